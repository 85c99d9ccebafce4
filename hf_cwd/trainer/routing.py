"""Which rule for which parameter, with the reason: hidden matrices to Muon, everything else to AdamW."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from hf_cwd.groups import ROUTED_NAMES
from hf_cwd.matrices import Layout
from hf_cwd.sharding.zero import full_shape
from hf_cwd.trainer.kinds import Kind, Place, kind
from hf_cwd.trainer.targets import Targets

# Names of output layers in models that do not say what their body is (base_model_prefix) or their head.
HEAD_NAMES = ("lm_head", "head", "score", "classifier", "output_projection")


@dataclass(frozen=True)
class Route:
    """One parameter. ``algorithm`` None means that it is not trained.

    ``layout`` says which matrices a matrix rule's parameter holds, None that it is one in two dimensions.
    """

    name: str
    shape: tuple[int, ...]
    algorithm: str | None
    reason: str
    layout: Layout | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def matrices(self) -> int:
        """How many matrices a matrix rule finds in it."""
        return 1 if self.layout is None else self.layout.count(self.shape)


class Routing:
    """The routes of a model's parameters; called with parameter groups, it splits them by rule and layout.

    Attributes:
        routes: a :class:`Route` for each parameter, in the model's order.
    """

    def __init__(self, model_name: str, matrices: str | None, routes: Sequence[tuple[Tensor, Route]]) -> None:
        self.routes = [r for _, r in routes]
        self._model_name = model_name
        self._matrices = matrices
        self._by_parameter = dict(routes)

    def __call__(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Splits groups by rule and layout, and sets their ``algorithm``; the matrices' groups come first.

        The Trainer logs the learning rate of group 0 only, which is to be the one that was asked for.

        Args:
            groups: torch.optim parameter groups, not mutated; other keys, such as ``weight_decay``, are kept.

        Raises:
            ValueError: a parameter of another model, or no matrix to orthogonalise.
        """
        first, rest = [], []
        for group in groups:
            split: dict[tuple[str, Layout | None], list[tuple[str, Any]]] = {}
            params = group["params"]
            for entry in [params] if isinstance(params, Tensor) else params:
                route = self._route(entry)
                if route is not None:
                    split.setdefault((route.algorithm, route.layout), []).append((route.name, entry))
            for (algorithm, layout), entries in split.items():
                names, params = map(list, zip(*entries, strict=True))
                part = {**group, "params": params, ROUTED_NAMES: names, "algorithm": algorithm}
                if algorithm == self._matrices:
                    first.append(part | {"layout": None if layout is None else layout.as_group_value()})
                else:
                    rest.append(part)
        if not first:
            raise ValueError(
                f"{self._model_name} has no trainable matrix for {self._matrices}: all of its parameters are "
                f"embeddings, heads, vectors or the like ({self._reasons()}). Use --optim cwd_adamw"
            )
        return first + rest

    def _route(self, entry: Any) -> Route | None:
        """The route of a parameter, or ``(name, parameter)``, of a group; None for a frozen one."""
        name, p = entry if isinstance(entry, tuple) else (None, entry)
        if p not in self._by_parameter:
            raise ValueError(
                f"parameter {name or ''} of shape {full_shape(p)} is not one of {self._model_name}'s: "
                "route the model whose parameters the optimizer gets"
            )
        route = self._by_parameter[p]
        if route.algorithm is not None:
            return route
        if p.requires_grad:
            raise ValueError(f"{route.name} was frozen when the model was routed: route it again")
        return None

    def summary(self, details: Callable[[str], str] = lambda algorithm: "") -> str:
        """How many matrices, tensors and parameters each rule gets, in one line.

        Args:
            details: what to add for a rule, such as its learning rate.
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
    """Sorts a model's parameters: hidden matrices to ``matrices``, all else to ``others``.

    By module and name; of sizes, only one row or column (a vector) and up to 4 input channels of a convolution (raw
    images or sound) count. Hidden matrices are the weights of linear layers and convolutions, recurrent
    ones, and the stacked weights of experts; fused projections count as the matrices that they hold. Embeddings (tied
    to the head or not), the output head (every layer outside a transformers model's body; in a model without one,
    layers named as in ``HEAD_NAMES``), vectors (norms, biases, one row or column), input convolutions, routers,
    positions and what :mod:`hf_cwd.trainer.architectures` lists go to ``others``; frozen parameters are left out.

    Args:
        target_modules: restricts ``matrices`` to these modules: a regular expression for the whole name of a module,
            a list of names, parts of names or expressions, or ``"all-linear"``; what ``--optim_target_modules`` takes.
            Parameters of unknown kind are matrices in a named module, and go to ``others`` elsewhere.

    Raises:
        ValueError: a parameter of unknown kind without ``target_modules``, or an entry of ``target_modules`` that
            names no matrix.

    Example:
        >>> import torch
        >>> from hf_cwd import route
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 6))
        >>> print(route(model))
        0.weight  [10, 4]  adamw: embedding
        1.weight  [6, 4]  muon: hidden matrix
        1.bias  [6]  adamw: vector (bias)
    """
    modules = dict(model.named_modules())
    owners: dict[Tensor, list[Place]] = {}
    for path, module in modules.items():
        for name, p in module.named_parameters(recurse=False):
            owners.setdefault(p, []).append(Place(path, module, name))
    heads = _heads(modules)
    targets = None if target_modules is None else Targets(target_modules)
    routes, unknown = [], []
    for p, places in owners.items():
        found = Kind(False, "frozen") if not p.requires_grad else _kind(p, places, heads, modules)
        if targets is not None:
            found = targets.restrict(found, p, places)
        elif found.is_matrix is None:
            unknown.append(f"{places[0].parameter} {list(full_shape(p))} ({found.reason})")
        algorithm = None if not p.requires_grad else matrices if found.is_matrix else others
        routes.append((p, Route(places[0].parameter, full_shape(p), algorithm, found.reason, found.layout)))
    if unknown:
        shown = "; ".join(unknown[:5]) + (f"; and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise ValueError(
            f"{type(model).__name__} has parameters that may or may not be matrices for {matrices}: {shown}. Name the "
            f"modules whose matrices {matrices} shall take by --optim_target_modules (a regular expression, a JSON "
            "list, or all-linear); everything else goes to "
            f"{others}. Or use --optim cwd_{others}"
        )
    if targets is not None:
        targets.check(matrices)
    return Routing(type(model).__name__, matrices, routes)


def _kind(p: Tensor, places: list[Place], heads: set[nn.Module], modules: dict[str, nn.Module]) -> Kind:
    is_head = any(place.module in heads for place in places)
    if (
        any(type(place.module).__name__.endswith(("Embedding", "EmbeddingBag")) for place in places)
        and len(full_shape(p)) == 2
    ):
        return Kind(False, "embedding, tied to the output head" if is_head else "embedding")
    found = kind(p, places[0], modules)
    return Kind(False, "output head") if is_head and found.is_matrix else found


def _heads(modules: dict[str, nn.Module]) -> set[nn.Module]:
    """The output layers: what transformers names as such, and every module outside of the model's body."""
    # Behind the wrappers of PEFT, TRL and DDP; a PeftModel only passes the attribute on.
    models = [(path, m) for path, m in modules.items() if hasattr(type(m), "base_model_prefix")]
    path, model = models[0] if models else ("", modules[""])
    heads = set()
    output = model.get_output_embeddings() if models and hasattr(model, "get_output_embeddings") else None
    if output is not None:
        heads |= set(output.modules())
    body = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if isinstance(body, nn.Module) and body is not model:
        body_path = f"{path}.{model.base_model_prefix}".lstrip(".")
        around = [name for name in modules if body_path.startswith(f"{name}.") or not name]
        inside = set(body.modules()) | {modules[name] for name in around}
        return heads | {module for module in modules.values() if module not in inside}
    named = [module for name, module in modules.items() if name.rsplit(".", 1)[-1] in HEAD_NAMES]
    return heads | {inner for module in named for inner in module.modules()}
