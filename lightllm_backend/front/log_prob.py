# SPDX-License-Identifier: Apache-2.0
"""Log probabilities as numbers that JSON knows."""

# Stands for minus infinity and NaN.
_LEAST = -9999.0


def finite(log_prob: float) -> float:
    """Return the log probability, or the least that clients get."""
    return log_prob if log_prob > _LEAST else _LEAST
