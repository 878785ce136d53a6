# SPDX-License-Identifier: Apache-2.0
"""The command `lightllm`: `lightllm generate "…"` streams an answer to the terminal, `lightllm health` asks the server
whether it works.

Text goes to standard output, everything else to standard error. The exit code is 0, 1 (an error, told in one line), 2
(wrong usage) or 130 (Ctrl-C, which cancels the request on the server).
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightllm_client import __version__
from lightllm_client.endpoint import HEALTH_SECONDS, Endpoint
from lightllm_client.errors import LightLLMError
from lightllm_client.options import DATATYPES, HELP, LISTS
from lightllm_client.sync_client import LightLLMClient
from lightllm_client.tensors import Chunk, Generation

_PARSERS = {"INT32": int, "UINT64": int, "FP32": float, "BYTES": str}


class UsageError(Exception):
    """The command line asks for something impossible."""


class ChatError(Exception):
    """The prompt cannot be put into the model's chat template."""


def argument_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; its results are the arguments of `generate` and `health`."""
    parser = argparse.ArgumentParser(
        prog="lightllm", description="Call a LightLLM ensemble on Triton server.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    text = "Complete a prompt."
    command = commands.add_parser("generate", help=text, description=text, allow_abbrev=False)
    command.set_defaults(command=generate)
    command.add_argument("prompt", metavar="PROMPT", help='The prompt; "-" reads it from standard input.')
    add_connection_options(command)
    command.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Write the text as it is made, or once at the end.",
    )
    command.add_argument(
        "--chat", action="store_true", help="Put the prompt into the model's chat template, as a user's message."
    )
    command.add_argument("--system", help="The system's message in front of it; needs --chat.")
    command.add_argument(
        "--model-dir", type=Path, help="The model's directory, for its chat template (default: the embedded model's)."
    )
    command.add_argument(
        "--verbose",
        action="store_true",
        help="Write statistics, and log probabilities if asked for, to standard error.",
    )
    add_request_options(command)

    text = "Ask the server whether it works."
    command = commands.add_parser("health", help=text, description=text, allow_abbrev=False)
    command.set_defaults(command=health)
    add_connection_options(command)
    return parser


def add_connection_options(command: argparse.ArgumentParser) -> None:
    """Give a command the options that say which server and model to call, and how long to wait."""
    command.add_argument(
        "--url", default=Endpoint.url, help="The server's gRPC address (default: %(default)s).", metavar="HOST:PORT"
    )
    command.add_argument("--model", default=Endpoint.model, help="The ensemble's name (default: %(default)s).")
    command.add_argument(
        "--timeout", type=float, help="Seconds until the request is given up and cancelled.", metavar="SECONDS"
    )


def add_request_options(command: argparse.ArgumentParser) -> None:
    """Give a command one option for each of a request's; those that are not given are None."""
    group = command.add_argument_group("options of the request")
    for name, text in HELP.items():
        flag = f"--{name.replace('_', '-')}"
        if DATATYPES[name] == "BOOL":
            group.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=text)
        else:
            action = "append" if name in LISTS else "store"
            group.add_argument(flag, dest=name, action=action, type=_PARSERS[DATATYPES[name]], help=text)


def generate(
    prompt: str,
    url: str,
    model: str,
    timeout: float | None,
    stream: bool,
    chat: bool,
    system: str | None,
    model_dir: Path | None,
    verbose: bool,
    **options: Any,
) -> None:
    """Complete a prompt."""
    if system is not None and not chat:
        raise UsageError("--system needs --chat")
    given = {name: value for name, value in options.items() if value is not None}
    text = read_standard_input() if prompt == "-" else prompt
    if chat:
        text = chat_prompt(text, system, model_dir)
    with LightLLMClient(url, model, timeout) as client:
        started = time.monotonic()
        if stream:
            with client.stream(text, **given) as chunks:
                generation, first = write_chunks(chunks)
        else:
            generation = client.generate(text, **given)
            write_text([generation.text])
            first = time.monotonic()
        if verbose:
            write_statistics(generation, first - started, time.monotonic() - started)


def health(url: str, model: str, timeout: float | None) -> None:
    """Ask the server whether it works."""
    with LightLLMClient(url, model) as client:
        seconds = client.health(HEALTH_SECONDS if timeout is None else timeout)
    print(f"healthy: answered in {seconds:.3f} s")


def read_standard_input() -> str:
    """All of standard input, exactly as it is."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8: {error}") from error


def chat_prompt(text: str, system: str | None, model_dir: Path | None) -> str:
    """The prompt for one user's message, after a system's message if there is one."""
    try:
        from lightllm_client.chat import ChatTemplate, ChatTemplateError, default_model_dir
    except ModuleNotFoundError as error:
        raise ChatError(f"--chat needs {error.name}: pip install 'lightllm-client[chat]'") from None
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return ChatTemplate.load(model_dir or default_model_dir()).render(messages)
    except ChatTemplateError as error:
        raise ChatError(str(error)) from None


def write_text(pieces: Iterator[str] | list[str]) -> None:
    """Write each piece at once; what is left on the terminal, also after an error, ends with a line break."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals that know less than Unicode
    last = ""
    try:
        for piece in pieces:
            last = piece or last
            print(piece, end="", flush=True)
    finally:
        if last and not last.endswith("\n"):
            print(flush=True)


def write_chunks(chunks: Iterator[Chunk]) -> tuple[Generation, float]:
    """Write the chunks' text as they come; the whole, and when the first one came."""
    received: list[Chunk] = []
    times: list[float] = []

    def pieces() -> Iterator[str]:
        for chunk in chunks:
            times.append(time.monotonic())
            received.append(chunk)
            yield chunk.text

    write_text(pieces())
    return Generation.join(received), times[0]


def write_statistics(generation: Generation, first: float, seconds: float) -> None:
    """Write what the answer cost."""
    if generation.log_probs:
        pairs = " ".join(
            f"{token}:{log_prob:.4f}"
            for token, log_prob in zip(generation.token_ids, generation.log_probs, strict=True)
        )
        print(f"log probabilities: {pairs}; sum {generation.cumulative_logprob:.4f}", file=sys.stderr)
    for token_id, likeliest in zip(generation.token_ids, generation.top_log_probs, strict=False):
        pairs = " ".join(f"{other}:{log_prob:.4f}" for other, log_prob in likeliest.items())
        print(f"likeliest in place of {token_id}: {pairs}", file=sys.stderr)
    print(
        f"{generation.num_input_tokens} tokens in, {generation.num_output_tokens} out in {seconds:.2f} s"
        f" ({generation.num_output_tokens / seconds:.1f} tokens/s, first text after {first:.2f} s),"
        f" finish reason: {generation.finish_reason}",
        file=sys.stderr,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own by default; the exit code."""
    parser = argument_parser()
    parsed = vars(parser.parse_args(arguments))
    command = parsed.pop("command")
    try:
        command(**parsed)
    except UsageError as error:
        parser.error(str(error))
    except (LightLLMError, ChatError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read standard output has gone; Python flushes it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
