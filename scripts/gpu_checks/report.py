"""The report of a check: the table as it grows, gpu_report.md and gpu_report.json."""

import json
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from benchmarks.results import describe_machine

from gpu_checks.rows import Finding, Row, Verdict
from xdpo.files import write_text
from xdpo.provenance import git_commit, library_versions
from xdpo.report.grids import Cell, Grid, to_markdown

ON_A_CPU = (
    "On a CPU: graphs are traced without making kernels, fp16's loss scaling runs in float32, no memory is limited, "
    "and two processes share no card"
)
NAMES = "gpu_report.md", "gpu_report.json"


def describe_cards() -> list[dict[str, Any]]:
    """The CUDA cards of this machine."""
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": card.name,
            "memory_gb": round(card.total_memory / 1e9, 1),
            "compute_capability": f"{card.major}.{card.minor}",
        }
        for card in properties
    ]


def driver_version() -> str | None:
    """The NVIDIA driver's, as nvidia-smi says it; None without it."""
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    asked = subprocess.run(
        [program, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return asked.stdout.strip().partition("\n")[0] or None


def describe(size: str, device: str | None) -> dict[str, Any]:
    """Everything that a result depends on: cards, driver, versions, commit. device None: nothing was run."""
    cards = describe_cards() if device == "cuda" else []
    has_card = bool(cards)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "size": size,
        "run_on": device,
        "cards": cards,
        "driver": driver_version() if has_card else None,
        "cuda": torch.version.cuda if has_card else None,
        "cudnn": torch.backends.cudnn.version() if has_card else None,
        "machine": describe_machine(),
        "versions": library_versions(),
        "git_commit": git_commit(),
    }


def line(row: Row, finding: Finding) -> str:
    """A row in words, for the terminal."""
    if finding.verdict is Verdict.IMPOSSIBLE:
        return f"{finding.verdict:17} {row.claim}: {finding.remedy}"
    text = f"{finding.verdict:17} {row.claim}: {finding.measured}, expected {finding.expected}"
    return text if finding.verdict is Verdict.HOLDS else f"{text}\n{'':17} try: {finding.remedy}"


def tally(findings: list[Finding]) -> str:
    counts = Counter(finding.verdict for finding in findings)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict)


def write(folder: Path, facts: dict[str, Any], rows: tuple[Row, ...], findings: list[Finding]) -> list[Path]:
    """Write the report in both forms. Returns their paths. Raises StorageError where they can't be written."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, record = (folder / name for name in NAMES)
    found = [{"claim": row.claim, **asdict(finding)} for row, finding in zip(rows, findings, strict=True)]
    write_text(record, json.dumps({**facts, "rows": found}, indent=2, ensure_ascii=False) + "\n")
    write_text(markdown, to_page(facts, rows, findings))
    return [markdown, record]


def to_page(facts: dict[str, Any], rows: tuple[Row, ...], findings: list[Finding]) -> str:
    cards = "; ".join("{name}, {memory_gb} GB, {compute_capability}".format_map(card) for card in facts["cards"])
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    table = tuple(
        (Cell(finding.verdict), Cell(row.claim), Cell(finding.measured), Cell(finding.expected), Cell(_advice(finding)))
        for row, finding in zip(rows, findings, strict=True)
    )
    columns = ("", "claim", "measured", "expected", "what to try")
    lines = [
        "# What was checked on this GPU",
        "",
        f"* Cards: {cards or 'none was used'}; driver {facts['driver']}, CUDA {facts['cuda']}, cuDNN {facts['cudnn']}",
        f"* Versions: {versions}",
        f"* Commit: {facts['git_commit']}; {facts['time']}; size: {facts['size']}; run on: {facts['run_on']}",
        *([f"* {ON_A_CPU}"] if facts["run_on"] == "cpu" else []),
        f"* {tally(findings)}",
        "",
        to_markdown(Grid("", columns, table)),
        "",
    ]
    return "\n".join(lines)


def _advice(finding: Finding) -> str:
    return "" if finding.verdict is Verdict.HOLDS else finding.remedy
