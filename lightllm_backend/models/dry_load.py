# SPDX-License-Identifier: Apache-2.0
"""Loads a checkpoint without its weights, so that what contradicts config.json is told before anything starts.

    python -m lightllm_backend.models.dry_load DIRECTORY TP WEIGHT_DTYPE HEAD_DTYPE

The launch command runs it as a process of its own, since importing torch takes seconds and memory. The model and the
checks are the worker's; its parameters are on torch's device `meta`, where they have a shape and a dtype alone. A fault
is one line on standard output, and the exit code FAULT. The process ends with the launch command.
"""

from __future__ import annotations

from lightllm_backend.end_with_parent import end_with_parent

if __name__ == "__main__":
    end_with_parent()  # before torch, whose import takes seconds

import logging
import sys
from pathlib import Path

import torch

from lightllm_backend.kernels import reference
from lightllm_backend.models.causal_lm import model_class
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.find_weights import find_weight_files, is_whole_archive
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.weights import check_weights
from lightllm_backend.parallel import TensorParallel

FAULT = 2


def dry_load(directory: str | Path, tp: int, weight_dtype: str = "auto", head_dtype: str = "auto") -> None:
    """Raise the ModelError that a worker with these settings would raise, unless only values of weights tell it."""
    shape = ModelConfig.from_directory(directory).with_weight_dtype(weight_dtype, head_dtype, tp)
    # All ranks check alike: a tensor's shape is that of the whole model.
    parallel, device, max_length = TensorParallel(0, tp), torch.device("meta"), 1
    model = model_class(shape.architecture)(shape, reference, parallel, torch.float32, device, max_length)
    # Files of torch.save from before torch 1.6 are no archives: reading their headers would read all of them.
    if all(path.suffix == ".safetensors" or is_whole_archive(path) for path in find_weight_files(Path(directory))):
        check_weights(model, directory)


def main(directory: str, tp: str, weight_dtype: str, head_dtype: str) -> int:
    logging.disable(logging.WARNING)  # the worker warns
    try:
        dry_load(directory, int(tp), weight_dtype, head_dtype)
    except ModelError as error:
        print(" ".join(str(error).split()))
        return FAULT
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
