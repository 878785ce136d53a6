# SPDX-License-Identifier: Apache-2.0
"""Options to tensors and back: names, datatypes, shapes, and what is refused before it is sent."""

from __future__ import annotations

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from lightllm_backend.client_options import CLIENT_OPTIONS, source
from lightllm_client import Chunk, Generation, Internal, InvalidArgument, LightLLMClient, Options
from lightllm_client.options import DATATYPES, HELP
from lightllm_client.tensors import chunk_from_response, infer_request

EXAMPLES = {
    "max_tokens": (64, ("INT32", [1], [64])),
    "do_sample": (True, ("BOOL", [1], [True])),
    "temperature": (0.5, ("FP32", [1], [0.5])),
    "top_p": (0.25, ("FP32", [1], [0.25])),
    "top_k": (-1, ("INT32", [1], [-1])),
    "min_p": (0.5, ("FP32", [1], [0.5])),
    "presence_penalty": (-1, ("FP32", [1], [-1.0])),
    "frequency_penalty": (1.5, ("FP32", [1], [1.5])),
    "repetition_penalty": (1.25, ("FP32", [1], [1.25])),
    "logit_bias": ({np.int64(5): -100, 7: 0.5}, ("BYTES", [1], ['{"5": -100.0, "7": 0.5}'])),
    "seed": (2**64 - 1, ("UINT64", [1], [2**64 - 1])),
    "min_tokens": (np.int64(3), ("INT32", [1], [3])),
    "ignore_eos": (np.bool_(True), ("BOOL", [1], [True])),
    "stop_words": (["\n\n", "尾", ""], ("BYTES", [3], ["\n\n", "尾", ""])),
    "stop_token_ids": ([2, np.int64(0)], ("INT32", [2], [2, 0])),
    "exclude_input_in_output": (False, ("BOOL", [1], [False])),
    "parse_special": (False, ("BOOL", [1], [False])),
    "skip_special_tokens": (False, ("BOOL", [1], [False])),
    "return_log_probs": (True, ("BOOL", [1], [True])),
    "top_logprobs": (3, ("INT32", [1], [3])),
    "structured_output": ({"regex": "a"}, ("BYTES", [1], ['{"regex": "a"}'])),
    "allowed_token_ids": ([5, np.int32(7)], ("INT32", [2], [5, 7])),
    "prompt_logprobs": (5, ("INT32", [1], [5])),
    "n": (1, ("INT32", [1], [1])),
    "tenant": ("Ünit 7", ("BYTES", [1], ["Ünit 7"])),
    "priority": (-3, ("INT32", [1], [-3])),
}


def test_the_options_are_those_of_the_servers_table():
    assert CLIENT_OPTIONS.read_text() == source(), "run python -m lightllm_backend.client_options"


def test_every_option_has_a_datatype_a_help_text_and_an_example():
    assert set(Options.__annotations__) == set(DATATYPES) == set(HELP) == set(EXAMPLES)


def test_every_option_is_sent_as_its_tensor(fake_server):
    with LightLLMClient(fake_server.url) as client:
        client.generate("What?", **{name: value for name, (value, _) in EXAMPLES.items()})
    sent = fake_server.requests[0].tensors
    assert sent == {
        "text_input": ("BYTES", [1], ["What?"]),
        "stream": ("BOOL", [1], [False]),
        **{name: tensor for name, (_, tensor) in EXAMPLES.items()},
    }


def test_what_is_unset_is_not_sent(fake_server):
    with LightLLMClient(fake_server.url) as client:
        client.generate("Wörter 🗼\0")
    assert fake_server.requests[0].tensors == {
        "text_input": ("BYTES", [1], ["Wörter 🗼\0"]),
        "stream": ("BOOL", [1], [False]),
    }


@pytest.mark.parametrize("prompt", [[1, 2, 49151], (1, 2, 49151), np.array([1, 2, 49151])])
def test_token_ids_are_sent_as_input_ids(fake_server, prompt):
    with LightLLMClient(fake_server.url) as client:
        client.generate(prompt)
    assert fake_server.requests[0].tensors == {
        "input_ids": ("INT32", [3], [1, 2, 49151]),
        "stream": ("BOOL", [1], [False]),
    }


def test_one_stop_word_or_id_may_stand_without_a_list(fake_server):
    with LightLLMClient(fake_server.url) as client:
        client.generate("What?", stop_words="end", stop_token_ids=2)
    assert fake_server.requests[0].tensors["stop_words"] == ("BYTES", [1], ["end"])
    assert fake_server.requests[0].tensors["stop_token_ids"] == ("INT32", [1], [2])


def test_an_empty_prompt_is_left_to_the_server_to_refuse():
    assert list(infer_request("m", [], False, {}).inputs[0].shape) == [0]
    assert infer_request("m", "", False, {}).raw_input_contents[0] == b"\0\0\0\0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 2**31}, r"max_tokens is 2147483648; allowed: an integer from -2\*\*31"),
        ({"max_tokens": "12"}, "max_tokens is '12'"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": None}, "max_tokens is None"),
        ({"seed": -1}, "seed is -1; allowed: an integer from 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"top_p": "0.5"}, "top_p is '0.5'; allowed: a number"),
        ({"temperature": 1e300}, r"temperature is 1e\+300"),
        ({"do_sample": 1}, "do_sample is 1; allowed: True or False"),
        ({"stop_words": [1]}, "stop_words holds 1; allowed: strings"),
        ({"stop_words": b"end"}, "stop_words is b'end'"),
        ({"stop_words": 3}, "stop_words is 3; allowed: one or a sequence of strings"),
        ({"stop_token_ids": "2"}, "stop_token_ids is '2'; allowed: one or a sequence of integers"),
        ({"stop_token_ids": [2, "3"]}, "stop_token_ids is '3'; allowed: an integer"),
        ({"stop_token_ids": True}, "stop_token_ids is True; allowed: an integer"),
        ({"stop_words": "\ud800"}, "stop_words has the lone surrogate"),
        ({"logit_bias": [(5, 1)]}, "logit_bias is .*; allowed: a mapping of token ids to numbers, or its JSON"),
        ({"structured_output": ["a"]}, r"structured_output is \['a'\]; allowed: a mapping of JSON values, or its JSON"),
        ({"structured_output": {"choice": {1}}}, "structured_output is {'choice': .*; allowed: a mapping of JSON"),
        ({"logit_bias": {"x": 1}}, "logit_bias is {'x': 1}; allowed: a mapping"),
        ({"max_token": 3}, "max_token is not an option; allowed: max_tokens, do_sample"),
        ({"stop": ["."]}, "stop is not an option; stop_words is meant; allowed: max_tokens"),
    ],
)
def test_a_wrong_option_is_refused_with_its_name_and_value(options, message):
    with pytest.raises(InvalidArgument, match=message):
        infer_request("m", "What?", False, options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"What?", "the prompt is bytes"),
        (["What?"], "input_ids holds 'What\\?'"),
        ([1, -2], "input_ids holds -2"),
        ([2**31], "input_ids holds 2147483648"),
        ([True], "input_ids holds True"),
        ("a\udfff", "text_input has the lone surrogate '\\\\udfff' at 1"),
    ],
)
def test_a_wrong_prompt_is_refused(prompt, message):
    with pytest.raises(InvalidArgument, match=message):
        infer_request("m", prompt, False, {})


def test_a_response_without_an_output_is_an_error_that_names_it():
    with pytest.raises(Internal, match="no output text_output"):
        chunk_from_response(service_pb2.ModelInferResponse())


def test_joined_chunks_take_totals_and_the_last_state():
    first = Chunk("a", (1, 2), (-1.0, -2.0), -3.0, "", 5, 2)
    last = Chunk("b", (3,), (-0.5,), -3.5, "stop", 5, 1)
    assert Generation.join([first, last]) == Generation("ab", (1, 2, 3), (-1.0, -2.0, -0.5), -3.5, "stop", 5, 3)


def test_the_likeliest_tokens_are_those_of_each_token(fake_server):
    with LightLLMClient(fake_server.url) as client:
        chunks = list(client.stream("What?", max_tokens=3, top_logprobs=2))
        whole = client.generate("What?", max_tokens=3, top_logprobs=2)
    assert chunks[1].top_log_probs == ({1: -0.5, 2: -1.5},)
    assert whole.top_log_probs == ({0: -0.5, 1: -1.5}, {1: -0.5, 2: -1.5}, {2: -0.5, 3: -1.5})
    assert Generation.join(chunks) == whole
