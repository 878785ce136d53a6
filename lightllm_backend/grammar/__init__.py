# SPDX-License-Identifier: Apache-2.0
"""Structured output: what the text of a request must follow, compiled into masks of the tokens that may come next."""
