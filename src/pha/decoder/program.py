"""A model as instructions for `pha.decoder.kernel`, which writes one token at a time on a CPU.

What a layer computes is said here a second time, step by step, in the terms of the kernel; tests
hold the two together. What has no such form (branches of one's own, adapters, hooks, quantised
layers, windows, other positions) is left to the layers themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pha.decoder import instructions as op
from pha.decoder import runtime
from pha.mixers.extended_gss import ExtendedGSS
from pha.model.attention import GroupedQueryAttention
from pha.model.backbone import Backbone
from pha.model.block import ParallelBlock, Residual, SequentialBlock
from pha.model.ffn import AuxiliaryFFN, SwiGLU
from pha.model.gss import GROUP, GatedStateSpace
from pha.model.mixing import LearnableMixing
from pha.model.norm import RMSNorm
from pha.utils.plain import Plain

MOST_ROWS = 8  # sequences beyond which torch's matrix products win
BYTES_PER_THREAD = 2**21  # of weights, below which another thread gains nothing

# The layers that this file says again, and what else than weights it takes from them.
FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward
    for kind in (
        *(Backbone, ParallelBlock, SequentialBlock, Residual, LearnableMixing, RMSNorm),
        *(GatedStateSpace, ExtendedGSS, GroupedQueryAttention, AuxiliaryFFN, SwiGLU),
        *(nn.Embedding, nn.Linear, nn.Dropout, nn.Identity, nn.ModuleList, nn.ModuleDict),
    )
}
SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    RMSNorm: ("eps",),
    Residual: ("alpha", "post"),
    GatedStateSpace: ("input_scaling",),
    ExtendedGSS: ("input_scaling", "output_gate", "convolution", "input_dt"),
    GroupedQueryAttention: ("cosine", "positions", "window", "theta", "length_scaling"),
    nn.Dropout: ("p", "training"),
}


class _Inexpressible(Exception):  # noqa: N818 - never leaves this module
    """Some part of the model has no instructions."""


def make_decoder(backbone: Backbone, head: nn.Module, batch: int) -> Decoder | None:
    """The instructions for B sequences, or None where the layers have to do it."""
    plain = Plain((backbone, head), FORWARDS, SETTINGS)
    if batch > MOST_ROWS or not plain.holds():
        return None
    if any(type(m) is nn.Dropout and m.p > 0 and m.training for m in backbone.modules()):
        return None
    weight: Tensor = head.get_parameter("weight")
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    if any(x.device.type != "cpu" or not x.is_contiguous() for x in plain.parameters):
        return None
    run, same = runtime.kernel("run", weight.dtype), runtime.kernel("same", torch.float32)
    if run is None or same is None:
        return None
    try:
        return Decoder(backbone, head, batch, plain, run, same)
    except _Inexpressible:
        return None


class Decoder:
    """The forward pass of one token for each of B sequences, as instructions.

    Attributes:
        batch: B.
        key_layers: layers that keep keys and values, and the shape (G, K) of one key.
        state_layers: layers that keep a state, and its size.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        batch: int,
        plain: Plain,
        run: Callable[..., None],
        same: Callable[..., bool],
    ) -> None:
        self.batch, self.plain, self.run, self.same = batch, plain, run, same
        weight: Tensor = head.get_parameter("weight")
        self.dtype, self.vocabulary = weight.dtype, weight.shape[0]
        self.key_layers: dict[int, tuple[int, int]] = {}
        self.state_layers: dict[int, int] = {}
        self._patches: list[tuple[int, str, int]] = []  # instruction, what it points at, layer
        self._steps: list[list[int]] = []
        self._constants: list[Tensor] = []
        self._read = {id(backbone.embed_tokens.weight)}  # matrices, which are read where they lie
        self._used = self._width = 0
        self._ones = self._constant(torch.tensor([0.0, 1.0]))
        self.d = backbone.config.hidden_size
        self.x = self._slot(self.d)
        for index, layer in enumerate(backbone.layers):
            self._block(layer, index)
        if isinstance(backbone.norm, RMSNorm):
            self._norm(backbone.norm, self.x, self.x)
        self._wait()
        self._linear(head, self.x, self._slot(self.vocabulary))
        self.steps = np.array(self._steps, np.int64)
        self.constants = torch.cat(self._constants).numpy()
        # As an array: a tensor made in inference mode cannot be written to outside of it.
        self.work = torch.zeros(batch, self._width).numpy()
        matrices = [x for x in plain.parameters if id(x) in self._read]
        size = sum(x.nbytes for x in matrices)
        self.threads = max(1, min(torch.get_num_threads(), size // BYTES_PER_THREAD))
        # Of all others constants were made: they must still be what they were then.
        small = [x.detach() for x in plain.parameters if id(x) not in self._read]
        self._small = (
            np.array([x.data_ptr() for x in small], np.int64),
            np.array([x.nbytes for x in small], np.int64),
            torch.cat([x.flatten().view(torch.uint8) for x in small]).numpy(),
        )

    def is_valid(self) -> bool:
        """Whether the model is still what the instructions were made of."""
        return self.plain.holds() and self.same(*self._small)

    def step(
        self,
        x_Bd: Tensor,
        rotary: tuple[Tensor, Tensor],
        keys: Mapping[int, tuple[Tensor, Tensor]],
        states: Mapping[int, Tensor],
        length: int,
        starts: Tensor,
    ) -> Tensor:
        """Logits (B, V) in the dtype of the weights after one more token, which joins the past.

        Args:
            x_Bd: scaled embeddings of the tokens, (B, d).
            rotary: cosine and sine (B or 1, 1, K / 2) of their positions.
            keys: layer -> keys and values (B, G, capacity, K), of which the first `length` count.
            states: layer -> (B, n) float32; overwritten.
            length: tokens seen so far, and the place of the new one.
            starts: (B,) int64, the first place that each sequence attends to.
        """
        capacity = 0
        for number, what, layer in self._patches:
            if what == "state":
                self.steps[number, op.ADDRESS] = states[layer].data_ptr()
            else:
                key, value = keys[layer]
                capacity = key.shape[2]
                self.steps[number, op.ADDRESS] = key.data_ptr()
                self.steps[number, op.AUX2] = value.data_ptr()
        self.work[:, self.x : self.x + self.d] = x_Bd.numpy()
        logits = torch.empty(self.batch, self.vocabulary, dtype=self.dtype)
        angles = torch.cat([part.expand(self.batch, 1, -1) for part in rotary], dim=-1)
        runtime.together(
            self.run,
            self.threads,
            self.batch,
            length,
            capacity,
            self.steps,
            self.constants,
            self.work.reshape(-1),
            angles.contiguous().view(-1).numpy(),
            starts.numpy(),
            np.zeros(1, np.int64),
            _array(logits),
        )
        return logits

    # Instructions

    def _slot(self, size: int) -> int:
        """A place for `size` numbers of each sequence."""
        self._used, place = self._used + -(-size // 16) * 16, self._used
        self._width = max(self._width, self._used)
        return place

    def _constant(self, values: Tensor) -> int:
        place = sum(x.numel() for x in self._constants)
        self._constants.append(values.detach().float().flatten().clone())
        return place

    def _number(self, value: float) -> int:
        return self._constant(torch.tensor([value]))

    def _emit(self, instruction: int, **fields: int) -> None:
        row = [0] * op.FIELDS
        row[op.OP] = instruction
        for name, value in fields.items():
            row[getattr(op, name.upper())] = value
        self._steps.append(row)

    def _wait(self) -> None:
        """Let what follows see what all threads have written."""
        if self._steps:
            self._steps[-1][op.WAIT] = 1

    def _point(self, what: str, layer: int) -> None:
        """The last instruction is to point at the past of `layer`."""
        self._patches.append((len(self._steps) - 1, what, layer))

    def _linear(self, linear: nn.Module, source: int, to: int) -> None:
        weight: Tensor = linear.get_parameter("weight")
        if weight.dtype != self.dtype or linear.bias is not None:
            raise _Inexpressible
        self._read.add(id(weight))
        size, inner = weight.shape
        self._emit(
            op.LINEAR,
            target=to,
            source=source,
            size=size,
            inner=inner,
            address=weight.data_ptr(),
        )

    def _norm(
        self, norm: nn.Module, source: int, to: int, weight: float = 1.0, add: bool = False
    ) -> None:
        if not isinstance(norm, RMSNorm):
            raise _Inexpressible
        self._emit(
            op.NORM,
            target=to,
            source=source,
            size=norm.weight.numel(),
            aux=self._constant(norm.weight),
            first=self._number(weight),
            second=self._number(norm.eps),
            flag=int(add),
        )

    # Layers

    def _block(self, layer: nn.Module, index: int) -> None:
        self._used = self.x + -(-self.d // 16) * 16  # all but x is used anew in each layer
        if type(layer) is ParallelBlock:
            mixing = layer.mixing
            weights = mixing.weights().tolist()

            def mix(z: int) -> int:
                outputs = self._branches(dict(layer.branches.items()), index, z)
                to = self._slot(self.d)
                for i, name in enumerate(mixing.names):
                    self._norm(mixing.norms[name], outputs[name], to, weights[i], add=i > 0)
                return to

            self._residual(layer.mix_residual, mix)
        elif type(layer) is SequentialBlock:
            for name, branch in layer.branches.items():
                self._residual(
                    layer.residuals[name],  # type: ignore[arg-type]
                    lambda z, n=name, b=branch: self._branches({n: b}, index, z)[n],  # type: ignore[misc]
                )
        else:
            raise _Inexpressible
        if layer.has_primary_ffn:
            ffn: SwiGLU = layer.primary_ffn
            self._residual(
                layer.ffn_residual, lambda z: self._lockstep({"": self._swiglu(ffn, z)})[""]
            )

    def _residual(self, residual: Residual, f: Callable[[int], int]) -> None:
        if residual.post:
            self._wait()
            to = f(self.x)
            self._emit(
                op.ADD,
                target=self.x,
                source=to,
                size=self.d,
                first=self._number(residual.alpha),
                second=self._ones + 1,
            )
            self._norm(residual.norm, self.x, self.x)
            return
        z = self._slot(self.d)
        self._norm(residual.norm, self.x, z)
        self._wait()
        self._emit(
            op.ADD,
            target=self.x,
            source=f(z),
            size=self.d,
            first=self._ones + 1,
            second=self._number(1 / residual.alpha),
        )

    def _branches(self, branches: dict[str, nn.Module], index: int, z: int) -> dict[str, int]:
        makers: dict[str, Iterator[int]] = {}
        for name, branch in branches.items():
            if type(branch) in (GatedStateSpace, ExtendedGSS):
                makers[name] = self._gss(branch, index, z)  # type: ignore[arg-type]
            elif type(branch) is GroupedQueryAttention:
                makers[name] = self._attention(branch, index, z)
            elif type(branch) is AuxiliaryFFN:
                makers[name] = self._swiglu(branch.swiglu, z)
            else:
                raise _Inexpressible
        return self._lockstep(makers)

    def _lockstep(self, makers: dict[str, Iterator[int]]) -> dict[str, int]:
        """Run the stages of several branches side by side, with one wait after each; their slots.

        Each yields where the next stage needs all of the one before: its result, known by then.
        """
        results: dict[str, int] = {}
        while makers:
            for name, maker in list(makers.items()):
                try:
                    results[name] = next(maker)
                except StopIteration:
                    del makers[name]
            if makers:
                self._wait()
        return results

    def _gss(self, branch: GatedStateSpace, index: int, z: int) -> Iterator[int]:
        if index in self.state_layers:  # instructions have the first state of a layer alone
            raise _Inexpressible
        n = branch.log_A.numel()
        gate, value, h, y = (self._slot(size) for size in (n, n, n, self.d))
        self._linear(branch.W_g, z, gate)
        self._linear(branch.W_B, z, value)
        into = {"target": h, "source": gate, "aux": value, "size": n}
        extended = branch if isinstance(branch, ExtendedGSS) else None
        if extended is not None and extended.convolution:
            raise _Inexpressible
        if extended is not None and extended.output_gate:
            self._linear(extended.W_o, z, reading := self._slot(n))
        if extended is not None and extended.input_dt:
            self._linear(extended.W_dt, z, steps := self._slot(n // GROUP))
            yield y  # one of its numbers is for states of several threads
            self._emit(
                op.FORGET,
                **into,
                aux2=steps,
                first=self._constant(-branch.log_A.exp()),
                second=self._constant(extended.dt_offset()),
                flag=int(branch.input_scaling == "zero-order-hold"),
            )
        else:
            a, b = branch.decay_and_scale()
            self._emit(op.GATE, **into, first=self._constant(a), second=self._constant(b))
        self._point("state", index)
        self.state_layers[index] = n
        if extended is not None and extended.output_gate:
            self._emit(op.SWIGLU, target=(read := self._slot(n)), source=reading, aux=h, size=n)
            h = read
        yield y
        self._linear(branch.W_C, h, y)
        yield y

    def _attention(self, branch: GroupedQueryAttention, index: int, z: int) -> Iterator[int]:
        own = branch.window, branch.theta, branch.length_scaling
        if branch.positions != "rotary" or any(option is not None for option in own):
            raise _Inexpressible
        heads, groups, inner = branch.heads, branch.kv_heads, branch.head_dim
        q, k, v = (self._slot(count * inner) for count in (heads, groups, groups))
        mixed, y = self._slot(heads * inner), self._slot(self.d)
        for linear, to in ((branch.W_q, q), (branch.W_k, k), (branch.W_v, v)):
            self._linear(linear, z, to)
        yield y
        if branch.cosine:
            scale = branch.temperatures()
        else:
            scale = torch.full((heads,), 1 / math.sqrt(inner))
        for to, count, factor in ((q, heads, scale), (k, groups, torch.ones(groups))):
            self._emit(
                op.HEADS,
                source=to,
                size=count,
                inner=inner,
                first=self._constant(factor),
                flag=int(branch.cosine),
            )
        # The thread that turned a key also keeps it: both share out the same heads.
        self._emit(op.APPEND, source=k, aux=v, size=groups, inner=inner)
        self._point("keys", index)
        self.key_layers[index] = groups, inner
        yield y
        self._emit(op.ATTEND, target=mixed, source=q, aux=groups, size=heads, inner=inner)
        self._point("keys", index)
        yield y
        self._linear(branch.W_o, mixed, y)
        yield y

    def _swiglu(self, ffn: SwiGLU, z: int) -> Iterator[int]:
        size = ffn.W_gate.out_features
        gate, up, inner, y = (self._slot(count) for count in (size, size, size, self.d))
        self._linear(ffn.W_gate, z, gate)
        self._linear(ffn.W_up, z, up)
        self._emit(op.SWIGLU, target=inner, source=gate, aux=up, size=size)
        yield y
        self._linear(ffn.W_down, inner, y)
        yield y


def _array(x: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor, flat; bfloat16 as uint16."""
    x = x.detach().view(-1)
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
