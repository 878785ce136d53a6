# SPDX-License-Identifier: Apache-2.0
"""Quantised weights: what a checkpoint's configuration says of each linear layer, and how its tensors are read."""
