"""Trains each cell of the resume table, and again from its checkpoint by other processes.

    python -m tests.checkpoint.resumes FOLDER

FOLDER/results.json says how far apart the two ends are. Cells that the same processes can train are trained one after
another: all of them in full; then, by new processes, all of them from their checkpoints, by --resume_from_checkpoint.
"""

import faulthandler
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from dev.crash_checkpoints import loaded
from dev.forked_runs import LAYOUTS, LONGEST, clean_state, finish, start, tiny_llama, train, warm_up
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, Trainer

from hf_cwd import CWDTrainer, CWDTrainingArguments
from hf_cwd.checkpoint.files import CheckpointError
from hf_cwd.rules import RULES
from hf_cwd.trainer.optim_args import options
from tests.support import garbage

STEPS, SAVED = 7, 4  # with two ranks the second epoch ends after step 6
# Who saves and who resumes: each layout has all four, and so has each rule.
TRAINERS = [(Trainer, Trainer), (CWDTrainer, Trainer), (CWDTrainer, CWDTrainer), (Trainer, CWDTrainer)]


def in_bfloat16(seed: int) -> torch.nn.Module:
    return tiny_llama(seed).bfloat16()


def with_lora(seed: int) -> torch.nn.Module:
    """The model below the adapters is in no checkpoint, and the same for both runs."""
    model = tiny_llama()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@dataclass(frozen=True)
class Variation:
    """How a cell differs from the plain one."""

    arguments: dict[str, Any] = field(default_factory=dict)
    optim_args: dict[str, Any] = field(default_factory=dict)
    model: Callable[[int], torch.nn.Module] = tiny_llama  # from a seed


def _zero(stage: int, top: dict[str, Any] | None = None, **section: Any) -> dict[str, Any]:
    config = LAYOUTS[f"zero{stage}"].arguments["deepspeed"]
    return {"deepspeed": {**config, **(top or {}), "zero_optimization": {"stage": stage, **section}}}


VARIATIONS = {
    "plain": Variation(),
    "accumulation": Variation({"gradient_accumulation_steps": 2}),
    "bf16": Variation({"bf16": True}),
    "masters": Variation({}, {"master": "remainder"}, in_bfloat16),
    "lora": Variation(model=with_lora),
    "compiled": Variation({"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    "offload": Variation({"fsdp_config": {"version": 2, "cpu_offload": True}}),
    "sub_groups": Variation(_zero(3, sub_group_size=4000)),
    "BF16_Optimizer": Variation({"bf16": True, **_zero(1, {"data_types": {"grad_accum_dtype": "fp32"}})}),
}


class Cell(NamedTuple):
    """One run, of as many ranks as the layout has, or of another number."""

    layout: str
    rule: str
    variation: str = "plain"
    ranks: int | None = None

    def __str__(self) -> str:
        return "-".join(str(part) for part in self if part not in ("plain", None))

    @property
    def world(self) -> int:
        return self.ranks or LAYOUTS[self.layout].world

    @property
    def kind(self) -> tuple[int, frozenset[str]]:
        """What the same processes can train: neither DeepSpeed nor what lets Accelerate shard can be undone."""
        return self.world, frozenset(LAYOUTS[self.layout].arguments) & {"fsdp", "deepspeed"}


BOTH = ("adamw", "muon")  # element-wise, and with whole matrices
CELLS = [
    *(Cell(layout, rule) for layout in LAYOUTS for rule in RULES),
    *(Cell(layout, rule, ranks=3) for layout in ("fsdp2", "zero2", "zero3") for rule in BOTH),
    *(Cell("fsdp2", rule, "offload") for rule in BOTH),
    *(Cell("zero3", rule, "sub_groups") for rule in BOTH),
    *(Cell("zero1", rule, "BF16_Optimizer") for rule in BOTH),
    *(Cell(layout, "muon", "bf16") for layout in ("ddp", "zero2", "zero3", "zero3-offload")),
    *(Cell(layout, "muon", "masters") for layout in ("one", "fsdp2", "fsdp2-sharded")),
    *(Cell(layout, "muon", "lora") for layout in ("one", "fsdp2", "zero2")),
    *(Cell(layout, "muon", "accumulation") for layout in ("fsdp2", "zero3")),
    Cell("one", "muon", "compiled"),
]
SOURCES = ("one", "fsdp2", "fsdp2-sharded", "zero2", "zero3")  # whose checkpoints the other layouts are given
# What a run can lose without a word: each must be seen in the end.
LOSSY = Cell("one", "adamw")
LOSSES = {
    "random numbers": lambda checkpoint: (checkpoint / "rng_state.pth").unlink(),
    "a number of a state": lambda checkpoint: change_a_number(checkpoint / "optimizer.pt"),
    "its place in the data": lambda checkpoint: ["--ignore_data_skip", "true"],
}


def change_a_number(path: Path) -> None:
    """By a few percent, in the momentum of the second weight: the first may have rows that no token uses."""
    state = torch.load(path)
    state["state"][1]["exp_avg"].view(-1)[0] *= 1.05
    torch.save(state, path)


def trainers(cell: Cell) -> tuple[type[Trainer], type[Trainer]]:
    return TRAINERS[(list(LAYOUTS).index(cell.layout) + list(RULES).index(cell.rule)) % len(TRAINERS)]


def one(folder: Path, cell: Cell, kind: type[Trainer], seed: int, flags: list[str]) -> None:
    """One run, with the flags of a command line."""
    (given,) = HfArgumentParser(CWDTrainingArguments).parse_args_into_dataclasses(["--output_dir", "unused", *flags])
    variation, resume = VARIATIONS[cell.variation], given.resume_from_checkpoint
    wanted = {"momentum": 0.9, **variation.optim_args}
    choices = {
        "optim": f"cwd_{cell.rule}",
        "save_steps": SAVED,
        "save_total_limit": None,
        "lr_scheduler_type": "linear",
        "resume_from_checkpoint": resume,
        "ignore_data_skip": given.ignore_data_skip,
        **variation.arguments,
        "cwd_verify": given.cwd_verify,
        "optim_args": ",".join(f"{key}={value}" for key, value in wanted.items() if key in options(cell.rule)),
    }
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    with clean_state():
        made = lambda: variation.model(seed)  # noqa: E731
        train(folder, cell.layout, steps=STEPS, resume=resume, kind=kind, model=made, **choices)
    garbage.pass_over()


def in_full(folder: Path, cells: list[Cell]) -> None:
    for cell in cells:
        one(folder / str(cell), cell, trainers(cell)[0], 0, [])


def again(folder: Path, cells: list[Cell]) -> None:
    """From other weights than the first run began with, and into another directory."""
    for cell in cells:
        checkpoint = folder / str(cell) / f"checkpoint-{SAVED}"
        one(folder / f"{cell} again", cell, trainers(cell)[1], 99, ["--resume_from_checkpoint", str(checkpoint)])
        for what, lose in LOSSES.items() if cell == LOSSY else ():
            copy = shutil.copytree(checkpoint, folder / what / checkpoint.name)
            flags = ["--resume_from_checkpoint", str(copy), "--cwd_verify", "off"]
            one(folder / f"{cell} without {what}", cell, Trainer, 99, [*flags, *(lose(copy) or [])])


def crossed(folder: Path, cells: list[Cell]) -> None:
    """From the checkpoints of other layouts: what is said, or "" where the run goes on."""
    found = {}
    for cell in cells:
        if cell.rule != "adamw" or cell.variation != "plain":
            continue
        for source in SOURCES:
            if source == cell.layout and cell.ranks is None:
                continue
            checkpoint, said = folder / str(Cell(source, "adamw")) / f"checkpoint-{SAVED}", ""
            flags = ["--resume_from_checkpoint", str(checkpoint)]
            try:
                one(folder / f"{source} to {cell}", cell, CWDTrainer, 99, flags)
            except CheckpointError as error:
                said = str(error)
            found[f"{source} to {cell}"] = said
    (folder / f"crossed-{cells[0]}-{os.environ.get('RANK', 0)}").write_text(json.dumps(found))


def compared(folder: Path, run: str, other: str) -> dict[str, Any]:
    """For each file of the last checkpoints the largest difference of numbers, and what both runs logged."""
    ends = [dict(loaded(folder / name / f"checkpoint-{STEPS}")) for name in (run, other)]
    logs = []
    for name in (run, other):
        state = json.loads((folder / name / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        logs.append([entry for entry in state["log_history"] if "loss" in entry and entry["step"] > SAVED])
    return {
        "files": {name: difference(value, ends[1].get(name)) for name, value in ends[0].items()},
        "more files": sorted(ends[1].keys() - ends[0].keys()),
        "numbers": sum(map(numbers, ends[0].values())),
        "logs": logs,
    }


def numbers(value: Any) -> int:
    """How many floating-point numbers there are in a value's tensors."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.is_floating_point()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(numbers, parts))


def difference(one: Any, two: Any) -> float:
    """The largest of numbers in tensors; infinite where anything else differs."""
    if type(one) is not type(two):
        return inf
    if isinstance(one, dict):
        return max((difference(one[key], two[key]) for key in one), default=0.0) if one.keys() == two.keys() else inf
    if isinstance(one, list | tuple):
        return max(map(difference, one, two), default=0.0) if len(one) == len(two) else inf
    if isinstance(one, torch.Tensor):
        return of_tensors(one, two)
    if isinstance(one, np.ndarray):
        return 0.0 if np.array_equal(one, two) else inf
    return 0.0 if one == two or not isinstance(one, str | bytes | int | float | None) else inf


def of_tensors(one: torch.Tensor, two: torch.Tensor) -> float:
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return inf
    if torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (one, two))):
        return 0.0
    found = (one.double() - two.double()).abs().max().item()
    return found if found > 0 else inf  # other bits, but no other number


def main() -> None:
    folder = Path(sys.argv[1])
    for layout in ("one", "ddp", "fsdp2", "zero3"):
        warm_up(layout, folder)
    garbage.pass_over()
    kinds: dict[Any, list[Cell]] = {}
    for cell in CELLS:
        kinds.setdefault(cell.kind, []).append(cell)
    phases = [(phase, kind) for kind in kinds for phase in (in_full, again)] + [(crossed, kind) for kind in kinds]
    for phase, kind in phases:
        (world, _), cells, log = kind, kinds[kind], folder / "log"
        log.unlink(missing_ok=True)
        codes = finish(start(lambda phase=phase, cells=cells: phase(folder, cells), world, log), timeout=900)
        assert codes == [0] * world, log.read_text()
    results = {str(cell): compared(folder, str(cell), f"{cell} again") for cell in CELLS}
    for what in LOSSES:
        results[what] = compared(folder, str(LOSSY), f"{LOSSY} without {what}")
    results["crossed"] = [json.loads(path.read_text()) for path in sorted(folder.glob("crossed-*"))]
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
