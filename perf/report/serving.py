# SPDX-License-Identifier: Apache-2.0
"""The report's section on the service benchmark, and what its results say beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from perf import peer
from perf.record import RESULTS
from perf.report.markdown import Result, cell, origin, section, table

# What LightLLM published: LLaMA-7B on an A800, 2,000 ShareGPT prompts.
PUBLISHED = [
    {"who": "LightLLM on an A800, published", "asked": "200", "took": "188.85", "requests_per_second": 10.59},
    {"who": "vLLM 0.1.2 on an A800, published", "asked": "200", "took": "361.79", "requests_per_second": 5.53},
]
SERVERS = {"http": "tritonserver, http", "grpc": "tritonserver, grpc", "openai": "front, OpenAI's API"}
LATENCIES = ("time_to_first_token", "time_per_output_token", "inter_token", "delivery_lag")


def serving(result: Result) -> list[str]:
    columns = [
        ("", "{who}"),
        ("asked requests/s", "{asked}"),
        ("s", "{took}"),
        ("requests/s", "{requests_per_second:.2f}", "–"),
        ("output tokens/s", "{output_tokens_per_second:,.0f}", "–"),
        ("first token p50, ms", "{time_to_first_token_p50:,.1f}", "–"),
        ("p99", "{time_to_first_token_p99:,.1f}", "–"),
        ("per output token p50, ms", "{time_per_output_token_p50:,.1f}", "–"),
        ("p99", "{time_per_output_token_p99:,.1f}", "–"),
        ("between responses p50, ms", "{inter_token_p50:,.1f}", "–"),
        ("p99", "{inter_token_p99:,.1f}", "–"),
        ("tokens a response", "{tokens_per_response:.2f}", "–"),
        ("behind the engine p99, ms", "{delivery_lag_p99:.0f}", "–"),
        ("KV pool in use", "{pool_share_while_queued:.1%}", "–"),
    ]
    rows = [*(_row(result, run) for run in result["runs"]), *_others(result)]
    prompts = "text" if result["prompts"] == "text" else "token ids"
    parts = [result["model"], *(f"{name} {value}" for name, value in sorted(result["settings"].items()))]
    title = f"{', '.join(parts)}: {result['workload']} as {prompts}"
    plots = [f"![{plot.stem}](results/{plot.name})" for plot in sorted(RESULTS.glob(f"{result['stem']}.*.png"))]
    return section(title, origin(result), table(columns, rows), plots)


def _row(result: Result, run: Result) -> Result:
    """A run with who was measured, what was asked, and its latencies in milliseconds."""
    if result["system"] != "server":
        who = "engine alone"
    else:
        protocol = str(result.get("protocol"))
        who = protocol if "peer" in result else SERVERS.get(protocol, "")
    if "peer" in result:
        who = f"{peer.name_of(result)}, {who}"
    if run.get("clients", {}).get("were_the_limit"):
        who += " (its clients were the limit)"
    asked = f"{run['request_rate']:g}" if run["request_rate"] else "all at once"
    latencies = {f"{key}_{name}": 1e3 * seconds for key in LATENCIES for name, seconds in (run.get(key) or {}).items()}
    return run | latencies | {"who": who, "asked": asked, "took": cell(run, "{seconds:.1f}", "–")}


def _others(result: Result) -> list[Result]:
    """Rows of others' systems that were asked the same."""
    rates = [run["request_rate"] for run in result["runs"]]
    if result["is_dataset"]:
        is_its_setup = result["model"] == "llama-7b" and result["system"] == "server" and 200 in rates
        return PUBLISHED if is_its_setup else []
    peers = peer.serving_peers(result)
    rows = [_row(one, run) for one in peers for run in one["runs"] if run["request_rate"] in rates]
    if "kv_dtype" in result["settings"]:
        rows = [row | {"who": f"{row['who']}, K and V in 16 bits"} for row in rows]
    return rows


def server_share(results: Sequence[Result]) -> list[str]:
    """What tritonserver takes of the engine's throughput, where both were asked the same at the same commit, so on the
    same day (one GPU is a few percent faster than another of its name), and for far more than they can do."""
    servers, engines = ([one for one in results if one["system"] == system] for system in ("server", "engine"))
    lines = []
    for result, run, engine in _pairs(servers, engines):
        if run["requests_per_second"] < (run["request_rate"] or math.inf) / 2:
            lost = 1 - run["output_tokens_per_second"] / engine["output_tokens_per_second"]
            what = f"{result['model']}, {result['workload']} as {result['prompts']}"
            lines += [f"Of the engine's throughput tritonserver takes {100 * lost:.1f} % ({what}).", ""]
    return lines


def front_share(results: Sequence[Result]) -> list[str]:
    """What the front makes of the same load over gRPC, where all but its processes was alike."""
    fronts, direct = ([one for one in results if one["protocol"] == protocol] for protocol in ("openai", "grpc"))
    lines = []
    for result, run, other in _pairs(fronts, direct, "system", "prompts", "streaming", but=["front_processes"]):
        figures = [f"{run['requests_per_second'] / other['requests_per_second']:.1%} of the requests/s"]
        if run.get("time_to_first_token") and run.get("time_per_output_token"):
            later = run["time_to_first_token"]["p50"] - other["time_to_first_token"]["p50"]
            ratio = run["time_per_output_token"]["p99"] / other["time_per_output_token"]["p99"]
            figures += [f"first token p50 {1e3 * later:+.1f} ms", f"per output token p99 × {ratio:.2f}"]
        processes = result["settings"].get("front_processes", "1")
        way = f"Through the front in {processes} process{'es' if processes != '1' else ''} instead of gRPC"
        lines += [f"{way}: {', '.join(figures)} ({_load(result, run)}).", ""]
    return lines


def weights_gain(results: Sequence[Result]) -> list[str]:
    """What quantised weights make of the service's throughput, where all else was alike, commit and GPU included."""
    types = ["weight_dtype", "head_dtype"]
    quantised = [one for one in results if "weight_dtype" in one["settings"]]
    plain = [one for one in results if "weight_dtype" not in one["settings"]]
    lines = []
    for result, run, other in _pairs(quantised, plain, "system", "protocol", "prompts", but=types):
        gain = run["requests_per_second"] / other["requests_per_second"]
        settings = ", ".join(f"{name} {value}" for name, value in sorted(result["settings"].items()))
        lines += [f"{gain:.2f} times the requests/s of unquantised weights: {settings} ({_load(result, run)}).", ""]
    return lines


def _load(result: Result, run: Result) -> str:
    return f"{result['model']}, {result['workload']} at {run['request_rate'] or math.inf:g}/s"


def _pairs(
    results: Sequence[Result], others: Sequence[Result], *more: str, but: Sequence[str] = ()
) -> Iterator[tuple[Result, Result, Result]]:
    """Each run (the second) of a result (the first) beside the run of another that was asked the same.

    more: keys in which both have to agree as well. but: settings in which they may differ.
    """
    common = ("commit", "machine", "model", "workload", "shared_prefix", "max_tokens", "seed", "concurrency", *more)

    def asked(result: Result, run: Result) -> tuple[Any, ...]:
        settings = {name: value for name, value in result["settings"].items() if name not in but}
        return (*(str(result[name]) for name in common), str(sorted(settings.items())), run["request_rate"])

    runs = {asked(other, run): run for other in others for run in other["runs"]}
    for result in results:
        for run in result["runs"]:
            if other := runs.get(asked(result, run)):
                yield result, run, other
