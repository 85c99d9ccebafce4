"""Sharded training under the Trainer: the layouts that an optimizer cannot be trained in are refused, with the fix."""

import os
from typing import Any

from hf_cwd.rules import Rule


def check_sharding(name: str, rule: Rule, args: Any) -> None:
    """Called with finished TrainingArguments, and again where the optimizer is made.

    FSDP2, tensor parallelism and their combinations need nothing. Accelerate's configuration arrives in the
    environment, where a Trainer with ``--fsdp`` leaves it for the next one.

    Raises:
        ValueError: context or sequence parallelism; FSDP version 1 with a rule that needs matrices, or with flattened
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
    # What transformers makes of --fsdp and --fsdp_config; its defaults differ by version.
    plugin = args.fsdp_plugin_args
    if plugin is None and not _is_true("ACCELERATE_USE_FSDP"):
        return
    plugin = plugin or {}
    if plugin.get("fsdp_version", int(os.environ.get("FSDP_VERSION", "1"))) != 1:
        return
    if rule.matrix is not None:
        raise ValueError(
            f"--optim {name} needs whole matrices, of which FSDP version 1 leaves nothing but flat pieces: use FSDP2, "
            "by fsdp_version: 2 in --fsdp_config or in the configuration of `accelerate launch`"
        )
    if not plugin.get("use_orig_params", _is_true("FSDP_USE_ORIG_PARAMS")):
        raise ValueError(
            f"--optim {name} under FSDP version 1 needs use_orig_params: without it norms and biases are flattened "
            "into one parameter with the matrices, and decayed with them. Give fsdp_use_orig_params: true, or FSDP2 by "
            "fsdp_version: 2, in --fsdp_config or in the configuration of `accelerate launch`"
        )


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")
