# SPDX-License-Identifier: Apache-2.0
"""An engine on two hosts, which are network namespaces: the same tokens, and it survives the loss of a host."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightllm_backend.messages.engine_messages import ENGINE_STOPPED
from lightllm_backend.request import SamplingParams
from lightllm_backend.worker.host_group import LOST_SECONDS
from tests.polling import poll
from tests.runner.engine_harness import save_random_llama, transformers_greedy
from tests.worker.process_harness import TIMEOUT, Engine, Pending, configuration, further_host, kill_all, started
from tests.worker.two_hosts import Host, NoNamespaces, two_hosts

TOKENIZER = Path(__file__).parents[1] / "data" / "llama" / "tokenizer.json"
PROMPTS = [[5], [17, 3, 98, 42, 7], list(range(20, 61))]
GREEDY = SamplingParams(max_tokens=12)
ENDLESS = SamplingParams(max_tokens=8000, ignore_eos=True)
BUSY_SECONDS = 60.0  # more, on a machine that is busy with other things

# Ends a process that unpickles anything but plain data. Python imports it at start.
NO_PICKLE = r"""
import os, sys
def refuse(event, arguments):
    if event == "pickle.find_class":
        os.write(2, f"unpickled: {arguments}\n".encode())
        os._exit(77)
sys.addaudithook(refuse)
os.write(2, b"unpickling is refused\n")
"""


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with contextlib.ExitStack() as stack:
        try:
            pair = stack.enter_context(two_hosts())
        except NoNamespaces as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield pair


def runs(engine: Engine) -> Pending:
    """A request that has begun and would go on for long."""
    pending = engine.submit(PROMPTS[0], ENDLESS)
    assert pending.started.wait(TIMEOUT)
    return pending


def test_two_hosts_lose_each_other_and_meet_again(hosts, tmp_path: Path, monkeypatch) -> None:
    first, second = hosts
    (tmp_path / "sitecustomize.py").write_text(NO_PICKLE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    model, log = tmp_path / "model", tmp_path / "log"
    save_random_llama(model, num_attention_heads=4, hidden_size=64, vocab_size=517, max_position_embeddings=8192)
    shutil.copy(TOKENIZER, model)
    expected = transformers_greedy(model, PROMPTS, GREEDY.max_tokens)
    config = configuration(
        model,
        2,
        nnodes=2,
        master_addr=first.address,
        worker_python=first.python(tmp_path / "python"),
        max_total_token_num=8192,
    )
    process = further_host(config, log, second.inside())
    try:
        with started(config) as engine:
            assert [answer.tokens for answer in engine.answer(PROMPTS, GREEDY)] == expected

            pending = runs(engine)
            second.plug(is_in=False)
            began = time.monotonic()
            assert pending.ended.wait(TIMEOUT)
            assert time.monotonic() - began < LOST_SECONDS + BUSY_SECONDS
            assert str(pending.chunks[-1].error) == str(ENGINE_STOPPED)
            assert poll(lambda: "host 0 is lost: " in log.read_text(), LOST_SECONDS + BUSY_SECONDS), "it notices, too"
            assert process.poll() is None
            second.plug(is_in=True)
            engine.client.wait_ready(TIMEOUT)
            assert [answer.tokens for answer in engine.answer(PROMPTS, GREEDY)] == expected

            pending = runs(engine)
            kill_all(process)
            assert pending.ended.wait(BUSY_SECONDS)
            assert str(pending.chunks[-1].error) == str(ENGINE_STOPPED)
    finally:
        if process.poll() is None:
            kill_all(process)
    assert "unpickling is refused" in log.read_text()
    assert "unpickled: " not in log.read_text()
