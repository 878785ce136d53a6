# SPDX-License-Identifier: Apache-2.0
"""What holds for all tests: the environment before torch or a kernel is imported, and time limits."""

import os
import re
from typing import Any

# Threads that spin at OpenMP's barriers take the core that the awaited thread needs (see generation/worker_group.py).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch
from xdist.scheduler import LoadFileScheduling

# A test that is slow for once, beside other work, is no failure.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

HAS_GPU = torch.cuda.is_available()
collect_ignore = [] if HAS_GPU else ["gpu"]

# Without a GPU, kernels run in Triton-lang's interpreter.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Names of fixtures that start a server for a whole session, as the files that use them spell them.
FULL_SERVER = re.compile(r"\bfull_(server|client)\b")
SHORT_SERVERS = re.compile(r"\b(small_)?(server: TritonServer|client: LightLLMClient)\b")


class ServerScheduling(LoadFileScheduling):
    """Runs a file on one of the processes of pytest-xdist, and all files that share a server on the same one."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        if not file.startswith("tests/e2e/"):
            return file
        source = (self.config.rootpath / file).read_text(encoding="utf-8")
        if FULL_SERVER.search(source):
            return "full server"
        return "short servers" if SHORT_SERVERS.search(source) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ServerScheduling:
    return ServerScheduling(config, log)


# What takes longest, so that the processes of pytest-xdist end with many small files, at about the same time.
FIRST = ("tests/kernels/test_kernel_compile.py", "tests/e2e/", "tests/worker/", "tests/perf/", "tests/runner/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with FIRST."""
    items.sort(key=lambda item: next((at for at, path in enumerate(FIRST) if item.nodeid.startswith(path)), len(FIRST)))


def pytest_report_header() -> str | None:
    return None if HAS_GPU else "without an NVIDIA GPU: tests/gpu is left out"
