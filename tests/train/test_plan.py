"""What a plan says of a micro-batch: its size, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pha.bench.peers import build, model_config
from pha.cli import main
from pha.foreign import ForeignModel
from pha.model.config import ArchitectureConfig, vars_of
from pha.model.presets import preset_config
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.train.config import TrainConfig
from pha.train.plan import (
    PROBE_TOKENS,
    Card,
    _divide,
    _kept,
    activation_bytes_per_token,
    make_plan,
)
from pha.utils import compiling


@pytest.mark.parametrize(
    ("share", "most", "micro"),
    [
        (128, 72, 64),
        (128, 128, 128),
        (96, 40, 32),
        (90, 89, 45),
        (127, 72, 64),  # a prime: 64 and 63
        (127, 127, 127),
        (7, 3, 3),
        (1, 1, 1),
        (5, 1, 1),
    ],
)
def test_micro_batches_divide_the_share_where_that_makes_no_small_ones(
    share: int, most: int, micro: int
) -> None:
    assert _divide(share, most) == micro
    pieces = [min(micro, share - start) for start in range(0, share, micro)]
    assert max(pieces) <= most
    assert 2 * max(pieces) > min(share, most)


def test_a_compiled_model_keeps_what_its_graphs_keep() -> None:
    model = ForeignModel(build(model_config("hf:llama-tiny", 64), torch.device("cpu")))
    eager, compiled = (
        sum(size for size, shape in _kept(model, PROBE_TOKENS, "bf16", c) if PROBE_TOKENS in shape)
        for c in (False, True)
    )
    assert 0.4 < compiled / eager < 0.8  # norms, rotation and SwiGLU keep their inputs alone


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["pha-tiny", "attention-only-tiny"])
def test_what_is_counted_is_what_inductor_keeps(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ArchitectureConfig(**(vars_of(preset_config(preset)) | {"num_hidden_layers": 2}))
    counted = activation_bytes_per_token(config, "bf16", compiled=True)
    assert counted < activation_bytes_per_token(config, "bf16")
    model = PHAForCausalLM(PHAConfig(**(vars_of(config) | {"vocab_size": 8})))
    compile_blocks = compiling.compile_blocks
    monkeypatch.setattr(
        "pha.train.plan.compile_blocks", lambda model, backend: compile_blocks(model)
    )
    kept = _kept(model, PROBE_TOKENS, "bf16", compiled=True)
    assert counted == sum(size for size, shape in kept if PROBE_TOKENS in shape) / PROBE_TOKENS


def test_a_card_that_is_not_here_is_planned_for(small_config: Callable[..., TrainConfig]) -> None:
    changes = {"data__sequence_length": 4096, "run__global_batch": 64, "model__vocab_size": 257}
    config = small_config(**changes)
    here = torch.device("cpu")
    plans = [
        make_plan(config, 100, here, "bf16", 4, Card(rate, 80 * 10**9)) for rate in (1e14, 2e14)
    ]
    assert [plan.free_bytes for plan in plans] == [80 * 10**9] * 2
    assert plans[0].micro_batch == 16  # a CPU takes no more than 8,192 tokens at a time
    assert plans[0].weights_bytes == 16 * plans[0].parameters
    assert plans[0].seconds == 2 * plans[1].seconds
    assert plans[0].seconds == pytest.approx(plans[0].flops / (1e14 * 4 * 0.4))
    small = make_plan(config, 100, here, "bf16", 4, Card(1e14, 2 * 10**8))
    assert small.micro_batch < 16
    assert small.activation_bytes < 0.8 * 2 * 10**8


@pytest.mark.parametrize(
    "words",
    [
        ["--dry-run", "--device-gb", "80"],
        ["--dry-run", "--device-gb", "80", "--device-tflops", "0"],
        ["--device-gb", "80", "--device-tflops", "989"],
    ],
)
def test_half_a_card_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "pha-tiny.text", "--data", "STORE", *words])
    assert "--device-tflops and --device-gb" in capsys.readouterr().err
