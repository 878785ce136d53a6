# SPDX-License-Identifier: Apache-2.0
"""Closes the administration APIs of Triton server to its clients. Standard library only.

With shared memory a client has the server map any region of its user, the prompts of others included. With the model
repository it loads and unloads models, also some of its own. Logging and trace settings name files that the server
writes.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence

from lightllm_backend.config import ADMINISTRATION_APIS

# Triton server names this header in its refusal.
_HEADER = "closed-see-setting-open_apis"


def closing_options(open_apis: Collection[str]) -> list[str]:
    """Make tritonserver's options that close every administration API but these, over HTTP and gRPC.

    The options open an API to whoever sends a header with the right value. Local users can read a command line, and
    thus the value; so it has a line break, which HTTP forbids in headers.
    """
    closed = ",".join(api for api in ADMINISTRATION_APIS if api not in open_apis)
    if not closed:
        return []
    restriction = f"{closed}:{_HEADER}={secrets.token_hex(16)}\n{secrets.token_hex(16)}"
    return [f"--http-restricted-api={restriction}", f"--grpc-restricted-protocol={restriction}"]


def model_control_options(open_apis: Collection[str], arguments: Sequence[str]) -> list[str]:
    """Make tritonserver's options without which it refuses to load and unload models, if that API is open.

    With them it starts with no models but those that are named. arguments: the user's own, which may choose otherwise.
    """
    given = {argument.partition("=")[0] for argument in arguments}
    if "model-repository" not in open_apis or "--model-control-mode" in given:
        return []
    return ["--model-control-mode=explicit", *(["--load-model=*"] if "--load-model" not in given else [])]
