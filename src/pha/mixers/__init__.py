"""Further mixers, a file each, of the same contract as the state space of Eq. 2.

Importing this package makes them known to `branches` in a configuration.
"""

from pha.mixers.compressive import CompressiveAttention
from pha.mixers.extended_gss import ExtendedGSS
from pha.mixers.gated_deltanet import GatedDeltaNet
from pha.mixers.h3 import H3
from pha.mixers.hyena import Hyena
from pha.mixers.linear_attention import LinearAttention
from pha.mixers.mamba import Mamba
from pha.mixers.mamba2 import Mamba2
from pha.mixers.mehta import MehtaGSS
from pha.mixers.qrnn import QRNN
from pha.mixers.retnet import Retention
from pha.mixers.rg_lru import RGLRU
from pha.mixers.s4d import S4D

__all__ = [
    "H3",
    "QRNN",
    "RGLRU",
    "S4D",
    "CompressiveAttention",
    "ExtendedGSS",
    "GatedDeltaNet",
    "Hyena",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "MehtaGSS",
    "Retention",
]
