# SPDX-License-Identifier: Apache-2.0
"""The PTX that unpacks weights, run by an interpreter of its few instructions, for every number there is."""

import pytest
import torch

from lightllm_backend.kernels.quantized.unpacking import INT4_INTO_INT8, unpacking

OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": lambda a, b, c, table: (a & b | c) if int(table[0]) == 0xEA else (a & b ^ c),
}


def pairs_of(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The halves of words [n] int64, as numbers [n, 2] of `dtype`, the lower one first."""
    return torch.stack((words & 0xFFFF, words >> 16), -1).to(torch.int32).to(torch.int16).view(dtype)


def words_of(pairs: torch.Tensor) -> torch.Tensor:
    low, high = (pairs.view(torch.int16).long() & 0xFFFF).unbind(-1)
    return low | high << 16


def run(ptx: str, words: list[torch.Tensor], results: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Run on words [n] int64 of 32 bits; return the results as numbers [n, 2]."""
    registers = {f"${results + index}": word for index, word in enumerate(words)}
    for line in ptx.strip("{} ").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        target, *operands = (part.strip() for part in rest.split(","))
        values = [registers[one] if one in registers else torch.full_like(words[0], int(one, 0)) for one in operands]
        if name in OPERATIONS:
            registers[target] = OPERATIONS[name](*values)
            continue
        left, right = (pairs_of(value, dtype).float() for value in values)
        result = left - right if name.startswith("sub.") else left * right
        registers[target] = words_of(result.to(dtype))
    return [pairs_of(registers[f"${index}"], dtype) for index in range(results)]


def bytes_of(values: torch.Tensor) -> torch.Tensor:
    """Words whose four bytes are these numbers [n, 4]."""
    return sum((values.view(torch.uint8).long()[:, index] << 8 * index) for index in range(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero", [None, 5])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_four_bits(dtype, zero, scale):
    """Nibbles k and k + 4 are a pair; a zero point comes with the offset that numbers have in the fraction."""
    nibbles = torch.arange(16).repeat(2, 1).flatten().unfold(0, 8, 1)  # each number at each place
    words = sum(nibbles[:, index] << 4 * index for index in range(8))
    given = [words]
    if zero is not None:
        offset = torch.tensor([zero + (128.0 if dtype == torch.bfloat16 else 1024.0)]).to(dtype).view(torch.int16)
        given += [(offset.long() * 0x00010001).expand(len(words))] * 2
    if scale is not None:
        bits = torch.tensor([scale]).to(dtype).view(torch.int16).long()
        given += [(bits * 0x00010001).expand(len(words))] * 2
    results = run(unpacking("int4", dtype, zero is not None, scale is not None), given, 4, dtype)
    for pair, result in enumerate(results):
        expected = nibbles[:, [pair, pair + 4]] - (8 if zero is None else zero)
        assert torch.equal(result.float(), expected.float() * (scale or 1))


def test_four_bits_into_eight():
    """Nibbles 2k and 2k + 1 are the k-th bytes of the two results, 16 times as large."""
    nibbles = torch.arange(16).repeat(2, 1).flatten().unfold(0, 8, 1)
    words = sum(nibbles[:, index] << 4 * index for index in range(8))
    results = run(INT4_INTO_INT8, [words], 2, torch.int16)
    for odd, result in enumerate(results):
        assert torch.equal(result.contiguous().view(torch.int8).long(), 16 * (nibbles[:, odd::2] - 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "zero"), [("int8", None), ("int8", -100), ("fp8", None)])
def test_eight_bits(kind, zero, dtype):
    """Bytes 0 and 2 are a pair, and 1 and 3; every byte that is a number, at each place."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    every = every[every.float().abs() <= 448]  # without NaN
    values = every.view(torch.uint8).repeat(2).unfold(0, 4, 1).contiguous().view(every.dtype)
    given = [bytes_of(values)]
    if zero is not None:
        given += [(torch.tensor([float(zero)]).to(dtype).view(torch.int16).long() & 0xFFFF) * 0x00010001] * 2
        given[1:] = [one.expand(len(values)) for one in given[1:]]
    results = run(unpacking(kind, dtype, zero is not None), given, 2, dtype)
    for result, places in zip(results, ([0, 2], [1, 3]), strict=True):
        assert torch.equal(result.float(), values.float()[:, places] - (zero or 0))
