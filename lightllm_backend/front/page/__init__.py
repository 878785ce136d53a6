# SPDX-License-Identifier: Apache-2.0
"""The page at `/`: chat and completion in a browser, and the engine's load."""
