# SPDX-License-Identifier: Apache-2.0
"""Ranks on several GPUs: sums through symmetric memory and NCCL, and whole engines against transformers."""

import itertools
import random
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from lightllm_backend.request import SamplingParams
from tests.models.quantization.checkpoints import Store, awq, fp8_by_channel, gptq, int8_by_channel, write_checkpoint
from tests.runner.engine_harness import load, run, save_random_llama, transformers_greedy, transformers_logits
from tests.worker.process_harness import configuration, started, workers

NUM_GPUS = torch.cuda.device_count()
SIZES = [pytest.param(tp, marks=pytest.mark.skipif(tp > NUM_GPUS, reason="there are too few GPUs")) for tp in (2, 4)]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS < 2, reason="there are not two GPUs"),
]

VOCAB = 8003
PROMPTS = [
    random.Random(seed).choices(range(3, VOCAB), k=length)
    for seed, length in enumerate([1, 2, 7, 16, 33, 100, 257, 700])
]
MAX_TOKENS = 24
SAMPLED = [
    SamplingParams(max_tokens=MAX_TOKENS, do_sample=True, seed=seed, **changes)
    for seed, changes in zip(
        range(len(PROMPTS)), itertools.cycle([{"top_k": 40}, {"top_p": 0.9}, {"repetition_penalty": 1.2}]), strict=False
    )
]

# Few layers, as wide as LLaMA-7B's and LLaMA-2-70B's.
REAL_SHAPES = {
    "7b": {
        "vocab_size": VOCAB, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 3,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 2048,
        "initializer_range": 0.03,
    },
    "70b": {
        "vocab_size": VOCAB, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 1,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 2048,
        "initializer_range": 0.02,
    },
}  # fmt: skip


def compressed_tensors(stored: str, numbers: dict[str, object]) -> dict[str, object]:
    """Weights of 8 bits by channel, activations by token."""
    eight = {"num_bits": 8, "symmetric": True, **numbers}
    inputs = eight | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": eight | {"strategy": "channel"}, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": stored, "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }  # fmt: skip


# Formats of which a rank's part is cut in ways of its own; groups of 64, since a quarter of 11,008 columns is no
# multiple of 128.
FORMATS: dict[str, tuple[Store, dict[str, object]]] = {
    "awq": (awq(64), {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}),
    "gptq": (
        gptq(4, 64, symmetric=True, in_order=True, version=1),
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False},
    ),
    "W8A8": (int8_by_channel, compressed_tensors("int-quantized", {})),
    "FP8_DYNAMIC": (
        fp8_by_channel,
        compressed_tensors("float-quantized", {"type": "float"}),
    ),
}
FAMILIES = {
    "qwen3": transformers.Qwen3Config(
        vocab_size=VOCAB, hidden_size=4096, intermediate_size=12288, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=2048, initializer_range=0.03,
    ),
    "gemma3": transformers.Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=3840, intermediate_size=15360, num_hidden_layers=3, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, max_position_embeddings=2048, initializer_range=0.03,
        query_pre_attn_scalar=256, sliding_window=64, sliding_window_pattern=3,
    ),
}  # fmt: skip

RANK = """
import sys, torch
from lightllm_backend.parallel import TensorParallel
rank, size, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
device = torch.device("cuda", rank)
torch.cuda.set_device(device)
parallel = TensorParallel.connect(rank, size, device, sys.argv[4])
parallel = parallel.with_symmetric_memory(64, 4096, dtype, device)
assert (parallel.symmetric is not None) == (dtype != torch.float16), "its kernels know no float16"

def values(of_rank, rows, salt):
    return (torch.arange(rows * 4096, device=device).view(rows, 4096) * 7 + 3 * of_rank + salt) % 13

def sums(rows, salt):
    buffer = parallel.product_buffer(rows, 4096, dtype)
    x = buffer if buffer is not None else torch.empty(rows, 4096, dtype=dtype, device=device)
    first = parallel.all_reduce(x.copy_(values(rank, rows, salt)))
    second = parallel.all_reduce(values(rank, rows, salt + 1).to(dtype))
    return first, second

for rows in (1, 5, 64, 100):  # one shot, two shots, and more than the buffer holds
    salt = torch.zeros((), dtype=torch.int64, device=device)
    sums(rows, salt)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sums(rows, salt)
    for number in range(50):
        salt.fill_(number)
        graph.replay()
        for later, total in enumerate(captured):
            expected = sum(values(other, rows, number + later) for other in range(size))
            assert torch.equal(total, expected.to(dtype)), (rows, number, later)
"""

MAILING_RANK = """
import random, sys, time, torch
from lightllm_backend.kernels import launchers
from lightllm_backend.kernels.collective import lamport_buffers
from lightllm_backend.parallel import TensorParallel
lamport_buffers.MIN_BYTES_SAVED_BY_TWO_SHOTS = 128 << 10
rank, size, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
device = torch.device("cuda", rank)
torch.cuda.set_device(device)
parallel = TensorParallel.connect(rank, size, device, sys.argv[4])
parallel = parallel.with_symmetric_memory(64, 4096, dtype, device)
tolerance = 1e-5 if dtype == torch.float32 else 2e-2
torch.manual_seed(0)
weight = torch.randn(4096, device=device).to(dtype)

class Layers:
    # Some sums in a row, as a model's step makes them, between embeddings and logits, of values that a seed decides.
    def __init__(self, rows, parts):
        self.rows, self.parts = rows, parts
        self.ids = torch.empty(rows, device=device, dtype=torch.int32)
        self.table = torch.randn(64 * size, 4096, device=device).to(dtype)  # the same on all ranks
        self.logits = torch.empty(rows, 1 if rows > 300 else 9000, device=device, dtype=dtype)
        self.x = [torch.empty(parts, rows, 4096, device=device, dtype=dtype if parts == 1 else torch.float32)
                  for _ in range(3)]
        self.residual = torch.empty(rows, 4096, device=device, dtype=dtype)
        self.launch()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.captured = self.launch()

    def launch(self):
        buffers = parallel.lamport_buffers(self.rows, 4096)
        assert buffers is not None
        held = self.table[64 * rank : 64 * rank + 64]
        embedded = launchers.all_reduce_embeddings(self.ids, held, 64 * rank, 64, buffers)
        outs = [launchers.all_reduce_rms_norm(x, weight, 1e-5, self.residual, buffers) for x in self.x]
        buffers = parallel.gathering_buffers(*self.logits.shape)
        assert buffers is not None
        return [*outs, launchers.all_gather(self.logits, buffers), embedded]

    def run(self, seed, captured):
        generator = torch.Generator(device).manual_seed(seed)
        def randn(*shape):
            return torch.randn(*shape, generator=generator, device=device)
        of_all = [randn(size, *x.shape).to(x.dtype) for x in self.x]
        for x, values in zip(self.x, of_all):
            x.copy_(values[rank])
        self.residual.copy_(randn(self.rows, 4096))
        self.ids.random_(64 * size, generator=generator)
        logits = randn(size, *self.logits.shape).to(dtype)
        self.logits.copy_(logits[rank])
        residual, expected = self.residual.clone(), []
        for values in of_all:
            summed = values.float().sum(1).to(dtype)
            torch.distributed.all_reduce(check := summed[rank].float().clone())  # NCCL agrees with what the seeds say
            assert (check - summed.float().sum(0)).norm() < 1e-3 * check.norm()
            expected.append(launchers.rms_norm(summed.float(), weight, 1e-5, residual))
        torch.cuda.synchronize()
        if random.random() < 0.3:
            time.sleep(0.003 * random.random())
        if captured:
            self.graph.replay()
        *outs, gathered, embedded = self.captured if captured else self.launch()
        assert torch.equal(gathered, torch.cat(list(logits), 1)), (self.rows, seed)
        assert torch.equal(embedded, self.table[self.ids.long()]), (self.rows, seed)
        for out, right in zip([*outs, self.residual], [*expected, residual]):
            assert (out.float() - right.float()).norm() < tolerance * right.float().norm(), (self.rows, seed)
        whole = torch.cat([*outs, self.residual]).view(torch.uint8)
        assert all(torch.equal(whole, other) for other in parallel.all_gather(whole).chunk(size, -1)), "ranks differ"

random.seed(rank)
choice = random.Random(7)
layers = [Layers(rows, parts) for rows, parts in ((1, 1), (5, 3), (20, 1), (1000, 1))]
for seed in range(200):
    choice.choice(layers).run(seed, captured=choice.random() < 0.8)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(
        tmp_path_factory.mktemp("llama"), vocab_size=VOCAB, hidden_size=512, intermediate_size=1376,
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
        initializer_range=0.08,
    )  # fmt: skip


def check_ranks(code: str, *arguments: str) -> None:
    """Run it as ranks 0, 1, …, of the number that the first argument is."""
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), *arguments], cwd=root)
        for rank in range(int(arguments[0]))
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * len(ranks)
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sums_in_graphs_are_right(tmp_path, tp, dtype) -> None:
    check_ranks(RANK, str(tp), dtype, str(tmp_path / "meeting"))


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_that_sum_through_lamport_buffers_are_right(tmp_path, tp, dtype) -> None:
    """In graphs and without, shapes in turns, in one shot and, of four ranks, in two; now and then a rank is late."""
    check_ranks(MAILING_RANK, str(tp), dtype, str(tmp_path / "meeting"))


@pytest.mark.parametrize("tp", SIZES)
def test_tokens_in_float32_are_those_of_transformers_and_of_one_rank(directory, tp) -> None:
    settings = {"device": "cuda", "max_total_token_num": 4096, "batch_max_tokens": 300}
    with started(configuration(directory, 1, **settings)) as engine:
        alone = [answer.tokens for answer in engine.answer(PROMPTS, SAMPLED)]
    with started(configuration(directory, tp, **settings)) as engine:
        greedy = engine.answer(PROMPTS, SamplingParams(max_tokens=MAX_TOKENS))
        assert [answer.tokens for answer in greedy] == transformers_greedy(directory, PROMPTS, MAX_TOKENS, "cuda")
        sampled = [answer.tokens for answer in engine.answer(PROMPTS, SAMPLED)]
    # Another order of sums can move one draw in a few hundred across the border between two tokens.
    assert sum(tokens == other for tokens, other in zip(sampled, alone, strict=True)) >= len(PROMPTS) - 1
    assert workers() == []


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("shape", ["small", *REAL_SHAPES])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_where_the_choice_is_clear(directory, tmp_path_factory, shape, dtype, tp) -> None:
    """Teacher-forced: of each token that was chosen, transformers' logit is next to its greatest."""
    if shape in REAL_SHAPES:
        directory = save_random_llama(tmp_path_factory.mktemp(shape), **REAL_SHAPES[shape])
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, return_log_probs=True)
    settings = {"device": "cuda", "dtype": dtype, "max_total_token_num": 4096}
    with started(configuration(directory, tp, **settings)) as engine:
        answers = engine.answer(PROMPTS, sampling)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        logits = transformers_logits(directory, prompt, answer.tokens, "cuda")
        chosen = logits.gather(1, torch.tensor(answer.tokens).unsqueeze(1)).squeeze(1)
        tolerance = 0.3 * float(logits.std())
        assert float((logits.max(-1).values - chosen).max()) < tolerance
        truth = logits.log_softmax(-1).gather(1, torch.tensor(answer.tokens).unsqueeze(1)).squeeze(1)
        assert float((truth - torch.tensor(answer.log_probs)).abs().max()) < tolerance
    assert workers() == []


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Writes a directory with weights of this format and shape, once."""

    @lru_cache
    def write(name: str, shape: str) -> Path:
        store, method = FORMATS[name]
        torch.manual_seed(7)
        config = transformers.LlamaConfig(**REAL_SHAPES[shape] | {"num_hidden_layers": 1})
        directory = tmp_path_factory.mktemp("quantised")
        with torch.device("cuda"):
            write_checkpoint(directory, transformers.LlamaForCausalLM(config), store, method)
        torch.cuda.empty_cache()
        return directory

    return write


def check_against_one_gpu(directory: Path, tp: int, tolerance: float = 0.35, **settings: object) -> None:
    """Teacher-forced: of each token that the ranks choose, one GPU's log probability is next to its greatest.

    tolerance: in nats, what another order of sums changes in bfloat16. A random choice differs by several.
    """
    settings |= {"dtype": "bfloat16", "max_total_token_num": 4096, "device": "cuda"}
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, return_log_probs=True)
    with started(configuration(directory, tp, **settings)) as engine:
        answers = engine.answer(PROMPTS, sampling)
    assert workers() == []
    scored = SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=1)
    sequences = [[*prompt, *answer.tokens] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    alone = run(load(directory, **settings), sequences, scored)
    for answer, score in zip(answers, alone, strict=True):
        assert score.prompt is not None
        truth = np.frombuffer(score.prompt.log_probs, np.float32)[-MAX_TOKENS:]
        best = np.frombuffer(score.prompt.top_log_probs, np.float32)[-MAX_TOKENS:]
        assert np.max(best - truth) < tolerance
        assert np.max(np.abs(truth - np.array(answer.log_probs))) < tolerance


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("shape", list(REAL_SHAPES))
@pytest.mark.parametrize("name", list(FORMATS))
def test_quantised_weights_choose_as_on_one_gpu(quantised, name, shape, tp) -> None:
    # Decode steps leave activations in 16 bits, the prompt that scores them has 8 where the checkpoint says so.
    check_against_one_gpu(quantised(name, shape), tp, tolerance=0.8 if "8" in name else 0.35)


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_weights_quantised_on_the_fly_choose_as_on_one_gpu(tmp_path, weight_dtype, tp) -> None:
    save_random_llama(tmp_path, **REAL_SHAPES["7b"])
    check_against_one_gpu(tmp_path, tp, weight_dtype=weight_dtype)


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_families_at_real_widths_choose_as_on_one_gpu(tmp_path, family, tp) -> None:
    torch.manual_seed(7)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32)
    model.save_pretrained(tmp_path)
    check_against_one_gpu(tmp_path, tp)


@pytest.mark.parametrize("tp", SIZES)
def test_the_pool_is_as_large_on_each_rank_and_leaves_room_for_the_worst_step(directory, tp) -> None:
    # Other processes' memory is on GPU 0 alone here, so the ranks find different room.
    held = torch.empty(2 << 30, dtype=torch.uint8, device="cuda:0")
    free, total = torch.cuda.mem_get_info(0)
    settings = {"device": "cuda", "dtype": "bfloat16", "max_total_token_num": None}
    fraction = (total - free) / total + 0.05
    with started(configuration(directory, tp, mem_fraction=fraction, **settings)) as engine:
        longest = [[5] * 2000] * 8
        answers = engine.answer(longest, SamplingParams(max_tokens=4, ignore_eos=True))
        assert all(len(answer.tokens) == 4 for answer in answers)
    del held
