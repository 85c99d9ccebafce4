"""Trains a tiny model on two ranks and ends without a word to its process group, as scripts do: STORE.

Gloo's threads get the processor when nobody else wants it. What they leave for later is therefore left for very late.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_cwd import CWDMuon

dist.init_process_group("gloo", f"file://{sys.argv[1]}", rank=int(os.environ["RANK"]), world_size=2)
layers = [torch.nn.Linear(16, 16, bias=False) for _ in range(2)]
model = DistributedDataParallel(torch.nn.Sequential(*layers))
optimizer = CWDMuon(model.parameters(), lr=1e-2, weight_decay=0.1, share="always")
for _ in range(3):
    model(torch.ones(4, 16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as file:
            if "gloo_runloop" in file.read():
                os.sched_setscheduler(int(task), os.SCHED_IDLE, os.sched_param(0))
if "error" in sys.argv:
    raise ValueError("after the last step")
