"""The paper, one idea a file: the branches, their mixing, the blocks and the backbone."""

from pha.nn.attention import GroupedQueryAttention
from pha.nn.block import ParallelBlock, SequentialBlock
from pha.nn.branches import BRANCHES, Branch, register_branch
from pha.nn.config import ArchitectureConfig
from pha.nn.ffn import SwiGLU
from pha.nn.gss import GatedStateSpace
from pha.nn.mehta import MehtaGSS
from pha.nn.mixing import LearnableMixing
from pha.nn.model import Backbone

__all__ = [
    "BRANCHES",
    "ArchitectureConfig",
    "Backbone",
    "Branch",
    "GatedStateSpace",
    "GroupedQueryAttention",
    "LearnableMixing",
    "MehtaGSS",
    "ParallelBlock",
    "SequentialBlock",
    "SwiGLU",
    "register_branch",
]
