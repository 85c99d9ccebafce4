"""Errors as the commands print them."""

import difflib
from collections.abc import Iterable


def in_words(error: BaseException) -> str:
    """An error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def nearest(word: str, known: Iterable[str]) -> str:
    """A question to add to the error about a word that is not known; empty where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f". Did you mean {near[0]}?" if near else ""
