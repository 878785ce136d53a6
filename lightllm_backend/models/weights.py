# SPDX-License-Identifier: Apache-2.0
"""Loading of a checkpoint, tensor by tensor, straight into a model's fused and sharded parameters.

A model says with its weight map where each tensor of the checkpoint goes; the files say where they come from. Nothing
but the parameters themselves is ever held.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.weight_files import Source, opened, weight_files

# The head's tensor in a checkpoint, of whatever model.
HEAD = "lm_head.weight"

# How many tensors an error names before it only counts them.
_NAMED = 10

# How many numbers of two tensors are compared at once.
_COMPARED = 1 << 24

log = logging.getLogger("lightllm.weights")


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


class TiableHead(Protocol):
    """The part of a model's head that loading needs."""

    @property
    def tied(self) -> bool:
        """Whether the head's weight is that of the embeddings."""

    def untie(self) -> None:
        """Give the head a weight of its own; the weight map has it from then on."""


class HasWeights(Protocol):
    """The part of a model that loading needs."""

    # What the names of all tensors but the head's begin with; files of the model without its head lack it.
    prefix: str
    embedding_name: str  # of the tensor of embeddings in a checkpoint

    @property
    def head(self) -> TiableHead: ...

    def weight_map(self) -> Mapping[str, WeightSlot]:
        """The checkpoint's names for all that the model needs, and where each goes."""

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint may carry this tensor although the model has no use for it."""


def load_weights(model: HasWeights, directory: str | Path, progress: bool = True) -> None:
    """Fill every parameter of the model from the .safetensors or .bin files in `directory`."""
    folder = Path(directory)
    files = weight_files(folder)
    slots = _slots(model, files)
    loaded: dict[str, Path] = {}
    left_over = []
    with tqdm(total=len(slots), desc="Loading weights", unit="tensor", disable=not progress) as bar:
        for path in files:
            with opened(path) as sources:
                for source in sources.values():
                    name = source.name if source.name in slots else model.prefix + source.name
                    if name in loaded:
                        raise ModelError(
                            f"{path}: {source.name} is in {loaded[name].name} too; one file must have it, so remove "
                            "what does not belong to the model"
                        )
                    if name in slots:
                        _fill(slots[name], source)
                        loaded[name] = path
                        bar.update()
                    elif not model.ignores(source.name):
                        left_over.append(source.name)
    missing = [name for name in slots if name not in loaded]
    if missing or left_over:
        raise ModelError(f"{folder}: {_mismatch(missing, left_over)}")


def _mismatch(missing: list[str], left_over: list[str]) -> str:
    problems = [
        f"{what}, {len(names)} in all: {', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''}"
        for what, names in (("tensors are missing", missing), ("tensors are not the model's", left_over))
        if names
    ]
    needed = "the files must belong to the model of config.json"
    if missing == [HEAD]:
        needed += ", which must say tie_word_embeddings: true if the head is that of the embeddings"
    return f"{'; '.join(problems)}; {needed}"


def _slots(model: HasWeights, files: list[Path]) -> dict[str, WeightSlot]:
    """Where the checkpoint's tensors go, once the files have settled a head that config.json ties to the embeddings.

    As in transformers 5, a head that differs from the embeddings is used, and one without embeddings is both. Every
    rank compares whole tensors, so that all decide alike.
    """
    if not model.head.tied:
        return dict(model.weight_map())
    names = {HEAD: HEAD, model.embedding_name: model.embedding_name}
    names[model.embedding_name.removeprefix(model.prefix)] = model.embedding_name
    found: dict[str, Source] = {}
    with ExitStack() as kept:
        for path in files:
            with ExitStack() as file:
                sources = file.enter_context(opened(path))
                if here := {names[name]: source for name, source in sources.items() if name in names}:
                    found |= here
                    kept.push(file.pop_all())
        slot = model.weight_map()[model.embedding_name]
        if len(found) == 2 and not _are_equal(found[HEAD], found[model.embedding_name], slot):
            log.warning(
                "%s: %s differs from %s, to which config.json ties it (tie_word_embeddings); it is used as it is",
                found[HEAD].path, HEAD, model.embedding_name,
            )  # fmt: skip
            model.head.untie()
    slots = dict(model.weight_map())
    if found.keys() == {HEAD}:
        slots[HEAD] = slots.pop(model.embedding_name)
    return slots


def _are_equal(one: Source, other: Source, slot: WeightSlot) -> bool:
    """Whether two tensors for the same slot are equal in its dtype; neither is held whole."""
    if not one.shape == other.shape == slot.full_shape:
        return False
    rows, columns = slot.full_shape
    step = max(1, _COMPARED // columns)
    parts = ((slice(start, start + step),) for start in range(0, rows, step))
    dtype = slot.target.dtype
    return all(torch.equal(one.read(part).to(dtype), other.read(part).to(dtype)) for part in parts)


def dummy_weights(model: HasWeights, seed: int = 0) -> None:
    """Fill every parameter with normally distributed values: the same for the same seed and kind of device.

    What several ranks hold is the same on each, and what is split differs from one to the next.
    """
    slots = list(model.weight_map().values())
    generator = torch.Generator(slots[0].target.device)
    for number, slot in enumerate(slots):
        generator.manual_seed(hash((seed, number, slot.start)))
        slot.target.normal_(slot.mean, 0.02, generator=generator)


def _fill(slot: WeightSlot, source: Source) -> None:
    source.check_dtype()
    if source.shape != slot.full_shape:
        raise ModelError(
            f"{source.path}: {source.name} has the shape {list(source.shape)}; "
            f"config.json makes it {list(slot.full_shape)}"
        )
    slot.target.copy_(source.read(slot.part()))
