"""The Trainer's arguments, and a swift garbage collector, for every test here."""

from tests.support.launching import imports_are_no_garbage
from tests.support.tiny import arguments

__all__ = ["arguments", "imports_are_no_garbage"]
