"""``python COMMAND...`` as a launcher starts it, with what ranks import imported already: forked off a server.

Begins in a twentieth of a second, since it imports no more than forking.py beside it. :func:`write` makes a command
of it, for launchers that are told which Python to start (torch's, and so Accelerate's, by PYTHON_EXEC).
"""

import os
import sys
from pathlib import Path


def write(path: Path) -> Path:
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$@"\n')
    path.chmod(0o755)
    return path


def main() -> int:
    from forking import DEEPSPEED, fork

    command = sys.argv[2:] if sys.argv[1] == "-u" else sys.argv[1:]
    process = fork(*command, cwd=os.getcwd(), modules=DEEPSPEED)
    output, errors = process.communicate()
    sys.stdout.write(output)
    sys.stderr.write(errors)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
