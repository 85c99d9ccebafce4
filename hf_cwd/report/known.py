"""What is known of a run's settings: flat, with short names, each in its section."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

OPTIMIZER, ARGUMENTS, OTHER, CONFIG = "Optimizer", "Training arguments", "Other", "Model configuration"
SECTIONS = {"arguments": ARGUMENTS, "optimizer": OPTIMIZER, "model": "Model", "versions": "Versions"}
FIRST = (
    "optim",
    "optimizer_class",
    "optim_args",
    "learning_rate",
    "lr",
    "weight_decay",
    "cautious",
)  # of the optimizer
ORDER = (OPTIMIZER, ARGUMENTS, "Model", CONFIG, OTHER, "Versions")


class Known(NamedTuple):
    """Values of settings by their names, the section that each is in, and those that the run itself says."""

    values: dict[str, Any]
    sections: dict[str, str]
    own: dict[str, Any]  # of its record, else of its model card


def settings(
    record: Mapping[str, Any], card: Mapping[str, Any], state: Mapping[str, Any], config: Mapping[str, Any]
) -> Known:
    """What a run's record says, or else its model card, and what the Trainer's state and the configuration say beside.

    An argument of the Trainer has its own name, and so has whatever else has a name to itself; the others are named by
    their path in the record. The state wins: all runs have it, and it has steps and epochs as they came to be.
    """
    flat = _flat(record or card)
    names = _short(flat)
    own = {names[key]: value for key, value in flat.items()}
    of_config = {f"model.{key}": value for key, value in _flat(config).items()}
    nested = any(isinstance(value, Mapping) for value in record.values())
    sections = dict.fromkeys(of_config, CONFIG) | dict.fromkeys(state, ARGUMENTS)
    for key, name in names.items():
        sections[name] = SECTIONS.get(key.split(".")[0], OTHER) if nested else ARGUMENTS
    sections |= dict.fromkeys(FIRST, OPTIMIZER)
    return Known({**of_config, **own, **state}, sections, own)


@cache
def readable(text: str) -> str:
    """`text` with what cannot be printed or encoded replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted keys; lists as JSON; without what is null."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = prefix + readable(str(key))
        if isinstance(item, Mapping):
            flat.update(_flat(item, f"{name}."))
        elif item is not None:
            flat[name] = item if isinstance(item, str | int | float) else json.dumps(item)
    return flat


def _short(keys: Mapping[str, Any]) -> dict[str, str]:
    """A name for each key: its last part, where no other has that, or where it is an argument's."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    own = {key for key in keys if key.startswith("arguments.") and key.count(".") == 1}
    arguments = {key.removeprefix("arguments.") for key in own}
    return {
        key: name if key in own or (last.count(name) == 1 and name not in arguments) else key
        for key, name in zip(keys, last, strict=True)
    }
