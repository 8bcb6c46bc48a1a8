"""The first loss, precisions beside float32, loss scaling in fp16, and the same bits from run to run."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from gpu_checks.context import Context, make_trainee
from gpu_checks.rows import Finding, Row, equal, near
from xdpo import runs
from xdpo.compute import precision_of
from xdpo.config import ComputeConfig
from xdpo.non_finite import MAX_SKIPPED

PRECISIONS = ("bf16", "fp16", "fp32")
EXACT = "fp32 without TF32"
ERROR_TOLERANCE = 0.02  # relative, of a denoising error in another precision; learner.RECORDED_ERROR_TOLERANCE
FP16_SCALE = 64.0
GRADIENT_TOLERANCE = 0.1  # relative, of the gradient's norm: a difference of two gradients, whose roundings add up


# --- first loss and precisions -------------------------------------------------------------------------


def first_step(context: Context, precision: str, trainable: str, *, pipeline: str | None, compiled: bool) -> dict:
    """Loss, error and gradient norm of the first step, before its update; made once.

    In fp16 its loss scale is one at which nothing overflows: training finds its own, and skips steps until then.

    precision: one of PRECISIONS, "auto", or EXACT. pipeline: None for the size's. Raises NotPossible for a precision
    that the machine has not, and for compiling without a compiler.
    """
    name, tf32 = ("fp32", "false") if precision == EXACT else (precision, "true")
    name, pipeline = precision_of(ComputeConfig(precision=name)), pipeline or context.size.pipeline
    context.refuse_precision(name)
    keys = [f"compute.precision={name}", f"compute.tf32={tf32}", f"model.trainable={trainable}"]
    keys.append(f"compute.compile={str(compiled).lower()}")

    def make() -> dict:
        with context.compiling() if compiled else nullcontext():
            trainee = make_trainee(context.settings(*keys, pipeline=pipeline))
            if name == "fp16":
                trainee.learner.accelerator.scaler = torch.amp.GradScaler(context.device.type, init_scale=FP16_SCALE)
            return trainee.accumulate()

    return context.share(("first step", *keys, pipeline), make)


def check_first_loss(context: Context, precision: str, trainable: str, pipeline: str | None, compiled: bool) -> Finding:
    found = first_step(context, precision, trainable, pipeline=pipeline, compiled=compiled)
    remedy = (
        "compute.compile=false"
        if compiled
        else "compute.attention=eager, then compute.tf32=false: policy and reference run through different kernels"
    )
    return near(found["loss"], math.log(2), 1e-6, remedy)


def check_against_float32(context: Context, precision: str, name: str, tolerance: float) -> Finding:
    found = first_step(context, precision, "full", pipeline=None, compiled=False)
    true = first_step(context, EXACT, "full", pipeline=None, compiled=False)
    remedy = "compute.precision=fp32 with compute.tf32=false, and say which card does this"
    return near(found[name], true[name], tolerance, remedy)


# --- loss scaling --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaling:
    """Loss scales around a step whose gradients overflow, and after a resume; the trained weights around that step."""

    before: float
    after: float
    resumed: float
    weights_before: str
    weights_after: str
    weights_moved: bool


def scaling(context: Context) -> Scaling:
    """LoRA until a step is taken, then a step with an infinite gradient, a checkpoint, and its resume."""
    precision = "fp16" if context.on_gpu else "fp32"
    settings = context.settings(f"compute.precision={precision}", "model.trainable=lora")
    trainee = make_trainee(settings, scaled_on_cpu=not context.on_gpu)
    learner, numbers = trainee.learner, itertools.count()
    start = runs.weights_checksum(learner.bare_policy)
    for number in itertools.islice(numbers, MAX_SKIPPED):  # the scale begins high: it settles first
        trainee.step(number)
        if not learner.skipped_steps.in_a_row:
            break
    before, weights_before = learner.accelerator.scaler.get_scale(), runs.weights_checksum(learner.bare_policy)
    with overflowing(learner.parameters[0]):
        trainee.step(next(numbers))
    after, weights_after = learner.accelerator.scaler.get_scale(), runs.weights_checksum(learner.bare_policy)
    folder = context.working / "scaled"
    learner.save(folder, 1)
    del trainee, learner
    resumed = make_trainee(settings, scaled_on_cpu=not context.on_gpu).learner
    resumed.load(runs.checkpoint_path(folder, 1))
    return Scaling(
        before,
        after,
        resumed=resumed.accelerator.scaler.get_scale(),
        weights_before=weights_before,
        weights_after=weights_after,
        weights_moved=weights_before != start,
    )


@contextmanager
def overflowing(parameter: torch.nn.Parameter) -> Iterator[None]:
    """A context in which backward passes give a parameter a gradient that is no finite number."""
    hook = parameter.register_hook(lambda gradient: gradient * math.inf)
    yield
    hook.remove()


def check_scaling(context: Context, compared: Callable[[Scaling], tuple[object, object]]) -> Finding:
    return equal(*compared(context.share("scaling", lambda: scaling(context))), "compute.precision=bf16 or fp32")


# --- the same bits -------------------------------------------------------------------------------------


def check_run_to_run(context: Context) -> Finding:
    def train() -> str:
        trainee = make_trainee(context.settings("compute.deterministic=true"))
        norms = [trainee.step(number)["gradient_norm"] for number in range(2)]
        return f"{runs.weights_checksum(trainee.learner.bare_policy)}, gradients {norms[0]!r} and {norms[1]!r}"

    try:
        first, second = train(), train()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    return equal(second, first, "compute.attention=eager beside compute.deterministic=true")


def first_loss_rows() -> Iterator[Row]:
    trained = {"full": "full", "lora": "LoRA"}
    for precision, (trainable, name), compiled in itertools.product(PRECISIONS, trained.items(), (False, True)):
        claim = f"first loss is ln 2: {precision}, {name}"
        pipeline = None
        if compiled:
            claim, pipeline = f"{claim}, compiled (a tiny network)", "tiny"
        yield Row(claim, partial(check_first_loss, **_case(precision, trainable, pipeline, compiled)))
    case = _case("auto", "full", None, True)
    yield Row("first loss is ln 2: full, compiled, at this size", partial(check_first_loss, **case))


def _case(precision: str, trainable: str, pipeline: str | None, compiled: bool) -> dict:
    return {"precision": precision, "trainable": trainable, "pipeline": pipeline, "compiled": compiled}


ROWS = (
    *first_loss_rows(),
    *(
        Row(
            f"{title} as in float32: {precision}",
            partial(check_against_float32, precision=precision, name=name, tolerance=tolerance),
        )
        for precision in PRECISIONS
        for title, name, tolerance in (
            ("denoising error", "policy_error", ERROR_TOLERANCE),
            ("gradient norm", "gradient_norm", GRADIENT_TOLERANCE),
        )
    ),
    *(
        Row(f"fp16: {claim}", partial(check_scaling, compared=compared))
        for claim, compared in (
            ("a step that can be taken moves weights", lambda found: (found.weights_moved, True)),
            ("a step that overflows moves none", lambda found: (found.weights_after, found.weights_before)),
            ("a step that overflows halves the loss scale", lambda found: (found.after, found.before / 2)),
            ("a resumed run has the saved loss scale", lambda found: (found.resumed, found.after)),
        )
    ),
    Row("the same bits from run to run: full, compute.deterministic=true", check_run_to_run),
)
