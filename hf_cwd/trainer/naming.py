"""The values of ``--optim`` that this package adds, and which of them TrainingArguments ask for."""

import difflib
from typing import Any

from hf_cwd.rules import RULES

PREFIX = "cwd_"


def names() -> list[str]:
    """One for each rule."""
    return [PREFIX + rule for rule in RULES]


def unknown_name(name: str) -> str:
    """The error for a value of ``--optim`` that begins as ours do."""
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"--optim {name} does not exist.{hint} hf_cwd has {', '.join(names())}"


def chosen(args: Any) -> str:
    """The value of ``--optim``, which is a string until TrainingArguments have made it a member."""
    return str(getattr(args.optim, "value", args.optim))
