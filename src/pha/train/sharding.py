"""Sharding (FSDP2): every process holds a part of each weight, its gradient and its moments."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from pha.foreign import ForeignModel
from pha.loading import LanguageModel
from pha.model.block import ParallelBlock
from pha.results import LayerMixing
from pha.utils.compiling import blocks_of

Module = TypeVar("Module", bound=nn.Module)


def shard(model: LanguageModel, shards: int, device: torch.device) -> None:
    """Cut every parameter into parts for `shards` processes that follow each other, in place.

    The weights of a block are whole while it runs, gathered from all. Where there are more
    processes, each group of so many holds all weights, and the groups add their gradients up:
    hybrid sharding, in which weights never leave a group.

    Args:
        model: whole, the same in every process.
        shards: of which the number of processes is a multiple.
        device: of this process.
    """
    replicas = dist.get_world_size() // shards
    mesh = init_device_mesh(device.type, (replicas, shards), mesh_dim_names=("replica", "shard"))
    for module in (*blocks_of(model), model):
        fully_shard(module, mesh=mesh if replicas > 1 else mesh["shard"])
    # The other way into a model beside its loss: what evaluations read.
    register_fsdp_forward_method(model, "states")
    # Some ways of launching have left models whole without a word.
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one every process has to ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What belongs here of a whole tensor that a parameter, sharded or not, is to have or keep."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh, here = parameter.device_mesh, parameter.to_local().device
    return distribute_tensor(tensor.to(here), mesh, parameter.placements, src_data_rank=None)


def shallow_copy(module: Module) -> Module:
    """Another module of the same class as before it was sharded, that holds the same things."""
    kind = type(module)
    if isinstance(module, FSDPModule):
        kind = kind.__mro__[2]  # of which torch derived one, with itself in front
    found = kind.__new__(kind)
    found.__dict__.update(module.__dict__)
    return found


def norms(tensors: list[Tensor]) -> Tensor:
    """The norm of each tensor, (N,)."""
    first = tensors[0]
    if not isinstance(first, DTensor):
        return torch.stack(torch._foreach_norm(tensors))
    here = torch.stack(torch._foreach_norm([x.to_local() for x in tensors]))  # type: ignore[attr-defined]
    squares = here.double().square()
    dist.all_reduce(squares, group=first.device_mesh.get_group("shard"))
    return squares.sqrt().float()


def mixing_of(model: LanguageModel) -> list[LayerMixing]:
    """The mixing of every layer; none of a model that is not ours."""
    if isinstance(model, ForeignModel):
        return []
    found = []
    for layer in model.model.layers:
        if isinstance(layer, ParallelBlock):
            if isinstance(layer, FSDPModule):
                layer.unshard()
            found.append(LayerMixing(**layer.mixing.describe()))
            if isinstance(layer, FSDPModule):
                layer.reshard()
    return found
