# SPDX-License-Identifier: Apache-2.0
"""The parsers that read what others wrote, each with a strategy of inputs and a check.

A check returns if the parser gave a right answer, or the one error that it may raise. Any other exception is a finding.
"""

from __future__ import annotations

import json
import math
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from hypothesis import strategies as st

from lightllm_backend.config import ConfigError, EngineConfig
from lightllm_backend.front.chat.deltas import Message as ChatMessage
from lightllm_backend.front.chat.parsers import make_parser
from lightllm_backend.front.chat.tool_choice import ToolChoice
from lightllm_backend.front.lightllm.parameters import LIGHTLLM_PARAMETERS, MAX_ANSWERS, read_generate_request
from lightllm_backend.grammar.schema_place import place_of_error
from lightllm_backend.messages.channel import Channel, Message, frame_of
from lightllm_backend.messages.engine_messages import Cancel, Submit, Tokens
from lightllm_backend.messages.ensemble_messages import ChunkMessage, EnsembleContext
from lightllm_backend.messages.return_messages import ClientGone, DecodingFailed, Delivered
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.registry import ARCHITECTURES, MODEL_TYPES
from lightllm_backend.models.rotary import RotaryEmbedding
from lightllm_backend.models.weight_files import opened, weight_files
from lightllm_backend.models.weights import WeightSlot
from lightllm_backend.option_table import CANONICAL, MAX_INT32, MAX_STOP_WORDS
from lightllm_backend.options import parse_request
from lightllm_backend.request import FinishReason, Request, RequestError, RequestOptions, TokenChunk
from lightllm_backend.structured_output import (
    KINDS,
    of_guide,
    of_kind,
    response_format,
    structured_output,
    vllm_structured_outputs,
)
from lightllm_backend.text.response import DecodeState
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.text.tokenizer_settings import TokenizerError
from lightllm_backend.triton_server.setup import repository_parameters
from lightllm_client.chat import ChatTemplate, ChatTemplateError
from lightllm_client.tensors import infer_request
from tests.fuzz import front, http_calls
from tests.fuzz.target import Target
from tests.fuzz.values import damaged, integers, json_texts, json_values, mutated, scalars, texts

DATA = Path(__file__).parents[1] / "data"
# A message must be readable, and must not repeat what somebody sent by the megabyte.
MAX_MESSAGE = 20_000


_UNKNOWN = "x-unknown"  # a keyword that stands for one that cannot be followed
_CONVERTERS: dict[str, Callable[[Any, str], str]] = {
    "structured_output": lambda value, _: structured_output(value),
    "response_format": lambda value, _: response_format(value),
    "structured_outputs": lambda value, _: vllm_structured_outputs(value),
    **{kind: lambda value, _, kind=kind: of_kind(kind)(value) for kind in KINDS},  # type: ignore[misc]
    "guide": lambda value, guide: of_guide(value if isinstance(value, str) else "json_schema", guide),
}


def readable(error: Exception, beginning: str = "") -> None:
    assert 0 < len(str(error)) <= MAX_MESSAGE
    assert str(error).startswith(beginning)
    str(error).encode(errors="surrogateescape")  # bytes of a path that are no UTF-8 are allowed, other surrogates not


# Options of a request

_option_names = st.one_of(st.sampled_from((*CANONICAL, "id", "timeout", "triton_x", "colour")), texts)
_TENSORS_OF_OPTIONS = ("text_input", "max_tokens", "temperature", "stop_words", "seed", "input_ids")
_requests = st.tuples(
    mutated({"text_input": "a"}, _TENSORS_OF_OPTIONS),
    st.none() | json_texts(mutated({"max_tokens": 3}, tuple(CANONICAL))),
    st.dictionaries(_option_names, scalars, max_size=3),
)


def check_options(case: tuple[dict[str, Any], str | None, dict[str, Any]]) -> None:
    """A request that is accepted is within the table's limits and can be sent to a worker."""
    try:
        parsed = parse_request(*case)
    except RequestError as error:
        return readable(error, "INVALID_ARG: ")
    sampling = parsed.options.sampling
    assert (parsed.text is None) != (parsed.token_ids is None)
    assert 1 <= sampling.max_tokens <= MAX_INT32
    assert 0 <= sampling.min_tokens <= sampling.max_tokens
    assert 0 < sampling.top_p <= 1
    assert math.isfinite(sampling.temperature + sampling.presence_penalty + sampling.frequency_penalty)
    assert len(sampling.stop_words) <= MAX_STOP_WORDS
    frame_of(Submit(Request("uid", parsed.token_ids or (1,), sampling), 1))
    return None


# Messages between processes

_ids = st.integers(0, MAX_INT32)
_uids = st.text(max_size=9)
_chunks = st.builds(
    TokenChunk, _uids, st.lists(_ids, max_size=3), st.lists(st.floats(width=32, allow_nan=False), max_size=3),
    st.none() | st.sampled_from(FinishReason), _ids, st.none() | st.floats(0, 9),
    st.none() | st.builds(RequestError, st.sampled_from(RequestError.CODES), st.text(max_size=9)),
)  # fmt: skip
_messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Cancel, _uids),
    st.builds(ClientGone, _uids),
    st.builds(Delivered, _uids, st.none() | st.binary(max_size=9)),
    st.builds(DecodingFailed, _uids, st.text(max_size=9)),
    st.builds(
        Tokens, st.lists(_ids, max_size=3).map(lambda ids: np.array(ids, np.int64)),
        st.lists(_ids, max_size=3).map(lambda ids: np.array(ids, np.int32)),
        st.lists(st.tuples(_ids, _chunks), max_size=2),
    ),
)  # fmt: skip
_frames = _messages.flatmap(lambda message: st.tuples(st.just(message), damaged(frame_of(message))))


def check_frame(case: tuple[Message, bytes]) -> None:
    """A whole frame arrives as it was sent; a damaged one is a message or an error, and the next one arrives."""
    message, frame = case
    left, right = socket.socketpair()
    sender, receiver = Channel(left), Channel(right)
    try:
        sender.send_frame(frame)
        sender.send(Cancel("next"))
        try:
            received = receiver.receive()
        except Exception:  # noqa: BLE001 (whoever receives ends the connection, whatever the error)
            assert frame != frame_of(message)
        else:
            assert isinstance(received, Message)
            assert frame != frame_of(message) or frame_of(received) == frame
        assert receiver.receive() == Cancel("next")
    finally:
        sender.close()
        receiver.close()


_contexts = st.builds(EnsembleContext, st.builds(RequestOptions), _uids, st.none() | st.floats(0, 9))
_chunk_messages = st.builds(ChunkMessage, st.just("uid"), st.none() | _chunks, st.binary(max_size=3), st.booleans())
_sealed = (_contexts | _chunk_messages | st.builds(DecodeState)).map(lambda message: message.pack())
_packed = (
    st.lists(st.text(max_size=3) | st.integers(-9, 99) | st.binary(max_size=3) | st.none(), max_size=9).map(
        msgpack.packb
    )
    | _sealed
)
_ensemble = _packed.flatmap(damaged)


def check_ensemble(packed: bytes) -> None:
    """The bytes are a message that packs into the same ones, or an error."""
    for kind in (EnsembleContext, ChunkMessage, DecodeState):
        try:
            message = kind.unpack(packed)
        except (ValueError, TypeError):
            continue
        assert kind.unpack(message.pack()).pack() == message.pack()


# Files of a model directory

_SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    "rope_theta": 1e4, "torch_dtype": "float16", "tie_word_embeddings": False,
}  # fmt: skip
_SCALING = {
    "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "factor": 2.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    "truncate": True, "attention_factor": None,
}  # fmt: skip
_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}
_QUANTIZATIONS = (
    {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
     "modules_to_not_convert": ["lm_head"]},
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "checkpoint_format": "gptq",
     "dynamic": {"-:.*up_proj": {}, "down": {"bits": 8}}, "modules_in_block_to_quantize": [["mlp.up_proj"]]},
    {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": None, "weight_block_size": None},
    {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32, "sym": True,
     "data_type": "int", "extra_config": {"lm_head": {"bits": 8}, ".*up_proj": {"bits": 16}, "model.a": {}},
     "block_name_to_quantize": [["model.layers"]]},
    {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm*"]},
    {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "FP8"}}},
)  # fmt: skip
_TORCHAO = {
    "_type": "Float8DynamicActivationFloat8WeightConfig",
    "_version": 2,
    "_data": {"granularity": [{"_type": "PerRow"}, {"_type": "PerRow"}], "weight_dtype": None, "group_size": None},
}
_torchao = st.builds(
    lambda values, config, by_name: (
        values | {"quant_type": {"default": {"_type": "FqnToConfig", "_data": {"fqn_to_config": by_name}}}}
        if by_name
        else values | {"quant_type": {"default": config}}
    ),
    mutated({"quant_method": "torchao", "modules_to_not_convert": None, "include_input_output_embeddings": False}),
    mutated(_TORCHAO),
    st.none() | mutated({"_default": _TORCHAO, "re:.*up_proj": None, "lm_head": _TORCHAO}),
)
_GROUP = {"targets": ["Linear", "re:.*up_proj"], "format": None, "output_activations": None}
_WEIGHTS = {
    "num_bits": 8,
    "type": "int",
    "strategy": "channel",
    "group_size": None,
    "symmetric": True,
    "actorder": None,
}
_INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
_compressed = st.builds(
    lambda values, group, weights, inputs: (
        values | {"config_groups": {"group_0": group | {"weights": weights, "input_activations": inputs}}}
    ),
    mutated(
        {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["re:lm"]}, ("sparsity_config",)
    ),
    mutated(_GROUP),
    mutated(_WEIGHTS, ("block_structure",)),
    st.none() | mutated(_INPUTS),
)


@st.composite
def _configs(draw: st.DrawFn) -> str:
    model_type, architecture = draw(st.sampled_from(sorted(MODEL_TYPES.items())))
    known = tuple(ARCHITECTURES[architecture].defaults)
    values = draw(mutated({**_SMALL, "architectures": [architecture], "model_type": model_type}, known))
    if draw(st.booleans()):
        values[draw(st.sampled_from(("rope_scaling", "rope_parameters")))] = draw(
            st.sampled_from((_SCALING, _YARN, _LONGROPE)).flatmap(
                lambda scaling: mutated(scaling, ("rope_theta", "type", "partial_rotary_factor"))
            )
        )
    if draw(st.booleans()):
        values |= {"sliding_window": draw(integers), "use_sliding_window": True, "layer_types": draw(json_values)}
    if draw(st.booleans()):
        values["quantization_config"] = draw(st.sampled_from(_QUANTIZATIONS).flatmap(mutated) | _compressed | _torchao)
    return draw(json_texts(st.just(values)))


def in_directory(check: Callable[[Path, Any], None]) -> Callable[[Any], None]:
    """The check with a fresh directory."""

    def run(case: Any) -> None:
        directory = Path(tempfile.mkdtemp(prefix="lightllm-fuzz-"))
        try:
            check(directory, case)
        finally:
            shutil.rmtree(directory)

    return run


def check_config(directory: Path, case: tuple[str, str]) -> None:
    """A model that is accepted has sizes that the engine can compute with."""
    for name, text in zip(("config.json", "generation_config.json"), case, strict=True):
        (directory / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        config = ModelConfig.from_directory(directory)
    except ModelError as error:
        return readable(error)
    assert config.num_heads % config.num_kv_heads == 0
    assert min(config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim) >= 1
    assert config.max_sequence_length >= 1
    assert len(config.ropes) in (0, config.num_layers)
    for rope in set(config.ropes) if config.head_dim <= 1024 else ():
        cos, _, _ = RotaryEmbedding(rope, 4, torch.device("cpu"))(torch.tensor([1]), torch.tensor([2]))
        assert 2 * cos.shape[1] <= config.head_dim
    assert all(config.window(layer) >= 0 for layer in range(config.num_layers))
    for name in ("model.layers.0.mlp.up_proj", "lm_head"):
        scheme = config.quantization.scheme(name)
        assert scheme is None or scheme.group_size % 8 == 0
    assert all(token >= 0 for token in config.eos_ids)
    return None


_TOKEN = {"content": "<a>", "special": True, "lstrip": False, "normalized": False}
_SETTINGS = {
    "bos_token": "<s>", "eos_token": _TOKEN, "additional_special_tokens": ["<b>"], "add_bos_token": True,
    "added_tokens_decoder": {"511": _TOKEN}, "auto_map": None, "chat_template": "{{ messages[0].content }}",
}  # fmt: skip
_token_maps = st.dictionaries(integers.map(str) | texts, mutated(_TOKEN) | json_values, max_size=2)
_tokenizers = st.tuples(
    st.sampled_from(("byte_level", "llama")),
    json_texts(
        st.builds(
            lambda values, added: values | ({"added_tokens_decoder": added} if added else {}),
            mutated(_SETTINGS, ("extra_special_tokens", "pad_token")), _token_maps,
        )
    ),
    json_texts(mutated({"bos_token": "<s>"}, ("pad_token", "additional_special_tokens"))),
    json_texts(mutated({"<c>": 512}, ("<s>",))),
)  # fmt: skip


def check_tokenizer(directory: Path, case: tuple[str, str, str, str]) -> None:
    """A tokenizer that is accepted encodes and decodes."""
    data, *files = case
    shutil.copytree(DATA / data, directory, dirs_exist_ok=True)
    for name, text in zip(
        ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"), files, strict=True
    ):
        (directory / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        tokenizer = Tokenizer.load(directory, "slow" if data == "llama" else "auto", model_vocab_size=512)
    except TokenizerError as error:
        return readable(error)
    try:
        assert isinstance(tokenizer.decode(tokenizer.encode("a<a> b<c>")), str)
    except TokenizerError as error:
        return readable(error)
    return None


_BYTES_OF_DTYPES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "BOOL": 1,
}
_tensor_names = st.sampled_from(("a.weight", "b.bias", "x.qweight", "")) | st.text(max_size=9)


@st.composite
def _safetensors(draw: st.DrawFn) -> bytes:
    """A whole file of tensors with any names, dtypes and shapes, or one that was cut short.

    The library reads the header, and gets nothing worse than an interrupted download leaves.
    """
    header: dict[str, Any] = {}
    size = 0
    for name in draw(st.lists(_tensor_names, max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(_BYTES_OF_DTYPES))), draw(st.lists(st.integers(0, 4), max_size=4))
        begin, size = size, size + math.prod(shape) * _BYTES_OF_DTYPES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, size]}
    text = json.dumps(header).encode()
    file = len(text).to_bytes(8, "little") + text + bytes(size)
    return file[: draw(st.integers(0, len(file)))] if draw(st.integers(0, 3)) == 0 else file


_INDEX = {"metadata": {}, "weight_map": {"a.weight": "model-1.safetensors", "b.bias": "model-1.safetensors"}}
_file_names = st.sampled_from(("model-1.safetensors", "../model-1.safetensors", "/etc/hostname", ".", "")) | json_values
_indices = json_texts(
    st.builds(
        lambda values, name: values | {"weight_map": {"a.weight": name}},
        mutated(_INDEX), _file_names,
    ) | mutated(_INDEX)
)  # fmt: skip


def check_weights(directory: Path, case: tuple[str | None, bytes]) -> None:
    """The files are inside the model's directory, and each tensor has a shape and a dtype that is known or refused."""
    index, data = case
    (directory / "model-1.safetensors").write_bytes(data)
    if index is not None:
        path = directory / "model.safetensors.index.json"
        path.write_text(index, encoding="utf-8", errors="surrogatepass")
    try:
        for path in weight_files(directory):
            assert path.parent == directory
            with opened(path) as sources:
                for source in sources.values():
                    assert all(isinstance(size, int) and size >= 0 for size in source.shape)
                    WeightSlot(torch.empty(0), source.shape).check(source)
    except ModelError as error:
        readable(error)


# Structured output, up to what llguidance compiles

_schemas = st.recursive(
    scalars | st.builds(dict),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ("properties", "items", "anyOf", "$ref", "$defs", "enum", "const", "type", "format", "a/b~c", _UNKNOWN)
            )
            | texts,
            inner | st.sampled_from(("#/$defs/a", "object", "date-time")),
            max_size=4,
        ),
    ),
    max_leaves=12,
)
_asked = st.one_of(
    _schemas,
    st.dictionaries(st.sampled_from((*KINDS, "json", "type")), _schemas | st.lists(texts, max_size=3), max_size=2),
    st.builds(
        lambda kind, schema: {"type": kind, "json_schema": {"name": "a", "schema": schema}},
        st.sampled_from(("text", "json_object", "json_schema")), _schemas,
    ),
)  # fmt: skip
_structured = st.tuples(st.sampled_from(sorted(_CONVERTERS)), _asked | json_texts(_asked), texts)


def check_structured_output(case: tuple[str, Any, str]) -> None:
    """What is accepted is one text, which asks for itself; an error in a schema has a place in it."""
    name, value, guide = case
    try:
        text = _CONVERTERS[name](value, guide)
    except ValueError as error:
        return readable(error)
    if not text:
        return None
    [(kind, followed)] = json.loads(text).items()
    assert kind in KINDS
    assert structured_output(text) == text
    if kind == "json_schema":
        place = place_of_error(followed, lambda schema: _UNKNOWN if f'"{_UNKNOWN}":' in json.dumps(schema) else "")
        part = followed
        for step in place.split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            part = part[int(key)] if isinstance(part, list) else part[key]
    return None


# What a chat model says

_marks = st.sampled_from((
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>",
    "[", "]", "{", "}", ",", ";", ":", '"', "\\",
    '{"name": "f", "arguments": {"a": [1, "b"]}}', '{"name": "g", "parameters": "{}"}', '{"name": "f"', '"arguments": ',
    '"parameters": ', "null", "-1.5e3", "\n", " ", "\\u00e9", "é",
))  # fmt: skip
_answers = st.tuples(
    st.sampled_from(("hermes", "llama3", "none")), st.sampled_from(("think", "none")), st.booleans(), st.booleans(),
    st.lists(_marks | texts, max_size=12),
)  # fmt: skip
_TOOLS = [{"type": "function", "function": {"name": "f"}}]


def check_answer(case: tuple[str, str, bool, bool, list[str]]) -> None:
    """A message is the same whether it comes at once, in pieces or character by character."""
    calls, reasoning, is_inside, several, pieces = case
    text = "".join(pieces)
    messages = []
    for division in ([text], pieces, list(text)):
        parser = make_parser("", "<think>" if is_inside else "", ToolChoice(_TOOLS, None, several), calls, reasoning)
        deltas = [delta for piece in division for delta in parser.feed(piece)] + parser.finish()
        plain = ChatMessage.join(deltas).to_plain()
        for call in plain.get("tool_calls", ()):
            assert call.pop("id").startswith("call_")
        messages.append(plain)
    assert messages[0] == messages[1] == messages[2]


# Chat templates

_expressions = st.sampled_from((
    "messages[0].content", "messages | length", "bos_token", "missing", "missing.x", "loop.index", "messages | tojson",
    "1 / 0", "'a' * 3", "messages[0]['role'] | upper", "raise_exception('no')", "strftime_now('%Y')", "messages | sort",
    "x", "range(3) | list", "(1).real", "''.__class__", "messages.append(1)", "{'a': 1} | items | list", "1 ~ 2",
))  # fmt: skip
_pieces = st.recursive(
    st.one_of(
        st.text(st.characters(codec="ascii", exclude_characters="{}"), max_size=9),
        _expressions.map(lambda expression: f"{{{{ {expression} }}}}"),
        _expressions.map(lambda expression: f"{{% set x = {expression} %}}"),
        st.sampled_from(("{%", "{{", "{% endfor %}", "{# note #}", "{% break %}", "{% include 'a' %}")),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        inner.map(lambda body: f"{{% for message in messages %}}{body}{{% endfor %}}"),
        inner.map(lambda body: f"{{% if messages %}}{body}{{% else %}}b{{% endif %}}"),
        inner.map(lambda body: f"{{% macro m(a) %}}{body}{{% endmacro %}}{{{{ m(1) }}}}"),
        inner.map(lambda body: f"{{% generation %}}{body}{{% endgeneration %}}"),
    ),
    max_leaves=6,
)


def check_chat_files(directory: Path, case: tuple[str, str, str, str]) -> None:
    """Templates and special tokens are read from a model's directory or refused."""
    _, *files = case
    for name, text in zip(
        ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json"), files, strict=True
    ):
        (directory / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        ChatTemplate.load(directory).render([{"role": "user", "content": "Hi"}])
    except ChatTemplateError as error:
        readable(error)


_chats = st.tuples(
    _pieces,
    st.lists(mutated({"role": "user", "content": "Hi"}, ("reasoning_content", "thinking")), max_size=3),
    st.booleans() | st.sampled_from(("content", "reasoning", "x")),
    st.none() | st.lists(json_values, max_size=2),
)


def check_chat(case: tuple[str, list[dict[str, Any]], bool | str, list[Any] | None]) -> None:
    source, messages, continued, tools = case
    try:
        template = ChatTemplate(source, {"bos_token": "<s>"}, tokenizer_adds_bos=True)
        assert isinstance(template.render(messages, tools=tools, continue_final_message=continued), str)
    except ChatTemplateError as error:
        readable(error)


# Settings

# As config.pbtxt and the environment can spell them: no lone surrogates but those that stand for bytes.
_words = st.text(st.characters(exclude_categories=["Cs"], include_characters="\udc80\udcff"), max_size=9)
_setting_names = st.sampled_from((*EngineConfig.__dataclass_fields__, "colour", "Tp")) | _words
_setting_values = (
    _words | (integers | st.floats()).map(str) | st.sampled_from(("1,2", "auto", "cpu", "trace", "0x1", "１２", "1_0"))
)
_settings = st.tuples(
    st.dictionaries(_setting_names, _setting_values, max_size=3),
    st.dictionaries(_setting_names.map(lambda name: f"LIGHTLLM_{name.upper()}"), _setting_values, max_size=2),
)


def check_settings(case: tuple[dict[str, str], dict[str, str]]) -> None:
    """Settings that are accepted are the same after their way through the environment."""
    try:
        config = EngineConfig.build(*case)
    except ConfigError as error:
        return readable(error)
    assert EngineConfig.build({}, config.environment()) == config
    return None


_PBTXT = b'name: "generation"\nparameters { key: "tp", value: { string_value: "2" } }\nmax_batch_size: 0\n'


def check_pbtxt(directory: Path, data: bytes) -> None:
    (directory / "generation").mkdir()
    (directory / "generation" / "config.pbtxt").write_bytes(data)
    try:
        assert all(isinstance(value, str) for value in repository_parameters(directory).values())
    except ConfigError as error:
        readable(error)


# The front's requests in LightLLM's form

_lightllm_parameters = mutated({"max_new_tokens": 3, "do_sample": True}, LIGHTLLM_PARAMETERS)
_lightllm_bodies = mutated({"inputs": "a"}, ("parameters", "multimodal_params")) | st.fixed_dictionaries(
    {"inputs": st.just("a") | json_values, "parameters": _lightllm_parameters}
)


def check_lightllm_body(body: dict[str, Any]) -> None:
    """A body that is accepted becomes a request that the client can send."""
    try:
        asked = read_generate_request(body)
        infer_request("lightllm", asked.prompt, True, asked.options)
        assert 1 <= asked.n <= MAX_ANSWERS
    except RequestError as error:
        readable(error, "INVALID_ARG: ")


TARGETS = {
    "options": Target(_requests, check_options),
    "channel": Target(_frames, check_frame),
    "ensemble": Target(_ensemble, check_ensemble),
    "structured output": Target(_structured, check_structured_output),
    "answers": Target(_answers, check_answer),
    "config.json": Target(
        st.tuples(_configs(), json_texts(mutated({"eos_token_id": [2, 3]}))), in_directory(check_config)
    ),
    "tokenizer": Target(_tokenizers, in_directory(check_tokenizer)),
    "weights": Target(st.tuples(st.none() | _indices, _safetensors()), in_directory(check_weights)),
    "chat": Target(_chats, check_chat),
    "chat files": Target(_tokenizers, in_directory(check_chat_files)),
    "settings": Target(_settings, check_settings),
    "LightLLM's API": Target(_lightllm_bodies, check_lightllm_body),
    "config.pbtxt": Target(damaged(_PBTXT), in_directory(check_pbtxt)),
    "front": Target(http_calls.calls(), front.check, front.CALLS_EACH),
    "front's document": Target(http_calls.schema_calls(front.document()), front.check, front.CALLS_EACH),
}
