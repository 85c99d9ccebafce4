"""What a caller got wrong, told in one line: the value, why it will not do, and what to do. Needs no package."""

import argparse
import contextlib
import errno
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

TRACEBACK = "--traceback"
LONGEST = 240  # characters of somebody else's message
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO}
# How safetensors, tokenizers and torch.save tell the same, without an errno.
DISK_TEXT = re.compile(r"os error \d+|No space left on device|File too large|PytorchStreamWriter failed")


class UsageError(ValueError):
    """A mistake of the caller's; the message names the value and the fix."""


class OneLineErrors(argparse.ArgumentParser):
    """A parser whose errors are UsageErrors: argparse itself would list all of the usage, some 200 lines of it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def command(main: Callable[[], object]) -> None:
    """Runs a script's `main`; a UsageError is one line and exit status 2, and a traceback with --traceback."""
    try:
        main()
    except UsageError as error:
        if TRACEBACK in sys.argv[1:]:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {in_words(error)}", file=sys.stderr)
        sys.exit(2)


def in_words(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def reason(error: BaseException) -> str:
    """What led to an error, in the words of whoever raised it first, cut short."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = in_words(error)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


@contextlib.contextmanager
def told(what: str, fix: str = "") -> Iterator[None]:
    """Any error in the block becomes the UsageError `what`: its reason, and `fix`.

    For the one call of a library that reads what the caller gave: which errors it raises there, it does not document.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's: auto_find_batch_size waits for it
            raise
        raise UsageError(f"{what}: {reason(error).rstrip('.')}{'. ' * bool(fix)}{fix}") from error


@contextlib.contextmanager
def writing(directory: str | Path, flag: str = "--output_dir") -> Iterator[None]:
    """An error in the block that comes of the disk becomes a UsageError which names the directory and its flag."""
    try:
        yield
    except Exception as error:
        text = _of_the_disk(error)
        if text is None:
            raise
        raise UsageError(f"{flag} {directory} cannot be written: {text}. Make room, or give another {flag}") from error


def check_writable(directory: str | Path, flag: str = "--output_dir") -> None:
    """Refuses a directory in which nothing can be made; of what is not there yet, the nearest that is."""
    path = Path(directory).absolute()
    try:
        there = next(each for each in (path, *path.parents) if each.exists())
        if not there.is_dir():
            raise UsageError(f"{flag} {directory}: {there} is a file. Give a directory, or remove the file")
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise UsageError(f"{flag} {directory} cannot be written: {in_words(error)}. Give another directory") from error


def _of_the_disk(error: BaseException | None) -> str | None:
    while error is not None:
        text = in_words(error)
        if (isinstance(error, OSError) and error.errno in DISK) or DISK_TEXT.search(text):
            return text[:LONGEST]
        error = error.__cause__ or error.__context__
    return None
