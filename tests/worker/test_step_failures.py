# SPDX-License-Identifier: Apache-2.0
"""A step that fails in a real worker process: every request ends at once, and the engine comes back."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from lightllm_backend.request import SamplingParams
from tests.polling import poll
from tests.runner.engine_harness import save_random_llama
from tests.worker.process_harness import TIMEOUT, configuration, started, workers

RUNNING, QUEUED = 8, 4  # as process_harness configures it
AT_ONCE_SECONDS = 20.0  # on a machine that is busy with other things

# In place of the interpreter: a worker whose next step on one rank fails once the file `fault` says how.
WORKER = """#!{python}
import runpy, sys
from pathlib import Path

import torch
from lightllm_backend.runner.model_runner import ModelRunner

fault, launch = Path({folder!r}, "fault"), ModelRunner.launch
rank = sys.argv[-1]

def failing_launch(self, batch):
    if fault.exists() and fault.read_text().split(":")[0] == rank:
        _, kind, message = fault.read_text().split(":")
        fault.unlink()
        raise {{"RuntimeError": RuntimeError, "OutOfMemoryError": torch.OutOfMemoryError}}[kind](message)
    return launch(self, batch)

ModelRunner.launch = failing_launch
sys.argv = sys.argv[2:]
runpy.run_module("lightllm_backend.worker.main", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("tp", "rank", "kind", "message"),
    [(1, 0, "OutOfMemoryError", "CUDA out of memory"), (2, 1, "RuntimeError", "a kernel failed")],
)
def test_a_step_that_fails_ends_every_request_at_once_and_the_engine_comes_back(
    tmp_path: Path, tp: int, rank: int, kind: str, message: str
) -> None:
    script, fault = tmp_path / "python", tmp_path / "fault"
    script.write_text(WORKER.format(python=sys.executable, folder=str(tmp_path)), encoding="utf-8")
    script.chmod(0o755)
    directory = save_random_llama(tmp_path / "llama", num_attention_heads=4, hidden_size=64)
    long = SamplingParams(max_tokens=100, ignore_eos=True)
    with started(configuration(directory, tp, worker_python=str(script))) as engine:
        [before] = engine.answer([[5, 6, 7]], long)
        pids = set(engine.supervisor.pids)
        pending = [engine.submit([number], long) for number in range(RUNNING + QUEUED)]
        assert pending[0].started.wait(TIMEOUT)
        fault.write_text(f"{rank}:{kind}:{message}")
        assert poll(lambda: not fault.exists(), TIMEOUT)
        began = time.monotonic()
        for one in pending:
            assert one.ended.wait(AT_ONCE_SECONDS)
        assert time.monotonic() - began < AT_ONCE_SECONDS
        errors = {str(one.chunks[-1].error) for one in pending}
        if rank == 0:
            assert errors == {f"INTERNAL: the engine failed: {kind}: {message}"}
        else:
            assert all(error.startswith(("INTERNAL: ", "UNAVAILABLE: ")) for error in errors), errors
        assert poll(lambda: not any(map(psutil.pid_exists, pids)), TIMEOUT)
        engine.client.wait_ready(TIMEOUT)
        assert not pids & set(engine.supervisor.pids)
        [after] = engine.answer([[5, 6, 7]], long)
        assert after.tokens == before.tokens
    assert workers() == []
