"""What each kernel is worth: whole steps, prompts and tokens with it and without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from pha.nn import decoding
from pha.ops import OPS
from pha.utils.hardware import instruction_set

DECODER = "decoder"


def kernels(device_type: str, mode: str) -> list[str]:
    """The kernels that take part in a mode of `MODEL_MODES` on a device.

    They are the ops whose chosen backend is not the one in plain torch, and the compiled decoder.
    """
    if mode == "decode":
        return [DECODER] if device_type == "cpu" else []
    return [
        op.name
        for op in OPS.values()
        if op.choice(device_type) != op.plain
        and op.name != "scan"  # no model calls it
        and (op.name != "attention" or device_type != "cpu" or "AVX2" not in instruction_set())
        and (op.name != "linear_cross_entropy" or mode == "train")
    ]


@contextmanager
def without(names: Sequence[str]) -> Iterator[None]:
    """Compute in plain torch inside the block what these kernels would."""
    with ExitStack() as stack:
        for name in names:
            if name == DECODER:
                decoding.enabled = False
                stack.callback(setattr, decoding, "enabled", True)
            else:
                stack.enter_context(OPS[name].force(OPS[name].plain))
        yield
