"""What a run reads and is judged by: a text in a token store, or a task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pha.data.sampler import DocumentSampler, Planter, StretchSampler, WindowSampler
from pha.data.store import TokenStore
from pha.data.tokenizer import tokenizer_hashes, tokenizer_sha256
from pha.evals import protocols
from pha.evals.perplexity import evaluate
from pha.evals.tasks import evaluate_task
from pha.loading import LanguageModel
from pha.results import Evaluation
from pha.tasks.sampler import TaskSampler
from pha.tasks.task import make_task, words_tokenizer
from pha.tasks.testing import make_tests
from pha.train.config import DataConfig, TrainConfig
from pha.utils.errors import PHAError

UNBOUNDED = 1 << 40  # sequences, where there is no end of them


class Limits(TypedDict, total=False):
    """How much a validation reads, and with whom; see `pha.evals.perplexity.evaluate`."""

    max_tokens: int | None
    share: tuple[int, int]
    reduce: Callable[[Tensor], Tensor] | None


class TextData:
    """A text: windows of its training split, perplexity on the others.

    Attributes:
        name: for messages.
        sha256: of the data themselves, which must not change under a run.
        vocab_size: every token is below it.
        length: T of a sequence in what judges the weights.
        tokenizer: makes that of the tokens, which is saved with every model.
        require_tokenizer: refuses a model whose tokenizer is another one.
        describe: makes what a result has to say of the data, ready for JSON.
    """

    def __init__(self, store: TokenStore, data: DataConfig) -> None:
        self.store, self.data = store, data
        self.name, self.sha256, self.vocab_size = str(store.path), store.sha256, store.vocab_size
        self.length = data.sequence_length
        self.tokenizer, self.require_tokenizer = store.tokenizer, store.require_tokenizer
        self.describe = store.describe

    def windows(self) -> int:
        """Sequences in a pass over the training split."""
        return max(0, (len(self.store.tokens("train")) - 1) // self.length)

    def sampler(self, config: TrainConfig) -> WindowSampler:
        """The batches of a run: windows in an order that the seed fixes."""
        store, data = self.store, self.data
        starts = store.document_starts("train")
        common = (
            store.tokens("train"),
            self.length,
            config.run.global_batch,
            config.run.seed,
            starts if data.packed_documents else None,
            Planter(store.frequencies("train")) if data.planted_repeats else None,
            data.planted_repeats,
        )
        if data.carry == "chunks":
            return StretchSampler(*common)
        if data.long_documents:
            return DocumentSampler(*common, documents=starts, share=data.long_documents)
        return WindowSampler(*common)

    def validate(
        self, model: LanguageModel, precision: str, **limits: Unpack[Limits]
    ) -> Evaluation:
        """What chooses the weights: the validation split."""
        return self._evaluate(model, "validation", precision, **limits)

    def test(self, model: LanguageModel, precision: str) -> Evaluation:
        """What judges them: the test split, or the validation split where there is no other."""
        split = "test" if "test" in self.store.splits else "validation"
        return self._evaluate(model, split, precision)

    def other_tests(self, model: LanguageModel, precision: str) -> list[Evaluation]:
        """What is measured besides: nothing."""
        return []

    def _evaluate(
        self, model: LanguageModel, split: str, precision: str, **limits: Unpack[Limits]
    ) -> Evaluation:
        protocol = protocols.Protocol(self.length, self.length, self.data.packed_documents)
        return evaluate(model, self.store, split, protocol, precision=precision, **limits)

    def prompts(self, length: int) -> list[str]:
        """Two texts to continue: the openings of two validation documents, or of two halves."""
        tokens = self.store.tokens("validation")
        starts = self.store.document_starts("validation")
        second = int(starts[len(starts) // 2]) if len(starts) > 1 else len(tokens) // 2
        tokenizer = self.tokenizer()
        return [tokenizer.decode(tokens[s : s + length].tolist()) for s in (0, second)]


class TaskData:
    """A task: fresh sequences at every step, loss and accuracy of the answers of its tests.

    It has what `TextData` has.

    Raises:
        PHAError: no such task, or options that do not fit.
    """

    def __init__(self, data: DataConfig) -> None:
        assert data.task is not None
        self.name, self.data = f"task {data.task}", data
        self.task = make_task(data.task, data.task_options)
        self.tests = make_tests(data.task, data.task_options, data.tests, data.sequence_length)
        self.words = self.task.words()
        for test in self.tests:
            if test.task.words() != self.words:
                raise PHAError(
                    f"data.tests: {test.label} has other tokens than the training sequences; "
                    "leave options that change them out of the tests"
                )
        self.vocab_size, self.length = len(self.words), self.tests[0].length
        drawn = [next(test.blocks(for_validation=True))[0] for test in self.tests]
        digest = hashlib.sha256(json.dumps(self.words).encode())
        for block in drawn:
            digest.update(block.tokens.tobytes() + block.labels.tobytes())
        self.sha256 = digest.hexdigest()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A word is a token."""
        return words_tokenizer(self.words)

    def require_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Its words must be the same."""
        if tokenizer_sha256(self.tokenizer()) not in tokenizer_hashes(tokenizer):
            raise PHAError(f"the model has other tokens than {self.name}; train one from scratch")

    def describe(self) -> dict[str, Any]:
        """As of a token store, with nothing to count."""
        return {
            "sha256": self.sha256,
            "source": self.name,
            "description": self.name,
            "tokenizer": "words",
            "tokenizer_sha256": tokenizer_sha256(self.tokenizer()),
            "vocab_size": self.vocab_size,
        }

    def windows(self) -> int:
        """No end of them."""
        return UNBOUNDED

    def sampler(self, config: TrainConfig) -> TaskSampler:
        """Fresh sequences."""
        run = config.run
        return TaskSampler(self.task, self.data.sequence_length, run.global_batch, run.seed)

    def validate(
        self, model: LanguageModel, precision: str, **limits: Unpack[Limits]
    ) -> Evaluation:
        """The first test, on sequences of its own."""
        test = self.tests[0]
        return evaluate_task(
            model, test, "validation", for_validation=True, precision=precision, **limits
        )

    def test(self, model: LanguageModel, precision: str) -> Evaluation:
        """The first test."""
        return evaluate_task(model, self.tests[0], self.tests[0].label, precision=precision)

    def other_tests(self, model: LanguageModel, precision: str) -> list[Evaluation]:
        """The others."""
        return [
            evaluate_task(model, test, test.label, precision=precision) for test in self.tests[1:]
        ]

    def prompts(self, length: int) -> list[str]:
        """The openings of two sequences of the first test."""
        (block, _), tokenizer = next(self.tests[0].blocks(for_validation=True)), self.tokenizer()
        return [tokenizer.decode(row[:length].tolist()) for row in block.tokens[:2]]


TrainingData = TextData | TaskData
"""Where batches come from, and what chooses and judges the weights."""
