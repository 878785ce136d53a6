# SPDX-License-Identifier: Apache-2.0
"""dry_load: what a worker loads passes, and what it refuses by headers and configuration is told in the same words."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightllm_backend.models import weights
from lightllm_backend.models.dry_load import FAULT, dry_load
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.weight_files import opened
from tests.models.quantization.test_checkpoints import CASES, write
from tests.models.random_models import FAMILIES, save_random_model
from tests.models.step_harness import load_model, model_of
from tests.models.test_tied_head import different, write_tied

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def directory(tmp_path):
    return save_random_model("llama2_gqa", tmp_path)


def change(directory, **tensors):
    """Replace tensors of the model, or leave them out."""
    path = directory / "model.safetensors"
    changed = load_file(path) | tensors
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(tmp_path, family):
    dry_load(save_random_model(family, tmp_path), tp=2)


@pytest.mark.parametrize("name", CASES)
def test_every_quantised_format_passes(tmp_path, name):
    write(tmp_path, CASES[name])
    dry_load(tmp_path, tp=1)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(64, 63), torch.zeros(64), torch.zeros(64, 64, dtype=torch.int8), None],
    ids=["shape", "dimensions", "dtype", "missing"],
)  # fmt: skip
@pytest.mark.parametrize("tp", [1, 2])
def test_a_plain_tensor_is_refused_as_the_worker_does(directory, tensor, tp):
    change(directory, **{Q_PROJ: tensor})
    with pytest.raises(ModelError, match=Q_PROJ) as in_the_worker:
        load_model(directory)
    with pytest.raises(ModelError) as at_launch:
        dry_load(directory, tp)
    assert str(at_launch.value) == str(in_the_worker.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bin_is_checked_if_its_header_can_be_read_alone(directory, zipped):
    tensors = load_file(directory / "model.safetensors") | {Q_PROJ: torch.zeros(64, 63)}
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    if zipped:
        with pytest.raises(ModelError, match=rf"pytorch_model\.bin: {Q_PROJ} has the shape"):
            dry_load(directory, tp=1)
    else:
        dry_load(directory, tp=1)


def test_a_group_that_ranks_would_cut_is_told(tmp_path):
    write(tmp_path, CASES["gptq"])
    with pytest.raises(ModelError, match=r"down_proj: tp = 2 gives a rank 28 of 56 .* allowed: 1"):
        dry_load(tmp_path, tp=2)


@pytest.mark.parametrize("head", [different, torch.clone, lambda embeddings: embeddings[:-1].clone()])
def test_a_head_beside_tied_embeddings(tmp_path, head):
    """Only values tell a copy from a head of its own. Both are served."""
    write_tied(tmp_path, "llama2_gqa", head)
    if head in (different, torch.clone):
        dry_load(tmp_path, tp=1)
        return
    with pytest.raises(
        ModelError, match=r"lm_head\.weight has the shape \[198, 64\]; config.json makes it \[199, 64\]"
    ):
        dry_load(tmp_path, tp=1)


@pytest.mark.parametrize("weight_dtype", ["int8", "fp8"])
def test_weights_that_are_quantised_on_the_fly_have_to_be_floats(directory, weight_dtype):
    dry_load(directory, 2, weight_dtype, head_dtype="int8")
    change(directory, **{Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)})
    config = ModelConfig.from_directory(directory).with_weight_dtype(weight_dtype, "int8", 1)
    with pytest.raises(ModelError, match=f"{Q_PROJ} has the dtype int8; one of float16, .* is needed") as in_the_worker:
        model_of(directory, config)
    with pytest.raises(ModelError) as at_launch:
        dry_load(directory, 1, weight_dtype, head_dtype="int8")
    assert str(at_launch.value) == str(in_the_worker.value)


def test_no_values_are_read(directory, monkeypatch):
    def read(part):
        raise AssertionError(f"{part} is read")

    @contextmanager
    def headers(path):
        with opened(path) as sources:
            yield {name: replace(source, read=read) for name, source in sources.items()}

    monkeypatch.setattr(weights, "opened", headers)
    dry_load(directory, tp=1)
    with pytest.raises(AssertionError, match="is read"):
        load_model(directory)


def test_the_command_prints_one_line(directory):
    change(directory, **{Q_PROJ: torch.zeros(64, 63)})
    command = [sys.executable, "-m", "lightllm_backend.models.dry_load", str(directory), "1", "auto", "auto"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ)
    assert done.returncode == FAULT
    assert done.stdout == (
        f"{directory / 'model.safetensors'}: {Q_PROJ} has the shape [64, 63]; config.json makes it [64, 64]\n"
    )
    assert done.stderr == ""
