# SPDX-License-Identifier: Apache-2.0
"""The sizes that launchers compute are Triton-lang's, without its functions, which take the host microseconds."""

import re
from pathlib import Path

import triton

from lightllm_backend import kernels
from lightllm_backend.kernels.sizes import cdiv, next_power_of_2


def test_sizes_are_those_of_triton_lang() -> None:
    for number in (*range(1, 300), 4095, 4096, 4097, 11008, 2**20 + 1):
        assert next_power_of_2(number) == triton.next_power_of_2(number)
        for divisor in (1, 3, 64, 128):
            assert cdiv(number, divisor) == triton.cdiv(number, divisor)
    assert cdiv(0, 128) == 0


def test_no_launcher_takes_triton_lang_s() -> None:
    files = list(Path(kernels.__file__).parent.rglob("*.py"))
    taking = [file.name for file in files if re.search(r"\btriton\.(cdiv|next_power_of_2)\b", file.read_text())]
    assert len(files) > 40
    assert taking == []
