#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# triton 3.9.0: a mask `index < count` makes every access of a kernel four times as narrow unless 16 divides `count`.
#
# A kernel copies float32 in blocks of 1,024, with aligned pointers and the usual mask for the last block. One would
# expect accesses of 16 bytes in either case, since all blocks but the last are whole and the mask only says where the
# data ends. But one instruction has one mask, and the compiler proves that four neighbours share it only from what it
# knows of `count`: with a count that is a multiple of 16 (which Triton-lang finds out at the first call with it) a thread
# makes 2 loads of 16 bytes, with any other, or with `do_not_specialize`, 8 loads of 4 bytes.
#
# Users meet it with vocabularies such as GPT-2's 50,257, and when they name an argument in `do_not_specialize` to save
# compilations: the same kernel, on the same data, reads more slowly. A bound that shows the factor, `4 * pieces`, or a
# mask on whole pieces restores the wide accesses.
#
# Seen (PTX for sm_90):
#   count known to be a multiple of 16: 2 x ld.global.v4.b32, 2 x st.global.v4.b32
#   count of which nothing is known:    8 x ld.global.b32, 8 x st.global.b32
#   4 * pieces, nothing known of these: 2 x ld.global.v4.b32, 2 x st.global.v4.b32
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet triton==3.9.0

cat >kernel.py <<'PYTHON'
import re
from collections import Counter

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def copy(source, target, count, factor: tl.constexpr, block: tl.constexpr):
    index = tl.program_id(0) * block + tl.arange(0, block)
    mask = index < count * factor
    tl.store(target + index, tl.load(source + index, mask=mask), mask=mask)


def accesses(factor, known):
    source = ASTSource(
        copy,
        signature={"source": "*fp32", "target": "*fp32", "count": "i32", "factor": "constexpr", "block": "constexpr"},
        constexprs={(3,): factor, (4,): 1024},
        attrs={(argument,): [["tt.divisibility", 16]] for argument in ((0, 1, 2) if known else (0, 1))},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    return dict(Counter(re.findall(r"(?:ld|st)\.global[.\w]*", ptx)))


wide = {"ld.global.v4.b32": 2, "st.global.v4.b32": 2}
narrow = {"ld.global.b32": 8, "st.global.b32": 8}
for title, factor, known, expected in (
    ("count known to be a multiple of 16:", 1, True, wide),
    ("count of which nothing is known:", 1, False, narrow),
    ("4 * pieces, nothing known of these:", 4, False, wide),
):
    seen = accesses(factor, known)
    print(f"{title:36}" + ", ".join(f"{number} x {name}" for name, number in seen.items()))
    assert seen == expected, f"changed: expected {expected}"
PYTHON
TRITON_DEFAULT_FP_FUSION=1 venv/bin/python kernel.py
