"""Small models and shared checks for the tests of the language model."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.modeling import PHAConfig, PHAForCausalLM

VOCABULARY = 31
GSS_PARAMETERS = {"log_A", "log_dt"}
MEHTA_PARAMETERS = {"Lambda_re", "Lambda_im", "C_re", "C_im", "D"}
FLOAT32_PARAMETERS = {"theta", "logit_scale", *GSS_PARAMETERS, *MEHTA_PARAMETERS}
SUBSETS = [
    subset
    for size in (1, 2, 3)
    for subset in itertools.combinations(("gss", "attention", "aux_ffn"), size)
]
KINDS = [("parallel", subset) for subset in SUBSETS]
KINDS += [("sequential", ("attention", "gss")), ("sequential", ("gss",))]
KINDS += [("parallel", ("mehta_gss", "attention", "aux_ffn")), ("sequential", ("mehta_gss",))]
# In a hybrid the second layer has attention alone; see `small_config`.
KINDS += [("hybrid", ("mehta_gss",)), ("hybrid", ("gss", "aux_ffn"))]
MEHTA_SHAPE = {"channels": 12, "modes": 20, "expansion": 2}
# Logits are of order one; other matrix shapes add their terms in another order, a few units of
# float32 apiece, and two layers pass them on.
ATOL = 1e-5

each_kind = pytest.mark.parametrize(
    ("block", "branches"), KINDS, ids=[f"{block}-{'+'.join(names)}" for block, names in KINDS]
)
each_main_kind = pytest.mark.parametrize(
    ("block", "branches"),
    [
        ("parallel", ("gss", "attention", "aux_ffn")),
        ("parallel", ("attention",)),
        ("parallel", ("gss",)),
        ("sequential", ("attention", "gss")),
        ("parallel", ("mehta_gss", "attention", "aux_ffn")),
        ("hybrid", ("mehta_gss",)),
    ],
    ids=["pha", "attention-only", "gss-only", "sequential", "pha-mehta", "mehta-hybrid"],
)


def small_config(**overrides: Any) -> PHAConfig:
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "state_size": 48,
    } | overrides
    if fields.get("block") == "hybrid":
        fields |= {"block": "sequential", "attention_layers": [1], "primary_ffn_expansion": 0}
    if "mehta_gss" in fields.get("branches", ()):
        fields.setdefault("branch_options", {"mehta_gss": MEHTA_SHAPE})
    return PHAConfig(**fields)


def scrambled(config: PHAConfig, seed: int = 0) -> PHAForCausalLM:
    """A model whose every parameter is off its starting value, with layers that matter.

    Fresh layers hardly move the residual stream, and a tied head then repeats the last token.
    """
    torch.manual_seed(seed)
    model = PHAForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            if "embed_tokens" not in name:
                parameter.add_(spread * torch.randn_like(parameter))
            if "mixing.norms" in name or name.endswith(("W_down.weight", "W_o.weight")):
                parameter.mul_(4)
    return model


@functools.cache
def cached_model(block: str, branches: tuple[str, ...]) -> PHAForCausalLM:
    """Shared by tests that only run the model."""
    return scrambled(small_config(block=block, branches=list(branches))).requires_grad_(False)


def tokens(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for rounding; a search over any shapes asks it of models in float64."""
    atol = 1e-11 if expected.dtype == torch.float64 else ATOL
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def starts_of(lengths: list[int]) -> Tensor:
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts[0, [sum(lengths[:i]) for i in range(len(lengths))]] = True
    return starts


def padded_batch(lengths: tuple[int, ...], width: int, side: str = "left") -> tuple[Tensor, Tensor]:
    """Rows of their own lengths, the rest filled with random tokens that the mask hides.

    They are on the left, on the right, or anywhere ("holes").
    """
    columns, rows = torch.arange(width), torch.tensor(lengths)[:, None]
    if side == "holes":
        generator = torch.Generator().manual_seed(3)
        columns = torch.rand(len(lengths), width, generator=generator).argsort(-1)
    mask = columns >= width - rows if side == "left" else columns < rows
    return tokens(len(lengths), width), mask.long()


def run_in_pieces(
    model: PHAForCausalLM,
    ids: Tensor,
    cuts: list[int],
    attention_mask: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> Tensor:
    """Feed `ids` cut at `cuts`, with masks over the whole sequence so far."""
    cache, outputs = None, []
    for begin, end in itertools.pairwise([0, *cuts, ids.shape[1]]):
        output = model(
            ids[:, begin:end],
            attention_mask=None if attention_mask is None else attention_mask[:, :end],
            document_starts=None if document_starts is None else document_starts[:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        outputs.append(output.logits)
    return torch.cat(outputs, 1)
