"""finetune.py: real runs of a tiny chat model; those of SmolLM2 are in test_examples.py."""

import json
import lzma
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import finetune
import pytest
import torch
from datasets import Dataset, DatasetDict
from material import assistant, user
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import hf_cwd

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/finetune.py"
LORA = {"use_peft": "true", "lora_r": 4, "lora_target_modules": "all-linear"}


class Recorder(TrainerCallback):
    """What the trainer trained with, and the held-out loss whenever it was taken."""

    def __init__(self):
        self.eval_losses = []

    def on_evaluate(self, args, state, control, *, metrics, **others):
        self.eval_losses.append(metrics["eval_loss"])

    def on_train_begin(self, args, state, control, *, model, optimizer, train_dataloader, **others):
        self.args, self.model, self.optimizer = args, model, optimizer.optimizer
        self.rows, self.first_step = train_dataloader.dataset, state.global_step


ASKED, SAID = "What of the Union?", "It is strong."
# A row, and what of its tokens is seen and what of them the loss is taken on; <e> is the end of a text.
FORMATS = {
    "text": ({"text": SAID}, f"{SAID}<e>", f"{SAID}<e>"),
    "prompt and completion": ({"prompt": ASKED, "completion": SAID}, f"{ASKED}{SAID}<e>", f"{SAID}<e>"),
    "chat": (
        {"messages": [user(ASKED), assistant(SAID)], "prompt": ASKED, "text": "unused"},
        f"[user]{ASKED}<e>[assistant]{SAID}<e>",
        f"[user]{ASKED}<e>[assistant]{SAID}<e>",
    ),
    "chat with a completion": (
        {"prompt": [user(ASKED)], "completion": [assistant(SAID)], "id": 3},
        f"[user]{ASKED}<e>[assistant]{SAID}<e>",
        f"{SAID}<e>",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, arguments, tmp_path):
    row, seen, learnt = FORMATS[name]
    path, recorder = tmp_path / "rows.jsonl.xz", Recorder()
    path.write_bytes(lzma.compress("\n".join([json.dumps(row)] * 10).encode()))
    metrics = finetune.main(
        arguments(train_file=path, output_dir=tmp_path, max_steps=1, save_strategy="no"), [recorder]
    )
    assert (metrics["train_samples"], metrics["eval_samples"]) == (9, 1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids, labels = recorder.rows[0]["input_ids"], recorder.rows[0]["labels"]
    assert tokenizer.decode(ids) == seen.replace("<e>", tokenizer.eos_token)
    assert tokenizer.decode([label for label in labels if label != -100]) == learnt.replace("<e>", tokenizer.eos_token)


def test_text_field_directory_and_file_of_arguments(arguments, texts, tmp_path):
    """A field that was named comes before messages; blank texts are dropped; flags after the file win."""
    rows = [{"body": text, "messages": [user(ASKED)]} for text in (*texts[:9], " \n", None)]
    parts = {"train": Dataset.from_list(rows), "validation": Dataset.from_list(rows[:3])}
    DatasetDict(parts).save_to_disk(tmp_path / "data")
    argv = arguments(
        train_file=None,
        dataset_name=tmp_path / "data",
        dataset_text_field="body",
        output_dir=tmp_path / "out",
        save_strategy="no",
        max_eval_samples=2,
    )
    lines = [f"{key.removeprefix('--')}: {value}" for key, value in zip(argv[::2], argv[1::2], strict=True)]
    lines += ["use_peft: true", "lora_target_modules: [q_proj, v_proj]", "eval_on_start: true"]
    (tmp_path / "args.yaml").write_text("\n".join(lines))
    recorder = Recorder()
    metrics = finetune.main([str(tmp_path / "args.yaml"), "--max_steps", "1", "--lora_r", "3"], [recorder])
    assert (metrics["train_samples"], metrics["eval_samples"]) == (9, 2)
    before, after = recorder.eval_losses
    assert before != after == metrics["eval_loss"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert recorder.rows[0]["input_ids"] == tokenizer(texts[0])["input_ids"][:64]
    adapter = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (adapter["r"], set(adapter["target_modules"])) == (3, {"q_proj", "v_proj"})
    assert not recorder.args.bf16  # TRL's default is true, on a CPU too


RUNS = {"full": {"optim": "cwd_muon"}, "lora": {"optim": "cwd_adamw", **LORA}}


@pytest.fixture(scope="module", params=RUNS)
def trained(request, workspace, arguments):
    """Output directory, changes, metrics and recorder of six uninterrupted steps."""
    output, recorder = workspace / f"tuned {request.param}", Recorder()
    metrics = finetune.main(
        arguments(output_dir=output, per_device_eval_batch_size=1, eval_on_start="true", **RUNS[request.param]),
        [recorder],
    )
    return output, RUNS[request.param], metrics, recorder


def weights(folder):
    return load_file(next(folder.glob("*model.safetensors")))


def test_training_and_its_metrics(trained, model, pairs):
    output, changes, metrics, recorder = trained
    assert type(recorder.optimizer) is (hf_cwd.CWDMuon if changes["optim"] == "cwd_muon" else hf_cwd.CWDAdamW)
    state = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in state if "loss" in entry]
    assert losses[-1] < losses[0]
    assert recorder.eval_losses[-1] < recorder.eval_losses[0]
    fractions = [entry["cwd/decayed_fraction"] for entry in state if "loss" in entry]
    # LoRA starts at B = 0, where A has no gradient: everything agrees on the first step.
    assert fractions[0] == 1 if "use_peft" in changes else 0 < fractions[0] < 1
    assert all(0 < fraction < 1 for fraction in fractions[1:])

    tuned, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert metrics["trainable_parameters"] == sum(value.numel() for value in weights(output).values())
    if "use_peft" in changes:
        assert all("lora_" in name for name in weights(output))
        frozen, start = tuned.state_dict(), AutoModelForCausalLM.from_pretrained(model).state_dict()
        unwrapped = {name.replace(".base_layer", ""): value for name, value in frozen.items() if "lora_" not in name}
        assert unwrapped.keys() == start.keys()
        assert all(torch.equal(value, start[name]) for name, value in unwrapped.items())

    total = 0.0
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").split("\n")]
    held_out = rows[9::10]  # 10 %: every tenth
    for row in held_out:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        shared = next((i for i, pair in enumerate(zip(prompt, ids, strict=False)) if len({*pair}) > 1), len(prompt))
        ids = torch.tensor([*ids, tokenizer.eos_token_id])
        with torch.no_grad():
            logits = tuned.eval()(ids[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[shared - 1 :].mean().item()
    assert metrics["eval_loss"] == pytest.approx(total / len(held_out), rel=1e-5)
    assert metrics["perplexity"] == math.exp(metrics["eval_loss"])


def test_resumed_run_equals_the_uninterrupted_one(trained, workspace, arguments):
    output, changes, metrics, _ = trained
    resumed = workspace / f"resumed {output.name}"
    shutil.copytree(output / "checkpoint-3", resumed / "checkpoint-3")
    argv = arguments(output_dir=resumed, per_device_eval_batch_size=1, resume_from_checkpoint="true", **changes)
    recorder = Recorder()
    assert finetune.main(argv, [recorder])["eval_loss"] == metrics["eval_loss"]
    assert recorder.first_step == 3
    halfway, one, other = (weights(folder) for folder in (resumed / "checkpoint-3", output, resumed))
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key
    assert any(not torch.equal(halfway[key], one[key]) for key in one)


def test_muon_gets_the_adapter_s_matrices(arguments, tmp_path):
    recorder = Recorder()
    argv = arguments(output_dir=tmp_path, optim="cwd_muon", max_steps=1, save_strategy="no", **LORA)
    finetune.main(argv, [recorder])
    assert type(recorder.optimizer) is hf_cwd.CWDMuon
    muon = [p for group in recorder.optimizer.param_groups if group["algorithm"] == "muon" for p in group["params"]]
    adapters = [p for name, p in recorder.model.named_parameters() if "lora_" in name]
    assert {id(p) for p in muon} == {id(p) for p in adapters}


def test_packed_rows_do_not_see_each_other(arguments, tmp_path):
    """One batch of four rows, padded or packed: the same tokens, so the same mean loss."""
    losses = {
        packing: finetune.main(
            arguments(output_dir=tmp_path / packing, packing=packing, learning_rate=0, max_steps=1, save_strategy="no")
        )
        for packing in ("false", "true")
    }
    assert losses["true"]["eval_samples"] < losses["false"]["eval_samples"] == 4
    # The same numbers summed in other orders.
    assert losses["true"]["eval_loss"] == pytest.approx(losses["false"]["eval_loss"], rel=1e-5)


def test_two_processes(workspace, arguments):
    """Two steps are two fifths of an epoch: 36 rows are five steps of two ranks, nine of one."""
    changes = {"max_steps": 2, "learning_rate": 0, "save_strategy": "no", "per_device_eval_batch_size": 1, **LORA}
    alone = finetune.main(arguments(output_dir=workspace / "one", **changes))
    output = workspace / "two"
    argv = arguments(output_dir=output, ddp_backend="gloo", **changes)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, SCRIPT, *argv], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((output / "all_results.json").read_text())
    assert (alone["epoch"], metrics["epoch"]) == (pytest.approx(2 / 9), pytest.approx(2 / 5))
    assert metrics["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)  # summed in another order
