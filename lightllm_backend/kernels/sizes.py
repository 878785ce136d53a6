# SPDX-License-Identifier: Apache-2.0
"""Whole numbers that launchers compute: Triton-lang's functions of these names take the host microseconds a call."""


def cdiv(number: int, divisor: int) -> int:
    """number / divisor, rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The least power of two that is no smaller than a number above 0."""
    return 1 << (number - 1).bit_length()
