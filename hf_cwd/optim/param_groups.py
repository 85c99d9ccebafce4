"""What an optimizer is given to train, parameters, with names or not, or groups of them: read, or refused."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

TAKES = (
    "an optimizer takes an iterable of Tensors, of (name, Tensor) pairs, or of dicts with such an iterable as 'params'"
)
# Key under which a routing leaves the names of a group's parameters, for messages only; it is no part of the group.
ROUTED_NAMES = "hf_cwd_names"


def as_groups(params: Any) -> list[dict[str, Any]]:
    """The ``params`` of an optimizer as new group dicts, see :func:`as_group`.

    Raises:
        TypeError: something else than parameters or groups, or some of both.
        ValueError: nothing at all.
    """
    entries = _listed(params)
    if not entries:
        raise ValueError(
            "the optimizer got an empty parameter list. A generator, such as model.parameters(), can be read once "
            "only: make a list of it, or call it again"
        )
    dicts = [isinstance(entry, dict) for entry in entries]
    if any(dicts) and not all(dicts):
        raise TypeError(
            f"{TAKES}, and got {dicts.count(True)} dicts among {len(dicts)} entries: put the others into one"
        )
    return [as_group(entry) for entry in entries] if all(dicts) else [as_group({"params": entries})]


def as_group(group: Any) -> dict[str, Any]:
    """A parameter group as a new dict, with its parameters in a list, and their names in pairs with them.

    Raises:
        TypeError: no dict, or something that is no parameter.
        ValueError: no ``params``, names of some parameters only, or a Tensor that is computed from others.
    """
    if not isinstance(group, dict):
        raise TypeError(f"param_group must be a dict, but got {_typename(group)}")
    if "params" not in group:
        raise ValueError(f"a parameter group has no 'params', only {', '.join(map(repr, group)) or 'nothing'}")
    result = {key: value for key, value in group.items() if key != "param_names"}
    params = group["params"]
    entries = [params] if isinstance(params, Tensor) else _listed(params)
    pairs = [isinstance(entry, tuple) for entry in entries]
    if any(pairs) and not all(pairs):
        raise ValueError(f"{pairs.count(False)} of {len(pairs)} parameters of a group have no name: name all or none")
    for number, entry in enumerate(entries):
        _check_entry(number, entry)
    names = group.get("param_names")
    if names is not None and not any(pairs):
        if len(names) != len(entries):
            raise ValueError(f"a parameter group has {len(names)} param_names and {len(entries)} parameters")
        entries = list(zip(names, entries, strict=True))
    return result | {"params": entries}


def check_shared(group: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where a parameter of a group is in one of the others, or only some groups have names."""
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
    for number, other in enumerate(others):
        both = set(other["params"]).intersection(tensors)
        if both:
            shapes = ", ".join(str(tuple(p.shape)) for p in both)
            raise ValueError(
                f"parameters of shape {shapes} are in parameter groups {number} and {len(others)}: a parameter can be "
                "in one group only"
            )
        named = any(isinstance(entry, tuple) for entry in group["params"])
        if named != ("param_names" in other):
            with_names, without = (len(others), number) if named else (number, len(others))
            raise ValueError(
                f"parameter group {with_names} has names of its parameters, and group {without} has none: name all or "
                "none"
            )


def _listed(params: Any) -> list[Any]:
    if isinstance(params, set | frozenset):
        raise TypeError("parameters in a set have another order in each run: give a list")
    if isinstance(params, Tensor | str | Mapping) or not isinstance(params, Iterable):
        raise TypeError(f"{TAKES}, and got {_typename(params)}{_hint(params)}")
    return list(params)


def _check_entry(number: int, entry: Any) -> None:
    name, p = entry if isinstance(entry, tuple) and len(entry) == 2 else (None, entry)
    if isinstance(entry, tuple) and not (isinstance(name, str) and isinstance(p, Tensor)):
        raise TypeError(f"{TAKES}, and entry {number} is a tuple of {', '.join(map(_typename, entry)) or 'nothing'}")
    if not isinstance(p, Tensor):
        raise TypeError(f"{TAKES}, and entry {number} is {_typename(p)}{_hint(p)}")
    if not p.is_leaf and not p.retains_grad:
        raise ValueError(
            f"parameter {name or number} of shape {tuple(p.shape)} is computed from other Tensors: give those, or "
            "nn.Parameter(p.detach())"
        )


def _typename(value: Any) -> str:
    return "None" if value is None else torch.typename(value)


def _hint(value: Any) -> str:
    if isinstance(value, nn.Module):
        return ": give model.parameters()"
    if isinstance(value, Mapping):
        return ": put it into a list" if "params" in value else ": give its values()"
    if isinstance(value, Tensor):
        return ": put it into a list"
    return ": call it, as in model.parameters()" if callable(value) else ""
