"""CWDTrainer's checkpoints, and the plain Trainer's: saved whole, compared before a run goes on, refused by name."""

import json
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from hf_cwd import CWDTrainer, CWDTrainingArguments
from hf_cwd.checkpoint import manifest
from hf_cwd.checkpoint.files import CheckpointError


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def assert_same(one, other):
    assert all(map(torch.equal, weights(one), weights(other)))


def checkpoints(out):
    return sorted(name for name in os.listdir(out) if name != "cwd_run.json")


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_all_is_well(train, out, said):
    """The same files as the plain Trainer's and the manifest, nothing else, and an exact resume."""
    whole, plain = train(), train(kind=Trainer, output_dir=str(out) + "-plain")
    assert_same(whole, plain)
    assert checkpoints(out) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    files = {*os.listdir(f"{out}-plain/checkpoint-4")}
    assert {*os.listdir(out / "checkpoint-4")} == files
    found = manifest.verify(out / "checkpoint-4")
    assert (found.step, found.world_size) == (4, 1)
    assert {*found.files} == files - {manifest.NAME}
    assert found.versions.keys() >= {"hf_cwd", "torch", "transformers"}
    shutil.rmtree(out / "checkpoint-4")
    shutil.rmtree(out / "checkpoint-3")
    assert_same(train(True), whole)
    assert f"{out}/checkpoint-2 is what was saved at step 2: 6 files, " in said()
    assert " GB/s)" in said()


def test_the_best_checkpoint_has_its_final_path_and_rotation_keeps_it(train, out):
    class Worse(CWDTrainer):
        """Is best at step 2."""

        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            self.state.log_history[-1]["eval_loss"] = metrics["eval_loss"] = abs(self.state.global_step - 2)
            return metrics

    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2}
    trainer = train(kind=Worse, **options)
    best = str(out / "checkpoint-2")
    assert trainer.state.best_model_checkpoint == best
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4"]
    for name in checkpoints(out):
        assert json.loads((out / name / "trainer_state.json").read_text())["best_model_checkpoint"] == best
        manifest.verify(out / name)


def test_pushing_comes_after_the_name(train, out):
    class Pusher(CWDTrainer):
        """Notes what it would push; the plain Trainer asks only with push_to_hub."""

        def _save_checkpoint(self, *args, **kwargs):
            super()._save_checkpoint(*args, **kwargs)
            assert pushed[-1][0] == str(out / f"checkpoint-{self.state.global_step}")

    class Hub(Trainer):
        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            self._push_from_checkpoint(folder)  # as the Trainer does

        def _push_from_checkpoint(self, folder):
            pushed.append((folder, manifest.exists(folder)))

    pushed = []
    train(kind=type("Pushing", (Pusher, Hub), {}), max_steps=2)
    assert pushed == [(str(out / f"checkpoint-{step}"), True) for step in (1, 2)]


def test_a_subclass_that_saves_elsewhere_still_gets_a_manifest(train, out, said):
    class Own(CWDTrainer):
        def _get_output_dir(self, trial):
            return self.args.output_dir

    train(kind=Own, max_steps=2)
    assert checkpoints(out) == ["checkpoint-1", "checkpoint-2"]
    manifest.verify(out / "checkpoint-2")
    assert "Own saved checkpoint-1 directly, not where CWDTrainer told it" in said()


def test_the_newest_whole_checkpoint_is_taken_and_the_others_are_named(train, out, said):
    whole = train()
    os.truncate(out / "checkpoint-4" / "optimizer.pt", 1000)
    flip(out / "checkpoint-3" / "model.safetensors", -1)
    assert_same(train("true"), whole)
    assert f"skipped: {out}/checkpoint-4 is not what was saved: optimizer.pt has 1000 bytes instead of " in said()
    assert f"skipped: {out}/checkpoint-3 is not what was saved: model.safetensors was changed, in bytes 0 to " in said()
    assert f"{out}/checkpoint-2 is what was saved at step 2" in said()
    manifest.verify(out / "checkpoint-4")  # the resumed run has replaced both


DAMAGE = {
    "torn": (lambda path: os.truncate(path / "scheduler.pt", 0), "scheduler.pt has 0 bytes instead of "),
    "flipped": (lambda path: flip(path / "rng_state.pth", 2000), "rng_state.pth was changed, in bytes 0 to "),
    "missing": (lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "foreign": (lambda path: (path / "scaler.pt").touch(), "scaler.pt is not of this checkpoint, and would be loaded"),
    "state": (lambda path: flip(path / "trainer_state.json", -5), "trainer_state.json was changed"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_before_training_starts(train, out, damage):
    train(max_steps=2)
    act, message = DAMAGE[damage]
    act(out / "checkpoint-2")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(CheckpointError) as caught:
        train(str(out / "checkpoint-2"), max_steps=3)
    assert f"{out}/checkpoint-2 is not what was saved: {message}" in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("in_arguments", [True, False])
def test_the_plain_trainer_finds_it_before_the_first_step(train, out, tmp_path, in_arguments):
    """It has loaded it by then. Its callback knows the path by the arguments, or by the step."""
    train(kind=Trainer, max_steps=2)
    if in_arguments:
        (out / "checkpoint-2").rename(tmp_path / "copied")
    path = tmp_path / "copied" if in_arguments else out / "checkpoint-2"
    flip(path / "model.safetensors", -1)
    options = {"resume_from_checkpoint": str(path)} if in_arguments else {}
    with pytest.raises(CheckpointError, match=r"(copied|checkpoint-2) is not what was saved: model\.safetensors was"):
        train(str(path), kind=Trainer, max_steps=3, **options)
    assert "checkpoint-3" not in os.listdir(out)
    train(str(path), kind=Trainer, max_steps=3, cwd_verify="off", **options)


def test_verify_fast_and_off(train, out, said):
    train(max_steps=2)
    flip(out / "checkpoint-2" / "model.safetensors", -1)
    train(True, max_steps=3, cwd_verify="fast")
    assert "checkpoint-2 is what was saved at step 2: sizes and headers of 6 files" in said()
    (out / "checkpoint-3" / "scaler.pt").touch()
    with pytest.raises(CheckpointError, match=r"scaler\.pt is not of"):
        train(str(out / "checkpoint-3"), cwd_verify="fast")
    (out / "checkpoint-2" / "notes.pt").touch()
    train(str(out / "checkpoint-2"), max_steps=3, cwd_verify="off")
    with pytest.raises(ValueError, match="cwd_verify='never' does not exist: give one of full, fast, off"):
        CWDTrainingArguments(cwd_verify="never")


def test_without_a_manifest(train, out, said):
    """Taken if it has all its parts; and only if no other can be verified."""
    whole = train()
    for step in (3, 4):
        (out / f"checkpoint-{step}" / manifest.NAME).unlink()
    assert_same(train(True), whole)
    assert f"{out}/checkpoint-2 is what was saved" in said()
    assert f"skipped: {out}/checkpoint-4 has no cwd_manifest.json" in said()
    for step in (1, 2, 3, 4):
        (out / f"checkpoint-{step}" / manifest.NAME).unlink(missing_ok=True)
    os.truncate(out / "checkpoint-4" / "optimizer.pt", 1000)
    (out / "checkpoint-3" / "trainer_state.json").unlink()
    assert_same(train(True), whole)
    assert "checkpoint-2 has no cwd_manifest.json, as when the plain Trainer saved it: it cannot be verified" in said()
    assert "checkpoint-4 is damaged: optimizer.pt was cut off" in said()
    assert "checkpoint-3 has no trainer_state.json: its run was killed during the save" in said()


def test_nothing_to_resume_from(train, out):
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be resumed from: it has none"):
        train(True)
    with pytest.raises(CheckpointError, match=r"elsewhere is not a directory\. Give the path of a checkpoint"):
        train(str(out / "elsewhere"))
    train(max_steps=1, save_only_model=True)
    for resume in (True, str(out / "checkpoint-1")):
        with pytest.raises(CheckpointError, match="checkpoint-1 was saved with save_only_model and has no optimizer"):
            train(resume)
    (out / "checkpoint-1" / manifest.NAME).unlink()
    with pytest.raises(CheckpointError, match=r"has no optimizer state \(optimizer\*, latest \.\.\.\), no schedule"):
        train(str(out / "checkpoint-1"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.bin"])
def test_a_malicious_pickle_does_not_run(train, out, tmp_path, name):
    """Also where whoever made it has made the manifest too."""

    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    train(max_steps=1)
    checkpoint = out / "checkpoint-1"
    if name == "model.bin":
        (checkpoint / "model.safetensors").unlink()
        name = "pytorch_model.bin"
    torch.save(Malicious(), checkpoint / name)
    manifest.write(checkpoint, step=1, world_size=1, versions={})
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        train(str(checkpoint), max_steps=2)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_checkpoint_before_it(train, out):
    """By the system's own limit to the size of a file, as on a full disk in the middle of one."""
    reference = train(max_steps=3)
    shutil.rmtree(out)
    train(max_steps=2)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        with pytest.raises(RuntimeError, match="checkpoint-3 could not be saved") as caught:
            train(True, max_steps=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "Nothing else was touched: checkpoint-2 and older checkpoints are unchanged. Free " in str(caught.value)
    assert checkpoints(out) == ["checkpoint-1", "checkpoint-2"]
    assert all(path.read_bytes() == content for path, content in before.items() if path.name != "cwd_run.json")
    assert_same(train(True, max_steps=3), reference)


def test_the_plain_trainer_s_checkpoints_have_manifests(train, out, said):
    train(kind=Trainer, max_steps=2)
    plain = train(kind=Trainer, max_steps=3)  # writes over the first two
    for step in (1, 2, 3):
        assert manifest.verify(out / f"checkpoint-{step}").step == step
    assert_same(train(True, kind=Trainer, max_steps=4), train(str(out / "checkpoint-3"), max_steps=4))
    assert plain.args.output_dir == str(out)
    assert said().count("checkpoint-3 is what was saved at step 3") == 2


def test_other_optimizers_of_the_plain_trainer_have_no_manifest(train, out):
    train(kind=Trainer, max_steps=1, optim="adamw_torch")
    assert not manifest.exists(Path(out) / "checkpoint-1")
