"""The backbone: embedding, L identical layers, final norm; and how its weights start."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pha.nn.attention import GroupedQueryAttention, rotary_angles
from pha.nn.block import BLOCKS, ParallelBlock
from pha.nn.branches import Sequence, StateCache
from pha.nn.config import ArchitectureConfig
from pha.nn.gss import GatedStateSpace
from pha.nn.mixing import LearnableMixing
from pha.nn.norm import RMSNorm
from pha.ops.attention import attention_mask
from pha.ops.precision import compute_type


class Backbone(nn.Module):
    """Tokens to hidden states: sqrt(d) * embedding, L blocks, RMSNorm [ours].

    The output head is tied with the embedding and belongs to the language model around this.
    """

    def __init__(self, config: ArchitectureConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        block = BLOCKS[config.block]
        self.layers = nn.ModuleList(block(config, i) for i in range(config.num_hidden_layers))
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
        past_length: int = 0,
    ) -> Tensor:
        """Hidden states (B, T, d) after the final norm, in the compute type.

        Args:
            input_ids: (B, T) tokens, or
            inputs_embeds: (B, T, d) in their place, before the scaling by sqrt(d).
            positions: (B or 1, T); counts on from `past_length` when absent. Only differences
                matter, since attention is rotary.
            document_starts: (B, S) bool over cached and new tokens, true where one begins.
            token_mask: (B, S) bool over cached and new tokens, false at padding.
            cache: the model's state so far; updated.
            past_length: number of tokens in the cache, S - T.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        T = inputs_embeds.shape[1]
        S = past_length + T
        if positions is None:
            positions = torch.arange(past_length, S, device=inputs_embeds.device).unsqueeze(0)
        sequence = Sequence(
            rotary=rotary_angles(positions, self.config.head_dim, self.config.rope_theta),
            attention_mask=attention_mask(T, S, inputs_embeds.device, document_starts, token_mask),
            document_starts=None if document_starts is None else document_starts[:, -T:],
            token_mask=None if token_mask is None else token_mask[:, -T:],
            cache=cache,
        )
        x = self.dropout(inputs_embeds * math.sqrt(self.config.hidden_size))
        for layer in self.layers:
            x = layer(x, sequence)
        return self.norm(x).to(compute_type(x))

    @torch.no_grad()
    def mixing_weights(self) -> list[dict[str, dict[str, float]]]:
        """Per layer `{"weights": {branch: w}, "effective": {branch: share}}`; [] if sequential."""
        layers = []
        for layer in self.layers:
            if isinstance(layer, ParallelBlock):
                mixing = layer.mixing
                weights, shares = mixing.weights().tolist(), mixing.effective_shares().tolist()
                layers.append(
                    {
                        "weights": dict(zip(mixing.names, weights, strict=True)),
                        "effective": dict(zip(mixing.names, shares, strict=True)),
                    }
                )
        return layers


def initialise(module: nn.Module, config: ArchitectureConfig) -> None:
    """Set the starting values of `module`'s own parameters (not of its children).

    Linear layers are normal with `initializer_range`; the embedding has std d^(-1/2), so that
    the tied head gives logits of order one [ours]. With `deepnorm_init`, linear layers follow
    DeepNorm: Xavier-normal with gain beta for value, output and FFN weights, gain 1 for q and k.
    """
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=config.hidden_size**-0.5)
    elif isinstance(module, RMSNorm | LearnableMixing | GatedStateSpace | GroupedQueryAttention):
        module.reset_parameters()
    elif isinstance(module, nn.Linear) and not config.deepnorm_init:
        nn.init.normal_(module.weight, std=config.initializer_range)
    elif isinstance(module, nn.Linear):
        gain = 1.0 if getattr(module, "unit_gain", False) else config.deepnorm_beta
        nn.init.xavier_normal_(module.weight, gain=gain)
