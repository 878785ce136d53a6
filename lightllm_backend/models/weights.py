# SPDX-License-Identifier: Apache-2.0
"""Loading of a checkpoint, tensor by tensor, straight into a model's fused and sharded parameters.

A model says with its weight map where each tensor of the checkpoint goes; the files say where they come from. Both
kinds of file are mapped into memory, so nothing but the parameters themselves is ever held.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from lightllm_backend.models.errors import ModelError

# How many tensors an error names before it only counts them.
_NAMED = 10

# What unpickling a file that is torn, or is something else, has been seen to raise, or may.
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


@dataclass(frozen=True)
class WeightSlot:
    """Where one tensor of a checkpoint goes.

    `target` is a parameter, or those rows of a fused one that are this tensor's. It takes the checkpoint's tensor,
    which has `full_shape`, or what this rank holds of it: along dimension `dim`, from `start` on.
    """

    target: Tensor
    full_shape: tuple[int, ...]
    dim: int = 0
    start: int = 0
    mean: float = 0.0  # what dummy weights are drawn around

    @classmethod
    def whole(cls, parameter: Tensor, mean: float = 0.0) -> WeightSlot:
        return cls(parameter, tuple(parameter.shape), mean=mean)

    def part(self) -> tuple[slice, ...]:
        """This rank's part of the checkpoint's tensor, as an index."""
        stop = self.start + self.target.shape[self.dim]
        return tuple(slice(self.start, stop) if d == self.dim else slice(None) for d in range(len(self.full_shape)))


class HasWeights(Protocol):
    """The part of a model that loading needs."""

    # What the names of all tensors but the head's begin with; files of the model without its head lack it.
    prefix: str

    def weight_map(self) -> Mapping[str, WeightSlot]:
        """The checkpoint's names for all that the model needs, and where each goes."""

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint may carry this tensor although the model has no use for it."""


@dataclass(frozen=True)
class _Source:
    """One tensor of a checkpoint, not read yet."""

    name: str
    path: Path
    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], Tensor]


def load_weights(model: HasWeights, directory: str | Path, progress: bool = True) -> None:
    """Fill every parameter of the model from the .safetensors or .bin files in `directory`."""
    folder = Path(directory)
    weight_map = model.weight_map()
    loaded: set[str] = set()
    left_over = []
    with tqdm(total=len(weight_map), desc="Loading weights", unit="tensor", disable=not progress) as bar:
        for path in _files(folder):
            sources = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
            for source in sources:
                name = source.name if source.name in weight_map else model.prefix + source.name
                if name in weight_map:
                    _fill(weight_map[name], source)
                    if name not in loaded:
                        loaded.add(name)
                        bar.update()
                elif not model.ignores(source.name):
                    left_over.append(source.name)
    missing = [name for name in weight_map if name not in loaded]
    if missing or left_over:
        problems = [
            f"{len(names)} tensors are {what}: {', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''}"
            for what, names in (("missing", missing), ("not the model's", left_over))
            if names
        ]
        raise ModelError(f"{folder}: {'; '.join(problems)}; the files must belong to the model of config.json")


def dummy_weights(model: HasWeights, seed: int = 0) -> None:
    """Fill every parameter with normally distributed values: the same for the same seed and kind of device.

    What several ranks hold is the same on each, and what is split differs from one to the next.
    """
    slots = list(model.weight_map().values())
    generator = torch.Generator(slots[0].target.device)
    for number, slot in enumerate(slots):
        generator.manual_seed(hash((seed, number, slot.start)))
        slot.target.normal_(slot.mean, 0.02, generator=generator)


def _fill(slot: WeightSlot, source: _Source) -> None:
    if source.shape != slot.full_shape:
        raise ModelError(
            f"{source.path}: {source.name} has the shape {list(source.shape)}; "
            f"config.json makes it {list(slot.full_shape)}"
        )
    slot.target.copy_(source.read(slot.part()))


def _files(folder: Path) -> list[Path]:
    """The checkpoint's files: those of an index, the one of the usual name, or all; .safetensors before .bin."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            return _indexed(index)
        single = folder / f"{stem}{suffix}"
        if single.is_file():
            return [single]
        if others := sorted(folder.glob(f"*{suffix}")):
            return others
    raise ModelError(f"{folder}: there are no weights; .safetensors or .bin files are needed")


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: is not an index of weights: {error!r}; it must map tensors to files") from error
    paths = [index.parent / name for name in names]
    if absent := [path.name for path in paths if not path.is_file()]:
        raise ModelError(f"{index}: names files that are not there: {', '.join(absent)}; download them")
    return paths


def _safetensors(path: Path) -> Iterator[_Source]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            for name in names:
                values = file.get_slice(name)
                yield _Source(name, path, tuple(values.get_shape()), values.__getitem__)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read: {error}; download it again if it is cut short") from error


def _pickled(path: Path) -> Iterator[_Source]:
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
    for name, tensor in tensors.items():
        yield _Source(name, path, tuple(tensor.shape), tensor.__getitem__)
