"""Models for others: a folder with weights, configuration, tokenizer and model card."""

from pha.sharing.export import Exported, export_model

__all__ = ["Exported", "export_model"]
