"""The votes in SQLite: once `add` has returned, a vote is on the disk, once, whatever happens to the process."""

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
    at TEXT NOT NULL,
    display TEXT
);
CREATE TABLE IF NOT EXISTS agreed (annotator INTEGER PRIMARY KEY, at TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS by_annotator ON votes (annotator, number);
"""


class ConflictError(StudyError):
    """A vote contradicts an earlier one."""


@dataclass(frozen=True)
class Display:
    """How large an image stood on the screen: width and height in CSS pixels, device pixels per CSS pixel."""

    width: float
    height: float
    ratio: float


@dataclass(frozen=True)
class Vote:
    """One annotator's answers to one task. answers: question → "left", "right" or "tie". seconds: the time that the
    pair was on the screen. Seconds and display are None where they aren't known."""

    task: str
    annotator: int
    answers: Mapping[str, str]
    seconds: float | None
    at: str  # ISO 8601, UTC
    display: Display | None = None


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
                if "display" not in [column[1] for column in cursor.execute("PRAGMA table_info(votes)")]:
                    cursor.execute("ALTER TABLE votes ADD COLUMN display TEXT")  # of an older study
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
                    display = None if vote.display is None else json.dumps(asdict(vote.display))
                    cursor.execute(
                        "INSERT INTO votes (task, annotator, answers, seconds, at, display) VALUES (?, ?, ?, ?, ?, ?)",
                        [vote.task, vote.annotator, answers, vote.seconds, vote.at, display],
                    )
        return new

    def agree(self, annotator: int, at: str) -> None:
        """Keep that an annotator agreed to what the first page says, and when; the first time counts."""
        with self._writing() as cursor:
            cursor.execute("INSERT OR IGNORE INTO agreed VALUES (?, ?)", [annotator, at])

    def has_agreed(self, annotator: int) -> bool:
        query = "SELECT 1 FROM agreed WHERE annotator = ?"
        return self._connection().execute(query, [annotator]).fetchone() is not None

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
        query = "SELECT task, annotator, answers, seconds, at, display FROM votes ORDER BY number"
        return [
            Vote(task, annotator, json.loads(answers), seconds, at, Display(**json.loads(display)) if display else None)
            for task, annotator, answers, seconds, at, display in self._connection().execute(query)
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
    return float(value) if _is_number(value, 0, 1e7) else None


def as_display(value: Any) -> Display | None:
    """The size at which a page says that the images stood; None for what is no such size."""
    names = ("width", "height", "ratio")
    if not isinstance(value, dict) or not all(_is_number(value.get(name), 1e-3, 1e6) for name in names):
        return None
    return Display(*(float(value[name]) for name in names))


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value < high


def as_time(value: Any) -> str:
    """The time, in ISO 8601, at which a page says a vote was given; now for what is no such time."""
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return now()
    return value


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
