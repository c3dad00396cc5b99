"""The configuration's checks, the presets' sizes, and how the weights start."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch

from pha.model import ArchitectureConfig, Backbone
from pha.model.branches import make_branches
from pha.model.parameters import count_parameters
from pha.model.presets import PAPER_PARAMETERS, PRESETS, preset, preset_config
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.utils.errors import PHAError
from tests.model.common import small

ABLATIONS = [
    "attention-only-180m",
    "attention-only-180m-shallow",
    "attention-ffn-180m",
    "attention-gss-180m",
    "gss-ffn-180m",
    "gss-only-180m",
]
MINIATURES = {
    "pha-90m": "pha-90m-tiny",
    "pha-125m": "pha-125m-tiny",
    "pha-180m": "pha-180m-tiny",
    "sequential-186m": "sequential-tiny",
    "attention-only-180m": "attention-only-tiny",
    "attention-only-180m-shallow": "attention-only-tiny-shallow",
    "attention-ffn-180m": "attention-ffn-tiny",
    "attention-gss-180m": "attention-gss-tiny",
    "gss-ffn-180m": "gss-ffn-tiny",
    "gss-only-180m": "gss-only-tiny",
    "pha-125m-openwebtext": "pha-125m-openwebtext-tiny",
    "pha-125m-mehta": "pha-125m-mehta-tiny",
    "pha-180m-mehta": "pha-180m-mehta-tiny",
    "mehta-gss-only-125m": "mehta-gss-only-tiny",
    "mehta-gss-hybrid-125m": "mehta-gss-hybrid-tiny",
    "h3-hybrid-125m": "h3-hybrid-tiny",
}
# Systems of others, alone in our block and in PHA in the place of the GSS.
SYSTEMS = [
    *("mamba2", "gated-deltanet", "rg-lru", "mamba", "qrnn", "alibi", "retnet"),
    *("linear", "delta", "cosformer", "hedgehog", "s4d", "h3", "hyena"),
]
MINIATURES |= {
    full: tiny
    for system in SYSTEMS
    for full, tiny in (
        (f"{system}-125m", f"{system}-tiny"),
        (f"pha-125m-{system}", f"pha-125m-{system}-tiny"),
    )
}
CONTROLS = {"attention-125m": "attention-only-tiny-shallow", "gss-125m": "gss-only-tiny"}
LAYOUTS = ["griffin", "jamba", "gated-deltanet-hybrid", "transformer-xl", "compressive"]
PLUS = {f"pha-plus-{size}": f"pha-{size}" for size in ("90m", "125m", "180m", "tiny")}
MINIATURES |= {name: "pha-plus-tiny" for name in PLUS if "tiny" not in name}
MINIATURES |= CONTROLS | {f"{layout}-125m": f"{layout}-tiny" for layout in LAYOUTS}
MEHTA = [name for name in MINIATURES if "mehta" in name]
TINY = [name for name in PRESETS if "tiny" in name]
# The published sizes in miniature differ in size on purpose, as the published ones do.
TWINS = [name for name in TINY if name not in ("pha-125m-tiny", "pha-180m-tiny")]

BAD_SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("vocab_size", {"vocab_size": 0}),
    ("hidden_size", {"hidden_size": -8}),
    ("num_hidden_layers", {"num_hidden_layers": 0}),
    ("num_attention_heads", {"num_attention_heads": 0}),
    ("num_key_value_heads", {"num_key_value_heads": 0}),
    ("num_attention_heads", {"num_attention_heads": 8, "num_key_value_heads": 3}),
    ("num_key_value_heads", {"num_attention_heads": 2, "num_key_value_heads": 4}),
    ("head_dim", {"head_dim": 0}),
    ("head_dim", {"head_dim": 75}),
    ("state_size", {"state_size": 0}),
    ("state_size", {"state_size": 2184}),
    ("dt_min", {"dt_min": 0.0}),
    ("dt_max", {"dt_min": 0.2, "dt_max": 0.1}),
    ("dropout", {"dropout": 1.0}),
    ("dropout", {"dropout": -0.1}),
    ("dropout", {"dropout": math.nan}),
    ("rope_theta", {"rope_theta": -1.0}),
    ("rms_norm_eps", {"rms_norm_eps": -1e-5}),
    ("rms_norm_eps", {"rms_norm_eps": math.inf}),
    ("initializer_range", {"initializer_range": 0}),
    ("branches", {"branches": []}),
    ("branches", {"branches": 5}),
    ("branches", {"branches": ["gss", "gss"]}),
    ("layer_pattern", {"layer_pattern": [["gss"], []]}),
    ("layer_pattern", {"layer_pattern": [["gss", {"gss": {}}]]}),
    ("layer_pattern", {"layer_pattern": [[{"gss": {}, "attention": {}}]]}),
    ("layer_pattern", {"layer_pattern": ["gss"]}),
    ("branch_options", {"branch_options": {"other": {}}}),
    ("attention_layers", {"attention_layers": [12]}),
    ("attention_layers", {"attention_layers": [-1]}),
    ("attention_layers", {"attention_layers": [7, 1]}),
    ("attention_layers", {"attention_layers": [1, 1]}),
    ("attention_layers", {"attention_layers": [True]}),
    ("attention_layers", {"attention_layers": 3}),
    ("block", {"block": "diagonal"}),
    ("residual", {"residual": "none"}),
    ("input_scaling", {"input_scaling": "one"}),
    ("attention_logits", {"attention_logits": "cosine"}),
    ("deepnorm_init", {"deepnorm_init": True}),
    ("primary_ffn_expansion", {"primary_ffn_expansion": 0.001}),
    ("primary_ffn_expansion", {"primary_ffn_expansion": -1.0}),
    ("auxiliary_ffn_expansion", {"auxiliary_ffn_expansion": 0.0}),
]


@pytest.mark.parametrize(("field", "overrides"), BAD_SHAPES)
def test_bad_shape_is_refused_by_field(field: str, overrides: dict[str, Any]) -> None:
    with pytest.raises(PHAError, match=rf"model: .*\b{field}\b"):
        ArchitectureConfig(**overrides).check()
    with pytest.raises(PHAError, match=rf"model: .*\b{field}\b"):
        PHAConfig(**overrides)


def test_unknown_field_is_an_error() -> None:
    with pytest.raises(TypeError, match="hidden_sise"):
        ArchitectureConfig(hidden_sise=3)  # type: ignore[call-arg]


def test_defaults_are_the_125m_model() -> None:
    defaults = ArchitectureConfig()
    defaults.check()
    assert preset_config("pha-125m") == ArchitectureConfig(preset="pha-125m")


def test_backbone_checks_its_configuration() -> None:
    with pytest.raises(PHAError, match="head_dim"):
        Backbone(ArchitectureConfig(head_dim=7))


@pytest.mark.parametrize(
    ("hidden_size", "expansion", "expected"),
    [(480, 0.67, 320), (608, 0.67, 408), (480, 2.0, 960), (768, 2.5, 1920), (768, 8 / 3, 2048)],
)
def test_ffn_size_rounds_to_the_nearest_multiple_of_eight(
    hidden_size: int, expansion: float, expected: int
) -> None:
    config = small(
        hidden_size=hidden_size,
        primary_ffn_expansion=expansion,
        auxiliary_ffn_expansion=expansion,
    )
    assert config.ffn_size(expansion) == expected
    with torch.device("meta"):
        layer = Backbone(config).layers[0]
    assert layer.get_parameter("primary_ffn.W_gate.weight").shape == (expected, hidden_size)
    gate = layer.get_parameter("branches.aux_ffn.swiglu.W_gate.weight")
    assert gate.shape == (expected, hidden_size)


def test_residual_constants_are_those_of_deepnorm() -> None:
    config = small(num_hidden_layers=8)
    assert config.residual_alpha == pytest.approx(2.0, rel=1e-15)
    assert config.deepnorm_beta == pytest.approx(1 / 64**0.25, rel=1e-15)


@pytest.mark.parametrize("name", sorted(PAPER_PARAMETERS))
def test_published_sizes_have_the_paper_parameters(name: str) -> None:
    total = sum(count_parameters(preset_config(name)).values())
    assert total == pytest.approx(PAPER_PARAMETERS[name], rel=0.003)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_are_comparable_to_the_full_model(name: str) -> None:
    total = sum(count_parameters(preset_config(name)).values())
    assert total == pytest.approx(180e6, rel=0.02)


@pytest.mark.parametrize(
    ("name", "total"), [("pha-125m-mehta", 125.2e6), ("pha-180m-mehta", 180.4e6)]
)
def test_the_layer_of_mehta_gives_the_stated_sizes(name: str, total: float) -> None:
    assert sum(count_parameters(preset_config(name)).values()) == pytest.approx(total, abs=0.1e6)


@pytest.mark.parametrize("system", SYSTEMS)
def test_other_systems_are_of_the_size_of_pha_125m(system: str) -> None:
    hybrids = ["h3-hybrid-125m"] if system == "h3" else []
    for name in (f"{system}-125m", f"pha-125m-{system}", *hybrids):
        total = sum(count_parameters(preset_config(name)).values())
        assert 124.75e6 <= total <= 125.05e6, name


@pytest.mark.parametrize("name", [*CONTROLS, *(f"{layout}-125m" for layout in LAYOUTS)])
def test_controls_and_layouts_are_of_the_same_size(name: str) -> None:
    total = sum(count_parameters(preset_config(name)).values())
    assert 124.75e6 <= total <= 125.05e6


@pytest.mark.parametrize("name", [name for name in MEHTA if "only" in name or "hybrid" in name])
def test_models_of_table_5_are_of_the_125m_class(name: str) -> None:
    total = sum(count_parameters(preset_config(name)).values())
    assert total == pytest.approx(125e6, rel=0.02)


def test_attention_is_the_second_layer_and_one_half_a_depth_later() -> None:
    for name in (x for x in PRESETS if "hybrid" in x and "deltanet" not in x):
        config = preset_config(name)
        assert config.attention_layers == [1, 1 + config.num_hidden_layers // 2]


@pytest.mark.parametrize(("name", "pha"), PLUS.items())
def test_pha_plus_is_of_the_size_of_pha(name: str, pha: str) -> None:
    total, expected = (sum(count_parameters(preset_config(x)).values()) for x in (name, pha))
    assert total == pytest.approx(expected, rel=0.004)


@pytest.mark.parametrize("name", TINY)
def test_tiny_presets_are_tiny(name: str) -> None:
    counts = count_parameters(preset_config(name, vocab_size=2048))
    assert 2e6 <= sum(counts.values()) - counts["embedding"] <= 5e6


@pytest.mark.parametrize("name", TWINS)
def test_tiny_twins_are_within_one_percent(name: str) -> None:
    def sizes(preset_name: str) -> tuple[int, int]:
        counts = count_parameters(preset_config(preset_name, vocab_size=2048))
        return sum(counts.values()), sum(counts.values()) - counts["embedding"]

    assert sizes(name) == pytest.approx(sizes("pha-tiny"), rel=0.01)


@pytest.mark.parametrize(("full", "tiny"), MINIATURES.items())
def test_every_full_size_has_a_tiny_one_of_its_kind(full: str, tiny: str) -> None:
    large, small = preset_config(full), preset_config(tiny)
    assert (large.block, large.branches) == (small.block, small.branches)
    assert large.layer_pattern == small.layer_pattern
    assert large.attention_logits == small.attention_logits
    assert small.hidden_size < large.hidden_size


def test_no_preset_is_left_out() -> None:
    assert set(PRESETS) == {*MINIATURES, *MINIATURES.values(), "pha-tiny"}
    layouts = {f"{x}-125m" for x in LAYOUTS}
    systems = {f"{x}-125m" for x in SYSTEMS} | {f"pha-125m-{x}" for x in SYSTEMS}
    names = {*CONTROLS, *layouts, "h3-hybrid-125m", *systems}
    assert set(MINIATURES) == {*PAPER_PARAMETERS, *ABLATIONS, *MEHTA, *names, *PLUS} - {
        "pha-plus-tiny"
    }


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_sound_and_named(name: str) -> None:
    config = preset_config(name)
    assert config.preset == name
    # GQA shares each key head between at least three query heads in every published model.
    assert config.num_attention_heads >= 3 * config.num_key_value_heads
    if "tiny" not in name:
        assert config.num_attention_heads * config.head_dim == config.hidden_size


def test_preset_is_a_copy() -> None:
    preset("pha-tiny")["hidden_size"] = 1
    preset("pha-125m-mehta-tiny")["branch_options"]["mehta_gss"]["modes"] = 1
    assert PRESETS["pha-125m-mehta-tiny"]["branch_options"]["mehta_gss"]["modes"] == 112
    assert PRESETS["pha-tiny"]["hidden_size"] != 1
    assert preset_config("pha-tiny", hidden_size=48).hidden_size == 48
    assert preset_config("pha-tiny").hidden_size != 48


def test_unknown_preset_suggests_the_closest() -> None:
    with pytest.raises(PHAError, match=r"'pha-125'.*mean .*pha-125m"):
        preset("pha-125")
    with pytest.raises(PHAError, match=r"'zzz'.*did you mean"):
        preset_config("zzz")


@pytest.mark.parametrize("block", ["parallel", "sequential"])
@pytest.mark.parametrize(
    "branches",
    [["gss", "attention", "aux_ffn"], ["attention"], ["gss"], ["aux_ffn"], ["gss", "aux_ffn"]],
    ids="+".join,
)
@pytest.mark.parametrize("residual", ["pre", "post"])
def test_counts_sum_to_the_real_model(
    block: Literal["parallel", "sequential"], branches: list[str], residual: Literal["pre", "post"]
) -> None:
    config = PHAConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=3,
        block=block,
        branches=branches,
        residual=residual,
    )
    counts = count_parameters(config)
    assert set(counts) == {"embedding", *branches, "primary_ffn", "norms_and_mixing"}
    # transformers' model: tied weights are one parameter, and are counted once.
    assert sum(counts.values()) == sum(p.numel() for p in PHAForCausalLM(config).parameters())


@pytest.mark.parametrize("block", ["parallel", "sequential"])
def test_counts_of_layers_with_different_branches(block: Literal["parallel", "sequential"]) -> None:
    shape = {"channels": 5, "modes": 7, "expansion": 2}
    config = PHAConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        block=block,
        branches=["mehta_gss"],
        branch_options={"mehta_gss": shape},
        attention_layers=[1],
        primary_ffn_expansion=0,
    )
    counts = count_parameters(config)
    norms = 24 * (2 * 4 if block == "parallel" else 4) + 24 + (4 if block == "parallel" else 0)
    assert counts == {
        "embedding": 37 * 24,
        "mehta_gss": 3 * (2 * 24 * 48 + 24 * 5 + 5 * 48 + 2 * 7 + 2 * 5 * 7 + 5),
        "attention": 2 * 24 * 12 + 2 * 24 * 6 + 2,
        "primary_ffn": 0,
        "norms_and_mixing": norms,
    }
    assert sum(counts.values()) == sum(p.numel() for p in PHAForCausalLM(config).parameters())


def test_a_pattern_gives_each_layer_its_branches_and_options() -> None:
    config = small(
        num_hidden_layers=5,
        layer_pattern=[["gss", "aux_ffn"], [{"attention": {"window": 4, "positions": "none"}}]],
        branch_options={"attention": {"window": 8}},
        attention_layers=[2],
    )
    layers = [make_branches(config, i) for i in range(5)]
    assert [list(layer) for layer in layers] == [
        *(["gss", "aux_ffn"], ["attention"], ["attention"], ["attention"], ["gss", "aux_ffn"])
    ]
    assert [layers[i]["attention"].window for i in (1, 2, 3)] == [4, 8, 4]
    assert [layers[i]["attention"].positions for i in (1, 2)] == ["none", "rotary"]
    assert list(count_parameters(config)) == [
        *("embedding", "gss", "aux_ffn", "attention", "primary_ffn", "norms_and_mixing")
    ]


def test_options_of_attention_where_only_some_layers_have_it() -> None:
    fields: dict[str, Any] = {"branches": ["gss"], "branch_options": {"attention": {}}}
    with pytest.raises(PHAError, match="branch_options names attention"):
        ArchitectureConfig(**fields).check()
    ArchitectureConfig(**fields, attention_layers=[0]).check()


def test_counts_by_component() -> None:
    d, n, L, H, G, K = 24, 48, 3, 6, 2, 10
    config = small(primary_ffn_expansion=2.0, auxiliary_ffn_expansion=1.0)
    assert count_parameters(config) == {
        "embedding": 37 * d,
        "gss": L * (3 * d * n + n + n // 16),
        "attention": L * (2 * d * H * K + 2 * d * G * K + H),
        "aux_ffn": L * 3 * d * 24,
        "primary_ffn": L * 3 * d * 48,
        # Per layer: three branch norms, two residual norms, three thetas. And the final norm.
        "norms_and_mixing": L * (5 * d + 3) + d,
    }


def test_mixing_weights_are_reported_by_layer_and_branch() -> None:
    model = Backbone(small(branches=["aux_ffn", "gss"]))
    with torch.no_grad():
        model.get_parameter("layers.1.mixing.theta").copy_(torch.tensor([0.5, -0.5]))
        model.get_parameter("layers.2.mixing.norms.gss.weight").mul_(3)
    report = model.mixing_weights()
    assert len(report) == 3
    assert report[0] == {
        "weights": {"aux_ffn": 0.5, "gss": 0.5},
        "effective": {"aux_ffn": 0.5, "gss": 0.5},
    }
    p = [math.log1p(math.exp(0.5)), math.log1p(math.exp(-0.5))]
    assert report[1]["weights"]["aux_ffn"] == pytest.approx(p[0] / sum(p), rel=3e-7)
    assert report[2]["weights"] == report[0]["weights"]
    assert report[2]["effective"]["gss"] == pytest.approx(0.75, rel=3e-7)
    assert Backbone(small(block="sequential")).mixing_weights() == []


def test_mixing_weights_of_layers_with_different_branches() -> None:
    report = Backbone(small(branches=["gss", "aux_ffn"], attention_layers=[1])).mixing_weights()
    names = [list(layer["weights"]) for layer in report]
    assert names == [["gss", "aux_ffn"], ["attention"], ["gss", "aux_ffn"]]
    assert report[1] == {"weights": {"attention": 1.0}, "effective": {"attention": 1.0}}


def test_embedding_is_scaled_by_the_root_of_the_width() -> None:
    model = Backbone(small())
    ids = torch.randint(37, (2, 5))
    seen = []
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids)
    expected = model.embed_tokens(ids) * math.sqrt(24)
    torch.testing.assert_close(seen[0], expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("residual", ["pre", "post"])
def test_hidden_states_leave_normalised(residual: str) -> None:
    x = Backbone(small(residual=residual))(torch.randint(37, (2, 5)))
    size = x.square().mean(-1).sqrt()
    # RMSNorm with its epsilon of 1e-5 under a mean square of order one.
    torch.testing.assert_close(size, torch.ones(2, 5), rtol=0, atol=1e-4)


def test_dropout_reaches_embedding_and_stream() -> None:
    ids = torch.randint(37, (2, 5))
    model = Backbone(small(dropout=0.4))
    assert torch.equal(model.eval()(ids), model(ids))
    model.train()
    torch.manual_seed(0)
    first = model(ids)
    assert not torch.equal(first, model(ids))
    torch.manual_seed(0)
    assert torch.equal(first, model(ids))
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates == [0.4] * (1 + 2 * 3)
