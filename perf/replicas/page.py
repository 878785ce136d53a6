# SPDX-License-Identifier: Apache-2.0
"""What docs/replicas.md shows of the stored results, between pairs of comments: `python -m perf.replicas page`."""

from __future__ import annotations

import json
import re
from typing import Any

from perf.record import RESULTS, ROOT
from perf.report.servers import chaos_table, throughput_table

PAGE = ROOT / "docs" / "replicas.md"


def updated(text: str) -> str:
    """The page with its results written anew."""
    sections = {"CHAOS": _chaos(), "THROUGHPUT": _throughput()}
    for name, paragraphs in sections.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, paragraphs=paragraphs: match[1] + "\n\n".join(paragraphs) + "\n", text)
    return text


def _chaos() -> list[str]:
    sleeping, embedded, two = (_stored(f"chaos_{name}") for name in ("sleeping_4", "embedded_4", "embedded_2"))
    return [
        (
            f"With {sleeping['replicas']} replicas whose engine sleeps as long as LLaMA-7B's steps take on an H200,"
            f" {sleeping['concurrency']} requests at once, on {sleeping['machine']['cores']} cores; {_ends(sleeping)}:"
        ),
        "\n".join(chaos_table(sleeping)),
        (
            f"With {embedded['replicas']} replicas of the embedded model, {embedded['concurrency']} requests at once,"
            f" each answer compared with the model's own, on {embedded['machine']['cores']} cores that dozens of other "
            f"processes used at the same time, which is why a start takes so long; {_ends(embedded)}:"
        ),
        "\n".join(chaos_table(embedded)),
        f"The same with {two['replicas']} replicas and {two['concurrency']} requests at once; {_ends(two)}:",
        "\n".join(chaos_table(two)),
    ]


def _ends(result: dict[str, Any]) -> str:
    tallies = [phase["tally"] for phase in result["phases"]]
    lost = sum(len(tally["lost"]) for tally in tallies)
    return f"{sum(tally['done'] for tally in tallies):,} answers, {lost or 'none'} lost"


def _throughput() -> list[str]:
    small, large = (_stored(f"throughput_16_cores{name}") for name in ("", "_70b"))
    return [
        (
            f"Steps as long as LLaMA-7B's on an H200, {small['concurrency']} requests at once a replica (medians of "
            f"{len(small['rows'][0]['runs'])} runs):"
        ),
        "\n".join(throughput_table(small)),
        f"Steps {large['slowdown']:g} times as long, about LLaMA-2-70B's on two H200s:",
        "\n".join(throughput_table(large)),
        f"Replicas, proxy and clients shared the {small['machine']['cores']} cores of one machine.",
    ]


def _stored(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"replicas_{name}.json").read_text())
    return result
