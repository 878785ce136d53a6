# SPDX-License-Identifier: Apache-2.0
"""Lets atheris choose inputs by the code of ours that they reach: `python -m tests.fuzz --coverage-guided SECONDS`.

It needs `pip install atheris` (3.0.0 for Python 3.11 and newer). An input is the bytes from which hypothesis draws a
case, so a case is well-formed for whatever library lies behind our code. Each target has a process of its own, which
ends with a finding. It begins with the inputs in corpus/ and some random ones. `--keep` then writes the shortest inputs
that reach all the lines that were reached into corpus/; the tests replay them. Another version of hypothesis or another
strategy makes other cases of them, which are as good but reach less.
"""

from __future__ import annotations

import base64
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType
from typing import TYPE_CHECKING, Any

from hypothesis import given

if TYPE_CHECKING:
    from tests.fuzz.target import Target

CORPUS = Path(__file__).with_name("corpus")
OURS = ("lightllm_backend", "lightllm_client")
MAX_BYTES = 1024  # of an input
NUM_RANDOM = 32  # inputs to begin with
ERROR_LINES = 60


def kept_inputs(name: str) -> list[bytes]:
    """The inputs of a target in corpus/, one in each line."""
    path = _corpus_file(name)
    return [base64.b64decode(line) for line in path.read_text().split()] if path.exists() else []


def checker(target: Target) -> Callable[[bytes], bytes | None]:
    """Make a function that checks the case of an input; it returns the bytes used, None if too few."""
    test = given(target.inputs)(target.check)
    check: Callable[[bytes], bytes | None] = test.hypothesis.fuzz_one_input  # type: ignore[attr-defined]
    return check


def guide(name: str, seconds: int, keep: bool) -> tuple[str, bool]:
    """Let atheris choose inputs for so long; return the figures, or the finding and True."""
    random = Random(0)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        inputs = [*kept_inputs(name), *(random.randbytes(MAX_BYTES) for _ in range(NUM_RANDOM))]
        for number, data in enumerate(inputs):
            (corpus / str(number)).write_bytes(data)
        limits = [f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", "-len_control=0", "-timeout=60"]
        command = [sys.executable, "-m", __spec__.name, name, "fuzz", *limits, f"-artifact_prefix={folder}/"]
        done = subprocess.run(
            [*command, str(corpus)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        if done.returncode != 0:
            return "\n".join(done.stdout.splitlines()[-ERROR_LINES:]), True
        if keep:
            subprocess.run([sys.executable, "-m", __spec__.name, name, "keep", str(corpus)], check=True)
        [runs] = re.findall(r"Done (\d+) runs", done.stdout)
        first, last = (re.findall(r"cov: (\d+)", done.stdout)[index] for index in (0, -1))
        return f"{int(runs):,} inputs, {first} → {last} branches, nothing found", False


def _corpus_file(name: str) -> Path:
    return CORPUS / (re.sub(r"\W+", "_", name) + ".txt")


def _fuzz(name: str, arguments: list[str]) -> None:
    """Run atheris, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=list(OURS)):
        targets = importlib.import_module("tests.fuzz.targets").TARGETS
    target: Target = targets[name]

    def check(case: Any) -> None:
        try:
            target.check(case)
        except BaseException:
            print(f"the case: {case!a}", flush=True)
            raise

    atheris.Setup([sys.argv[0], *arguments], checker(target._replace(check=check)))
    atheris.Fuzz()


def _keep(name: str, corpus: Path) -> None:
    """Write the inputs that reach lines which no shorter one reaches."""
    check = checker(importlib.import_module("tests.fuzz.targets").TARGETS[name])
    reached: set[tuple[str, int]] = set()
    lines: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        path = frame.f_code.co_filename
        if not any(f"{os.sep}{package}{os.sep}" in path for package in OURS):
            return None
        if event == "line":
            lines.add((path, frame.f_lineno))
        return trace

    kept = []
    candidates = {used for data in corpus.iterdir() if (used := check(data.read_bytes()))}
    for data in sorted(candidates, key=lambda data: (len(data), data)):
        lines.clear()
        sys.settrace(trace)
        try:
            check(data)
        finally:
            sys.settrace(None)
        if not lines <= reached:
            kept.append(data)
            reached |= lines
    CORPUS.mkdir(exist_ok=True)
    _corpus_file(name).write_text("".join(f"{base64.b64encode(data).decode()}\n" for data in kept))


if __name__ == "__main__":
    if sys.argv[2] == "fuzz":
        _fuzz(sys.argv[1], sys.argv[3:])
    else:
        _keep(sys.argv[1], Path(sys.argv[3]))
