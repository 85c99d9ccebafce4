"""Helpers for the error messages of the commands."""

import difflib
from collections.abc import Iterable


def in_words(error: BaseException) -> str:
    """The type and the text of an error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def nearest(word: str, valid: Iterable[str]) -> str:
    """Suggests the valid word that is most similar to an unknown one; empty if none is similar."""
    near = difflib.get_close_matches(word, list(valid), n=1)
    return f". Did you mean {near[0]}?" if near else ""
