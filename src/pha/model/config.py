"""What a model is made of: one dataclass, checked as a whole."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pha.utils.errors import PHAError

_Layer = Sequence[str | dict[str, dict[str, Any]]]
"""Branches of a layer, those with options of their own as mappings."""

# Far beyond any model: what is above is a slip or a damaged file, and fills the memory.
MOST, MOST_LAYERS = 1 << 24, 10_000

RENAMED = {"input_scale": "input_scaling"}
"""Fields by their names of older versions."""


@dataclass(kw_only=True)
class ArchitectureConfig:
    """Shape and choices of a PHA model. Defaults are PHA-125M; `[ours]` fills a hole in the paper.

    Attributes:
        preset: name of the published configuration this started from, for the record.
        vocab_size: V, entries of the embedding, which is tied with the output head.
        hidden_size: d.
        num_hidden_layers: L.
        block: `parallel` mixes all branches of one input (Eq. 3); `sequential` chains them, each
            with its own norm and residual, in the order of `branches`.
        branches: names in `pha.model.BRANCHES`; the primary FFN comes after them and is not one.
        branch_options: keyword arguments for the constructors of branches, by branch name.
        layer_pattern: branches of single layers in the place of `branches`, repeated over the
            stack. One with options of its own, over those of `branch_options`, is a mapping:
            `[[rg_lru], [rg_lru], [{attention: {window: 2048}}]]`.
        attention_layers: layers, counted from 0, whose only branch is `attention`, whatever
            the others say, as in stacks of state spaces with a few layers of attention.
        num_attention_heads: H, query heads.
        num_key_value_heads: G, shared key-value heads.
        head_dim: K, size of a head (even, for the rotary embedding).
        primary_ffn_expansion: hidden size of the primary FFN over d; 0 for layers without one.
        auxiliary_ffn_expansion: hidden size of the `aux_ffn` branch over d.
        state_size: n, a multiple of 16 [ours: chosen to reach the paper's parameter counts].
        dt_min: shortest initial time step of the state space, log-uniform [ours].
        dt_max: longest initial time step [ours].
        input_scaling: the formula of b in Eq. 2: `unit-variance` is sqrt(1 - a^2),
            `zero-order-hold` is 1 - a [ours, measured equal; the first keeps slow states at unit
            scale].
        rope_theta: base of the rotary embedding [ours: the value was lost].
        attention_window: how many keys a query sees, its own included; None is all of them. With a
            window, cost is linear and memory constant in length, and the state space alone carries
            what lies behind it [ours: not in the paper].
        attention_logits: `scaled-cosine` as in the paper, or `dot-product` over sqrt(K).
        residual: `pre` is x + f(RMSNorm(x)) / alpha, `post` is RMSNorm(alpha x + f(x)), the two
            sound readings of "scales residual connections by alpha" [ours: pre].
        mixing_weights: `learned`, Eq. 4, or `fixed`: equal weights that are not trained, the
            control for what learning them is worth.
        branch_norms: an RMSNorm on each branch output before the mix, as in Eq. 3; only to measure
            what they are worth is there a reason to leave them out.
        deepnorm_init: DeepNorm's scaled Xavier initialisation, only with `post` [ours: off].
        dropout: probability, on the embedding and on what enters the residual stream.
        initializer_range: standard deviation of the linear layers' initial weights [ours].
        rms_norm_eps: added to the mean square in every RMSNorm [ours].
    """

    preset: str | None = None
    vocab_size: int = 50257
    hidden_size: int = 608
    num_hidden_layers: int = 12
    block: Literal["parallel", "sequential"] = "parallel"
    branches: list[str] = field(default_factory=lambda: ["gss", "attention", "aux_ffn"])
    branch_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    layer_pattern: list[list[str | dict[str, dict[str, Any]]]] = field(default_factory=list)
    attention_layers: list[int] = field(default_factory=list)
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 76
    primary_ffn_expansion: float = 2.0
    auxiliary_ffn_expansion: float = 0.67
    state_size: int = 2176
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    input_scaling: Literal["unit-variance", "zero-order-hold"] = "unit-variance"
    rope_theta: float = 10000.0
    attention_window: int | None = None
    attention_logits: Literal["scaled-cosine", "dot-product"] = "scaled-cosine"
    residual: Literal["pre", "post"] = "pre"
    mixing_weights: Literal["learned", "fixed"] = "learned"
    branch_norms: bool = True
    deepnorm_init: bool = False
    dropout: float = 0.0
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5

    @property
    def residual_alpha(self) -> float:
        """DeepNorm's alpha = (2 L)^(1/4)."""
        return float((2 * self.num_hidden_layers) ** 0.25)

    @property
    def deepnorm_beta(self) -> float:
        """DeepNorm's beta = (8 L)^(-1/4), the gain of value, output and FFN weights."""
        return float((8 * self.num_hidden_layers) ** -0.25)

    @property
    def branch_names(self) -> list[str]:
        """Every branch that some layer may have."""
        added = [["attention"]] if self.attention_layers else []
        layers: list[_Layer] = [*self._patterns(), *added]
        return list(dict.fromkeys(name for layer in layers for name, _ in _named(layer)))

    def layer_branches(self, layer_idx: int) -> dict[str, dict[str, Any]]:
        """Names of the branches of one layer, each with its options."""
        return self.branches_of_layers([layer_idx])[0]

    def branches_of_layers(self, layers: Iterable[int] | None = None) -> list[dict[str, Any]]:
        """`layer_branches` of these layers, or of all.

        Each attribute is read once: a configuration of transformers takes a microsecond for it.
        """
        patterns, options, alone = self._patterns(), self.branch_options, self.attention_layers
        return [
            {
                name: options.get(name, {}) | own
                for name, own in _named(
                    ["attention"] if layer in alone else patterns[layer % len(patterns)]
                )
            }
            for layer in (range(self.num_hidden_layers) if layers is None else layers)
        ]

    def attention_options(self) -> list[dict[str, Any]]:
        """Options of the branch `attention` in each layer that has it."""
        return [x["attention"] for x in self.branches_of_layers() if "attention" in x]

    def _patterns(self) -> list[_Layer]:
        return [*self.layer_pattern] or [self.branches]

    def ffn_size(self, expansion: float) -> int:
        """Hidden size of an FFN: `expansion` times d, to the nearest multiple of 8 [ours].

        Raises:
            PHAError: an expansion that is no number, or too large.
        """
        self._require_expansion("an expansion", expansion)
        return 8 * round(expansion * self.hidden_size / 8)

    @staticmethod
    def _require_expansion(name: str, value: Any) -> None:
        is_number = isinstance(value, int | float) and abs(value) <= MOST  # which a NaN is not
        _require(is_number, f"{name} is {value!r}; give a number, at most {MOST:,}")

    def check(self) -> None:
        """Refuse impossible shapes.

        Raises:
            PHAError: naming the field, its value and what would be right.
        """
        hints = get_type_hints(ArchitectureConfig)
        for item in fields(ArchitectureConfig):
            value, hint = getattr(self, item.name), hints[item.name]
            wanted = f"it must be {'a finite number' if hint is float else item.type}"
            if get_origin(hint) is Literal:
                wanted = f"choose {' or '.join(get_args(hint))}"
            _require(_is_a(value, hint), f"{item.name} is {value!r}; {wanted}")
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "state_size",
        ):
            most = MOST_LAYERS if name == "num_hidden_layers" else MOST
            value = getattr(self, name)
            _require(1 <= value <= most, f"{name} is {value}; at least 1 and at most {most:,}")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
            f"num_key_value_heads ({self.num_key_value_heads})",
        )
        _require(
            self.head_dim % 2 == 0,
            f"head_dim is {self.head_dim}; the rotary embedding needs an even number",
        )
        _require(
            self.state_size % 16 == 0,
            f"state_size is {self.state_size}; it must be a multiple of 16, one HiPPO group",
        )
        _require(
            0 < self.dt_min <= self.dt_max,
            f"dt_min ({self.dt_min}) must be above 0 and at most dt_max ({self.dt_max})",
        )
        _require(
            self.attention_window is None or self.attention_window >= 2,
            f"attention_window is {self.attention_window}; at least 2, or null for no window",
        )
        _require(0 <= self.dropout < 1, f"dropout is {self.dropout}; it must be in [0, 1)")
        for name in ("rope_theta", "initializer_range", "rms_norm_eps"):
            value = getattr(self, name)
            _require(value > 0, f"{name} is {value}; it must be above 0")
        _require(bool(self.branches), "branches is empty; name at least one, such as gss")
        layers: list[tuple[str, _Layer]] = [("branches", self.branches)]
        layers += ((f"layer {i} of layer_pattern", x) for i, x in enumerate(self.layer_pattern))
        for what, entries in layers:
            _require(
                bool(entries) and all(isinstance(x, str) or len(x) == 1 for x in entries),
                f"{what} is {entries}; name at least one, each by itself",
            )
            names = [name for name, _ in _named(entries)]
            _require(len(set(names)) == len(names), f"{what} names one twice: {', '.join(names)}")
        _require(
            self.residual == "post" or not self.deepnorm_init,
            "deepnorm_init needs residual post; with pre, leave it off",
        )
        last = self.num_hidden_layers - 1
        _require(
            self.attention_layers == sorted(set(self.attention_layers))
            and all(0 <= layer <= last for layer in self.attention_layers),
            f"attention_layers is {self.attention_layers}; name each layer once, in order, "
            f"from 0 to {last}",
        )
        unknown = set(self.branch_options) - set(self.branch_names)
        _require(not unknown, f"branch_options names {', '.join(sorted(unknown))}, not in branches")
        for name, may_be_zero in (
            ("primary_ffn_expansion", True),
            ("auxiliary_ffn_expansion", False),
        ):
            expansion = getattr(self, name)
            self._require_expansion(name, expansion)
            size = self.ffn_size(expansion)
            _require(
                size >= 8 or (may_be_zero and expansion == 0),
                f"{name} is {expansion}, a hidden size of {size}; at least 8 is needed"
                + (", or 0 for no FFN" if may_be_zero else ""),
            )


def _named(entries: _Layer) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and own options, of branches that are named with them or without."""
    for entry in entries:
        yield from ({entry: {}} if isinstance(entry, str) else entry).items()


def is_old(config: dict[str, Any]) -> bool:
    """Whether a configuration was written by an older version; see `pha.conversion`."""
    branches = config.get("branches")
    return (isinstance(branches, list) and "ffn" in branches) or not RENAMED.keys().isdisjoint(
        config
    )


def vars_of(config: ArchitectureConfig) -> dict[str, Any]:
    """The fields of an architecture as keyword arguments, of whatever class it is."""
    return {item.name: getattr(config, item.name) for item in fields(ArchitectureConfig)}


def _is_a(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_is_a(x, arguments[0]) for x in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_a(k, arguments[0]) and _is_a(v, arguments[1]) for k, v in value.items()
        )
    if origin in (Union, UnionType):
        return any(_is_a(value, x) for x in arguments)
    if origin is Literal:
        return value in arguments
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PHAError(f"model: {message}")
