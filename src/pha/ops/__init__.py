"""The numerics: each op has a naive oracle and the backends that are tested against it.

Shapes, here and in the whole package: B batch, T tokens, S cached and new tokens, d hidden size,
n state size, H query heads, G key-value heads, K head size, V vocabulary, N = B * T.
"""

from pha.ops import kernels as kernels  # which makes them known
from pha.ops.attention import attention
from pha.ops.backends import OPS, Op, in_use, unusual
from pha.ops.diagonal_ssm import diagonal_ssm
from pha.ops.dss import dss
from pha.ops.gated_scan import gated_scan
from pha.ops.linear_attention import linear_attention
from pha.ops.linear_cross_entropy import linear_cross_entropy, token_statistics
from pha.ops.linear_scan import linear_scan
from pha.ops.long_convolution import long_convolution
from pha.ops.rms_norm import rms_norm
from pha.ops.rotary import rotate, unit_rotary
from pha.ops.selective_scan import selective_scan
from pha.ops.short_convolution import short_convolution
from pha.ops.swiglu import swiglu

__all__ = [
    "OPS",
    "Op",
    "attention",
    "diagonal_ssm",
    "dss",
    "gated_scan",
    "in_use",
    "linear_attention",
    "linear_cross_entropy",
    "linear_scan",
    "long_convolution",
    "rms_norm",
    "rotate",
    "selective_scan",
    "short_convolution",
    "swiglu",
    "token_statistics",
    "unit_rotary",
    "unusual",
]
