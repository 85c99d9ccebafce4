"""Chooses a rule for each parameter, with the reason: Muon for hidden matrices, AdamW for all others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hf_cwd.distributed import collectives
from hf_cwd.distributed.local_view import full_shape
from hf_cwd.log import logger
from hf_cwd.newton_schulz.matrices import MatrixLayout
from hf_cwd.optim.param_groups import ROUTED_NAMES
from hf_cwd.routing.classify import Classification, Place, classify
from hf_cwd.routing.heads import output_layers
from hf_cwd.routing.target_modules import TargetModules


@dataclass(frozen=True)
class Route:
    """The rule of a parameter, and the reason.

    Attributes:
        algorithm: the rule's name; None for a parameter that is not trained.
        layout: for a matrix rule, the matrices that the parameter holds; None if it is one 2-D matrix.
    """

    name: str
    shape: tuple[int, ...]
    algorithm: str | None
    reason: str
    layout: MatrixLayout | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def matrices(self) -> int:
        """The number of matrices in the parameter, if it has a matrix rule."""
        return 1 if self.layout is None else self.layout.count(self.shape)


class Routing:
    """The routes of a model's parameters. Calling it with parameter groups splits them by rule and layout.

    Attributes:
        routes: a :class:`Route` for each parameter, in the model's order.
        outputs: the names of the output layers.
        unknown: the routes of parameters that are in no table; they do not go to the matrix rule.
    """

    def __init__(
        self,
        model_name: str,
        matrices: str | None,
        routes: Sequence[tuple[Tensor, Route]],
        *,
        outputs: Sequence[str] = (),
        unknown: Sequence[Route] = (),
    ) -> None:
        self.routes = [r for _, r in routes]
        self.outputs = list(outputs)
        self.unknown = list(unknown)
        self._model_name = model_name
        self._matrices = matrices
        self._by_parameter = dict(routes)

    def __call__(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Splits groups by rule and layout, and sets their ``algorithm``. The groups of matrices come first.

        The Trainer logs the learning rate of group 0 only, so that this group should have the rule that was asked for.
        A warning names the parameters that are in no table.

        Args:
            groups: torch.optim parameter groups, not mutated. Other keys, such as ``weight_decay``, are kept.

        Raises:
            ValueError: a parameter is not of this model, or there is no matrix for the matrix rule.
        """
        first, rest = [], []
        for group in groups:
            split: dict[tuple[str, MatrixLayout | None], list[tuple[str, Any]]] = {}
            params = group["params"]
            for param in [params] if isinstance(params, Tensor) else params:
                route = self._route(param)
                if route is not None:
                    split.setdefault((route.algorithm, route.layout), []).append((route.name, param))
            for (algorithm, layout), named in split.items():
                names, params = map(list, zip(*named, strict=True))
                part = {**group, "params": params, ROUTED_NAMES: names, "algorithm": algorithm}
                if algorithm == self._matrices:
                    first.append(part | {"layout": None if layout is None else layout.as_group_value()})
                else:
                    rest.append(part)
        if not first:
            raise ValueError(
                f"{self._model_name} has no trainable matrix for {self._matrices}: all of its parameters are "
                f"embeddings, heads, vectors or the like ({self._reasons()}). Use CWDAdamW"
            )
        if self.unknown and collectives.rank() == 0:
            logger().warning(self._unknown_line())
        return first + rest

    def _unknown_line(self) -> str:
        names: dict[str, list[str]] = {}
        for r in self.unknown:
            names.setdefault(r.reason, []).append(r.name)
        shown = "; ".join(
            f"{same[0]}{f' and {len(same) - 1} more' if len(same) > 1 else ''} ({reason})"
            for reason, same in names.items()
        )
        return (
            f"{self.unknown[0].algorithm} takes parameters that may be matrices for {self._matrices}: {shown}. "
            f"target_modules would give it to {self._matrices}"
        )

    def _route(self, param: Any) -> Route | None:
        """The route of a parameter, or of a pair ``(name, parameter)``; None for a frozen one."""
        name, p = param if isinstance(param, tuple) else (None, param)
        if p not in self._by_parameter:
            raise ValueError(
                f"parameter {name or ''} of shape {full_shape(p)} is not one of {self._model_name}'s: "
                "route the model whose parameters the optimizer gets"
            )
        route = self._by_parameter[p]
        if route.algorithm is not None:
            return route
        if p.requires_grad:
            raise ValueError(f"{route.name} was frozen when the model was routed: call route again")
        return None

    def summary(self, details: Callable[[str], str] = lambda algorithm: "") -> str:
        """The numbers of matrices, tensors and parameters of each rule, in one line.

        Args:
            details: maps a rule to text that is added for it, such as its learning rate.
        """
        parts = []
        first = [] if self._matrices is None else [self._matrices]
        for algorithm in dict.fromkeys([*first, *(r.algorithm for r in self.routes)]):
            chosen = [r for r in self.routes if r.algorithm == algorithm]
            matrices = f"{sum(r.matrices for r in chosen):,} matrices in " if algorithm in first else ""
            line = f"{matrices}{len(chosen):,} tensors, {sum(r.numel for r in chosen):,} parameters"
            parts.append(f"{algorithm or 'frozen'}: {line}{details(algorithm) if algorithm else ''}")
        return "; ".join(parts)

    def __str__(self) -> str:
        return "\n".join(f"{r.name}  {list(r.shape)}  {r.algorithm or 'frozen'}: {r.reason}" for r in self.routes)

    def _reasons(self) -> str:
        counts: dict[str, int] = {}
        for r in self.routes:
            counts[r.reason] = counts.get(r.reason, 0) + 1
        return ", ".join(f"{count} x {reason}" for reason, count in counts.items()) or "none"


def route(
    model: nn.Module,
    *,
    matrices: str = "muon",
    others: str = "adamw",
    target_modules: str | Sequence[str] | None = None,
) -> Routing:
    """Sorts a model's parameters: hidden matrices to the rule ``matrices``, all other parameters to ``others``.

    The choice goes by module and name. Sizes count only for vectors (one row or column), for convolutions of the raw
    input (up to 4 input channels), and for layers that may be output layers.

    - To ``matrices``: the weights of linear layers and convolutions, recurrent weights, stacked weights of experts, and
      the factors of PEFT's low-rank methods. A fused projection counts as the matrices that it holds.
    - To ``others``: embeddings (tied to the head or not), output layers (:mod:`hf_cwd.routing.heads`), vectors (norms,
      biases, one row or column), convolutions of the raw input, routers, positions, the exceptions in
      :mod:`hf_cwd.routing.architectures` and :mod:`hf_cwd.routing.adapters`, and parameters that are in no table
      (:attr:`Routing.unknown`).
    - Frozen parameters are left out.

    Args:
        target_modules: restricts ``matrices`` to these modules, as ``optim_target_modules`` does: a regular
            expression for the whole name of a module, a list of names, parts of names or expressions, or
            ``"all-linear"``. A parameter that is in no table is a matrix in a named module, and goes to ``others``
            elsewhere.

    Raises:
        ValueError: a lazy layer has no shape yet, or an entry of ``target_modules`` names no matrix.

    Example:
        >>> import torch
        >>> from hf_cwd import route
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
        >>> print(route(model))
        0.weight  [10, 4]  adamw: embedding
        1.weight  [6, 4]  muon: hidden matrix
        1.bias  [6]  adamw: vector (bias)
        2.weight  [3, 6]  adamw: output head (nothing follows it)
        2.bias  [3]  adamw: vector (bias)
    """
    modules = dict(model.named_modules())
    owners: dict[Tensor, list[Place]] = {}
    for path, module in modules.items():
        for name, p in module.named_parameters(recurse=False):
            owners.setdefault(p, []).append(Place(path, module, name))
    lazy = [places[0].parameter for p, places in owners.items() if is_lazy(p)]
    if lazy:
        raise ValueError(f"{lazy[0]} has no shape yet: run the model on a batch before the optimizer is made")
    heads = output_layers(model)
    targets = None if target_modules is None else TargetModules(target_modules)
    routes, unknown = [], []
    for p, places in owners.items():
        parameter = Classification(False, "frozen") if not p.requires_grad else _classify(p, places, heads, modules)
        is_unknown = targets is None and parameter.is_matrix is None
        if targets is not None:
            parameter = targets.restrict(parameter, p, places)
        algorithm = None if not p.requires_grad else matrices if parameter.is_matrix else others
        routes.append((p, Route(places[0].parameter, full_shape(p), algorithm, parameter.reason, parameter.layout)))
        if is_unknown:
            unknown.append(routes[-1][1])
    if targets is not None:
        targets.check(matrices)
    return Routing(type(model).__name__, matrices, routes, outputs=_outermost(heads, modules), unknown=unknown)


def _outermost(heads: Mapping[nn.Module, str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The names of the output layers that hold weights, without the modules inside of them."""
    return [
        name
        for name, module in modules.items()
        if module in heads
        and modules[name.rpartition(".")[0]] not in heads
        and any(len(full_shape(p)) > 1 for p in module.parameters())
    ]


def _classify(
    p: Tensor, places: list[Place], heads: Mapping[nn.Module, str], modules: Mapping[str, nn.Module]
) -> Classification:
    reasons = [heads[place.module] for place in places if place.module in heads]
    if (
        any(type(place.module).__name__.endswith(("Embedding", "EmbeddingBag")) for place in places)
        and len(full_shape(p)) == 2
    ):
        return Classification(False, "embedding, tied to the output head" if reasons else "embedding")
    parameter = classify(p, places[0], modules)
    return Classification(False, reasons[0]) if reasons and parameter.is_matrix is not False else parameter
