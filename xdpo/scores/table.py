"""The score table: every score ever computed for an output folder, and the place of its image, in one parquet file.

A score belongs to (image checksum, prompt, scorer, scorer version) and is never computed twice. During scoring, new
scores are written as small finished files into `scores.parts/`, by each process its own; closing merges them into
`scores.parquet`. Each file is written whole, so a kill at any moment loses only the scores since the last part.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from xdpo.files import reading, replacing, writing

if TYPE_CHECKING:
    import pyarrow as pa

TABLE, PARTS = "scores.parquet", "scores.parts"


class Placement(NamedTuple):
    """The place of an image: in a model's folder of a prompt set. `key` names its prompt there, as in `Picture`."""

    prompt_set: str
    model: str
    category: str
    key: str
    repeat: int
    file: str


class ScoreKey(NamedTuple):
    """What decides a score."""

    prompt: str
    sha256: str
    scorer: str
    version: str


class PlacedScore(NamedTuple):
    """A score of an image in a model's folder."""

    placement: Placement
    key: ScoreKey
    score: float


_COLUMNS = (*Placement._fields, *ScoreKey._fields, "score")
_Row = tuple[Placement | None, ScoreKey, float]  # None: only remembered, because another image took its place


class ScoreTable:
    """The table of one output folder, in memory and on disk. Who writes it has the folder's lock."""

    def __init__(self, folder: Path, *, read: bool = True):
        """Read the table if it exists. read: False for a process that only adds scores, which the first one gathers.

        Raises ValueError for a table that cannot be read, naming the file.
        """
        self.folder = folder
        self.scores: dict[ScoreKey, float] = {}
        self._placed: dict[tuple, tuple[Placement, ScoreKey]] = {}
        self._unsaved: dict[ScoreKey, float] = {}
        for path in [folder / TABLE, *sorted((folder / PARTS).glob("*.parquet"))]:
            if read and path.exists():
                for placement, key, score in _read(path):
                    self.scores[key] = score
                    if placement is not None:
                        self._placed[_slot(placement, key)] = placement, key

    @property
    def placed(self) -> list[PlacedScore]:
        """The scores of all images, in their latest state."""
        return [PlacedScore(placement, key, self.scores[key]) for placement, key in self._placed.values()]

    def add(self, scores: Mapping[ScoreKey, float]) -> None:
        """Remember new scores; `save_part` or `close` writes them."""
        self.scores.update(scores)
        self._unsaved.update(scores)

    def gather(self, scores: Mapping[ScoreKey, float]) -> None:
        """Remember scores that another process has written as parts."""
        self.scores.update(scores)

    def save_part(self) -> None:
        """Write the scores since the last part as one more file."""
        if self._unsaved:
            rows = [(None, key, score) for key, score in self._unsaved.items()]
            _write(self.folder / PARTS / f"{uuid4().hex}.parquet", rows)
            self._unsaved = {}

    def close(self, images: Iterable[tuple[Placement, ScoreKey]], replaced: Iterable[tuple[str, str, str]]) -> None:
        """Set the places of scored images, merge everything into scores.parquet and remove the parts.

        `replaced` holds (prompt set, model, scorer) triples whose earlier placements no longer count.
        """
        outdated = set(replaced)
        kept = [(at, key) for at, key in self._placed.values() if (at.prompt_set, at.model, key.scorer) not in outdated]
        self._placed = {_slot(placement, key): (placement, key) for placement, key in [*kept, *images]}
        shown = {key for _, key in self._placed.values()}
        rest = [(None, key, self.scores[key]) for key in sorted(self.scores.keys() - shown)]
        _write(self.folder / TABLE, [*self.placed, *rest])
        self._unsaved = {}
        if (self.folder / PARTS).is_dir():
            for part in (self.folder / PARTS).iterdir():
                part.unlink()
            (self.folder / PARTS).rmdir()


def _slot(placement: Placement, key: ScoreKey) -> tuple:
    """What has one score at a time: an image of a model, by one scorer."""
    return placement.prompt_set, placement.model, placement.key, placement.repeat, key.scorer


def _schema() -> "pa.Schema":
    import pyarrow as pa

    special = {"repeat": pa.int32(), "score": pa.float64()}
    return pa.schema([(name, special.get(name, pa.string())) for name in _COLUMNS])


def _read(path: Path) -> list[_Row]:
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
    rows: list[_Row] = []
    width = len(Placement._fields)
    for *values, score in zip(*table.to_pydict().values(), strict=True):
        placement, key = Placement(*values[:width]), ScoreKey(*values[width:])
        rows.append((None if placement.model is None else placement, key, score))
    return rows


def _write(path: Path, rows: Sequence[_Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    nowhere = (None,) * len(Placement._fields)
    lines = [(*(placement or nowhere), *key, score) for placement, key, score in rows]
    columns = {name: [line[column] for line in lines] for column, name in enumerate(_COLUMNS)}
    table = pa.Table.from_pydict(columns, schema=_schema())
    with replacing(path, "wb") as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
