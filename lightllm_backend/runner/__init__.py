# SPDX-License-Identifier: Apache-2.0
"""The runner: computes batches on one device, with CUDA graphs where they pay."""
