"""How the C kernel's library comes to be: with the package, or on first use, or not at all and then with a reason."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from hf_cwd.kernels import build, c

ROOT = Path(__file__).parents[2]
SOURCE = Path(build.__file__).parent
# In place of the kernel's, which take seconds to compile: how the library comes to be does not depend on what is in it.
SMALL = {
    "cwd.c": '#include "cwd_loops.h"\nint cwd_level(void) { return LEVEL; }\n',
    "cwd_loops.h": "#define LEVEL 1\n",
}

try:
    COMPILER = build.compiler()
except build.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    """An empty user cache, an empty folder for temporary files, and a package of small sources without a library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "package").mkdir()
    _write_small(tmp_path / "package")
    monkeypatch.setattr(build, "HERE", tmp_path / "package")


def _write_small(folder: Path) -> None:
    assert SMALL.keys() == set(build.SOURCES)
    for name, text in SMALL.items():
        (folder / name).write_text(text)


@pytest.fixture
def _own_sources():
    """The kernel's."""
    for source in build.SOURCES:
        shutil.copy(SOURCE / source, build.HERE)


def _script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def _runs(library: Path) -> bool:
    """In a process of its own: a library once loaded stays."""
    script = f"import ctypes; print(ctypes.CDLL({str(library)!r}).cwd_level())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    return done.returncode == 0 and int(done.stdout) in (-1, 0, 1, 2)


def _reason() -> str:
    with pytest.raises(build.BuildError) as raised:
        build.library()
    return str(raised.value)


def test_built_once_in_the_user_s_cache(tmp_path):
    library = build.library()
    assert library.parent == tmp_path / "cache" / "hf_cwd"
    assert _runs(library)
    with mock.patch.object(build, "build", side_effect=AssertionError("built again")):
        assert build.library() == library
    assert list(library.parent.iterdir()) == [library]  # nothing else is left behind


def test_the_package_s_own_is_taken_without_a_compiler(monkeypatch):
    packaged = build.HERE / build.name()
    build.build(packaged, COMPILER)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert build.library() == packaged


@pytest.mark.parametrize("source", build.SOURCES)
def test_of_another_source_it_is_another_library(source):
    packaged = build.HERE / build.name()
    packaged.touch()
    assert build.library() == packaged
    with (build.HERE / source).open("a") as file:
        file.write("/* changed */\n")
    assert build.library() != packaged


def test_of_another_compiler_it_is_another_library(tmp_path, monkeypatch):
    before = build.library()
    forward = f'[ "$*" = --version ] && echo "another one" && exit; exec {" ".join(COMPILER)} "$@"'
    monkeypatch.setenv("CC", _script(tmp_path / "another", forward) + " -g")
    after = build.library()
    assert after != before
    assert _runs(after)


@pytest.mark.usefixtures("_own_sources")
def test_an_old_compiler_gets_only_the_flags_it_needs(tmp_path, monkeypatch):
    refusing = (
        f'case "$*" in *openmp*|*trapping*) echo "error: unknown flag" >&2; exit 1;; esac; exec {COMPILER[0]} "$@"'
    )
    monkeypatch.setenv("CC", _script(tmp_path / "old", refusing))
    assert _runs(build.library())


def test_processes_at_once(tmp_path, monkeypatch):
    """As ranks do on their first step; each sees all of the library or nothing."""
    slow = (
        f'[ "$*" = --version ] || sleep 1; exec {" ".join(COMPILER)} "$@"'  # so that none has it before another begins
    )
    monkeypatch.setenv("CC", _script(tmp_path / "slow", slow))
    script = (
        "import ctypes, pathlib, sys\nsys.path.insert(0, sys.argv[1])\nimport build\n"
        "build.HERE = pathlib.Path(sys.argv[2])\n"
        "print(build.library(), ctypes.CDLL(str(build.library())).cwd_level())"
    )
    command = [sys.executable, "-c", script, str(SOURCE), str(build.HERE)]
    ranks = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    results = {rank.communicate(timeout=300)[0] for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert len(results) == 1
    assert len(list((tmp_path / "cache" / "hf_cwd").iterdir())) == 1


def test_a_cache_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").touch()  # a folder without permission would not stop root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build.library().parent == tmp_path / "temporary" / f"hf_cwd-{os.getuid()}"
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "file"))
    assert _reason().startswith("there is nowhere to build it: ")


def test_a_user_without_a_home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.os.path, "expanduser", lambda path: path)
    assert build.library().parent == tmp_path / "temporary" / f"hf_cwd-{os.getuid()}"


def test_a_cache_that_others_can_write_to(tmp_path):
    """Somebody's library would run as us."""
    shared = tmp_path / "cache" / "hf_cwd"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    assert build.library().parent == tmp_path / "temporary" / f"hf_cwd-{os.getuid()}"


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _reason() == "there is no C compiler (cc, gcc or clang; or set CC)"


def test_a_compiler_asked_for_by_name_is_the_only_one(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert _reason() == "CC=no-such-compiler -m64 was not found"


def test_a_broken_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", _script(tmp_path / "broken", "echo 'cc1: fatal error: no headers' >&2; exit 3"))
    assert _reason() == f"{tmp_path}/broken failed with status 3: cc1: fatal error: no headers"


def test_a_compiler_that_never_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", _script(tmp_path / "slow", "exec sleep 60"))
    monkeypatch.setattr(build, "SECONDS", 0.2)
    assert "timed out after 0.2 seconds" in _reason()


def test_a_library_that_cannot_be_loaded():
    packaged = build.HERE / build.name()
    packaged.write_text("not a library")
    c._load.cache_clear()
    try:
        assert str(packaged) in c.unavailable(torch.device("cpu"))
    finally:
        c._load.cache_clear()


@pytest.mark.usefixtures("_own_sources")
def test_the_clones_use_the_vectors_of_their_level():
    """A build whose AVX-512 clone has 256-bit vectors would be right, and slow."""
    if not shutil.which("objdump") or not build.WIDE:
        pytest.skip("no objdump, or not x86-64")
    listing = subprocess.run(["objdump", "-d", str(build.library())], capture_output=True, text=True, check=True).stdout
    roots: dict[str, set[str]] = {"v3": set(), "v4": set(), "other": set()}
    for function, code in re.findall(r"^\w+ <([^>]+)>:\n((?:.+\n)+)", listing, re.MULTILINE):
        level = next((level for level in ("v3", "v4") if f"_{level}" in function), "other")
        roots[level] |= set(re.findall(r"sqrtps.*%([xyz]mm)", code))
        assert level == "v4" or "zmm" not in code, function
        assert level != "other" or "ymm" not in code, function
    assert max(roots["v3"]) == "ymm"
    assert max(roots["v4"]) == "zmm"


def _checkout(folder: Path) -> Path:
    """What setup.py reads, without what lies in the working tree beside it, and with the small sources."""
    ignored = shutil.ignore_patterns("*.so.0", "__pycache__")
    shutil.copytree(ROOT / "hf_cwd", folder / "hf_cwd", ignore=ignored)
    for name in ("setup.py", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    _write_small(folder / "hf_cwd/kernels")
    return folder


def _setup(checkout: Path, *command: str, **environment: str) -> Path:
    """Runs setup.py, and returns the one file that is in dist then."""
    pytest.importorskip("setuptools")
    run = [sys.executable, "setup.py", "-q", *command]
    done = subprocess.run(run, cwd=checkout, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = (checkout / "dist").iterdir()
    return made


def test_a_wheel_has_the_library_and_its_source(tmp_path):
    wheel = zipfile.ZipFile(_setup(_checkout(tmp_path / "checkout"), "bdist_wheel"))
    names = {Path(name).name for name in wheel.namelist() if name.startswith("hf_cwd/kernels/")}
    assert names >= {*build.SOURCES, build.name()}
    wheel.extractall(tmp_path / "installed")
    assert _runs(tmp_path / "installed" / "hf_cwd" / "kernels" / build.name())


def test_a_wheel_without_a_compiler(tmp_path):
    wheel = zipfile.ZipFile(_setup(_checkout(tmp_path / "checkout"), "bdist_wheel", CC="no-such-compiler"))
    names = {Path(name).name for name in wheel.namelist() if name.startswith("hf_cwd/kernels/")}
    assert names >= {*build.SOURCES, "c.py"}
    assert not any(name.endswith(".so.0") for name in names)


def test_a_source_distribution_has_the_source(tmp_path):
    with tarfile.open(_setup(_checkout(tmp_path / "checkout"), "sdist")) as archive:
        assert {Path(name).name for name in archive.getnames()} >= set(build.SOURCES)


def test_an_editable_install_has_the_library(tmp_path):
    """What pip install -e does with an extension."""
    checkout = _checkout(tmp_path / "checkout")
    (checkout / "dist").mkdir()
    (checkout / "dist" / "here").touch()
    _setup(checkout, "build_ext", "--inplace")
    assert _runs(checkout / "hf_cwd" / "kernels" / build.name())
