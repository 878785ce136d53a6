# SPDX-License-Identifier: Apache-2.0
"""A process of the front: `python -m lightllm_backend.front.main [FD]`, settings from the environment.

FD: the descriptor of a socket that listens; without it, the process listens at `host` and `openai_port` itself. The
launch command starts `front_processes` of these, each with its socket and with a pipe as standard input, whose end
tells that the launch command has died. SIGTERM ends the process once it has answered what it has begun.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import sys
from collections.abc import Mapping

import uvicorn
import uvloop
from fastapi import FastAPI

from lightllm_backend import logs
from lightllm_backend.config import ConfigError, EngineConfig
from lightllm_backend.file_limit import raise_file_limit
from lightllm_backend.front.application import make_application
from lightllm_backend.front.security import read_api_keys
from lightllm_backend.front.state import Front
from lightllm_backend.models.errors import ModelError
from lightllm_backend.text.tokenizer_settings import TokenizerError

USAGE_ERROR = 2
KEEP_ALIVE_SECONDS = 75  # longer than the 60 s of common proxies, which must not find a connection closed


def make_server(environment: Mapping[str, str]) -> uvicorn.Server:
    """Make the server that these settings ask for; raise an error of one line for what cannot be served."""
    config = EngineConfig.build({}, environment)
    return server_of(make_application(Front.load(config), read_api_keys(config, environment)), config)


def server_of(application: FastAPI, config: EngineConfig) -> uvicorn.Server:
    """Make the server of an application."""
    return uvicorn.Server(
        uvicorn.Config(
            application,
            host=config.host,
            port=config.openai_port or 0,
            http="httptools",
            ws="none",
            lifespan="on",
            access_log=False,
            log_level="warning",
            log_config=None,  # its loggers pass on to ours
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            backlog=4096,
        )
    )


async def serve(server: uvicorn.Server, sockets: list[socket.socket] | None) -> None:
    """Serve until a signal, or until the process that has started this one is dead."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        asyncio.get_running_loop().add_reader(0, _on_parent, server)
    await server.serve(sockets)


def _on_parent(server: uvicorn.Server) -> None:
    if not os.read(0, 1):
        asyncio.get_running_loop().remove_reader(0)
        server.should_exit = True


def main() -> int:
    logs.set_up("front", level=logging.WARNING)
    raise_file_limit()
    sockets = [socket.socket(fileno=int(sys.argv[1]))] if len(sys.argv) > 1 else None
    try:
        server = make_server(os.environ)
    except (ConfigError, ModelError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    uvloop.run(serve(server, sockets))
    return 0


if __name__ == "__main__":
    sys.exit(main())
