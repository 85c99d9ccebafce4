"""The package's logger."""

import functools
import logging
import sys


def logger() -> logging.Logger:
    """It speaks on standard error when the program set no logging up."""
    found = logging.getLogger("hf_cwd")
    if found.level == logging.NOTSET:
        found.setLevel(logging.INFO)
    if not found.hasHandlers():
        stream = logging.StreamHandler(sys.stderr)
        stream.setFormatter(logging.Formatter("[hf_cwd] %(message)s"))
        found.addHandler(stream)
    return found


@functools.cache
def warn_once(message: str) -> None:
    logger().warning(message)
