"""The score table: every score ever computed in an output folder, and where its image stands, in one parquet file.

A score belongs to (image checksum, prompt, scorer, scorer version) and is never computed twice. While scoring goes
on, new scores are written as small finished files into `scores.parts/`; closing merges them into `scores.parquet`.
Each file is written aside and renamed, so a kill at any moment loses only the scores since the last part.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from xdpo.files import only_writer, reading, replacing, writing

TABLE, PARTS = "scores.parquet", "scores.parts"


class ScoreKey(NamedTuple):
    """What decides a score."""

    sha256: str
    prompt: str
    scorer: str
    version: str


@dataclass(frozen=True)
class Score:
    """One row: a score and where its image stands. The place is None where later images took it."""

    prompt_set: str | None
    model: str | None
    category: str | None
    key: str | None
    repeat: int | None
    file: str | None
    prompt: str
    sha256: str
    scorer: str
    version: str
    score: float

    @property
    def place(self) -> tuple | None:
        """Which image of which model, and by which scorer; None for a score that is only remembered."""
        return None if self.model is None else (self.prompt_set, self.model, self.key, self.repeat, self.scorer)


class ScoreTable:
    """The table of one output folder, in memory and on disk."""

    def __init__(self, folder: Path, *, for_writing: bool = False):
        """Read what is there; `for_writing` keeps other writers out until `close` or the end of the process.

        Raises ValueError for a table that cannot be read, naming the file, or that another process writes to.
        """
        self.folder = folder
        self._lock = ExitStack()
        if for_writing:
            self._lock.enter_context(only_writer(folder, "evaluate.py"))
        self.known: dict[ScoreKey, float] = {}
        self._placed: dict[tuple, Score] = {}
        self._unsaved: dict[ScoreKey, float] = {}
        for path in [folder / TABLE, *sorted((folder / PARTS).glob("*.parquet"))]:
            if path.exists():
                for row in _read(path):
                    self.known[_key_of(row)] = row.score
                    if row.place is not None:
                        self._placed[row.place] = row

    @property
    def placed(self) -> list[Score]:
        """The scores of all images at their latest known state."""
        return list(self._placed.values())

    def add(self, scores: Mapping[ScoreKey, float]) -> None:
        """Remember new scores; `save_part` or `close` brings them to disk."""
        self.known.update(scores)
        self._unsaved.update(scores)

    @property
    def unsaved_count(self) -> int:
        return len(self._unsaved)

    def save_part(self) -> None:
        """Write the scores since the last part as one more file."""
        if self._unsaved:
            rows = [_unplaced(key, score) for key, score in self._unsaved.items()]
            _write(self.folder / PARTS / f"{uuid4().hex}.parquet", rows)
            self._unsaved = {}

    def close(self, places: Iterable[Score], replaced: Iterable[tuple[str, str, str]]) -> None:
        """Put `places` in, merge all into scores.parquet and remove the parts.

        `replaced` holds (prompt set, model, scorer) triples whose earlier places no longer count.
        """
        outdated = set(replaced)
        kept = [row for row in self.placed if (row.prompt_set, row.model, row.scorer) not in outdated]
        self._placed = {row.place: row for row in [*kept, *places]}
        shown = {_key_of(row) for row in self._placed.values()}
        rest = [_unplaced(key, score) for key, score in self.known.items() if key not in shown]
        _write(self.folder / TABLE, [*self._placed.values(), *rest])
        self._unsaved = {}
        if (self.folder / PARTS).is_dir():
            for part in (self.folder / PARTS).iterdir():
                part.unlink()
            (self.folder / PARTS).rmdir()
        self._lock.close()


def _key_of(row: Score) -> ScoreKey:
    return ScoreKey(row.sha256, row.prompt, row.scorer, row.version)


def _unplaced(key: ScoreKey, score: float) -> Score:
    return Score(None, None, None, None, None, None, key.prompt, key.sha256, key.scorer, key.version, score)


def _schema():
    import pyarrow as pa

    special = {"repeat": pa.int32(), "score": pa.float64()}
    return pa.schema([(field.name, special.get(field.name, pa.string())) for field in fields(Score)])


def _read(path: Path) -> list[Score]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    remedy = "move it away and run again: its images are then scored anew"
    with reading(path):
        content = path.read_bytes()
    try:
        table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a score table that can be read ({error}); {remedy}") from None
    if table.schema.names != _schema().names:
        raise ValueError(f"{path} is not a score table of this version: its columns are {table.schema.names}; {remedy}")
    return [Score(*row) for row in zip(*table.to_pydict().values(), strict=True)]


def _write(path: Path, rows: list[Score]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    schema = _schema()
    table = pa.Table.from_pydict({name: [getattr(row, name) for row in rows] for name in schema.names}, schema=schema)
    with replacing(path, "wb") as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
