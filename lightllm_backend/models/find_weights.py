# SPDX-License-Identifier: Apache-2.0
"""Finds the weight files of a model directory, and checks them as far as their headers tell. Imports no torch.

launch/checkpoint.py checks before anything is started; the worker meets the same faults with the same messages.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lightllm_backend.models.config_fields import ConfigFields
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.unsupported import adapter_error

# The usual names, best first; each may be an index that names the files.
USUAL = ("model.safetensors", "pytorch_model.bin")

# Prefixes of other .safetensors and .bin files in model directories: adapters, weights in their authors' own format,
# and training state.
NOT_THE_MODEL = (
    "adapter_", "consolidated", "optimizer", "random_states", "rng_state", "sampler", "scaler", "scheduler",
    "training_args",
)  # fmt: skip

# The beginning of the pointer that Git LFS leaves in place of a large file.
_LFS_POINTER = b"version https://git-lfs"


def find_weight_files(folder: Path) -> list[Path]:
    """The files that hold the model: those with a usual name, else all candidates; .safetensors before .bin."""
    for name in USUAL:
        if (folder / name).exists():
            return [_file(folder / name)]
        if (index := folder / f"{name}.index.json").exists():
            return _indexed(_file(index))
    for name in USUAL:
        files = sorted(folder.glob(f"*{Path(name).suffix}"))
        if model_files := [path for path in files if not path.name.startswith(NOT_THE_MODEL)]:
            return [_file(path) for path in model_files]
    if any(folder.glob("adapter_model.*")):
        raise adapter_error(folder)
    others = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".gguf", ".h5", ".pt", ".pth")]
    others += [path.name for path in sorted(folder.glob("consolidated*.safetensors"))]
    found = f" ({', '.join(others[:3])} is in another format: convert it)" if others else ""
    raise ModelError(f"{folder}: there are no weights; .safetensors or .bin files are needed{found}")


def check_weight_files(folder: Path) -> None:
    """Raise ModelError for weight files that are absent or cut short. Reads headers alone, whatever the files' size."""
    for path in find_weight_files(folder):
        refuse_pointer(path)
        if path.suffix != ".safetensors":
            is_whole_archive(path)
            continue
        try:
            # Compares the header with the size of the file, which it maps.
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise safetensors_error(path, error) from error


def holds_tensor(folder: Path, names: Collection[str]) -> bool:
    """Whether a .safetensors file of the model has a tensor of one of these names; no for files that cannot be read."""
    try:
        for path in find_weight_files(folder):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="np") as file:
                    if not set(file.keys()).isdisjoint(names):
                        return True
    except (ModelError, SafetensorError, OSError):
        pass  # the check of the weights says what is wrong with them
    return False


def refuse_pointer(path: Path) -> None:
    """Raise ModelError for a file that is a pointer of Git LFS, or cannot be opened."""
    try:
        with path.open("rb") as file:
            beginning = file.read(len(_LFS_POINTER))
    except PermissionError:
        raise
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}; download it again") from error
    if beginning == _LFS_POINTER:
        raise ModelError(f"{path}: is a pointer of Git LFS, not the file itself; get it with `git lfs pull`")


def is_whole_archive(path: Path) -> bool:
    """Whether torch.save has written the file as a zip archive. Raises ModelError for the beginning of an archive."""
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    if is_archive and not zipfile.is_zipfile(path):
        raise ModelError(f"{path}: cannot be read: the file is cut short; download it again")
    return is_archive


def safetensors_error(path: Path, error: Exception) -> ModelError:
    """The error for a .safetensors file that cannot be read."""
    return ModelError(f"{path}: cannot be read: {error}; download it again if it is cut short")


def _file(path: Path) -> Path:
    """The path, unless it is something else than a file: to open a pipe would wait for its writer."""
    if path.exists() and not path.is_file():
        raise ModelError(f"{path}: is not a file; a file with weights, or an index of such files, is needed")
    return path


def _indexed(index: Path) -> list[Path]:
    fields = ConfigFields.read(index)
    placed = fields.child("weight_map")
    if not placed.values:
        raise fields.error("weight_map", "an object that maps tensors to the files beside it is needed")
    for tensor, name in placed.values.items():
        if not _is_plain_name(name):
            raise placed.error(tensor, "the name of a file beside the index is needed")
    paths = [index.parent / name for name in sorted(set(placed.values.values()))]
    if absent := [path.name for path in paths if not path.exists()]:
        raise ModelError(f"{index}: names files that are not there: {', '.join(absent)}; download them")
    return [_file(path) for path in paths]


def _is_plain_name(name: Any) -> bool:
    """Whether this is the name of a file beside the index, and no path to elsewhere."""
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name or "\0" in name:
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half a surrogate pair, which no name of a file holds
        return False
    return True
