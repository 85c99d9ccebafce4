"""Runs a script, a module or code as the interpreter would, with ``--optim cwd_*`` available.

It is available in child processes too: PYTHONPATH gets the directory ``inherited``, whose sitecustomize Python imports
at start.
"""

import os
import pkgutil
import runpy
import shutil
import sys
from collections.abc import Sequence
from importlib.machinery import BuiltinImporter, SourceFileLoader
from types import TracebackType
from typing import Any, NoReturn

import hf_cwd

USAGE = """usage: {program} [--name=value ...] SCRIPT.py [arguments of the script]
       {program} [--name=value ...] -m MODULE [arguments of the module]
       {program} [--name=value ...] -c CODE [arguments of the code]
       {program} [--name=value ...] - [arguments of the code on standard input]
       {program} COMMAND [arguments of the command]
       {program} --help | --version

Runs an unmodified training script with --optim cwd_adamw, cwd_lion, cwd_muon and cwd_sgd available, also in the
processes that it starts. A directory or a zip file with a __main__.py is a script too. COMMAND is a command on the PATH
that starts Python, such as trl, accelerate or torchrun. --name=value before the script becomes its first argument;
DeepSpeed's launcher puts --local_rank=N there."""


def main(arguments: Sequence[str], program: str = "python -m hf_cwd") -> None:
    """Runs the script, module, code or command that `arguments` name, in the module ``__main__``.

    Returns only if it ends without an error. A command replaces this process.
    """
    usage = USAGE.format(program=program)

    def refuse(reason: str) -> NoReturn:
        print(f"{usage}\n\n{program}: error: {reason}", file=sys.stderr)
        sys.exit(2)

    flags = []
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] not in WAYS:
        if rest[0] in ("-h", "--help"):
            print(usage)
            return
        if rest[0] == "--version":
            print(f"hf_cwd {hf_cwd.__version__}")
            return
        if not rest[0].startswith("--") or "=" not in rest[0]:
            refuse(f"{rest[0]!r} before the script: write --name=value, or put it after the script")
        flags.append(rest.pop(0))
    if not rest:
        refuse("no script given")
    _hand_down()
    what, *rest = rest
    try:
        if what in WAYS:
            WAYS[what](flags, rest)
        elif os.path.exists(what):
            _run_path(what, [what, *flags, *rest])
        else:
            _run_command(what, [what, *flags, *rest])
    except _UsageError as error:
        refuse(str(error))


class _UsageError(Exception):
    """The arguments are wrong; nothing has run yet."""


def _hand_down() -> None:
    """Makes child processes import hf_cwd when they start, by environment variables."""
    directory = os.path.join(os.path.dirname(os.path.abspath(__file__)), "inherited")
    given = os.environ.get("PYTHONPATH")
    others = [entry for entry in given.split(os.pathsep) if entry != directory] if given else []
    os.environ["PYTHONPATH"] = os.pathsep.join([directory, *others])
    os.environ["HF_CWD_PYTHON"] = f"{sys.version.split()[0]} {sys.prefix}"


def _run_module(flags: list[str], rest: list[str]) -> None:
    if not rest:
        raise _UsageError("-m needs the name of a module")
    name, *rest = rest
    sys.argv = ["-m", *flags, *rest]  # as the interpreter has it until it finds the module
    _set_first_path(os.getcwd())
    _run(name)


def _run_code(flags: list[str], rest: list[str]) -> None:
    if not rest:
        raise _UsageError("-c needs the code")
    code, *rest = rest
    sys.argv = ["-c", *flags, *rest]
    _set_first_path("")
    _run("<string>", code, {"__loader__": BuiltinImporter})


def _run_input(flags: list[str], rest: list[str]) -> None:
    sys.argv = ["-", *flags, *rest]
    _set_first_path("")
    _run("<stdin>", sys.stdin.buffer.read(), {"__loader__": BuiltinImporter, "__file__": "<stdin>", "__cached__": None})


WAYS = {"-m": _run_module, "-c": _run_code, "-": _run_input}


def _run_path(script: str, argv: list[str]) -> None:
    sys.argv = argv
    path = os.path.join(os.getcwd(), script)  # not normalised, as in the interpreter
    if pkgutil.get_importer(path) is not None:  # a directory or a zip file
        if sys.flags.safe_path:
            sys.path.insert(0, path)  # PYTHONSAFEPATH excludes a script's directory, but here the path is the script
        else:
            sys.path[0] = path
        _run("__main__")
        return
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise _UsageError(f"cannot open the script {script!r}: {error.strerror}") from None
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    _run(path, source, {"__loader__": SourceFileLoader("__main__", path), "__file__": path, "__cached__": None})


def _run_command(name: str, argv: list[str]) -> NoReturn:
    command = shutil.which(name)
    if command is None:
        raise _UsageError(f"there is no script {name!r} in {os.getcwd()}, and no such command")
    try:
        os.execv(command, argv)
    except OSError as error:
        raise _UsageError(f"cannot run the command {command}: {error.strerror}") from None


def _set_first_path(directory: str) -> None:
    """Replaces the first path, which is the working directory under `python -m`, and hf-cwd's directory otherwise."""
    if not sys.flags.safe_path:
        sys.path[0] = directory


def _run(name: str, source: str | bytes | None = None, attributes: dict[str, Any] | None = None) -> None:
    """Runs `source`, the contents of the file `name`, or without `source` the module `name`.

    Args:
        attributes: attributes of the module ``__main__``, for `source`.
    """
    # The module object must stay the same: dill, for example, keeps a reference to it from its import.
    namespace = sys.modules["__main__"].__dict__
    fresh = {"__name__": "__main__", "__doc__": None, "__package__": None, "__loader__": None, "__spec__": None}
    fresh |= {"__annotations__": {}, "__builtins__": namespace["__builtins__"]}
    namespace.clear()
    namespace.update(fresh)
    try:
        if source is None:
            runpy._run_module_as_main(name, alter_argv=sys.argv[0] == "-m")
        else:
            namespace.update(attributes)
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
    """Makes the interpreter print the error with only `traceback`; the interpreter chooses the exit status."""
    hook = sys.excepthook

    def show(error_type: type[BaseException], value: BaseException, _: TracebackType | None) -> None:
        sys.excepthook = hook
        sys.last_traceback = traceback
        hook(error_type, value.with_traceback(traceback), traceback)

    sys.excepthook = show
