"""The optimizer: parameter groups, state, the step and state dicts, for any rule."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from hf_cwd import kernels
from hf_cwd.distributed.exchange import Exchange
from hf_cwd.distributed.local_view import full_shape
from hf_cwd.distributed.plan import EXCHANGE
from hf_cwd.optim import state
from hf_cwd.optim.matrix_step import MatrixParam, MatrixStep
from hf_cwd.optim.original_params import OriginalParams
from hf_cwd.optim.param_groups import ROUTED_NAMES, as_group, as_groups, check_shared
from hf_cwd.optim.state_dict import Overruled, adopt, only_initialises, overruled, restore_dtypes
from hf_cwd.optim.statistics import StepStatistics
from hf_cwd.optim.validation import check_layout, check_masters, drop_torch_only, problem
from hf_cwd.rules import COMMON, RULES, Rule
from hf_cwd.rules.base import has_remainder
from hf_cwd.rules.hyperparameters import Choice, checked

ON_RULE_CHANGE = Choice("refuse", ("refuse", "reset"))


class CommonOptions(TypedDict, total=False):
    """Keyword arguments that every optimizer here takes, beside ``lr``, ``weight_decay`` and its rule's own.

    Attributes:
        cautious: False is plain decoupled weight decay, by the same code.
        mask: ``"ge"`` (the paper's ``u*x >= 0``) or ``"gt"``.
        maximize: ascend instead of descend.
        kernel: ``"auto"`` takes the fastest: ``"c"`` on CPUs, ``"triton"`` on GPUs, else ``"eager"``.
        state_dtype: of momenta and second moments, ``"float32"`` or ``"bfloat16"``; ``"auto"`` is the parameter's own.
        master: ``"remainder"`` trains bfloat16 parameters as if they had fp32 masters: a state of 16 bits an element
            holds what they lack of one, and the other states are fp32. The weights are the master's, rounded half up.
        capturable: step counts stay on the GPU, so that a CUDA graph may capture the step; a tensor ``lr`` too.
        on_rule_change: what ``load_state_dict`` does with another rule's state: ``"refuse"``, or ``"reset"``, which
            leaves it and begins with new states.
        routing: splits the parameter groups by rule before anything else, see :func:`hf_cwd.route`.
        announce: is called with the parameter groups once, when they are complete.
        differentiable, foreach, fused: only False or None; ``kernel=`` chooses the implementation here.
    """

    cautious: bool
    mask: str
    maximize: bool
    kernel: str
    state_dtype: str
    master: str
    capturable: bool
    on_rule_change: str
    routing: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None
    announce: Callable[[Sequence[Mapping[str, Any]]], None] | None
    differentiable: bool | None
    foreach: bool | None
    fused: bool | None


class _Elementwise(NamedTuple):
    """What an element-wise rule has to step: for each of its groups the parameters with a gradient.

    ``kept`` are the calls of the last step, where they may be taken again.
    """

    rule: Rule
    groups: list[dict[str, Any]]
    params: list[list[Tensor]]
    kept: state.Kept | None


class CWDOptimizer(torch.optim.Optimizer):
    """Any registered rule with cautious weight decay: ``x <- x - lr * (scale*u + weight_decay * 1[u*x >= 0] * x)``.

    A group's ``algorithm`` key names its rule, so that several rules can share one optimizer. Groups are plain
    torch.optim groups otherwise: every hyper-parameter is a key, read at each step, and schedulers may change it. In a
    group of a rule for matrices, ``layout`` None stands for plain 2-D matrices; a dict holds the arguments of the
    :class:`hf_cwd.newton_schulz.matrices.MatrixLayout` by which the group's parameters hold several matrices, or hold
    them otherwise.

    Parameters may be plain tensors, DTensors (FSDP2, tensor parallelism), or such that DeepSpeed's ZeRO makes flat
    tensors of. Element-wise rules step whatever part of a parameter a rank holds. Rules for matrices exchange the parts
    of a DTensor or of a flat tensor, so that every matrix is orthogonalised whole, by one rank: the ranks of its device
    mesh, or of DeepSpeed's group, must then all call :meth:`step`. A plain tensor is its rank's own, as in torch.optim,
    and nobody communicates, unless it is known to be a replica: see ``share`` and :meth:`mark_replicated`.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or group dicts; dicts are copied, not mutated.
        lr: learning rate, a float or a one-element tensor (read once a step).
        algorithm: rule of the groups that name none.
        companions: for the groups of other rules, their hyper-parameters' defaults: ``{"adamw": {"eps": 1e-6}}``.
        options: the rule's hyper-parameters, :class:`CommonOptions`, and for a rule for matrices ``share`` and
            ``exchange_bytes``, see :func:`hf_cwd.distributed.plan.plan`, and ``process_group``: the ranks that hold
            plain tensors as replicas, by default the world.

    Raises:
        ValueError: a value out of range, or a parameter that the rule cannot take.
        TypeError: an unknown keyword, or something that is no parameter.
        RuntimeError: a complex parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        algorithm: str,
        companions: Mapping[str, Mapping[str, Any]] | None = None,
        routing: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
        announce: Callable[[Sequence[Mapping[str, Any]]], None] | None = None,
        **options: Any,
    ) -> None:
        drop_torch_only(options)
        rule, owner = _rule(algorithm), type(self).__name__
        self.statistics: StepStatistics | None = None
        self.on_rule_change = checked(
            owner, "on_rule_change", ON_RULE_CHANGE, options.pop("on_rule_change", ON_RULE_CHANGE.default)
        )
        self.reset_because: str | None = None
        self.overruled: list[Overruled] | None = None
        self._is_prepared = False
        self._originals = OriginalParams()
        self._matrix_step = MatrixStep.of(self._originals, rule, options)
        self._workspace = kernels.Workspace()
        self._kept: dict[Rule, state.Kept | None] = {}
        more = ("on_rule_change", *((*EXCHANGE, "process_group") if rule.matrix is not None else ()))
        defaults = _checked_defaults(owner, rule, {"lr": lr} | options, more)
        self.companions: dict[str, dict[str, Any]] = {}
        for name, values in (companions or {}).items():
            complete = _checked_defaults(owner, _rule(name), values)
            self.companions[name] = {key: complete[key] for key in values}
        groups = as_groups(params)
        super().__init__(groups if routing is None else routing(groups), defaults | {"algorithm": algorithm})
        check_masters(self.param_groups)
        if announce is not None:
            announce(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        own = ("companions", "on_rule_change", "reset_because", "overruled", "_originals", "_matrix_step")
        return (
            super().__getstate__()
            | {name: getattr(self, name) for name in own}
            | {"statistics": None, "_is_prepared": False, "_workspace": kernels.Workspace(), "_kept": {}}
        )

    @property
    def exchanges(self) -> list[Exchange]:
        """How matrices are exchanged between ranks: in each group of ranks; under DeepSpeed for each flat tensor.

        Empty before the first step.
        """
        return self._matrix_step.exchanges

    def mark_replicated(self, params: Iterable[Tensor]) -> None:
        """Says which plain tensors are replicas, with equal weights and gradients on all ranks, as under DDP.

        ``share="auto"`` then lets one rank work for all where that is cheaper; by itself it takes plain tensors for
        each rank's own. Under the Trainer this is done for the model that it wraps in DistributedDataParallel.

        Args:
            params: all of them: a later call takes the place of an earlier one. The optimizer may have others, and
                need not have these.
        """
        own = {p for group in self.param_groups for p in group["params"]}
        self._matrix_step.mark_replicated(own.intersection(params))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, with the defaults of its rule. Raises, and adds nothing, where it cannot be trained.

        Raises:
            ValueError: a hyper-parameter that is not valid, or parameters that the rule cannot take.
            TypeError: something that is no parameter.
            RuntimeError: a complex parameter.
        """
        group = as_group(param_group)
        own, algorithm = self.defaults["algorithm"], group.get("algorithm", self.defaults["algorithm"])
        rule, names, number = _rule(algorithm), group.pop(ROUTED_NAMES, None), len(self.param_groups)
        drop_torch_only(group)
        check_shared(group, self.param_groups)
        # torch fills in all of self.defaults; this optimizer's own rule's mean nothing in a group of another rule.
        foreign = _rule(own).hyperparameters.keys() - rule.hyperparameters.keys() - group.keys()
        if algorithm != own:
            defaults = {name: kind.default for name, kind in rule.hyperparameters.items()}
            group = defaults | self.companions.get(algorithm, {}) | group
        super().add_param_group(group)
        for name in foreign:
            del group[name]
        self._originals.add(group, names)
        try:
            self._check_group(group, number)
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            self._originals.pop()
            raise

    def _check_group(self, group: dict[str, Any], number: int) -> None:
        rule = _rule(group["algorithm"])
        try:
            group.update(rule.checked_hyperparameters(group))
        except ValueError as error:
            raise ValueError(f"parameter group {number}: {error}") from None
        if rule.matrix is not None:
            group.setdefault("layout", None)
        for position, p in enumerate(group["params"]):
            name, shape = self._originals.describe(p, position, group), full_shape(p)
            if torch.is_complex(p):
                raise RuntimeError(
                    f"{name} is complex: a sign, and so a cautious mask, is defined for real numbers only"
                )
            if rule.matrix is None:
                continue
            if group["layout"] is not None:
                check_layout(group["layout"], name, shape)
            elif len(shape) != 2:
                raise ValueError(
                    f"{name} is not a matrix: {rule.name} takes 2-D parameters only. Give the others to a group with "
                    f"'algorithm': {rule.companion!r}, say with 'layout' which matrices it holds, or pass "
                    "routing=hf_cwd.route(model) to have them sorted"
                )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimizer step; parameters without a gradient are left alone, their step count too.

        A matrix that is spread over ranks and has a gradient on some only is stepped as if it were zero on the others.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: a sparse, complex or meta gradient; no parameter has changed then. Or another rank ended
                during an exchange of matrices.
            ValueError: that matrices lie on ranks in a way that is not supported, or that replicas have different
                weights, gradients or states (looked at on the first step, and every 128th). Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        works = self._checked()
        if not self._is_prepared:
            check_masters(self.param_groups)
            self._prepare_hidden()
            self._is_prepared = True
        if only_initialises(self):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        state.make(self.state[p], p, group)
            return loss
        if params := self._matrix_params():
            self._matrix_step(params, self.state, self.statistics, lambda: self._step_elementwise(works))
        else:
            self._step_elementwise(works)
        if self.statistics is not None:
            self.statistics.settle(self.param_groups, self._originals)
        return loss

    def _checked(self) -> list[_Elementwise]:
        """The work of element-wise rules. Raises RuntimeError where a parameter cannot be stepped, of any rule."""
        by_rule: dict[Rule, list[dict[str, Any]]] = {}
        for group in self.param_groups:
            by_rule.setdefault(_rule(group["algorithm"]), []).append(group)
        works = []
        for rule, groups in by_rule.items():
            params = [[p for p in group["params"] if p.grad is not None] for group in groups]
            kept = self._kept.get(rule)
            if kept is None or not kept.takes(self.state, groups, params):
                kept = None
                for group in groups:
                    self._check_tensors(rule, group)
            if rule.matrix is None:
                works.append(_Elementwise(rule, groups, params, kept))
        return works

    def _check_tensors(self, rule: Rule, group: dict[str, Any]) -> None:
        for position, p in enumerate(group["params"]):
            reason = problem(
                p,
                state.held(self.state, p, group),
                needs_matrices=rule.matrix is not None and not self._originals.view(p, group).is_flat,
                has_master=has_remainder(group, p.dtype),
            )
            if reason is not None:
                raise RuntimeError(f"{self._originals.describe(p, position, group)} {reason}")

    def _prepare_hidden(self) -> None:
        """Prepares all flat tensors before the first is changed: DeepSpeed may show the optimizer one at a time."""

        def needs(group: dict[str, Any]) -> bool:
            return _rule(group["algorithm"]).matrix is not None

        flats = self._originals.flat_views(needs)
        shown = {p for group in self.param_groups for p in group["params"]}
        for group, view in flats:
            if needs(group) and not shown.issuperset(view.param for _, view in flats):
                self._matrix_step.prepare([MatrixParam(view, 0, group, state.settings(group))])
        for group, view in flats:  # stages 1 and 2 link the states of all groups after the first one's step
            state.make(self.state[view.param], view.param, group)

    def _matrix_params(self) -> list[MatrixParam]:
        """The parameters of matrix rules, those without a gradient too."""
        params = []
        for group in self.param_groups:
            if _rule(group["algorithm"]).matrix is not None:
                given, view = state.settings(group), self._originals.view
                params += [MatrixParam(view(p, group), i, group, given) for i, p in enumerate(group["params"])]
        return params

    def _step_elementwise(self, works: Sequence[_Elementwise]) -> None:
        for rule, groups, params, kept in works:
            given = [state.settings(group) for group in groups]
            if kept is not None:
                kept.advance(given, params)
                items, calls = kept.items, kept.calls
            else:
                items = []
                for some, group, settings in zip(params, groups, given, strict=True):
                    views = [self._originals.view(p, group, needed=False) for p in some]
                    for view, item in zip(views, state.advance(self.state, views, group, settings), strict=True):
                        items += state.pieces(item, view.stretches) if view.is_flat else [item]
                calls = kernels.calls(rule, items, self._originals.described)
                self._kept[rule] = state.Kept.of(self.state, groups, params, items, calls)
            kernels.update(rule, calls, self.statistics, self._workspace)
            for item in items:
                item.grad = None  # kept items must not keep the memory of gradients

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer, or of the torch.optim one whose rule it follows.

        The saved hyper-parameters win, as in torch; keys that the saved groups lack (``cautious``, ``mask``) keep their
        present values. ``overruled`` lists the present values that gave way.

        Raises:
            ValueError: another rule's or another model's state, one that is not complete, or made by an option that is
                not supported here (``amsgrad``). Nothing has changed then. With ``on_rule_change="reset"`` it is not
                taken instead, and ``reset_because`` says why.
        """
        groups = self.param_groups
        adopted, self.reset_because = adopt(state_dict, groups, on_rule_change=self.on_rule_change)
        self.overruled = overruled(groups, adopted["param_groups"])
        super().load_state_dict(adopted)
        self._originals.replace(groups, self.param_groups)
        restore_dtypes(self, adopted)


def _checked_defaults(owner: str, rule: Rule, values: Mapping[str, Any], more: Sequence[str] = ()) -> dict[str, Any]:
    """The defaults of a rule's groups, with ``values`` in place of the rule's own. TypeError for an unknown key.

    Args:
        owner: who takes them, for the message.
        more: what else it takes, for the message.
    """
    known = {**COMMON, **rule.hyperparameters}
    for name in values.keys() - known.keys():
        takes = sorted({*known, *more})
        near = difflib.get_close_matches(name, takes, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise TypeError(f"{owner} has no argument {name!r}.{hint} It takes {', '.join(takes)}")
    return rule.checked_hyperparameters({name: kind.default for name, kind in known.items()} | dict(values))


def _rule(name: str) -> Rule:
    if name not in RULES:
        raise ValueError(f"algorithm={name!r} is not a registered rule: use one of {', '.join(RULES)}")
    return RULES[name]
