# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m client generate "…"` streams an answer to the terminal, `python -m client health`
asks for one token. Text goes to standard output, everything else to standard error; exit codes are 0, 1 (an error,
told in one line), 2 (wrong usage) and 130 (Ctrl-C, which cancels the request on the server)."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from client.chat import ChatTemplate, ChatTemplateError, default_model_dir
from client.errors import LightLLMError
from client.lightllm import LightLLMClient
from client.tensors import DATATYPES, LISTS, Chunk, Generation

OPTION_HELP: dict[str, str] = {
    "max_tokens": "Tokens to generate at most (server's default: 16).",
    "do_sample": "Draw tokens instead of taking the likeliest (default: yes if temperature, top-p or top-k is given).",
    "temperature": "Flattens (> 1) or sharpens (< 1) the distribution; 0 takes the likeliest token.",
    "top_p": "Draw from the likeliest tokens that together have this probability.",
    "top_k": "Draw from this many of the likeliest tokens; -1 is all.",
    "presence_penalty": "Taken from the logit of each token generated before.",
    "frequency_penalty": "Taken from the logit of a token for each time that it was generated.",
    "repetition_penalty": "Divides the likelihood of tokens of the prompt and the answer; 1 is off.",
    "seed": "The same seed gives the same draw.",
    "min_tokens": "Ignore end of sequence and stop words until this many tokens.",
    "ignore_eos": "Go on after the model's end of sequence.",
    "stop_words": "End before this text; may be given several times.",
    "stop_token_ids": "End with this token id, as with the model's end of sequence; may be given several times.",
    "exclude_input_in_output": "Leave the prompt out of the answer (default: yes).",
    "parse_special": "Take special tokens in the prompt as tokens, not as text (default: yes).",
    "skip_special_tokens": "Leave special tokens out of the answer (default: yes).",
    "return_log_probs": "Ask for log probabilities; --verbose shows them.",
}
CLICK_TYPES = {"INT32": click.INT, "UINT64": click.INT, "FP32": click.FLOAT, "BOOL": click.BOOL, "BYTES": click.STRING}

Command = TypeVar("Command", bound=Callable[..., None])


def sampling_options(command: Command) -> Command:
    """Give a command one option for each of the ensemble's."""
    for name, text in reversed(OPTION_HELP.items()):
        flag = f"--{name.replace('_', '-')}"
        if DATATYPES[name] == "BOOL":
            option = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
        else:
            option = click.option(flag, name, type=CLICK_TYPES[DATATYPES[name]], multiple=name in LISTS, help=text)
        command = option(command)
    return command


def connection_options(command: Command) -> Command:
    """Give a command the options that say which server and model to call, and how long."""
    for option in (
        click.option("--timeout", type=click.FLOAT, help="Seconds until the request is given up and cancelled."),
        click.option("--model", default="lightllm", show_default=True, help="The ensemble's name."),
        click.option("--url", default="127.0.0.1:8001", show_default=True, help="The server's gRPC address."),
    ):
        command = option(command)
    return command


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn errors and Ctrl-C into exit codes."""
    try:
        yield
    except (LightLLMError, ChatTemplateError) as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@click.group(help="Call a LightLLM ensemble on Triton server.")
def main() -> None:
    """The group of commands."""


@main.command()
@click.argument("prompt")
@connection_options
@click.option("--stream/--no-stream", default=True, help="Write the text as it is made (default), or once at the end.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template, as a user's message.")
@click.option("--system", help="The system's message in front of it; needs --chat.")
@click.option(
    "--model-dir",
    type=click.Path(path_type=Path),
    help="The model's directory, for its chat template (default: the embedded model's).",
)
@click.option("--verbose", is_flag=True, help="Write statistics to standard error.")
@sampling_options
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
    """Complete PROMPT ("-" reads it from standard input)."""
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat")
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    with exit_codes(), LightLLMClient(url, model, timeout) as client:
        text = read_standard_input() if prompt == "-" else prompt
        if chat:
            text = chat_prompt(text, system, model_dir or default_model_dir())
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


@main.command()
@connection_options
def health(url: str, model: str, timeout: float | None) -> None:
    """Ask the server whether it works."""
    with exit_codes(), LightLLMClient(url, model) as client:
        seconds = client.health(10.0 if timeout is None else timeout)
        click.echo(f"healthy: answered in {seconds:.3f} s")


def read_standard_input() -> str:
    """All of standard input, exactly as it is."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input is not UTF-8: {error}") from error


def chat_prompt(text: str, system: str | None, model_dir: Path) -> str:
    """The prompt for one user's message, after a system's message if there is one."""
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return ChatTemplate.load(model_dir).render(messages)


def write_text(pieces: Iterator[str] | list[str]) -> None:
    """Write each piece at once; what is left on the terminal, also after an error, ends with a line break."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals that know less than Unicode
    last = ""
    try:
        for piece in pieces:
            last = piece or last
            click.echo(piece, nl=False)
    finally:
        if last and not last.endswith("\n"):
            click.echo()


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
        click.echo(f"log probabilities: {pairs}; sum {generation.cumulative_logprob:.4f}", err=True)
    click.echo(
        f"{generation.num_input_tokens} tokens in, {generation.num_output_tokens} out in {seconds:.2f} s"
        f" ({generation.num_output_tokens / seconds:.1f} tokens/s, first text after {first:.2f} s),"
        f" finish reason: {generation.finish_reason}",
        err=True,
    )


if __name__ == "__main__":
    main(prog_name="python -m client")
