"""The model as transformers has it: body, causal language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin, GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from pha.caching import CacheAdapter, PHACache, SequencePieces
from pha.inputs import check_rows, packed_starts, token_mask
from pha.model.backbone import Backbone, initialise
from pha.model.branches import Branch
from pha.modeling.configuration import PHAConfig
from pha.ops.linear_cross_entropy import linear_cross_entropy, token_statistics
from pha.ops.precision import accumulation_type
from pha.utils.errors import PHAError
from pha.utils.plain import is_plain_linear

# transformers' names of attention implementations -> backends of ours; any other is the default.
_BACKENDS = {"eager": "naive"}
# Ways to write that go on from the past alone; all others try tokens and take them back.
_MODES = {
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
}


class PHAPreTrainedModel(PreTrainedModel):
    """Weights, saving and loading, shared by every PHA model."""

    config: PHAConfig
    config_class = PHAConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["ParallelBlock", "SequentialBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    # A state cannot be taken back: transformers refuses what would crop the cache.
    _is_stateful = True
    # Beginnings of the names of weights that a folder may lack: those of a new head.
    starts_anew: ClassVar[tuple[str, ...]] = ()

    def post_init(self) -> None:
        """What transformers does after the modules are made; they say what stays in float32."""
        special = {name for m in self.modules() for name in getattr(type(m), "float32", ())}
        self._keep_in_fp32_modules_strict = special
        branches = [module for module in self.modules() if isinstance(module, Branch)]
        self._unit_gain = {
            id(x) for b in branches for name, x in b.named_modules() if name in b.unit_gain
        }
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config, id(module) in self._unit_gain)

    @classmethod
    def from_pretrained(
        cls,
        *arguments: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **options: Any,
    ) -> Any:
        """As of transformers, but weights must be those of the configuration, no more, no less.

        With `output_loading_info` it is left to the caller to look at what is returned beside the
        model.

        Raises:
            PHAError: naming weights that are missing, left over or of another shape.
        """
        model, found = super().from_pretrained(
            *arguments, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        missing = [x for x in found["missing_keys"] if not x.startswith(cls.starts_anew)]
        problems = {"lack": missing, "also have": found["unexpected_keys"]}
        if output_loading_info:
            problems = {}
        if not ignore_mismatched_sizes:
            problems["have another shape of"] = [name for name, *_ in found["mismatched_keys"]]
        for what, names in problems.items():
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise PHAError(
                    f"{arguments[0]}: config.json and the weights are of two models, as the "
                    f"weights {what} {min(names)}{more}; get both from one place"
                )
        return (model, found) if output_loading_info else model

    def new_cache(self) -> Cache:
        """An empty cache for keys, values and recurrent states, which grows as it is used."""
        return PHACache(config=self.config)


class PHAModel(Backbone, PHAPreTrainedModel):
    """The backbone, from tokens to hidden states, as transformers calls the body of a model."""

    config: PHAConfig
    config_class = PHAConfig

    def __init__(self, config: PHAConfig) -> None:
        PHAPreTrainedModel.__init__(self, config)  # type: ignore[call-arg]
        self.make_layers(config)
        self._keeps_keys = config.keeps_keys  # which takes a while to find out
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        document_starts: Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last norm.

        Args:
            input_ids: (B, T) tokens, or
            attention_mask: (B, S) over cached and new tokens, 0 where there is no token: padding on
                either side, or holes. What comes out in these places means nothing.
            position_ids: (B or 1, T); may be left out, since positions enter only as differences.
                Where they do not grow, a new document begins.
            past_key_values: the model's whole state: keys, values and recurrent states; updated. Or
                the past of rows in training, a `CarriedCache`, or of pieces of sequences on several
                ranks, a `SequencePieces`, which are not.
            inputs_embeds: (B, T, d) in place of `input_ids`.
            use_cache: return the state; off while training.
            output_hidden_states: return what enters each layer, and what leaves the last norm.
            output_attentions: return the weights (B, H, T, S) of each layer with attention.
            document_starts: (B, S) bool, true where a packed document begins.
            others: `own_losses`, see `Context`; the rest is ignored, but for other ways to pack
                rows, which are refused.

        Returns:
            last_hidden_state (B, T, d), past_key_values, hidden_states, attentions.

        Raises:
            PHAError: both inputs or none, a cache of other sequences or another model, a mask of
                other tokens, or weights of attention that the model does not have.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise PHAError("give exactly one of input_ids and inputs_embeds")
        past_key_values = self.cache_for(past_key_values, use_cache)
        if tokens.dim() != (2 if inputs_embeds is None else 3):
            raise PHAError(f"tokens are {tuple(tokens.shape)}; give them as (batch, tokens)")
        batch, new = tokens.shape[:2]
        cache: CacheAdapter | None = None
        past: int | Tensor = 0
        if past_key_values is not None:
            if isinstance(past_key_values, CacheAdapter):
                cache = past_key_values
            else:
                cache = CacheAdapter(past_key_values, self.config)
            past = cache.length()
        total = past + new if isinstance(past, int) else None
        check_rows("attention_mask", attention_mask, batch, total)
        mask = token_mask(attention_mask, cache is not None, lambda: self.config.has_windows)
        if isinstance(cache, SequencePieces):
            self.require_pieces()
            if document_starts is not None:
                document_starts = cache.pieces.up_to_here(document_starts, 1)
        check_rows("document_starts", document_starts, batch, total)
        if document_starts is None:
            starts = packed_starts(position_ids, attention_mask, past, others)
            document_starts = None if starts is None else starts.expand(batch, -1)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        if output_attentions is None:
            output_attentions = bool(self.config.output_attentions)
        layer_inputs: list[Tensor] | None = [] if output_hidden_states else None
        weights: list[Tensor] | None = [] if output_attentions else None
        if cache is not None:  # after all that may be refused for other reasons
            cache.enter(batch, attention_mask)
        x = Backbone.forward(
            self,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            positions=position_ids,
            document_starts=document_starts,
            token_mask=mask,
            cache=cache,
            attention_backend=_BACKENDS.get(self.config._attn_implementation),
            layer_inputs=layer_inputs,
            attention_weights=weights,
            own_losses=others.get("own_losses"),
        )
        if weights == []:
            raise PHAError(
                "output_attentions: no layer of this model has attention; leave it out, and see "
                "model.model.mixing_weights() for what each branch gives"
            )
        if cache is not None:
            if not self._keeps_keys:
                cache.count(x)
            cache.leave(padded=mask is not None)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=None if layer_inputs is None else (*layer_inputs, x),
            attentions=None if weights is None else tuple(weights),
        )

    def require_pieces(self) -> None:
        """Refuse a model with a branch that cannot read a piece of a sequence.

        Raises:
            PHAError: naming it.
        """
        names = {
            name
            for layer in self.layers
            for name, branch in layer.branches.items()  # type: ignore[union-attr, operator]
            if not branch.in_pieces
        }
        if names:
            raise PHAError(
                f"model: branch {' and '.join(sorted(names))} cannot read a piece of a sequence; "
                "leave whole sequences on each rank"
            )

    def cache_for(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache of a call: the one that is given, or a new one where one is wanted."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return self.new_cache() if given is None and use_cache and not self.training else given


class PHAForCausalLM(PHAPreTrainedModel, GenerationMixin):
    """The Parallel Hybrid Architecture with its tied language-modelling head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    # What writes tokens without the layers, where there is something; see `pha.decoder.decode`.
    decode: ClassVar[Callable[..., Tensor | None] | None] = None

    def __init__(self, config: PHAConfig) -> None:
        super().__init__(config)
        # Before the body, whose weights start when it is made: all of them as they always have
        # for a seed, whatever the head draws.
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.model = PHAModel(config)
        self.lm_head = head
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_starts: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where labels are given.

        Args:
            input_ids: and what is not explained here: see `PHAModel.forward`.
            attention_mask: (B, S).
            position_ids: (B, T).
            past_key_values: the model's whole state.
            inputs_embeds: (B, T, d).
            labels: (B, T) aligned with `input_ids`; -100 is ignored. Gives the loss.
            use_cache: return the state; off while training.
            output_hidden_states: return what enters each layer, and what leaves the last norm.
            output_attentions: return the weights of attention.
            logits_to_keep: how many last positions get logits (0: all), or which.
            document_starts: (B, S) bool.
            num_items_in_batch: what the summed loss is divided by; the number of labels if absent.
            others: `shift_labels` (B, T), the token that follows each one, in place of `labels`.
                Trainer would look for it in every batch if it were an argument of its own. With it
                may come `label_places` (N,), where in the flattened batch there are labels: only
                these states then meet the head.

        Returns:
            loss (nats per token), logits (B, T', V), past_key_values, hidden_states, attentions.
            While training with labels there are no logits: the loss never forms them all.

        Raises:
            PHAError: as `PHAModel.forward`, or labels of another batch.
        """
        past_key_values = self.model.cache_for(past_key_values, use_cache)
        shift_labels: Tensor | None = others.pop("shift_labels", None)
        label_places: Tensor | None = others.pop("label_places", None)
        wanted = [output_attentions, output_hidden_states]
        wanted += [self.config.output_attentions, self.config.output_hidden_states]
        if not (any(wanted) or self.training) and all(
            x is None for x in (inputs_embeds, document_starts, labels, shift_labels)
        ):
            logits = self._decode(input_ids, past_key_values, attention_mask, position_ids)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        is_taught = torch.is_grad_enabled() and not (labels is None and shift_labels is None)
        own_losses: list[Tensor] | None = [] if is_taught else None
        body: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            document_starts=document_starts,
            own_losses=own_losses,
            **others,
        )
        x = body.last_hidden_state
        assert x is not None
        loss = logits = None
        if labels is not None:
            shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=-100)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if shift_labels is not None:
            if shift_labels.shape != x.shape[:2]:
                raise PHAError(
                    f"labels are {tuple(shift_labels.shape)} for a batch of {tuple(x.shape[:2])}; "
                    "give one for each token"
                )
            rows, targets = x.flatten(0, 1), shift_labels.flatten()
            if label_places is None:
                total, logits = self._summed_loss(rows, targets)
            else:
                total, _ = self._summed_loss(rows[label_places], targets[label_places])
            for own in own_losses or ():
                total = total + (own - own.detach())  # the gradient, not the value
            items = num_items_in_batch
            items = (shift_labels != -100).sum() if items is None else items
            loss = total / (items + (items == 0))  # a batch without labels teaches nothing
        if logits is not None:
            logits = logits.unflatten(0, x.shape[:2])[:, kept]
        elif loss is None or not self.training:
            logits = self.lm_head(x[:, kept])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )

    def _summed_loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy of states (N, d) summed over labels (N,); the logits, if it forms them."""
        if is_plain_linear(self.lm_head):
            weight = self.lm_head.weight
            return linear_cross_entropy(x, weight, targets), None
        logits = self.lm_head(x)
        wide = logits.to(accumulation_type(logits))
        return nn.functional.cross_entropy(wide, targets, reduction="sum"), logits

    def states(
        self,
        input_ids: Tensor,
        document_starts: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Last hidden states (B, T, d) of tokens (B, T), which go into a cache if there is one."""
        body: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            document_starts=document_starts,
        )
        assert body.last_hidden_state is not None
        return body.last_hidden_state

    def token_statistics(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What `pha.ops.token_statistics` says of hidden states (N, d), whatever the head is."""
        if is_plain_linear(self.lm_head):
            return token_statistics(x, self.lm_head.weight, targets)
        logits = self.lm_head(x)
        wide = logits.to(accumulation_type(logits))
        losses = nn.functional.cross_entropy(wide, targets, reduction="none")
        return losses, wide.argmax(-1) == targets

    def _decode(
        self,
        input_ids: Tensor | None,
        cache: Cache | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor | None:
        """Logits after one more token by compiled instructions, where that is possible."""
        decode = type(self).decode
        if decode is None or cache is None or input_ids is None or input_ids.shape[1:] != (1,):
            return None
        if isinstance(cache, CacheAdapter):  # one of training
            return None
        if self.config._attn_implementation in _BACKENDS:  # a backend that was asked for
            return None
        adapter = CacheAdapter(cache, self.config)
        return decode(self.model, self.lm_head, input_ids, adapter, attention_mask, position_ids)

    def _prepare_generation_config(
        self, *arguments: Any, **options: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        config, others = super()._prepare_generation_config(*arguments, **options)
        _require_possible(config)
        return config, others

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """Let `generate` hand over its mask as it is: (B, S), whatever the cache."""
        return attention_mask


def _require_possible(config: GenerationConfig) -> None:
    """Refuse ways to write that would need a state back, or keep the past in another form.

    Raises:
        PHAError: with what to do instead.
    """
    mode = config.get_generation_mode()  # without an assistant, which transformers refuses
    if mode not in _MODES:
        raise PHAError(
            f"generate: {mode.value.replace('_', ' ')} is not supported with stateful models, "
            "whose states cannot take tokens back; sample (do_sample=True) or search with num_beams"
        )
    if config.cache_implementation in ("quantized", "paged"):
        raise PHAError(
            f"generate: a {config.cache_implementation} cache has no room for states; leave "
            "cache_implementation out, or bound the keys by config.attention_window"
        )


# By this table Trainer knows that labels have to be shifted where it forms the loss itself.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["pha"] = PHAForCausalLM.__name__
