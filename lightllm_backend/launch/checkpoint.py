# SPDX-License-Identifier: Apache-2.0
"""check_checkpoint: tells what is wrong with a checkpoint before anything is started, without reading its weights."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from lightllm_backend.config import EngineConfig
from lightllm_backend.environment import package_environment
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.find_weights import check_weight_files

_DRY_LOAD = "lightllm_backend.models.dry_load"
_FAULT = 2  # its exit code


def check_checkpoint(directory: Path, config: EngineConfig) -> None:
    """Raise ModelError for weights that a worker would refuse by their files' headers and the configurations.

    Files that are absent or cut short are told at once, all else after the seconds in which a process imports torch. If
    that process cannot run, or fails, the workers are left to tell; it has written to standard error why.
    """
    if config.load_format == "dummy":
        return
    check_weight_files(directory)
    if config.model_dir is None:  # the embedded model is of our own making
        return
    python = config.worker_python or sys.executable
    arguments = [str(directory), str(config.tp), config.weight_dtype, config.head_dtype]
    with contextlib.suppress(OSError):
        done = subprocess.run(
            [python, "-m", _DRY_LOAD, *arguments],
            check=False,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=package_environment(os.environ),
            start_new_session=True,  # Ctrl-C reaches this command alone, and the process ends with it
        )
        if done.returncode == _FAULT and done.stdout:
            raise ModelError(done.stdout.strip())
