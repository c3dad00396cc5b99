"""What each kernel is worth: whole steps, prompts and tokens with it and without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec

from pha.ops import OPS

DECODER = "decoder"


def kernels(device_type: str, mode: str) -> list[str]:
    """The kernels that take part in a mode of `MODEL_MODES` on a device.

    They are the ops whose chosen backend is not the one in plain torch, and the compiled decoder.
    """
    if mode == "decode":
        return [DECODER] if device_type == "cpu" and find_spec("numba") else []
    return [
        op.name
        for op in OPS.values()
        if op.choice(device_type) != op.plain
        and (op.name != "linear_cross_entropy" or mode == "train")
    ]


@contextmanager
def without(names: Sequence[str]) -> Iterator[None]:
    """Compute in plain torch inside the block what these kernels would."""
    with ExitStack() as stack:
        for name in names:
            if name == DECODER:
                from pha import decoder

                decoder.enabled = False
                stack.callback(setattr, decoder, "enabled", True)
            else:
                stack.enter_context(OPS[name].force(OPS[name].plain))
        yield
