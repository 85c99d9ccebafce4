"""Lets a run of several ranks end with the exit status that it has earned.

A thread of gloo's that executed a collective is often the last to hold its tensors, and needs Python to let go of them.
If it gets to that only after Python has begun to finalise, Python ends the thread, and C++ then aborts the process:
"terminate called without an active exception", after correct results. To destroy the process group does not prevent
that: whatever else holds it (a DistributedDataParallel, a variable) keeps its threads alive.
"""

import os
import sys
import time

TASKS = "/proc/self/task"
PATIENCE = 60.0  # seconds, after which a thread that never rests is left to itself
PAUSE = 0.02  # seconds; a thread that waits for Python wakes up every 0.005, and so is not taken for one that rests


def settle() -> None:
    """Waits until gloo's threads rest, then destroys the process group, if nobody has; called when Python exits.

    A process group with another backend beside gloo stays: NCCL's, when it is destroyed, may wait for ranks that have
    died. A collective that was begun and that another rank does not join holds the process up until its time-out, as it
    would a moment later, when Python frees the process group.
    """
    if "torch.distributed" not in sys.modules or not _gloo_rests():
        return
    import torch.distributed as dist

    if dist.is_initialized() and {part.split(":")[1] for part in dist.get_backend_config().split(",")} == {"gloo"}:
        dist.destroy_process_group()


def _gloo_rests() -> bool:
    """Waits until each of gloo's threads sleeps, and slept all through a pause. False if there are none, or in vain."""
    end = time.monotonic() + PATIENCE
    before = None
    while time.monotonic() < end:
        now = _gloo_threads()
        if now == before:
            return bool(now)
        before = now if all(state.startswith("S") for state, *_ in now.values()) else None
        time.sleep(PAUSE if now else 0)
    return False


def _gloo_threads() -> dict[str, list[str]]:
    """State and numbers of context switches of each; nothing on a system without /proc."""
    threads = {}
    for task in os.listdir(TASKS) if os.path.isdir(TASKS) else ():
        try:
            with open(f"{TASKS}/{task}/status") as file:
                fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        except OSError:  # it has ended
            continue
        if fields["Name"] == "pt_gloo_runloop":
            threads[task] = [fields[key] for key in ("State", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")]
    return threads
