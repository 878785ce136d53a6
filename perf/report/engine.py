# SPDX-License-Identifier: Apache-2.0
"""The report's sections on the engine without a server: its steps, their kernels, loading, and what they compute."""

from __future__ import annotations

from perf import peer
from perf.record import types_of
from perf.report.markdown import Result, cell, grid, origin, section, table


def static_inference(result: Result) -> list[str]:
    other = peer.static_peer(result)
    peer_name = peer.name_of(other) if other else ""
    columns = [
        ("batch", "{batch}"),
        ("prompt", "{prompt}"),
        ("output", "{output_len}"),
        ("prefill tokens/s", "{prefill_tokens_per_second:,.0f}", "–"),
        (f"{peer_name}, tokens/s", "{peer_prefill_tokens_per_second:,.0f}", "–"),
        ("of unquantised tokens/s", "{prefill_ratio:.2f}", "–"),
        ("TFLOP/s", "{tflops:.0f}", "–"),
        ("of the peak", "{prefill_share:.2f}", "–"),
        ("ms a step", "{step_ms:.2f}", "–"),
        ("of the unquantised step", "{step_ratio:.2f}", "–"),
        ("on the GPU, ms", "{device_step_ms:.2f}", "–"),
        (f"{peer_name}, ms", "{peer_step_ms:.2f}", "–"),
        ("floor ms", "{floor_ms:.2f}", "–"),
        ("floor / step", "{share:.2f}", "–"),
        ("tokens/s", "{decode_tokens_per_second:,.0f}", "–"),
    ]
    rows = [row | peer.beside(other, row) for row in result["rows"]]
    for row in rows:
        row["prompt"] = f"{row['prompt_tokens'] / row['batch']:,.0f}{' (mean)' if row['mixed'] else ''}"
        if "prefill_flops_per_second" in row:
            row["tflops"] = row["prefill_flops_per_second"] / 1e12
    told = [column for column in columns if any(cell(row, *column[1:]) != "–" for row in rows)]
    settings = result["settings"]
    ranks = settings.get("LIGHTLLM_TP", "1")
    title = ", ".join([result["model"], result["engine"]["dtype"], *types_of(settings), f"tp {ranks}"])
    started = "" if result["start_seconds"] is None else f"; started in {result['start_seconds']:.1f} s"
    return [f"**{title}**{started} ({origin(result)}):", "", *table(told, rows)]


def step_profile(result: Result) -> list[str]:
    rows = [row | {"batch": f"{row['batch']}{' (mixed)' if row['mixed'] else ''}"} for row in result["rows"]]
    columns = [
        ("batch", "{batch}"), ("wall", "{wall_ms:.2f}", "–"), ("recorded", "{span_ms:.2f}", "–"),
        ("GPU busy", "{busy_ms:.2f}", "–"), ("planning", "{next_batch_ms:.2f}", "–"),
        ("launching", "{launch_ms:.2f}", "–"), ("waiting", "{wait_ms:.2f}", "–"),
        ("taking the result", "{apply_ms:.2f}", "–"), ("GPU idle", "{idle_share:.1%}", "–"),
    ]  # fmt: skip
    spent = [{kernel["name"]: kernel["ms"] for kernel in row.get("kernels", [])} for row in rows]
    names = sorted({name for one in spent for name in one}, key=lambda name: -max(one.get(name, 0) for one in spent))
    cells = [[f"`{name[:60]}`", *(f"{one[name]:.3f}" if name in one else "–" for one in spent)] for name in names[:12]]
    headings = ["on the GPU, ms a step at batch", *(row["batch"] for row in rows)]
    types = ", ".join([result["dtype"], *types_of(result["settings"])])
    title = f"{result['phase'].capitalize()} steps of {result['model']}, {types}, ms"
    return section(title, origin(result), table(columns, rows), grid(headings, cells) if cells else [])


def rank_step(result: Result) -> list[str]:
    layers, tp = result["layers"], result["tp"]

    def compared(name: str, one: float, ranks: float, digits: int) -> list[str]:
        return [name, *(f"{figure:.{digits}f}" for figure in (one, one / tp, ranks, ranks - one / tp))]

    tables = []
    for row in result["rows"]:
        one, ranks = row["one"], row["ranks"]
        cells = [compared(name, of_one, ranks["parts"][name], 1) for name, of_one in one["parts"].items()]
        cells.sort(key=lambda part: -float(part[-1]))
        cells.append(compared("the step, ms", one["step_ms"], ranks["step_ms"], 3))
        tables.append(grid([f"batch {row['batch']}", "one GPU", f"1/{tp} of it", f"{tp} GPUs", "beyond"], cells))
    types = ", ".join([result["dtype"], *([] if result["weight_dtype"] == "auto" else [result["weight_dtype"]])])
    title = f"Decode steps of {layers} layers of {result['model']}, {types}, µs a layer, of the rest µs a step"
    return section(title, origin(result), *tables)


def power_limit(result: Result) -> list[str]:
    columns = [
        ("batch", "{batch}"), ("ms after a rest", "{rested_ms:.2f}"), ("ms for seconds on end", "{sustained_ms:.2f}"),
        ("W", "{watts:.0f}"), ("clock, MHz", "{megahertz:,.0f}"), ("J a step", "{joules:.2f}"),
    ]  # fmt: skip
    limit = f"limit {result['rows'][0]['limit_watts']:.0f} W"
    title = f"Decode steps of {result['model']} without an engine, {result['context']} tokens of context, {limit}"
    return section(title, origin(result), table(columns, result["rows"]))


def kernels(result: Result) -> list[str]:
    cells = []
    for row in result["rows"]:
        name = f"{row['kernel']}: {row['case']}"
        if row.get("is_wrong"):
            cells.append([name, "wrong", "", "", "", ""])
            continue
        gigabytes = f"{row['bytes_per_second'] / 1e9:,.0f}"
        tera = f"{row['operations_per_second'] / 1e12:.0f}" if row["operations"] else "–"
        others = ", ".join(f"{name} {us:.1f}" for name, us in row["torch_us"].items())
        cells.append([name, f"{row['us']:.1f}", gigabytes, tera, f"{row['share']:.2f}", others or "–"])
    read, tera = result["limits"]["read_bytes_per_second"] / 1e9, result["limits"]["bf16_flops_per_second"] / 1e12
    summary = f"Kernels, beside {read:,.0f} GB/s read, {tera:.0f} TFLOP/s ({origin(result)})"
    headings = ["kernel", "µs", "GB/s", "TFLOP/s", "of the limit", "PyTorch, µs"]
    return [f"<details><summary>{summary}</summary>", "", *grid(headings, cells), "", "</details>"]


def all_reduce(result: Result) -> list[str]:
    names = [name for name in result["rows"][0] if name != "bytes"]
    cells = [[f"{row['bytes'] >> 10}", *(f"{row[name]:.1f}" for name in names)] for row in result["rows"]]
    title = f"All-reduce of bf16 between {result['ranks']} GPUs, µs"
    return section(title, origin(result), grid(["KB", *(name.replace("_", " ") for name in names)], cells))


def load_time(result: Result) -> list[str]:
    size = f"{result['checkpoint_bytes'] / 1e9:.1f} GB"
    cells = [[size, f"{row['seconds']:.1f}", f"{row['host_peak_bytes'] / 2**30:.2f}"] for row in result["rows"]]
    title = f"Weights of {result['model']} from safetensors in the page cache"
    headings = ["checkpoint", "seconds", "host memory beyond the page cache, GiB"]
    return section(title, origin(result), grid(headings, cells))


def cpu_speed(result: Result) -> list[str]:
    columns = [
        ("batch", "{batch}"),
        ("engine", "{engine_tokens_per_second:.1f}"),
        ("transformers", "{transformers_tokens_per_second:.1f}"),
        ("ratio", "{ratio:.2f}"),
    ]
    types = [result["dtype"], *types_of({"LIGHTLLM_WEIGHT_DTYPE": result.get("weight_dtype", "auto")})]
    title = f"SmolLM2-135M on a CPU, {', '.join(types)}, tokens/s"
    return section(title, origin(result), table(columns, result["rows"]))


def cpu_peer(result: Result) -> list[str]:
    columns = [
        ("work", "{work}"), ("engine", "{engine_tokens_per_second:.1f}"),
        ("llama.cpp", "{llama_cpp_tokens_per_second:.1f}"), ("ratio", "{ratio:.2f}"),
        ("engine's best round", "{engine_best:.1f}"), ("llama.cpp's", "{llama_cpp_best:.1f}"),
        ("ratio", "{ratio_of_best:.2f}"),
    ]  # fmt: skip
    rows = [
        row | {f"{name}_best": max(row[f"{name}_rounds"]) for name in ("engine", "llama_cpp")} for row in result["rows"]
    ]
    title = f"{result['model']} on a CPU beside llama.cpp ({result['peer_package']}), {result['dtype']}, "
    title += f"{result['threads']} threads, tokens/s"
    load = " to ".join(f"{result['load_average'][when][0]:.1f}" for when in ("before", "after"))
    source = f"{origin(result)}; load average {load}, of which the runs make some"
    return section(title, source, table(columns, rows))


def prefix_cache(result: Result) -> list[str]:
    columns = [
        ("prefix cache", "{is_on}"),
        ("TTFT of the first, ms", "{first_ms:.1f}"),
        ("of the next, ms", "{next_ms:.1f}"),
        (f"{result['burst']} at once, all, ms", "{burst_ms:.1f}"),
    ]
    rows = [row | {"is_on": "yes" if row["prefix_cache"] else "no"} for row in result["rows"]]
    title = f"{result['model']}: {result['shared']:,} shared prompt tokens and {result['own']} of its own"
    return section(title, origin(result), table(columns, rows))


def long_context(result: Result) -> list[str]:
    first = result["rows"][0]
    headings = ["tokens in all", f"prefill of {result['prompt']:,} tokens, s", "step there, ms", "start, s"]
    headings += [*(f"{part}, GiB" for part in first["memory"]), "KV tokens"]
    headings += [f"step of {step['batch']}, ms" for step in first["steps"]]
    cells = [
        [
            f"{row['max_total']:,}",
            cell(row, "{long[prefill_seconds]:.2f}", "–"),
            cell(row, "{long[step_ms]:.2f}", "–"),
            f"{row['start_seconds']:.1f}",
            *(f"{row['memory'][part] / 2**30:.2f}" for part in first["memory"]),
            f"{row['pool_tokens']:,}",
            *(f"{step['step_ms']:.3f}" for step in row["steps"]),
        ]
        for row in result["rows"]
    ]
    return section(f"{result['model']}: long requests", origin(result), grid(headings, cells))


def perplexity(result: Result) -> list[str]:
    size = f"{result['tokens']:,} tokens in windows of {result['window']:,}"
    title = f"Perplexity of {result['model']}, {result['dtype']}, {size}"
    return section(title, origin(result), perplexity_table(result))


def perplexity_table(result: Result) -> list[str]:
    """Weights and heads, as in docs/quantization.md."""
    cells: list[list[str]] = []
    for row in result["rows"]:
        change = round(100 * (row["ratio"] - 1), 1) + 0.0  # the sum is never -0.0
        types = [row["weights"] if " " in row["weights"] else f"`{row['weights']}`", f"`{row['head_dtype']}`"]
        cells.append([*types, f"{row['perplexity']:.2f}", f"{change:+.1f} %" if cells else "–"])
    return grid(["weights", "head", "perplexity", "change"], cells)
