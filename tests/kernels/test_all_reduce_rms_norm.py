# SPDX-License-Identifier: Apache-2.0
"""all_reduce_rms_norm: one rank whose buffer the others have filled, against the formula; and ranks that wait, in this
and the other exchanges through Lamport buffers."""

import multiprocessing
import random
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.collective import lamport_buffers
from lightllm_backend.kernels.collective.all_reduce_rms_norm import rounded_all_reduce_rms_norm
from lightllm_backend.kernels.collective.lamport_buffers import EMPTY, SENT_FOR_EMPTY, LamportBuffers, bits_type_of
from tests.kernels.kernel_harness import TOLERANCE, relative_error
from tests.kernels.quantized_weights import random_weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def empty_buffers(ranks: int, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.full((2, ranks, rows, dim), EMPTY, dtype=bits_type_of(dtype), device=device) for _ in range(ranks)]


def is_empty_but_for(buffer: Tensor, rank: int) -> bool:
    """Whether others have nothing left there; nobody reads what a rank has in its own buffer for itself."""
    return bool((torch.cat((buffer[:, :rank], buffer[:, rank + 1 :]), 1) == EMPTY).all())


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1), (4, 2)])
@pytest.mark.parametrize(("parts", "tokens", "dim"), [(None, 3, 576), (1, 1, 64), (3, 5, 1000)])
def test_what_others_sent_is_added_in_each_turn(
    implementation: ModuleType, dtype, ranks, rank, parts, tokens, dim, device
):
    buffers = empty_buffers(ranks, 5, dim, dtype, device)
    own = LamportBuffers.of(buffers, rank)
    weight, post_weight = torch.randn(2, dim, device=device).to(dtype)
    others = [other for other in range(ranks) if other != rank]
    for turn in (0, 1, 0):
        shape = (tokens, dim) if parts is None else (parts, tokens, dim)
        x = torch.randn(*shape, device=device).to(dtype if parts is None else torch.float32)
        sent = torch.randn(ranks, tokens, dim, device=device).to(dtype)
        for other in others:
            buffers[rank][turn, other, :tokens] = sent[other].view(bits_type_of(dtype))
        residual = torch.randn(tokens, dim, device=device).to(dtype)
        sent[rank] = x if parts is None else x.sum(0).to(dtype)
        post = post_weight if turn == 1 else None
        added = sent.double().sum(0)
        added = added if post is None else reference.rms_norm(added, post.double(), EPS)
        expected_residual = residual.double() + added
        expected = reference.rms_norm(expected_residual, weight.double(), EPS)
        out = implementation.all_reduce_rms_norm(x, weight, EPS, residual, own, post)
        assert out.dtype == dtype
        # The interpreter truncates to bfloat16 where a GPU rounds.
        tolerance = TOLERANCE[dtype]
        assert relative_error(residual, expected_residual) < tolerance
        assert relative_error(out, expected) < 2 * tolerance
        assert own.turns.tolist() == [1 - turn] * tokens + [0] * (5 - tokens)
        assert is_empty_but_for(buffers[rank], rank), "what was read is empty again"
        for other in others:
            there = buffers[other][turn, rank, :tokens]
            assert relative_error(there.view(dtype), sent[rank]) < tolerance
            there.fill_(EMPTY)
            assert is_empty_but_for(buffers[other], other), "nothing else is written"


@pytest.mark.parametrize("is_static", [False, True])
def test_sums_are_rounded_as_quantize_tokens_rounds_them(is_static, device):
    dim, tokens = 128, 5
    reader = random_weight("fp8", 16, dim, dim, device)
    input_scale = torch.full((1,), 0.01, device=device) if is_static else None
    reader = replace(reader, quantizes_input=True, in_fragments=True, input_scale=input_scale)
    weight, x, arrived = (torch.randn(shape, device=device).half() for shape in (dim, (tokens, dim), (tokens, dim)))

    def after(implementation, *more):
        buffers = empty_buffers(2, tokens, dim, torch.float16, device)
        buffers[0][0, 1] = arrived.view(torch.int16)
        return implementation(x, weight, EPS, x.clone(), LamportBuffers.of(buffers, 0), None, *more)

    values, scales = launchers.quantize_tokens(after(launchers.all_reduce_rms_norm), reader)
    rounded = after(rounded_all_reduce_rms_norm, reader)
    assert torch.equal(rounded.scales, scales)
    assert torch.equal(rounded.values.view(torch.int8), values.view(torch.int8))
    assert (rounded.shape, rounded.dtype) == ((tokens, dim), torch.float16)


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_that_looks_like_no_message_is_sent_as_another(implementation, dtype, device):
    buffers = empty_buffers(2, 1, 8, dtype, device)
    buffers[1][0, 0] = torch.zeros(1, 8, dtype=dtype).view(bits_type_of(dtype))
    x = torch.full((1, 8), EMPTY, dtype=bits_type_of(dtype), device=device).view(dtype)
    residual = torch.ones(1, 8, dtype=dtype, device=device)
    weight = torch.ones(8, dtype=dtype, device=device)
    out = implementation.all_reduce_rms_norm(x, weight, EPS, residual, LamportBuffers.of(buffers, 1))
    assert out.isnan().all()
    assert (buffers[0][0, 1] != EMPTY).all()
    assert buffers[0][0, 1].view(dtype).isnan().all()


def test_both_stand_ins_are_nan():
    for dtype in DTYPES:
        bits = torch.tensor([EMPTY, SENT_FOR_EMPTY], dtype=bits_type_of(dtype))
        assert bits.view(dtype).isnan().all()


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_no_tokens(implementation, device):
    own = LamportBuffers.of(empty_buffers(2, 1, 8, torch.float32, device), 0)
    empty = torch.empty(0, 8, device=device)
    out = implementation.all_reduce_rms_norm(empty, torch.ones(8, device=device), EPS, empty.clone(), own)
    assert out.shape == (0, 8)


def test_messages_that_do_not_fit():
    own = LamportBuffers.of(empty_buffers(2, 3, 8, torch.float32, torch.device("cpu")), 0)
    assert own.fit(3, 8)
    assert not own.fit(4, 8)
    assert not own.fit(3, 4), "a row would lie elsewhere"


@pytest.mark.parametrize(
    ("ranks", "rows", "in_two_shots"), [(2, 10**6, False), (4, 53, False), (4, 54, True), (8, 15, False), (8, 16, True)]
)
def test_large_messages_of_many_ranks_take_two_shots(ranks, rows, in_two_shots):
    buffers = [torch.empty(2, ranks, rows, 4096, dtype=torch.int16, device="meta")] * ranks
    assert LamportBuffers(buffers, torch.empty(0), torch.empty(0), 0).use_two_shots(rows) == in_two_shots


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parts", "tokens", "dim"), [(None, 7, 96), (3, 5, 1000)])
def test_in_two_shots_the_owner_of_a_row_adds(monkeypatch, implementation, dtype, parts, tokens, dim, device):
    monkeypatch.setattr(lamport_buffers, "MIN_BYTES_SAVED_BY_TWO_SHOTS", 0)
    ranks, rank = 4, 2
    buffers = empty_buffers(ranks, tokens, dim, dtype, device)
    own, buffer = LamportBuffers.of(buffers, rank), buffers[rank]
    owners = torch.arange(tokens) % ranks
    mine = owners == rank
    weight = torch.randn(dim, device=device).to(dtype)
    for turn in (0, 1, 0):
        shape = (tokens, dim) if parts is None else (parts, tokens, dim)
        x = torch.randn(*shape, device=device).to(dtype if parts is None else torch.float32)
        sent = torch.randn(ranks, tokens, dim, device=device).to(dtype)
        bits = sent.view(bits_type_of(dtype))
        for other in range(ranks):
            if other != rank:
                buffer[turn, other, mine] = bits[other, mine]  # addends
                buffer[turn, other, owners == other] = bits[other, owners == other]  # sums
        residual = torch.randn(tokens, dim, device=device).to(dtype)
        sent[rank] = x if parts is None else x.sum(0).to(dtype)
        expected_residual = sent[owners, torch.arange(tokens)].double()
        expected_residual[mine] = residual[mine].double() + sent[:, mine].double().sum(0)
        expected = reference.rms_norm(expected_residual, weight.double(), EPS)
        out = implementation.all_reduce_rms_norm(x, weight, EPS, residual, own)
        tolerance = TOLERANCE[dtype]
        assert relative_error(residual, expected_residual) < tolerance
        assert relative_error(out, expected) < 2 * tolerance
        assert own.turns.tolist() == [1 - turn] * tokens
        assert is_empty_but_for(buffer, rank), "what was read is empty again"
        for other in range(ranks):
            if other != rank:
                there = buffers[other][turn, rank]
                assert relative_error(there[mine].view(dtype), expected_residual[mine]) < tolerance
                assert relative_error(there[owners == other].view(dtype), sent[rank, owners == other]) < tolerance
                there[mine | (owners == other)] = EMPTY
                assert is_empty_but_for(buffers[other], other), "nothing else is written"


ROWS, DIM = 3, 32


def run_rank(rank: int, ranks: int, directory: Path, implementation: ModuleType) -> None:
    """Sums of many shapes in a row with ranks that are other processes, now and then late."""
    size = 2 * ranks * ROWS * DIM
    files = [str(directory / f"{other}") for other in range(ranks)]
    buffers = [torch.from_file(file, shared=True, size=size, dtype=torch.int32) for file in files]
    own = LamportBuffers.of([buffer.view(2, ranks, ROWS, DIM) for buffer in buffers], rank)
    weight = torch.ones(DIM)
    for number in range(6):
        tokens = random.Random(number).randint(0, ROWS)
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(ranks, tokens, DIM, generator=generator)
        residual = torch.randn(tokens, DIM, generator=generator)
        expected_residual = residual + x.sum(0)
        if random.Random(number * ranks + rank).random() < 0.2:
            time.sleep(0.02)
        out = implementation.all_reduce_rms_norm(x[rank], weight, EPS, residual, own)
        assert relative_error(residual, expected_residual) < 1e-6
        assert relative_error(out, reference.rms_norm(expected_residual, weight, EPS)) < 1e-5
        # The other exchanges use the same places in turns.
        gathered = implementation.all_gather(x[rank], own)
        assert torch.equal(gathered, torch.cat(list(x), 1))
        ids = torch.randint(2 * ranks, (tokens,), generator=generator, dtype=torch.int32)
        table = torch.randn(2 * ranks, DIM, generator=generator)
        held = table[2 * rank : 2 * rank + 2]
        assert torch.equal(implementation.all_reduce_embeddings(ids, held, 2 * rank, 2, own), table[ids.long()])


GROUPS = [(3, reference), (3, launchers)]


def run_rank_of_each_group(rank: int, directory: Path) -> None:
    """One process for all groups that have the rank."""
    torch.set_num_threads(1)  # threads do not survive a fork
    lamport_buffers.MIN_BYTES_SAVED_BY_TWO_SHOTS = 100  # of three ranks, two rows and more are summed in two shots
    for number, (ranks, implementation) in enumerate(GROUPS):
        if rank < ranks:
            run_rank(rank, ranks, directory / str(number), implementation)
            print(f"rank {rank} of {ranks}, {implementation.__name__}: right", flush=True)


def test_ranks_wait_for_each_other(tmp_path, device):
    """On a CPU: between GPUs, see tests/gpu."""
    if device.type == "cuda":
        pytest.skip("other processes' buffers are not on this GPU")
    for number, (ranks, _) in enumerate(GROUPS):
        for rank in range(ranks):
            path = tmp_path / str(number) / str(rank)
            path.parent.mkdir(exist_ok=True)
            torch.from_file(str(path), shared=True, size=2 * ranks * ROWS * DIM, dtype=torch.int32).fill_(EMPTY)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run_rank_of_each_group, args=(rank, tmp_path)) for rank in range(3)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
