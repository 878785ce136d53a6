# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile without a container engine: its instructions, and a build with stand-ins for the installers."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lightllm_backend.launch.embedded_model import REQUIREMENT

ROOT = Path(__file__).parent.parent
INSTALLERS = ("apt-get", "python3", "useradd", "rm")


def instructions() -> list[tuple[str, str]]:
    """The instructions' names and arguments, with continued lines joined and comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (name, " ".join(rest.split()))
        for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def arguments_of(instruction: str) -> list[str]:
    return [rest for name, rest in instructions() if name == instruction]


def copied() -> list[tuple[list[str], str]]:
    return [(words[:-1], words[-1]) for words in (rest.split() for rest in arguments_of("COPY"))]


def test_it_is_built_on_nvidia_s_server_of_a_version_that_can_be_chosen() -> None:
    assert instructions()[0] == ("ARG", "TRITON_SERVER=24.10")
    assert arguments_of("FROM") == ["nvcr.io/nvidia/tritonserver:${TRITON_SERVER}-py3"]


def test_what_is_copied_exists_and_is_part_of_the_build_context() -> None:
    ignored, *exceptions = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert ignored == "*"
    for sources, _ in copied():
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source.removeprefix('./')}" in exceptions, source


@pytest.mark.parametrize("command", arguments_of("RUN"))
def test_a_step_is_valid_shell(command: str) -> None:
    subprocess.run(["bash", "-n", "-c", command], check=True, timeout=10)


def test_the_steps_run_in_order_and_install_what_they_should(tmp_path: Path) -> None:
    """COPY, WORKDIR, ARG and ENV are carried out; the installers write down how they were called."""
    log = tmp_path / "calls"
    for program in INSTALLERS:
        path = tmp_path / "programs" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "{program} $*" >>{log}\n')
        path.chmod(0o755)
    variables = {"PATH": f"{tmp_path / 'programs'}:{os.environ['PATH']}"}
    directory = tmp_path
    for name, rest in instructions():
        if name in ("ARG", "ENV"):
            variables |= dict(pair.split("=", 1) for pair in rest.split())
        elif name == "WORKDIR":
            directory = tmp_path / "image" / rest.lstrip("/")
            directory.mkdir(parents=True)
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copy(ROOT / source, directory / target)
        elif name == "RUN":
            subprocess.run(["sh", "-c", rest], cwd=directory, env=variables, check=True, timeout=30)
    called = log.read_text().splitlines()
    installed = [call.removeprefix("python3 -m pip install ") for call in called if call.startswith("python3 ")]
    assert installed == [
        "torch==2.10.0",
        "--requirement requirements-image.txt",
        f"--no-deps {REQUIREMENT}",
        "--no-deps --config-settings editable_mode=compat --editable . --editable ./client",
    ]
    assert re.fullmatch(r"numpy==1\.\d+\.\d+\n", (directory / "constraints.txt").read_text())
    assert variables["PIP_CONSTRAINT"] == f"/{directory.relative_to(tmp_path / 'image')}/constraints.txt"
    in_image = (directory / "requirements-image.txt").read_text()
    assert "nvidia-pytriton==" not in in_image
    assert "transformers==" in in_image
    assert {"lightllm_backend", "client", "model_repository", "pyproject.toml"} <= {p.name for p in directory.iterdir()}


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def test_it_does_not_run_as_root() -> None:
    (user,) = arguments_of("USER")
    assert user not in ("root", "0")
    assert f"--uid {user} " in " ".join(arguments_of("RUN"))
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    assert names.index("USER") < names.index("ENTRYPOINT")


def test_its_ports_its_entry_point_and_its_health_check() -> None:
    assert arguments_of("EXPOSE") == ["8000 8001 8002"]
    entry_point = json.loads(arguments_of("ENTRYPOINT")[0])
    assert entry_point == ["python3", "-m", "lightllm_backend.serve", "--host", "0.0.0.0"]
    health = ast.literal_eval(arguments_of("HEALTHCHECK")[0].partition("CMD ")[2])
    assert health == ["lightllm", "health"]
    client_module = "lightllm_client.__main__"
    assert f'\nlightllm = "{client_module}:main"\n' in (ROOT / "client" / "pyproject.toml").read_text()
    for module in (entry_point[2], client_module):
        assert importlib.util.find_spec(module) is not None, module
