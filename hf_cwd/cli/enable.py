"""``hf-cwd enable`` adds ``--optim cwd_*`` to every script of this environment; ``hf-cwd disable`` undoes it.

It writes two files into the site-packages directory: a copy of ``startup.py``, and a .pth file that imports the copy
whenever Python starts.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from hf_cwd import startup

MODULE = "_hf_cwd_startup"
# It must be one line. The module may be missing, and Python would print the error at each start.
PTH = f'import sys; exec("try:\\n    import {MODULE}\\n    {MODULE}.install()\\nexcept ImportError:\\n    pass")\n'
WITHOUT = "use a virtual environment, or start scripts with `python -m hf_cwd script.py`, which writes no files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Neither command has arguments."""


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
    """Writes both files into `directory`, each atomically. The first one has no effect without the second."""
    from hf_cwd.trainer.optim_names import names

    # This hf_cwd may have been imported from PYTHONPATH or the working directory, which other starts do not have.
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('hf_cwd') is None)"
    if subprocess.run([sys.executable, "-E", "-P", "-c", probe]).returncode:
        raise ValueError(f"hf_cwd is not installed in {sys.prefix}: install it there first (`pip install -e .`)")
    # The module comes first, so that no start of Python finds a line that imports a missing module.
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
    print(f"Every script run by {sys.executable} now has --optim {', '.join(names())}. To undo it: hf-cwd disable")


def disable(directory: Path) -> None:
    """Removes the files of :func:`enable` and their compiled versions."""
    files = [directory / f"{MODULE}.pth", directory / f"{MODULE}.py"]
    existing = [path for path in files if path.exists()]
    for path in [*existing, *directory.glob(f"__pycache__/{MODULE}.*.pyc")]:
        path.unlink()
        print(f"removed {path}")
    if not existing:
        print(f"hf_cwd was not enabled in {directory}: there was nothing to remove")
