# SPDX-License-Identifier: Apache-2.0
"""Many requests in a pool that is far too small for them, with freed slots poisoned, against each request alone.

python -m tests.runner.isolation --requests 1000
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch

from lightllm_backend.request import SamplingParams
from lightllm_backend.router.router import Router
from lightllm_backend.worker.load import LoadedEngine
from tests.router.test_preemption import RecklessAdmission
from tests.runner.engine_harness import Answer, load, run, save_random_llama

POOL_TOKENS = 120  # one to four requests fit, so every slot is used again and again
MAX_PROMPT, MAX_TOKENS = 60, 30
EOS_ID = 2


@dataclass
class Outcome:
    """What became of the requests."""

    differing: list[int]  # requests whose answer is not that of their solo run
    preemptions: int
    shared_tokens: int  # prompt tokens that came out of the prefix cache
    freed: int  # slots, each as often as it became free


def mixed_requests(count: int, seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of three families and of none; greedy, sampled, with penalties and with log probabilities."""
    chosen = random.Random(seed)
    extra = random.Random(seed + 1)  # of its own, so that prompts and lengths, which decide what is shared, stay
    families = [[chosen.randrange(3, 199) for _ in range(40)] for _ in range(3)]
    prompts, params = [], []
    for number in range(count):
        beginning = chosen.choice([*families, []])[: chosen.randint(5, 40)]
        own = [chosen.randrange(3, 199) for _ in range(chosen.randint(1, MAX_PROMPT - len(beginning)))]
        options: dict[str, Any] = {"max_tokens": chosen.randint(1, MAX_TOKENS), "ignore_eos": chosen.random() < 0.5}
        if chosen.random() < 0.5:
            min_p = extra.choice([0.0, 0.02])
            options |= {"do_sample": True, "temperature": 1.3, "top_p": 0.95, "min_p": min_p, "seed": number}
        if chosen.random() < 0.3:
            options |= {"frequency_penalty": 0.4, "repetition_penalty": 1.2, "return_log_probs": True}
        if extra.random() < 0.2:
            options["logit_bias"] = tuple((token, extra.uniform(-5.0, 5.0)) for token in extra.sample(range(199), 9))
        prompts.append(beginning + own)
        params.append(SamplingParams(**options))
    return prompts, params


def load_small(directory: Path, kv_dtype: str) -> LoadedEngine:
    """The engine in float64: in fewer bits, what else is in a batch changes the last of them, and once in some
    thousand requests an int8 of K or V, and with it a token.

    On one thread: its products are too small to share, and threads that wait for each other cost most.
    """
    with patch("lightllm_backend.worker.load.choose_dtype", return_value=torch.float64):
        engine = load(directory, kv_dtype=kv_dtype)
    torch.set_num_threads(1)
    return engine


def solo_answers(engine: LoadedEngine, prompts: list[list[int]], params: list[SamplingParams]) -> list[Answer]:
    """Each request's answer when it is alone."""
    return [run(engine, [prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]


def compare(
    engine: LoadedEngine, prompts: list[list[int]], params: list[SamplingParams], alone: list[Answer], overlap: int
) -> Outcome:
    """Run all requests together in a small pool, and compare their answers with those of the solo runs."""
    router = Router(POOL_TOKENS, 16, 32, len(prompts), frozenset({EOS_ID}), policy=RecklessAdmission())
    freed = []

    def poison(slots: np.ndarray) -> None:
        freed.append(len(slots))
        engine.storage.poison(slots)

    router.on_free(poison)
    engine.storage.poison(np.arange(engine.info.pool_tokens, dtype=np.int32))
    chosen = random.Random(overlap)
    arrivals = sorted(chosen.randrange(4 * len(prompts)) for _ in prompts)
    answers = run(engine, prompts, params, arrivals, overlap=overlap, router=router)
    pairs = enumerate(zip(answers, alone, strict=True))
    differing = [
        number for number, (one, other) in pairs if (one.token_ids, one.reason) != (other.token_ids, other.reason)
    ]
    stats = router.stats()
    shared = sum(map(len, prompts)) - stats.prompt_tokens_total
    return Outcome(differing, stats.preemptions_total, shared, sum(freed))


@click.command(help=str(__doc__).partition("\n")[0])
@click.option("--requests", default=1000, show_default=True, type=click.IntRange(min=1), help="that many")
@click.option("--seed", default=0, show_default=True, type=int, help="of all that is random")
def main(requests: int, seed: int) -> None:
    prompts, params = mixed_requests(requests, seed)
    with tempfile.TemporaryDirectory() as directory:
        save_random_llama(Path(directory))
        for kv_dtype in ("auto", "int8"):
            engine = load_small(Path(directory), kv_dtype)
            alone = solo_answers(engine, prompts, params)
            for overlap in (0, 1):
                outcome = compare(engine, prompts, params, alone, overlap)
                click.echo(f"kv_dtype {kv_dtype}, overlap {overlap}: {outcome}")
                assert not outcome.differing


if __name__ == "__main__":
    main()
