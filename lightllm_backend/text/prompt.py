# SPDX-License-Identifier: Apache-2.0
"""Turns the text or token ids of a request into the prompt that the engine computes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lightllm_backend.options import ParsedRequest, check_prompt_bytes
from lightllm_backend.request import RequestError
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.text.tokenizer_settings import TokenizerError


@dataclass(frozen=True)
class Prompt:
    """The token ids for the engine, and the text that the client wants repeated."""

    token_ids: list[int]
    echo: str  # the output begins with this text; empty if the request excludes its input


def encode_prompt(parsed: ParsedRequest, tokenizer: Tokenizer, max_prompt_bytes: int) -> Prompt:
    """Encode the prompt; raise INVALID_ARG for a text that is too long or has a token that the model lacks.

    The engine checks the number of tokens.
    """
    wanted = not parsed.options.exclude_input_in_output
    if parsed.text is None:
        token_ids = list(parsed.token_ids or ())
        return Prompt(
            token_ids, tokenizer.decode_prompt(token_ids, parsed.options.skip_special_tokens) if wanted else ""
        )
    check_prompt_bytes(len(parsed.text.encode()), max_prompt_bytes)
    try:
        token_ids = tokenizer.encode(parsed.text, parse_special=parsed.options.parse_special)
    except TokenizerError as error:
        raise RequestError("INVALID_ARG", f"text_input: {error}") from error
    return Prompt(token_ids, parsed.text if wanted else "")
