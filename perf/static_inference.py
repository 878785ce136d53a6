# SPDX-License-Identifier: Apache-2.0
"""LightLLM's static inference test: how fast batches of requests are, through the engine and without a server.

    python -m perf.static_inference --model llama-7b --case 32x4096x64 --case 1x8192x1 --mixed 580x64 --plot
    python -m perf.static_inference --model llama-7b --weight_dtype auto,fp8,int8,int4
    python -m perf.static_inference --model_dir /models/llama-7B --no-dummy_weights

For each batch: prefill is the time for one token of every request; a step is (time for output_len tokens - time for
one) / (output_len - 1), all in wall clock at the client, scheduler and sampler included, medians of some repeats.
Beside it stands the device's own time for the same steps, by its clock. The floor is what the GPUs need at least for a
step, with limits measured in the same run (perf/hardware_limits.py): max(weights read, matrix arithmetic) + K and V
read, divided by the number of GPUs (perf/model_cost.py). Several types of weights are measured one after the other, a
result each, with ratios to `auto`. Other settings of the engine come from the environment, as LIGHTLLM_<NAME>.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lightllm_backend.config import ENVIRONMENT_PREFIX, EngineConfig
from perf import peer
from perf.cases import WORKLOAD, Case, SizeList, Sizes, mixed_case
from perf.engine_under_test import EngineUnderTest, engine_under_test
from perf.hardware_limits import hardware_limits
from perf.model_cost import ModelCost
from perf.record import RESULTS, circumstances, types_of, write_result
from perf.shapes import LENGTHS, SHAPES


def measure(engine: EngineUnderTest, case: Case, repeats: int) -> dict[str, Any]:
    """One row of the result. The first round is not counted: whatever happens only once happens in it."""
    runs = []
    for _ in range(repeats + 1):
        one = engine.run(case.prompt_lengths, 1)
        runs.append((one, engine.run(case.prompt_lengths, case.output_len) if case.output_len > 1 else one))
    prefill = statistics.median(one.seconds for one, _ in runs[1:])
    row: dict[str, Any] = {
        "batch": case.batch,
        "prompt_tokens": sum(case.prompt_lengths),
        "output_len": case.output_len,
        "mixed": case.mixed,
        "prefill_ms": 1e3 * prefill,
        "prefill_tokens_per_second": sum(case.prompt_lengths) / prefill,
    }
    if case.output_len > 1:
        step = (statistics.median(whole.seconds for _, whole in runs[1:]) - prefill) / (case.output_len - 1)
        device = statistics.median(whole.device_seconds - one.device_seconds for one, whole in runs[1:])
        row |= {
            "mean_context": case.context_tokens / case.batch,
            "most_running": max(whole.most_running for _, whole in runs),
            "step_ms": 1e3 * step,
            "device_step_ms": 1e3 * device / (case.output_len - 1),
            "median_step_ms": 1e3 * statistics.median(whole.step_seconds for _, whole in runs[1:]),
            "decode_tokens_per_second": case.batch / step,
        }
    return row


def compare(row: dict[str, Any], case: Case, cost: ModelCost, limits: dict[str, Any], num_gpus: int) -> None:
    """Adds how much of the limits the row reaches."""
    row["prefill_flops_per_second"] = 1e3 * cost.prefill_flops(case.prompt_lengths) / row["prefill_ms"]
    row["prefill_share"] = 1e3 * cost.prefill_seconds(case.prompt_lengths, limits) / num_gpus / row["prefill_ms"]
    if "step_ms" in row:
        row["floor_ms"] = 1e3 * cost.step_seconds(case.batch, case.context_tokens, limits) / num_gpus
        row["share"] = row["floor_ms"] / row["step_ms"]


def add_ratios(result: dict[str, Any], plain: dict[str, Any]) -> None:
    """Adds the ratios to another result of the same batches, whose weights are those of the checkpoint."""

    def batch_of(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("batch", "prompt_tokens", "output_len", "mixed"))

    plain_rows = {batch_of(row): row for row in plain["rows"]}
    for row in result["rows"]:
        if other := plain_rows.get(batch_of(row)):
            row["prefill_ratio"] = row["prefill_tokens_per_second"] / other["prefill_tokens_per_second"]
            if "step_ms" in row:
                row["step_ratio"] = row["step_ms"] / other["step_ms"]


def table_of(result: dict[str, Any]) -> Table:
    other = peer.static_peer(result)
    parts = [result["model"], result["engine"]["dtype"], *types_of(result["settings"])]
    beside = f"; beside {peer.name_of(other)}" if other else ""
    table = Table(title=", ".join([*parts, result["machine"]["gpu"] or "cpu"]) + beside)
    columns = {
        "batch": ("batch", "{}"),
        "prompt": ("prompt", "{:,.0f}"),
        "output": ("output_len", "{}"),
        "prefill ms": ("prefill_ms", "{:.2f}"),
        "prefill tokens/s": ("prefill_tokens_per_second", "{:,.0f}"),
        "to auto": ("prefill_ratio", "{:.2f}"),
        "peer's": ("peer_prefill_tokens_per_second", "{:,.0f}"),
        "TFLOP/s": ("tflops", "{:.0f}"),
        "of the peak": ("prefill_share", "{:.2f}"),
        "step ms": ("step_ms", "{:.3f}"),
        "of auto": ("step_ratio", "{:.2f}"),
        "device ms": ("device_step_ms", "{:.3f}"),
        "between tokens ms": ("median_step_ms", "{:.3f}"),
        "decode tokens/s": ("decode_tokens_per_second", "{:,.0f}"),
        "floor ms": ("floor_ms", "{:.3f}"),
        "floor / step": ("share", "{:.2f}"),
        "peer's ms": ("peer_step_ms", "{:.2f}"),
    }
    rows = [
        {
            **row,
            **peer.beside(other, row),
            "prompt": row["prompt_tokens"] / row["batch"],
            **({"tflops": row["prefill_flops_per_second"] / 1e12} if "prefill_flops_per_second" in row else {}),
        }
        for row in result["rows"]
    ]
    known = {heading: column for heading, column in columns.items() if any(column[0] in row for row in rows)}
    for heading in known:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(layout.format(row[key]) if key in row else "–" for key, layout in known.values()))
    return table


def engine_config(directory: str, given: dict[str, str | None], cases: Sequence[Case]) -> EngineConfig:
    """The settings of this run: the command line's, the environment's, and lengths that suffice."""
    longest = max(case.longest for case in cases)
    variables = {name: value for name, value in given.items() if value is not None}
    variables |= {"model_dir": directory, "log_stats_interval": "0", "worker_python": sys.executable}
    variables |= {"max_req_input_len": str(max(longest - 1, LENGTHS["max_req_input_len"]))}
    variables |= {"max_req_total_len": str(max(longest, LENGTHS["max_req_total_len"]))}
    variables |= {"running_max_req_size": str(max(case.batch for case in cases))}
    environment = {ENVIRONMENT_PREFIX + name.upper(): value for name, value in variables.items()}
    return EngineConfig.build({}, {**os.environ, **environment})


def settings_of(config: EngineConfig) -> dict[str, str]:
    """What a reader needs to repeat the run; where things lie on this machine is not part of it."""
    own = {ENVIRONMENT_PREFIX + "MODEL_DIR", ENVIRONMENT_PREFIX + "WORKER_PYTHON"}
    return {name: value for name, value in config.environment().items() if name not in own}


def run(
    name: str, directory: str, config: EngineConfig, cases: Sequence[Case], repeats: int, limits: dict[str, Any] | None
) -> dict[str, Any]:
    """The result, as it is stored. A batch whose prompts alone exceed the KV pool is left out, and said so."""
    rows = []
    with engine_under_test(config) as engine:
        dtype: torch.dtype = getattr(torch, engine.info.dtype)
        kv_dtype = torch.int8 if config.kv_dtype == "int8" else dtype
        cost = ModelCost.of(directory, dtype, kv_dtype, config.weight_dtype, config.head_dtype)
        for case in tqdm(cases, desc=name, unit="batch"):
            if sum(case.prompt_lengths) + case.batch > engine.info.pool_tokens:
                tqdm.write(f"{case}: left out, the KV pool has {engine.info.pool_tokens} token slots")
                continue
            row = measure(engine, case, repeats)
            if row.get("most_running", case.batch) < case.batch:
                tqdm.write(f"{case}: at most {row['most_running']} of them ran at once")
            if limits is not None:
                compare(row, case, cost, limits, config.tp)
            rows.append(row)
    return {
        "benchmark": "static_inference", "model": name, "repeats": repeats,
        **circumstances(limits["gpu"] if limits else None), "limits": limits,
        "engine": dataclasses.asdict(engine.info) | {"model": name}, "settings": settings_of(config),
        "start_seconds": engine.start_seconds, "rows": rows,
    }  # fmt: skip


def name_parts(settings: dict[str, str]) -> list[str]:
    """What distinguishes these settings in a file's name."""
    layouts = {"TP": "tp{}", "WEIGHT_DTYPE": "weights_{}", "HEAD_DTYPE": "head_{}", "KV_DTYPE": "{}"}
    given = {key: settings.get(f"LIGHTLLM_{key}") for key in layouts}
    return [layouts[key].format(value) for key, value in given.items() if value]


def file_name(result: dict[str, Any]) -> str:
    parts = [result["benchmark"], result["model"], *name_parts(result["settings"]), result["machine"]["gpu"] or "cpu"]
    return "_".join(parts).replace(" ", "_").lower() + ".json"


WEIGHT_DTYPES = EngineConfig.__dataclass_fields__["weight_dtype"].metadata["allowed"].split(" | ")
HEAD_DTYPES = EngineConfig.__dataclass_fields__["head_dtype"].metadata["allowed"].split(" | ")


def _dtypes(_context: click.Context, _parameter: click.Parameter, text: str | None) -> list[str | None]:
    """`auto` comes first, since the others are compared with it. None: what the environment says."""
    if text is None:
        return [None]
    dtypes = set(text.split(","))
    if not dtypes <= set(WEIGHT_DTYPES):
        raise click.BadParameter(f"{text!r}; allowed: some of {', '.join(WEIGHT_DTYPES)}, separated by commas")
    return sorted(dtypes, key=WEIGHT_DTYPES.index)


@click.command(help=str(__doc__).partition("\n")[0], context_settings={"max_content_width": 120})
@click.option("--model", type=click.Choice(list(SHAPES)), default="llama-7b", show_default=True, help="shape by name")
@click.option("--model_dir", help="a Hugging Face directory instead")
@click.option("--dummy_weights/--no-dummy_weights", default=True, show_default=True, help="random ones, or the model's")
@click.option("--batches", default="1,8,32,64,128,256", show_default=True, type=SizeList(), help="batch sizes")
@click.option("--input_len", default="128", show_default=True, type=SizeList(), help="prompt tokens of each request")
@click.option("--output_len", default=128, show_default=True, type=click.IntRange(min=1), help="1: prefill alone")
@click.option(
    "--case",
    "more",
    multiple=True,
    type=Sizes("BATCH", "INPUT", "OUTPUT"),
    help="one more batch, beside all combinations of the options above; may be repeated",
)
@click.option("--mixed", multiple=True, type=Sizes("BATCH", "OUTPUT"), help="one more batch, of mixed lengths")
@click.option(
    "--lengths",
    default=WORKLOAD,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="the workload that the mixed lengths are those of: CSV with prompt_tokens and output_tokens",
)
@click.option("--mean_context", default=395, show_default=True, type=click.IntRange(min=1), help="of a mixed batch")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1), help="rounds that count")
@click.option("--tp", type=click.IntRange(min=1), help="GPUs that share the model")
@click.option("--dtype", help="bfloat16 | float16 | float32")
@click.option(
    "--weight_dtype",
    "weight_dtypes",
    callback=_dtypes,
    metavar="DTYPE,DTYPE,…",
    help=f"{' | '.join(WEIGHT_DTYPES)}, of the layers' weights; several are measured one after the other",
)
@click.option("--head_dtype", type=click.Choice(HEAD_DTYPES), help="of the head's weight")
@click.option("--kv_dtype", type=click.Choice(["auto", "int8"]), help="of K and V")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]))
@click.option("--batch_max_tokens", help="prompt tokens a step")
@click.option("--max_total_token_num", help="token slots of the KV pool")
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file (default: in perf/results)")
@click.option("--plot", is_flag=True, help="draw step over batch size into an SVG file beside the JSON file")
def main(
    model: str,
    model_dir: str | None,
    dummy_weights: bool,
    batches: list[int],
    input_len: list[int],
    output_len: int,
    more: tuple[tuple[int, int, int], ...],
    mixed: tuple[tuple[int, int], ...],
    lengths: Path,
    mean_context: int,
    repeats: int,
    out: Path | None,
    plot: bool,
    tp: int | None,
    weight_dtypes: list[str | None],
    **settings: str | None,
) -> None:
    if model_dir is None and not dummy_weights:
        raise click.UsageError("--no-dummy_weights needs --model_dir: a shape has no weights of its own")
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib; python -m perf.step_plot draws a stored result elsewhere")
    if out is not None and len(weight_dtypes) > 1:
        raise click.UsageError("--out is one file; each of several --weight_dtype has its own")
    cases = [Case.equal(batch, length, output_len) for length in input_len for batch in batches]
    cases += [Case.equal(*sizes) for sizes in more]
    cases += [mixed_case(lengths, batch, output, mean_context) for batch, output in mixed]
    limits = None if settings["device"] == "cpu" else hardware_limits()
    settings |= {"load_format": "dummy" if dummy_weights else "auto", "tp": str(tp) if tp else None}
    if limits is None and settings["max_total_token_num"] is None:
        settings["max_total_token_num"] = str(max(case.batch * case.longest for case in cases))
    with tempfile.TemporaryDirectory() as scratch:
        if model_dir is None:
            Path(scratch, "config.json").write_text(json.dumps(SHAPES[model]))
        directory = model_dir or scratch
        name = Path(model_dir).name if model_dir else model
        plain = None
        for weight_dtype in weight_dtypes:
            config = engine_config(directory, settings | {"weight_dtype": weight_dtype}, cases)
            result = run(name, directory, config, cases, repeats, limits)
            if config.weight_dtype == "auto":
                plain = result
            elif plain is not None:
                add_ratios(result, plain)
            Console(width=160).print(table_of(result))
            path = out or RESULTS / file_name(result)
            write_result(path, result)
            if plot:
                from perf.step_plot import draw  # only now: matplotlib is not everywhere

                draw(result, path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
