"""A model of transformers that is not ours, in the same loop: what it can do is found by trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from pha.ops import linear_cross_entropy, token_statistics
from pha.ops.precision import accumulation_type
from pha.utils.errors import PHAError
from pha.utils.plain import is_plain_linear

_TRIAL = 24  # tokens of a trial: more than any convolution reaches back
_CUT = 11  # of them, where it is cut in two
_LARGE = 100.0  # rms of logits that any cap or scale would show in


@dataclass
class ForeignCache:
    """What a model remembers of the pieces that it has read, as arguments for the next one."""

    arguments: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0


class ForeignModel(nn.Module):
    """A causal language model of transformers, with the methods of ours that the loop calls.

    Attributes:
        inner: the model.
        chunked: whether its logits are a plain product of its last hidden states, so that the loss
            can go in chunks. `look` finds out; until then all logits are formed.
        longest: tokens that it can read at most, where positions are learned; else None.
    """

    no_decay: tuple[str, ...] = ()
    capped_rate: tuple[str, ...] = ()

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner = inner
        self.chunked = False
        self._continues: bool | None = None
        self._pads: bool | None = None
        self.no_decay = tuple(n for n, _ in self.named_parameters() if n.endswith("A_log"))
        reach = getattr(inner.config, "max_position_embeddings", None)
        embedding = inner.get_input_embeddings()
        tables = [
            module.num_embeddings
            for module in inner.modules()
            if isinstance(module, nn.Embedding) and module is not embedding
        ]
        learned = reach is not None and any(size >= reach for size in tables)
        self.longest: int | None = reach if learned else None

    @property
    def config(self) -> PreTrainedConfig:
        """Of the model."""
        return self.inner.config

    @property
    def generation_config(self) -> GenerationConfig:
        """Of the model."""
        found: GenerationConfig = self.inner.generation_config
        return found

    @generation_config.setter
    def generation_config(self, settings: GenerationConfig) -> None:
        self.inner.generation_config = settings

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.inner.device

    @property
    def head(self) -> nn.Module:
        """The output head."""
        found: nn.Module = self.inner.get_output_embeddings()
        return found

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the model as transformers does."""
        self.inner.save_pretrained(folder)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Of the model, by its own names."""
        return self.inner.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what `save_pretrained` has written."""
        return self.inner.load_state_dict(state_dict, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        shift_labels: Tensor,
        document_starts: Tensor | None = None,
        num_items_in_batch: int | float | None = None,
        label_places: Tensor | None = None,
    ) -> CausalLMOutput:
        """The loss of tokens (B, T) that are to predict `shift_labels` (B, T), as of our model."""
        x = self.states(input_ids, document_starts).flatten(0, 1)
        targets = shift_labels.flatten()
        if label_places is not None:
            x, targets = x[label_places], targets[label_places]
        if self._in_chunks():
            total = linear_cross_entropy(x, self.head.weight, targets)  # type: ignore[arg-type]
        else:
            total = F.cross_entropy(x.to(accumulation_type(x)), targets, reduction="sum")
        return CausalLMOutput(loss=total / (num_items_in_batch or len(targets)))

    def states(
        self,
        input_ids: Tensor,
        document_starts: Tensor | None = None,
        cache: ForeignCache | None = None,
    ) -> Tensor:
        """What `token_statistics` takes for tokens (B, T): (B, T, d), or the logits (B, T, V).

        Packed documents go through the model apart, each as a sequence of its own.

        Raises:
            PHAError: more tokens than it has positions, or it cannot go on from a cache.
        """
        if document_starts is not None:
            return self._apart(input_ids, document_starts)
        cached = {} if cache is None else cache.arguments
        self._require_room(input_ids.shape[1] + (0 if cache is None else cache.tokens))
        if cache is not None and cache.tokens:
            self._require_continuation()
        model = self.inner.base_model if self._in_chunks() else self.inner
        output = model(input_ids, use_cache=cache is not None, **cached)
        if cache is not None:
            cache.tokens += input_ids.shape[1]
            for name in ("past_key_values", "cache_params"):
                if getattr(output, name, None) is not None:
                    cache.arguments[name] = output[name]
        x: Tensor = output.last_hidden_state if self._in_chunks() else output.logits
        return x

    def token_statistics(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What `pha.ops.token_statistics` says of what `states` gave, (N, d) or (N, V)."""
        if self._in_chunks():
            return token_statistics(x, self.head.weight, targets)  # type: ignore[arg-type]
        wide = x.to(accumulation_type(x))
        return F.cross_entropy(wide, targets, reduction="none"), wide.argmax(-1) == targets

    def new_cache(self) -> ForeignCache:
        """An empty cache."""
        return ForeignCache()

    def generate(self, input_ids: Tensor, **arguments: Any) -> Any:
        """As of transformers.

        Raises:
            PHAError: more tokens than it has positions, a prompt in pieces or prompts side by side
                that it cannot read.
        """
        settings: GenerationConfig = arguments["generation_config"]
        self._require_room(input_ids.shape[1] + int(settings.max_new_tokens or 0))
        if settings.prefill_chunk_size:
            self._require_continuation()
        mask: Tensor | None = arguments.get("attention_mask")
        if mask is not None and not mask.all():
            self._require_padding()
        # RecurrentGemma keeps its state in its modules, and a prompt of one token would go on
        # from that of the text before; reading without a cache clears it.
        self.inner(input_ids[:, :1], use_cache=False)
        return self.inner.generate(input_ids, **arguments)

    @torch.no_grad()
    def look(self) -> ForeignModel:
        """Find out by trial whether the loss can go in chunks.

        Raises:
            PHAError: a later token changes what comes out before it.
        """
        with self._trial() as ids:
            self.chunked = self._head_is_plain(ids)
            other = torch.cat([ids[:, :_CUT], ids[:, _CUT:].flip(1)], dim=1)
            before, after = self.states(ids), self.states(other)
        if not _close(before[:, :_CUT], after[:, :_CUT]):
            raise PHAError(
                f"a {self.config.model_type} model sees tokens that come later: it is no causal "
                "language model"
            )
        return self

    def _in_chunks(self) -> bool:
        return self.chunked and is_plain_linear(self.head)

    def _head_is_plain(self, ids: Tensor) -> bool:
        """Whether the logits are what the head makes of the body's last hidden states, at any size.

        The class forms them from its own states, and from larger ones that are slipped in.
        """
        inner, head = self.inner, self.head
        body = inner.base_model
        weights = {id(p) for p in (*body.parameters(), *head.parameters())}
        if body is inner or not is_plain_linear(head):
            return False
        if not all(id(p) in weights for p in inner.parameters()):
            return False
        factor, seen = 1.0, ids.new_empty(0)

        def enlarge(_: nn.Module, __: Any, output: Any) -> Any:
            nonlocal seen
            output["last_hidden_state"] = seen = output["last_hidden_state"] * factor
            return output

        handle = body.register_forward_hook(enlarge)
        try:
            for _ in range(2):
                own = inner(ids, use_cache=False).logits
                if not _close(own, F.linear(seen, head.weight)):  # type: ignore[arg-type]
                    return False
                factor = _LARGE / float(own.float().square().mean().sqrt())
        except (KeyError, TypeError):  # a body that gives something else
            return False
        finally:
            handle.remove()
        return True

    @torch.no_grad()
    def _require_continuation(self) -> None:
        """Refuse a model that does not go on from its cache as if it had read all at once."""
        if self._continues is None:
            self._continues = True  # for the trial itself
            try:
                with self._trial() as ids:
                    cache, whole = self.new_cache(), self.states(ids)
                    parts = [self.states(piece, cache=cache) for piece in ids.split(_CUT, dim=1)]
                self._continues = _close(torch.cat(parts, dim=1), whole, 1e-4)
            except (RuntimeError, TypeError, ValueError):
                self._continues = False
        if not self._continues:
            raise PHAError(
                f"transformers' {self.config.model_type} does not go on from its cache with more "
                "than one token: read all at once (a larger --piece), or use `pha eval`"
            )

    @torch.no_grad()
    def _require_padding(self) -> None:
        """Refuse prompts of several lengths for a model that reads what pads them."""
        if self._pads is None:
            settings = GenerationConfig(
                max_new_tokens=1, pad_token_id=0, return_dict_in_generate=True, output_logits=True
            )
            with self._trial() as ids:
                alone = ids[:, :_CUT]
                padded = F.pad(alone, (5, 0))
                mask = F.pad(torch.ones_like(alone), (5, 0))
                one, two = (
                    self.inner.generate(x, attention_mask=m, generation_config=settings).logits[0]
                    for x, m in ((alone, torch.ones_like(alone)), (padded, mask))
                )
            self._pads = _close(one, two, 1e-4)
        if not self._pads:
            raise PHAError(
                f"transformers' {self.config.model_type} reads what pads shorter prompts: "
                "continue one at a time (--batch-size 1)"
            )

    def _require_room(self, tokens: int) -> None:
        if self.longest is not None and tokens > self.longest:
            raise PHAError(
                f"this {self.config.model_type} has {self.longest} learned positions and cannot "
                f"read {tokens} tokens; ask for fewer (`pha eval` with --sequence-length)"
            )

    @contextmanager
    def _trial(self) -> Iterator[Tensor]:
        """Tokens (1, T) for a trial, without dropout."""
        was_training = self.training
        self.eval()
        length = min(_TRIAL, self.longest or _TRIAL)
        try:
            yield (torch.arange(length, device=self.device) % self.config.vocab_size)[None]
        finally:
            self.train(was_training)

    def _apart(self, input_ids: Tensor, document_starts: Tensor) -> Tensor:
        """`states` of rows whose documents go through the model as sequences of their own.

        They are sorted by length, and as many at a time as the batch has tokens. What pads them
        comes after them and so changes nothing.
        """
        begins = document_starts.clone()
        begins[:, 0] = True
        first = begins.flatten().nonzero().flatten().tolist()
        lengths = [b - a for a, b in zip(first, [*first[1:], input_ids.numel()], strict=True)]
        pieces = input_ids.flatten().split(lengths)
        order = sorted(range(len(pieces)), key=lambda i: -lengths[i])
        found: dict[int, Tensor] = {}
        while order:
            many = max(1, input_ids.numel() // lengths[order[0]])
            group, order = order[:many], order[many:]
            x = self.states(pad_sequence([pieces[i] for i in group], batch_first=True))
            found |= {i: row[: lengths[i]] for i, row in zip(group, x, strict=True)}
        return torch.cat([found[i] for i in range(len(pieces))]).unflatten(0, input_ids.shape)


def _close(x: Tensor, y: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors agree to within rounding, relative to the largest value."""
    if x.shape != y.shape:
        return False
    if x.dtype in (torch.bfloat16, torch.float16):
        tolerance = max(tolerance, 2e-2)
    x, y = x.float(), y.float()
    return bool((x - y).abs().max() <= tolerance * y.abs().max())
