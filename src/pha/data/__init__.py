"""From text to training batches: sources, tokenizers, the token store and the window sampler.

    source (documents) -> tokenizer (ids) -> token store (files) -> sampler (batches)

torch, tokenizers, transformers and datasets are imported only by the functions that need them.
"""

from pha.data.documents import SourceOptions
from pha.data.preparation import PreparationState, cached_store, prepare
from pha.data.sources import open_source
from pha.data.splits import SPLITS
from pha.data.store import Counts, TokenStore
from pha.data.tokenizer import load_tokenizer, tokenizer_sha256

__all__ = [
    "SPLITS",
    "Counts",
    "PreparationState",
    "SourceOptions",
    "TokenStore",
    "cached_store",
    "load_tokenizer",
    "open_source",
    "prepare",
    "tokenizer_sha256",
]
