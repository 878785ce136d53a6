# SPDX-License-Identifier: Apache-2.0
"""An engine that counts: the real loop, Router and server on a real socket, with a runner without a model."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lightllm_backend.config import EngineConfig
from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.grammar.compiler import GrammarCompiler, ModelVocabulary
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.messages.engine_load import EngineLoad
from lightllm_backend.messages.engine_messages import EngineInfo
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.request import Request, SamplingParams, TokenChunk
from lightllm_backend.router.batch import Batch, StepResult
from lightllm_backend.text.tokenizer import TokenizerError
from lightllm_backend.worker.batch_channel import BatchSender
from lightllm_backend.worker.loop import run
from lightllm_backend.worker.main import build_router
from lightllm_backend.worker.server import EngineServer
from lightllm_backend.worker.statistics_log import StatisticsLog
from lightllm_backend.worker.structured_output import StructuredOutput

VOCAB_SIZE = 1000
EOS_ID = 999
POOL_TOKENS = 500
INFO = EngineInfo(
    model="counting", dtype="float32", device="cpu", vocab_size=VOCAB_SIZE, eos_ids=(EOS_ID,),
    lengths=LengthLimits(50, "max_req_input_len", 400, "max_req_total_len"), pool_tokens=POOL_TOKENS, memory={},
)  # fmt: skip


class CountingRunner:
    """The next token is the last one + 1. `gate`, when clear, holds every step; `failure` is raised by the next one."""

    def __init__(self, overlap: int, is_gated: bool = False) -> None:
        self.overlap = overlap
        self.is_gated = is_gated
        self._unreleased: list[threading.Event] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.step_seconds = 0.0
        self.num_launched = 0
        self.most_in_flight = 0
        self._in_flight = 0
        self._last: dict[int, int] = {}  # by row of the request table
        self._structured: set[int] = set()  # rows

    def launch(self, batch: Batch) -> Any:
        self.num_launched += 1
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        for admission in batch.admitted:
            self._last[admission.row] = (admission.prompt_ids + admission.generated_ids)[-1]
            self._structured.discard(admission.row)
            if admission.sampling.structured_output:
                self._structured.add(admission.row)
        tokens = []
        for row in batch.rows[batch.samples].tolist():
            self._last[row] += 1
            tokens.append(self._last[row])
        result = StepResult(np.array(tokens, np.int32), -np.array(tokens, np.float32))
        num_structured = len(self._structured.intersection(batch.rows[batch.samples].tolist()))
        masks = np.zeros((num_structured, -(-VOCAB_SIZE // 32)), dtype=np.int32) if num_structured else None
        released = threading.Event()
        if masks is None:
            released.set()
        else:
            self._unreleased.append(released)
        return SimpleNamespace(result=lambda: self._finish(result, released), is_done=self.gate.is_set, masks=masks)

    def release(self, _: Any) -> None:
        """Masks make no difference to a number."""
        self._unreleased.pop(0).set()

    def release_all(self) -> None:
        for released in self._unreleased:
            released.set()

    def _finish(self, result: StepResult, released: threading.Event) -> StepResult:
        self._in_flight -= 1
        time.sleep(self.step_seconds)
        assert self.gate.wait(60)
        assert released.wait(60)
        if self.failure:
            raise self.failure
        return result


class CountingEngine:
    """A worker in a thread. `stop` is what the death of its supervisor does to it."""

    def __init__(
        self,
        address: str,
        overlap: int = 0,
        pool_tokens: int = POOL_TOKENS,
        batch_max_tokens: int = 64,
        structured: StructuredOutput | None = None,
        is_gated: bool = False,
        **settings: Any,
    ) -> None:
        self.runner = CountingRunner(overlap, is_gated)
        self._structured = structured
        info = replace(INFO, pool_tokens=pool_tokens)
        self.router = build_router(EngineConfig(max_req_input_len=50, **settings), info, batch_max_tokens)
        self.error: Exception | None = None
        self.may_load_tokenizer = threading.Event()  # when clear, holds whatever is to be compiled
        self.may_load_tokenizer.set()
        self.server: EngineServer
        read_end, self._parent_pipe = os.pipe()
        self.server = EngineServer(address, INFO, read_end)
        self.vitals = Vitals(Path(address).parent, "worker-0")
        self.load = EngineLoad(Path(address).parent)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            statistics, followers, structured = StatisticsLog(0), BatchSender("", 0), self.structured_output()
            run(
                self.server, self.router, followers, self.runner, statistics, self.vitals, self.load, structured  # type: ignore[arg-type]
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 (tests look at it)
            self.error = error
        finally:
            self.server.close()
            self.vitals.close()

    def structured_output(self) -> StructuredOutput:
        if self._structured is not None:
            return self._structured
        return StructuredOutput(GrammarCompiler(self._no_vocabulary), self.server.wake)

    def _no_vocabulary(self) -> ModelVocabulary:
        assert self.may_load_tokenizer.wait(10)
        raise TokenizerError("numbers are no text")

    def stop(self) -> None:
        self.runner.gate.set()
        self.may_load_tokenizer.set()
        with contextlib.suppress(OSError):
            os.close(self._parent_pipe)
        self._thread.join(60)
        assert not self._thread.is_alive()


class Answer:
    """What one request gets."""

    def __init__(self, client: EngineClient, prompt: list[int], deadline: float | None = None, **sampling: Any) -> None:
        self.chunks: list[TokenChunk] = []
        self.ended = threading.Event()
        self._queue: queue.Queue[TokenChunk] = queue.Queue()
        self.uid = client.new_uid()
        client.submit(Request(self.uid, tuple(prompt), SamplingParams(**sampling), deadline), self._on_chunk)

    def _on_chunk(self, chunk: TokenChunk) -> None:
        self.chunks.append(chunk)
        self._queue.put(chunk)
        if chunk.finish_reason is not None:
            self.ended.set()

    def next(self) -> TokenChunk:
        return self._queue.get(timeout=60)

    def wait(self) -> Answer:
        """All of it; the request has ended exactly once."""
        assert self.ended.wait(60)
        assert [chunk.finish_reason is not None for chunk in self.chunks] == [False] * (len(self.chunks) - 1) + [True]
        return self

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def last(self) -> TokenChunk:
        return self.chunks[-1]


@contextlib.contextmanager
def counting_engine(
    directory: Path, overlap: int = 0, pool_tokens: int = POOL_TOKENS, **settings: Any
) -> Iterator[tuple[CountingEngine, EngineClient]]:
    address = str(directory / "engine")
    engine = CountingEngine(address, overlap, pool_tokens, **settings)
    client = EngineClient(address)
    try:
        client.wait_ready(10)
        yield engine, client
    finally:
        engine.stop()
        client.close()
