"""A process that encodes and counts: `python -m pha.data.worker`, started by `EncodingPool`.

It imports neither torch nor transformers. Messages come on standard input and go to standard
output; the first holds the tokenizer's JSON and the type of the ids.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import numpy as np

from pha.data.encoding import TextEncoder
from pha.data.pieces import encode_pieces, receive, send

_TOGETHER = 1 << 16  # characters; more at once only take memory, as there is one thread


def main() -> None:
    """Answer messages until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    questions = sys.stdin.buffer
    first = receive(questions)
    if first is None:
        return
    state, dtype = (block.decode() for block in first)
    encoder = TextEncoder(state)
    while (pieces := receive(questions)) is not None:
        encoded = encode_pieces(encoder, np.dtype(dtype), pieces, _TOGETHER)
        send(answers, [encoded.counts.tobytes(), encoded.ids.tobytes()])


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # nobody is left to answer
        main()
