# SPDX-License-Identifier: Apache-2.0
"""Attention over the paged KV pool, and the writing of K and V to the pool."""
