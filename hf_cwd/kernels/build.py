"""Builds cwd.c into a shared library: with the package if a compiler is there (setup.py), else on first use.

Standard library only, and no import of hf_cwd: setup.py runs this file where torch is not installed.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("cwd.c", "cwd_loops.h")
# Every clone must give the same bits: a multiply and an add are fused where the source says fmaf, nowhere else.
EXACT = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-ffp-contract=off")
# What a compiler may not know. The results do not depend on them: vectors are longer, and sqrtf may be vectorised.
FAST = ("-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd")
WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
SECONDS = 120


class BuildError(Exception):
    """The library cannot be built; its text is the reason, one clause."""


def name(*more: str) -> str:
    """File name of the library. Of another source, other flags or another machine it is another one."""
    parts = [*((HERE / source).read_text() for source in SOURCES), *EXACT, *FAST, *WIDE, sys.platform]
    digest = hashlib.sha256("\0".join([*parts, platform.machine(), *more]).encode()).hexdigest()
    return f"libcwd-{digest[:16]}.so.0"  # not .so, which Python takes for a module


def compiler() -> list[str]:
    """The command of a C compiler: ``$CC``, or without it the first of cc, gcc and clang that is there."""
    asked = os.environ.get("CC")
    for command in [asked] if asked else ["cc", "gcc", "clang"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise BuildError(f"CC={asked} was not found" if asked else "there is no C compiler (cc, gcc or clang; or set CC)")


def version(command: list[str]) -> str:
    """What the compiler says that it is."""
    return _run([*command, "--version"])


def build(target: Path, command: list[str]) -> None:
    """Compiles to ``target``. Another process never sees half a file: it is renamed into place."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".cwd-") as scratch:
        made = Path(scratch) / target.name
        compile_ = [*command, *EXACT, str(HERE / SOURCES[0]), "-o", str(made)]
        try:
            _run([*compile_, *FAST, *WIDE, "-lm"])
        except BuildError:
            _run([*compile_, "-lm"])
        os.replace(made, target)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} failed: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise BuildError(f"{command[0]} failed with status {done.returncode}: {lines[0].strip()}")
    return done.stdout


def library() -> Path:
    """The library of this source: the package's own, or the user's cache's, where it is built if it is not there.

    Raises:
        BuildError: it can neither be found nor built.
    """
    packaged = HERE / name()
    if packaged.exists():
        return packaged
    command = compiler()
    cached = name(*command, version(command))
    for directory in _caches():
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not _is_ours(directory):
                continue
            if not (directory / cached).exists():
                build(directory / cached, command)
            return directory / cached
        except OSError:
            continue  # not writable: the next one
    raise BuildError(f"there is nowhere to build it: {' and '.join(map(str, _caches()))} cannot be written to")


def _caches() -> list[Path]:
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    own = [user / "hf_cwd"] if user.is_absolute() else []  # in a container a user may have no home
    return [*own, Path(tempfile.gettempdir()) / f"hf_cwd-{os.getuid()}"]


def _is_ours(directory: Path) -> bool:
    """Whether nobody else could have put a library there: it is going to be run."""
    status = directory.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022
