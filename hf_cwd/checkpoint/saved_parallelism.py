"""In which layout a checkpoint was saved, by the names of its files: also one that has no manifest."""

import os
import re
from pathlib import Path

WHOLE = "one process or DDP"
FSDP = "FSDP with state_dict_type {}"
PARTITIONED, FLAT = "ZeRO-3", "ZeRO-1 or 2"
LOAD_TIME = "a DistributedConfig"
_WEIGHTS = re.compile(r"(model|adapter_model|pytorch_model)(-.*)?\.(safetensors|bin)")
_STATES = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_.*_optim_states\.pt")
_PARTITIONED_WEIGHTS = re.compile(r"(?:bf16_)?zero_pp_rank_\d+_mp_.*_model_states\.pt")


def saved_under(checkpoint: str | os.PathLike) -> str | None:
    """One of the layouts above; None where none can be told, as without optimizer states.

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
    """Each rank has a file of optimizer states, and at stage 3 one of weights."""
    names = [path.name for path in states.iterdir()] if states.is_dir() else []
    ranks = {match[1] for match in map(_STATES.fullmatch, names) if match}
    kind = PARTITIONED if any(map(_PARTITIONED_WEIGHTS.fullmatch, names)) else FLAT
    return zero(kind, len(ranks)) if ranks else None


def zero(kind: str, ranks: int) -> str:
    """DeepSpeed's layout, of a kind of stages and as many ranks, each of which has its part."""
    return f"DeepSpeed's {kind} on {ranks} {'rank' if ranks == 1 else 'ranks'}"


def advice(checkpoint: str | os.PathLike, layout: str) -> str:
    """How to go on from a checkpoint that was saved under a layout."""
    has_weights = any(map(_WEIGHTS.fullmatch, os.listdir(checkpoint)))
    maker = "accelerate merge-weights" if layout.startswith("FSDP") else "zero_to_fp32.py in it"
    made = "" if has_weights else f", which {maker} makes"
    return f"Resume it under {layout}, or begin a new run by from_pretrained from its weights{made}"
