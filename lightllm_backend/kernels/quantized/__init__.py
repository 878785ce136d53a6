# SPDX-License-Identifier: Apache-2.0
"""Products with weights of 4 and 8 bits."""
