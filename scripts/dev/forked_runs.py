"""Trainings on CPU processes that are forked from one which has imported everything: for scripts that start many.

The layouts are Accelerate's and DeepSpeed's; each takes a Trainer, unless told otherwise of a tiny Llama.
"""

import contextlib
import faulthandler
import importlib
import os
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

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dev import cpu_ranks
from hf_cwd import CWDTrainer, CWDTrainingArguments

STEPS = 8
ROWS = 12  # three steps of two ranks: a run goes over the ends of epochs, and is resumed within one
LONGEST = 100  # seconds that a run may take: gloo can stand still for ever where a rank was killed
MODEL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
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


def trainer_of(
    folder: Path,
    name: str,
    *,
    steps: int = STEPS,
    kind: type[Trainer] = CWDTrainer,
    model: Callable[[], torch.nn.Module] | None = None,
    **options: Any,
) -> Trainer:
    """A Trainer of a layout, in the process of each rank.

    Args:
        model: makes another than the tiny Llama; called when DeepSpeed knows how to cut it.
        options: TrainingArguments.
    """
    layout = LAYOUTS[name]
    if "deepspeed" in layout.arguments:
        cpu_ranks.meet()
    elif "fsdp" in layout.arguments:
        cpu_ranks.switch_on()
    defaults = {
        "use_cpu": True,
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "optim": "cwd_adamw",
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_timeout": 60,
    }
    if layout.world > 1:
        defaults["ddp_backend"] = "gloo"
    args = CWDTrainingArguments(output_dir=str(folder), **(defaults | layout.arguments | options))
    tokens = torch.randint(0, 64, (ROWS, 8), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    return kind(model=(model or tiny_llama)(), args=args, train_dataset=rows)


def train(folder: Path, name: str, *, steps: int = STEPS, resume: bool | str = False, **options: Any) -> None:
    """One run, see :func:`trainer_of`. One that is over is left alone: the Trainer would make another step."""
    if not (folder / f"checkpoint-{steps}").is_dir():
        trainer_of(folder, name, steps=steps, **options).train(resume_from_checkpoint=resume or None)


def tiny_llama(seed: int = 0) -> torch.nn.Module:
    """With dropout, so that random numbers have to come back too."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**MODEL, attention_dropout=0.1))


@contextlib.contextmanager
def clean_state() -> Iterator[None]:
    """For one run of several in a process: Accelerate keeps its own in singletons and in the environment."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


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


def start(job: Callable[[], Any], world: int, log: Path, *, threads: int = 1) -> list[int]:
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
            torch.set_num_threads(threads)
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
