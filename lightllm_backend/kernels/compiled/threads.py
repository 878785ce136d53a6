# SPDX-License-Identifier: Apache-2.0
"""Divides the work of a compiled kernel, which does not hold the GIL, among threads."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch


def in_parts(function: Callable[..., None], arguments: tuple[Any, ...], count: int, is_much: bool) -> None:
    """function(*arguments, first, last) for parts of `count` that are one thread's each, or for all if it is not much.

    There are as many threads as PyTorch has. Waking one takes some 0.1 ms, which has to be worth it.
    """
    if not is_much:
        function(*arguments, 0, count)
        return
    parts = min(torch.get_num_threads(), count)
    ends = [count * part // parts for part in range(parts + 1)]
    others = [_pool().submit(function, *arguments, *part) for part in itertools.pairwise(ends[1:])]
    function(*arguments, 0, ends[1])
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kernels")
