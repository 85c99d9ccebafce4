"""Candidates over real tensors, and the rounds in which each of them takes one step, in random order."""

import gc
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.candidates import COPY, MATRIX, Candidate, Copy, states, traffic, try_out
from bench.machine import available, peak_of, resident, synchronize
from bench.shapes import Parameter

WARM_UP = 2
# The threads of a candidate's own OpenMP spin for a while after its step: not into the next candidate's.
PAUSE = 0.002
BUDGET = 0.9  # of the memory that is free
CYCLES = 2e9  # a second, about; a GPU waits for so many while its host queues a step


class Ready(NamedTuple):
    """A candidate over its tensors, warmed up."""

    optimizer: Any
    params: list[Tensor]
    bytes: int
    kept: int | None


class Plan(NamedTuple):
    """What runs, over own copies of all tensors each or over one set taken in turns; and what does not, and why."""

    names: list[str]
    shared: bool
    left_out: dict[str, str]


def plan(
    wanted: Mapping[str, Candidate],
    needed: Sequence[str],
    parameters: Sequence[Parameter],
    dtype: torch.dtype,
    device: str,
    memory: str,
) -> Plan:
    """Tries every candidate on tiny tensors, then sees what fits into memory.

    Args:
        needed: names without which nothing can be compared.
        memory: "own", "shared" or "auto": own copies if they fit.

    Raises:
        MemoryError: not even those fit.
    """
    left_out, state_bytes, kinds = {}, {}, {}
    sizes = [torch.Size(p.shape).numel() * dtype.itemsize for p in parameters]
    weights, largest = sum(sizes), max(sizes)
    for name, candidate in wanted.items():
        reason, found = try_out(candidate, dtype, device)
        if reason is not None:
            left_out[name] = reason
            continue
        kinds[name] = found
        state_bytes[name] = sum(weights // dtype.itemsize * kind.itemsize for kind in found.values())
    gc.collect()
    if missing := [name for name in needed if name in left_out]:
        raise RuntimeError(f"{missing[0]}, the baseline, cannot run: {left_out[missing[0]]}")
    free = int(available(device) * BUDGET)
    spare = {"none": 0, "tensor": 4 * largest, "full": 2 * weights}
    copies = 2 * COPY if "copy" in kinds else 0

    def need(names: Sequence[str], shared: bool) -> int:
        most = max(spare[wanted[name].temporaries] for name in names)
        if not shared:
            return most + copies + 2 * weights + sum(2 * weights + state_bytes[name] for name in names)
        total = most + copies
        for private in {wanted[name].private for name in names}:
            some = (name for name in names if wanted[name].private == private)
            union = {(key, kind) for name in some for key, kind in kinds[name].items()}
            total += 2 * weights + sum(weights // dtype.itemsize * kind.itemsize for _, kind in union)
        return total

    names = list(kinds)
    shared = memory == "shared" or (memory == "auto" and need(names, False) > free)
    for name in sorted(names, key=lambda name: need([name], shared), reverse=True):
        if need(names, shared) <= free or name in needed:
            continue
        names.remove(name)
        left_out[name] = f"no memory: {need([*names, name], shared) / 1e9:.1f} GB with it, {free / 1e9:.1f} GB free"
    if (least := need(names, shared)) > free:
        raise MemoryError(f"{least / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free: take a smaller --model")
    return Plan(names, shared, left_out)


def prepared(
    chosen: Plan, wanted: Mapping[str, Candidate], parameters: Sequence[Parameter], dtype: torch.dtype, device: str
) -> dict[str, Ready]:
    """Every candidate over real tensors, after its first steps."""
    generator = torch.Generator(device).manual_seed(0)

    def random_tensors(scale: float) -> list[Tensor]:
        made = (torch.randn(p.shape, generator=generator, device=device) for p in parameters)
        return [tensor.mul_(scale).to(dtype) for tensor in made]

    weights, gradients, ready = random_tensors(0.02), random_tensors(0.01), {}
    sets: dict[bool, tuple[list[Tensor], list[Tensor], dict[Any, Tensor]]] = {False: (weights, gradients, {})}
    for name in chosen.names:
        private = chosen.shared and wanted[name].private
        if not chosen.shared or private not in sets:
            sets[private] = [w.clone() for w in weights], [g.clone() for g in gradients], {}
        own = [torch.nn.Parameter(w) for w in sets[private][0]]
        for p, g in zip(own, sets[private][1], strict=True):
            p.grad = g
        if not chosen.shared:
            before = resident(device)
        optimizer = wanted[name].make(own)
        if chosen.shared:
            _first_steps(optimizer, own, sets[private][2])
        for _ in range(WARM_UP):
            optimizer.step()
        synchronize(device)
        kept = None
        if not chosen.shared and before is not None and not isinstance(optimizer, Copy):
            state = sum(t.nbytes for p in own for t in states(optimizer, p).values())
            kept = max(0, resident(device) - before - state)
        ready[name] = Ready(optimizer, own, traffic(optimizer, own), kept)
    return ready


def _first_steps(optimizer: Any, params: Sequence[Tensor], slots: dict[Any, Tensor]) -> None:
    """Makes the states one parameter at a time, each in the memory that other candidates' states of that name have."""
    gradients = [p.grad for p in params]
    for p in params:
        p.grad = None
    for position, (p, gradient) in enumerate(zip(params, gradients, strict=True)):
        p.grad = gradient
        optimizer.step()
        p.grad = None
        for key, tensor in states(optimizer, p).items():
            optimizer.state[p][key] = slots.setdefault((key, tensor.dtype, position), tensor)
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient


def extra_memory(ready: Ready, device: str) -> int | None:
    """Bytes above parameters, gradients and states: what the optimizer keeps, and what a step needs for a while.

    Whatever else the process does can only add to it: the least of three.
    """
    peaks = [peak_of(ready.optimizer.step, device) for _ in range(3)]
    return None if None in peaks else min(peaks) + (ready.kept or 0)


class Times(NamedTuple):
    """Seconds of each candidate, one a round."""

    step: dict[str, list[float]]
    host: dict[str, list[float]]


def renew(params: Sequence[Tensor]) -> None:
    """Gradients of equal shapes change places: in training, too, they lie elsewhere in each step."""
    alike: dict[torch.Size, list[Tensor]] = {}
    for p in params:
        alike.setdefault(p.shape, []).append(p)
    for some in alike.values():
        gradients = [p.grad for p in some]
        for p, gradient in zip(some, gradients[1:] + gradients[:1], strict=True):
            p.grad = gradient


def rounds(ready: Mapping[str, Ready], pairs: int, device: str, limit: float, seed: int = 0) -> Times:
    """In each round every candidate steps once, in random order.

    On a GPU a step's time is the device's, between two events, while it is busy with something else until the host has
    queued everything; the host's is the time until ``step()`` returns.

    Args:
        limit: seconds after which no round begins.
    """
    order, names = random.Random(seed), list(ready)
    times = Times({name: [] for name in names}, {name: [] for name in names})
    delay = dict.fromkeys(names, 0.05)
    gc.collect()
    gc.disable()
    try:
        start = time.monotonic()
        for done in range(-1, pairs):  # the first round is not counted: it tells how long to keep a GPU busy
            if done > 0 and time.monotonic() - start > limit:
                break
            for name in order.sample(names, len(names)):
                renew(ready[name].params)
                run = ready[name].optimizer.step
                step, host = _on_cpu(run) if device == "cpu" else _on_gpu(run, delay[name])
                if done >= 0:
                    times.step[name].append(step)
                    times.host[name].append(host)
                else:
                    delay[name] = min(0.2, 2 * host + 1e-3)
    finally:
        gc.enable()
    return times


def _on_cpu(run: Any) -> tuple[float, float]:
    time.sleep(PAUSE)
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return seconds, seconds


def _on_gpu(run: Any, delay: float) -> tuple[float, float]:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(delay * CYCLES))
    first.record()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3, host


def product_rate(device: str, family: str, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """TFLOP/s of a large product of matrices: what Muon's iteration could reach at most, about."""
    if family != MATRIX:
        return None
    n, repeats = (8192, 10) if device == "cuda" else (1024, 5)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e12
