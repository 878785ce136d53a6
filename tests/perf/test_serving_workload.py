# SPDX-License-Identifier: Apache-2.0
"""Workloads: tables, datasets, prompts of exact length, arrival times."""

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest

from lightllm_backend.launch.embedded_model import embedded_model_directory
from lightllm_backend.text.tokenizer import Tokenizer
from perf.model_directory import DATA
from perf.serving.workload import (
    FIRST_ORDINARY_ID,
    Length,
    WorkloadError,
    all_exchanges,
    arrival_times,
    first_exchanges,
    id_prompts,
    items_from_dataset,
    lengths_from_table,
    text_prompts,
)

LENGTHS = [Length(4, 5), Length(17, 1), Length(300, 9)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DATA)


def test_the_stored_workload_is_the_one_that_is_cited() -> None:
    lengths = lengths_from_table(DATA / "workload_2000.csv")
    assert len(lengths) == 2000
    assert (sum(length.prompt for length in lengths), sum(length.output for length in lengths)) == (315_134, 654_241)


@pytest.mark.parametrize("row", ["5", "5,0", "5,x", "1,2,3"])
def test_a_row_that_is_no_length_is_named(tmp_path: Path, row: str) -> None:
    table = tmp_path / "lengths.csv"
    table.write_text(f"prompt_tokens,output_tokens\n3,4\n{row}\n")
    with pytest.raises(WorkloadError, match=rf"lengths.csv:3 is '{row}'; allowed: two whole numbers"):
        lengths_from_table(table)


def conversation(*turns: tuple[str, str]) -> dict[str, object]:
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in turns]}


def test_a_dataset_gives_the_first_exchange_also_when_it_is_cut_short(tmp_path: Path) -> None:
    conversations = [
        conversation(("human", "one {"), ("gpt", "two }"), ("human", "three"), ("gpt", "four")),
        conversation(("gpt", "nobody asked"), ("human", "five"), ("gpt", "six")),
        conversation(("human", "never answered")),
        conversation(),
        conversation(("human", "seven"), ("gpt", "eight")),
    ]
    text = json.dumps(conversations, indent=1)
    dataset = tmp_path / "dataset.json"
    dataset.write_text(text)
    assert list(first_exchanges(dataset)) == [("one {", "two }"), ("five", "six"), ("seven", "eight")]
    assert list(all_exchanges(dataset)) == [[("one {", "two }"), ("three", "four")], [("seven", "eight")]]
    dataset.write_text(text[: text.index("eight")])
    assert list(first_exchanges(dataset)) == [("one {", "two }"), ("five", "six")]


def test_a_sample_of_a_dataset_leaves_out_what_is_too_short_or_too_long(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def words(count: int) -> str:
        return " ".join(["the"] * (count - 1))  # and the token of the beginning

    assert len(tokenizer.encode(words(1024))) == 1024
    pairs = {(3, 50): False, (4, 50): True, (50, 3): False, (50, 4): True, (1024, 1024): True, (1025, 50): False}
    pairs |= {(1024, 1025): False, (4, 2044): True}
    dataset = tmp_path / "dataset.json"
    dataset.write_text(json.dumps([conversation(("human", words(a)), ("gpt", words(b))) for a, b in pairs]))
    items = items_from_dataset(dataset, tokenizer, 100, seed=1, as_text=True)
    assert {(item.length.prompt, item.length.output) for item in items} == {
        pair for pair, kept in pairs.items() if kept
    }
    assert all(len(tokenizer.encode(str(item.prompt))) == item.length.prompt for item in items)
    two = items_from_dataset(dataset, tokenizer, 2, seed=1, as_text=False)
    assert [item.length for item in two] == [item.length for item in items[:2]]
    assert two[0].prompt == tuple(tokenizer.encode(str(items[0].prompt)))


def test_id_prompts_have_their_lengths_and_share_only_their_prefix() -> None:
    items = id_prompts(LENGTHS, 100, seed=1, shared_prefix=7)
    assert [len(item.prompt) for item in items] == [11, 24, 307]
    assert [item.length for item in items] == [Length(11, 5), Length(24, 1), Length(307, 9)]
    assert len({item.prompt[:7] for item in items}) == 1
    assert len({item.prompt[7:11] for item in items}) == 3
    assert {token for item in items for token in item.prompt} <= set(range(FIRST_ORDINARY_ID, 100))
    assert items == id_prompts(LENGTHS, 100, seed=1, shared_prefix=7)
    assert items != id_prompts(LENGTHS, 100, seed=2, shared_prefix=7)


@pytest.mark.parametrize("family", ["sentencepiece", "byte-level"])
def test_text_prompts_are_exactly_so_many_tokens(family: str, tokenizer: Tokenizer) -> None:
    if family == "byte-level":
        tokenizer = Tokenizer.load(embedded_model_directory())
    items = text_prompts(LENGTHS, tokenizer, seed=1, shared_prefix=20)
    assert [len(tokenizer.encode(str(item.prompt))) for item in items] == [24, 37, 320]
    assert [item.length.prompt for item in items] == [24, 37, 320]
    assert len({str(item.prompt).split()[10] for item in items}) == 1
    assert len({str(item.prompt).split()[-1] for item in items}) == 3


def test_arrivals_are_a_poisson_process() -> None:
    times = arrival_times(4000, 50.0, seed=3)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == 0.0
    assert min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(1 / 50, rel=0.1)  # of an exponential distribution, as its mean
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.03)
    assert times == arrival_times(4000, 50.0, seed=3)
    assert times != arrival_times(4000, 50.0, seed=4)


def test_without_a_rate_all_arrive_at_once() -> None:
    assert arrival_times(3, math.inf, seed=0) == [0.0, 0.0, 0.0]
