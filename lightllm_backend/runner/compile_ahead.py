# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels on all cores at once, ahead of their first launch."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import triton
from tqdm import tqdm
from triton.runtime.jit import JITFunction


class _Threads(ThreadPoolExecutor):
    """Compile a kernel and its launcher, for which some versions of Triton-lang call a C compiler."""

    def submit(self, compile_kernel: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        def compile_both() -> Any:
            kernel = compile_kernel()
            triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)  # it is kept on disk
            return kernel

        return super().submit(compile_both)


def compile_ahead(launch: Callable[[], Any]) -> None:
    """Compile what `launch` launches. Its kernels do not run, so what they would write is not written.

    Otherwise Triton-lang compiles one kernel after the other, each when it is launched first. Does nothing where its
    version has no other way.
    """
    if not hasattr(triton, "AsyncCompileMode"):
        return
    run = JITFunction.run

    def only_compile(kernel: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        del warmup
        return run(kernel, *arguments, grid=grid, warmup=True, **options)

    with _Threads(len(os.sched_getaffinity(0))) as threads, triton.AsyncCompileMode(threads) as mode:
        JITFunction.run = only_compile
        try:
            launch()
        finally:
            JITFunction.run = run
        for _ in tqdm(as_completed(mode.raw_futures), "Compiling", len(mode.raw_futures), unit="kernel"):
            pass
