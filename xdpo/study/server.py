"""The study as a small web application: a page for each secret link, which takes the votes of its annotator.

Every unknown path and every wrong token gets the same 404, a page for a person's browser. Wrong tokens from one address
are answered more and more slowly.
"""

import asyncio
import hashlib
import json
import logging
import secrets
import socket
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from xdpo.study.folder import Key, Links, Study, StudyError
from xdpo.study.form import SIDES
from xdpo.study.votes import ConflictError, Vote, VoteStore, as_display, as_seconds, now

PAGES = Path(__file__).parent / "pages"
STATIC = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "backends.js": "text/javascript",
    "admin.css": "text/css",
    "admin.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",  # a link is a secret
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
}
PRELOADED_TASKS = 3
MAX_BODY_BYTES = 10_000
FREE_GUESSES, LONGEST_DELAY_SECONDS, FORGOTTEN_SECONDS, ADDRESSES = 5, 8.0, 600.0, 10_000


class Guesses:
    """Counts the wrong tokens that an address tried lately, and delays the next answer accordingly."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self._tried: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def delay_seconds(self, address: str) -> float:
        """Count a wrong token. Returns the seconds to wait before answering: 0 for a few errors, then doubling."""
        count, last = self._tried.pop(address, (0, self.clock()))
        count = 1 if self.clock() - last > FORGOTTEN_SECONDS else count + 1
        self._tried[address] = (count, self.clock())
        if len(self._tried) > ADDRESSES:
            self._tried.popitem(last=False)
        beyond = count - FREE_GUESSES
        return 0.0 if beyond <= 0 else min(0.25 * 2 ** min(beyond - 1, 10), LONGEST_DELAY_SECONDS)


class Ballots:
    """What an annotator is shown, and how answers are kept; independent of the web framework."""

    def __init__(self, study: Study):
        self.study, self.store, self.links = study, VoteStore(study), Links.load(study.folder)

    def state(self, annotator: int, previous: dict[str, str] | None = None) -> dict[str, Any]:
        """The page's content; `left`, `right` and `preload` are (task, side), which the application turns into URLs."""
        tasks, voted = self.study.tasks[annotator - 1], set(self.store.tasks_of(annotator))
        open_tasks = [task for task in tasks if task.task not in voted]
        shown = None
        if open_tasks:
            shown = {
                "task": open_tasks[0].task,
                "number": len(voted) + 1,
                "prompt": self.study.prompts[open_tasks[0].item],
                **{side: (open_tasks[0].task, side) for side in SIDES},
            }
        return {
            "title": self.study.title,
            "questions": [{"id": question["id"], "text": question["text"]} for question in self.study.form.questions],
            "tie": self.study.form.tie,
            "introduction": None if self._may_vote(annotator) else self.study.introduction,
            "done": len(voted),
            "total": len(tasks),
            "can_undo": bool(voted),
            "task": shown,
            "preload": [(task.task, side) for task in open_tasks[1 : 1 + PRELOADED_TASKS] for side in SIDES],
            **({"previous": previous} if previous is not None else {}),
            **({} if open_tasks else {"code": self.links.code_of(annotator), "link": self.study.form.completion_link}),
        }

    def begin(self, annotator: int) -> dict[str, Any]:
        """Keep that an annotator has read the first page and agrees to it."""
        self.store.agree(annotator, now())
        return self.state(annotator)

    def _may_vote(self, annotator: int) -> bool:
        return self.study.form.introduction is None or self.store.has_agreed(annotator)

    def vote(self, annotator: int, ballot: Any) -> dict[str, Any]:
        """Keep a vote. Raises ConflictError for a task that isn't the annotator's, StudyError for an invalid vote."""
        if not isinstance(ballot, dict):
            raise StudyError("a vote is an object with task and answers")
        if not self._may_vote(annotator):
            raise StudyError("the study's first page comes before the first vote; reload this page to see it")
        task = ballot.get("task")
        answers = self.study.check_answers(ballot.get("answers"))
        if not isinstance(task, str) or self.study.owner_of.get(task, (None,))[0] != annotator:
            raise ConflictError("this task is not among yours; reload the page to go on")
        seconds, display = as_seconds(ballot.get("seconds")), as_display(ballot.get("display"))
        self.store.add(Vote(task, annotator, answers, seconds, now(), display))
        return self.state(annotator)

    def undo(self, annotator: int) -> dict[str, Any]:
        return self.state(annotator, self.store.withdraw_last(annotator))

    def image(self, annotator: int, task: str, side: str) -> bytes:
        """The PNG at a side of an annotator's task. Raises KeyError if there is none."""
        owner, found = self.study.owner_of[task]
        if owner != annotator or side not in SIDES:
            raise KeyError(task)
        return (self.study.folder / "images" / f"{getattr(found, side)}.png").read_bytes()

    def example(self, side: str) -> bytes:
        """The PNG at a side of the first page's example. Raises KeyError if there is none."""
        if self.study.form.introduction is None or side not in SIDES:
            raise KeyError(side)
        return (self.study.folder / "example" / f"{side}.png").read_bytes()

    def progress(self, key: Key, links: Links) -> dict[str, Any]:
        """The administrator's view: progress, no answers."""
        voted = {number: set(self.store.tasks_of(number)) for number in range(1, len(self.study.tasks) + 1)}
        seen, counts = self.store.last_seen(), dict.fromkeys(key.items, 0)
        for number, tasks in enumerate(self.study.tasks, start=1):
            for task in tasks:
                if task.task in voted[number] and task.task not in key.repeats:
                    counts[task.item] += 1
        pairs = [name for name, item in key.items.items() if item.kind == "pair"]
        return {
            "title": self.study.title,
            "items": len(pairs),
            "complete_items": sum(counts[name] >= self.study.votes_per_pair for name in pairs),
            "votes": sum(map(len, voted.values())),
            "votes_wanted": sum(map(len, self.study.tasks)),
            "annotators": [
                {
                    "number": number,
                    "done": len(voted[number]),
                    "total": len(tasks),
                    "link": f"/a/{links.annotators[number - 1]}",
                    "code": links.code_of(number),
                    "last_seen": seen.get(number),
                }
                for number, tasks in enumerate(self.study.tasks, start=1)
            ],
        }


def application(folder: Path) -> FastAPI:
    """The web application of a study. Raises StudyError for a folder without a study, or with a damaged one."""
    study = Study.load(folder)
    key, links, ballots, guesses = Key.load(study), Links.load(folder), Ballots(study), Guesses()
    number_of = {token: number for number, token in enumerate(links.annotators, start=1)}
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    async def not_found(request: Request) -> HTTPException:
        await asyncio.sleep(guesses.delay_seconds(request.client.host if request.client else ""))
        return HTTPException(404)

    async def annotator_of(request: Request, token: str) -> int:
        # compare_digest: the time of a comparison reveals nothing about the secret.
        for secret, number in number_of.items():
            if secrets.compare_digest(secret.encode(), token.encode()):
                return number
        raise await not_found(request)

    async def administrator(request: Request, token: str) -> None:
        if not secrets.compare_digest(links.administrator.encode(), token.encode()):
            raise await not_found(request)

    def page(name: str, media_type: str = "text/html") -> Response:
        return Response((PAGES / name).read_bytes(), media_type=media_type, headers={"Cache-Control": "no-cache"})

    def answered(state: dict[str, Any], token: str) -> JSONResponse:
        def url(task_and_side: tuple[str, str]) -> str:
            return f"/a/{token}/image/{'/'.join(task_and_side)}"

        if state["task"]:
            state["task"] |= {side: url(state["task"][side]) for side in SIDES}
        if state["introduction"]:
            state["introduction"]["example"] |= {side: f"/a/{token}/example/{side}" for side in SIDES}
        state["preload"] = [url(task_and_side) for task_and_side in state["preload"]]
        return JSONResponse(state, headers={"Cache-Control": "no-store"})

    async def body_of(request: Request) -> Any:
        content = b""
        async for piece in request.stream():
            content += piece
            if len(content) > MAX_BODY_BYTES:
                raise StudyError("this is too large for a vote")
        try:
            return json.loads(content or b"null")
        except (ValueError, RecursionError):
            raise StudyError("this is no JSON") from None

    @app.middleware("http")
    async def with_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(StudyError)
    async def in_words(request: Request, error: StudyError) -> JSONResponse:
        status = 409 if isinstance(error, ConflictError) else 422
        return JSONResponse({"error": str(error)}, status, headers={"Cache-Control": "no-store"})

    @app.exception_handler(sqlite3.Error)
    async def no_database(request: Request, error: sqlite3.Error) -> JSONResponse:
        # The disk is full or fails: nothing was acknowledged, and the page tries again until that is repaired.
        logging.getLogger("uvicorn.error").error("%s: %s", ballots.store.path, error)
        words = f"the votes can't be read or written: {error}; please tell the person who invited you"
        return JSONResponse({"error": words}, 503, headers={"Cache-Control": "no-store"})

    @app.exception_handler(HTTPException)
    @app.exception_handler(404)
    @app.exception_handler(405)
    async def nothing_here(request: Request, error: Exception) -> Response:
        headers = {"Cache-Control": "no-store"}
        if "text/html" in request.headers.get("accept", ""):  # a person's browser, not the page's script
            return Response((PAGES / "unknown.html").read_bytes(), 404, headers, "text/html")
        return JSONResponse({"error": "not found"}, 404, headers=headers)

    @app.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in STATIC:
            raise HTTPException(404)
        return page(name, STATIC[name])

    @app.get("/a/{token}")
    async def annotator_page(request: Request, token: str) -> Response:
        await annotator_of(request, token)
        return page("page.html")

    @app.get("/a/{token}/state")
    async def annotator_state(request: Request, token: str) -> Response:
        number = await annotator_of(request, token)
        return answered(await run_in_threadpool(ballots.state, number), token)

    @app.post("/a/{token}/vote")
    async def vote(request: Request, token: str) -> Response:
        number = await annotator_of(request, token)
        return answered(await run_in_threadpool(ballots.vote, number, await body_of(request)), token)

    @app.post("/a/{token}/undo")
    async def undo(request: Request, token: str) -> Response:
        number = await annotator_of(request, token)
        return answered(await run_in_threadpool(ballots.undo, number), token)

    @app.post("/a/{token}/begin")
    async def begin(request: Request, token: str) -> Response:
        number = await annotator_of(request, token)
        return answered(await run_in_threadpool(ballots.begin, number), token)

    @app.get("/a/{token}/image/{task}/{side}")
    async def image(request: Request, token: str, task: str, side: str) -> Response:
        number = await annotator_of(request, token)
        return await picture(request, ballots.image, number, task, side)

    @app.get("/a/{token}/example/{side}")
    async def example(request: Request, token: str, side: str) -> Response:
        await annotator_of(request, token)
        return await picture(request, ballots.example, side)

    async def picture(request: Request, read: Callable[..., bytes], *which: Any) -> Response:
        try:
            content = await run_in_threadpool(read, *which)
        except KeyError:
            raise HTTPException(404) from None
        # No Last-Modified: the order in which images were written could reveal their models.
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        headers = {"Cache-Control": "private, max-age=86400", "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type="image/png", headers=headers)

    @app.get("/admin/{token}")
    async def admin_page(request: Request, token: str) -> Response:
        await administrator(request, token)
        return page("admin.html")

    @app.get("/admin/{token}/state")
    async def admin_state(request: Request, token: str) -> Response:
        await administrator(request, token)
        progress = await run_in_threadpool(ballots.progress, key, links)
        return JSONResponse(progress, headers={"Cache-Control": "no-store"})

    return app


def serve(folder: Path, host: str, port: int, started: Callable[[str], None] | None = None) -> None:
    """Serve a study until stopped. `started` is called with the address once the server listens. Raises StudyError.

    If the server listens on all of the machine's addresses, `started` gets one with the machine's name.
    """
    import uvicorn

    config = uvicorn.Config(application(folder), log_level="warning", server_header=False)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise StudyError(f"can't listen on {host} port {port}: {why}; choose another --host or --port") from None
    if started:
        name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        started(f"http://{name}:{listening.getsockname()[1]}")
    uvicorn.Server(config).run(sockets=[listening])
