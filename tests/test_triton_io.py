# SPDX-License-Identifier: Apache-2.0
"""The names and types in triton_io against every config.pbtxt, the rules that all of those must keep, and chunks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from lightllm_backend import triton_io
from lightllm_backend.request import FinishReason, RequestError, TokenChunk
from lightllm_backend.response import DecodeState
from lightllm_backend.triton_io import MODEL_TENSORS

REPOSITORY = Path(__file__).resolve().parents[1] / "model_repository"
STEPS = ("tokenizer", "generation", "detokenizer")


def read_config(model: str) -> Any:
    config = model_config_pb2.ModelConfig()
    text_format.Parse((REPOSITORY / model / "config.pbtxt").read_text(), config)
    return config


def declared(tensors: Any) -> dict[str, tuple[str, int]]:
    """name: (type, size), as triton_io has them."""
    found = {}
    for tensor in tensors:
        [size] = tensor.dims
        found[tensor.name] = (model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_"), size)
    assert len(found) == len(tensors), "a name stands there twice"
    return found


def test_each_model_is_known() -> None:
    assert {path.parent.name for path in REPOSITORY.glob("*/config.pbtxt")} == set(MODEL_TENSORS)


@pytest.mark.parametrize("model", MODEL_TENSORS)
def test_names_and_types(model: str) -> None:
    config = read_config(model)
    inputs, outputs = MODEL_TENSORS[model]
    assert declared(config.input) == inputs
    assert declared(config.output) == outputs


@pytest.mark.parametrize("model", MODEL_TENSORS)
def test_optional_inputs(model: str) -> None:
    """A client may leave out anything; between the steps everything that a chunk needs is there."""
    optional = {tensor.name for tensor in read_config(model).input if tensor.optional}
    required = {tensor.name for tensor in read_config(model).input} - optional
    assert required == {"generation": {"input_ids"}, "detokenizer": set(MODEL_TENSORS["detokenizer"][0])}.get(
        model, set()
    )


@pytest.mark.parametrize("model", MODEL_TENSORS)
def test_rules_for_all_models(model: str) -> None:
    config = read_config(model)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert not config.HasField("sequence_batching")
    assert any(path.is_file() for path in (REPOSITORY / model / "1").iterdir()), "git keeps no empty version folder"
    if config.platform == "ensemble":
        return
    assert config.backend == "python"
    assert (REPOSITORY / model / "1" / "model.py").is_file()
    [group] = config.instance_group
    assert group.count == 1 or model == "detokenizer", "only the detokenizer keeps nothing of a request"
    assert model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind) == "KIND_CPU"
    assert config.model_transaction_policy.decoupled == (model in ("generation", "detokenizer"))


def test_the_ensemble_wires_every_tensor() -> None:
    ensemble = read_config("lightllm")
    steps = {step.model_name: step for step in ensemble.ensemble_scheduling.step}
    assert tuple(steps) == STEPS
    known = set(MODEL_TENSORS["lightllm"][0])
    types = dict(MODEL_TENSORS["lightllm"][0])
    for model in STEPS:
        inputs, outputs = MODEL_TENSORS[model]
        step = steps[model]
        assert set(step.input_map) == set(inputs), f"{model} gets all its inputs"
        assert set(step.output_map) == set(outputs), f"all outputs of {model} go somewhere"
        for name, source in step.input_map.items():
            assert source in known, f"{model}'s {name} comes from a step before"
            assert types[source] == inputs[name]
        for name, target in step.output_map.items():
            assert target not in known, f"{target} is made twice"
            known.add(target)
            types[target] = outputs[name]
    assert set(MODEL_TENSORS["lightllm"][1]) == set(steps["detokenizer"].output_map.values())


def test_the_detokenizer_reads_generation_only() -> None:
    """Inputs that come from different decoupled models make the ensemble fail at load."""
    steps = {step.model_name: step for step in read_config("lightllm").ensemble_scheduling.step}
    made_by_generation = set(steps["generation"].output_map.values())
    assert set(steps["detokenizer"].input_map.values()) <= made_by_generation


def test_a_chunk_says_all_that_the_detokenizer_must_know(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    backend = SimpleNamespace(
        Tensor=lambda name, array: SimpleNamespace(name=lambda: name, as_numpy=lambda: array),
        InferenceResponse=lambda output_tensors: SimpleNamespace(inputs=lambda: output_tensors),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    )
    monkeypatch.setattr(triton_io, "pb_utils", backend, raising=False)
    sender = SimpleNamespace(send=lambda response, flags: sent.append(response))
    request = SimpleNamespace(get_response_sender=lambda: sender)
    first = DecodeState(stop_words=("x",), prefix="Q: ")
    responder = triton_io.GenerationResponder(request, "u", first, "/returns", in_ensemble=True)
    begun = TokenChunk("u", [7], [-1.0], num_prompt_tokens=3)
    ended = TokenChunk("u", [], [], FinishReason.FAILED, 3, error=RequestError("INTERNAL", "broken"))
    responder.send(begun, None, ask=False)
    responder.send(ended, [["x"], [240]], ask=True)
    responder.probe()
    read = [triton_io.read_chunk(response) for response in sent]
    assert [chunk and chunk.token_ids for chunk, _ in read] == [[7], [], None]
    assert [details["ask"] for _, details in read] == [False, True, True]
    assert {(details["uid"], details["return_address"]) for _, details in read} == {("u", "/returns")}
    assert read[0][0] == begun
    assert DecodeState(*read[0][1]["state"]) == DecodeState(stop_words=["x"], eos_ids=[], prefix="Q: ")
    assert read[1][0] is not None
    assert (read[1][0].finish_reason, str(read[1][0].error)) == (FinishReason.FAILED, "INTERNAL: broken")
    assert read[1][1]["state"] == [["x"], [240]]
