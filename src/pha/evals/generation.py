"""Text sampled from a model: transformers' `generate` in left-padded batches, one seed one text."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)

from pha.caching import PHACache
from pha.loading import LoadedModel
from pha.utils.errors import PHAError
from pha.utils.hardware import synchronise

_DECODING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: how many tokens to add at most.
        temperature: logits are divided by it; 0 always takes the likeliest token.
        top_p: sample from the smallest set of tokens with at least this much probability.
        seed: of the random choices.
        stop: strings at which a text ends; neither they nor what follows is part of it.

    Raises:
        PHAError: settings out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise PHAError(f"the number of new tokens is {self.max_new_tokens}; at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise PHAError(f"temperature is {self.temperature}; it must be finite and not negative")
        if not 0 < self.top_p <= 1:
            raise PHAError(f"top-p is {self.top_p}; it must be in (0, 1]")
        if self.seed < 0:
            raise PHAError(f"the seed is {self.seed}; it must not be negative")
        if "" in self.stop:
            raise PHAError("a stop string is empty; give at least one character")


@dataclass(frozen=True)
class Continuation:
    """One generated text.

    Attributes:
        prompt: what was continued.
        text: the continuation alone.
        index: place of the prompt among the prompts, from 0.
        sample: which of the samples of this prompt, from 0.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens generated, an end-of-text token and a stop string's included.
        finish: why it ended: `length`, `end-of-text` or `stop`.
    """

    prompt: str
    text: str
    index: int
    sample: int
    prompt_tokens: int
    new_tokens: int
    finish: str


@dataclass
class Speed:
    """Time of the prompts (prefill) and of every token after a text's first (decoding), apart.

    Attributes:
        prompt_tokens: tokens of all prompts, without padding.
        prefill_seconds: until the first new tokens.
        decode_tokens: new tokens after the first of each text.
        decode_steps: forward passes that made them.
        decode_seconds: time of these.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class _Request:
    """A text to be made: sample number `sample` of prompt number `index`."""

    prompt: str
    ids: list[int]
    index: int
    sample: int


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to logits: the largest sum is then a draw from their softmax.

    The noise of a row depends on its key alone, non-negative integers, and not on the other rows.
    It is drawn on the CPU, whatever the device.
    """

    def __init__(self, keys: Sequence[Sequence[int]]) -> None:
        self.sources = [np.random.default_rng(key) for key in keys]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits, and the next noise of each row."""
        drawn = np.stack([source.standard_exponential(scores.shape[1]) for source in self.sources])
        # Minus the logarithm of an exponential variable is a Gumbel variable. None is zero.
        return scores - torch.from_numpy(drawn).to(scores).clamp_min(1e-30).log()


def draws(keys: Sequence[Sequence[int]], sampling: Sampling) -> LogitsProcessorList:
    """What turns logits into others whose largest is the choice; see `GumbelNoise` for the keys."""
    if sampling.temperature == 0:
        return LogitsProcessorList()
    return LogitsProcessorList(
        [
            TemperatureLogitsWarper(float(sampling.temperature)),
            TopPLogitsWarper(float(sampling.top_p)),
            GumbelNoise(keys),
        ]
    )


class _Stop(StopStringCriteria):
    """Ends a row at a stop string in its new text; transformers' own also looks at the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str], start: int) -> None:
        super().__init__(tokenizer, list(stop))
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        ended: Tensor = super().__call__(input_ids[:, self.start :], scores)
        return ended


@dataclass
class _Clock(StoppingCriteria):
    """Stops nothing; notes when each step was done."""

    times: list[float] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        synchronise(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Writer(TextStreamer):
    """Passes the text of one row on, word by word."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, **_DECODING)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    num_samples: int = 1,
    batch_size: int = 8,
    piece: int = 0,
    write: Callable[[str], None] | None = None,
    speed: Speed | None = None,
    past: PHACache | None = None,
) -> Iterator[Continuation]:
    """Continue prompts, each `num_samples` times; texts come when their batch is done.

    A text depends on the model, its prompt, the settings, the seed and its sample number, and
    neither on the other prompts nor on the size of the batch; but matrix products round by the
    shape of a batch, so where two tokens are equal to within rounding, either may be taken.

    Args:
        loaded: model and tokenizer.
        prompts: an empty one starts from the end-of-text token.
        sampling: how tokens are chosen.
        num_samples: texts for each prompt.
        batch_size: texts at a time; shorter prompts are padded on the left.
        piece: tokens of a prompt per forward pass, which bounds the memory of long ones; 0 for all.
        write: called with new text as it comes, for one text in all: word by word, or at its end
            where there are stop strings.
        speed: what this took is added to it.
        past: of one sequence, without padding, which all texts go on from; it stays as it is.

    Returns:
        An iterator over the texts, by prompt and then sample.

    Raises:
        PHAError: settings out of range, or an empty prompt without an end-of-text token.
    """
    for name, value in (("samples", num_samples), ("texts at a time", batch_size)):
        if value < 1:
            raise PHAError(f"the number of {name} is {value}; at least 1")
    if piece < 0:
        raise PHAError(f"a piece of the prompt is {piece} tokens; at least 1, or 0 for all at once")
    if num_samples > 1 and sampling.temperature == 0:
        raise PHAError("temperature 0 gives one text however often; ask for one sample")
    requests = [
        _Request(prompt, ids, index, number)
        for index, prompt in enumerate(prompts)
        for ids in [_prompt_ids(loaded.tokenizer, prompt)]
        for number in range(num_samples)
    ]
    speed = Speed() if speed is None else speed
    return (
        continuation
        for batch in _batches(requests, batch_size, alike=past is not None)
        for continuation in _continue(loaded, batch, sampling, piece, speed, write, past)
    )


def _batches(requests: list[_Request], size: int, alike: bool) -> Iterator[list[_Request]]:
    """The requests in order, up to `size` at a time; if `alike`, of as many tokens each.

    After a past there is no padding then, which would lie between tokens.
    """
    for _, group in groupby(requests, key=lambda request: len(request.ids) if alike else 0):
        together = list(group)
        yield from (together[i : i + size] for i in range(0, len(together), size))


def _prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids and tokenizer.eos_token_id is None:
        raise PHAError("a prompt is empty, and this tokenizer has no end-of-text token")
    return ids or [tokenizer.eos_token_id]


@torch.inference_mode()
def _continue(
    loaded: LoadedModel,
    batch: Sequence[_Request],
    sampling: Sampling,
    piece: int,
    speed: Speed,
    write: Callable[[str], None] | None,
    past: PHACache | None,
) -> list[Continuation]:
    """The texts of one batch."""
    model, tokenizer = loaded.model, loaded.tokenizer
    end = tokenizer.eos_token_id
    pad = 0 if end is None else end
    prompts = [torch.tensor(request.ids) for request in batch]
    ids = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([torch.ones_like(p) for p in prompts], True, 0, "left")
    read = int(mask.sum())
    cached: dict[str, Any] = {}
    if past is not None:
        cached["past_key_values"] = cache = past.copy()
        if len(batch) > 1:
            cache.batch_repeat_interleave(len(batch))
        # A byte for each token: the mask is all that still grows with them under a window.
        mask = F.pad(mask.bool(), (past.get_seq_length(), 0), value=True)
    keys = [[sampling.seed, request.sample, *request.ids] for request in batch]
    clock = _Clock()
    criteria = StoppingCriteriaList([clock])
    if sampling.stop:
        criteria.append(_Stop(tokenizer, sampling.stop, ids.shape[1]))
    synchronise(model.device)
    begin = time.perf_counter()
    # What settings beside the model add, such as beams or penalties, nobody has asked for here.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        tokens = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,  # the largest is the choice
                eos_token_id=end,
                pad_token_id=pad,
                prefill_chunk_size=piece or None,
            ),
            logits_processor=draws(keys, sampling),
            stopping_criteria=criteria,
            streamer=_Writer(tokenizer, write) if write and not sampling.stop else None,
            **cached,
        )
    finally:
        model.generation_config = own
    texts = [
        Continuation(r.prompt, text, r.index, r.sample, len(r.ids), count, finish)
        for r, row in zip(batch, tokens[:, ids.shape[1] :].tolist(), strict=True)
        for text, count, finish in [ended(tokenizer, row, sampling.stop)]
    ]
    if write and sampling.stop:
        write(texts[0].text)
    speed.prompt_tokens += read
    speed.prefill_seconds += clock.times[0] - begin
    speed.decode_tokens += sum(made.new_tokens - 1 for made in texts)
    speed.decode_steps += len(clock.times) - 1
    speed.decode_seconds += clock.times[-1] - clock.times[0]
    return texts


def ended(
    tokenizer: PreTrainedTokenizerFast, row: list[int], stop: Sequence[str]
) -> tuple[str, int, str]:
    """Where a text ends: the text, its tokens, and why, as `Continuation` has them.

    `row` has new tokens, and any padding after the end. A text ends before the string of `stop`
    that is complete first.
    """

    def text(count: int) -> str:
        decoded: str = tokenizer.decode(row[:count], **_DECODING)
        return decoded

    def stopped(count: int) -> bool:
        return any(string in text(count) for string in stop)

    finish, count = "length", len(row)
    if tokenizer.eos_token_id in row:
        finish, count = "end-of-text", row.index(tokenizer.eos_token_id) + 1
    if not stopped(count):
        return text(count), count, finish
    count = bisect_left(range(count), True, key=stopped)
    whole = text(count)
    places = [(whole.find(string), string) for string in stop if string in whole]
    _, first = min((place + len(string), place) for place, string in places)
    return whole[:first], count, "stop"
