# SPDX-License-Identifier: Apache-2.0
"""Norms, with the addition to the residual."""
