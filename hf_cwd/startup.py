"""Calls hf_cwd's registration right after certain modules of transformers and TRL have been executed.

``import hf_cwd`` is therefore fast, and under ``python -m hf_cwd`` the script itself is the first to import torch.
``hf-cwd enable`` copies this file to the site-packages directory, where every start of Python imports it. The copy must
work if hf_cwd has been uninstalled.
"""

import sys

MODULES = (
    "transformers.training_args",
    "transformers.trainer_optimizer",
    "transformers.trainer",
    "transformers.hf_argparser",
    "trl.scripts._hf_argparser",  # TRL's copy of HfArgumentParser
)


def install() -> None:
    """Adds to those modules that are imported, and to the others when they are. A second call changes nothing."""
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
    """The finders of this file or of a copy of it in ``sys.meta_path``; there should be at most one."""
    return [finder for finder in sys.meta_path if type(finder).__name__ == CWDFinder.__name__]


def _add_to(module):
    import hf_cwd.trainer.registration  # the full path, since an empty leftover directory imports as hf_cwd

    hf_cwd.trainer.registration.add_to(module)


def _add_after_import(module):
    """Adds to a module that is being imported, perhaps by another thread, when its import ends.

    Waiting for that thread could deadlock: it may wait for hf_cwd, which is being imported here. The end of an import
    is detected by the private attribute ``_initializing`` of the spec, which has not changed since Python 3.4.
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
    if not spec._initializing:  # its import has just ended
        _add_to(module)


def _add_or_report(module):
    try:
        _add_to(module)
    except Exception as error:
        for finder in installed():
            sys.meta_path.remove(finder)
        _report(error)


class CWDFinder:
    """Finds one of the modules by the finders after this one, and makes hf_cwd add to it after its execution.

    Python holds a lock that all imports share while it calls ``find_spec``. An import in there would deadlock with
    another thread that imports the same module and waits for that lock.
    """

    def find_spec(self, fullname, path, target=None):
        if fullname not in MODULES:
            return None
        finders = iter(list(sys.meta_path))
        any(finder is self for finder in finders)  # advances past this finder: Python has called the ones before it
        for finder in finders:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                _add_after_execution(spec.loader)
                return spec
        return None


def _add_after_execution(loader):
    # A loader belongs to one spec. Its type must not change, for get_source() and importlib.resources. So an instance
    # attribute shadows the method.
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
