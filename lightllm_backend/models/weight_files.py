# SPDX-License-Identifier: Apache-2.0
"""Weight files: finds those of a model directory and lists their tensors.

Files are mapped into memory, so that a tensor costs nothing before it is read.
"""

from __future__ import annotations

import logging
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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

# Dtypes of unquantised weights.
FLOATS = ("float16", "bfloat16", "float32", "float64")
# safetensors' names of dtypes, and torch's.
_SAFETENSORS_DTYPES = {
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I8": "int8", "U8": "uint8", "I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool",
}  # fmt: skip

# The beginning of the pointer that Git LFS leaves in place of a large file.
_LFS_POINTER = b"version https://git-lfs"

# Errors of unpickling a torn file or one of another format.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    struct.error,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

log = logging.getLogger("lightllm.weights")


@dataclass(frozen=True)
class Source:
    """One tensor of a file. `read` loads a slice of it."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], Tensor]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the model: those with a usual name, else all candidates; .safetensors before .bin."""
    files = _model_files(folder)
    if adapters := [path.name for path in sorted(folder.glob("adapter_model.*"))]:
        log.warning("%s: %s beside the model is not used: merge it into the model to serve it", folder, adapters[0])
    return files


def opened(path: Path) -> AbstractContextManager[dict[str, Source]]:
    """The tensors of a weight file, by name. They can be read inside the context."""
    return _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)


def _model_files(folder: Path) -> list[Path]:
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


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted({_plain_name(name) for name in read_json_object(index)["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: is not an index of weights: {error!r}; it must map tensors to files") from error
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


@contextmanager
def _safetensors(path: Path) -> Iterator[dict[str, Source]]:
    _refuse_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            yield {
                name: Source(
                    name,
                    path,
                    _SAFETENSORS_DTYPES.get(values.get_dtype(), values.get_dtype()),
                    tuple(values.get_shape()),
                    values.__getitem__,
                )
                for name, values in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read: {error}; download it again if it is cut short") from error


@contextmanager
def _pickled(path: Path) -> Iterator[dict[str, Source]]:
    _refuse_pointer(path)
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip and not zipfile.is_zipfile(path):
        raise ModelError(f"{path}: cannot be read: the file is cut short; download it again")
    try:
        # Files from before torch 1.6 are no zip archives, and cannot be mapped.
        tensors: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except _UNPICKLING_ERRORS as error:
        raise ModelError(
            f"{path}: cannot be read as a file of nothing but tensors: {(str(error) or repr(error)).splitlines()[0]}; "
            "download it again, or convert it to .safetensors if you trust it to run code while it is loaded"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ModelError(f"{path}: is not a dictionary of tensors, as a checkpoint's file must be")
    yield {
        name: Source(name, path, str(value.dtype).removeprefix("torch."), tuple(value.shape), value.__getitem__)
        for name, value in tensors.items()
    }


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelError(f"{path}: is a pointer of Git LFS, not the file itself; get it with `git lfs pull`")
