"""The model of a run: ours by its architecture, or one of transformers by its name."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from pha.foreign import ForeignModel, make_foreign, read_shape, shape_config
from pha.loading import LanguageModel, load_model, model_folder
from pha.model.config import vars_of
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.runs import RunFolder
from pha.train.config import TrainConfig
from pha.train.recipes import load_recipe


def foreign_shape(config: TrainConfig) -> PreTrainedConfig:
    """The configuration of a run's model that is not ours.

    Raises:
        PHAError: no such model, or an impossible shape.
    """
    assert config.transformers.name is not None
    changes = config.transformers.set
    if config.run.init_from is not None:
        return read_shape(model_folder(Path(config.run.init_from))[0], changes)
    data = config.data
    length = max([data.sequence_length, *(x.get("length", 1) for x in data.tests.values())])
    return shape_config(config.transformers.name, config.model.vocab_size, length, changes)


def make_model(config: TrainConfig) -> LanguageModel:
    """A model with seeded initial weights, or those of `run.init_from`.

    Raises:
        PHAError: a shape that transformers cannot make, or no causal language model.
    """
    torch.manual_seed(config.run.seed)
    if config.transformers.name is not None:
        return _make_foreign(config)
    length = {"max_position_embeddings": config.data.sequence_length}
    fresh = PHAForCausalLM(PHAConfig(**(vars_of(config.model) | length)))
    if config.run.init_from is not None:
        start = load_model(Path(config.run.init_from)).pha
        fresh.load_state_dict(start.state_dict())
        fresh.config.trained_length = max(start.config.longest_trained, config.data.sequence_length)
    fresh.model.gradient_checkpointing = config.run.gradient_checkpointing
    return fresh


def initial_model(run: RunFolder | None) -> PHAForCausalLM | None:
    """The model that a run began with, made again from its seed.

    None where there is no run, it keeps no configuration, or it began with other weights.
    """
    if run is None or not run.config.is_file():
        return None
    config = load_recipe(str(run.config), {"run.imports": []})
    if config.run.init_from is not None or config.transformers.name is not None:
        return None
    model = make_model(config)
    assert isinstance(model, PHAForCausalLM)
    return model.eval()


def _make_foreign(config: TrainConfig) -> ForeignModel:
    if config.run.init_from is None:
        model: LanguageModel = make_foreign(foreign_shape(config)).look()
    else:
        model = load_model(Path(config.run.init_from), changes=config.transformers.set).model
    assert isinstance(model, ForeignModel)
    if config.run.gradient_checkpointing:
        # The second is its name in older versions of transformers.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(model.inner, name) for name in names if hasattr(model.inner, name))()
    return model
