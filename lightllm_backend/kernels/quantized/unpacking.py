# SPDX-License-Identifier: Apache-2.0
"""PTX that turns words of 4-bit and 8-bit weights into numbers of 16 bits, two at a time, or of 4 bits into int8."""

from functools import lru_cache

import torch

from lightllm_backend.kernels.quantized.weight import INT4_ZERO

# The tables of lop3 for (a & b) | c and (a & b) ^ c.
_AND_OR, _AND_XOR = "0xEA", "0x6A"

# Turns a word of eight 4-bit numbers, which count from -8, into int8 16 times as large: the even ones, and the odd.
INT4_INTO_INT8 = (
    f"{{ .reg .b32 t; shl.b32 t, $2, 4; lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, {_AND_XOR}; "
    f"lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, {_AND_XOR}; }}"
)


@lru_cache
def unpacking(kind: str, dtype: torch.dtype, has_zeros: bool, has_scale: bool = False) -> str:
    """PTX that turns a word into 16-bit numbers; `kind` is int4, int8 or fp8. With a scale, int4 is multiplied by it.

    A word holds pairs, of 4-bit numbers or bytes, 16 bits apart; both of a pair become numbers by the same operations.
    Small whole numbers enter the fraction of 128.0 in bfloat16, or of 1024.0 in float16, whose last place counts 1, and
    the offset is subtracted. fp8's exponent and fraction move to where the wider format has them; a multiplication
    makes up for the other bias.
    """
    is_bf16 = dtype == torch.bfloat16
    subtract, multiply = ("sub.bf16x2", "mul.bf16x2") if is_bf16 else ("sub.f16x2", "mul.f16x2")
    one = 0x4300 if is_bf16 else 0x6400  # its last place counts 1
    lines = [".reg .b32 t, s;"]
    if kind == "int4":
        for pair in range(4):
            source = "$4"
            if pair:
                lines.append(f"shr.u32 t, $4, {4 * pair};")
                source = "t"
            lines.append(f"lop3.b32 t, {source}, 0x000F000F, {_twice(one)}, {_AND_OR};")
            if not has_zeros:
                lines.append(f"mov.b32 s, {_twice(one + INT4_ZERO)};")
            lines.append(f"{subtract} ${pair}, t, {'$5' if has_zeros else 's'};")
            if has_scale:
                lines.append(f"{multiply} ${pair}, ${pair}, {'$7' if has_zeros else '$5'};")
        return _block(lines)
    for pair in range(2):  # bytes 0 and 2, or 1 and 3
        source = "$2"
        if kind == "fp8":  # in the upper byte of 16 bits, the sign is in its place
            if pair == 0:
                lines.append("shl.b32 t, $2, 8;")
                source = "t"
            shift, mask, factor = (4, 0x07F0, 0x7B80) if is_bf16 else (1, 0x3F80, 0x5C00)  # 2**120, 2**8
            lines.append(f"and.b32 s, {source}, 0x80008000;")
            lines.append(f"shr.u32 t, {source}, {shift};")
            lines.append(f"lop3.b32 t, t, {_twice(mask)}, s, {_AND_OR};")
            lines.append(f"mov.b32 s, {_twice(factor)};")
            lines.append(f"{multiply} ${pair}, t, s;")
            continue
        if pair == 1:
            lines.append("shr.u32 t, $2, 8;")
            source = "t"
        if is_bf16:  # seven bits enter 128.0; the sign decides between subtracting 128 and 256
            lines.append(f"lop3.b32 s, {source}, 0x00800080, {_twice(one)}, {_AND_XOR};")
            lines.append(f"lop3.b32 t, {source}, 0x007F007F, {_twice(one)}, {_AND_OR};")
        else:  # with the sign inverted, eight bits are the number plus 128
            lines.append(f"mov.b32 s, {_twice(one + 128)};")
            lines.append(f"lop3.b32 t, {source}, 0x00FF00FF, s, {_AND_XOR};")
        lines.append(f"{subtract} ${pair}, t, s;")
        if has_zeros:
            lines.append(f"{subtract} ${pair}, ${pair}, $3;")
    return _block(lines)


def _twice(number: int) -> str:
    return f"0x{number:04X}{number:04X}"


def _block(lines: list[str]) -> str:
    return "{ " + " ".join(lines) + " }"
