# SPDX-License-Identifier: Apache-2.0
"""LLaMA's real tokenizer and llama.cpp's test vectors for it, fetched once from the sources of llama-cpp-python.

pip wants the metadata of what it downloads, and would build that package for them. A build backend that knows nothing
but its name and version stands in for the package's own.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import pytest
from filelock import FileLock

_VERSION = "0.3.36"
_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_IN_ARCHIVE = f"llama_cpp_python-{_VERSION}/vendor/llama.cpp/models"
_FILES = [f"ggml-vocab-llama-spm.gguf{suffix}" for suffix in ("", ".inp", ".out")]
_BACKEND = f"""
from pathlib import Path

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    folder = Path(directory) / "llama_cpp_python-{_VERSION}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: {_VERSION}\\n")
    return folder.name
"""


def fetched_files() -> Path:
    """The folder with the three files. Skips the test if they are not there and cannot be fetched."""
    cache = Path(os.environ.get("LIGHTLLM_CACHE") or "~/.cache/lightllm").expanduser()
    folder = cache / "llama-vocabulary"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".llama-vocabulary.lock"):
        if not all((folder / name).is_file() for name in _FILES):
            with tempfile.TemporaryDirectory() as work:
                _fetch(Path(work), folder)
    return folder


def _fetch(work: Path, folder: Path) -> None:
    backend = work / "backend" / "scikit_build_core"
    backend.mkdir(parents=True)
    (backend / "build.py").write_text(_BACKEND)
    (work / "requirement").write_text(f"llama-cpp-python=={_VERSION} --hash=sha256:{_SHA256}")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir",
        "--retries", "1", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes",
        "--requirement", str(work / "requirement"), "--dest", str(work),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(backend.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        assert "DO NOT MATCH THE HASHES" not in done.stderr, done.stderr
        reason = done.stderr.strip().splitlines()[-1:]
        pytest.skip(f"the sources of llama-cpp-python cannot be fetched: {reason}")
    folder.mkdir(exist_ok=True)
    with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
        for name in _FILES:
            member = archive.extractfile(f"{_IN_ARCHIVE}/{name}")
            assert member is not None
            (folder / name).write_bytes(member.read())


def vectors(folder: Path) -> list[tuple[str, list[int]]]:
    """Texts and their ids, without BOS."""
    texts = (folder / _FILES[1]).read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [[int(token_id) for token_id in line.split()] for line in (folder / _FILES[2]).read_text().split("\n")]
    return list(zip(texts, ids, strict=True))


def sentencepiece_model(folder: Path) -> bytes:
    """tokenizer.model as Meta has it, as far as it bears on tokens."""
    fields = gguf.GGUFReader(folder / _FILES[0]).fields

    def values(name: str) -> Sequence:
        return fields[f"tokenizer.ggml.{name}"].contents()

    pieces = [
        _field(1, _field(1, piece.encode()) + _field(2, score) + _field(3, kind))
        for piece, score, kind in zip(values("tokens"), values("scores"), values("token_type"), strict=True)
    ]
    bpe, size, byte_fallback = _field(3, 2), _field(4, len(pieces)), _field(35, 1)
    name, dummy_prefix, remove_extra_spaces = _field(1, b"identity"), _field(3, 1), _field(4, 0)
    trainer, normalizer = _field(2, bpe + size + byte_fallback), _field(3, name + dummy_prefix + remove_extra_spaces)
    return b"".join([*pieces, trainer, normalizer])


def _field(number: int, value: bytes | float) -> bytes:
    """One field of a protocol buffer. By hand: the generated code of sentencepiece wants a newer protobuf than ours."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
