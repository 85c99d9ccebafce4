"""One training of bench/gpu_zero.py: the real Trainer with or without DeepSpeed, and what DeepSpeed made of it."""

import contextlib
import gc
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import train as bench_train

ROOT = Path(__file__).resolve().parents[2]
STEPS, FP16_STEPS = 6, 20  # in float16 some are skipped, until the loss scale is small enough
SCALER = {"enabled": "auto", "initial_scale_power": 24, "hysteresis": 1}  # too large at first
EXACT = "ns_dtype=float32"  # Muon's in float32: in bfloat16 a last bit of a gradient moves half a percent of the result
# For each optimizer its learning rate and weight decay, with which the decay is some tenths of what weights go.
OPTIMIZERS = {
    "cwd_adamw": (1e-3, 10.0),
    "cwd_lion": (3e-4, 10.0),
    "cwd_muon": (3e-3, 3.0),
    "cwd_sgd:momentum=0.9": (0.1, 0.1),
}


class Run(NamedTuple):
    """What a training ended with. ``figures``: the last that the optimizer logged, by key."""

    weights: dict[str, Tensor]
    losses: list[float]
    figures: dict[str, float]


class Setting(NamedTuple):
    """What all trainings share. ``folder``: where the model is that they start from, and checkpoints."""

    device: str
    folder: Path
    rows: int
    tokens: int

    def train(
        self, name: str, precision: str, config: str | None = None, *, saves: bool = False, resumes: bool = False
    ) -> Run:
        """One training, from a clean state: Accelerate keeps its own in singletons and in the environment.

        Args:
            name: ``NAME`` or ``NAME:OPTIM_ARGS`` of the optimizer.
            config: a file of configs/deepspeed; without one, without DeepSpeed.
            saves, resumes: writes a checkpoint half way, goes on from it.

        Raises:
            ValueError: under DeepSpeed, something is not as it was asked for.
        """
        from accelerate.state import AcceleratorState, GradientState
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        environment = dict(os.environ)
        try:
            return self._train(name, precision, config, saves, resumes)
        finally:
            os.environ.clear()
            os.environ.update(environment)
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            unset_hf_deepspeed_config()
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def _train(self, name: str, precision: str, config: str | None, saves: bool, resumes: bool) -> Run:
        from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

        import hf_cwd  # noqa: F401  registers the names

        (optim, _, given), (rate, decay) = name.partition(":"), OPTIMIZERS[name]
        own = [EXACT] if optim == "cwd_muon" and precision == "fp32" else []
        steps = FP16_STEPS if precision == "fp16" else STEPS
        runs = self.folder / "runs"
        args = TrainingArguments(  # before the model, which stage 3 cuts as it is loaded
            output_dir=str(runs),
            optim=optim,
            optim_args=",".join([*filter(None, [given]), *own]) or None,
            learning_rate=rate,
            weight_decay=decay,
            max_steps=steps,
            seed=0,
            logging_steps=1,
            per_device_train_batch_size=self.rows,
            use_cpu=self.device == "cpu",
            report_to="none",
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            dataloader_pin_memory=self.device != "cpu",
            save_strategy="steps" if saves else "no",
            save_steps=steps // 2,
            disable_tqdm=True,
            deepspeed=configuration(config) if config else None,
        )
        # That attention rounds alike in all runs.
        model = AutoModelForCausalLM.from_pretrained(
            self.folder / "model", dtype=torch.float32, attn_implementation="eager"
        )
        data = bench_train.rows(model.config.vocab_size, self.tokens, steps * self.rows)
        trainer = Trainer(model=model, args=args, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=str(runs / f"checkpoint-{steps // 2}") if resumes else None)
            if config:
                check(trainer, config, self.device, steps)
            logs = trainer.state.log_history
            return Run(
                weights=masters(model) if config else parameters(model),
                losses=[entry["loss"] for entry in logs if "loss" in entry],
                figures={key: value for entry in logs for key, value in entry.items() if key.startswith("cwd/")},
            )
        finally:
            if getattr(trainer, "deepspeed", None) is not None:
                trainer.deepspeed.destroy()  # its hooks would keep it, with everything in it


def configuration(name: str) -> dict[str, Any]:
    config = json.loads((ROOT / f"configs/deepspeed/{name}.json").read_text())
    return config | {"fp16": SCALER}


def check(trainer: Any, name: str, device: str, steps: int) -> None:
    """Raises ValueError unless ours stepped, each time, in the engine that was asked for, and where it should."""
    import deepspeed

    from hf_cwd.trainer.wrappers import innermost

    engine, optimizer, offload = trainer.deepspeed, innermost(trainer.optimizer), name.endswith("_offload")
    masters = list(optimizer.state)  # after a step of stage 3 the groups are empty
    # What travels between the CPU and the GPU.
    staged = [t for exchange in optimizer.exchanges for t in exchange.staging._memory.values()]
    own = offload and device != "cpu"
    pairs = {
        "the engine's optimizer is ours": (engine.basic_optimizer is optimizer, True),
        "DeepSpeedCPUAdams made": (deepspeed.ops.adam.DeepSpeedCPUAdam.optimizer_id, 0),
        "stage": (engine.zero_optimization_stage(), int(name.removeprefix("zero")[0])),
        "CPU offload": (engine.zero_cpu_offload(), offload),
        "masters are on": ({p.device.type for p in masters}, {"cpu" if offload else device}),
        "matrices pass through memory": (bool(staged), own and bool(optimizer.exchanges)),
        "which is page-locked": ({t.is_pinned() for t in staged}, {True} if staged else set()),
        "steps": ({int(state["step"]) for state in optimizer.state.values() if state}, {steps - engine.skipped_steps}),
    }
    if engine.fp16_enabled():
        pairs["some steps are skipped"] = (1 <= engine.skipped_steps <= steps // 2, True)
    else:
        pairs["skipped steps"] = (engine.skipped_steps, 0)
    wrong = [f"{what}: {found} instead of {wanted}" for what, (found, wanted) in pairs.items() if found != wanted]
    if wrong:
        raise ValueError(", ".join(wrong))


def masters(model: nn.Module) -> dict[str, Tensor]:
    """What DeepSpeed steps, by name; raises ValueError unless the model's own weights are that, rounded."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

    found = {}
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id"):  # of one process, whose part is all of it
            whole = safe_get_local_fp32_param(p).detach()[: p.ds_numel].view(p.ds_shape).cpu().clone()
        else:
            whole = safe_get_full_fp32_param(p).detach().cpu().clone()
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            if not torch.equal(p.detach().cpu(), whole.to(p.dtype)):
                raise ValueError(f"{name}: the model's weight is not the optimizer's, rounded to {p.dtype}")
        found[name] = whole
    return found


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def save_model(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The model that all start from; its weights, which bfloat16 holds exactly, as all are to start from the same."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config)).bfloat16().float()
    model.save_pretrained(folder / "model")
    return parameters(model)


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Callable[[], None]]:
    """Gives a function that joins a group of one process, which the environment names as a launcher does."""

    def join() -> None:
        import deepspeed

        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if device == "cuda":
            torch.cuda.set_device(0)
        deepspeed.init_distributed("nccl" if device == "cuda" else "gloo", auto_mpi_discovery=False)

    try:
        yield join
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def prepare(device: str) -> None:
    """For a process of these trainings only: the same run twice is the same, and new memory is no number."""
    os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "DS_ACCELERATOR": device}
    if device == "cuda":  # with several, the Trainer without DeepSpeed would use them all
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(min(4, torch.get_num_threads()))  # beside the other parts
