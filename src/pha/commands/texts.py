"""Verbs that write and read texts: generate and score."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from pha.commands.common import (
    Attention,
    Dtype,
    File,
    Folder,
    Json,
    Model,
    Precision,
    answer,
    figures_table,
    print_json,
    progress_console,
    read_attention,
)
from pha.data.readers import Meter, kind_of, read_json_lines, read_text
from pha.utils.errors import PHAError
from pha.utils.files import followed
from pha.utils.formats import decode, read_file, require_encodable, to_json
from pha.utils.outputs import require_file, require_outputs, writing

if TYPE_CHECKING:
    from pha.evals.generation import Speed
    from pha.loading import LoadedModel
    from pha.states import State

_print = partial(print, end="", flush=True)


def generate(
    model: Model,
    *,
    prompt: Annotated[str | None, "TEXT"] = None,
    prompts: File | None = None,
    prefix: File | None = None,
    load_state: File | None = None,
    save_state: File | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    stop: Sequence[Annotated[str, "STRING"]] = (),
    num_samples: int = 1,
    batch_size: int = 8,
    piece: int = 0,
    attention: Sequence[Attention] = (),
    dtype: Dtype = "fp32",
    out: File | None = None,
    json: Json = False,
) -> None:
    """Continue a text, or a file of them.

    Give --prompt or --prompts. One text is printed as it grows, or with --stop when it is done;
    several, when their batch is done. --json and --out give one JSON object a line. Tokens per
    second go to standard error: prompts and decoding apart, with the bytes of weights that decoding
    read per second. One seed gives one text for a prompt, whatever else is in the batch.

    --prefix reads a text of any length before all prompts. --save-state keeps what the model then
    remembers, and --load-state goes on from it bit for bit, without reading again; no prompt is
    needed to save. A text and what follows it become tokens apart, so let a text end where a word
    does and the next begin with the blank.

    Args:
        prompt: text to continue; - reads it from standard input
        prompts: one prompt a line, or .jsonl with a field prompt or text in each
        prefix: UTF-8 text to read first, after the state if one is loaded
        load_state: go on from this state of the same model
        save_state: write the state before the prompts here
        max_new_tokens: at most
        temperature: 0: always the likeliest
        top_p: sample from this much probability
        seed: of the random choices
        stop: end before this; may be repeated
        num_samples: texts for each prompt
        batch_size: texts at a time
        piece: prompt tokens per forward pass; bounds the memory of long prompts; 0: all, and 2048
            of --prefix
        out: write JSON lines to FILE
        json: print JSON lines
    """
    if save_state is not None and prefix is None and load_state is None:
        raise PHAError("there is no state to save; give the text to read with --prefix")
    only_saves = save_state is not None and prompt is None and prompts is None
    texts = [] if only_saves else _prompts(prompt, prompts)
    for text in stop:
        require_encodable(text, "--stop")
    require_file(out)
    if prefix is not None:
        _require_there(prefix)
    others = (prompts, prefix, load_state, save_state)
    if out is not None and followed(out) in [followed(path) for path in others if path]:
        raise PHAError(f"{out} is read or written besides; choose another --out")
    from pha.evals.generation import Sampling, Speed
    from pha.evals.generation import generate as continue_texts
    from pha.loading import load_model
    from pha.states import require_state_file
    from pha.utils.files import write_text
    from pha.utils.hardware import PRECISIONS, default_device

    if save_state is not None:
        require_state_file(save_state)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, tuple(stop))
    options = read_attention(attention)
    loaded = load_model(model, default_device(), dtype=PRECISIONS[dtype], attention=options)
    streamed = len(texts) * num_samples == 1 and not json and out is None
    speed = Speed()
    state = _read_past(loaded, prefix, load_state, piece or 2048, speed)
    if save_state is not None and state is not None:
        kept = _save(save_state, state, loaded)
        if only_saves:
            answer(json, kept, f"{save_state}: {kept['tokens']:,} tokens, {kept['bytes']:,} bytes")
            return
    continuations = continue_texts(
        loaded,
        texts,
        sampling,
        num_samples=num_samples,
        batch_size=batch_size,
        piece=piece,
        write=_print if streamed else None,
        speed=speed,
        past=None if state is None else state.cache,
    )
    if streamed:
        _print(texts[0])
    lines = []
    for each in continuations:
        if out is not None:
            lines.append(to_json(asdict(each)) + "\n")
        if json:
            print_json(asdict(each))
        elif streamed:
            _print("\n")
        elif out is None:
            head = f"=== prompt {each.index + 1}, sample {each.sample + 1} ==="
            _print(f"{head}\n{each.prompt}{each.text}\n")
    if out is not None:
        with writing(out):
            write_text(out, "".join(lines))
    weight_bytes = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    print(_speed_line(speed, weight_bytes), file=sys.stderr)


def _require_there(path: Path) -> None:
    if not path.is_file():
        raise PHAError(f"there is no file {path}")


def _read_past(
    loaded: LoadedModel, prefix: Path | None, saved: Path | None, piece: int, speed: Speed
) -> State | None:
    """The state before the prompts: a saved one, after another text if one is given."""
    from pha import states
    from pha.utils.hardware import seconds_of

    state = None if saved is None else states.load_state(saved, loaded.pha, loaded.tokenizer)
    if prefix is None:
        return state
    with _counting(progress_console(), prefix.name) as count:

        def read() -> None:
            nonlocal state
            text = read_text(prefix, Meter())
            state = states.read_text(loaded, text, state, piece, count)

        speed.prefill_seconds += seconds_of(read, loaded.model.device)
    assert state is not None
    speed.prompt_tokens += state.texts[-1].tokens
    return state


def _save(path: Path, state: State, loaded: LoadedModel) -> dict[str, Any]:
    """Write a state; what was written, as a record."""
    from pha.states import save_state

    save_state(path, state, loaded.pha, loaded.tokenizer)
    texts = [asdict(text) for text in state.texts]
    tokens = sum(text.tokens for text in state.texts)
    return {"path": str(path), "tokens": tokens, "bytes": path.stat().st_size, "texts": texts}


@contextmanager
def _counting(console: Console, name: str) -> Iterator[Callable[[int], None]]:
    """A line that counts the tokens of a text; yields what to call with more of them."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if not console.is_terminal:  # where rich would leave an empty line
        yield lambda _: None
        return
    shape = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    seen = 0
    with Progress(*shape, console=console, transient=True) as progress:
        task = progress.add_task("")

        def count(tokens: int) -> None:
            nonlocal seen
            seen += tokens
            progress.update(task, description=f"{name}: {seen:,} tokens")

        yield count


def _prompts(prompt: str | None, path: Path | None) -> list[str]:
    """The texts to continue.

    Raises:
        PHAError: a file that cannot be read, without prompts, or with a line that holds none.
    """
    if (prompt is None) == (path is None):
        raise PHAError("give a text with --prompt, or a file of them with --prompts")
    if prompt is not None:
        if prompt != "-":
            return [require_encodable(prompt, "--prompt")]
        text = decode(sys.stdin.buffer.read() if sys.stdin else b"", "standard input")
        return [text.replace("\r\n", "\n").removesuffix("\n")]
    assert path is not None
    if kind_of(path).suffix == ".jsonl":
        texts = [_prompt_field(*found) for found in read_json_lines(path, Meter())]
    else:
        lines = (line.removesuffix("\r") for line in read_file(path).split("\n"))
        texts = [line for line in lines if line.strip()]
    if not texts:
        raise PHAError(f"{path} has no prompts; write one a line")
    return texts


def _prompt_field(where: str, record: dict[str, Any]) -> str:
    for name in ("prompt", "text"):
        if isinstance(record.get(name), str):
            return require_encodable(record[name], f"field {name!r} in {where}")
    raise PHAError(f"{where} has no text in a field prompt or text")


def _speed_line(speed: Speed, weight_bytes: int) -> str:
    def rate(amount: float, seconds: float) -> float:
        return amount / seconds if seconds else 0.0

    line = (
        f"prompts: {speed.prompt_tokens:,} tokens in {speed.prefill_seconds:.2f} s, "
        f"{rate(speed.prompt_tokens, speed.prefill_seconds):,.0f} tokens/s"
    )
    if not speed.decode_steps:
        return line
    # A step reads all weights once, whatever the batch.
    read = speed.decode_steps * weight_bytes / 1e9
    return (
        f"{line}; decoding: {speed.decode_tokens:,} tokens in {speed.decode_seconds:.2f} s, "
        f"{rate(speed.decode_tokens, speed.decode_seconds):,.1f} tokens/s, weights read at "
        f"{rate(read, speed.decode_seconds):.2f} GB/s"
    )


def score(
    model: Model,
    files: Sequence[File],
    *,
    out: Folder | None = None,
    piece: int = 2048,
    attention: Sequence[Attention] = (),
    shown: int = 20_000,
    precision: Precision = "fp32",
    json: Json = False,
) -> None:
    """How well a model predicts documents of any length, word by word.

    Reads each FILE in pieces with the model's state carried along: the numbers are those of
    one pass over the whole document. With --attention window=N memory does not grow with its
    length. --out writes, for each file, a page that shows which words surprised the model.

    Args:
        files: UTF-8 texts
        out: write NAME.html and NAME.json here
        piece: tokens per forward pass
        shown: tokens shown as text in the page
    """
    from pha.evals.score import score as score_text
    from pha.loading import load_model
    from pha.report.surprise import Collector, write_page
    from pha.results import JSON_FORMAT
    from pha.utils.files import write_json
    from pha.utils.hardware import choose_precision, default_device, provenance, return_freed_memory

    for path in files:
        _require_there(path)
    if out is not None and len({path.stem for path in files}) < len(files):
        raise PHAError("two files have the same name; score them into different --out folders")
    for path in files:
        require_outputs(out, f"{path.stem}.json", f"{path.stem}.html")
    options = read_attention(attention)
    return_freed_memory()
    device = default_device()
    loaded = load_model(model, device, attention=options)
    chosen = choose_precision(precision, device)
    facts = {"format": JSON_FORMAT, "provenance": provenance(device, chosen)}
    facts |= {"attention": options} if options else {}
    results: list[dict[str, Any]] = []
    for path in files:
        collected = Collector(shown)
        with _counting(progress_console(), path.name) as count:

            def look(found: Any, collected: Collector = collected, count: Any = count) -> None:
                collected(found)
                count(len(found.ids))

            text = read_text(path, Meter())
            result = score_text(loaded, path.name, text, piece=piece, precision=chosen, each=look)
        results.append(asdict(result))
        if out is not None:
            page, name = out / f"{path.stem}.html", model.name or str(model)
            nats = [None, *(round(float(x), 4) for x in collected.all_nats()[1:])]
            with writing(out):
                write_json(page.with_suffix(".json"), results[-1] | {"nats": nats} | facts)
                write_page(page, name, result, collected, loaded.tokenizer)
    title = f"perplexity of {model}, state carried through each document"
    columns = ("tokens", "per token", "per word", "per byte", "tok/s", "memory")
    table = figures_table(title, "document", *columns)
    for each in results:
        table.add_row(
            each["name"],
            f"{each['tokens']:,}",
            f"{each['perplexity']:,.2f}",
            f"{each['word_perplexity']:,.1f}",
            f"{each['byte_perplexity']:.4f}",
            f"{each['tokens_per_second']:,.0f}",
            f"{each['memory_end'] / 1e9:.2f} GB",
        )
    where = [] if out is None else [f"pages and JSON: {out}"]
    answer(json, {"model": str(model), "documents": results} | facts, table, *where)
