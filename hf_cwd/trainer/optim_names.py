"""The values of ``--optim`` that this package adds, and the one that TrainingArguments ask for."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

from hf_cwd.rules import RULES

PREFIX = "cwd_"


def names() -> list[str]:
    """The values of ``--optim``, one for each rule."""
    return [PREFIX + rule for rule in RULES]


def unknown_name(name: str, others: Iterable[str] = ()) -> str | None:
    """The error message for an unknown value of ``--optim``; None if it does not resemble one of ours.

    Args:
        others: all valid values, those of transformers included.
    """
    ours, plain = PREFIX.strip("_"), re.sub("[^a-z0-9]", "", name.lower())
    is_ours = plain.startswith(ours)
    near = difflib.get_close_matches(plain.removeprefix(ours), RULES, n=1, cutoff=0.6 if is_ours else 0.85)
    if not near and not is_ours:
        return None
    hint = f" Did you mean {PREFIX}{near[0]}?" if near else ""
    theirs = next((other for other in others if near and other.startswith(near[0])), None)
    if theirs is not None and not is_ours:
        hint = f"{hint[:-1]}, or transformers' {theirs}?"
    return f"--optim {name} does not exist.{hint} hf_cwd has {', '.join(names())}"


def chosen(args: Any) -> str:
    """The value of ``--optim``: ``args.optim`` is a string first, and a member of OptimizerNames later."""
    return str(getattr(args.optim, "value", args.optim))
