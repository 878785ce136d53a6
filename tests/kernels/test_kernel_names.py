# SPDX-License-Identifier: Apache-2.0
"""Launchers and references have the interface's names and signatures, and every kernel file has a launcher."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightllm_backend import kernels
from lightllm_backend.kernels import compiled, launchers, reference
from lightllm_backend.kernels.interface import Kernels

FOLDER = Path(kernels.__file__).parent

# What the kernels share, and the references.
NOT_KERNELS = {"__init__", "dependent_launch", "gluon", "hardware", "interface", "launchers", "reference", "sizes"}
NOT_KERNELS |= {
    "step_memo",
    "head_norm",
    "kv_scales",
    "prefill_loops",
    "choice",
    "lamport_buffers",
    "messages",
    "whole_prompt_tiles",
}
NOT_KERNELS |= {"gate"}
# A file of compiled/ has several kernels.
NOT_KERNELS |= {"attention", "dot_product", "numbers", "products", "rows", "threads"}
NOT_KERNELS |= {"weight", "grid_weight", "fragments", "load_tile", "product"}  # of weights of 4 and 8 bits
NOT_KERNELS |= {"prefetch_plan", "prefetch_products", "quantized_prefetch", "rounded_tokens", "unpacking"}
# Launched by linear_splits and gated_linear, gated_tiles by gated_linear alone, and by prefill_attention.
NOT_KERNELS |= {"linear_tiles", "linear_prefetch", "gated_tiles", "prefill_attention_hopper"}


def _functions(module):
    return {
        name: function
        for name, function in vars(module).items()
        if inspect.isfunction(function) and not name.startswith("_")
    }


def test_launchers_and_references_have_the_same_names():
    files = sorted(path.stem for path in FOLDER.rglob("*.py") if path.stem not in NOT_KERNELS)
    assert files == sorted(launchers.__all__) == sorted(reference.__all__)
    assert set(_functions(launchers)) == set(_functions(reference)) == set(_functions(compiled)) == set(files)


@pytest.mark.parametrize("name", launchers.__all__)
def test_a_kernel_and_its_reference_are_in_one_folder(name):
    launcher, plain = (_functions(module)[name].__module__ for module in (launchers, reference))
    assert launcher.rpartition(".")[0] == plain.rpartition(".")[0]
    assert launcher.endswith(f".{name}")
    assert plain.endswith(".reference")


@pytest.mark.parametrize("name", launchers.__all__)
def test_signatures_are_those_of_the_interface(name):
    declared = inspect.signature(_functions(Kernels)[name])
    expected = declared.replace(parameters=list(declared.parameters.values())[1:])  # without self
    assert inspect.signature(_functions(launchers)[name]) == expected
    assert inspect.signature(_functions(reference)[name]) == expected
    assert inspect.signature(_functions(compiled)[name]) == expected


def test_the_interface_describes_each():
    described = {name for name, function in _functions(Kernels).items() if function.__doc__}
    assert described == set(_functions(Kernels)) == set(launchers.__all__)


def test_each_is_tested():
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert set(launchers.__all__) <= tests


def test_select():
    assert kernels.select("cpu") is reference
    assert kernels.select("cpu", compiled=True) is compiled
    assert kernels.select("cuda:1") is launchers


def test_a_cpu_engine_needs_no_triton_lang():
    code = "import sys; from lightllm_backend.kernels import select; select('cpu'); assert 'triton' not in sys.modules"
    root = FOLDER.parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
