"""Whether calling a module does what its class says and nothing else: asked before any fast path.

A fast path computes what some modules would, without calling them. So it may run only where each of
them is exactly of a known class, with ordinary weights, and where nothing listens or stands in
between: a hook, a replaced `forward`, an adapter, offloading, quantisation. Everything else runs
the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, repeat
from operator import contains, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

Forwards = Mapping[type[nn.Module], Callable[..., Any]]
"""Class -> the `forward` that a fast path stands for, taken before anybody could replace it."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ANY_MODULE = [
    *(torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks),
    *(torch_modules._global_backward_hooks, torch_modules._global_backward_pre_hooks),
]


class Plain:
    """Modules as they are now, and whether they are still that.

    Looking again takes microseconds, so that it can be done at every token.

    Args:
        roots: the modules that a fast path stands for, with all that they contain.
        forwards: the classes that it knows.
        settings: class -> attributes of its modules that it has looked at.

    Attributes:
        parameters: of all modules.
    """

    def __init__(
        self,
        roots: Iterable[nn.Module],
        forwards: Forwards,
        settings: Mapping[type[nn.Module], Iterable[str]],
    ) -> None:
        modules = [module for root in roots for module in root.modules()]
        self._modules, self._types = modules, [type(module) for module in modules]
        self._known = set(self._types) <= set(forwards)
        self._forwards = [(kind, forwards.get(kind)) for kind in dict.fromkeys(self._types)]
        self._names = [vars(module) for module in modules]
        self._hooks = [vars(module)[name] for module in modules for name in _HOOKS] + _ANY_MODULE
        self._parts: list[dict[str, Any]] = [
            part
            for module in modules
            for part in (module._modules, module._parameters, module._buffers)
            if part
        ]
        self._contents = [*self._now(), _END]
        places = [
            (vars(module), name) for module in modules for name in settings.get(type(module), ())
        ]
        self._dicts, self._keys = [d for d, _ in places], [key for _, key in places]
        self._values = list(map(getitem, self._dicts, self._keys))
        tensors = {id(x): x for x in self._contents if isinstance(x, Tensor)}
        self.parameters = list(tensors.values())
        self._known &= all(_is_ordinary(tensor) for tensor in self.parameters)
        self._pointers = [x.data_ptr() for x in self.parameters] if self._known else []

    def holds(self) -> bool:
        """Whether the modules did only what their classes say, and do so still."""
        try:
            return (
                self._known
                and not any(self._hooks)
                and not any(map(contains, self._names, repeat("forward")))
                and all(map(is_, map(type, self._modules), self._types))
                and all(kind.forward is forward for kind, forward in self._forwards)
                and all(map(is_, self._contents, chain(self._now(), [_END])))
                and all(map(is_, map(getitem, self._dicts, self._keys), self._values))
                and list(map(Tensor.data_ptr, self.parameters)) == self._pointers
            )
        except KeyError:  # something that was there has gone
            return False

    def _now(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._parts))


_END = object()
_LINEAR = nn.Linear.forward


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling `module` multiplies with its weight and does nothing else.

    The same as `Plain` asks of a tree of modules, in terms that torch.compile can trace.
    """
    return (
        type(module) is nn.Linear
        and nn.Linear.forward is _LINEAR
        and "forward" not in module.__dict__
        and module.bias is None
        and _is_ordinary(module.weight)
        and not any(len(getattr(module, name)) for name in _HOOKS)
        and not any(len(hooks) for hooks in _ANY_MODULE)
    )


def nothing_intercepts() -> bool:
    """Whether operations on tensors just run: no tracing, transforms or modes that look at them."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether a weight is plain numbers that lie in memory."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type != "meta"
    )
