"""Tells by the names of a checkpoint's files under which parallelism it was saved, also without a manifest."""

import os
import re
from pathlib import Path

WHOLE = "one process or DDP"
FSDP = "FSDP with state_dict_type {}"
STAGE_3, STAGES_1_2 = "ZeRO-3", "ZeRO-1 or 2"
LOAD_TIME = "a DistributedConfig"
_WEIGHTS = re.compile(r"(model|adapter_model|pytorch_model)(-.*)?\.(safetensors|bin)")
_STATES = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_.*_optim_states\.pt")
_PARTITIONED_WEIGHTS = re.compile(r"(?:bf16_)?zero_pp_rank_\d+_mp_.*_model_states\.pt")


def saved_under(checkpoint: str | os.PathLike) -> str | None:
    """One of the texts above; None if the names do not tell, for instance without optimizer states.

    The names are those of transformers 5, accelerate 1 and DeepSpeed 0.19.
    """
    names = {path.name for path in Path(checkpoint).iterdir()}
    if any(name.startswith("cwd_part-") for name in names):
        return LOAD_TIME
    if "latest" in names:
        return _zero(Path(checkpoint, Path(checkpoint, "latest").read_text(encoding="utf-8").strip()))
    if "optimizer.bin" in names:
        return FSDP.format("FULL_STATE_DICT")
    if "optimizer_0" in names:
        return FSDP.format("SHARDED_STATE_DICT")
    return WHOLE if "optimizer.pt" in names else None


def _zero(states: Path) -> str | None:
    """Every rank saves a file of optimizer states, and at stage 3 also one of weights."""
    names = [path.name for path in states.iterdir()] if states.is_dir() else []
    ranks = {match[1] for match in map(_STATES.fullmatch, names) if match}
    stages = STAGE_3 if any(map(_PARTITIONED_WEIGHTS.fullmatch, names)) else STAGES_1_2
    return zero(stages, len(ranks)) if ranks else None


def zero(stages: str, ranks: int) -> str:
    """The text for DeepSpeed's ZeRO, which can be resumed on the same number of ranks only."""
    return f"DeepSpeed's {stages} on {ranks} {'rank' if ranks == 1 else 'ranks'}"


def advice(checkpoint: str | os.PathLike, parallelism: str) -> str:
    """How to continue from a checkpoint that was saved under another parallelism."""
    has_weights = any(map(_WEIGHTS.fullmatch, os.listdir(checkpoint)))
    maker = "accelerate merge-weights" if parallelism.startswith("FSDP") else "zero_to_fp32.py in it"
    made = "" if has_weights else f", which {maker} makes"
    return f"Resume it under {parallelism}, or begin a new run by from_pretrained from its weights{made}"
