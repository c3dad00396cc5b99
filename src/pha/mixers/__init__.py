"""Further mixers, a file each, of the same contract as the state space of Eq. 2.

Importing this package makes them known to `branches` in a configuration.
"""

from pha.mixers.mehta import MehtaGSS

__all__ = ["MehtaGSS"]
