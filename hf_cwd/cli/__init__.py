"""The command ``hf-cwd``. Each subcommand is a module with ``add_arguments`` and ``main``, imported when it is used."""

import argparse
import importlib
import sys

import hf_cwd
from hf_cwd import launcher
from hf_cwd.cli.errors import nearest

COMMANDS = {
    "run": ("hf_cwd.launcher", "run an unmodified script with --optim cwd_* available"),
    "enable": ("hf_cwd.cli.enable", "make --optim cwd_* available in every script of this Python environment"),
    "disable": ("hf_cwd.cli.enable", "undo `hf-cwd enable`"),
    "explain": ("hf_cwd.cli.explain", "show what trains each parameter of a model, and why"),
    "doctor": ("hf_cwd.cli.doctor", "check this environment"),
    "report": ("hf_cwd.cli.report", "draw and compare finished or running training runs, as one HTML page"),
}


VERSION = f"hf_cwd {hf_cwd.__version__}"


def main() -> int | None:
    asked = sys.argv[1] if len(sys.argv) > 1 else None
    if asked == "run":  # the script parses its own flags
        return launcher.main(sys.argv[2:], program="hf-cwd run")
    parser = argparse.ArgumentParser("hf-cwd", description="Cautious Weight Decay for the Hugging Face Trainer.")
    parser.add_argument("--version", action="version", version=VERSION)
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    commands = {name: parsers.add_parser(name, help=text, description=text) for name, (_, text) in COMMANDS.items()}
    if asked in COMMANDS:
        return _command(asked, parser, commands[asked])
    if asked in ("-h", "--help", "--version"):
        parser.parse_args()
    if asked is None:
        parser.print_help(sys.stderr)
        return 2
    what = "option" if asked.startswith("-") else "command"
    parser.error(f"there is no {what} {asked!r}{nearest(asked, [*COMMANDS, '--help', '--version'])}")


def _command(name: str, parser: argparse.ArgumentParser, own: argparse.ArgumentParser) -> int | None:
    module = importlib.import_module(COMMANDS[name][0])
    own.add_argument("--version", action="version", version=VERSION)
    module.add_arguments(own)
    args, unknown = parser.parse_known_args()
    if unknown:
        near = nearest(unknown[0].partition("=")[0], own._option_string_actions)
        own.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
    try:
        return module.main(args)
    except ValueError as error:
        own.exit(2, f"hf-cwd {name}: error: {error}\n")
