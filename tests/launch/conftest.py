# SPDX-License-Identifier: Apache-2.0
"""A model, a repository and settings for the launch command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from tests.free_ports import free_ports
from tests.launch.command_line import MODEL

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(ROOT / "tests" / "data" / "byte_level", directory)
    (directory / "config.json").write_text(json.dumps(MODEL))
    save_file({}, directory / "model.safetensors")  # the launch command looks whether it is whole, no further
    return directory


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "repository" / "generation").mkdir(parents=True)
    (tmp_path / "repository" / "generation" / "config.pbtxt").write_text("")
    return tmp_path / "repository"


@pytest.fixture
def settings(model_dir: Path) -> dict[str, str]:
    http_port, grpc_port, metrics_port = map(str, free_ports(3))
    ports = {"http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port}
    return {"model_dir": str(model_dir), "max_req_total_len": "32", "max_req_input_len": "16", **ports}
