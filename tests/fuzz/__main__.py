# SPDX-License-Identifier: Apache-2.0
"""Feeds the parsers with random input: `python -m tests.fuzz [CASES] [--target NAME]`.

With `--server` it sends random requests to a real server with a small random model, and to a front beside it, instead.
It prints seconds, cases and the (smallest) input of a finding for each target; the exit code is 1 if there is one. With
`--coverage-guided SECONDS` atheris chooses the inputs by the code that they reach (see coverage_guided.py). The targets
"front's document" have requests that schemathesis draws from the front's OpenAPI document.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.coverage_guided import guide

if TYPE_CHECKING:
    from tests.fuzz.target import Target

START_SECONDS = 900.0  # nobody waits for it, and the machine may be busy
EXAMPLES_AT_ONCE = 500  # hypothesis remembers all examples of a run


@contextlib.contextmanager
def server_targets(has_front: bool) -> Iterator[dict[str, Target]]:
    """A real server, a front beside it if asked for, and the strategies of requests to them."""
    from tests.e2e.server import TritonServer
    from tests.fuzz import requests
    from tests.fuzz.served import CALLS_AT_ONCE, ServerUnderFuzz, write_model
    from tests.fuzz.target import Target

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        settings = write_model(Path(folder, "model"))
        server = TritonServer(Path(folder, "log"), **settings)
        stack.callback(server.stop)
        under_fuzz = ServerUnderFuzz(server.wait_ready(START_SECONDS))
        several = st.lists(requests.calls, min_size=CALLS_AT_ONCE, max_size=CALLS_AT_ONCE)
        targets = {"server": Target(several, under_fuzz.check, CALLS_AT_ONCE)}
        if has_front:
            from tests.e2e.front import FrontProcess
            from tests.fuzz import http_calls
            from tests.fuzz.front import MAX_BODY_BYTES
            from tests.fuzz.front_server import ListeningFront

            front = FrontProcess(server, Path(folder, "front log"), **settings, max_body_bytes=MAX_BODY_BYTES)
            stack.callback(front.stop)
            listening = ListeningFront(front.wait_ready().port)
            by_document = http_calls.schema_calls(listening.document)
            for name, calls in {"front": http_calls.calls(), "front's document": by_document}.items():
                several = st.lists(calls, min_size=CALLS_AT_ONCE, max_size=CALLS_AT_ONCE)
                targets[name] = Target(several, listening.check_all, CALLS_AT_ONCE)
            stack.callback(lambda: print(f"  statuses of the front: {dict(sorted(listening.statuses.items()))}"))
        yield targets
        print(under_fuzz.close())


def draw(
    target: Target, cases: int, seed: int | None, until: float, phases: Sequence[Phase]
) -> tuple[int, Exception | None]:
    """Check so many inputs, or fewer if the time is over; return how many, and the error of the smallest that fails."""
    at_once = EXAMPLES_AT_ONCE * target.cases_each
    done = 0
    while done < cases and time.monotonic() < until:
        hypothesis.core.global_force_seed = None if seed is None else seed + done
        examples = -(-min(at_once, cases - done) // target.cases_each)
        options = settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )
        try:
            options(given(target.inputs)(target.check))()
        except Exception as error:  # noqa: BLE001 (findings)
            return done, error
        done += examples * target.cases_each
        print(f"{done} of {cases}", file=sys.stderr, flush=True)
    return done, None


def fed(target: Target, cases: int, seconds: float, seed: int | None, shrinks: bool) -> tuple[str, bool]:
    """Feed a target with random cases; return the figures, and whether something was found."""
    phases = (Phase.generate, Phase.shrink) if shrinks else (Phase.generate,)
    done, error = draw(target, cases, seed, time.monotonic() + seconds, phases)
    if error is None:
        return f"{done:,} cases, nothing found", False
    return "".join(traceback.format_exception(error)), True


@click.command()
@click.argument("cases", type=int, default=1000)
@click.option("--target", metavar="NAME", help="one of them instead of all, which share the cases")
@click.option("--server", is_flag=True, help="a real server instead of the parsers")
@click.option("--coverage-guided", type=int, metavar="SECONDS", help="with atheris, for so long for each target")
@click.option("--keep", is_flag=True, help="keep what atheris has found to reach more, for the tests")
@click.option("--seconds", type=float, default=float("inf"), help="the most for each target")
@click.option("--seed", type=int, default=None, help="the same inputs again")
def main(
    cases: int,
    target: str | None,
    server: bool,
    coverage_guided: int | None,
    keep: bool,
    seconds: float,
    seed: int | None,
) -> None:
    """Feed the parsers with random input."""
    findings = 0
    with contextlib.ExitStack() as stack:
        if server:
            targets = stack.enter_context(server_targets(has_front=target != "server"))
        else:
            from tests.fuzz.targets import TARGETS

            targets = TARGETS
        if target and target not in targets:
            raise click.BadParameter(f"--target is {target}; allowed: {', '.join(targets)}")
        targets = {target: targets[target]} if target else targets
        for name, chosen in targets.items():
            started = time.monotonic()
            if coverage_guided:
                result, is_finding = guide(name, coverage_guided, keep)
            else:
                result, is_finding = fed(chosen, cases // len(targets), seconds, seed, shrinks=not server)
            findings += is_finding
            result = result.encode(errors="backslashreplace").decode()
            print(f"{name}: {time.monotonic() - started:.1f} s: {result}", flush=True)
    sys.exit(int(findings > 0))


main()
