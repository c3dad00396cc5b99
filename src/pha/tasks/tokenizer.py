"""The tokenizer of a task: its words, parted by spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def words_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word is a token, by its place in `words`; there is no special token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocab=ids, unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
