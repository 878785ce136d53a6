# SPDX-License-Identifier: Apache-2.0
"""Transformer models on the project's kernels, and the loading of their weights."""
