"""What parameter groups were made of: FSDP2 and DeepSpeed put other tensors in the place of a model's parameters."""

import weakref
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_cwd.sharding import zero
from hf_cwd.sharding.zero import FlatShard

Group = MutableMapping[str, Any]


@dataclass
class _Origin:
    """Of one group, which is found by being the same object: its place may change."""

    group: Group
    names: list[str] | None
    params: list[weakref.ref[Tensor]]  # where it is replaced, a full parameter is to be freed

    def __getstate__(self) -> dict[str, Any]:
        return {"group": self.group, "names": self.names, "params": []}


class Origins:
    """The origin of each of an optimizer's groups."""

    def __init__(self) -> None:
        self._origins: list[_Origin] = []
        self._flat: dict[Tensor, FlatShard | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_origins": self._origins, "_flat": {}}

    def add(self, group: Group, names: list[str] | None) -> None:
        self._origins.append(_Origin(group, names, list(map(weakref.ref, group["params"]))))

    def pop(self) -> None:
        """Forgets the last one that was added."""
        self._origins.pop()

    def replace(self, old: Sequence[Group], new: Sequence[Group]) -> None:
        """Other groups take the places of these."""
        pairs = [(self._of(group), other) for group, other in zip(old, new, strict=True)]
        for origin, other in pairs:
            if origin is not None:
                origin.group = other

    def flat(self, p: Tensor, group: Group, *, needed: bool = True) -> FlatShard | None:
        """What lies in ``p`` if it is a flat tensor of DeepSpeed's that stands for the group's parameters, else None.

        Raises:
            ValueError: it is one, but not in a way that is known here, see
                :func:`hf_cwd.sharding.zero.flat_shard`. With ``needed`` False the answer is None then.
        """
        if p.ndim != 1:
            return None
        if p not in self._flat:
            try:
                self._flat[p] = self._find(p, group)
            except ValueError:
                if needed:
                    raise
                self._flat[p] = None
        return self._flat[p]

    def _find(self, p: Tensor, group: Group) -> FlatShard | None:
        origin = self._of(group)
        refs = [] if origin is None else origin.params
        alive = [(i, param) for i, ref in enumerate(refs) if (param := ref()) is not None]
        params = [param for _, param in alive]
        if any(param is p for param in params) or not zero.is_sharded(params):
            return None
        return zero.flat_shard(p, params, [self._name(origin, i, param) for i, param in alive])

    @property
    def has_flat(self) -> bool:
        """Whether flat tensors have been stepped."""
        return any(flat is not None for flat in self._flat.values())

    def describe(self, p: Tensor, position: int, group: Group) -> str:
        """A parameter in words, with its name where the optimizer was given names."""
        flat = self._flat.get(p)
        if flat is None:
            return self._name(self._of(group), position, p)
        names = [param.name for param in flat.params]
        some = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        return f"the flat tensor of {p.numel()} elements that holds parts of {some}"

    def _of(self, group: Group) -> _Origin | None:
        return next((origin for origin in self._origins if origin.group is group), None)

    @staticmethod
    def _name(origin: _Origin | None, position: int, p: Tensor) -> str:
        names = (origin.names or origin.group.get("param_names")) if origin is not None else None
        name = f" {names[position]!r}" if names else ""
        return f"parameter{name} of shape {zero.full_shape(p)}"
