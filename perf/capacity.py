# SPDX-License-Identifier: Apache-2.0
"""What replicas behind a proxy carry, and what a million tokens costs.

    python -m perf.capacity --price 2.5
    python -m perf.capacity --simulate llama-7b --replicas 8 --rates 8,12,14,16,20
    python -m perf.capacity --validate

The first prints what the stored simulations cost at a price of a GPU for an hour. The second simulates: the real Router
in each replica (perf/simulated_engine.py), steps as long as they were measured (perf/step_times.py), chats of ShareGPT
(perf/chat_traffic.py), and a proxy that chooses the replica (perf/replica_choice.py). Its cases replace those of the
same name in perf/results/. The third compares the simulation of one engine with stored runs of the service benchmark.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any, NamedTuple

import click
import numpy as np
from tqdm import tqdm

from lightllm_backend.router.router import Router
from perf.admission import show
from perf.chat_traffic import MAX_TOKENS, PAUSE_SECONDS, chat_traffic
from perf.lengths import DATA, conversation_lengths
from perf.record import RESULTS, circumstances, write_result
from perf.replica_choice import POLICIES, ReplicaChoice
from perf.serving.workload import arrival_times
from perf.simulated_engine import EOS_ID, MakeRouter, Outcome, simulate_alone
from perf.simulated_replicas import Served, SimulatedReplicas
from perf.step_times import StepTimes

BATCH_MAX_TOKENS = 8192  # the default on a GPU
QUEUE_SIZE = 10_000  # the default
WARM_UP = 64, 64_000  # sequences and their tokens in a typical step
GRACE_SECONDS = 2.0  # after the requests that count: one without its first token by then counts as never answered
SUSTAINED = 0.95  # of the requests that come, at least so many must end in the same seconds


class Model(NamedTuple):
    """The model that is simulated: a result of static_inference, and the one with the time per byte of K and V."""

    result: str
    kv_from: str | None = None

    @property
    def steps(self) -> StepTimes:
        return StepTimes.stored(self.result, self.kv_from)


MODELS = {
    "llama-7b": Model("llama-7b_nvidia_h200"),
    "llama-7b fp8": Model("llama-7b_weights_fp8_nvidia_h200", kv_from="llama-7b_nvidia_h200"),
    "llama-3-8b": Model("llama-3-8b_nvidia_h200"),
    "qwen3-8b": Model("qwen3-8b_nvidia_h200", kv_from="llama-3-8b_nvidia_h200"),
    "llama-2-70b tp2": Model("llama-2-70b_tp2_nvidia_h200", kv_from="llama-3-8b_nvidia_h200"),
    "llama-2-70b tp2 fp8": Model("llama-2-70b_tp2_weights_fp8_nvidia_h200", kv_from="llama-3-8b_nvidia_h200"),
}
# Runs of the service benchmark with LLaMA-7B in 16 bits and their workloads.
MEASURED = {
    "serving_llama-7b_workload_120_nvidia_h200": "workload_120.csv",
    "serving_llama-7b_workload_2000_sweep_nvidia_h200": "workload_2000.csv",
    "serving_llama-7b_workload_2000_nvidia_h200": "workload_2000.csv",
    "serving_llama-7b_workload_2000_at_once_nvidia_h200": "workload_2000.csv",
}


def make_router(steps: StepTimes, num_rows: int) -> MakeRouter:
    eos_ids = frozenset({EOS_ID})
    return lambda clock: Router(steps.pool_tokens, num_rows, BATCH_MAX_TOKENS, QUEUE_SIZE, eos_ids, clock=clock)


class Case(NamedTuple):
    model: str
    replicas: int
    rate: float  # requests a second and replica
    policy: str
    seed: int = 0

    @property
    def warm_up(self) -> float:
        """Seconds until as many requests run as later: about those that the longest answers take."""
        return MAX_TOKENS * MODELS[self.model].steps.decode_seconds(*WARM_UP)

    @property
    def seconds(self) -> float:
        """How many count: fewer where more replicas make as many requests."""
        return max(8.0, 120 / self.replicas)


def simulate(case: Case) -> dict[str, Any]:
    steps = MODELS[case.model].steps
    num_rows = steps.most_running
    choose = ReplicaChoice(case.policy, case.replicas, case.seed)
    end = case.warm_up + case.seconds
    chats = chat_traffic(case.rate * case.replicas, end + GRACE_SECONDS, case.seed)
    gc.freeze()
    gc.disable()  # millions of objects, hardly a circle
    replicas = SimulatedReplicas(make_router(steps, num_rows), num_rows, case.replicas, choose, steps)
    replicas.fill(chats.before)
    served = replicas.run(chats.turns, until=end + GRACE_SECONDS)
    gc.enable()
    return row_of(case, served)


def row_of(case: Case, served: Sequence[Served]) -> dict[str, Any]:
    """What the proxy's clients see of the seconds that count."""
    begin, end = case.warm_up, case.warm_up + case.seconds
    arrived = [one for one in served if begin <= one.arrival < end]
    ended = [one for one in served if begin <= one.end < end]
    waits = np.array([one.first_token - one.arrival for one in arrived]) + server_seconds()
    first_p50, first_p99 = np.quantile(np.where(np.isnan(waits), np.inf, waits), (0.5, 0.99), method="lower").tolist()
    paces = [(one.end - one.first_token) / (one.turn.output - 1) for one in ended if one.turn.output > 1]
    prompts, loads = sum(one.turn.prompt for one in arrived), np.bincount([one.replica for one in arrived])
    return {
        "replicas": case.replicas,
        "policy": case.policy,
        "rate": case.rate,
        "requests": len(arrived),
        "arrivals_per_second": len(arrived) / case.seconds,
        "requests_per_second": len(ended) / case.seconds,
        "prompt_tokens_per_second": sum(one.turn.prompt for one in ended) / case.seconds,
        "output_tokens_per_second": sum(one.turn.output for one in ended) / case.seconds,
        "first_token_p50": first_p50 if math.isfinite(first_p50) else None,
        "first_token_p99": first_p99 if math.isfinite(first_p99) else None,
        "per_output_token_p50": float(np.median(paces)),
        "cached_share": sum(one.cached_tokens for one in arrived) / prompts,
        "busiest": float(loads.max() * case.replicas / len(arrived)),  # its requests by an even share
    }


def server_seconds() -> float:
    """How much later the first token comes through the server than from the engine alone, where both were asked so."""
    runs = [_stored(f"serving_llama-7b_workload_120{system}_nvidia_h200")["runs"][0] for system in ("", "_engine")]
    through, alone = (float(run["time_to_first_token"]["p50"]) for run in runs)
    return through - alone


def alone(steps: StepTimes, file: str, run: dict[str, Any], num_rows: int) -> Outcome:
    """One engine that is asked what the run of the service benchmark asked, at the same times."""
    lengths = conversation_lengths(DATA / file)[: run["requests"]]
    arrivals = arrival_times(len(lengths), run["request_rate"] or math.inf, seed=0)
    return simulate_alone(
        make_router(steps, num_rows), num_rows, lengths, arrivals, step_seconds=steps, plan_late=True
    )  # fmt: skip


def validate() -> list[dict[str, Any]]:
    """Simulated beside measured. The engine's own time alone is simulated, so a first token has the server's added."""
    steps, rows = MODELS["llama-7b"].steps, []
    for name, file in MEASURED.items():
        result = _stored(name)
        num_rows = int(result["settings"].get("running_max_req_size", 1000))
        for run in result["runs"]:
            outcome = alone(steps, file, run, num_rows)
            first = outcome.first_token_seconds + server_seconds()
            row = {"workload": result["workload"], "rate": run["request_rate"], "commit": result["commit"]}
            row |= _beside("requests_per_second", run["requests_per_second"], run["requests"] / outcome.seconds)
            for percentile in ("p50", "p99"):
                predicted = float(np.quantile(first, float(f"0.{percentile[1:]}")))
                row |= _beside(f"first_token_{percentile}", run["time_to_first_token"][percentile], predicted)
            row |= _beside("end_to_end_mean", run["end_to_end"]["mean"], float(outcome.end_seconds.mean()))
            rows.append(row)
    return rows


def _beside(name: str, measured: float, simulated: float) -> dict[str, float]:
    return {f"{name}_measured": measured, f"{name}_simulated": simulated, f"{name}_ratio": simulated / measured}


def cost(row: dict[str, Any], gpus: int, price: float) -> dict[str, float]:
    """Dollars for a million tokens: of answers alone, and of prompts and answers together."""
    dollars = price * gpus * row["replicas"] / 3600
    output, prompt = row["output_tokens_per_second"], row["prompt_tokens_per_second"]
    return {"per_million_output": 1e6 * dollars / output, "per_million": 1e6 * dollars / (output + prompt)}


def best(rows: Sequence[dict[str, Any]], first_token_seconds: float) -> list[dict[str, Any]]:
    """Return the rows with the most output tokens, one for each number of replicas and policy.

    The first token's p99 holds in them. Where fewer requests end than come, more and more run at once, so such a load
    cannot last.
    """
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        group = row["replicas"], POLICIES.index(row["policy"])
        if row["first_token_p99"] is not None and row["first_token_p99"] <= first_token_seconds and is_sustained(row):
            found[group] = max(row, found.get(group, row), key=lambda one: float(one["output_tokens_per_second"]))
    return [found[group] for group in sorted(found)]


def is_sustained(row: dict[str, Any]) -> bool:
    return float(row["requests_per_second"]) >= SUSTAINED * float(row["arrivals_per_second"])


def stored_validation() -> dict[str, Any]:
    return _stored("capacity_validation")


def stored_capacities() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("capacity_*_nvidia_h200.json"))]


class Capacities:
    """The result file of a model. A case replaces the one of the same name."""

    def __init__(self, model: str) -> None:
        self._path = RESULTS / f"capacity_{model.replace(' ', '_')}_nvidia_h200.json"
        self._model = model

    def add(self, row: dict[str, Any]) -> None:
        before = json.loads(self._path.read_text())["rows"] if self._path.exists() else []
        rows = {_name(one): one for one in (*before, row)}
        steps = MODELS[self._model].steps
        write_result(
            self._path,
            {
                "benchmark": "capacity", "model": self._model, "gpu": steps.result["machine"]["gpu"],
                "gpus": int(steps.result["settings"].get("LIGHTLLM_TP", 1)), "pool_tokens": steps.pool_tokens,
                "most_running": steps.most_running, "pause_seconds": PAUSE_SECONDS, "max_tokens": MAX_TOKENS,
                **circumstances(None), "rows": [rows[name] for name in sorted(rows)],
            },
        )  # fmt: skip


def _name(row: dict[str, Any]) -> tuple[int, float, int]:
    return row["replicas"], row["rate"], POLICIES.index(row["policy"])


def _stored(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


class Numbers(click.ParamType):
    """Positive numbers separated by commas."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        try:
            numbers = [self._kind(item) for item in str(value).split(",")]
        except ValueError:
            numbers = []
        if not numbers or not all(0 < number < math.inf for number in numbers):
            whole = "whole " if self._kind is int else ""
            self.fail(f"{value!r}; allowed: {whole}numbers > 0, separated by commas", param, ctx)
        return numbers


def show_costs(price: float, first_token_seconds: float) -> None:
    rows = []
    for result in stored_capacities():
        for row in best(result["rows"], first_token_seconds):
            load = {name: row[name] for name in ("replicas", "policy", "rate", "requests_per_second")}
            load |= {name: row[name] for name in ("output_tokens_per_second", "first_token_p99", "cached_share")}
            rows.append({"model": result["model"], **load, **cost(row, result["gpus"], price)})
    if not rows:
        raise click.UsageError(f"--first_token is {first_token_seconds:g}; no stored simulation keeps that limit")
    show(f"dollars for a million tokens, at {price:g} dollars a GPU and hour", rows)


@click.command(help=str(__doc__).partition("\n")[0])
@click.option("--price", default=2.5, show_default=True, type=click.FloatRange(min=0), help="dollars a GPU and hour")
@click.option(
    "--first_token", default=0.5, show_default=True, type=click.FloatRange(min=0), help="most seconds until it, p99"
)
@click.option("--simulate", "model", type=click.Choice(list(MODELS)), help="simulate this model instead")
@click.option("--replicas", default="8", show_default=True, type=Numbers(int), help="how many, separated by commas")
@click.option(
    "--rates", default="16", show_default=True, type=Numbers(float), help="requests a second and replica, by commas"
)
@click.option("--policies", default=",".join(POLICIES), show_default=True, help="of the proxy, separated by commas")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(min=1), help="that simulate")
@click.option("--validate", "is_validation", is_flag=True, help="compare with measured runs instead")
def main(
    price: float,
    first_token: float,
    model: str | None,
    replicas: list[int],
    rates: list[float],
    policies: str,
    processes: int,
    is_validation: bool,
) -> None:
    if is_validation:
        result = {"benchmark": "capacity_validation", **circumstances(None), "rows": validate()}
        write_result(RESULTS / "capacity_validation.json", result)
    elif model:
        chosen = policies.split(",")
        if unknown := set(chosen) - set(POLICIES):
            raise click.UsageError(f"--policies has {', '.join(sorted(unknown))}; allowed: {', '.join(POLICIES)}")
        cases = [Case(model, *one) for one in product(replicas, rates, chosen)]
        capacities = Capacities(model)
        with ProcessPoolExecutor(processes) as pool:
            for row in tqdm(pool.map(simulate, cases), total=len(cases), unit="case"):
                capacities.add(row)
    else:
        show_costs(price, first_token)


if __name__ == "__main__":
    main()
