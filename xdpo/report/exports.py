"""Tables as files for other programs: CSV and LaTeX."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from xdpo.files import write_text, writing
from xdpo.report.grids import Cell, Grid, numeric_columns

TABLES = "tables"  # their folder beside the report


def write_tables(tables: Sequence[Grid], output: Path) -> None:
    """Write every table as .csv and .tex, named after its title, into tables/ in `output`. Raises StorageError."""
    folder = output / TABLES
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for grid in tables:
        write_text(folder / f"{file_stem(grid)}.csv", to_csv(grid))
        write_text(folder / f"{file_stem(grid)}.tex", to_latex(grid))


def file_stem(grid: Grid) -> str:
    """The name of a table's files without its ending: "mine: mean scores" → mine_mean_scores."""
    return re.sub(r"[^\w.-]+", "_", grid.title).strip("_")


def to_csv(grid: Grid) -> str:
    """The table as CSV: numbers as they were computed, not rounded, and smaller print in columns of its own."""
    detailed = [any(row[i].detail for row in grid.rows) for i in range(len(grid.columns))]

    def widened(values: Iterable[tuple[object, object]]) -> list[object]:
        return [cell for pair, both in zip(values, detailed, strict=True) for cell in (pair if both else pair[:1])]

    def raw(cell: Cell) -> object:
        return cell.value if isinstance(cell.value, int | float) and not cell.text.startswith("[") else cell.text

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(widened((column, f"{column}: detail") for column in grid.columns))
    writer.writerows(widened((raw(cell), cell.detail) for cell in row) for row in grid.rows)
    return text.getvalue()


def to_latex(grid: Grid) -> str:
    """The table as a LaTeX tabular of the package booktabs: the best in bold, arrows for better and worse."""
    signs = {"▲": r"$\uparrow$", "▼": r"$\downarrow$", "≠": r"$\neq$"}

    def shown(cell: Cell) -> str:
        text = rf"\textbf{{{latex(cell.text)}}}" if cell.best else latex(cell.text)
        detail = rf"{{\scriptsize {latex(cell.detail)}}}" if cell.detail else ""
        return " ".join(filter(None, [text, signs.get(cell.sign, ""), detail]))

    alignment = "".join("r" if right else "l" for right in numeric_columns(grid))
    lines = [
        "% " + " ".join(f"{grid.title}. {grid.note}".split()),
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        " & ".join(map(latex, grid.columns)) + r" \\",
        r"\midrule",
        *(" & ".join(map(shown, row)) + r" \\" for row in grid.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


_LATEX = {
    **{character: rf"\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"−": "$-$", "×": r"$\times$", "≠": r"$\neq$", "½": r"$\frac12$", "↑": r"$\uparrow$", "<": "$<$", ">": "$>$"},
    "[": "{[}",  # or a line break before it would take it for a length
    **{"η": r"$\eta$", "γ": r"$\gamma$", "β": r"$\beta$", "–": "--"},
}


def latex(text: str) -> str:
    """The text on one line, with every character escaped that LaTeX would read as a command."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
