# SPDX-License-Identifier: Apache-2.0
"""Front: what all handlers share, made once in each process of the front."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Request

from lightllm_backend.config import EngineConfig
from lightllm_backend.front.caller import CallingClient
from lightllm_backend.front.engine_load import EngineLoad
from lightllm_backend.front.generation_defaults import read_generation_defaults
from lightllm_backend.front.token_texts import TokenTexts
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.text.model_tokenizer import known_lengths, load_tokenizer
from lightllm_backend.text.tokenizer import LONG_TEXT, Tokenizer
from lightllm_client import AsyncLightLLMClient
from lightllm_client.chat import ChatTemplate, ChatTemplateError


@dataclass(frozen=True)
class Front:
    """What handlers share. They get it by `front_of(request)`."""

    config: EngineConfig
    model_name: str  # in OpenAI's API
    client: AsyncLightLLMClient  # of the ensemble
    tokenizer: Tokenizer
    lengths: LengthLimits  # by the settings and config.json; the engine may allow less
    chat_template: ChatTemplate | None
    no_chat_template: str = ""  # why there is none
    defaults: Mapping[str, Any] = field(default_factory=dict)  # options of requests that do not name them
    token_texts: TokenTexts = field(init=False)
    engine_load: EngineLoad = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_texts", TokenTexts(self.tokenizer))
        address = self.config.local_address(self.config.metrics_port)
        object.__setattr__(self, "engine_load", EngineLoad(address))

    @classmethod
    def load(cls, config: EngineConfig) -> Front:
        """Load what belongs to the model's directory; raise ModelError or TokenizerError if it cannot be served."""
        assert config.model_dir is not None, "the launch command names the directory of the embedded model, too"
        directory = Path(config.model_dir)
        template, reason = None, ""
        try:
            template = ChatTemplate.load(directory)
        except ChatTemplateError as error:
            reason = str(error)
        return cls(
            config=config,
            model_name=config.served_model_name or directory.resolve().name,
            client=CallingClient(config.local_address(config.grpc_port)),
            tokenizer=load_tokenizer(directory, config),
            lengths=known_lengths(directory, config),
            chat_template=template,
            no_chat_template=reason,
            defaults=read_generation_defaults(directory) if config.generation_config == "auto" else {},
        )

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text; raise TokenizerError if it has none. A long one takes another thread its time."""
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)


def front_of(request: Request) -> Front:
    """The front that a request has come to."""
    front: Front = request.app.state.front
    return front


def tenant_of(request: Request) -> str:
    """The tenant of a request's API key; empty if no key is asked for."""
    tenant: str = request.scope["state"].get("tenant", "")
    return tenant
