# SPDX-License-Identifier: Apache-2.0
"""The page on replicas against the configuration of the proxy, the client and the stored results."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lightllm_client import retries
from perf.replicas.page import updated

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "replicas.md").read_text(encoding="utf-8")
CONFIGURATION = (ROOT / "deploy" / "proxy" / "haproxy.cfg").read_text(encoding="utf-8")


def test_the_results_are_the_stored_ones() -> None:
    assert updated(PAGE) == PAGE, "run python -m perf.replicas page"


def setting(name: str) -> str:
    """A setting of the proxy that stands once in its file, or the same each time."""
    [value] = set(re.findall(rf"^\s+{name} (.+)$", CONFIGURATION, flags=re.MULTILINE))
    return value


def test_the_limits_are_those_of_the_configuration() -> None:
    idle, interval = (int(setting(f"srvtcpka-{name}").removesuffix("s")) for name in ("idle", "intvl"))
    assert f"open connections end after {idle + interval * int(setting('srvtcpka-cnt'))} s" in PAGE
    assert f"more than {int(setting('hash-balance-factor')) / 100:g} times the average" in PAGE
    assert f"at most {int(setting('tune.bufsize')) >> 10} KiB" in PAGE
    assert f"ends after {setting('timeout client').removesuffix('s')} s (`timeout client`)" in PAGE
    assert f"has {setting('timeout check').removesuffix('s')} s** (`timeout check`)" in PAGE
    assert "after two failed probes, back after the first" in PAGE
    assert " fall 2 rise 1 " in CONFIGURATION


def test_the_ports_are_those_of_the_configuration() -> None:
    ports = dict(re.findall(r"presetenv LISTEN_(\w+) (\d+)", CONFIGURATION))
    assert (
        f"gRPC at {ports['GRPC']}, Triton server's HTTP at {ports['HTTP']}, OpenAI's API at {ports['OPENAI']}" in PAGE
    )
    assert f"`:{ports['METRICS']}/metrics`" in PAGE


def test_every_backend_lists_the_same_replicas() -> None:
    backends = re.split(r"^backend ", CONFIGURATION, flags=re.MULTILINE)[1:]
    assert len(backends) == 6
    assert {tuple(re.findall(r'server (replica-\d) "\$\{REPLICA_(\d)\}', one)) for one in backends} == {
        tuple((f"replica-{number}", str(number)) for number in range(1, 5))
    }


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "proxy" / "nginx.conf").read_text(encoding="utf-8")
    folders = "".join(
        f"{name}_temp_path {tmp_path}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    changed = tmp_path / "nginx.conf"
    changed.write_text(f"pid {tmp_path}/pid;\n" + text.replace("http {", f"http {{ {folders}", 1), encoding="utf-8")
    run = subprocess.run(["nginx", "-t", "-e", "stderr", "-c", changed], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ports = dict(re.findall(r"presetenv LISTEN_(\w+) (\d+)", CONFIGURATION))
    assert re.findall(r"listen (\d+)", text) == [ports[name] for name in ("GRPC", "HTTP", "OPENAI")]


def test_the_retries_are_those_of_the_client() -> None:
    first, most = retries.FIRST_PAUSE_SECONDS, retries.MAX_PAUSE_SECONDS
    assert f"after {first:g} s, then after twice as long each time up to {most:g} s" in PAGE
    assert f"`max_retries` is {retries.MAX_RETRIES}" in PAGE
    assert retries.JITTER == 0.25
    assert "shortened by up to a quarter" in PAGE
