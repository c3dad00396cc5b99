"""Text sampled from a model: cached, in left-padded batches, streamed as whole characters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pha.evals.streaming import TextStream
from pha.loading import LoadedModel
from pha.utils.errors import PHAError
from pha.utils.hardware import synchronise

# A nucleus is nearly always among so many tokens, and finding them is ten times faster than sorting
# a vocabulary.
_CANDIDATES = 1024


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
            raise PHAError(f"temperature is {self.temperature}; it must not be negative")
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
        weight_bytes: bytes of all parameters, each once. A decoding step reads them all, whatever
            the batch: the embedding as the output head.
        prompt_tokens: tokens of all prompts, without padding.
        prefill_seconds: until the first new tokens.
        decode_tokens: new tokens after the first of each text.
        decode_steps: forward passes that made them.
        decode_seconds: time of these.
    """

    weight_bytes: int = 0
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """The counts and times, with rates: tokens/s and bytes/s of weights read in decoding."""

        def rate(amount: float, seconds: float) -> float:
            return amount / seconds if seconds else 0.0

        read = self.decode_steps * self.weight_bytes
        return {
            **vars(self),
            "prefill_tokens_per_second": rate(self.prompt_tokens, self.prefill_seconds),
            "decode_tokens_per_second": rate(self.decode_tokens, self.decode_seconds),
            "decode_weight_bytes_per_second": rate(read, self.decode_seconds),
        }


@dataclass
class _Row:
    """One text in the making."""

    prompt: str
    ids: list[int]
    index: int
    sample: int
    stream: TextStream
    new_tokens: int = 0
    finish: str = ""

    def result(self) -> Continuation:
        return Continuation(
            self.prompt,
            self.stream.text,
            self.index,
            self.sample,
            len(self.ids),
            self.new_tokens,
            self.finish,
        )


@dataclass
class _Progress(StoppingCriteria):
    """Sees every new token: passes text on, ends finished rows, takes the time."""

    rows: list[_Row]
    max_new_tokens: int
    eos_token_id: int | None
    write: Callable[[str], None]
    times: list[float] = field(default_factory=list)
    tokens: int = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        new = input_ids[:, -1].tolist()
        self.times.append(time.perf_counter())
        for row, token in zip(self.rows, new, strict=True):
            if not row.finish:
                self._take(row, token)
        return torch.tensor([bool(row.finish) for row in self.rows], device=input_ids.device)

    def _take(self, row: _Row, token: int) -> None:
        row.new_tokens += 1
        self.tokens += 1
        self.write(row.stream.push(token))
        if row.stream.stopped:
            row.finish = "stop"
        elif token == self.eos_token_id:
            row.finish = "end-of-text"
        elif row.new_tokens == self.max_new_tokens:
            row.finish = "length"
        if row.finish:
            self.write(row.stream.close())
            row.finish = "stop" if row.stream.stopped else row.finish


class _Draw(LogitsProcessor):
    """Leaves each row a single token, drawn with the row's own random numbers."""

    def __init__(self, rows: Sequence[_Row], sampling: Sampling) -> None:
        self.temperature, self.top_p = sampling.temperature, sampling.top_p
        self.uniforms = torch.stack(
            [_uniforms(sampling.seed, row.sample, row.ids, sampling.max_new_tokens) for row in rows]
        )
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = draw(scores, self.uniforms[:, self.step], self.temperature, self.top_p)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


def _uniforms(seed: int, sample: int, ids: Sequence[int], count: int) -> Tensor:
    """(count,) float64 in [0, 1): a function of seed, sample and prompt, and of nothing else."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, sample, *ids])))
    return torch.from_numpy(generator.random(count))


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Nucleus sampling by inversion: the token where cumulative probability passes `uniform`.

    Tokens are taken in order of falling probability, as many as it takes to reach `top_p`.

    Args:
        logits: (B, V).
        uniform: (B,) float64 in [0, 1).
        temperature: above 0.
        top_p: in (0, 1].

    Returns:
        (B,) token ids, on the device of the logits.
    """
    probability = (logits.float() / temperature).softmax(-1)
    for size in (min(_CANDIDATES, logits.shape[-1]), logits.shape[-1]):
        top, ids = probability.topk(size)
        # On the CPU in float64: summing in parallel on a GPU would not be deterministic.
        cumulative = top.cpu().double().cumsum(-1)
        if bool((cumulative[:, -1] >= top_p).all()):
            break
    kept = (cumulative < top_p).sum(-1, keepdim=True).clamp_max(size - 1)  # the last one kept
    mass = cumulative.gather(-1, kept)
    place = torch.searchsorted(cumulative, uniform[:, None] * mass, right=True)
    return ids.gather(-1, torch.minimum(place, kept).to(ids.device))[:, 0]


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
) -> Iterator[Continuation]:
    """Continue prompts, each `num_samples` times; texts come when their batch is done.

    A text depends on the model, its prompt, the settings, the seed and its sample number, and
    neither on the other prompts nor on the size of the batch; but matrix products round by the
    shape of a batch, so where two tokens are equal to within rounding, either may be taken.

    Args:
        loaded: model and tokenizer.
        prompts: any texts; an empty one starts from the end-of-text token.
        sampling: how tokens are chosen.
        num_samples: texts for each prompt.
        batch_size: texts at a time; shorter prompts are padded on the left.
        piece: tokens of a prompt per forward pass, which bounds the memory of long ones; 0 for all.
        write: called with new text as it comes, whichever row of the batch it belongs to.
        speed: what this took is added to it.

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
    rows = [
        _Row(prompt, ids, index, number, TextStream(loaded.tokenizer, sampling.stop))
        for index, prompt in enumerate(prompts)
        for ids in [_prompt_ids(loaded.tokenizer, prompt)]
        for number in range(num_samples)
    ]
    batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    speed = Speed() if speed is None else speed
    write = write or (lambda text: None)
    return (
        row.result()
        for batch in batches
        for row in _run_batch(loaded, batch, sampling, piece, speed, write)
    )


def sample(
    loaded: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Continue one prompt; the arguments are those of `Sampling`.

    Returns:
        `prompt`, `text` (the continuation alone), and the settings.

    Raises:
        PHAError: settings out of range.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    [continuation] = generate(loaded, [prompt], sampling)
    return {
        "prompt": prompt,
        "text": continuation.text,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }


def _prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids and tokenizer.eos_token_id is None:
        raise PHAError("a prompt is empty, and this tokenizer has no end-of-text token")
    return ids or [tokenizer.eos_token_id]


@torch.inference_mode()
def _run_batch(
    loaded: LoadedModel,
    rows: list[_Row],
    sampling: Sampling,
    piece: int,
    speed: Speed,
    write: Callable[[str], None],
) -> list[_Row]:
    """Generate the texts of one batch, and return its rows."""
    model, eos = loaded.model, loaded.tokenizer.eos_token_id
    pad = 0 if eos is None else eos
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row.ids)) + row.ids for row in rows])
    lengths = torch.tensor([len(row.ids) for row in rows])
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    progress = _Progress(rows, sampling.max_new_tokens, eos, write)
    draws = [_Draw(rows, sampling)] if sampling.temperature > 0 else []
    synchronise(model.device)
    begin = time.perf_counter()
    model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        # `progress` ends texts and `draws` leaves the search one choice, so it is always greedy.
        generation_config=GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            prefill_chunk_size=piece or None,
        ),
        logits_processor=LogitsProcessorList(draws),
        stopping_criteria=StoppingCriteriaList([progress]),
    )
    speed.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    speed.prompt_tokens += int(lengths.sum())
    speed.prefill_seconds += progress.times[0] - begin
    speed.decode_tokens += progress.tokens - len(rows)
    speed.decode_steps += len(progress.times) - 1
    speed.decode_seconds += progress.times[-1] - progress.times[0]
    return rows
