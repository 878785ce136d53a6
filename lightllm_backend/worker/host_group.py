# SPDX-License-Identifier: Apache-2.0
"""How the ranks of an engine on several hosts meet, check that they fit together, and notice that a host is lost.

They meet in a store of torch.distributed (TCPStore), which rank 0 opens at `master_addr`:`master_port` in each of its
starts. Every other rank leaves its card there: who it is, and what must be the same on all hosts. Rank 0 waits for all
cards, for as long as it takes, and answers with a verdict: the list of members, or how the hosts differ.

The ranks of other hosts then connect to rank 0 for its batches. Both ends watch that connection from then on. It ends
with either process, and the kernel ends it when the network carries nothing for LOST_SECONDS; then the rank ends, even
if it waits in a collective operation, and its supervisor starts it again, to meet anew.

What crosses the network is JSON, msgpack, and what torch's store, gloo and NCCL send. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from lightllm_backend.config import ConfigError, EngineConfig
from lightllm_backend.messages.channel import Channel

# The settings that every rank reads; the others are rank 0's or the server's alone.
SHARED_SETTINGS = (
    "tp", "nnodes", "load_format", "dtype", "weight_dtype", "head_dtype", "kv_dtype", "eos_id", "prefix_cache",
    "max_total_token_num", "batch_max_tokens", "running_max_req_size", "max_req_input_len", "max_req_total_len",
)  # fmt: skip

LOST_SECONDS = 10.0  # without a sign of life of the other end's kernel
POLL_SECONDS = 0.1  # from one look into the store to the next
RETRY_SECONDS = 1.0  # from one attempt to join to the next
TELL_SECONDS = 10.0  # from one line about what is waited for to the next
# For all members to read the verdict, and to connect: what takes longer has ended meanwhile.
VERDICT_SECONDS, CONNECT_SECONDS = 5.0, 30.0
STORE_SECONDS = 30.0  # for one answer of the store
_ID_BYTES = 32

log = logging.getLogger("lightllm.hosts")


@dataclass(frozen=True)
class Card:
    """What a rank says of itself. `id` is random: it tells this process from another start of the same rank."""

    rank: int
    node_rank: int
    host: str
    directory: str
    facts: dict[str, str]  # what must be the same everywhere
    id: str

    @classmethod
    def of(cls, config: EngineConfig, rank: int, directory: str, device: torch.device) -> Card:
        """The card of this process, which serves the model in `directory`."""
        facts = {
            "lightllm_backend": _version(),
            "torch": torch.__version__,
            "device": _kind(device),
            "model": _fingerprint(Path(directory)),
            **{name: str(getattr(config, name)) for name in SHARED_SETTINGS},
        }
        return cls(rank, config.node_rank, socket.gethostname(), directory, facts, secrets.token_hex(_ID_BYTES // 2))

    @property
    def name(self) -> str:
        return f"host {self.node_rank} ({self.host}, {self.directory})"


class BatchConnection:
    """A connection between rank 0 and a rank of another host, watched from construction to `unwatch`."""

    def __init__(self, connected: socket.socket, peer: str, on_lost: Callable[[str], None]) -> None:
        """Call `on_lost`, on another thread, with the loss in words once the other end is gone."""
        _notice_losses(connected)
        self.channel = Channel(connected)
        self._is_watched = True
        arguments = connected, peer, on_lost
        threading.Thread(target=self._watch, args=arguments, name="host-watch", daemon=True).start()

    def unwatch(self) -> None:
        """Before this end closes the channel."""
        self._is_watched = False

    def _watch(self, connected: socket.socket, peer: str, on_lost: Callable[[str], None]) -> None:
        events = select.poll()
        events.register(connected, select.POLLRDHUP)  # errors come unasked
        events.poll()
        if self._is_watched:
            error = connected.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            on_lost(f"{peer} is lost: {os.strerror(error) if error else 'its process has ended'}")


def lead(config: EngineConfig, card: Card, on_lost: Callable[[str], None]) -> tuple[Store, list[BatchConnection]]:
    """Rank 0: wait for all other ranks; return their store, and the connections to those of other hosts.

    Raises ConfigError, here and in all other ranks, if the hosts differ.
    """
    listener = _listener(config)
    address = listener.getsockname()
    use_interface_of(address[0])
    store = TCPStore(
        address[0],
        address[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        timeout=timedelta(seconds=STORE_SECONDS),
    )
    cards = _wait_for_cards(store, config)
    differences = _differences(card, cards)
    with contextlib.closing(socket.create_server((address[0], 0), family=_family(address[0]))) as batches:
        verdict = {"error": differences, "members": [one.id for one in cards], "batches": batches.getsockname()[1]}
        store.set("verdict", json.dumps(verdict))
        if differences:
            _wait_until_read(store, cards)
            raise ConfigError(differences)
        return store, _accept(batches, [one for one in cards if one.node_rank > 0], on_lost)


def join(config: EngineConfig, card: Card, on_lost: Callable[[str], None]) -> tuple[Store, BatchConnection | None]:
    """Any other rank: wait for rank 0; return its store, and the connection to it if it is on another host.

    Raises ConfigError if the hosts differ.
    """
    told = Patience(card.rank == config.host_ranks[0])
    while True:
        try:
            address = _wait_for_master(config, told)
            use_interface_of(address)
            store = TCPStore(
                str(config.master_addr),
                config.master_port,
                wait_for_workers=False,
                timeout=timedelta(seconds=STORE_SECONDS),
            )
            store.set(_key(card.rank), json.dumps(asdict(card)))
            verdict = _wait_for_verdict(store, told)
            store.set(f"read by {card.id}", "")
            if card.id in verdict["members"] and verdict["error"]:
                raise ConfigError(verdict["error"])
            if card.id in verdict["members"]:
                return store, _connect(config, card, verdict["batches"], on_lost)
            told.tell(
                f"rank 0 has begun without this rank {card.rank} of {card.name}; waiting for its next start"
                f" (is node_rank {card.node_rank} given to two hosts?)"
            )
        except (torch.distributed.DistError, OSError) as error:
            reason = str(error).partition("\n")[0]
            told.tell(f"rank 0 has gone before all hosts had joined it; waiting for its next start ({reason})")
        time.sleep(RETRY_SECONDS)


class Patience:
    """Tells what is waited for, every TELL_SECONDS at most, if it is this process that tells."""

    def __init__(self, tells: bool) -> None:
        self._tells = tells
        self._told_at = -TELL_SECONDS

    def tell(self, what: str) -> None:
        now = time.monotonic()
        if self._tells and now - self._told_at >= TELL_SECONDS:
            self._told_at = now
            log.info("%s", what)


def use_interface_of(address: str) -> None:
    """Let gloo and NCCL use the network interface with this address of ours, unless the environment names another."""
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # else it takes a prefix


def _listener(config: EngineConfig) -> socket.socket:
    """Listen at `master_addr` alone. Raises ConfigError if that is no address of this host, or the port is taken."""
    try:
        family, address = _resolved(config)
        return socket.create_server(address, family=family, backlog=config.tp)
    except OSError as error:
        raise ConfigError(
            f"rank 0 cannot listen at {config.master_addr} port {config.master_port}: {error.strerror}; allowed as"
            " master_addr and master_port: an address of host 0, and a free port"
        ) from None


def _resolved(config: EngineConfig) -> tuple[socket.AddressFamily, tuple[str, int]]:
    family, _, _, _, address = socket.getaddrinfo(config.master_addr, config.master_port, type=socket.SOCK_STREAM)[0]
    return family, (str(address[0]), config.master_port)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _wait_for_cards(store: Store, config: EngineConfig) -> list[Card]:
    told = Patience(tells=True)
    ranks = range(1, config.tp)
    while missing := [rank for rank in ranks if not store.check([_key(rank)])]:
        per_host = len(config.host_ranks)
        hosts = sorted({rank // per_host for rank in missing})
        told.tell(f"waiting at {config.master_addr} port {config.master_port} for host {', '.join(map(str, hosts))}")
        time.sleep(POLL_SECONDS)
    return [Card(**json.loads(store.get(_key(rank)))) for rank in ranks]


def _wait_until_read(store: Store, cards: Sequence[Card]) -> None:
    ends = time.monotonic() + VERDICT_SECONDS
    while time.monotonic() < ends and not store.check([f"read by {card.id}" for card in cards]):
        time.sleep(POLL_SECONDS)


def _differences(mine: Card, others: Sequence[Card]) -> str:
    """How the hosts differ from this one, in words; empty: they do not."""
    found = {
        f"{key} is {mine.facts[key]} on {mine.name} and {other.facts.get(key)} on {other.name}": None
        for other in others
        for key in mine.facts
        if other.facts.get(key) != mine.facts[key]
    }
    return "; ".join(found)


def _accept(listener: socket.socket, expected: Sequence[Card], on_lost: Callable[[str], None]) -> list[BatchConnection]:
    """Wait for these ranks to connect. Each begins with its id; whoever else connects is turned away."""
    waiting = {card.id: card for card in expected}
    connections = []
    ends = time.monotonic() + CONNECT_SECONDS
    while waiting:
        listener.settimeout(max(0.001, ends - time.monotonic()))
        try:
            connected, _ = listener.accept()
        except TimeoutError:
            names = ", ".join(f"rank {card.rank} of {card.name}" for card in waiting.values())
            raise ConnectionError(f"{names} has not connected within {CONNECT_SECONDS:g} s") from None
        connected.settimeout(VERDICT_SECONDS)
        card = waiting.pop(_received(connected, _ID_BYTES), None)
        if card is None:
            connected.close()
            continue
        connected.settimeout(None)
        connections.append(BatchConnection(connected, card.name, on_lost))
    return connections


def _received(connected: socket.socket, count: int) -> str:
    """The first `count` bytes that come, or fewer from somebody who sends no more."""
    received = b""
    with contextlib.suppress(OSError):
        while len(received) < count and (part := connected.recv(count - len(received))):
            received += part
    return received.decode(errors="replace")


def _wait_for_verdict(store: Store, told: Patience) -> Any:
    """Wait for as long as rank 0 answers; a loss of the network without a word ends `wait`, unlike `check`, in time."""
    while True:
        try:
            store.wait(["verdict"], timedelta(seconds=TELL_SECONDS))
            return json.loads(store.get("verdict"))
        except torch.distributed.DistStoreError:  # not yet
            told.tell("waiting for the other hosts")


def _connect(config: EngineConfig, card: Card, port: int, on_lost: Callable[[str], None]) -> BatchConnection | None:
    if config.node_rank == 0:
        return None
    connected = socket.create_connection((str(config.master_addr), port), timeout=VERDICT_SECONDS)
    connected.sendall(card.id.encode())
    connected.settimeout(None)
    return BatchConnection(connected, "host 0", on_lost)


def _wait_for_master(config: EngineConfig, told: Patience) -> str:
    """Wait until somebody listens at `master_addr`; return our own address on the way there."""
    while True:
        try:
            with socket.create_connection(
                (str(config.master_addr), config.master_port), timeout=VERDICT_SECONDS
            ) as probe:
                address: str = probe.getsockname()[0]
                return address
        except OSError as error:  # host 0 is not up, or has no name yet
            told.tell(f"waiting for host 0 at {config.master_addr} port {config.master_port} ({error})")
            time.sleep(RETRY_SECONDS)


def _notice_losses(connected: socket.socket) -> None:
    """Let the kernel end the connection once it has heard nothing from the other end for LOST_SECONDS."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probe_seconds = max(1, int(LOST_SECONDS / 5))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_seconds)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_seconds)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(LOST_SECONDS * 1e3))


def _key(rank: int) -> str:
    return f"card of rank {rank}"


def _kind(device: torch.device) -> str:
    """The device as far as it decides what is computed: GPUs of one architecture have the same kernels."""
    if device.type != "cuda":
        return device.type
    return "GPU of compute capability {}.{}".format(*torch.cuda.get_device_capability(device))


def _version() -> str:
    """This package's version, and a digest of its source, which may change without the version."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    try:
        version = importlib.metadata.version("lightllm-backend")
    except importlib.metadata.PackageNotFoundError:  # found by PYTHONPATH alone
        version = "a version that is not installed"
    return f"{version} (source {digest.hexdigest()[:12]})"


def _fingerprint(directory: Path) -> str:
    """What tells models apart without reading their weights."""
    config = hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()[:12]
    sizes = [path.stat().st_size for pattern in ("*.safetensors", "*.bin") for path in directory.glob(pattern)]
    return f"config.json {config} with {len(sizes)} weight files of {sum(sizes)} bytes"
