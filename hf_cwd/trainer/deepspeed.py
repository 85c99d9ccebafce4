"""DeepSpeed under the Trainer: reads and checks its configuration together with ``--optim cwd_*``."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from packaging.version import Version

from hf_cwd.distributed import deepspeed_zero
from hf_cwd.log import warn_once
from hf_cwd.trainer.optim_args import as_text, written
from hf_cwd.trainer.optim_names import PREFIX, chosen, names, unknown_name

# Features that do not work with these optimizers, or are untested: a key, whether its value turns the feature on, and
# the name of the feature.
REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("zero_optimization.zero_hpz_partition_size", lambda size: size > 1, "hpZ"),
    ("zero_optimization.mics_shard_size", lambda size: size > 0, "MiCS"),
    ("zero_optimization.zero_quantized_weights", bool, "ZeRO++"),
    ("zero_optimization.zero_quantized_nontrainable_weights", bool, "ZeRO++"),
    ("zero_optimization.zero_quantized_gradients", bool, "ZeRO++"),
    ("zero_optimization.zeropp_loco_param", bool, "ZeRO++"),
    ("zero_optimization.offload_param.device", lambda device: device not in ("none", None), "parameter offload"),
    ("zero_optimization.cpu_offload_params", bool, "parameter offload"),
    ("zero_optimization.offload_optimizer.device", lambda device: device == "nvme", "NVMe offload"),
    ("zero_optimization.offload_optimizer.ratio", lambda ratio: ratio != 1, "partial offload"),
    ("zero_optimization.offload_optimizer.super_offload", bool, "SuperOffload"),
    ("zero_optimization.zenflow", bool, "ZenFlow"),
    ("bf16.bf16_master_weights_and_grads", bool, "bf16 master weights"),
    ("bf16.bf16_optimizer_states", bool, "bf16 master weights"),
    ("fp16.fp16_master_weights_and_grads", bool, "fp16 master weights"),
    ("checkpoint.load_universal", bool, "universal checkpoints"),
    ("tensor_parallel.autotp_size", lambda size: size > 1, "tensor parallelism"),
    ("sequence_parallel_size", lambda size: size > 1, "Ulysses sequence parallelism"),
    ("expert_parallel", bool, "expert parallelism"),
    ("pipeline", bool, "pipeline parallelism"),
)


def is_used(args: Any) -> bool:
    """Whether TrainingArguments or ``accelerate launch`` ask for DeepSpeed; TrainingArguments need not be finished."""
    return bool(args.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true")


def adopt_section(args: Any) -> None:
    """Copies an ``"optimizer"`` section that names one of our optimizers into ``optim`` and ``optim_args``.

    Called before transformers reads the configuration. :func:`drop_section` then removes the section.

    Raises:
        ValueError: the section contradicts a flag, or names another optimizer while ``--optim`` names one of ours.
    """
    section = _read(args).get("optimizer")
    if not section:
        return
    type_name, flag = str(section.get("type")), chosen(args)
    name = type_name.lower()
    if not name.startswith(PREFIX):
        if flag.startswith(PREFIX):
            raise ValueError(
                f"--optim {flag} is given, and DeepSpeed's configuration has an optimizer of its own, which would "
                f'replace it: delete the line "optimizer": {{"type": "{type_name}", ...}} from it'
            )
        return
    if name not in names():
        raise ValueError(f"DeepSpeed's configuration names the optimizer {type_name}: {unknown_name(name)}")
    default = next(field.default for field in dataclasses.fields(args) if field.name == "optim")
    if flag not in (name, str(getattr(default, "value", default))):
        raise ValueError(
            f'--optim {flag} is given, and DeepSpeed\'s configuration says "optimizer": {{"type": "{type_name}", '
            "...}: delete one of them"
        )
    values = {key: value for key, value in section.get("params", {}).items() if value != "auto"}
    for key, attribute in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        value = values.pop(key, getattr(args, attribute))
        if _number(value) != _number(getattr(args, attribute)):
            raise ValueError(
                f'DeepSpeed\'s configuration says "{key}": {value}, and --{attribute} is {getattr(args, attribute)}: '
                f'write "{key}": "auto" there, or give --{attribute} {value}'
            )
    texts = list(filter(None, [as_text(args.optim_args)]))
    args.optim = name
    args.optim_args = ",".join(texts + [f"{key}={written(value)}" for key, value in values.items()]) or None


def drop_section(args: Any) -> None:
    """Removes the section of :func:`adopt_section` from the configuration that transformers has read."""
    plugin = getattr(args, "deepspeed_plugin", None)
    config = {} if plugin is None else plugin.hf_ds_config.config
    if str(config.get("optimizer", {}).get("type")).lower().startswith(PREFIX):
        del config["optimizer"]
        # Complaints that compare the section with flags of other optimizers.
        mismatches = getattr(plugin.hf_ds_config, "mismatches", [])
        mismatches[:] = [line for line in mismatches if not line.startswith("- ds optimizer.")]


def check(args: Any, name: str, arguments: Mapping[str, Any]) -> None:
    """Checks the configuration; called with finished TrainingArguments, and again when the optimizer is made.

    Args:
        name: the value of ``--optim``.
        arguments: the optimizer's keyword arguments.

    Raises:
        ValueError: the configuration asks for something that does not work with hf_cwd, or is untested.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None:
        return
    config = plugin.hf_ds_config.config
    for key, asks, what in REFUSED:
        value = _value(config, key)
        if value is not None and value != "auto" and asks(value):
            raise ValueError(
                f'--optim {name} has not been tried with DeepSpeed\'s {what} ("{key}": {value!r}): leave it out of the '
                "configuration"
            )
    if config.get("zero_force_ds_cpu_optimizer", False):
        raise ValueError(
            f'--optim {name} is given, and DeepSpeed\'s configuration says "zero_force_ds_cpu_optimizer": true, which '
            "puts DeepSpeedCPUAdam in its place: delete that line"
        )
    if "scheduler" in config and any(argument.endswith("_lr") for argument in arguments):
        raise ValueError(
            f"--optim_args {args.optim_args!r} sets a second learning rate, which the scheduler of DeepSpeed's "
            'configuration overwrites: delete its "scheduler" line, and use --lr_scheduler_type'
        )
    low, high = map(Version, deepspeed_zero.TESTED.split(" to "))
    if not low <= Version(deepspeed_zero.version()) <= high:
        warn_once(
            f"DeepSpeed {deepspeed_zero.version()} has not been tried with hf_cwd, whose tests run with "
            f"{deepspeed_zero.TESTED}"
        )


def meet(args: Any) -> None:
    """Initialises DeepSpeed's communication on CPUs, where Accelerate initialises only torch's (``--use_cpu``).

    Otherwise DeepSpeed assumes one process, and refuses the batch size when stage 3 partitions a model at load time.
    """
    if args.use_cpu and is_used(args) and torch.distributed.is_initialized():
        from deepspeed import comm

        if not comm.is_initialized():
            comm.init_distributed("gloo", verbose=False)


def keep_ours() -> None:
    """Prevents Accelerate from replacing our optimizer by DeepSpeedCPUAdam, which it does under offload.

    Called when the optimizer is made; Accelerate reads the configuration after that.
    """
    from accelerate.state import AcceleratorState

    plugin = getattr(AcceleratorState(), "deepspeed_plugin", None) if AcceleratorState._shared_state else None
    if plugin is not None:
        plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False


def missing_tools() -> list[str]:
    """The missing tools among those with which DeepSpeed compiles its communication for CPUs at the first start."""
    compiler = os.environ.get("CXX", "c++")
    lacking = [] if shutil.which(compiler.split()[0]) else [f"a C++ compiler ({compiler})"]
    return lacking if shutil.which("ninja") else [*lacking, "ninja"]


def check_tools(name: str) -> None:
    """Raises RuntimeError if DeepSpeed must compile its communication and a tool for that is missing."""
    if not torch.accelerator.is_available() and (missing := missing_tools()):
        raise RuntimeError(
            f"--optim {name}: without an accelerator DeepSpeed compiles its communication when it starts, and needs "
            f"{' and '.join(missing)} for it. Install that (apt install g++, pip install ninja), or train with FSDP2"
        )


def _read(args: Any) -> Mapping[str, Any]:
    """The configuration as the user wrote it."""
    source = args.deepspeed or (os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") if is_used(args) else None)
    if not source or source == "none":
        return {}
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(source).config


def _number(value: Any) -> Any:
    """Converts text such as ``1e-3``, which YAML does not read as a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _value(config: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config
