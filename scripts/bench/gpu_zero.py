"""The part of gpu_check about DeepSpeed: every rule under ZeRO on one GPU, beside the Trainer without DeepSpeed.

It is one process in a group of its own: what ranks exchange is not tried, but all that each of them does is, with the
GPU's streams, page-locked memory under CPU offload, and float16 with its loss scaler.
"""

import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.gpu_zero_run import OPTIMIZERS, Run, Setting, prepare, process_group, save_model

Say = Callable[[str, bool | None, str], None]
MODEL = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
ROWS, TOKENS = 8, 128  # of a step
ZERO = ("zero2", "zero3", "zero2_offload", "zero3_offload")
# Files of configs/deepspeed, with a precision each.
CASES = [
    *((config, "fp32") for config in ZERO),
    *((config, "fp16") for config in ("zero2", "zero3_offload")),
    *((config, "bf16") for config in ZERO),
]
# For each precision and optimizer, how far from the Trainer without DeepSpeed it may end, as a share of the way that
# the weights went. In float32 the norm of the gradients rounds otherwise, and so does the kernel of CPU offload, which
# turns a direction that nearly cancels. In bfloat16 DeepSpeed has the whole model in it, autocast its products only.
LARGEST = {
    "fp32": dict(zip(OPTIMIZERS, (5e-3, 2e-2, 5e-3, 2e-3), strict=True)),
    "bf16": dict(zip(OPTIMIZERS, (0.2, 0.3, 0.2, 0.2), strict=True)),
}
LAST = 20  # seconds that are left for what was begun


def zero(
    say: Say,
    seconds: float = 150.0,
    device: str = "cuda",
    names: Sequence[str] = tuple(OPTIMIZERS),
    cases: Sequence[tuple[str, str]] = CASES,
    model: Mapping[str, Any] = MODEL,
) -> None:
    """A checkpoint, and every optimizer in every case."""
    if importlib.util.find_spec("deepspeed") is None:
        say("deepspeed", None, "not installed: nothing to check")
        return
    begin = time.monotonic()
    prepare(device)
    with tempfile.TemporaryDirectory() as folder, process_group(device) as join:
        setting = Setting(device, Path(folder), ROWS, TOKENS)
        start = save_model(setting.folder, dict(model))
        # All of these first: in a process group the Trainer trains otherwise.
        asked = {precision for _, precision in cases}
        pairs = [(name, precision) for precision in LARGEST for name in names if precision in asked]
        plain = {(name, precision): setting.train(name, precision) for name, precision in pairs}
        say("without DeepSpeed", None, f"{len(plain)} runs, {time.monotonic() - begin:.1f} s")
        join()
        say("checkpoint", *resumed(setting, "zero3_offload"))
        for config, precision in cases:
            late = time.monotonic() - begin > seconds - LAST
            found = (None, "left out: no time") if late else compared(setting, config, precision, names, plain, start)
            say(f"{config} {precision}", *found)


def compared(
    setting: Setting,
    config: str,
    precision: str,
    names: Sequence[str],
    plain: Mapping[tuple[str, str], Run],
    start: Mapping[str, Tensor],
) -> tuple[bool, str]:
    """Trains with each of the optimizers; float16, which is nothing's like, only has to learn."""
    wrong, texts, begin = [], [], time.monotonic()
    for name in names:
        short = name.partition(":")[0].removeprefix("cwd_")
        try:
            run = setting.train(name, precision, config)
            first, last = run.losses[0], run.losses[-1]
            texts.append(f"{short} {first:.2f} to {last:.2f}")
            if not (all(map(math.isfinite, run.losses)) and last < first):
                raise ValueError(f"losses {run.losses}")
            if precision == "fp16":
                continue
            reference = plain[name, precision]
            share = distance(run.weights, reference.weights) / distance(start, reference.weights)
            texts[-1] = f"{short} {share:.0e}"
            if not share <= LARGEST[precision][name]:
                raise ValueError(f"{share:.1e} of the way off, more than {LARGEST[precision][name]:.0e}")
            if precision == "fp32" and (differing := differing_figures(run.figures, reference.figures)):
                raise ValueError(f"logged {differing}")
        except Exception as error:  # whatever it is, the other optimizers go on
            wrong.append(f"{short}: {said(error)}")
    text = f"{'losses' if precision == 'fp16' else 'of the way off:'} {', '.join(texts)}"
    return not wrong, "; ".join([*wrong, f"{text}; {time.monotonic() - begin:.1f} s"])


def resumed(setting: Setting, config: str) -> tuple[bool, str]:
    """Muon, which has most to restore, in float32, in which the weights are the masters."""
    begin = time.monotonic()
    try:
        whole = setting.train("cwd_muon", "fp32", config, saves=True)
        found = setting.train("cwd_muon", "fp32", config, resumes=True)
    except Exception as error:
        return False, said(error)
    largest = max(float((found.weights[name] - x).abs().max()) for name, x in whole.weights.items())
    text = f"{config} muon: weights differ by {largest:.0e}, losses by "
    losses = max(abs(a - b) for a, b in zip(found.losses, whole.losses, strict=True))
    return largest == losses == 0, f"{text}{losses:.0e}; {time.monotonic() - begin:.1f} s"


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float((x.double() - other[name].double()).square().sum()) for name, x in one.items()))


def differing_figures(found: Mapping[str, float], wanted: Mapping[str, float]) -> str:
    """What was logged with one and not with the other, or differs by more than rounding can explain."""
    keys = found.keys() ^ wanted.keys()
    keys |= {key for key in found.keys() & wanted.keys() if not math.isclose(found[key], wanted[key], rel_tol=1e-2)}
    return ", ".join(f"{key} {found.get(key)} instead of {wanted.get(key)}" for key in sorted(keys))


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
