"""Table 1 of the paper as configurations, the ablations of Table 7, the models of Table 5.

State sizes n, and the depths and widths of the ablations, are ours: the paper gives only totals.
They are chosen so that each total lands on the paper's count. Each has a small twin.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

from pha.model.config import ArchitectureConfig
from pha.utils.errors import PHAError

_90M: dict[str, Any] = {
    "hidden_size": 480,
    "num_hidden_layers": 14,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 60,
    "primary_ffn_expansion": 2.0,
    "auxiliary_ffn_expansion": 0.67,
    "state_size": 1568,
}
_125M = _90M | {
    "hidden_size": 608,
    "num_hidden_layers": 12,
    "head_dim": 76,
    "state_size": 2176,
}
_180M: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "primary_ffn_expansion": 2.5,
    "auxiliary_ffn_expansion": 1.25,
    "state_size": 2592,
}
_TINY: dict[str, Any] = {
    "hidden_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 40,
    "primary_ffn_expansion": 2.0,
    "auxiliary_ffn_expansion": 0.67,
    "state_size": 544,
}
_SEQUENTIAL: dict[str, Any] = {"block": "sequential", "branches": ["attention", "gss"]}
_ATTENTION: dict[str, Any] = {"branches": ["attention"]}
_ATTENTION_FFN: dict[str, Any] = {"branches": ["attention", "aux_ffn"]}
_ATTENTION_GSS: dict[str, Any] = {"branches": ["gss", "attention"]}
_GSS_FFN: dict[str, Any] = {"branches": ["gss", "aux_ffn"]}
_GSS: dict[str, Any] = {"branches": ["gss"]}
_MEHTA: dict[str, Any] = {"branches": ["mehta_gss", "attention", "aux_ffn"]}

# Table 5's GSS and GSS Hybrid, which the paper takes from others, as 125M stacks of 12 layers of
# width 768 with the layer of Mehta et al. in place of attention; in the hybrid, attention in the
# second layer and in the one half a depth later. That layer alone would make 110M of them: an FFN
# in every layer, of the same size throughout each model, brings either to 125M [ours].
_MEHTA_STACK: dict[str, Any] = {
    "block": "sequential",
    "branches": ["mehta_gss"],
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "primary_ffn_expansion": 0.7,
}
_MEHTA_HYBRID = _MEHTA_STACK | {"attention_layers": [1, 7], "primary_ffn_expansion": 1.1}

# The paper's model on OpenWebText is a 125M of its own shape, with FFNs smaller than on WikiText
# and four query heads to a key head. The rest of the shape was lost: a little wider, with the state
# taking up what the FFNs leave [ours].
_OPENWEBTEXT: dict[str, Any] = _125M | {
    "hidden_size": 640,
    "head_dim": 80,
    "primary_ffn_expansion": 1.5,
    "auxiliary_ffn_expansion": 0.5,
    "state_size": 2208,
}


def _mehta_shape(channels: int, modes: int) -> dict[str, Any]:
    return {"branch_options": {"mehta_gss": {"channels": channels, "modes": modes}}}


_MEHTA_STACK_TINY = (
    _TINY
    | _mehta_shape(56, 112)
    | {
        "block": "sequential",
        "branches": ["mehta_gss"],
        "num_hidden_layers": 6,
        "primary_ffn_expansion": 1.2,
    }
)

# Systems that the paper compares with, at the size of PHA-125M. Alone, a mixer is the only branch
# of our block at width 768. In PHA it stands in the place of the GSS. Either way the primary FFN
# takes what the mixer leaves: beside the GSS it has 1216 units, 320 in miniature [ours].
_ALONE: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def _system(
    name: str,
    branch: str,
    options: tuple[dict[str, Any], dict[str, Any], dict[str, Any]],
    ffn: tuple[int, int, int, int],
) -> dict[str, dict[str, Any]]:
    """Four presets: alone, in PHA, and both in miniature.

    Args:
        name: that of the system.
        branch: its mixer.
        options: of the mixer alone, in PHA and in miniature.
        ffn: units of the primary FFN in each of the four.
    """
    full, inside, tiny = ({"branch_options": {branch: given}} if given else {} for given in options)
    kinds = {
        f"{name}-125m": _ALONE | full | {"branches": [branch]},
        f"pha-125m-{name}": _125M | inside | {"branches": [branch, "attention", "aux_ffn"]},
        f"{name}-tiny": _TINY | tiny | {"branches": [branch]},
        f"pha-125m-{name}-tiny": _TINY | tiny | {"branches": [branch, "attention", "aux_ffn"]},
    }
    return {
        kind: fields | {"primary_ffn_expansion": units / fields["hidden_size"]}
        for (kind, fields), units in zip(kinds.items(), ffn, strict=True)
    }


_NO_POSITIONS: dict[str, Any] = {"attention": {"positions": "none"}}
_ALIBI: dict[str, Any] = {
    "branch_options": {"attention": {"positions": "alibi"}},
    "attention_logits": "dot-product",
}

# Stacks that put layers of attention between others, with the mixers' own sizes.
_GRIFFIN: dict[str, Any] = {
    "layer_pattern": [["rg_lru"], ["rg_lru"], [{"attention": {"window": 1024}}]]
}
_JAMBA: dict[str, Any] = {
    "layer_pattern": [*[["mamba"]] * 4, [{"attention": {"positions": "none"}}], *[["mamba"]] * 3]
}
_THREE_TO_ONE: dict[str, Any] = {"layer_pattern": [*[["gated_deltanet"]] * 3, ["attention"]]}

# PHA+: an output gate and a time step from the input for Eq. 2, attention in every third layer. The
# state takes up what is left; docs/decisions.md says what each change is worth [ours].
_PLUS: dict[str, Any] = {
    "layer_pattern": [
        ["extended_gss", "aux_ffn"],
        ["extended_gss", "aux_ffn"],
        ["extended_gss", "attention", "aux_ffn"],
    ],
    "branch_options": {"extended_gss": {"output_gate": True, "input_dt": True}},
}

PRESETS: dict[str, dict[str, Any]] = {
    "pha-90m": _90M,
    "pha-125m": _125M,
    "pha-180m": _180M,
    "sequential-186m": _180M
    | _SEQUENTIAL
    | {"num_hidden_layers": 12, "primary_ffn_expansion": 8 / 3},
    "attention-only-180m": _180M | _ATTENTION | {"num_hidden_layers": 24},
    "attention-only-180m-shallow": _180M | _ATTENTION | {"primary_ffn_expansion": 7.125},
    "attention-ffn-180m": _180M | _ATTENTION_FFN | {"num_hidden_layers": 17},
    "attention-gss-180m": _180M | _ATTENTION_GSS | {"num_hidden_layers": 12, "state_size": 2528},
    "gss-ffn-180m": _180M | _GSS_FFN | {"num_hidden_layers": 11, "state_size": 2720},
    "gss-only-180m": _180M | _GSS | {"num_hidden_layers": 14, "state_size": 2480},
    "pha-125m-openwebtext": _OPENWEBTEXT,
    "pha-125m-mehta": _125M | _MEHTA,
    "pha-180m-mehta": _180M | _MEHTA,
    "mehta-gss-only-125m": _MEHTA_STACK,
    "mehta-gss-hybrid-125m": _MEHTA_HYBRID,
    # The small ones: pha-tiny has the paper's smallest shape in miniature, the other two grow from
    # it as 125M and 180M do from 90M, and the ablations are its twins within 1% of parameters.
    "pha-tiny": _TINY,
    "pha-90m-tiny": _TINY,
    "pha-plus-tiny": _TINY | _PLUS | {"state_size": 480},
    "pha-125m-tiny": _TINY | {"hidden_size": 192, "head_dim": 48, "state_size": 640},
    "pha-180m-tiny": _180M
    | {
        "hidden_size": 240,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 40,
        "state_size": 816,
    },
    "sequential-tiny": _TINY | _SEQUENTIAL | {"primary_ffn_expansion": 8 / 3},
    "attention-only-tiny": _TINY
    | _ATTENTION
    | {"num_hidden_layers": 8, "primary_ffn_expansion": 2.6},
    "attention-only-tiny-shallow": _TINY | _ATTENTION | {"primary_ffn_expansion": 6.05},
    "attention-ffn-tiny": _TINY
    | _ATTENTION_FFN
    | {"num_hidden_layers": 7, "primary_ffn_expansion": 2.45},
    "attention-gss-tiny": _TINY | _ATTENTION_GSS | {"num_hidden_layers": 5, "state_size": 432},
    "gss-ffn-tiny": _TINY | _GSS_FFN | {"state_size": 672},
    "gss-only-tiny": _TINY | _GSS | {"num_hidden_layers": 5, "state_size": 560},
    "pha-125m-openwebtext-tiny": _TINY
    | {"primary_ffn_expansion": 1.5, "auxiliary_ffn_expansion": 0.5, "state_size": 640},
    "pha-125m-mehta-tiny": _TINY | _MEHTA | _mehta_shape(56, 112),
    "pha-180m-mehta-tiny": _180M
    | _MEHTA
    | _mehta_shape(80, 144)
    | {
        "hidden_size": 168,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 28,
    },
    "mehta-gss-only-tiny": _MEHTA_STACK_TINY,
    "mehta-gss-hybrid-tiny": _MEHTA_STACK_TINY
    | {"attention_layers": [1, 4], "primary_ffn_expansion": 2.05},
    "pha-plus-90m": _90M | _PLUS | {"state_size": 1376},
    "pha-plus-125m": _125M | _PLUS | {"state_size": 1856},
    "pha-plus-180m": _180M | _PLUS | {"state_size": 2272},
    **_system("rg-lru", "rg_lru", ({}, {}, {}), (2304, 2728, 912, 672)),
    **_system("mamba", "mamba", ({}, {}, {}), (1488, 2088, 736, 496)),
    **_system("qrnn", "qrnn", ({}, {}, {}), (2032, 2528, 848, 608)),
    # What the others stand beside: attention and Eq. 2, each as the only branch.
    "attention-125m": _ALONE | _ATTENTION | {"primary_ffn_expansion": 2440 / 768},
    "gss-125m": _ALONE | _GSS | {"state_size": 2176, "primary_ffn_expansion": 944 / 768},
    # Attention stays where it is in PHA, beside the GSS.
    "alibi-125m": _ALONE | _ATTENTION | _ALIBI | {"primary_ffn_expansion": 2440 / 768},
    "pha-125m-alibi": _125M | _ALIBI,
    "alibi-tiny": _TINY | _ATTENTION | _ALIBI | {"primary_ffn_expansion": 968 / 160},
    "pha-125m-alibi-tiny": _TINY | _ALIBI,
    **_system(
        *("mamba2", "mamba2"),
        ({}, {}, {"state_size": 32, "head_size": 32}),
        (1488, 2080, 752, 512),
    ),
    **_system(
        *("gated-deltanet", "gated_deltanet"),
        (
            {"heads": 6, "key_size": 96, "value_size": 192},
            {"heads": 4, "key_size": 114, "value_size": 228},
            {"heads": 3, "key_size": 40, "value_size": 80},
        ),
        (1576, 2168, 776, 536),
    ),
    **_system("linear", "linear_attention", ({}, {}, {}), (2096, 2584, 888, 648)),
    **_system(*("delta", "linear_attention"), ({"rule": "delta"},) * 3, (2096, 2584, 888, 648)),
    **_system(
        *("cosformer", "linear_attention"),
        ({"feature_map": "cosformer"},) * 3,
        (2096, 2584, 888, 648),
    ),
    **_system(
        *("hedgehog", "linear_attention"),
        ({"feature_map": "hedgehog"},) * 3,
        (2056, 2528, 864, 624),
    ),
    **_system(
        *("retnet", "retnet"),
        ({"heads": 3}, {"heads": 2}, {"heads": 2}),
        (1072, 1768, 680, 440),
    ),
    **_system("s4d", "s4d", ({}, {}, {"modes": 8}), (2568, 2944, 984, 744)),
    **_system("h3", "h3", ({}, {}, {"modes": 8}), (1984, 2472, 832, 592)),
    # The hybrid of H3's paper: attention in the second layer and half a depth later, no positions.
    "h3-hybrid-125m": _ALONE
    | {"branches": ["h3"], "attention_layers": [1, 7], "primary_ffn_expansion": 2064 / 768}
    | {"branch_options": _NO_POSITIONS},
    "h3-hybrid-tiny": _TINY
    | {"branches": ["h3"], "attention_layers": [1, 3], "primary_ffn_expansion": 896 / 160}
    | {"branch_options": _NO_POSITIONS | {"h3": {"modes": 8}}},
    # In miniature a filter is as long as sequences are there.
    **_system(
        *("hyena", "hyena"),
        ({}, {}, {"max_length": 256, "filter_size": 16}),
        (2064, 2552, 880, 640),
    ),
}

PRESETS |= {
    "griffin-125m": _ALONE | _GRIFFIN | {"primary_ffn_expansion": 2352 / 768},
    "griffin-tiny": _TINY | _GRIFFIN | {"num_hidden_layers": 3, "primary_ffn_expansion": 8.15},
    "jamba-125m": _ALONE
    | _JAMBA
    | {"hidden_size": 640, "head_dim": 80, "num_attention_heads": 8, "num_key_value_heads": 2}
    | {"num_hidden_layers": 16, "primary_ffn_expansion": 1752 / 640},
    "jamba-tiny": _TINY | _JAMBA | {"num_hidden_layers": 8, "primary_ffn_expansion": 1.3},
    "gated-deltanet-hybrid-125m": _ALONE | _THREE_TO_ONE | {"primary_ffn_expansion": 1792 / 768},
    "gated-deltanet-hybrid-tiny": _TINY
    | _THREE_TO_ONE
    | {
        "branch_options": {"gated_deltanet": {"heads": 3, "key_size": 40, "value_size": 80}},
        "primary_ffn_expansion": 5.15,
    },
}

# Transformers with a memory of the text before, which `data.carry chunks` brings along in training:
# 1,024 tokens, and 512 with 512 slots of 4; in miniature 256, for sequences as long.
_COMPRESSIVE: dict[str, Any] = {"branches": ["compressive_attention"]}


def _slots(slots: int) -> dict[str, Any]:
    return {"branch_options": {"compressive_attention": {"slots": slots}}}


PRESETS |= {
    "transformer-xl-125m": PRESETS["attention-125m"] | {"attention_window": 1025},
    "transformer-xl-tiny": PRESETS["attention-only-tiny-shallow"] | {"attention_window": 257},
    "compressive-125m": _ALONE
    | _COMPRESSIVE
    | _slots(512)
    | {"attention_window": 513, "primary_ffn_expansion": 1416 / 768},
    "compressive-tiny": _TINY
    | _COMPRESSIVE
    | _slots(256)
    | {"attention_window": 257, "primary_ffn_expansion": 4.75},
}

# Parameters that the paper states (Table 1; its ablations are "comparable" to the full model).
PAPER_PARAMETERS: dict[str, float] = {
    "pha-90m": 89.7e6,
    "pha-125m": 125e6,
    "pha-180m": 180.5e6,
    "sequential-186m": 185.8e6,
    "pha-125m-openwebtext": 125e6,
}


def preset(name: str) -> dict[str, Any]:
    """The fields of `ArchitectureConfig` that the preset called `name` sets, `preset` included.

    Raises:
        PHAError: no such preset; the closest names are suggested.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4) or list(PRESETS)[:3]
        raise PHAError(
            f"there is no preset {name!r}; did you mean {' or '.join(close)}? "
            "`pha params` lists all"
        )
    return {"preset": name} | copy.deepcopy(PRESETS[name])


def preset_config(name: str, **overrides: Any) -> ArchitectureConfig:
    """The preset as a checked configuration, with fields replaced by `overrides`."""
    config = ArchitectureConfig(**(preset(name) | overrides))
    config.check()
    return config
