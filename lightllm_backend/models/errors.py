# SPDX-License-Identifier: Apache-2.0
"""The one exception of this folder."""


class ModelError(ValueError):
    """A model directory that cannot be served; the message names the path, what is wrong there, and what is needed."""
