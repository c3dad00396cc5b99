"""What a branch keeps of what every branch promises, and how fast it is: a line for each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pha.modeling import PHAConfig, PHAForCausalLM
from pha.utils.hardware import seconds_of
from pha.utils.text import shorten

VOCABULARY, LENGTH = 61, 48
WITHIN = 1e-9  # of logits of order one, in float64
SPEED = {"width": 192, "length": 1024, "runs": 8}


@dataclass(frozen=True)
class Finding:
    """What one look at a branch came to."""

    what: str
    passed: bool
    words: str


def check_branch(name: str) -> Iterator[Finding]:
    """Look at the branch `name`, alone in a small model of random weights; nothing is trained."""
    for what, (look, fine, wrong) in _LOOKS.items():
        try:
            error = look(name)
            passed = error <= WITHIN
            words = fine if passed else f"{wrong}; largest error {error:.1e}"
        except Exception as problem:  # whatever the branch raises is the finding
            passed, words = False, f"{type(problem).__name__}: {shorten(str(problem), 300)}"
        yield Finding(what, passed, words)
    try:
        ours, own = _seconds(("gss", name))
        words = (
            f"{own * 1e3:.1f} ms forward and backward against {ours * 1e3:.1f} ms of gss "
            f"({own / ours:.1f} times), {SPEED['length']:,} tokens of width {SPEED['width']}"
        )
        yield Finding("speed", True, words)
    except Exception as problem:
        yield Finding("speed", False, f"{type(problem).__name__}: {shorten(str(problem), 300)}")


def _model(name: str, **shape: Any) -> PHAForCausalLM:
    """A model whose every layer matters: fresh ones hardly move the residual stream."""
    fields: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 32}
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16} | shape
    torch.manual_seed(0)
    model = PHAForCausalLM(PHAConfig(vocab_size=VOCABULARY, branches=[name], **fields)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() < 2 else parameter.shape[1] ** -0.5
            if "embed_tokens" not in key:
                parameter.add_(spread * torch.randn_like(parameter))
    return model


def _exact(name: str) -> PHAForCausalLM:
    return _model(name).double().requires_grad_(False)


def _tokens(rows: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (rows, length), generator=generator)


def _error(actual: Tensor, expected: Tensor) -> float:
    found = float((actual - expected).abs().max())
    return found if found == found else float("inf")


def _ahead(name: str) -> float:
    model, ids, cut = _exact(name), _tokens(2), LENGTH // 2
    others = torch.cat([ids[:, :cut], _tokens(2, LENGTH - cut, seed=1)], 1)
    return _error(model(others).logits[:, :cut], model(ids).logits[:, :cut])


def _splits(name: str) -> float:
    model, ids, cache = _exact(name), _tokens(2), None
    found: list[Tensor] = []
    for begin, end in itertools.pairwise([0, 1, 2, 20, LENGTH - 1, LENGTH]):
        part = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
        cache = part.past_key_values
        found.append(part.logits)
    return _error(torch.cat(found, 1), model(ids).logits)


def _documents(name: str) -> float:
    model, ids, lengths = _exact(name), _tokens(1), [9, 1, LENGTH - 10]
    starts = torch.zeros(1, LENGTH, dtype=torch.bool)
    starts[0, [0, 9, 10]] = True
    apart = [model(each).logits for each in ids.split(lengths, 1)]
    return _error(model(ids, document_starts=starts).logits, torch.cat(apart, 1))


def _pads(name: str) -> float:
    model, ids = _exact(name), _tokens(2)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    padded = model(ids, attention_mask=mask).logits[1:, 30:]
    return _error(padded, model(ids[1:, 30:]).logits)


def _bf16(name: str) -> float:
    """0 where a training step under autocast is finite and near the one without."""
    model, ids = _model(name).train(), _tokens(2)
    with torch.no_grad():
        exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits.detach()
        model(ids, labels=ids).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not all(bool(each.isfinite().all()) for each in gradients):
        return float("inf")
    off = float((logits - exact).pow(2).mean().sqrt() / exact.std())
    return 0.0 if off < 0.1 else off


class _Logits(nn.Module):
    def __init__(self, model: PHAForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids, use_cache=False).logits
        return logits


def _exports(name: str) -> float:
    whole = _Logits(_exact(name))
    shapes = ({1: torch.export.Dim("length", min=2, max=512)},)
    with torch.no_grad():
        exported = torch.export.export(whole, (_tokens(2),), dynamic_shapes=shapes)
    return _error(exported.module()(_tokens(2, 17)), whole(_tokens(2, 17)))


def _seconds(names: Sequence[str]) -> list[float]:
    """Shortest time of a forward and backward pass of models with one layer, which take turns."""
    shape = {"hidden_size": SPEED["width"], "num_hidden_layers": 1, "state_size": 256}
    ids, device = _tokens(1, SPEED["length"]), torch.device("cpu")

    def step(model: PHAForCausalLM) -> None:
        model(ids, labels=ids).loss.backward()

    models = [_model(name, **shape).train() for name in names]
    turns = [[seconds_of(partial(step, m), device) for m in models] for _ in range(SPEED["runs"])]
    return [min(each) for each in zip(*turns, strict=True)]


_Look = tuple[Callable[[str], float], str, str]
_LOOKS: dict[str, _Look] = {
    "looks ahead": (_ahead, "no", "a later token changes an earlier output"),
    "splits": (_splits, "through the cache as in one piece", "the cache does not carry its past"),
    "documents": (_documents, "kept apart", "packed documents see each other"),
    "padding": (_pads, "left out", "padding changes what stands beside it"),
    "bf16": (_bf16, "as in fp32, gradients finite", "far from fp32, or gradients not finite"),
    "export": (_exports, "torch.export with any length", "the exported model answers otherwise"),
}
