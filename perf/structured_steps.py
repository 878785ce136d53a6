# SPDX-License-Identifier: Apache-2.0
"""What structured output costs the engine: a step of 64 requests, and the first token with a schema never seen.

    python -m perf.structured_steps
    python -m perf.structured_steps --model tiny --rows 4 --device cpu --max_total_token_num 4096

LLaMA-7B's shape with random weights and a vocabulary of 128,256 tokens (perf/structured_output.py makes it), through
the EngineClient, without Triton server. Rounds without and with structured output take turns, greedy and drawn; the
first round of each does not count, and medians are told. In a round with it, every request follows an endless list of
documents by one of the SCHEMAS, the largest in perf/data/json_schemas.json.

A step is the time from the first token of the last request to the last token of the first, by the steps between. The
first token is that of a request alone, with a prompt and a schema that the engine has never seen. The targets are a
step at most 3 % longer and a first token at most 2 ms later.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from lightllm_backend.config import ENVIRONMENT_PREFIX, EngineConfig
from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.request import Request, RequestError, SamplingParams, TokenChunk
from perf.engine_under_test import engine_client
from perf.record import RESULTS, circumstances, gpu_name, write_result
from perf.shapes import SHAPES
from perf.static_inference import settings_of
from perf.structured_output import LARGE_VOCABULARY, tokenizer_json
from perf.structured_output import SCHEMAS as ALL_SCHEMAS

SCHEMAS = ("kubernetes_like", "long_flat", "invoice", "function_call", "calendar_event", "deep", "survey", "person")
SAMPLINGS = {
    "greedy": SamplingParams(ignore_eos=True),
    "drawn": SamplingParams(ignore_eos=True, do_sample=True, temperature=1.0, top_p=0.95, seed=1),
}
TARGET_STEP, TARGET_FIRST_MS = 0.03, 2.0


def write_model(name: str, directory: Path) -> None:
    """Write the config.json of a shape with the large vocabulary, and the tokenizer."""
    (directory / "config.json").write_text(json.dumps(SHAPES[name] | {"vocab_size": LARGE_VOCABULARY}))
    (directory / "tokenizer.json").write_text(tokenizer_json(large=True))


class Rounds:
    """Requests with prompts and schemas that are always new."""

    def __init__(self, client: EngineClient, prompt_tokens: int, output_tokens: int) -> None:
        self._client = client
        self._prompt_tokens, self._output_tokens = prompt_tokens, output_tokens
        self._vocabulary = range(client.wait_ready().vocab_size)
        self._random = random.Random(0)
        self._number = 0

    def step_seconds(self, sampling: SamplingParams, rows: int, structured: bool) -> float:
        """The mean step while all rows run."""
        times = self._run([self._with_schema(sampling, structured) for _ in range(rows)], self._output_tokens)
        begin, end = max(one[0] for one in times), min(one[-1] for one in times)
        steps = min(sum(begin < moment <= end for moment in one) for one in times)
        if steps < self._output_tokens / 2:
            raise RuntimeError(f"the requests ran together for {steps} of {self._output_tokens} steps only")
        return (end - begin) / steps

    def first_seconds(self, sampling: SamplingParams, structured: bool) -> float:
        """The time to the first token of a request alone."""
        begin = time.perf_counter()
        [[first]] = self._run([self._with_schema(sampling, structured)], 1)
        return first - begin

    def _with_schema(self, sampling: SamplingParams, structured: bool) -> SamplingParams:
        self._number += 1
        if not structured:
            return sampling
        document = ALL_SCHEMAS[SCHEMAS[self._number % len(SCHEMAS)]] | {"title": f"number {self._number}"}
        definitions = document.pop("$defs", {})
        schema = {"$defs": definitions, "type": "array", "items": document, "minItems": 1000}
        return replace(sampling, structured_output=json.dumps({"json_schema": schema}))

    def _run(self, params: Sequence[SamplingParams], output_tokens: int) -> list[list[float]]:
        """Run requests to their ends; return when each token of each came."""
        times: dict[str, list[float]] = {}
        errors: list[RequestError] = []
        all_done, num_open = threading.Event(), len(params)

        def on_chunk(chunk: TokenChunk) -> None:
            nonlocal num_open
            times[chunk.uid] += [time.perf_counter()] * len(chunk.token_ids)
            if chunk.finish_reason is not None:
                errors.extend([chunk.error] if chunk.error else [])
                num_open -= 1
                if num_open == 0:
                    all_done.set()

        for sampling in params:
            prompt = tuple(self._random.choices(self._vocabulary, k=self._prompt_tokens))
            request = Request(self._client.new_uid(), prompt, replace(sampling, max_tokens=output_tokens))
            times[request.uid] = []
            self._client.submit(request, on_chunk)
        all_done.wait()
        if errors:
            raise errors[0]
        return list(times.values())


def compare(seconds: Callable[[bool], float], repeats: int) -> dict[str, float]:
    """The medians of turns without and with structured output, in milliseconds."""
    turns = [(seconds(False), seconds(True)) for _ in range(repeats + 1)][1:]
    without, structured = (1e3 * statistics.median(times) for times in zip(*turns, strict=True))
    return {"without_ms": without, "structured_ms": structured}


def measure(client: EngineClient, rows: int, prompt: int, output: int, repeats: int, firsts: int) -> dict[str, Any]:
    """The figures of each sampling, and whether they reach the targets."""
    rounds = Rounds(client, prompt, output)
    result: dict[str, Any] = {}
    for name, sampling in SAMPLINGS.items():
        step = compare(lambda structured, of=sampling: rounds.step_seconds(of, rows, structured), repeats)
        first = compare(lambda structured, of=sampling: rounds.first_seconds(of, structured), firsts)
        step["longer"] = step["structured_ms"] / step["without_ms"] - 1
        first["later_ms"] = first["structured_ms"] - first["without_ms"]
        reached = step["longer"] <= TARGET_STEP and first["later_ms"] <= TARGET_FIRST_MS
        result[name] = {"step": step, "first": first, "reached": reached}
    return result


def table_of(title: str, measured: dict[str, Any]) -> Table:
    table = Table(title=title)
    for heading in ("", "step, ms", "structured", "longer", "first token, ms", "new schema", "later, ms", "reached"):
        table.add_column(heading, justify="right")
    for name, row in measured.items():
        step, first = row["step"], row["first"]
        table.add_row(
            name, f"{step['without_ms']:.3f}", f"{step['structured_ms']:.3f}", f"{step['longer']:.1%}",
            f"{first['without_ms']:.2f}", f"{first['structured_ms']:.2f}", f"{first['later_ms']:.2f}",
            "yes" if row["reached"] else "no",
        )  # fmt: skip
    return table


def engine_config(directory: Path, rows: int, longest: int, given: dict[str, str | None]) -> EngineConfig:
    variables = {name: value for name, value in given.items() if value is not None}
    variables |= {"model_dir": str(directory), "load_format": "dummy", "log_stats_interval": "0"}
    variables |= {"worker_python": sys.executable, "running_max_req_size": str(rows)}
    variables |= {"max_req_input_len": str(longest), "max_req_total_len": str(longest + 1)}
    environment = {ENVIRONMENT_PREFIX + name.upper(): value for name, value in variables.items()}
    return EngineConfig.build({}, {**os.environ, **environment})


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--model", type=click.Choice(list(SHAPES)), default="llama-7b", show_default=True, help="shape by name")
@click.option("--rows", default=64, show_default=True, type=click.IntRange(min=1), help="requests that run together")
@click.option("--prompt", default=128, show_default=True, type=click.IntRange(min=1), help="tokens of each prompt")
@click.option("--output", default=256, show_default=True, type=click.IntRange(min=4), help="tokens of each answer")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1), help="rounds of steps")
@click.option("--firsts", default=40, show_default=True, type=click.IntRange(min=1), help="first tokens")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]))
@click.option("--tp", help="GPUs that share the model")
@click.option("--max_total_token_num", help="token slots of the KV pool")
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file (default: in perf/results)")
def main(
    model: str, rows: int, prompt: int, output: int, repeats: int, firsts: int, out: Path | None,
    **settings: str | None,
) -> None:  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        write_model(model, Path(scratch))
        config = engine_config(Path(scratch), rows, prompt + output, settings)
        with engine_client(config) as client:
            info = client.wait_ready()
            measured = measure(client, rows, prompt, output, repeats, firsts)
    gpu = gpu_name(info.device)
    title = f"{model}, vocabulary {info.vocab_size:,}, {info.dtype}, {rows} requests, {gpu or 'cpu'}"
    Console(width=120).print(table_of(title, measured))
    result = {
        "benchmark": "structured_steps", "model": model, "rows": rows, "prompt": prompt, "output": output,
        "repeats": repeats, "firsts": firsts, **circumstances(gpu), "llguidance": version("llguidance"),
        "engine": asdict(info) | {"model": model}, "settings": settings_of(config), "measured": measured,
    }  # fmt: skip
    name = f"structured_steps_{model}_{gpu or 'cpu'}.json".replace(" ", "_").lower()
    write_result(out or RESULTS / name, result)


if __name__ == "__main__":
    main()
