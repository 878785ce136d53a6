# SPDX-License-Identifier: Apache-2.0
"""The tables of perf/README.md, from the results that are stored beside it: `python -m perf.report`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from perf.record import RESULTS

PAGE = Path(__file__).with_name("README.md")
# vLLM 0.26.0 on the same kind of machine, measured in the same way: ms a step by batch, LLaMA-7B's shape, bf16.
PEER_STEP_MS = {1: 4.59, 8: 4.95, 32: 5.94, 64: 7.29, 128: 10.28, 256: 17.22}


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
    ranks, kv_dtype = settings.get("LIGHTLLM_TP", "1"), settings.get("LIGHTLLM_KV_DTYPE", "auto")
    with_peer = (result["model"], ranks, kv_dtype) == ("llama-7b", "1", "auto")
    headings = ["batch", "prefill tokens/s", "ms a step", "tokens/s", "floor ms", "floor / step"]
    rows = []
    for row in result["rows"]:
        cells = [
            f"{row['batch']}", f"{row['prefill_tokens_per_second']:,.0f}", f"{row['step_ms']:.2f}",
            f"{row['decode_tokens_per_second']:,.0f}", f"{row['floor_ms']:.2f}", f"{row['share']:.2f}",
        ]  # fmt: skip
        rows.append([*cells, f"{PEER_STEP_MS[row['batch']]:.2f}"] if with_peer else cells)
    title = f"{result['model']}, {result['engine']['dtype']}, K and V {kv_dtype.replace('auto', 'alike')}, tp {ranks}"
    lengths = f"{result['input_len']} prompt and {result['output_len']} output tokens"
    return [
        f"**{title}**, {lengths}; started in {result['start_seconds']:.1f} s ({origin(result)}):",
        "",
        *table([*headings, "vLLM 0.26.0, ms a step"] if with_peer else headings, rows),
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


SECTIONS = {
    "static_inference": static_inference, "all_reduce": all_reduce, "load_time": load_time, "cpu_speed": cpu_speed,
}  # fmt: skip


def main() -> None:
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    lines: list[str] = []
    for name, section in SECTIONS.items():
        for result in results:
            if result["benchmark"] == name:
                lines += [*section(result), ""]
    begin, end = "<!-- results, made by perf/report.py -->\n", "<!-- end of results -->"
    text = re.sub(f"{begin}.*{end}", lambda _: begin + "\n".join(lines) + end, PAGE.read_text(), flags=re.DOTALL)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
