# SPDX-License-Identifier: Apache-2.0
"""The report's sections on servers under floods, faults and slow clients, on the front, and on replicas."""

from __future__ import annotations

import statistics
from collections import defaultdict

from perf.report.markdown import Result, cell, grid, origin, section, table


def overload(result: Result) -> list[str]:
    columns = [
        ("done", "{outcomes[done]:,}", "0"), ("refused", "{outcomes[refused]:,}", "0"),
        ("refused after, s, p50", "{refused_seconds[p50]:.2f}"), ("p99", "{refused_seconds[p99]:.2f}"),
        ("longest", "{refused_seconds[max]:.2f}"), ("between responses before, ms, p99", "{before_ms:.1f}", "–"),
        ("while refusing, ms, p99", "{while_refusing_ms:.1f}", "–"),
        ("while others wait, ms, p99", "{while_waiting_ms:.1f}", "–"),
        ("longest pause, s", "{gap_while_refusing[max]:.2f}"),
    ]  # fmt: skip
    gaps = {name: result.get(f"gap_{name}") for name in ("before", "while_refusing", "while_waiting")}
    row = result | {f"{name}_ms": 1e3 * gap["p99"] for name, gap in gaps.items() if gap}
    title = f"{result['requests']:,} requests at once over {result['protocol']}, an engine that tells the time"
    grown, bare = result.get("grown_mb"), result.get("model_that_only_refuses", {})
    growth = [f"What the flood adds to each process, MB: {_signed(grown)}."] if grown else []
    least = []
    if refused := bare.get("refused_seconds"):
        least.append(f"A model that only refuses: {refused['p50']:.2f} s (p50), {refused['max']:.2f} s (longest).")
    if gap := bare.get("gap_while_refusing"):
        least.append(
            f"Streams of another model beside it: {1e3 * bare['gap_before']['p99']:.1f} → {1e3 * gap['p99']:.1f} ms "
            f"between responses (p99), the longest pause {gap['max']:.2f} s."
        )
    return section(title, origin(result), table(columns, [row]), growth, [" ".join(least)] if least else [])


def slow_readers(result: Result) -> list[str]:
    cells = [
        [name, f"{100 * pace['median']:.1f}", f"{100 * pace['least']:.1f}", f"{result['p99_gap_ms'][name]:.0f}"]
        for name, pace in result["pace"].items()
    ]
    headings = ["the neighbours", "% of their pace alone, median", "least", "between responses, ms, p99"]
    title = f"{result['readers']} streams of clients that read nothing, beside {result['neighbours']} of others, "
    title += f"{result['seconds']:g} s each"
    told = f"Alone: {result['p99_gap_ms']['alone']:.0f} ms between responses (p99). "
    told += f"What a phase beside clients that read nothing adds to each process, MB: {_signed(result['growth_mb'])}."
    return section(title, origin(result), grid(headings, cells), [told])


def _signed(megabytes: dict[str, float]) -> str:
    return ", ".join(f"{role} {size:+.1f}" for role, size in sorted(megabytes.items()))


def body_memory(result: Result) -> list[str]:
    columns = [("body, MiB", "{mebibytes}"), ("more memory at the peak, MiB", "{peak_mebibytes:.0f}")]
    title = "What Triton server takes while it reads the body of an HTTP request"
    return section(title, origin(result), table(columns, result["rows"]))


def soak(result: Result) -> list[str]:
    ends = [[kind, f"{count:,}"] for kind, count in sorted(result["ends"].items(), key=lambda item: -item[1])]
    back_after = defaultdict(list)
    for fault in result["faults"]:
        back_after[f"{fault['signal']}, {fault['role']}"].append(cell(fault, "{back_after:.1f}", "never"))
    faults = [[name, str(len(seconds)), ", ".join(seconds)] for name, seconds in back_after.items()]
    growth = [[role, f"{megabytes:+.1f}"] for role, megabytes in result["growth_mb"].items()]
    title = f"{result['model']}: {result['seconds'] / 60:g} minutes of mixed load, {result['clients']} requests at once"
    return section(
        title,
        origin(result),
        grid(["end of a request", "number"], ends),
        grid(["fault", "times", "served again after, s"], faults) if faults else [],
        grid(["processes", "growth from the second to the last fifth, MB"], growth),
    )


def front_throughput(result: Result) -> list[str]:
    columns = [
        ("way in", "{way}"), ("CPU a request, µs", "{request_us:,.0f}"), ("CPU a response, µs", "{response_us:,.0f}"),
        ("responses a CPU second", "{responses_a_cpu_second:,.0f}"),
        ("responses/s then", "{responses_a_second:,.0f}"),
    ]  # fmt: skip
    rows = [row | {"way": way} for way, row in result["ways"].items()]
    parts = ", ".join(f"{name}: {value:.1f} µs" for name, value in result["parts_us"].items())
    streams, slow = result["open_streams"], result["slow_readers"]
    many = (
        f"{streams['streams']:,.0f} open streams with a token a second each: {streams['kib_a_stream']:.0f} KiB and "
        f"{streams['descriptors_a_stream']:.2f} descriptors a stream, {streams['cpu_share']:.2f} of a core. "
        f"{slow['readers']:.0f} clients that do not read: {slow['kib_a_reader']:.0f} KiB each; "
        f"beside them an answer of 64 tokens takes {slow['request_us_beside'] / 1e3:.1f} ms of CPU, without them "
        f"{slow['request_us_alone'] / 1e3:.1f} ms."
    )
    told = ([f"Parts of a response: {parts}."], [many])
    return section("A process of the front", origin(result), table(columns, rows), *told)


def replicas_chaos(result: Result) -> list[str]:
    title = f"{result['replicas']} replicas of the {result['engine']} engine, {result['concurrency']} requests at once"
    return section(title, _origin_with_proxy(result), chaos_table(result))


def chaos_table(result: Result) -> list[str]:
    """What was done to replicas and how requests ended meanwhile, as in docs/replicas.md."""
    columns = [
        ("meanwhile", "{name}"),
        ("seconds", "{seconds:.0f}"),
        ("ejected after, s", "{ejected_seconds:.1f}", "–"),
        ("answered", "{tally[done]:,}"),
        ("repeated", "{repeated:,}", "–"),  # older results have not counted it
        ("retries", "{tally[retries]:,}"),
        ("broken off", "{broken_off:,}"),
        ("lost", "{lost:,}"),
    ]
    rows = [
        phase | {"broken_off": sum(phase["tally"]["told"].values()), "lost": len(phase["tally"]["lost"])}
        for phase in result["phases"]
    ]
    return table(columns, rows)


def replicas_throughput(result: Result) -> list[str]:
    steps = f", steps {result['slowdown']:g} times as long" if result["slowdown"] != 1 else ""
    title = f"Replicas of the sleeping engine{steps}, {result['concurrency']} requests at once each"
    return section(title, _origin_with_proxy(result), throughput_table(result))


def throughput_table(result: Result) -> list[str]:
    """Tokens a second by number of replicas, as in docs/replicas.md."""
    columns = [
        ("replicas", "{replicas}"),
        ("tokens/s", "{tokens_per_second:,.0f}"),
        ("of linear", "{linear:.3f}"),
        ("cores busy", "{busy:.0%}"),
    ]
    rows = [row | {"busy": statistics.median(run["cores_busy"] for run in row["runs"])} for row in result["rows"]]
    return table(columns, rows)


def _origin_with_proxy(result: Result) -> str:
    return f"HAProxy {result['versions']['haproxy']}, {origin(result)}"
