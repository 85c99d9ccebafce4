"""Registers ``cwd_<rule>`` as values of ``--optim``: members of transformers' OptimizerNames, with handlers.

transformers has no public function for this. Once it is imported, this module adds to it:

- members of the enum, from which HfArgumentParser takes its choices;
- entries in the Trainer's table of handlers;
- a check of the arguments when TrainingArguments are built, before a model is loaded;
- a suggestion of the nearest name for an unknown one;
- default callbacks, see ``_CALLBACKS``;
- the verification of a checkpoint before a run resumes from it.
"""

import argparse
import functools
import importlib
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from hf_cwd import startup
from hf_cwd.trainer.argument_checks import check_finished_arguments, check_training_arguments
from hf_cwd.trainer.handler import handler
from hf_cwd.trainer.optim_names import names, unknown_name

_lock = threading.Lock()  # not to be held during an import, which may wait for a thread that waits for this lock
# In this order: the guard reads what the diagnostics have added to a log.
_CALLBACKS = {
    "hf_cwd.trainer.callbacks.diagnostics": "DiagnosticsCallback",
    "hf_cwd.trainer.callbacks.optimizer_guard": "OptimizerGuard",
    "hf_cwd.trainer.callbacks.run_record": "RunRecordCallback",
    "hf_cwd.trainer.callbacks.checkpoint": "CheckpointCallback",
    "hf_cwd.trainer.model_lookup": "ModelCallback",
}
_RESUMES = "hf_cwd.trainer.resume_hooks"  # wraps methods of the Trainer
_PARSERS = ("transformers.hf_argparser", "trl.scripts._hf_argparser")


def register() -> None:
    """Registers the names now if transformers is imported, else as soon as it is. More calls change nothing."""
    startup.install()


def add_to(module: ModuleType) -> None:
    """Adds to one of :data:`hf_cwd.startup.MODULES` after its execution. More calls change nothing."""
    _ACTIONS[module.__name__](module)


def unregister() -> None:
    """Undoes :func:`register` completely."""
    with _lock:
        for finder in startup.installed():
            sys.meta_path.remove(finder)
        arguments = sys.modules.get("transformers.training_args")
        if arguments is not None:
            optimizers = sys.modules.get("transformers.trainer_optimizer")
            handlers = getattr(optimizers, "_OPTIMIZER_HANDLERS", {})
            for name in names():
                handlers.pop(arguments.OptimizerNames._value2member_map_.get(name), None)
                _remove_member(arguments.OptimizerNames, name)
            wrapped = arguments.TrainingArguments.__post_init__
            if hasattr(wrapped, "_hf_cwd_original"):
                arguments.TrainingArguments.__post_init__ = wrapped._hf_cwd_original
        trainer = sys.modules.get("transformers.trainer")
        if trainer is not None:
            trainer.DEFAULT_CALLBACKS[:] = [c for c in trainer.DEFAULT_CALLBACKS if c.__module__ not in _CALLBACKS]
            importlib.import_module(_RESUMES).remove(trainer)
        for parser in filter(None, map(sys.modules.get, _PARSERS)):
            make = getattr(parser, "make_choice_type_function", None)
            if hasattr(make, "_hf_cwd_original"):
                parser.make_choice_type_function = make._hf_cwd_original


def member(name: str) -> Any:
    """The OptimizerNames member of a name. Unpickling a member calls this, also if hf_cwd was not imported before."""
    register()
    return importlib.import_module("transformers.training_args").OptimizerNames(name)


def _on_training_args(module: ModuleType) -> None:
    with _lock:
        for name in names():
            _add_member(module.OptimizerNames, name)
        original = module.TrainingArguments.__post_init__
        if hasattr(original, "_hf_cwd_original"):
            return

        @functools.wraps(original)
        def __post_init__(self: Any) -> None:  # noqa: N807
            check_training_arguments(self)
            original(self)
            check_finished_arguments(self)

        __post_init__._hf_cwd_original = original
        module.TrainingArguments.__post_init__ = __post_init__


def _on_trainer_optimizer(module: ModuleType) -> None:
    # Before 5.2 there is no such table; check_training_arguments refuses our names there.
    handlers = getattr(module, "_OPTIMIZER_HANDLERS", {})
    with _lock:
        for name in names():
            handlers[_add_member(module.OptimizerNames, name)] = handler


def _on_trainer(module: ModuleType) -> None:
    callbacks = [getattr(importlib.import_module(home), name) for home, name in _CALLBACKS.items()]
    resumes = importlib.import_module(_RESUMES)
    with _lock:
        module.DEFAULT_CALLBACKS += [callback for callback in callbacks if callback not in module.DEFAULT_CALLBACKS]
        resumes.install(module)


def _on_hf_argparser(module: ModuleType) -> None:
    with _lock:
        original = getattr(module, "make_choice_type_function", None)
        if original is None or hasattr(original, "_hf_cwd_original"):
            return

        @functools.wraps(original)
        def make_choice_type_function(choices: list[Any]) -> Callable[[str], Any]:
            convert = original(choices)

            def convert_or_suggest(text: str) -> Any:
                # argparse would list some forty names in no order.
                is_optim = any(name in choices for name in names())
                if is_optim and text not in choices and (error := unknown_name(text, choices)) is not None:
                    raise argparse.ArgumentTypeError(error)
                return convert(text)

            return convert_or_suggest

        make_choice_type_function._hf_cwd_original = original
        module.make_choice_type_function = make_choice_type_function


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.training_args": _on_training_args,
    "transformers.trainer_optimizer": _on_trainer_optimizer,
    "transformers.trainer": _on_trainer,
    **dict.fromkeys(_PARSERS, _on_hf_argparser),
}


def _add_member(enum: Any, value: str) -> Any:
    """Returns the member of a ``str`` enum; adds it if it is missing (works for Python 3.11 to 3.13)."""
    if value in enum._value2member_map_:
        return enum._value2member_map_[value]
    new = str.__new__(enum, value)
    new._name_ = value.upper()
    new._value_ = value
    new.__objclass__ = enum
    new._sort_order_ = len(enum._member_names_)
    # Enum pickles by value, which fails to load in a process without our names: pickle a call of member() instead.
    new.__reduce_ex__ = lambda protocol: (member, (value,))
    # EnumType refuses to set or delete an attribute that is a member; type does not.
    type.__setattr__(enum, new._name_, new)
    enum._member_map_[new._name_] = new
    enum._value2member_map_[value] = new
    enum._member_names_.append(new._name_)
    if hasattr(enum, "_hashable_values_"):  # Python 3.13
        enum._hashable_values_.append(value)
    return new


def _remove_member(enum: Any, value: str) -> None:
    old = enum._value2member_map_.pop(value, None)
    if old is None:
        return
    type.__delattr__(enum, old._name_)
    del enum._member_map_[old._name_]
    enum._member_names_.remove(old._name_)
    if hasattr(enum, "_hashable_values_"):
        enum._hashable_values_.remove(value)
