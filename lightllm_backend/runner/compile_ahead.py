# SPDX-License-Identifier: Apache-2.0
"""compile_ahead: compiles kernels on all cores, before their first launch."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import triton
from tqdm import tqdm
from triton.runtime.jit import JITFunction


class _Threads(ThreadPoolExecutor):
    """Threads that compile a kernel and its launcher, for which some versions of Triton-lang call a C compiler."""

    def submit(self, compile_kernel: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        def compile_both() -> Any:
            kernel = compile_kernel()
            triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)  # cached on disk
            return kernel

        return super().submit(compile_both)


def compile_ahead(launch: Callable[[], Any]) -> None:
    """Compile the kernels that `launch` launches, without running them: their outputs stay unwritten.

    Triton-lang otherwise compiles each kernel at its first launch, one after the other. Versions without
    AsyncCompileMode offer nothing else; there this function does nothing.
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
