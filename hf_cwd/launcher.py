"""Runs a script or a module with the optimizer names known, as the interpreter itself would run it."""

import os
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import TracebackType
from typing import NoReturn

USAGE = """usage: {program} [--name=value ...] SCRIPT.py [arguments of the script]
       {program} [--name=value ...] -m MODULE [arguments of the module]

Runs a training script, unmodified, with --optim cwd_adamw, cwd_lion, cwd_muon and cwd_sgd available. A directory or a
zip file with a __main__.py is a script too. --name=value before the script becomes its first argument: it is there that
the launcher of DeepSpeed puts --local_rank=N."""


def main(arguments: Sequence[str], program: str = "python -m hf_cwd") -> None:
    """Runs what `arguments` name, in the module ``__main__``; returns when, and only if, it ends without an error."""
    usage = USAGE.format(program=program)

    def refuse(reason: str) -> NoReturn:
        print(f"{usage}\n\n{program}: error: {reason}", file=sys.stderr)
        sys.exit(2)

    flags = []
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "-m":
        if rest[0] in ("-h", "--help"):
            print(usage)
            return
        if not rest[0].startswith("--") or "=" not in rest[0]:
            refuse(f"{rest[0]!r} before the script: write --name=value, or put it after the script")
        flags.append(rest.pop(0))
    if not rest:
        refuse("no script given")
    if rest[0] == "-m":
        if len(rest) < 2:
            refuse("-m needs the name of a module")
        _, name, *rest = rest
        sys.argv = ["-m", *flags, *rest]  # what the interpreter shows until it has found the module
        _set_first_path(os.getcwd())
        _run(name)
        return
    script, *rest = rest
    if not os.path.exists(script):
        refuse(f"there is no script {script!r} in {os.getcwd()}")
    sys.argv = [script, *flags, *rest]
    path = os.path.join(os.getcwd(), script)  # not normalised: the interpreter does not either
    if pkgutil.get_importer(path) is not None:  # a directory or a zip file
        if sys.flags.safe_path:
            sys.path.insert(0, path)  # PYTHONSAFEPATH leaves out the directory of a script: this is the script
        else:
            sys.path[0] = path
        _run("__main__")
        return
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        refuse(f"cannot open the script {script!r}: {error.strerror}")
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    _run(path, source)


def _set_first_path(directory: str) -> None:
    """`python -m` had put the working directory there, the command hf-cwd its own."""
    if not sys.flags.safe_path:
        sys.path[0] = directory


def _run(name: str, source: bytes | None = None) -> None:
    """Runs the source of the file `name` or, without one, the module `name`."""
    # The module object stays: dill and others keep the one that they found when they were imported.
    namespace = sys.modules["__main__"].__dict__
    fresh = {"__name__": "__main__", "__doc__": None, "__package__": None, "__loader__": None, "__spec__": None}
    fresh |= {"__annotations__": {}, "__builtins__": namespace["__builtins__"]}
    namespace.clear()
    namespace.update(fresh)
    try:
        if source is None:
            runpy._run_module_as_main(name, alter_argv=sys.argv[0] == "-m")
        else:
            namespace.update(__loader__=SourceFileLoader("__main__", name), __file__=name, __cached__=None)
            exec(compile(source, name, "exec", dont_inherit=True), namespace)
    except SystemExit:
        raise
    except BaseException as error:
        _hide_launcher(_without_launcher(error.__traceback__))
        raise


def _without_launcher(traceback: TracebackType | None) -> TracebackType | None:
    ours = {code.co_filename for code in (_run.__code__, runpy._run_module_as_main.__code__)}
    while traceback is not None and traceback.tb_frame.f_code.co_filename in ours:
        traceback = traceback.tb_next
    return traceback


def _hide_launcher(traceback: TracebackType | None) -> None:
    """Lets the interpreter show the error, and choose the exit status, as if only `traceback` had led to it."""
    hook = sys.excepthook

    def show(kind: type[BaseException], value: BaseException, _: TracebackType | None) -> None:
        sys.excepthook = hook
        sys.last_traceback = traceback
        hook(kind, value.with_traceback(traceback), traceback)

    sys.excepthook = show
