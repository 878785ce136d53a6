# SPDX-License-Identifier: Apache-2.0
"""On a GPU, with CUDA graphs and without: what tests/runner/test_layer_groups.py says of the CPU."""

from pathlib import Path

import pytest
import torch
import transformers

from lightllm_backend.router.admission import ExactAdmission
from tests.runner.engine_harness import load, run, transformers_greedy
from tests.runner.test_layer_groups import GREEDY, MAX_TOKENS, MODELS, PROMPTS, router_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.mark.parametrize("name", list(MODELS))
def test_tokens_are_those_of_transformers_with_freed_slots_poisoned(name: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    transformers.AutoModelForCausalLM.from_config(MODELS[name]).save_pretrained(tmp_path)
    expected = transformers_greedy(tmp_path, PROMPTS, MAX_TOKENS, "cuda")
    engine = load(tmp_path, prefix_cache=False, max_total_token_num=4096)
    assert engine.groups.num_windowed > 0
    graphs, arrivals = engine.runner.graphs, [index // 3 for index in range(len(PROMPTS))]
    for engine.runner.graphs in (graphs, None):
        for batch_max_tokens in (200, 11):
            router = router_for(engine, ExactAdmission(), batch_max_tokens, spare_slots=100)
            answers = run(engine, PROMPTS, GREEDY, arrivals, overlap=1, router=router)
            assert [answer.token_ids for answer in answers] == expected
