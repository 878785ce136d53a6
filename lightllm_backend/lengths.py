# SPDX-License-Identifier: Apache-2.0
"""LengthLimits: the maximum lengths of a prompt and a sequence, and the source of each. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lightllm_backend.config import EngineConfig

THE_MODEL = "the model's limit"


@dataclass(frozen=True)
class LengthLimits:
    """The maximum number of prompt tokens and of all tokens of a request, each with its source for error messages."""

    max_input: int
    max_input_source: str
    max_total: int
    max_total_source: str

    @classmethod
    def of(
        cls, config: EngineConfig, model_limit: int, pool_tokens: int | None = None, longest: int | None = None
    ) -> LengthLimits:
        """Take the least of the model's limit, the settings and, once its size is known, the KV pool.

        longest: the tokens that the pool can hold of one sequence, if not `pool_tokens`.
        """
        limits = [(model_limit, THE_MODEL)]
        if config.max_req_total_len is not None:
            limits.insert(0, (config.max_req_total_len, "max_req_total_len"))
        max_total, total_source = min(limits, key=lambda limit: limit[0])  # the first among equal limits
        max_input, input_source = max_total - 1, total_source
        if config.max_req_input_len is not None and config.max_req_input_len <= max_input:
            max_input, input_source = config.max_req_input_len, "max_req_input_len"
        without_pool = cls(max_input, input_source, max_total, total_source)
        return without_pool.within_pool(pool_tokens, longest or pool_tokens) if pool_tokens else without_pool

    def within_pool(self, pool_tokens: int, longest: int) -> LengthLimits:
        """These limits, lowered to what a KV pool holds: `longest` tokens of one sequence."""
        # The model never reads the last token, so it needs no slot.
        max_total, source = longest + 1, f"the KV pool of {pool_tokens} tokens"
        if max_total >= self.max_total:
            return self
        if self.max_input < max_total:
            return replace(self, max_total=max_total, max_total_source=source)
        return LengthLimits(max_total - 1, source, max_total, source)

    def warnings(self, config: EngineConfig) -> Iterator[str]:
        """Yield a sentence for each setting above the limit."""
        for name, asked, limit, source in (
            ("max_req_total_len", config.max_req_total_len, self.max_total, self.max_total_source),
            ("max_req_input_len", config.max_req_input_len, self.max_input, self.max_input_source),
        ):
            if asked is not None and asked > limit:
                yield f"{name} is {asked}; {limit} is used, by {source}"

    def __str__(self) -> str:
        return (
            f"at most {self.max_input:,} prompt tokens ({self.max_input_source}),"
            f" {self.max_total:,} in all ({self.max_total_source})"
        )
