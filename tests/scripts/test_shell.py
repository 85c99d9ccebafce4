"""env.sh, quickstart, test, gpu_check: with a python3 that only pretends, so that nothing is installed."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTEST = f"-m pytest -n {min(len(os.sched_getaffinity(0)), 8)} --dist loadfile --no-loadscope-reorder"
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
    scripts = ("quickstart", "test", "gpu_check", "launch_local", "compare_args.py")
    scripts += ("dev/env.sh", "common/__init__.py", "common/usage.py")
    for name in (*(f"scripts/{script}" for script in scripts), ".ci/run", "setup.py", "constraints.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "configs/models", folder / "configs/models")
    shutil.copytree(ROOT / "configs/accelerate", folder / "configs/accelerate")
    (folder / "tests").mkdir()
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "env", "dirname", "cat", "cksum", "grep", "rm", "mkdir", "cp", "touch", "sed", "basename"):
        (tools / tool).symlink_to(shutil.which(tool))
    executable(tools / "python3", FAKE_PYTHON)
    return folder


@pytest.fixture
def run(project, tmp_path):
    """`run(script, *arguments, FAKE_...=...)` from elsewhere: the process, and what python was told."""
    log = tmp_path / "log"

    def call(script, *arguments, **variables):
        log.write_text("")
        environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), "FAKE_LOG": str(log)}
        environment |= {"REAL_PYTHON": sys.executable, **variables}
        command = [str(project / script), *arguments]
        if script.endswith(".sh"):
            command = ["bash", "-c", 'source "$0"; set_up; echo "root=$root python=$python"', *command]
        done = subprocess.run(command, cwd=os.sep, env=environment, capture_output=True, text=True)
        return done, log.read_text().splitlines()

    return call


def test_first_run_installs_torch_first_and_second_does_not(run, project):
    done, told = run("scripts/dev/env.sh")
    assert done.returncode == 0, done.stderr
    assert f"root={project} python={project}/.venv/bin/python" in done.stdout
    assert "Installed in" in done.stdout
    assert "-m venv --clear" in told[0]
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert told[1].endswith(f"-c constraints.txt {pinned}")
    assert told[2].endswith("-c constraints.txt -e .[scripts,test]")
    assert all(line.startswith(f"{project}: ") for line in told[1:])
    done, told = run("scripts/dev/env.sh")
    assert (done.returncode, told) == (0, [])
    assert "Already installed" in done.stdout


@pytest.mark.parametrize("name", ["setup.py", "constraints.txt"])
def test_changed_requirements_are_installed(run, project, name):
    run("scripts/dev/env.sh")
    with (project / name).open("a") as file:
        file.write("# changed\n")
    _, told = run("scripts/dev/env.sh")
    assert [" ".join(line.split()[-2:]) for line in told][-1] == "-e .[scripts,test]"


def installed(environment: Path, source: Path | str | None = None) -> Path:
    """An environment, in which hf_cwd is installed from `source`."""
    executable(environment / "bin/python", FAKE_PYTHON)
    if source is not None:
        (environment / "bin/installed-from").write_text(f"{source}\n")
    return environment


def test_moved_project_is_installed_again(run, project):
    """Also where its environment says that it holds it: what was installed is no longer there."""
    run("scripts/dev/env.sh")
    (project / ".venv/bin/installed-from").write_text("/nowhere\n")
    done, told = run("scripts/dev/env.sh")
    assert "Installed in" in done.stdout
    assert told[-1].endswith("-e .[scripts,test]")


def test_an_environment_of_others_is_asked_for(run, project, tmp_path):
    others = installed(tmp_path / "others")
    for script in ("scripts/dev/env.sh", "scripts/quickstart", "scripts/test", ".ci/run"):
        done, told = run(script, VIRTUAL_ENV=str(others))
        assert (done.returncode, told) == (2, [])
        (line,) = done.stderr.splitlines()
        assert f"into {others}, which was not made here: allow it by HF_CWD_INSTALL=yes, or deactivate" in line
    assert not (project / ".venv").exists()
    done, told = run("scripts/dev/env.sh", VIRTUAL_ENV=str(others), HF_CWD_INSTALL="yes")
    assert done.returncode == 0, done.stderr
    assert f"python={others}/bin/python" in done.stdout
    assert len(told) == 2
    assert not (project / ".venv").exists()
    assert run("scripts/dev/env.sh", VIRTUAL_ENV=str(others))[1] == []  # it is installed, and nothing to be asked
    (project / "constraints.txt").write_text("torch==3\n")
    assert len(run("scripts/dev/env.sh", VIRTUAL_ENV=str(others))[1]) == 2  # that it may was said before


@pytest.mark.parametrize("is_link", [False, True])
def test_another_clone_keeps_its_environment(is_link, run, project, tmp_path):
    other = tmp_path / "other clone"
    others = installed(other / ".venv", other)
    variables = {"VIRTUAL_ENV": str(others), "HF_CWD_INSTALL": "yes"}
    if is_link:
        (project / ".venv").symlink_to(others)
        del variables["VIRTUAL_ENV"]
    done, told = run("scripts/quickstart", **variables)
    assert (done.returncode, told) == (2, [])
    assert f"has hf_cwd installed from {other}, and would no longer see it: deactivate" in done.stderr
    assert (others / "bin/installed-from").read_text() == f"{other}\n"


def test_an_environment_that_another_clone_took_over_is_not_used(run, project, tmp_path):
    """Its stamp says that it is installed for this project, and Python would import another one."""
    others = installed(tmp_path / "others")
    run("scripts/dev/env.sh", VIRTUAL_ENV=str(others), HF_CWD_INSTALL="yes")
    (tmp_path / "other clone").mkdir()
    installed(others, tmp_path / "other clone")
    done, told = run("scripts/dev/env.sh", VIRTUAL_ENV=str(others), HF_CWD_INSTALL="yes")
    assert (done.returncode, told) == (2, [])
    assert "has hf_cwd installed from" in done.stderr


def test_the_active_environment_may_be_the_project_s_own(run, project):
    run("scripts/dev/env.sh")
    (project / ".venv/.hf_cwd_installed").unlink()
    done, told = run("scripts/dev/env.sh", VIRTUAL_ENV=str(project / ".venv"))
    assert done.returncode == 0, done.stderr
    assert len(told) == 2


def test_failed_installation_is_told_and_tried_again(run):
    done, told = run("scripts/dev/env.sh", FAKE_PIP="3")
    assert done.returncode == 1
    assert "The installation failed" in done.stderr
    assert sum("pip install" in line for line in told) == 1  # nothing goes on after the first failure
    done, told = run("scripts/dev/env.sh")
    assert done.returncode == 0
    assert sum("pip install" in line for line in told) == 2


@pytest.mark.parametrize("left_over", ["bin/nothing", "bin/python"])
def test_half_made_environment_is_made_anew(run, project, left_over):
    executable(project / ".venv" / left_over, FAKE_PYTHON)  # no pip-is-here beside it
    done, told = run("scripts/dev/env.sh")
    assert done.returncode == 0, done.stderr
    assert "-m venv --clear" in told[0]


def test_an_active_environment_that_does_not_do(run, tmp_path):
    installed(tmp_path / "active")
    for variables, message in (({"FAKE_VERSION": "3.10"}, "3.10"), ({"VIRTUAL_ENV": "/nowhere"}, "/nowhere")):
        done, _ = run("scripts/dev/env.sh", **({"VIRTUAL_ENV": str(tmp_path / "active")} | variables))
        assert done.returncode == 1
        assert message in done.stderr
        assert "deactivate it" in done.stderr


WRONG = {
    ("quickstart", "--steps", "0"): "quickstart: error: --steps 0: give at least 1; see --help",
    ("quickstart", "--steps", "many"): "quickstart: error: argument --steps: invalid int value: 'many'",
    ("quickstart", "--optim", "cwd_adam"): "quickstart: error: argument --optim: invalid choice: 'cwd_adam'",
    ("quickstart", "--weight_decay", "0"): "quickstart: error: --weight_decay 0.0: give more than 0",
    ("quickstart", "--learning_rate", "-1"): "quickstart: error: --learning_rate -1.0: give a finite number, 0 or more",
    ("quickstart", "--seed", "-1"): "quickstart: error: --seed -1: give 0 or more",
    ("quickstart", "--model", "nope.json"): "quickstart: error: --model nope.json: no such file",
    ("quickstart", "--output_dir", "{project}/setup.py"): "setup.py is a file. Give a directory, or remove the file",
    ("quickstart", "cwd_muon"): "quickstart: error: 'cwd_muon' is no flag, nor the value of one",
    ("test", "tests/nope.py::test_it"): "test: error: there is no tests/nope.py: name a file or directory of tests/",
    ("launch_local",): "launch_local: error: there is no layout '': give --layout and one of: ddp fsdp2 hsdp",
    ("launch_local", "--layout", "z3"): "launch_local: error: there is no layout 'z3': give --layout and one of: ddp",
    ("launch_local", "--layout"): "launch_local: error: --layout needs a value; usage:",
    ("launch_local", "--layers", "2"): "launch_local: error: there is no flag --layers; usage:",
    ("launch_local", "--layout", "tp"): "launch_local: error: there is no script; usage: scripts/launch_local",
    ("launch_local", "--layout", "tp", "nope.py"): "launch_local: error: there is no script 'nope.py': give the path",
    (
        "launch_local",
        "--layout=tp",
        "--processes=1",
        "nope.py",
    ): "--processes 1: give a number of processes, at least 2",
}


@pytest.mark.parametrize(("words", "message"), WRONG.items(), ids=map(" ".join, WRONG))
def test_arguments_are_read_before_anything_is_installed(words, message, run, project):
    script, *arguments = words
    done, told = run(f"scripts/{script}", *(argument.format(project=project) for argument in arguments))
    assert (done.returncode, done.stdout, told) == (2, "", [])
    (line,) = done.stderr.splitlines()
    assert message in line
    assert not (project / ".venv").exists()


@pytest.mark.parametrize("script", ["quickstart", "test", "launch_local"])
def test_help_installs_nothing(script, run, project):
    done, told = run(f"scripts/{script}", "--help")
    assert (done.returncode, told) == (0, [])
    assert done.stdout.startswith("usage: ")
    assert not (project / ".venv").exists()


def test_gpu_check_installs_nothing_and_names_an_interpreter_that_does_not_do(run, project):
    done, told = run("scripts/gpu_check", "--help")
    assert done.returncode == 0
    assert [line.split(": ")[1] for line in told] == [f"{project}/scripts/bench/gpu.py --help"]
    for variables, message in (
        ({"FAKE_VERSION": "3.9"}, "python3 is Python 3.9"),
        ({"PYTHON": "/no"}, "/no does not run"),
    ):
        done, told = run("scripts/gpu_check", **variables)
        assert (done.returncode, told) == (2, [])
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"gpu_check: error: {message}")


@pytest.mark.parametrize("version", ["3.9", "2.7", "3.10"])
def test_old_python_is_one_sentence(run, project, version):
    done, _ = run("scripts/dev/env.sh", FAKE_VERSION=version)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "3.11 or newer" in done.stderr
    assert f"Python {version} (python3)" in done.stderr
    assert not (project / ".venv").exists()


def test_newer_python_is_found_under_its_own_name(run, tmp_path):
    executable(tmp_path / "bin/python3", FAKE_PYTHON.replace("${FAKE_VERSION:-3.12}", "3.9"))
    executable(tmp_path / "bin/python3.11", FAKE_PYTHON.replace("${FAKE_VERSION:-3.12}", "3.11"))
    done, _ = run("scripts/dev/env.sh")
    assert done.returncode == 0, done.stderr


def test_no_python_at_all(run, tmp_path):
    (tmp_path / "bin/python3").unlink()
    done, _ = run("scripts/dev/env.sh")
    assert done.returncode == 1
    assert "no Python was found" in done.stderr


def test_python_asked_for_is_taken_or_refused(run, tmp_path):
    executable(tmp_path / "old", FAKE_PYTHON.replace("${FAKE_VERSION:-3.12}", "3.8"))
    done, _ = run("scripts/dev/env.sh", PYTHON=str(tmp_path / "old"))
    assert done.returncode == 1  # although python3 would do
    assert "3.8" in done.stderr
    executable(tmp_path / "new", FAKE_PYTHON)
    (tmp_path / "bin/python3").unlink()
    assert run("scripts/dev/env.sh", PYTHON=str(tmp_path / "new"))[0].returncode == 0


def test_quickstart_passes_its_arguments_on(run, project):
    done, told = run("scripts/quickstart", "--optim", "cwd_muon", "--run_name", "two words")
    assert done.returncode == 0, done.stderr
    assert told[-1].endswith(f"{project}/scripts/compare.py --optim cwd_muon --run_name two words")


@pytest.mark.parametrize("script", ["scripts/test", ".ci/run"])
def test_tests_lint_then_run_pytest_in_the_project(run, project, script):
    done, told = run(script, "-k", "muon")
    assert done.returncode == 0, done.stderr
    expected = ["-m ruff check .", "-m ruff format --check .", f"{PYTEST} -k muon"]
    assert told[-3:] == [f"{project}: {command}" for command in expected]


def test_exit_status_of_the_tests(run):
    done, told = run("scripts/test", FAKE_RUFF="1")
    assert done.returncode == 1
    assert told[-1].endswith(PYTEST)  # a lint error does not hide the tests
    assert run("scripts/test", FAKE_PYTEST="5")[0].returncode == 5
