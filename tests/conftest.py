# SPDX-License-Identifier: Apache-2.0
"""What must be in the environment before torch or a kernel is imported."""

import os

# Threads that spin at OpenMP's barriers take the core that the awaited thread needs (see engine/supervisor.py).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
