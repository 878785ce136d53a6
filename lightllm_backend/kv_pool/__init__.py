# SPDX-License-Identifier: Apache-2.0
"""The KV pool: which token slots are free, and the K and V tensors that they index."""
