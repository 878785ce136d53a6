# SPDX-License-Identifier: Apache-2.0
"""Where and with what a benchmark ran, and its result as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "perf" / "results"
PACKAGES = ("torch", "triton", "transformers", "numpy")


def circumstances(gpu: str | None) -> dict[str, Any]:
    """What a reader must know to judge a figure."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get("COMMIT") or _commit(),
        "machine": {"gpu": gpu, "cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def gpu_name(device: str) -> str | None:
    """The name of the GPU of an engine in another process; None if the engine computes on a CPU."""
    import torch

    return str(torch.cuda.get_device_name()) if device == "cuda" else None


def nvidia_gpu_name() -> str | None:
    """The name of the first GPU, found without torch; None if there is none."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return names[0] if names else None


def types_of(settings: dict[str, str]) -> list[str]:
    """The types that the settings LIGHTLLM_<NAME> of a result give to tensors, in words."""
    names = {"WEIGHT_DTYPE": "weights", "HEAD_DTYPE": "head", "KV_DTYPE": "K and V"}
    given = {name: settings.get(f"LIGHTLLM_{key}", "auto") for key, name in names.items()}
    return [f"{name} {dtype}" for name, dtype in given.items() if dtype != "auto"]


def write_result(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")


def _commit() -> str:
    """The commit, marked if the files differ from it; empty outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
