# SPDX-License-Identifier: Apache-2.0
"""The batches of static_inference."""

from pathlib import Path

import click
import numpy as np
import pytest

from perf.cases import WORKLOAD, Case, SizeList, Sizes, mixed_case, read_lengths, running_contexts


def test_context_tokens_are_what_the_measured_steps_read_on_average() -> None:
    case = Case((5, 9), output_len=4)
    # Tokens 2 to 4 of each are made in 3 steps, which see the prompt and 1, 2 and 3 tokens.
    steps = [sum(prompt + made for prompt in case.prompt_lengths) for made in (1, 2, 3)]
    assert case.context_tokens == pytest.approx(sum(steps) / len(steps))
    assert case.longest == 13


@pytest.mark.parametrize("output_len", [32, 128])
def test_a_mixed_batch_has_the_mean_context_that_is_asked_for(output_len: int) -> None:
    case = mixed_case(WORKLOAD, 580, output_len, 395)
    assert case.mixed
    assert case.batch == 580
    assert case.context_tokens / case.batch == pytest.approx(395, rel=0.02)
    assert min(case.prompt_lengths) >= 1
    assert np.std(case.prompt_lengths) > 100
    assert mixed_case(WORKLOAD, 580, output_len, 395) == case


def test_running_requests_are_met_in_proportion_to_their_output() -> None:
    workload = np.array([[100.0, 30.0], [1000.0, 10.0]])
    contexts = running_contexts(workload, 4000, np.random.default_rng(1))
    short = contexts[contexts < 500]
    assert len(short) / len(contexts) == pytest.approx(0.75, abs=0.03)
    assert short.min() >= 100
    assert short.max() <= 130
    assert short.mean() == pytest.approx(115, abs=1)


def test_lengths_need_their_columns(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    good.write_text("id,output_tokens,prompt_tokens\n1,20,3\n")
    bad.write_text("prompt,output\n1,2\n")
    assert read_lengths(good).tolist() == [[3.0, 20.0]]
    with pytest.raises(click.ClickException, match=r"prompt_tokens, output_tokens"):
        read_lengths(bad)


def test_sizes_are_read_or_refused_with_what_is_allowed() -> None:
    assert Sizes("BATCH", "INPUT", "OUTPUT").convert("32x4096x64", None, None) == (32, 4096, 64)
    assert SizeList().convert("1,8", None, None) == [1, 8]
    for kind, value in ((Sizes("BATCH", "OUTPUT"), "580"), (Sizes("BATCH", "OUTPUT"), "5x0"), (SizeList(), "1,,2")):
        with pytest.raises(click.BadParameter, match="allowed: "):
            kind.convert(value, None, None)
