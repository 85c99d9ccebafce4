"""Tells hf_cwd of each module of transformers and TRL that it adds to, right after that module has been executed.

``import hf_cwd`` therefore costs next to nothing, and a script under ``python -m hf_cwd`` is the first to import torch.
``hf-cwd enable`` copies this file to the site-packages directory, where every start of Python imports it: it must work
when hf_cwd is gone.
"""

import sys

MODULES = (
    "transformers.training_args",
    "transformers.trainer_optimizer",
    "transformers.trainer",
    "transformers.hf_argparser",
    "trl.scripts._hf_argparser",  # TRL has a copy of its own
)


def install() -> None:
    """Adds to those of the modules that are imported, and to the others as soon as they are. Twice does the same."""
    if not installed():
        sys.meta_path.insert(0, CWDFinder())
    for name in MODULES:
        module = sys.modules.get(name)
        if module is None:
            continue
        if module.__spec__._initializing:
            _add_after_import(module)
        else:
            _add_to(module)


def installed():
    """Our finders, of this file or of a copy of it; there should be one at most."""
    return [finder for finder in sys.meta_path if type(finder).__name__ == CWDFinder.__name__]


def _add_to(module):
    import hf_cwd.trainer.registration  # the whole path: a directory that was left behind imports as hf_cwd

    hf_cwd.trainer.registration.add_to(module)


def _add_after_import(module):
    """Adds to a module that is being imported, perhaps by another thread.

    To wait for that thread would be wrong: it may itself wait for hf_cwd, which is being imported here. How a module is
    marked as imported is Python's own business, and has been the same since 3.4.
    """
    spec, plain = module.__spec__, type(module.__spec__)

    class Watched(plain):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "_initializing" and not value:
                self.__class__ = plain
                if sys.modules.get(self.name) is module:
                    _add_or_report(module)

    spec.__class__ = Watched
    if not spec._initializing:  # it was imported just now
        _add_to(module)


def _add_or_report(module):
    try:
        _add_to(module)
    except Exception as error:
        for finder in installed():
            sys.meta_path.remove(finder)
        _report(error)


class CWDFinder:
    """Lets the finders after it find one of the modules, and has hf_cwd add to it once it has been executed.

    Python calls ``find_spec`` with the one lock held that all imports share: importing anything there waits for ever
    where another thread imports the same, and waits for that lock.
    """

    def find_spec(self, fullname, path, target=None):
        if fullname not in MODULES:
            return None
        finders = iter(list(sys.meta_path))
        any(finder is self for finder in finders)  # those before us have been asked
        for finder in finders:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                _add_after_execution(spec.loader)
                return spec
        return None


def _add_after_execution(loader):
    # A loader belongs to one spec. Shadowing one method of it leaves its type, and so get_source() and
    # importlib.resources, as they were.
    execute = loader.exec_module

    def exec_module(module):
        vars(loader).pop("exec_module", None)
        execute(module)
        _add_or_report(module)

    loader.exec_module = exec_module


def _report(error):
    if isinstance(error, ModuleNotFoundError) and error.name == "hf_cwd":
        return  # uninstalled
    is_copy = __name__ != "hf_cwd.startup"
    undo = f", or run `hf-cwd disable`, or delete {__file__} and the .pth file beside it" if is_copy else ""
    print(
        f"hf_cwd cannot be imported ({type(error).__name__}: {error}), so --optim cwd_* is not known. "
        f"Install it again{undo}.",
        file=sys.stderr,
    )
