# SPDX-License-Identifier: Apache-2.0
"""Random models of each family against transformers, in float32: logits, greedy tokens, ranks, int8 K and V."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from lightllm_backend.config import EngineConfig
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.layers import alibi_slopes
from lightllm_backend.parallel import TensorParallel
from lightllm_backend.request import SamplingParams
from lightllm_backend.worker.main import build_router
from tests.models.random_models import FAMILIES, VOCAB, random_model, save_random_model
from tests.models.step_harness import check_reads_nothing_back, check_steps, load_model
from tests.models.thread_parallel import run_ranks
from tests.runner.engine_harness import load, run, transformers_greedy, transformers_logits

MAX_TOKENS = 8
PROMPTS = [random.Random(seed).choices(range(3, VOCAB), k=length) for seed, length in enumerate([1, 2, 5, 8, 34])]


@cache
def model_of_family(family: str) -> transformers.PreTrainedModel:
    return random_model(family)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's model, which no test may change."""

    @cache
    def save(family: str) -> Path:
        directory = tmp_path_factory.mktemp(family)
        model_of_family(family).save_pretrained(directory)
        return directory

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(saved, family):
    check_steps(load_model(saved(family)), model_of_family(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_never_asks_the_device_for_a_value(saved, family):
    check_reads_nothing_back(saved(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(saved, family):
    prompts, arrivals = PROMPTS[::2], [7, 0, 2]
    answers = run(load(saved(family)), prompts, SamplingParams(max_tokens=MAX_TOKENS), arrivals, batch_max_tokens=9)
    assert [answer.token_ids for answer in answers] == transformers_greedy(saved(family), prompts, MAX_TOKENS)


@pytest.mark.parametrize("overlap", [0, 1])
def test_answers_that_cross_the_limit_of_longrope_are_those_of_transformers_generate(tmp_path, overlap):
    """Some answers begin and end on different sides of the limit."""
    save_random_model("phi3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["original_max_position_embeddings"] = config["rope_parameters"]["original_max_position_embeddings"] = 9
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = load(tmp_path)
    assert (engine.prefixes_are_alike, engine.recompute_at) == (True, 9)
    assert load(tmp_path, max_req_total_len=9).recompute_at is None
    sampling = SamplingParams(max_tokens=MAX_TOKENS)
    expected = transformers_greedy(tmp_path, PROMPTS, MAX_TOKENS)
    for arrivals in (None, [random.Random(7).randrange(10) for _ in PROMPTS]):
        answers = run(engine, PROMPTS, sampling, arrivals, batch_max_tokens=9, overlap=overlap)
        assert [answer.token_ids for answer in answers] == expected
    # Once more, with K and V of both kinds in the prefix cache.
    router = build_router(EngineConfig(running_max_req_size=16), engine.info, 9, recompute_at=engine.recompute_at)
    for _ in range(2):
        answers = run(engine, PROMPTS, sampling, overlap=overlap, router=router)
        assert [answer.token_ids for answer in answers] == expected
    crossing = sum(len(prompt) <= 9 < len(prompt) + MAX_TOKENS - 1 for prompt in PROMPTS)
    first_time = sum(map(len, PROMPTS)) + 10 * crossing
    assert 0 < router.stats().prompt_tokens_total - first_time <= 2 * len(PROMPTS)
    # Without it, some answers differ.
    router = build_router(EngineConfig(running_max_req_size=16), engine.info, 9)
    answers = run(engine, PROMPTS, sampling, router=router)
    assert [answer.token_ids for answer in answers] != expected


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_together_compute_the_same_logits(saved, family):
    directory, transformer = saved(family), model_of_family(family)
    run_ranks(2, lambda parallel: check_steps(load_model(directory, parallel=parallel), transformer))


@pytest.mark.parametrize(
    ("family", "size"), [("mistral", 2), ("gemma3", 2), ("qwen2_window", 4), ("bloom_12_heads", 2), ("olmo2", 2)]
)
def test_ranks_together_through_lamport_buffers(saved, family, size):
    """With room for 3 rows: what the last norm takes of each step, and some whole steps."""
    directory, transformer = saved(family), model_of_family(family)
    columns = transformer.config.hidden_size
    run_ranks(size, lambda parallel: check_steps(load_model(directory, parallel=parallel), transformer), 3, columns)


@pytest.mark.parametrize(
    ("family", "size"), [("bloom_6_heads", 3), ("bloom_12_heads", 4), ("qwen2_window", 4), ("olmo2", 4)]
)
def test_more_ranks(saved, family, size):
    directory, transformer = saved(family), model_of_family(family)
    run_ranks(size, lambda parallel: check_steps(load_model(directory, parallel=parallel), transformer))


@pytest.mark.parametrize("family", ["bloom_6_heads", "mistral"])
def test_a_number_of_ranks_that_does_not_divide_the_heads_is_refused(saved, family):
    with pytest.raises(ModelError, match=r"num_attention_heads is \d, which tp = 5 does not divide"):
        load_model(saved(family), parallel=TensorParallel(0, 5))


# One family of each kind of attention, which is where int8 K and V are written and read.
ATTENTIONS = ["llama2_gqa", "bloom_6_heads", "phi3", "qwen2_window", "qwen3", "gemma2"]


@pytest.mark.parametrize("family", ATTENTIONS)
def test_int8_keys_and_values_change_little(saved, family):
    model, transformer = load_model(saved(family)), model_of_family(family)
    check_steps(model, transformer, torch.int8, tolerance=0.4)
    with pytest.raises(AssertionError, match="not close"):
        check_steps(model, transformer, torch.int8)


@pytest.mark.parametrize("family", ATTENTIONS)
def test_int8_keys_and_values_choose_the_same_tokens_where_the_choice_is_clear(saved, family):
    directory = saved(family)
    plain, engine = load(directory), load(directory, kv_dtype="int8")
    assert engine.info.pool_tokens == plain.info.pool_tokens
    assert engine.info.memory["KV pool"] < 0.4 * plain.info.memory["KV pool"]
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    for prompt, answer in zip(PROMPTS, run(engine, PROMPTS, sampling), strict=True):
        logits = transformers_logits(directory, prompt, answer.token_ids)
        chosen = logits.gather(1, torch.tensor(answer.token_ids).unsqueeze(1)).squeeze(1)
        assert float((logits.max(-1).values - chosen).max()) < 0.25 * float(logits.std())


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "granite", "olmo2"])
def test_bfloat16_chooses_the_same_tokens_where_the_choice_is_clear(saved, family):
    """These families round norms, soft caps or products in ways of their own."""
    directory = saved(family)
    engine = load(directory, dtype="bfloat16")
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, return_log_probs=True)
    for prompt, answer in zip(PROMPTS, run(engine, PROMPTS, sampling), strict=True):
        logits = transformers_logits(directory, prompt, answer.token_ids)
        chosen = torch.tensor(answer.token_ids).unsqueeze(1)
        assert float((logits.max(-1).values - logits.gather(1, chosen).squeeze(1)).max()) < 0.1 * float(logits.std())
        log_probs = logits.log_softmax(-1).gather(1, chosen).squeeze(1)
        torch.testing.assert_close(torch.tensor(answer.log_probs), log_probs, atol=0.1 * float(logits.std()), rtol=0)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 7, 8, 12, 16, 31, 112])
def test_alibi_slopes_are_those_of_transformers(heads):
    positions = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
    torch.testing.assert_close(alibi_slopes(heads), positions[:, 0, 1], atol=0, rtol=1e-5)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("family", ["bloom_6_heads", "llama2_gqa"])
def test_names_may_lack_the_prefix(tmp_path, family, suffix):
    save_random_model(family, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = load_model(tmp_path).prefix
    assert all(name.startswith(prefix) or name == "lm_head.weight" for name in tensors)
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    (tmp_path / "model.safetensors").unlink()
    if suffix == "bin":
        torch.save(bare, tmp_path / "pytorch_model.bin")
    else:
        save_file(bare, tmp_path / "model.safetensors")
    check_steps(load_model(tmp_path), model_of_family(family))


@pytest.mark.parametrize("names", ["of files", "of classes"])
def test_the_text_part_of_a_model_with_images(tmp_path, names):
    """As transformers 5.23 saves it, and with the names that its classes have."""
    text = FAMILIES["gemma3"].to_dict() | {"vocab_size": VOCAB}
    vision = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    model, expected = transformers.Gemma3ForConditionalGeneration(config).float(), random_model("gemma3")
    model.model.language_model.load_state_dict(expected.model.state_dict())
    model.lm_head.load_state_dict(expected.lm_head.state_dict())
    model.save_pretrained(tmp_path)
    if names == "of classes":
        tensors = load_file(tmp_path / "model.safetensors")
        renamed = {name.replace("language_model.model.", "language_model."): tensors[name] for name in tensors}
        head = renamed.pop("language_model.lm_head.weight")
        assert renamed.keys() | {"lm_head.weight"} == {name.removeprefix("model.") for name in model.state_dict()}
        renamed = {f"model.{name}": tensor for name, tensor in renamed.items()}
        save_file({**renamed, "lm_head.weight": head}, tmp_path / "model.safetensors")
    check_steps(load_model(tmp_path), expected)


def test_the_masks_of_the_first_blooms_are_ignored(tmp_path):
    save_random_model("bloom_8_heads", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.self_attention.scale_mask_softmax.causal_mask"] = torch.ones(4, 4, dtype=torch.bool)
    save_file(tensors, tmp_path / "model.safetensors")
    check_steps(load_model(tmp_path), random_model("bloom_8_heads"))


def test_what_transformers_makes_of_layer_types_that_are_refused_here():
    """The rows of docs/compatibility.md on Phi-3 and SmolLM3."""
    ids = torch.arange(3, 23)[None]
    some, full = (["full_attention", kind, "full_attention"] for kind in ("sliding_attention", "full_attention"))

    def model(config_class, **changes):
        torch.manual_seed(0)
        shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
        config = config_class(**shape, **heads, bos_token_id=1, eos_token_id=2, **changes)
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    @torch.no_grad()
    def logits(config_class, **changes):
        return model(config_class, **changes)(ids).logits

    phi3 = partial(logits, transformers.Phi3Config, sliding_window=4)
    assert torch.equal(phi3(layer_types=some), phi3())
    assert torch.equal(phi3(layer_types=full), phi3())
    with pytest.raises(RuntimeError, match="must match the size"):
        model(transformers.Phi3Config, sliding_window=4, layer_types=some).generate(ids, max_new_tokens=4)
    smollm3 = partial(logits, transformers.SmolLM3Config, layer_types=some)
    on, off = (smollm3(sliding_window=4, use_sliding_window=is_on) for is_on in (True, False))
    torch.testing.assert_close(off, on)
    assert not torch.allclose(off, logits(transformers.SmolLM3Config, layer_types=full))
    with pytest.raises(TypeError, match="'NoneType' object"):  # of the cache
        smollm3(use_sliding_window=False)


def test_mistral_with_layer_types_has_its_window_in_those_alone(tmp_path):
    """transformers 5.23's AutoConfig reads it as Ministral; the class of Mistral has the window in all."""
    save_random_model("mistral_window", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(expected).__name__ == "MinistralForCausalLM"
    check_steps(load_model(tmp_path), expected)
    with pytest.raises(AssertionError, match="not close"):
        check_steps(load_model(tmp_path), random_model("mistral_window"))
