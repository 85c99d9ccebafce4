"""The command ``hf-cwd``: each subcommand is a module with ``add_arguments`` and ``main``, imported when asked for."""

import argparse
import importlib
import sys

COMMANDS = {
    "run": ("hf_cwd.launcher", "run a script, unmodified, with the optimizer names known"),
    "enable": ("hf_cwd.cli.enable", "make the optimizer names known to every script of this Python environment"),
    "disable": ("hf_cwd.cli.enable", "undo `hf-cwd enable`"),
    "explain": ("hf_cwd.cli.explain", "show what trains each parameter of a model, and why"),
    "doctor": ("hf_cwd.cli.doctor", "check this environment"),
    "report": ("hf_cwd.cli.report", "draw and compare finished or running trainings, as one HTML page"),
}


def main() -> int | None:
    asked = sys.argv[1] if len(sys.argv) > 1 else None
    module = importlib.import_module(COMMANDS[asked][0]) if asked in COMMANDS else None
    if asked == "run":  # the flags of a script are not ours to parse
        return module.main(sys.argv[2:], program="hf-cwd run")
    parser = argparse.ArgumentParser("hf-cwd", description="Cautious Weight Decay for the Hugging Face Trainer.")
    parsers = parser.add_subparsers(dest="command", required=True)
    commands = {name: parsers.add_parser(name, help=text, description=text) for name, (_, text) in COMMANDS.items()}
    if module is not None:
        module.add_arguments(commands[asked])
    try:
        return module.main(parser.parse_args())  # which ends the program, unless a known command was asked for
    except ValueError as error:
        commands[asked].exit(2, f"hf-cwd {asked}: error: {error}\n")
