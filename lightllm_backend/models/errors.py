# SPDX-License-Identifier: Apache-2.0
"""ModelError: the exception of this folder."""


class ModelError(ValueError):
    """A model directory that cannot be served. The message names the path, the fault and what is needed."""
