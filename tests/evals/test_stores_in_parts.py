"""What reads a store reads one in parts as it does the same one whole."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path

import numpy as np

from pha.data import prepare
from pha.data.joining import join
from pha.data.parts import Part
from pha.evals.perplexity import evaluate
from pha.evals.probes.reading import Question
from pha.evals.protocols import Protocol
from pha.evals.where import divisions, passages
from pha.loading import LoadedModel
from pha.train.config import DataConfig
from pha.train.data import TextData


def test_evaluations_and_probes_are_those_of_one_file(writer: LoadedModel, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("train-1", "train-2", "valid-1", "valid-2", "test-1", "test-2", "test-3"):
        (source / f"{name}.txt").write_text(f"the {name} file says it again\n" * 9)
    one = prepare(str(source), "bytes", tmp_path / "one")
    for number in range(1, 8):
        prepare(str(source), "bytes", tmp_path / "many", part=Part(number, 7))
    many = join(tmp_path / "many")
    found = []
    for store in (one, many):
        protocol = Protocol(32, 16, packed_documents=True)
        losses = np.empty(store.counts("test").tokens - 1, dtype=np.float32)
        result = evaluate(writer.pha, store, "test", protocol, losses=losses)
        data = DataConfig(store=str(store.path), sequence_length=32)
        counts = np.array([200, len(losses) - 200])
        found.append(
            [
                replace(result, seconds=0.0),
                losses.tolist(),
                [bins.members.tolist() for bins in divisions(store, "test", protocol)],
                list(
                    map(astuple, passages(store.tokens("test"), losses, counts, store.tokenizer()))
                ),
                Question(store, "test").tokens().tolist(),
                TextData(store, data).prompts(24),
            ]
        )
    assert found[0] == found[1]
