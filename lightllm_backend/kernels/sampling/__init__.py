# SPDX-License-Identifier: Apache-2.0
"""The choice of the next token from logits."""
