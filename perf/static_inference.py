# SPDX-License-Identifier: Apache-2.0
"""LightLLM's static inference test: how fast batches of equal requests are, through the engine and without a server.

    python -m perf.static_inference --model llama-7b --batches 1,8,32,64,128,256
    python -m perf.static_inference --model_dir /models/llama-7B --load_format auto

For each batch size: prefill is the time for one token of every request; a step is (time for output_len tokens - time
for one) / (output_len - 1), all in wall clock at the client, scheduler and sampler included, medians of some repeats.
The floor is what this GPU needs at least for a step, with limits measured in the same run (perf/hardware_limits.py):
max(weights read, matrix arithmetic) + K and V read, these at half of the output; divided by the number of GPUs. Other
settings of the engine come from the environment, as LIGHTLLM_<NAME>.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lightllm_backend.config import ENVIRONMENT_PREFIX, EngineConfig
from lightllm_backend.models.model_config import ModelConfig
from perf.engine_under_test import EngineUnderTest, engine_under_test
from perf.hardware_limits import hardware_limits
from perf.record import RESULTS, circumstances, write_result

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def _shape(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int = 32000
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


SHAPES = {
    "tiny": _shape(2, 128, 256, 4, 2, 1000),  # to try this program itself
    "llama-7b": _shape(32, 4096, 11008, 32, 32, 32000),
    "llama-13b": _shape(40, 5120, 13824, 40, 40, 32000),
    "llama-2-70b": _shape(80, 8192, 28672, 64, 8, 32000),
}


def measure(engine: EngineUnderTest, batch: int, input_len: int, output_len: int, repeats: int) -> dict[str, float]:
    """One row of the result. The first round is not counted: kernels are compiled in it."""
    first_token, all_tokens, steps = [], [], []
    for repeat in range(repeats + 1):
        one = engine.run(batch, input_len, 1)
        whole = engine.run(batch, input_len, output_len)
        if repeat > 0:
            first_token.append(one.seconds)
            all_tokens.append(whole.seconds)
            steps.append(whole.step_seconds)
    prefill = statistics.median(first_token)
    step = (statistics.median(all_tokens) - prefill) / (output_len - 1)
    return {
        "batch": batch,
        "prefill_ms": 1e3 * prefill,
        "prefill_tokens_per_second": batch * input_len / prefill,
        "step_ms": 1e3 * step,
        "median_step_ms": 1e3 * statistics.median(steps),
        "decode_tokens_per_second": batch / step,
    }


def floor_ms(
    model: ModelConfig, dtype: str, kv_dtype: str, batch: int, input_len: int, output_len: int, limits: dict[str, Any]
) -> float:
    """The least that a decode step can take on this GPU."""
    query, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * query + 2 * kv + 3 * model.intermediate_size)
    weights = model.num_layers * layer + model.hidden_size * model.vocab_size
    values = batch * (input_len + output_len / 2) * 2 * kv * model.num_layers
    # int8 values have a float16 scale for each token and head.
    kv_read = values * (1 + 2 / model.head_dim if kv_dtype == "int8" else ITEM_BYTES[dtype])
    weights_read = weights * ITEM_BYTES[dtype] / limits["read_bytes_per_second"]
    arithmetic = 2 * weights * batch / limits["bf16_flops_per_second"]
    cache_read = kv_read / limits["read_bytes_per_second"]
    return float(1e3 * (max(weights_read, arithmetic) + cache_read))


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    columns = {
        "batch": ("batch", "{:.0f}"),
        "prefill ms": ("prefill_ms", "{:.2f}"),
        "prefill tokens/s": ("prefill_tokens_per_second", "{:,.0f}"),
        "step ms": ("step_ms", "{:.3f}"),
        "between tokens ms": ("median_step_ms", "{:.3f}"),
        "decode tokens/s": ("decode_tokens_per_second", "{:,.0f}"),
        "floor ms": ("floor_ms", "{:.3f}"),
        "share": ("share", "{:.2f}"),
    }
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(layout.format(row[key]) if key in row else "–" for key, layout in columns.values()))
    return table


def engine_config(directory: str, given: dict[str, str | None], largest: int, total_len: int) -> EngineConfig:
    """The settings of this run: the command line's, the environment's, and what the batches need."""
    variables = {name: value for name, value in given.items() if value is not None}
    variables |= {"model_dir": directory, "log_stats_interval": "0", "worker_python": sys.executable}
    variables |= {"max_req_input_len": str(total_len - 1), "max_req_total_len": str(total_len)}
    variables |= {"running_max_req_size": str(largest)}
    environment = {ENVIRONMENT_PREFIX + name.upper(): value for name, value in variables.items()}
    return EngineConfig.build({}, {**os.environ, **environment})


def settings_of(config: EngineConfig) -> dict[str, str]:
    """What a reader needs to repeat the run; where things lie on this machine is not part of it."""
    own = {ENVIRONMENT_PREFIX + "MODEL_DIR", ENVIRONMENT_PREFIX + "WORKER_PYTHON"}
    return {name: value for name, value in config.environment().items() if name not in own}


@click.command(help=str(__doc__).partition("\n")[0], context_settings={"max_content_width": 120})
@click.option("--model", type=click.Choice(list(SHAPES)), default="llama-7b", show_default=True, help="shape by name")
@click.option("--model_dir", help="a Hugging Face directory instead")
@click.option("--load_format", default="dummy", show_default=True, help="auto: real weights, not random ones")
@click.option("--batches", default="1,8,32,64,128,256", show_default=True, help="batch sizes, separated by commas")
@click.option("--input_len", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--output_len", default=128, show_default=True, type=click.IntRange(min=2))
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1), help="rounds that count")
@click.option("--dtype", help="bfloat16 | float16 | float32")
@click.option("--device", help="auto | cuda | cpu")
@click.option("--batch_max_tokens", help="prompt tokens a step")
@click.option("--max_total_token_num", help="token slots of the KV pool")
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file (default: in perf/results)")
def main(
    model: str, model_dir: str | None, batches: str, input_len: int, output_len: int, repeats: int,
    out: Path | None, **settings: str | None,
) -> None:  # fmt: skip
    sizes = [int(size) for size in batches.split(",")]
    limits = None if settings["device"] == "cpu" else hardware_limits()
    if limits is None and settings["max_total_token_num"] is None:
        settings["max_total_token_num"] = str(max(sizes) * (input_len + output_len))
    name = Path(model_dir).name if model_dir else model
    with tempfile.TemporaryDirectory() as scratch:
        if model_dir is None:
            Path(scratch, "config.json").write_text(json.dumps(SHAPES[model]))
        directory = model_dir or scratch
        shape = ModelConfig.from_directory(directory)
        config = engine_config(directory, settings, max(sizes), input_len + output_len)
        rows = []
        with engine_under_test(config) as engine:
            for size in tqdm(sizes, desc=name, unit="batch"):
                row = measure(engine, size, input_len, output_len, repeats)
                if limits is not None:
                    whole_model = floor_ms(
                        shape, engine.info.dtype, config.kv_dtype, size, input_len, output_len, limits
                    )
                    row["floor_ms"] = whole_model / config.tp
                    row["share"] = row["floor_ms"] / row["step_ms"]
                rows.append(row)
    machine = limits["gpu"] if limits else "cpu"
    title = f"{name}, {engine.info.dtype}, {machine}: {input_len} prompt and {output_len} output tokens"
    Console(width=120).print(table_of(rows, title))
    result = {
        "benchmark": "static_inference", "model": name, "input_len": input_len, "output_len": output_len,
        "repeats": repeats, **circumstances(limits["gpu"] if limits else None), "limits": limits,
        "engine": dataclasses.asdict(engine.info) | {"model": name}, "settings": settings_of(config),
        "start_seconds": engine.start_seconds, "rows": rows,
    }  # fmt: skip
    where = f"static_inference_{name}_{machine}.json".replace(" ", "_").lower()
    write_result(out or RESULTS / where, result)


if __name__ == "__main__":
    main()
