"""The body with a head that classifies, for fine-tuning with transformers."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from pha.modeling.configuration import PHAConfig
from pha.modeling.language_model import PHAModel, PHAPreTrainedModel


class PHAForSequenceClassification(GenericForSequenceClassification, PHAPreTrainedModel):
    """A class for each sequence, from the state of its last token that is no padding."""

    starts_anew: ClassVar[tuple[str, ...]] = ("score.",)

    def __init__(self, config: PHAConfig) -> None:
        PHAPreTrainedModel.__init__(self, config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.model = PHAModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class PHAForTokenClassification(GenericForTokenClassification, PHAPreTrainedModel):
    """A class for each token, from its state, which knows of the tokens up to it."""

    starts_anew: ClassVar[tuple[str, ...]] = ("score.",)

    def __init__(self, config: PHAConfig) -> None:
        PHAPreTrainedModel.__init__(self, config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.model = PHAModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
