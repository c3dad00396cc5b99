"""The paper, one idea a file: the branches, their mixing, the blocks and the backbone."""

from pha.model.attention import GroupedQueryAttention
from pha.model.backbone import Backbone
from pha.model.block import ParallelBlock, SequentialBlock
from pha.model.branches import BRANCHES, Branch, Context, Diagnostics, register_branch
from pha.model.config import ArchitectureConfig
from pha.model.ffn import SwiGLU
from pha.model.gss import GatedStateSpace
from pha.model.mixing import LearnableMixing

__all__ = [
    "BRANCHES",
    "ArchitectureConfig",
    "Backbone",
    "Branch",
    "Context",
    "Diagnostics",
    "GatedStateSpace",
    "GroupedQueryAttention",
    "LearnableMixing",
    "ParallelBlock",
    "SequentialBlock",
    "SwiGLU",
    "register_branch",
]
