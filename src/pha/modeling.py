"""The transformers face of `pha.nn`: configuration, causal language model, cache adapter."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from pha.nn import ArchitectureConfig, Backbone
from pha.nn.model import initialise
from pha.nn.presets import preset
from pha.ops import linear_cross_entropy
from pha.utils.errors import PHAError


class PHAConfig(ArchitectureConfig, PreTrainedConfig):
    """`ArchitectureConfig` as a transformers configuration (saved as config.json).

    Raises:
        PHAError: an impossible shape (see `ArchitectureConfig.check`).
    """

    model_type: ClassVar[str] = "pha"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.check()
        super().__post_init__(**kwargs)
        if not self.tie_word_embeddings:
            raise PHAError("model: tie_word_embeddings is false; the paper ties them, and so do we")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> PHAConfig:
        """A published configuration by name (`pha params` lists them), fields replaced at will.

        Raises:
            PHAError: an unknown preset or an impossible shape.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(overrides) - set(known)):
            close = difflib.get_close_matches(unknown[0], known, n=2) or ["a field of PHAConfig"]
            raise PHAError(
                f"model: there is no field {unknown[0]}; did you mean {' or '.join(close)}?"
            )
        return cls(**(preset(name) | overrides))

    @property
    def layer_types(self) -> list[str]:
        """What each layer keeps in a transformers cache.

        Without attention the first layer still has room for keys, which then count the past.
        """
        kinds = {
            (True, True): "hybrid",
            (True, False): "full_attention",
            (False, True): "linear_attention",
            (False, False): "full_attention",
        }
        attention, state = "attention" in self.branches, "gss" in self.branches
        return [kinds[True, state]] + [kinds[attention, state]] * (self.num_hidden_layers - 1)


class _CacheAdapter:
    """`pha.nn.StateCache` on top of a transformers cache, which stays the only store."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def length(self) -> int:
        """Tokens seen so far."""
        return int(self.cache.get_seq_length())

    def count(self, x_BTd: Tensor) -> None:
        """Note T more tokens where no keys do: transformers asks every cache for its length."""
        marks = x_BTd.new_zeros(x_BTd.shape[0], 1, x_BTd.shape[1], 1, dtype=torch.bool)
        self.cache.update(marks, marks, 0)

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self.cache.update(key, value, layer_idx)

    def recurrent_state(self, layer_idx: int) -> Tensor | None:
        layer = self.cache.layers[layer_idx]
        return layer.recurrent_states[0] if layer.has_previous_state[0] else None

    def set_recurrent_state(self, layer_idx: int, state: Tensor) -> None:
        self.cache.update_recurrent_state(state, layer_idx)
        # transformers marks a layer as started only with its convolution state; there is none here.
        self.cache.layers[layer_idx].has_previous_state[0] = True


class PHAPreTrainedModel(PreTrainedModel):
    """Weights, saving and loading, shared by every PHA model."""

    config: PHAConfig
    config_class = PHAConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["ParallelBlock", "SequentialBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True
    # Decay rates, time steps and mixing scalars are float32 whatever the rest is loaded in.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["log_A", "log_dt", "theta", "logit_scale"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config)


class PHAForCausalLM(PHAPreTrainedModel, GenerationMixin):
    """The Parallel Hybrid Architecture with its tied language-modelling head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PHAConfig) -> None:
        super().__init__(config)
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_starts: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where labels are given.

        Args:
            input_ids: (B, T) tokens.
            attention_mask: (B, S) over cached and new tokens, 0 at padding on either side.
            position_ids: (B, T); may be left out, since positions enter only as differences.
            past_key_values: the model's whole state: keys, values and recurrent states.
            inputs_embeds: (B, T, d) in place of `input_ids`.
            labels: (B, T) aligned with `input_ids`; -100 is ignored. Gives the loss.
            use_cache: return the state; off while training.
            logits_to_keep: how many last positions get logits (0: all), or which.
            document_starts: (B, S) bool, true where a packed document begins.
            shift_labels: (B, T) the token that follows each one, instead of `labels`.
            num_items_in_batch: what the summed loss is divided by; the number of labels if absent.

        Returns:
            loss (nats per token), logits (B, T', V), past_key_values. While training with labels
            there are no logits: the loss never forms them all.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise PHAError("give exactly one of input_ids and inputs_embeds")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        use_cache = use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        cache = None if past_key_values is None else _CacheAdapter(past_key_values)
        x = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            positions=position_ids,
            document_starts=document_starts,
            token_mask=_token_mask(attention_mask),
            cache=cache,
            past_length=0 if cache is None else cache.length(),
        )
        if cache is not None and "attention" not in self.config.branches:
            cache.count(x)
        loss = logits = None
        if labels is not None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        if shift_labels is not None:
            total = linear_cross_entropy(
                x.flatten(0, 1), self.lm_head.weight, shift_labels.flatten()
            )
            items = num_items_in_batch
            loss = total / ((shift_labels != -100).sum() if items is None else items)
        if loss is None or not self.training:
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.lm_head(x[:, kept])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


def _token_mask(attention_mask: Tensor | None) -> Tensor | None:
    """(B, S) bool with false at padding, or None where nothing is padded."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise PHAError("attention_mask must be (batch, tokens); documents go in document_starts")
    mask = attention_mask.bool()
    return None if bool(mask.all()) else mask


AutoConfig.register("pha", PHAConfig)
AutoModelForCausalLM.register(PHAConfig, PHAForCausalLM)
