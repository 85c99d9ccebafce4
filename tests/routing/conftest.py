"""The Trainer's arguments, for every test here."""

from tests.support.tiny import arguments

__all__ = ["arguments"]
