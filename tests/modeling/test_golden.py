"""The golden loss curve.

`python -m tests.modeling.test_golden` rewrites it, after a change that is meant to change the
mathematics; see `test_golden_loss_curve`.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pha.modeling import PHAForCausalLM
from tests.modeling.common import small_config

GOLDEN = Path(__file__).parents[1] / "golden" / "loss-pha-50.json"

STEPS, BATCH, LENGTH = 50, 4, 32


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


def golden_model() -> PHAForCausalLM:
    """Weights from integers too, by name: neither torch's generators nor the order matter."""
    config = small_config(
        vocab_size=64, num_attention_heads=4, num_key_value_heads=1, head_dim=8, state_size=32
    )
    model = PHAForCausalLM(config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As the auxiliary FFN was called when the curve was recorded.
            stream = congruential(zlib.crc32(name.replace("aux_ffn", "ffn").encode()))
            uniform = torch.tensor([next(stream) / 2**14 - 1 for _ in range(parameter.numel())])
            if parameter.dim() == 2:
                # Uniform on [-1, 1) has variance one third.
                spread = (3 / parameter.shape[1]) ** 0.5
                parameter.copy_(spread * uniform.view_as(parameter))
            elif name.endswith("log_dt"):
                parameter.copy_(torch.linspace(math.log(1e-3), math.log(1e-1), parameter.numel()))
    return model


def golden_losses() -> list[float]:
    """Train for 50 steps."""
    model = golden_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    count = STEPS * BATCH * (LENGTH + 1)
    data = torch.tensor(golden_tokens(count, 64)).view(STEPS, BATCH, LENGTH + 1)
    losses = []
    for batch in data:
        loss = model(batch[:, :-1], shift_labels=batch[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_golden_loss_curve() -> None:
    """A change that is not about the mathematics leaves the curve as it is."""
    golden = json.loads(GOLDEN.read_text())["losses"]
    assert len(golden) == STEPS
    assert golden[-1] < golden[0] - 1
    # Instruction sets (SSE4, AVX2, AVX-512) and thread counts move these losses by up to 1e-6 of
    # themselves, and float64 as much: rounding has not had the steps to grow. A change of one
    # part in a thousand to a temperature, a decay or a residual scale moves them by more than 1e-5.
    assert golden_losses() == pytest.approx(golden, rel=1e-5)


if __name__ == "__main__":
    GOLDEN.write_text(
        json.dumps(
            {
                "what": "training loss per step, nats per token; see tests/modeling/test_golden.py",
                "losses": golden_losses(),
            },
            indent=1,
        )
        + "\n"
    )
