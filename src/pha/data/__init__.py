"""From text to training batches: sources, tokenizers, the token store and the window sampler.

    source (documents) -> tokenizer (ids) -> token store (files) -> sampler (batches)

torch, tokenizers, transformers and datasets are imported only by the functions that need them.
"""

from pha.data.documents import Document, Source, SourceOptions
from pha.data.encoding import TextEncoder
from pha.data.preparation import PreparationState, Progress, cached_store, prepare
from pha.data.sampler import (
    Batch,
    EvaluationWindow,
    WindowSampler,
    evaluation_windows,
)
from pha.data.sources import open_source
from pha.data.splits import SPLITS
from pha.data.store import Counts, TokenStore
from pha.data.tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_sha256

__all__ = [
    "END_OF_TEXT",
    "SPLITS",
    "Batch",
    "Counts",
    "Document",
    "EvaluationWindow",
    "PreparationState",
    "Progress",
    "Source",
    "SourceOptions",
    "TextEncoder",
    "TokenStore",
    "WindowSampler",
    "cached_store",
    "evaluation_windows",
    "load_tokenizer",
    "open_source",
    "prepare",
    "tokenizer_sha256",
]
