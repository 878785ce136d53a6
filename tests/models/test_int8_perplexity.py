# SPDX-License-Identifier: Apache-2.0
"""What fewer bits cost a real model, SmolLM2: the perplexity of a fixed text, with int8 keys and values, and as a CPU
multiplies weights that were dequantised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightllm_backend import kernels
from lightllm_backend.kernels.quantized.grid_weight import GridWeight, has_kernel
from lightllm_backend.launch.embedded_model import embedded_model_directory
from lightllm_backend.models.causal_lm import CausalLM
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.text.tokenizer import Tokenizer
from tests.models.step_harness import HandSequence, StepHarness, load_model, model_of

TEXT = """\
The lighthouse at the end of the harbour had not been lit for eleven years when Marta bought it. The man who sold it \
to her, a retired pilot with a white beard, told her that the stairs were sound but that the roof was not, and that \
in the winter storms the sea came over the wall and into the kitchen. She said that she did not mind. She had lived \
in the city for most of her life, in a small flat above a bakery, and what she wanted now was a place in which she \
could hear the weather.

In the first month she repaired the roof with the help of two brothers from the village. They worked from the early \
morning until the light was gone, and in the evening they sat on the rocks, ate bread and cheese, and watched the \
fishing boats come in one after the other. The older brother knew the name of every boat and of every captain. The \
younger one hardly spoke at all, but he could carry three sacks of sand at once, and he never forgot where a tool had \
been put down.

A lighthouse works by a simple idea. A lamp stands in the middle of a ring of glass, and the glass bends the light, \
which would otherwise go up to the sky and down to the floor, into one flat beam. When the ring turns, the beam sweeps \
over the water. From the time between two flashes a sailor can tell which lighthouse it is, because each one on the \
coast turns at a speed of its own. The lamp itself does not have to be strong; most of the work is done by the glass.

The glass of Marta's lighthouse was cracked in two places. She wrote to a factory in France, and after six weeks a \
letter came back: they still had the drawings, they could make the two pieces, and it would cost about as much as a \
new car. She put the letter into a drawer. Then she took it out again, read it once more, and began to count.
"""


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(embedded_model_directory(), max_length=512)


def perplexity(model: CausalLM, tokens: list[int], kv_dtype: torch.dtype, lengths: list[int]) -> float:
    """The text is computed in steps of these lengths; each reads what is before it from the pool."""
    config = ModelConfig.from_directory(embedded_model_directory())
    harness = StepHarness(model, config.num_layers, rows=1, max_length=512, kv_dtype=kv_dtype)
    sequence = HandSequence(0, tokens, prompt_length=len(tokens) - 8)
    logits = []
    with torch.inference_mode():
        for length in lengths:
            step = harness.step_input([(sequence, length)])
            every_token = torch.arange(length)
            logits.append(model.forward(replace(step, last_tokens=every_token)).float())
            sequence.cached += length
    return float(torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(tokens[1 : 1 + sum(lengths)])).exp())


def test_int8_keys_and_values_cost_less_than_half_a_percent(model):
    tokens = Tokenizer.load(embedded_model_directory()).encode(TEXT)[:260]
    half = len(tokens) // 2
    lengths = [half, len(tokens) - 8 - half, *[1] * 7]
    plain, quantised = (perplexity(model, tokens, dtype, lengths) for dtype in (torch.float32, torch.int8))
    assert plain < 30, "the model does not know the language"
    assert plain != quantised
    assert abs(quantised / plain - 1) < 0.005


@pytest.mark.skipif(not has_kernel(torch.device("cpu")), reason="this CPU has no kernel")
def test_weights_on_their_grids_cost_less_than_a_percent(model):
    tokens = Tokenizer.load(embedded_model_directory()).encode(TEXT)
    config = ModelConfig.from_directory(embedded_model_directory()).with_grids()
    on_grids = model_of(
        embedded_model_directory(), config, None, torch.bfloat16, 512, kernels.select("cpu", compiled=True)
    )
    weights = [layer.attention.qkv.weight for layer in on_grids.layers] + [on_grids.head.weight]
    assert [weight.bits for weight in weights if isinstance(weight, GridWeight)] == [4] * config.num_layers + [8]
    # So few tokens at once are multiplied by the grids alone.
    plain = perplexity(model, tokens, torch.float32, [320])
    quantised = perplexity(on_grids, tokens, torch.bfloat16, [64] * 5)
    assert plain != quantised
    assert abs(quantised / plain - 1) < 0.01


@pytest.mark.skipif(not has_kernel(torch.device("cpu")), reason="this CPU has no kernel")
@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_quantised_weights_on_grids_cost_less_than_a_percent(weight_dtype):
    directory = embedded_model_directory()
    tokens = Tokenizer.load(directory).encode(TEXT)[:257]
    config = ModelConfig.from_directory(directory).with_weight_dtype(weight_dtype, "auto", 1)
    exact = model_of(directory, config, None, torch.float32, 512)
    on_grids = model_of(directory, config.with_grids(), None, torch.float32, 512, kernels.select("cpu", compiled=True))
    weights = [layer.attention.qkv.weight for layer in on_grids.layers]
    assert {weight.bits for weight in weights if isinstance(weight, GridWeight)} == {int(weight_dtype[-1])}
    sizes = [[slot.nbytes for slot in model.weight_map().values()] for model in (exact, on_grids)]
    assert sizes[0] == sizes[1]
    plain = perplexity(exact, tokens, torch.float32, [256])
    quantised = perplexity(on_grids, tokens, torch.float32, [64, 128, 64])
    assert plain != quantised
    assert abs(quantised / plain - 1) < 0.01
