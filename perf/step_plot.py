# SPDX-License-Identifier: Apache-2.0
"""A result of static_inference as a picture: the step over the batch size, with the floor and the peer.

    python -m perf.step_plot perf/results/static_inference_*.json

Needs matplotlib (requirements-dev.txt). The SVG lies beside the JSON file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt

from perf import peer
from perf.record import types_of

# Text stays text, so that the file is small; the same result gives the same bytes.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "lightllm", "font.family": "sans-serif"}


def draw(result: dict[str, Any], path: Path) -> None:
    """One pair of curves (step and floor) for each length of the prompts; mixed batches are points."""
    curves: dict[tuple[bool, int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in result["rows"]:
        if "step_ms" in row:
            curves[row["mixed"], row["prompt_tokens"] // row["batch"], row["output_len"]].append(row)
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for index, ((mixed, prompt, output), rows) in enumerate(sorted(curves.items())):
            name = f"{'mixed, ' if mixed else ''}{prompt} + {output} tokens"
            rows.sort(key=lambda row: int(row["batch"]))
            _curve(axes, rows, "step_ms", name, f"C{index}", "o-")
            if "floor_ms" in rows[0]:
                _curve(axes, rows, "floor_ms", f"{name}: floor", f"C{index}", ".:")
        other = peer.static_peer(result)
        compared = [row | peer.beside(other, row) for row in result["rows"]]
        known = [row for row in compared if "peer_step_ms" in row]
        if other and known:
            _curve(axes, known, "peer_step_ms", peer.name_of(other), "black", "s--")
        axes.set(xscale="log", xlabel="batch", ylabel="ms a step", ylim=(0, None))
        batches = sorted({row["batch"] for rows in curves.values() for row in rows})
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
        axes.set_title(_title(result))
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _title(result: dict[str, Any]) -> str:
    parts = [result["model"], result["engine"]["dtype"], *types_of(result["settings"])]
    parts.append(f"{result['settings'].get('LIGHTLLM_TP', 1)} x {result['machine']['gpu'] or 'cpu'}")
    return ", ".join(parts)


def _curve(axes: Any, rows: list[dict[str, Any]], key: str, label: str, color: str, style: str) -> None:
    axes.plot([row["batch"] for row in rows], [row[key] for row in rows], style, color=color, label=label)


@click.command(help=str(__doc__).partition("\n")[0])
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(results: tuple[Path, ...]) -> None:
    for path in results:
        draw(json.loads(path.read_text()), path.with_suffix(".svg"))
        print(f"written to {path.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
