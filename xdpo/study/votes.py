"""The votes in SQLite: once `add` has returned, a vote is on the disk, once, whatever happens to the process."""

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from xdpo.study.folder import Study, StudyError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS study (id TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS votes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order in which they came
    task TEXT NOT NULL UNIQUE,                 -- nobody votes twice
    annotator INTEGER NOT NULL,
    answers TEXT NOT NULL,
    seconds REAL,
    at TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS by_annotator ON votes (annotator, number);
"""


class ConflictError(StudyError):
    """A vote contradicts an earlier one."""


@dataclass(frozen=True)
class Vote:
    """One annotator's answers to one task. answers: question → "left" or "right". seconds: its time, if known."""

    task: str
    annotator: int
    answers: Mapping[str, str]
    seconds: float | None
    at: str  # ISO 8601, UTC


class VoteStore:
    """The votes of one study; any number of threads and processes may use it at once."""

    def __init__(self, study: Study):
        """Raises StudyError for a database that is damaged or belongs to another study."""
        self.study, self.path = study, study.folder / "votes.sqlite"
        self._local = threading.local()
        try:
            connection = self._connection()
            if (result := connection.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(result)
            connection.executescript(_SCHEMA)
            with self._writing() as cursor:
                cursor.execute(
                    "INSERT OR IGNORE INTO study SELECT ? WHERE NOT EXISTS (SELECT 1 FROM study)", [study.id]
                )
            [(study_id,)] = connection.execute("SELECT id FROM study")
        except sqlite3.OperationalError as error:
            raise StudyError(f"{self.path}: {error}; check that the folder is writable and has room") from None
        except (sqlite3.DatabaseError, ValueError) as error:
            raise StudyError(
                f"{self.path} is damaged: {error}. Nothing was changed; copy it away and save what is in it with "
                f"`sqlite3 {self.path.name} .recover`, or take it from a backup"
            ) from None
        if study_id != study.id:
            raise StudyError(f"{self.path} holds the votes of another study ({study_id}, not {study.id})")

    def add(self, *votes: Vote) -> int:
        """Keep votes, all or none. Adding the same ones again changes nothing. Returns how many are new.

        Raises ConflictError if one contradicts an earlier vote.
        """
        new = 0
        with self._writing() as cursor:
            for vote in votes:
                answers = json.dumps(dict(sorted(vote.answers.items())))
                row = cursor.execute("SELECT answers FROM votes WHERE task = ?", [vote.task]).fetchone()
                if row is not None and row[0] != answers:
                    raise ConflictError("this pair was already answered otherwise; reload the page to go on")
                if row is None:
                    new += 1
                    cursor.execute(
                        "INSERT INTO votes (task, annotator, answers, seconds, at) VALUES (?, ?, ?, ?, ?)",
                        [vote.task, vote.annotator, answers, vote.seconds, vote.at],
                    )
        return new

    def withdraw_last(self, annotator: int) -> dict[str, str]:
        """Withdraw an annotator's last vote and return its answers. Raises ConflictError if there is none."""
        with self._writing() as cursor:
            last = "SELECT max(number) FROM votes WHERE annotator = ?"
            row = cursor.execute(f"DELETE FROM votes WHERE number = ({last}) RETURNING answers", [annotator]).fetchone()
        if row is None:
            raise ConflictError("there is nothing to undo")
        return json.loads(row[0])

    def tasks_of(self, annotator: int) -> list[str]:
        """The tasks on which an annotator has voted, in order."""
        query = "SELECT task FROM votes WHERE annotator = ? ORDER BY number"
        return [task for (task,) in self._connection().execute(query, [annotator])]

    def last_seen(self) -> dict[int, str]:
        """When each annotator last voted."""
        return dict(self._connection().execute("SELECT annotator, max(at) FROM votes GROUP BY annotator"))

    def all(self) -> list[Vote]:
        """Every vote, in order."""
        rows = self._connection().execute("SELECT task, annotator, answers, seconds, at FROM votes ORDER BY number")
        return [
            Vote(task, annotator, json.loads(answers), seconds, at) for task, annotator, answers, seconds, at in rows
        ]

    def _connection(self) -> sqlite3.Connection:
        """This thread's connection."""
        if not hasattr(self._local, "connection"):
            connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk before it returns
            self._local.connection = connection
        return self._local.connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Cursor]:
        """A transaction that has the write lock from its start, so that what it reads cannot change."""
        connection = self._connection()
        cursor = connection.cursor()
        cursor.execute("BEGIN IMMEDIATE")
        try:
            yield cursor
            cursor.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # SQLite has ended it already if the disk failed
                cursor.execute("ROLLBACK")
            raise


def as_seconds(value: Any) -> float | None:
    """The seconds that a page reports for a vote; None if the value is not a valid time."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e7
    return float(value) if is_number else None


def as_time(value: Any) -> str:
    """The time, in ISO 8601, at which a page says a vote was given; now for what is no such time."""
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return now()
    return value


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
