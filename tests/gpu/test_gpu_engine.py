# SPDX-License-Identifier: Apache-2.0
"""The engine on a GPU against transformers: token for token in float32, teacher-forced in bfloat16 and float16."""

import random
from pathlib import Path

import pytest
import torch

from lightllm_backend.request import SamplingParams
from tests.models.random_models import save_random_model
from tests.runner.engine_harness import load, run, save_random_llama, transformers_greedy, transformers_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

VOCAB = 8003
PROMPTS = [
    random.Random(seed).choices(range(3, VOCAB), k=length)
    for seed, length in enumerate([1, 2, 7, 16, 33, 100, 257, 700])
]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(
        tmp_path_factory.mktemp("llama"), vocab_size=VOCAB, hidden_size=512, intermediate_size=1376,
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
        initializer_range=0.08,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[list[int]]:
    return transformers_greedy(directory, PROMPTS, MAX_TOKENS, "cuda")


@pytest.mark.parametrize("with_graphs", [True, False])
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("batch_max_tokens", [8192, 60])
def test_greedy_tokens_are_those_of_transformers_in_float32(
    directory, expected, batch_max_tokens, overlap, with_graphs
) -> None:
    engine = load(directory, batch_max_tokens=batch_max_tokens, max_total_token_num=4096)
    assert engine.runner.graphs is not None
    if not with_graphs:
        engine.runner.graphs = None
    arrivals = [random.Random(overlap).randrange(10) for _ in PROMPTS]
    answers = run(engine, PROMPTS, SamplingParams(max_tokens=MAX_TOKENS), arrivals, overlap=overlap)
    assert [answer.token_ids for answer in answers] == expected


@pytest.mark.parametrize("batch_max_tokens", [8192, 24])
def test_short_prompts_that_arrive_while_others_decode(directory, batch_max_tokens) -> None:
    """Their steps are graphs as well, and whole prompts or chunks give the same tokens in them as without."""
    source = random.Random(batch_max_tokens)
    prompts = [[source.randrange(3, VOCAB) for _ in range(source.randint(1, 90))] for _ in range(40)]
    more = [{}, {}, {"do_sample": True, "top_p": 0.9}, {"repetition_penalty": 1.2}, {"return_log_probs": True}]
    sampling = [SamplingParams(max_tokens=source.randint(1, 20), seed=1, **source.choice(more)) for _ in prompts]
    engine = load(directory, max_total_token_num=4096)
    graphs = engine.runner.graphs
    taken, replayed = [], graphs.run

    def run_and_count(batch):
        output = replayed(batch)
        taken.append((batch.num_decodes > 0, batch.slots.shape[1] > batch.num_decodes, output is not None))
        return output

    graphs.run = run_and_count
    arrivals = [source.randrange(60) for _ in prompts]
    with_graphs = run(engine, prompts, sampling, arrivals, batch_max_tokens)
    assert taken.count((True, True, True)) > 10, "few steps had prompts beside decodes and were graphs"
    assert all(is_graph for _, _, is_graph in taken)
    engine.runner.graphs = None
    without = run(engine, prompts, sampling, arrivals, batch_max_tokens)
    assert [answer.token_ids for answer in with_graphs] == [answer.token_ids for answer in without]
    for one, other in zip(with_graphs, without, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_half_precision_agrees_where_the_choice_is_clear(directory, dtype, tolerance) -> None:
    engine = load(directory, dtype=dtype, max_total_token_num=4096)
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, return_log_probs=True)
    for prompt, answer in zip(PROMPTS, run(engine, PROMPTS, sampling), strict=True):
        logits = transformers_logits(directory, prompt, answer.token_ids, "cuda")
        chosen = logits.gather(1, torch.tensor(answer.token_ids).unsqueeze(1)).squeeze(1)
        spread = float(logits.std())
        assert float((logits.max(-1).values - chosen).max()) < 2 * tolerance * spread
        truth = logits.log_softmax(-1).gather(1, torch.tensor(answer.token_ids).unsqueeze(1)).squeeze(1)
        assert float((truth - torch.tensor(answer.log_probs)).abs().max()) < 2 * tolerance * spread


@pytest.mark.parametrize("family", ["qwen3", "qwen3_window", "gemma2", "gemma3", "phi3", "olmo2"])
def test_families_that_are_not_quite_llama(tmp_path, family) -> None:
    """Token for token in float32; in bfloat16, with K and V in 16 and in 8 bits, no clear choice is another."""
    save_random_model(family, tmp_path, VOCAB)
    prompts = [prompt[:200] for prompt in PROMPTS]
    engine = load(tmp_path, max_total_token_num=4096, batch_max_tokens=60)
    answers = run(engine, prompts, SamplingParams(max_tokens=MAX_TOKENS), batch_max_tokens=60)
    assert [answer.token_ids for answer in answers] == transformers_greedy(tmp_path, prompts, MAX_TOKENS, "cuda")
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    for kv_dtype in ("auto", "int8"):
        engine = load(tmp_path, dtype="bfloat16", kv_dtype=kv_dtype, max_total_token_num=4096)
        for prompt, answer in zip(prompts, run(engine, prompts, sampling), strict=True):
            logits = transformers_logits(tmp_path, prompt, answer.token_ids, "cuda")
            chosen = logits.gather(1, torch.tensor(answer.token_ids).unsqueeze(1)).squeeze(1)
            assert float((logits.max(-1).values - chosen).max()) < 0.3 * float(logits.std())


def test_sampling_is_the_same_as_on_a_cpu(directory) -> None:
    sampling = [
        SamplingParams(
            max_tokens=12, do_sample=True, temperature=0.9, top_p=0.9, top_k=40, seed=1, repetition_penalty=1.2
        ),
        SamplingParams(max_tokens=12, do_sample=True, temperature=1.3, seed=2**63 + 9, frequency_penalty=0.5),
        SamplingParams(max_tokens=12, min_tokens=6, presence_penalty=0.4),
        SamplingParams(max_tokens=12, do_sample=True, top_p=0.5, seed=4),
    ]
    on_gpu = run(load(directory, max_total_token_num=4096), PROMPTS[2:6], sampling)
    on_cpu = run(load(directory, max_total_token_num=4096, device="cpu"), PROMPTS[2:6], sampling)
    assert [answer.token_ids for answer in on_gpu] == [answer.token_ids for answer in on_cpu]


def test_the_pool_leaves_room_for_the_worst_step(directory) -> None:
    free, total = torch.cuda.mem_get_info()
    fraction = (total - free) / total + 0.05
    engine = load(directory, mem_fraction=fraction, max_total_token_num=None, dtype="bfloat16")
    assert engine.info.pool_tokens > 10000
    sampling = SamplingParams(
        max_tokens=4, do_sample=True, top_p=0.9, top_k=20, presence_penalty=0.5, return_log_probs=True, ignore_eos=True
    )
    longest = [[5] * (engine.info.lengths.max_total - 4)] * 16
    assert all(len(answer.token_ids) == 4 for answer in run(engine, longest, sampling))
    free, _ = torch.cuda.mem_get_info()
    assert (total - free) / total < fraction + 0.01
