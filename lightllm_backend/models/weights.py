# SPDX-License-Identifier: Apache-2.0
"""load_weights: loads a checkpoint, tensor by tensor, straight into a model's fused and sharded parameters.

A model's weight map says where each tensor of the checkpoint goes. Loading holds no copy beside the parameters.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.finite_weights import FiniteWeights
from lightllm_backend.models.unsupported import refuse_quantized
from lightllm_backend.models.weight_files import FLOATS, Source, opened, weight_files

# The head's tensor in a checkpoint of any model.
HEAD = "lm_head.weight"

# Endings of the names of scales for an 8-bit KV pool, which ours, with scales of each token, has no use for.
KV_SCALES = (".k_scale", ".v_scale", ".kv_scale", ".k_proj.output_scale", ".v_proj.output_scale")

# What transformers' fp8 and torchao call the parts of a quantised weight, and what other tools call them.
_USUAL_NAMES = {
    "weight_scale_inv": "weight_scale",
    "activation_scale": "input_scale",
    "_weight_qdata": "weight",
    "_weight_scale": "weight_scale",
    "_weight_zero_point": "weight_zero_point",
}

# Tensors that an error names; it only counts the others.
_NAMED = 10

# Elements compared at once: 64 MiB of float32, instead of whole embeddings.
_COMPARED = 1 << 24

log = logging.getLogger("lightllm.weights")


@dataclass(frozen=True)
class WeightSlot:
    """The destination of one tensor of a checkpoint.

    `target` is a parameter, or this tensor's rows of a fused one. It takes this rank's part of the tensor, which has
    `full_shape`, or one of `shapes`, which mean the same: along dimension `dim`, from `start` on.
    """

    target: Tensor
    full_shape: tuple[int, ...]
    dim: int = 0
    start: int = 0
    mean: float = 0.0  # of dummy weights
    offset: float = 0.0  # added to the checkpoint's numbers
    dtypes: Sequence[str] = FLOATS  # that the tensor may have
    shapes: tuple[tuple[int, ...], ...] = ()

    is_optional: ClassVar[bool] = False  # the checkpoint may lack the tensor

    @classmethod
    def whole(cls, parameter: Tensor, mean: float = 0.0, offset: float = 0.0) -> WeightSlot:
        """The slot of a tensor that every rank holds whole."""
        return cls(parameter, tuple(parameter.shape), mean=mean, offset=offset)

    def part(self) -> tuple[slice, ...]:
        """This rank's part of the checkpoint's tensor, as an index."""
        stop = self.start + self.target.shape[self.dim]
        return tuple(slice(self.start, stop) if d == self.dim else slice(None) for d in range(len(self.full_shape)))

    @property
    def num_weights(self) -> int:
        """How many of the whole model's weights the tensor holds."""
        return math.prod(self.full_shape)

    @property
    def nbytes(self) -> int:
        """The memory that the slot fills."""
        return self.target.nbytes

    @property
    def targets(self) -> list[Tensor]:
        """What the tensor fills."""
        return [self.target]

    def check(self, source: Source) -> None:
        """Raise ModelError unless the tensor has a dtype and a shape that the slot takes. Reads none of its values."""
        dtypes = self.dtypes
        if source.dtype not in dtypes:
            needed = f"{'one of ' if len(dtypes) > 1 else ''}{', '.join(dtypes)} is needed"
            # Scales and biases beside a quantised weight are floats as well.
            if source.dtype not in FLOATS and dtypes is FLOATS and source.name.endswith(".weight"):
                needed += ": an unquantised checkpoint, or a config.json that says how this one is quantised"
            raise ModelError(f"{source.path}: {source.name} has the dtype {source.dtype}; {needed}")
        if source.shape not in (self.full_shape, *self.shapes):
            raise ModelError(
                f"{source.path}: {source.name} has the shape {list(source.shape)}; "
                f"config.json makes it {list(self.full_shape)}"
            )

    def fill(self, source: Source) -> None:
        """Load this rank's part of a checkpoint's tensor, which `check` has let pass.

        Raises ModelError if its values are not what is expected.
        """
        self.target.copy_(source.read(self.part()))
        if self.offset != 0:
            self.target.add_(self.offset)

    def finish(self) -> None:
        """Do what needs other tensors of the checkpoint; called once all slots are filled."""

    def randomize(self, generator: torch.Generator) -> None:
        """Fill the target with dummy weights."""
        self.target.normal_(self.mean, 0.02, generator=generator)


@dataclass(frozen=True)
class JoinedSlot(WeightSlot):
    """The slot of a tensor of which several parts are needed, each with a slot of its own for the same tensor."""

    parts: tuple[WeightSlot, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[WeightSlot]) -> WeightSlot:
        """The slot of a tensor that all of `parts` read; itself if there is one."""
        first = parts[0]
        return (
            first
            if len(parts) == 1
            else cls(first.target, first.full_shape, first.dim, first.start, parts=tuple(parts))
        )

    @property
    def is_optional(self) -> bool:  # type: ignore[override]
        return self.parts[0].is_optional

    @property
    def num_weights(self) -> int:
        return self.parts[0].num_weights

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def targets(self) -> list[Tensor]:
        return [target for part in self.parts for target in part.targets]

    def check(self, source: Source) -> None:
        for part in self.parts:
            part.check(source)

    def fill(self, source: Source) -> None:
        for part in self.parts:
            part.fill(source)

    def finish(self) -> None:
        for part in self.parts:
            part.finish()

    def randomize(self, generator: torch.Generator) -> None:
        for part in self.parts:
            part.randomize(generator)


def join_slots(maps: Iterable[Mapping[str, WeightSlot]]) -> dict[str, WeightSlot]:
    """The slots of all maps; those of one tensor are joined."""
    found: dict[str, list[WeightSlot]] = {}
    for slots in maps:
        for name, slot in slots.items():
            found.setdefault(name, []).append(slot)
    return {name: JoinedSlot.of(parts) for name, parts in found.items()}


class TiableHead(Protocol):
    """The interface of a model's head that loading needs."""

    @property
    def tied(self) -> bool:
        """Whether the head shares the embeddings' weight."""

    def untie(self) -> None:
        """Give the head a weight of its own, which the weight map then contains."""


class HasWeights(Protocol):
    """The interface of a model that loading needs."""

    # The prefix of all tensor names except the head's. Checkpoints of a model without a head lack it.
    prefix: str
    embedding_name: str  # of the embeddings' tensor in a checkpoint

    @property
    def head(self) -> TiableHead: ...

    def weight_map(self) -> Mapping[str, WeightSlot]:
        """The names of all tensors that the model needs from a checkpoint, and their destinations."""

    def arrange_weights(self) -> None:
        """Bring the filled weights into the order that the kernels read best."""

    def rename(self, name: str) -> str:
        """The weight map's name of a tensor that some checkpoints call otherwise, except for the prefix."""

    def left_out_by(self, layer: str) -> str:
        """What in the configuration leaves this linear layer unquantised, for errors; empty if no key does."""

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint may contain this tensor although the model does not need it."""


def load_weights(model: HasWeights, directory: str | Path, progress: bool = True) -> None:
    """Fill every parameter of the model from the .safetensors or .bin files in `directory`."""
    folder = Path(directory)
    files = weight_files(folder)
    slots = _slots(model, files)
    names = _check_headers(model, folder, files, slots)
    finite = FiniteWeights()
    with tqdm(total=len(names), desc="Loading weights", unit="tensor", disable=not progress) as bar:
        for path in files:
            with opened(path) as sources:
                for source in sources.values():
                    if source.name in names:
                        slot = slots[names[source.name]]
                        slot.fill(source)
                        finite.note(source, slot.targets)
                        bar.update()
    finite.check()
    for name in names.values():
        slots[name].finish()
    model.arrange_weights()


def check_weights(model: HasWeights, directory: str | Path) -> None:
    """Raise the ModelError that load_weights would for the names, shapes and dtypes of tensors.

    Reads the files' headers alone, so the model may be on torch's device `meta`, where parameters have no memory.
    """
    folder = Path(directory)
    files = weight_files(folder)
    _check_headers(model, folder, files, _slots(model, files))


def _check_headers(
    model: HasWeights, folder: Path, files: list[Path], slots: Mapping[str, WeightSlot]
) -> dict[str, str]:
    """Return the weight map's names of the checkpoint's tensors, by theirs; raise ModelError unless the two match.

    Reads no weights, so that a fault is told before minutes of loading.
    """
    names: dict[str, str] = {}
    loaded: dict[str, Source] = {}
    left_over, kv_scales = [], []
    for path in files:
        with opened(path) as sources:
            refuse_quantized(path, _unknown(model, slots, sources), lambda name: _left_out_by(model, name))
            for their_name, source in sources.items():
                name = _name_in(slots, model, their_name)
                if name in loaded:
                    raise ModelError(
                        f"{path}: {their_name} is in {loaded[name].path.name} too; one file must have it, so remove "
                        "what does not belong to the model"
                    )
                if name in slots:
                    names[their_name] = name
                    loaded[name] = source
                elif their_name.endswith(KV_SCALES):
                    kv_scales.append(their_name)
                elif not model.ignores(their_name):
                    left_over.append(their_name)
    missing = [name for name, slot in slots.items() if name not in loaded and not slot.is_optional]
    if missing or left_over:
        where = files[0] if len(files) == 1 else folder
        raise ModelError(f"{where}: {_mismatch(missing, left_over)}")
    for name, source in loaded.items():
        slots[name].check(source)
    if kv_scales:
        log.warning(
            "%s: %d scales for K and V, like %s, are not used: the KV pool has scales of its own",
            folder,
            len(kv_scales),
            kv_scales[0],
        )
    return names


def _name_in(slots: Mapping[str, object], model: HasWeights, name: str) -> str:
    """The name by which the model knows a checkpoint's tensor, if it does."""
    name = model.rename(name)
    layer, dot, part = name.rpartition(".")
    usual = layer + dot + _USUAL_NAMES.get(part, part)
    found = (known for known in (name, usual, model.prefix + usual) if known in slots)
    return next(found, model.prefix + name)


def _unknown(model: HasWeights, slots: Mapping[str, WeightSlot], names: Iterable[str]) -> list[str]:
    """The names of tensors that have no slot."""
    return [name for name in names if _name_in(slots, model, name) not in slots]


def _left_out_by(model: HasWeights, name: str) -> str:
    """What in the configuration leaves the layer of a checkpoint's tensor unquantised, if any key does."""
    layer = model.rename(name).rpartition(".")[0]
    head = HEAD.removesuffix(".weight")
    return model.left_out_by(layer if layer == head else model.prefix + layer.removeprefix(model.prefix))


def _mismatch(missing: list[str], left_over: list[str]) -> str:
    problems = [
        f"{what}, {len(names)} in all: {', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''}"
        for what, names in (("tensors are missing", missing), ("tensors are not the model's", left_over))
        if names
    ]
    needed = "the files must belong to the model of config.json"
    quantised = {name.rpartition(".")[0] for name in missing}
    if name := next((name for name in left_over if name.removesuffix(".weight") in quantised), ""):
        layer = name.removesuffix(".weight")
        needed += f", which says that {layer} is quantised, while they have it in floats"
    if missing == [HEAD]:
        needed += ", which must say tie_word_embeddings: true if the head is that of the embeddings"
    return f"{'; '.join(problems)}; {needed}"


def _slots(model: HasWeights, files: list[Path]) -> dict[str, WeightSlot]:
    """The destinations of the checkpoint's tensors, after a look at the head if config.json ties it to the embeddings.

    As in transformers 5, a head that differs from the embeddings is loaded, and a head without embeddings serves as
    both. Every rank compares whole tensors, so that all decide alike.
    """
    if not model.head.tied:
        return dict(model.weight_map())
    wanted = dict.fromkeys((HEAD, model.embedding_name))
    found: dict[str, Source] = {}
    with ExitStack() as kept:
        for path in files:
            with ExitStack() as file:
                sources = file.enter_context(opened(path))
                named = ((_name_in(wanted, model, name), source) for name, source in sources.items())
                if here := {name: source for name, source in named if name in wanted}:
                    found |= here
                    kept.push(file.pop_all())
        slot = model.weight_map()[model.embedding_name]
        if len(found) == 2 and not _are_equal(found[HEAD], found[model.embedding_name], slot):
            log.warning(
                "%s: %s differs from %s, to which config.json ties it (tie_word_embeddings); it is used as it is",
                found[HEAD].path,
                HEAD,
                model.embedding_name,
            )
            model.head.untie()
    slots = dict(model.weight_map())
    if found.keys() == {HEAD}:
        slots[HEAD] = slots.pop(model.embedding_name)
    return slots


def _are_equal(one: Source, other: Source, slot: WeightSlot) -> bool:
    """Whether two tensors for one slot are equal in its dtype. Neither is loaded whole.

    Where no values are read, tensors of the slot's shape are taken to be equal: then neither is refused in error.
    """
    if not one.shape == other.shape == slot.full_shape:
        return False
    if slot.target.is_meta:
        return True
    rows, columns = slot.full_shape
    step = max(1, _COMPARED // columns)
    parts = ((slice(start, start + step),) for start in range(0, rows, step))
    dtype = slot.target.dtype
    return all(torch.equal(one.read(part).to(dtype), other.read(part).to(dtype)) for part in parts)


def dummy_weights(model: HasWeights, seed: int = 0) -> None:
    """Fill every parameter with normally distributed values, which depend on the seed and the kind of device alone.

    Ranks have the same values of a tensor that each holds whole, and different ones of a tensor that they split.
    """
    slots = list(model.weight_map().values())
    generator = torch.Generator(slots[0].target.device)
    for index, slot in enumerate(slots):
        generator.manual_seed(hash((seed, index, slot.start)))
        slot.randomize(generator)
    model.arrange_weights()
