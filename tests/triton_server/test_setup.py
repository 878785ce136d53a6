# SPDX-License-Identifier: Apache-2.0
"""How a model starts: its settings are read, its shared memory becomes its user's alone."""

from __future__ import annotations

import mmap
import stat
import uuid
from pathlib import Path

import pytest

from lightllm_backend.config import ConfigError
from lightllm_backend.triton_server.setup import SHARED_MEMORY, hide_shared_memory, repository_parameters


def test_mapped_shared_memory_becomes_private() -> None:
    region = Path(SHARED_MEMORY, f"lightllm-test-{uuid.uuid4()}")
    region.write_bytes(bytes(mmap.PAGESIZE))
    region.chmod(0o644)
    try:
        with region.open("r+b") as file, mmap.mmap(file.fileno(), 0):
            hide_shared_memory()
        assert stat.S_IMODE(region.stat().st_mode) == 0o600
    finally:
        region.unlink()


@pytest.mark.parametrize("content", [b"\x80", b"parameters {", b"no_such_field: 1"])
def test_settings_of_a_config_pbtxt_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "generation").mkdir()
    (tmp_path / "generation" / "config.pbtxt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"generation/config\.pbtxt: "):
        repository_parameters(tmp_path)
