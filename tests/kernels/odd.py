"""Tensors whose numbers do not lie at their address as their shape says, and what has to come of steps with them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._pytree import tree_map_only

from hf_cwd import CWDOptimizer
from hf_cwd.rules import RULES

SHAPE = (12, 20)


class Wrapped(Tensor):
    """Has no memory, as torchao's tensors: holds a plain tensor, and does all on that."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = args, kwargs or {}
        found = func(*tree_map_only(cls, _inner, args), **tree_map_only(cls, _inner, kwargs))
        name = func._schema.name.removeprefix("aten::")
        if name.endswith("_") and isinstance(args[0], cls):
            return args[0]
        return cls(found) if name in ("detach", "clone", "zeros_like", "empty_like", "alias") else found


def _inner(wrapped: Wrapped) -> Tensor:
    return wrapped.inner


class Listened(Tensor):
    """Has memory, and is asked at each function what it is to do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Renamed(Tensor):
    """Is a tensor as any other."""


def columns(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor], 1)[:, tensor.shape[1] :]


def behind(tensor: Tensor) -> Tensor:
    """At an address that is no multiple of 16."""
    return torch.cat([torch.zeros(1), tensor.flatten()])[1:].view(tensor.shape)


# What makes such a tensor of a plain one, by name.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "wrapper": lambda t: Wrapped(t.clone()),
    "collective under way": lambda t: AsyncCollectiveTensor(t.clone()),
    "torch function": lambda t: t.clone().as_subclass(Listened),
    "negative bit": lambda t: torch._neg_view(-t),
    "plain subclass": lambda t: t.clone().as_subclass(Renamed),
    "misaligned": behind,
    "columns": columns,
    "transposed": lambda t: t.t().contiguous().t(),
}
LIE_OTHERWISE = ("columns", "transposed")
ARE_PLAIN = ("plain subclass", "misaligned")
PLACES = ("parameter", "gradient", "states")


def plain(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Wrapped):
        return tensor.inner
    return tensor.elem if isinstance(tensor, AsyncCollectiveTensor) else tensor.as_subclass(Tensor)


def trained(rule: str, kind: str | None, place: str, **options) -> tuple[list[Tensor], CWDOptimizer]:
    """A parameter beside an ordinary one after three steps, where a tensor of the kind is in that place."""
    generator = torch.Generator().manual_seed(0)
    make = KINDS[kind] if kind else Tensor.clone
    made = {name: make if name == place else Tensor.clone for name in PLACES}
    first, second = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    params = [torch.nn.Parameter(made["parameter"](first)), torch.nn.Parameter(second)]
    hyper = {"momentum": 0.9} if rule == "sgd" else {}
    optimizer = CWDOptimizer(
        [("odd", params[0]), ("ordinary", params[1])], lr=0.1, weight_decay=0.1, algorithm=rule, **hyper, **options
    )
    for _ in range(3):
        for p, each in zip(params, (made["gradient"], Tensor.clone), strict=True):
            p.grad = each(torch.randn(SHAPE, generator=generator))
        optimizer.step()
        state = optimizer.state[params[0]]
        for key in RULES[rule].state_keys(optimizer.param_groups[0]):
            state[key] = made["states"](state[key])
    return [plain(p.detach()).clone() for p in params], optimizer


def problems(rule: str) -> Iterator[str]:
    """Differences between steps with odd tensors and those with ordinary ones."""
    right, _ = trained(rule, None, "")
    for place in PLACES:
        for kind in KINDS:
            found, _ = trained(rule, kind, place)
            for name, p, q in zip(("odd", "ordinary"), found, right, strict=True):
                if not torch.allclose(p, q, rtol=0, atol=1e-6):
                    yield f"{kind} as {place}: the {name} parameter is {float((p - q).abs().max()):.3g} off"
