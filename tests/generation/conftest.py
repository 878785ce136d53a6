# SPDX-License-Identifier: Apache-2.0
"""The streams of a process, with stand-ins around them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightllm_backend.generation import stream as stream_module
from lightllm_backend.generation import streams as streams_module
from lightllm_backend.generation.stream import Stream
from lightllm_backend.generation.streams import Streams
from lightllm_backend.text.tokenizer import Tokenizer
from tests.generation.stand_ins import SEAL, FakeEngine, FakeObserver


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(Path(__file__).parents[1] / "data" / "byte_level")


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def streams(engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    for module in (stream_module, streams_module):
        monkeypatch.setattr(module, "CHECK_SECONDS", 0.02)
    made = Streams(engine, FakeObserver(), str(tmp_path / "returns"), SEAL)  # type: ignore[arg-type]
    yield made
    made.close()


@pytest.fixture
def without_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which nobody would acknowledge a probe, so that a chunk that comes later would wait for ever."""
    monkeypatch.setattr(Stream, "check_client", lambda stream: False)
