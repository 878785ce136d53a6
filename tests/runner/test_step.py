# SPDX-License-Identifier: Apache-2.0
"""A step padded to a bucket, as a CUDA graph runs it, against the same step without: here launched on the CPU."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightllm_backend.config import EngineConfig
from lightllm_backend.models.layers import StepInput
from lightllm_backend.request import Request, SamplingParams
from lightllm_backend.router.batch import Batch
from lightllm_backend.runner.buckets import BucketChoice, step_buckets
from lightllm_backend.runner.device_tables import DeviceTables
from lightllm_backend.runner.model_runner import ModelRunner
from lightllm_backend.runner.step import ForwardOutput, Step
from lightllm_backend.runner.step_arrays import Bucket, StepArrays, fill
from lightllm_backend.runner.warm_up import example_batch
from lightllm_backend.worker.load import LoadedEngine
from lightllm_backend.worker.main import build_router
from tests.models.random_models import VOCAB, save_random_model
from tests.runner.engine_harness import load

CPU = torch.device("cpu")
NUM_ROWS = 16
LONGEST_PROMPT = 40


class PaddedSteps:
    """What CudaGraphs is to a runner. Remembers the buckets that were larger than their batch."""

    def __init__(self, step: Step) -> None:
        self._step = step
        buckets = step_buckets(NUM_ROWS, batch_max_tokens=64, max_graph_tokens=96)
        self._choose = BucketChoice([bucket for bucket in buckets if bucket.prefills or bucket.decodes % 4 == 0])
        self.padded: set[Bucket] = set()

    def run(self, batch: Batch) -> ForwardOutput:
        bucket = self._choose(batch)
        assert bucket is not None
        if bucket != Bucket.of(batch):
            self.padded.add(bucket)
        return self._step.run(batch, bucket)


def sampling(source: random.Random) -> SamplingParams:
    more = source.choice(
        [{}, {}, {"do_sample": True, "top_p": 0.9}, {"frequency_penalty": 0.5, "repetition_penalty": 1.2},
         {"return_log_probs": True}, {"do_sample": True, "top_k": 20, "return_log_probs": True, "min_tokens": 3}]
    )  # fmt: skip
    return SamplingParams(max_tokens=source.randint(1, 12), seed=source.randrange(100), ignore_eos=True, **more)


def pool(runner: ModelRunner) -> list[torch.Tensor]:
    return [tensor for layer in runner._step._kv_layers for tensor in layer[:3] if tensor is not None]


def check_same_steps(plain: ModelRunner, padded: ModelRunner, engine: LoadedEngine, seed: int) -> int:
    """Both run the batches of one Router, and are in the same state after each of them. The number of steps.

    Where sums are rounded otherwise, an int8 of K or V may be tipped over to its neighbour and, rarely, change a
    choice: the next step begins with the same ones.
    """
    is_quantized = any(tensor.dtype == torch.int8 for tensor in pool(plain))
    chosen = other = 0
    source = random.Random(seed)
    config = EngineConfig(running_max_req_size=NUM_ROWS, prefix_cache=engine.groups.count == 1)
    router = build_router(config, engine.info, source.choice([5, 16, 64]), groups=engine.groups)
    num_requests, submitted, steps = 9, 0, 0
    while submitted < num_requests or router.has_work:
        for _ in range(source.choice([0, 0, 1, 2, 5]) if submitted < num_requests else 0):
            prompt = tuple(source.randrange(3, VOCAB) for _ in range(source.randint(1, LONGEST_PROMPT)))
            router.submit(Request(f"{seed} {submitted}", prompt, sampling(source)))
            submitted += 1
        batch = router.next_batch()
        if batch is None:
            continue
        expected, result = plain.launch(batch).result(), padded.launch(batch).result()
        chosen, other = (
            chosen + len(expected.token_ids),
            other + np.count_nonzero(result.token_ids != expected.token_ids),
        )
        if is_quantized:
            padded._tables.token_ids.copy_(plain._tables.token_ids)
        assert (result.log_probs is None) == (expected.log_probs is None)
        if expected.log_probs is not None:
            same = result.token_ids == expected.token_ids
            tolerance = 0.05 if is_quantized else 1e-4
            np.testing.assert_allclose(result.log_probs[same], expected.log_probs[same], atol=tolerance)
        assert torch.equal(padded._tables.token_ids[:-1], plain._tables.token_ids[:-1])
        assert torch.equal(padded._tables.slots[:, :-1], plain._tables.slots[:, :-1])
        for ours, theirs in zip(pool(padded), pool(plain), strict=True):
            tolerance = 4 if ours.dtype == torch.int8 else 1e-3  # scales are float16
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=1e-3, equal_nan=True)
            if is_quantized:
                ours.copy_(theirs)
        router.apply(batch, expected)
        steps += 1
    assert other <= (0.03 * chosen if is_quantized else 0)
    return steps


@pytest.mark.parametrize(
    ("family", "kv_dtype", "num_groups"),
    [
        ("llama2_gqa", "auto", 1),
        ("llama2_gqa", "int8", 1),
        ("bloom_6_heads", "auto", 1),
        ("mistral_window", "auto", 1),
        ("qwen2_window", "auto", 3),
    ],
)
def test_padding_changes_nothing(tmp_path: Path, family: str, kv_dtype: str, num_groups: int) -> None:
    save_random_model(family, tmp_path)
    settings = {"kv_dtype": kv_dtype, "max_total_token_num": 700, "prefix_cache": num_groups == 1}
    engines = [load(tmp_path, **settings) for _ in range(2)]
    assert engines[0].groups.count == num_groups
    plain, padded = (engine.runner for engine in engines)
    steps = PaddedSteps(padded._step)
    padded.graphs = steps  # type: ignore[assignment]
    for tensor in pool(plain) + pool(padded):
        # What nobody has written must not be read, nor be written by padding.
        tensor.fill_(torch.nan if tensor.is_floating_point() else 127)
    assert check_same_steps(plain, padded, engines[0], seed=0) > 20
    kinds = {(bucket.decodes > 0, bucket.prefills > 0) for bucket in steps.padded}
    assert kinds == {(True, False), (False, True), (True, True)}


def test_arrays_of_a_padded_step_by_hand() -> None:
    tables = DeviceTables(num_rows=4, max_length=90, device=CPU)  # rows of 96
    tables.rotary_lengths[:] = [3, 9, 8, 2]
    # Row 3 decodes; row 0 prefills all of its prompt; row 1 tokens 4 and 5 of a prompt of 9.
    batch = Batch(
        rows=np.array([3, 0, 1], np.int32),
        starts=np.array([6, 0, 4], np.int32),
        lengths=np.array([1, 3, 2], np.int32),
        slots=np.array([[50, 10, 11, 12, 30, 31]], np.int32),
        samples=np.array([True, True, False]),
        num_decodes=1,
        admitted=(),
    )
    bucket = Bucket(tokens=8, decodes=3, prefills=3)
    layout = bucket.layout()
    arrays = StepArrays(*layout.arrays(np.full(layout.num_bytes, 77, np.uint8)))
    fill(arrays, batch, bucket, tables)
    expected = StepArrays(
        token_indices=[294, 0, 1, 2, 100, 101, 384, 384],
        last_tokens=[0, 3, 0, 0, 0, 0],
        sampled_indices=[295, 3, 384, 384, 384, 384],
        positions=[6, 0, 1, 2, 4, 5, 0, 0],
        slots=[50, 10, 11, 12, 30, 31, -1, -1],
        rotary_lengths=[7, 3, 3, 3, 9, 9, 0, 0],
        rows=[3, 4, 4, 0, 1, 4],
        context_lengths=[7, 0, 0, 3, 6, 0],
        query_starts=[1, 4, 6, 6],
    )
    for name in StepArrays._fields:
        assert getattr(arrays, name).tolist() == getattr(expected, name), name


def test_a_bucket_that_the_batch_fills_has_no_padding() -> None:
    tables = DeviceTables(num_rows=2, max_length=10, device=CPU)  # rows of 16
    batch = Batch(
        rows=np.array([1], np.int32), starts=np.array([2], np.int32), lengths=np.array([2], np.int32),
        slots=np.array([[5, 6]], np.int32), samples=np.array([False]), num_decodes=0, admitted=(),
    )  # fmt: skip
    bucket = Bucket.of(batch)
    assert bucket == (2, 0, 1)
    arrays = StepArrays(*bucket.layout().arrays(np.zeros(bucket.layout().num_bytes, np.uint8)))
    fill(arrays, batch, bucket, tables)
    assert arrays.slots.tolist() == [5, 6, -1, -1], "aligned"
    assert arrays.query_starts.tolist() == [0, 2]
    assert arrays.sampled_indices.tolist() == [32], "a chunk that is not the last samples nothing"


def test_the_model_is_told_of_prompts_without_cached_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random_model("llama2_gqa", tmp_path)
    runner = load(tmp_path, max_total_token_num=700).runner
    steps: list[StepInput] = []
    forward = runner._step._model.forward
    monkeypatch.setattr(runner._step._model, "forward", lambda step: steps.append(step) or forward(step))
    behind, prompts = example_batch(1, [9], SamplingParams(), cached=4), example_batch(1, [3, 200], SamplingParams())
    mixed = replace(prompts, starts=np.array([0, 0, 4], np.int32), lengths=np.array([1, 3, 200], np.int32))
    for batch in (prompts, mixed, behind):
        runner.launch(batch)
    runner.launch_padding(Bucket(8, 1, 2))
    of_prompts, of_mixed, *others = (step.whole_prompts for step in steps)
    assert of_prompts is not None
    assert of_mixed is not None
    assert sorted(of_prompts.tiles.tolist()) == [[1, 3, 0], [4, 200, 0], [4, 200, 1]]
    assert of_mixed.tiles.tolist() == [[1, 3, 0]]
    assert (of_prompts.are_all, of_mixed.are_all) == (True, False)
    assert others == [None, None]
