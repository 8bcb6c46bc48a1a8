"""Write the sections of a report as Markdown: text, tables and links to figures."""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from xdpo.report.exports import TABLES, file_stem
from xdpo.report.grids import Grid, plain, to_markdown
from xdpo.report.sections import Section


def markdown(title: str, sections: Sequence[Section], folder: Path) -> str:
    """The report as Markdown. Figures are linked relative to `folder`, where the report will be."""
    lines = [f"# {plain(title)}", ""]
    for section in sections:
        lines += [f"## {plain(section.title)}", ""]
        for text in section.text:
            lines += [plain(text), ""]
        for block in [*section.blocks, *section.folded]:
            if isinstance(block, Grid):
                lines += [f"### {plain(block.title)}", "", to_markdown(block), ""]
            else:
                link = quote(Path(os.path.relpath(block.png, folder)).as_posix())
                lines += [f"![{plain(block.alt)}]({link})", ""]
        for table in section.files:
            stem = f"{TABLES}/{quote(file_stem(table))}"
            lines += [f"{plain(table.title)}: [CSV]({stem}.csv), [LaTeX]({stem}.tex)", ""]
    lines += [f"All tables as CSV and LaTeX: [{TABLES}/]({TABLES}/)", ""]
    return "\n".join(lines)
