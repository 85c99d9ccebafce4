"""env.sh, quickstart, test: with a python3 that only pretends, so that nothing is installed."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Answers what the scripts ask an interpreter, and writes down what they tell it to do.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *sys.version_info*) echo "${FAKE_VERSION:-3.12}" ;;
  *importlib.metadata*) [[ ! -f "${0%/*}/installed-from" ]] || cat "${0%/*}/installed-from" ;;
  *compare_args.py*) exec "$REAL_PYTHON" "$@" ;;
  "-m pip --version") [[ -f "${0%/*}/pip-is-here" ]] ;;
  "-m venv --clear "*) rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && touch "$4/bin/pip-is-here" ;;&
  "-m pip install "*" -e "*) status="${FAKE_PIP:-0}"; ((status)) || pwd >"${0%/*}/installed-from" ;;&
  "-m pip install "*) status="${FAKE_PIP:-0}" ;;&
  "-m ruff check "*) status="${FAKE_RUFF:-0}" ;;&
  "-m pytest"*) status="${FAKE_PYTEST:-0}" ;;&
  *) echo "$PWD: $*" >>"$FAKE_LOG"; exit "${status:-0}" ;;
esac
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts below a path with spaces, beside a bin/ with the only programs on the PATH."""
    folder = tmp_path / "my own project"
    for name in ("scripts/env.sh", "scripts/quickstart", "scripts/test", ".ci/run", "setup.py", "constraints.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "env", "dirname", "cat", "cksum", "grep", "rm", "mkdir", "cp", "touch"):
        (tools / tool).symlink_to(shutil.which(tool))
    executable(tools / "python3", FAKE_PYTHON)
    return folder


@pytest.fixture
def run(project, tmp_path):
    """`run(script, *arguments, FAKE_...=...)` from elsewhere: the process, and what python was told."""
    log = tmp_path / "log"

    def call(script, *arguments, **variables):
        log.write_text("")
        environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), "FAKE_LOG": str(log), **variables}
        command = [str(project / script), *arguments]
        if script.endswith(".sh"):
            command = ["bash", "-c", 'source "$0"; echo "root=$root python=$python"', *command]
        done = subprocess.run(command, cwd=os.sep, env=environment, capture_output=True, text=True)
        return done, log.read_text().splitlines()

    return call


def test_first_run_installs_torch_first_and_second_does_not(run, project):
    done, told = run("scripts/env.sh")
    assert done.returncode == 0, done.stderr
    assert f"root={project} python={project}/.venv/bin/python" in done.stdout
    assert "Installed in" in done.stdout
    assert "-m venv --clear" in told[0]
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert told[1].endswith(f"-c constraints.txt {pinned}")
    assert told[2].endswith("-c constraints.txt -e .[scripts,test]")
    assert all(line.startswith(f"{project}: ") for line in told[1:])
    done, told = run("scripts/env.sh")
    assert (done.returncode, told) == (0, [])
    assert "Already installed" in done.stdout


@pytest.mark.parametrize("name", ["setup.py", "constraints.txt"])
def test_changed_requirements_are_installed(run, project, name):
    run("scripts/env.sh")
    with (project / name).open("a") as file:
        file.write("# changed\n")
    _, told = run("scripts/env.sh")
    assert [" ".join(line.split()[-2:]) for line in told][-1] == "-e .[scripts,test]"


def test_moved_project_is_installed_again(run, project):
    run("scripts/env.sh")
    (project / ".venv").rename(project.parent / "environment")
    variables = {"VIRTUAL_ENV": str(project.parent / "environment")}
    assert run("scripts/env.sh", **variables)[1] == []
    other = project.parent / "other"
    project.rename(other)
    other.mkdir(exist_ok=True)
    done = subprocess.run(
        ["bash", "-c", 'source "$0"', str(other / "scripts/env.sh")],
        env={"PATH": str(project.parent / "bin"), "FAKE_LOG": os.devnull, **variables},
        capture_output=True,
        text=True,
    )
    assert "Installed in" in done.stdout


def test_failed_installation_is_told_and_tried_again(run):
    done, told = run("scripts/env.sh", FAKE_PIP="3")
    assert done.returncode == 1
    assert "The installation failed" in done.stderr
    assert sum("pip install" in line for line in told) == 1  # nothing goes on after the first failure
    done, told = run("scripts/env.sh")
    assert done.returncode == 0
    assert sum("pip install" in line for line in told) == 2


@pytest.mark.parametrize("left_over", ["bin/nothing", "bin/python"])
def test_half_made_environment_is_made_anew(run, project, left_over):
    executable(project / ".venv" / left_over, FAKE_PYTHON)  # no pip-is-here beside it
    done, told = run("scripts/env.sh")
    assert done.returncode == 0, done.stderr
    assert "-m venv --clear" in told[0]


def test_active_environment_is_used(run, project, tmp_path):
    executable(tmp_path / "active/bin/python", FAKE_PYTHON)
    done, told = run("scripts/env.sh", VIRTUAL_ENV=str(tmp_path / "active"))
    assert f"python={tmp_path}/active/bin/python" in done.stdout
    assert not (project / ".venv").exists()
    assert len(told) == 2
    for variables, message in (({"FAKE_VERSION": "3.10"}, "3.10"), ({"VIRTUAL_ENV": "/nowhere"}, "/nowhere")):
        done, _ = run("scripts/env.sh", **({"VIRTUAL_ENV": str(tmp_path / "active")} | variables))
        assert done.returncode == 1
        assert message in done.stderr
        assert "deactivate it" in done.stderr


@pytest.mark.parametrize("version", ["3.9", "2.7", "3.10"])
def test_old_python_is_one_sentence(run, project, version):
    done, _ = run("scripts/env.sh", FAKE_VERSION=version)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "3.11 or newer" in done.stderr
    assert f"Python {version} (python3)" in done.stderr
    assert not (project / ".venv").exists()


def test_newer_python_is_found_under_its_own_name(run, tmp_path):
    executable(tmp_path / "bin/python3", FAKE_PYTHON.replace("${FAKE_VERSION:-3.12}", "3.9"))
    executable(tmp_path / "bin/python3.11", FAKE_PYTHON.replace("${FAKE_VERSION:-3.12}", "3.11"))
    done, _ = run("scripts/env.sh")
    assert done.returncode == 0, done.stderr


def test_no_python_at_all(run, tmp_path):
    (tmp_path / "bin/python3").unlink()
    done, _ = run("scripts/env.sh")
    assert done.returncode == 1
    assert "no Python was found" in done.stderr


def test_python_asked_for_is_taken_or_refused(run, tmp_path):
    executable(tmp_path / "old", FAKE_PYTHON.replace("${FAKE_VERSION:-3.12}", "3.8"))
    done, _ = run("scripts/env.sh", PYTHON=str(tmp_path / "old"))
    assert done.returncode == 1  # although python3 would do
    assert "3.8" in done.stderr
    executable(tmp_path / "new", FAKE_PYTHON)
    (tmp_path / "bin/python3").unlink()
    assert run("scripts/env.sh", PYTHON=str(tmp_path / "new"))[0].returncode == 0


def test_quickstart_passes_its_arguments_on(run, project):
    done, told = run("scripts/quickstart", "--optim", "cwd_muon", "--run_name", "two words")
    assert done.returncode == 0, done.stderr
    assert told[-1].endswith(f"{project}/scripts/compare.py --optim cwd_muon --run_name two words")


@pytest.mark.parametrize("script", ["scripts/test", ".ci/run"])
def test_tests_lint_then_run_pytest_in_the_project(run, project, script):
    done, told = run(script, "-k", "muon")
    assert done.returncode == 0, done.stderr
    expected = ["-m ruff check .", "-m ruff format --check .", "-m pytest -k muon"]
    assert told[-3:] == [f"{project}: {command}" for command in expected]


def test_exit_status_of_the_tests(run):
    done, told = run("scripts/test", FAKE_RUFF="1")
    assert done.returncode == 1
    assert told[-1].endswith("-m pytest")  # a lint error does not hide the tests
    assert run("scripts/test", FAKE_PYTEST="5")[0].returncode == 5
