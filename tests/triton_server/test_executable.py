# SPDX-License-Identifier: Apache-2.0
"""Which tritonserver is chosen, with what environment, and that a Python model really runs in it."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightllm_backend.environment import original_environment
from lightllm_backend.triton_server import executable as tritonserver
from lightllm_backend.triton_server.executable import command
from tests.free_ports import free_ports

START_LIMIT_SECONDS = 60

TOY_CONFIG = """
backend: "python"
max_batch_size: 0
input [{ name: "a" data_type: TYPE_FP32 dims: [-1] }, { name: "b" data_type: TYPE_FP32 dims: [-1] }]
output [{ name: "sum" data_type: TYPE_FP32 dims: [-1] }, { name: "library_path" data_type: TYPE_STRING dims: [1] }]
instance_group [{ count: 1, kind: KIND_CPU }]
"""

TOY_MODEL = """
import os
import numpy as np
import triton_python_backend_utils as pb_utils
from lightllm_backend.environment import original_environment

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        a, b = (pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in "ab")
        path = np.array([original_environment(os.environ).get("LD_LIBRARY_PATH", "unset")], dtype=object)
        return pb_utils.InferenceResponse([pb_utils.Tensor("sum", a + b), pb_utils.Tensor("library_path", path)])
"""


@pytest.fixture
def empty_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing is installed but what is in this virtual environment."""
    monkeypatch.setattr(tritonserver, "CONTAINER_BINARIES", str(tmp_path / "no_container"))
    return {"PATH": str(tmp_path / "no_programs"), "HOME": str(tmp_path)}


def executable(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_the_variable_names_the_command_line(empty_path: dict[str, str]) -> None:
    empty_path["LIGHTLLM_TRITONSERVER"] = "env A='b c' /elsewhere/tritonserver --backend-directory=/x"
    argv, environment = command(["--model-repository", "m"], empty_path)
    assert argv == ["env", "A=b c", "/elsewhere/tritonserver", "--backend-directory=/x", "--model-repository", "m"]
    assert "LD_LIBRARY_PATH" not in environment


def test_a_container_s_server_is_used_plainly(
    empty_path: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = executable(tmp_path / "opt" / "tritonserver")
    monkeypatch.setattr(tritonserver, "CONTAINER_BINARIES", str(server.parent))
    empty_path["LD_LIBRARY_PATH"] = "/image/lib"
    argv, environment = command(["--version"], empty_path)
    assert argv == [str(server), "--version"]
    path = f"{Path(sys.executable).parent}:{empty_path['PATH']}"
    assert environment == {**empty_path, "PATH": path, "LIGHTLLM_ORIGINAL_LD_LIBRARY_PATH": "/image/lib"}


def test_a_server_on_path_wins_over_the_packaged_one_and_our_wrapper_is_none(
    empty_path: dict[str, str], tmp_path: Path
) -> None:
    wrapper = executable(tmp_path / "venv" / "tritonserver", f"#!/bin/sh\nexec python -m {tritonserver.MODULE}\n")
    server = executable(tmp_path / "bin" / "tritonserver")
    empty_path["PATH"] = f"{wrapper.parent}:{server.parent}"
    assert command([], empty_path)[0] == [str(server)]
    empty_path["PATH"] = str(wrapper.parent)
    assert Path(command([], empty_path)[0][0]).parts[-4:] == ("pytriton", "tritonserver", "bin", "tritonserver")


def test_the_packaged_server_finds_its_backend_its_libraries_and_this_python(empty_path: dict[str, str]) -> None:
    empty_path["LD_LIBRARY_PATH"] = "/users/lib"
    argv, environment = command(["--model-repository=m"], empty_path)
    assert argv[2:] == ["--model-repository=m"]
    backends = Path(argv[1].removeprefix("--backend-directory="))
    for name in ("libtriton_python.so", "triton_python_backend_utils.py", "triton_python_backend_stub"):
        assert (backends / "python" / name).is_file()
    assert os.access(backends / "python" / "triton_python_backend_stub", os.X_OK)
    pytriton_libraries, libpython, users = environment["LD_LIBRARY_PATH"].split(":")
    assert list(Path(pytriton_libraries).glob("libtritonserver*"))
    assert list(Path(libpython).glob(f"libpython3.{sys.version_info.minor}.so*"))
    assert users == "/users/lib"
    assert Path(environment["PATH"].split(":")[0], "python3").samefile(sys.executable)


def test_a_given_backend_directory_is_kept(empty_path: dict[str, str]) -> None:
    for given in (["--backend-directory=/mine"], ["--backend-directory", "/mine"]):
        assert command(given, empty_path)[0][1:] == given


def test_a_backend_directory_of_an_older_package_is_renewed(empty_path: dict[str, str]) -> None:
    backends = Path(command([], empty_path)[0][1].removeprefix("--backend-directory="))
    link = backends / "python" / "libtriton_python.so"
    good = link.readlink()
    link.unlink()
    link.symlink_to("/gone/libtriton_python.so")
    command([], empty_path)
    assert link.readlink() == good


@pytest.mark.parametrize("before", [{}, {"LD_LIBRARY_PATH": "/a:/b"}])
def test_workers_get_the_libraries_that_the_user_had(empty_path: dict[str, str], before: dict[str, str]) -> None:
    _, environment = command([], {**empty_path, **before})
    _, nested = command([], environment)
    for server_environment in (environment, nested):
        restored = original_environment(server_environment)
        assert {key: restored.get(key) for key in ("LD_LIBRARY_PATH",)} == {
            "LD_LIBRARY_PATH": before.get("LD_LIBRARY_PATH")
        }
        assert not [key for key in restored if "ORIGINAL" in key]


def test_an_environment_without_the_variable_is_left_alone() -> None:
    assert original_environment({"LD_LIBRARY_PATH": "/a"}) == {"LD_LIBRARY_PATH": "/a"}


def test_numpy_2_is_refused_with_what_is_allowed(empty_path: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tritonserver.importlib.metadata, "version", lambda name: "2.1.0")
    with pytest.raises(tritonserver.TritonServerError, match=r"numpy 2\.1\.0 .* allowed: numpy < 2"):
        command([], empty_path)


def test_no_server_at_all_is_an_error_that_says_what_to_do(
    empty_path: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tritonserver.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        tritonserver.TritonServerError, match=r"nvidia-pytriton is not installed .*LIGHTLLM_TRITONSERVER"
    ):
        command([], empty_path)


def test_a_missing_libpython_names_the_package_to_install(
    empty_path: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tritonserver, "_library_directories", lambda: iter([tmp_path]))
    with pytest.raises(tritonserver.TritonServerError, match=r"apt-get install libpython3\.\d+$"):
        command([], empty_path)


@pytest.fixture
def toy_server(tmp_path: Path) -> Iterator[str]:
    """The URL of a server, started as a user would with the wrapper script, that adds two tensors."""
    model = tmp_path / "repository" / "add"
    executable(model / "1" / "model.py", TOY_MODEL)
    executable(model / "config.pbtxt", TOY_CONFIG)
    wrapper = Path(sys.executable).parent / "tritonserver"
    assert wrapper.exists(), "run ./build.sh once: it writes the virtual environment's tritonserver"
    http_port, grpc_port, metrics_port = free_ports(3)
    ports = [f"--http-port={http_port}", f"--grpc-port={grpc_port}", f"--metrics-port={metrics_port}"]
    hosts = [f"--{service}-address=127.0.0.1" for service in ("http", "grpc", "metrics")]
    environment = {**os.environ, "LD_LIBRARY_PATH": "/users/own/lib"}
    environment.pop("LIGHTLLM_TRITONSERVER", None)
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [wrapper, "--model-repository", tmp_path / "repository", *ports, *hosts],
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            env=environment,
        )
        try:
            wait_until_ready(f"http://127.0.0.1:{http_port}", server, tmp_path / "log")
            yield f"http://127.0.0.1:{http_port}"
        finally:
            server.terminate()
            server.wait(30)


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5):
            return
        time.sleep(0.1)
    pytest.fail(log.read_text())


@pytest.mark.e2e
def test_a_python_model_computes_in_the_real_server(toy_server: str) -> None:
    inputs = [
        {"name": "a", "datatype": "FP32", "shape": [3], "data": [1.5, 2, 3]},
        {"name": "b", "datatype": "FP32", "shape": [3], "data": [10, 20, 30]},
    ]
    body = json.dumps({"inputs": inputs}).encode()
    with urllib.request.urlopen(f"{toy_server}/v2/models/add/infer", data=body, timeout=30) as response:
        outputs = {output["name"]: output["data"] for output in json.load(response)["outputs"]}
    assert outputs["sum"] == [11.5, 22, 33]
    assert outputs["library_path"] == ["/users/own/lib"]
