# SPDX-License-Identifier: Apache-2.0
"""A worker: the process that holds a GPU, or a share of the CPU's cores. There is one for each tensor-parallel rank.

Rank 0 has the Router and runs THE loop (loop.py). The other ranks, the followers, run the batches that rank 0 sends
them (batch_channel.py); all ranks sample the same tokens.

The EngineSupervisor starts a worker as `python -m lightllm_backend.worker.main SOCKET RANK`. The settings come from the
environment, the state goes to standard output (see worker_group.py), the log to standard error.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes at once; a worker ends with its parent

import gc
import logging
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lightllm_backend import logs
from lightllm_backend.config import ConfigError, EngineConfig
from lightllm_backend.file_limit import raise_file_limit
from lightllm_backend.grammar.compiler import GrammarCompiler, ModelVocabulary
from lightllm_backend.kv_pool.layer_groups import ONE_GROUP, LayerGroups
from lightllm_backend.launch.embedded_model import embedded_model_directory
from lightllm_backend.messages.engine_load import EngineLoad
from lightllm_backend.messages.engine_messages import EngineInfo
from lightllm_backend.messages.run_directory import batches_address, rendezvous_file
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.router.admission import ExactAdmission
from lightllm_backend.router.past_future import PastFutureAdmission
from lightllm_backend.router.router import Router
from lightllm_backend.text.model_tokenizer import load_tokenizer
from lightllm_backend.worker.batch_channel import BatchReceiver, BatchSender
from lightllm_backend.worker.loop import follow, run
from lightllm_backend.worker.server import EngineServer
from lightllm_backend.worker.statistics_log import StatisticsLog
from lightllm_backend.worker.structured_output import StructuredOutput

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]

    from lightllm_backend.worker.host_group import BatchConnection
    from lightllm_backend.worker.load import LoadedEngine, Meet

# How long a worker whose supervisor is gone may take to end by itself: the loop ends after the step that runs.
ORPHAN_SECONDS = 5.0
# How long one turn of the loop may take before the worker counts as stuck. The longest step of a GPU takes
# seconds; on a CPU a step may take minutes. With the 10 s for which the guard looks on, a GPU's worker that is stuck is
# found within 30 s.
GPU_PATIENCE_SECONDS, CPU_PATIENCE_SECONDS = 20.0, 600.0

POISON_VARIABLE = "LIGHTLLM_POISON_FREED_SLOTS"  # "1": a debug mode, see CONTRIBUTING.md

log = logging.getLogger("lightllm.worker")


def build_router(
    config: EngineConfig,
    info: EngineInfo,
    batch_max_tokens: int,
    prefixes_are_alike: bool = True,
    recompute_at: int | None = None,
    groups: LayerGroups = ONE_GROUP,
) -> Router:
    """The Router of an engine with these settings."""
    return Router(
        capacity=info.pool_tokens * groups.count,
        max_running=config.running_max_req_size,
        batch_max_tokens=batch_max_tokens,
        max_queue_size=config.max_queue_size,
        eos_ids=frozenset(info.eos_ids),
        queue_timeout_s=config.queue_timeout_s,
        policy=PastFutureAdmission() if config.admission == "past_future" else ExactAdmission(),
        prefix_cache=config.prefix_cache if prefixes_are_alike else False,
        tenant_weights=dict(config.tenant_weights or ()),
        tenant_reserve=config.tenant_reserve,
        recompute_at=recompute_at,
        groups=groups,
    )


class Leader:
    """Rank 0: the Router, the EngineServer and the loop."""

    def __init__(self, config: EngineConfig, address: str, parent_pipe: int) -> None:
        self._config = config
        self._load = EngineLoad(Path(address).parent)
        self._load.publish(0, 0)  # the worker before this one may have died with a full queue
        # Opens the listener before _load() waits for the other ranks, so that they find it.
        self._followers = BatchSender(batches_address(address), len(config.host_ranks) - 1)
        compiler = GrammarCompiler(partial(_vocabulary, config))
        preparing = threading.Thread(target=compiler.prepare, name="grammar", daemon=True)
        preparing.start()  # the tokenizer is there before the weights are
        self._hosts: list[BatchConnection] = []
        self._engine = _load(config, 0, self._meet if config.nnodes > 1 else _meet_on_this_host(address))
        preparing.join()
        self._load.publish_pool(self._engine.info.pool_tokens, self._engine.longest)
        self._server = EngineServer(address, self._engine.info, parent_pipe)
        self._structured = StructuredOutput(compiler, self._server.wake)
        self._followers.accept()
        # Last: whoever reads the vitals takes it that requests are served.
        self._vitals = _vitals(address, 0, self._engine.info)

    def _meet(self, directory: str, device: torch.device) -> Store:
        from lightllm_backend.worker.host_group import Card, lead

        store, self._hosts = lead(self._config, Card.of(self._config, 0, directory, device), _leave_with_host)
        for host in self._hosts:
            self._followers.add(host.channel)
        return store

    def run(self) -> None:
        engine = self._engine
        router = build_router(
            self._config,
            engine.info,
            engine.batch_max_tokens,
            engine.prefixes_are_alike,
            engine.recompute_at,
            engine.groups,
        )
        if os.environ.get(POISON_VARIABLE) == "1":
            log.warning("debug mode: K and V of token slots that become free are overwritten with NaN")
            router.on_free(engine.storage.poison)
        try:
            statistics = StatisticsLog(self._config.log_stats_interval)
            run(
                self._server, router, self._followers, engine.runner, statistics, self._vitals, self._load,
                self._structured,
            )  # fmt: skip
        finally:
            self._load.publish(0, 0)
            self._structured.close()
            self._server.close()
            for host in self._hosts:
                host.unwatch()
            self._followers.close()
            self._vitals.close()


class Follower:
    """Any other rank: runs the batches of rank 0."""

    def __init__(self, config: EngineConfig, address: str, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._leader: BatchConnection | None = None  # if rank 0 is on another host
        self._engine = _load(config, rank, self._meet if config.nnodes > 1 else _meet_on_this_host(address))
        self._vitals = _vitals(address, rank, self._engine.info)
        leader = self._leader
        self._batches = BatchReceiver(leader.channel) if leader else BatchReceiver.connect(batches_address(address))

    def _meet(self, directory: str, device: torch.device) -> Store:
        from lightllm_backend.worker.host_group import Card, join

        card = Card.of(self._config, self._rank, directory, device)
        store, self._leader = join(self._config, card, _leave_with_host)
        return store

    def run(self) -> None:
        try:
            follow(self._batches, self._engine.runner)
        finally:
            self._vitals.close()


def _load(config: EngineConfig, rank: int, meet: Meet) -> LoadedEngine:
    # This imports torch, which takes seconds; a wrong setting has been reported before.
    from lightllm_backend.worker.load import load_engine

    return load_engine(config, rank, meet)


def _meet_on_this_host(address: str) -> Meet:
    return lambda directory, device: rendezvous_file(address)


def _leave_with_host(loss: str) -> None:
    """End this process: without all hosts there is no engine, and its supervisor starts another."""
    log.error("%s", loss)
    leave(1)


def _vocabulary(config: EngineConfig) -> ModelVocabulary:
    directory = config.model_dir or str(embedded_model_directory())
    shape = ModelConfig.from_directory(directory)
    eos_ids = shape.eos_ids if config.eos_id is None else config.eos_id
    return ModelVocabulary(load_tokenizer(directory, config), shape.vocab_size, eos_ids)


def _vitals(address: str, rank: int, info: EngineInfo) -> Vitals:
    patience = CPU_PATIENCE_SECONDS if info.device == "cpu" else GPU_PATIENCE_SECONDS
    return Vitals(Path(address).parent, f"worker-{rank}", patience)


def watch_parent(parent_pipe: int, seconds: float) -> None:
    """End this process soon after its supervisor, even if a collective waits for a rank that is gone."""
    os.read(parent_pipe, 1)  # returns at end-of-file: nothing is ever written
    time.sleep(seconds)
    os._exit(1)


def main() -> None:
    address, rank = sys.argv[1], int(sys.argv[2])
    status, parent_pipe = os.dup(sys.stdout.fileno()), os.dup(sys.stdin.fileno())
    raise_file_limit()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints belongs to the log
    logs.set_up(f"worker-{rank}")
    threading.excepthook = leave_with_thread
    try:
        config = EngineConfig.build({}, os.environ)
        # Nobody tells the ranks of another host to end after their step, and rank 0 learns from their end.
        seconds = ORPHAN_SECONDS if config.node_rank == 0 else 0.0
        threading.Thread(target=watch_parent, args=(parent_pipe, seconds), name="parent-pipe", daemon=True).start()
        worker = Leader(config, address, parent_pipe) if rank == 0 else Follower(config, address, rank)
    except Exception as error:
        known = isinstance(error, (ConfigError, ConnectionError, ModelError))
        log.error("cannot start: %s", error, exc_info=not known)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        os.write(status, f"error: {' '.join(message.split())}\n".encode(errors="backslashreplace"))
        leave(1)
    gc.collect()
    gc.freeze()  # the collector need not walk what was loaded, which stays, between steps
    os.write(status, b"ready\n")
    try:
        worker.run()
    except Exception:
        log.exception("the engine failed")
        leave(1)
    leave(0)


def leave_with_thread(failure: threading.ExceptHookArgs) -> None:
    """End this process: without one of its threads it is broken, and its supervisor starts another."""
    log.error("thread %s failed", failure.thread and failure.thread.name, exc_info=failure.exc_value)
    leave(1)


def leave(code: int) -> NoReturn:
    """Exit without torch's teardown, which waits for steps in flight, which may wait for other ranks."""
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
