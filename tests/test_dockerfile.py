# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile without a container engine: its instructions, and a build with stand-ins for the installers."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from string import Template

import pytest
from packaging.requirements import Requirement

from lightllm_backend.launch.embedded_model import REQUIREMENT

ROOT = Path(__file__).parent.parent
INSTALLERS = ("apt-get", "python3", "groupadd", "useradd", "rm")


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


def last_stage() -> list[tuple[str, str]]:
    names = [name for name, _ in instructions()]
    return instructions()[len(names) - names[::-1].index("FROM") :]


def copied() -> list[tuple[list[str], str]]:
    """The sources and the target of each COPY from the build context."""
    return [(words[:-1], words[-1]) for words in map(str.split, arguments_of("COPY")) if "--from" not in words[0]]


def test_it_is_built_on_nvidia_s_server_of_a_version_and_digest_that_can_be_chosen() -> None:
    assert instructions()[:2] == [("ARG", "TRITON_SERVER=26.10"), ("ARG", "TRITON_SERVER_DIGEST=")]
    server = "nvcr.io/nvidia/tritonserver:${TRITON_SERVER}-py3${TRITON_SERVER_DIGEST}"
    assert arguments_of("FROM") == [f"{server} AS server", "server AS build", "server"]


def test_the_image_has_the_result_of_the_build_alone() -> None:
    assert [rest for name, rest in last_stage() if name in ("COPY", "RUN", "ADD")] == [
        "--from=build /opt/lightllm /opt/lightllm"
    ]


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


@pytest.mark.parametrize("torch", ["", "torch==2.10.0"])
def test_the_steps_run_in_order_and_install_what_they_should(tmp_path: Path, torch: str) -> None:
    """COPY, WORKDIR, ARG and ENV are carried out, each stage in a root of its own; the installers write down how they
    were called."""
    log = tmp_path / "calls"
    for program in INSTALLERS:
        path = tmp_path / "programs" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "{program} $*" >>{log}\n')
        path.chmod(0o755)
    stage, roots, directory, variables = "", {"": tmp_path}, tmp_path, {"PATH": ""}
    for name, rest in instructions():
        if name == "FROM":
            stage = rest.partition(" AS ")[2] or "last"
            roots[stage] = directory = tmp_path / stage
            directory.mkdir()
            variables = {"PATH": f"{tmp_path / 'programs'}:{os.environ['PATH']}"}
        elif name in ("ARG", "ENV"):
            pairs = dict(pair.split("=", 1) for pair in rest.split())
            variables |= {key: Template(value).substitute(variables) for key, value in pairs.items()}
            if "TORCH" in pairs:
                variables["TORCH"] = torch
        elif name == "WORKDIR":
            directory = roots[stage] / rest.lstrip("/")
            directory.mkdir(parents=True, exist_ok=True)
        elif name == "COPY" and rest.startswith("--from="):
            source, target = rest.removeprefix("--from=build ").split()
            copy(roots["build"] / source.lstrip("/"), roots[stage] / target.lstrip("/"))
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copy(ROOT / source, directory / target)
        elif name == "RUN":
            subprocess.run(["sh", "-c", rest], cwd=directory, env=variables, check=True, timeout=30)
    called = [call.removeprefix("python3 -m ") for call in log.read_text().splitlines() if call.startswith("python3 ")]
    assert stage == "last"
    editable = "--config-settings editable_mode=compat"
    assert called == [
        "venv environment",
        "pip install --no-deps --require-hashes --requirement requirements.lock",
        *([f"pip install {torch}"] if torch else []),
        f"pip install --no-deps --no-build-isolation {editable} --editable . --editable ./client",
        "compileall -q lightllm_backend client",
    ]
    assert variables["PATH"].startswith(f"/{directory.relative_to(roots[stage])}/environment/bin:")
    assert {"lightllm_backend", "client", "model_repository", "pyproject.toml"} <= {p.name for p in directory.iterdir()}


def locked() -> dict[str, tuple[Requirement, int]]:
    """Each line of the lock: the requirement, and how many hashes it has."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    found = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        requirement, *hashes = line.split(" --hash=sha256:")
        found[requirement] = (Requirement(requirement), len(hashes))
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_the_lock_has_what_the_project_asks_for_with_hashes(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}

    def applies(requirement: Requirement) -> bool:
        return requirement.marker is None or requirement.marker.evaluate(environment)

    lock = locked()
    assert [name for name, (_, hashes) in lock.items() if hashes == 0] == []
    versions = {one.name: str(one.specifier).removeprefix("==") for one, _ in lock.values() if applies(one)}
    lines = [*(ROOT / "requirements.txt").read_text().splitlines(), REQUIREMENT]
    lines += (ROOT / "requirements-image.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    wrong = [str(one) for one in wanted if applies(one) and not one.specifier.contains(versions.get(one.name, "0"))]
    assert wrong == ["nvidia-pytriton==0.7.0"]  # the image has its own server


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def test_it_does_not_run_as_root() -> None:
    (user,) = arguments_of("USER")
    uid, _, gid = user.partition(":")
    assert "0" not in (uid, gid)
    made = " ".join(arguments_of("RUN"))
    assert f"groupadd --gid {gid} " in made
    assert f" --uid {uid} --gid {gid} " in made
    names = [name for name, _ in last_stage()]
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
