"""What is in a run's directory after a run was ended anywhere, and what rotation leaves; one process."""

import os

import pytest

from hf_cwd.checkpoint import manifest
from hf_cwd.checkpoint.files import CheckpointError
from hf_cwd.checkpoint.storage import REPLACED, Storage

STALE = "_tmp-checkpoint-{}-0123abcd"


def fill(folder, text="x", *, sealed=True):
    folder.mkdir(parents=True)
    (folder / "model.bin").write_text(text)
    if sealed:
        manifest.write(folder, step=int(folder.name.rpartition("-")[2]), world_size=1, versions={})


def save(storage, name, text="new"):
    staging = storage.stage(name)
    (staging / name).mkdir()
    (staging / name / "model.bin").write_text(text)
    assert not (storage.directory / name).exists() or (storage.directory / name / "model.bin").read_text() != text
    storage.seal(staging / name, step=3, versions={"a": "1"})
    storage.publish(staging, name)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_gets_its_name_whole(tmp_path):
    storage = Storage(tmp_path)
    save(storage, "checkpoint-3")
    assert tree(tmp_path) == ["checkpoint-3/cwd_manifest.json", "checkpoint-3/model.bin"]
    assert manifest.verify(tmp_path / "checkpoint-3").versions == {"a": "1"}
    save(storage, "checkpoint-3", "newer")
    assert tree(tmp_path) == ["checkpoint-3/cwd_manifest.json", "checkpoint-3/model.bin"]
    assert (tmp_path / "checkpoint-3" / "model.bin").read_text() == "newer"


def test_what_was_sealed_gets_its_name_and_what_was_not_is_removed(tmp_path):
    fill(tmp_path / STALE.format(4) / "checkpoint-4")
    fill(tmp_path / STALE.format(5) / "checkpoint-5", sealed=False)
    fill(tmp_path / STALE.format(6) / "checkpoint-6")
    (tmp_path / STALE.format(6) / "checkpoint-6" / "model.bin").write_text("cut")
    fill(tmp_path / STALE.format(7) / "rotated", sealed=False)
    (tmp_path / STALE.format(8)).mkdir()
    (tmp_path / "_tmp-probe-0123abcd").touch()
    lines = Storage(tmp_path).recover(fast=False)
    assert tree(tmp_path) == ["checkpoint-4/cwd_manifest.json", "checkpoint-4/model.bin"]
    assert os.listdir(tmp_path) == ["checkpoint-4"]
    assert len(lines) == 5
    assert sum("is complete and has its name now" in line for line in lines) == 1


@pytest.mark.parametrize("is_new_whole", [True, False])
def test_a_replaced_checkpoint_is_there_in_its_old_or_its_new_form(tmp_path, is_new_whole):
    """The run was ended when the old one had lost its name, and the new one had not yet got it."""
    fill(tmp_path / STALE.format(4) / "checkpoint-4", "new", sealed=is_new_whole)
    fill(tmp_path / "checkpoint-4", "old")
    os.replace(tmp_path / "checkpoint-4", tmp_path / STALE.format(4) / REPLACED)
    Storage(tmp_path).recover(fast=False)
    assert os.listdir(tmp_path) == ["checkpoint-4"]
    assert (tmp_path / "checkpoint-4" / "model.bin").read_text() == ("new" if is_new_whole else "old")
    manifest.verify(tmp_path / "checkpoint-4")


def test_other_directories_are_left_alone(tmp_path):
    for name in ("_tmp-mine", "_tmp-checkpoint-4", "_tmp-checkpoint-4-XYZ", "runs", "checkpoint-best"):
        fill(tmp_path / name / "checkpoint-4", sealed=False)
    before = tree(tmp_path)
    storage = Storage(tmp_path)
    assert storage.recover(fast=False) == []
    storage.rotate(1, ["checkpoint-9"])
    assert tree(tmp_path) == before


def test_rotation_keeps_what_it_is_told_to_and_the_newest(tmp_path):
    for age, step in enumerate((5, 2, 3, 9)):  # 9 is younger than what is saved now, by the clock too
        fill(tmp_path / f"checkpoint-{step}")
        os.utime(tmp_path / f"checkpoint-{step}", (1000 + age, 1000 + age))
    storage = Storage(tmp_path)
    for limit in (None, 0, 4):
        storage.rotate(limit, ["checkpoint-3"])
        assert [*storage.checkpoints()] == [2, 3, 5, 9]
    storage.rotate(3, ["checkpoint-3", "checkpoint-5"])
    assert [*storage.checkpoints()] == [3, 5, 9]
    storage.rotate(1, ["checkpoint-3", "checkpoint-5"])
    assert [*storage.checkpoints()] == [3, 5]
    assert not [name for name in os.listdir(tmp_path) if name.startswith("_")]


def test_an_error_leaves_the_directory_as_it_was(tmp_path):
    fill(tmp_path / "checkpoint-2")
    before, storage = tree(tmp_path), Storage(tmp_path)
    staging = storage.stage("checkpoint-4")
    (staging / "checkpoint-4").mkdir()
    (staging / "checkpoint-4" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="damaged header"):
        storage.seal(staging / "checkpoint-4", step=4, versions={})
    storage.discard(staging)
    assert tree(tmp_path) == before
