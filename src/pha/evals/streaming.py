"""Token by token to text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of a continuation while it grows.

    Joined together, what `push` and `close` return is the text that decoding all tokens at once
    gives, up to the first stop string. That holds for byte-level tokenizers, whose text can be cut
    wherever a character ends. transformers' `TextStreamer` knows no stop strings and one row only,
    and waits for spaces.

    Attributes:
        text: what has been returned so far.
        stopped: whether a stop string was met; then tokens are ignored.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []  # not yet whole characters
        self._held = ""  # may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Take a token; return the text that is certain now and was not before."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        text = self._decode()
        if text.endswith(_INCOMPLETE):
            return ""
        self._tokens.clear()
        return self._release(text)

    def close(self) -> str:
        """Return what is left when no token follows, broken characters as U+FFFD."""
        if self.stopped:
            return ""
        text = self._decode()
        self._tokens.clear()
        released = self._release(text)
        if self.stopped:
            return released
        rest, self._held = self._held, ""
        self.text += rest
        return released + rest

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(
            self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _release(self, text: str) -> str:
        self._held += text
        # The stop string that is complete first, however the text was cut into tokens.
        ends = [
            (place + len(stop), place)
            for stop in self._stop
            if (place := self._held.find(stop)) >= 0
        ]
        self.stopped = bool(ends)
        size = min(ends)[1] if ends else len(self._held) - self._overlap()
        released, self._held = self._held[:size], "" if ends else self._held[size:]
        self.text += released
        return released

    def _overlap(self) -> int:
        """Length of the longest end of the held text that some stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        return next(
            (
                size
                for size in range(min(longest, len(self._held)), 0, -1)
                if any(stop.startswith(self._held[-size:]) for stop in self._stop)
            ),
            0,
        )
