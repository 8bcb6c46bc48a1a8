"""Which columns of a source are read, and what each is called.

Within the package, columns have the names of Pick-a-Pic v2: encoded images `jpg_0` and `jpg_1`, `label_0` (1: image 0
is preferred, 0: image 1 is, 0.5: a tie), `caption`; optionally a scorer's `score_0` and `score_1`, as
scripts/relabel.py writes them. A source whose columns have other names says so in `data.columns`. These may also stand
for something else than labels: `chosen` and `rejected` images, or the votes for both.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

IMAGE_COLUMNS = ("jpg_0", "jpg_1")
IMAGE = "image"  # one of several of a caption, in place of both: see data.ranked
REQUIRED_COLUMNS = (*IMAGE_COLUMNS, "label_0", "caption")
SCORE_COLUMNS = ("score_0", "score_1")
VOTE_COLUMNS = ("votes_0", "votes_1")
OPTIONAL_COLUMNS = (
    *("label_1", "has_label", "are_different", "ranking_id", "image_0_uid", "image_1_uid", "__key__"),
    *SCORE_COLUMNS,
)
ID_COLUMNS = ("ranking_id", "image_0_uid", "image_1_uid", "__key__")
FLAG_COLUMNS = ("has_label", "are_different")
NUMBER_COLUMNS = ("label_0", "label_1", *SCORE_COLUMNS, *VOTE_COLUMNS, "rank", "votes")
ORIENTED = {"chosen": "jpg_0", "rejected": "jpg_1"}  # columns that say which image is preferred by their names


class DataError(ValueError):
    """Preference data that cannot be used as they are; the message names the remedy."""


@dataclass(frozen=True)
class Columns:
    """The columns that are read of a source.

    given: `data.columns`, what a column stands for → its name in the source. numbers: names of further columns of
    numbers, which filters read.
    """

    given: Mapping[str, str] = field(default_factory=dict)
    numbers: Sequence[str] = ()

    @property
    def are_oriented(self) -> bool:
        """Whether the images' columns say which is preferred, in place of labels."""
        return "chosen" in self.given

    @property
    def are_ranked(self) -> bool:
        """Whether the source lists images with ranks or votes, several of a caption, in place of pairs."""
        return IMAGE in self.given

    @property
    def order(self) -> str:
        """What ranks images: `rank`, of which the lowest is the best, or `votes`, of which the highest is."""
        return "rank" if "rank" in self.given else "votes"

    @property
    def required(self) -> tuple[str, ...]:
        """What the source must have, by canonical names."""
        if self.are_ranked:
            return (IMAGE, self.order, "caption", *(("group",) if "group" in self.given else ()))
        labels = () if self.are_oriented else VOTE_COLUMNS if "votes_0" in self.given else ("label_0",)
        return (*IMAGE_COLUMNS, *labels, "caption", *self.numbers)

    @property
    def key(self) -> str:
        """What distinguishes the reading of a source from that by default, where it is empty."""
        return "".join(
            [*(f" {name}={self.given[name]}" for name in sorted(self.given)), *map(" {}".format, self.numbers)]
        )

    def names(self, columns: Iterable[str]) -> dict[str, str]:
        """Source column → canonical column, of those that are read.

        Members of a tar have endings (`jpg_0.jpg`); exact names take precedence.
        """
        columns = list(columns)
        names: dict[str, str] = {}
        for stands_for, name in self.given.items():
            found = [column for column in columns if name == column] or [
                column for column in columns if name == column.split(".")[0]
            ]
            names |= {column: ORIENTED.get(stands_for, stands_for) for column in found[:1]}
        taken = {*self.given, *(ORIENTED.get(name, name) for name in self.given)}
        if "label_0" not in self.required:  # something else says which image is preferred
            taken |= {"label_0", "label_1"}
        read = {"caption"} if self.are_ranked else {*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS, *self.numbers}
        read -= taken
        for column in sorted(columns, key=lambda column: "." in column):
            name = column.split(".")[0]
            name = "caption" if name == "original_prompt" else name
            if name in read and name not in names.values() and column not in names:
                names[column] = name
        return names

    def require(self, columns: Sequence[str], where: str, required: Sequence[str] | None = None) -> None:
        """Raise DataError where a source lacks a column, naming those that it has. required: None means all of them."""
        found = set(self.names(columns).values())
        if missing := [name for name in required or self.required if name not in found]:
            sides = dict(zip(ORIENTED.values(), ORIENTED, strict=True)) if self.are_oriented else {}
            given = [self.given.get(sides.get(name, name), sides.get(name, name)) for name in missing]
            raise DataError(
                f"{where} lacks the columns {listed(sorted(given))}; it has {listed(columns)}. Columns of other names "
                "are named in data.columns, as in data.columns='{caption: prompt}', and in eval.columns where those of "
                "held-out pairs differ"
            )


def listed(names: Iterable[str]) -> str:
    return ", ".join(map(str, names))
