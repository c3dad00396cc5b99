"""Golden losses: a long curve of PHA, and the first steps of every kind of layer.

`python -m tests.modeling.test_golden` rewrites those that differ, after a change that is meant to
change the mathematics; see `test_golden_loss_curve`.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pha.model import BRANCHES
from pha.model.presets import PRESETS
from pha.modeling import PHAForCausalLM
from tests.mixers.test_every_mixer import SMALL
from tests.modeling.common import KINDS, small_config

GOLDEN = Path(__file__).parents[1] / "golden" / "loss-pha-50.json"
ALL_GOLDEN = GOLDEN.with_name("losses-20.json")

STEPS, BATCH, LENGTH = 50, 4, 32
ALL_STEPS = 20
# Hyena has sines of large angles: what a processor rounds otherwise in their initial values
# grows to percents in twenty steps.
HYENA_STEPS = 3
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "state_size": 32,
}
PHA = ("parallel", ("gss", "attention", "aux_ffn"))
# What a configuration may choose besides its branches, in the layer that has all of them.
CHOICES: dict[str, dict[str, Any]] = {
    "post": {"residual": "post"},
    "deepnorm": {"residual": "post", "deepnorm_init": True},
    "fixed mixing": {"mixing_weights": "fixed"},
    "no branch norms": {"branch_norms": False},
    "zero-order hold": {"input_scaling": "zero-order-hold"},
    "dot product": {"attention_logits": "dot-product"},
    "window": {"attention_window": 8},
    "alibi": {
        "attention_logits": "dot-product",
        "branch_options": {"attention": {"positions": "alibi", "window": 8}},
    },
}
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    f"{block} {' '.join(names)}": (block, names, {}) for block, names in KINDS
}
CASES |= {
    f"parallel {' '.join(names)}": (
        "parallel",
        names,
        {"branch_options": {mixer: SMALL.get(mixer, {})}},
    )
    for mixer, branch in sorted(BRANCHES.items())
    if branch.__module__.startswith("pha.mixers.") and mixer != "mehta_gss"
    for names in ((mixer,), (mixer, "attention", "aux_ffn"))
}
CASES["hybrid h3"] = ("hybrid", ("h3",), {"branch_options": {"h3": SMALL["h3"]}})
CASES |= {f"PHA, {name}": (*PHA, choice) for name, choice in CHOICES.items()}


def congruential(seed: int) -> Iterator[int]:
    """A linear congruential generator: 15 usable bits a step, the same on any machine."""
    state = seed % 2**31
    while True:
        state = (1103515245 * state + 12345) % 2**31
        yield state >> 16


def golden_tokens(count: int, vocabulary: int) -> list[int]:
    """Three times in four the successor 5 x + 3 of the token before, else a random one."""
    token, result = 0, []
    for chance in itertools.islice(congruential(1), count):
        token = (5 * token + 3 if chance % 4 else chance // 4) % vocabulary
        result.append(token)
    return result


def golden_model(**choices: Any) -> PHAForCausalLM:
    """Weights from integers too, by name: neither torch's generators nor the order matter."""
    config = small_config(**SHAPE, **choices)
    torch.manual_seed(0)
    model = PHAForCausalLM(config).train()
    torch.manual_seed(1)
    others = dict(PHAForCausalLM(config).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As the auxiliary FFN was called when the curve was recorded.
            stream = congruential(zlib.crc32(name.replace("aux_ffn", "ffn").encode()))
            uniform = torch.tensor([next(stream) / 2**14 - 1 for _ in range(parameter.numel())])
            if parameter.dim() > 1:
                # Uniform on [-1, 1) has variance one third.
                spread = (3 / parameter[0].numel()) ** 0.5
                parameter.copy_(spread * uniform.view_as(parameter))
            elif name.endswith("log_dt"):
                parameter.copy_(torch.linspace(math.log(1e-3), math.log(1e-1), parameter.numel()))
            elif not torch.equal(parameter, others[name]):
                parameter.copy_(uniform)
    return model


def golden_losses(
    steps: int = STEPS, dtype: torch.dtype = torch.float32, **choices: Any
) -> list[float]:
    """Train for so many steps."""
    model = golden_model(**choices).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = torch.tensor(golden_tokens(STEPS * BATCH * (LENGTH + 1), 64))
    losses = []
    for batch in data.view(STEPS, BATCH, LENGTH + 1)[:steps]:
        loss = model(batch[:, :-1], shift_labels=batch[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 7))
    return losses


def first_losses(case: str) -> list[float]:
    """The first steps of a case, in float64: in fp32 some kinds let rounding grow to 2e-5."""
    steps = HYENA_STEPS if "hyena" in case else ALL_STEPS
    block, branches, choices = CASES[case]
    return golden_losses(steps, torch.float64, block=block, branches=list(branches), **choices)


def test_golden_loss_curve() -> None:
    """A change that is not about the mathematics leaves the curve as it is."""
    golden = json.loads(GOLDEN.read_text())["losses"]
    assert len(golden) == STEPS
    assert golden[-1] < golden[0] - 1
    # Instruction sets (SSE4, AVX2, AVX-512) and thread counts move these losses by up to 1e-6 of
    # themselves, and float64 as much: rounding has not had the steps to grow. A change of one
    # part in a thousand to a temperature, a decay or a residual scale moves them by more than 1e-5.
    assert golden_losses() == pytest.approx(golden, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_layer_has_its_golden_losses(case: str) -> None:
    golden = json.loads(ALL_GOLDEN.read_text())["losses"][case]
    assert len(golden) == (HYENA_STEPS if "hyena" in case else ALL_STEPS)
    # AVX-512, AVX2 and SSE4 move these by less than 5e-8 of themselves, which is how they are kept.
    assert first_losses(case) == pytest.approx(golden, rel=1e-6)


def test_no_preset_and_no_branch_of_ours_is_without_golden_losses() -> None:
    kinds = {(block, names) for block, names, _ in CASES.values()}
    for preset in PRESETS.values():
        block = "hybrid" if preset.get("attention_layers") else preset.get("block", "parallel")
        assert (block, tuple(preset.get("branches", PHA[1]))) in kinds
    ours = {name for name, branch in BRANCHES.items() if branch.__module__.startswith("pha.")}
    assert {name for _, names in kinds for name in names} == ours


if __name__ == "__main__":
    torch.set_num_threads(1)
    what = "training loss per step, nats per token; see tests/modeling/test_golden.py"
    losses = golden_losses()
    if losses != pytest.approx(json.loads(GOLDEN.read_text())["losses"], rel=1e-5):
        GOLDEN.write_text(json.dumps({"what": what, "losses": losses}, indent=1) + "\n")
    kept = json.loads(ALL_GOLDEN.read_text())["losses"] if ALL_GOLDEN.is_file() else {}
    found = {case: first_losses(case) for case in CASES}
    # What has only been rounded otherwise, by another processor, stays as it is.
    same = {case for case in found if found[case] == pytest.approx(kept.get(case, []), rel=1e-6)}
    lines = (
        f"  {json.dumps(case)}: {json.dumps(kept[case] if case in same else found[case])}"
        for case in found
    )
    text = ",\n".join(lines)
    ALL_GOLDEN.write_text(f'{{\n "what": "{what}",\n "losses": {{\n{text}\n }}\n}}\n')
