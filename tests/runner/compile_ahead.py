# SPDX-License-Identifier: Apache-2.0
"""Compiles a small engine's kernels ahead, for a GPU that is not there: `python -m tests.runner.compile_ahead 4`,
which is how many requests it runs.

Prints how many were compiled by that, how many more a look at the same steps compiles, how many launchers were made,
and what is missing where one is to run after all. Must run without TRITON_INTERPRET.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lightllm_backend.kernels import launchers
from lightllm_backend.kv_pool.storage import KVStorage
from lightllm_backend.models.causal_lm import model_class
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.weights import dummy_weights
from lightllm_backend.parallel import TensorParallel
from lightllm_backend.runner.buckets import step_buckets
from lightllm_backend.runner.compile_ahead import compile_ahead
from lightllm_backend.runner.model_runner import ModelRunner
from lightllm_backend.runner.warm_up import compile_kernels
from perf.shapes import SHAPES
from tests.kernels.pretended_gpu import pretend_gpu

CPU = torch.device("cpu")
LONGEST = 64


class PretendedDriver:
    """Of an H100. What would load a kernel is not there."""

    def __init__(self) -> None:
        self.launchers = 0

    def launcher_cls(self, *_: Any) -> None:
        self.launchers += 1

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def small_runner(rows: int) -> ModelRunner:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(SHAPES["tiny"] | {"num_hidden_layers": 1}))
        config = ModelConfig.from_directory(directory)
    one_rank = TensorParallel.connect(0, 1, CPU, "")
    model = model_class(config.architecture)(config, launchers, one_rank, torch.bfloat16, CPU, LONGEST)
    dummy_weights(model, seed=0)
    storage = KVStorage(1, 1, model.num_kv_heads, model.head_dim, torch.bfloat16, CPU)
    return ModelRunner(model, storage, launchers, rows, LONGEST, [2], config.vocab_size, CPU)


def main(rows: int) -> None:
    driver = PretendedDriver()
    triton.runtime.driver.set_active(driver)
    pretend_gpu((9, 0))
    compiled: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **what: compiled.append(what["repr"])
    runner, buckets = small_runner(rows), step_buckets(rows, LONGEST, 32)
    run = JITFunction.run
    compile_kernels(runner, LONGEST, LONGEST, buckets)
    assert JITFunction.run is run, "launches are launches again"
    ahead, launchers_ahead = len(compiled), driver.launchers
    with torch.inference_mode():
        compile_ahead(lambda: [runner.launch_padding(bucket) for bucket in buckets])
    try:
        runner.launch_padding(buckets[0])
    except AttributeError as error:  # the driver cannot load it
        told = {"ahead": ahead, "launchers": launchers_ahead, "again": len(compiled) - ahead, "launch": str(error)}
        print(json.dumps(told))


if __name__ == "__main__":
    main(int(sys.argv[1]))
