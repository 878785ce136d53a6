# SPDX-License-Identifier: Apache-2.0
"""A head that config.json ties to the embeddings where the files say otherwise: what transformers 5.23 makes of it."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightllm_backend.models import weights
from lightllm_backend.models.errors import ModelError
from lightllm_backend.parallel import TensorParallel
from tests.models.random_models import random_model
from tests.models.step_harness import check_steps, load_model
from tests.models.thread_parallel import run_ranks

HEAD = "lm_head.weight"
EMBEDDINGS = {
    "llama2_gqa": "model.embed_tokens.weight",
    "mistral_window": "model.embed_tokens.weight",
    "qwen2": "model.embed_tokens.weight",
    "bloom_8_heads": "transformer.word_embeddings.weight",
}


def shards_of(tensors):
    """Two files, with the head in one and the embeddings in the other."""
    last = {name: tensor for name, tensor in tensors.items() if name == HEAD}
    return [
        {name: tensor for name, tensor in tensors.items() if name != HEAD},
        last or {"spare.inv_freq": torch.ones(2)},
    ]


def write_files(directory, tensors, layout):
    (directory / "model.safetensors").unlink()
    name, suffix = ("model", ".safetensors") if "safetensors" in layout else ("pytorch_model", ".bin")
    save = save_file if suffix == ".safetensors" else torch.save
    if "sharded" not in layout:
        save(tensors, directory / f"{name}{suffix}")
        return
    placed = {}
    for number, shard in enumerate(shards_of(tensors)):
        save(shard, directory / f"{name}-{number}{suffix}")
        placed |= dict.fromkeys(shard, f"{name}-{number}{suffix}")
    (directory / f"{name}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def write_tied(directory, family, head, layout="safetensors"):
    """A model whose config.json ties its head; `head` makes what the files have as such of the embeddings."""
    model = random_model(family)
    model.config.tie_word_embeddings = True
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    assert config["tie_word_embeddings"]
    tensors = load_file(directory / "model.safetensors")
    tensors.pop(HEAD, None)
    own = head(tensors[EMBEDDINGS[family]])
    if own is not None:
        tensors[HEAD] = own
    write_files(directory, tensors, layout)


def different(embeddings):
    """One number of the last token's, which is the last rank's."""
    head = embeddings.clone()
    head[-1, 3] += 2.0
    return head


def theirs(directory) -> transformers.PreTrainedModel:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    return model.eval()


LAYOUTS = ["safetensors", "sharded safetensors", "bin", "sharded bin"]
# Each layout of one family, and each other family in one layout.
CASES = [("llama2_gqa", layout) for layout in LAYOUTS] + [(family, LAYOUTS[1]) for family in [*EMBEDDINGS][1:]]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_different_head_is_used_with_a_warning(tmp_path, caplog, family, layout):
    write_tied(tmp_path, family, different, layout)
    model, transformer = load_model(tmp_path), theirs(tmp_path)
    assert "lm_head.weight differs from" in caplog.text
    embeddings = transformer.get_input_embeddings().weight
    assert not torch.equal(transformer.get_output_embeddings().weight, embeddings)
    check_steps(model, transformer)
    assert HEAD in model.weight_map()


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_an_equal_copy_is_tied_without_a_word(tmp_path, caplog, family, layout):
    write_tied(tmp_path, family, torch.clone, layout)
    model = load_model(tmp_path)
    assert model.head.weight is model.embedding.weight
    assert HEAD not in model.weight_map()
    assert caplog.text == ""
    check_steps(model, theirs(tmp_path))


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_head_without_embeddings_is_both(tmp_path, caplog, family, layout):
    write_tied(tmp_path, family, torch.clone)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[EMBEDDINGS[family]]
    write_files(tmp_path, tensors, layout)
    check_steps(load_model(tmp_path), theirs(tmp_path))
    assert caplog.text == ""


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_neither_is_an_error_that_names_the_embeddings(tmp_path, family):
    write_tied(tmp_path, family, lambda embeddings: None)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[EMBEDDINGS[family]]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"tensors are missing, 1 in all: {EMBEDDINGS[family]};"):
        load_model(tmp_path)


@pytest.mark.parametrize("head", [different, torch.clone])
@pytest.mark.parametrize("family", EMBEDDINGS)
def test_all_ranks_decide_alike(tmp_path, family, head):
    """Though the difference is in the rows of the last alone: graphs must be of the same steps on all."""
    write_tied(tmp_path, family, head)
    ranks = [load_model(tmp_path, parallel=TensorParallel(rank, 2)) for rank in range(2)]
    assert [rank.head.tied for rank in ranks] == [head is torch.clone] * 2
    expected = theirs(tmp_path)
    run_ranks(2, lambda parallel: check_steps(load_model(tmp_path, parallel=parallel), expected))


@pytest.mark.parametrize("compared", [1, 1 << 24])
def test_tensors_are_compared_as_the_model_has_them(tmp_path, monkeypatch, compared):
    """In float16 the difference is none; a part of few rows at a time finds what the whole does."""
    monkeypatch.setattr(weights, "_COMPARED", compared)
    write_tied(tmp_path, "llama2_gqa", lambda embeddings: embeddings.half().float())
    assert load_model(tmp_path, dtype=torch.float16).head.tied
    assert not load_model(tmp_path, dtype=torch.float32).head.tied


def test_bare_names_are_found(tmp_path):
    write_tied(tmp_path, "llama2_gqa", different)
    tensors = load_file(tmp_path / "model.safetensors")
    write_files(tmp_path, {name.removeprefix("model."): tensor for name, tensor in tensors.items()}, "safetensors")
    assert not load_model(tmp_path).head.tied


def test_a_head_of_another_shape_is_named(tmp_path):
    write_tied(tmp_path, "llama2_gqa", lambda embeddings: embeddings[:-1].clone())
    with pytest.raises(
        ModelError, match=r"lm_head\.weight has the shape \[198, 64\]; config.json makes it \[199, 64\]"
    ):
        load_model(tmp_path)


def test_an_untied_head_must_be_there(tmp_path):
    """transformers 5.23 draws a random one and warns."""
    random_model("llama2_gqa").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"tensors are missing, 1 in all: lm_head\.weight; .* say tie_word_embeddings: true if"
    ):
        load_model(tmp_path)
