"""Further mixers, a file each, of the same contract as the state space of Eq. 2.

Importing this package makes them known to `branches` in a configuration.
"""

from pha.mixers.mamba import Mamba
from pha.mixers.mehta import MehtaGSS
from pha.mixers.qrnn import QRNN
from pha.mixers.rg_lru import RGLRU

__all__ = ["QRNN", "RGLRU", "Mamba", "MehtaGSS"]
