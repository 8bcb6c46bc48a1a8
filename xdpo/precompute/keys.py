"""The caches' keys: everything that decides a cache's content, by name. A run with another key must not use it."""

from pathlib import Path
from typing import Any

from xdpo.cache import ExampleCache
from xdpo.cache.examples import PRECISION, SOURCE
from xdpo.compute import device_kind, precision_of
from xdpo.config import Config
from xdpo.data import Filters, PairTable, Split
from xdpo.families import caption_choices, family_of_pipeline, part_checksum
from xdpo.files import file_sha256


def takes_single_images(settings: Config, split: Split) -> bool:
    """Whether batches hold single images instead of pairs. Held-out batches always hold pairs."""
    return settings.loss.objective.is_unpaired and not split.is_held_out


def examples_folder(settings: Config, split: Split) -> Path:
    if settings.cache.examples is None:
        raise ValueError("cache.examples is null: this run has no example cache")
    return Path(settings.cache.examples) / split.value


def source_folder(settings: Config, split: Split) -> Path:
    """Where remote files are read into while a cache is filled from them."""
    return examples_folder(settings, split) / SOURCE


def example_key(settings: Config, split: Split) -> dict[str, Any]:
    """Everything that decides what an example cache holds; held-out pairs are those of the `eval` section.

    The encoders' device and batch, which change rounding, are left out. A reference's key identifies cached examples by
    their bytes.
    """
    data, model = split.source(settings), settings.model
    family = family_of_pipeline(model)
    source = {"source": data.source, "path": data.path, "split": data.split, "max_pairs": data.max_pairs}
    filters = Filters(settings.filter).key()
    if split.is_held_out:
        filters.pop("filter.held_out_captions", None)
    elif settings.filter.held_out_captions:
        given = {"path", "split"} if settings.eval.columns is None else {"path", "split", "columns"}
        filters["filter.held_out_captions"] = settings.eval.model_dump(mode="json", include=given)
    return {
        **{f"data.{name}": list(value) if isinstance(value, tuple) else value for name, value in source.items()},
        "data.revision": data.revision,
        **({} if data.columns is None else {"data.columns": data.columns}),
        **filters,
        "data.resolution": data.resolution,
        "crop": "center",
        "mirrored images": data.horizontal_flip and not split.is_held_out,
        "posterior": "mean and standard deviation" if data.sample_latents else "mean",
        "cache.dtype": settings.cache.dtype,
        "autoencoder": part_checksum(model, "vae"),
        "text encoder": part_checksum(model, *family.text_encoders, *family.tokenizers),
        **caption_choices(model),
        PRECISION: encoders_precision(settings),
    }


def encoders_precision(settings: Config) -> str:
    """In what images and captions are encoded, which decides their rounding alone."""
    precision, held_in = precision_of(settings.compute), settings.model.frozen_precision
    return precision if held_in == "fp32" else f"{precision}, text encoders held in {held_in}"


def reference_key(settings: Config, pairs: PairTable | ExampleCache, split: Split, precision: str) -> dict[str, Any]:
    """Everything that decides the reference's errors at a position.

    The batch's shape and the versions of PyTorch and its kernels, which change rounding, are left out. precision: of
    autocast, as accelerate names it.
    """
    compute, model = settings.compute, settings.model
    graph = None  # not compiled, as evaluation always is
    if compute.compile and not split.is_held_out:
        adapter = model.lora_rank if model.trainable == "lora" else None
        graph = {"adapter": adapter, "gradient_checkpointing": compute.gradient_checkpointing}
    data, augment, family = settings.data, not split.is_held_out, family_of_pipeline(model)
    is_unpaired = takes_single_images(settings, split)
    return {
        **({"desirable share of unpaired images": settings.loss.values["desirable_share"]} if is_unpaired else {}),
        "pairs": pairs.fingerprint,
        "seed": split.seed(settings),
        "resolution": data.resolution,
        "crop": data.crop if augment else "center",
        "horizontal_flip": data.horizontal_flip and augment,
        "caption_dropout": data.caption_dropout if augment else 0.0,
        "sample_latents": data.sample_latents,
        "examples": f"cached, manifest {file_sha256(pairs.folder / 'manifest.json')}"
        if isinstance(pairs, ExampleCache)
        else "encoded while training",
        "noise": settings.noise.model_dump(exclude_none=True),
        "pipeline": part_checksum(model, family.denoiser, *family.encoders, *family.tokenizers, "scheduler"),
        **({} if model.size_conditioning is None else {"size conditioning": model.size_conditioning}),
        **({} if model.guidance is None else {"guidance": model.guidance}),
        **caption_choices(model),
        "precision": precision,
        **({} if model.frozen_precision == "fp32" else {"frozen weights": model.frozen_precision}),
        "device": device_kind(),
        "kernels": compute.model_dump(include={"tf32", "attention", "channels_last", "deterministic"}),
        "compiled": graph,
    }
