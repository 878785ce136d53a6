# SPDX-License-Identifier: Apache-2.0
"""What fails: the engine in the middle of answers, and models that cannot be loaded."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file
from tritonclient.utils import InferenceServerException

from lightllm_backend.config import EngineConfig
from lightllm_backend.generation.supervisor import EngineStartError, EngineSupervisor
from lightllm_client import LightLLMClient, Unavailable
from tests.e2e.calls import in_parallel, infer_http
from tests.e2e.server import ServerEnded, TritonServer
from tests.polling import poll

pytestmark = pytest.mark.e2e

PROMPT = "Once upon a time, there was a"
RESTART_SECONDS = 120.0


def test_the_engine_dies_in_the_middle(small_server: TritonServer, small_client: LightLLMClient) -> None:
    """Each request ends with an error behind the text that it had; a new engine serves on."""
    before = small_server.metrics()
    texts: list[str] = []

    def stream() -> str:
        with small_client.stream(PROMPT, max_tokens=2000, ignore_eos=True) as chunks:
            try:
                while True:
                    texts.append(next(chunks).text)
            except Unavailable as error:
                return str(error)

    def whole() -> str:
        try:
            small_client.generate(PROMPT, max_tokens=2000, ignore_eos=True)
        except Unavailable as error:
            return str(error)
        return "no error"

    def unary() -> str:
        with pytest.raises(InferenceServerException) as failed:
            infer_http(small_server, {"text_input": PROMPT, "max_tokens": 2000, "ignore_eos": True})
        return f"{failed.value.status()} {failed.value.message()}"

    def kill() -> str:
        assert poll(lambda: len(texts) >= 3 and small_server.metrics()["lightllm_running_requests"] == 3, 60)
        worker = small_server.worker()
        worker.kill()
        return ""

    streamed, generated, inferred, _ = in_parallel([stream, whole, unary, kill])
    message = "UNAVAILABLE: the engine stopped while the request was running; try again"
    assert "".join(texts).strip()
    assert streamed == generated == message
    assert inferred == f"503 {message}"

    assert poll(lambda: serves(small_client), RESTART_SECONDS)
    assert poll(lambda: small_server.metrics()["lightllm_engine_up"] == 1.0)
    after = small_server.metrics()
    assert after["lightllm_engine_restarts_total"] == before["lightllm_engine_restarts_total"] + 1
    failed = 'lightllm_requests_total{status="failed"}'
    assert after[failed] == before[failed] + 3
    assert after["lightllm_generated_tokens_total"] > before["lightllm_generated_tokens_total"], "it counts on"
    assert infer_http(small_server, {"text_input": PROMPT, "max_tokens": 2})["num_output_tokens"] == 2
    assert len(list(small_client.stream(PROMPT, max_tokens=8))) > 1, "streams have their credit"
    assert poll(small_server.is_idle), small_server.metrics()


def serves(client: LightLLMClient) -> bool:
    try:
        client.generate("Hello", max_tokens=1, timeout=60)
    except Unavailable:
        return False
    return True


# Model directories, and settings


def ended(log: Path, model: str, **settings: object) -> ServerEnded:
    """What becomes of a server that loads this model alone, which fails."""
    server = TritonServer(log, ["--model-control-mode=explicit", f"--load-model={model}"], **settings)
    with pytest.raises(ServerEnded) as failed:
        server.wait_ready()
    return failed.value


def missing(directory: Path) -> str:
    shutil.rmtree(directory)
    return str(directory)


def torn_weights(directory: Path) -> str:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return "model.safetensors"


@pytest.mark.parametrize("spoil", [missing, torn_weights])
def test_the_worker_names_what_is_wrong_with_a_model(
    tiny_model: Path, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    directory = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    named = spoil(directory)
    config = EngineConfig(model_dir=str(directory), worker_python=sys.executable, device="cpu", dtype="float32")
    supervisor = EngineSupervisor(config, str(tmp_path / "engine"))
    with pytest.raises(EngineStartError) as failed:
        supervisor.wait_ready()
    message = str(failed.value)
    assert named in message
    assert "exit code" not in message, "the worker says itself what is wrong"
    assert "\n" not in message
    assert poll(lambda: not workers_at(tmp_path / "engine"))


def workers_at(address: Path) -> list[psutil.Process]:
    """This process's workers that were told this address; a process that has ended has no command line."""
    children = psutil.Process().children(recursive=True)
    return [one for one in children if str(address) in command_line(one)]


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def test_the_server_names_the_tensors_that_a_checkpoint_lacks(tiny_model: Path, tmp_path: Path) -> None:
    """So many that the message is cut short with "…", which is not ASCII."""
    directory = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name and "norm" not in name}
    assert len(tensors) - len(kept) > 10
    save_file(kept, directory / "model.safetensors")
    log = str(ended(tmp_path / "log", "generation", model_dir=directory))
    assert "model.layers.1." in log
    assert "…" in log


def test_an_error_names_a_directory_of_any_name(tiny_model: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_model, tmp_path / "modèle 模型"))
    (directory / "tokenizer.json").write_text('{"version": "1.0"')
    failed = ended(tmp_path / "log", "tokenizer", model_dir=directory)
    assert failed.exit_code != 0
    assert str(directory / "tokenizer.json") in str(failed)


def test_the_server_does_not_start_with_a_wrong_setting(tmp_path: Path) -> None:
    failed = ended(tmp_path / "log", "lightllm_unary", max_req_input_len=0)
    assert failed.exit_code != 0
    assert "max_req_input_len is 0; allowed: a whole number ≥ 1" in str(failed)
