"""Imports hf_cwd in child processes of ``python -m hf_cwd``, which find this file on PYTHONPATH.

Any Python may be started with that PYTHONPATH, also Python 2, or one without hf_cwd. It must run as usual.
"""

import os
import sys

# A script must not see this directory in sys.path. PYTHONPATH keeps it, for child processes.
_here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if entry != _here]


def _import_hf_cwd():
    # Another environment uses its own hf_cwd, if any. The parent's environment uses the parent's hf_cwd. That one may
    # not be installed, but imported from the parent's working directory, which is then added to sys.path.
    parents = os.environ.get("HF_CWD_PYTHON") == " ".join((sys.version.split()[0], sys.prefix))
    root = os.path.dirname(os.path.dirname(_here))
    is_added = parents and root not in sys.path
    if is_added:
        sys.path.insert(0, root)
    try:
        import hf_cwd  # noqa: F401
    finally:
        if is_added:
            sys.path.remove(root)


_this = sys.modules.pop("sitecustomize", None)  # Python 2 clears a module without references
try:
    import sitecustomize  # noqa: F401  the next one on the path; without one, Python expects this ImportError
finally:
    if sys.version_info >= (3, 11):  # noqa: UP036
        try:  # noqa: SIM105  importing contextlib takes longer than all of this
            _import_hf_cwd()
        except Exception:  # scripts that do not need hf_cwd must run if it is broken
            pass
