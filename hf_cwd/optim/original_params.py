"""What parameter groups were made of: FSDP2 and DeepSpeed put other tensors in the place of a model's parameters."""

import logging
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_cwd.distributed import local_view
from hf_cwd.distributed.deepspeed_zero import flat_tensors
from hf_cwd.distributed.local_view import FlatView, LocalView, full_shape, is_flat

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


class OriginalParams:
    """The origin of each of an optimizer's groups."""

    def __init__(self) -> None:
        self._originals: list[_Origin] = []
        self._flat: dict[Tensor, FlatView | ValueError | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_originals": self._originals, "_flat": {}}

    def add(self, group: Group, names: list[str] | None) -> None:
        self._originals.append(_Origin(group, names, group["params"]))

    def pop(self) -> None:
        """Forgets the last one that was added."""
        self._originals.pop()

    def replace(self, old: Sequence[Group], new: Sequence[Group]) -> None:
        """Other groups take the places of these."""
        pairs = [(self._of(group), other) for group, other in zip(old, new, strict=True)]
        for origin, other in pairs:
            if origin is not None:
                origin.group = other

    def __len__(self) -> int:
        return len(self._originals)

    def number(self, group: Group) -> int:
        """A group's place among all, of which DeepSpeed may show the optimizer one alone."""
        return next(i for i, origin in enumerate(self._originals) if origin.group is group)

    def view(self, p: Tensor, group: Group, *, needed: bool = True) -> LocalView:
        """What this rank holds of a tensor in a group.

        Raises:
            ValueError: it is a flat tensor of DeepSpeed's, and cannot be mapped to parameters, see
                :func:`hf_cwd.distributed.deepspeed_zero.flat_shard`. With ``needed`` False its padding then counts as
                weights.
        """
        view = self._flat_view(p, group, needed) if p.ndim == 1 else None
        if isinstance(view, ValueError):
            if needed:
                raise view
            view = None
        return local_view.of(p) if view is None else view

    def _flat_view(self, p: Tensor, group: Group, needed: bool) -> FlatView | ValueError | None:
        if p not in self._flat:
            params = self._model_params(group)
            try:
                self._flat[p] = local_view.of_flat(p, params, self._names(group)) if is_flat(p, params) else None
            except ValueError as error:
                self._flat[p] = error
                if not needed:
                    _logger.warning("%s. Its padding is stepped, and counted, with the weights", error)
        return self._flat[p]

    def flat_views(self, needs: Callable[[Group], bool]) -> list[tuple[Group, FlatView]]:
        """The flat tensors of all groups, also of those that DeepSpeed does not show the optimizer at the moment.

        Raises:
            ValueError: as :meth:`view`, of a group that needs to know what lies in them.
        """
        result = []
        for group in (origin.group for origin in self._originals):
            needed, flats = needs(group), []
            try:
                flats = flat_tensors(self._model_params(group))
            except ValueError:
                if needed:
                    raise
            views = [self.view(p, group, needed=needed) for p in flats or group["params"]]
            result += [(group, view) for view in views if view.is_flat]
        return result

    def _model_params(self, group: Group) -> list[Tensor]:
        """What the group was made of, as far as it is known."""
        origin = self._of(group)
        return [] if origin is None else origin.params

    def _names(self, group: Group) -> list[str]:
        """Names of these."""
        origin = self._of(group)
        return [self._name(origin, i, p) for i, p in enumerate(self._model_params(group))]

    def described(self, p: Tensor) -> str:
        """A parameter of any group in words."""
        groups = [origin.group for origin in self._originals]
        places = ((i, group) for group in groups for i, param in enumerate(group["params"]) if param is p)
        return self.describe(p, *next(places))

    def describe(self, p: Tensor, position: int, group: Group) -> str:
        """A parameter in words, with its name where the optimizer was given names."""
        flat = self._flat.get(p)
        if not isinstance(flat, FlatView):
            return self._name(self._of(group), position, p)
        names = [param.name for param in flat.shard.params]
        return f"the flat tensor of {p.numel()} elements that holds parts of {listed(names, most=2)}"

    def _of(self, group: Group) -> _Origin | None:
        return next((origin for origin in self._originals if origin.group is group), None)

    @staticmethod
    def _name(origin: _Origin | None, position: int, p: Tensor) -> str:
        names = (origin.names or origin.group.get("param_names")) if origin is not None else None
        name = f" {names[position]!r}" if names else ""
        return f"parameter{name} of shape {full_shape(p)}"


def listed(names: Sequence[str], *, most: int = 3) -> str:
    """Names for a message: the first ones, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def changed(then: Sequence[str], now: Sequence[str]) -> str:
    """How a list of names, which is another now, has changed."""
    gone, new = [n for n in then if n not in now], [n for n in now if n not in then]
    change = [f"{what} {listed(some)}" for what, some in (("no longer", gone), ("now", new)) if some]
    return "; ".join(change) or "their order is another"
