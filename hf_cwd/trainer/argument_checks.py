"""Checks of TrainingArguments, before a model is loaded or an optimizer is made.

:mod:`hf_cwd.trainer.start_checks` looks at the optimizer before the first step,
:mod:`hf_cwd.trainer.callbacks.optimizer_guard` and :mod:`hf_cwd.trainer.gradient_guard` look at each step.
"""

import os
from typing import Any

import torch

from hf_cwd.rules import COMMON, RULES, Rule
from hf_cwd.trainer import deepspeed
from hf_cwd.trainer.optim_args import as_text, flags, optimizer_arguments
from hf_cwd.trainer.optim_names import PREFIX, chosen, names, unknown_name

MINIMUM_TRANSFORMERS = "5.2"


def check_training_arguments(args: Any) -> None:
    """Checks the optimizer's arguments; called at the start of ``TrainingArguments.__post_init__``.

    Raises:
        ValueError: see :func:`hf_cwd.trainer.optim_args.optimizer_arguments` and
            :func:`hf_cwd.trainer.deepspeed.adopt_section`; also an unknown name that begins like ours.
        RuntimeError: see :func:`hf_cwd.trainer.deepspeed.check_tools`.
        ImportError: transformers is too old for our names.
    """
    if deepspeed.is_used(args):
        deepspeed.adopt_section(args)
    name = chosen(args)
    if name not in names():
        _check_other_name(name)
        return
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version(MINIMUM_TRANSFORMERS):
        raise ImportError(
            f"--optim {name} needs transformers >= {MINIMUM_TRANSFORMERS}, found {transformers.__version__}: "
            f"pip install -U 'transformers>={MINIMUM_TRANSFORMERS}'"
        )
    if deepspeed.is_used(args):
        deepspeed.check_tools(name)
    args.optim_args = as_text(args.optim_args)
    for flag, value in flags(args).items():
        setattr(args, flag, value)
    arguments = optimizer_arguments(args)
    rule = RULES[name.removeprefix(PREFIX)]
    declared = {**COMMON, **rule.hyperparameters}
    rule.checked_hyperparameters({key: each.default for key, each in declared.items()} | arguments)


def _check_other_name(name: str) -> None:
    """Raises ValueError that suggests the nearest name; transformers would only list its own names."""
    from transformers.training_args import OptimizerNames

    valid = [member.value for member in OptimizerNames]
    if name not in valid and (error := unknown_name(name, valid)) is not None:
        raise ValueError(error)


def check_finished_arguments(args: Any) -> None:
    """Checks parallelism and DeepSpeed; called at the end of ``TrainingArguments.__post_init__``.

    Raises:
        ValueError: see :func:`check_sharding` and :func:`hf_cwd.trainer.deepspeed.check`.
    """
    name = chosen(args)
    if name in names():
        check_sharding(name, RULES[name.removeprefix(PREFIX)], args)
        deepspeed.drop_section(args)
        deepspeed.check(args, name, optimizer_arguments(args))
        deepspeed.meet(args)


def check_sharding(name: str, rule: Rule, args: Any) -> None:
    """Refuses the kinds of parallelism that the optimizer does not support.

    It is called with finished TrainingArguments, and again when the optimizer is made. FSDP2, tensor parallelism and
    their combinations need no check. Accelerate's configuration comes in environment variables, and a Trainer with
    ``--fsdp`` leaves them set for the next one.

    Raises:
        ValueError: context or sequence parallelism; FSDP version 1 with a rule for matrices, or with flattened
            parameters.
    """
    sizes = args.parallelism_config
    if sizes is None and _is_true("ACCELERATE_USE_PARALLELISM_CONFIG"):
        from accelerate import ParallelismConfig

        sizes = ParallelismConfig()  # from the environment
    if sizes is not None and sizes.cp_size > 1:
        raise ValueError(
            f"--optim {name} does not support cp_size={sizes.cp_size}: torch has context parallelism for the attention "
            "of GPUs only, and it has not been tried with hf_cwd. Set cp_size to 1; dp_shard_size, dp_replicate_size "
            "and tp_size are supported"
        )
    if sizes is not None and sizes.sp_size > 1:
        raise ValueError(
            f"--optim {name} does not support sp_size={sizes.sp_size}: Accelerate's sequence parallelism is "
            "DeepSpeed's Ulysses, which has not been tried with hf_cwd. Set sp_size to 1"
        )
    # The plugin's arguments come from --fsdp and --fsdp_config; transformers' defaults differ by version.
    plugin = args.fsdp_plugin_args
    if plugin is None and not _is_true("ACCELERATE_USE_FSDP"):
        return
    plugin = plugin or {}
    if plugin.get("fsdp_version", int(os.environ.get("FSDP_VERSION", "1"))) != 1:
        return
    if rule.matrix is not None:
        raise ValueError(
            f"--optim {name} needs whole matrices, and FSDP version 1 flattens them: use FSDP2, by fsdp_version: 2 in "
            "--fsdp_config or in the configuration of `accelerate launch`"
        )
    if not plugin.get("use_orig_params", _is_true("FSDP_USE_ORIG_PARAMS")):
        raise ValueError(
            f"--optim {name} under FSDP version 1 needs use_orig_params: without it norms and biases are flattened "
            "into one parameter with the matrices, and decayed with them. Give fsdp_use_orig_params: true, or FSDP2 by "
            "fsdp_version: 2, in --fsdp_config or in the configuration of `accelerate launch`"
        )


def check_world(args: Any) -> None:
    """Raises ValueError if several processes were started and each would train on its own.

    Without an accelerator, transformers trains them together only if ``--use_cpu`` is given.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    started = torch.distributed.get_world_size() if together else 1
    if started > 1 and args.world_size == 1:
        raise ValueError(
            f"{started} processes were started, but TrainingArguments have world_size=1, so that each would train a "
            "model of its own. On a machine without accelerators add --use_cpu"
        )


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")
