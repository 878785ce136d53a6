# SPDX-License-Identifier: Apache-2.0
"""How the ranks of several hosts meet: who may join, what must be the same, and what ends a connection."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from lightllm_backend.config import ConfigError, EngineConfig
from lightllm_backend.messages.engine_messages import Cancel
from lightllm_backend.worker import __main__ as worker_command
from lightllm_backend.worker import host_group, load
from lightllm_backend.worker.host_group import SHARED_SETTINGS, Card, join, lead, use_interface_of
from tests.free_ports import free_ports
from tests.polling import poll
from tests.runner.engine_harness import save_random_llama

CPU = torch.device("cpu")
LIMIT = 60.0


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(host_group, "RETRY_SECONDS", 0.05)


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    """Host 0 of two, with two ranks each."""
    (tmp_path / "config.json").write_text("{}")
    [port] = free_ports(1)
    return EngineConfig(model_dir=str(tmp_path), tp=4, nnodes=2, master_addr="127.0.0.1", master_port=port)


class Ranks:
    """Ranks that meet on threads of this process."""

    def __init__(self) -> None:
        self.losses: list[str] = []
        self._pool = ThreadPoolExecutor(8)

    def start(self, config: EngineConfig, rank: int, **facts: str) -> Future[Any]:
        own = replace(config, node_rank=rank // 2)
        card = Card.of(own, rank, str(config.model_dir), CPU)
        card.facts.update(facts)
        meet: Callable[..., Any] = join if rank else lead
        return self._pool.submit(meet, own, card, self.losses.append)


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


def test_all_meet_and_other_hosts_are_connected(config: EngineConfig, ranks: Ranks) -> None:
    store, connections = (futures := [ranks.start(config, rank) for rank in range(4)])[0].result(LIMIT)
    others = [future.result(LIMIT) for future in futures[1:]]
    store.set("message", "to all")
    assert [other.get("message") for other, _ in others] == [b"to all"] * 3
    assert [leader is not None for _, leader in others] == [False, True, True], "rank 1 is on host 0"
    for connection in connections:
        connection.channel.send(Cancel("uid"))
    assert [leader.channel.receive() for _, leader in others if leader] == [Cancel("uid")] * 2

    # The end of one side is told by the other one alone.
    leader = others[1][1]
    leader.unwatch()
    leader.channel.close()
    assert poll(lambda: ranks.losses, LIMIT)
    assert ranks.losses == [f"host 1 ({socket.gethostname()}, {config.model_dir}) is lost: its process has ended"]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"lightllm_backend": "0.0.1"},
            r"lightllm_backend is [\d.]+ \(source \w+\) on host 0 \(.+\) and 0.0.1 on host 1 \(.+\)",
        ),
        ({"kv_dtype": "int8"}, r"kv_dtype is auto on host 0 \(.+\) and int8 on host 1 \(.+\)"),
        (
            {"device": "GPU of compute capability 9.0", "max_total_token_num": "7"},
            r"device is cpu on .+ and GPU .+; max_total_token_num is None on host 0 .+ and 7 on host 1 .+",
        ),
    ],
)
def test_a_difference_is_an_error_on_both_hosts_that_names_both(config, ranks, facts, message) -> None:
    futures = [ranks.start(config, rank, **(facts if rank > 1 else {})) for rank in range(4)]
    for future in futures:
        with pytest.raises(ConfigError, match=f"^{message}$"):
            future.result(LIMIT)


def test_another_model_is_a_difference(config: EngineConfig, ranks: Ranks, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "model.safetensors").write_bytes(b"12345")
    elsewhere = replace(config, model_dir=str(other))
    futures = [ranks.start(config if rank < 2 else elsewhere, rank) for rank in range(4)]
    message = r"^model is config\.json \w+ with 0 .+ on host 0 .+ with 1 .+ of 5 bytes on .+other\)$"
    with pytest.raises(ConfigError, match=message):
        futures[0].result(LIMIT)


def test_who_comes_after_the_start_waits_for_the_next_one(config, ranks, caplog) -> None:
    caplog.set_level(logging.INFO, logger="lightllm.hosts")
    first = [ranks.start(config, rank) for rank in range(4)]
    assert all(future.result(LIMIT) for future in first)
    late = ranks.start(config, 2)
    assert poll(lambda: "rank 0 has begun without this rank 2 of host 1" in caplog.text, LIMIT)
    assert not late.done()
    del first  # rank 0's store ends with it
    second = [ranks.start(config, rank) for rank in (0, 1, 3)]
    assert all(future.result(LIMIT) for future in (*second, late))


def test_strangers_are_turned_away(config: EngineConfig, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_group, "VERDICT_SECONDS", 0.1)
    card = Card.of(replace(config, node_rank=1), 2, str(config.model_dir), CPU)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stranger, silent, member = (socket.create_connection(listener.getsockname()) for _ in range(3))
        stranger.sendall(b"x" * 32)
        member.sendall(card.id.encode())
        [connection] = host_group._accept(listener, [card], ranks.losses.append)
        connection.channel.send(Cancel("uid"))
        assert b"Cancel" in member.recv(100)
        assert stranger.recv(1) == silent.recv(1) == b""
        connection.unwatch()
    for one in (stranger, silent, member):
        one.close()


def test_a_rank_that_does_not_connect_ends_the_start(config, ranks, monkeypatch) -> None:
    monkeypatch.setattr(host_group, "CONNECT_SECONDS", 0.1)
    card = Card.of(replace(config, node_rank=1), 2, str(config.model_dir), CPU)
    message = r"^rank 2 of host 1 \(.+\) has not connected within 0.1 s$"
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ConnectionError, match=message):
        host_group._accept(listener, [card], ranks.losses.append)


def test_an_address_of_another_host_is_refused(config: EngineConfig, ranks: Ranks) -> None:
    elsewhere = replace(config, master_addr="192.0.2.7")
    with pytest.raises(ConfigError, match=r"cannot listen at 192\.0\.2\.7 port \d+: .+; allowed"):
        ranks.start(elsewhere, 0).result(LIMIT)


def test_the_interface_follows_from_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    use_interface_of("127.0.0.1")
    assert (os.environ["NCCL_SOCKET_IFNAME"], os.environ["GLOO_SOCKET_IFNAME"]) == ("=lo", "mine")


def test_every_setting_that_all_ranks_read_is_compared() -> None:
    """mem_fraction and device may differ: the pool has the minimum, and the devices themselves are compared."""
    source = Path(load.__file__).read_text(encoding="utf-8")
    read = set(re.findall(r"\bconfig\.(\w+)", source)) & set(EngineConfig.__dataclass_fields__)
    lengths = {"max_req_input_len", "max_req_total_len"}  # LengthLimits reads them
    assert read - {"mem_fraction", "device", "model_dir"} | lengths == set(SHARED_SETTINGS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: nnodes is 1; allowed: at least 2; one host alone runs the server"),
        (["--nnodes=2", "--tp=2", "--master_addr=h"], "error: node_rank is 0; allowed: 1 … 1; host 0 runs the server"),
        (["--nnodes=2", "--tp=2", "--node-rank=1"], "error: master_addr is not set; allowed: the address of host 0"),
        (["--nnodes=2", "--tp=2", "--node_rank=1", "--master_addr=h", "--model_dir=/nowhere"], "error: /nowhere: "),
    ],
)
def test_a_wrong_setting_is_one_line_and_code_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(worker_command.command, arguments, env={"LIGHTLLM_MODEL_DIR": None})
    assert result.exit_code == 2
    assert result.output.startswith(message)
    assert result.output.count("\n") == 1


def test_weights_that_cannot_be_read_are_told_at_once(tmp_path: Path) -> None:
    save_random_llama(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    arguments = ["--nnodes=2", "--tp=2", "--node_rank=1", "--master_addr=h", f"--model_dir={tmp_path}"]
    result = CliRunner().invoke(worker_command.command, arguments)
    assert result.exit_code == 2
    assert result.output.startswith(f"error: {tmp_path / 'model.safetensors'}: cannot be read: ")
    assert result.output.count("\n") == 1
