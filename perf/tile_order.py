# SPDX-License-Identifier: Apache-2.0
"""Times attention of whole prompts by the share of tiles that are issued largest first (see runner/prompt_tiling.py).

python -m perf.tile_order
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from lightllm_backend.kernels import launchers
from lightllm_backend.kernels.attention.whole_prompt_tiles import WholePromptTiles
from lightllm_backend.runner.prompt_tiling import order_tiles
from perf.kernels.measure import Arguments, Place, seconds_of
from perf.kernels.pool import mixed_contexts, pool_arguments

HEADS, HEAD_DIM = 32, 128  # LLaMA-7B's
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
SETS = 4  # inputs that take turns, so that none is in the L2 cache any more

STEPS = {
    "1 x 8192": [8192],
    "4 x 2048": [2048] * 4,
    "8 x 1024": [1024] * 8,
    "16 mixed": mixed_contexts(16, 512),
    "64 mixed": mixed_contexts(64, 128),
}


def arguments(place: Place, lengths: Sequence[int], heads: int, tail_share: float) -> Arguments:
    """Those of prefill_attention. The pool's K and V are not the new ones, which does not matter to the time."""
    q, k, v = place.randn(sum(lengths), 3 * heads, HEAD_DIM).split(heads, 1)
    rest = pool_arguments(place, lengths, heads, HEAD_DIM, "")
    del rest["max_context_length"]
    tiles = order_tiles(np.zeros(len(lengths), np.int32), np.array(lengths, np.int32), 0, tail_share)
    whole = WholePromptTiles(torch.from_numpy(tiles).to(place.device), are_all=True)
    starts = torch.tensor([0, *accumulate(lengths)], device=place.device, dtype=torch.int32)
    return {"q": q, "k": k, "v": v, "query_starts": starts, "whole_prompts": whole, **rest}


@click.command(help=str(__doc__).partition("\n")[0])
def main() -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("this needs a GPU")
    place = Place(torch.device("cuda"), torch.bfloat16)
    table = Table("prompts", *(f"{share:g}" for share in SHARES), title="µs, by share of tiles issued largest first")
    with torch.inference_mode():
        for name, lengths in STEPS.items():
            row = []
            for share in SHARES:
                sets = [arguments(place, lengths, HEADS, share) for _ in range(SETS)]
                calls = [lambda one=one: launchers.prefill_attention(**one) for one in sets]
                row.append(f"{1e6 * seconds_of(calls):.1f}")
            table.add_row(name, *row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
