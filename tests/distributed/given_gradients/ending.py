"""Two ranks, of which one ends, or stops joining in, before the second step; the other writes what happens to it.

RANK=0 WORLD_SIZE=2 python -m tests.distributed.given_gradients.ending FOLDER exits|stalls
"""

import datetime
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from hf_cwd.rules import RULES
from tests.distributed.given_gradients.small import give, make, parameters

TIMEOUT = 8  # seconds, of the process group
DEADLINE = 120  # after which a stalled rank gives up waiting for the other's report


def main():
    folder, ending, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", f"file://{folder}/{ending}", rank=rank, world_size=2, timeout=timeout)
    rule = next(name for name, kind in RULES.items() if kind.matrix is not None)
    params = parameters(True)
    optimizer = make(params, rule)
    give(params, 1)
    optimizer.step()
    report, started = folder / f"{ending}.txt", time.monotonic()
    if rank == 1:
        if ending == "exits":
            os._exit(1)
        while not report.exists() and time.monotonic() - started < DEADLINE:
            time.sleep(0.1)
        os._exit(0)
    try:
        optimizer.step()
        text = "no error"
    except RuntimeError as error:
        text = str(error)
    (folder / "writing").write_text(f"{time.monotonic() - started}\n{text}")
    (folder / "writing").rename(report)
    os._exit(0)  # the process group cannot be taken down in order


if __name__ == "__main__":
    main()
