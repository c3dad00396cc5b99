"""Sequences in pieces on several ranks: the same states, loss and gradients as on one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pha.caching import SequencePieces
from pha.modeling import PHAConfig
from pha.ops.pieces import Pieces
from pha.utils.errors import PHAError
from pha.utils.processes import Command, run_processes
from tests.modeling.common import FLOAT32_PARAMETERS, scrambled, small_config, tokens

T = 24
LAYERS: dict[str, dict[str, Any]] = {
    "pha": {},
    "eq. 2": {"branches": ["gss"]},
    "windowed attention": {"branches": ["attention"], "attention_window": 9},
    "linear attention": {"branches": ["linear_attention", "attention"]},
    "retention": {"branches": ["retnet"], "hidden_size": 36},
    "mamba-2": {"branches": ["mamba2"]},
    "rg-lru": {"branches": ["rg_lru", "attention"]},
    "qrnn": {"branches": ["qrnn"]},
    "one after the other": {"block": "sequential", "branches": ["attention", "gss"]},
}


def config_of(which: str) -> PHAConfig:
    fields = dict(LAYERS[which])
    if "linear_attention" in fields.get("branches", ()):
        fields |= {"hidden_size": 36}
    return small_config(**fields)


def learn(
    which: str, documents: bool, pieces: Pieces | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """States of this rank's piece, or of all; and gradients summed over ranks."""
    model = scrambled(config_of(which)).double().train()
    ids = tokens(2, T + 1)
    starts = torch.zeros(2, T, dtype=torch.bool)
    starts[0, [0, 5, 13]] = starts[1, [0, 10]] = True  # near the ends of pieces, too
    here, cache = slice(0, T), None
    if pieces is not None:
        size = T // pieces.size
        here, cache = slice(pieces.rank * size, (pieces.rank + 1) * size), None
        cache = SequencePieces(pieces, size)
    inputs = {"document_starts": starts[:, here]} if documents else {}
    x = model.model(ids[:, :-1][:, here], past_key_values=cache, **inputs).last_hidden_state
    logits = model.lm_head(x).flatten(0, 1)
    nn.functional.cross_entropy(logits, ids[:, 1:][:, here].flatten(), reduction="sum").backward()
    return x.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def rank_main(folder: Path) -> None:
    """Of one process: compare what it has with the whole, which it computes as well."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meet'}",
        rank=int(sys.argv[3]),
        world_size=int(sys.argv[2]),
    )
    pieces = Pieces()
    for which in LAYERS:
        for documents in (False, True) if which == "pha" else (True,):
            whole, gradients = learn(which, documents)
            x, own = learn(which, documents, pieces)
            size = T // pieces.size
            begin = pieces.rank * size
            torch.testing.assert_close(x, whole[:, begin : begin + size], rtol=0, atol=1e-9)
            for name, gradient in gradients.items():
                dist.all_reduce(own[name])
                # What is float32 in any model has sums of float32 as gradients.
                bound = 1e-5 if name.rpartition(".")[2] in FLOAT32_PARAMETERS else 1e-9
                torch.testing.assert_close(own[name], gradient, rtol=bound, atol=bound, msg=name)
    (folder / f"done-{pieces.rank}").touch()
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_with_pieces_equal_one_with_all(ranks: int, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.modeling.test_pieces", str(tmp_path), str(ranks)]
    commands = [Command([*words, str(rank)], tmp_path / f"log-{rank}") for rank in range(ranks)]
    run_processes(commands, parallel=ranks, seconds=240)
    assert all((tmp_path / f"done-{rank}").exists() for rank in range(ranks)), "\n".join(
        (tmp_path / f"log-{rank}").read_text()[-2000:] for rank in range(ranks)
    )


class Alone(Pieces):
    """The first of two, where nobody answers."""

    def __init__(self) -> None:
        self.group, self.rank, self.size = None, 0, 2


def test_what_cannot_be_in_pieces_is_refused() -> None:
    ids = tokens(2, 6)
    with pytest.raises(PHAError, match="branch mehta_gss cannot read a piece"):
        scrambled(small_config(branches=["mehta_gss"])).model(
            ids, past_key_values=SequencePieces(Alone(), 6)
        )
    with pytest.raises(PHAError, match="leave padding out"):
        scrambled(small_config()).model(
            ids, attention_mask=torch.ones_like(ids), past_key_values=SequencePieces(Alone(), 6)
        )


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
