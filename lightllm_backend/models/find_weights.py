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

from lightllm_backend.json_file import read_json_object
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
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return _indexed(index)
    for name in USUAL:
        files = sorted(folder.glob(f"*{Path(name).suffix}"))
        if model_files := [path for path in files if not path.name.startswith(NOT_THE_MODEL)]:
            return model_files
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


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted({_plain_name(name) for name in read_json_object(index)["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: is not an index of weights: {error!r}; it must map tensors to files") from error
    if not names:
        raise ModelError(f"{index}: weight_map is empty; it must map tensors to files")
    paths = [index.parent / name for name in names]
    if absent := [path.name for path in paths if not path.is_file()]:
        raise ModelError(f"{index}: names files that are not there: {', '.join(absent)}; download them")
    return paths


def _plain_name(name: Any) -> str:
    """The name of a file beside the index; ValueError for anything else, a path to elsewhere included."""
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file beside it")
    os.fsencode(name)  # for half a surrogate pair, which no name of a file holds: a ValueError, too
    return name
