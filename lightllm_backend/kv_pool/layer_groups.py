# SPDX-License-Identifier: Apache-2.0
"""LayerGroups: how the layers of a model share the KV pool, so that those with a window hold no more than it.

A slot holds K and V of one token in the layers of one group, and a token takes a slot in each. Groups are of one size,
so that a slot serves any of them and the pool need not be divided. In groups with a window, a sequence gives back the
slots of tokens that none of its queries can see any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Each group has a table of the slots of all positions; more of them would take more memory than such windows free.
MAX_GROUPS = 8

ENDLESS = 1 << 40  # tokens


@dataclass(frozen=True)
class LayerGroups:
    """The groups: first those whose layers see the whole context, then those with a window."""

    num_full: int = 1
    num_windowed: int = 0
    window: int = 0  # positions that a query sees in groups with a window, its own included
    places: tuple[tuple[int, int], ...] = ()  # of each layer: its group, and its place in that group's slots

    @classmethod
    def whole(cls, num_layers: int) -> LayerGroups:
        """One group of all layers, which gives nothing back."""
        return cls(places=tuple((0, layer) for layer in range(num_layers)))

    @classmethod
    def of(cls, windows: Sequence[int], max_length: int) -> LayerGroups:
        """Group the layers by their windows (0: none).

        A group is as large as the smaller of the two kinds; the last group of the other kind may have fewer layers. All
        layers are one group if no sequence outgrows the windows, or if there would be too many groups.
        """
        window = max(windows)
        full = [layer for layer, its_window in enumerate(windows) if not its_window]
        windowed = [layer for layer, its_window in enumerate(windows) if its_window]
        size = min(len(full), len(windowed)) or len(windows)
        num_full, num_windowed = -(-len(full) // size), -(-len(windowed) // size)
        if not 0 < window < max_length or num_full + num_windowed > MAX_GROUPS:
            return cls.whole(len(windows))
        places = {layer: divmod(index, size) for index, layer in enumerate(full)}
        places |= {layer: (num_full + index // size, index % size) for index, layer in enumerate(windowed)}
        return cls(num_full, num_windowed, window, tuple(places[layer] for layer in range(len(windows))))

    def __str__(self) -> str:
        return f"{self.num_windowed} of {self.count} groups of {self.layers_per_slot} layers have it"

    @property
    def count(self) -> int:
        return self.num_full + self.num_windowed

    @property
    def layers_per_slot(self) -> int:
        return 1 + max(place for _, place in self.places)

    def held(self, length: Any) -> Any:
        """The slots that sequences of `length` tokens hold, a number or an array of them, after a step that decodes."""
        return self.num_full * length + self.num_windowed * np.minimum(length, self.window)

    def most_held(self, length: int, batch_max_tokens: int) -> int:
        """The most slots that a sequence of `length` tokens ever holds, after a step that computes all it may.

        Each token of a step has slots, and so have the tokens that its first one sees.
        """
        return self.num_full * length + self.num_windowed * min(length, self.window - 1 + batch_max_tokens)

    def longest(self, slots: int, batch_max_tokens: int) -> int:
        """The length of the longest sequence that never holds more than these slots."""
        in_window = self.window - 1 + batch_max_tokens
        if self.num_windowed == 0 or slots < self.count * in_window:
            return slots // self.count
        return (slots - self.num_windowed * in_window) // self.num_full if self.num_full else ENDLESS


# The Router needs no places, so that this is one group of any layers.
ONE_GROUP = LayerGroups()
