# SPDX-License-Identifier: Apache-2.0
"""The Router: which sequences run in the next step, which token slots they get, and when each of them ends."""
