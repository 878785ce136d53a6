# SPDX-License-Identifier: Apache-2.0
"""Servers as a whole: metrics, models that are unloaded and loaded, two servers beside each other, how they end."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from lightllm_backend.front.engine_load import longest_from_metrics
from lightllm_backend.triton_server import metric_table
from lightllm_backend.version import VERSION
from lightllm_client import InvalidArgument, LightLLMClient, LightLLMError
from tests.e2e.calls import NO_PROXY, in_parallel, infer_grpc
from tests.e2e.conftest import SHORT_MODEL_SAYS
from tests.e2e.faults import Streams
from tests.e2e.launch_command import Traces
from tests.e2e.server import REPOSITORY, START_SECONDS, TritonServer, engine_environment, get
from tests.models.random_models import save_random_model
from tests.polling import poll
from tests.runner.engine_harness import transformers_greedy

pytestmark = pytest.mark.e2e

PROMPT = "The capital of Japan is"
DEAD_SECONDS = 20.0  # until a server with a dead step has ended, as in test_e2e_standstill
DEFAULT_PORTS = (8000, 8001, 8002)
LLAMA_TOKENIZER = Path(__file__).parents[1] / "data" / "llama"
LLAMA_VOCAB = 512  # of that tokenizer


# Metrics


def test_all_metrics_are_there(server: TritonServer) -> None:
    names = {name.partition("{")[0] for name in server.metrics()}
    assert set(metric_table.samples()) <= names
    [info] = [name for name in server.metrics() if name.startswith("lightllm_info{")]
    assert 'device="cpu"' in info
    assert 'dtype="float32"' in info
    assert f'version="{VERSION}"' in info
    assert longest_from_metrics(f"{info} 1\n"), "the front finds it"


def settled_metrics(server: TritonServer) -> dict[str, float]:
    """When nothing runs and all that has been observed is carried over, which takes a few tenths of a second."""
    seen: list[dict[str, float]] = [{}]

    def is_settled() -> bool:
        seen.append({name: value for name, value in server.metrics().items() if name.startswith("lightllm_")})
        return server.is_idle() and seen[-1] == seen[-2]

    assert poll(is_settled, every=0.5), seen[-1]
    return seen[-1]


def test_metrics_count(server: TritonServer, client: LightLLMClient) -> None:
    before = settled_metrics(server)
    for _ in range(3):
        client.generate(PROMPT, max_tokens=4)
    list(client.stream(PROMPT, max_tokens=5))
    client.generate(PROMPT, max_tokens=8, stop_words=[SHORT_MODEL_SAYS.strip()])
    infer_grpc(server, {"text_input": PROMPT, "max_tokens": 2})

    def grown() -> dict[str, float]:
        now = server.metrics()
        return {
            name: now[f"lightllm_{name}"] - before[f"lightllm_{name}"]
            for name in (
                'requests_total{status="length"}', 'requests_total{status="stop"}', "request_seconds_count",
                "queue_seconds_count", "time_to_first_token_seconds_count",
                'request_tokens_total{part="prompt",status="length"}',
                'request_tokens_total{part="answer",status="length"}',
            )
        }  # fmt: skip

    expected = {
        'requests_total{status="length"}': 5, 'requests_total{status="stop"}': 1, "request_seconds_count": 6,
        "queue_seconds_count": 6, "time_to_first_token_seconds_count": 6,
        'request_tokens_total{part="prompt",status="length"}': 5 * 5,
        'request_tokens_total{part="answer",status="length"}': 3 * 4 + 5 + 2,
    }  # fmt: skip
    assert poll(lambda: grown() == expected), grown()

    def generated() -> float:
        return server.metrics()["lightllm_generated_tokens_total"] - before["lightllm_generated_tokens_total"]

    # The stop string is found outside the engine, which may have gone on meanwhile.
    assert poll(lambda: 3 * 4 + 5 + 2 + 1 <= generated() <= 3 * 4 + 5 + 2 + 8), generated()
    assert poll(server.is_idle)
    now = server.metrics()
    computed = now["lightllm_prompt_tokens_total"] - before["lightllm_prompt_tokens_total"]
    # Of each prompt's 5 tokens at least the last; the others lie in the prefix cache, at the latest after the first.
    assert 6 <= computed <= 5 + 5 * 1
    assert now["lightllm_kv_tokens_cached"] >= 5
    queried, hit = (
        now[f"lightllm_prefix_cache_{what}_total"] - before[f"lightllm_prefix_cache_{what}_total"]
        for what in ("queries", "hits")
    )
    assert (queried, queried - hit) == (6 * 5, computed)


def test_gauges_while_a_request_runs(server: TritonServer, client: LightLLMClient) -> None:
    with client.stream(PROMPT, max_tokens=1000, ignore_eos=True) as stream:
        next(stream)
        assert poll(lambda: server.metrics()["lightllm_running_requests"] == 1)
        assert poll(lambda: server.metrics()["lightllm_kv_tokens_used"] >= 5)
        assert server.metrics()["lightllm_engine_up"] == 1
    assert poll(server.is_idle), server.metrics()


# Unload and load


@pytest.fixture
def repository_client(small_server: TritonServer) -> Iterator[Any]:
    with tritonclient.grpc.InferenceServerClient(small_server.grpc_url, channel_args=NO_PROXY) as client:
        yield client


def test_the_ensemble_unloaded_and_loaded(
    small_server: TritonServer, small_client: LightLLMClient, repository_client: Any
) -> None:
    worker = small_server.worker()
    repository_client.unload_model("lightllm", unload_dependents=True)
    assert poll(lambda: not worker.is_running(), 60), "the engine ends with the generation step"
    with pytest.raises(LightLLMError):
        small_client.generate(PROMPT, max_tokens=1)
    with pytest.raises(InferenceServerException, match="UNAVAILABLE: the engine is not up"):
        infer_grpc(small_server, {"text_input": PROMPT})
    repository_client.load_model("lightllm")
    assert small_client.generate(PROMPT, max_tokens=1).num_output_tokens == 1
    assert len(list(small_client.stream(PROMPT, max_tokens=8))) > 1
    # The unary entry was not loaded anew: it finds the new engine by itself.
    assert poll(lambda: unary_serves(small_server))


def unary_serves(server: TritonServer) -> bool:
    try:
        return bool(infer_grpc(server, {"text_input": PROMPT, "max_tokens": 1})["num_output_tokens"] == 1)
    except InferenceServerException:
        return False


def test_the_unary_entry_unloaded_and_loaded(
    small_server: TritonServer, small_client: LightLLMClient, repository_client: Any
) -> None:
    repository_client.unload_model("lightllm_unary")
    assert poll(lambda: not repository_client.is_model_ready("lightllm_unary"))
    assert small_client.generate(PROMPT, max_tokens=1).num_output_tokens == 1
    repository_client.load_model("lightllm_unary")
    assert poll(lambda: unary_serves(small_server))


# Servers as processes


def test_two_servers_do_not_meet_and_one_with_a_dead_step_ends_and_leaves_nothing(
    server: TritonServer, client: LightLLMClient, tmp_path: Path
) -> None:
    """The other one has two ranks and a model that is no LLaMA, whose tokens are those of transformers."""
    bloom = save_random_model("bloom_6_heads", tmp_path / "model", LLAMA_VOCAB)
    for file in LLAMA_TOKENIZER.iterdir():
        shutil.copy(file, bloom)
    prompts = [random.Random(seed).choices(range(3, LLAMA_VOCAB), k=1 + 6 * seed) for seed in range(6)]
    expected = transformers_greedy(bloom, prompts, 10)
    other = TritonServer(tmp_path / "log", model_dir=bloom, tp=2, max_total_token_num=1000)
    try:
        other.wait_ready()
        run_directory, processes = other.run_directory(), other.processes()
        traces = Traces(processes[0], run_directory.parent / "none")
        assert len(processes) == 10, "the server, a stub for each instance of five models, two workers, the guard"
        assert run_directory != server.run_directory()
        with LightLLMClient(other.grpc_url, timeout=60, max_retries=0) as other_client:
            answers = in_parallel([partial(other_client.generate, prompt, max_tokens=10) for prompt in prompts])
            assert [list(answer.token_ids) for answer in answers] == expected
            with pytest.raises(InvalidArgument, match="input_ids holds 600; allowed: 0 ≤ id < 512"):
                other_client.generate([600], max_tokens=1)
            with pytest.raises(InvalidArgument, match="3 tokens and max_tokens is 999; allowed: .* 1000 tokens"):
                other_client.generate([5, 6, 7], max_tokens=999)
            for length in (1001, 140_000):  # beyond the pool, and beyond the model's limit as well
                said = f"{length} tokens and max_tokens is -1; allowed: at most 1000 prompt .*KV pool of 1000 tokens"
                with pytest.raises(InvalidArgument, match=said):
                    other_client.generate([5] * length, max_tokens=-1)
        assert client.generate([600], max_tokens=1).num_output_tokens == 1
        assert poll(lambda: other.metrics()["lightllm_kv_tokens_total"] == 1000)
        [victim] = [one for one in processes if "/generation/" in " ".join(one.cmdline())]
        streams = Streams(other.grpc_url, other.http_port, max_tokens=900, count=1)
        streams.wait_begun()
        victim.kill()
        assert poll(lambda: other.process.poll() is not None, DEAD_SECONDS)
        assert streams.wait_ended(DEAD_SECONDS)
    finally:
        other.process.kill()
        other.process.wait()
    assert poll(lambda: not traces.left() and not run_directory.exists()), traces.left()
    said = "error: the server is ended: generation (process " in other.log()
    assert said or other.process.returncode < 0, "Triton server at times dies of a dead step before it is ended"
    assert client.generate(PROMPT, max_tokens=1).text == SHORT_MODEL_SAYS


def test_plain_tritonserver(tmp_path: Path) -> None:
    """The command of the documentation, word for word, from the repository's root in the activated environment."""
    wrapper = Path(sys.executable).with_name("tritonserver")
    if not wrapper.exists():
        pytest.skip(f"there is no {wrapper}; build.sh makes it")
    taken = [port for port in DEFAULT_PORTS if is_taken(port)]
    if taken:
        pytest.skip(f"ports {taken} are taken")
    environment = engine_environment({})
    environment["PATH"] = os.pathsep.join([str(wrapper.parent), environment["PATH"]])
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["tritonserver", "--model-repository", "model_repository"],
            cwd=REPOSITORY.parent, env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        assert poll(lambda: process.poll() is not None or is_ready(DEFAULT_PORTS[0]), START_SECONDS)
        assert process.poll() is None, log.read_text()
        processes = psutil.Process(process.pid).children(recursive=True)
        with LightLLMClient() as client:
            assert client.generate(PROMPT, max_tokens=1, timeout=60).text == " Tokyo"
    finally:
        process.terminate()
        exit_code = process.wait(60)
    assert exit_code == 0
    assert poll(lambda: not any(one.is_running() for one in processes))


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return True
    return False


def is_ready(port: int) -> bool:
    try:
        return get(port, "/v2/health/ready")[0] == 200
    except OSError:
        return False


# Load generators


def test_perf_analyzer(server: TritonServer, tmp_path: Path) -> None:
    analyzer = shutil.which(
        "perf_analyzer", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if analyzer is None:
        pytest.skip("perf_analyzer is not installed: perf/install_perf_analyzer.sh")
    data = tmp_path / "data.json"
    data.write_text('{"data": [{"text_input": ["The capital of Japan is"], "stream": [true], "max_tokens": [4]}]}')
    report = tmp_path / "report.csv"
    finished = subprocess.run(
        [
            analyzer, "-m", "lightllm", "-u", server.grpc_url, "-i", "grpc", "--async", "--streaming",
            "--input-data", str(data), "--concurrency-range", "2", "--request-count", "6", "-f", str(report),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert report.read_text().startswith("Concurrency,Inferences/Second"), finished.stdout
    assert poll(server.is_idle), server.metrics()
