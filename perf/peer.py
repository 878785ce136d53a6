# SPDX-License-Identifier: Apache-2.0
"""What another engine reached on the same kind of machine, asked the same: results of perf.peer_vllm in perf/results/.

Its results are those of our own benchmarks with the key `peer`, the engine's name, and `weights`, their type.
"""

from __future__ import annotations

import json
from typing import Any

from perf.record import RESULTS

# By our `weight_dtype`: the peer's weights of as many bits.
WEIGHTS = {"auto": "bf16", "fp8": "fp8", "int8": "fp8", "int4": "awq"}


def stored() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("peer_*.json"))]


def name_of(peer: dict[str, Any]) -> str:
    """The engine, its version and its weights, as tables name them."""
    return f"{peer['peer']} {peer['versions'][peer['peer'].lower()]} {peer['weights']}"


def static_peer(result: dict[str, Any]) -> dict[str, Any] | None:
    """The peer's result for one of static_inference, if there is one for its model, GPUs and types."""
    settings = {name: result["settings"].get(f"LIGHTLLM_{name}", "auto") for name in ("KV_DTYPE", "HEAD_DTYPE")}
    if result["engine"]["dtype"] != "bfloat16" or set(settings.values()) != {"auto"}:
        return None
    weights = WEIGHTS[result["settings"].get("LIGHTLLM_WEIGHT_DTYPE", "auto")]
    wanted = ("static_inference", result["model"], weights, int(result["settings"].get("LIGHTLLM_TP", "1")))
    for peer in stored():
        found = tuple(peer[name] for name in ("benchmark", "model", "weights", "tp"))
        if found == wanted and peer["machine"]["gpu"] == result["machine"]["gpu"]:
            return peer
    return None


def beside(peer: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, float]:
    """The peer's figures for a row of our result: those that there are."""
    names = ("batch", "prompt_tokens", "output_len", "mixed")
    rows = [one for one in peer["rows"] if all(one[name] == row[name] for name in names)] if peer else []
    figures = ("step_ms", "prefill_tokens_per_second")
    return {f"peer_{name}": one[name] for one in rows for name in figures if name in one}


def serving_peers(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The peer's results for one of the service benchmark: those for its model, GPUs, weights and requests.

    The engine alone stands beside the peer in process, a server also beside the peer's server.
    """
    settings = result["settings"]
    wanted = {name: result[name] for name in ("model", "workload", "prompts", "shared_prefix", "max_tokens")}
    wanted |= {"benchmark": "serving", "tp": int(settings.get("tp", 1))}
    wanted |= {"weights": WEIGHTS[settings.get("weight_dtype", "auto")]}
    return [
        peer
        for peer in stored()
        if all(peer.get(name) == value for name, value in wanted.items())
        and peer["machine"]["gpu"] == result["machine"]["gpu"]
        and (result["system"] == "server" or peer["system"] == "engine")
    ]
