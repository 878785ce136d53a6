# SPDX-License-Identifier: Apache-2.0
"""The report's section on serving, from results that are made up."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from perf.benchmark_serving import result_path
from perf.report.serving import front_share, server_share, serving, weights_gain
from perf.serving.plots import write_plots

LATENCY = {"mean": 0.01, "p50": 0.0123, "p90": 0.02, "p99": 0.0456}


def result(system: str, tokens_per_second: float, **changes: Any) -> dict[str, Any]:
    run = {
        "request_rate": 200.0, "seconds": 60.0, "requests_per_second": 33.3, "tokens_per_response": 1.5,
        "output_tokens_per_second": tokens_per_second, "time_to_first_token": LATENCY,
        "time_per_output_token": LATENCY, "inter_token": None, "clients": {"were_the_limit": False},
    }  # fmt: skip
    return {
        "stem": "none", "model": "llama-7b", "system": system, "settings": {}, "workload": "workload_2000",
        "is_dataset": False, "prompts": "ids", "shared_prefix": 0, "max_tokens": None, "seed": 0, "concurrency": None,
        "protocol": "grpc", "machine": {"gpu": "NVIDIA H200"}, "versions": {"torch": None, "triton": None},
        "benchmark": "serving", "streaming": True, "commit": "abc", "date": "2026-01-01", "runs": [run], **changes,
    }  # fmt: skip


def rows(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| (?!--:)", line)]


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"peer": "vLLM", "versions": {"vllm": "0.26.0"}, "tp": 1}
    http = result("server", 1.0, protocol="http", weights="bf16", **common)
    http["runs"] = [{"request_rate": 200.0, "requests_per_second": 25.5, "time_to_first_token": {"p50": 1.35}}]
    at_once = result("engine", 1.0, weights="fp8", **common)
    at_once["runs"] = [{"request_rate": None, "requests_per_second": 29.7}]
    monkeypatch.setattr("perf.peer.stored", lambda: [http, at_once])


def test_a_result_has_its_row_beside_the_peers(peers: None) -> None:
    asked = result("server", 10_900.0)
    asked["runs"][0] |= {"delivery_lag": {"p99": 0.2449}, "pool_share_while_queued": 0.9868}
    heading, ours, peer = rows(serving(asked))
    assert len(heading) == len(ours) == len(peer) == 14
    assert ours == [
        "tritonserver, grpc", "200", "60.0", "33.30", "10,900", "12.3", "45.6", "12.3", "45.6", "–", "–", "1.50",
        "245", "98.7%",
    ]  # fmt: skip
    assert peer == ["vLLM 0.26.0 bf16, http", "200", "–", "25.50", "–", "1,350.0", "–", *["–"] * 7]


def test_there_is_a_peer_only_where_it_was_asked_the_same(peers: None) -> None:
    for change in ({"settings": {"tp": "4"}}, {"model": "llama-2-70b"}, {"workload": "workload_1000"}):
        assert len(rows(serving(result("server", 1.0, **change)))) == 2
    assert len(rows(serving(result("engine", 1.0)))) == 2
    at_once = result("engine", 1.0, settings={"kv_dtype": "int8", "weight_dtype": "fp8"})
    at_once["runs"][0]["request_rate"] = None
    [*_, peer] = rows(serving(at_once))
    assert peer[:4] == ["vLLM 0.26.0 fp8, engine alone, K and V in 16 bits", "all at once", "–", "29.70"]
    published = rows(serving(result("server", 1.0, is_dataset=True, workload="sharegpt")))
    assert [row[3] for row in published[2:]] == ["10.59", "5.53"]


def test_clients_that_were_the_limit_are_told() -> None:
    limited = result("server", 1.0)
    limited["runs"][0]["clients"]["were_the_limit"] = True
    assert "its clients were the limit" in rows(serving(limited))[1][0]


def test_the_servers_share_is_of_the_same_load() -> None:
    engine, server = result("engine", 10_000.0), result("server", 9_800.0)
    assert server_share([engine, server])[0].startswith("Of the engine's throughput tritonserver takes 2.0 %")
    assert server_share([engine, result("server", 9_800.0, settings={"kv_dtype": "int8"})]) == []
    assert server_share([engine, result("server", 9_800.0, commit="another")]) == []
    for one in (engine, server):
        one["runs"][0]["request_rate"] = 40.0  # nearly reached, so both gave what they were asked for
    assert server_share([engine, server]) == []


def test_the_front_is_compared_with_the_same_load() -> None:
    direct, front = (result("server", 1.0, protocol=protocol) for protocol in ("grpc", "openai"))
    front["settings"] = {"front_processes": "4"}
    front["runs"][0] |= {"requests_per_second": 0.97 * 33.3, "time_to_first_token": {**LATENCY, "p50": 0.0137}}
    figures = "97.0% of the requests/s, first token p50 +1.4 ms, per output token p99 × 1.00"
    [line, _] = front_share([direct, front])
    assert line == f"Through the front in 4 processes instead of gRPC: {figures} (llama-7b, workload_2000 at 200/s)."
    for change in ({"settings": {"kv_dtype": "int8"}}, {"commit": "another"}, {"prompts": "text"}):
        assert front_share([direct | change, front]) == []


def test_quantised_weights_are_compared_with_the_same_load() -> None:
    plain, quantised = (
        result("server", 1.0, settings={"kv_dtype": "int8", **more}) for more in ({}, {"weight_dtype": "fp8"})
    )
    quantised["runs"][0]["requests_per_second"] = 1.26 * 33.3
    gain = "1.26 times the requests/s of unquantised weights: kv_dtype int8, weight_dtype fp8"
    assert weights_gain([plain, quantised])[0] == f"{gain} (llama-7b, workload_2000 at 200/s)."
    for change in ({"settings": {}}, {"commit": "another"}, {"system": "engine"}, {"protocol": "http"}):
        assert weights_gain([plain | change, quantised]) == []


def test_what_was_asked_otherwise_is_stored_under_another_name() -> None:
    one = result("server", 1.0)
    at_once = result("server", 1.0)
    at_once["runs"][0]["request_rate"] = None
    changes: list[dict[str, Any]] = [
        {"system": "engine"}, {"settings": {"kv_dtype": "int8"}}, {"prompts": "text"}, {"protocol": "http"},
        {"protocol": "openai"},
        {"streaming": False}, {"concurrency": 4}, {"max_tokens": 4}, {"workload": "64x64_after_2000"},
        {"runs": one["runs"] * 2}, {"runs": at_once["runs"]},
    ]  # fmt: skip
    paths = {result_path(one), *(result_path(one | change) for change in changes)}
    assert len(paths) == 1 + len(changes)
    assert result_path(one).name == "serving_llama-7b_server_workload_2000_rate_200_nvidia_h200.json"


def test_a_sweep_has_a_plot_and_each_run_its_timeline(tmp_path: Path) -> None:
    moment = {"running_requests": 3, "queued_requests": 2, "kv_tokens_used": 9, "kv_tokens_cached": 0}
    moments = [{"at": float(at), "kv_tokens_total": 10, **moment} for at in range(3)]
    sweep = result("server", 1.0)
    [run] = sweep["runs"]
    run |= {"timeline": moments, "end_to_end": LATENCY}
    sweep["runs"] = [run, run | {"request_rate": None}]
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(sweep))
    written = write_plots(path)
    assert [plot.name for plot in written] == ["sweep.sweep.png", "sweep.timeline.200.png", "sweep.timeline.inf.png"]
    before = [plot.read_bytes() for plot in written]
    assert before[1] != before[2]
    assert [plot.read_bytes() for plot in write_plots(path)] == before
