# SPDX-License-Identifier: Apache-2.0
"""What another engine reached on the same kind of machine, measured in the same way. The only place of its figures.

The peer's settings: FA3, CUDA graphs, torch.compile, asynchronous scheduling, no prefix cache; bfloat16, K and V too;
random weights, greedy, wall clock through its engine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

NAME = "vLLM 0.26.0"
GPU = "NVIDIA H200"


class Figures(NamedTuple):
    """By batch; 128 prompt and 128 output tokens."""

    step_ms: dict[int, float]
    prefill_tokens_per_second: dict[int, float]


# By shape and number of GPUs.
FIGURES = {
    ("llama-7b", 1): Figures({1: 4.59, 8: 4.95, 32: 5.94, 64: 7.29, 128: 10.28, 256: 17.22}, {256: 44900}),
    ("llama-7b", 4): Figures({1: 2.49, 256: 6.66}, {}),
    ("llama-2-70b", 4): Figures({1: 12.15, 32: 13.5, 128: 16.5}, {}),
}


def beside(result: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """The peer's figures for a row of static_inference's result: those that there are."""
    settings = result["settings"]
    is_its_setup = (
        result["machine"]["gpu"] == GPU
        and result["engine"]["dtype"] == "bfloat16"
        and settings.get("LIGHTLLM_KV_DTYPE", "auto") == "auto"
    )
    is_its_batch = not row["mixed"] and row["prompt_tokens"] == 128 * row["batch"] and row["output_len"] == 128
    figures = FIGURES.get((result["model"], int(settings.get("LIGHTLLM_TP", "1"))))
    if figures is None or not is_its_setup or not is_its_batch:
        return {}
    columns = {"peer_step_ms": figures.step_ms, "peer_prefill_tokens_per_second": figures.prefill_tokens_per_second}
    return {name: values[row["batch"]] for name, values in columns.items() if row["batch"] in values}
