"""``--optim_args`` as text, ``key=value,key=value``, also where a YAML or JSON file gives it as a mapping."""

import json
from collections.abc import Mapping
from typing import Any


def as_text(optim_args: Any) -> str | None:
    """``optim_args`` in the only form that transformers reads.

    Raises:
        ValueError: neither text nor a mapping, or a JSON object that is damaged.
    """
    if isinstance(optim_args, str) and optim_args.lstrip().startswith("{"):
        try:
            optim_args = json.loads(optim_args)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--optim_args {optim_args!r} begins as a JSON object and is none: {error}. Mend it, or write "
                "key=value,key=value"
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
    """A value as it stands in the text: ``0.9:0.95``, ``false``."""
    if isinstance(value, list | tuple):
        return ":".join(map(written, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
