# SPDX-License-Identifier: Apache-2.0
"""A whole engine in one process: Router and ModelRunner on a random little LLaMA, or on any model directory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import transformers

from lightllm_backend.config import EngineConfig
from lightllm_backend.grammar.compiler import GrammarCompiler
from lightllm_backend.grammar.matcher import MaskMaker
from lightllm_backend.request import FinishReason, PromptLogProbs, Request, RequestError, SamplingParams, TokenChunk
from lightllm_backend.router.router import Router
from lightllm_backend.worker.load import LoadedEngine, load_engine
from lightllm_backend.worker.main import build_router


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    top_log_probs: bytes = b""
    reason: FinishReason | None = None
    error: RequestError | None = None
    prompt: PromptLogProbs | None = None


def save_random_llama(directory: Path, **changes: object) -> Path:
    """A LLaMA that is small but has everything: GQA, several layers, a vocabulary of odd size."""
    torch.manual_seed(7)
    shape: dict[str, object] = {
        "vocab_size": 199,
        "hidden_size": 96,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,  # far apart logits: ties do not decide
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(shape | changes)))
    model.save_pretrained(directory)
    return directory


def load(directory: Path, **settings: object) -> LoadedEngine:
    defaults: dict[str, object] = {"dtype": "float32", "running_max_req_size": 16, "max_total_token_num": 2048}
    return load_engine(EngineConfig(model_dir=str(directory), **(defaults | settings)))


def run(
    engine: LoadedEngine,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams],
    arrivals: Sequence[int] | None = None,
    batch_max_tokens: int | None = None,
    overlap: int | None = None,
    router: Router | None = None,
    compiler: GrammarCompiler | None = None,
) -> list[Answer]:
    """All prompts to their ends; prompt i arrives before step arrivals[i]. Each step the pool is checked.

    The answers to one prompt follow each other. compiler: for prompts with structured output.
    """
    router = router or build_router(
        EngineConfig(running_max_req_size=16, prefix_cache=engine.groups.num_windowed == 0),
        engine.info,
        batch_max_tokens or engine.batch_max_tokens,
        engine.prefixes_are_alike,
        engine.recompute_at,
        engine.groups,
    )
    params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    requests = [Request(str(i), tuple(prompt), params[i]) for i, prompt in enumerate(prompts)]
    waiting = deque(sorted(zip(arrivals or [0] * len(prompts), range(len(prompts)), strict=True)))
    uids = [uid for request in requests for uid in request.uids]
    answers = {uid: Answer() for uid in uids}
    depth = engine.runner.overlap if overlap is None else overlap
    in_flight: deque = deque()
    mask_maker = MaskMaker()

    def take(chunks: list[TokenChunk]) -> None:
        for chunk in chunks:
            answer = answers[chunk.uid]
            answer.token_ids += chunk.token_ids
            answer.log_probs += chunk.log_probs
            answer.top_log_probs += chunk.top_log_probs
            assert answer.prompt is None or chunk.prompt_log_probs is None, "they come once"
            answer.prompt = answer.prompt or chunk.prompt_log_probs
            assert answer.reason is None, "nothing comes after the end"
            answer.reason, answer.error = chunk.finish_reason, chunk.error

    def take_result() -> None:
        done, pending = in_flight.popleft()
        output = router.apply(done, pending.result())
        for number, token in zip(output.handles.tolist(), output.token_ids.tolist(), strict=True):
            answers[uids[number]].token_ids.append(token)
        take(output.chunks)

    step = 0
    while waiting or router.has_work or in_flight:
        while waiting and waiting[0][0] <= step:
            number = waiting.popleft()[1]
            matcher = compiler.compile(params[number]) if params[number].structured_output else None  # type: ignore[union-attr]
            router.submit(requests[number], uids.index(requests[number].uid), matcher)
        batch = router.next_batch()
        if batch is not None:
            launched = engine.runner.launch(batch)
            if launched.masks is not None:
                while in_flight:
                    take_result()
                mask_maker.fill(router.matchers(batch), launched.masks)  # type: ignore[arg-type]
                engine.runner.release(launched)
            in_flight.append((batch, launched))
        take(router.drain_finished())
        while in_flight and (len(in_flight) > depth or batch is None):
            take_result()
        router.check_integrity()
        step += 1
    assert router.stats().kv_tokens_used == 0
    return list(answers.values())


def transformers_greedy(
    directory: Path, prompts: Sequence[Sequence[int]], max_tokens: int, device: str = "cpu"
) -> list[list[int]]:
    model = _reference_model(directory, device)
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=device)
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
            )
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def transformers_logits(
    directory: Path, prompt: Sequence[int], tokens: Sequence[int], device: str = "cpu"
) -> torch.Tensor:
    """Logits [len(tokens), vocab] in float32 of what follows the prompt, given those tokens."""
    ids = torch.tensor([[*prompt, *tokens]], device=device)
    with torch.no_grad():
        return _reference_model(directory, device)(ids).logits[0, len(prompt) - 1 : -1].cpu()


@lru_cache(maxsize=1)
def _reference_model(directory: Path, device: str) -> torch.nn.Module:
    # Not the default attention: that of transformers 5.20 leaves out Gemma 2's soft cap.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.to(device).eval()
