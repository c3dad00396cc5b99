"""The transformers face of `pha.model`, known to its Auto classes, with every branch of ours."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from pha import mixers as mixers  # which makes them known
from pha.modeling.classification import PHAForSequenceClassification, PHAForTokenClassification
from pha.modeling.configuration import PHAConfig
from pha.modeling.language_model import PHAForCausalLM, PHAModel, PHAPreTrainedModel

try:
    from pha.decoder import decode, stand_for
except ImportError:  # no numba: the layers write tokens too
    pass
else:
    stand_for(PHAModel)
    PHAForCausalLM.decode = staticmethod(decode)

AutoConfig.register("pha", PHAConfig)
AutoModel.register(PHAConfig, PHAModel)
AutoModelForCausalLM.register(PHAConfig, PHAForCausalLM)
AutoModelForSequenceClassification.register(PHAConfig, PHAForSequenceClassification)
AutoModelForTokenClassification.register(PHAConfig, PHAForTokenClassification)

__all__ = [
    "PHAConfig",
    "PHAForCausalLM",
    "PHAForSequenceClassification",
    "PHAForTokenClassification",
    "PHAModel",
    "PHAPreTrainedModel",
]
