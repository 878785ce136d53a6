# SPDX-License-Identifier: Apache-2.0
"""A model, a repository and settings for the launch command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.free_ports import free_ports
from tests.launch.command_line import MODEL

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(ROOT / "tests" / "data" / "byte_level", directory)
    (directory / "config.json").write_text(json.dumps(MODEL))
    save_file(random_tensors(), directory / "model.safetensors")
    return directory


def random_tensors() -> dict[str, NDArray[np.float32]]:
    """The weights of MODEL."""
    vocabulary, hidden, features = MODEL["vocab_size"], MODEL["hidden_size"], MODEL["intermediate_size"]
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {
        "mlp.gate_proj": (features, hidden),
        "mlp.up_proj": (features, hidden),
        "mlp.down_proj": (hidden, features),
    }
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    shapes = {f"model.layers.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    draw = np.random.default_rng(1)
    return {f"{name}.weight": draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "repository" / "generation").mkdir(parents=True)
    (tmp_path / "repository" / "generation" / "config.pbtxt").write_text("")
    return tmp_path / "repository"


@pytest.fixture
def settings(model_dir: Path) -> dict[str, str]:
    http_port, grpc_port, metrics_port = map(str, free_ports(3))
    ports = {"http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port}
    # Without load_format dummy, the launch command takes seconds to look at the weights.
    limits = {"max_req_total_len": "32", "max_req_input_len": "16"}
    return {"model_dir": str(model_dir), "load_format": "dummy", **limits, **ports}
