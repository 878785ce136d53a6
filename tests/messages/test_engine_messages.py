# SPDX-License-Identifier: Apache-2.0
"""Each message between an EngineClient and a worker arrives as it was sent."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lightllm_backend.lengths import LengthLimits
from lightllm_backend.messages.channel import Channel, Message, listen
from lightllm_backend.messages.engine_messages import (
    Cancel,
    CloseEngine,
    EngineInfo,
    Ready,
    Stats,
    Stop,
    Submit,
    Tokens,
)
from lightllm_backend.request import FinishReason, Request, RequestError, SamplingParams, TokenChunk
from lightllm_backend.router.statistics import EngineStats


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[Channel, Channel]]:
    listener = listen(str(tmp_path / "s"))
    near = Channel.connect(str(tmp_path / "s"))
    far = Channel.accept(listener)
    listener.close()
    yield near, far
    near.close()
    far.close()


def over_the_wire(ends: tuple[Channel, Channel], message: Message) -> Message:
    ends[0].send(message)
    return ends[1].receive()


@pytest.mark.parametrize(
    "request_",
    [
        Request("u", (1, 2, 3), SamplingParams()),
        Request(
            "ü-1",
            (0, 2**31 - 1),
            SamplingParams(
                max_tokens=7, do_sample=True, temperature=0.5, top_p=0.25, top_k=3, min_p=0.5, presence_penalty=-1.0,
                frequency_penalty=0.5, repetition_penalty=2.0, seed=2**64 - 1, min_tokens=2, ignore_eos=True,
                stop_words=("a", "🎉"), logit_bias=((5, -100.0), (0, 0.5)), return_log_probs=True, top_logprobs=20,
            ),
            deadline=12.5,
            urgent=True,
            tenant="Ünit 7",
            priority=-3,
        ),
    ],
)  # fmt: skip
def test_a_request_arrives_as_it_was(ends: tuple[Channel, Channel], request_: Request) -> None:
    message = Submit(request_, 2**39)
    assert over_the_wire(ends, message) == message


@pytest.mark.parametrize(
    "chunk",
    [
        TokenChunk("u", [1, 2], [-0.5, -1.25], None, 5, 0.25),
        TokenChunk("u", [], [], FinishReason.LENGTH, 5),
        TokenChunk("u", [7], [], FinishReason.STOP),
        TokenChunk("u", [7, 8], [-0.5, -1.0], top_log_probs=bytes(range(32))),
    ],
)
def test_a_chunk_arrives_as_it_was(ends: tuple[Channel, Channel], chunk: TokenChunk) -> None:
    assert tokens_over_the_wire(ends, chunk).chunks == [(3, chunk)]


def test_a_chunk_s_error_arrives_with_its_code(ends: tuple[Channel, Channel]) -> None:
    sent = TokenChunk("u", [], [], FinishReason.CANCELLED, error=RequestError("CANCELLED", "the deadline: passed"))
    [(_, arrived)] = tokens_over_the_wire(ends, sent).chunks
    assert arrived.error is not None
    assert (arrived.error.code, arrived.error.message) == ("CANCELLED", "the deadline: passed")
    assert arrived.finish_reason is FinishReason.CANCELLED


def tokens_over_the_wire(ends: tuple[Channel, Channel], *chunks: TokenChunk) -> Tokens:
    message = Tokens(np.array([5, 2**39]), np.array([7, 2**31 - 1], np.int32), [(3, chunk) for chunk in chunks])
    arrived = over_the_wire(ends, message)
    assert isinstance(arrived, Tokens)
    return arrived


def test_tokens_arrive_as_arrays(ends: tuple[Channel, Channel]) -> None:
    arrived = tokens_over_the_wire(ends)
    assert (arrived.numbers.dtype, arrived.numbers.tolist()) == (np.int64, [5, 2**39])
    assert (arrived.token_ids.dtype, arrived.token_ids.tolist()) == (np.int32, [7, 2**31 - 1])
    assert arrived.chunks == []


LENGTHS = LengthLimits(50, "max_req_input_len", 400, "the model's limit")


@pytest.mark.parametrize(
    "message",
    [
        Cancel("u"),
        Stop("u"),
        CloseEngine("a step is dead", drain=True),
        Ready(EngineInfo("m", "float32", "cpu", 10, (2, 3), LENGTHS, 500, {"weights": 1})),
        Stats(EngineStats(queued_requests=1, device_seconds_total=0.5)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_every_other_message_arrives_as_it_was(ends: tuple[Channel, Channel], message: Message) -> None:
    assert over_the_wire(ends, message) == message
