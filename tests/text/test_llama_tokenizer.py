# SPDX-License-Identifier: Apache-2.0
"""LLaMA's real tokenizer, as tokenizer.model alone and as tokenizer.json, on llama.cpp's test vectors."""

import pytest

from lightllm_backend.text.text_stream import TextStream
from lightllm_backend.text.tokenizer import Tokenizer
from tests.data.make_tokenizers import llama_tokenizer_json
from tests.text.llama_vocabulary import fetched_files, sentencepiece_model, vectors


@pytest.fixture(scope="module")
def test_vectors() -> list[tuple[str, list[int]]]:
    return vectors(fetched_files())


@pytest.fixture(scope="module")
def model() -> bytes:
    return sentencepiece_model(fetched_files())


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: bytes) -> Tokenizer:
    directory = tmp_path_factory.mktemp("llama")
    if request.param == "tokenizer.model":
        (directory / "tokenizer.model").write_bytes(model)
    else:
        llama_tokenizer_json(model).save(str(directory / "tokenizer.json"))
    return Tokenizer.load(directory)


def test_hello(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 32000
    assert tokenizer.encode("Hello world") == [1, 15043, 3186]


def test_every_vector_is_encoded_as_it_says(tokenizer: Tokenizer, test_vectors: list[tuple[str, list[int]]]) -> None:
    assert len(test_vectors) == 47
    for text, ids in test_vectors:
        assert tokenizer.encode(text) == [1, *ids], text


def test_every_vector_comes_back_token_by_token(
    tokenizer: Tokenizer, test_vectors: list[tuple[str, list[int]]]
) -> None:
    for text, ids in test_vectors:
        stream = TextStream(tokenizer)
        pieces = [stream.push([token_id]) for token_id in [1, *ids]]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + stream.flush() == text
        assert tokenizer.decode([1, *ids]) == text


def test_an_answer_goes_on_from_its_prompt_wherever_the_text_is_cut(
    tokenizer: Tokenizer, test_vectors: list[tuple[str, list[int]]]
) -> None:
    for text, ids in test_vectors:
        for cut in range(0, len(ids) + 1, max(1, len(ids) // 8)):
            prompt_ids = [1, *ids[:cut]]
            stream = TextStream(tokenizer, prompt_ids=prompt_ids)
            answer = "".join([stream.push([token_id]) for token_id in ids[cut:]]) + stream.flush()
            assert tokenizer.decode_prompt(prompt_ids) + answer == text
