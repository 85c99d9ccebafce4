"""Which rule for which parameter, with the reason: hidden matrices to Muon, everything else to AdamW."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Names of output layers in models that do not say what their body is (base_model_prefix) or their head.
HEAD_NAMES = ("lm_head", "head", "score", "classifier", "output_projection")


@dataclass(frozen=True)
class Route:
    """One parameter. ``algorithm`` None means that it is not trained."""

    name: str
    shape: tuple[int, ...]
    algorithm: str | None
    reason: str


class Routing:
    """The routes of a model's parameters; called with parameter groups, it splits them by rule.

    Attributes:
        routes: a :class:`Route` for each parameter, in the model's order.
    """

    def __init__(self, model_name: str, matrices: str, routes: Sequence[tuple[Tensor, Route]]) -> None:
        self.routes = [r for _, r in routes]
        self._model_name = model_name
        self._matrices = matrices
        self._by_parameter = dict(routes)

    def __call__(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Splits groups by rule and sets their ``algorithm``; the matrices' groups come first.

        The Trainer logs the learning rate of group 0 only, which is to be the one that was asked for.

        Args:
            groups: torch.optim parameter groups, not mutated; other keys, such as ``weight_decay``, are kept.

        Raises:
            ValueError: a parameter of another model, or no matrix to orthogonalise.
        """
        first, rest = [], []
        for group in groups:
            split: dict[str, list[Any]] = {}
            params = group["params"]
            for entry in [params] if isinstance(params, Tensor) else params:
                name, p = entry if isinstance(entry, tuple) else (None, entry)
                if p not in self._by_parameter:
                    raise ValueError(
                        f"parameter {name or ''} of shape {tuple(p.shape)} is not one of {self._model_name}'s: "
                        "route the model whose parameters the optimizer gets"
                    )
                algorithm = self._by_parameter[p].algorithm
                if algorithm is None:
                    if p.requires_grad:
                        raise ValueError(
                            f"{self._by_parameter[p].name} was frozen when the model was routed: route it again"
                        )
                    continue
                split.setdefault(algorithm, []).append(entry)
            for algorithm, entries in split.items():
                part = {**group, "params": entries, "algorithm": algorithm}
                (first if algorithm == self._matrices else rest).append(part)
        if not first:
            raise ValueError(
                f"{self._model_name} has no trainable matrix for {self._matrices}: all of its parameters are "
                f"embeddings, heads, vectors or of an unknown kind ({self._reasons()}). Use --optim cwd_adamw"
            )
        return first + rest

    def summary(self) -> str:
        """How many tensors and parameters each rule gets, in one line."""
        parts = []
        for algorithm in dict.fromkeys([self._matrices, *(r.algorithm for r in self.routes)]):
            chosen = [r for r in self.routes if r.algorithm == algorithm]
            numel = sum(torch.Size(r.shape).numel() for r in chosen)
            parts.append(f"{algorithm or 'frozen'}: {len(chosen)} tensors, {numel:,} parameters")
        return "; ".join(parts)

    def __str__(self) -> str:
        return "\n".join(f"{r.name}  {list(r.shape)}  {r.algorithm or 'frozen'}: {r.reason}" for r in self.routes)

    def _reasons(self) -> str:
        counts: dict[str, int] = {}
        for r in self.routes:
            counts[r.reason] = counts.get(r.reason, 0) + 1
        return ", ".join(f"{count} x {reason}" for reason, count in counts.items()) or "none"


def route(model: nn.Module, *, matrices: str = "muon", others: str = "adamw") -> Routing:
    """Sorts a model's parameters: 2-D weights of the hidden linear layers to ``matrices``, all else to ``others``.

    By module and shape, never by size: embeddings (tied to the head or not), the output head (every linear layer
    outside a transformers model's body; in a model without one, layers named as in ``HEAD_NAMES``), vectors (norms,
    biases) and anything that is not the weight of a linear layer go to ``others``; frozen parameters are left out.

    Example:
        >>> import torch
        >>> from hf_cwd import route
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 6))
        >>> print(route(model))
        0.weight  [10, 4]  adamw: embedding
        1.weight  [6, 4]  muon: hidden matrix
        1.bias  [6]  adamw: vector (bias)
    """
    owners: dict[Tensor, list[tuple[str, nn.Module, str]]] = {}
    for module_name, module in model.named_modules():
        for attribute, p in module.named_parameters(recurse=False):
            owners.setdefault(p, []).append((module_name, module, attribute))
    heads = _heads(model)
    routes = []
    for p, places in owners.items():
        name = ".".join(part for part in (places[0][0], places[0][2]) if part)
        algorithm, reason = _decide(p, places, heads, matrices, others)
        routes.append((p, Route(name, tuple(p.shape), algorithm, reason)))
    return Routing(type(model).__name__, matrices, routes)


def _decide(
    p: Tensor, places: list[tuple[str, nn.Module, str]], heads: set[nn.Module], matrices: str, others: str
) -> tuple[str | None, str]:
    modules = [module for _, module, _ in places]
    if not p.requires_grad:
        return None, "frozen"
    is_head = [module for module in modules if module in heads]
    if any(isinstance(module, nn.Embedding) for module in modules):
        return others, "embedding, tied to the output head" if is_head else "embedding"
    if p.ndim < 2:
        return others, f"vector ({'bias' if places[0][2] == 'bias' else 'norm or scale'})"
    if is_head:
        return others, "output head"
    if p.ndim == 2 and isinstance(modules[0], nn.Linear) and places[0][2] == "weight":
        return matrices, "hidden matrix"
    return others, f"not the weight of a linear layer ({type(modules[0]).__name__}.{places[0][2]})"


def _heads(model: nn.Module) -> set[nn.Module]:
    """The output layers: what transformers names as such, and every module outside of the model's body."""
    heads = set()
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        heads.add(output)
    body = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if isinstance(body, nn.Module) and body is not model:
        inside = set(body.modules())
        heads |= {module for module in model.modules() if module not in inside and module is not model}
    else:
        heads |= {module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in HEAD_NAMES}
    return heads
