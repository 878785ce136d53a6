# SPDX-License-Identifier: Apache-2.0
"""The security page against the code: settings, options, paths, and the command that runs the container."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from lightllm_backend.config import _OTHER_VARIABLES, ADMINISTRATION_APIS, ENVIRONMENT_PREFIX, EngineConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_every_setting_that_is_named_exists_with_this_default() -> None:
    named = {"max_prompt_bytes", "max_queue_size", "trust_remote_code", "host", "open_apis"}
    assert {name for name in named if f"`{name}`" in PAGE or f"--{name} " in PAGE} == named
    assert named <= set(EngineConfig.__dataclass_fields__)
    config = EngineConfig()
    assert (config.max_prompt_bytes, config.host) == (2**20, "127.0.0.1")
    assert not config.trust_remote_code
    assert not config.open_apis
    variables = re.findall(rf"`{ENVIRONMENT_PREFIX}(\w+)`", PAGE)
    assert variables
    assert set(variables) <= _OTHER_VARIABLES


def test_the_closed_apis_are_listed() -> None:
    [listed] = re.findall(r"The launch command closes (.*?), over HTTP", PAGE)
    assert tuple(re.findall(r"`([\w-]+)`", listed)) == ADMINISTRATION_APIS
    examples = re.findall(r"--open_apis (\S+)", PAGE)
    assert examples
    assert set(examples) <= set(ADMINISTRATION_APIS)


def test_the_container_is_the_dockerfile_s() -> None:
    assert f"Triton server {re.findall(r'^ARG TRITON_SERVER=(.*)$', DOCKERFILE, re.MULTILINE)[0]}" in PAGE
    assert f"user {re.findall(r'^USER (.*)$', DOCKERFILE, re.MULTILINE)[0]}" in PAGE
    arguments = re.findall(r"--build-arg (\w+)=(\S+?)[`\s]", PAGE)
    assert {name for name, _ in arguments} <= set(re.findall(r"^ARG (\w+)=", DOCKERFILE, re.MULTILINE))
    assert all(f"{value}" in DOCKERFILE for _, value in arguments)
    [command] = re.findall(r"^\$ (docker run .*?)\n```", PAGE, re.MULTILINE | re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    assert "--read-only" in words
    assert "lightllm-home:/home/lightllm" in words
    assert "useradd --create-home --uid 10001 --gid 10001 lightllm" in DOCKERFILE


def test_the_commands_of_build_sh_exist() -> None:
    commands = set(re.findall(r"\./build\.sh (\w+)", PAGE))
    assert commands >= {"audit", "lock", "sbom", "serve"}
    build = (ROOT / "build.sh").read_text(encoding="utf-8")
    assert [name for name in commands if f"\n{name}() {{" not in build] == []
