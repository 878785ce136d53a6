# SPDX-License-Identifier: Apache-2.0
"""What a stranger cannot do: call administration APIs, read shared memory, have a file opened, find prompts in logs."""

from __future__ import annotations

import http.client
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from lightllm_client import LightLLMClient
from tests.e2e.calls import NO_PROXY, GenerateStream, generate, infer_grpc, infer_http, stream_grpc
from tests.e2e.server import TritonServer

pytestmark = pytest.mark.e2e

# Calls of every administration API, with what would be harmful where the call was served.
CLOSED_OVER_HTTP = [
    ("GET", "/v2/logging", ""),
    ("POST", "/v2/logging", '{"log_verbose_level": 1}'),
    ("GET", "/v2/trace/setting", ""),
    ("POST", "/v2/models/lightllm/trace/setting", '{"trace_file": "/tmp/trace"}'),
    ("GET", "/v2/systemsharedmemory/status", ""),
    ("POST", "/v2/systemsharedmemory/region/a/register", '{"key": "/a", "offset": 0, "byte_size": 8}'),
    ("POST", "/v2/cudasharedmemory/unregister", ""),
    ("POST", "/v2/repository/index", "{}"),
    ("POST", "/v2/repository/models/lightllm/unload", "{}"),
]
CLOSED_OVER_GRPC: list[Callable[[Any], object]] = [
    lambda client: client.get_log_settings(),
    lambda client: client.update_trace_settings(settings={"trace_file": "/tmp/trace"}),
    lambda client: client.get_system_shared_memory_status(),
    lambda client: client.register_system_shared_memory("a", "/a", 8),
    lambda client: client.unregister_cuda_shared_memory(),
    lambda client: client.get_model_repository_index(),
    lambda client: client.load_model("lightllm"),
]
# What clients, perf_analyzer and orchestrators call.
OPEN_OVER_HTTP = ["/v2", "/v2/health/live", "/v2/health/ready"]
OPEN_OVER_HTTP += [f"/v2/models/lightllm{part}" for part in ("", "/ready", "/config", "/stats")]


def call(server: TritonServer, method: str, path: str, body: str = "") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize(("method", "path", "body"), CLOSED_OVER_HTTP)
def test_administration_is_closed_over_http(server: TritonServer, method: str, path: str, body: str) -> None:
    status, answer = call(server, method, path, body)
    assert status == 403
    assert json.loads(answer)["error"] == "This API is restricted, expecting header 'closed-see-setting-open_apis'"


def test_administration_is_closed_over_grpc(server: TritonServer) -> None:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url, channel_args=NO_PROXY) as client:
        for refused in CLOSED_OVER_GRPC:
            with pytest.raises(InferenceServerException, match="restricted, expecting .*closed-see-setting-open_apis"):
                refused(client)


def test_what_clients_need_stays_open(server: TritonServer) -> None:
    assert [call(server, "GET", path)[0] for path in OPEN_OVER_HTTP] == [200] * len(OPEN_OVER_HTTP)
    with tritonclient.grpc.InferenceServerClient(server.grpc_url, channel_args=NO_PROXY) as client:
        assert client.is_server_ready()
        assert client.get_server_metadata().name == "triton"
        assert client.get_model_config("lightllm").config.name == "lightllm"
        assert client.get_inference_statistics("lightllm").model_stats


def test_what_is_not_closed_works(small_server: TritonServer) -> None:
    assert call(small_server, "GET", "/v2/logging")[0] == 200
    assert call(small_server, "GET", "/v2/systemsharedmemory/status")[0] == 200


def test_shared_memory_sockets_and_files_are_private(server: TritonServer) -> None:
    mapped = [
        line.split()[-1]
        for process in server.processes()
        for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        if "/dev/shm/" in line and not line.endswith("(deleted)")
    ]
    regions = {Path(path) for path in mapped}
    assert len(regions) >= 6  # one for each stub
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (*regions, server.run_directory())}
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


def test_a_path_in_a_request_is_text(server: TritonServer, tmp_path: Path) -> None:
    """A named pipe would hold up whoever opened it, and its reader would be seen."""
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    for path in (str(fifo), f"file://{fifo}", f"@{fifo}"):
        for name in ("text_input", "stop_words", "sampling_parameters", "id", "lora_name", "guided_decoding_guide"):
            generate(server, {"text_input": "a", "max_tokens": 1, name: path})
        generate(server, {"text_input": "a", "max_tokens": 1, "parameters": {"model": path, "headers": path}})
    with pytest.raises(OSError, match="No such device or address"):  # nobody has it open for reading
        os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)


def test_no_log_has_a_prompt_or_an_answer(small_server: TritonServer, small_client: LightLLMClient) -> None:
    """At the most verbose level of the server. Its log has a request's id, which is the client's to choose."""
    marker = "Zanzibar"
    assert call(small_server, "POST", "/v2/logging", '{"log_verbose_level": 3}')[0] == 200
    try:
        before = len(small_server.log())
        assert (
            marker in generate(small_server, {"text_input": marker, "exclude_input_in_output": False})[1]["text_output"]
        )
        list(GenerateStream(small_server, {"text_input": marker, "stream": True, "max_tokens": 2}))
        generate(small_server, {"text_input": "a", "stop_words": marker})
        generate(small_server, {"text_input": "a", "sampling_parameters": json.dumps({"stop": marker})})
        generate(small_server, {"text_input": "a", "sampling_parameters": f"{{{marker}"})
        generate(small_server, {"text_input": "a", "parameters": {"stop": marker}})
        generate(small_server, {"text_input": "a", "parameters": {"colour": marker, marker: 1}})
        generate(small_server, b'{"text_input": "%s' % marker.encode())
        infer_http(small_server, {"text_input": marker})
        infer_grpc(small_server, {"text_input": marker}, parameters={"stop": marker})
        stream_grpc(small_server, {"text_input": marker})
        assert small_client.generate(marker, max_tokens=1).num_output_tokens == 1
        written = small_server.log()[before:]
    finally:
        call(small_server, "POST", "/v2/logging", '{"log_verbose_level": 0}')
    assert len(re.findall("model: tokenizer", written)) >= 8  # the requests themselves are in it
    assert [line for line in written.splitlines() if marker in line] == []
