"""The study over HTTP: who gets what, and that an acknowledged vote outlives any kill of the server."""

import hashlib
import http.client
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from test_study import COLOURS, make_images, many_prompts

from xdpo.study import server
from xdpo.study.build import StudyPlan, build_study
from xdpo.study.folder import Links
from xdpo.study.votes import VoteStore

ROOT = Path(__file__).resolve().parent.parent
LEFT = {"preference": "left", "alignment": "left"}


class Serving:
    """scripts/user_study.py serve in a process of its own, on a port that stays the same after a restart."""

    def __init__(self, folder, port=0):
        self.folder, self.port, self.process = folder, port, None
        self.start()

    def start(self):
        command = [sys.executable, "scripts/user_study.py", "serve", str(self.folder), "--port", str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if line.startswith("administrator"):
                self.port = urlsplit(line.split()[1]).port
                return
        raise AssertionError(self.process.stderr.read())

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def request(self, path, body=None, source="127.0.0.1", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30, source_address=(source, 0))
        try:
            content = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, content, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def json(self, path, body=None):
        status, _, content = self.request(path, body)
        return status, json.loads(content)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return [make_images(root / name, name, many_prompts(6), side=4) for name in COLOURS]


@pytest.fixture(scope="module")
def study(tmp_path_factory, folders):
    plan = StudyPlan({"set_a": 2}, 0, 2, 2, 0, 0, None)
    return build_study(tmp_path_factory.mktemp("study") / "study", folders[0], folders[1:], plan)


@pytest.fixture(scope="module")
def serving(study):
    running = Serving(study.folder)
    yield running
    running.kill()


@pytest.fixture
def links(study, serving):
    links = Links.load(study.folder)
    return links.administrator, [f"/a/{token}" for token in links.annotators]


def test_an_annotator_votes_undoes_and_finishes(serving, links, study):
    _, (first, second) = links
    status, state = serving.json(f"{first}/state")
    assert status == 200 and (state["done"], state["total"], state["can_undo"]) == (0, 4, False)
    assert state["task"]["number"] == 1 and len(state["preload"]) == 6
    assert state["questions"][0]["text"].startswith("Given the same prompt")
    task = state["task"]["task"]

    status, after = serving.json(f"{first}/vote", {"task": task, "answers": LEFT, "seconds": 2.5})
    assert status == 200 and after["done"] == 1 and after["task"]["task"] != task
    assert serving.json(f"{first}/vote", {"task": task, "answers": LEFT, "seconds": 9}) == (200, after)
    status, error = serving.json(f"{first}/vote", {"task": task, "answers": LEFT | {"alignment": "right"}})
    assert status == 409 and "already answered otherwise" in error["error"]

    status, undone = serving.json(f"{first}/undo", {})
    assert status == 200 and undone["task"]["task"] == task and undone["previous"] == LEFT and undone["done"] == 0
    assert serving.json(f"{first}/undo", {}) == (409, {"error": "there is nothing to undo"})
    for _ in range(4):
        _, state = serving.json(f"{first}/state")
        serving.json(f"{first}/vote", {"task": state["task"]["task"], "answers": LEFT})
    _, state = serving.json(f"{first}/state")
    assert state["task"] is None and state["done"] == state["total"] == 4
    assert serving.json(f"{second}/state")[1]["done"] == 0


def test_images_are_the_annotators_own_without_a_trace_of_their_making(serving, links, study):
    _, (first, second) = links
    task = study.tasks[1][0]
    status, headers, content = serving.request(f"{second}/image/{task.task}/left")
    assert status == 200 and content == (study.folder / "images" / f"{task.left}.png").read_bytes()
    assert "last-modified" not in {name.lower() for name in headers} and headers["cache-control"].startswith("private")
    assert serving.request(f"{second}/image/{task.task}/left", **{"If-None-Match": headers["etag"]})[0] == 304
    # All that comes with an image follows from its pixels, or is the same for all.
    told = set(headers) - {name.lower() for name in server.HEADERS}
    assert told == {"date", "content-length", "content-type", "cache-control", "etag"}
    assert headers["etag"] == f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    assert serving.request(f"{first}/image/{task.task}/left")[0] == 404
    assert serving.request(f"{second}/image/{task.task}/middle")[0] == 404


def test_nobody_votes_for_another_and_what_is_no_vote_is_refused_in_words(serving, links, study):
    _, (first, second) = links
    task = study.tasks[1][0].task
    status, error = serving.json(f"{first}/vote", {"task": task, "answers": LEFT})
    assert status == 409 and "not among yours" in error["error"]
    for body in ([], {"task": task}, {"task": task, "answers": {"preference": "left"}}, {"task": 3, "answers": "left"}):
        status, error = serving.json(f"{second}/vote", body)
        assert status in (409, 422) and error["error"]
    assert serving.json(f"{second}/vote", {"task": task, "answers": LEFT | {"preference": "both"}})[0] == 422
    assert serving.json(f"{second}/vote", {"task": "x" * 20_000, "answers": LEFT})[0] == 422
    assert serving.json(f"{second}/state")[1]["done"] == 0


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/static/../folder.py",
        "/static/%2e%2e/folder.py",
        "/static/..%2f..%2fserver.py",
        "/static/page.html",
        "/a/",
        "/a/wrong",
        "/a/wrong/state",
        "/admin/wrong/state",
        "/key.json",
    ],
)
def test_every_other_path_and_every_wrong_token_gets_the_same_nothing(serving, path):
    status, headers, content = serving.request(path)
    assert status == 404 and json.loads(content) == {"error": "not found"}
    assert "server" not in headers and headers["referrer-policy"] == "no-referrer"


def test_a_person_with_a_wrong_link_reads_what_to_do(serving):
    pages = {serving.request(path, Accept="text/html,*/*")[::2] for path in ("/", "/a/wrong", "/key.json")}
    ((status, content),) = pages
    assert status == 404 and b"This link is not known" in content


def test_an_annotators_link_opens_no_administration_and_path_tricks_no_file(serving, links):
    administrator, (first, _) = links
    token = first.removeprefix("/a/")
    assert serving.request(f"/admin/{token}")[0] == 404 and serving.request(f"/a/{administrator}")[0] == 404
    assert serving.request(f"{first}/image/..%2f..%2fkey.json/left")[0] == 404
    assert serving.request(f"{first}/image/../../key.json")[0] == 404


def test_all_that_is_served_is_free_of_the_models_names(serving, links, study):
    administrator, annotators = links
    paths = [f"/static/{name}" for name in server.STATIC] + [f"/admin/{administrator}", f"/admin/{administrator}/state"]
    for annotator, tasks in zip(annotators, study.tasks, strict=True):
        paths += [annotator, f"{annotator}/state"]
        paths += [f"{annotator}/image/{task.task}/{side}" for task in tasks for side in ("left", "right")]
    told = re.compile("|".join([*COLOURS, "set_a", "baseline", "made by"]).encode())
    for path in paths:
        status, headers, content = serving.request(path)
        assert status == 200 and not told.search(content), path
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert not told.search(repr(headers).encode())


def test_the_administrator_sees_how_far_everyone_is(serving, links):
    administrator, (first, _) = links
    status, state = serving.json(f"/admin/{administrator}/state")
    assert status == 200 and state["items"] == 4 and state["votes_wanted"] == 8
    assert [row["total"] for row in state["annotators"]] == [4, 4]
    assert state["annotators"][0]["link"] == first
    assert state["votes"] == sum(row["done"] for row in state["annotators"])


def test_wrong_tokens_are_answered_ever_more_slowly_and_forgotten_in_time():
    now = [0.0]
    guesses = server.Guesses(clock=lambda: now[0])
    delays = [guesses.delay_seconds("10.0.0.1") for _ in range(20)]
    assert delays[:5] == [0.0] * 5 and delays[5:8] == [0.25, 0.5, 1.0] and max(delays) == 8.0 == delays[-1]
    assert guesses.delay_seconds("10.0.0.2") == 0.0
    now[0] = 601.0
    assert guesses.delay_seconds("10.0.0.1") == 0.0


def test_guesses_at_a_link_are_slowed_and_the_right_link_is_not(serving, links):
    _, (first, _) = links

    def seconds(path):
        begin = time.monotonic()
        status, _, _ = serving.request(path, source="127.0.0.9")
        return status, time.monotonic() - begin

    guessed = [seconds(f"/{kind}/{guess}/state") for guess in range(4) for kind in ("a", "admin")]
    assert {status for status, _ in guessed} == {404}
    assert [taken > least for (_, taken), least in zip(guessed[5:], (0.25, 0.5, 1.0), strict=True)] == [True] * 3
    status, taken = seconds(f"{first}/state")
    assert status == 200 and taken < 1.0
    begin = time.monotonic()
    serving.request("/a/wrong", source="127.0.0.10")
    assert time.monotonic() - begin < 1.0  # another address


def test_a_full_disk_is_said_in_words_and_voting_goes_on_when_there_is_room(tmp_path, folders):
    plan = StudyPlan(None, 0, 1, 1, 0, 0, None)
    study = build_study(tmp_path / "study", folders[0], folders[1:], plan)
    running, link = Serving(study.folder), f"/a/{Links.load(study.folder).annotators[0]}/vote"
    try:
        bodies = [{"task": task.task, "answers": LEFT} for task in study.tasks[0][:3]]
        assert running.json(link, bodies[0])[0] == 200
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        for body in bodies[1:]:
            status, error = running.json(link, body)
            assert status == 503 and "votes can't be read or written" in error["error"]
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        assert [running.json(link, body)[0] for body in bodies] == [200, 200, 200]
    finally:
        running.kill()
    assert [vote.task for vote in VoteStore(study).all()] == [body["task"] for body in bodies]


def test_a_folder_without_a_study_and_a_taken_port_are_refused_in_words(tmp_path, serving, study):
    for arguments, message in (
        ([str(tmp_path)], "no study in"),
        ([str(study.folder), "--port", str(serving.port)], "choose another --host or --port"),
    ):
        command = [sys.executable, "scripts/user_study.py", "serve", *arguments]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1 and message in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.slow
def test_every_acknowledged_vote_of_200_annotators_outlives_kills_of_the_server(tmp_path, folders):
    """All vote at once; the server is killed three times meanwhile. A vote without an answer is sent again."""
    plan = StudyPlan(None, 0, 100, 200, 0, 0, None)
    study = build_study(tmp_path / "study", folders[0], folders[1:2], plan)
    links, running = Links.load(study.folder), Serving(study.folder)
    acknowledged: dict[str, dict] = {}
    failures, lock = [], threading.Lock()

    def annotate(number):
        for place, task in enumerate(study.tasks[number - 1]):
            answers = {"preference": ("left", "right")[(number + place) % 2], "alignment": "right"}
            body = {"task": task.task, "answers": answers, "seconds": 1.0}
            end = time.monotonic() + 90
            while True:
                try:
                    status, _, content = running.request(f"/a/{links.annotators[number - 1]}/vote", body)
                    if status == 200:
                        break
                    failures.append((status, content))
                    return
                except (OSError, http.client.HTTPException):
                    if time.monotonic() > end:
                        failures.append("no answer for 90 seconds")
                        return
                    time.sleep(0.05)
            with lock:
                acknowledged[task.task] = answers

    try:
        threads = [threading.Thread(target=annotate, args=[number]) for number in range(1, 201)]
        for thread in threads:
            thread.start()
        for kill in range(1, 4):
            while len(acknowledged) < kill * 120 and any(thread.is_alive() for thread in threads):
                time.sleep(0.01)
            running.kill()
            running.start()
        for thread in threads:
            thread.join()
    finally:
        running.kill()
    assert failures == []
    votes = VoteStore(study).all()
    assert len(acknowledged) == sum(map(len, study.tasks)) == 600
    assert len(votes) == len({vote.task for vote in votes}) == 600  # each exactly once
    assert {vote.task: dict(vote.answers) for vote in votes} == acknowledged
    assert all(study.owner_of[vote.task][0] == vote.annotator for vote in votes)


def test_ending_the_server_as_a_person_does_leaves_no_error(study):
    running = Serving(study.folder)
    assert running.request("/static/page.css")[0] == 200  # from here on the server itself handles signals
    running.process.send_signal(signal.SIGINT)
    _, errors = running.process.communicate(timeout=30)
    assert "Traceback" not in errors and os.path.exists(study.folder / "votes.sqlite")
