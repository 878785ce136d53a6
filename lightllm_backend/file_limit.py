# SPDX-License-Identifier: Apache-2.0
"""Raises the limit on open files. Standard library only."""

from __future__ import annotations

import contextlib
import resource

MAX_OPEN_FILES = 65536  # more than any process of a server needs; a hard limit may be a billion


def raise_file_limit() -> None:
    """Raise this process's soft limit on open files to its hard limit, or to MAX_OPEN_FILES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # some sandboxes forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
