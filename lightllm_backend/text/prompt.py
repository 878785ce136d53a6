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


def check_prompt(
    parsed: ParsedRequest, tokenizer: Tokenizer, max_prompt_bytes: int, lengths: LengthLimits | None = None
) -> int:
    """Return how many bytes of text are to be encoded; raise INVALID_ARG for a prompt that cannot fit.

    lengths: the limits as far as they are known before the engine's are; the engine checks the number of tokens again.
    """
    if parsed.text is None:
        if lengths and len(parsed.token_ids or ()) > lengths.max_input:
            check_lengths(len(parsed.token_ids or ()), parsed.options.sampling.max_tokens, lengths)
        return 0
    text = parsed.text.encode()
    check_prompt_bytes(len(text), max_prompt_bytes)
    if lengths and tokenizer.token_bytes:
        fewest = tokenizer.token_bytes.fewest_tokens(text)
        if fewest > lengths.max_input:
            longest = tokenizer.token_bytes.longest
            raise RequestError(
                "INVALID_ARG",
                f"text_input has {len(text)} bytes, which are at least {fewest} tokens (one stands for at most "
                f"{longest} bytes); allowed: at most {lengths.max_input} prompt tokens ({lengths.max_input_source})",
            )
    return len(text)


def encode_prompt(parsed: ParsedRequest, tokenizer: Tokenizer) -> Prompt:
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
    return Prompt(token_ids, parsed.text if wanted else "")
