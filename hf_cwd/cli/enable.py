"""``hf-cwd enable`` makes the optimizer names known to every script of this environment, ``hf-cwd disable`` undoes it.

Two files in the site-packages directory do it: a copy of ``startup.py``, and a .pth file that imports the copy whenever
Python starts.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from hf_cwd import startup

MODULE = "_hf_cwd_startup"
# The file may be gone while the line stands, and Python would print the error at each start. It must be one line.
PTH = f'import sys; exec("try:\\n    import {MODULE}\\n    {MODULE}.install()\\nexcept ImportError:\\n    pass")\n'
WITHOUT = "use a virtual environment, or start scripts with `python -m hf_cwd script.py`, which needs nothing written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Neither command takes any."""


def main(args: argparse.Namespace) -> int:
    directory = Path(sysconfig.get_path("purelib"))
    try:
        {"enable": enable, "disable": disable}[args.command](directory)
    except OSError as error:
        raise ValueError(
            f"cannot {args.command} hf_cwd in {directory}: {error.strerror} ({error.filename}). To {args.command} it "
            f"here, run this as a user who may write there; else {WITHOUT}"
        ) from error
    return 0


def enable(directory: Path) -> None:
    """Writes both files into `directory`, each at once or not at all; the first without the second does nothing."""
    from hf_cwd.trainer.optim_names import names

    # PYTHONPATH and the working directory may have led to this hf_cwd, and will not be those of every start.
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('hf_cwd') is None)"
    if subprocess.run([sys.executable, "-E", "-P", "-c", probe]).returncode:
        raise ValueError(f"hf_cwd is not installed in {sys.prefix}: install it there first (`pip install -e .`)")
    # The module first, so that no start of Python finds a line that imports what is not there.
    contents = {f"{MODULE}.py": Path(startup.__file__).read_text(), f"{MODULE}.pth": PTH}
    drafts = {name: directory / f"{name}.{os.getpid()}.draft" for name in contents}
    try:
        for name, draft in drafts.items():
            draft.write_text(contents[name])
        for name, draft in drafts.items():
            os.replace(draft, directory / name)
            print(f"wrote {directory / name}")
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
    print(f"Every script run by {sys.executable} now knows --optim {', '.join(names())}. To undo it: hf-cwd disable")


def disable(directory: Path) -> None:
    """Removes what :func:`enable` wrote, and what Python compiled of it."""
    files = [directory / f"{MODULE}.pth", directory / f"{MODULE}.py"]
    found = [path for path in files if path.exists()]
    for path in [*found, *directory.glob(f"__pycache__/{MODULE}.*.pyc")]:
        path.unlink()
        print(f"removed {path}")
    if not found:
        print(f"hf_cwd was not enabled in {directory}: there was nothing to remove")
