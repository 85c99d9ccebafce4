"""The command ``hf-cwd`` itself: what it prints, and its exit status, whatever it is asked for."""

import sys

import pytest

import hf_cwd
from hf_cwd import cli


@pytest.fixture
def ended(monkeypatch, capsys):
    """Runs the command and returns its exit status, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-cwd", *arguments])
        try:
            status = cli.main() or 0
        except SystemExit as stopped:
            status = stopped.code
        return (status, *capsys.readouterr())

    return run


def test_no_command(ended):
    status, output, errors = ended()
    assert (status, output) == (2, "")
    assert errors.startswith("usage: hf-cwd ")
    for command, (_, text) in cli.COMMANDS.items():
        assert command in errors
        assert text.split(",")[0] in " ".join(errors.split())


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(ended, flag):
    status, output, errors = ended(flag)
    assert (status, errors) == (0, "")
    assert output.startswith("usage: hf-cwd ")
    for command in cli.COMMANDS:
        assert command in output
        assert ended(command, flag)[:1] == (0,)


def test_version(ended):
    for command in ((), *((command,) for command in cli.COMMANDS)):
        assert ended(*command, "--version") == (0, f"hf_cwd {hf_cwd.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "usage", "error"),
    [
        (["explian"], "hf-cwd", "there is no command 'explian'. Did you mean explain?"),
        (["docter", "--json"], "hf-cwd", "there is no command 'docter'. Did you mean doctor?"),
        (["frobnicate"], "hf-cwd", "there is no command 'frobnicate'\n"),
        (["--verison"], "hf-cwd", "there is no option '--verison'. Did you mean --version?"),
        ([""], "hf-cwd", "there is no command ''\n"),
        (["doctor", "--jsno"], "hf-cwd doctor", "unrecognized arguments: --jsno. Did you mean --json?"),
        (["explain", "model", "--layuot=ddp=2"], "hf-cwd explain", "--layuot=ddp=2. Did you mean --layout?"),
        (["explain"], "hf-cwd explain", "the following arguments are required: model"),
        (["report"], "hf-cwd report", "the following arguments are required: RUN_DIR"),
        (["enable", "all"], "hf-cwd enable", "unrecognized arguments: all\n"),
        (["run"], "hf-cwd run", "no script given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(ended, arguments, usage, error):
    status, output, errors = ended(*arguments)
    assert (status, output) == (2, "")
    assert errors.startswith(f"usage: {usage} ")
    assert f"{usage}: error: " in errors
    assert error in errors
