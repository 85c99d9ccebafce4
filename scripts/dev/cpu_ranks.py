#!/usr/bin/env python
"""Accelerate's FSDP, FSDP2 and ParallelismConfig, and DeepSpeed, on CPU ranks; then as `-m hf_cwd`.

    torchrun --nproc_per_node 2 scripts/dev/cpu_ranks.py script.py --use_cpu --fsdp --optim cwd_adamw ...
    torchrun --nproc_per_node 2 scripts/dev/cpu_ranks.py script.py --use_cpu --deepspeed configs/deepspeed/zero3.json

Accelerate keeps these layouts for accelerators. What runs is its own code, and torch's and DeepSpeed's, with gloo
between the ranks: to try a layout on a laptop, and in tests. With an accelerator for each rank it is not needed.
"""

import os
import sys


def switch_on() -> None:
    """To be called before the first TrainingArguments, Accelerator or PartialState.

    All that the replacements use is local to this function: run as a script this file is the module ``__main__``, which
    the launcher empties for the script that it runs.
    """
    import dataclasses

    import torch
    import torch.distributed.fsdp
    from accelerate.state import DistributedType, PartialState

    distributed, device, prepare_backend = torch.distributed, torch.device("cpu"), PartialState._prepare_backend

    def _prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
        backend, kind = prepare_backend(self, True, sagemaker_dp, "gloo")
        if kind != DistributedType.MULTI_CPU:
            return backend, kind  # a single process
        if not distributed.is_initialized():
            distributed.init_process_group(backend)
        # For MULTI_CPU Accelerate leaves FSDP and parallelism configurations out, without a word.
        return backend, DistributedType.MULTI_XPU

    def set_device(self):
        self.device = device

    PartialState._prepare_backend, PartialState.set_device = _prepare_backend, set_device
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # DDP takes no device_ids on a CPU

    @dataclasses.dataclass
    class CPUOffloadPolicy(distributed.fsdp.CPUOffloadPolicy):
        pin_memory: bool = False  # it is an accelerator's driver that pins memory

    distributed.fsdp.CPUOffloadPolicy = CPUOffloadPolicy


def meet() -> None:
    """Instead, for DeepSpeed: it trains on CPUs as it is, once it knows the ranks.

    It knows them where it has started their communication itself, and with --use_cpu Accelerate does that. At stage 3,
    where a model is cut while it is loaded, each would then take itself for the only one, and refuse the batch size.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for a GPU, and warns that there is none
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)


def asks_for_deepspeed() -> bool:
    """By `accelerate launch`, or by the script's own flag."""
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true")
    return launched or any(argument.partition("=")[0] == "--deepspeed" for argument in sys.argv[1:])


if __name__ == "__main__":
    from hf_cwd import launcher

    if asks_for_deepspeed():
        meet()
    else:
        switch_on()
    launcher.main(sys.argv[1:], program="cpu_ranks.py")
