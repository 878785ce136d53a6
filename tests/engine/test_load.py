# SPDX-License-Identifier: Apache-2.0
"""Which device a rank takes, on machines with and without GPUs."""

from __future__ import annotations

import os

import pytest
import torch

from lightllm_backend.config import ConfigError, EngineConfig
from lightllm_backend.engine.load import choose_device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine that says it has them; the list is what becomes the current one."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the number of threads is set to; the machine has six cores."""
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    return chosen


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_has_a_gpu_of_its_own(two_gpus, rank) -> None:
    assert choose_device(EngineConfig(tp=2), rank) == torch.device("cuda", rank)
    assert two_gpus == [rank]


def test_more_ranks_than_gpus_are_refused(two_gpus) -> None:
    with pytest.raises(ConfigError, match="tp is 3; allowed: at most 2, the number of GPUs that PyTorch finds"):
        choose_device(EngineConfig(tp=3), 0)
    assert two_gpus == []


@pytest.mark.parametrize(("tp", "expected"), [(1, 6), (2, 3), (4, 1), (8, 1)])
def test_ranks_share_the_cores(two_gpus, threads, tp, expected) -> None:
    assert choose_device(EngineConfig(tp=tp, device="cpu"), tp - 1) == torch.device("cpu")
    assert threads == [expected]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device is 'cuda', but PyTorch finds no GPU"):
        choose_device(EngineConfig(device="cuda"), 0)
