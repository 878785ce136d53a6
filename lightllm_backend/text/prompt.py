# SPDX-License-Identifier: Apache-2.0
"""Turns the text or token ids of a request into the prompt that the engine computes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lightllm_backend.lengths import LengthLimits
from lightllm_backend.options import ParsedRequest, check_lengths, check_prompt_bytes
from lightllm_backend.request import RequestError
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.text.tokenizer_settings import TokenizerError


@dataclass(frozen=True)
class Prompt:
    """The token ids for the engine, and the text that the client wants repeated."""

    token_ids: list[int]
    echo: str  # the output begins with this text; empty if the request excludes its input


def check_prompt(parsed: ParsedRequest, tokenizer: Tokenizer, max_prompt_bytes: int, lengths: LengthLimits) -> int:
    """Return how many bytes of text are to be encoded; raise INVALID_ARG for a prompt that cannot fit.

    lengths: those that are known without the engine, which may allow less.
    """
    if parsed.text is None:
        _check_count(len(parsed.token_ids or ()), parsed, lengths)
        return 0
    text = parsed.text.encode()
    check_prompt_bytes(len(text), max_prompt_bytes)
    known = tokenizer.token_bytes
    fewest = known.fewest_tokens(text) if known else 0
    if known and fewest > lengths.max_input:
        raise RequestError(
            "INVALID_ARG",
            f"text_input has {len(text)} bytes, which are at least {fewest} tokens (one stands for at most "
            f"{known.longest} bytes); allowed: at most {lengths.max_input} prompt tokens ({lengths.max_input_source})",
        )
    return len(text)


def encode_prompt(parsed: ParsedRequest, tokenizer: Tokenizer, lengths: LengthLimits) -> Prompt:
    """Encode a prompt that `check_prompt` has passed; raise INVALID_ARG for a token that the model lacks."""
    wanted = not parsed.options.exclude_input_in_output
    if parsed.text is None:
        token_ids = list(parsed.token_ids or ())
        return Prompt(
            token_ids, tokenizer.decode_prompt(token_ids, parsed.options.skip_special_tokens) if wanted else ""
        )
    try:
        token_ids = tokenizer.encode(parsed.text, parse_special=parsed.options.parse_special)
    except TokenizerError as error:
        raise RequestError("INVALID_ARG", f"text_input: {error}") from error
    _check_count(len(token_ids), parsed, lengths)
    return Prompt(token_ids, parsed.text if wanted else "")


def _check_count(num_tokens: int, parsed: ParsedRequest, lengths: LengthLimits) -> None:
    """Refuse too many tokens here already, since they are much to send on; the engine checks the other limits."""
    if num_tokens > lengths.max_input:
        check_lengths(num_tokens, parsed.options.sampling.max_tokens, lengths)
