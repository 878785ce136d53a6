# SPDX-License-Identifier: Apache-2.0
"""Matrix products with weights, alone or with a gated activation."""
