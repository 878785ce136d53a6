# SPDX-License-Identifier: Apache-2.0
"""The version of this package; a test compares it with pyproject.toml's. Standard library only."""

VERSION = "0.2.0"
