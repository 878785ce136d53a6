# SPDX-License-Identifier: Apache-2.0
"""Sums over tensor-parallel ranks, fused with the norm that follows."""
