# SPDX-License-Identifier: Apache-2.0
"""Feeds the parsers with random input: `python -m tests.fuzz [CASES] [--target NAME]`.

With `--server` it sends random requests to a real server with the embedded model instead. It prints cases, seconds and
the smallest input of a finding for each target; the exit code is 1 if there is one. With `--coverage-guided SECONDS`
atheris (`pip install atheris`) chooses the input by the code that it reaches, until a finding.
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


@contextlib.contextmanager
def server_target() -> Iterator[Target]:
    """A real server, and the strategy of requests to it."""
    from tests.e2e.server import TritonServer
    from tests.fuzz import requests
    from tests.fuzz.targets import Target

    with tempfile.TemporaryDirectory() as folder:
        server = TritonServer(Path(folder, "log")).wait_ready()
        try:
            yield Target(requests.calls, lambda call: requests.check(server, call))
        finally:
            server.stop()


def draw(target: Target, cases: int) -> Exception | None:
    """Check so many inputs; return the error of the smallest that fails."""
    options = settings(
        max_examples=cases, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
    )
    try:
        options(given(target.inputs)(target.check))()
    except Exception as error:  # noqa: BLE001 (findings)
        return error
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
@click.option("--target", metavar="NAME", help="one parser instead of all, which share the cases")
@click.option("--server", is_flag=True, help="a real server instead of the parsers")
@click.option("--coverage-guided", type=int, metavar="SECONDS", help="with atheris, for so long")
@click.option("--seed", type=int, default=None, help="the same inputs again")
def main(cases: int, target: str | None, server: bool, coverage_guided: int | None, seed: int | None) -> None:
    """Feed the parsers with random input."""
    if seed is not None:
        hypothesis.core.global_force_seed = seed
    targets = load_targets(with_coverage=coverage_guided is not None)
    if target and target not in targets:
        raise click.BadParameter(f"--target is {target}; allowed: {', '.join(targets)}")
    targets = {target: targets[target]} if target else targets
    findings = 0
    with contextlib.ExitStack() as stack:
        if server:
            targets = {"server": stack.enter_context(server_target())}
        for name, chosen in targets.items():
            started = time.monotonic()
            if coverage_guided:
                guide_by_coverage(chosen, coverage_guided)
            error = draw(chosen, cases // len(targets))
            findings += error is not None
            result = "".join(traceback.format_exception(error)) if error else "nothing found"
            result = result.encode(errors="backslashreplace").decode()
            print(f"{name}: {cases // len(targets)} cases, {time.monotonic() - started:.1f} s: {result}", flush=True)
    sys.exit(int(findings > 0))


main()
