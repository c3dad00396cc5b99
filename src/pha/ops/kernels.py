"""What is faster on a GPU, and adds itself to the table of ops when it is imported."""

from pha.ops.gated_scan import trial as gated_scan
from pha.ops.linear_attention import fla as linear_attention
from pha.ops.linear_cross_entropy import triton as linear_cross_entropy
from pha.ops.linear_scan import triton as linear_scan

__all__ = ["gated_scan", "linear_attention", "linear_cross_entropy", "linear_scan"]
