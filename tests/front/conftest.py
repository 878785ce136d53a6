# SPDX-License-Identifier: Apache-2.0
"""The front with a pretended engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lightllm_backend.config import EngineConfig
from lightllm_backend.front.state import Front
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_client.chat import ChatTemplate
from tests.front.pretended import TEMPLATE, Caller, PretendedClient, chunk

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def front_without_client() -> Front:
    tokenizer = Tokenizer.load(DATA / "byte_level")
    lengths = LengthLimits.of(EngineConfig(), 64)
    return Front(EngineConfig(), "tiny", None, tokenizer, lengths, ChatTemplate(TEMPLATE, {}))  # type: ignore[arg-type]


@pytest.fixture
def client() -> PretendedClient:
    return PretendedClient([chunk("Hel", 10), chunk("lo", 11, 12, finish_reason="stop")])


@pytest.fixture
def front(front_without_client: Front, client: PretendedClient) -> Front:
    return replace(front_without_client, client=client)


@pytest.fixture
def call(front: Front) -> Caller:
    return Caller(front)
