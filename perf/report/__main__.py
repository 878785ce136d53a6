# SPDX-License-Identifier: Apache-2.0
"""Writes perf/RESULTS.md from the results that are stored in perf/results/: `python -m perf.report`."""

from __future__ import annotations

import json
from pathlib import Path

from perf.record import RESULTS, ROOT
from perf.report import engine, servers, serving, simulations
from perf.report.markdown import Result

PAGE = ROOT / "perf" / "RESULTS.md"
INTRODUCTION = """\
<!-- SPDX-License-Identifier: Apache-2.0 -->
<!-- Written by `python -m perf.report` from perf/results/*.json. Do not edit. -->
# Results

[README.md](README.md) says how to measure these figures again and how to read each column.

"""

# The page's sections in order: each tells of a result of the benchmark of its name.
SECTIONS = (
    engine.static_inference, serving.serving, engine.step_profile, engine.rank_step, engine.power_limit,
    engine.kernels, engine.all_reduce, engine.load_time, engine.cpu_speed, engine.cpu_peer,
    simulations.router_time, simulations.admission, simulations.window_slots, simulations.fairness,
    engine.prefix_cache, engine.long_context,
    servers.overload, servers.slow_readers, servers.body_memory, servers.soak, servers.front_throughput,
    engine.perplexity,
    servers.replicas_chaos, servers.replicas_throughput, simulations.capacity, simulations.capacity_validation,
)  # fmt: skip
# What compares the results of a section with each other, and follows them.
COMPARISONS = {serving.serving: (serving.server_share, serving.front_share, serving.weights_gain)}


def page(results: dict[Path, Result]) -> str:
    """The text of perf/RESULTS.md. results: each stored result by its file, with the file's `stem` added."""
    ours = {path: result for path, result in results.items() if "peer" not in result}
    lines: list[str] = []
    for section in SECTIONS:
        chosen = {path: result for path, result in ours.items() if result["benchmark"] == section.__name__}
        for path, result in chosen.items():
            lines += [*section(result), ""]
            if "note" in result:
                lines += [result["note"], ""]
            picture = path.with_suffix(".svg")
            if picture.exists():
                lines += [f"![{section.__name__} {result['model']}](results/{picture.name})", ""]
        for compare in COMPARISONS.get(section, ()):
            lines += compare(list(chosen.values()))
    return INTRODUCTION + "\n".join(lines).rstrip() + "\n"


def stored_results() -> dict[Path, Result]:
    """Each result in perf/results/ by its file."""
    return {path: json.loads(path.read_text()) | {"stem": path.stem} for path in sorted(RESULTS.glob("*.json"))}


def main() -> None:
    PAGE.write_text(page(stored_results()))


if __name__ == "__main__":
    main()
