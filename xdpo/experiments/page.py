"""The results of a reproduction as a Markdown page with figures."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xdpo.experiments import drawing, measures
from xdpo.experiments.findings import Findings
from xdpo.experiments.measures import Estimate
from xdpo.experiments.plan import BASE
from xdpo.files import write_text
from xdpo.provenance import git_commit, library_versions
from xdpo.report.figures import save
from xdpo.report.grids import Cell, Grid, number, percent, title_of, to_markdown

SLOPE_EXPONENTS = (6.0, 100.0, 400.0)
DRAWN_EXPONENTS = SLOPE_EXPONENTS[:2]  # at 400 the exponents of Eq. 10 meet the loss's limit

SlopeSettings = tuple[dict[str, float], float, tuple[float, float]]
"""β and η by name, the reference's error, and the range of d at the end of training."""


def write(findings: Findings, page: Path, command: str) -> list[Path]:
    """Write the page, and its figures into a folder of the same name beside it. Returns all written paths."""
    figures = page.with_suffix("")
    written = [
        *save(drawing.quality(findings), figures / "quality"),
        *save(drawing.errors(findings), figures / "errors"),
    ]
    slopes = _slope_settings(findings)
    if slopes is not None:
        written += save(drawing.slopes(*slopes, DRAWN_EXPONENTS), figures / "slopes")
    text = "\n\n".join(_blocks(findings, figures.name, command, slopes)) + "\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, text)
    return [page, *written]


def _blocks(findings: Findings, figures: str, command: str, slopes: SlopeSettings | None) -> list[str]:
    plan = findings.plan
    blocks = [
        f"# {plan.title}",
        _made_by(findings, command),
        "Intervals are 95 % bootstraps that draw seeds and prompts anew. Every method has the same data, batch, "
        f"schedule, {plan.steps} optimizer steps and seeds {', '.join(map(str, plan.seeds))}; the scores are of "
        f"{len(findings.scores[BASE, plan.score])} prompts ({', '.join(plan.prompts)}).",
        "## Questions",
        to_markdown(questions(findings)),
        "## Quality over training",
        f"![Quality over training]({figures}/quality.png)",
        to_markdown(efficiency(findings)),
    ]
    for group in dict.fromkeys(plan.methods[name].group for name in findings.methods):
        blocks += [f"## {group}", to_markdown(methods(findings, group))]
    blocks += [
        "## Does every objective beat the base?",
        _against_base(findings),
        "## Both errors over training",
        "d is the policy's error minus the reference's on held-out pairs, at the same timesteps and noise in all runs; "
        "lines are means over seeds, bands their range.",
        f"![Both errors over training]({figures}/errors.png)",
    ]
    if slopes is not None:
        blocks += [
            "## How hard each reward form pulls",
            f"![Slopes]({figures}/slopes.png)",
            to_markdown(bend(slopes)),
        ]
    blocks += ["## Tuning", to_markdown(tuning(findings))]
    if findings.failed:
        blocks += ["## Failed runs", *(f"`{name}`:\n\n```\n{end}\n```" for name, end in findings.failed.items())]
    return blocks


def _made_by(findings: Findings, command: str) -> str:
    """The line on command, commits, machine and versions. The commits are those that the trainings recorded."""
    commits, starts = set(), []
    for run in findings.runs.values():
        if (run.folder / "run.json").is_file():
            facts = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
            commits.add(str(facts.get("git_commit"))[:10])
            starts += [start["time"] for start in facts["starts"]]
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items() if version)
    where = f"{platform.machine()}, {versions}"
    trained = f"trainings at commit {', '.join(sorted(commits))}, from {min(starts)} on"
    return f"Made by `{command}`; {trained}; written at commit {str(git_commit())[:10]}; on {where}."


def questions(findings: Findings) -> Grid:
    """Each question, its answer, and the difference that decides it."""
    rows = []
    for question in findings.plan.questions:
        if not findings.can_answer(question):
            rows.append((Cell(question.ask), Cell("not answered: a method failed"), Cell(""), Cell("")))
            continue
        answer, difference = findings.answer(question)
        measured = question.logged or title_of(question.score or findings.plan.score)
        rows.append(
            (
                Cell(question.ask),
                Cell(answer, best=difference.sign != 0),
                Cell(f"{measured}: {question.method} − {question.than}"),
                Cell(_signed(difference)),
            )
        )
    note = (
        "A difference is resolved, and its answer bold, where its interval excludes zero. Otherwise these seeds and "
        "prompts cannot tell whether there is a difference; it does not mean that there is none."
    )
    return Grid("Questions", ("question", "answer", "difference in", "difference [95 %]"), tuple(rows), note)


def methods(findings: Findings, group: str) -> Grid:
    """Scores, win rates and errors of a group of methods, with the base in the first row."""
    plan = findings.plan
    names = [BASE, *(n for n in findings.methods if group in (plan.methods[n].group, *plan.methods[n].also_in))]
    best = {scorer: max(names, key=lambda name: findings.of(name, scorer).mean()) for scorer in plan.scorers}
    rows = [_method_row(findings, name, [s for s in plan.scorers if best[s] == name]) for name in names]
    columns = ("method", plan.tuning.key.rpartition(".")[2], *(title_of(s) for s in plan.scorers))
    columns += ("wins against base", f"wins against {plan.baseline}", "d chosen", "d rejected")
    note = (
        f"Win rates by {title_of(plan.score)}, pair by pair of seed and prompt; d at the end, held-out pairs, [lowest, "
    )
    return Grid(group, columns, tuple(map(tuple, rows)), note + "highest] over seeds.")


def _method_row(findings: Findings, name: str, best_by: Sequence[str]) -> list[Cell]:
    plan = findings.plan
    row = [Cell(name), Cell("" if name == BASE else findings.chosen[plan.methods[name].tuned_as or name])]
    for scorer in plan.scorers:
        mean = measures.mean(findings.of(name, scorer))
        row.append(Cell(number(mean.value, scorer), mean.value, _interval(mean), best=scorer in best_by))
    for other in (BASE, plan.baseline):
        if name in (other, BASE) or other not in (BASE, *findings.methods):
            row.append(Cell(""))
            continue
        wins = measures.win_rate(findings.of(name, plan.score), findings.of(other, plan.score))
        row.append(Cell(percent(wins.value), wins.value, f"[{100 * wins.low:.1f}, {100 * wins.high:.1f}]"))
    for side in ("chosen", "rejected"):
        values = findings.logged(name, f"eval/d_{side}")
        finite = name != BASE and np.isfinite(values).all()
        spread = f"[{values.min():.2g}, {values.max():.2g}]" if finite else ""
        row.append(Cell(f"{values.mean():.2g}" if finite else "", float(values.mean()) if finite else None, spread))
    return row


def efficiency(findings: Findings) -> Grid:
    """Pairs and time to reach the baseline's final score, as ratios: the paper's 1.5 and 1.6."""
    plan, rows = findings.plan, []
    for name in findings.methods:
        if not plan.methods[name].curves or plan.baseline not in findings.methods:
            continue
        speed_up = findings.speed_up(name)
        cost = findings.seconds_per_pair(name) / findings.seconds_per_pair(plan.baseline)
        in_time = Estimate(speed_up.value / cost, speed_up.low / cost, speed_up.high / cost)
        rows.append((Cell(name), _times(speed_up), Cell(f"{cost:.2f}", cost), _times(in_time)))
    columns = ("method", "pairs: times fewer", "time of a pair", "time: times less")
    note = (
        f"Pairs seen until the final {title_of(plan.score)} of {plan.baseline} is reached, {plan.baseline}'s over the "
        "method's, by straight lines between checkpoints, 0 where it never is; the time of a pair in the fastest run "
        f"of each, from caches where there can be any, against {plan.baseline}'s; and the ratio in time, whose "
        "interval is that of the pairs. Objectives with the same passes cost the same: what they differ by is how busy "
        "the machine was. The paper says 1.5 and 1.6, without a unit."
    )
    return Grid("Efficiency", columns, tuple(rows), note)


def _against_base(findings: Findings) -> str:
    plan = findings.plan
    more: list[str] = []
    less: list[str] = []
    open_ones: list[str] = []
    for name in findings.methods:
        wins = measures.win_rate(findings.of(name, plan.score), findings.of(BASE, plan.score))
        text = f"{name} {percent(wins.value)} [{100 * wins.low:.1f}, {100 * wins.high:.1f}]"
        (more if wins.low > 0.5 else less if wins.high < 0.5 else open_ones).append(text)
    lines = []
    for what, results in (
        (f"More than half of the prompts won against the base by {title_of(plan.score)}", more),
        ("**Not resolved**, the interval holds a half", open_ones),
        ("**No**, less than half", less),
    ):
        if results:
            lines.append(f"{what}: {'; '.join(results)}.")
    failed = [name for name in plan.methods if name not in findings.methods]
    if failed:
        lines.append(f"**Failed**: {', '.join(failed)}.")
    return "\n\n".join(lines)


def bend(slopes: SlopeSettings) -> Grid:
    """How much the power term changed the slope at the errors that training reached."""
    settings, _, seen = slopes
    rows = []
    for n in SLOPE_EXPONENTS:
        with_exponent = {**settings, "n": n, "gamma": 1 / n}
        cells = [Cell(f"{n:g}", n)]
        for form in ("appendix_c", "eq9"):
            low, high, start = (
                drawing.reward_slope(np.array([d]), with_exponent, 0.1, form)[0] for d in (*seen, 0.0)
            )  # these two forms don't depend on the reference's error
            cells.append(Cell(f"{percent(low / start - 1, sign=True)} to {percent(high / start - 1, sign=True)}"))
        rows.append(tuple(cells))
    note = (
        f"Change of the slope against d = 0, where all forms have Diffusion-DPO's; γ = 1/n, η = {settings['eta']:g}; d "
        f"from {seen[0]:.2g} to {seen[1]:.2g}, means over held-out pairs at the ends of the runs."
    )
    return Grid("Bend", ("n", "slope, appendix_c", "slope, eq9"), tuple(rows), note)


def tuning(findings: Findings) -> Grid:
    """The score of every tuning run; all methods have the same budget."""
    plan = findings.plan
    rows = []
    for method in plan.tuned:
        cells = [Cell(method)]
        for value in plan.tuning.values:
            score = findings.tuning[method, value]
            chosen = findings.chosen.get(method) == value
            cells.append(Cell(number(score, plan.score) if np.isfinite(score) else "failed", score, best=chosen))
        at_end = findings.chosen.get(method) in (plan.tuning.values[0], plan.tuning.values[-1])
        rows.append((*cells, Cell("yes" if at_end else "")))
    note = (
        f"Mean {title_of(plan.score)} on {', '.join(Path(name).stem for name in plan.tuning.prompts)}, which nothing "
        f"else uses, after training with seed {plan.tuning.seed}; bold is what was taken. Methods that are not listed "
        "take the value of the method that they vary."
    )
    columns = (f"{plan.tuning.key} =", *plan.tuning.values, "at the end of the range")
    return Grid("Tuning", columns, tuple(rows), note)


def _slope_settings(findings: Findings) -> SlopeSettings | None:
    """The slope settings of the xDPO methods; None without such methods."""
    first = {n: findings.runs[n, findings.plan.seeds[0]].settings for n in findings.methods}
    names = [n for n, settings in first.items() if "reward" in settings.loss.objective.keys]
    if not names:
        return None
    loss = first[names[0]].loss
    ends = np.concatenate([findings.logged(n, f"eval/d_{side}") for n in names for side in ("chosen", "rejected")])
    if not np.isfinite(ends).all():
        return None
    reference = float(findings.logged(names[0], "eval/reference_error").mean())
    return loss.model_dump(include={"beta", "eta"}), reference, (min(float(ends.min()), 0.0), float(ends.max()))


def _interval(estimate: Estimate) -> str:
    return f"[{estimate.low:.3g}, {estimate.high:.3g}]"


def _times(ratio: Estimate) -> Cell:
    return Cell(
        "never" if ratio.value == 0 else f"{ratio.value:.2f}",
        ratio.value,
        f"[{ratio.low:.2f}, {ratio.high:.2f}]",
    )


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3g} [{estimate.low:+.3g}, {estimate.high:+.3g}]".replace("-", "−")
