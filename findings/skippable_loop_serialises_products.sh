#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# triton 3.9.0: products of Hopper's tensor cores wait for each other if the loop around them may run zero times.
#
# A Gluon kernel sums products of tiles in a loop, each started with is_async=True, and waits for all but the last one
# at the end of a step. One would expect the code to be the same whatever the compiler knows of the number of steps, an
# argument. But a loop that may be skipped opens a path on which the zeros, which other instructions set, reach the last
# wait, and ptxas then has the kernel wait for every product to end: four times a step here, of 64 x 64 x 64. It says so
# in a warning (C7515) of its own log, of which triton shows nothing unless TRITON_DUMP_PTXAS_LOG is set while it
# compiles. gl.assume(steps > 0) before the loop lets products overlap again.
#
# Users meet it with loops whose bounds are arguments or depend on the program's index: the kernel is right, and slower
# than the code looks.
#
# Seen (instructions for sm_90a):
#   steps > 0 not known: 4 products, 4 waits; triton says nothing; ptxas's log: (C7515) Potential Performance Loss:
#                        wgmma.mma_async instructions are serialized
#   steps > 0 assumed:   4 products, 2 waits; triton says nothing; ptxas's log: no warning
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet triton==3.9.0

cat >kernel.py <<'PYTHON'
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia import hopper


@gluon.jit
def product(a, b, c, steps, known: gl.constexpr):
    loaded: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    rows = gl.arange(0, 64, gl.SliceLayout(1, loaded))[:, None]
    columns = gl.arange(0, 64, gl.SliceLayout(0, loaded))[None, :]
    a_shared = gl.allocate_shared_memory(gl.float16, [2, 64, 64], swizzled)
    b_shared = gl.allocate_shared_memory(gl.float16, [2, 64, 64], swizzled)
    total = gl.zeros([64, 64], gl.float32, summed)
    if known:
        gl.assume(steps > 0)
    for step in range(steps):
        a_tile, b_tile = a_shared.index(step % 2), b_shared.index(step % 2)
        a_tile.store(gl.load(a + (rows * steps + step) * 64 + columns))
        b_tile.store(gl.load(b + (step * 64 + rows) * 64 + columns))
        hopper.fence_async_shared()
        total = hopper.warpgroup_mma(a_tile, b_tile, total, is_async=True)
        total = hopper.warpgroup_mma_wait(1, deps=(total,))  # for the step before
    total = hopper.warpgroup_mma_wait(0, deps=(total,))
    rows = gl.arange(0, 64, gl.SliceLayout(1, summed))[:, None]
    columns = gl.arange(0, 64, gl.SliceLayout(0, summed))[None, :]
    gl.store(c + rows * 64 + columns, total)


source = GluonASTSource(
    product,
    signature={"a": "*fp16", "b": "*fp16", "c": "*fp32", "steps": "i32", "known": "constexpr"},
    constexprs={(4,): sys.argv[1] == "known"},
    attrs={(argument,): [["tt.divisibility", 16]] for argument in range(3)},
)
sass = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["sass"]
with open("counts", "w") as file:
    file.write(f"{sass.count('HGMMA.')} products, {sass.count('WARPGROUP.DEPBAR')} waits")
PYTHON

cat >check.py <<'PYTHON'
import os
import re
import subprocess
import sys


def compiled(known, log):
    """What is printed meanwhile, and the counts of instructions."""
    settings = {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DEFAULT_FP_FUSION": "1", "TRITON_DUMP_PTXAS_LOG": log}
    done = subprocess.run(
        [sys.executable, "kernel.py", known], env=os.environ | settings, capture_output=True, text=True, check=True
    )
    with open("counts") as file:
        return done.stdout + done.stderr, file.read()


for title, known, expected, is_serialised in (
    ("steps > 0 not known:", "unknown", "4 products, 4 waits", True),
    ("steps > 0 assumed:", "known", "4 products, 2 waits", False),
):
    silent, counts = compiled(known, "0")
    log, _ = compiled(known, "1")
    assert "Compiling entry function 'product'" in log, "changed: ptxas's log is not shown"
    warning = re.search(r"\(C7515\).*instructions are serialized", log)
    hint = "ptxas" in silent or "serialized" in silent
    print(f"{title:20} {counts}; triton says {'something' if hint else 'nothing'}", end="; ")
    print(f"ptxas's log: {warning[0] if warning else 'no warning'}")
    assert counts == expected, f"changed: expected {expected}"
    assert bool(warning) == is_serialised, "changed: the warning"
    assert not hint, "changed: triton tells of it"
PYTHON
TRITON_CACHE_DIR="$work/cache" venv/bin/python check.py
