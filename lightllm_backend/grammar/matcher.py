# SPDX-License-Identifier: Apache-2.0
"""Matcher: how far the text of one request has come in its grammar, and which tokens may come next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import copy
from functools import lru_cache

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from lightllm_backend.request import RequestError, SamplingParams

_ALL_ALLOWED = -1
# What llguidance says of a token that its mask has not allowed. Its other errors are limits that a text has reached.
_NO_FIT = "doesn't satisfy the grammar"
# What it says when it has made a mask: the text is not complete, and no token may come next. The mask has EOS alone,
# which the matcher then takes as the end (findings/dead_end_takes_eos.sh).
_DEAD_END = "NoExtensionBias"
# Fewer masks are made, and tokens taken, quicker by one thread.
_PARALLEL_FROM = 8
# The longest of a step's 64 masks takes as long as ten others (schemas of perf.structured_steps), so more threads gain
# nothing.
_MAX_THREADS = 16


@lru_cache
def _executor() -> LLExecutor:
    """Threads of llguidance's own, which leave a core to the loop and one to the server."""
    return LLExecutor(max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0)) - 2)))


def is_dead_end(inner: LLMatcher) -> bool:
    """Whether the newest mask has shown that the text can neither go on nor end."""
    return _DEAD_END in inner.get_error()


class Matcher:
    """Follows the sampled tokens of a request.

    The text may end where the grammar allows it: with the model's EOS, unless ignored, or with one of the request's
    stop_token_ids. min_tokens forbids these; if the grammar allows nothing else, the end wins.
    """

    def __init__(self, inner: LLMatcher, sampling: SamplingParams, eos_ids: Sequence[int]) -> None:
        self.inner = inner
        self._num_tokens = 0
        self._min_tokens = sampling.min_tokens
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._eos_bits = _bits(eos_ids)
        self._stop_bits = _bits(sampling.stop_token_ids)
        self._ignores_eos = sampling.ignore_eos
        self._changes_ends = bool(sampling.ignore_eos or sampling.stop_token_ids or sampling.min_tokens)

    def copy(self) -> Matcher:
        """Return a matcher that has come as far and goes on by itself."""
        other = copy(self)
        other.inner = self.inner.deep_copy()
        return other

    @staticmethod
    def accept_all(matchers: Sequence[Matcher], token_ids: Sequence[int]) -> list[bool | RequestError]:
        """Give each of these matchers its next token; return whether its text is complete, so that nothing may follow.

        A RequestError in the place of that: the grammar allows nothing that could complete the text, or has become too
        complex for llguidance's limits. llguidance releases the interpreter's lock while several take theirs.
        """
        pairs = list(zip(matchers, token_ids, strict=True))
        ended = [matcher.is_ended_by(token_id) for matcher, token_id in pairs]
        consuming = [pair for pair, has_ended in zip(pairs, ended, strict=True) if not has_ended]
        if len(consuming) < _PARALLEL_FROM:
            taken = iter([matcher.inner.consume_token(token_id) for matcher, token_id in consuming])
        else:
            taken = iter(_executor().consume_token_par([(matcher.inner, token_id) for matcher, token_id in consuming]))
        return [
            has_ended or matcher.outcome(token_id, next(taken))
            for (matcher, token_id), has_ended in zip(pairs, ended, strict=True)
        ]

    def is_ended_by(self, token_id: int) -> bool:
        """Count the token; return whether it is a stop id that the text cannot go on with."""
        self._num_tokens += 1
        if token_id not in self._stop_ids or self.inner.is_error():  # an error since the mask was made
            return False
        return not self.inner.validate_tokens([token_id])

    def outcome(self, token_id: int, is_taken: bool) -> bool | RequestError:
        """Return what `accept_all` says of a token that llguidance has taken or not."""
        if is_taken and not self.inner.is_error():  # after an error, it takes EOS
            return self.inner.is_stopped()
        if is_dead_end(self.inner):
            return RequestError(
                "INVALID_ARG", "structured_output allows nothing after this text, which is not complete"
            )
        reason = self.inner.get_error().splitlines()[0]
        if _NO_FIT in reason:
            return RequestError("INTERNAL", f"token {token_id} does not follow structured_output: {reason}")
        return RequestError("INVALID_ARG", f"structured_output has become too complex: {reason}")

    def change_ends(self, mask: NDArray[np.int32]) -> None:
        """Allow and forbid in the mask [words] of the next token what the request's options say about the end."""
        if not self._changes_ends:
            return
        may_end = any(mask[word] & bit for word, bit in self._eos_bits)
        is_too_short = self._num_tokens < self._min_tokens
        if not may_end and not (is_too_short and self._stop_bits):
            return  # as in most places of a text
        grammars_own = mask.copy()
        if self._ignores_eos or is_too_short:
            _clear(mask, self._eos_bits)
        if is_too_short:
            _clear(mask, self._stop_bits)
        elif may_end:
            for word, bit in self._stop_bits:
                mask[word] |= bit
        if not mask.any():
            mask[:] = grammars_own


class MaskMaker:
    """Makes the masks of a step. llguidance releases the interpreter's lock meanwhile."""

    def fill(self, matchers: Sequence[Matcher | None], masks: NDArray[np.int32]) -> None:
        """Write the mask of each matcher's next token into `masks` [matchers, words]; None allows all tokens."""
        size = masks.shape[1] * masks.itemsize
        live = [(matcher, index) for index, matcher in enumerate(matchers) if matcher is not None]
        if len(live) < len(matchers):
            masks[[index for index, matcher in enumerate(matchers) if matcher is None]] = _ALL_ALLOWED
        if len(live) < _PARALLEL_FROM:
            for matcher, index in live:
                matcher.inner.unsafe_compute_mask_ptr(masks[index].ctypes.data, size)
        else:
            places = [(matcher.inner, index) for matcher, index in live]
            _executor().unsafe_compute_mask_ptr(places, masks.ctypes.data, size, len(masks))
        for matcher, index in live:
            matcher.change_ends(masks[index])


def _bits(token_ids: Sequence[int]) -> list[tuple[int, np.int32]]:
    """The word of each token in a mask, and its bit."""
    return [(token_id // 32, np.uint32(1 << token_id % 32).view(np.int32)) for token_id in token_ids]


def _clear(mask: NDArray[np.int32], bits: list[tuple[int, np.int32]]) -> None:
    for word, bit in bits:
        mask[word] &= ~bit
