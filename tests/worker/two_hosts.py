# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one machine: network namespaces, joined by a cable that can be pulled out."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ADDRESSES = ("192.0.2.1", "192.0.2.2")  # reserved for documentation, so nobody's


class NoNamespaces(RuntimeError):
    """This user may not make namespaces, or a program is missing."""


class Host:
    """A network namespace, which a sleeping process keeps."""

    def __init__(self, number: int, keeper: subprocess.Popen[bytes]) -> None:
        self.address = ADDRESSES[number]
        self.interface = f"cable{number}"
        self.pid = keeper.pid
        self._keeper = keeper

    def inside(self, *command: str) -> list[str]:
        """The command, to be run on this host."""
        return ["nsenter", f"--target={self.pid}", "--user", "--net", "--preserve-credentials", "--", *command]

    def run(self, *command: str) -> None:
        done = subprocess.run(self.inside(*command), capture_output=True, text=True)
        if done.returncode:
            raise NoNamespaces(f"{' '.join(command)}: {done.stderr.strip()}")

    def python(self, path: Path) -> str:
        """Write a script that is this interpreter on this host; return its path."""
        path.write_text(f'#!/bin/sh\nexec {" ".join(self.inside(sys.executable))} "$@"\n', encoding="utf-8")
        path.chmod(0o755)
        return str(path)

    def plug(self, is_in: bool) -> None:
        """Put the cable in, or pull it out."""
        self.run("ip", "link", "set", self.interface, "up" if is_in else "down")

    def close(self) -> None:
        self._keeper.kill()
        self._keeper.wait()


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Both hosts; they vanish at the end. Raises NoNamespaces where there can be none."""
    with contextlib.ExitStack() as stack:
        first = Host(0, _keeper(stack, ["unshare", "--user", "--map-root-user", "--net"]))
        second = Host(1, _keeper(stack, [*first.inside("unshare", "--net")]))
        first.run(
            "ip", "link", "add", first.interface, "type", "veth", "peer", second.interface, "netns", str(second.pid)
        )
        for host in (first, second):
            host.run("ip", "address", "add", f"{host.address}/24", "dev", host.interface)
            host.run("ip", "link", "set", "lo", "up")
            host.plug(is_in=True)
        yield first, second


def _keeper(stack: contextlib.ExitStack, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a process that sleeps in the namespaces which the command makes, and wait until it does."""
    try:
        keeper = subprocess.Popen(
            [*command, "sh", "-c", "echo inside; exec sleep 600"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except FileNotFoundError as error:
        raise NoNamespaces(str(error)) from None
    stack.callback(keeper.wait)
    stack.callback(keeper.kill)
    assert keeper.stdout is not None
    assert keeper.stderr is not None
    if keeper.stdout.readline() != b"inside\n":
        raise NoNamespaces(keeper.stderr.read().decode().strip())
    return keeper
