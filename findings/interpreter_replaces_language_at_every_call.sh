#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# triton 3.9.0: in the interpreter, every call of a function from a kernel replaces the language's functions anew.
#
# With TRITON_INTERPRET=1 a kernel runs on the CPU, in numpy. For that, the interpreter puts its own functions in place
# of those of triton.language as a kernel is launched, and puts the old ones back at the end. But it does so once more
# at every call of another @triton.jit function, though its functions are in place already: it looks through the whole
# module to find that little is left to replace. The library's own tl.zeros, tl.sum and tl.cdiv are such functions too.
# One would expect that a call costs little more than the function's body. It costs five additions more.
#
# Users meet it when they test kernels on a machine without a GPU: the compiler inlines functions, so kernels consist of
# small ones, and then the interpreter spends most of its time on replacing the language.
#
# Seen (two cores; a launch that adds 500 times, to 64 numbers each):
#   in_one_piece:      16 ms, triton.language replaced 1 times
#   with_a_function:   94 ms, triton.language replaced 501 times
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet numpy==2.4.6 torch==2.13.0 triton==3.9.0

cat >kernels.py <<'PYTHON'
import time

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

TIMES = 500


@triton.jit
def add(x, y):
    return x + y


@triton.jit
def in_one_piece(target, count: tl.constexpr, times: tl.constexpr):
    index = tl.arange(0, count)
    total = index.to(tl.float32)
    for _ in range(times):
        total = total + 0.5
    tl.store(target + index, total)


@triton.jit
def with_a_function(target, count: tl.constexpr, times: tl.constexpr):
    index = tl.arange(0, count)
    total = index.to(tl.float32)
    for _ in range(times):
        total = add(total, 0.5)
    tl.store(target + index, total)


replacements = 0
replace = interpreter._patch_lang


def count_and_replace(function):
    global replacements
    replacements += 1
    return replace(function)


interpreter._patch_lang = count_and_replace
kernels = (in_one_piece, with_a_function)
counts, seconds = {}, {kernel: [] for kernel in kernels}
for _ in range(7):
    for kernel in kernels:
        target = torch.empty(64, dtype=torch.float32)
        replacements, begun = 0, time.process_time()
        kernel[(1,)](target, 64, TIMES)
        seconds[kernel].append(time.process_time() - begun)
        counts[kernel] = replacements
        assert target.tolist() == [index + TIMES / 2 for index in range(64)], "wrong sums"
for kernel in kernels:
    print(f"{kernel.__name__ + ':':16} {1e3 * min(seconds[kernel]):4.0f} ms, "
          f"triton.language replaced {counts[kernel]} times")
assert counts[in_one_piece] == 1, "changed: a launch does not replace triton.language once"
assert counts[with_a_function] == 1 + TIMES, "changed: triton.language is not replaced at every call"
assert min(seconds[with_a_function]) > 2 * min(seconds[in_one_piece]), "changed: a call costs little"
PYTHON
TRITON_INTERPRET=1 venv/bin/python kernels.py
