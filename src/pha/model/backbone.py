"""The backbone: embedding, L identical layers, final norm; and how its weights start."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pha.model.attention import rotary_angles
from pha.model.block import BLOCKS, ParallelBlock
from pha.model.branches import Branch, Context, StateCache
from pha.model.config import ArchitectureConfig
from pha.model.mixing import LearnableMixing
from pha.model.norm import RMSNorm
from pha.ops.attention import attention_mask, block_mask, takes_blocks
from pha.ops.precision import compute_type


class Backbone(nn.Module):
    """Tokens to hidden states: sqrt(d) * embedding, L blocks, RMSNorm [ours].

    The output head is tied with the embedding and belongs to the language model around this.
    """

    def __init__(self, config: ArchitectureConfig) -> None:
        super().__init__()
        self.config = config
        self.make_layers(config)

    def make_layers(self, config: ArchitectureConfig) -> None:
        """Make the modules.

        Raises:
            PHAError: an impossible shape or branch.
        """
        config.check()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        block = BLOCKS[config.block]
        self.layers = nn.ModuleList(block(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False  # compute layers again rather than keep what they made
        # With the post reading each layer ends in a norm of its own.
        self.norm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps)
            if config.residual == "pre"
            else nn.Identity()
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        document_starts: Tensor | None = None,
        token_mask: Tensor | None = None,
        cache: StateCache | None = None,
        attention_backend: str | None = None,
        layer_inputs: list[Tensor] | None = None,
        attention_weights: list[Tensor] | None = None,
        own_losses: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states (B, T, d) after the final norm, in the compute type.

        Args:
            input_ids: (B, T) tokens, or
            inputs_embeds: (B, T, d) in their place, before the scaling by sqrt(d).
            positions: (B or 1, T); when absent, how many tokens of the document came before.
            document_starts: (B, S) bool over cached and new tokens, true where one begins.
            token_mask: (B, S) bool over cached and new tokens, false where there is no token.
            cache: the model's state so far; updated.
            attention_backend: name in the op table; None for the one of the device.
            layer_inputs: receives what enters each layer, (B, T, d).
            attention_weights: receives those of each layer with attention, (B, H, T, S).
            own_losses: receives losses of branches, see `Context`.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        context = self._context(
            inputs_embeds,
            positions,
            document_starts,
            token_mask,
            cache,
            attention_backend,
            attention_weights,
        )
        x = self.dropout(inputs_embeds * math.sqrt(self.config.hidden_size))
        for index, layer in enumerate(self.layers):
            if layer_inputs is not None:
                layer_inputs.append(x)
            # A layer gets what is its own, and so cannot tell which one it is: a compiled graph
            # serves all of them.
            if cache is not None:
                context = replace(context, cache=cache.layer(index))
            if own_losses is not None:
                context = replace(context, own_losses=[])
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, context, use_reentrant=False)
            else:
                x = layer(x, context)
            if own_losses is not None:
                own_losses += context.own_losses or []
        return self.norm(x).to(compute_type(x))

    def _context(
        self,
        inputs_embeds: Tensor,
        positions: Tensor | None,
        document_starts: Tensor | None,
        token_mask: Tensor | None,
        cache: StateCache | None,
        attention_backend: str | None,
        attention_weights: list[Tensor] | None,
    ) -> Context:
        """What all layers need to know of the tokens."""
        T, device, config = inputs_embeds.shape[1], inputs_embeds.device, self.config
        past, (keys, first) = (0, (T, 0)) if cache is None else (cache.length(), cache.key_range(T))
        query = torch.arange(T, device=device) + past
        key = torch.arange(keys, device=device) + first
        window, mask, places, blocks = config.attention_window, None, None, None
        # A static cache's keys have fixed places, filled or not.
        is_static = cache is not None and cache.is_static
        new: Tensor | slice = query if is_static else slice(past, None)
        is_masked = is_static or document_starts is not None or token_mask is not None
        if is_static:
            places = query - first
        if takes_blocks(attention_backend, T, device.type) and attention_weights is None:
            is_plain = not is_masked and keys == T
            blocks = {
                bound: None
                if bound is None and is_plain
                else block_mask(query, key, document_starts, token_mask, bound)
                for bound in self._bounds(keys)
            }
        elif is_static:
            mask = attention_mask(query, key, document_starts, token_mask, window)
            window = None
        elif is_masked:
            mask = attention_mask(query, key, document_starts, token_mask)
        if positions is None:
            positions = query[None]
            if document_starts is not None or token_mask is not None:
                positions = _counted(document_starts, token_mask)[:, new]
        return Context(
            positions=positions,
            rotary=rotary_angles(positions, config.head_dim, config.rope_theta),
            attention_mask=mask,
            attention_window=window,
            query_places=places,
            blocks=blocks,
            attention_backend=attention_backend,
            attention_weights=attention_weights,
            document_starts=None if document_starts is None else document_starts[:, new],
            token_mask=None if token_mask is None else token_mask[:, new],
        )

    def _bounds(self, keys: int) -> set[int | None]:
        """The windows of layers that hide some of so many keys, and None if one hides none."""
        found: set[int | None] = set()
        for branch in self.layers.modules():
            if isinstance(branch, Branch) and branch.keeps_keys:
                own = getattr(branch, "window", None), self.config.attention_window
                bound = min((w for w in own if w is not None), default=keys)
                found.add(bound if bound < keys else None)
        return found

    def mixing_weights(self) -> list[dict[str, dict[str, float]]]:
        """Per layer what `LearnableMixing.describe` says; [] if sequential."""
        return [x.mixing.describe() for x in self.layers if isinstance(x, ParallelBlock)]


def _counted(document_starts: Tensor | None, token_mask: Tensor | None) -> Tensor:
    """(B, S) position of each token in its document, from the masks over all (B, S)."""
    if token_mask is None:
        assert document_starts is not None
        token_mask = torch.ones_like(document_starts)
    before = token_mask.cumsum(-1) - token_mask.long()
    if document_starts is None:
        return before
    return before - torch.where(document_starts, before, 0).cummax(-1).values


def initialise(module: nn.Module, config: ArchitectureConfig, unit_gain: bool = False) -> None:
    """Set the starting values of `module`'s own parameters (not of its children).

    Linear layers are normal with `initializer_range`; the embedding has std d^(-1/2), so that
    the tied head gives logits of order one [ours]. With `deepnorm_init`, linear layers follow
    DeepNorm: Xavier-normal with gain beta, or 1 with `unit_gain`, as branches say it of their q and
    k and of the gate of Eq. 2 [ours].
    """
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=config.hidden_size**-0.5)
    elif isinstance(module, RMSNorm | LearnableMixing | Branch):
        module.reset_parameters()
    elif isinstance(module, nn.Linear) and config.deepnorm_init:
        nn.init.xavier_normal_(module.weight, gain=1.0 if unit_gain else config.deepnorm_beta)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=config.initializer_range)
