# SPDX-License-Identifier: Apache-2.0
"""What the device knows of the running requests, and how a Batch becomes the tensors of one step.

The tables are indexed by request row, so a step needs nothing from the host that the host does not have when it plans:
the token that step N samples is written to the table on the device, and step N+1 reads it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightllm_backend.models.layers import KVLayer, StepInput
from lightllm_backend.router.batch import Batch


class RequestTables:
    """`tokens[row, position]`: prompt and generated ids. `slots[row, position]`: where K and V lie (req_to_token)."""

    def __init__(self, num_rows: int, max_length: int, device: torch.device) -> None:
        self.device = device
        self.padding_row = num_rows  # belongs to no request
        self.tokens = torch.zeros((num_rows + 1, max_length), dtype=torch.int32, device=device)
        self.slots = torch.zeros((num_rows + 1, max_length), dtype=torch.int32, device=device)
        self.prompt_lengths = np.zeros(num_rows, dtype=np.int32)

    def admit(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Upload the prompts of newcomers, in one copy."""
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
        self.prompt_lengths[rows] = lengths
        ids = np.concatenate([np.asarray(prompt, dtype=np.int32) for prompt in prompts])
        row_of_token = np.repeat(np.asarray(rows, dtype=np.int32), lengths)
        packed = upload([ids, row_of_token, _positions(np.zeros_like(lengths), lengths)], self.device)
        self.tokens[packed[1], packed[2]] = packed[0]


class Sampled(NamedTuple):
    """The m sequences of a step that get a token, on the host and on the device.

    lengths: tokens known before the sampled one, which is also the position that it takes.
    """

    host_rows: NDArray[np.int32]
    host_lengths: NDArray[np.int32]
    rows: Tensor  # [m] int32
    lengths: Tensor  # [m] int32


class DeviceBatch:
    """The tensors of one step: the model's input, and where the sampled tokens go."""

    def __init__(self, batch: Batch, tables: RequestTables, kv_layers: Sequence[KVLayer]) -> None:
        context_lengths = batch.starts + batch.lengths
        positions = _positions(batch.starts, batch.lengths)
        ends = np.cumsum(batch.lengths, dtype=np.int32)
        query_starts = np.concatenate([[0], ends[batch.num_decodes :] - batch.num_decodes]).astype(np.int32)
        rotary_lengths = np.maximum(np.repeat(tables.prompt_lengths[batch.rows], batch.lengths), positions + 1)
        sampled_rows, sampled_lengths = batch.rows[batch.samples], context_lengths[batch.samples]
        (
            token_rows, device_positions, slots, device_rotary_lengths, rows, device_context_lengths,
            device_query_starts, last_tokens, device_sampled_rows, device_sampled_lengths,
        ) = upload(
            [
                np.repeat(batch.rows, batch.lengths), positions, batch.slots, rotary_lengths, batch.rows,
                context_lengths, query_starts, ends[batch.samples] - 1, sampled_rows, sampled_lengths,
            ],
            tables.device,
        )  # fmt: skip
        self.sampled = Sampled(sampled_rows, sampled_lengths, device_sampled_rows, device_sampled_lengths)
        tables.slots[token_rows, device_positions] = slots
        prefill_lengths = batch.lengths[batch.num_decodes :]
        self.step = StepInput(
            input_ids=tables.tokens[token_rows, device_positions],
            positions=device_positions,
            rotary_lengths=device_rotary_lengths,
            slots=slots,
            rows=rows,
            context_lengths=device_context_lengths,
            query_starts=device_query_starts,
            num_decodes=batch.num_decodes,
            max_query_length=int(prefill_lengths.max(initial=0)),
            max_context_length=int(context_lengths.max(initial=0)),
            last_tokens=last_tokens.long(),
            req_to_token=tables.slots,
            kv_layers=kv_layers,
        )


def upload(arrays: Sequence[NDArray[np.int32]], device: torch.device) -> list[Tensor]:
    """int32 arrays as tensors on the device, in one asynchronous copy."""
    packed = torch.from_numpy(np.concatenate(arrays).astype(np.int32, copy=False))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    return list(torch.split(packed, [len(array) for array in arrays]))


def _positions(starts: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """start, start + 1, … of each sequence, packed."""
    first_index = np.cumsum(lengths) - lengths
    count = int(lengths.sum())
    return np.arange(count, dtype=np.int32) + np.repeat((starts - first_index).astype(np.int32), lengths)
