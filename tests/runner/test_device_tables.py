# SPDX-License-Identifier: Apache-2.0
"""The tables on the device: how much memory they take beside the KV pool, and how admissions get into them."""

import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightllm_backend.kernels import reference
from lightllm_backend.kv_pool.storage import KVStorage
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.rope import Rope
from lightllm_backend.models.rotary import RotaryEmbedding
from lightllm_backend.request import SamplingParams
from lightllm_backend.router.batch import Admission
from lightllm_backend.runner import device_tables
from lightllm_backend.runner.device_tables import DeviceTables
from lightllm_backend.runner.sampler import Sampler
from lightllm_backend.runner.staging import Staging
from lightllm_backend.runner.warm_up import tokens_that_fit

CPU, META = torch.device("cpu"), torch.device("meta")
GIB = 1 << 30

LLAMA_3_1_8B = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32,
    num_heads=32, num_kv_heads=8, head_dim=128, norm_eps=1e-5, tie_word_embeddings=False, max_sequence_length=131072,
    torch_dtype="bfloat16", bos_id=128000, eos_ids=(128001,),
    ropes=(Rope(128, 500000.0, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),) * 32,
)  # fmt: skip
SLOT_BYTES = KVStorage.slot_bytes(32, 8, 128, torch.bfloat16)


@pytest.mark.parametrize(
    ("num_rows", "max_length", "num_groups"), [(1, 2, 1), (7, 16, 6), (7, 17, 1), (1000, 131072, 6)]
)
def test_the_bytes_of_the_tables_are_told_before_they_are_made(num_rows, max_length, num_groups) -> None:
    tables = DeviceTables(num_rows, max_length, META, num_groups)
    assert tables.token_ids.nbytes + tables.slots.nbytes == DeviceTables.num_bytes(num_rows, max_length, num_groups)
    for table in (tables.token_ids, *tables.slots):
        assert table.shape[1] >= max_length
        assert table.stride(0) * table.element_size() % 64 == 0, "kernels are compiled for aligned rows"


@pytest.mark.parametrize(
    ("rope", "most"),
    [(LLAMA_3_1_8B.ropes[0], 64 << 20), (Rope(128, 10000.0, "dynamic", 32.0, 4096), 31.01 * (1 << 20))],
)
def test_a_model_of_131072_positions_needs_about_a_gibibyte_of_tables(rope, most) -> None:
    """1,000 requests of any length at once; 1 % of what an H200 has for the KV pool of LLaMA 3.1 8B."""
    rotary = RotaryEmbedding(rope, 131072, CPU)
    positions = rotary.frequencies if rotary.is_dynamic else rotary.table
    assert positions.dtype == torch.float32
    assert positions.nbytes <= most
    tables = DeviceTables.num_bytes(1000, 131072)
    assert tables == 2 * 1001 * 131072 * 4
    assert tables + positions.nbytes < 1.05 * GIB
    # 126 GiB are 90 % of an H200's, 15 of them weights and 2 workspace.
    room = int((126 - 15 - 2) * GIB)
    pool = tokens_that_fit(room, SLOT_BYTES, partial(DeviceTables.num_bytes, 1000), 131072)
    assert pool > 0.99 * room / SLOT_BYTES


def test_the_pool_and_its_tables_fill_what_is_left_and_no_more() -> None:
    source = random.Random(0)
    bounded = 0
    for _ in range(300):
        num_rows, max_length = source.randint(1, 4000), int(2 ** source.uniform(1, 20))
        slot_bytes, room = int(2 ** source.uniform(6, 20)), int(2 ** source.uniform(20, 37))
        table_bytes = partial(DeviceTables.num_bytes, num_rows)

        def needed(slots: int) -> int:
            return slots * slot_bytes + table_bytes(min(max_length, slots + 1))  # noqa: B023

        slots = tokens_that_fit(room, slot_bytes, table_bytes, max_length)
        assert needed(slots + 1) > room
        assert slots < 0 or needed(slots) <= room
        bounded += slots + 1 < max_length
    assert 30 < bounded < 270
    assert tokens_that_fit(-5, 10, partial(DeviceTables.num_bytes, 1), 100) < 1


@pytest.mark.parametrize("at_once", [1, 7, 1 << 15])
def test_admissions_are_written_whatever_the_size_of_a_copy(monkeypatch, at_once) -> None:
    monkeypatch.setattr(device_tables, "_ADMITTED_AT_ONCE", at_once)
    tables = DeviceTables(num_rows=4, max_length=32, device=CPU)
    tables.token_ids.fill_(-1)
    tables.slots.fill_(-1)
    sampling = SamplingParams()
    admissions = [
        Admission(2, tuple(range(10, 19)), sampling, (90, 91), (70, 71, 72)),
        Admission(0, (5,), sampling, (95, 96), is_recomputed=True),
        Admission(3, tuple(range(20, 32)), sampling, (), tuple(range(40, 51))),
    ]
    tables.admit(admissions, Staging(CPU))
    expected_tokens, expected_slots = np.full((5, 32), -1), np.full((5, 32), -1)
    for one in admissions:
        known = one.prompt_ids + one.generated_ids
        expected_tokens[one.row, : len(known)] = known
        expected_slots[one.row, : len(one.cached_slots)] = one.cached_slots
    assert (tables.token_ids.numpy() == expected_tokens).all()
    assert (tables.slots[0].numpy() == expected_slots).all()
    assert tables.prompt_lengths.tolist() == [1, 0, 9, 12]
    assert tables.rotary_lengths.tolist() == [3, 0, 9, 12]


def test_penalties_read_as_much_of_the_table_as_the_longest_sequence_has() -> None:
    """Programs are launched for each block of what they get, however long sequences may be."""
    widths = []

    def apply_penalties(logits: torch.Tensor, tokens: torch.Tensor, *arguments: torch.Tensor) -> None:
        widths.append((tokens.shape, tokens.stride()))
        reference.apply_penalties(logits, tokens, *arguments)

    sampler = Sampler(
        SimpleNamespace(apply_penalties=apply_penalties, choose_greedily=reference.choose_greedily), 3, [2], CPU
    )
    sampler.admit([0, 1], [SamplingParams(repetition_penalty=2.0)] * 2, Staging(CPU))
    tables = DeviceTables(num_rows=3, max_length=131072, device=CPU)
    tables.token_ids[:2, :9] = 4
    logits = torch.tensor([[1.0, 1, 1, 1.5, 2, 1]] * 2)
    rows, lengths = np.array([0, 1], np.int32), np.array([5, 9], np.int32)
    places = torch.tensor([5, 131072 + 9])
    sampled = sampler.sample(logits, rows, lengths, tables, Staging(CPU), places)
    assert sampled.token_ids.tolist() == [3, 3]
    assert tables.token_ids.view(-1)[places].tolist() == [3, 3]
    assert widths == [((4, 9), (131072, 1))]


def test_parameters_are_uploaded_when_rows_or_their_owners_have_changed() -> None:
    """The temperatures that each draw gets, and how many arrays are uploaded for it."""

    class Counting(Staging):
        num_arrays = 0

        def upload(self, *arrays: np.ndarray) -> list[torch.Tensor]:
            self.num_arrays += len(arrays)
            return super().upload(*arrays)

    drawn: list[list[float]] = []

    def sample(logits: torch.Tensor, temperature: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        drawn.append(temperature.tolist())
        return logits.argmax(-1).int()

    sampler, staging = Sampler(SimpleNamespace(sample=sample), 3, [2], CPU), Counting(CPU)
    tables = DeviceTables(num_rows=3, max_length=32, device=CPU)

    def uploads_of_draw(*rows: int) -> int:
        before = staging.num_arrays
        logits, lengths, places = torch.zeros(len(rows), 8), np.ones(len(rows), np.int32), torch.arange(len(rows))
        sampler.sample(logits, np.array(rows, np.int32), lengths, tables, staging, places)
        return staging.num_arrays - before

    def admit(row: int, temperature: float) -> None:
        sampler.admit([row], [SamplingParams(do_sample=True, temperature=temperature)], Staging(CPU))

    for row in range(3):
        admit(row, 0.5 + row)
    everything = uploads_of_draw(0, 1)
    assert everything > 10
    assert uploads_of_draw(0, 1) == 1, "the lengths"
    assert uploads_of_draw(1, 2) == uploads_of_draw(1) == everything
    admit(1, 9.0)
    assert uploads_of_draw(1) == everything
    assert drawn == [[0.5, 1.5], [0.5, 1.5], [1.5, 2.5], [1.5], [9.0]]
