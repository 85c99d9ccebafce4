"""From TrainingArguments to an optimizer: ``--optim_args`` by declared type, and the Trainer's handler."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_cwd.distributed.plan import EXCHANGE
from hf_cwd.log import logger
from hf_cwd.optim import named
from hf_cwd.optim.optimizer import ON_RULE_CHANGE, CWDOptimizer
from hf_cwd.routing.route import Routing, route
from hf_cwd.routing.target_modules import Targets
from hf_cwd.rules import COMMON, RULES, Rule
from hf_cwd.rules.hyperparameters import Choice, Hyperparameter, Real, checked
from hf_cwd.trainer import deepspeed
from hf_cwd.trainer.optim_args import as_text
from hf_cwd.trainer.optim_names import PREFIX, chosen, names, unknown_name
from hf_cwd.trainer.parallelism import check_sharding

MINIMUM_TRANSFORMERS = "5.2"
CLASSES = {
    "adamw": named.CWDAdamW,
    "lion": named.CWDLion,
    "muon": named.CWDMuon,
    "sgd": named.CWDSGD,
}
# TrainingArguments' own flags for these; giving them a second name would only let the two disagree.
FLAGS = {"lr": "--learning_rate", "learning_rate": "--learning_rate", "weight_decay": "--weight_decay"}
# Of the callbacks, not of the optimizer: see DiagnosticsCallback and CheckpointCallback.
LOG = {
    "cwd_log": Choice("summary", ("summary", "groups", "off")),
    "cwd_verify": Choice("full", ("full", "fast", "off")),
}
ADAM_FLAGS = {"adam_beta1": Real(0.9, high=1.0), "adam_beta2": Real(0.999, high=1.0), "adam_epsilon": Real(1e-8)}
SHARED = ("cautious", "mask", "kernel", "state_dtype", "master", "maximize")
SHOWN = 3  # values of groups that differ in the start-up line; of more, the smallest and the largest


class Option(NamedTuple):
    """What a key of ``--optim_args`` sets: an argument of the optimizer, and the type of its value."""

    argument: str
    kind: Hyperparameter


def options(rule_name: str) -> dict[str, Option]:
    """The keys of ``--optim_args`` for ``cwd_<rule_name>``.

    A rule with a companion (Muon's AdamW) takes the companion's hyper-parameters with its name as prefix, and without
    it where the rule has none of that name: ``adamw_betas`` and ``betas``, but ``adamw_eps`` only. One with a matrix
    stage takes :data:`hf_cwd.distributed.plan.EXCHANGE` as well, and all take :data:`LOG`, which is no argument.
    """
    rule = RULES[rule_name]
    known = {name: Option(name, kind) for name, kind in rule.hyperparameters.items()}
    known |= {name: Option(name, COMMON[name]) for name in ("cautious", "mask", "kernel", "state_dtype", "master")}
    if rule.matrix is not None:
        known |= {name: Option(name, kind) for name, kind in EXCHANGE.items()}
    if rule.companion is not None:
        for name, kind in {"lr": Real(COMMON["lr"].default), **RULES[rule.companion].hyperparameters}.items():
            argument = f"{rule.companion}_{name}"
            known[argument] = Option(argument, kind)
            if name != "lr":
                known.setdefault(name, known[argument])
    return known | {name: Option(name, kind) for name, kind in {"on_rule_change": ON_RULE_CHANGE, **LOG}.items()}


def parse_optim_args(name: str, text: str | None) -> dict[str, Any]:
    """The optimizer's keyword arguments in an ``--optim_args`` string, ``"nesterov=false,betas=0.9:0.95"``.

    Raises:
        ValueError: anything that is not ``key=value`` with a known key, once, and a valid value; the message says what
            is valid and suggests the nearest name.
    """
    known = options(name.removeprefix(PREFIX))
    values: dict[str, Any] = {}
    for part in (text or "").replace(" ", "").split(",") if text else ():
        key, equals, value = part.partition("=")
        if not key or not equals or not value or "=" in value:
            raise ValueError(
                f"--optim_args {text!r}: {part!r} is not key=value. Write key=value,key=value with the keys "
                f"{_keys(known)}"
            )
        if key in FLAGS:
            raise ValueError(f"--optim_args: {key} is set by {FLAGS[key]}, not here")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"--optim_args: {name} has no option {key!r}.{hint} Its options are {_keys(known)}")
        argument, kind = known[key]
        if argument in values:
            raise ValueError(f"--optim_args {text!r}: {argument} is given twice")
        values[argument] = checked("--optim_args", key, kind, value, text=True)
    return values


def optimizer_arguments(args: Any) -> dict[str, Any]:
    """All keyword arguments of the optimizer that TrainingArguments ask for, as numbers.

    ``learning_rate`` and ``weight_decay`` are taken as they are. ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon``
    apply to AdamW, also beside Muon; ``--optim_args`` may set the same instead.

    Raises:
        ValueError: see :func:`parse_optim_args` and :func:`flags`; also an ``--adam_*`` flag that the optimizer has no
            use for, or that contradicts ``--optim_args``, and ``--optim_target_modules`` where nothing is sorted by
            module.
    """
    name = chosen(args)
    rule, values = RULES[name.removeprefix(PREFIX)], flags(args)
    given = {key: value for key, value in parse_optim_args(name, args.optim_args).items() if key not in LOG}
    if args.optim_target_modules is not None:
        if rule.companion is None:
            raise ValueError(f"--optim_target_modules has no effect on {name}, which takes any module: leave it out")
        Targets(args.optim_target_modules)  # a regular expression that is none fails here, not at the optimizer
    own = {"lr": values["learning_rate"], "weight_decay": values["weight_decay"]}
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    # One that is given with its default value cannot be told apart.
    changed = [flag for flag in ADAM_FLAGS if values[flag] != defaults[flag]]
    if "adamw" in (rule.name, rule.companion):
        return own | _adam_arguments(rule, values, given, changed) | given
    if changed:
        use = ". Its betas are set by --optim_args betas=0.9:0.95" if "betas" in rule.hyperparameters else ""
        told = " and ".join(f"--{flag}" for flag in changed)
        raise ValueError(f"{told} given, but {name} has no Adam in it: leave the flag out{use}")
    return own | given


def _adam_arguments(
    rule: Rule, values: Mapping[str, Any], given: Mapping[str, Any], changed: Sequence[str]
) -> dict[str, Any]:
    """What the ``--adam_*`` flags set; ValueError where ``--optim_args``, which ``given`` holds, say otherwise."""
    prefix = "" if rule.name == "adamw" else "adamw_"
    betas, eps = ("adam_beta1", "adam_beta2"), "adam_epsilon"
    found = {f"{prefix}betas": tuple(values[flag] for flag in betas), f"{prefix}eps": values[eps]}
    for (argument, value), sources in zip(found.items(), (betas, (eps,)), strict=True):
        both = [f"--{flag}" for flag in sources if flag in changed]
        if both and given.get(argument, value) != value:
            raise ValueError(
                f"{argument}={given[argument]} in --optim_args contradicts {' and '.join(both)} ({value}): give one of "
                "them"
            )
    return found


def flags(args: Any) -> dict[str, Any]:
    """TrainingArguments' own fields that the optimizer gets, as numbers.

    YAML has ``1e-3`` for text, since it lacks a point: it is read as on a command line.

    Raises:
        ValueError: no number, or one out of range; the message names the flag.
    """
    kinds = {"learning_rate": COMMON["lr"], "weight_decay": COMMON["weight_decay"], **ADAM_FLAGS}
    return {
        name: checked(chosen(args), f"--{name}", kind, value := getattr(args, name), text=isinstance(value, str))
        for name, kind in kinds.items()
    }


def check_training_arguments(args: Any) -> None:
    """Called when TrainingArguments are built: what would fail at the optimizer fails before a model is loaded.

    Raises:
        ValueError: see :func:`optimizer_arguments`; also a ``cwd_`` name that does not exist, and
            :func:`hf_cwd.trainer.deepspeed.adopt_section`.
        RuntimeError: see :func:`hf_cwd.trainer.deepspeed.check_tools`.
        ImportError: a transformers that is too old for our names.
    """
    if deepspeed.is_used(args):
        deepspeed.adopt_section(args)
    name = chosen(args)
    if name not in names():
        _check_other_name(name)
        return
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version(MINIMUM_TRANSFORMERS):
        raise ImportError(
            f"--optim {name} needs transformers >= {MINIMUM_TRANSFORMERS}, found {transformers.__version__}: "
            f"pip install -U 'transformers>={MINIMUM_TRANSFORMERS}'"
        )
    if deepspeed.is_used(args):
        deepspeed.check_tools(name)
    args.optim_args = as_text(args.optim_args)
    for flag, value in flags(args).items():
        setattr(args, flag, value)
    arguments = optimizer_arguments(args)
    rule = RULES[name.removeprefix(PREFIX)]
    kinds = {**COMMON, **rule.hyperparameters}
    rule.checked_hyperparameters({key: kind.default for key, kind in kinds.items()} | arguments)


def _check_other_name(name: str) -> None:
    """Raises ValueError with the nearest name for one that is nobody's; transformers lists all of its own."""
    from transformers.training_args import OptimizerNames

    known = [member.value for member in OptimizerNames]
    if name not in known and (error := unknown_name(name, known)) is not None:
        raise ValueError(error)


def check_finished_arguments(args: Any) -> None:
    """Called when TrainingArguments are built and transformers has filled them in.

    Raises:
        ValueError: see :func:`check_sharding` and :func:`hf_cwd.trainer.deepspeed.check`.
    """
    name = chosen(args)
    if name in names():
        check_sharding(name, RULES[name.removeprefix(PREFIX)], args)
        deepspeed.drop_section(args)
        deepspeed.check(args, name, optimizer_arguments(args))
        deepspeed.meet(args)


def handler(ctx: Any) -> tuple[type[CWDOptimizer], dict[str, Any]]:
    """The Trainer's handler of our names: an optimizer class and its keyword arguments.

    It returns a class, not one of transformers' factories, so that the parameter groups come from the Trainer, with its
    own decay set, also where a subclass overrides it; ``routing`` then splits them by rule.
    """
    name = chosen(ctx.args)
    rule = RULES[name.removeprefix(PREFIX)]
    check_sharding(name, rule, ctx.args)
    arguments = optimizer_arguments(ctx.args)
    deepspeed.check(ctx.args, name, arguments)
    deepspeed.keep_ours()
    _check_world(ctx.args)
    asked, routing = dict(arguments), None
    if rule.companion is not None:
        # Not above: it imports transformers, which is to find its names registered.
        from hf_cwd.trainer.model_lookup import model_of

        routing = arguments["routing"] = route(
            model_of(ctx.args, name) if ctx.model is None else ctx.model,
            matrices=rule.name,
            others=rule.companion,
            target_modules=ctx.args.optim_target_modules,
        )
    if ctx.args.should_log:
        arguments["announce"] = _announcement(rule, asked, routing)
    if rule.name in CLASSES:
        return CLASSES[rule.name], arguments
    if rule.companion is not None:
        prefix = f"{rule.companion}_"
        own = {key.removeprefix(prefix): arguments.pop(key) for key in list(arguments) if key.startswith(prefix)}
        arguments["companions"] = {rule.companion: own}
    return CWDOptimizer, {"algorithm": rule.name} | arguments


def _check_world(args: Any) -> None:
    """Processes that were started together must train together: without a GPU transformers needs to be told."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    started = torch.distributed.get_world_size() if together else 1
    if started > 1 and args.world_size == 1:
        raise ValueError(
            f"{started} processes were started, but TrainingArguments take each for the only one, so that every one "
            "would train a model of its own. On a machine without accelerators add --use_cpu"
        )


def _announcement(
    rule: Rule, asked: Mapping[str, Any], routing: Routing | None
) -> Callable[[Sequence[Mapping[str, Any]]], None]:
    """What logs the start-up line: the settings that the parameter groups have, and what each rule got."""

    def announce(groups: Sequence[Mapping[str, Any]]) -> None:
        groups = [group for group in groups if group["params"]]

        def details(algorithm: str) -> str:
            some = [group for group in groups if group["algorithm"] == algorithm]
            rates, decays = ([float(group[key]) for group in some] for key in ("lr", "weight_decay"))
            return f", lr {_shown(rates)}, weight_decay {_shown(decays)}"

        found = effective(rule.name, asked) | of_groups(groups, rule.name)
        described = [f"{key}={_shown(value) if isinstance(value, list) else value}" for key, value in found.items()]
        line = " ".join([f"{PREFIX}{rule.name}", *described])
        if routing is not None:
            line += f" | {routing.summary(details)} | output layers: {', '.join(routing.outputs) or 'none'}"
        logger().info(line)

    return announce


def _shown(values: Sequence[Any]) -> str:
    """Different values of parameter groups in words, the largest first."""
    some = sorted(set(values), reverse=True)
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in some]
    return " and ".join(texts) if len(texts) <= SHOWN else f"{texts[-1]} to {texts[0]} ({len(texts)} values)"


def asked_for(args: Any, key: str) -> Any:
    """What ``--optim_args`` say of a key; None where they say nothing, as where ``optimizers=`` was given."""
    return parse_optim_args(chosen(args), args.optim_args).get(key) if chosen(args) in names() else None


def effective(rule_name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Every value that the optimizer runs with, defaults included."""
    values = {key: arguments[key] for key in ("lr", "weight_decay")}
    for option in options(rule_name).values():
        if option.argument in (*LOG, "on_rule_change"):  # no setting of the training
            continue
        default = arguments["lr"] if option.argument.endswith("_lr") else option.kind.default
        values[option.argument] = arguments.get(option.argument, default)
    return values


def of_groups(groups: Sequence[Mapping[str, Any]], own: str) -> dict[str, Any]:
    """Every value that parameter groups have, by its key in ``--optim_args``; a list where they differ.

    ``lr`` is that before the schedule, and ``weight_decay`` that of the groups that decay.

    Args:
        own: the rule whose keys have no prefix.
    """
    found: dict[str, list[Any]] = {"lr": [], "weight_decay": []}
    for group in groups:
        prefix = "" if group["algorithm"] == own else f"{group['algorithm']}_"
        keys = {"lr": f"{prefix}lr", "weight_decay": "weight_decay"}
        keys |= {key: prefix + key for key in RULES[group["algorithm"]].hyperparameters}
        keys |= {key: key for key in SHARED if key != "maximize" or group[key]}
        for key, name in keys.items():
            value = group.get("initial_lr", group[key]) if key == "lr" else group[key]
            value = value.item() if isinstance(value, Tensor) else value
            if value not in (values := found.setdefault(name, [])):
                values.append(value)
    if len(found["weight_decay"]) > 1:  # norms and biases have none
        found["weight_decay"] = [decay for decay in found["weight_decay"] if decay != 0]
    return {name: values[0] if len(values) == 1 else values for name, values in found.items() if values}


def _keys(known: dict[str, Option]) -> str:
    return ", ".join(sorted(known))
