# SPDX-License-Identifier: Apache-2.0
"""Server-sent events of OpenAI's API: what is the same in all events of a stream is formatted once."""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii
from typing import Any

from lightllm_backend.front.openai.generate import Job, Usage
from lightllm_backend.front.openai.schema import SamplingFields

# ASCII, since some clients end a line of an event at U+2028 or U+0085, too.
text_json = encode_basestring_ascii


class Events:
    """Formats the events of one stream."""

    def __init__(self, job: Job, object_name: str, body: SamplingFields, usage: Usage) -> None:
        head = {"id": job.id, "object": object_name, "created": job.created, "model": job.front.model_name}
        options = body.stream_options
        self._usage = usage
        self._asks_usage = bool(options and options.include_usage)
        self._continuous = self._asks_usage and bool(options and options.continuous_usage_stats)
        self._begin = f'data: {json.dumps(head)[:-1]}, "choices": ['
        # With include_usage every event has the field; only the last one says something.
        self._end = '], "usage": null}\n\n' if self._asks_usage else "]}\n\n"

    def event(self, choice: str) -> str:
        """Format one event; `choice` is the JSON of its one choice."""
        if self._continuous:
            return f'{self._begin}{choice}], "usage": {json.dumps(self._usage.as_json())}}}\n\n'
        return f"{self._begin}{choice}{self._end}"

    def last(self) -> bytes:
        """Format the end of the stream, with the usage if it was asked for."""
        usage = ""
        if self._asks_usage:
            usage = f'{self._begin}], "usage": {json.dumps(self._usage.as_json())}}}\n\n'
        return (usage + "data: [DONE]\n\n").encode()


def choice_json(index: int, content: str, finish_reason: str, logprobs: dict[str, Any] | None) -> str:
    """Format a choice; `content` is its own field: `"text": "…"` or `"delta": {…}`."""
    reason = f'"{finish_reason}"' if finish_reason else "null"
    shown = "null" if logprobs is None else json.dumps(logprobs)
    return f'{{"index": {index}, {content}, "logprobs": {shown}, "finish_reason": {reason}}}'
