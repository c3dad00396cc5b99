"""Models of transformers that are not ours, in the same loop: what they can do is found by trial.

Loading them runs no code but that of transformers: weights are safetensors, and a configuration
that brings code of its own is refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import logging

from pha.ops import linear_cross_entropy, token_statistics
from pha.ops.precision import accumulation_type
from pha.peers import PEERS, PREFIX, peer_config, peer_names
from pha.utils.errors import PHAError, is_out_of_memory
from pha.utils.files import user_path
from pha.utils.formats import read_json
from pha.utils.plain import is_plain_linear
from pha.utils.text import shorten

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.bpe"]
_TIMEOUT = 10  # seconds for the Hub's first answer
_TRIAL = 24  # tokens of a trial: more than any convolution reaches back
_CUT = 11  # of them, where it is cut in two
_LARGE = 100.0  # rms of logits that any cap or scale would show in
# Constants that earlier versions of transformers wrote beside the weights.
_CONSTANTS = (".attn.masked_bias", ".rotary_emb.inv_freq")
# In what a shape is changed by, these are settled elsewhere.
_SETTLED = ("vocab_size", "dtype", "architectures", "transformers_version")


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

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what `save_pretrained` has written."""
        return self.inner.load_state_dict(state_dict, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        shift_labels: Tensor,
        document_starts: Tensor | None = None,
        num_items_in_batch: int | float | None = None,
    ) -> CausalLMOutput:
        """The loss of tokens (B, T) that are to predict `shift_labels` (B, T), as of our model."""
        x = self.states(input_ids, document_starts).flatten(0, 1)
        targets = shift_labels.flatten()
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
            PHAError: more tokens than it has positions, or a prompt in pieces that it cannot read.
        """
        settings: GenerationConfig = arguments["generation_config"]
        self._require_room(input_ids.shape[1] + int(settings.max_new_tokens or 0))
        if settings.prefill_chunk_size:
            self._require_continuation()
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


def source_folder(name: str) -> Path:
    """The folder that a name without `hf:` stands for: a folder here, or a model of the Hub.

    Of a model of the Hub, configuration, tokenizer and safetensors are fetched into its cache.

    Raises:
        PHAError: neither, or the Hub does not answer.
    """
    folder = user_path(name)
    if folder.is_dir():
        return folder
    if not _HUB_NAME.fullmatch(name):
        raise PHAError(f"no folder {name}, and no name of the Hub's form OWNER/NAME")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, etag_timeout=_TIMEOUT))
    except RepositoryNotFoundError as error:
        raise PHAError(
            f"the Hugging Face Hub has no public model {name!r}: check the name, or log in with "
            "`hf auth login` if it is private or gated"
        ) from error
    except Exception as error:  # network errors have no common class
        raise PHAError(
            f"no folder {name}, and the Hugging Face Hub does not answer for a model of that name: "
            "check the network, or download it elsewhere and give its folder"
        ) from error


def check_config(folder: Path) -> dict[str, Any]:
    """The configuration in a folder, of a class that transformers itself has.

    Raises:
        PHAError: no such file, an unknown kind of model, code of its own, or quantised weights.
    """
    config = read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if "auto_map" in (config if kind is not None else ()):
        raise PHAError(
            f"{folder} brings code of its own (auto_map in config.json), which is never run; use a "
            "model whose class is part of transformers"
        )
    try:
        known = bool(kind) and AutoConfig.for_model(kind)
    except Exception:  # whatever transformers makes of such a name
        known = False
    if not known:
        raise PHAError(f"{folder} holds a {kind!r} model, which this version of transformers lacks")
    if config.get("quantization_config") is not None:
        raise PHAError(f"{folder} holds quantised weights; use the model's own, in full precision")
    return dict(config)


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Say in a line what transformers makes of bad files or fields."""
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except PHAError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise PHAError(f"{what} ({shorten(str(error), 200)})") from error
    finally:
        logging.set_verbosity(verbosity)


def shape_config(
    name: str, vocab_size: int, positions: int, changes: Mapping[str, Any]
) -> PreTrainedConfig:
    """The configuration of a model to be trained from random weights.

    Args:
        name: a peer, a folder or a model of the Hub.
        vocab_size: V.
        positions: the sequence length of its training.
        changes: fields to change.

    Raises:
        PHAError: no such model, a field that its class does not have, or an impossible value.
    """
    if name in PEERS:
        kind, shape = PEERS[name].model_type, PEERS[name].shape
    else:
        if not (user_path(name).is_dir() or "/" in name):
            close = difflib.get_close_matches(name, PEERS, n=2, cutoff=0.4) or peer_names()
            raise PHAError(
                f"there is no {PREFIX}{name}; did you mean {' or '.join(PREFIX + c for c in close)}"
                "? A folder or OWNER/NAME of the Hub works too"
            )
        shape = check_config(source_folder(name))
        kind = shape.pop("model_type")
        special = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
        alias = getattr(AutoConfig.for_model(kind), "attribute_map", {})
        left_out = {*_SETTLED, *special, *(alias.get(key, key) for key in special)}
        shape = {key: value for key, value in shape.items() if key not in left_out}
    with in_one_line(f"transformers refuses the shape of {PREFIX}{name}"):
        known = peer_config(kind, shape, vocab_size, positions)
        _require_fields(known, changes)
        return peer_config(kind, {**shape, **changes}, vocab_size, positions)


def _require_fields(config: PreTrainedConfig, changes: Mapping[str, Any]) -> None:
    """Refuse fields that a class of transformers does not have, which it would take in silence."""
    for key in changes:
        if key.startswith("_") or key in _SETTLED or not hasattr(config, key):
            near = difflib.get_close_matches(key, vars(config), n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise PHAError(f"transformers.set: {config.model_type} has no field {key} to set{hint}")


def make_foreign(config: PreTrainedConfig) -> ForeignModel:
    """A model with random weights in float32.

    Raises:
        PHAError: an impossible shape.
    """
    with in_one_line(f"transformers cannot make this {config.model_type}"):
        return ForeignModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def _tensors(path: Path) -> int:
    """How many a file of safetensors holds."""
    with safe_open(path, "pt") as file:
        return len(file.keys())


def load_foreign(
    folder: Path, dtype: torch.dtype, changes: Mapping[str, Any] = MappingProxyType({})
) -> ForeignModel:
    """Load the model in a folder, from safetensors only.

    Args:
        folder: with config.json and weights, whose names `pha.loading` has checked.
        dtype: of the weights.
        changes: fields of its configuration to change, such as dropout.

    Raises:
        PHAError: see `check_config`; weights that are no safetensors, damaged, or of another model.
    """
    config = check_config(folder)
    files = [path for path in folder.glob("*.safetensors") if path.is_file()]
    if not files:
        raise PHAError(
            f"{folder} has no safetensors; other weights are pickled programs and are not read: "
            "convert them elsewhere"
        )
    with in_one_line(f"{folder} is damaged and cannot be loaded"):
        tensors = sum(map(_tensors, files))
        layers = max(int(config.get(k) or 0) for k in ("num_hidden_layers", "n_layer", "n_layers"))
        settings = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **changes
        )
        _require_fields(settings, changes)
        parameters = 0
        if layers <= tensors:
            with torch.device("meta"):
                blank = AutoModelForCausalLM.from_config(settings)
            parameters = sum(p.numel() for p in blank.parameters())
        size = sum(path.stat().st_size for path in files)
        if layers > tensors or parameters > size:
            raise PHAError(
                f"{folder}/config.json describes another model than its weights of {size:,} bytes; "
                "get both from one place"
            )
        inner, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=settings,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    wrong = [name for name in found["unexpected_keys"] if not name.endswith(_CONSTANTS)]
    wrong += found["missing_keys"]
    wrong += [name for name, *_ in found["mismatched_keys"]]
    if wrong:
        raise PHAError(
            f"{folder}: config.json and the weights are of two models, as they differ in "
            f"{min(wrong)}; get both from one place"
        )
    # What a file beside the weights says of sampling is not what was asked for.
    inner.generation_config = GenerationConfig()
    return ForeignModel(inner)
