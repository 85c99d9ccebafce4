"""The package's logger."""

import functools
import logging
import sys


def logger() -> logging.Logger:
    """The logger ``hf_cwd``. It writes to standard error if the program has not configured logging."""
    result = logging.getLogger("hf_cwd")
    if result.level == logging.NOTSET:
        result.setLevel(logging.INFO)
    if not result.hasHandlers():
        stream = logging.StreamHandler(sys.stderr)
        stream.setFormatter(logging.Formatter("[hf_cwd] %(message)s"))
        result.addHandler(stream)
    return result


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning the first time it is called with this message."""
    logger().warning(message)
