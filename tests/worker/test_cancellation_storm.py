# SPDX-License-Identifier: Apache-2.0
"""Cancellation in every state and by every way below Triton server; cancellation_storm.py runs many more."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightllm_backend.generation import stream as stream_module
from lightllm_backend.generation import streams as streams_module
from tests.worker.cancellation_storm import WAYS, Storm

STATES = {"queued", "prefilling", "running", "preempted", "constrained", "stream in flight"}


def test_nothing_is_left_of_requests_that_are_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (stream_module, streams_module):
        monkeypatch.setattr(module, "CHECK_SECONDS", module.CHECK_SECONDS)  # the storm changes it
    storm = Storm(tmp_path, seed=1)
    try:
        storm.run(300, doomed_every=50, killed_every=200)
        for _ in range(8):  # more of them, should a rare state not have been met yet
            if set(storm.states) >= STATES:
                break
            storm.run(100, doomed_every=50, killed_every=200)
        left = storm.come_to_rest()
        assert left == {}
        assert storm.most_steps <= 2, "slots are free within two steps of the news"
        assert set(storm.ways) == {*WAYS, "none", "channel closed", "process killed"}
        assert set(storm.states) >= STATES
    finally:
        storm.close()
