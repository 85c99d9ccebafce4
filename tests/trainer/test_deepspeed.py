"""DeepSpeed as people start it: configs/deepspeed as it is, by a flag or a launcher, a script that knows nothing of it.

Ranks are forked; test_launcher.py has launchers start them.
"""

import json
from pathlib import Path

import pytest

from tests.support import forked_python
from tests.support.forking import DEEPSPEED, fork, fork_ranks
from tests.support.launching import ROOT, finish_all, flags, write_material

HF_CWD = ("-m", "hf_cwd")
ACCELERATE = ("-m", "accelerate.commands.launch")
CONFIGS = sorted(path.stem for path in (ROOT / "configs/deepspeed").glob("*.json"))
RESUMED = ("zero2", "zero3_offload")
STEPS, ACCUMULATION = 6, 2
PARAMETERS = 21  # tensors of the model
# Runs tests/trainer/scripts/unmodified.py with its own arguments, and then with those in $THEN; each run is reported.
SCRIPT = """
import hashlib, json, os, sys
from pathlib import Path

import deepspeed
import torch

from hf_cwd.trainer.wrappers import innermost

sys.path.insert(0, {scripts!r})
import unmodified


class WatchedTrainer(unmodified.CountingTrainer):
    batches = 0

    def training_step(self, *arguments, **options):
        self.batches += 1
        return super().training_step(*arguments, **options)

    def train(self):
        result = super().train(resume_from_checkpoint=self.args.resume_from_checkpoint)
        digest = hashlib.sha256()
        for p in self.model.parameters():
            with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
                digest.update(p.detach().float().numpy().tobytes())
        optimizer, engine = innermost(self.optimizer), self.deepspeed
        report = {{
            "world_size": self.args.world_size,
            "optimizer": type(optimizer).__name__,
            "replacements": deepspeed.ops.adam.DeepSpeedCPUAdam.optimizer_id,  # how many were ever made
            "weights": digest.hexdigest(),
            "batches": self.batches,
            "losses": [log["loss"] for log in self.state.log_history if "loss" in log],
        }}
        if engine is not None:
            assert engine.basic_optimizer is optimizer
            report["engine"] = {{
                "stage": engine.zero_optimization_stage(),
                "cut": sum(hasattr(p, "ds_id") for p in self.model.parameters()),
                "offload": engine.zero_cpu_offload(),
                "accumulation": engine.gradient_accumulation_steps(),
                "clipping": engine.gradient_clipping(),
                "bf16": engine.bfloat16_enabled(),
            }}
        Path(self.args.output_dir, f"rank-{{self.args.process_index}}.json").write_text(json.dumps(report))
        return result


unmodified.CountingTrainer = WatchedTrainer
for arguments in [sys.argv[1:], *json.loads(os.environ["THEN"])]:
    sys.argv[1:] = arguments
    unmodified.main()
torch.distributed.barrier()  # a rank that aborts at its end would take a slower one with it
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A function that gives a run's reports, one a rank."""
    folder = tmp_path_factory.mktemp("deepspeed")
    write_material(folder)
    script = folder / "watched.py"
    script.write_text(SCRIPT.format(scripts=str(Path(__file__).parent / "scripts")))
    reports = {}

    def run(name, **changes):
        """Arguments of a run."""
        reports[name] = []
        defaults = {"output_dir": folder / name, "max_steps": STEPS, "logging_steps": 1, "max_grad_norm": 0.5}
        defaults |= {"gradient_accumulation_steps": ACCUMULATION, "optim_args": "nesterov=false,ns_dtype=float32"}
        return flags(folder, **(defaults | changes))

    def ranks(first, *then):
        options = {"modules": DEEPSPEED, "DS_ACCELERATOR": "cpu", "THEN": json.dumps(then)}
        return fork_ranks(2, *HF_CWD, script, *first, cwd=ROOT, **options)

    def accelerated(arguments):
        file = ROOT / "configs/accelerate/zero3_offload.yaml"
        command = (*ACCELERATE, "--config_file", file, "--main_process_port", 0, *HF_CWD, script, *arguments)
        python = forked_python.write(folder / "python")
        return fork(*command, cwd=ROOT, modules=DEEPSPEED, PYTHON_EXEC=str(python), DS_ACCELERATOR="cpu", THEN="[]")

    def resumed(name):
        checkpoint = folder / name / f"checkpoint-{STEPS // 2}"
        return run(f"{name} resumed", deepspeed=f"configs/deepspeed/{name}.json", resume_from_checkpoint=checkpoint)

    def offloaded(stage):
        """A configuration as people have them, which does not say what becomes of the optimizer."""
        config = json.loads((ROOT / f"configs/deepspeed/zero{max(stage, 2)}_offload.json").read_text())
        config["zero_optimization"]["stage"] = stage
        del config["zero_force_ds_cpu_optimizer"]
        path = folder / f"offload-{stage}.json"
        path.write_text(json.dumps(config))
        return run(f"offload at stage {stage}", deepspeed=path)

    runs = {
        name: run(name, deepspeed=f"configs/deepspeed/{name}.json", save_steps=STEPS // 2, save_strategy="steps")
        for name in CONFIGS
    }
    # DDP first: once used, DeepSpeed stays switched on in a process, by Accelerate.
    processes = [*ranks(run("ddp"), *runs.values()), accelerated(run("accelerate", bf16="true"))]
    results = finish_all(processes)
    results += finish_all(ranks(resumed("zero2"), *map(offloaded, (1, 2, 3)), resumed("zero3_offload")))
    logs = [f"{result.args}\n{result.stdout}{result.stderr}" for result in results]
    for name, ranks in reports.items():
        ranks += [json.loads(path.read_text()) for path in sorted((folder / name).glob("rank-*.json"))]

    def of(name):
        # Not the exit status: one launch in some 50 aborts at the interpreter's exit, after correct results.
        if len(reports[name]) != 2:
            pytest.fail(f"{name}: {len(reports[name])} of 2 ranks came to an end\n" + "\n".join(logs))
        return reports[name]

    return of


def check(ranks, name, **engine):
    """Ours stepped, on two ranks that agree, in an engine that did as it was told; the first rank's report."""
    stage, offload = int(name.removeprefix("zero")[0]), name.endswith("_offload")
    engine |= {"stage": stage, "offload": offload, "cut": PARAMETERS if stage == 3 else 0}
    for rank in ranks:
        assert (rank["world_size"], rank["optimizer"], rank["replacements"]) == (2, "CWDMuon", 0)
        assert rank["engine"] == {"accumulation": ACCUMULATION, "clipping": 0.5, "bf16": False} | engine
        assert rank["losses"][-1] < rank["losses"][0]
        assert rank["weights"] == ranks[0]["weights"]
    assert len(ranks[0]["losses"]) == STEPS
    return ranks[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_trains_as_ddp_does(name, launched):
    report = check(launched(name), name)
    assert report["losses"] == pytest.approx(launched("ddp")[0]["losses"], abs=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_keeps_the_optimizer_where_the_configuration_does_not_say_so(stage, launched):
    report = check(launched(f"offload at stage {stage}"), f"zero{stage}_offload")
    assert report["losses"] == pytest.approx(launched("ddp")[0]["losses"], abs=1e-4)


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_equals_uninterrupted(name, launched):
    """In other processes."""
    report, resumed = launched(name)[0], check(launched(f"{name} resumed"), name)
    assert (report["batches"], resumed["batches"]) == (STEPS * ACCUMULATION, STEPS // 2 * ACCUMULATION)
    assert (resumed["weights"], resumed["losses"]) == (report["weights"], report["losses"])


def test_flags_win_over_accelerate_s_file(launched):
    report = check(launched("accelerate"), "zero3_offload", bf16=True)
    assert report["losses"] == pytest.approx(launched("ddp")[0]["losses"], abs=5e-3)  # the weights are in bf16
