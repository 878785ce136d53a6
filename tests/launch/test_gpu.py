# SPDX-License-Identifier: Apache-2.0
"""What the launch command says of a machine without a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from lightllm_backend.config import ConfigError
from lightllm_backend.launch.gpu import NO_DEVICE, SUCCESS, check_gpu


class Driver:
    """NVIDIA's driver, as far as it is asked."""

    def __init__(self, result: int, text: bytes | None) -> None:
        self._result, self._text = result, text

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self._result

    def cuGetErrorString(self, result: int, target: Any) -> int:  # noqa: N802
        assert result == self._result
        target._obj.value = self._text
        return SUCCESS


@pytest.mark.parametrize(
    ("result", "text", "why"),
    [
        (NO_DEVICE, b"no CUDA-capable device is detected", "NVIDIA's driver finds no GPU"),
        (803, b"unsupported driver", "NVIDIA's driver does not start: error 803, unsupported driver"),
        (12345, None, "NVIDIA's driver does not start: error 12345, unknown"),
    ],
)
def test_what_the_driver_says(monkeypatch: pytest.MonkeyPatch, result: int, text: bytes | None, why: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(result, text))
    with pytest.raises(ConfigError) as raised:
        check_gpu()
    assert str(raised.value) == f"device is 'cuda', but {why}; allowed here: auto | cpu"


def test_a_gpu_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(SUCCESS, None))
    check_gpu()


def test_no_driver() -> None:
    with pytest.raises(ConfigError, match=r"NVIDIA's driver \(libnosuch.so.1\) is not installed"):
        check_gpu("libnosuch.so.1")
