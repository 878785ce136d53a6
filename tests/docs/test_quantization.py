# SPDX-License-Identifier: Apache-2.0
"""docs/quantization.md against the code: methods, files, settings, limits."""

from __future__ import annotations

import json
from pathlib import Path

from lightllm_backend.config import EngineConfig
from lightllm_backend.kernels.quantized.choice import MAX_16_BIT_ROUNDED, MAX_16_BIT_TOKENS
from lightllm_backend.kernels.quantized.quantized_splits import MAX_TILE_TOKENS
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.quantization.config import METHODS, QUANTIZATION_FILES
from lightllm_backend.models.quantization.on_the_fly import SHRINKS
from perf.perplexity import RESULT
from perf.record import RESULTS
from perf.report.engine import perplexity_table
from perf.shapes import SHAPES

PAGE = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")


def first_cells(header: str) -> list[str]:
    """The first cells of the table that begins with this column."""
    lines = PAGE.splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(line.split("|")[1].strip().strip("`"))
    return rows


def test_methods_and_files() -> None:
    assert first_cells("`quant_method`") == list(METHODS)
    assert all(f"`{name}`" in PAGE for name in QUANTIZATION_FILES)


def test_the_settings() -> None:
    allowed = EngineConfig.__dataclass_fields__["weight_dtype"].metadata["allowed"].split(" | ")
    assert ["auto", *first_cells("`weight_dtype`")] == allowed


def test_the_perplexities_are_those_that_were_measured() -> None:
    result = json.loads(RESULT.read_text())
    assert "\n".join(perplexity_table(result)) in PAGE, "write the table of python -m perf.perplexity"
    assert f"{result['model']}, on {result['tokens']:,} tokens" in PAGE
    assert f"in windows of {result['window']:,}, computed in {result['dtype']} on a CPU" in PAGE
    assert result["machine"]["gpu"] is None


def test_where_kernels_change() -> None:
    few, more = MAX_16_BIT_ROUNDED, MAX_TILE_TOKENS
    assert more == MAX_16_BIT_TOKENS
    assert first_cells("tokens of a step")[:2] == [f"1 to {few}", f"{few + 1} to {more}"]


def test_the_search() -> None:
    assert f"among {len(SHRINKS)} ranges" in PAGE


def test_the_groups_of_int4_by_ranks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama-7b"]))
    shape = ModelConfig.from_directory(tmp_path)
    assert f"LLaMA-7B, whose MLP has {shape.intermediate_size:,} features" in PAGE
    rows = []
    for tp in (1, 2, 4, 8):
        scheme = shape.with_weight_dtype("int4", "auto", tp).quantization.scheme("model.layers.0.mlp.down_proj")
        assert scheme is not None
        rows.append(f"| {tp} | {scheme.group_size} |\n")
    assert "| `tp` | groups |\n| --- | --- |\n" + "".join(rows) in PAGE


def test_the_steps_are_those_that_were_measured() -> None:
    fp8, int8, int4, peer = (
        {row["batch"]: row for row in json.loads((RESULTS / f"{name}_nvidia_h200.json").read_text())["rows"]}
        for name in (
            "static_inference_llama-7b_weights_fp8", "static_inference_llama-7b_weights_int8",
            "static_inference_llama-7b_weights_int4", "peer_vllm_llama-7b_fp8",
        )
    )  # fmt: skip

    def figures(row: dict[str, float]) -> str:
        return f"{row['step_ms']:.2f} | {row['step_ratio']:.2f} | {row['prefill_tokens_per_second']:,.0f}"

    lines = [
        f"| {batch} | {figures(fp8[batch])} | {peer[batch]['step_ms']:.2f} | {figures(int8[batch])}"
        f" | {figures(int4[batch])} |"
        for batch in fp8
    ]
    assert "\n".join(lines) in PAGE
