"""Models of transformers that are not ours, in the same loop."""

from pha.foreign.model import ForeignModel
from pha.foreign.reading import (
    in_one_line,
    load_foreign,
    make_foreign,
    read_shape,
    shape_config,
    source_folder,
)

__all__ = [
    "ForeignModel",
    "in_one_line",
    "load_foreign",
    "make_foreign",
    "read_shape",
    "shape_config",
    "source_folder",
]
