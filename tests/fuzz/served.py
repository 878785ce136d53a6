# SPDX-License-Identifier: Apache-2.0
"""Sends random requests to a real server, several at once, beside a neighbour whose answers must not change."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import psutil

from lightllm_client import LightLLMClient
from tests.e2e.calls import in_parallel
from tests.e2e.server import TritonServer
from tests.fuzz.requests import Call, check
from tests.polling import poll

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
TOKENIZER = Path(__file__).parents[1] / "data" / "byte_level" / "tokenizer.json"
CALLS_AT_ONCE = 16
MAX_LENGTH = 64  # of the server's requests, in tokens
NEIGHBOURS_PROMPT, NEIGHBOURS_TOKENS = "Once upon a time", 40
MEASURED_EVERY = 5000  # requests: the memory of the server
_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def write_model(directory: Path) -> dict[str, object]:
    """Write a LLaMA of two layers without weights; return the settings that serve it with random ones."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(_CONFIG))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    shutil.copyfile(TOKENIZER, directory / "tokenizer.json")
    return {"model_dir": directory, "load_format": "dummy", "max_req_total_len": MAX_LENGTH}


class ServerUnderFuzz:
    """Counts what becomes of the requests that it sends to a server. `close` says what they have done to it."""

    def __init__(self, server: TritonServer) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()  # by the way in and what became of the request
        self._server = server
        self._client = LightLLMClient(server.grpc_url, timeout=120, max_retries=0)
        self._neighbours_text = self._neighbours_answer()
        self._done = Event()
        self._pool = ThreadPoolExecutor(1)
        self._neighbour = self._pool.submit(self._be_neighbour)
        self._memory: list[dict[tuple[int, str], int]] = []

    def check(self, calls: Sequence[Call]) -> None:
        """Send the requests at once and judge each answer."""
        outcomes = in_parallel([lambda call=call: check(self._server, call) for call in calls])
        self.outcomes.update((call.way, outcome) for call, outcome in zip(calls, outcomes, strict=True))
        if self.outcomes.total() // MEASURED_EVERY > len(self._memory):
            self._memory.append(self._resident())
        assert not self._neighbour.done(), self._neighbour.result()

    def close(self) -> str:
        """Return the figures. Raise AssertionError if the server has not stayed as it was."""
        self._done.set()
        neighbours = self._neighbour.result()
        self._pool.shutdown()
        self._client.close()
        assert poll(self._server.is_idle), self._server.metrics()
        assert "Traceback" not in self._server.log(), self._server.log()
        lines = [f"  {way}, {outcome}: {count}" for (way, outcome), count in sorted(self.outcomes.items())]
        lines.append(f"  neighbour's answers, all alike: {neighbours}")
        assert len(set(map(frozenset, self._memory))) <= 1, "a process of the server was replaced"
        for process in self._memory[0] if self._memory else ():
            sizes = [f"{sizes[process] / 2**20:.1f}" for sizes in self._memory]
            lines.append(f"  {process[1]}, MiB after each {MEASURED_EVERY} requests: {', '.join(sizes)}")
        return "\n".join(lines)

    def _neighbours_answer(self) -> str:
        chunks = self._client.stream(NEIGHBOURS_PROMPT, max_tokens=NEIGHBOURS_TOKENS, ignore_eos=True)
        return "".join(chunk.text for chunk in chunks)

    def _be_neighbour(self) -> int:
        count = 0
        while not self._done.is_set():
            assert self._neighbours_answer() == self._neighbours_text, "a neighbour's answer has changed"
            count += 1
        return count

    def _resident(self) -> dict[tuple[int, str], int]:
        """The bytes in memory of each process of the server, by its number and role."""
        return {(process.pid, _role(process)): process.memory_info().rss for process in self._server.processes()}


def _role(process: psutil.Process) -> str:
    arguments = process.cmdline()
    models = [Path(argument).parent.parent.name for argument in arguments if argument.endswith("/model.py")]
    modules = [argument for argument in arguments if argument.startswith("lightllm_backend.")]
    return [*models, *modules, Path(arguments[0]).name][0]
