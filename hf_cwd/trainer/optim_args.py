"""From TrainingArguments to the optimizer's arguments: the Trainer's own flags, and ``--optim_args`` by declared type.

``--optim_args`` is text, ``key=value,key=value``. A YAML or JSON file may also give a mapping.
"""

import contextlib
import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from hf_cwd.distributed.plan import EXCHANGE
from hf_cwd.optim.optimizer import ON_RULE_CHANGE
from hf_cwd.routing.target_modules import TargetModules
from hf_cwd.rules import COMMON, RULES, Rule
from hf_cwd.rules.hyperparameters import Betas, Choice, Coefficients, Hyperparameter, Real, checked
from hf_cwd.trainer.optim_names import PREFIX, chosen, names

# These have flags of their own in TrainingArguments. A second name would only let the two disagree.
FLAGS = {"lr": "--learning_rate", "learning_rate": "--learning_rate", "weight_decay": "--weight_decay"}
ADAM_FLAGS = {"adam_beta1": Real(0.9, high=1.0), "adam_beta2": Real(0.999, high=1.0), "adam_epsilon": Real(1e-8)}
# For the callbacks, not for the optimizer: see DiagnosticsCallback and CheckpointCallback.
CALLBACK_OPTIONS = {
    "cwd_log": Choice("summary", ("summary", "groups", "off")),
    "cwd_verify": Choice("full", ("full", "fast", "off")),
}
SHARED = ("cautious", "mask", "kernel", "state_dtype", "master", "maximize")
TEXT_FORMS = {Betas: "written 0.9:0.95", Coefficients: "written a:b:c or a:b:c:a:b:c"}


class Option(NamedTuple):
    """What a key of ``--optim_args`` sets: an argument of the optimizer, and the type of its value."""

    argument: str
    hyperparameter: Hyperparameter


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """A context in which errors of :mod:`hf_cwd.routing` name the Trainer's flags instead of arguments and classes."""
    try:
        yield
    except ValueError as error:
        text = re.sub(r"^(?=target_modules\b)", "--optim_", str(error))
        raise type(error)(re.sub(r"(?<=Use )CWDAdamW$", "--optim cwd_adamw", text)) from None


def as_text(optim_args: Any) -> str | None:
    """Converts ``optim_args`` to text, the only form that transformers reads.

    Raises:
        ValueError: neither text nor a mapping, or invalid JSON.
    """
    if isinstance(optim_args, str) and optim_args.lstrip().startswith("{"):
        try:
            optim_args = json.loads(optim_args)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--optim_args {optim_args!r} begins like a JSON object, but is not valid JSON: {error}. Correct it, "
                "or write key=value,key=value"
            ) from None
    if optim_args is None or isinstance(optim_args, str):
        return optim_args
    if not isinstance(optim_args, Mapping):
        raise ValueError(
            f"optim_args={optim_args!r} is neither text nor a mapping: write 'key=value,key=value', or key: value in a "
            "YAML or JSON file"
        )
    return ",".join(f"{key}={written(value)}" for key, value in optim_args.items()) or None


def written(value: Any) -> str:
    """A value as ``--optim_args`` spells it: ``0.9:0.95``, ``false``."""
    if isinstance(value, list | tuple):
        return ":".join(map(written, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def options(rule_name: str) -> dict[str, Option]:
    """The keys of ``--optim_args`` for ``cwd_<rule_name>``.

    A rule with a companion (AdamW for Muon) also takes the companion's hyper-parameters, prefixed with the companion's
    name. Without the prefix a key sets the rule's own hyper-parameter if it has one of that name, else the companion's:
    ``betas`` is ``adamw_betas``, but ``eps`` is Muon's. A rule with a matrix stage also takes
    :data:`hf_cwd.distributed.plan.EXCHANGE`. Every rule takes :data:`CALLBACK_OPTIONS`, which are no arguments of the
    optimizer.
    """
    rule = RULES[rule_name]
    result = {name: Option(name, declared) for name, declared in rule.hyperparameters.items()}
    result |= {name: Option(name, COMMON[name]) for name in ("cautious", "mask", "kernel", "state_dtype", "master")}
    if rule.matrix is not None:
        result |= {name: Option(name, declared) for name, declared in EXCHANGE.items()}
    if rule.companion is not None:
        for name, declared in {"lr": Real(COMMON["lr"].default), **RULES[rule.companion].hyperparameters}.items():
            argument = f"{rule.companion}_{name}"
            result[argument] = Option(argument, declared)
            if name != "lr":
                result.setdefault(name, result[argument])
    extra = {"on_rule_change": ON_RULE_CHANGE, **CALLBACK_OPTIONS}
    return result | {name: Option(name, declared) for name, declared in extra.items()}


def parse_optim_args(name: str, text: str | None) -> dict[str, Any]:
    """Reads ``--optim_args``, such as ``"nesterov=false,betas=0.9:0.95"``, as keyword arguments of the optimizer.

    Raises:
        ValueError: a part is not ``key=value``, a key is unknown or given twice, or a value is not valid. The message
            says what is valid and suggests the nearest name.
    """
    valid = options(name.removeprefix(PREFIX))
    values: dict[str, Any] = {}
    for part in (text or "").replace(" ", "").split(",") if text else ():
        key, equals, value = part.partition("=")
        if not key or not equals or not value or "=" in value:
            raise ValueError(
                f"--optim_args {text!r}: {part!r} is not key=value. Write key=value,key=value with the keys "
                f"{_keys(valid)}"
            )
        if key in FLAGS:
            raise ValueError(f"--optim_args: {key} is set by {FLAGS[key]}, not here")
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"--optim_args: {name} has no option {key!r}.{hint} Its options are {_keys(valid)}")
        argument, hyperparameter = valid[key]
        if argument in values:
            raise ValueError(f"--optim_args {text!r}: {argument} is given twice")
        values[argument] = _parsed(key, hyperparameter, value)
    return values


def _parsed(key: str, hyperparameter: Hyperparameter, text: str) -> Any:
    try:
        return checked("--optim_args", key, hyperparameter, text, text=True)
    except ValueError as error:
        form = TEXT_FORMS.get(type(hyperparameter))
        raise ValueError(str(error) if form is None else f"{error}, {form}") from None


def asked_for(args: Any, key: str) -> Any:
    """The value of a key in ``--optim_args``; None if it is not given, or ``--optim`` is not one of ours."""
    return parse_optim_args(chosen(args), args.optim_args).get(key) if chosen(args) in names() else None


def optimizer_arguments(args: Any) -> dict[str, Any]:
    """The keyword arguments of the optimizer that TrainingArguments ask for, except its parameters and routing.

    ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` set AdamW's hyper-parameters, also for the AdamW beside Muon.
    ``--optim_args`` may set the same ones instead.

    Raises:
        ValueError: see :func:`parse_optim_args` and :func:`flags`. Also: an ``--adam_*`` flag that the optimizer does
            not use, or that contradicts ``--optim_args``, and ``--optim_target_modules`` for an optimizer that does
            not choose by module.
    """
    name = chosen(args)
    rule, values = RULES[name.removeprefix(PREFIX)], flags(args)
    parsed = parse_optim_args(name, args.optim_args)
    given = {key: value for key, value in parsed.items() if key not in CALLBACK_OPTIONS}
    if args.optim_target_modules is not None:
        if rule.companion is None:
            raise ValueError(f"--optim_target_modules has no effect on {name}, which takes any module: leave it out")
        with naming_flags():
            # An invalid regular expression fails here, before a model is loaded.
            TargetModules(args.optim_target_modules)
    own = {"lr": values["learning_rate"], "weight_decay": values["weight_decay"]}
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    # A flag that is given its default value looks like one that is not given.
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
    """The arguments that the ``--adam_*`` flags set.

    Raises:
        ValueError: ``given``, the values of ``--optim_args``, contradict a ``changed`` flag.
    """
    prefix = "" if rule.name == "adamw" else "adamw_"
    betas, eps = ("adam_beta1", "adam_beta2"), "adam_epsilon"
    arguments = {f"{prefix}betas": tuple(values[flag] for flag in betas), f"{prefix}eps": values[eps]}
    for (argument, value), sources in zip(arguments.items(), (betas, (eps,)), strict=True):
        both = [f"--{flag}" for flag in sources if flag in changed]
        if both and given.get(argument, value) != value:
            raise ValueError(
                f"{argument}={given[argument]} in --optim_args contradicts {' and '.join(both)} ({value}): give one of "
                "them"
            )
    return arguments


def flags(args: Any) -> dict[str, Any]:
    """The fields of TrainingArguments that the optimizer uses, as numbers.

    YAML reads ``1e-3`` as text, since it has no decimal point. Text is converted as on a command line.

    Raises:
        ValueError: a value is not a number or out of range. The message names the flag.
    """
    fields = {"learning_rate": COMMON["lr"], "weight_decay": COMMON["weight_decay"], **ADAM_FLAGS}
    return {
        name: checked(chosen(args), f"--{name}", declared, value := getattr(args, name), text=isinstance(value, str))
        for name, declared in fields.items()
    }


def effective(rule_name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Every value that the optimizer runs with, including defaults."""
    values = {key: arguments[key] for key in ("lr", "weight_decay")}
    for option in options(rule_name).values():
        if option.argument in (*CALLBACK_OPTIONS, "on_rule_change"):  # these do not change the training
            continue
        default = arguments["lr"] if option.argument.endswith("_lr") else option.hyperparameter.default
        values[option.argument] = arguments.get(option.argument, default)
    return values


def of_groups(groups: Sequence[Mapping[str, Any]], own: str) -> dict[str, Any]:
    """Every value in the parameter groups, by its key in ``--optim_args``; a list where groups differ.

    ``lr`` is the learning rate before the schedule. Groups without weight decay do not count for ``weight_decay``.

    Args:
        own: the rule whose keys have no prefix.
    """
    collected: dict[str, list[Any]] = {"lr": [], "weight_decay": []}
    for group in groups:
        prefix = "" if group["algorithm"] == own else f"{group['algorithm']}_"
        keys = {"lr": f"{prefix}lr", "weight_decay": "weight_decay"}
        keys |= {key: prefix + key for key in RULES[group["algorithm"]].hyperparameters}
        keys |= {key: key for key in SHARED if key != "maximize" or group[key]}
        for key, name in keys.items():
            value = group.get("initial_lr", group[key]) if key == "lr" else group[key]
            value = value.item() if isinstance(value, Tensor) else value
            if value not in (values := collected.setdefault(name, [])):
                values.append(value)
    if len(collected["weight_decay"]) > 1:  # norms and biases have none
        collected["weight_decay"] = [decay for decay in collected["weight_decay"] if decay != 0]
    return {name: values[0] if len(values) == 1 else values for name, values in collected.items() if values}


def _keys(valid: dict[str, Option]) -> str:
    return ", ".join(sorted(valid))
