"""Tokenizers: bytes, a byte-level BPE trained on the corpus, GPT-2's, or a saved one.

All are lossless: decoding the ids of a text gives the text back.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pha.data.encoding import TextEncoder, byte_vocabulary
from pha.utils.errors import PHAError
from pha.utils.files import sha256_file, user_path
from pha.utils.formats import read_json
from pha.utils.text import shorten

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

_MOST_ENTRIES = 1 << 20  # of a BPE that is trained here
_SAVED = "tokenizer.json"
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_BPE_PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_FORMS = "bytes, bpe:SIZE, gpt2, gpt2:FOLDER, a run or a tokenizer's folder"
# White space, contractions, accents composed and not, capitals, a control character, an emoji.
_PROBE = " A  b\t\n\n it's <x> , Éé e\u0301 ß 中 \u00a0\u200b\x00 😀 ."


def load_tokenizer(spec: str, corpus: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """Load or train a tokenizer.

    Args:
        spec: `bytes` (ids 0..255 are the byte values, 256 the end of text), `bpe:SIZE` (a
            byte-level BPE of SIZE entries trained on `corpus`: bytes, merges, end of text), `gpt2`
            (from the Hugging Face Hub), `gpt2:FOLDER` (GPT-2's encoder.json and vocab.bpe, or
            vocab.json and merges.txt, in FOLDER), or a folder that holds such files or one that
            `save_pretrained` wrote, or a run, for the tokenizer of its model.
        corpus: texts for `bpe:SIZE`, read once.

    Returns:
        A tokenizer with `<|endoftext|>` as its end-of-text and beginning-of-text token (a saved
        one keeps its own), no unknown and no padding token.

    Raises:
        PHAError: an unknown spec, missing or damaged files, a corpus too small for SIZE, a
            tokenizer that loses text.
    """
    if spec == "bytes":
        return _wrap(_byte_level_bpe(byte_vocabulary(), []))
    if spec.startswith("bpe:"):
        return _wrap(_train_bpe(_bpe_size(spec), corpus))
    if spec == "gpt2":
        return _gpt2(*_download_gpt2(), origin="the Hugging Face Hub")
    if spec.startswith("gpt2:"):
        folder = user_path(spec.removeprefix("gpt2:"))
        return _gpt2(*_bpe_files(folder), origin=str(folder))
    folder = _saved_folder(spec)
    if not spec or not folder.is_dir():
        raise PHAError(f"no tokenizer {spec!r}: give {_FORMS}")
    if (folder / _SAVED).is_file():
        return _load_saved(folder)
    return _wrap(_read_bpe(*_bpe_files(folder)))


def tokenizer_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of everything that determines the ids of a text; saving and loading keep it."""
    return _state_sha256(json.loads(tokenizer.backend_tokenizer.to_str()))


def tokenizer_hashes(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """`tokenizer_sha256`, and what it would be had we written the same tokenizer.

    GPT-2's own file says in other words what `gpt2` makes of its vocabulary and merges.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    found = [_state_sha256(state)]
    if state["normalizer"] is None:  # so nothing is normalised, whatever is said of it
        state["added_tokens"] = [t | {"normalized": False} for t in state["added_tokens"]]
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if key in state["model"]:
            state["model"][key] = state["model"][key] or None
    return list(dict.fromkeys([*found, _state_sha256(state)]))


def saved_tokenizer_sha256(folder: Path) -> str:
    """`tokenizer_sha256` of the tokenizer that `save_pretrained` wrote to `folder`.

    Raises:
        PHAError: no readable tokenizer there.
    """
    try:
        return _state_sha256(read_json(folder / _SAVED))
    except (KeyError, TypeError) as error:
        raise PHAError(f"{folder / _SAVED} is not a tokenizer") from error


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The rows a model's embedding needs: the largest id plus one."""
    return int(max(tokenizer.get_vocab().values())) + 1


def _saved_folder(spec: str) -> Path:
    """The folder that a spec names; of a run, that of its model."""
    folder = user_path(spec)
    inside = folder / "model"
    return inside if (inside / _SAVED).is_file() and not (folder / _SAVED).is_file() else folder


def tokenizer_identity(spec: str) -> str:
    """What a spec stands for, without loading it: a folder is followed by a hash of its files."""
    folder = _saved_folder(spec.removeprefix("gpt2:"))
    names = [_SAVED, *(name for pair in _BPE_PAIRS for name in pair)]
    hashes = [sha256_file(folder / name) for name in names if (folder / name).is_file()]
    return " ".join([spec, *hashes])


def _state_sha256(state: Mapping[str, Any]) -> str:
    # Not the padding and truncation that calls leave behind, nor what only serves decoding.
    parts = {key: state[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _byte_level_bpe(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return backend


def _bpe_size(spec: str) -> int:
    digits = spec.removeprefix("bpe:")
    smallest = 256 + 1
    # `tokenizers` sets memory for all entries aside at once, and aborts where there is not enough.
    if not (re.fullmatch(r"[0-9]{1,7}", digits) and smallest <= int(digits) <= _MOST_ENTRIES):
        raise PHAError(
            f"tokenizer {shorten(repr(spec), 40)}: SIZE in bpe:SIZE is a number from {smallest} to "
            f"{_MOST_ENTRIES}"
        )
    return int(digits)


def _train_bpe(size: int, corpus: Iterable[str] | None) -> Tokenizer:
    """Train merges on `corpus` and number the entries as GPT-2 does: bytes, merges, end of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if corpus is None:
        raise PHAError(
            f"bpe:{size} is trained on a corpus: give one, or a saved tokenizer's folder"
        )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    merges = [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
    vocabulary = byte_vocabulary()
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    if len(vocabulary) != size - 1:
        raise PHAError(
            f"the corpus is too small for bpe:{size}: it gives {len(vocabulary) + 1} entries; "
            "choose a smaller size or bytes"
        )
    return _byte_level_bpe(vocabulary, merges)


def _bpe_files(folder: Path) -> tuple[Path, Path]:
    for vocabulary, merges in _BPE_PAIRS:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return folder / vocabulary, folder / merges
    pairs = " or ".join(" and ".join(pair) for pair in _BPE_PAIRS)
    raise PHAError(f"{folder} holds no tokenizer: it needs {pairs} (or a saved {_SAVED})")


def _read_bpe(vocabulary_file: Path, merges_file: Path) -> Tokenizer:
    from tokenizers.models import BPE

    try:
        vocabulary, merges = BPE.read_file(str(vocabulary_file), str(merges_file))
        backend = _byte_level_bpe(vocabulary, merges)
    except Exception as error:  # tokenizers raises bare Exception
        raise PHAError(
            f"{vocabulary_file} and {merges_file.name} are not a BPE vocabulary and its merges: "
            "get both files again"
        ) from error
    if not byte_vocabulary().keys() <= vocabulary.keys():
        raise PHAError(f"{vocabulary_file} is not byte-level: it lacks entries for single bytes")
    return backend


def _gpt2(vocabulary_file: Path, merges_file: Path, origin: str) -> PreTrainedTokenizerFast:
    tokenizer = _wrap(_read_bpe(vocabulary_file, merges_file))
    known = TextEncoder(tokenizer).encode("Hello world").tolist() == [15496, 995]
    if not (known and tokenizer.eos_token_id == 50256 == vocabulary_size(tokenizer) - 1):
        raise PHAError(f"the files from {origin} are not GPT-2's vocabulary: get them again")
    return tokenizer


def _download_gpt2() -> tuple[Path, Path]:
    from transformers.utils.hub import cached_file

    try:
        vocabulary, merges = (cached_file("gpt2", name) for name in _BPE_PAIRS[1])
    except (OSError, ValueError) as error:
        raise PHAError(
            "the gpt2 tokenizer cannot be had from the Hugging Face Hub: get encoder.json and "
            "vocab.bpe some other way and use gpt2:FOLDER, or train one with bpe:SIZE"
        ) from error
    return Path(vocabulary), Path(merges)


def read_saved_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that `save_pretrained` wrote to `folder`; nothing outside it is read or run.

    Raises:
        PHAError: missing or damaged files.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    for name in (_SAVED, *filter(lambda name: (folder / name).is_file(), _SETTINGS)):
        if not isinstance(read_json(folder / name), dict):
            raise PHAError(f"{folder / name} is no part of a tokenizer: get it again")
    try:
        # The file is named, as the settings may name another one elsewhere.
        file = str(folder / _SAVED)
        return PreTrainedTokenizerFast.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            tokenizer_file=file,
            model_max_length=VERY_LARGE_INTEGER,  # it warns of longer texts, which we cut ourselves
        )
    except Exception as error:  # tokenizers raises bare Exception
        raise PHAError(
            f"{folder / _SAVED} cannot be loaded as a tokenizer: get it again"
        ) from error


def _load_saved(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = read_saved_tokenizer(folder)
    tokenizer.clean_up_tokenization_spaces = False
    if tokenizer.decode(TextEncoder(tokenizer).encode(_PROBE).tolist()) != _PROBE:
        raise PHAError(
            f"the tokenizer in {folder} does not give back the text it is given: "
            "use a byte-level one, as perplexity per word needs every byte"
        )
    return tokenizer
