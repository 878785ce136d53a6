# SPDX-License-Identifier: Apache-2.0
"""LightLLM's service benchmark: requests that arrive by chance, at a server, and how fast they are answered.

    python -m perf.benchmark_serving --lengths perf/data/workload_120.csv --request-rate 4
    python -m perf.benchmark_serving --launch --model llama-7b --lengths perf/data/workload_2000.csv --request-rate 200
    python -m perf.benchmark_serving --launch --protocol openai --set front_processes=4 …

Measures a server that runs (--address), one that is started for it (--launch), or the engine alone (--in-process).
Every answer is checked: an error, or another length than what was asked for, ends it with exit code 1 and says which
request it was. It also says when the clients themselves were the limit.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from tqdm import tqdm

from lightllm_backend.config import ENVIRONMENT_PREFIX, ConfigError, EngineConfig
from lightllm_backend.generation.worker_group import EngineStartError
from lightllm_backend.launch.embedded_model import MODEL_NAME
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.text.tokenizer_settings import TokenizerError
from perf.model_directory import DATA, TOKENIZER_PIECES, write_model_directory
from perf.record import RESULTS, circumstances, nvidia_gpu_name, write_result
from perf.serving import timeline, workload
from perf.serving.calls import Target
from perf.serving.load import Planned
from perf.serving.measure import RequestFailed, clients_summary, summary
from perf.serving.systems import ServerSystem, System, SystemFailed, engine_alone, launched_server
from perf.serving.tables import figures_table, notes
from perf.serving.workload import Length, WorkItem, WorkloadError
from perf.shapes import LENGTHS, SHAPES

DEFAULT_PROMPTS = 1000
MACHINE_SETTINGS = {"model_dir", "worker_python"}  # where things lie on one machine
DEFAULT_ADDRESSES = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000", "openai": "127.0.0.1:9000"}


@dataclass(frozen=True)
class Options:
    """The command line."""

    lengths: Path | None
    dataset: Path | None
    random: tuple[int, int] | None
    num_prompts: int | None
    prompts: str
    shared_prefix: int
    max_tokens: int | None
    ignore_eos: bool
    tokenizer: Path | None
    vocab_size: int
    seed: int
    request_rate: float
    sweep: tuple[float, ...]
    concurrency: int | None
    processes: int
    protocol: str
    streaming: bool
    timeout: float
    address: str | None
    metrics_address: str
    launch: bool
    in_process: bool
    model: str | None
    settings: dict[str, str]
    name: str | None
    out: Path | None
    plot: bool

    def check(self) -> None:
        if sum(source is not None for source in (self.lengths, self.dataset, self.random)) != 1:
            raise click.UsageError("give one of --lengths, --dataset and --random")
        if self.launch and self.in_process:
            raise click.UsageError("give one of --launch and --in-process")
        if not (self.launch or self.in_process) and (self.model or self.settings):
            raise click.UsageError("--model and --set are for --launch and --in-process")
        if self.in_process and (self.prompts == "text" or not self.streaming):
            raise click.UsageError("--in-process streams token ids; it has neither --prompts text nor --no-streaming")
        if self.dataset and self.shared_prefix:
            raise click.UsageError("--shared-prefix is for --lengths and --random")
        if self.model is not None and self.model not in SHAPES:
            raise click.UsageError(f"--model is {self.model}; allowed: {', '.join(SHAPES)}")

    @property
    def rates(self) -> tuple[float, ...]:
        return self.sweep or (self.request_rate,)


def work_items(options: Options, model_dir: Path | None, seed: int) -> list[WorkItem]:
    """The requests of one run; WorkloadError if there are not as many as wanted."""
    if options.lengths:
        lengths = workload.lengths_from_table(options.lengths)
    elif options.random:
        lengths = [Length(*options.random)] * (options.num_prompts or DEFAULT_PROMPTS)
    else:
        lengths = []
    lengths = lengths[: options.num_prompts]
    if options.dataset is None and options.prompts == "ids":
        items = workload.id_prompts(lengths, options.vocab_size, seed, options.shared_prefix)
    else:
        tokenizer = Tokenizer.load(options.tokenizer or model_dir or DATA)
        if options.dataset is None:
            items = workload.text_prompts(lengths, tokenizer, seed, options.shared_prefix)
        else:
            count = options.num_prompts or DEFAULT_PROMPTS
            items = workload.items_from_dataset(options.dataset, tokenizer, count, seed, options.prompts == "text")
            lengths = [item.length for item in items]
    if len(items) < (options.num_prompts or 1):
        raise WorkloadError(f"--num-prompts is {options.num_prompts}; allowed: at most {len(items)}, which there are")
    if options.max_tokens is not None:
        items = [WorkItem(item.prompt, Length(item.length.prompt, options.max_tokens)) for item in items]
    return items


def one_run(system: System, options: Options, items: list[WorkItem], rate: float) -> dict[str, Any]:
    due = workload.arrival_times(len(items), rate, options.seed)
    plan = [Planned(index, *planned) for index, planned in enumerate(zip(due, items, strict=True))]
    try:
        before = system.moment()
    except OSError as error:
        raise SystemFailed(f"--metrics-address is {options.metrics_address}: {error}; allowed: a server's") from None
    title = "all at once" if math.isinf(rate) else f"{rate:g} requests/s"
    with tqdm(total=len(plan), desc=title, unit="request") as bar, timeline.Timeline(system.moment) as seen:
        started, traces, shares = system.run(plan, options.concurrency, bar.update)
    moments = [moment for moment in seen.moments if moment.at >= started]
    result = summary(traces, started, options.streaming)
    return {
        "request_rate": None if math.isinf(rate) else rate,
        **result,
        "clients": clients_summary(shares),
        "pool_share_while_queued": timeline.pool_share(moments),
        "device_share": timeline.device_share(before, moments, result["seconds"]),
        "delivery_lag": None if options.in_process else timeline.delivery_lag(before, moments, traces),
        "timeline": timeline.rows(moments, started),
    }


@contextlib.contextmanager
def system_of(options: Options, settings: Mapping[str, str]) -> Iterator[System]:
    address = options.address or DEFAULT_ADDRESSES[options.protocol]
    target = Target(options.protocol, address, options.streaming, options.ignore_eos, options.timeout)
    if options.in_process:
        with engine_alone(settings, options.ignore_eos) as engine:
            yield engine
    elif options.launch:
        with launched_server(settings, target, options.processes) as server:
            yield server
    else:
        yield ServerSystem(target, options.metrics_address, options.processes)


def benchmark(options: Options, console: Console) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="lightllm-model-") as scratch:
        settings = dict(options.settings)
        if options.model:
            write_model_directory(options.model, Path(scratch))
            inherited = {name for name in LENGTHS if os.environ.get(ENVIRONMENT_PREFIX + name.upper())}
            lengths = {name: str(length) for name, length in LENGTHS.items() if name not in inherited}
            settings = {"model_dir": scratch, "load_format": "dummy", **lengths, **settings}
        given = settings.get("model_dir") or os.environ.get(f"{ENVIRONMENT_PREFIX}MODEL_DIR")
        model_dir = Path(given) if given and (options.launch or options.in_process) else None
        # Prompts are new in each run, so that none is found in a prefix cache.
        workloads = [work_items(options, model_dir, options.seed + number) for number in range(len(options.rates))]
        runs = []
        with system_of(options, settings) as system:
            for items, rate in zip(workloads, options.rates, strict=True):
                runs.append(one_run(system, options, items, rate))
                console.print(figures_table(runs[-1]))
                for line in notes(runs[-1]):
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
    return {"benchmark": "serving", **description(options, model_dir), **circumstances(nvidia_gpu_name()), "runs": runs}


def description(options: Options, model_dir: Path | None) -> dict[str, Any]:
    """What was asked of what, as a reader needs it to ask the same."""
    settings = {}
    if options.launch or options.in_process:
        inherited = {
            name: os.environ.get(ENVIRONMENT_PREFIX + name.upper()) for name in EngineConfig.__dataclass_fields__
        }
        given = {**inherited, **options.settings}
        settings = {name: value for name, value in given.items() if value and name not in MACHINE_SETTINGS}
    source = options.lengths or options.dataset
    name = source.stem if source else "{}x{}".format(*options.random or ())
    model = options.name or options.model or (model_dir.name if model_dir else MODEL_NAME)
    return {
        "model": model,
        "system": "engine" if options.in_process else "server",
        "settings": settings,
        "workload": f"{name}_after_{options.shared_prefix}" if options.shared_prefix else name,
        "is_dataset": options.dataset is not None,
        "prompts": options.prompts,
        "shared_prefix": options.shared_prefix,
        "max_tokens": options.max_tokens,
        "ignore_eos": options.ignore_eos,
        "seed": options.seed,
        "concurrency": options.concurrency,
        "protocol": None if options.in_process else options.protocol,
        "streaming": options.streaming,
    }


def result_path(result: dict[str, Any]) -> Path:
    """A name of its own for each thing that was asked of each system."""
    rates = [run["request_rate"] for run in result["runs"]]
    ways = {
        "sweep": len(rates) > 1,
        "text": result["prompts"] == "text",
        "unary": not result["streaming"],
        str(result["protocol"]): result["protocol"] in ("http", "openai"),
        f"concurrency_{result['concurrency']}": result["concurrency"] is not None,
        f"max_tokens_{result['max_tokens']}": result["max_tokens"] is not None,
        f"rate_{rates[0] or 0:g}": len(rates) == 1 and rates[0] is not None,
    }
    parts = [
        "serving",
        result["model"],
        result["system"],
        result["workload"],
        *(way for way, holds in ways.items() if holds),
    ]
    parts += [f"{name}_{value}" for name, value in sorted(result["settings"].items())]
    parts.append(result["machine"]["gpu"] or "cpu")
    return RESULTS / ("_".join(parts).replace(" ", "_").replace("/", "_").lower() + ".json")


def _settings(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise click.BadParameter(f"{wrong[0]!r} has no value; allowed: NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _rates(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[float, ...]:
    try:
        rates = tuple(float(rate) for rate in text.split(",")) if text else ()
    except ValueError:
        rates = (0.0,)
    if any(not rate > 0 for rate in rates):
        raise click.BadParameter(f"{text!r}; allowed: requests a second above 0, separated by commas")
    return rates


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
COUNT = click.IntRange(min=1)


@click.command(help=str(__doc__).partition("\n")[0], context_settings={"max_content_width": 120, "show_default": True})
@click.option("--lengths", type=FILE, help="CSV of prompt and output tokens")
@click.option("--dataset", type=FILE, help="ShareGPT's JSON, whole or cut short; LightLLM's own choice of it")
@click.option("--random", nargs=2, type=COUNT, metavar="INPUT OUTPUT", help="all prompts and outputs of these lengths")
@click.option("--num-prompts", type=COUNT, help=f"requests [default: all of --lengths, else {DEFAULT_PROMPTS}]")
@click.option("--prompts", type=click.Choice(["ids", "text"]), default="ids", help="what is sent, of the same length")
@click.option("--shared-prefix", type=click.IntRange(min=0), default=0, help="tokens in front that all prompts share")
@click.option("--max-tokens", type=COUNT, help="ask for this many instead of the wanted length")
@click.option("--ignore-eos/--no-ignore-eos", default=True, help="answers have exactly the length asked for")
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), help="model directory that text is made for")
@click.option("--vocab-size", type=click.IntRange(min=4), default=TOKENIZER_PIECES, help="ids are below this")
@click.option("--seed", type=int, default=0, help="of prompts and arrivals")
@click.option("--request-rate", type=click.FloatRange(0, min_open=True), default=math.inf, help="a second, Poisson")
@click.option("--sweep", callback=_rates, help="several request rates, one after the other: 1,2,4,8")
@click.option("--concurrency", type=COUNT, help="at most this many requests at once")
@click.option("--processes", type=COUNT, default=4, help="client processes")
@click.option("--protocol", type=click.Choice(list(DEFAULT_ADDRESSES)), default="grpc", help="openai: the front")
@click.option("--streaming/--no-streaming", default=True)
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=600.0, help="seconds for a request")
@click.option("--address", help="host:port of a server that runs [default: 127.0.0.1 and the protocol's port]")
@click.option("--metrics-address", default="127.0.0.1:8002", help="its metrics")
@click.option("--launch", is_flag=True, help="start a server, measure it, stop it")
@click.option("--in-process", is_flag=True, help="the engine alone, without a server")
@click.option("--model", help="what is started: a shape with random weights (perf/model_directory.py)")
@click.option("--set", "settings", multiple=True, callback=_settings, metavar="NAME=VALUE", help="an engine setting")
@click.option("--name", help="the model's name in the result")
@click.option("--out", type=click.Path(path_type=Path), help="the JSON file [default: in perf/results]")
@click.option("--plot", is_flag=True, help="plots beside the JSON file (needs matplotlib)")
def main(**given: Any) -> None:
    options = Options(**given)
    options.check()
    console = Console(width=120)
    try:
        result = benchmark(options, console)
    except RequestFailed as failure:
        sys.exit(f"failed: {failure}")
    except (ConfigError, EngineStartError, OSError, SystemFailed, TokenizerError, WorkloadError) as error:
        sys.exit(f"error: {error}")
    path = options.out or result_path(result)
    write_result(path, result)
    if options.plot:
        from perf.serving.plots import write_plots

        write_plots(path)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # when what it has started is stopped
    main()
