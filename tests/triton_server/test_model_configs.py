# SPDX-License-Identifier: Apache-2.0
"""The table of tensors against every config.pbtxt, and the rules that every config.pbtxt must keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from lightllm_backend.triton_server import model_configs
from lightllm_backend.triton_server.tensors import BATCHED_ENSEMBLE, BATCHED_OUTPUT_NAMES, DIRECT_OUTPUTS, MODEL_TENSORS

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
STEPS = ("tokenizer", "generation", "detokenizer")

# What generation takes from those who call it by itself, and gives them; the ensemble has no use for it.
FOR_DIRECT_CALLERS = {"generation": {"sampling_parameters", *DIRECT_OUTPUTS}}


def read_config(model: str) -> Any:
    config = model_config_pb2.ModelConfig()
    text_format.Parse((REPOSITORY / model / "config.pbtxt").read_text(), config)
    return config


def declared(tensors: Any) -> dict[str, tuple[str, int]]:
    """name: (type, size), as tensors.py has them."""
    found = {}
    for tensor in tensors:
        *batch, size = tensor.dims
        assert batch == [1] * len(batch)
        assert list(tensor.reshape.shape) == [size] * len(batch), "the steps behind know no batch dimension"
        found[tensor.name] = (model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_"), size)
    assert len(found) == len(tensors), "a name stands there twice"
    return found


def test_each_model_is_known() -> None:
    assert {path.parent.name for path in REPOSITORY.glob("*/config.pbtxt")} == set(MODEL_TENSORS)


@pytest.mark.parametrize("model", MODEL_TENSORS)
def test_config_files_are_as_the_table_makes_them(model: str) -> None:
    text = (REPOSITORY / model / "config.pbtxt").read_text()
    assert model_configs.updated(model, text) == text, "run python -m lightllm_backend.triton_server.model_configs"
    emptied = text.replace('name: "finish_reason"', 'name: "reason"').replace('"prompt_ids"', '"ids"')
    assert model_configs.updated(model, emptied) == text


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


@pytest.mark.parametrize("name", ["lightllm", BATCHED_ENSEMBLE])
def test_an_ensemble_wires_every_tensor(name: str) -> None:
    ensemble = read_config(name)
    steps = {step.model_name: step for step in ensemble.ensemble_scheduling.step}
    assert tuple(steps) == STEPS
    known = set(MODEL_TENSORS[name][0])
    types = dict(MODEL_TENSORS[name][0])
    for model, follower in zip(STEPS, (*STEPS[1:], None), strict=True):
        inputs, outputs = MODEL_TENSORS[model]
        step = steps[model]
        own = FOR_DIRECT_CALLERS.get(model, set())
        assert set(step.input_map) == set(inputs) - own, f"{model} gets all its inputs"
        assert set(step.output_map) == set(outputs) - own, f"all outputs of {model} go somewhere"
        assert follower is None or set(step.output_map) == set(steps[follower].input_map)
        for tensor, source in step.input_map.items():
            assert source in known, f"{model}'s {tensor} comes from a step before"
            assert types[source] == inputs[tensor]
        for tensor, target in step.output_map.items():
            assert target not in known, f"{target} is made twice"
            known.add(target)
            types[target] = outputs[tensor]
    assert set(MODEL_TENSORS[name][1]) == set(steps["detokenizer"].output_map.values())


def test_the_batched_ensemble_is_the_other_but_for_shapes_and_a_name() -> None:
    plain, batched = read_config("lightllm"), read_config(BATCHED_ENSEMBLE)
    assert {(tensor.dims[0], len(tensor.dims)) for tensor in batched.input} == {(1, 2)}
    assert declared(plain.input) == declared(batched.input)
    assert BATCHED_OUTPUT_NAMES == {"cumulative_logprob": "cum_log_probs"}
    renamed = {BATCHED_OUTPUT_NAMES.get(name, name): kind for name, kind in declared(plain.output).items()}
    assert renamed == declared(batched.output)


def test_the_detokenizer_reads_generation_only() -> None:
    """Inputs that come from different decoupled models make the ensemble fail at load."""
    steps = {step.model_name: step for step in read_config("lightllm").ensemble_scheduling.step}
    made_by_generation = set(steps["generation"].output_map.values())
    assert set(steps["detokenizer"].input_map.values()) <= made_by_generation
