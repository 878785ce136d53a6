# SPDX-License-Identifier: Apache-2.0
"""The settings as options of a command line, for the launch command and for the command of further hosts. No torch."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from lightllm_backend.config import EngineConfig

MODEL_REPOSITORY = Path(__file__).resolve().parents[1] / "model_repository"
USAGE_ERROR = 2  # the exit code for a wrong setting
CONTEXT_SETTINGS: dict[str, Any] = {
    "token_normalize_func": lambda name: name.replace("-", "_"),
    "max_content_width": 120,
}


def setting_options() -> list[click.Parameter]:
    """Make a command-line option for each setting. Values stay text, since config.py parses those of every source."""
    options: list[click.Parameter] = []
    for setting in fields(EngineConfig):
        default, allowed = setting.default, setting.metadata["allowed"]
        notes = [f"allowed: {allowed}"] if allowed else []
        notes += [] if default is None else [f"default: {str(default).lower() if default is False else default}"]
        flag: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if isinstance(default, bool) else {}
        text = setting.metadata["help"] + (f" [{'; '.join(notes)}]" if notes else "")
        options.append(click.Option([f"--{setting.name}"], type=str, metavar="VALUE", help=text, **flag))
    options.append(
        click.Option(
            ["--model_repository"],
            default=str(MODEL_REPOSITORY),
            show_default=True,
            metavar="PATH",
            help="the folder with LightLLM's models for Triton server",
        )
    )
    return options
