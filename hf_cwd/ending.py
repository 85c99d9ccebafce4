"""Prevents gloo from aborting a process when Python exits after a successful run.

A gloo thread that executed a collective often holds the last reference to its tensors, and needs the GIL to release it.
If Python is finalising by then, it ends the thread, and C++ aborts the process with "terminate called without an active
exception", although the results were correct. Destroying the process group is not enough: other references to it (a
DistributedDataParallel, a variable) keep its threads alive.
"""

import os
import sys
import time

TASKS = "/proc/self/task"
PATIENCE = 60.0  # seconds to wait for a thread that stays busy
PAUSE = 0.02  # seconds; a thread that waits for the GIL wakes up every 0.005 s, so that it does not look idle


def settle() -> None:
    """Waits until gloo's threads are idle, then destroys the process group if it still exists; called at exit.

    It does not destroy a process group that has another backend as well, because NCCL may wait for dead ranks. If
    another rank does not join a collective, the process waits until the time-out of the collective. It would also do so
    when Python frees the process group.
    """
    if "torch.distributed" not in sys.modules or not _gloo_rests():
        return
    import torch.distributed as dist

    if dist.is_initialized() and {part.split(":")[1] for part in dist.get_backend_config().split(",")} == {"gloo"}:
        dist.destroy_process_group()


def _gloo_rests() -> bool:
    """Waits until every gloo thread has slept through a pause. False without gloo threads, or after ``PATIENCE``."""
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
    """The state and the numbers of context switches of each gloo thread; empty on a system without /proc."""
    threads = {}
    for task in os.listdir(TASKS) if os.path.isdir(TASKS) else ():
        try:
            with open(f"{TASKS}/{task}/status") as file:
                fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        except OSError:  # the thread has ended
            continue
        if fields["Name"] == "pt_gloo_runloop":
            threads[task] = [fields[key] for key in ("State", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")]
    return threads
