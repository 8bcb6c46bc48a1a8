"""The weight files of the metrics: find them in a folder or download them at a fixed revision, and check them."""

import json
import pickle
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from xdpo.files import kept_sha256, reading, replacing

SIZES_FILE = "sizes.json"


@dataclass(frozen=True)
class WeightFile:
    """A weight file of an original metric.

    `revision` is the full commit of the repository, which fixes the content that the hub sends. `sha256` is set if we
    know the checksum. A file without one is checked by its revision, by `weights_only=True`, and by names and shapes
    that must all fit. `url` is set for files that are not on the hub.
    """

    repository: str
    name: str
    revision: str
    about_bytes: int
    sha256: str | None = None
    url: str | None = None

    @property
    def relative_path(self) -> str:
        """The file's path below a weights folder."""
        return f"{self.repository}/{self.name}"

    @property
    def source(self) -> str:
        """The command that downloads it into a weights folder named DIR."""
        if self.url:
            return f"curl -L --create-dirs -o 'DIR/{self.relative_path}' '{self.url}'"
        return f"hf download {self.repository} {self.name} --revision {self.revision} --local-dir DIR/{self.repository}"


def find_files(scorer: str, files: Mapping[str, WeightFile], folder: str | Path | None) -> dict[str, Path]:
    """Paths of `files` by their keys: {repository}/{name} in `folder`, or in the hub's cache if that is None.

    Raises ValueError that lists every missing or altered file with its size and source.
    """
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"{scorer}: no weights folder {str(folder)!r} here")
    originals = read_sizes(folder) is None
    paths, faults = {}, []
    for key, file in files.items():
        path, reason = _in_folder(file, Path(folder)) if folder is not None else _from_hub(file)
        if path is None:
            faults.append((file, reason))
        elif is_cut_short(path):
            faults.append((file, f"{path} is broken or cut short at {size_in_words(path.stat().st_size)}"))
        elif originals and file.sha256 and digest(path) != file.sha256:
            faults.append(
                (file, f"{path} is not the original: its sha256 is {digest(path)[:12]}…, not {file.sha256[:12]}…")
            )
        else:
            paths[key] = path
    if faults:
        lines = [
            f"  {file.relative_path} ({size_in_words(file.about_bytes)}): {reason}\n    {file.source}"
            for file, reason in faults
        ]
        raise ValueError(
            f"{scorer}: {len(faults)} of {len(files)} files are missing or broken; with the commands below in a folder "
            "DIR of yours, on any machine, they are found there (--weights DIR, or load_scorer(…, weights=DIR))\n"
            + "\n".join(lines)
        )
    return paths


def _in_folder(file: WeightFile, folder: Path) -> tuple[Path | None, str]:
    path = folder / file.relative_path
    return (path, "") if path.is_file() else (None, f"no file at {path}")


def _from_hub(file: WeightFile) -> tuple[Path | None, str]:
    try:
        if file.url:
            return _from_url(file, file.url), ""
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(file.repository, file.name, revision=file.revision)), ""
    except (OSError, ValueError, HTTPException) as error:
        reason = str(error).strip() or repr(error)
        return None, f"could not be downloaded: {reason.splitlines()[0]}"


def _from_url(file: WeightFile, url: str) -> Path:
    """The file in our folder beside the hub's cache, downloaded if it isn't there yet."""
    from huggingface_hub import constants

    path = Path(constants.HF_HOME) / "xdpo" / file.revision / file.name
    if not path.is_file():
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()  # read before writing: the network's errors are not the disk's
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "wb") as output:
            output.write(content)
    return path


def is_cut_short(path: Path) -> bool:
    """Whether a file is truncated according to its own table of contents; reads a few kilobytes."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return False
        except (SafetensorError, OSError):
            return True
    with path.open("rb") as file:
        start = file.read(4)
    return not start or (start == b"PK\x03\x04" and not zipfile.is_zipfile(path))  # of a zip, the end is the contents


def digest(path: Path) -> str:
    """sha256 of a file in hex, as `kept_sha256`; a system error names the file."""
    with reading(path):
        return kept_sha256(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt or .pth file on the CPU; no other Python object is unpickled.

    Tensors under the key "state_dict" are unwrapped. Raises ValueError for a broken file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} ({size_in_words(path.stat().st_size)}) can't be read: {reason}; delete it and fetch it again"
        ) from error
    tensors = tensors.get("state_dict", tensors)
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Give `module`, built without memory, these tensors as `dtype`. Errors name `path`, the tensors' file.

    Raises ValueError unless all names and shapes fit and none is left over.
    """
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    misfits = [name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape]
    if missing or extra or misfits:
        examples = [
            f"{len(names)} {kind}, as {names[0]}"
            for kind, names in (("missing", missing), ("unknown", extra), ("of another shape", sorted(misfits)))
            if names
        ]
        raise ValueError(
            f"{path} ({size_in_words(path.stat().st_size)}) holds another model than the scorer's: tensors "
            f"{'; '.join(examples)}. Fetch the original again, or describe your own in {SIZES_FILE}"
        )
    module.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)


def read_sizes(folder: str | Path | None) -> dict | None:
    """The sizes.json of a weights folder with models of other sizes than the originals; None without one.

    Its keys are names of architectures, its values their differences. With it, checksums are not compared. Raises
    ValueError if it is not a JSON object.
    """
    path = Path(folder) / SIZES_FILE if folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        sizes = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(sizes, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(sizes).__name__}")
    return sizes


def size_in_words(count: int) -> str:
    """3944517836 → "3.94 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1e3:.0f} kB"
