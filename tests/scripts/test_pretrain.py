"""pretrain.py: real runs of a tiny model."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pretrain
import pytest
import torch
from common.lm_data import train_tokenizer
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from hf_cwd import CWDTrainerMixin

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/pretrain.py"


@pytest.fixture(scope="module")
def trained(workspace, flags):
    """Output directory and metrics of six uninterrupted steps."""
    output = workspace / "trained"
    return output, pretrain.main(flags(output_dir=output))


def texts(workspace):
    return [json.loads(line)["text"] for line in (workspace / "docs.jsonl").read_text(encoding="utf-8").split("\n")]


def evaluation_blocks(output, workspace):
    """The held-out blocks, made here anew: whole documents, each ended by EOS, cut into 64 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    held_out = texts(workspace)[19::20]  # 5 % of 200: every twentieth
    stream = [token for text in held_out for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(stream[: len(stream) // 64 * 64]).view(-1, 64)


def test_metrics_against_a_count_by_hand(trained, workspace):
    output, metrics = trained
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    blocks = evaluation_blocks(output, workspace)
    with torch.no_grad():
        logits = model(input_ids=blocks).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()
    right = (logits.argmax(-1) == blocks[:, 1:]).sum().item()
    assert metrics["eval_blocks"] == len(blocks)
    # In other batches a near tie of two logits can fall the other way: one token of the count.
    assert metrics["eval_token_accuracy"] == pytest.approx(
        right / blocks[:, 1:].numel(), abs=1.5 / blocks[:, 1:].numel()
    )
    assert right > 0
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["perplexity"] == math.exp(metrics["eval_loss"])
    assert metrics["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert metrics["train_tokens"] == 6 * 4 * 64
    assert metrics["train_tokens_per_second"] == pytest.approx(6 * 4 * 64 / metrics["train_runtime"])
    saved = json.loads((output / "all_results.json").read_text())
    assert {"train_loss", "eval_loss", "perplexity", "eval_token_accuracy"} <= saved.keys()


def test_tokenizer_is_trained_on_the_training_documents_only(trained, workspace):
    everything = texts(workspace)
    training = [text for i, text in enumerate(everything) if i % 20 != 19]
    of_training, of_all = (
        train_tokenizer(Dataset.from_dict({"text": part}), text_column="text", vocab_size=512).get_vocab()
        for part in (training, everything)
    )
    for folder in (trained[0] / "tokenizer", trained[0]):
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == of_training
    assert of_training != of_all


def test_log_holds_the_decayed_fraction(trained):
    history = json.loads((trained[0] / "trainer_state.json").read_text())["log_history"]
    fractions = [entry["cwd/decayed_fraction"] for entry in history if "loss" in entry]
    assert len(fractions) == 6
    assert all(0 < fraction < 1 for fraction in fractions)


def test_resumed_run_equals_the_uninterrupted_one(trained, workspace, flags):
    resumed = workspace / "resumed"
    shutil.copytree(trained[0] / "checkpoint-3", resumed / "checkpoint-3")
    metrics = pretrain.main(flags(output_dir=resumed, resume_from_checkpoint="true"))
    assert metrics["train_tokens"] == 3 * 4 * 64
    halfway, one, other = (
        load_file(folder / "model.safetensors") for folder in (resumed / "checkpoint-3", trained[0], resumed)
    )
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key
    assert any(not torch.equal(halfway[key], one[key]) for key in one)
    one, other = (
        torch.load(folder / "checkpoint-6/optimizer.pt", weights_only=True)["state"] for folder in (trained[0], resumed)
    )
    assert one.keys() == other.keys()
    for index, state in one.items():
        assert state.keys() == other[index].keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[index][key])), (index, key)


def test_a_model_whose_weights_have_older_names_resumes_too(workspace, flags):
    """transformers saves Mixtral's experts as they once were; Muon orthogonalises them as they are, stacked."""
    config = json.loads((workspace / "config.json").read_text())
    shape = {"num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    (workspace / "moe.json").write_text(json.dumps({**config, "model_type": "mixtral", **shape}))
    changes = {"config_name": workspace / "moe.json", "optim": "cwd_muon"}
    whole, resumed = workspace / "moe", workspace / "moe-resumed"
    pretrain.main(flags(output_dir=whole, **changes))
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    pretrain.main(flags(output_dir=resumed, resume_from_checkpoint="true", **changes))
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert one.keys() == other.keys()
    assert any(".experts.3." in key for key in one), "what is saved in the end has the names of the Hub"
    for key in one:
        assert torch.equal(one[key], other[key]), key


def test_weights_can_be_trained_on(trained, workspace, flags):
    """With a learning rate of 0 the loss shows that weights, tokenizer and held-out blocks are the saved ones."""
    changes = {"config_name": None, "train_tokenizer_vocab_size": None, "model_name_or_path": trained[0]}
    metrics = pretrain.main(
        flags(output_dir=workspace / "on", learning_rate=0, max_steps=1, save_strategy="no", **changes)
    )
    assert metrics["eval_loss"] == trained[1]["eval_loss"]


def test_file_of_arguments_and_overrides(workspace, flags):
    """Plain text, a YAML file of arguments (`no` is False in YAML), a flag that wins over it, and derived shapes."""
    text = workspace / "lines.txt"
    text.write_text("\n".join(texts(workspace)[:40]), encoding="utf-8")
    argv = flags(
        output_dir=workspace / "yaml",
        train_file=text,
        max_steps=2,
        config_overrides="hidden_size=48,rms_norm_eps=1e-4",
        max_train_samples=5,
        max_eval_samples=3,
        save_strategy="no",
    )
    lines = [f"{key.removeprefix('--')}: {value}" for key, value in zip(argv[::2], argv[1::2], strict=True)]
    lines += ["lr_scheduler_type: cosine_with_min_lr", "lr_scheduler_kwargs: {min_lr: 0.001}", "run_name: null"]
    (workspace / "args.yaml").write_text("\n".join(lines))
    metrics = pretrain.main([str(workspace / "args.yaml"), "--max_eval_samples", "2"])
    assert (metrics["train_blocks"], metrics["eval_blocks"]) == (5, 2)
    assert metrics["train_tokens"] == 5 * 64  # two steps are one epoch of five blocks
    config = json.loads((workspace / "yaml/config.json").read_text())
    assert (config["hidden_size"], config["head_dim"], config["rms_norm_eps"]) == (48, 24, 1e-4)
    history = json.loads((workspace / "yaml/trainer_state.json").read_text())["log_history"]
    assert history[1]["learning_rate"] > 0.001  # the second and last step, on the way to min_lr


def test_two_processes(trained, workspace, flags):
    """Two ranks agree with one on tokenizer, blocks and metrics, and count the tokens of both."""
    output = workspace / "two"
    argv = flags(
        output_dir=output,
        config_name=None,
        model_name_or_path=trained[0],
        learning_rate=0,
        max_steps=2,
        save_strategy="no",
        ddp_backend="gloo",
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, SCRIPT, *argv], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((output / "all_results.json").read_text())
    assert metrics["train_tokens"] == 2 * 2 * 4 * 64
    assert metrics["eval_token_accuracy"] == pytest.approx(trained[1]["eval_token_accuracy"], abs=1e-3)
    assert metrics["eval_loss"] == pytest.approx(trained[1]["eval_loss"], rel=1e-3)  # padded to whole batches a rank


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture(scope="module")
def trained_by_torch(workspace, flags):
    output = workspace / "trained by torch"
    pretrain.main(flags(output_dir=output, optim="adamw_torch"))
    return output


class Start(TrainerCallback):
    """The step that training begins at."""

    def on_train_begin(self, args, state, control, **others):
        self.step = state.global_step


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
@pytest.mark.parametrize("optim", ["cwd_adamw", "adamw_torch"])
def test_the_newest_whole_checkpoint_is_taken_and_the_other_named(
    optim, name, trained, trained_by_torch, flags, tmp_path, caplog
):
    """Damaged by a kill, or by a copy that broke off."""
    whole = trained[0] if optim == "cwd_adamw" else trained_by_torch
    output = shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("tokenizer"))
    cut(output / "checkpoint-6" / name)
    start = Start()
    pretrain.main(flags(output_dir=output, optim=optim, resume_from_checkpoint="true"), [start])
    assert start.step == 3
    assert re.search(rf"skipped: .*checkpoint-6\b.*{re.escape(name)}", caplog.text)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, output))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_checkpoints_that_do_not_do(trained, trained_by_torch, flags, refused, tmp_path):
    for optim, whole in (("cwd_adamw", trained[0]), ("adamw_torch", trained_by_torch)):
        checkpoint = shutil.copytree(whole / "checkpoint-6", tmp_path / optim / "checkpoint-6")
        options = {"output_dir": tmp_path / optim, "optim": optim, "max_steps": 8}
        argv = flags(resume_from_checkpoint=checkpoint, **options)
        other = refused(
            pretrain, flags(resume_from_checkpoint=checkpoint, config_overrides="hidden_size=48", **options)
        )
        assert other.startswith(f"{checkpoint} has other weights than this model: ")
        assert other.endswith("Give the model that it was saved with")
        cut(checkpoint / "model.safetensors")
        line = refused(pretrain, argv)
        assert str(checkpoint) in line
        assert "model.safetensors" in line
        none = refused(pretrain, flags(resume_from_checkpoint="true", **options))
        assert f"no checkpoint in {tmp_path / optim} can be resumed from" in none
        assert "model.safetensors" in none


def test_a_checkpoint_of_another_rule(trained, flags, refused, tmp_path):
    checkpoint = trained[0] / "checkpoint-6"
    argv = flags(output_dir=tmp_path, optim="cwd_lion", resume_from_checkpoint=checkpoint, max_steps=8)
    assert "on_rule_change=reset" in refused(pretrain, argv)


@pytest.mark.parametrize(("optim", "is_ours"), [("cwd_sgd", True), ("adafactor", False)])
def test_an_optimizer_of_ours_has_cwd_trainer_s_guards(optim, is_ours, flags, monkeypatch, tmp_path):
    made = []
    original = Trainer.train
    monkeypatch.setattr(
        Trainer, "train", lambda self, *args, **kwargs: made.append(self) or original(self, *args, **kwargs)
    )
    pretrain.main(flags(output_dir=tmp_path, optim=optim, max_steps=1, save_strategy="no"))
    assert isinstance(made[0], CWDTrainerMixin) is is_ours
