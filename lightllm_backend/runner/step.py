# SPDX-License-Identifier: Apache-2.0
"""Step: one step of the model. It reads the tables and StepArrays alone, so that CUDA graphs can capture it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lightllm_backend.kernels.attention.whole_prompt_tiles import WholePromptTiles
from lightllm_backend.kernels.interface import Kernels
from lightllm_backend.models.causal_lm import CausalLM
from lightllm_backend.models.layers import GroupInput, KVLayer, StepInput
from lightllm_backend.router.batch import Batch
from lightllm_backend.runner.device_tables import DeviceTables
from lightllm_backend.runner.prompt_scores import DeviceScores, ScoredTokens, score
from lightllm_backend.runner.prompt_tiling import tile_whole_prompts
from lightllm_backend.runner.staging import Staging
from lightllm_backend.runner.step_arrays import Bucket, StepArrays, fill


class ForwardOutput(NamedTuple):
    """The output for n sequences, sampling ones first. The logits may be modified in place."""

    logits: Tensor  # [n, vocab]
    token_ids: Tensor  # [n] int32, the greedy choices, already written to the table; -1: logits that are not numbers
    indices: Tensor  # [n] int64, indices of the choices in the flattened table
    scores: DeviceScores | None = None  # of the batch's scored chunks


class Step:
    """Writes the slots of the new tokens to the tables, runs the model, and writes the greedy choices to the tables."""

    def __init__(
        self,
        model: CausalLM,
        kernels: Kernels,
        tables: DeviceTables,
        kv_layers: Sequence[KVLayer],
        staging: Staging,
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._tables = tables
        self._kv_layers = kv_layers
        self._staging = staging

    def upload(self, batch: Batch, bucket: Bucket, target: Tensor | None = None) -> Tensor:
        """Copy the batch's StepArrays to the device, as bytes, in one asynchronous copy."""
        layout = bucket.layout(self._tables.num_groups)
        buffer = self._staging.buffer(layout.num_bytes)
        fill(StepArrays(*buffer.arrays(layout)), batch, bucket, self._tables)
        return buffer.send(layout.num_bytes, target)

    def run(self, batch: Batch, bucket: Bucket | None = None) -> ForwardOutput:
        """Launch a batch kernel by kernel, padded to `bucket` if given."""
        if bucket is not None:
            return self.launch(self.upload(batch, bucket), bucket)
        bucket = Bucket.of(batch)
        scored = ScoredTokens.of(batch, self._tables, self._staging) if batch.scored else None
        return self.launch(self.upload(batch, bucket), bucket, tile_whole_prompts(batch, self._staging), scored)

    def launch(
        self,
        inputs: Tensor,
        bucket: Bucket,
        prompts: WholePromptTiles | None = None,
        scored: ScoredTokens | None = None,
    ) -> ForwardOutput:
        """Launch the kernels of a step on uploaded `inputs`.

        It reads nothing back from the device, and launches the same for all batches of a bucket, except for `prompts`
        and `scored`.
        """
        tables = self._tables
        arrays = StepArrays(*bucket.layout(tables.num_groups).tensors(inputs))
        all_token_ids = tables.token_ids.view(-1)
        slots = arrays.slots.view(tables.num_groups, -1)[:, : bucket.tokens]
        tables.slots.view(tables.num_groups, -1).index_copy_(1, arrays.token_indices, slots)
        step = StepInput(
            input_ids=all_token_ids.index_select(0, arrays.token_indices),
            positions=arrays.positions,
            rotary_lengths=arrays.rotary_lengths,
            rows=arrays.rows,
            context_lengths=arrays.context_lengths,
            query_starts=arrays.query_starts,
            num_decodes=bucket.decodes,
            # The table's width, not the batch's maximum, so that the choice of kernels is stable.
            max_context_length=tables.token_ids.shape[1],
            # Without prefills, the step samples after every token.
            last_tokens=arrays.last_tokens if bucket.prefills else None,
            groups=[GroupInput(*group) for group in zip(slots.unbind(), tables.slots.unbind(), strict=True)],
            kv_layers=self._kv_layers,
            whole_prompts=prompts,
        )
        scores = None
        if scored is None:
            logits = self._model.forward(step)
        else:
            hidden_states = self._model.hidden_states(step)
            scores = score(scored, lambda tokens: self._model.logits(hidden_states, tokens), all_token_ids)
            logits = self._model.logits(hidden_states, step.last_tokens)
        token_ids = self._kernels.choose_greedily(logits, arrays.sampled_indices, all_token_ids)
        return ForwardOutput(logits, token_ids, arrays.sampled_indices, scores)
