"""Models to generate with: a user's name for one → its files and their version → a pipeline."""

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, StrictInt, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file

from xdpo.config import ComputeConfig, FilePath, ModelConfig, Section, Text, load_config, parse_yaml
from xdpo.families import PipelineParts, check_model, family_of_pipeline, load_parts, part_checksum, pipeline_with
from xdpo.families.checks import check_denoiser
from xdpo.families.pipeline_files import Unreachable, describe_file, fetch, weight_paths
from xdpo.files import kept_sha256
from xdpo.models.lora import LORA_FILE, check_lora, layers_adapted
from xdpo.models.policy import make_policy

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

MODEL_CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"


class ModelSpec(Section):
    """A model to generate with: a pipeline, its denoiser replaced or adapted, or a run of train_xdpo.py.

    configs/models/ holds the paper's five. `vae` replaces the autoencoder of any of these. `revision` is the hub
    revision of `unet` or `lora`, `base_revision` that of `base`.
    """

    base: FilePath | None = None  # hub id or folder of a pipeline
    base_revision: Text | None = None
    unet: FilePath | None = None  # hub id or folder of a denoiser in diffusers format, itself or under its usual name
    lora: FilePath | None = None  # a safetensors file, or hub id or folder with pytorch_lora_weights.safetensors
    vae: FilePath | None = None  # as the config's model.vae
    t5_tokens: Annotated[StrictInt, Field(gt=0, le=512)] | None = None  # likewise; a run knows its own
    run: FilePath | None = None  # run folder (its export), or a checkpoint folder of a run
    revision: Text | None = None

    @model_validator(mode="after")
    def _is_one_model(self):
        if (self.base is None) == (self.run is None):
            raise ValueError("give either base, a pipeline, or run, a run folder of train_xdpo.py")
        if self.unet is not None and self.lora is not None:
            raise ValueError("give unet or lora, not both")
        if self.run is not None and (self.unet or self.lora or self.base_revision or self.revision or self.t5_tokens):
            raise ValueError("a run knows its base, weights and t5_tokens; give run alone")
        if self.revision is not None and not (self.unet or self.lora):
            raise ValueError("revision is that of unet or lora; the pipeline's is base_revision")
        return self


@dataclass(frozen=True)
class ResolvedModel:
    """A model whose files have been found. Revisions are hub commits, or "sha256:…" of local weights.

    `kind` is that of `weights`: the denoiser's name, such as "unet" (hub id or folder), "lora" (hub id, folder or
    file), "checkpoint" (folder), or "base" and None.
    """

    name: str
    base: ModelConfig
    base_revision: str
    kind: str
    weights: str | None = None
    subfolder: str | None = None
    revision: str | None = None

    @property
    def identity(self) -> dict[str, str | int | None]:
        """What makes two models the same, wherever their files lie."""
        base = "local folder" if Path(self.base.pipeline).is_dir() else self.base.pipeline
        same: dict[str, str | int | None] = {
            "base": base,
            "base_revision": self.base_revision,
            "kind": self.kind,
            "revision": self.revision,
        }
        if self.base.vae is not None:
            same["vae"] = part_checksum(self.base, "vae")
        if self.base.t5_tokens is not None:
            same["t5_tokens"] = self.base.t5_tokens
        return same


def read_model_spec(name: str, **replacing: str | int | None) -> tuple[str, ModelSpec]:
    """A user's name for a model → (display name, spec). Raises ValueError, with the choices, for what is no model.

    name: a YAML file or the name of one in configs/models, a pipeline folder, a run folder, its export or a checkpoint
    of it, or a hub id. replacing: fields of ModelSpec, where not None, in place of those that the name stands for.
    """
    path, shipped = Path(name), sorted(file.stem for file in MODEL_CONFIGS.glob("*.yaml"))
    if name in shipped:  # even if a folder has that name, such as this package's, which is ./xdpo
        path = MODEL_CONFIGS / f"{name}.yaml"
    if path.suffix in (".yaml", ".yml"):
        return path.stem, _spec_from_yaml(path, **replacing)
    if path.is_file():
        raise ValueError(f"model: {name!r} {describe_file(path)}")
    folder = path.resolve()
    if (folder / "model_index.json").is_file():
        return folder.name, _spec(name, base=name, **replacing)
    if (folder / "config.yaml").is_file():
        return folder.name, _spec(name, run=name, **replacing)
    if (folder.parent / "config.yaml").is_file() and folder.name == "export":
        return folder.parent.name, _spec(name, run=name, **replacing)
    if (folder / "policy.safetensors").is_file():
        return f"{folder.parent.parent.name}_{folder.name}", _spec(name, run=name, **replacing)
    if folder.is_dir():
        raise ValueError(
            f"model: {name!r} is no pipeline folder (model_index.json), run folder (config.yaml) or checkpoint "
            "(policy.safetensors). A UNet or LoRA folder goes with its pipeline: --model PIPELINE --unet or --lora it"
        )
    if name.count("/") != 1 or path.is_absolute() or name.startswith("."):
        near = difflib.get_close_matches(name, shipped, n=1)
        raise ValueError(
            f"model: no folder {name!r} here; choose from {', '.join(shipped)}, or give a folder, a YAML file or a hub "
            "id of the form owner/name" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return name.replace("/", "_"), _spec(name, base=name, **replacing)


def resolve_model(name: str, spec: ModelSpec) -> ResolvedModel:
    """Find a model's files and their version, before any weight is loaded.

    For hub models only small files are fetched here, which give the commit. Raises ValueError where files are missing.
    """
    if spec.run is not None:
        return _resolve_run(name, Path(spec.run), spec.vae)
    pipeline = ModelConfig(pipeline=spec.base, revision=spec.base_revision, vae=spec.vae, t5_tokens=spec.t5_tokens)
    base, base_revision = _resolve_base(pipeline)
    source = spec.unet or spec.lora
    if source is None:
        return ResolvedModel(name, base, base_revision, "base")
    denoiser = family_of_pipeline(base).denoiser
    kind = denoiser if spec.unet else "lora"
    label, path = f"model.{'unet' if spec.unet else 'lora'}: {source!r}", Path(source)
    if path.is_file():
        if kind == denoiser or path.suffix != ".safetensors":
            raise ValueError(f"{label} {describe_file(path)}")
        _check_fit(kind, path, base, label)
        return ResolvedModel(name, base, base_revision, kind, source, None, f"sha256:{kept_sha256(path)}")
    files = (f"{denoiser}/config.json", "config.json") if kind == denoiser else (LORA_FILE,)
    if path.is_dir():
        file = next((path / file for file in files if (path / file).is_file()), None)
        if file is None:
            others = ", ".join(sorted(other.name for other in path.glob("*.safetensors"))) if kind == "lora" else ""
            hint = f", but {others}: name that file itself, as --lora {path}/FILE" if others else ""
            raise ValueError(f"{label} has no {' or '.join(files)}{hint}")
        _check_fit(kind, file, base, label)
        return ResolvedModel(name, base, base_revision, kind, str(file.parent), None, _local_revision(file.parent))
    commit, file = _hub_file(source, files, spec.revision, label.partition(":")[0])
    _check_fit(kind, file, base, label, has_weights=False)
    subfolder = denoiser if kind == denoiser and file.parent.name == denoiser else None
    return ResolvedModel(name, base, base_revision, kind, source, subfolder, commit)


def load_model(model: ResolvedModel, dtype: torch.dtype = torch.float32) -> "DiffusionPipeline":
    """The family's pipeline of a resolved model: on the CPU, no safety checker.

    dtype: of the weights. In float32 FLUX takes 67 GB of the machine's memory; where its files already have the dtype
    that is asked for they are mapped, and take next to none. Raises ValueError where weights can't be loaded or don't
    fit the base.
    """
    parts = load_parts(model.base, dtype=dtype)
    try:
        if model.weights is None:
            return pipeline_with(parts, parts.denoiser)
        if model.kind == parts.family.denoiser:
            return pipeline_with(parts, _load_denoiser(type(parts.denoiser), model, model.weights, dtype))
        if model.kind == "checkpoint":
            return pipeline_with(parts, _load_checkpoint(parts, Path(model.weights), model.base))
        pipeline = pipeline_with(parts, parts.denoiser)
        _load_lora(pipeline, parts.family.lora_parts, model, model.weights)
        return pipeline
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        problem = f"can't load {model.kind} weights of {model.weights}: {error}"
        raise ValueError(f"model {model.name!r}: {problem}") from error


def _spec(label: str, **fields: Any) -> ModelSpec:
    try:
        return ModelSpec(**fields)
    except ValidationError as error:
        problems = "; ".join(
            ".".join(map(str, problem["loc"])) + (": " if problem["loc"] else "") + problem["msg"]
            for problem in error.errors()
        )
        raise ValueError(f"model {label}: {problems}") from None


def _spec_from_yaml(path: Path, **replacing: str | int | None) -> ModelSpec:
    try:
        fields, repeated_keys = parse_yaml(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: can't read {path}: {error}") from error
    if repeated_keys:
        raise ValueError(f"model {path}: {'; '.join(repeated_keys)}")
    if not isinstance(fields, dict):
        raise ValueError(f"model {path}: must be a mapping with {', '.join(ModelSpec.model_fields)}")
    given = {key: value for key, value in replacing.items() if value is not None}
    return _spec(str(path), **{str(key): value for key, value in fields.items()}, **given)


def _resolve_base(base: ModelConfig) -> tuple[ModelConfig, str]:
    check_model(base)
    if Path(base.pipeline).is_dir():
        return base, _local_revision(Path(base.pipeline), "*/")
    commit, _ = _hub_file(base.pipeline, ("model_index.json",), base.revision, "model.base")
    return base.model_copy(update={"revision": commit}), commit


def _resolve_run(name: str, path: Path, vae: str | None) -> ResolvedModel:
    """A run's export, or one of its checkpoints; the base is the pipeline that the run trained.

    vae: in place of the autoencoder that it was trained with.
    """
    is_checkpoint = (path / "policy.safetensors").is_file()
    run = path.resolve().parents[1] if is_checkpoint else path.resolve().parent if path.name == "export" else path
    if not (run / "config.yaml").is_file():
        raise ValueError(f"model.run: {str(path)!r} is neither a run folder of train_xdpo.py nor a checkpoint of one")
    trained = load_config(run / "config.yaml").model
    changes = {"frozen_precision": "fp32", "vae": vae or trained.vae}  # what is sampled has a precision of its own
    base, base_revision = _resolve_base(trained.model_copy(update=changes))
    if is_checkpoint:
        return ResolvedModel(name, base, base_revision, "checkpoint", str(path), None, _local_revision(path))
    denoiser = family_of_pipeline(base).denoiser
    if (run / "export" / denoiser).is_dir():
        kind, weights = denoiser, run / "export" / denoiser
    elif (run / "export" / LORA_FILE).is_file():
        kind, weights = "lora", run / "export"
    else:
        saved = ", ".join(str(folder) for folder in sorted((run / "checkpoints").glob("step_????????")))
        raise ValueError(
            f"model.run: {run} has no export, as it isn't finished; name one of its checkpoints: {saved or 'none yet'}"
        )
    _check_fit(kind, weights / ("config.json" if kind == denoiser else LORA_FILE), base, f"model.run: {run}")
    return ResolvedModel(name, base, base_revision, kind, str(weights), None, _local_revision(weights))


def _check_fit(kind: str, file: Path, base: ModelConfig, label: str, *, has_weights: bool = True) -> None:
    """Refuse a denoiser or a LoRA file that doesn't fit the base, if the base's configs are available.

    has_weights: the weights lie beside the denoiser's config, as in a folder; a hub model's are fetched on loading.
    """
    try:
        family = family_of_pipeline(base)
        folder = fetch(base.pipeline, base.revision, family.parts)
    except Unreachable:  # load_parts will raise
        return
    if kind == family.denoiser:
        check_denoiser(family, file.parent, folder, label, has_weights=has_weights)
    else:
        check_lora(family, file, folder, label)


def _local_revision(folder: Path, depth: str = "") -> str:
    """The identity of a folder's model, whatever its name: "sha256:…" over its weights and configs."""
    total = hashlib.sha256()
    weights = sorted(folder.glob(f"{depth}*.safetensors")) or sorted(folder.glob(f"{depth}*.bin"))
    for path in [*weights, *sorted(folder.glob(f"{depth}*.json"))]:
        if path.name != "optimizer.safetensors":  # of a checkpoint: not part of the model
            total.update(path.relative_to(folder).as_posix().encode() + bytes.fromhex(kept_sha256(path)))
    return f"sha256:{total.hexdigest()}"


def _hub_file(repository: str, files: tuple[str, ...], revision: str | None, key: str) -> tuple[str, Path]:
    """The commit of a hub revision, and the path in the cache of the first of `files` that it has."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    problem: Exception | None = None
    for file in files:
        try:
            path = Path(hf_hub_download(repository, file, revision=revision))
            return path.parents[file.count("/")].name, path  # …/snapshots/COMMIT/file
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            problem = error
    raise ValueError(
        f"{key}: can't find {' or '.join(files)} of {repository!r} on the hub or in its cache: "
        f"{str(problem).strip().splitlines()[0].rstrip('.')}. "
        "Check the name and the network, or download it once and give its folder"
    ) from problem


def _load_denoiser(kind: "type[ModelMixin]", model: ResolvedModel, weights: str, dtype: torch.dtype) -> "ModelMixin":
    """The denoiser that replaces the base's; from a variant (fp16, …) where a folder has nothing else."""
    folder = Path(weights)
    where = {"variant": weight_paths(folder)[0]} if folder.is_dir() else {"revision": model.revision}
    denoiser, report = kind.from_pretrained(
        weights,
        subfolder=model.subfolder,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        **where,
    )
    if missing := report["missing_keys"]:
        raise ValueError(f"{len(missing)} weights are missing, {min(missing)} for one; it is another model's")
    return denoiser.eval().requires_grad_(False)


def _load_lora(pipeline: "DiffusionPipeline", names: tuple[str, ...], model: ResolvedModel, weights: str) -> None:
    """Adapt a pipeline's parts of these names. Raises ValueError where not every layer of the file took effect."""
    from diffusers.utils import logging
    from peft.tuners.tuners_utils import BaseTunerLayer

    path = Path(weights)
    where: dict[str, str | None]
    if path.is_file():
        file, where = path, {"weight_name": path.name}
    elif path.is_dir():
        file, where = path / LORA_FILE, {"weight_name": LORA_FILE}
    else:
        _, file = _hub_file(weights, (LORA_FILE,), model.revision, "model.lora")
        where = {"weight_name": LORA_FILE, "revision": model.revision}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a LoRA of the denoiser alone has nothing for the text encoders, which is no fault
    try:
        pipeline.load_lora_weights(str(path.parent if path.is_file() else path), use_safetensors=True, **where)
    finally:
        logging.set_verbosity(verbosity)
    adapted = [
        module for name in names for module in getattr(pipeline, name).modules() if isinstance(module, BaseTunerLayer)
    ]
    if len(adapted) != (expected := layers_adapted(file)):
        raise ValueError(
            f"{file.name} adapts {expected} layers, and {len(adapted)} took effect; its names are ambiguous"
        )


def _load_checkpoint(parts: PipelineParts, folder: Path, model: ModelConfig) -> "ModelMixin":
    """Load a training checkpoint into the base's denoiser: the moving average of the weights, if it has one."""
    policy = make_policy(parts, model, ComputeConfig())
    names = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    weights = load_file(folder / "policy.safetensors")
    if weights.keys() != set(names):
        raise ValueError(f"model.run: {folder} doesn't fit its run's config: it holds other parameters than the policy")
    if (folder / "ema.safetensors").is_file():
        average = load_file(folder / "ema.safetensors")
        weights = {name: average[str(index)] for index, name in enumerate(names)}
    policy.load_state_dict(weights, strict=False)
    return policy.eval().requires_grad_(False)
