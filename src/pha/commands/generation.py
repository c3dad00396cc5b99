"""The verb that lets a model write: generate."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pha.commands.common import AddVerb
from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from pha.evals.generation import Continuation, Speed

_DETAIL = """\
One text is printed as it grows, or with --stop when it is done; several, when their batch is done.
--json and --out give one JSON object a line. Tokens per second go to standard error: prompts and
decoding apart, with the bytes of weights that decoding read per second.

One seed gives one text for a prompt, whatever else is in the batch.
"""


def add_generate(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb("generate", generate, "continue a text, or a file of them", _DETAIL)
    sub.add_argument("model", metavar="RUN_OR_MODEL", type=Path)
    prompts = sub.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt", metavar="TEXT", help="text to continue; - reads it from standard input"
    )
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="one prompt a line, or .jsonl with a field prompt or text in each",
    )
    sub.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="at most (128)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (0.8)")
    sub.add_argument(
        "--top-p", type=float, default=0.95, help="sample from this much probability (0.95)"
    )
    sub.add_argument("--seed", type=int, default=0, help="of the random choices (0)")
    sub.add_argument(
        "--stop",
        metavar="STRING",
        action="append",
        default=[],
        help="end before this; may be repeated",
    )
    sub.add_argument(
        "--num-samples", metavar="N", type=int, default=1, help="texts for each prompt (1)"
    )
    sub.add_argument("--batch-size", metavar="N", type=int, default=8, help="texts at a time (8)")
    sub.add_argument(
        "--piece",
        metavar="N",
        type=int,
        default=0,
        help="prompt tokens per forward pass; bounds the memory of long prompts (0: all)",
    )
    sub.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="type of the weights (fp32)"
    )
    sub.add_argument("--out", metavar="FILE", type=Path, help="write JSON lines to FILE")
    sub.add_argument("--json", action="store_true", help="print JSON lines")


def generate(options: Namespace) -> None:
    """`pha generate`."""
    prompts = _prompts(options)
    if options.out is not None and options.out.is_dir():
        raise PHAError(f"{options.out} is a folder: name the file to write")
    from pha.evals.generation import Sampling, Speed
    from pha.evals.generation import generate as continue_texts
    from pha.loading import load_model
    from pha.utils.files import write_text
    from pha.utils.hardware import PRECISIONS, default_device

    sampling = Sampling(
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        options.seed,
        tuple(options.stop),
    )
    loaded = load_model(options.model, default_device(), dtype=PRECISIONS[options.dtype])
    alone = len(prompts) * options.num_samples == 1
    streamed = alone and not options.json and options.out is None
    speed = Speed()
    texts = continue_texts(
        loaded,
        prompts,
        sampling,
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        piece=options.piece,
        write=_print if streamed else None,
        speed=speed,
    )
    if streamed:
        _print(prompts[0])
    lines = []
    for continuation in texts:
        line = json.dumps(asdict(continuation), ensure_ascii=False) + "\n"
        lines.append(line)
        if options.json:
            _print(line)
        elif streamed:
            _print("\n")
        elif options.out is None:
            _print(_headed(continuation))
    if options.out is not None:
        try:
            write_text(options.out, "".join(lines))
        except OSError as error:
            raise PHAError(
                f"{options.out} cannot be written ({error.strerror or error})"
            ) from error
    weight_bytes = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    print(_speed_line(speed, weight_bytes), file=sys.stderr)


def _prompts(options: Namespace) -> list[str]:
    """The texts to continue.

    Raises:
        PHAError: a file that cannot be read, without prompts, or with a line that holds none.
    """
    if options.prompts is None:
        if options.prompt != "-":
            return [options.prompt]
        try:
            return [sys.stdin.read().removesuffix("\n")]
        except UnicodeDecodeError as error:
            raise PHAError("standard input is not UTF-8 text") from error
    path: Path = options.prompts
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise PHAError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise PHAError(f"{path} cannot be read ({error.strerror or error})") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise PHAError(f"{path} has no prompts; write one a line")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt_field(path, number, line) for number, line in numbered]


def _prompt_field(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise PHAError(f"{path}, line {number}, is not JSON ({error.msg})") from error
    if isinstance(record, dict):
        for name in ("prompt", "text"):
            if isinstance(record.get(name), str):
                return str(record[name])
    raise PHAError(f"{path}, line {number}, has no text in a field prompt or text")


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _headed(continuation: Continuation) -> str:
    head = f"=== prompt {continuation.index + 1}, sample {continuation.sample + 1} ==="
    return f"{head}\n{continuation.prompt}{continuation.text}\n"


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
