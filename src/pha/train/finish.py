"""The end of a run: weights chosen by validation perplexity, evaluated on the test split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pha.data.store import TokenStore
from pha.evals.generation import sample
from pha.evals.perplexity import Evaluation, evaluate
from pha.loading import load_model
from pha.model.parameters import count_parameters
from pha.train.averaging import average_models
from pha.train.checkpoint import Progress
from pha.utils.files import copy_folder, write_json
from pha.utils.hardware import provenance

if TYPE_CHECKING:
    from pha.train.session import Session


@dataclass(frozen=True)
class Candidate:
    """Weights that a run may end with.

    Attributes:
        name: `best checkpoint` or `average`.
        folder: where they are.
        steps: the optimiser steps they come from, best first.
        validation_perplexity: what decides: of the whole split where there is something to decide.
        evaluation: on the test split.
    """

    name: str
    folder: Path
    steps: list[int]
    validation_perplexity: float
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return {
            "name": self.name,
            "steps": self.steps,
            "validation_perplexity": self.validation_perplexity,
            "evaluation": self.evaluation.to_dict(),
        }


def finish(session: Session, progress: Progress) -> dict[str, Any]:
    """Choose the weights, evaluate them on the test split and write result.json."""
    config, plan, run = session.config, session.plan, session.run
    store, console, device = session.store, session.console, session.accelerator.device
    # The validation split chooses the weights; what counts is the one that they never met.
    split = "test" if "test" in store.splits else "validation"
    candidates = _candidates(session, progress, split)
    chosen = min(candidates, key=lambda candidate: candidate.validation_perplexity)
    if chosen.folder != run.model:
        copy_folder(chosen.folder, run.model)
    loaded = load_model(run.path, device)
    samples = []
    if config.run.sample_tokens:
        with console.status(f"{run.name}: sampling"):
            samples = [
                sample(loaded, prompt, max_new_tokens=config.run.sample_tokens, seed=i)
                for i, prompt in enumerate(_prompts(store))
            ]
    components = count_parameters(config.model)
    speed = progress.tokens / progress.seconds
    result = {
        "name": run.name,
        "recipe": config.recipe,
        "seed": config.run.seed,
        "steps": progress.step,
        "tokens_seen": progress.tokens,
        "seconds": progress.seconds,
        "tokens_per_second": speed,
        "data_wait": progress.data_seconds / progress.seconds,
        "utilisation": 6.0 * plan.parameters * speed / plan.matmul_flops,
        "matmul_flops": plan.matmul_flops,
        "peak_memory_bytes": progress.peak_memory,
        "chosen": chosen.name,
        "chosen_step": chosen.steps[0] if len(chosen.steps) == 1 else None,
        "candidates": [candidate.to_dict() for candidate in candidates],
        "model": {
            "preset": config.model.preset,
            "parameters": {
                "total": plan.parameters,
                "embedding": components["embedding"],
                "non_embedding": plan.parameters - components["embedding"],
                "components": components,
            },
        },
        "evaluations": [chosen.evaluation.to_dict()],
        "best_validation_perplexity": progress.best[0][0],
        "mixing": loaded.model.model.mixing_weights(),
        "samples": samples,
        "data": store.describe(),
        "provenance": provenance(device, config.run.precision),
    }
    write_json(run.result, result)
    return result


def _candidates(session: Session, progress: Progress, split: str) -> list[Candidate]:
    """The best checkpoint and, where the run asks for one, the average of the best."""
    config, run, store, console = session.config, session.run, session.store, session.console
    device = session.accelerator.device

    def score(name: str, folder: Path, which: str) -> Evaluation:
        with console.status(f"{run.name}: evaluating the {name} on the {which} split"):
            return evaluate(
                load_model(folder, device).model,
                store,
                which,
                sequence_length=config.data.sequence_length,
                packed_documents=config.data.packed_documents,
                precision=config.run.precision,
            )

    perplexity, step = progress.best[0]
    averaged = [step for _, step in progress.best[: config.run.average_best]]
    if len(averaged) < 2:
        only = score("best checkpoint", run.model, split)
        return [Candidate("best checkpoint", run.model, [step], perplexity, only)]
    average_models([run.best_model(step) for step in averaged], run.averaged)
    candidates = []
    for name, folder, steps in (
        ("best checkpoint", run.best_model(step), [step]),
        ("average", run.averaged, averaged),
    ):
        validation = score(name, folder, "validation").perplexity
        candidates.append(Candidate(name, folder, steps, validation, score(name, folder, split)))
    return candidates


def _prompts(store: TokenStore) -> list[str]:
    """The openings of two validation documents, or of the two halves of a running text."""
    tokens = store.tokens("validation")
    starts = store.document_starts("validation")
    second = int(starts[len(starts) // 2]) if len(starts) > 1 else len(tokens) // 2
    tokenizer = store.tokenizer()
    return [tokenizer.decode(tokens[s : s + 24].tolist()) for s in (0, second)]
