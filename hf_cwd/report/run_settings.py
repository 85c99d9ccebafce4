"""Collects a run's settings: a flat mapping with short names, and the section of each."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

OPTIMIZER, ARGUMENTS, OTHER, CONFIG = "Optimizer", "Training arguments", "Other", "Model configuration"
SECTIONS = {"arguments": ARGUMENTS, "optimizer": OPTIMIZER, "model": "Model", "versions": "Versions"}
# The optimizer's settings, which come first.
FIRST = ("optim", "optimizer_class", "optim_args", "learning_rate", "lr", "weight_decay", "cautious")
ORDER = (OPTIMIZER, ARGUMENTS, "Model", CONFIG, OTHER, "Versions")


class RunSettings(NamedTuple):
    """The settings of a run.

    Attributes:
        values: all values by name.
        sections: the section of each name.
        own: the values from the run's record, or from its model card.
    """

    values: dict[str, Any]
    sections: dict[str, str]
    own: dict[str, Any]


def collect_settings(
    record: Mapping[str, Any], card: Mapping[str, Any], state: Mapping[str, Any], config: Mapping[str, Any]
) -> RunSettings:
    """Merges a run's record, or else its model card, with the Trainer's state and the model's configuration.

    The Trainer's arguments keep their names, and so do other settings if the name is unique. All others are named by
    their path in the record. Values of the state override the record: all runs have a state, and its steps and epochs
    are the actual ones.
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
    return RunSettings({**of_config, **own, **state}, sections, own)


@cache
def readable(text: str) -> str:
    """Replaces characters that cannot be printed or encoded."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested objects, with dotted keys. Lists become JSON; null values are left out."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = prefix + readable(str(key))
        if isinstance(item, Mapping):
            flat.update(_flat(item, f"{name}."))
        elif item is not None:
            flat[name] = item if isinstance(item, str | int | float) else json.dumps(item)
    return flat


def _short(keys: Mapping[str, Any]) -> dict[str, str]:
    """A name for each key: its last component if that is unique or an argument's name, else the whole key."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    own = {key for key in keys if key.startswith("arguments.") and key.count(".") == 1}
    arguments = {key.removeprefix("arguments.") for key in own}
    return {
        key: name if key in own or (last.count(name) == 1 and name not in arguments) else key
        for key, name in zip(keys, last, strict=True)
    }
