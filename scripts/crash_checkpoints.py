#!/usr/bin/env python
"""Kills training runs at random moments, resumes them, and compares the ends with those of runs that nobody killed.

    .venv/bin/python scripts/crash_checkpoints.py --kills 200 --layouts one ddp fsdp2 zero3

A tiny Llama is trained by CWDTrainer, saving at each step, on CPU processes. Each run is killed several times (SIGKILL:
all its ranks, or one of them, whose end the others then see), and each time started again with
``resume_from_checkpoint=True``. It is lost if it does not end with the checkpoint of the run that nobody killed, bit
for bit: weights, optimizer states, schedule and random numbers. Exits with 1 if a run was lost.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import importlib
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import numpy as np
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_cwd import CWDTrainer, CWDTrainingArguments
from hf_cwd.checkpoint import manifest
from scripts import cpu_ranks

STEPS = 8
ROWS = 12  # three steps of two ranks: a run goes over the ends of epochs, and is resumed within one
LONGEST = 100  # seconds that a run may take: gloo can stand still for ever where a rank was killed
END = f"checkpoint-{STEPS}"
DIFFERENT = ("trainer_state.json", "training_args.bin")  # times and paths
MODEL = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32},
}


@dataclass(frozen=True)
class Layout:
    """How many ranks, and the arguments that make them share a model."""

    world: int = 2
    arguments: dict[str, Any] = field(default_factory=dict)


def _fsdp(**config: Any) -> Layout:
    return Layout(arguments={"fsdp": True, "fsdp_config": {"version": 2, **config}})


def _zero(stage: int, **section: Any) -> Layout:
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {**dict.fromkeys(auto, "auto"), "bf16": {"enabled": "auto"}}
    return Layout(arguments={"deepspeed": {**config, "zero_optimization": {"stage": stage, **section}}})


_OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
LAYOUTS = {
    "one": Layout(1),
    "ddp": Layout(),
    "fsdp2": _fsdp(),
    "fsdp2-sharded": _fsdp(state_dict_type="SHARDED_STATE_DICT"),
    "zero1": _zero(1),
    "zero2": _zero(2),
    "zero3": _zero(3),
    "zero1-offload": _zero(1, **_OFFLOAD),
    "zero2-offload": _zero(2, **_OFFLOAD),
    "zero3-offload": _zero(3, **_OFFLOAD),
}


def train(
    folder: Path,
    name: str,
    *,
    steps: int = STEPS,
    resume: bool | str = False,
    kind: type[Trainer] = CWDTrainer,
    model: Callable[[], torch.nn.Module] | None = None,
    **options: Any,
) -> None:
    """One run, in the process of each rank. One that is over is left alone: the Trainer would make another step.

    Args:
        model: makes another than the tiny Llama; called when DeepSpeed knows how to cut it.
    """
    if (folder / f"checkpoint-{steps}").is_dir():
        return
    layout = LAYOUTS[name]
    if "deepspeed" in layout.arguments:
        cpu_ranks.meet()
    elif "fsdp" in layout.arguments:
        cpu_ranks.switch_on()
    defaults = {
        **{"use_cpu": True, "max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
        **{"optim": "cwd_adamw", "weight_decay": 0.1, "lr_scheduler_type": "constant", "logging_steps": 1},
        **{"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "report_to": "none"},
        **{"disable_tqdm": True, "dataloader_pin_memory": False, "ddp_timeout": 60},
    }
    if layout.world > 1:
        defaults["ddp_backend"] = "gloo"
    args = CWDTrainingArguments(output_dir=str(folder), **{**defaults, **layout.arguments, **options})
    tokens = torch.randint(0, 64, (ROWS, 8), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = kind(model=(model or tiny_llama)(), args=args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume or None)


def tiny_llama(seed: int = 0) -> torch.nn.Module:
    """With dropout, so that random numbers have to come back too."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**MODEL, attention_dropout=0.1))


def warm_up(name: str, folder: Path) -> None:
    """Does once, before ranks are forked, what each would do anew: mostly imports.

    DeepSpeed looks whether its communication is built under a lock, which a rank that is killed would leave for ever.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    if "deepspeed" in LAYOUTS[name].arguments:
        from deepspeed.comm.torch import build_shm_op

        build_shm_op()

    def first() -> None:
        train(folder / f"warm-{name}", name, steps=1)
        (folder / "modules").write_text("\n".join(sys.modules))

    if any(finish(start(first, LAYOUTS[name].world, folder / "log"), timeout=LONGEST)):
        raise RuntimeError(f"{name} does not run:\n{(folder / 'log').read_text()[-4000:]}")
    for module in (folder / "modules").read_text().splitlines():
        with contextlib.suppress(Exception):  # some make others as they go
            importlib.import_module(module)


def start(job: Callable[[], Any], world: int, log: Path) -> list[int]:
    """Forks the ranks of a run from this process, which has imported everything and computed nothing.

    Each ends with 0, or with 1 and a traceback in the log.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            faulthandler.dump_traceback_later(LONGEST, exit=True)
            tempfile.tempdir = str(log.parent)  # what a compiler's check leaves there goes with the rest
            torch.set_num_threads(1)
            if world > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                os.environ.update({key: str(value) for key, value in ranks.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            job()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pids


def finish(pids: list[int], *, timeout: float, grace: float = 60) -> list[int]:
    """How each rank has ended: its exit status, or minus the signal that killed it.

    Args:
        timeout: seconds until all are killed.
        grace: seconds that the others have, once one has ended badly, as a launcher gives them.
    """
    ended: dict[int, int] = {}
    end = time.monotonic() + timeout
    while True:
        for pid in pids:
            if pid not in ended:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended[pid] = os.waitstatus_to_exitcode(status)
        if len(ended) == len(pids):
            return [ended[pid] for pid in pids]
        if any(ended.values()):
            end = min(end, time.monotonic() + grace)
            grace = timeout  # it is counted from the first bad end
        if time.monotonic() > end:
            for pid in pids:
                if pid not in ended:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def contents(checkpoint: Path) -> dict[str, str]:
    """A digest of what each file of a checkpoint holds: of all but times, paths and the order of keys."""
    return {name: _digest(value) for name, value in loaded(checkpoint)}


def loaded(checkpoint: Path) -> Iterator[tuple[str, Any]]:
    """What each file of a checkpoint holds, one after another; see :func:`contents`."""
    for name in manifest.verify(checkpoint).files:
        path = checkpoint / name
        if name.endswith(".metadata"):  # of torch.distributed.checkpoint, with the files beside it
            with tempfile.NamedTemporaryFile() as file:
                dcp_to_torch_save(path.parent, file.name)
                yield name, torch.load(file.name, weights_only=False)
        elif path.suffix in (".pt", ".pth", ".bin") and name not in DIFFERENT:
            yield name, torch.load(path, weights_only=False)
        elif path.suffix == ".safetensors":
            yield name, load_file(path)
        elif path.suffix != ".distcp" and name not in DIFFERENT:
            yield name, path.read_bytes()


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(_plain(value)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A value without what differs between two equal ones; an object other than these is its type."""
    if isinstance(value, dict):
        return sorted((str(key), _plain(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist())
    return value if isinstance(value, str | bytes | int | float | None) else type(value).__name__


def run(folder: Path, name: str, log: Path, **options: Any) -> float:
    """A run that nobody kills; the seconds that it took."""
    began = time.monotonic()
    codes = finish(start(lambda: train(folder, name, **options), LAYOUTS[name].world, log), timeout=300)
    if any(codes):
        raise RuntimeError(f"{name}: ranks ended with {codes}:\n{log.read_text()[-4000:]}")
    return time.monotonic() - began


def lineage(folder: Path, name: str, log: Path, *, seconds: float, most: int, random_: random.Random) -> int:
    """Starts a run, kills it and starts it again until it was killed ``most`` times or has ended; how many it were.

    Args:
        seconds: that a whole run takes: it is killed at any moment of most of them.
    """
    world, kills = LAYOUTS[name].world, 0
    while kills < most:
        pids = start(lambda: train(folder, name, resume=has_begun(folder)), world, log)
        time.sleep(random_.uniform(0, 0.8 * seconds))
        victims = pids if random_.random() < 0.5 else [random_.choice(pids)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        codes = finish(pids, timeout=120, grace=random_.uniform(0, 2))
        if not any(codes):
            break  # it had ended before
        kills += 1
    return kills


def has_begun(folder: Path) -> bool:
    """Whether there is something to resume from: a run that was killed before its first checkpoint begins anew."""
    return any(folder.glob("*checkpoint-*/checkpoint-*/" + manifest.NAME)) or any(folder.glob("checkpoint-*"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="at least so many, over all layouts")
    parser.add_argument("--seed", type=int, default=None, help="of the moments and victims; printed when left out")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--most", type=int, default=6, help="kills of one run, before it is left to end")
    parser.add_argument("--seconds", type=float, default=None, help="begin no run after so many")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    moments, began, kills, runs, lost = random.Random(seed), time.monotonic(), 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        seconds, ends = {}, {}
        for name in args.layouts:
            warm_up(name, root)
            seconds[name] = run(root / name, name, root / "log")
            ends[name] = contents(root / name / END)
            print(f"{name}: {seconds[name]:.1f} s without a kill", flush=True)
        while kills < args.kills and (args.seconds is None or time.monotonic() - began < args.seconds):
            name, folder, log = args.layouts[runs % len(args.layouts)], root / str(runs), root / f"{runs}.log"
            more = lineage(folder, name, log, seconds=seconds[name], most=args.most, random_=moments)
            try:
                run(folder, name, log, resume=has_begun(folder))
                same = contents(folder / END) == ends[name]
            except (RuntimeError, ValueError) as error:
                print(error)
                same = False
            kills, runs, lost = kills + more, runs + 1, lost + (not same)
            print(f"{name}: {more} kills, {'the same end' if same else 'LOST'}", flush=True)
    print(f"seed {seed}: {kills} kills of {runs} runs in {time.monotonic() - began:.0f} s, {lost} lost")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
