# SPDX-License-Identifier: Apache-2.0
"""A model directory for benchmarks: a shape by name and a tokenizer of 32,000 pieces, no weights.

    python -m perf.model_directory llama-7b /tmp/llama-7b
    ./build.sh serve --model_dir /tmp/llama-7b --load_format dummy

So text can be sent to a model of any shape, at that shape's speed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click

from perf.shapes import SHAPES

DATA = Path(__file__).with_name("data")
TOKENIZER = DATA / "tokenizer.model"
TOKENIZER_PIECES = 32000


def write_model_directory(shape: str, directory: Path) -> None:
    """Served with `load_format dummy`; the vocabulary of a shape that has less than the tokenizer grows."""
    config = SHAPES[shape]
    pieces = max(int(str(config["vocab_size"])), TOKENIZER_PIECES)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": pieces}, indent=2) + "\n")
    shutil.copyfile(TOKENIZER, directory / "tokenizer.model")


@click.command(help=str(__doc__).partition("\n")[0])
@click.argument("shape")
@click.argument("directory", type=click.Path(path_type=Path))
def main(shape: str, directory: Path) -> None:
    if shape not in SHAPES:
        raise click.BadParameter(f"{shape!r} is not a shape; allowed: {', '.join(SHAPES)}", param_hint="SHAPE")
    write_model_directory(shape, directory)
    print(f"written to {directory}; serve it with --model_dir {directory} --load_format dummy")


if __name__ == "__main__":
    main()
