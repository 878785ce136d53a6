# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints of little random models, written by the public definition of each format.

AWQ (AutoAWQ's WQLinear_GEMM): qweight[i, j] holds in its bits 4 n to 4 n + 3 the weight of input i and output
8 j + (0, 2, 4, 6, 1, 3, 5, 7)[n]; qzeros are packed alike; weight = (q - zero) * scale.
GPTQ (AutoGPTQ's QuantLinear): qweight[j, o] holds in its bits b n to b n + b - 1 the weight of input 32 / b * j + n and
output o; qzeros are packed so along the outputs, less 1 in each number (`gptq`) or as they are (`gptq_v2`); g_idx[i] is
the group of input i.
compressed-tensors: weight_packed[o, j] holds in its bits b n to b n + b - 1 the signed weight of output o and input
32 / b * j + n, plus half the range; weight_zero_point is packed so along the outputs.
fp8: weight = value * scale, with a scale for all, for each output, or for each block of 128 x 128.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.models.random_models import random_model

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

# Takes a matrix's name and float32 [out, in]; returns its tensors in the checkpoint, and the weight that they mean.
Store = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


def write_checkpoint(
    directory: Path,
    family: str | transformers.PreTrainedModel,
    store: Store,
    config: dict[str, object],
    file: str = "config.json",
    left_out: Iterable[str] = (),
    with_head: bool = False,
) -> transformers.PreTrainedModel:
    """Write the family's random model, or that one, its linear layers stored so; return what they mean, as a model."""
    model = random_model(family) if isinstance(family, str) else family
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    head = [("lm_head", model.lm_head)] if with_head else []
    with torch.no_grad():
        for name, module in linear_layers(model) + head:
            if name not in left_out:
                stored, meant = store(name, module.weight)
                tensors |= {f"{name}.{part}": value.contiguous() for part, value in stored.items()}
                if "weight" not in stored:
                    del tensors[f"{name}.weight"]
                module.weight.copy_(meant)
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors")
    values = model.config.to_dict() | {"dtype": "float32"}
    if file == "config.json":
        values["quantization_config"] = config
    else:
        (directory / file).write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps(values))
    return model


def linear_layers(model: transformers.PreTrainedModel) -> list[tuple[str, torch.nn.Linear]]:
    """Those of the decoder layers."""
    modules = model.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, torch.nn.Linear) and name != "lm_head"]


def round_inputs(model: transformers.PreTrainedModel, rounded: Callable[[str, Tensor], Tensor]) -> None:
    """Let each linear layer of the decoder round its input."""
    for name, module in linear_layers(model):
        module.register_forward_pre_hook(lambda _, inputs, name=name: (rounded(name, inputs[0]),))


def int8_by_token(_name: str, x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-127, 127) * scale


def fp8_by_token(_name: str, x: Tensor) -> Tensor:
    return fp8(x, x.abs().amax(-1, keepdim=True) / 448).float() * (x.abs().amax(-1, keepdim=True) / 448)


def fp8(x: Tensor, scale: Tensor | float) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def group_index(in_features: int, group_size: int, in_order: bool = True) -> Tensor:
    """The group of each input feature; out of order, alike for all matrices of so many inputs."""
    groups = torch.arange(in_features) // group_size
    return groups if in_order else groups[torch.randperm(in_features, generator=torch.Generator().manual_seed(5))]


def quantise(weight: Tensor, bits: int, groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers without a sign [out, in], float16 scales and zero points [out, groups], and the weight they stand for."""
    top, count = 2**bits - 1, int(groups.max()) + 1
    numbers = torch.empty_like(weight, dtype=torch.int64)
    scales = weight.new_empty(len(weight), count)
    zeros = torch.empty_like(scales, dtype=torch.int64)
    for group in range(count):
        columns = weight[:, groups == group]
        if symmetric:
            scale, zero = columns.abs().amax(1) * 2 / top, zeros.new_full((len(weight),), 2 ** (bits - 1))
        else:
            least = columns.amin(1).clamp_max(0)
            scale = (columns.amax(1).clamp_min(0) - least) / top
            zero = (-least / scale).round().long()
        scale = scale.half().float()
        scales[:, group], zeros[:, group] = scale, zero.clamp(0, top)
        numbers[:, groups == group] = ((columns / scale[:, None]).round().long() + zero[:, None]).clamp(0, top)
    meant = (numbers - zeros[:, groups]) * scales[:, groups]
    return numbers, scales.half(), zeros, meant


def pack(numbers: Tensor, bits: int, order: Iterable[int] | None = None) -> Tensor:
    """Numbers [n, m] as words of 32 bits along the last dimension; number order[i] of a word is in bits b i and up."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % per_word)).cpu().numpy().astype(np.uint32)
    words = np.zeros((len(padded), padded.shape[1] // per_word), np.uint32)
    for place, number in enumerate(range(per_word) if order is None else order):
        words |= padded[:, number::per_word] << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32))


def awq(group_size: int, zero_point: bool = True) -> Store:
    def store(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        size = weight.shape[1] if group_size == -1 else group_size
        numbers, scales, zeros, meant = quantise(weight, 4, group_index(weight.shape[1], size), not zero_point)
        tensors = {"qweight": pack(numbers.t(), 4, AWQ_ORDER), "scales": scales.t()}
        return tensors | {"qzeros": pack(zeros.t(), 4, AWQ_ORDER)}, meant

    return store


def gptq(bits: int, group_size: int, symmetric: bool, in_order: bool, version: int) -> Store:
    def store(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        groups = group_index(weight.shape[1], weight.shape[1] if group_size == -1 else group_size, in_order)
        numbers, scales, zeros, meant = quantise(weight, bits, groups, symmetric)
        words = pack(zeros.t(), bits)
        if version == 1:  # as GPTQModel does: 1 less in each number of a word, as one subtraction
            words = (words.long() - (0x11111111 if bits == 4 else 0x01010101)).to(torch.int32)
        tensors = {"qweight": pack(numbers, bits).t(), "scales": scales.t(), "qzeros": words}
        return tensors | {"g_idx": groups.to(torch.int32)}, meant

    return store


def changed(store: Store, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Store:
    """The same with tensors that are changed so; they mean what they meant."""

    def stored(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, meant = store(name, weight)
        return change(tensors), meant

    return stored


def without_index(store: Store) -> Store:
    """GPTQ's tensors as AutoRound writes them, without g_idx."""
    return changed(store, lambda tensors: {part: value for part, value in tensors.items() if part != "g_idx"})


def packed(bits: int, group_size: int, symmetric: bool, in_order: bool = True) -> Store:
    def store(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        groups = group_index(weight.shape[1], group_size, in_order)
        numbers, scales, zeros, meant = quantise(weight, bits, groups, symmetric)
        tensors = {
            "weight_packed": pack(numbers, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack(zeros.t(), bits).t()
        return tensors | ({} if in_order else {"weight_g_idx": groups.to(torch.int32)}), meant

    return store


def int8_by_channel(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scale).round()
    return {"weight": values.to(torch.int8), "weight_scale": scale}, values * scale


def fp8_by_channel(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    values = fp8(weight, scale)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def fp8_by_tensor(input_scale: Callable[[str], float] | None = None) -> Store:
    def store(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = weight.abs().amax() / 448
        values = fp8(weight, scale)
        tensors = {"weight": values, "weight_scale": scale}
        if input_scale is not None:
            tensors["input_scale"] = torch.tensor(input_scale(name))
        return tensors, values.float() * scale

    return store


def fp8_in_blocks(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = (torch.arange(size) // 128 for size in weight.shape)
    short = [-size % 128 for size in weight.shape]
    blocks = torch.nn.functional.pad(weight.abs(), (0, short[1], 0, short[0]))
    scales = blocks.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).amax((1, 3)) / 448
    by_weight = scales[rows][:, columns]
    values = fp8(weight, by_weight)
    return {"weight": values, "weight_scale_inv": scales}, values.float() * by_weight
