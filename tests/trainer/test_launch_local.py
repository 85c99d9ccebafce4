"""configs/accelerate and scripts/launch_local: every layout, in real processes, trains what DDP trains."""

import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import forked_python
from tests.support.launching import ENVIRONMENT, ROOT, write_material
from tests.support.tiny import tiny_llama

LAYOUTS = sorted(path.stem for path in (ROOT / "configs/accelerate").glob("*.yaml") if path.stem != "single")
# One rule of each kind, the second with AdamW beside it; from weights, which come cut from the files under tensor
# parallelism and ZeRO-3, and from a model that was made.
RUNS = {
    "lion": ("CWDLion", "--model_name_or_path"),
    "muon": ("CWDMuon", "--model_name_or_path"),
    "muon-made": ("CWDMuon", "--config_name"),
}
FSDP1 = {"lion": "CWDLion", "adamw": "CWDAdamW"}
# Processes, and how many of them see a batch of their own.
ZERO = {"zero1": (2, 2), "zero2": (2, 2), "zero3": (2, 2), "zero3_offload": (2, 2)}
PROCESSES = {"ddp": (2, 2), "fsdp2": (2, 2), "hsdp": (4, 4), "tp": (2, 1), **ZERO}
# How a model's parameters are cut; what DeepSpeed has between Trainer and optimizer, with partitions of gradients and
# offload where it says so.
PLACEMENTS = {
    "ddp": ({"whole"}, []),
    "fsdp2": ({"(Shard(dim=0),)"}, []),
    "hsdp": ({"(Replicate(), Shard(dim=0))"}, []),
    "tp": ({"whole", "(Shard(dim=0),)", "(Shard(dim=1),)"}, []),  # norms are whole on both ranks
    "zero1": ({"whole"}, ["DeepSpeedZeroOptimizer", False, False]),
    "zero2": ({"whole"}, ["DeepSpeedZeroOptimizer", True, False]),
    "zero3": ({"1/2"}, ["DeepSpeedZeroOptimizer_Stage3", None, False]),
    "zero3_offload": ({"1/2"}, ["DeepSpeedZeroOptimizer_Stage3", None, True]),
}
BATCH = 8
NORMS = 5
# Trains with scripts/pretrain.py once for each rule; arguments: folders of the material and of the output, and flags.
SCRIPT = """
import hashlib, json, os, sys
from pathlib import Path

sys.path.insert(0, {scripts!r})
import pretrain
import torch
from transformers import TrainerCallback

material, output, *flags = sys.argv[1:]
reports = {{}}


def placement(p):
    if hasattr(p, "ds_id"):  # ZeRO-3: of each parameter a rank keeps ds_tensor
        return f"1/{{p.ds_numel / p.ds_tensor.numel():g}}"
    return str(getattr(p, "placements", "whole"))


def whole(p):
    if hasattr(p, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()


class Report(TrainerCallback):
    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        self.zero = []
        while hasattr(optimizer, "optimizer"):  # wrappers of Accelerate's and DeepSpeed's
            optimizer = optimizer.optimizer
            if type(optimizer).__name__.startswith("DeepSpeedZero"):
                offload = getattr(optimizer, "cpu_offload", None) or getattr(optimizer, "offload_optimizer", False)
                gradients = getattr(optimizer, "partition_gradients", None)
                self.zero = [type(optimizer).__name__, gradients, offload]
        self.optimizer, self.stepped = optimizer, {{}}
        optimizer.register_step_post_hook(self.after_step)

    def after_step(self, optimizer, *_):
        # Looked at here: DeepSpeed gives the optimizer its tensors for a step only.
        self.stepped |= {{p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}}

    def on_train_end(self, args, state, control, model, **kwargs):
        digest = hashlib.sha256()
        for p in model.parameters():
            digest.update(whole(p).numpy().tobytes())
        own = self.stepped.keys() == set(model.parameters())
        undecayed = [p for p, weight_decay in self.stepped.items() if weight_decay == 0]
        if self.zero:  # flat tensors, each with this rank's half of a group
            numel = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
            own = len(self.stepped) == len(self.optimizer.param_groups)
            own &= sum(p.numel() for p in self.stepped) * args.world_size == numel
            undecayed = [None] * (undecayed[0].numel() * args.world_size // model.config.hidden_size)
        reports[args.run_name] = {{
            "world_size": args.world_size,
            "optimizer": type(self.optimizer).__name__,
            "zero": self.zero,
            "own": own,
            "placements": sorted(map(placement, model.parameters())),
            "undecayed": len(undecayed),
            "decayed": [log["cwd/decayed_fraction"] for log in state.log_history if "cwd/decayed_fraction" in log],
            "losses": [log["loss"] for log in state.log_history if "loss" in log],
            "digest": digest.hexdigest(),
        }}


def train(rule, name, source):
    metrics = pretrain.main(
        [source, f"{{material}}/model", "--train_file", f"{{material}}/train.txt", "--cache_dir", f"{{output}}/cache",
         "--optim", f"cwd_{{rule}}", "--run_name", name, "--output_dir", f"{{output}}/{{name}}", *flags],
        [Report()],
    )
    reports[name]["eval_loss"] = metrics["eval_loss"]


for name, (_, source) in {runs}.items():
    train(name.partition("-")[0], name, source)
if Path(output).name == "ddp":
    # Weights in one piece are not saved: on a CPU torch 2.13's FSDP1 then ends in a segmentation fault.
    config = {{"fsdp_version": 1, "sync_module_states": False, "state_dict_type": "SHARDED_STATE_DICT"}}
    flags += ["--fsdp", "full_shard", "--fsdp_config", json.dumps(config)]
    for rule in {fsdp1}:
        train(rule, f"fsdp1-{{rule}}", "--model_name_or_path")
print("rank", os.environ["RANK"], "is done")
Path(output, f"rank-{{os.environ['RANK']}}.json").write_text(json.dumps(reports))
torch.distributed.barrier()  # a rank that aborts at its end would take a slower one with it
"""
FLAGS = {
    "max_steps": 6,
    "logging_steps": 1,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.1,
    "max_eval_samples": 2 * BATCH,  # whole batches: a part of one weighs otherwise where two ranks have the same batch
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": "true",
}


def run(command, folder, **environment):
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment for scripts/dev/env.sh: this interpreter, which installs nothing, nor says what it has.

    Accelerate's launcher and the ranks that it starts are forked.
    """
    folder = tmp_path_factory.mktemp("environment")
    (folder / "bin").mkdir()
    forked = forked_python.write(folder / "bin/forked")
    python = folder / "bin/python"
    cases = f'"-m pip" | "-I -c") ;; "-m accelerate.commands.launch") exec "{forked}" "$@" ;;'
    python.write_text(f'#!/usr/bin/env bash\ncase "$1 $2" in {cases} *) exec "{sys.executable}" "$@" ;; esac\n')
    python.chmod(0o755)
    return {"VIRTUAL_ENV": str(folder), "HF_CWD_INSTALL": "yes", "PYTHON_EXEC": str(forked)}


@pytest.fixture(scope="module")
def launched(tmp_path_factory, environment):
    """What every layout's process printed, and its ranks' reports for each rule."""
    folder = tmp_path_factory.mktemp("layouts")
    write_material(folder)
    tiny_llama(vocab_size=320, num_key_value_heads=2).save_pretrained(folder / "model")  # a head for each rank of tp
    (folder / "script.py").write_text(SCRIPT.format(scripts=str(ROOT / "scripts"), runs=RUNS, fsdp1=list(FSDP1)))

    def launch(layout):
        output = folder / layout
        output.mkdir()
        flags = {**FLAGS, "per_device_train_batch_size": BATCH // PROCESSES[layout][1]}
        flags = [part for key, value in flags.items() for part in (f"--{key}", value)]
        command = [ROOT / "scripts/launch_local", "--layout", layout, folder / "script.py", folder, output, *flags]
        done = run(command, folder, **environment)
        # Not the exit status: about one launch in 50 aborts at the interpreter's exit, after correct results.
        reports = [json.loads(path.read_text()) for path in sorted(output.glob("rank-*.json"))]
        assert len(reports) == PROCESSES[layout][0], done.stdout + done.stderr
        return done, reports

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(PROCESSES, pool.map(launch, PROCESSES), strict=True))


def check_training(report):
    assert report["own"], "the optimizer steps the parameters that the model has once it is cut"
    assert report["undecayed"] == NORMS
    assert all(map(math.isfinite, report["losses"]))
    assert report["losses"][-1] < report["losses"][0]


def check_same_training(report, other):
    # The same batches and weights: what differs is rounding (seen: 1e-6), which may turn a sign of Lion's.
    assert report["losses"] == pytest.approx(other["losses"], abs=1e-4)
    assert report["eval_loss"] == pytest.approx(other["eval_loss"], abs=1e-4)


def test_every_configuration_is_launched():
    assert set(LAYOUTS) == PROCESSES.keys()


@pytest.mark.parametrize("layout", PROCESSES)
def test_layout_trains_as_ddp_does(layout, launched):
    done, ranks = launched[layout]
    for name, (optimizer, _) in RUNS.items():
        report, *others = [rank[name] for rank in ranks]
        assert (report["optimizer"], report["world_size"]) == (optimizer, PROCESSES[layout][0])
        assert (set(report["placements"]), report["zero"]) == PLACEMENTS[layout]
        check_training(report)
        assert len(report["decayed"]) == FLAGS["max_steps"]
        if not (layout.startswith("zero3") and name == "muon-made"):  # transformers then draws other initial weights
            check_same_training(report, launched["ddp"][1][0][name])
            # Of all ranks' parts, not of this rank's; one element in 1000 may have turned its sign by rounding.
            assert report["decayed"] == pytest.approx(launched["ddp"][1][0][name]["decayed"], abs=1e-3)
        for other in others:
            assert (other["digest"], other["eval_loss"]) == (report["digest"], report["eval_loss"])
    assert re.findall(r"^rank (\d) is done$", done.stdout, re.MULTILINE) == ["0"], "the others are not heard"


@pytest.mark.parametrize("rule", FSDP1)
def test_fsdp1_trains_element_wise_rules_on_the_model_s_own_parameters(rule, launched):
    _, ranks = launched["ddp"]
    for rank in ranks:
        report = rank[f"fsdp1-{rule}"]
        assert report["optimizer"] == FSDP1[rule]
        check_training(report)
        assert report["eval_loss"] == ranks[0][f"fsdp1-{rule}"]["eval_loss"]
    if rule in RUNS:
        check_same_training(report, ranks[0][rule])
        assert report["digest"] != ranks[0][rule]["digest"], "a rank has a part"


def test_a_failure_says_where_the_other_ranks_output_is(tmp_path):
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    started = 'echo "$PET_REDIRECTS $*" >started; exit 3'
    python.write_text(f'#!/usr/bin/env bash\n[[ "$2" != accelerate.* ]] || {{ {started}; }}\necho 3.12\n')
    python.chmod(0o755)
    (tmp_path / "script.py").touch()
    arguments = ["--layout", "hsdp", "script.py", "--optim", "cwd_sgd"]
    environment = {"VIRTUAL_ENV": str(tmp_path), "HF_CWD_INSTALL": "yes", "TMPDIR": str(tmp_path)}
    done = run([ROOT / "scripts/launch_local", *arguments], tmp_path, **environment)
    assert done.returncode == 1
    folder = re.search(r"hsdp failed; the output of ranks 1 to 3 is in (.*)\.\n", done.stderr)[1]
    assert Path(folder).is_dir()
    command = (tmp_path / "started").read_text()
    assert command.startswith("0:0,1:3,2:3,3:3 -m accelerate.commands.launch --config_file ")
    assert f"--num_processes 4 --main_process_port 0 --log_dir {folder} " in command
    assert command.endswith("/scripts/dev/cpu_ranks.py script.py --optim cwd_sgd --use_cpu\n")
