"""The Trainer's handler for our names: from TrainingArguments to an optimizer class and its arguments."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_cwd.log import logger
from hf_cwd.optim import named
from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.routing.route import Routing, route
from hf_cwd.rules import RULES, Rule
from hf_cwd.trainer import deepspeed
from hf_cwd.trainer.argument_checks import check_sharding, check_world
from hf_cwd.trainer.optim_args import effective, naming_flags, of_groups, optimizer_arguments
from hf_cwd.trainer.optim_names import PREFIX, chosen

CLASSES = {
    "adamw": named.CWDAdamW,
    "lion": named.CWDLion,
    "muon": named.CWDMuon,
    "sgd": named.CWDSGD,
}
SHOWN = 3  # the start-up line lists up to this many different values of the groups; of more, the smallest and largest


def handler(ctx: Any) -> tuple[type[CWDOptimizer], dict[str, Any]]:
    """Returns an optimizer class and its keyword arguments, as the Trainer expects for a value of ``--optim``.

    It returns a class and not a factory of transformers. The Trainer then makes the parameter groups, and its choice of
    decayed parameters applies, also where a subclass overrides it. ``routing`` splits these groups by rule.
    """
    name = chosen(ctx.args)
    rule = RULES[name.removeprefix(PREFIX)]
    check_sharding(name, rule, ctx.args)
    arguments = optimizer_arguments(ctx.args)
    deepspeed.check(ctx.args, name, arguments)
    deepspeed.keep_ours()
    check_world(ctx.args)
    asked, routing = dict(arguments), None
    if rule.companion is not None:
        # Not at the top: it imports transformers, which must find our names registered.
        from hf_cwd.trainer.model_lookup import model_of

        model = model_of(ctx.args, name) if ctx.model is None else ctx.model
        with naming_flags():
            routing = route(
                model, matrices=rule.name, others=rule.companion, target_modules=ctx.args.optim_target_modules
            )
        arguments["routing"] = naming_flags()(routing)
    if ctx.args.should_log:
        arguments["announce"] = _announcement(rule, asked, routing)
    if rule.name in CLASSES:
        return CLASSES[rule.name], arguments
    if rule.companion is not None:
        prefix = f"{rule.companion}_"
        own = {key.removeprefix(prefix): arguments.pop(key) for key in list(arguments) if key.startswith(prefix)}
        arguments["companions"] = {rule.companion: own}
    return CWDOptimizer, {"algorithm": rule.name} | arguments


def _announcement(
    rule: Rule, asked: Mapping[str, Any], routing: Routing | None
) -> Callable[[Sequence[Mapping[str, Any]]], None]:
    """Returns a function that logs the start-up line: the values in the parameter groups, and what each rule got."""

    def announce(groups: Sequence[Mapping[str, Any]]) -> None:
        groups = [group for group in groups if group["params"]]

        def details(algorithm: str) -> str:
            some = [group for group in groups if group["algorithm"] == algorithm]
            rates, decays = ([float(group[key]) for group in some] for key in ("lr", "weight_decay"))
            return f", lr {_shown(rates)}, weight_decay {_shown(decays)}"

        values = effective(rule.name, asked) | of_groups(groups, rule.name)
        described = [f"{key}={_shown(value) if isinstance(value, list) else value}" for key, value in values.items()]
        line = " ".join([f"{PREFIX}{rule.name}", *described])
        if routing is not None:
            line += f" | {routing.summary(details)} | output layers: {', '.join(routing.outputs) or 'none'}"
        logger().info(line)

    return announce


def _shown(values: Sequence[Any]) -> str:
    """The different values of parameter groups as text, the largest first."""
    some = sorted(set(values), reverse=True)
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in some]
    return " and ".join(texts) if len(texts) <= SHOWN else f"{texts[-1]} to {texts[0]} ({len(texts)} values)"
