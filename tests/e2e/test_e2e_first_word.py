# SPDX-License-Identifier: Apache-2.0
"""A vocabulary whose texts begin with a space that decoding drops (LLaMA's), and one token more than the model has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_client import Generation, LightLLMClient
from tests.e2e.calls import generate, in_parallel, infer_grpc, infer_http
from tests.e2e.launch_command import Traces
from tests.e2e.server import REPOSITORY, TritonServer
from tests.models.random_models import save_random_model
from tests.polling import poll

pytestmark = pytest.mark.e2e

TOKENIZER = Path(__file__).parents[1] / "data" / "llama"
VOCAB = 512  # of that tokenizer
PROMPTS = [
    "The quick",
    "a dog",
    "the server takes",
    "When the text ends",
    "a dog</s>",
    "words [/INST]",
    "in the sun until",
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """With tokenizer.model, since other servers have tokenizer.json; the directory is named in config.pbtxt."""
    folder = tmp_path_factory.mktemp("llama")
    directory = save_random_model("llama2_gqa", folder / "modèle 模型", VOCAB)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(VOCAB): {"content": "<pad>", "special": True, "normalized": False}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    repository = Path(shutil.copytree(REPOSITORY, folder / "repository"))
    with (repository / "generation" / "config.pbtxt").open("a", encoding="utf-8") as generation:
        generation.write(f'parameters {{ key: "model_dir", value: {{ string_value: "{directory}" }} }}')
    server = TritonServer(folder / "log", repository=repository, tokenizer_mode="slow")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def client(llama: TritonServer) -> Iterator[LightLLMClient]:
    with LightLLMClient(llama.grpc_url, timeout=120) as client:
        yield client


def answer_on_every_way(llama: TritonServer, client: LightLLMClient, prompt: str, options: dict[str, Any]) -> str:
    """The text of the answer, which is the same on every way, and what comes after the prompt in the text of both."""
    tokenizer = Tokenizer.load(TOKENIZER)
    prompt_ids = tokenizer.encode(prompt)
    echo = {"exclude_input_in_output": False}
    whole, streamed, by_ids, http, grpc, echoed, echoed_ids = in_parallel(
        [
            lambda: client.generate(prompt, **options),
            lambda: Generation.join(client.stream(prompt, **options)),
            lambda: client.generate(prompt_ids, **options),
            lambda: infer_http(llama, {"text_input": prompt, **options}),
            lambda: infer_grpc(llama, {"input_ids": prompt_ids, **options}),
            lambda: client.generate(prompt, **options, **echo),
            lambda: Generation.join(client.stream(prompt_ids, **options, **echo)),
        ]
    )
    before = tokenizer.decode(prompt_ids)
    expected = tokenizer.decode([*prompt_ids, *whole.token_ids]).removeprefix(before)
    assert {whole.text, streamed.text, by_ids.text, http["text_output"], grpc["text_output"]} == {expected}
    assert (echoed.text, echoed_ids.text) == (prompt + expected, before + expected)
    return expected


def test_a_first_word_keeps_its_space_on_every_way(llama: TritonServer, client: LightLLMClient) -> None:
    with_space = 0
    for seed, prompt in enumerate(PROMPTS):
        options = {"max_tokens": 12, "ignore_eos": True, "temperature": 1.0, "seed": seed}
        text = answer_on_every_way(llama, client, prompt, options)
        if text.startswith(" ") and text.strip():
            with_space += 1
            stop_words = [text[:2]]
            for answer in (
                client.generate(prompt, stop_words=stop_words, **options),
                Generation.join(client.stream(prompt, stop_words=stop_words, **options)),
            ):
                assert (answer.text, answer.finish_reason) == ("", "stop")
                assert answer.num_output_tokens < 12
    assert with_space, "or the test shows nothing"


def test_a_token_past_the_model_is_told_at_start_and_refused_in_a_prompt(llama: TritonServer) -> None:
    assert llama.log().count("the tokenizer has ids past the model's vocab_size of 512: 512 (<pad>)") == 1
    status, answer = generate(llama, {"text_input": "a dog<pad>"})
    assert status == 400
    assert "INVALID_ARG: text_input: '<pad>' is the token 512, which the model does not have" in answer["error"]
    status, answer = generate(llama, {"input_ids": [1, 512]})
    assert "INVALID_ARG: input_ids holds 512; allowed: 0 ≤ id < 512" in answer["error"]
    assert generate(llama, {"text_input": "a dog<pad>", "parse_special": False})[0] == 200
    assert generate(llama, {"text_input": "a dog", "stop_words": ["<pad>"]})[0] == 200


def test_a_killed_server_leaves_nothing(llama: TritonServer) -> None:
    """The last of the tests with this server."""
    run_directory = llama.run_directory()
    traces = Traces(llama.processes()[0], run_directory.parent / "none")
    llama.process.kill()
    llama.process.wait()
    assert poll(lambda: not traces.left() and not run_directory.exists()), traces.left()
