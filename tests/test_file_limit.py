# SPDX-License-Identifier: Apache-2.0
"""Each process raises its limit on open files."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource
from lightllm_backend import file_limit
file_limit.MAX_OPEN_FILES = 300
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
file_limit.raise_file_limit()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [(64, 128, "128 128"), (64, 400, "300 400"), (350, 400, "350 400")],
    ids=["to the hard one", "no further than needed", "never lower"],
)
def test_the_soft_limit_is_raised(soft: int, hard: int, raised: str) -> None:
    program = PROGRAM.format(soft=soft, hard=hard)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.strip() == raised, done.stderr
