"""Imports hf_cwd's integration when transformers is about to define its optimizer names, and not before.

``import hf_cwd`` therefore costs next to nothing, and a script under ``python -m hf_cwd`` is the first to import torch.
``hf-cwd enable`` copies this file to the site-packages directory, where every start of Python imports it: it must work
when hf_cwd is gone.
"""

import sys

# Those that hf_cwd.trainer.names waits for, too: it has to be there before the first of them.
_MODULES = ("transformers.training_args", "transformers.trainer_optimizer", "transformers.trainer")
_REGISTRY = "hf_cwd.trainer.names"


def install():
    """Registers the names when transformers needs them; at once, if it is there already."""
    if any(name in sys.modules for name in _MODULES):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """A finder that registers the names, then leaves it to the others to find the module."""

    def find_spec(self, fullname, path, target=None):
        # Once registered, the names have their own finder, which may be asking us right now.
        if fullname not in _MODULES or any(type(finder).__module__ == _REGISTRY for finder in sys.meta_path):
            return None
        sys.meta_path.remove(self)
        try:
            _register()
        except Exception as error:
            if not isinstance(error, ModuleNotFoundError) or error.name != "hf_cwd":
                print(
                    f"hf_cwd cannot be imported ({type(error).__name__}: {error}), so --optim cwd_* is not known. "
                    f"Install it again, or run `hf-cwd disable`, or delete {__file__} and the .pth file beside it.",
                    file=sys.stderr,
                )
        # The import system goes through sys.meta_path by position, and would miss the finder that is now first.
        for finder in list(sys.meta_path):
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


def _register():
    import hf_cwd.trainer.names  # the whole path: a directory that was left behind imports as hf_cwd

    hf_cwd.trainer.names.register()
