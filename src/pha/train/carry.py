"""What the rows of one step leave to those of the next: states, and the memory of attention.

With `data.carry: chunks` a row goes on where it ended in the step before, as if its text had been
read at once, but for gradients, which stay within a step: truncated backpropagation through time.
With `states` a row of some steps starts from the states that another text left: state passing
(arXiv 2507.02782).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pha.caching import CarriedCache
from pha.model import ArchitectureConfig
from pha.train.config import DataConfig, TrainConfig


def memory_of(data: DataConfig, model: ArchitectureConfig) -> int:
    """How many keys of the steps before a layer of attention sees.

    Where `data.memory` does not say, these are all that a window leaves to the first token of a
    row, or else as many as a row has tokens.
    """
    if data.carry != "chunks":
        return 0
    window = model.attention_window
    usual = data.sequence_length if window is None else window - 1
    return usual if data.memory is None else data.memory


class Carried:
    """The past of all rows of this process, for a micro-batch at a time.

    What it holds is named: keys and values of each layer, states, the `tokens` that came before in
    a row's document and, beside keys, the `starts` of documents among them.

    Args:
        config: of the run.
        pieces: (start, stop) of this process's micro-batches in every global batch, in order.
        device: where the past is kept.
    """

    def __init__(
        self, config: TrainConfig, pieces: Sequence[tuple[int, int]], device: torch.device
    ) -> None:
        self.data, self.seed = config.data, config.run.seed
        self.memory = memory_of(config.data, config.model)
        self.pieces, self.device = list(pieces), device
        self.pasts: list[dict[str, Tensor]] = [{} for _ in pieces]

    def enter(self, step: int, piece: int, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the model for a micro-batch, with the past of its rows."""
        past = self.pasts[piece] if self._goes_on(step) else {}
        cache, ids, starts = CarriedCache(past, self.memory), inputs["input_ids"], None
        if inputs["document_starts"] is not None:
            starts = inputs["document_starts"].clone()
            if past and self.data.carry == "states":  # which pass into whatever begins the row
                starts[:, 0] = False
        before = past.get("tokens", ids.new_zeros(len(ids)))
        positions = _positions(ids, before, starts)
        cache.left["tokens"] = positions[:, -1] + 1
        if self.memory:
            new = torch.zeros_like(ids, dtype=torch.bool) if starts is None else starts
            known = torch.cat([past["starts"], new], 1) if "starts" in past else new
            cache.left["starts"] = known[:, -self.memory :]
            # Without attention there are starts and no keys.
            starts = known[:, -ids.shape[1] - cache.length() :] if cache.length() else starts
        return inputs | {
            "document_starts": starts,
            "position_ids": positions,
            "past_key_values": cache,
        }

    def leave(self, piece: int, inputs: dict[str, Any]) -> None:
        """Keep what a micro-batch left, given what `enter` returned for it."""
        self.pasts[piece] = inputs["past_key_values"].left

    def _goes_on(self, step: int) -> bool:
        """Whether the rows of a step have a past: a pure function of seed and step.

        No draw of another kind is from the same stream: the 1 is that of windows of attention.
        """
        if self.data.carry == "chunks":
            return True
        drawn = np.random.PCG64(np.random.SeedSequence([self.seed, step, 2])).random_raw()
        return int(drawn) < self.data.carry_share * 2**64

    def state(self) -> dict[str, Tensor]:
        """All that is held, in the order of the rows; empty before the first step."""
        return {name: torch.cat([past[name] for past in self.pasts]) for name in self.pasts[0]}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over the rows of this process of what all processes held."""
        self.pasts = [
            {name: x[start:stop].to(self.device) for name, x in state.items()}
            for start, stop in self.pieces
        ]


def _positions(ids: Tensor, before: Tensor, starts: Tensor | None) -> Tensor:
    """(B, T): how many tokens of its document came before each of `ids`, (B,) before the first."""
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if starts is None:
        return before[:, None] + places
    begun = torch.where(starts, places, -1).cummax(1).values
    return torch.where(begun < 0, before[:, None] + places, places - begun)
