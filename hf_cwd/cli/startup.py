"""Imports hf_cwd when transformers is about to define its optimizer names, in a Python that never heard of hf_cwd.

``hf-cwd enable`` copies this file to the site-packages directory, where every start of Python imports it: it must cost
next to nothing, and must work when hf_cwd is gone. ``hf-cwd disable`` removes the copy.
"""

import sys

# Those that hf_cwd.trainer.names waits for, too: hf_cwd has to be there before the first of them.
_MODULES = ("transformers.training_args", "transformers.trainer_optimizer")


class _Finder:
    """A finder that imports hf_cwd, then leaves it to the others to find the module."""

    def find_spec(self, fullname, path, target=None):
        # A hf_cwd that is imported already has its own finder, and may be asking us right now.
        if fullname not in _MODULES or "hf_cwd" in sys.modules:
            return None
        sys.meta_path.remove(self)
        _import_hf_cwd()
        # The import system goes through sys.meta_path by position, and would miss the finder that hf_cwd put first.
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


def _import_hf_cwd():
    try:
        import hf_cwd.trainer.names  # noqa: F401  the whole path: a directory that was left behind imports as hf_cwd
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "hf_cwd":
            return
        print(
            f"hf_cwd cannot be imported ({type(error).__name__}: {error}), so --optim cwd_* is not known. Install it "
            f"again, or run `hf-cwd disable`, or delete {__file__} and the .pth file beside it.",
            file=sys.stderr,
        )


if "hf_cwd" not in sys.modules:
    sys.meta_path.insert(0, _Finder())
