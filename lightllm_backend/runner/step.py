# SPDX-License-Identifier: Apache-2.0
"""One step of the model, from the tables and a StepArrays alone: launched as it is, or captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lightllm_backend.kernels.attention.whole_prompt_tiles import WholePromptTiles
from lightllm_backend.kernels.interface import Kernels
from lightllm_backend.models.layers import CausalLM, KVLayer, StepInput
from lightllm_backend.router.batch import Batch
from lightllm_backend.runner.device_batch import Bucket, RequestTables, StepArrays, fill
from lightllm_backend.runner.prompt_tiling import tile_whole_prompts
from lightllm_backend.runner.staging import Staging


class StepOutput(NamedTuple):
    """Of n sequences, those that sample first. Whoever needs the logits may change them."""

    logits: Tensor  # [n, vocab]
    tokens: Tensor  # [n] int32, the greedy choice, which is in the table of tokens already
    places: Tensor  # [n] int64, where in the flattened table


class Step:
    """Writes the slots of new tokens into their table, runs the model, and writes the greedy choice into the other."""

    def __init__(
        self, model: CausalLM, kernels: Kernels, tables: RequestTables, kv_layers: Sequence[KVLayer],
        staging: Staging,
    ) -> None:  # fmt: skip
        self._model = model
        self._kernels = kernels
        self._tables = tables
        self._kv_layers = kv_layers
        self._staging = staging

    def upload(self, batch: Batch, bucket: Bucket, target: Tensor | None = None) -> Tensor:
        """The bytes of the batch's StepArrays on the device, in one asynchronous copy."""
        layout = bucket.layout()
        buffer = self._staging.buffer(layout.num_bytes)
        fill(StepArrays(*buffer.arrays(layout)), batch, bucket, self._tables)
        return buffer.send(layout.num_bytes, target)

    def run(self, batch: Batch, bucket: Bucket | None = None) -> StepOutput:
        """Launch it kernel by kernel; with a bucket, padded to that."""
        if bucket is not None:
            return self.launch(self.upload(batch, bucket), bucket)
        bucket = Bucket.of(batch)
        return self.launch(self.upload(batch, bucket), bucket, tile_whole_prompts(batch, self._staging))

    def launch(self, inputs: Tensor, bucket: Bucket, prompts: WholePromptTiles | None = None) -> StepOutput:
        """From what `upload` returns. Reads nothing back; is the same for all batches of a bucket but for `prompts`."""
        arrays = StepArrays(*bucket.layout().tensors(inputs))
        tables = self._tables
        all_tokens = tables.tokens.view(-1)
        tables.slots.view(-1).index_copy_(0, arrays.token_places, arrays.slots)
        step = StepInput(
            input_ids=all_tokens.index_select(0, arrays.token_places),
            positions=arrays.positions,
            rotary_lengths=arrays.rotary_lengths,
            slots=arrays.slots,
            rows=arrays.rows,
            context_lengths=arrays.context_lengths,
            query_starts=arrays.query_starts,
            num_decodes=bucket.decodes,
            # Use the table's width, not the batch's maximum, so that the choice of kernels is stable.
            max_context_length=tables.tokens.shape[1],
            # Each sequence that decodes samples.
            last_tokens=arrays.last_tokens if bucket.prefills else None,
            req_to_token=tables.slots,
            kv_layers=self._kv_layers,
            whole_prompts=prompts,
        )
        logits = self._model.forward(step)
        tokens = self._kernels.choose_greedily(logits, arrays.sampled_places, all_tokens)
        return StepOutput(logits, tokens, arrays.sampled_places)
