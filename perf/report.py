# SPDX-License-Identifier: Apache-2.0
"""Writes perf/RESULTS.md from the results that are stored in perf/results/: `python -m perf.report`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from perf import peer
from perf.record import RESULTS, types_of

PAGE = Path(__file__).with_name("RESULTS.md")
INTRODUCTION = """\
<!-- SPDX-License-Identifier: Apache-2.0 -->
<!-- Written by `python -m perf.report` from perf/results/*.json. Do not edit. -->
# Results

[README.md](README.md) says how to measure these figures again and how to read each column.

"""

# What LightLLM published: LLaMA-7B on an A800, 2,000 ShareGPT prompts.
PUBLISHED_SERVING = [
    ["LightLLM on an A800, published", "200", "188.85", "10.59"],
    ["vLLM 0.1.2 on an A800, published", "200", "361.79", "5.53"],
]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", f"|{' --: |' * len(headings)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def origin(result: dict[str, Any]) -> str:
    versions = result["versions"]
    machine = result["machine"]["gpu"] or f"{result['machine']['cpu']}, {result['machine']['cores']} cores"
    parts = [machine, *(f"{name} {versions[name]}" for name in ("torch", "triton") if versions[name])]
    return f"{', '.join(parts)}, commit {result['commit']}, {result['date'][:10]}"


def static_inference(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    other = peer.static_peer(result)
    peer_name = peer.name_of(other) if other else ""
    layouts = {
        "prefill tokens/s": ("prefill_tokens_per_second", "{:,.0f}"),
        f"{peer_name}, tokens/s": ("peer_prefill_tokens_per_second", "{:,.0f}"),
        "of unquantised tokens/s": ("prefill_ratio", "{:.2f}"),
        "TFLOP/s": ("tflops", "{:.0f}"),
        "of the peak": ("prefill_share", "{:.2f}"),
        "ms a step": ("step_ms", "{:.2f}"),
        "of the unquantised step": ("step_ratio", "{:.2f}"),
        "on the GPU, ms": ("device_step_ms", "{:.2f}"),
        f"{peer_name}, ms": ("peer_step_ms", "{:.2f}"),
        "floor ms": ("floor_ms", "{:.2f}"),
        "floor / step": ("share", "{:.2f}"),
        "tokens/s": ("decode_tokens_per_second", "{:,.0f}"),
    }
    rows = []
    for row in result["rows"]:
        shown = {**row, **peer.beside(other, row)}
        if "prefill_flops_per_second" in row:
            shown["tflops"] = row["prefill_flops_per_second"] / 1e12
        prompt = f"{row['prompt_tokens'] / row['batch']:,.0f}{' (mean)' if row['mixed'] else ''}"
        cells = [layout.format(shown[key]) if key in shown else "–" for key, layout in layouts.values()]
        rows.append([str(row["batch"]), prompt, str(row["output_len"]), *cells])
    headings = ["batch", "prompt", "output", *layouts]
    told = [column for column in range(len(headings)) if any(row[column] != "–" for row in rows)]
    ranks = settings.get("LIGHTLLM_TP", "1")
    title = ", ".join([result["model"], result["engine"]["dtype"], *types_of(settings), f"tp {ranks}"])
    started = "" if result["start_seconds"] is None else f"; started in {result['start_seconds']:.1f} s"
    return [
        f"**{title}**{started} ({origin(result)}):",
        "",
        *table([headings[column] for column in told], [[row[column] for column in told] for row in rows]),
    ]


def step_profile(result: dict[str, Any]) -> list[str]:
    columns = {
        "wall": "wall_ms", "recorded": "span_ms", "GPU busy": "busy_ms", "planning": "next_batch_ms",
        "launching": "launch_ms", "waiting": "wait_ms", "taking the result": "apply_ms",
    }  # fmt: skip
    rows = result["rows"]
    batches = [f"{row['batch']}{' (mixed)' if row['mixed'] else ''}" for row in rows]
    times = [
        [
            batch,
            *(f"{row[key]:.2f}" if key in row else "–" for key in columns.values()),
            f"{row['idle_share']:.1%}" if "idle_share" in row else "–",
        ]
        for batch, row in zip(batches, rows, strict=True)
    ]
    spent = [{kernel["name"]: kernel["ms"] for kernel in row.get("kernels", [])} for row in rows]
    names = sorted(
        {name for kernels in spent for name in kernels}, key=lambda name: -max(k.get(name, 0) for k in spent)
    )
    kernels = [[f"`{name[:60]}`", *(f"{k[name]:.3f}" if name in k else "–" for k in spent)] for name in names[:12]]
    types = ", ".join([result["dtype"], *types_of(result["settings"])])
    title = f"{result['phase'].capitalize()} steps of {result['model']}, {types}, ms"
    return [
        f"**{title}** ({origin(result)}):",
        "",
        *table(["batch", *columns, "GPU idle"], times),
        *(["", *table(["on the GPU, ms a step at batch", *batches], kernels)] if kernels else []),
    ]


def rank_step(result: dict[str, Any]) -> list[str]:
    layers, tp = result["layers"], result["tp"]
    lines = []
    for row in result["rows"]:
        one, ranks = row["one"]["parts"], row["ranks"]["parts"]
        cells = [
            [
                name,
                *(f"{value:.1f}" for value in (one[name], one[name] / tp, ranks[name], ranks[name] - one[name] / tp)),
            ]
            for name in one
        ]
        cells.sort(key=lambda cell: -float(cell[-1]))
        step = [row["one"]["step_ms"], row["one"]["step_ms"] / tp, row["ranks"]["step_ms"]]
        cells.append(["the step, ms", *(f"{value:.3f}" for value in (*step, step[2] - step[1]))])
        headings = [f"batch {row['batch']}", "one GPU", f"1/{tp} of it", f"{tp} GPUs", "beyond"]
        lines += ["", *table(headings, cells)]
    types = ", ".join([result["dtype"], *([] if result["weight_dtype"] == "auto" else [result["weight_dtype"]])])
    title = f"Decode steps of {layers} layers of {result['model']}, {types}, µs a layer, of the rest µs a step"
    return [f"**{title}** ({origin(result)}):", *lines]


def power_limit(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"{row['batch']}",
            f"{row['rested_ms']:.2f}",
            f"{row['sustained_ms']:.2f}",
            f"{row['watts']:.0f}",
            f"{row['megahertz']:,.0f}",
            f"{row['joules']:.2f}",
        ]
        for row in result["rows"]
    ]
    limit = f"limit {result['rows'][0]['limit_watts']:.0f} W"
    title = f"**Decode steps of {result['model']} without an engine, {result['context']} tokens of context, {limit}**"
    headings = ["batch", "ms after a rest", "ms for seconds on end", "W", "clock, MHz", "J a step"]
    return [f"{title} ({origin(result)}):", "", *table(headings, rows)]


def kernels(result: dict[str, Any]) -> list[str]:
    rows = []
    for row in result["rows"]:
        name = f"{row['kernel']}: {row['case']}"
        if row.get("is_wrong"):
            rows.append([name, "wrong", "", "", "", ""])
            continue
        tera = f"{row['operations_per_second'] / 1e12:.0f}" if row["operations"] else "–"
        others = ", ".join(f"{name} {us:.1f}" for name, us in row["torch_us"].items())
        gigabytes = f"{row['bytes_per_second'] / 1e9:,.0f}"
        rows.append([name, f"{row['us']:.1f}", gigabytes, tera, f"{row['share']:.2f}", others or "–"])
    limits = result["limits"]
    reached = (
        f"{limits['read_bytes_per_second'] / 1e9:,.0f} GB/s read, {limits['bf16_flops_per_second'] / 1e12:.0f} TFLOP/s"
    )
    return [
        f"<details><summary>Kernels, beside {reached} ({origin(result)})</summary>",
        "",
        *table(["kernel", "µs", "GB/s", "TFLOP/s", "of the limit", "PyTorch, µs"], rows),
        "",
        "</details>",
    ]


def all_reduce(result: dict[str, Any]) -> list[str]:
    names = [name for name in result["rows"][0] if name != "bytes"]
    rows = [[f"{row['bytes'] >> 10}", *(f"{row[name]:.1f}" for name in names)] for row in result["rows"]]
    title = f"**All-reduce of bf16 between {result['ranks']} GPUs, µs** ({origin(result)}):"
    return [title, "", *table(["KB", *(name.replace("_", " ") for name in names)], rows)]


def load_time(result: dict[str, Any]) -> list[str]:
    size = f"{result['checkpoint_bytes'] / 1e9:.1f} GB"
    rows = [[size, f"{row['seconds']:.1f}", f"{row['host_peak_bytes'] / 2**30:.2f}"] for row in result["rows"]]
    title = f"**Weights of {result['model']} from safetensors in the page cache** ({origin(result)}):"
    return [title, "", *table(["checkpoint", "seconds", "host memory beyond the page cache, GiB"], rows)]


def cpu_speed(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"{row['batch']}",
            f"{row['engine_tokens_per_second']:.1f}",
            f"{row['transformers_tokens_per_second']:.1f}",
            f"{row['ratio']:.2f}",
        ]
        for row in result["rows"]
    ]
    title = f"**SmolLM2-135M on a CPU, {result['dtype']}, tokens/s** ({origin(result)}):"
    return [title, "", *table(["batch", "engine", "transformers", "ratio"], rows)]


def cpu_peer(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["work"],
            f"{row['engine_tokens_per_second']:.1f}",
            f"{row['llama_cpp_tokens_per_second']:.1f}",
            f"{row['ratio']:.2f}",
            f"{max(row['engine_rounds']):.1f}",
            f"{max(row['llama_cpp_rounds']):.1f}",
            f"{row['ratio_of_best']:.2f}",
        ]
        for row in result["rows"]
    ]
    load = " to ".join(f"{result['load_average'][when][0]:.1f}" for when in ("before", "after"))
    title = (
        f"**{result['model']} on a CPU beside llama.cpp ({result['peer_package']}), {result['dtype']}, "
        f"{result['threads']} threads, tokens/s** ({origin(result)}; load average {load}, of which the runs make some):"
    )
    headings = ["work", "engine", "llama.cpp", "ratio", "engine's best round", "llama.cpp's", "ratio"]
    return [title, "", *table(headings, rows)]


def router_time(result: dict[str, Any]) -> list[str]:
    times = ("router_ms_p50", "router_ms_p99", "server_ms_p50", "server_ms_p99")
    rows = [
        [row["admission"], f"{row['running']:,.0f}", f"{row['queued']:,}", *(f"{row[name]:.3f}" for name in times)]
        for row in result["rows"]
    ]
    headings = ["admission", "running", "queued", "Router, ms, p50", "p99", "EngineServer, ms, p50", "p99"]
    return [f"**Host time a step** ({origin(result)}):", "", *table(headings, rows)]


def admission(result: dict[str, Any]) -> list[str]:
    at_once = [
        [
            f"{row['pool_tokens']:,}",
            f"{row['steps']:,}",
            f"{row['running']:,.0f}",
            f"{row['share_by_step']:.1%}",
            f"{row['share_by_time']:.1%}",
        ]
        for row in result["at_once"]
    ]
    served = [
        [
            f"{row['pool_tokens']:,}", row["policy"], f"{row['share_by_time']:.0%}", f"{row['running']:,.0f}",
            f"{row['requests_per_second']:.1f}", f"{row['output_tokens_per_second']:,.0f}",
            f"{row['ttft_p50']:.1f}", f"{row['ttft_p90']:.1f}", f"{row['preemptions']:,}", f"{row['prompt_tokens']:,}",
        ]
        for row in result["served"]
    ]  # fmt: skip
    asked_for = f"{result['asked_for']:,} tokens asked for, ended at the true length"
    return [
        f"**Simulated: {result['workload']} at once, lengths known, until the queue is empty** ({origin(result)}):",
        "",
        *table(["token slots", "steps", "running", "slots with a live token, by step", "by time"], at_once),
        "",
        f"**Simulated: {result['workload']} at {result['request_rate']:g} requests/s, {asked_for}**:",
        "",
        *table(
            [
                "token slots", "admission", "pool use", "running", "requests/s", "output tokens/s",
                "TTFT p50, s", "p90", "preemptions", "prompt tokens computed",
            ],
            served,
        ),
    ]  # fmt: skip


def window_slots(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["model"],
            "yes" if row["gives_back"] else "no",
            f"{row['groups']} of {row['layers_per_slot']} layers",
            *(f"{row[name] / (1 << 30):.2f}" for name in ("most_bytes", "last_bytes")),
            f"{row['at_once']:,}",
        ]
        for row in result["rows"]
    ]
    lengths = f"{result['prompt']:,} + {result['output']:,} tokens"
    headings = ["model", "gives back", "groups", "most, GiB", "at its end, GiB", f"at once in {result['pool_gib']} GiB"]
    return [f"**K and V of a sequence of {lengths}, simulated** ({origin(result)}):", "", *table(headings, rows)]


def fairness(result: dict[str, Any]) -> list[str]:
    times = ("first_p50_s", "first_p99_s", "p50_s", "p99_s")
    rows = [
        [
            row["flood"], row["case"], f"{row['step_ms']:.1f}", *(f"{row[name]:.2f}" for name in times),
            f"{row['steps_p50']:.0f}", f"{row['steps_p99']:.0f}", f"{row['output_tokens_per_second']:,.0f}",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    first = result["rows"][0]
    alone = f"alone: first token after {first['alone_first_s']:.3f} s, end after {first['alone_s']:.2f} s and "
    alone += f"{first['alone_steps']} steps"
    headings = [
        "flood of", "case", "step, ms", "first token, s, p50", "p99", "end, s, p50", "p99", "steps, p50", "p99",
        "output tokens/s, all",
    ]  # fmt: skip
    title = f"**Simulated: {result['singles']} single requests, one after another, beside a flood** ({origin(result)};"
    return [f"{title} {alone}):", "", *table(headings, rows)]


def prefix_cache(result: dict[str, Any]) -> list[str]:
    rows = [
        ["yes" if row["prefix_cache"] else "no", *(f"{row[name]:.1f}" for name in ("first_ms", "next_ms", "burst_ms"))]
        for row in result["rows"]
    ]
    title = f"**{result['model']}: {result['shared']:,} shared prompt tokens and {result['own']} of its own"
    headings = ["prefix cache", "TTFT of the first, ms", "of the next, ms", f"{result['burst']} at once, all, ms"]
    return [f"{title}** ({origin(result)}):", "", *table(headings, rows)]


def long_context(result: dict[str, Any]) -> list[str]:
    parts = list(result["rows"][0]["memory"])
    batches = [step["batch"] for step in result["rows"][0]["steps"]]
    rows = []
    for row in result["rows"]:
        memory = [f"{row['memory'][part] / 2**30:.2f}" for part in parts]
        long = row.get("long") or {}
        figures = [f"{long['prefill_seconds']:.2f}", f"{long['step_ms']:.2f}"] if long else ["–", "–"]
        steps = [f"{step['step_ms']:.3f}" for step in row["steps"]]
        figures += [f"{row['start_seconds']:.1f}", *memory, f"{row['pool_tokens']:,}", *steps]
        rows.append([f"{row['max_total']:,}", *figures])
    headings = ["tokens in all", f"prefill of {result['prompt']:,} tokens, s", "step there, ms", "start, s"]
    headings += [f"{part}, GiB" for part in parts] + ["KV tokens"]
    headings += [f"step of {batch}, ms" for batch in batches]
    return [f"**{result['model']}: long requests** ({origin(result)}):", "", *table(headings, rows)]


def serving(result: dict[str, Any]) -> list[str]:
    headings = ["", "asked requests/s", "s", "requests/s", "output tokens/s", "first token p50, ms", "p99"]
    headings += ["per output token p50, ms", "p99", "between responses p50, ms", "p99", "tokens a response"]
    headings += ["behind the engine p99, ms", "KV pool in use"]
    rows = [_serving_row(result, run) for run in result["runs"]]
    rows += [[*row, *["–"] * (len(headings) - len(row))] for row in _others(result)]
    prompts = "text" if result["prompts"] == "text" else "token ids"
    parts = [result["model"], *(f"{name} {value}" for name, value in sorted(result["settings"].items()))]
    title = f"**{', '.join(parts)}: {result['workload']} as {prompts}** ({origin(result)}):"
    plots = [f"![{plot.stem}](results/{plot.name})" for plot in sorted(RESULTS.glob(f"{result['stem']}.*.png"))]
    return [title, "", *table(headings, rows), *([""] if plots else []), *plots]


def _serving_row(result: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """The cells of a run; "–" for what its result does not tell."""
    name = f"{peer.name_of(result)}, " if "peer" in result else ""
    servers = {"http": "tritonserver, http", "grpc": "tritonserver, grpc", "openai": "front, OpenAI's API"}
    protocol = str(result.get("protocol"))
    server = protocol if name else servers.get(protocol, "")
    who = name + (server if result["system"] == "server" else "engine alone")
    if run.get("clients", {}).get("were_the_limit"):
        who += " (its clients were the limit)"
    layouts = {
        "seconds": "{:.1f}", "requests_per_second": "{:.2f}", "output_tokens_per_second": "{:,.0f}",
        "tokens_per_response": "{:.2f}", "pool_share_while_queued": "{:.1%}",
    }  # fmt: skip
    told = {key: layout.format(run[key]) if run.get(key) else "–" for key, layout in layouts.items()}

    def milliseconds(key: str, percentile: str, layout: str = "{:,.1f}") -> str:
        seconds = (run.get(key) or {}).get(percentile)
        return "–" if seconds is None else layout.format(1e3 * seconds)

    rate = f"{run['request_rate']:g}" if run["request_rate"] else "all at once"
    throughput = [told[key] for key in ("seconds", "requests_per_second", "output_tokens_per_second")]
    latencies = [
        milliseconds(key, percentile)
        for key in ("time_to_first_token", "time_per_output_token", "inter_token")
        for percentile in ("p50", "p99")
    ]
    lag = milliseconds("delivery_lag", "p99", "{:.0f}")
    return [who, rate, *throughput, *latencies, told["tokens_per_response"], lag, told["pool_share_while_queued"]]


def _others(result: dict[str, Any]) -> list[list[str]]:
    """Rows of others' systems that were asked the same."""
    rates = [run["request_rate"] for run in result["runs"]]
    if result["is_dataset"]:
        is_its_setup = result["model"] == "llama-7b" and result["system"] == "server" and 200 in rates
        return PUBLISHED_SERVING if is_its_setup else []
    peers = peer.serving_peers(result)
    rows = [_serving_row(one, run) for one in peers for run in one["runs"] if run["request_rate"] in rates]
    if "kv_dtype" in result["settings"]:
        rows = [[f"{name}, K and V in 16 bits", *cells] for name, *cells in rows]
    return rows


# What two results that are compared have in common.
ASKED = ("commit", "machine", "model", "workload", "shared_prefix", "max_tokens", "seed", "concurrency")


def server_share(results: Sequence[dict[str, Any]]) -> list[str]:
    """What tritonserver takes of the engine's throughput, where both were asked the same at the same commit, so on the
    same day (one GPU is a few percent faster than another of its name), and for far more than they can do."""

    def asked(result: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(str(result[name]) for name in (*ASKED, "settings"))

    engines = [result for result in results if result["system"] == "engine"]
    alone = {(asked(result), run["request_rate"]): run for result in engines for run in result["runs"]}
    lines = []
    for result in (one for one in results if one["system"] == "server"):
        for run in result["runs"]:
            is_saturated = run["requests_per_second"] < (run["request_rate"] or math.inf) / 2
            if is_saturated and (engine := alone.get((asked(result), run["request_rate"]))):
                lost = 1 - run["output_tokens_per_second"] / engine["output_tokens_per_second"]
                what = f"{result['model']}, {result['workload']} as {result['prompts']}"
                lines += [f"Of the engine's throughput tritonserver takes {100 * lost:.1f} % ({what}).", ""]
    return lines


def front_share(results: Sequence[dict[str, Any]]) -> list[str]:
    """What the front makes of the same load over gRPC, where all but its processes was alike."""

    def asked(result: dict[str, Any]) -> tuple[Any, ...]:
        rest = {name: value for name, value in result["settings"].items() if name != "front_processes"}
        return (*(str(result[name]) for name in (*ASKED, "system", "prompts", "streaming")), str(sorted(rest.items())))

    direct = {
        (asked(result), run["request_rate"]): run
        for result in results
        if result["protocol"] == "grpc"
        for run in result["runs"]
    }
    lines = []
    for result in (one for one in results if one["protocol"] == "openai"):
        for run in result["runs"]:
            if other := direct.get((asked(result), run["request_rate"])):
                share = run["requests_per_second"] / other["requests_per_second"]
                figures = [f"{share:.1%} of the requests/s"]
                if run.get("time_to_first_token") and run.get("time_per_output_token"):
                    later = run["time_to_first_token"]["p50"] - other["time_to_first_token"]["p50"]
                    ratio = run["time_per_output_token"]["p99"] / other["time_per_output_token"]["p99"]
                    figures.append(f"first token p50 {1e3 * later:+.1f} ms")
                    figures.append(f"per output token p99 × {ratio:.2f}")
                processes = result["settings"].get("front_processes", "1")
                what = f"{result['model']}, {result['workload']} at {run['request_rate'] or math.inf:g}/s"
                way = f"Through the front in {processes} process{'es' if processes != '1' else ''} instead of gRPC"
                lines += [f"{way}: {', '.join(figures)} ({what}).", ""]
    return lines


def weights_gain(results: Sequence[dict[str, Any]]) -> list[str]:
    """What quantised weights make of the service's throughput, where all else was alike, commit and GPU included."""

    def asked(result: dict[str, Any]) -> tuple[Any, ...]:
        rest = {name: value for name, value in result["settings"].items() if name not in ("weight_dtype", "head_dtype")}
        return (*(str(result[name]) for name in (*ASKED, "system", "protocol", "prompts")), str(sorted(rest.items())))

    plain = {
        (asked(result), run["request_rate"]): run
        for result in results
        if "weight_dtype" not in result["settings"]
        for run in result["runs"]
    }
    lines = []
    for result in (one for one in results if "weight_dtype" in one["settings"]):
        for run in result["runs"]:
            if other := plain.get((asked(result), run["request_rate"])):
                gain = run["requests_per_second"] / other["requests_per_second"]
                what = f"{result['model']}, {result['workload']} at {run['request_rate'] or math.inf:g}/s"
                settings = ", ".join(f"{name} {value}" for name, value in sorted(result["settings"].items()))
                lines += [f"{gain:.2f} times the requests/s of unquantised weights: {settings} ({what}).", ""]
    return lines


def overload(result: dict[str, Any]) -> list[str]:
    outcomes, refused = result["outcomes"], result["refused_seconds"]
    before, during = result["gap_before"], result["gap_while_refusing"]
    title = f"**{result['requests']:,} requests at once over {result['protocol']}, an engine that tells the time**"
    figures = [f"{outcomes.get(name, 0):,}" for name in ("done", "refused")]
    figures += [f"{refused[name]:.2f}" for name in ("p50", "p99", "max")]
    waiting = result.get("gap_while_waiting")
    figures += [f"{1e3 * gap['p99']:.1f}" if gap else "–" for gap in (before, during, waiting)]
    figures += [f"{during['max']:.2f}"]
    headings = ["done", "refused", "refused after, s, p50", "p99", "longest", "between responses before, ms, p99"]
    headings += ["while refusing, ms, p99", "while others wait, ms, p99", "longest pause, s"]
    lines = [f"{title} ({origin(result)}):", "", *table(headings, [figures])]
    if grown := result.get("grown_mb"):
        sizes = ", ".join(f"{role} {size:+.1f}" for role, size in sorted(grown.items()))
        lines += ["", f"What the flood adds to each process, MB: {sizes}."]
    bare = result.get("model_that_only_refuses", {})
    if least := bare.get("refused_seconds"):
        lines += ["", f"A model that only refuses: {least['p50']:.2f} s (p50), {least['max']:.2f} s (longest)."]
    if gap := bare.get("gap_while_refusing"):
        lines[-1] += (
            f" Streams of another model beside it: {1e3 * bare['gap_before']['p99']:.1f} → {1e3 * gap['p99']:.1f} ms"
            f" between responses (p99), the longest pause {gap['max']:.2f} s."
        )
    return lines


def slow_readers(result: dict[str, Any]) -> list[str]:
    beside, nothing = result["pace"], "beside clients that read nothing"
    title = (
        f"**{result['readers']} streams of clients that read nothing, beside {result['neighbours']} of others, "
        f"{result['seconds']:g} s each** ({origin(result)}):"
    )
    rows = [
        [name, f"{100 * share['median']:.1f}", f"{100 * share['least']:.1f}", f"{result['p99_gap_ms'][name]:.0f}"]
        for name, share in beside.items()
    ]
    headings = ["the neighbours", "% of their pace alone, median", "least", "between responses, ms, p99"]
    growth = ", ".join(f"{role} {megabytes:+.1f}" for role, megabytes in sorted(result["growth_mb"].items()))
    alone = f"Alone: {result['p99_gap_ms']['alone']:.0f} ms between responses (p99)."
    return [
        title,
        "",
        *table(headings, rows),
        "",
        f"{alone} What a phase {nothing} adds to each process, MB: {growth}.",
    ]


def body_memory(result: dict[str, Any]) -> list[str]:
    title = f"**What Triton server takes while it reads the body of an HTTP request** ({origin(result)}):"
    rows = [[str(row["mebibytes"]), f"{row['peak_mebibytes']:.0f}"] for row in result["rows"]]
    return [title, "", *table(["body, MiB", "more memory at the peak, MiB"], rows)]


def soak(result: dict[str, Any]) -> list[str]:
    minutes = result["seconds"] / 60
    title = f"**{result['model']}: {minutes:g} minutes of mixed load, {result['clients']} requests at once**"
    ends = [[kind, f"{count:,}"] for kind, count in sorted(result["ends"].items(), key=lambda item: -item[1])]
    faults: dict[str, list[float | None]] = {}
    for fault in result["faults"]:
        faults.setdefault(f"{fault['signal']}, {fault['role']}", []).append(fault["back_after"])
    back = [
        [name, str(len(seconds)), ", ".join("never" if one is None else f"{one:.1f}" for one in seconds)]
        for name, seconds in faults.items()
    ]
    growth = [[role, f"{megabytes:+.1f}"] for role, megabytes in result["growth_mb"].items()]
    lines = [f"{title} ({origin(result)}):", "", *table(["end of a request", "number"], ends), ""]
    if back:
        lines += [*table(["fault", "times", "served again after, s"], back), ""]
    return lines + table(["processes", "growth from the second to the last fifth, MB"], growth)


def perplexity_table(result: dict[str, Any]) -> list[str]:
    """Weights and heads, as in docs/quantization.md."""
    rows: list[list[str]] = []
    for row in result["rows"]:
        change = round(100 * (row["ratio"] - 1), 1) + 0.0  # the sum is never -0.0
        types = [row["weights"] if " " in row["weights"] else f"`{row['weights']}`", f"`{row['head_dtype']}`"]
        rows.append([*types, f"{row['perplexity']:.2f}", f"{change:+.1f} %" if rows else "–"])
    return table(["weights", "head", "perplexity", "change"], rows)


def perplexities(result: dict[str, Any]) -> list[str]:
    size = f"{result['tokens']:,} tokens in windows of {result['window']:,}"
    title = f"**Perplexity of {result['model']}, {result['dtype']}, {size}** ({origin(result)}):"
    return [title, "", *perplexity_table(result)]


def front_throughput(result: dict[str, Any]) -> list[str]:
    figures = ("request_us", "response_us", "responses_a_cpu_second", "responses_a_second")
    rows = [[way, *(f"{row[name]:,.0f}" for name in figures)] for way, row in result["ways"].items()]
    headings = ["way in", "CPU a request, µs", "CPU a response, µs", "responses a CPU second", "responses/s then"]
    parts = ", ".join(f"{name}: {value:.1f} µs" for name, value in result["parts_us"].items())
    streams, slow = result["open_streams"], result["slow_readers"]
    many = (
        f"{streams['streams']:,.0f} open streams with a token a second each: {streams['kib_a_stream']:.0f} KiB and "
        f"{streams['descriptors_a_stream']:.2f} descriptors a stream, {streams['cpu_share']:.2f} of a core. "
        f"{slow['readers']:.0f} clients that do not read: {slow['kib_a_reader']:.0f} KiB each; "
        f"beside them an answer of 64 tokens takes {slow['request_us_beside'] / 1e3:.1f} ms of CPU, without them "
        f"{slow['request_us_alone'] / 1e3:.1f} ms."
    )
    title = f"**A process of the front** ({origin(result)}):"
    return [title, "", *table(headings, rows), "", f"Parts of a response: {parts}.", "", many]


def chaos_table(result: dict[str, Any]) -> list[str]:
    """What was done to replicas and how requests ended meanwhile, as in docs/replicas.md."""
    rows = []
    for phase in result["phases"]:
        tally = phase["tally"]
        ejected = "–" if phase["ejected_seconds"] is None else f"{phase['ejected_seconds']:.1f}"
        repeated = f"{phase['repeated']:,}" if "repeated" in phase else "–"  # older results have not counted it
        ends = (tally["retries"], sum(tally["told"].values()), len(tally["lost"]))
        cells = [ejected, f"{tally['done']:,}", repeated, *(f"{count:,}" for count in ends)]
        rows.append([phase["name"], f"{phase['seconds']:.0f}", *cells])
    headings = ["meanwhile", "seconds", "ejected after, s", "answered", "repeated", "retries", "broken off", "lost"]
    return table(headings, rows)


def replicas_chaos(result: dict[str, Any]) -> list[str]:
    title = (
        f"**{result['replicas']} replicas of the {result['engine']} engine, {result['concurrency']} requests at once**"
    )
    haproxy = f"HAProxy {result['versions']['haproxy']}"
    return [f"{title} ({haproxy}, {origin(result)}):", "", *chaos_table(result)]


def throughput_table(result: dict[str, Any]) -> list[str]:
    """Tokens a second by number of replicas, as in docs/replicas.md."""
    rows = []
    for row in result["rows"]:
        busy = statistics.median(run["cores_busy"] for run in row["runs"])
        cells = [row["replicas"], f"{row['tokens_per_second']:,.0f}", f"{row['linear']:.3f}", f"{busy:.0%}"]
        rows.append(list(map(str, cells)))
    return table(["replicas", "tokens/s", "of linear", "cores busy"], rows)


def replicas_throughput(result: dict[str, Any]) -> list[str]:
    steps = f", steps {result['slowdown']:g} times as long" if result["slowdown"] != 1 else ""
    title = f"**Replicas of the sleeping engine{steps}, {result['concurrency']} requests at once each**"
    haproxy = f"HAProxy {result['versions']['haproxy']}"
    return [f"{title} ({haproxy}, {origin(result)}):", "", *throughput_table(result)]


def capacity_headings() -> list[str]:
    return [
        "replicas", "policy", "asked requests/s and replica", "arrived requests/s", "ended", "output tokens/s",
        "first token p50, ms", "p99", "per output token p50, ms", "prompt tokens cached",
        "busiest replica, of an even share",
    ]  # fmt: skip


def capacity_cells(row: dict[str, Any]) -> list[str]:
    first = [row[f"first_token_{name}"] for name in ("p50", "p99")]
    return [
        str(row["replicas"]), row["policy"], f"{row['rate']:g}", f"{row['arrivals_per_second']:,.1f}",
        f"{row['requests_per_second']:,.1f}", f"{row['output_tokens_per_second']:,.0f}",
        *("later" if one is None else f"{1e3 * one:,.0f}" for one in first),
        f"{1e3 * row['per_output_token_p50']:.1f}", f"{row['cached_share']:.0%}", f"{row['busiest']:.2f}",
    ]  # fmt: skip


def capacity(result: dict[str, Any]) -> list[str]:
    gpus = "one" if result["gpus"] == 1 else result["gpus"]
    title = f"**Simulated: chats on replicas of {result['model']}, steps of {gpus} {result['gpu']}**"
    return [f"{title} ({origin(result)}):", "", *table(capacity_headings(), map(capacity_cells, result["rows"]))]


def validation_table(result: dict[str, Any]) -> list[str]:
    figures = {
        "requests/s": ("requests_per_second", 1, "{:.1f}"), "first token p50, ms": ("first_token_p50", 1e3, "{:,.0f}"),
        "p99": ("first_token_p99", 1e3, "{:,.0f}"), "end to end mean, s": ("end_to_end_mean", 1, "{:.2f}"),
    }  # fmt: skip
    rows = []
    for row in result["rows"]:
        cells = [row["workload"], f"{row['rate']:g}" if row["rate"] else "all at once"]
        for name, factor, layout in figures.values():
            cells += [layout.format(factor * row[f"{name}_{source}"]) for source in ("measured", "simulated")]
        rows.append(cells)
    headings = [name for figure in figures for name in (f"{figure}, measured", "simulated")]
    return table(["workload", "asked requests/s", *headings], rows)


def capacity_validation(result: dict[str, Any]) -> list[str]:
    return [f"**LLaMA-7B's service, measured and simulated** ({origin(result)}):", "", *validation_table(result)]


SECTIONS = {
    "static_inference": static_inference, "serving": serving, "step_profile": step_profile, "rank_step": rank_step,
    "power_limit": power_limit,
    "kernels": kernels, "all_reduce": all_reduce, "load_time": load_time, "cpu_speed": cpu_speed,
    "cpu_peer": cpu_peer,
    "router_time": router_time, "admission": admission, "window_slots": window_slots, "fairness": fairness,
    "prefix_cache": prefix_cache, "long_context": long_context, "overload": overload, "slow_readers": slow_readers,
    "body_memory": body_memory,
    "soak": soak,
    "front_throughput": front_throughput, "perplexity": perplexities,
    "replicas_chaos": replicas_chaos, "replicas_throughput": replicas_throughput,
    "capacity": capacity, "capacity_validation": capacity_validation,
}  # fmt: skip


def page(results: dict[Path, dict[str, Any]]) -> str:
    """The text of perf/RESULTS.md. results: each stored result by its file, with the file's `stem` added."""
    lines: list[str] = []
    for name, section in SECTIONS.items():
        ours = {path: result for path, result in results.items() if "peer" not in result}
        chosen = {path: result for path, result in ours.items() if result["benchmark"] == name}
        for path, result in chosen.items():
            lines += [*section(result), ""]
            if "note" in result:
                lines += [result["note"], ""]
            picture = path.with_suffix(".svg")
            if picture.exists():
                lines += [f"![{result['benchmark']} {result['model']}](results/{picture.name})", ""]
        if name == "serving":
            for compare in (server_share, front_share, weights_gain):
                lines += compare(list(chosen.values()))
    return INTRODUCTION + "\n".join(lines).rstrip() + "\n"


def stored_results() -> dict[Path, dict[str, Any]]:
    """Each result in perf/results/ by its file."""
    return {path: json.loads(path.read_text()) | {"stem": path.stem} for path in sorted(RESULTS.glob("*.json"))}


def main() -> None:
    PAGE.write_text(page(stored_results()))


if __name__ == "__main__":
    main()
