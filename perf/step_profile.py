# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step goes: the GPU's own time by kernel, when it idles, and what the host does meanwhile.

    python -m perf.step_profile --model llama-7b --batches 1,256,1000
    python -m perf.step_profile --model llama-7b --batches 256 --prefill
    python -m perf.step_profile --model llama-7b --batches 1,128 --tp 2

The engine runs in this process: the worker's loop without its sockets. Of several GPUs it is the first's rank, and the
others are followers in processes of their own. First some steps are timed by the
clock alone, then others are recorded by PyTorch's profiler, which slows small kernels down a little: the recorded span
beside the wall time tells how much. The gaps between two steps are an upper bound: most of them is the profiler's.
On a CPU there are only the host's times.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from lightllm_backend.config import EngineConfig
from lightllm_backend.generation.worker_group import worker_environment
from lightllm_backend.messages.run_directory import batches_address, rendezvous_file
from lightllm_backend.request import Request, SamplingParams
from lightllm_backend.router.batch import Batch
from lightllm_backend.runner.model_runner import PendingStep
from lightllm_backend.worker.batch_channel import BatchSender
from lightllm_backend.worker.load import LoadedEngine, load_engine
from lightllm_backend.worker.main import build_router
from perf.cases import WORKLOAD, Case, SizeList, mixed_case
from perf.record import RESULTS, circumstances, write_result
from perf.shapes import SHAPES
from perf.static_inference import HEAD_DTYPES, WEIGHT_DTYPES, engine_config, name_parts, settings_of

WARM_UP_STEPS = 5


class HostTimes(NamedTuple):
    """Seconds of one turn of the loop."""

    next_batch: float
    launch: float
    wait: float
    apply: float


class Activity(NamedTuple):
    """A kernel or a copy on the GPU; µs."""

    name: str
    start: float
    end: float


class StepLoop:
    """A batch of requests in an engine of its own Router, taken through the worker's loop turn by turn."""

    def __init__(
        self, engine: LoadedEngine, followers: BatchSender, config: EngineConfig, case: Case, seed: int
    ) -> None:
        self._runner = engine.runner
        self._followers = followers
        self._router = build_router(config, engine.info, engine.batch_max_tokens, groups=engine.groups)
        self._in_flight: deque[tuple[Batch, PendingStep]] = deque()
        self._case = case
        chooser, vocabulary = random.Random(seed), range(engine.info.vocab_size)
        sampling = SamplingParams(max_tokens=case.output_len, ignore_eos=True)
        for index, length in enumerate(case.prompt_lengths):
            self._router.submit(Request(str(index), tuple(chooser.choices(vocabulary, k=length)), sampling))

    def turn(self) -> HostTimes:
        started = time.perf_counter()
        batch = self._router.next_batch()
        planned = time.perf_counter()
        if batch is not None:
            self._followers.send(batch)
            self._in_flight.append((batch, self._runner.launch(batch)))
        launched = time.perf_counter()
        wait = apply = 0.0
        while self._in_flight and (len(self._in_flight) > self._runner.overlap or batch is None):
            before = time.perf_counter()
            done, step = self._in_flight.popleft()
            result = step.result()
            received = time.perf_counter()
            self._router.apply(done, result)
            wait, apply = wait + received - before, apply + time.perf_counter() - received
        return HostTimes(planned - started, launched - planned, wait, apply)

    @property
    def all_run(self) -> bool:
        """Whether every prompt has been planned to its end, and no request has ended."""
        stats = self._router.stats()
        return stats.running_requests == self._case.batch and stats.prompt_tokens_total == sum(
            self._case.prompt_lengths
        )

    def prefill(self) -> list[HostTimes]:
        times = [self.turn()]
        while not self.all_run:
            if not self._router.has_work:
                raise click.ClickException(f"{self._case} do not run at once: the KV pool is too small for them")
            times.append(self.turn())
        return times

    def finish(self) -> None:
        while self._router.has_work or self._in_flight:
            self.turn()


def activities_of(work: Callable[[], Any]) -> list[Activity]:
    """What the GPU does for it, in order of start."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    events = [event for event in recorded.events() if event.device_type.name == "CUDA"]
    found = [Activity(event.name, event.time_range.start, event.time_range.end) for event in events]
    return sorted(found, key=lambda activity: activity.start)


def summarize(activities: Sequence[Activity], steps: int) -> dict[str, Any]:
    """Times of one step in ms. Gaps are times in which nothing runs, by what ran before and after."""
    kernels: dict[str, list[float]] = defaultdict(list)
    gaps: dict[tuple[str, str], list[float]] = defaultdict(list)
    for activity in activities:
        kernels[activity.name].append(activity.end - activity.start)
    last = activities[0]  # of those so far, the one that ends last
    for activity in activities[1:]:
        if activity.start > last.end:
            gaps[last.name, activity.name].append(activity.start - last.end)
        last = max(last, activity, key=lambda one: one.end)
    span = last.end - activities[0].start
    idle = sum(map(sum, gaps.values()))

    def table(rows: Iterable[tuple[dict[str, str], list[float]]]) -> list[dict[str, Any]]:
        listed = [{**names, "ms": sum(times) / steps / 1e3, "count": len(times) / steps} for names, times in rows]
        return sorted(listed, key=lambda row: -row["ms"])

    return {
        "span_ms": span / steps / 1e3,
        "busy_ms": (span - idle) / steps / 1e3,
        "idle_share": idle / span,
        "kernels": table(({"name": name}, times) for name, times in kernels.items()),
        "gaps": table(({"after": pair[0], "before": pair[1]}, times) for pair, times in gaps.items())[:20],
    }


@contextlib.contextmanager
def loaded(config: EngineConfig) -> Iterator[tuple[LoadedEngine, BatchSender]]:
    """Rank 0 of an engine, and what leads its other ranks, as the worker's main has them."""
    with tempfile.TemporaryDirectory() as directory:
        address = str(Path(directory, "engine"))
        batches = BatchSender(batches_address(address), config.tp - 1)
        module = [sys.executable, "-m", "lightllm_backend.worker.main", address]
        followers = [
            subprocess.Popen(
                [*module, str(rank)], env=worker_environment(config), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
            for rank in range(1, config.tp)
        ]
        try:
            engine = load_engine(config, 0, lambda directory, device: rendezvous_file(address))
            batches.accept()
            yield engine, batches
        finally:
            batches.close()
            for follower in followers:
                follower.kill()
                follower.wait()


def profile_case(
    engine: LoadedEngine, followers: BatchSender, config: EngineConfig, case: Case, steps: int, in_prefill: bool
) -> dict[str, Any]:
    """One row of the result: of all steps that prefill the batch, or of as many that decode all of it."""
    on_gpu = engine.info.device == "cuda"
    StepLoop(engine, followers, config, case, seed=0).finish()  # whatever happens only once happens here
    loop = StepLoop(engine, followers, config, case, seed=1)
    started = time.perf_counter()
    times = loop.prefill()
    if not in_prefill:
        for _ in range(WARM_UP_STEPS):
            loop.turn()
        _wait_for_gpu(on_gpu)
        started = time.perf_counter()
        times = [loop.turn() for _ in range(steps)]
    _wait_for_gpu(on_gpu)
    wall = time.perf_counter() - started
    assert loop.all_run, "the batch is whole in every step that is timed"
    host = {f"{name}_ms": 1e3 * statistics.median(getattr(turn, name) for turn in times) for name in HostTimes._fields}
    row = {
        "batch": case.batch,
        "prompt_tokens": sum(case.prompt_lengths),
        "mixed": case.mixed,
        "steps": len(times),
        "wall_ms": 1e3 * wall / len(times),
        **host,
    }
    if on_gpu:
        if in_prefill:
            loop.finish()
            loop = StepLoop(engine, followers, config, case, seed=2)
            row |= summarize(activities_of(loop.prefill), len(times))
        else:
            row |= summarize(activities_of(lambda: [loop.turn() for _ in range(steps)]), steps)
        assert loop.all_run, "the batch is whole in every step that is recorded"
    loop.finish()
    return row


def _wait_for_gpu(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def print_row(row: dict[str, Any], console: Console) -> None:
    tokens = f"{row['prompt_tokens'] / row['batch']:,.0f} prompt tokens each"
    host = ", ".join(f"{name} {row[f'{name}_ms']:.3f}" for name in HostTimes._fields)
    console.print(f"[bold]batch {row['batch']}, {tokens}[/]: {row['wall_ms']:.3f} ms a step; host: {host}")
    if "kernels" not in row:
        return
    busy = f"recorded {row['span_ms']:.3f} ms a step, busy {row['busy_ms']:.3f}, idle {row['idle_share']:.1%}"
    table = Table("on the GPU", "ms a step", "count", title=busy)
    for kernel in row["kernels"][:15]:
        table.add_row(kernel["name"][:80], f"{kernel['ms']:.3f}", f"{kernel['count']:.1f}")
    table.add_section()
    for gap in row["gaps"][:5]:
        table.add_row(f"idle: {gap['after'][:35]} → {gap['before'][:35]}", f"{gap['ms']:.3f}", f"{gap['count']:.1f}")
    console.print(table)


def cases_for(
    batches: Sequence[int], input_len: int, mixed: int | None, mean_context: int, steps: int, batch_max_tokens: int
) -> list[Case]:
    """Batches with enough tokens to generate that none ends before the last step is recorded."""

    def output_len(prompt_tokens: int) -> int:
        prefill_steps = math.ceil(prompt_tokens / batch_max_tokens) + 1
        return prefill_steps + WARM_UP_STEPS + 2 * steps + 3

    cases = [Case.equal(batch, input_len, output_len(batch * input_len)) for batch in batches]
    if mixed:
        cases.append(mixed_case(WORKLOAD, mixed, output_len(mixed * mean_context), mean_context))
    return cases


@click.command(help=str(__doc__).partition("\n")[0], context_settings={"max_content_width": 120})
@click.option("--model", type=click.Choice(list(SHAPES)), default="llama-7b", show_default=True, help="shape by name")
@click.option("--batches", default="1,8,32,64,128,256", show_default=True, type=SizeList(), help="batch sizes")
@click.option("--input_len", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--mixed", type=click.IntRange(min=1), help="one more batch, of mixed lengths (see static_inference)")
@click.option("--mean_context", default=395, show_default=True, type=click.IntRange(min=1), help="of the mixed batch")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(min=1), help="timed, and as many recorded")
@click.option("--prefill", is_flag=True, help="the steps that prefill the batch, not those that decode")
@click.option("--tp", type=click.IntRange(min=1), help="GPUs that share the model")
@click.option("--dtype", help="bfloat16 | float16 | float32")
@click.option("--weight_dtype", type=click.Choice(WEIGHT_DTYPES), help="of the layers' weights")
@click.option("--head_dtype", type=click.Choice(HEAD_DTYPES), help="of the head's weight")
@click.option("--kv_dtype", type=click.Choice(["auto", "int8"]), help="of K and V")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]))
@click.option("--batch_max_tokens", default=8192, show_default=True, type=click.IntRange(min=1))
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file (default: in perf/results)")
def main(
    model: str,
    batches: list[int],
    input_len: int,
    mixed: int | None,
    mean_context: int,
    steps: int,
    prefill: bool,
    batch_max_tokens: int,
    out: Path | None,
    tp: int | None,
    **settings: str | None,
) -> None:
    cases = cases_for(batches, input_len, mixed, mean_context, steps, batch_max_tokens)
    # Without the prefix cache, since prompts that begin with the same token by chance would share it.
    settings |= {"load_format": "dummy", "batch_max_tokens": str(batch_max_tokens), "prefix_cache": "false"}
    settings["tp"] = str(tp) if tp else None
    if not torch.cuda.is_available():
        settings["max_total_token_num"] = str(max(case.batch * case.longest for case in cases))
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(SHAPES[model]))
        config = engine_config(directory, settings, cases)
        with loaded(config) as (engine, followers):
            on_gpu = engine.info.device == "cuda"
            if on_gpu:
                activities_of(lambda: torch.zeros(1, device="cuda"))  # the first recording sets the profiler up
            rows = [
                profile_case(engine, followers, config, case, steps, prefill)
                for case in tqdm(cases, desc=model, unit="batch")
            ]
    console = Console(width=120)
    for row in rows:
        print_row(row, console)
    gpu = torch.cuda.get_device_name() if on_gpu else None
    phase = "prefill" if prefill else "decode"
    result = {
        "benchmark": "step_profile", "model": model, "phase": phase, **circumstances(gpu), "dtype": engine.info.dtype,
        "settings": settings_of(config), "rows": rows,
    }  # fmt: skip
    parts = ["step_profile", model, *name_parts(result["settings"]), phase, *(gpu or "cpu").split()]
    name = "_".join(parts).lower()
    write_result(out or RESULTS / f"{name}.json", result)


if __name__ == "__main__":
    main()
