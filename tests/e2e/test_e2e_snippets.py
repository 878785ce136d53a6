# SPDX-License-Identifier: Apache-2.0
"""What the documentation's pages show, run as they show it: commands of a shell and scripts, against a real server.

tests/docs/snippets.py finds the blocks; tests/docs/test_snippets.py sees that each of the others says who runs it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.docs.snippets import ROOT, SHELLS, matches, pages, to_run
from tests.e2e.front import FrontProcess
from tests.e2e.server import TritonServer

pytestmark = pytest.mark.e2e

LIMIT_SECONDS = 120
# The ports of the pages; LightLLM's own is 8080.
ADDRESS = re.compile(r"(?:127\.0\.0\.1|localhost):(8000|8001|8002|8080|9000)\b")


@pytest.fixture(scope="module")
def here(full_server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Puts the addresses of this test's servers in the place of the pages'."""
    front = FrontProcess(full_server, tmp_path_factory.mktemp("snippets") / "log").wait_ready()
    ports = {
        "8000": full_server.http_port,
        "8001": full_server.grpc_port,
        "8002": full_server.metrics_port,
        "8080": front.port,
        "9000": front.port,
    }
    try:
        yield lambda text: ADDRESS.sub(lambda found: f"127.0.0.1:{ports[found[1]]}", text)
    finally:
        front.stop()


@pytest.fixture(scope="module")
def environment(here: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the shell, whose curl fails for an error's status, and whose lightllm asks this server."""
    programs = tmp_path_factory.mktemp("programs")
    bodies = {
        "curl": 'PATH=${PATH#*:}; exec curl --silent --show-error --fail-with-body "$@"',
        "lightllm": f'command=$1; shift; exec {sys.executable} -m lightllm_client "$command" --url'
        f' {here("127.0.0.1:8001")} "$@"',
    }
    for name, body in bodies.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    python_path = os.pathsep.join([str(ROOT), str(ROOT / "client")])
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": python_path, "NO_PROXY": "127.0.0.1"}


def in_shell(command: str, expected: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    if expected:  # which may be an error's
        assert matches(done.stdout, expected), f"{command}\n{done.stdout}{done.stderr}"
    else:
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", [page for page in pages() if to_run(page)])
def test_what_a_page_shows(
    page: str, here: Callable[[str], str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for block in to_run(page):
        if block.language in SHELLS:
            for command, expected in block.commands:
                in_shell(here(command), expected, environment)
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(here(block.text), str(block), "exec"), {"__name__": "__main__"})  # noqa: S102
        if block.expected is None:
            assert output.getvalue(), f"{block} prints nothing"
        else:
            assert matches(output.getvalue(), block.expected), f"{block}\n{output.getvalue()}"
