# SPDX-License-Identifier: Apache-2.0
"""The parts of a step, told by its norms and attention, and their table."""

import pytest

from perf.rank_step import parts_of
from perf.report import engine
from perf.step_profile import Activity

STEP = [  # of two layers; names and the time until the end, after the kernel before
    ("embeddings", 3), ("rms_norm_kernel", 1),
    ("product", 10), ("token_attention_kernel", 6), ("merge_splits_kernel", 2), ("product", 5),
    ("all_reduce_rms_norm_kernel", 4), ("product", 20), ("product", 11), ("all_reduce_rms_norm_kernel", 4),
    ("product", 12), ("token_attention_kernel", 6), ("merge_splits_kernel", 2), ("product", 5),
    ("all_reduce_rms_norm_kernel", 4), ("quantize", 2), ("product", 20), ("product", 11),
    ("all_reduce_rms_norm_kernel", 5), ("head", 30), ("all_gather_kernel", 7),
]  # fmt: skip


def test_parts_of_all_steps_add_up() -> None:
    activities, end = [], 0.0
    for _ in range(2):
        for name, length in STEP:
            # Each starts while the one before still runs.
            activities.append(Activity(name, max(0.0, end - 1), end + length))
            end += length
    parts = parts_of(activities, layers=2, steps=2)
    assert parts == {
        "embedding, head and the rest": pytest.approx(40),
        "norms, with their sums": pytest.approx(9),
        "q, k and v": pytest.approx(11),
        "attention": pytest.approx(8),
        "attention's output": pytest.approx(5),
        "gate, up and down": pytest.approx(32),
    }


def test_the_table_tells_what_is_beyond_a_share() -> None:
    machine = {"gpu": "GPU", "cpu": "", "cores": 1}
    result = {
        "model": "llama-7b", "tp": 2, "layers": 8, "dtype": "bfloat16", "weight_dtype": "fp8", "machine": machine,
        "versions": {"torch": "2", "triton": "3"}, "commit": "abc", "date": "2026-11-30T00:00", "rows": [{
            "batch": 32,
            "one": {"step_ms": 1.0, "parts": {"attention": 10.0, "norms, with their sums": 2.0}},
            "ranks": {"step_ms": 0.75, "parts": {"attention": 6.0, "norms, with their sums": 9.0}},
        }],
    }  # fmt: skip
    lines = engine.rank_step(result)
    assert lines[2:] == [
        "| batch 32 | one GPU | 1/2 of it | 2 GPUs | beyond |",
        "| --: | --: | --: | --: | --: |",
        "| norms, with their sums | 2.0 | 1.0 | 9.0 | 8.0 |",
        "| attention | 10.0 | 5.0 | 6.0 | 1.0 |",
        "| the step, ms | 1.000 | 0.500 | 0.750 | 0.250 |",
    ]
