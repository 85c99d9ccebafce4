"""Found on PYTHONPATH by the children of ``python -m hf_cwd``, which know its optimizer names as it does.

Any Python may be started with that PYTHONPATH, also version 2 and one without hf_cwd: it must not notice.
"""

import os
import sys

# A script finds sys.path as it is without us. PYTHONPATH keeps this directory, for the children of this process.
_here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if entry != _here]


def _import_hf_cwd():
    # Another environment has an hf_cwd of its own, or none. In that of the parent it is the parent's, which is perhaps
    # not installed: then the directory that it is in was the parent's working directory.
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


_this = sys.modules.pop("sitecustomize", None)  # Python 2 would empty a module that nobody holds
try:
    import sitecustomize  # noqa: F401  the next one on the path; without one the error that Python expects then
finally:
    if sys.version_info >= (3, 11):  # noqa: UP036
        try:  # noqa: SIM105  contextlib takes longer to import than all of this
            _import_hf_cwd()
        except Exception:  # whatever is wrong with it, a script that has no use for it must run
            pass
