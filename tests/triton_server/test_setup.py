# SPDX-License-Identifier: Apache-2.0
"""How a model starts: its shared memory becomes its user's alone."""

from __future__ import annotations

import mmap
import stat
import uuid
from pathlib import Path

from lightllm_backend.triton_server.setup import SHARED_MEMORY, hide_shared_memory


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
