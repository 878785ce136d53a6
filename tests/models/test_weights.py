# SPDX-License-Identifier: Apache-2.0
"""load_weights: every kind of checkpoint gives the same parameters, and every broken one a clear error."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightllm_backend.kernels import reference
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.llama import LlamaForCausalLM
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.weights import dummy_weights, load_weights
from lightllm_backend.parallel import TensorParallel

CPU = torch.device("cpu")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def directory(tmp_path):
    """A little model with biases and an untied head, as transformers writes it: model.safetensors."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    return tmp_path


def tensors_of(directory):
    return load_file(directory / "model.safetensors")


def empty_model(directory, parallel=None, dtype=torch.float32, device=CPU) -> LlamaForCausalLM:
    config = ModelConfig.from_directory(directory)
    return LlamaForCausalLM(config, reference, parallel or TensorParallel(), dtype, device, max_length=8)


def loaded(directory, **settings) -> LlamaForCausalLM:
    model = empty_model(directory, **settings)
    for slot in model.weight_map().values():
        slot.target.fill_(torch.nan)
    load_weights(model, directory, progress=False)
    return model


def check_equal(model: LlamaForCausalLM, tensors) -> None:
    slots = model.weight_map()
    assert slots.keys() == tensors.keys()
    for name, slot in slots.items():
        torch.testing.assert_close(slot.target, tensors[name].to(slot.target.dtype), rtol=0, atol=0, msg=name)


def replace_by_bin(directory, tensors, shards=1, zipped=True):
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {}
    for shard in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = {name: tensors[name] for name in names[shard::shards]}
        torch.save(part, directory / file, _use_new_zipfile_serialization=zipped)
        files |= dict.fromkeys(part, file)
    if shards > 1:
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))


def shard_safetensors(directory, tensors):
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {}
    for shard in range(3):
        part = {name: tensors[name] for name in names[shard::3]}
        save_file(part, directory / f"model-{shard}.safetensors")
        files |= dict.fromkeys(part, f"model-{shard}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_safetensors(directory):
    check_equal(loaded(directory), tensors_of(directory))


def test_sharded_safetensors_with_and_without_an_index(directory):
    tensors = tensors_of(directory)
    shard_safetensors(directory, tensors)
    check_equal(loaded(directory), tensors)
    (directory / "model.safetensors.index.json").unlink()
    check_equal(loaded(directory), tensors)


@pytest.mark.parametrize(("shards", "zipped"), [(1, True), (1, False), (3, True)])
def test_bin(directory, shards, zipped):
    tensors = tensors_of(directory)
    replace_by_bin(directory, tensors, shards, zipped)
    check_equal(loaded(directory), tensors)


def test_safetensors_are_preferred_to_bin(directory):
    tensors = tensors_of(directory)
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, directory / "pytorch_model.bin")
    check_equal(loaded(directory), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_bin", [False, True])
def test_the_dtype_is_converted(directory, dtype, as_bin):
    tensors = tensors_of(directory)
    if as_bin:
        replace_by_bin(directory, tensors)
    check_equal(loaded(directory, dtype=dtype), tensors)


def test_fused_parameters_hold_their_parts_in_order(directory):
    tensors = tensors_of(directory)
    layer = loaded(directory).layers[1]
    prefix = "model.layers.1"
    qkv = [tensors[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkv"]
    gate_up = [tensors[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(layer.attention.qkv.weight, torch.cat(qkv))
    assert torch.equal(layer.mlp.gate_up.weight, torch.cat(gate_up))


@pytest.mark.parametrize("as_bin", [False, True])
def test_each_rank_holds_its_part(directory, as_bin):
    tensors = tensors_of(directory)
    if as_bin:
        replace_by_bin(directory, tensors)
    ranks = [loaded(directory, parallel=TensorParallel(rank, 2)).weight_map() for rank in (0, 1)]
    for name, dim in {
        Q_PROJ: 0,
        "model.layers.0.self_attn.v_proj.bias": 0,
        "model.layers.0.self_attn.o_proj.weight": 1,
        "model.layers.1.mlp.up_proj.weight": 0,
        "model.layers.1.mlp.down_proj.weight": 1,
        "model.embed_tokens.weight": 0,
        "lm_head.weight": 0,
    }.items():
        assert torch.equal(torch.cat([rank[name].target for rank in ranks], dim), tensors[name]), name
    for name in ("model.layers.0.mlp.down_proj.bias", "model.norm.weight"):
        assert all(torch.equal(rank[name].target, tensors[name]) for rank in ranks), name


@pytest.mark.parametrize("end", ["inv_freq", "cos_cached", "sin_cached"])
def test_tables_of_rotary_embeddings_are_ignored(directory, end):
    """Early versions of transformers saved inv_freq, ColossalAI saves all three (vllm-project/vllm issue 1977)."""
    tensors = tensors_of(directory)
    tables = {f"model.layers.{layer}.self_attn.rotary_emb.{end}": torch.ones(2) for layer in (0, 1)}
    save_file({**tensors, **tables}, directory / "model.safetensors")
    check_equal(loaded(directory), tensors)


def test_missing_and_left_over_tensors_are_named(directory):
    tensors = tensors_of(directory)
    tensors["model.layers.0.self_attn.q_norm.weight"] = tensors.pop(Q_PROJ)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        loaded(directory)
    assert f"tensors are missing, 1 in all: {Q_PROJ};" in str(caught.value)
    assert "tensors are not the model's, 1 in all: model.layers.0.self_attn.q_norm.weight;" in str(caught.value)


def test_a_missing_tensor_is_told_before_any_is_read(directory, monkeypatch):
    """With its file, if there is one only. Loading takes minutes, and the last shard may be the one that lacks it."""
    tensors = tensors_of(directory)
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors")
    model = empty_model(directory)
    for slot in model.weight_map().values():
        slot.target.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"model\.safetensors: tensors are missing, 1 in all: model\.norm\.weight;"):
        load_weights(model, directory, progress=False)
    assert all(slot.target.isnan().all() for slot in model.weight_map().values())


def test_many_missing_tensors_are_counted(directory):
    save_file({Q_PROJ: tensors_of(directory)[Q_PROJ]}, directory / "model.safetensors")
    with pytest.raises(ModelError, match=r"tensors are missing, 34 in all: model\.embed_tokens\.weight, .*, …;"):
        loaded(directory)


@pytest.mark.parametrize("parallel", [TensorParallel(0, 1), TensorParallel(1, 2)])
def test_a_wrong_shape_is_named(directory, parallel):
    tensors = tensors_of(directory)
    save_file({**tensors, Q_PROJ: torch.zeros(17, 16)}, directory / "model.safetensors")
    with pytest.raises(ModelError, match=rf"model\.safetensors: {Q_PROJ} has the shape \[17, 16\]; .* \[16, 16\]"):
        loaded(directory, parallel=parallel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("number", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_counted(directory, number, dtype):
    tensors = tensors_of(directory)
    down, norm = "model.layers.1.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight"
    tensors[Q_PROJ][3, 4:6] = number
    tensors[down][7, 8] = number
    save_file(tensors, directory / "model.safetensors")
    name = str(dtype).removeprefix("torch.")
    for changed, others in ((down, "; so does 1 other tensor"), (norm, "; so do 2 other tensors")):
        tensors[changed][5] = number
        save_file(tensors, directory / "model.safetensors")
        with pytest.raises(ModelError) as caught:
            loaded(directory, dtype=dtype)
        assert f"numbers that are NaN or infinite in {name}{others}; finite numbers are needed" in str(caught.value)


def test_numbers_beyond_float16_are_refused_in_it_alone(directory):
    tensors = tensors_of(directory)
    tensors[Q_PROJ][3, 4] = 65536.0
    save_file(tensors, directory / "model.safetensors")
    loaded(directory)
    with pytest.raises(ModelError) as caught:
        loaded(directory, dtype=torch.float16)
    assert str(caught.value) == (
        f"{directory / 'model.safetensors'}: {Q_PROJ} holds a number that is NaN or infinite in float16; finite "
        "numbers are needed, of at most 65504: --dtype bfloat16 or float32 has larger ones"
    )


def test_finite_numbers_whose_sum_is_not_are_no_fault(directory):
    tensors = tensors_of(directory)
    tensors[Q_PROJ].fill_(65504.0)
    save_file(tensors, directory / "model.safetensors")
    check_equal(loaded(directory, dtype=torch.float16), tensors)


@pytest.mark.parametrize("kept", [0, 4, 1000, -8])
def test_torn_safetensors_name_the_file(directory, kept):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read: .+; download it again"):
        loaded(directory)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0, 5, 1000, -8])
def test_torn_bin_names_the_file(directory, kept, zipped):
    replace_by_bin(directory, tensors_of(directory), zipped=zipped)
    path = directory / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: cannot be read.*download it again"):
        loaded(directory)


class RunsCode:
    def __reduce__(self):
        return (print, ("code of the checkpoint has run",))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_a_pickle_that_would_run_code_is_refused(directory, capsys, save):
    (directory / "model.safetensors").unlink()
    save({"weights": RunsCode()}, directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: cannot be read as a file of nothing but tensors"):
        loaded(directory)
    assert "has run" not in capsys.readouterr().out


def test_a_bin_of_something_else_is_refused(directory):
    replace_by_bin(directory, {"step": 3})
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: is not a dictionary of tensors"):
        loaded(directory)


def test_no_weights_at_all(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="there are no weights"):
        loaded(directory)


def test_an_index_that_names_absent_files_or_is_none(directory):
    shard_safetensors(directory, tensors_of(directory))
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"index\.json: names files that are not there: model-1\.safetensors;"):
        loaded(directory)
    # Nothing but files beside it.
    for name in ("../model.safetensors", "/etc/hostname", "..", "", None, 5, ["a"], "\ud800"):
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        needed = r"index\.json: weight_map\.a is .*; the name of a file beside the index is needed"
        with pytest.raises(ModelError, match=needed) as refused:
            loaded(directory)
        str(refused.value).encode()


def test_the_progress_bar_counts_tensors(directory, capsys):
    load_weights(empty_model(directory), directory)
    assert "Loading weights: 100%" in capsys.readouterr().err
    load_weights(empty_model(directory), directory, progress=False)
    assert capsys.readouterr().err == ""


def test_dummy_weights_are_seeded_and_normal(directory):
    first, again, other = (empty_model(directory, dtype=torch.float16) for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        for slot in model.weight_map().values():
            slot.target.fill_(torch.nan)
        dummy_weights(model, seed)
    for name, slot in first.weight_map().items():
        values = slot.target.float()
        assert torch.equal(slot.target, again.weight_map()[name].target)
        assert not torch.equal(slot.target, other.weight_map()[name].target)
        assert abs(values.mean() - float("norm" in name)) < 0.03
        assert 0.005 < values.std() < 0.04


def test_dummy_weights_agree_where_ranks_hold_the_same_and_differ_where_not(directory):
    ranks = [empty_model(directory, parallel=TensorParallel(rank, 2)) for rank in (0, 1)]
    for model in ranks:
        dummy_weights(model, seed=1)
    first, second = (model.weight_map() for model in ranks)
    for name, slot in first.items():
        shared = slot.target.shape == slot.full_shape
        assert torch.equal(slot.target, second[name].target) == shared, name
