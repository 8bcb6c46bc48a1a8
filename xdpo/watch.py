"""Evaluation during a training: statistics on held-out pairs, and sheets of sample images."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from xdpo import data, processes
from xdpo.dashboard import WORSE
from xdpo.data import Split
from xdpo.families import pipeline_with
from xdpo.images.sheets import contact_sheet, save_sheet
from xdpo.learner import Learner
from xdpo.precompute import Pairs, make_dataset
from xdpo.runlog import WARNED, RunLog, read_rows
from xdpo.sampling.images import sample_images
from xdpo.tally import Tally

SAMPLE_CHUNK = 4  # images sampled at once
WORSE_IN_A_ROW = 3  # evaluations before a run warns


class Watch:
    """Evaluates held-out pairs and draws sample sheets at their intervals."""

    def __init__(self, learner: Learner, held_out_pairs: Pairs | None, folder: Path, log: RunLog):
        self.learner, self.held_out_pairs, self.folder, self.log = learner, held_out_pairs, folder, log
        self.longest_seconds = 0.0
        self._evaluations: list[Mapping[str, float]] | None = None  # the log's, read once, and those since

    def evaluate_and_sample(self, step_number: int) -> None:
        """Do what is due after an optimizer step; 0 is before the first. Every process calls it."""
        started = time.perf_counter()
        settings, log, pairs = self.learner.settings, self.log, self.held_out_pairs
        is_last = step_number == settings.train.max_steps
        if pairs and (step_number % settings.eval.every == 0 or is_last):
            metrics = evaluate(self.learner, pairs)
            warning = self._warn(metrics) if log.is_main else None
            log.row(step_number, metrics | ({WARNED: 1.0} if warning else {}))
            log.say(
                f"step {step_number}: held-out implicit accuracy {metrics['eval/implicit_accuracy']:.3f}, "
                f"margin {metrics['eval/margin']:.4g} over {len(pairs)} pairs × {settings.eval.draws} draws"
            )
            if warning:
                log.say(f"warning: step {step_number}: {warning}")
        if settings.samples.every and (step_number % settings.samples.every == 0 or is_last):
            if self.learner.accelerator.is_main_process:
                sheet = draw_samples(self.learner, self.folder, step_number)
                log.image(step_number, "samples", sheet)
                log.say(f"step {step_number}: samples in {sheet}")
            processes.wait()
        self.longest_seconds = max(self.longest_seconds, time.perf_counter() - started)

    def _warn(self, metrics: Mapping[str, float]) -> str | None:
        """What `warn_of_both_errors` says after another evaluation."""
        if self._evaluations is None:
            self._evaluations = [row for row in read_rows(self.log.path) if "eval/d_chosen" in row]
        warning = warn_of_both_errors([*self._evaluations, metrics])
        self._evaluations.append({**metrics, WARNED: 1.0} if warning else metrics)
        return warning


def warn_of_both_errors(rows: Sequence[Mapping[str, float]]) -> str | None:
    """What to say of a run's rows, the newest last, whose policy gets worse than its reference on both images; or None.

    The margin then grows only because the rejected image is unlearnt faster. It is said once in a run: where, for the
    first time, WORSE_IN_A_ROW evaluations in a row have both errors above the reference's by more than WORSE of it.
    """
    evaluations = [row for row in rows if "eval/d_chosen" in row]
    if any(WARNED in row for row in evaluations):
        return None
    newest = evaluations[-WORSE_IN_A_ROW:]
    shares = [row[f"eval/d_{side}"] / row["eval/reference_error"] for row in newest for side in ("chosen", "rejected")]
    if len(newest) < WORSE_IN_A_ROW or not all(share > WORSE for share in shares):
        return None
    chosen, rejected = shares[-2:]
    return (
        f"for {WORSE_IN_A_ROW} evaluations in a row the policy has been worse than the reference on both images; its "
        f"held-out errors are now {chosen:.1%} above on the chosen and {rejected:.1%} on the rejected ones. The margin "
        "grows by unlearning, and images may fall apart: look at samples, and try loss.safeguard=0.9, a larger "
        "loss.beta or a smaller optim.learning_rate"
    )


@torch.no_grad()
def evaluate(learner: Learner, pairs: Pairs) -> dict[str, float]:
    """Statistics over held-out pairs at fixed (t, ε). Each process measures its part of them.

    An objective of single images is evaluated on pairs too: the chosen image is desirable, the rejected one is not.
    """
    settings, accelerator = learner.settings, learner.accelerator
    draws, rank, world = settings.eval.draws, accelerator.process_index, accelerator.num_processes
    dataset = make_dataset(pairs, learner.parts.tokenize, settings, Split.HELD_OUT)
    batches = data.held_out_batches(len(pairs), draws, settings.train.micro_batch_pairs, rank, world)
    tally = Tally(settings, accelerator, len(pairs) * draws)
    for number, positions in enumerate(batches):
        if number % draws == 0:  # all draws of a batch follow one another: read and encode it once
            with accelerator.autocast():
                batch = learner.make_noisy.encoded(dataset.batch(positions))
        tally.add(batch, learner.measure(batch, Split.HELD_OUT, positions))
        learner.references[Split.HELD_OUT].commit()
    means, _ = tally.exchange()
    return {f"eval/{name}": mean for name, mean in means.items()}


@torch.no_grad()
def draw_samples(learner: Learner, folder: Path, step_number: int) -> Path:
    """A sheet of sample images for the configured prompts and seeds; with the reference's, where it is loaded."""
    parts, columns = learner.parts, dict[str, Sequence[Image.Image]]()
    with learner.encoders_on_device():
        parts.vae.enable_slicing()  # one image at a time: decoding several would need more memory than a step
        with learner.accelerator.autocast():
            with learner.reference.running() as reference:
                if reference is not None:
                    columns["reference"] = _sample(learner, reference)
            columns["policy"] = _sample(learner, learner.bare_policy)
        parts.vae.disable_slicing()  # it would round the encoding of training images differently
    path = folder / "samples" / f"step_{step_number:08d}.png"
    save_sheet(path, contact_sheet(columns, learner.settings.samples.prompts))
    return path


def _sample(learner: Learner, denoiser: torch.nn.Module) -> list[Image.Image]:
    samples = learner.settings.samples
    return sample_images(
        pipeline_with(learner.parts, denoiser),
        samples.prompts,
        seed=samples.seed,
        num_inference_steps=samples.num_inference_steps,
        guidance_scale=samples.guidance_scale,
        image_size=learner.settings.data.resolution,
        chunk_size=SAMPLE_CHUNK,
    )
