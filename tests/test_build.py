# SPDX-License-Identifier: Apache-2.0
"""build.sh with a stand-in for Python: what it installs, what it runs, and that signals reach it. The requirements."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lightllm_backend.launch.embedded_model import REQUIREMENT
from lightllm_backend.version import VERSION

ROOT = Path(__file__).parent.parent
PYTHON_VERSIONS = ("3.10", "3.11", "3.12")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A virtual environment whose python only writes down its process id and its arguments."""
    script(tmp_path / "venv" / "bin" / "python", f'echo "$$ $*" >>{tmp_path}/calls')
    variables = {"LIGHTLLM_VENV": str(tmp_path / "venv"), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    script(tmp_path / "programs" / "nvidia-smi", "exit 9")
    variables["PATH"] = f"{tmp_path / 'programs'}:{variables['PATH']}"
    return variables


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def build(*arguments: str, environment: dict[str, str]) -> tuple[int, subprocess.CompletedProcess[str]]:
    command = [ROOT / "build.sh", *arguments]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        output, errors = process.communicate(timeout=60)
    return process.pid, subprocess.CompletedProcess(command, process.returncode, output, errors)


def in_build_script(commands: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run shell commands where the functions of build.sh are defined."""
    program = f"source {ROOT}/build.sh help >/dev/null; {commands}"
    return subprocess.run(["/bin/bash", "-c", program], env=environment, capture_output=True, text=True, timeout=60)


def calls(environment: dict[str, str]) -> list[str]:
    return (Path(environment["HOME"]) / "calls").read_text().splitlines()


def test_help_is_the_default_and_names_every_command(environment: dict[str, str]) -> None:
    _, helped = build("help", environment=environment)
    _, default = build(environment=environment)
    assert helped.returncode == default.returncode == 0
    assert helped.stdout == default.stdout
    for command in ("demo", "serve", "test", "docs", "docker", "audit", "sbom", "lock", "help"):
        assert f"\n  {command} " in helped.stdout


def test_an_unknown_command_fails_and_is_named(environment: dict[str, str]) -> None:
    _, run = build("serv", environment=environment)
    assert run.returncode == 1
    assert "unknown command serv" in run.stderr


@pytest.mark.parametrize(("command", "program"), [("serve", "-m lightllm_backend.serve"), ("demo", "examples/demo.py")])
def test_what_runs_last_takes_the_place_of_the_shell(environment: dict[str, str], command: str, program: str) -> None:
    pid, run = build(command, "--tp", "2", "a b", environment=environment)
    assert run.returncode == 0, run.stderr
    assert calls(environment)[-1] == f"{pid} {program} --tp 2 a b"


def test_installing_is_done_once_in_order_and_again_when_its_settings_change(environment: dict[str, str]) -> None:
    build("serve", environment=environment)
    first = [call.partition(" ")[2].strip() for call in calls(environment)]
    pip = "-m pip install --disable-pip-version-check"
    assert first == [
        f"{pip} torch==2.13.0",
        f"{pip} -r requirements.txt",
        f"{pip} --no-deps {REQUIREMENT}",
        f"{pip} --no-deps --config-settings editable_mode=compat --editable . --editable ./client",
        "-c from lightllm_backend.triton_server.executable import write_wrapper; write_wrapper()",
        "-m lightllm_backend.serve",
    ]
    build("serve", environment=environment)
    assert len(calls(environment)) == len(first) + 1
    build("serve", environment={**environment, "LIGHTLLM_TORCH": "torch==2.10.0"})
    assert f"{pip} torch==2.10.0" in calls(environment)[len(first) + 1]


def test_a_failed_installation_is_tried_again(environment: dict[str, str]) -> None:
    python = Path(environment["LIGHTLLM_VENV"]) / "bin" / "python"
    working = python.read_text()
    script(python, "exit 7")
    assert build("serve", environment=environment)[1].returncode == 7
    python.write_text(working)
    build("serve", environment=environment)
    assert len(calls(environment)) == 6


def test_a_machine_with_a_gpu_gets_no_torch_without_cuda(environment: dict[str, str], tmp_path: Path) -> None:
    script(tmp_path / "programs" / "nvidia-smi", "exit 0")
    build("serve", environment=environment)
    assert calls(environment)[0].endswith("install --disable-pip-version-check torch===2.11.0")


def test_settings_of_the_build_are_not_passed_to_the_server(environment: dict[str, str]) -> None:
    environment |= {"LIGHTLLM_TORCH": "torch==2.10.0", "LIGHTLLM_IMAGE": "x", "LIGHTLLM_MODEL_DIR": "/m"}
    run = in_build_script("env", environment)
    names = [line.partition("=")[0] for line in run.stdout.splitlines()]
    assert {name for name in names if name.startswith("LIGHTLLM")} == {"LIGHTLLM_MODEL_DIR", "LIGHTLLM_VENV"}


@pytest.fixture
def interpreters(tmp_path: Path, environment: dict[str, str]) -> dict[str, str]:
    """An environment in which the only programs are the ones that build.sh needs and the stand-ins for Python."""
    for program in ("dirname", "cat", "bash"):
        (tmp_path / "only").mkdir(exist_ok=True)
        (tmp_path / "only" / program).symlink_to(str(shutil.which(program)))
    return {**environment, "PATH": str(tmp_path / "only")}


def test_the_first_interpreter_that_really_runs_is_taken(interpreters: dict[str, str], tmp_path: Path) -> None:
    script(tmp_path / "only" / "python3", "echo 3.9")
    script(tmp_path / "only" / "python3.12", "exit 127")
    script(tmp_path / "only" / "python3.10", f'exec {sys.executable} "$@"')
    run = in_build_script("find_python", interpreters)
    assert (run.returncode, run.stdout) == (0, "python3.10\n"), run.stderr


def test_without_an_interpreter_it_says_why_and_what_to_install(interpreters: dict[str, str], tmp_path: Path) -> None:
    script(tmp_path / "only" / "python3", "echo 3.13")
    script(tmp_path / "only" / "python3.12", "exit 127")
    script(tmp_path / "only" / "python3.11", "[[ $2 == *version* ]] && echo 3.11 || exit 1")
    script(tmp_path / "only" / "python3.10", '[[ $2 == *version* ]] && echo 3.10 || echo "no libpython3.10.so"')
    run = in_build_script("find_python", interpreters)
    assert (run.returncode, run.stdout) == (1, "")
    for reason in (
        "python3 is Python 3.13; allowed: 3.10, 3.11, 3.12",
        "python3.12 does not run",
        "apt-get install python3.11-venv",
        "no libpython3.10.so",
    ):
        assert reason in run.stderr


def test_docker_without_an_engine_says_so(interpreters: dict[str, str]) -> None:
    _, run = build("docker", environment=interpreters)
    assert run.returncode == 1
    assert "neither docker nor podman runs here" in run.stderr


def test_docker_builds_with_the_engine_that_runs(interpreters: dict[str, str], tmp_path: Path) -> None:
    script(tmp_path / "only" / "docker", "exit 1")
    script(tmp_path / "only" / "podman", 'echo "$$ $*"')
    pid, run = build("docker", "--no-cache", environment=interpreters)
    assert run.stdout == f"{pid} build --tag lightllm_backend --no-cache .\n"


def test_the_site_needs_no_engine_and_is_strict(environment: dict[str, str]) -> None:
    _, run = build("docs", environment=environment)
    assert [call.partition(" ")[2] for call in calls(environment)] == [
        "-m pip install --disable-pip-version-check -r requirements-docs.txt",
        "-m mkdocs build --strict --quiet",
    ]
    assert "http.server" in run.stdout


def test_the_audit_fails_for_what_cannot_be_looked_up(environment: dict[str, str], tmp_path: Path) -> None:
    tools = tmp_path / "venv" / "tools" / "bin"
    script(tools / "python", f'echo "tools $*" >>{tmp_path}/calls')
    script(tools / "pip-audit", 'echo "$*"; exit 3')
    _, run = build("audit", "--format=json", environment=environment)
    assert run.returncode == 3
    assert run.stdout == "--strict --disable-pip --require-hashes --requirement requirements.lock --format=json\n"
    installed = [call for call in calls(environment) if call.startswith("tools ")]
    assert len(installed) == 1  # pinned, and apart from the environment
    assert all("==" in requirement for requirement in installed[0].split()[-3:])


def test_the_sbom_lists_the_locked_packages(environment: dict[str, str], tmp_path: Path) -> None:
    tools = tmp_path / "venv" / "tools" / "bin"
    script(tools / "python", "echo installed")
    script(tools / "cyclonedx-py", 'echo "$*"')
    _, run = build("sbom", "-o", "sbom.json", environment=environment)
    assert run.returncode == 0, run.stderr
    command = "requirements --output-reproducible --pyproject pyproject.toml -o sbom.json requirements.lock\n"
    assert run.stdout == command  # nothing else on standard output, where the document may go


def requirements(*names: str) -> Iterator[Requirement]:
    for name in names:
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith("#"):
                yield Requirement(line)


@pytest.mark.parametrize("python", PYTHON_VERSIONS)
def test_every_requirement_has_one_version_on_every_python(python: str) -> None:
    listed = list(requirements("requirements.txt", "requirements-dev.txt", "requirements-docs.txt"))
    for name in {requirement.name for requirement in listed}:
        matching = [
            requirement
            for requirement in listed
            if requirement.name == name
            and (requirement.marker is None or requirement.marker.evaluate({"python_version": python}))
        ]
        assert len(matching) == 1, (name, python)
        operators = {specifier.operator for specifier in matching[0].specifier}
        assert operators == ({">=", "<="} if name in ("torch", "triton") else {"=="}), name


def test_numpy_is_one_that_the_python_backend_can_use() -> None:
    (numpy,) = (requirement for requirement in requirements("requirements.txt") if requirement.name == "numpy")
    assert not numpy.specifier.contains("2.0.0")


def test_the_package_knows_its_version() -> None:
    assert f'\nversion = "{VERSION}"\n' in (ROOT / "pyproject.toml").read_text()
