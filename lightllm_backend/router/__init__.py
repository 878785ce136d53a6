# SPDX-License-Identifier: Apache-2.0
"""The Router: schedules sequences, gives them token slots and decides when each of them ends."""
