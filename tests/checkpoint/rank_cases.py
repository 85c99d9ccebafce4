"""Two ranks that save apart, fail apart, or by the plain Trainer; FOLDER/results.json says what each saw.

python -m tests.checkpoint.rank_cases FOLDER
"""

import json
import os
import sys
from pathlib import Path

from dev.crash_checkpoints import contents
from dev.forked_runs import finish, start, train, warm_up
from transformers import LlamaForCausalLM, Trainer

from hf_cwd.checkpoint import manifest
from tests.support import garbage


def rank():
    return int(os.environ["RANK"])


def apart(folder, *, patched=True, **options):
    """Each rank is the only one of its node, with a disk of its own.

    transformers 5.23 writes weights on the first node only; patched, on each as it was meant to.
    """
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    if patched:
        LlamaForCausalLM.should_save_on_this_rank = lambda self, is_main_process: is_main_process
    train(folder / f"node-{rank()}", "ddp", steps=3, save_on_each_node=True, save_total_limit=None, **options)


def failing(folder):
    """Rank 1's disk fails at its second checkpoint."""
    describe = manifest.describe

    def fail(directory, names=None):
        if rank() == 1 and "checkpoint-2" in str(directory):
            raise OSError(5, "Input/output error")
        return describe(directory, names)

    manifest.describe = fail
    try:
        train(folder, "ddp", steps=3)
    except (OSError, RuntimeError) as error:
        (folder / f"error-{rank()}").write_text(str(error))


def launch(job, folder):
    codes = finish(start(job, 2, folder / "log"), timeout=120, grace=20)
    assert codes == [0, 0], (folder / "log").read_text()


def main():
    folder = Path(sys.argv[1])
    results = {}
    for name in ("ddp", "fsdp2"):
        warm_up(name, folder)
    garbage.pass_over()
    (folder / "log").unlink()
    launch(lambda: apart(folder), folder)
    nodes = [folder / f"node-{node}" for node in (0, 1)]
    results["apart"] = [
        {path.name: sorted(manifest.verify(path).files) for path in sorted(node.glob("*checkpoint-*"))}
        for node in nodes
    ]
    whole = [contents(node / "checkpoint-3") for node in nodes]
    # The newest is missing on one node, the one before it damaged on the other.
    os.rename(nodes[0] / "checkpoint-3", folder / "gone")
    os.truncate(nodes[1] / "checkpoint-2" / "scheduler.pt", 5)
    os.rename(nodes[1] / "checkpoint-3", folder / "gone too")
    (folder / "log").unlink()
    launch(lambda: apart(folder, resume=True), folder)
    results["resumed apart"] = [contents(node / "checkpoint-3") for node in nodes] == whole
    results["log"] = (folder / "log").read_text()
    codes = finish(start(lambda: apart(folder / "as it is", patched=False), 2, folder / "as it is.log"), timeout=120)
    results["as it is"] = [codes, (folder / "as it is.log").read_text()]
    launch(lambda: failing(folder / "failing"), folder)
    results["failing"] = [(folder / "failing" / f"error-{r}").read_text() for r in (0, 1)]
    results["kept"] = sorted(path.name for path in (folder / "failing").glob("checkpoint-*"))
    for name in ("ddp", "fsdp2"):
        launch(lambda name=name: train(folder / f"plain-{name}", name, steps=3, kind=Trainer), folder)
        paths = sorted((folder / f"plain-{name}").glob("checkpoint-*"))
        results[f"plain-{name}"] = {path.name: sorted(manifest.verify(path).files) for path in paths}
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
