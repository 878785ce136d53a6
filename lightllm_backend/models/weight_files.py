# SPDX-License-Identifier: Apache-2.0
"""Reads weight files: the tensors of each, by name.

Files are mapped into memory, so that a tensor costs nothing before it is read.
"""

from __future__ import annotations

import logging
import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.find_weights import find_weight_files, is_whole_archive, refuse_pointer, safetensors_error

# Dtypes of unquantised weights.
FLOATS = ("float16", "bfloat16", "float32", "float64")
# safetensors' names of dtypes, and torch's.
_SAFETENSORS_DTYPES = {
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I8": "int8", "U8": "uint8", "I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool",
}  # fmt: skip

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
    files = find_weight_files(folder)
    if adapters := [path.name for path in sorted(folder.glob("adapter_model.*"))]:
        log.warning("%s: %s beside the model is not used: merge it into the model to serve it", folder, adapters[0])
    return files


def opened(path: Path) -> AbstractContextManager[dict[str, Source]]:
    """The tensors of a weight file, by name. They can be read inside the context."""
    return _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)


@contextmanager
def _safetensors(path: Path) -> Iterator[dict[str, Source]]:
    refuse_pointer(path)
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
        raise safetensors_error(path, error) from error


@contextmanager
def _pickled(path: Path) -> Iterator[dict[str, Source]]:
    refuse_pointer(path)
    is_zip = is_whole_archive(path)
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
