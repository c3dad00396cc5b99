"""What a run will cost, worked out before anything is spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pha.caching import CarriedCache, SequencePieces
from pha.costs import shell, training_flops
from pha.foreign import ForeignModel, make_foreign
from pha.model import ArchitectureConfig
from pha.model.parameters import count_parameters
from pha.modeling import PHAForCausalLM
from pha.ops.linear_cross_entropy import chunk_logits
from pha.ops.pieces import Pieces
from pha.peers import count_multiplied
from pha.train.carry import memory_of
from pha.train.config import TrainConfig
from pha.train.models import foreign_shape
from pha.train.split import PROBES, CountedPieces, gathered_bytes
from pha.utils.compiling import compile_blocks
from pha.utils.errors import PHAError
from pha.utils.hardware import autocast, free_memory, matmul_rate

# A training step of a small model spends about this fraction of its time in matrix products at
# their measured rate; used for the estimate of a plan alone, every run reports its own.
ASSUMED_UTILISATION = 0.4
# Sequences per forward pass are raised up to this many tokens on a CPU, whose caches gain nothing
# from more.
CPU_TOKENS = 8192
PROBE_MOST = 512  # of a model that is not ours, which may pad or go token by token
PROBE_TOKENS = 23  # a prime, so that no size of a model's own is taken for it


@dataclass(frozen=True)
class Card:
    """A GPU that is not here, to plan for."""

    matmul_flops: float  # rate of matrix products, FLOP/s
    memory: int  # bytes


@dataclass(frozen=True)
class Plan:
    """Sizes, memory, work and time of a run."""

    parameters: int  # all of them, the tied head once
    steps: int  # optimiser steps
    tokens: int  # tokens seen in all
    steps_per_epoch: int  # optimiser steps in a pass over the training split
    micro_batch: int  # sequences per forward pass and device
    accumulation: int  # forward passes per optimiser step and device
    flops_per_token: float  # to train on one, the work of mixers counted as far as it is known
    flops: float  # of the run
    weights_bytes: int  # weights, gradients and two moments, and on a CPU a copy that is saved
    activation_bytes: int  # what a micro-batch keeps for its backward pass
    carried_bytes: int  # what the rows of a step leave to the next, on each device
    free_bytes: int  # what is free now
    devices: int  # that share the work
    gradient_bytes: int  # that each of them sends in a step, and receives, to add gradients up
    gathered_bytes: dict[str, int]  # what each receives in a step: `weights`, and by branch of
    # the pieces of others
    matmul_flops: float  # rate of matrix products, measured or that of a `Card`, FLOP/s
    seconds: float  # expected time of the training alone, at `ASSUMED_UTILISATION`


def activation_bytes_per_token(
    config: ArchitectureConfig, precision: str, compiled: bool = False, ranks: int = 1
) -> float:
    """Bytes per token that autograd keeps between forward and backward.

    Counted by running the model on fake tensors, which have shapes and types but no storage. Where
    `ranks` share a sequence, for a token of the last piece, with the keys gathered for it.
    """
    with FakeTensorMode():
        model = shell(config)
        if ranks > 1:
            last = CountedPieces(ranks, ranks - 1)
            kept = [
                sum(size for size, _ in _kept(model, tokens, precision, False, last))
                for tokens in PROBES
            ]
            return (kept[1] - kept[0]) / (PROBES[1] - PROBES[0])
        saved = _kept(model, PROBE_TOKENS, precision, compiled)
        # Weights cast for autocast and other tensors without a token dimension do not scale.
        return sum(size for size, shape in saved if PROBE_TOKENS in shape) / PROBE_TOKENS


def carried_bytes_per_row(config: TrainConfig, precision: str) -> int:
    """Bytes that a row leaves to the next step, counted in the same way.

    Raises:
        PHAError: it is to leave states, and the model has none.
    """
    if config.data.carry == "none":
        return 0
    cache = CarriedCache({}, memory=1)
    with FakeTensorMode(), torch.no_grad():
        model = shell(config.model)
        with autocast("cpu", precision):
            model.model(torch.zeros(1, PROBE_TOKENS, dtype=torch.long), past_key_values=cache)
    states = sum(x.nbytes for name, x in cache.left.items() if name.startswith("state"))
    if config.data.carry == "states" and not states:
        raise PHAError("data.carry is states, and no branch of this model keeps any; use chunks")
    keys = sum(x.nbytes for x in cache.left.values()) - states  # of one token
    return states + keys * memory_of(config.data, config.model)


def _kept(
    model: PHAForCausalLM | ForeignModel,
    tokens: int,
    precision: str,
    compiled: bool,
    pieces: Pieces | None = None,
) -> list[tuple[int, torch.Size]]:
    """What autograd keeps of so many tokens in training: bytes and shape of each piece of memory.

    Weights are not among it. Compiled, the blocks are cut into forward and backward as Inductor
    cuts them, and nothing is generated.
    """
    saved: dict[int, torch.Tensor] = {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()._cdata
        if memory not in own:
            saved.setdefault(memory, tensor)
        return tensor

    if compiled:
        compile_blocks(model, backend="aot_eager_decomp_partition")
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        autocast("cpu", precision),
    ):
        past: Any = None if pieces is None else SequencePieces(pieces, tokens)
        model.train().states(torch.zeros(1, tokens, dtype=torch.long), cache=past)
    if compiled:
        torch._dynamo.reset()  # these graphs must not count towards the limit of the run's own
    return [(x.untyped_storage().nbytes(), x.shape) for x in saved.values()]


@dataclass(frozen=True)
class _Size:
    """What of a model decides what its run costs."""

    parameters: int
    flops_per_token: float
    layers: int
    width: int
    per_token: float  # bytes that autograd keeps


def _measure(config: TrainConfig, precision: str) -> _Size:
    """The size of a run's model, found without room for its weights."""
    length, compiled = config.data.sequence_length, config.run.compile
    if config.transformers.name is None:
        ours = config.model
        total = sum(count_parameters(ours).values())
        ranks = config.run.context_parallel
        kept = activation_bytes_per_token(ours, precision, compiled, ranks)
        flops = training_flops(ours, length)
        return _Size(total, flops, ours.num_hidden_layers, ours.hidden_size, kept)
    shape, tokens = foreign_shape(config), min(length, PROBE_MOST)
    with FakeTensorMode():
        model = make_foreign(shape)
        weights = {p.shape for p in model.parameters()}  # cast for autocast they do not scale
        found = _kept(model, tokens, precision, compiled)
        # All logits are among it: whether the loss can go in chunks shows only with weights.
        kept = sum(size for size, form in found if form not in weights) / tokens
        kept += 2 * 4 * shape.vocab_size
        total, multiplied = count_multiplied(model.inner)
    # What its attention and state spaces compute besides is not known.
    return _Size(total, 6.0 * multiplied, shape.num_hidden_layers, shape.hidden_size, kept)


def _divide(share: int, most: int) -> int:
    """Sequences of a forward pass, at most so many: pieces of a share as even as can be.

    They divide it, as a graph is compiled for each size, unless that would make small ones.
    """
    even = max(size for size in range(1, most + 1) if share % size == 0)
    return even if 2 * even > most else math.ceil(share / math.ceil(share / most))


def make_plan(
    config: TrainConfig,
    train_windows: int,
    device: torch.device,
    precision: str,
    processes: int,
    card: Card | None = None,
) -> Plan:
    """Work out a run whose training split has `train_windows` sequences.

    `config.model.vocab_size` must be that of the data, `precision` resolved; `processes` share a
    global batch. `card` stands in the place of `device`.

    Raises:
        PHAError: the batch cannot be divided as asked, or too little data for one step.
    """
    run, length = config.run, config.data.sequence_length
    ranks = run.context_parallel
    for key, several in (("context_parallel", ranks), ("shards", run.shards)):
        if processes % several:
            raise PHAError(
                f"run.{key} is {several}, and the number of processes ({processes}) no multiple of "
                "it; start as many with torchrun --nproc_per_node"
            )
    replicas = processes // ranks
    if run.global_batch % replicas:
        raise PHAError(
            f"run.global_batch ({run.global_batch}) must be a multiple of the number of "
            f"processes ({processes})" + f" over run.context_parallel ({ranks})" * (ranks > 1)
        )
    share, piece = run.global_batch // replicas, length // ranks
    if card is None:
        free, rate = free_memory(device), matmul_rate(device, precision)
    else:
        device, free, rate = torch.device("cuda"), card.memory, card.matmul_flops
    size = _measure(config, precision)
    parameters, per_token, width = size.parameters, size.per_token, size.width
    weights = parameters * 4 * 4 // run.shards
    if run.shards > 1:  # one block, and the embedding, are whole while they are used
        embedding = config.model.vocab_size * width
        weights += 4 * (embedding + (parameters - embedding) // size.layers)
    if device.type == "cpu":  # the copy that is written while training goes on
        weights += 3 * 4 * parameters
    carried = carried_bytes_per_row(config, precision)
    if run.gradient_checkpointing:
        # What enters each layer, in float32, and the inside of one layer at a time.
        per_token = 4 * size.layers * width + per_token / size.layers
    # The loss holds a chunk of logits and what is computed from it, and the head's gradient.
    memory = None if card is None else card.memory
    vocabulary = config.model.vocab_size
    chunk = min(chunk_logits(device, vocabulary, memory), share * piece * vocabulary)
    loss_bytes = 3 * 4 * chunk + 4 * vocabulary * width
    budget = 0.8 * free - weights - loss_bytes - carried * share
    fits = int(budget / (per_token * piece + carried))
    if device.type == "cpu":
        fits = min(fits, max(1, CPU_TOKENS // piece))
    if run.micro_batch is not None:
        micro = min(run.micro_batch, share)
    else:
        micro = _divide(share, max(1, min(share, fits)))
    steps_per_epoch = train_windows // run.global_batch
    if steps_per_epoch == 0:
        raise PHAError(
            f"the training split has {train_windows} sequences of {length} tokens, fewer than one "
            f"global batch of {run.global_batch}; lower run.global_batch or data.sequence_length"
        )
    steps, per_step = run.steps, run.global_batch * length
    flops_per_token = size.flops_per_token
    if steps is None:
        if run.flops is not None:
            steps = max(1, round(run.flops / (per_step * flops_per_token)))
        else:
            assert run.epochs is not None
            steps = max(1, round(run.epochs * steps_per_epoch))
    tokens = steps * per_step
    accumulation = math.ceil(share / micro)
    # Adding up in a ring: each part goes around twice. Sharded, it goes around once to be added up
    # in a group, after each micro-batch, and then a shard's part twice between groups.
    among = (run.shards - 1) / run.shards
    groups = processes // run.shards
    sent = accumulation * among + 2 * (groups - 1) / groups / run.shards
    gathered = {}
    if ranks > 1:
        # Forward once, backward twice.
        one = gathered_bytes(config.model, precision, length, ranks)
        gathered = {name: 3 * share * size for name, size in one.items()}
    if run.shards > 1:  # forward and backward
        gathered["weights"] = round(2 * accumulation * 4 * parameters * among)
    return Plan(
        parameters=parameters,
        steps=steps,
        tokens=tokens,
        steps_per_epoch=steps_per_epoch,
        micro_batch=micro,
        accumulation=accumulation,
        flops_per_token=flops_per_token,
        flops=flops_per_token * tokens,
        weights_bytes=weights,
        activation_bytes=int((per_token * piece + carried) * micro) + loss_bytes,
        carried_bytes=carried * share,
        free_bytes=free,
        devices=processes,
        gradient_bytes=round(4 * parameters * sent),
        gathered_bytes=gathered,
        matmul_flops=rate,
        seconds=flops_per_token * tokens / (rate * processes * ASSUMED_UTILISATION),
    )
