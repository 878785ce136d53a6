# SPDX-License-Identifier: Apache-2.0
"""Which files of a model directory are the model, and what is said of those that are not, or are quantised."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightllm_backend.models.dry_load import dry_load
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.find_weights import NOT_THE_MODEL, check_weight_files, holds_tensor
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.unsupported import QUANTIZED_TENSORS
from lightllm_backend.models.weight_files import weight_files
from tests.models.step_harness import load_model

NORM = "model.norm.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
LORA = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)}


@pytest.fixture
def directory(tmp_path):
    """A little model, as transformers writes it: model.safetensors."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def marked(tensors, number):
    """The same model with a final norm that tells which file it is from."""
    return {**tensors, NORM: torch.full_like(tensors[NORM], number)}


def write(path, tensors):
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def write_index(directory, name, files):
    placed = {f"tensor {number}": file for number, file in enumerate(files)}
    placed |= dict.fromkeys(tensors_of(directory / files[0]), files[0])
    (directory / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def tensors_of(path):
    return torch.load(path) if path.suffix == ".bin" else load_file(path)


def mark_of(directory) -> float:
    """Which file the model is from."""
    mark = float(load_model(directory).norm.weight[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert theirs.model.norm.weight[0].item() == mark
    return mark


# Best first. What transformers 5.23 prefers, so do we.
ORDER = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("best", range(len(ORDER)))
def test_the_usual_names_in_transformers_order(directory, best):
    tensors = tensors_of(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    for number, name in list(enumerate(ORDER))[best:]:
        shard = name if "index" not in name else f"shard-{number}.{'bin' if 'bin' in name else 'safetensors'}"
        write(directory / shard, marked(tensors, number))
        if shard != name:
            write_index(directory, name.removesuffix(".index.json"), [shard])
    assert mark_of(directory) == best


NEIGHBOURS = {
    "adapter_model.safetensors": LORA,
    "adapter_model.bin": LORA,
    "consolidated.safetensors": {"layers.0.attention.wq.weight": torch.ones(2, 2)},
    "training_args.bin": {"lr": 1.0},
    "optimizer.bin": {"state": {}},
    "scheduler.bin": {"last_epoch": 3},
    "sampler.bin": {"seed": 3},
}


@pytest.mark.parametrize("name", NEIGHBOURS)
@pytest.mark.parametrize("usual", ["model.safetensors", "pytorch_model.bin"])
def test_the_usual_name_wins_over_what_lies_beside_it(directory, caplog, usual, name):
    tensors = tensors_of(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    write(directory / usual, marked(tensors, 5))
    write(directory / name, NEIGHBOURS[name])
    assert mark_of(directory) == 5
    assert (f"{name} beside the model is not used" in caplog.text) == name.startswith("adapter")


@pytest.mark.parametrize("usual", ["model-00001-of-00001.safetensors", "model.fp16.safetensors", "mine.bin"])
def test_without_a_usual_name_all_are_read_but_what_is_known_to_be_something_else(directory, usual):
    tensors = tensors_of(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    write(directory / usual, marked(tensors, 5))
    for name, others in NEIGHBOURS.items():
        write(directory / name, others)
    assert float(load_model(directory).norm.weight[0]) == 5
    assert all(name.startswith(NOT_THE_MODEL) for name in NEIGHBOURS)


def test_two_files_with_the_same_tensor_are_refused(directory):
    tensors = tensors_of(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory / "model.fp16.safetensors")
    write(directory / "model.bf16.safetensors", tensors)
    with pytest.raises(ModelError, match=r"model\.fp16\.safetensors: .* is in model\.bf16\.safetensors too; one file"):
        load_model(directory)


@pytest.mark.parametrize("config", [None, {}, {"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_adapter_alone_says_that_it_is_one(directory, config, suffix):
    (directory / "model.safetensors").unlink()
    write(directory / f"adapter_model.{suffix}", LORA)
    if config is not None:
        (directory / "adapter_config.json").write_text(json.dumps(config))
    base = "meta-llama/Llama-2-7b-hf" if config else "its base model"
    message = rf"{directory}: holds a PEFT adapter and no model; .*: merge the adapter into {base} \(peft"
    with pytest.raises(ModelError, match=message):
        load_model(directory)
    if config is not None:
        (directory / "config.json").unlink()
        with pytest.raises(ModelError, match=message):
            ModelConfig.from_directory(directory)


def test_a_model_beside_an_adapters_config_is_served(directory):
    (directory / "adapter_config.json").write_text("{}")
    assert load_model(directory).norm is not None


def test_an_authors_own_format_says_so(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(ModelError, match=r"authors' own format \(params\.json\); a Hugging Face model .* convert it"):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize("name", ["llama.Q4_1.gguf", "consolidated.00.pth", "consolidated.safetensors", "tf_model.h5"])
def test_files_of_other_formats_are_named(directory, name):
    (directory / "model.safetensors").rename(directory / name)
    with pytest.raises(ModelError, match=rf"there are no weights; .* \({name} is in another format: convert it\)"):
        load_model(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_says_so(directory, name):
    (directory / "model.safetensors").unlink()
    (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ModelError, match=rf"{name}: is a pointer of Git LFS, not the file itself; .*git lfs pull"):
        load_model(directory)


# What each tool puts in the place of a weight.
QUANTIZED = {
    "GPTQ": (
        {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.half, "g_idx": torch.int32},
        "GPTQ or AWQ",
    ),
    "AWQ": ({"scales": torch.half, "qweight": torch.int32, "qzeros": torch.int32}, "GPTQ or AWQ"),
    "4 bits": (
        {"weight": torch.uint8, "weight.absmax": torch.uint8, "weight.quant_state.bitsandbytes__nf4": torch.uint8},
        "bitsandbytes",
    ),
    "8 bits": ({"weight": torch.int8, "SCB": torch.float32}, "bitsandbytes"),
    "quanto": (
        {"weight._data": torch.int8, "weight._scale": torch.half, "input_scale": torch.half},
        "optimum-quanto",
    ),
    "torchao": ({"_weight_qdata": torch.float8_e4m3fn, "_weight_scale": torch.float32}, "torchao"),
    "packed": ({"weight_packed": torch.int32, "weight_scale": torch.half}, "compressed-tensors"),
    "float8": ({"weight": torch.float8_e4m3fn, "weight_scale": torch.float32}, "scales"),
    "float8 in blocks": ({"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32}, "scales"),
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("tool", QUANTIZED)
def test_quantised_weights_without_the_key_say_what_they_are(directory, tool, suffix):
    tensors = tensors_of(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    del tensors[Q_PROJ]
    parts, method = QUANTIZED[tool]
    tensors |= {Q_PROJ.replace("weight", part): torch.ones(2, 2).to(dtype) for part, dtype in parts.items()}
    path = directory / ("model.safetensors" if suffix == "safetensors" else "pytorch_model.bin")
    write(path, tensors)
    assert weight_files(directory) == [path]
    with pytest.raises(
        ModelError, match=rf"{path.name}: .*q_proj.* quantised with {method}, but no quantization_config"
    ):
        load_model(directory)


def test_no_name_of_a_model_is_taken_for_a_quantised_one(directory):
    ends = {end for ends in QUANTIZED_TENSORS.values() for end in ends}
    assert not ends & {name.rpartition(".")[2] for name in tensors_of(directory / "model.safetensors")}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_numbers_that_are_no_floats_of_16_bits_or_more_are_refused(directory, dtype, suffix):
    tensors = tensors_of(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    tensors[Q_PROJ] = tensors[Q_PROJ].to(dtype)
    path = directory / ("model.safetensors" if suffix == "safetensors" else "pytorch_model.bin")
    write(path, tensors)
    with pytest.raises(ModelError, match=rf"{path.name}: {Q_PROJ} has the dtype \w+; one of float16, .* is needed: an"):
        load_model(directory)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_are_converted(directory, dtype, suffix):
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(directory / "model.safetensors").items()}
    (directory / "model.safetensors").unlink()
    write(directory / ("model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"), tensors)
    slots = load_model(directory).weight_map()
    for name, tensor in tensors.items():
        torch.testing.assert_close(slots[name].target, tensor.float(), rtol=0, atol=0)


def header(size):
    """A header of safetensors for one tensor of `size` bytes, with its length before it."""
    described = json.dumps({NORM: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(described).to_bytes(8, "little") + described


INDEX = "model.safetensors.index.json"
BROKEN = {
    "no weights": ({}, "there are no weights"),
    "other formats": ({"model.gguf": b"GGUF"}, r"there are no weights; .* \(model.gguf is in another format"),
    "an index that is no JSON": ({INDEX: b"{"}, "index.json: is not valid JSON: "),
    "an index of files alone": ({INDEX: b'["a"]'}, "index.json: holds an array; a JSON object is needed"),
    "an index without a map": ({INDEX: b"{}"}, "index.json: weight_map is missing; an object that maps tensors to the"),
    "an empty index": ({INDEX: b'{"weight_map": {}}'}, "index.json: weight_map is {}; an object that maps tensors to"),
    "a list of files": ({INDEX: b'{"weight_map": ["a"]}'}, r"index.json: weight_map is \['a'\]; an object is needed"),
    "no name of a file": ({INDEX: b'{"weight_map": {"a": null}}'}, "index.json: weight_map.a is null; the name of a"),
    "an absent shard": ({INDEX: b'{"weight_map": {"a": "b.bin"}}'}, "names files that are not there: b.bin; download"),
    "an empty file": ({"model.safetensors": b""}, "model.safetensors: cannot be read: .*; download it again"),
    "half a length": ({"model.safetensors": header(9)[:5]}, "model.safetensors: cannot be read: .*; download it again"),
    "half a header": ({"model.safetensors": header(9)[:30]}, "model.safetensors: cannot be read: .*invalid header"),
    "no data": ({"model.safetensors": header(9)}, "model.safetensors: cannot be read: .*not fully covered"),
    "data cut short": ({"model.safetensors": header(9) + b"8 bytes."}, "cannot be read: .*not fully covered"),
    "a page of HTML": ({"model.safetensors": b"<html>" * 99}, "model.safetensors: cannot be read: .*header too large"),
    "a pointer": ({"model.safetensors": b"version https://git-lfs.github.com/spec/v1"}, "pointer of Git LFS"),
    "a pointer to a .bin": ({"pytorch_model.bin": b"version https://git-lfs.github.com/spec/v1"}, "pointer of Git LFS"),
    "a .bin cut short": ({"pytorch_model.bin": b"PK\3\4"}, "pytorch_model.bin: cannot be read: the file is cut short"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_the_launch_command_says_of_broken_files_is_what_the_worker_says(directory, broken):
    files, message = BROKEN[broken]
    (directory / "model.safetensors").unlink()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    with pytest.raises(ModelError, match=message) as at_launch:
        check_weight_files(directory)
    with pytest.raises(ModelError) as in_the_worker:
        load_model(directory)
    assert str(at_launch.value) == str(in_the_worker.value)


SHARD = "model-00001-of-00001.safetensors"


@pytest.mark.timeout(60)  # to open a pipe waits for its writer
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX, SHARD, "pytorch_model.bin", "mine.bin"])
def test_what_is_not_a_file_is_named(directory, name, make):
    (directory / "model.safetensors").rename(directory / "kept")
    if name == SHARD:
        (directory / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    (directory / name).unlink(missing_ok=True)
    make(directory / name)
    needed = "a JSON object" if name == "config.json" else "weights, or an index of such files,"
    with pytest.raises(ModelError, match=rf"/{name}: is not a file; a file with {needed}.* is needed"):
        dry_load(directory, tp=1)
    if name != "config.json":
        with pytest.raises(ModelError, match=rf"/{name}: is not a file"):
            check_weight_files(directory)
        assert not holds_tensor(directory, ["lm_head.weight_scale"])


def test_a_file_behind_links_is_a_file(directory):
    """As in Hugging Face's cache."""
    (directory / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (directory / name).rename(directory / "blobs" / name)
        (directory / name).symlink_to(f"blobs/{name}")
    dry_load(directory, tp=1)


def test_one_broken_shard_of_many_is_named(directory):
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    (directory / "b.safetensors").write_bytes(header(9) + b"8 bytes.")
    write_index(directory, "model.safetensors", ["a.safetensors", "b.safetensors"])
    with pytest.raises(ModelError, match=r"b\.safetensors: cannot be read"):
        check_weight_files(directory)


def test_a_link_to_a_file_that_has_gone_is_told(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("blobs/of-a-cache")
    for check in (check_weight_files, load_model):
        with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read: No such file or directory; downl"):
            check(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_large_file_is_checked_without_its_data(directory, name):
    """A TiB of zeros, which the file system does not store: reading it would take minutes."""
    (directory / "model.safetensors").unlink()
    with (directory / name).open("wb") as file:
        file.write(header(1 << 40))
        file.truncate(file.tell() + (1 << 40))
    check_weight_files(directory)
