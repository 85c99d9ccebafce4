"""What parameter groups were made of: FSDP2 and DeepSpeed put other tensors in the place of a model's parameters."""

import logging
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_cwd.distributed import deepspeed_zero
from hf_cwd.distributed.deepspeed_zero import FlatShard

Group = MutableMapping[str, Any]

_logger = logging.getLogger("hf_cwd")


@dataclass
class _Origin:
    """What one group was made of. The group is found by identity, since its index may change.

    ``params`` is the list object that the group had. FSDP2 replaces tensors within that list, so the old ones are
    freed. DeepSpeed gives the group another list, so the original ones stay alive here. Weak references would not do:
    torch refuses to swap a tensor that has one, and :meth:`torch.nn.Module.to` may have to.
    """

    group: Group
    names: list[str] | None
    params: list[Tensor]

    def __getstate__(self) -> dict[str, Any]:
        return {"group": self.group, "names": self.names, "params": []}


class Origins:
    """The origin of each of an optimizer's groups."""

    def __init__(self) -> None:
        self._origins: list[_Origin] = []
        self._flat: dict[Tensor, FlatShard | ValueError | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_origins": self._origins, "_flat": {}}

    def add(self, group: Group, names: list[str] | None) -> None:
        self._origins.append(_Origin(group, names, group["params"]))

    def pop(self) -> None:
        """Forgets the last one that was added."""
        self._origins.pop()

    def replace(self, old: Sequence[Group], new: Sequence[Group]) -> None:
        """Other groups take the places of these."""
        pairs = [(self._of(group), other) for group, other in zip(old, new, strict=True)]
        for origin, other in pairs:
            if origin is not None:
                origin.group = other

    def __len__(self) -> int:
        return len(self._origins)

    def number(self, group: Group) -> int:
        """A group's place among all, of which DeepSpeed may show the optimizer one alone."""
        return next(i for i, origin in enumerate(self._origins) if origin.group is group)

    def flat(self, p: Tensor, group: Group, *, needed: bool = True) -> FlatShard | None:
        """What lies in ``p`` if it is a flat tensor of DeepSpeed's that stands for the group's parameters, else None.

        Raises:
            ValueError: it is one, but not in a way that is known here, see
                :func:`hf_cwd.distributed.deepspeed_zero.flat_shard`. With ``needed`` False the answer is None then.
        """
        if p.ndim != 1:
            return None
        if p not in self._flat:
            try:
                params, names = self._model_params(group)
                stands_for = deepspeed_zero.is_sharded(params) and not any(param is p for param in params)
                self._flat[p] = deepspeed_zero.flat_shard(p, params, names) if stands_for else None
            except ValueError as error:
                self._flat[p] = error
                if not needed:
                    _logger.warning("%s. Its padding is stepped, and counted, with the weights", error)
        found = self._flat[p]
        if isinstance(found, ValueError):
            if needed:
                raise found
            return None
        return found

    def flat_tensors(self, needs: Callable[[Group], bool]) -> list[tuple[Group, Tensor]]:
        """DeepSpeed's flat tensors of all groups, also of those that it does not show the optimizer at the moment.

        Raises:
            ValueError: as :meth:`flat`, of a group that needs to know what lies in them.
        """
        found = []
        for group in (origin.group for origin in self._origins):
            needed, flats = needs(group), []
            try:
                flats = deepspeed_zero.flat_tensors(self._model_params(group)[0])
            except ValueError:
                if needed:
                    raise
            flats = flats or group["params"]
            found += [(group, p) for p in flats if self.flat(p, group, needed=needed) is not None]
        return found

    def _model_params(self, group: Group) -> tuple[list[Tensor], list[str]]:
        """What the group was made of, as far as it is known, and names."""
        origin = self._of(group)
        params = [] if origin is None else origin.params
        return params, [self._name(origin, i, param) for i, param in enumerate(params)]

    def described(self, p: Tensor) -> str:
        """A parameter of any group in words."""
        groups = [origin.group for origin in self._origins]
        found = ((i, group) for group in groups for i, param in enumerate(group["params"]) if param is p)
        return self.describe(p, *next(found))

    def describe(self, p: Tensor, position: int, group: Group) -> str:
        """A parameter in words, with its name where the optimizer was given names."""
        flat = self._flat.get(p)
        if not isinstance(flat, FlatShard):
            return self._name(self._of(group), position, p)
        names = [param.name for param in flat.params]
        return f"the flat tensor of {p.numel()} elements that holds parts of {listed(names, most=2)}"

    def _of(self, group: Group) -> _Origin | None:
        return next((origin for origin in self._origins if origin.group is group), None)

    @staticmethod
    def _name(origin: _Origin | None, position: int, p: Tensor) -> str:
        names = (origin.names or origin.group.get("param_names")) if origin is not None else None
        name = f" {names[position]!r}" if names else ""
        return f"parameter{name} of shape {deepspeed_zero.full_shape(p)}"


def listed(names: Sequence[str], *, most: int = 3) -> str:
    """Names for a message: the first ones, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def changed(then: Sequence[str], now: Sequence[str]) -> str:
    """How a list of names, which is another now, has changed."""
    gone, new = [n for n in then if n not in now], [n for n in now if n not in then]
    change = [f"{what} {listed(some)}" for what, some in (("no longer", gone), ("now", new)) if some]
    return "; ".join(change) or "their order is another"
