# SPDX-License-Identifier: Apache-2.0
"""Feeds the parsers with random input: `python -m tests.fuzz [CASES] [--target NAME]`.

With `--server` it sends random requests to a real server with the embedded model, and to a front beside it, instead. It
prints cases, seconds and the smallest input of a finding for each target; the exit code is 1 if there is one. With
`--coverage-guided SECONDS` atheris (`pip install atheris`) chooses the input by the code that it reaches, until a
finding. Where schemathesis is installed (`pip install schemathesis==4.32.5`, for Python 3.11 and newer), the target
"front's document" has requests that it draws from the front's OpenAPI document.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import hypothesis
from hypothesis import HealthCheck, given, settings

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

MAX_LENGTH = 64  # of the server's requests, in tokens
START_SECONDS = 900.0  # nobody waits for it, and the machine may be busy
EXAMPLES_AT_ONCE = 2000  # hypothesis remembers all examples of a run


@contextlib.contextmanager
def server_targets() -> Iterator[dict[str, Target]]:
    """A real server and a front beside it, and the strategies of requests to them."""
    from tests.e2e.front import FrontProcess
    from tests.e2e.server import TritonServer
    from tests.fuzz import http_calls, requests
    from tests.fuzz.front import MAX_BODY_BYTES
    from tests.fuzz.front_server import ListeningFront
    from tests.fuzz.targets import Target

    # Without a limit a chat is answered with as many tokens as fit.
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        server = TritonServer(Path(folder, "log"), max_req_total_len=MAX_LENGTH)
        stack.callback(server.stop)
        settings = {"max_req_total_len": MAX_LENGTH, "max_body_bytes": MAX_BODY_BYTES}
        front = FrontProcess(server.wait_ready(START_SECONDS), Path(folder, "front log"), **settings)
        stack.callback(front.stop)
        yield {
            "server": Target(requests.calls, lambda call: requests.check(server, call)),
            "front": Target(http_calls.calls(), ListeningFront(front.wait_ready().port).check),
        }


def draw(target: Target, cases: int, seed: int | None) -> Exception | None:
    """Check so many inputs; return the error of the smallest that fails."""
    at_once = EXAMPLES_AT_ONCE * target.cases_each
    for done in range(0, cases, at_once):
        hypothesis.core.global_force_seed = None if seed is None else seed + done
        options = settings(
            max_examples=min(at_once, cases - done) // target.cases_each,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )
        try:
            options(given(target.inputs)(target.check))()
        except Exception as error:  # noqa: BLE001 (findings)
            return error
        print(f"{min(done + at_once, cases)} of {cases}", file=sys.stderr, flush=True)
    return None


def load_targets(with_coverage: bool) -> dict[str, Target]:
    """Import the parsers. with_coverage: so that atheris sees which of their lines an input reaches."""
    with contextlib.ExitStack() as stack:
        if with_coverage:
            import atheris

            stack.enter_context(atheris.instrument_imports(include=["lightllm_backend", "lightllm_client"]))
        from tests.fuzz.targets import TARGETS
    return TARGETS


def guide_by_coverage(target: Target, seconds: int) -> None:
    """Let atheris choose inputs. It ends the process."""
    import atheris

    def test(case: object) -> None:
        target.check(case)

    fuzz_one_input = given(target.inputs)(test).hypothesis.fuzz_one_input  # type: ignore[attr-defined]
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-timeout=60"], fuzz_one_input)
    atheris.Fuzz()


@click.command()
@click.argument("cases", type=int, default=1000)
@click.option("--target", metavar="NAME", help="one of them instead of all, which share the cases")
@click.option("--server", is_flag=True, help="a real server instead of the parsers")
@click.option("--coverage-guided", type=int, metavar="SECONDS", help="with atheris, for so long")
@click.option("--seed", type=int, default=None, help="the same inputs again")
def main(cases: int, target: str | None, server: bool, coverage_guided: int | None, seed: int | None) -> None:
    """Feed the parsers with random input."""
    findings = 0
    with contextlib.ExitStack() as stack:
        if server:
            targets = stack.enter_context(server_targets())
        else:
            targets = load_targets(with_coverage=coverage_guided is not None)
        if target and target not in targets:
            raise click.BadParameter(f"--target is {target}; allowed: {', '.join(targets)}")
        targets = {target: targets[target]} if target else targets
        for name, chosen in targets.items():
            started = time.monotonic()
            if coverage_guided:
                guide_by_coverage(chosen, coverage_guided)
            error = draw(chosen, cases // len(targets), seed)
            findings += error is not None
            result = "".join(traceback.format_exception(error)) if error else "nothing found"
            result = result.encode(errors="backslashreplace").decode()
            print(f"{name}: {cases // len(targets)} cases, {time.monotonic() - started:.1f} s: {result}", flush=True)
    sys.exit(int(findings > 0))


main()
