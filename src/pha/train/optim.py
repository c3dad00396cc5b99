"""The right optimiser for each parameter, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pha.foreign import ForeignModel
from pha.model import Branch
from pha.train.config import OptimizerConfig, ScheduleConfig
from pha.train.sharding import part, whole
from pha.utils.errors import PHAError

# Of x -> a x + b x^3 + c x^5, which draws singular values towards 1: Keller Jordan's for Muon.
ROOT = 3.4445, -4.7750, 2.0315
ROUNDS = 5


def orthogonal(x: Tensor) -> Tensor:
    """A matrix with the singular vectors of x (M, N), and singular values of about 1, float32.

    Newton and Schulz's iteration. On a GPU it runs in bfloat16, whose errors it evens out.
    """
    y = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    y = y / y.norm().clamp(min=1e-7)
    if is_tall := y.shape[0] > y.shape[1]:
        y = y.T
    a, b, c = ROOT
    for _ in range(ROUNDS):
        square = y @ y.T
        y = torch.addmm(y, torch.addmm(square, square, square, beta=b, alpha=c), y, beta=a)
    return (y.T if is_tall else y).float()


class Muon(torch.optim.Optimizer):
    """Momentum with Nesterov's look ahead, made orthogonal; matrices may be sharded.

    As `torch.optim.Muon` with updates scaled to the size of AdamW's (arXiv 2502.16982), but for
    two things. Off a GPU it computes in float32, so that rounding does not tell how many processes
    share a batch. And of a sharded matrix the momentum is gathered once and orthogonalised whole.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, weight_decay: float, momentum: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient; nothing evaluates the model again here."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
                mean = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = part(orthogonal(whole(p.grad.lerp(mean, momentum))), p)
                p.mul_(1 - rate * group["weight_decay"])
                p.add_(update, alpha=-rate * 0.2 * math.sqrt(max(p.shape)))


class MuonAdamW(torch.optim.Optimizer):
    """Muon, for matrices, and AdamW as one optimiser: one list of groups, one checkpoint.

    The two share its groups and its state, each steps its own.
    """

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        first = len(self.muon.param_groups)
        self.muon.param_groups = self.param_groups[:first]
        self.adamw.param_groups = self.param_groups[first:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        self.muon.step()
        self.adamw.step()


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW | MuonAdamW:
    """AdamW in three groups: matrices decay, vectors do not, and some have a capped rate.

    Norm gains, mixing scalars and attention scales are vectors. Branches name the parameters whose
    rate is capped, such as decays and time steps, and matrices that are none to an optimiser. With
    `muon` the matrices but for the embedding, which is the head too, go to Muon.

    Raises:
        PHAError: Muon is asked for, and the model has no matrix for it.
    """
    hidden, matrices, vectors, capped = [], [], [], []
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if isinstance(model, ForeignModel):
        embeddings |= {id(p) for p in model.head.parameters()}  # which may be another matrix
    with_cap, without_decay = (_named(model, kind) for kind in ("capped_rate", "no_decay"))
    for parameter in model.parameters():
        if id(parameter) in with_cap:
            capped.append(parameter)
        elif parameter.ndim < 2 or id(parameter) in without_decay:
            vectors.append(parameter)
        elif config.kind == "muon" and parameter.ndim == 2 and id(parameter) not in embeddings:
            hidden.append(parameter)
        else:
            matrices.append(parameter)
    groups = (
        (matrices, config.weight_decay, math.inf),
        (vectors, 0.0, math.inf),
        (capped, 0.0, config.state_space_learning_rate),
    )
    adamw = torch.optim.AdamW(
        [{"params": p, "weight_decay": decay, "rate_cap": cap} for p, decay, cap in groups if p],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )
    if config.kind == "adamw":
        return adamw
    if not hidden:
        raise PHAError("the model has no matrix for Muon; set optimizer.kind to adamw")
    rate = config.muon_learning_rate or config.learning_rate
    group = {"params": hidden, "rate_cap": math.inf, "rate_scale": rate / config.learning_rate}
    muon = Muon([group], rate, config.weight_decay, config.muon_momentum)
    return MuonAdamW(muon, adamw)


def _named(model: nn.Module, kind: str) -> set[int]:
    """The parameters that branches, or a model that is not ours, name in their attribute `kind`."""
    branches = (module for module in model.modules() if isinstance(module, Branch | ForeignModel))
    return {
        id(parameter)
        for branch in branches
        for name, parameter in branch.named_parameters()
        if name in getattr(branch, kind)
    }


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, at its own scale and up to its own cap."""
    for group in optimizer.param_groups:
        group["lr"] = min(rate * group.get("rate_scale", 1.0), group["rate_cap"])


class Schedule:
    """Learning rate by step; the plateau kind also listens to validation perplexities."""

    def __init__(self, config: ScheduleConfig, peak: float, total_steps: int) -> None:
        self.config, self.peak, self.total_steps = config, peak, total_steps
        steps = config.warmup_steps
        self.warmup = round(config.warmup_fraction * total_steps) if steps is None else steps
        self.scale = 1.0
        self.best = math.inf
        self.waited = 0

    def rate(self, step: int) -> float:
        """The rate of the optimiser step number `step`, counted from 0."""
        config, warmup = self.config, self.warmup
        if step < warmup:
            return self.peak * (step + 1) / warmup
        if config.kind == "plateau":
            return self.peak * max(self.scale, config.floor)
        if config.kind == "constant":
            return self.peak
        last = self.total_steps - 1
        if config.kind == "warmup-stable-decay":
            decay = max(1, round(config.decay_fraction * self.total_steps))
            left = min(1.0, max(0, last - step) / decay)
            return self.peak * (config.floor + (1 - config.floor) * left)
        span = max(1, last - warmup)
        turned = (1 + math.cos(math.pi * min(1.0, (step - warmup) / span))) / 2
        return self.peak * (config.floor + (1 - config.floor) * turned)

    def observe(self, perplexity: float) -> None:
        """Take note of a validation perplexity; reduce the rate after too many without a best."""
        if perplexity < self.best:
            self.best, self.waited = perplexity, 0
            return
        self.waited += 1
        if self.waited > self.config.plateau_patience:
            self.scale, self.waited = self.scale * self.config.plateau_factor, 0

    def state(self) -> dict[str, float]:
        """What `load_state` needs, plain JSON values."""
        best = self.best if math.isfinite(self.best) else None
        return {"scale": self.scale, "best": best, "waited": self.waited}  # type: ignore[dict-item]

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.scale, self.waited = float(state["scale"]), int(state["waited"])
        self.best = math.inf if state["best"] is None else float(state["best"])
