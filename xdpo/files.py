"""Write files whole or not at all, on disks that may fill up, become read-only, be remote, or lose the process.

Everything is written aside, flushed to the disk and renamed, so that a reader sees the old file or the new one. A file
written aside has a name that ends in `.part` and is unique across machines; a later writer removes stale ones.
"""

import errno
import fcntl
import functools
import glob
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

PART = ".part"
LOCK = "lock"
LISTING_SECONDS = 30.0  # how long network storage may keep an old listing of a folder
STALE_SECONDS = 24 * 3600  # a file written aside that is older belongs to a process that is gone

STORAGE_ERRORS = frozenset(  # of reading, which say nothing about the file
    {
        *(errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ETIMEDOUT),
        *(errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    }
)


class StorageError(ValueError):
    """The storage failed, not the data. The message names the path, what happened, and what to do."""


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn an OSError in a block that reads `path` into a StorageError; FileNotFoundError is left as it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"could not read {path}: {storage_fault(error, Path(path))}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError in a block that writes `path` into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"could not write {path}: {storage_fault(error, path)}") from error


@contextmanager
def replacing(path: Path, mode: str = "w", *, sweeps: bool = True) -> Iterator[IO]:
    """Open a file that is written aside and replaces `path` once all of it is on the disk.

    sweeps: look through the folder for what killed processes left aside of this file; not where the folder was swept
    before and gets thousands of files, each of which would list all the others. Raises StorageError where it can't be
    written; what was there before is then intact.
    """
    aside = aside_of(path)
    try:
        with writing(path):
            if sweeps:
                sweep(path.parent, f"{glob.escape(path.name)}.*{PART}", older_than=STALE_SECONDS)
            with aside.open(mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            flush(path.parent)
    finally:
        _discard(aside)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Make a folder that is written aside and replaces `path` once all of it is on the disk.

    Raises StorageError where it can't be written; what was there before is then intact.
    """
    aside, old = aside_of(path), aside_of(path)
    try:
        sweep(path.parent, f"{glob.escape(path.name)}.*{PART}", older_than=STALE_SECONDS)
        aside.mkdir(parents=True)
        yield aside
        _give_usual_modes(aside)
        _flush_all(aside)
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        cause = system_error(error)
        fault = str(error) if cause is None else storage_fault(cause, path)
        raise StorageError(f"could not write {path}: {fault}; what was saved before is intact") from error
    finally:
        _discard(aside)
        if path.exists():
            _discard(old)
        elif old.exists():  # nothing took its place
            with writing(path):
                os.replace(old, path)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one. Raises StorageError."""
    with replacing(path) as file:
        file.write(text)


@contextmanager
def only_run(folders: Iterable[Path], work: str, *, is_main: bool) -> Iterator[None]:
    """Hold the locks of all folders that a run writes into. The run's first process holds them for all processes."""
    with ExitStack() as locks:
        for folder in folders if is_main else ():
            locks.enter_context(only_writer(folder, work))
        yield


@contextmanager
def only_writer(folder: Path, work: str) -> Iterator[None]:
    """Hold a folder's lock while writing into it. The system releases it when the process ends, for whatever reason.

    work: what is done there, for the message to a second writer. The lock is the system's lock on the file `lock`.
    Network file systems share it between machines if they support locks; where they don't, nothing is refused.
    Raises StorageError naming the process that has it.
    """
    path = folder / LOCK
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+", buffering=0)
    with file:
        if _is_locked_by_another(file):
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            raise StorageError(f"{folder} is in use: {holder}. Wait for it, stop it, or name another folder")
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        with writing(path):
            if path.stat().st_size:
                file.truncate(0)
            file.write(f"{work}, process {os.getpid()} on {socket.gethostname()} since {started}\n".encode())
        yield


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock of this name, after waiting for the process that has it. It excludes no threads."""
    with writing(path):
        file = path.open("ab")
    with file:
        with suppress(OSError):  # a file system without locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _is_locked_by_another(file: IO) -> bool:
    """Take a file's lock. Returns True if another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)  # others: a file system without locks
    return False


def appears(path: Path) -> bool:
    """Whether a file exists, or appears within LISTING_SECONDS: network storage may show it late."""
    deadline = time.monotonic() + LISTING_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        os.listdir(path.parent if path.parent.is_dir() else ".")  # has a network file system look again
        time.sleep(0.5)
    return True


def is_untouched(folder: Path) -> bool:
    """Whether a folder is absent, or holds only what a failed start leaves: its lock and files written aside."""
    return not folder.exists() or all(is_own(path) for path in folder.iterdir())


def is_own(path: Path) -> bool:
    """Whether this module made the file (a lock, or a file written aside), not the folder's user."""
    return path.suffix == PART or path.name == LOCK


def aside_of(path: Path) -> Path:
    """A name beside `path` that no other process uses, on this machine or another."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{PART}")


def sweep(folder: Path, pattern: str, *, older_than: float = 0.0) -> None:
    """Remove what killed processes left aside: files and folders that match and are at least this many seconds old."""
    for path in folder.glob(pattern):
        with suppress(OSError):  # another process swept it, or it is another user's
            if time.time() - path.stat().st_mtime >= older_than:
                _discard(path)


def flush(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def _give_usual_modes(folder: Path) -> None:
    """Give files the usual modes of the umask: safetensors writes files that only their owner may read."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(folder.stat().st_mode & 0o666)


def check_writable(folder: Path, setting: str) -> None:
    """Raise StorageError if `folder`, the value of `setting`, can't be made or written to. Writes nothing."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise StorageError(f"{setting}: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(
            f"{setting}: no permission to write in {existing}, or its storage is read-only; choose another folder"
        )


def lfs_pointer(start: bytes) -> str | None:
    """What to say of a file that begins so, where it is Git LFS's pointer to the file that is meant; else None."""
    if start.startswith(b"version https://git-lfs"):
        return "it is Git LFS's pointer to the file and not the file; run git lfs pull in that folder"
    return None


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kept_sha256(path: Path) -> str:
    """The same, kept as long as size and modification time stay: for weights, whose bytes take a minute to read."""
    status = path.stat()
    return _kept_sha256(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _kept_sha256(path: Path, size: int, modified_ns: int) -> str:
    return file_sha256(path)


def system_error(error: Exception) -> OSError | None:
    """The storage's error behind an exception; None if a file is missing or its content is at fault.

    safetensors reports a system error only as text ("… Os { code: 28, …").
    """
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return error
    code = re.search(r"os error (\d+)|code: (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    return OSError(int(code[1] or code[2]), os.strerror(int(code[1] or code[2]))) if code else None


def storage_fault(error: OSError, path: Path) -> str:
    """What an OSError on `path` means and what to do about it, as the end of a sentence."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
            free = shutil.disk_usage(existing).free / 1e9
            return f"the disk is full ({free:.2f} GB free there); make room and run the same command again"
        case errno.EMFILE | errno.ENFILE:
            return (
                f"too many files are open ({error.strerror}); the file itself is fine. Raise the limit (ulimit -n "
                "65536) and run the same command again"
            )
        case errno.EIO:
            return (
                "the disk or the network storage reports an input/output error (EIO), which may pass; look at the "
                "system's log, and run the same command again"
            )
        case errno.ESTALE | errno.ETIMEDOUT | errno.ENOTCONN | errno.EHOSTDOWN | errno.EHOSTUNREACH:
            return f"the network storage does not answer ({error.strerror}); run the same command again when it does"
        case errno.EROFS:
            return "the file system is read-only; name a folder that can be written to"
        case errno.EACCES | errno.EPERM:
            return "there is no permission; change it, or name another folder"
        case errno.ENOENT:
            return "the folder does not exist (any more)"
    return f"{error}; check that the folder is there and open to this user"


def _discard(path: Path) -> None:
    """Remove a file or folder if possible; what remains is swept later."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
