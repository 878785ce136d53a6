# SPDX-License-Identifier: Apache-2.0
"""Measures an installed vLLM as perf.static_inference and the service benchmark measure this engine.

    pip install vllm
    for weights in bf16 fp8 awq; do python -m perf.peer_vllm --model llama-7b --weights $weights; done

Runs in vLLM's environment, from this project's folder; of what this project depends on it needs nothing. Random weights
by shape, greedy, past any EOS, wall clock around LLM.generate. For each batch, prefill is the time for one token of
every request, and a step is (time for output_len tokens - time for one) / (output_len - 1): medians of some repeats,
after a round that does not count. Then the workload of --lengths, all requests at once. perf.report shows the results
beside ours. fp8 is quantised while loading (quantization="fp8"), awq a checkpoint in groups of 128 and float16.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from perf.record import RESULTS, circumstances, nvidia_gpu_name, write_result
from perf.serving.workload import Length, WorkItem, id_prompts, lengths_from_table
from perf.shapes import SHAPES

WORKLOAD = Path(__file__).with_name("data") / "workload_2000.csv"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
# By --weights: what config.json has beside the shape, and LLM's arguments.
WEIGHTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bf16": ({}, {"dtype": "bfloat16"}),
    "fp8": ({}, {"dtype": "bfloat16", "quantization": "fp8"}),
    "awq": ({"quantization_config": AWQ}, {"dtype": "float16"}),
}
# Nothing is fetched and nothing reported.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


class WrongAnswer(Exception):
    """vLLM made another number of tokens than it was asked for."""


class Peer:
    """vLLM with a model of random weights."""

    def __init__(self, directory: str, arguments: dict[str, Any]) -> None:
        try:
            import vllm  # only in its own environment
        except ModuleNotFoundError as error:
            raise SystemExit(f"{error}; this is measured where `pip install vllm` has put it") from None
        self.version = str(vllm.__version__)
        started = perf_counter()
        self._llm = vllm.LLM(model=directory, **arguments)
        self.start_seconds = perf_counter() - started
        self._sampling = vllm.SamplingParams

    def seconds(self, items: Sequence[WorkItem]) -> float:
        """For all of them, submitted at once."""
        prompts = [{"prompt_token_ids": list(item.prompt)} for item in items]
        sampling = [
            self._sampling(temperature=0.0, max_tokens=item.length.output, ignore_eos=True, detokenize=False)
            for item in items
        ]
        started = perf_counter()
        answers = self._llm.generate(prompts, sampling, use_tqdm=False)
        seconds = perf_counter() - started
        for item, answer in zip(items, answers, strict=True):
            if (made := len(answer.outputs[0].token_ids)) != item.length.output:
                raise WrongAnswer(f"{made} tokens came, {item.length.output} were asked for")
        return seconds


def measure_batch(peer: Peer, vocab_size: int, length: Length, batch: int, repeats: int) -> dict[str, Any]:
    """A row as static_inference has it."""
    seeds = random.Random(batch)

    def seconds(output: int) -> float:
        return peer.seconds(id_prompts([Length(length.prompt, output)] * batch, vocab_size, seeds.randrange(2**32)))

    rounds = [(seconds(1), seconds(length.output)) for _ in range(repeats + 1)][1:]
    prefill, whole = (statistics.median(times) for times in zip(*rounds, strict=True))
    return {
        "batch": batch,
        "prompt_tokens": batch * length.prompt,
        "output_len": length.output,
        "mixed": False,
        "prefill_ms": 1e3 * prefill,
        "prefill_tokens_per_second": batch * length.prompt / prefill,
        "step_ms": 1e3 * (whole - prefill) / (length.output - 1),
    }


def measure_service(peer: Peer, items: Sequence[WorkItem]) -> dict[str, Any]:
    """A run of the service benchmark, of which LLM.generate tells only the whole."""
    seconds = peer.seconds(items)
    prompt, output = (sum(getattr(item.length, name) for item in items) for name in ("prompt", "output"))
    return {
        "request_rate": None,
        "requests": len(items),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "seconds": seconds,
        "requests_per_second": len(items) / seconds,
        "output_tokens_per_second": output / seconds,
        "total_tokens_per_second": (prompt + output) / seconds,
    }


def arguments_of(weights: str, tp: int, max_model_len: int) -> dict[str, Any]:
    """LLM's."""
    return {
        "load_format": "dummy",
        "max_model_len": max_model_len,
        "gpu_memory_utilization": 0.92,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "tensor_parallel_size": tp,
        **WEIGHTS[weights][1],
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--model", choices=list(SHAPES), default="llama-7b", help="shape by name (default: %(default)s)")
    add("--weights", choices=list(WEIGHTS), default="bf16", help="default: %(default)s")
    add("--tp", type=int, default=1, help="GPUs that share the model (default: %(default)s)")
    add("--batches", default="1,8,32,64,128,256", help="batch sizes (default: %(default)s)")
    add("--input_len", type=int, default=128, help="prompt tokens of each request (default: %(default)s)")
    add("--output_len", type=int, default=128, help="default: %(default)s")
    add("--repeats", type=int, default=3, help="rounds that count (default: %(default)s)")
    add("--lengths", type=Path, default=WORKLOAD, help="CSV of prompt and output tokens (default: %(default)s)")
    add("--no_service", action="store_true", help="leave the workload out")
    add("--max_model_len", type=int, default=2048, help="default: %(default)s")
    add("--results", type=Path, default=RESULTS, help="folder of the JSON files (default: perf/results)")
    options = parser.parse_args(given)
    if options.output_len < 2:
        parser.error(f"--output_len is {options.output_len}; allowed: at least 2, since a step is a difference")

    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    with tempfile.TemporaryDirectory() as directory:
        measure(options, directory)


def measure(options: argparse.Namespace, directory: str) -> None:
    """Write the two results, with the model's config.json in `directory`."""
    arguments = arguments_of(options.weights, options.tp, options.max_model_len)
    config = SHAPES[options.model] | WEIGHTS[options.weights][0]
    Path(directory, "config.json").write_text(json.dumps(config))
    peer = Peer(directory, arguments)
    where = circumstances(nvidia_gpu_name())
    where["versions"]["vllm"] = peer.version
    common = {
        "peer": "vLLM", "model": options.model, "weights": options.weights, "tp": options.tp, **where,
        "settings": arguments | {name: value for name, value in os.environ.items() if name.startswith("VLLM_")},
        "start_seconds": peer.start_seconds,
    }  # fmt: skip
    parts = ["peer_vllm", options.model, options.weights, *([f"tp{options.tp}"] if options.tp > 1 else [])]
    gpu = (where["machine"]["gpu"] or "cpu").replace(" ", "_").lower()

    rows = []
    length, vocab_size = Length(options.input_len, options.output_len), config["vocab_size"]
    for batch in map(int, options.batches.split(",")):
        rows.append(measure_batch(peer, vocab_size, length, batch, options.repeats))
        figures = f"{rows[-1]['step_ms']:.3f} ms a step, prefill {rows[-1]['prefill_tokens_per_second']:,.0f} tokens/s"
        print(f"batch {batch}: {figures}", flush=True)
    static = {"benchmark": "static_inference", **common, "repeats": options.repeats, "rows": rows}
    write_result(options.results / f"{'_'.join([*parts, gpu])}.json", static)

    if not options.no_service:
        run = measure_service(peer, id_prompts(lengths_from_table(options.lengths), vocab_size, seed=0))
        print(f"{options.lengths.stem}: {run['requests_per_second']:.2f} requests/s")
        service = {
            "benchmark": "serving", **common, "system": "engine", "workload": options.lengths.stem, "prompts": "ids",
            "is_dataset": False, "shared_prefix": 0, "max_tokens": None, "runs": [run],
        }  # fmt: skip
        write_result(options.results / f"{'_'.join([*parts, options.lengths.stem, gpu])}.json", service)


if __name__ == "__main__":
    main()
