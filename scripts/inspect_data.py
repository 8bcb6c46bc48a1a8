"""Look at a config's pairs before training on them: labels, captions, images, duplicates; and a sheet of examples.

    python scripts/inspect_data.py --config configs/xdpo_sd15.yaml --sheet examples.png

No image is decoded but those of a sample. Of remote parquet files, what is no image is fetched, and one file for the
sample; remote tars are fetched whole, and let go. The config's filters apply, so what they leave out is counted.
"""

import argparse
import io
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xdpo.arguments import positive
from xdpo.config import Config, config_parser, load_config
from xdpo.paths import user_path

if TYPE_CHECKING:
    import numpy as np

    from xdpo.data import PairTable, Split

CELL = 256  # pixels of an image on the sheet
SHOWN = 5  # of the commonest values
SCRIPTS = {"CJK": "Han", "HIRAGANA": "Japanese", "KATAKANA": "Japanese"}  # first word of a character's name → script


def main(arguments: list[str] | None = None) -> int:
    """Inspect training pairs, and held-out ones where the config evaluates. Returns the exit status."""
    parser = config_parser(__doc__)
    parser.add_argument(
        "--sheet", type=user_path, metavar="FILE", help="draw training pairs of the sample (.png, .jpg)"
    )
    parser.add_argument("--examples", type=positive, default=8, help="pairs on the sheet (default: 8)")
    parser.add_argument("--sample", type=positive, default=64, help="pairs whose images are decoded (default: 64)")
    options = parser.parse_intermixed_args(arguments)
    try:
        settings = load_config(options.config, options.overrides)
        inspect(settings, options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def inspect(settings: Config, options: argparse.Namespace) -> None:
    """Print what the pairs of each split are, and write the sheet. Raises DataError, or ValueError for the sheet."""
    from xdpo.data import Split  # not before: with PyTorch it takes seconds

    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        for split in Split.of(settings):
            table = tables[split] = load(settings, split, Path(folder) / split.value)
            print(f"{split.title}: {table.counts}")
            for title, text in describe(table, options.sample):
                print(f"  {title:<11}{text}")
        if len(tables) > 1:
            print(shared_captions(tables[Split.TRAIN], tables[Split.HELD_OUT]))
        if options.sheet:
            draw(tables[Split.TRAIN], options.sheet, options.examples, sample=2 * options.examples)
            print(f"{options.sheet}: examples, the chosen image on the left")


def load(settings: Config, split: "Split", folder: Path) -> "PairTable":
    """All pairs of a split. folder: of what is kept of remote files, if there is no cache where it would stay."""
    from xdpo import data, precompute
    from xdpo.precompute.keys import source_folder

    source = split.source(settings)
    return data.load_pairs(
        source.model_copy(update={"max_pairs": None}) if split.is_held_out else source,
        filters=precompute.filters_of(settings, split, folder.with_name(data.Split.HELD_OUT.value)),
        in_order=True,
        streamed_into=source_folder(settings, split) if settings.cache.examples else folder,
    )


def describe(table: "PairTable", sample: int) -> Iterator[tuple[str, str]]:
    """(title, text) of each line on the pairs of a table."""
    captions = Counter(table.captions())
    yield "labels", labels(table)
    yield "captions", texts(captions)
    yield "scripts", shares(Counter(map(script_of, captions.elements())))
    yield "files", files(table)
    yield from [("sample", line) for line in sampled(table, sample)]
    if (scores := table.scores) is not None:
        yield "scores", scored(*scores)
    yield "duplicates", duplicates(table)


def labels(table: "PairTable") -> str:
    second, ties = table.chosen_side.mean(), table.counts.ties / table.counts.rows
    return (
        f"image 0 is preferred in {1 - second:.1%} of the pairs, image 1 in {second:.1%}; {ties:.1%} of rows are ties"
    )


def texts(captions: Counter[str]) -> str:
    lengths = [len(caption.split()) for caption in captions]
    commonest = ", ".join(f"{text[:40]!r} in {count:,}" for text, count in captions.most_common(3) if count > 1)
    return f"{len(captions):,} distinct, of {spread(lengths)} words" + (
        f"; the commonest: {commonest}" if commonest else ""
    )


def script_of(text: str) -> str:
    """The script of most letters of a text, as Unicode names it; `none` without letters."""
    letters = [character for character in text if character.isalpha()]
    if text.isascii():
        return "Latin" if letters else "none"
    names = Counter(unicodedata.name(letter, "unknown").split()[0] for letter in letters)
    name = names.most_common(1)[0][0] if names else "none"
    return SCRIPTS.get(name, name.capitalize() if names else name)


def files(table: "PairTable") -> str:
    """Bytes of the images, where the source tells, and how many have a name."""
    sizes = sizes_of(table)
    known = sizes[sizes >= 0].tolist()
    missing = f"; {sizes.size - len(known):,} are missing, or paths" if len(known) < sizes.size else ""
    return f"{sizes.size:,} images" + (f", {spread(known)} bytes{missing}" if known else ", in files of their own")


def sampled(table: "PairTable", sample: int) -> list[str]:
    """Formats and sizes of a sample's images, by decoding them."""
    from PIL import Image

    from xdpo.data.identity import bytes_of
    from xdpo.data.images import UnreadableImageError, decode_rgb

    formats, sizes, unreadable = Counter[str](), Counter[str](), 0
    for cell in (cell for pair in cells_of(table, sample).values() for cell in pair):
        try:
            image = decode_rgb(cell)
        except UnreadableImageError:
            unreadable += 1
            continue
        with Image.open(io.BytesIO(bytes_of(cell))) as opened:
            formats[f"{opened.format} {opened.mode}"] += 1
        sizes[f"{image.width} × {image.height}"] += 1
    count = unreadable + formats.total()
    return [f"{count} images, {unreadable} of them unreadable; {shares(formats)}", f"pixels {shares(sizes)}"]


def scored(chosen: "np.ndarray", rejected: "np.ndarray") -> str:
    import numpy as np

    values = np.concatenate([chosen, rejected])
    values = values[np.isfinite(values)]
    known = f"{len(values):,} of {spread(values.tolist())}" if len(values) else "none of them a number"
    return f"{known}; the chosen image's is higher in {np.mean(chosen > rejected):.1%} of the pairs"


def duplicates(table: "PairTable") -> str:
    """Pairs of the same caption and images as an earlier pair, by the images' names, else by their files' sizes."""
    chosen, rejected = table.image_names()
    how = "by the images' names"
    if chosen.dtype.kind != "U":  # numbers, which are all different
        chosen, rejected = sizes_of(table)
        how = "judged by the sizes of the images' files"
        if (chosen < 0).all():
            return "not known: images have neither names nor sizes"
    orders: dict[tuple, Counter[bool]] = {}
    for caption, one, other in zip(table.captions(), chosen.tolist(), rejected.tolist(), strict=True):
        key = (caption, *sorted([one, other]))
        orders.setdefault(key, Counter())[one <= other] += 1
    repeated = sum(order.total() - 1 for order in orders.values())
    contradictory = sum(len(order) > 1 for order in orders.values())
    same = int((chosen == rejected).sum())
    misnamed = 0 if (sizes_of(table) < 0).all() else table.misnamed()
    return (
        f"{repeated:,} pairs have caption and images of an earlier one; {contradictory:,} such pairs are labelled both "
        f"ways round; {same:,} pairs have the same image twice, {how}"
        + (f"; {misnamed:,} images differ in size from the first one of their name" if misnamed else "")
    )


def shared_captions(train: "PairTable", held_out: "PairTable") -> str:
    from xdpo.data.filters import normalized

    held_out_captions = set(map(normalized, held_out.captions()))
    shared = Counter(text for caption in train.captions() if (text := normalized(caption)) in held_out_captions)
    advice = "; filter.held_out_captions=true leaves them out" if shared else ""
    return (
        f"{len(shared):,} of {len(held_out_captions):,} held-out captions are captions of {shared.total():,} training "
        f"pairs too{advice}"
    )


def draw(table: "PairTable", path: Path, examples: int, sample: int) -> None:
    """Write a sheet of as many readable pairs of a sample as `examples` says, cropped as for training."""
    from PIL import Image, ImageOps

    from xdpo.data.images import UnreadableImageError, decode_rgb
    from xdpo.images.sheets import contact_sheet, save_sheet

    columns: dict[str, list[Image.Image]] = {"chosen": [], "rejected": []}
    captions: list[str] = []
    for index, cells in cells_of(table, sample).items():
        if len(captions) == examples:
            break
        try:
            images = [ImageOps.fit(decode_rgb(cell), (CELL, CELL)) for cell in cells]
        except UnreadableImageError:
            continue
        for column, image in zip(columns.values(), images, strict=True):
            column.append(image)
        captions.append(table.caption(index))
    if not captions:
        raise ValueError("no pair of the sample has two readable images, so there is no sheet to draw")
    save_sheet(path, contact_sheet(columns, captions))


def cells_of(table: "PairTable", sample: int) -> dict[int, tuple]:
    """Cells of the chosen and the rejected image of evenly spaced pairs, by their index; of remote files' first one."""
    from xdpo.data.identity import evenly
    from xdpo.data.streaming import StreamedImages

    images, indices = table.dataset.images, list(range(len(table)))
    if isinstance(images, StreamedImages):
        number = images.file_of(int(table.rows[0]))
        indices = [index for index in indices if images.file_of(int(table.rows[index])) == number]
        images.bring([number])
    cells = {}
    for index in (indices[place] for place in evenly(len(indices), sample)):
        row, side = int(table.rows[index]), int(table.chosen_side[index])
        cells[index] = (images.cell(row, side), images.cell(row, 1 - side))
    return cells


def sizes_of(table: "PairTable") -> "np.ndarray":
    """(2, N) bytes of the files of chosen and rejected images, −1 where they are not known."""
    import numpy as np

    from xdpo.data.streaming import StreamedImages

    images = table.dataset.images
    if isinstance(images, StreamedImages):  # not all of them are there
        return np.full((2, len(table)), -1)
    return table.oriented(np.stack([images.sizes(side)[table.rows] for side in (0, 1)]))


def spread(values: Sequence[float]) -> str:
    """Least, median and most."""
    ordered = sorted(values)
    least, median, most = (f"{value:,.6g}" for value in (ordered[0], ordered[len(ordered) // 2], ordered[-1]))
    return f"{least} to {most} (median {median})"


def shares(counts: Counter[str]) -> str:
    """The commonest values with their shares."""
    shown = [f"{name} {count / counts.total():.1%}" for name, count in counts.most_common(SHOWN)]
    others = len(counts) - len(shown)
    return ", ".join(shown) + (f", {others} others" if others else "")


if __name__ == "__main__":
    sys.exit(main())
