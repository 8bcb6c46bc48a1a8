"""The results of a reproduction as a Markdown page with figures."""

import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from xdpo.experiments import drawing, measures
from xdpo.experiments.findings import BOTH_ERRORS, Findings
from xdpo.experiments.measures import Estimate
from xdpo.experiments.plan import BASE, COSTS, Plan, Question
from xdpo.experiments.stages import TIMED_ROUNDS, TIMED_STEPS
from xdpo.files import write_text
from xdpo.provenance import git_commit, library_versions
from xdpo.report.figures import save
from xdpo.report.grids import Cell, Grid, number, percent, title_of, to_markdown

DRAWN_EXPONENTS = (6.0, 100.0)  # at 400 the exponents of Eq. 10 meet the loss's limit

SlopeSettings = tuple[dict[str, float], float, dict[tuple[float, str], tuple[float, float]]]
"""β and η, the reference's error, and by n and reward form the range of d at the ends of the runs."""


def write(findings: Findings, page: Path, command: str) -> list[Path]:
    """Write the page, and its figures into a folder of the same name beside it. Returns all written paths."""
    figures, written = page.with_suffix(""), list[Path]()
    if findings.with_curves:
        written += save(drawing.quality(findings), figures / "quality")
        written += save(drawing.trade_offs(findings), figures / "trade_offs")
    if findings.with_errors:
        written += save(drawing.errors(findings), figures / "errors")
    slopes = _slope_settings(findings)
    if slopes is not None:
        settings, reference, seen = slopes
        drawn = {n: _joined(seen, n) for n in DRAWN_EXPONENTS if any(n == other for other, _ in seen)}
        written += save(drawing.slopes(settings, reference, drawn), figures / "slopes")
    text = "\n\n".join(_blocks(findings, figures.name, command, slopes)) + "\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, text)
    return [page, *written]


def _blocks(findings: Findings, figures: str, command: str, slopes: SlopeSettings | None) -> list[str]:
    plan = findings.plan
    blocks = [f"# {plan.title}", _made_by(findings, command)]
    if findings.methods:
        blocks += [_what_is_here(findings), "## Questions", to_markdown(questions(findings))]
    if findings.with_curves:
        blocks += [
            "## Quality over training",
            f"![Quality over training]({figures}/quality.png)",
            to_markdown(efficiency(findings)),
            "## What quality is bought with",
            "Each line goes from the base over a method's checkpoints; bars are intervals of what goes up. Distance is "
            "the root mean square difference of pixels from the base's image of the same seed, spread that of a "
            "prompt's images from each other; d as in the questions.",
            f"![What quality is bought with]({figures}/trade_offs.png)",
        ]
    for group in dict.fromkeys(plan.methods[name].group for name in findings.methods):
        blocks += [f"## {group}", to_markdown(methods(findings, group))]
    for guidance in plan.guidances[1:] if findings.methods else ():
        blocks += [f"## At guidance {guidance:g}", to_markdown(at_guidance(findings, guidance))]
    if findings.methods:
        blocks += ["## Does every objective beat the base?", _against_base(findings)]
    if findings.with_errors:
        blocks += [
            "## Both errors over training",
            "d is the policy's error minus the reference's on held-out pairs, at the same timesteps and noise in all "
            "runs; lines are means over seeds, bands their range.",
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


def _what_is_here(findings: Findings) -> str:
    """The paragraph on what all results have in common, and on the parts of the plan that are missing."""
    plan = findings.plan
    text = (
        "Intervals are 95 % bootstraps that draw seeds and prompts anew, which are rather too narrow with few seeds; "
        "those of metrics on held-out pairs are Student's over seeds, on pairs that are the same for all. Every method "
        "has the same data, batch and "
        f"schedule, and is compared after {plan.steps} optimizer steps where nothing else is said; methods with curves "
        f"go on. The seeds are {', '.join(map(str, plan.seeds))}, or the first so many of them. The scores are of "
        f"{len(findings.scores[plan.guidance][BASE, plan.score])} prompts ({', '.join(plan.prompts)}), sampled at "
        f"guidance {plan.guidance:g} where no other is named."
    )
    missing = [name for name in plan.methods if not any(method == name for method, _ in findings.runs)]
    if missing:
        text += (
            f"\n\nParts of the plan that were not run: {', '.join(missing)}. Questions about them alone are left out."
        )
    return text


def _made_by(findings: Findings, command: str) -> str:
    """The line on command, commits, machine and versions. The commits are those that the trainings recorded."""
    commits, starts = set(), []
    for run in [*findings.candidates.values(), *findings.runs.values()]:
        if (run.folder / "run.json").is_file():
            facts = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
            commits.add(str(facts.get("git_commit"))[:10])
            starts += [start["time"] for start in facts["starts"]]
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items() if version)
    where = f"{platform.machine()}, {versions}"
    trained = f"trainings at commit {', '.join(sorted(commits))}, from {min(starts)} on"
    return f"Made by `{command}`; {trained}; written at commit {str(git_commit())[:10]}; on {where}."


def questions(findings: Findings) -> Grid:
    """Each question, its answer, and the difference that decides it.

    A question and those that go on from it with "…" are left out together, where parts that were not run leave all of
    them without an answer.
    """
    rows: list[tuple[Cell, ...]] = []
    begun = {BASE} | {name for name, _ in findings.runs}
    groups: list[list[Question]] = []
    for question in findings.plan.questions:
        if not groups or not question.ask.startswith("…"):
            groups.append([])
        groups[-1].append(question)
    were_run = [group for group in groups if any({question.method, question.than} <= begun for question in group)]
    for question in itertools.chain(*were_run):
        if not findings.can_answer(question):
            why = "a method failed" if {question.method, question.than} <= begun else "not run"
            rows.append((Cell(question.ask), Cell(f"not answered: {why}"), Cell(""), Cell("")))
            continue
        answer, difference = findings.answer(question)
        rows.append(
            (
                Cell(question.ask),
                Cell(answer, best=np.isfinite(difference.value) and difference.sign != 0),
                Cell(_measured(question, findings.plan)),
                Cell(_signed(difference) if np.isfinite(difference.value) else ""),
            )
        )
    note = (
        "A difference is resolved, and its answer bold, where its interval excludes zero. Otherwise these seeds and "
        "prompts cannot tell whether there is a difference; it does not mean that there is none. “At equal” compares "
        "two trainings where the quantity first reaches the lower of their highest values; the curves are straight "
        f"between checkpoints. {title_of(BOTH_ERRORS)}: mean of d over chosen and rejected held-out images, by which "
        "the policy's bound on the KL divergence of held-out images from its own exceeds the base's. d of chosen and "
        "of rejected images is not said of methods whose reference moves away from the base."
    )
    return Grid("Questions", ("question", "answer", "difference in", "difference [95 %]"), tuple(rows), note)


def _measured(question: Question, plan: Plan) -> str:
    """What a question compares, and where that is not after the plan's steps at its first guidance."""
    text = title_of(question.quantity or plan.score)
    if question.step is not None:
        text += f" after {question.step} steps"
    if question.guidance is not None:
        text += f" at guidance {question.guidance:g}"
    if question.at_equal:
        text += f" at equal {title_of(question.at_equal)}"
    text += f": {question.method} − {question.than}"
    if question.than_step is not None:
        text += f" after {question.than_step}"
    return text


def methods(findings: Findings, group: str) -> Grid:
    """Scores, win rates and errors of a group of methods, with the base in the first row."""
    plan = findings.plan
    names = [BASE, *(n for n in findings.methods if group in (plan.methods[n].group, *plan.methods[n].also_in))]
    best = {scorer: max(names, key=lambda name: findings.of(name, scorer).mean()) for scorer in plan.scorers}
    rows = [_method_row(findings, name, [s for s in plan.scorers if best[s] == name]) for name in names]
    columns = ("method", plan.tuning.key.rpartition(".")[2], *(title_of(s) for s in plan.scorers))
    columns += ("wins against base", f"wins against {plan.baseline}", "d chosen", "d rejected")
    note = f"Win rates by {title_of(plan.score)}, pair by pair of seed and prompt; d of held-out pairs, [lowest, "
    return Grid(group, columns, tuple(map(tuple, rows)), note + "highest] over seeds.")


def _method_row(findings: Findings, name: str, best_by: Sequence[str]) -> list[Cell]:
    plan = findings.plan
    row = [Cell(name), Cell("" if name == BASE else str(plan.value_of(name, findings.chosen)))]
    row += [_mean_cell(findings.of(name, scorer), scorer, scorer in best_by) for scorer in plan.scorers]
    for other in (BASE, plan.baseline):
        row.append(_wins_cell(findings, name, other))
    for side in ("chosen", "rejected"):
        values = findings.of(name, f"eval/d_{side}")
        finite = name != BASE and np.isfinite(values).all()
        spread = f"[{values.min():.2g}, {values.max():.2g}]" if finite else ""
        row.append(Cell(f"{values.mean():.2g}" if finite else "", float(values.mean()) if finite else None, spread))
    return row


def _mean_cell(scores: np.ndarray, scorer: str, is_best: bool) -> Cell:
    mean = measures.mean(scores)
    return Cell(number(mean.value, scorer), mean.value, _interval(mean), best=is_best)


def _wins_cell(findings: Findings, name: str, other: str, guidance: float | None = None) -> Cell:
    """How often a method wins against another; empty for one that has no results, or is the same."""
    if name in (other, BASE) or other not in (BASE, *findings.methods):
        return Cell("")
    scores, others = (findings.of(each, findings.plan.score, guidance=guidance) for each in (name, other))
    wins = measures.win_rate(scores, others)
    return Cell(percent(wins.value), wins.value, f"[{100 * wins.low:.1f}, {100 * wins.high:.1f}]")


def at_guidance(findings: Findings, guidance: float) -> Grid:
    """Scores and win rates of all methods at one of the plan's further guidances."""
    plan, names = findings.plan, [BASE, *findings.methods]
    scores = {(name, s): findings.of(name, s, guidance=guidance) for name in names for s in plan.scorers}
    best = {scorer: max(names, key=lambda name: scores[name, scorer].mean()) for scorer in plan.scorers}
    rows = [
        (
            Cell(name),
            *(_mean_cell(scores[name, scorer], scorer, best[scorer] == name) for scorer in plan.scorers),
            *(_wins_cell(findings, name, other, guidance) for other in (BASE, plan.baseline)),
        )
        for name in names
    ]
    columns = ("method", *map(title_of, plan.scorers), "wins against base", f"wins against {plan.baseline}")
    note = f"The same models as above; win rates by {title_of(plan.score)}."
    return Grid(f"Guidance {guidance:g}", columns, tuple(rows), note)


def efficiency(findings: Findings) -> Grid:
    """Pairs and time to reach the baseline's final score, as ratios: the paper's 1.5 and 1.6."""
    plan, rows = findings.plan, []
    for name in findings.with_curves if plan.baseline in findings.with_curves else ():
        speed_up = findings.speed_up(name)
        cost = findings.seconds_per_pair(name) / findings.seconds_per_pair(plan.baseline)
        in_time = Estimate(speed_up.value / cost, speed_up.low / cost, speed_up.high / cost)
        times = (Cell(f"{cost:.2f}", cost), _times(in_time)) if np.isfinite(cost) else (Cell(""), Cell(""))
        equal = (findings.difference_at_equal(name, plan.baseline, plan.score, spent) for spent in COSTS)
        differences = [
            Cell(_signed(each) if name != plan.baseline and np.isfinite(each.value) else "") for each in equal
        ]
        rows.append((Cell(name), _times(speed_up), *times, *differences))
    columns = (
        "method",
        "pairs: times fewer",
        "time of a pair",
        "time: times less",
        "at equal pairs",
        "at equal seconds",
    )
    note = (
        f"Pairs seen until the {title_of(plan.score)} of {plan.baseline} after {plan.steps} steps is reached, its own "
        "over the method's, by straight lines between checkpoints, 0 where it never is; the time of a pair against "
        f"{plan.baseline}'s, each in {TIMED_ROUNDS} rounds of sampling, or {TIMED_STEPS} steps for one, with "
        "nothing else on the machine and encoded examples from a cache; and the ratio in time, whose interval is that "
        "of the pairs. Times are of the methods that a question compares at equal seconds. "
        f"“At equal”: {title_of(plan.score)} minus {plan.baseline}'s, where the shorter of "
        "the two trainings ends; seconds are pairs times the time of a pair, with sampling and scoring where these are "
        "part of the training, and without what was prepared before it. The paper says 1.5 and 1.6, without a unit."
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
    failed = [name for name in dict.fromkeys(name for name, _ in findings.runs) if name not in findings.methods]
    if failed:
        lines.append(f"**Failed**: {', '.join(failed)}.")
    return "\n\n".join(lines)


def bend(slopes: SlopeSettings) -> Grid:
    """How much the power term changed the slope at the errors that trainings with it reached."""
    settings, reference, seen = slopes
    rows = []
    for (n, form), reached in sorted(seen.items()):
        with_exponent = {**settings, "n": n, "gamma": 1 / n}
        low, high, start = (
            drawing.reward_slope(np.array([d]), with_exponent, reference, form)[0] for d in (*reached, 0.0)
        )
        change = f"{percent(low / start - 1, sign=True)} to {percent(high / start - 1, sign=True)}"
        rows.append((Cell(f"{n:g}", n), Cell(form), Cell(f"{reached[0]:.2g} to {reached[1]:.2g}"), Cell(change)))
    note = (
        f"Change of the slope against d = 0, where all forms have Diffusion-DPO's; γ = 1/n, η = {settings['eta']:g}; d "
        "are means over held-out pairs at the ends of the runs, and 0."
    )
    return Grid("Bend", ("n", "reward", "d", "slope"), tuple(rows), note)


def tuning(findings: Findings) -> Grid:
    """The score of every tuning run; all methods have the same budget."""
    plan = findings.plan
    rows = []
    for method in dict.fromkeys(name for name, _ in findings.candidates):
        cells = [Cell(method)]
        for value in plan.tuning.values:
            score = findings.tuning[method, value]
            chosen = findings.chosen.get(method) == value
            cells.append(Cell(number(score, plan.score) if np.isfinite(score) else "failed", score, best=chosen))
        at_end = findings.chosen.get(method) in (plan.tuning.values[0], plan.tuning.values[-1])
        rows.append((*cells, Cell("yes" if at_end else "")))
    note = (
        f"Mean {title_of(plan.score)} on {', '.join(Path(name).stem for name in plan.tuning.prompts)}, which decides "
        f"nothing else, at guidance {plan.guidance:g} after {plan.steps} steps with seed {plan.tuning.seed}; bold is "
        "what was taken. Methods that are not listed take the value of the method that they vary, or a multiple of it."
    )
    columns = (f"{plan.tuning.key} =", *plan.tuning.values, "at the end of the range")
    return Grid("Tuning", columns, tuple(rows), note)


def _slope_settings(findings: Findings) -> SlopeSettings | None:
    """The slope settings of the xDPO methods; None without such methods, or where one's last d is none."""
    plan = findings.plan
    first = {n: findings.runs[n, plan.seeds[0]].settings for n in findings.methods}
    names = [n for n, settings in first.items() if "reward" in settings.loss.objective.keys]
    if not names:
        return None
    ends: dict[tuple[float, str], list[float]] = {}
    for name in names:
        loss = first[name].loss.model_dump()
        for side in ("chosen", "rejected"):
            values = findings.of(name, f"eval/d_{side}", plan.last_step(name))
            ends.setdefault((float(loss["n"]), str(loss["reward"])), []).extend(values.ravel().tolist())
    seen = {key: (min(*values, 0.0), max(*values, 0.0)) for key, values in ends.items()}
    if not np.isfinite([*seen.values()]).all():
        return None
    reference = float(findings.of(names[0], "eval/reference_error").mean())
    return first[names[0]].loss.model_dump(include={"beta", "eta"}), reference, seen


def _joined(seen: Mapping[tuple[float, str], tuple[float, float]], n: float) -> tuple[float, float]:
    """The range of d over all reward forms with this n."""
    ranges = [reached for (other, _), reached in seen.items() if other == n]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


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
