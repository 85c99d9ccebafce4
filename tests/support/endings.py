"""How many launches of two ranks end with the status that they should, on a machine that has too much to do.

    python -m tests.support.endings LAUNCHES [--at_once 6] [--script_raises] [--unsettled]

Each launch is two processes with an interpreter each that begins and ends `scripts/two_ranks.py` under the launcher.
They are forked from this process, which has imported what they need: that is what makes hundreds of them affordable.
"""

import argparse
import atexit
import collections
import gc
import os
import shutil
import tempfile
from pathlib import Path

import torch._dynamo
import torch.distributed.tensor
import torch.testing
from torch.nn.parallel import DistributedDataParallel  # noqa: F401

import hf_cwd.optim.named  # noqa: F401
from hf_cwd import ending, launcher

SCRIPT = Path(__file__).parents[1] / "trainer/scripts/two_ranks.py"


def fork_ranks(launches: int, at_once: int, folder: Path) -> list[str] | None:
    """The arguments of the script in each rank; None in the process that started them, when all have ended."""
    running, ended, started = {}, collections.Counter(), 0
    while started < launches or running:
        while started < launches and len(running) < 2 * at_once:
            for rank in range(2):
                log = folder / f"{started}-{rank}.log"
                pid = os.fork()
                if not pid:
                    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
                    os.dup2(descriptor, 1)
                    os.dup2(descriptor, 2)
                    os.environ["RANK"] = str(rank)
                    return [str(folder / f"{started}.store")]
                running[pid] = log
            started += 1
        pid, status = os.wait()
        log, code = running.pop(pid), os.waitstatus_to_exitcode(status)
        ended[code] += 1
        if code < 0:
            print(f"{log.stem} ended with {code}: {log.read_text()[-200:]}", flush=True)
    print(f"{launches} launches of two ranks ended with", dict(ended), flush=True)
    return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("launches", type=int)
    parser.add_argument("--at_once", type=int, default=6)
    parser.add_argument("--script_raises", action="store_true")
    parser.add_argument("--unsettled", action="store_true", help="as without hf_cwd.ending")
    args = parser.parse_args()
    if args.unsettled:
        atexit.unregister(ending.settle)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # so that the ranks do not copy what they share
    folder = Path(tempfile.mkdtemp())
    arguments = fork_ranks(args.launches, args.at_once, folder)
    if arguments is None:
        shutil.rmtree(folder)
    else:
        launcher.main([str(SCRIPT), *arguments, *(["error"] if args.script_raises else [])])


if __name__ == "__main__":
    main()
