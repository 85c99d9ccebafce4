"""A run's directory, as the ranks that see it save into it together: whole checkpoints, or none, after any crash."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_cwd.checkpoint import manifest
from hf_cwd.checkpoint.files import CheckpointError, inside, sync_directory
from hf_cwd.checkpoint.manifest import Manifest
from hf_cwd.distributed import collectives

# Not "checkpoint-*", which the Trainer would resume from or rotate. What begins with "_" is not pushed to the Hub.
_LEFT = re.compile(r"_tmp-(checkpoint-\d+)-[0-9a-f]{8}")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
REPLACED = "replaced"


class Storage:
    """One directory of checkpoints, and the ranks that share it.

    Where each node has a directory of its own under the same path, the ranks of each node share one; who sees what is
    found out by a file, once, so that neither ``save_on_each_node`` nor anything else has to be believed. The first
    rank of each directory is its keeper, who writes the manifest and moves directories.

    All ranks call each method, and in the same order; an error of one rank is an error of all.

    Args:
        directory: the run's, made here if need be.
        is_probed: False takes it to be the same for all ranks and writes nothing into it.

    Raises:
        OSError: it cannot be written into.
    """

    def __init__(self, directory: str | Path, *, is_probed: bool = True) -> None:
        self.directory, self.is_probed, self._rank = Path(directory), is_probed, collectives.rank()
        (self._token, *_) = collectives.gathered(secrets.token_hex(4))  # not from a generator that training draws from
        keepers = self._probe() if is_probed and collectives.world() > 1 else [0] * collectives.world()
        self._keeper, self.is_one = keepers[self._rank], len(set(keepers)) == 1
        peers = [rank for rank, keeper in enumerate(keepers) if keeper == self._keeper]
        self._share = slice(peers.index(self._rank), None, len(peers))

    @property
    def is_keeper(self) -> bool:
        """Whether this rank is the one that keeps its directory in order."""
        return self._rank == self._keeper

    def _probe(self) -> list[int]:
        """For each rank, the first of those that see the same directory."""
        mark = self.directory / f"_tmp-probe-{self._token}"

        def claim() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError), open(mark, "x", encoding="utf-8") as file:
                file.write(str(self._rank))

        together(claim if self._rank == 0 else None)
        together(None if mark.exists() else claim)
        keepers = together(lambda: int(mark.read_text(encoding="utf-8")))
        if keepers[self._rank] == self._rank:
            mark.unlink()
        return keepers

    def stage(self, name: str) -> Path:
        """Makes the directory in which a checkpoint is written before it has its name: ``<returned>/<name>``."""
        staging = self.directory / f"_tmp-{name}-{self._token}"

        def make() -> None:
            if staging.exists():  # of an attempt that failed in this run
                shutil.rmtree(staging)
            staging.mkdir(parents=True)

        together(make if self.is_keeper else None)
        return staging

    def seal(self, checkpoint: Path, **about: Any) -> None:
        """Waits until all ranks have written and all of it is on the disk; then the keeper writes the manifest.

        Args:
            about: what :func:`manifest.write` is to say of it.
        """
        together(None)
        mine = together(lambda: (self._keeper, manifest.describe(checkpoint, self._my_files(checkpoint))))

        def write() -> None:
            files = {name: entry for keeper, some in mine if keeper == self._rank for name, entry in some.items()}
            manifest.write(checkpoint, world_size=collectives.world(), files=dict(sorted(files.items())), **about)

        together(write if self.is_keeper else None)

    def _my_files(self, checkpoint: Path) -> list[str]:
        sizes = inside(checkpoint)
        return sorted(sizes, key=lambda name: (-sizes[name], name))[self._share]

    def publish(self, staging: Path, name: str) -> None:
        """Gives a sealed checkpoint its name. One that has it is removed after that."""
        together((lambda: self._move(staging, name)) if self.is_keeper else None)

    def _move(self, staging: Path, name: str) -> None:
        final = self.directory / name
        if final.exists():
            os.replace(final, staging / REPLACED)
            sync_directory(staging)
        os.replace(staging / name, final)
        sync_directory(self.directory)
        shutil.rmtree(staging)

    def discard(self, staging: Path) -> None:
        """Removes what could not be saved, where no other rank may be writing into it."""
        if collectives.world() == 1:
            shutil.rmtree(staging, ignore_errors=True)

    def rotate(self, limit: int | None, keep: Iterable[str]) -> None:
        """Removes the oldest checkpoints until ``limit`` are left, and none whose name is to be kept.

        A directory loses its name first, so that none that is half removed looks like a checkpoint.
        """
        if not self.is_keeper or not limit or limit < 1:
            return
        kept = set(keep)
        names = sorted(self.checkpoints().values(), key=lambda name: (self._time(name), number(name)))
        for name in [name for name in names if name not in kept][: max(0, len(names) - max(limit, len(kept)))]:
            gone = self.directory / f"_tmp-{name}-{self._token}"
            gone.mkdir()
            os.replace(self.directory / name, gone / "rotated")
            shutil.rmtree(gone)

    def _time(self, name: str) -> int:
        return (self.directory / name).stat().st_mtime_ns

    def checkpoints(self) -> dict[int, str]:
        """Directories that are named as checkpoints here, by step."""
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        found = {number(name): name for name in names if _CHECKPOINT.fullmatch(name)}
        return {step: name for step, name in sorted(found.items()) if (self.directory / name).is_dir()}

    def recover(self, *, fast: bool) -> list[str]:
        """Ends what a run that was killed has begun; the keeper tells what was done, a line each.

        A checkpoint that was sealed gets its name. Everything else that was not finished is removed.
        """
        return together(lambda: list(self._recover(fast)) if self.is_keeper else [])[self._rank]

    def _recover(self, fast: bool) -> Iterator[str]:
        for entry in sorted(self.directory.glob("_tmp-*")):
            match = _LEFT.fullmatch(entry.name)
            if entry.is_file() and entry.name.startswith("_tmp-probe-"):
                entry.unlink()
            if match is None or not entry.is_dir() or entry.is_symlink():
                continue
            name = match[1]
            try:
                manifest.verify(entry / name, fast=fast)
            except CheckpointError:
                if (entry / REPLACED).is_dir() and not (self.directory / name).exists():
                    os.replace(entry / REPLACED, self.directory / name)
                shutil.rmtree(entry)
                yield f"removed {entry}, which an interrupted save or removal of {name} had left"
            else:
                self._move(entry, name)
                yield f"{self.directory / name} was whole, and had not got its name when its run was ended: it has now"
            sync_directory(self.directory)

    def verify(self, checkpoint: str | Path, *, fast: bool, fresh: bool = False) -> Manifest:
        """:func:`manifest.verify` of the files that a resume loads, by the ranks together.

        Each looks at some of the files, and raises what any has found. A ``fresh`` run can do without optimizer states
        and schedule, which may be missing; ``training_args.bin``, a tokenizer or a README.md may be anything.
        """
        read = together(lambda: manifest.read(checkpoint))[self._rank]
        names = [name for name in read.files if read.loads(name)]
        if fresh:
            names = [n for n in names if os.path.lexists(Path(checkpoint, n)) or not manifest.is_of(n, manifest.STATES)]
        foreign = together((lambda: manifest.foreign(checkpoint, read)) if self.is_keeper else None)
        found = together(lambda: manifest.problems(checkpoint, read, names[self._share], fast=fast))
        every = [problem for some in (*foreign, *found) for problem in some or ()]
        manifest.check(checkpoint, list(dict.fromkeys(every)))
        return read


def number(name: str) -> int:
    """The step of a checkpoint, by the name of its directory."""
    return int(_CHECKPOINT.fullmatch(name)[1])


def together(action: Callable[[], Any] | None) -> list[Any]:
    """Does something on this rank, or nothing, waits for all ranks, and returns what it gave on each.

    Raises:
        Exception: this rank's own, or CheckpointError or RuntimeError with the text of another's.
    """
    result, error = None, None
    try:
        result = action() if action is not None else None
    except Exception as caught:
        error = caught
    known = (error.what, error.advice) if isinstance(error, CheckpointError) else None
    told = collectives.gathered((result, None if error is None else (known, f"{type(error).__name__}: {error}")))
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(told):
        if failure is not None:
            known, text = failure
            raise CheckpointError(*known) if known is not None else RuntimeError(f"rank {rank}: {text}")
    return [each for each, _ in told]
