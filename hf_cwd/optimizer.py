"""The optimizer: parameter groups, state, the step and state dicts, for any rule."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from hf_cwd import kernels, states
from hf_cwd.kernels.base import Settings
from hf_cwd.matrix_step import MatrixStep, Member
from hf_cwd.measure import StepStatistics
from hf_cwd.origins import Origins
from hf_cwd.refusals import check_layout, check_masters, problem, refuse_torch_kernels
from hf_cwd.rules import COMMON, RULES, Rule
from hf_cwd.rules.base import has_remainder
from hf_cwd.rules.hyperparameters import Choice, checked
from hf_cwd.sharding.exchange import Exchange
from hf_cwd.sharding.plan import EXCHANGE
from hf_cwd.sharding.zero import full_shape
from hf_cwd.state_dict import adopt, only_initialises, restore_dtypes

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
        fused, foreach, differentiable: only False or None; ``kernel=`` chooses the implementation here.
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
    fused: bool | None
    foreach: bool | None
    differentiable: bool | None


class _Elementwise(NamedTuple):
    """What an element-wise rule has to step: for each of its groups the parameters with a gradient.

    ``kept`` are the calls of the last step, where they may be taken again.
    """

    rule: Rule
    groups: list[dict[str, Any]]
    params: list[list[Tensor]]
    kept: states.Kept | None


class CWDOptimizer(torch.optim.Optimizer):
    """Any registered rule with cautious weight decay: ``x <- x - lr * (scale*u + weight_decay * 1[u*x >= 0] * x)``.

    A group's ``algorithm`` key names its rule, so that several rules can share one optimizer. Groups are plain
    torch.optim groups otherwise: every hyper-parameter is a key, read at each step, and schedulers may change it. In a
    group of a rule for matrices, ``layout`` None stands for plain 2-D matrices; a dict holds the arguments of the
    :class:`hf_cwd.matrices.Layout` by which the group's parameters hold several matrices, or hold them otherwise.

    Parameters may be plain tensors, DTensors (FSDP2, tensor parallelism), or such that DeepSpeed's ZeRO makes flat
    tensors of. Element-wise rules step whatever part of a parameter a rank holds. Rules for matrices exchange parts, so
    that every matrix is orthogonalised whole, by one rank: in a process group every rank must then call :meth:`step`.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or group dicts; dicts are copied, not mutated.
        lr: learning rate, a float or a one-element tensor (read once a step).
        algorithm: rule of the groups that name none.
        companions: for the groups of other rules, their hyper-parameters' defaults: ``{"adamw": {"eps": 1e-6}}``.
        options: the rule's hyper-parameters, :class:`CommonOptions`, and for a rule for matrices ``share`` and
            ``exchange_bytes``, see :func:`hf_cwd.sharding.plan.plan`.

    Raises:
        ValueError: a value out of range, or a parameter that the rule cannot take.
        TypeError: an unknown keyword.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        algorithm: str,
        companions: Mapping[str, Mapping[str, Any]] | None = None,
        routing: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
        **options: Any,
    ) -> None:
        refuse_torch_kernels(options)
        self.companions = dict(companions or {})
        self.statistics: StepStatistics | None = None
        self.on_rule_change = checked(
            "CWDOptimizer", "on_rule_change", ON_RULE_CHANGE, options.pop("on_rule_change", ON_RULE_CHANGE.default)
        )
        self.reset_because: str | None = None
        self._is_prepared = False
        self._origins = Origins()
        self._matrix_step = MatrixStep.of(_rule(algorithm), options)
        self._cache: dict[Any, Any] = {}  # the kernels' tables
        self._kept: dict[Rule, states.Kept | None] = {}
        known = {**COMMON, **_rule(algorithm).hyperparameters}
        for name in options.keys() - known.keys():
            takes = {*known, "on_rule_change", *(EXCHANGE if _rule(algorithm).matrix is not None else ())}
            near = difflib.get_close_matches(name, takes, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise TypeError(
                f"{type(self).__name__} has no argument {name!r}.{hint} It takes {', '.join(sorted(takes))}"
            )
        defaults = {name: kind.default for name, kind in known.items()} | {"algorithm": algorithm, "lr": lr} | options
        # A bare tensor and an empty list are left to torch, which refuses them in its own words.
        if routing is not None and not isinstance(params, Tensor) and (params := list(params)):
            params = routing(params if isinstance(params[0], dict) else [{"params": params}])
        super().__init__(params, defaults)
        check_masters(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        own = ("companions", "on_rule_change", "reset_because", "_origins", "_matrix_step")
        return (
            super().__getstate__()
            | {name: getattr(self, name) for name in own}
            | {"statistics": None, "_is_prepared": False, "_cache": {}, "_kept": {}}
        )

    @property
    def exchanges(self) -> list[Exchange]:
        """How matrices are exchanged between ranks: one, but under DeepSpeed one for each flat tensor; first none."""
        return self._matrix_step.exchanges

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, with the defaults of its rule. Raises ValueError, and adds nothing, if it cannot be trained."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        own, algorithm = self.defaults["algorithm"], param_group.get("algorithm", self.defaults["algorithm"])
        rule = _rule(algorithm)
        group = dict(param_group)
        names = group.pop("names", None)
        if algorithm != own:
            defaults = {name: kind.default for name, kind in rule.hyperparameters.items()}
            group = defaults | dict(self.companions.get(algorithm, {})) | group
        super().add_param_group(group)
        # torch fills in all of self.defaults; this optimizer's own rule's mean nothing in a group of another rule.
        for name in _rule(own).hyperparameters.keys() - rule.hyperparameters.keys() - param_group.keys():
            del group[name]
        self._origins.add(group, names)
        try:
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            self._origins.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        rule = _rule(group["algorithm"])
        group.update(rule.checked_hyperparameters(group))
        if rule.matrix is not None:
            group.setdefault("layout", None)
        for position, p in enumerate(group["params"]):
            name, shape = self._origins.describe(p, position, group), full_shape(p)
            if torch.is_complex(p):
                raise ValueError(f"{name} is complex: a sign, and so a cautious mask, is defined for real numbers only")
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
            ValueError: before the first step, that matrices lie on ranks in a way that is not supported.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        works = self._checked()
        if not self._is_prepared:
            check_masters(self.param_groups)
            self._prepare_flat()
            self._is_prepared = True
        if only_initialises(self):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        states.make(self.state[p], p, group)
            return loss
        if members := self._members():
            self._matrix_step(members, self.state, self.statistics, lambda: self._step_elementwise(works))
        else:
            self._step_elementwise(works)
        if self.statistics is not None:
            moving = [exchange.device for exchange in self.exchanges if exchange.plan.rounds]
            self.statistics.settle(self.param_groups, self._origins, moving[0] if moving else None)
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
            found = problem(
                p,
                states.held(self.state, p, group),
                needs_matrices=rule.matrix is not None and self._origins.flat(p, group) is None,
                has_master=has_remainder(group, p.dtype),
            )
            if found is not None:
                raise RuntimeError(f"{self._origins.describe(p, position, group)} {found}")

    def _prepare_flat(self) -> None:
        """Looks at all of DeepSpeed's flat tensors, which it shows one by one, before the first of them is changed."""

        def needs(group: dict[str, Any]) -> bool:
            return _rule(group["algorithm"]).matrix is not None

        flats = self._origins.flat_tensors(needs)
        shown = {p for group in self.param_groups for p in group["params"]}
        for group, p in flats:
            if needs(group) and not shown.issuperset(p for _, p in flats):
                self._matrix_step.prepare([self._member(p, 0, group, states.settings(group))])
        for group, p in flats:  # stages 1 and 2 link the states of all groups after the first one's step
            states.make(self.state[p], p, group)

    def _member(self, p: Tensor, position: int, group: dict[str, Any], given: Settings) -> Member:
        return Member(p, group, given, self._origins.describe(p, position, group), self._origins.flat(p, group))

    def _members(self) -> list[Member]:
        """The parameters of matrix rules, those without a gradient too."""
        members = []
        for group in self.param_groups:
            if _rule(group["algorithm"]).matrix is not None:
                given = states.settings(group)
                members += [self._member(p, i, group, given) for i, p in enumerate(group["params"])]
        return members

    def _step_elementwise(self, works: Sequence[_Elementwise]) -> None:
        for rule, groups, params, kept in works:
            given = [states.settings(group) for group in groups]
            if kept is not None:
                kept.advance(given, params)
                items, calls = kept.items, kept.calls
            else:
                items = []
                for some, group, settings in zip(params, groups, given, strict=True):
                    found = states.advance(self.state, some, group, settings)
                    flat = self._origins.flat(some[0], group, needed=False) if len(some) == 1 else None
                    # DeepSpeed steps each by itself, and has any numbers in the padding.
                    items += found if flat is None else states.pieces(found[0], flat.extents)
                calls = kernels.calls(rule, items, self._origins.described)
                self._kept[rule] = states.Kept.of(self.state, groups, params, items, calls)
            kernels.update(rule, calls, self.statistics, self._cache)
            for item in items:
                item.grad = None  # kept items must not keep the memory of gradients

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer, or of the torch.optim one whose rule it follows.

        The saved hyper-parameters win, as in torch; keys that the saved groups lack (``cautious``, ``mask``) keep their
        present values.

        Raises:
            ValueError: another rule's state, unless ``on_rule_change`` is ``"reset"``: then it is not taken, and
                ``reset_because`` says why. Or that of another model, a state that is not complete, or an option that
                is not supported here (``amsgrad``). Nothing has changed then.
        """
        groups = self.param_groups
        adopted, self.reset_because = adopt(state_dict, groups, on_rule_change=self.on_rule_change)
        super().load_state_dict(adopted)
        self._origins.replace(groups, self.param_groups)
        restore_dtypes(self, adopted)


def _rule(name: str) -> Rule:
    if name not in RULES:
        raise ValueError(f"algorithm={name!r} is not a registered rule: use one of {', '.join(RULES)}")
    return RULES[name]
