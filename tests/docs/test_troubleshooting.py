# SPDX-License-Identifier: Apache-2.0
"""docs/troubleshooting.md: each message that it quotes is one of the code's."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
TRITON_SERVERS = {
    "CudaDriverHelper has not been initialized", "Failed to initialize NVML",
    "Stub process 'tokenizer_0_0' is not healthy", "terminate called after throwing an instance of",
    "Non-graceful termination detected",
}  # fmt: skip
NAMES = {
    "infer", "lightllm", "logging", "trace", "model-repository", "shared-memory", "quantization_config", "<think>",
}  # fmt: skip
CODES = r"^(INTERNAL|INVALID_ARG|UNAVAILABLE)\b:?"


def quoted() -> list[str]:
    """What the first column of the tables has in backquotes."""
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [text for row in rows for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def parts(text: str) -> list[str]:
    """A quoted message without its code and its variables."""
    plain = re.sub(CODES, "", text.removeprefix("build.sh: "))
    return [part for piece in plain.split("…") if (part := piece.strip(" :;()"))]


def texts(path: Path) -> Iterator[str]:
    """The texts of a module, with its variables left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_each_message_is_one_of_ours() -> None:
    code = [text for path in (ROOT / "lightllm_backend").rglob("*.py") for text in texts(path)]
    known = "\n".join([*code, (ROOT / "build.sh").read_text(encoding="utf-8"), *TRITON_SERVERS, *NAMES])
    unknown = [part for text in quoted() for part in parts(text) if part not in known]
    assert unknown == []
    assert len(quoted()) > 20
