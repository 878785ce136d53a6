# SPDX-License-Identifier: Apache-2.0
"""Element-wise activations of feed-forward layers."""
