"""The end of a run: weights chosen by validation perplexity, evaluated on the test."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pha.costs import cache_bytes
from pha.evals.generation import Sampling, generate
from pha.foreign import ForeignModel
from pha.loading import LanguageModel, load_model
from pha.model.parameters import count_parameters
from pha.results import (
    SOLVED,
    Candidate,
    ModelSize,
    Parameters,
    RunResult,
    Sample,
)
from pha.train.averaging import average_models
from pha.train.checkpoint import Progress
from pha.train.config import TrainConfig
from pha.train.session import Session
from pha.train.sharding import mixing_of
from pha.utils.files import copy_folder
from pha.utils.hardware import provenance


def finish(session: Session, progress: Progress) -> RunResult:
    """Choose the weights, evaluate them on the test and write result.json."""
    config, plan, run = session.config, session.plan, session.run
    data, console, device = session.data, session.console, session.accelerator.device
    # The validation split chooses the weights; what counts is the one that they never met.
    found = _candidates(session, progress)
    chosen, folder = min(found, key=lambda each: each[0].validation_perplexity)
    if folder != run.model:
        copy_folder(folder, run.model)
    loaded = load_model(run.path, device)
    samples: list[Sample] = []
    most, length = 24, config.run.sample_tokens
    if isinstance(loaded.model, ForeignModel) and loaded.model.longest is not None:
        most, length = (min(n, max(1, loaded.model.longest // 3)) for n in (most, length))
    if config.run.sample_tokens:
        with console.status(f"{run.name}: sampling"):
            for seed, prompt in enumerate(data.prompts(most)):
                how = Sampling(length, seed=seed)
                [made] = generate(loaded, [prompt], how)
                samples.append(Sample(prompt, made.text, how.temperature, how.top_p, seed))
    components = _components(config, loaded.model)
    kept = cache_bytes(config.model, data.length) if config.transformers.name is None else None
    with console.status(f"{run.name}: evaluating the other tests"):
        others = data.other_tests(loaded.model, config.run.precision)
    solved = (x.step for x in run.read_metrics().eval if x.accuracy >= SOLVED)
    embedding = components["embedding"]
    speed = progress.tokens / progress.seconds
    result = RunResult(
        name=run.name,
        recipe=config.recipe,
        seed=config.run.seed,
        steps=progress.step,
        tokens_seen=progress.tokens,
        seconds=progress.seconds,
        tokens_per_second=speed,
        data_wait=progress.data_seconds / progress.seconds,
        utilisation=plan.flops_per_token * speed / (plan.matmul_flops * plan.devices),
        matmul_flops=plan.matmul_flops,
        peak_memory_bytes=progress.peak_memory,
        chosen=chosen.name,
        chosen_step=chosen.steps[0] if len(chosen.steps) == 1 else None,
        candidates=[candidate for candidate, _ in found],
        model=ModelSize(
            config.model_name,
            Parameters(plan.parameters, embedding, plan.parameters - embedding, components),
            kept,
            plan.flops_per_token,
        ),
        evaluations=[chosen.evaluation, *others],
        best_validation_perplexity=progress.best[0][0],
        solved_step=None if config.data.task is None else next(solved, None),
        mixing=mixing_of(loaded.model),
        samples=samples,
        data=data.describe(),
        provenance=provenance(device, config.run.precision),
    )
    result.write(run.result)
    return result


def _components(config: TrainConfig, model: LanguageModel) -> dict[str, int]:
    """Parameters by component; of a model that is not ours, what it begins and ends with apart."""
    if not isinstance(model, ForeignModel):
        return count_parameters(config.model)
    inner = model.inner
    ends = {
        id(p): p.numel() for m in (inner.get_input_embeddings(), model.head) for p in m.parameters()
    }
    embedding = sum(ends.values())
    return {"embedding": embedding, "other": sum(p.numel() for p in inner.parameters()) - embedding}


def _candidates(session: Session, progress: Progress) -> list[tuple[Candidate, Path]]:
    """The best checkpoint and, where the run asks for one, the average; each with its folder."""
    config, run, data = session.config, session.run, session.data
    device, precision = session.accelerator.device, config.run.precision

    def working(name: str) -> AbstractContextManager[Any]:
        return session.console.status(f"{run.name}: evaluating the {name}")

    perplexity, step = progress.best[0]
    averaged = [step for _, step in progress.best[: config.run.average_best]]
    if len(averaged) < 2:
        with working("best checkpoint"):
            only = data.test(load_model(run.model, device).model, precision)
        return [(Candidate("best checkpoint", [step], perplexity, only), run.model)]
    average_models([run.best_model(step) for step in averaged], run.averaged)
    found = []
    for name, folder, steps in (
        ("best checkpoint", run.best_model(step), [step]),
        ("average", run.averaged, averaged),
    ):
        with working(name):
            model = load_model(folder, device).model
            validation = data.validate(model, precision).perplexity
            found.append((Candidate(name, steps, validation, data.test(model, precision)), folder))
    return found
