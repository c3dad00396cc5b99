"""The standard set: what a new GPU is measured by, in the order of what matters, in ten minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pha.bench.op_work import OP_MODES, PASSES, op_backends
from pha.bench.peers import CHUNKED, fla_peers, is_ours
from pha.bench.work import Job
from pha.utils.hardware import default_device

TABLE_8 = ("pha-180m", "attention-only-180m", "attention-only-180m-shallow")
OPS_TIMED = ("gated-scan", "loss", "attention", "documents", "linear-attention")
# Model -> its stand-in where only the commands are tried out: two layers, so few to compile.
TINY = {
    "pha-125m": "pha-tiny+num_hidden_layers=2",
    "pha-180m": "pha-180m-tiny+num_hidden_layers=2",
    "attention-only-180m": "attention-only-tiny+num_hidden_layers=3",
    "attention-only-180m-shallow": "attention-only-tiny-shallow+num_hidden_layers=2",
    **{f"hf:{name}": f"hf:{name}-tiny" for name in ("llama", "gpt2", "falcon-h1", "mamba2")},
}


def standard_set(scale: str) -> list[list[Job]]:
    """Jobs that are compared with each other, a list for each setting.

    Reading prompts comes first (Table 8), then training at growing batches, decoding, and ops.

    Args:
        scale: `paper`, the models of the paper; or `tiny`, the same jobs at sizes for a CPU.
    """
    paper = scale == "paper"
    device_type = default_device().type
    precision = "bf16" if paper or device_type == "cuda" else "fp32"
    seconds = 0.5 if paper else 0.01

    def group(mode: str, models: Sequence[str], batch: int, length: int, **rest: Any) -> list[Job]:
        names = models if paper else [_tiny(name) for name in models]
        return [Job(mode, name, precision, batch, length, seconds, **rest) for name in names]

    compiled = {"compiled": True, "compiler": "inductor" if paper else "eager"}
    groups = []
    for length in (2048, 8192, 65536, 16384, 4096, 32768) if paper else (16,):
        # A peer is compiled as a whole, which takes long: not at every length.
        peer = ("hf:llama",) if length in (2048, 16384, 65536, 16) else ()
        groups.append(group("prefill", (*TABLE_8, *peer), 1, length, **compiled))
    for length in (2048, 8192) if paper else (16, 32):  # to show what launches cost
        groups.append(group("prefill", TABLE_8, 1, length))
    length = 1024 if paper else 16
    ours, peers = ("pha-125m", "pha-180m"), ("hf:gpt2", f"hf:gpt2{CHUNKED}", "hf:llama")
    for batch in (16, 32, 64, 96) if paper else (2, 4):
        first = batch in (16, 2)
        groups.append(group("train", ours + peers * first, batch, length, **compiled))
    if paper and fla_peers():  # which bring their own kernels, and are not compiled
        groups.append(group("train", ("pha-125m", *fla_peers()), 16, length))
    # Their scans in plain PyTorch keep too much for more.
    hybrids = ("pha-125m", "hf:falcon-h1", "hf:mamba2")
    groups.append(group("train", hybrids, 4 if paper else 1, length, **compiled))
    groups.append(group("decode", ("pha-125m", "hf:gpt2"), *((32, 2048) if paper else (2, 16))))
    for mode in OPS_TIMED:
        (job,) = group(mode, ("pha-180m",), 16 if paper else 2, length)
        groups.append(
            [
                replace(job, backend=f"{name}, {passes}")
                for passes in PASSES
                for name in op_backends(mode, device_type)
            ]
        )
    return groups


def _tiny(model: str) -> str:
    name, plus, ending = model.partition("+")
    return TINY[name] + plus + ending


def expected_seconds(job: Job) -> float:
    """How long a job takes on an H100: predicted from its parts, never measured.

    Building the model, the rates of the machine and measuring take 3 s, and an op 2 s with its
    kernel's compilation. One block takes 6 s to compile, 14 s with its backward pass, more with a
    scan in plain PyTorch; all layers of a peer at once 25 s.
    """
    if job.mode in OP_MODES:
        return 2.0
    if not job.compiled:
        return 6.0 if job.mode == "decode" else 3.0
    if job.mode == "train":
        plain_scan = job.model.startswith(("hf:falcon", "hf:mamba"))
        return 27.0 if plain_scan else 17.0
    return 9.0 if is_ours(job.model) else 28.0
