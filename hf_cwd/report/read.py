"""Reads runs from ``trainer_state.json`` and the small files beside it. It never loads a pickle."""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_cwd.report.run_settings import RunSettings, collect_settings, readable
from hf_cwd.report.scopes import without_repetitions
from hf_cwd.report.series import Series, by_key

STATE, RECORD, CONFIG = "trainer_state.json", "cwd_run.json", "config.json"
RESULTS, CARD = "all_results.json", "README.md"
SEED_IN_NAME = re.compile(r"[-_.+]*(?<![a-z])(?:seed|s)[-_=]?(\d+)(?![a-z0-9])", re.IGNORECASE)
# The arguments in the Trainer's state: those that change the training, and those that change what is written.
TRAINING, WRITING = ("max_steps", "num_train_epochs", "train_batch_size"), ("logging_steps", "eval_steps", "save_steps")


class Run(NamedTuple):
    """A training run."""

    name: str
    directory: Path
    history: list[dict[str, Any]]
    logged: dict[str, Series]  # the numbers in the history, by key
    settings: RunSettings
    results: dict[str, Any]
    seed: int | None
    identity: tuple[str, ...]  # equal for runs that differ only in the seed
    step: int
    max_steps: int
    recorded: bool  # whether it has a RECORD, and so all its settings are known
    notes: list[str]

    def series(self, key: str) -> Series:
        """The numbers logged under `key`."""
        return self.logged.get(key, Series([], []))

    @property
    def finished(self) -> bool:
        """Whether ``train()`` returned, perhaps before `max_steps`."""
        ended = any("train_loss" in entry and entry["step"] == self.step for entry in self.history)
        return ended or self.step >= self.max_steps


def read(paths: Sequence[str | Path]) -> list[Run]:
    """Reads the runs at or below `paths`, each once. Runs below one path are sorted by name, with numbers by value.

    A path is a run's directory, which contains ``trainer_state.json`` or ``checkpoint-*/trainer_state.json``, or a
    directory with runs below it.

    Raises:
        ValueError: a path does not exist or contains no run, or a file cannot be read. The message names it.
    """
    runs, left_out = read_whole(paths)
    if left_out:
        raise ValueError(left_out[0])
    return runs


def read_whole(paths: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """Like :func:`read`, but returns the readable runs, and the errors of the others.

    Raises:
        ValueError: a path does not exist or contains no run, or no run can be read.
    """
    directories = {each.resolve(): each for path in paths for each in _below(Path(os.path.abspath(path)))}
    top = os.path.commonpath([each.parent for each in directories.values()])
    runs, left_out = [], []
    for each in directories.values():
        try:
            runs.append(_run(each, readable(os.path.relpath(each, top))))
        except ValueError as error:
            left_out.append(str(error))
    if not runs:
        raise ValueError("; ".join(left_out))
    return runs, left_out


def _below(path: Path) -> Iterator[Path]:
    """The directories of runs at or below `path`."""
    if path.name == STATE and path.is_file():
        path = path.parent
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such directory; give a Trainer's output_dir")
    runs = 0
    for folder, names, _ in os.walk(path):
        names[:] = sorted((n for n in names if not n.startswith(".")), key=_natural)
        if _states(Path(folder)):
            names.clear()  # checkpoints of a run are not runs themselves
            runs += 1
            yield Path(folder)
    if not runs:
        raise ValueError(
            f"{path}: no {STATE} in it or below it. The Trainer writes one with each checkpoint and by "
            "trainer.save_state(): give the output_dir of a run that has saved"
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that compares numbers in names by value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _states(directory: Path) -> list[Path]:
    """The state files of the run itself and of its newest checkpoint, if they exist."""
    by_step = {}
    for path in directory.glob(f"checkpoint-*/{STATE}"):
        step = path.parent.name.removeprefix("checkpoint-")
        if step.isdecimal():
            by_step[int(step)] = path
    own = directory / STATE
    return [own] * own.is_file() + [by_step[step] for step in sorted(by_step)[-1:]]


def _run(directory: Path, name: str) -> Run:
    # If a run was resumed and is still running, a checkpoint is newer than its own state.
    states = [(path, _object(path)) for path in _states(directory)]
    path, state = max(states, key=lambda item: _whole(item[1].get("global_step")))
    history, notes = _history(path, state)
    beside = [directory] if path.parent == directory else [directory, path.parent]
    if directory.name.startswith("checkpoint-"):
        beside.append(directory.parent)
    record, config, results = (_first(beside, file) for file in (RECORD, CONFIG, RESULTS))
    kept = {key: state[key] for key in (*TRAINING, *WRITING) if state.get(key) is not None}
    settings = collect_settings(record, _card(beside), kept, config)
    step = max([_whole(state.get("global_step")), *(entry["step"] for entry in history)])
    training = {key: kept.get(key) for key in TRAINING} | settings.own
    identity = tuple(sorted(f"{key}={value}" for key, value in training.items() if key not in OF_ONE_RUN))
    return Run(
        name=name,
        directory=directory,
        history=history,
        logged=without_repetitions(by_key(history)),
        settings=settings,
        results=results,
        seed=_seed(settings.own, name),
        # A record has all settings. Without one, the name counts as well.
        identity=("" if record else without_seed(name), *identity),
        step=step,
        max_steps=_whole(state.get("max_steps")),
        recorded=bool(record),
        notes=notes,
    )


# Settings that do not change the training: where a run is stored, and which repetition it is.
OF_ONE_RUN = {"seed", "data_seed", "output_dir", "logging_dir", "run_name", "hub_model_id", "resume_from_checkpoint"}
OF_ONE_RUN |= {"logging_steps", "eval_steps", "save_steps", "logging_strategy", "save_strategy", "report_to"}


def _object(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file. The Trainer writes NaN and Infinity, which Python accepts."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}). Copy it again, or leave its run out") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a JSON object. Is it a file of the Trainer's?")
    return content


def _first(directories: Sequence[Path], file: str) -> dict[str, Any]:
    return next((_object(d / file) for d in directories if (d / file).is_file()), {})


def _whole(value: Any) -> int:
    """A non-negative integer below 2**53; 0 for any other value."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if number and 0 <= value < 2**53 else 0


def _history(path: Path, state: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The log entries that have a step, and notes on the others."""
    entries = state.get("log_history", [])
    if not isinstance(entries, list):
        raise ValueError(
            f'{path}: "log_history" is a {type(entries).__name__}, not a list. Is it a file of the Trainer\'s?'
        )
    good = [e for e in entries if isinstance(e, dict) and "step" in e and _whole(e["step"]) == e["step"]]
    history = [{readable(key): value for key, value in entry.items()} | {"step": int(entry["step"])} for entry in good]
    notes = []
    if not good:
        notes.append("logged nothing yet: it is in no chart")
    if len(good) < len(entries):
        notes.append(f"{len(entries) - len(good)} of {len(entries)} log entries name no step and are left out")
    logged = [entry["step"] for entry in history]
    ends = sum("train_loss" in entry for entry in history)  # the summary that train() logs when it returns
    clock = [entry["train_runtime"] for entry in history if isinstance(entry.get("train_runtime"), int | float)]
    if ends > 1 or any(b < a for times in (logged, clock) for a, b in itertools.pairwise(times)):
        notes.append("was resumed: of steps logged twice the later entry counts, and its times are of the last part")
    return history, notes


def _card(directories: Sequence[Path]) -> dict[str, Any]:
    """The hyper-parameters in the Trainer's model card."""
    path = next((d / CARD for d in directories if (d / CARD).is_file()), None)
    text = "" if path is None else path.read_text(encoding="utf-8", errors="replace")
    section = re.search(r"^### Training hyperparameters\n(.*?)(?:^#|\Z)", text, re.MULTILINE | re.DOTALL)
    items = re.findall(r"^- (\w+): (.+(?:\n(?!- |\n).+)*)", section[1] if section else "", re.MULTILINE)
    return {key: _number(" ".join(value.split())) for key, value in items}


def _number(text: str) -> int | float | str:
    for number_type in (int, float):
        try:
            return number_type(text)
        except ValueError:
            pass
    return text


def without_seed(name: str) -> str:
    """A run's name without the seed in it.

    >>> without_seed("lion-seed3"), without_seed("s1/lion"), without_seed("lion3")
    ('lion', 'lion', 'lion3')
    """
    match = SEED_IN_NAME.search(name)
    return name if match is None else (name[: match.start()] + name[match.end() :]).strip("-_./")


def _seed(settings: Mapping[str, Any], name: str) -> int | None:
    """The seed in the settings, or else in the run's name."""
    recorded = next((v for k, v in settings.items() if k.rsplit(".", 1)[-1] == "seed" and type(v) is int), None)
    match = SEED_IN_NAME.search(name)
    return int(match[1]) if recorded is None and match is not None else recorded
