"""``python -m hf_cwd script.py ...`` runs an unmodified Trainer script with the optimizer names known."""

import os
import runpy
import sys

import hf_cwd  # noqa: F401  registers the names

USAGE = """usage: python -m hf_cwd SCRIPT.py [arguments of the script]
       python -m hf_cwd -m MODULE [arguments of the module]

Runs a training script, unmodified, with --optim cwd_adamw, cwd_lion, cwd_muon and cwd_sgd available."""


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if arguments else 2)
    if arguments[0] == "-m":
        if len(arguments) < 2:
            sys.exit(f"-m needs the name of a module\n{USAGE}")
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    script = arguments[0]
    if not os.path.isfile(script):
        sys.exit(f"python -m hf_cwd: there is no script {script!r} in {os.getcwd()}\n{USAGE}")
    sys.argv = arguments
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.abspath(script))  # `python -m` had put the working directory there
    runpy.run_path(os.path.abspath(script), run_name="__main__")


if __name__ == "__main__":
    main()
