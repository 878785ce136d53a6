# SPDX-License-Identifier: Apache-2.0
"""Chat templates: messages to the prompt that a model was trained on, as transformers' `apply_chat_template` does it.

The template and its special tokens come from the model's directory, in the layout of Hugging Face. Templates are
foreign code, hence the sandbox. This is the only part of the library that needs jinja2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplateError(ValueError):
    """The model's directory has no usable chat template, or the template refuses the messages."""


def default_model_dir() -> Path:
    """Where the model that the server embeds is kept."""
    cache = os.environ.get("LIGHTLLM_CACHE") or "~/.cache/lightllm"
    return Path(cache).expanduser() / "SmolLM2-135M-Instruct"


class ChatTemplate:
    """A model's chat template with the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], tokenizer_adds_bos: bool = False) -> None:
        self._template = _compile(source)
        self._special_tokens = dict(special_tokens)
        self._tokenizer_adds_bos = tokenizer_adds_bos

    @classmethod
    def load(cls, model_dir: str | Path) -> ChatTemplate:
        """The template of a model's directory: chat_template.jinja, else `chat_template` in tokenizer_config.json."""
        directory = Path(model_dir)
        if not directory.is_dir():
            raise ChatTemplateError(f"the model directory {directory} does not exist")
        config = _read_json(directory / "tokenizer_config.json")
        tokens = {name: _token_text(config.get(name)) for name in SPECIAL_TOKENS}
        special_tokens = {name: text for name, text in tokens.items() if text is not None}
        source = _template_source(directory, config)
        return cls(source, special_tokens, _adds_bos(directory, config, special_tokens.get("bos_token")))

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt for messages, each with `role` and `content`, ready to be sent as `text_input`.

        The server tokenizes a prompt like any text, so where the tokenizer puts a beginning-of-sequence token in front
        by itself, the template's own is left out.
        """
        try:
            prompt = self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except (TemplateError, TypeError) as error:
            raise ChatTemplateError(f"the chat template failed: {error}") from error
        return prompt.removeprefix(self._special_tokens.get("bos_token", "")) if self._tokenizer_adds_bos else prompt


def _read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ChatTemplateError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ChatTemplateError(f"{path} is not a JSON object")
    return content


def _token_text(token: object) -> str | None:
    """A special token's spelling: the configuration has it plain or in an object of its properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _template_source(directory: Path, config: Mapping[str, Any]) -> str:
    try:
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        template = config.get("chat_template")
    except (OSError, ValueError) as error:
        raise ChatTemplateError(f"{directory / 'chat_template.jinja'} cannot be read: {error}") from error
    if isinstance(template, list):  # several templates by name, as models with a separate one for tools have
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ChatTemplateError(
            f"{directory} has no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json)"
        )
    return template


def _adds_bos(directory: Path, config: Mapping[str, Any], bos_token: str | None) -> bool:
    if bos_token is None:
        return False
    tokenizer = _read_json(directory / "tokenizer.json")
    if tokenizer:
        return json.dumps(bos_token) in json.dumps(tokenizer.get("post_processor"))
    return bool(config.get("add_bos_token", (directory / "tokenizer.model").exists()))


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)


def _to_json(value: object, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is; jinja2's own filter escapes HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here its content stands for itself."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> Template:
    """The template in an environment like that of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ChatTemplateError(f"the chat template is not valid: {error}") from error
