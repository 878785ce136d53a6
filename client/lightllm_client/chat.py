# SPDX-License-Identifier: Apache-2.0
"""Chat templates: messages to the prompt that a model was trained on, as transformers' `apply_chat_template` does it.

The templates and their special tokens come from the model's directory, in the layout of Hugging Face. Templates are
foreign code, hence the sandbox (template_sandbox.py). Only these two modules need jinja2:
`pip install "lightllm-client[chat]"`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from lightllm_client.template_sandbox import LimitedEnvironment

# The names of a message's reasoning; templates read the first, those of gpt-oss the second.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_END_OF_FINAL_MESSAGE = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplateError(ValueError):
    """The model's directory has no usable chat template, or the template refuses the messages."""


def default_model_dir() -> Path:
    """The directory of the server's embedded model, on the same machine and with the same LIGHTLLM_CACHE."""
    cache = os.environ.get("LIGHTLLM_CACHE") or "~/.cache/lightllm"
    return Path(cache).expanduser() / "SmolLM2-135M-Instruct"


class ChatTemplate:
    """A model's chat templates by name, and the special tokens that they may use; a single one is named `default`."""

    def __init__(
        self, sources: str | Mapping[str, str], special_tokens: Mapping[str, str], tokenizer_adds_bos: bool = False
    ) -> None:
        self._sources = {"default": sources} if isinstance(sources, str) else dict(sources)
        self._environment = _environment()
        self._templates = {name: _compile(self._environment, source) for name, source in self._sources.items()}
        self._special_tokens = dict(special_tokens)
        self._tokenizer_adds_bos = tokenizer_adds_bos

    @classmethod
    def load(cls, model_dir: str | Path) -> ChatTemplate:
        """The templates of a model's directory.

        They are in chat_template.jinja and additional_chat_templates/, else under `chat_template` in
        tokenizer_config.json, else (older processors) in chat_template.json.
        """
        directory = Path(model_dir)
        if not directory.is_dir():
            raise ChatTemplateError(f"the model directory {directory} does not exist")
        config = _read_json(directory / "tokenizer_config.json")
        special_tokens = _special_tokens(directory, config)
        adds_bos = _adds_bos(directory, config, special_tokens.get("bos_token"))
        return cls(_template_sources(directory, config), special_tokens, adds_bos)

    @property
    def sources(self) -> Mapping[str, str]:
        """The text of each template, by its name."""
        return self._sources

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for messages, each with `role` and `content`, ready to be sent as `text_input`.

        add_generation_prompt: end with the head of the model's answer; by default unless the final message goes on.
        tools: as JSON schemas. continue_final_message: end inside of the final message, or of its field of that name.
        chat_template: the name of one of several; by default `tool_use` for tools, if there is one, else `default`.
        variables: others that the template knows, as `enable_thinking`.

        The server tokenizes a prompt like any text, so where the tokenizer puts a beginning-of-sequence token in front
        by itself, the template's own is left out.
        """
        if add_generation_prompt and continue_final_message:
            raise ChatTemplateError("add_generation_prompt and continue_final_message exclude each other")
        for name, objects in (("tools", tools), ("documents", documents)):
            if not all(isinstance(item, Mapping) for item in objects or ()):
                raise ChatTemplateError(f"{name} must be a list of JSON objects")
        name = self._choose(chat_template, tools)
        field = "content" if continue_final_message is True else continue_final_message or None
        chat = [_with_reasoning(_plain(_without_none(message))) for message in messages]
        final_text = None if field is None else _mark_end(chat, field, self._sources[name])
        values = {
            **self._special_tokens,
            **_plain(variables),
            "messages": chat,
            "tools": None if tools is None else _plain(list(tools)),
            "documents": None if documents is None else _plain(list(documents)),
            "add_generation_prompt": field is None if add_generation_prompt is None else add_generation_prompt,
        }
        try:
            prompt = self._environment.render(self._templates[name], values)
        except Exception as error:
            raise ChatTemplateError(f"the chat template failed: {error}") from error
        if final_text is not None:
            prompt = _cut_at_end(prompt, final_text)
        return prompt.removeprefix(self._special_tokens.get("bos_token", "")) if self._tokenizer_adds_bos else prompt

    def _choose(self, name: str | None, tools: Sequence[Mapping[str, Any]] | None) -> str:
        if name is None:
            name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ChatTemplateError(f"there is no chat template {name!r}; there are: {', '.join(self._templates)}")
        return name


def _without_none(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without null values; OpenAI's clients send null for missing fields, and many templates fail at it."""
    return {key: value for key, value in message.items() if value is not None}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    for field in _REASONING_FIELDS:
        if message.get(field) is not None:
            return {"thinking": message[field], **message, "reasoning_content": message[field]}
    return message


def _plain(value: Any) -> Any:
    """A copy in JSON's types; a value of any other type becomes the name of its type."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # an enumeration's, as the value and not by its name
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return f"<{type(value).__name__}>"


def _mark_end(chat: list[dict[str, Any]], field: str, source: str) -> str:
    """Append a tag to the final message's text, or to the last text among its parts; returns that text."""
    content = chat[-1].get(field) if chat else None
    if content is None:
        raise ChatTemplateError(f"continue_final_message is set, but there is no final message with {field!r}")
    fields = [field]
    if field in _REASONING_FIELDS:
        fields = [other for other in _REASONING_FIELDS if chat[-1].get(other) == content]
    if not any(other in source for other in fields):
        raise ChatTemplateError(f"continue_final_message is {field!r}, which the chat template does not know")
    if isinstance(content, str):
        for other in fields:
            chat[-1][other] = content + _END_OF_FINAL_MESSAGE
        return content
    parts = content if isinstance(content, (list, tuple)) else ()
    part = next((one for one in reversed(parts) if isinstance(one, dict) and isinstance(one.get("text"), str)), None)
    if part is None:
        raise ChatTemplateError("continue_final_message is set, but the final message has no text")
    text: str = part["text"]
    part["text"] = text + _END_OF_FINAL_MESSAGE
    return text


def _cut_at_end(prompt: str, final_text: str) -> str:
    text, tag, after = prompt.rpartition(_END_OF_FINAL_MESSAGE.strip())
    if not tag or final_text.strip() not in prompt:
        raise ChatTemplateError("continue_final_message is set, but the chat template leaves the final message out")
    # A template that trims messages has trimmed the tag instead of what stands before it.
    return text if after.startswith(" ") else text.rstrip()


def _read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ChatTemplateError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ChatTemplateError(f"{path} is not a JSON object")
    return content


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The text of each named special token: bos_token and the like, and the model's own."""
    values = dict(config)
    if "added_tokens_decoder" not in config:  # as in transformers, the older file counts then
        values |= _read_json(directory / "special_tokens_map.json")
    named = {name: value for name, value in values.items() if name.endswith("_token")}
    if isinstance(extra := values.get("extra_special_tokens"), Mapping):
        named |= extra
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in tokens.items() if isinstance(text, str)}


def _template_sources(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    files = {path.stem: path for path in sorted(directory.glob("additional_chat_templates/*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    if files:
        return {name: _read_text(path) for name, path in files.items()}
    templates = config.get("chat_template") or _read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(templates, list):  # of models with a separate one for tools
        entries = [entry for entry in templates if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
        templates = {entry["name"]: entry.get("template") for entry in entries}
    elif isinstance(templates, str):
        templates = {"default": templates}
    named = templates.items() if isinstance(templates, dict) else ()
    texts = {name: text for name, text in named if isinstance(name, str) and isinstance(text, str)}
    if not texts:
        raise ChatTemplateError(
            f"{directory} has no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json)"
        )
    return texts


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ChatTemplateError(f"{path} cannot be read: {error}") from error


def _adds_bos(directory: Path, config: Mapping[str, Any], bos_token: str | None) -> bool:
    if bos_token is None:
        return False
    tokenizer = _read_json(directory / "tokenizer.json")
    if tokenizer:
        return json.dumps(bos_token) in json.dumps(tokenizer.get("post_processor"))
    return bool(config.get("add_bos_token", (directory / "tokenizer.model").exists()))


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)  # noqa: DTZ005 (without a time zone, as transformers has it)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here it renders as its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own, as in transformers: what is set inside ends with it.
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    @staticmethod
    def _content(caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> LimitedEnvironment:
    """An environment like that of transformers."""
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _compile(environment: LimitedEnvironment, source: str) -> Template:
    try:
        return environment.from_string(source)
    except (TemplateError, SyntaxError, RecursionError) as error:  # a `break` outside of a loop is Python's error
        raise ChatTemplateError(f"the chat template is not valid: {error}") from error
