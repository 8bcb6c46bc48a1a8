"""Files are written whole or not at all, beside any number of other writers; what storage does is said in words."""

import errno
import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
from conftest import failing

from xdpo import files
from xdpo.files import StorageError, check_writable, reading, replacing, replacing_folder, sweep, write_text, writing

WORDS = {
    errno.ENOSPC: "the disk is full .* make room",
    errno.EDQUOT: "the disk is full .* make room",
    errno.EMFILE: "too many files are open .* the file itself is fine. Raise the limit",
    errno.EIO: r".*input/output error \(EIO\)",
    errno.ESTALE: "the network storage does not answer",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "there is no permission",
}


@pytest.mark.parametrize("number", WORDS)
def test_what_storage_does_is_called_by_its_name(tmp_path, number):
    for meet, did in ((reading, "read"), (writing, "write")):
        words = f"could not {did} {tmp_path}/file: {WORDS[number]}"
        with pytest.raises(StorageError, match=words), meet(tmp_path / "file"):
            failing(number)()


def test_a_missing_file_is_for_the_reader_to_judge(tmp_path):
    with pytest.raises(FileNotFoundError), reading(tmp_path / "file"):
        (tmp_path / "file").read_text()


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as one, replacing(path) as other:
        one.write("one")
        other.write("other")
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["file"]


def test_many_writers_at_once_leave_one_whole_file(tmp_path):
    failed, at_once = [], threading.Barrier(4)

    def write(number):
        try:
            for _ in range(20):
                at_once.wait()
                write_text(tmp_path / "file", str(number) * 1000)
        except Exception as error:
            failed.append(error)
            at_once.abort()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert (tmp_path / "file").read_text() in {str(number) * 1000 for number in range(4)}
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("function", ["os.fsync", "os.replace"])
def test_what_was_there_stays_when_writing_fails(tmp_path, monkeypatch, function):
    write_text(tmp_path / "file", "before")
    monkeypatch.setattr(function, failing(errno.EIO))
    with pytest.raises(StorageError, match="could not write"):
        write_text(tmp_path / "file", "after")
    assert (tmp_path / "file").read_text() == "before" and os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_nothing_aside(tmp_path, full_disk):
    with pytest.raises(StorageError, match=f"could not write {tmp_path}/file: the disk is full"):
        write_text(tmp_path / "file", "text")
    assert os.listdir(tmp_path) == []


def test_small_files_are_replaced_whole(tmp_path):
    for text in ("one", "two"):
        write_text(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "two" and len(list(tmp_path.iterdir())) == 1


def test_an_error_while_writing_leaves_nothing_behind_and_names_what_is_intact(tmp_path):
    with (
        pytest.raises(StorageError, match="what was saved before is intact"),
        replacing_folder(tmp_path / "x") as aside,
    ):
        (aside / "file").write_text("half")
        raise OSError(5, "Input/output error")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_device_is_told_apart_from_other_errors(tmp_path):
    with pytest.raises(StorageError, match="the disk is full"), replacing_folder(tmp_path / "x") as aside:
        (aside / "file").symlink_to("/dev/full")
        with (aside / "file").open("w") as file:
            file.write("x" * 100_000)


def test_a_folder_takes_the_place_of_the_one_that_was_there(tmp_path):
    for name in ("one", "two"):
        with replacing_folder(tmp_path / "x") as aside:
            (aside / name).write_text(name)
    assert os.listdir(tmp_path) == ["x"] and os.listdir(tmp_path / "x") == ["two"]


@pytest.mark.parametrize("failing_rename", [1, 2])
def test_a_folder_stays_when_it_cannot_be_replaced(tmp_path, monkeypatch, failing_rename):
    with replacing_folder(tmp_path / "x") as aside:
        (aside / "file").write_text("before")
    replace, calls = os.replace, []

    def failing_once(source, target):
        calls.append(target)
        if len(calls) == failing_rename:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr("os.replace", failing_once)
    with (
        pytest.raises(StorageError, match="what was saved before is intact"),
        replacing_folder(tmp_path / "x") as aside,
    ):
        (aside / "file").write_text("after")
    assert (tmp_path / "x" / "file").read_text() == "before" and os.listdir(tmp_path) == ["x"]


def test_what_killed_writers_left_is_swept_and_what_others_write_now_is_not(tmp_path):
    old, new, foreign = (tmp_path / name for name in ("a[1].txt.0.part", "a[1].txt.1.part", "a1.txt.2.part"))
    for path in (old, new, foreign):
        path.write_text("half")
    for path in (old, foreign):
        os.utime(path, (time.time() - 2 * files.STALE_SECONDS,) * 2)
    write_text(tmp_path / "a[1].txt", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted(["a[1].txt", new.name, foreign.name])


def test_what_cannot_be_swept_stays_and_hinders_nobody(tmp_path, monkeypatch):
    (tmp_path / "file.0.part").write_text("another user's")
    monkeypatch.setattr("os.unlink", failing(errno.EPERM))
    sweep(tmp_path, "*.part")
    assert os.listdir(tmp_path) == ["file.0.part"]


def test_an_output_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "results", "--output")
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(StorageError, match=r"--output: .*file is a file"):
        check_writable(tmp_path / "file" / "results", "--output")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(StorageError, match="--output: no permission to write"):
        check_writable(tmp_path / "results", "--output")


def test_a_lock_on_a_full_disk_is_refused_in_words_and_binds_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / files.LOCK).symlink_to("/dev/full")
    with pytest.raises(files.StorageError, match="the disk is full"), files.only_writer(tmp_path / "run", "a training"):
        pytest.fail("went on without a lock")
    assert files.is_untouched(tmp_path / "run")


def test_a_checksum_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    path, read = tmp_path / "weights", []
    path.write_bytes(b"one")
    monkeypatch.setattr(files, "file_sha256", lambda of: read.append(of) or hashlib.sha256(of.read_bytes()).hexdigest())
    assert files.kept_sha256(path) == files.kept_sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert read == [path]
    path.write_bytes(b"longer")
    assert files.kept_sha256(path) == hashlib.sha256(b"longer").hexdigest()
