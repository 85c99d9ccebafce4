"""A run's directory, into which all ranks save together. After a crash each checkpoint is complete, or removed."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_cwd.checkpoint import manifest
from hf_cwd.checkpoint.files import CheckpointError, inside, sync_directory
from hf_cwd.checkpoint.manifest import Manifest
from hf_cwd.distributed import collectives

# The Trainer resumes from and rotates "checkpoint-*". It does not push names that begin with "_" to the Hub.
_LEFT = re.compile(r"_tmp-(checkpoint-\d+)-[0-9a-f]{8}")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
REPLACED = "replaced"


class Storage:
    """A directory of checkpoints, and the ranks that share it.

    The same path may be another directory on each node. A file that is written once shows which ranks see the same
    directory, so that ``save_on_each_node`` need not be trusted. The first rank of each directory is its keeper: it
    writes the manifest and renames directories.

    All ranks must call each method, in the same order. If one rank fails, all ranks raise an error.

    Args:
        directory: the run's directory; it is made if it does not exist.
        is_probed: False assumes that all ranks share one directory, and writes nothing into it.

    Raises:
        OSError: the directory is not writable.
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
        """Whether this rank writes the manifest and renames directories."""
        return self._rank == self._keeper

    def _probe(self) -> list[int]:
        """For each rank, the first rank that sees the same directory."""
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
        """Makes and returns a temporary directory; the checkpoint is then written to ``<returned>/<name>``."""
        staging = self.directory / f"_tmp-{name}-{self._token}"

        def make() -> None:
            if staging.exists():  # left by a save that failed in this run
                shutil.rmtree(staging)
            staging.mkdir(parents=True)

        together(make if self.is_keeper else None)
        return staging

    def seal(self, checkpoint: Path, *, step: int, versions: Mapping[str, str], is_resumable: bool = True) -> None:
        """Waits until all ranks have synced their files to the disk; then the keeper writes the manifest.

        Args:
            step, versions, is_resumable: see :class:`Manifest`.
        """
        together(None)
        of_ranks = together(lambda: (self._keeper, manifest.describe(checkpoint, self._my_files(checkpoint))))

        def write() -> None:
            files = {name: record for keeper, some in of_ranks if keeper == self._rank for name, record in some.items()}
            manifest.write(
                checkpoint,
                step=step,
                world_size=collectives.world(),
                versions=versions,
                is_resumable=is_resumable,
                files=dict(sorted(files.items())),
            )

        together(write if self.is_keeper else None)

    def _my_files(self, checkpoint: Path) -> list[str]:
        sizes = inside(checkpoint)
        return sorted(sizes, key=lambda name: (-sizes[name], name))[self._share]

    def publish(self, staging: Path, name: str) -> None:
        """Renames a sealed checkpoint to its final name, and removes an older checkpoint of that name."""
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
        """Removes a failed save, unless other ranks may still be writing."""
        if collectives.world() == 1:
            shutil.rmtree(staging, ignore_errors=True)

    def rotate(self, limit: int | None, keep: Iterable[str]) -> None:
        """Removes the oldest checkpoints until ``limit`` are left, except those named in ``keep``.

        It renames a directory before it removes it, so that an interrupted removal leaves no partial checkpoint.
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
        """The directories named ``checkpoint-<step>``, by step."""
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        by_step = {number(name): name for name in names if _CHECKPOINT.fullmatch(name)}
        return {step: name for step, name in sorted(by_step.items()) if (self.directory / name).is_dir()}

    def recover(self, *, fast: bool) -> list[str]:
        """Finishes or removes what a killed run has left behind. On the keeper it returns a line for each action.

        A sealed checkpoint gets its final name. All other temporary directories are removed.
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
                yield f"{self.directory / name} is complete and has its name now: its run ended before it was renamed"
            sync_directory(self.directory)

    def verify(self, checkpoint: str | Path, *, fast: bool, fresh: bool = False) -> Manifest:
        """:func:`manifest.verify` of the files that a resume loads; the ranks share the work.

        Each rank compares some of the files, and all raise what any of them finds. For a ``fresh`` run the optimizer's
        states and the schedule may be missing. Other files, such as ``training_args.bin``, a tokenizer or a README.md,
        are not compared.
        """
        saved = together(lambda: manifest.read(checkpoint))[self._rank]
        names = [name for name in saved.files if saved.loads(name)]
        if fresh:
            names = [n for n in names if os.path.lexists(Path(checkpoint, n)) or not manifest.is_of(n, manifest.STATES)]
        foreign = together((lambda: manifest.foreign(checkpoint, saved)) if self.is_keeper else None)
        problems = together(lambda: manifest.problems(checkpoint, saved, names[self._share], fast=fast))
        every = [problem for of_rank in (*foreign, *problems) for problem in of_rank or ()]
        manifest.check(checkpoint, list(dict.fromkeys(every)))
        return saved


def number(name: str) -> int:
    """The step in the name of a checkpoint's directory."""
    return int(_CHECKPOINT.fullmatch(name)[1])


def together(action: Callable[[], Any] | None) -> list[Any]:
    """Calls ``action`` on this rank if given, waits for all ranks, and returns the results of all ranks.

    Raises:
        Exception: this rank's own error; or a CheckpointError or RuntimeError with the text of another rank's error.
    """
    result, error = None, None
    try:
        result = action() if action is not None else None
    except Exception as caught:
        error = caught
    # CheckpointError is sent as its arguments, so that other ranks can raise the same error.
    arguments = (error.what, error.advice) if isinstance(error, CheckpointError) else None
    failure = None if error is None else (arguments, f"{type(error).__name__}: {error}")
    of_ranks = collectives.gathered((result, failure))
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(of_ranks):
        if failure is not None:
            arguments, text = failure
            raise CheckpointError(*arguments) if arguments is not None else RuntimeError(f"rank {rank}: {text}")
    return [each for each, _ in of_ranks]
