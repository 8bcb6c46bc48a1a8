"""Files on servers and hubs, read in ranges. A network that fails is asked again; a file that changes is refused.

http and https are read by the standard library, any other protocol (`hf`, `s3`, …) by fsspec.
"""

import http.client
import io
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from xdpo.data.columns import DataError
from xdpo.files import reading

ATTEMPTS = 7  # in a row without a byte
FIRST_WAIT = 1.0  # seconds before the second attempt; twice as many before each further one
LONGEST_WAIT = 120.0  # seconds
SILENCE = 60.0  # seconds without a byte, after which a connection counts as lost
PIECE = 2**16
FETCHED_AT_ONCE = 16 * 2**20
VERSIONS = ("blob_id", "ETag", "mtime", "created")  # what fsspec's protocols call it
PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers of a server that may be another one later


class RemoteError(DataError):
    """A file that could not be read, now or at all. The message names it and says why."""


def is_remote(path: str) -> bool:
    return "://" in path


@dataclass(frozen=True)
class State:
    """What tells a file from its later versions."""

    size: int
    version: str  # its ETag, checksum or date; empty where the server tells none


class Remote:
    """A file at a URL. expected: its state when it was first read; a file in another state is refused."""

    def __init__(self, url: str, expected: State | None = None):
        self.url = url
        self._state = expected

    @property
    def state(self) -> State:
        if self._state is None:
            self.read(0, 1)
        assert self._state is not None
        return self._state

    def read(self, start: int, stop: int) -> bytes:
        """Bytes from `start` to before `stop`. Raises RemoteError when several attempts in a row bring nothing."""
        content, failures = bytearray(), 0
        while len(content) < stop - start:
            before, wait = len(content), 0.0
            try:
                for piece in self._pieces(start + len(content), stop):
                    content += piece
                reason = "the connection ended early"
            except urllib.error.HTTPError as error:
                reason = f"the server answers {error.code} {error.reason}"
                if error.code not in PASSING:
                    raise RemoteError(f"{self.url}: {reason}") from None
                wait = _asked_to_wait(error.headers)
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            if len(content) < stop - start:
                failures = 1 if len(content) > before else failures + 1
                if failures >= ATTEMPTS:
                    raise RemoteError(f"{self.url}: {reason}, {failures} times in a row") from None
                time.sleep(min(max(wait, FIRST_WAIT * 2 ** (failures - 1)), LONGEST_WAIT))
        return bytes(content)

    def fetch(self, file: IO[bytes]) -> None:
        """Write all of it into a file. Raises RemoteError."""
        if (cached := self._in_the_hubs_cache) is not None:
            with reading(cached), cached.open("rb") as found:
                shutil.copyfileobj(found, file)
            return
        for start in range(0, self.state.size, FETCHED_AT_ONCE):
            file.write(self.read(start, min(start + FETCHED_AT_ONCE, self.state.size)))

    def _pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """One request's bytes as they come."""
        if not self.url.startswith(("http://", "https://")):
            yield self._by_fsspec(start, stop)
            return
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=SILENCE) as answer:
            if answer.status != 206:
                raise RemoteError(
                    f"{self.url}: the server does not serve parts of files (Range); download the files, and name them"
                )
            size = answer.headers["Content-Range"].rpartition("/")[2]
            version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            self._check(State(int(size), version))
            missing = min(stop, int(size)) - start
            while missing > 0 and (piece := answer.read1(min(PIECE, missing))):
                missing -= len(piece)
                yield piece

    def _by_fsspec(self, start: int, stop: int) -> bytes:
        system, path = self._fsspec
        try:
            if self._state is None or start == 0:
                facts = system.info(path)
                version = next((str(facts[name]) for name in VERSIONS if facts.get(name)), "")
                self._check(State(facts["size"], version))
            return system.cat_file(path, start=start, end=stop, cache_type="none")  # reads no more than is asked for
        except RemoteError:
            raise
        except Exception as error:  # each protocol's library has its own
            status = getattr(getattr(error, "response", None), "status_code", None)
            if isinstance(error, FileNotFoundError | PermissionError) or (status and status not in PASSING):
                raise RemoteError(f"{self.url}: {error}") from error
            raise OSError(f"{type(error).__name__}: {error}") from error

    @property
    def _in_the_hubs_cache(self) -> Path | None:
        """The file, where the hub's own cache has it from an earlier download."""
        match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)@([^/]+)/(.+)", self.url)
        if match is None:
            return None
        from huggingface_hub import try_to_load_from_cache

        name, revision, file = match.groups()
        found = try_to_load_from_cache(name, file, revision=revision, repo_type="dataset")
        is_whole = isinstance(found, str) and Path(found).stat().st_size == self.state.size
        return Path(str(found)) if is_whole else None

    @cached_property
    def _fsspec(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        return url_to_fs(self.url)

    def _check(self, state: State) -> None:
        if self._state is not None and state != self._state:
            raise RemoteError(
                f"{self.url} is another file than when this cache was begun ({state.size:,} bytes, version "
                f"{state.version or 'unknown'}; before {self._state.size:,}, {self._state.version or 'unknown'}). Put "
                "the first one back, or remove the cache's folder, and it is made from the new one"
            )
        self._state = state


def _asked_to_wait(headers: Message) -> float:
    """Seconds that a server asks for (Retry-After); dates, which few send, are left out."""
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0


class RemoteFile(io.RawIOBase):
    """A remote file as pyarrow reads it: only the ranges that are asked for."""

    def __init__(self, remote: Remote):
        self._remote, self._place = remote, 0

    def size(self) -> int:
        return self._remote.state.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size()}[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        stop = self.size() if size < 0 else min(self._place + size, self.size())
        content = self._remote.read(self._place, stop) if stop > self._place else b""
        self._place += len(content)
        return content
