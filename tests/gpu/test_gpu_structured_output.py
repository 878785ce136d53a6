# SPDX-License-Identifier: Apache-2.0
"""Structured output on a GPU: masks come over their own stream, and CUDA graphs and overlap change nothing."""

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightllm_backend.grammar.compiler import GrammarCompiler, ModelVocabulary
from lightllm_backend.request import FinishReason, SamplingParams
from lightllm_backend.runner.stream_gate import StreamGate
from lightllm_backend.text.tokenizer import Tokenizer
from tests.runner.engine_harness import load, run, save_random_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

ROOT = Path(__file__).parents[2]
TOKENIZER = Tokenizer.load(ROOT / "tests/data/llama")
SCHEMAS = json.loads((ROOT / "perf/data/json_schemas.json").read_text())
SHORT = ("person", "nested_arrays", "recursive_tree", "discriminated_union", "patterns")  # whose documents may end soon
PROMPTS = [random.Random(index).choices(range(3, 512), k=index % 9 + 1) for index in range(40)]


def test_a_stream_waits_at_a_gate_until_the_host_opens_it() -> None:
    device = torch.device("cuda")
    gate = StreamGate.where_possible(device)
    assert gate is not None, "every driver that torch runs on has them"
    stream, done = torch.cuda.Stream(device), torch.cuda.Event()
    source = torch.zeros(1000, dtype=torch.int32, pin_memory=True)
    target = torch.zeros(1000, dtype=torch.int32, device=device)
    for number in range(1, 20):
        closed = gate.close(stream)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            done.record()
        time.sleep(0.002)
        assert not done.query()
        source.fill_(number)
        gate.open(closed)
        done.synchronize()
        assert (target == number).all()
    numbers = [gate.close(stream) for _ in range(2)]
    with torch.cuda.stream(stream):
        done.record()
    gate.open(numbers[0])
    time.sleep(0.002)
    assert not done.query(), "the second is closed"
    gate.open_all()
    done.synchronize()


@pytest.mark.parametrize("with_graphs", [True, False])
def test_texts_are_the_same_with_overlap_and_without_and_documents_are_valid(tmp_path, with_graphs) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    directory = save_random_llama(tmp_path, vocab_size=TOKENIZER.vocab_size + 5, max_position_embeddings=512)
    engine = load(directory, max_total_token_num=16384, running_max_req_size=64)
    if not with_graphs:
        engine.runner.graphs = None
    compiler = GrammarCompiler(lambda: ModelVocabulary(TOKENIZER, engine.info.vocab_size, (2,)))
    names = [random.Random(index).choice(SHORT) for index in range(len(PROMPTS))]
    kinds = [
        SamplingParams(max_tokens=200, do_sample=True, temperature=2.0, seed=1), SamplingParams(max_tokens=60),
        SamplingParams(max_tokens=60, return_log_probs=True), SamplingParams(max_tokens=60, repetition_penalty=1.2),
    ]  # fmt: skip
    sampling = [
        kinds[index % 4]
        if index % 5 == 0
        else replace(kinds[index % 4], structured_output=json.dumps({"json_schema": SCHEMAS[name]}))
        for index, name in enumerate(names)
    ]
    arrivals = [index // 4 for index in range(len(PROMPTS))]
    plain, overlapped = (run(engine, PROMPTS, sampling, arrivals, overlap=depth, compiler=compiler) for depth in (0, 1))
    assert [answer.token_ids for answer in overlapped] == [answer.token_ids for answer in plain]
    ended = 0
    for name, params, answer in zip(names, sampling, overlapped, strict=True):
        assert answer.error is None
        if params.structured_output and answer.reason is FinishReason.STOP:
            ended += 1
            text = TOKENIZER.decode([token for token in answer.token_ids if token != 2])
            jsonschema.validate(json.loads(text), SCHEMAS[name])
    assert ended
