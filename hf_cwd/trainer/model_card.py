"""Adds to the model card what trained the model: the optimizer, its decay, mask and options."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, metadata_save

import hf_cwd
from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.routing.route import route
from hf_cwd.rules import RULES
from hf_cwd.trainer.callbacks.run_record import optimizer_settings
from hf_cwd.trainer.handler import CLASSES
from hf_cwd.trainer.optim_names import PREFIX, chosen
from hf_cwd.trainer.wrappers import innermost

PAPER = "https://arxiv.org/abs/2510.12402"
BEGIN, END = "<!-- hf_cwd: optimizer -->", "<!-- hf_cwd: end -->"
SECTION = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}\n\n?", re.DOTALL)
# The Trainer's entry for --optim: one line, or two if the arguments are on a line of their own.
STOCK = re.compile(r"^- optimizer: Use .*?\n(?=- |\n|\Z)", re.MULTILINE | re.DOTALL)
VERSIONS = re.compile(r"^### Framework versions$", re.MULTILINE)


def complete(trainer: Any) -> None:
    """Adds the optimizer to the text and the tags of the card in the output directory. A second call changes nothing.

    Args:
        trainer: a :class:`hf_cwd.CWDTrainerMixin` whose base class has just written the card.
    """
    path = Path(trainer.args.output_dir) / "README.md"
    if not path.is_file():
        return
    values = optimizer_settings(trainer.args, trainer.optimizer)
    card = metadata_load(path) or {}
    tags = card.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    own = ["cautious-weight-decay", "hf_cwd"] if _is_cautious(values) else ["hf_cwd"]
    metadata_save(path, card | {"tags": [*tags, *(tag for tag in own if tag not in tags)]})

    text = path.read_text(encoding="utf-8")
    listed = ", ".join(f"{key}={_text(value)}" for key, value in values.items())
    line = f"- optimizer: {_title(trainer, values)} (hf_cwd {hf_cwd.__version__}) with {listed}\n"
    text = SECTION.sub("", STOCK.sub(lambda _: line, text))
    section, place = f"{BEGIN}\n### Optimizer\n\n{_section(trainer, values)}\n{END}\n", VERSIONS.search(text)
    if place is None:
        text = f"{text.rstrip()}\n\n{section}"
    else:
        text = f"{text[: place.start()]}{section}\n{text[place.start() :]}"
    path.write_text(text, encoding="utf-8")


def _is_cautious(values: dict[str, Any]) -> bool:
    return values["cautious"] is not False and values["weight_decay"] != 0


def _algorithm(trainer: Any) -> str:
    optimizer = innermost(trainer.optimizer)
    made = isinstance(optimizer, CWDOptimizer)
    return optimizer.defaults["algorithm"] if made else chosen(trainer.args).removeprefix(PREFIX)


def _title(trainer: Any, values: dict[str, Any]) -> str:
    rule = _algorithm(trainer)
    name = CLASSES[rule].__name__.removeprefix("CWD") if rule in CLASSES else rule
    return f"CWD-{name}" if values["cautious"] is not False else f"{name} with plain decoupled weight decay"


def _section(trainer: Any, values: dict[str, Any]) -> str:
    title, by = _title(trainer, values), f"hf_cwd {hf_cwd.__version__}"
    paper = f"[cautious weight decay (arXiv 2510.12402)]({PAPER})"
    if values["weight_decay"] == 0:
        decay = f"It was trained by {title} of {by}, with a weight decay of 0: nothing was decayed."
    elif values["cautious"] is False:
        decay = f"It was trained by {title} of {by}: `cautious=False`, the baseline of {paper}."
    else:
        sign = {"ge": "u·x ≥ 0", "gt": "u·x > 0"}.get(values["mask"], "the group's mask")
        decay = (
            f"It was trained by {title} of {by}, with {paper}: a step decays a weight x only where {sign}, u being its "
            f"update. Learning rate {_text(values['lr'])}, weight decay {_text(values['weight_decay'])}."
        )
    lines = [decay, ""]
    rule = RULES[_algorithm(trainer)]
    if rule.companion is not None and chosen(trainer.args) == PREFIX + rule.name:
        target = trainer.args.optim_target_modules
        routing = route(trainer.model, matrices=rule.name, others=rule.companion, target_modules=target)
        lines += [f"Its parameters by rule: {routing.summary()}.", ""]
    logged = [entry["cwd/decayed_fraction"] for entry in trainer.state.log_history if "cwd/decayed_fraction" in entry]
    if logged:
        lines += [f"On the last step that was logged {logged[-1]:.1%} of the elements were decayed.", ""]
    if skipped := trainer._cwd_guard.skipped:
        lines += [f"Steps skipped because their gradients were not finite: {skipped}.", ""]
    rows = [f"| `{key}` | {_text(value)} |" for key, value in values.items()]
    return "\n".join([*lines, "| option | value |", "|---|---|", *rows])


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
