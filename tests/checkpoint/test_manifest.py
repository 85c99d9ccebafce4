"""The manifest: every kind of damage is found by name, nothing hostile is believed, and nothing is loaded."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from hf_cwd.checkpoint import files, manifest
from hf_cwd.checkpoint.files import CheckpointError

KEYS = {"step": 7, "world_size": 2, "versions": {"torch": "2.13"}}


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-7"
    (folder / "global_step7").mkdir(parents=True)
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(5)}, folder / "model.safetensors")
    torch.save({"state": torch.ones(100)}, folder / "optimizer.pt")
    (folder / "global_step7" / "empty.pt").touch()
    (folder / "trainer_state.json").write_text("{}")
    manifest.write(folder, **KEYS)
    return folder


def error_of(folder, **options):
    with pytest.raises(CheckpointError) as caught:
        manifest.verify(folder, **options)
    return str(caught.value)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_what_was_saved_verifies(checkpoint):
    for fast in (False, True):
        found = manifest.verify(checkpoint, fast=fast)
        assert (found.step, found.world_size, found.versions) == (7, 2, {"torch": "2.13"})
        assert [*found.files] == ["global_step7/empty.pt", "model.safetensors", "optimizer.pt", "trainer_state.json"]
        assert found.files["model.safetensors"].tensors == {"a": ("F32", (2, 3)), "b": ("F32", (5,))}
        sizes = {name: entry.size for name, entry in found.files.items()}
        assert sizes == {name: (checkpoint / name).stat().st_size for name in found.files}


@pytest.mark.parametrize("fast", [False, True])
def test_missing_cut_and_grown_files_are_named(checkpoint, fast):
    (checkpoint / "global_step7" / "empty.pt").unlink()
    size = (checkpoint / "optimizer.pt").stat().st_size
    os.truncate(checkpoint / "optimizer.pt", size - 1)
    (checkpoint / "trainer_state.json").write_text("{} ")
    said = error_of(checkpoint, fast=fast)
    assert "global_step7/empty.pt is missing" in said
    assert f"optimizer.pt has {size - 1} bytes instead of {size}: it was cut off" in said
    assert "trainer_state.json has 3 bytes instead of 2" in said
    assert "model.safetensors" not in said
    assert "resume from another one" in said


def test_one_flipped_bit_is_found_in_any_file_and_place(checkpoint, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 500)
    monkeypatch.setattr(manifest, "CHUNK", 500)
    manifest.write(checkpoint, **KEYS)
    for name in ("optimizer.pt", "trainer_state.json", "model.safetensors"):
        path = checkpoint / name
        size = path.stat().st_size
        for place in (0, size // 2, size - 1):
            flip(path, place)
            said = error_of(checkpoint)
            start = place // 500 * 500
            in_header = name == "model.safetensors" and place < size - 44  # what differs there is named as such
            assert f"{name} " in said
            assert in_header or f"was changed, in bytes {start} to {min(start + 500, size) - 1}." in said
            flip(path, place)
    manifest.verify(checkpoint)


def test_fast_looks_at_sizes_and_headers_only(checkpoint):
    flip(checkpoint / "optimizer.pt", 900)
    manifest.verify(checkpoint, fast=True)
    save_file({"a": torch.arange(6.0).reshape(3, 2), "b": torch.zeros(5)}, checkpoint / "model.safetensors")
    said = error_of(checkpoint, fast=True)
    assert "model.safetensors: tensor a is F32 [3, 2], and was F32 [2, 3] when it was saved" in said


def test_files_that_are_not_of_it_are_refused_if_they_would_be_loaded(checkpoint):
    (checkpoint / "README.md").write_text("mine")
    (checkpoint / "eval.json").write_text("{}")
    manifest.verify(checkpoint)
    for name in ("rng_state.pth", "pytorch_model.bin", "optimizer_0/.metadata", "global_step7/latest"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(b"")
        assert f"{name} is not of this checkpoint, and would be loaded with it" in error_of(checkpoint, fast=True)
        (checkpoint / name).unlink()


def test_no_pickle_is_loaded(checkpoint, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Malicious()))
    manifest.write(checkpoint, **KEYS)
    manifest.verify(checkpoint)
    (checkpoint / manifest.NAME).write_bytes(pickle.dumps(Malicious()))
    assert "is damaged" in error_of(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_links_and_pipes(checkpoint, tmp_path):
    """A link within the checkpoint is a file; one that leads out, and what would never end, are refused."""
    (checkpoint / "copy.pt").symlink_to("optimizer.pt")
    manifest.write(checkpoint, **KEYS)
    manifest.verify(checkpoint)
    (tmp_path / "secret").write_bytes((checkpoint / "optimizer.pt").read_bytes())
    (checkpoint / "copy.pt").unlink()
    (checkpoint / "copy.pt").symlink_to(tmp_path / "secret")
    assert "copy.pt is a link that leads out of the checkpoint" in error_of(checkpoint)
    with pytest.raises(CheckpointError, match="leads out"):
        manifest.write(checkpoint, **KEYS)
    (checkpoint / "copy.pt").unlink()
    os.mkfifo(checkpoint / "copy.pt")
    assert "copy.pt is not a file" in error_of(checkpoint)


@pytest.mark.parametrize("place", [0, 30, -2])
def test_a_damaged_manifest_says_so(checkpoint, place):
    flip(checkpoint / manifest.NAME, place)
    assert f"{checkpoint} cannot be verified: {manifest.NAME} " in error_of(checkpoint)


def test_every_cut_manifest_is_refused(checkpoint):
    content = (checkpoint / manifest.NAME).read_bytes()
    for length in range(0, len(content) - 1, 97):
        (checkpoint / manifest.NAME).write_bytes(content[:length])
        assert "cannot be verified" in error_of(checkpoint)


def sealed(body, **changes):
    """A manifest whose own checksum is right, whatever it says."""
    body = {**{key: value for key, value in body.items() if key not in ("format", "sha256")}, **changes}
    return {"format": body.pop("format", 2), "sha256": manifest._digest(body), **body}


ENTRY = {"size": 0, "xxh3_64": ["0" * 16], "tensors": None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": {"/etc/passwd": ENTRY}}, "'/etc/passwd' is not a path below the checkpoint"),
        ({"files": {"../other/x.pt": ENTRY}}, "'../other/x.pt' is not a path below the checkpoint"),
        ({"files": {"a/../../x.pt": ENTRY}}, "not a path below"),
        ({"files": {"a\\..\\x.pt": ENTRY}}, "not a path below"),
        ({"files": {"C:x.pt": ENTRY}}, "not a path below"),
        ({"files": {"a//b.pt": ENTRY}}, "not a path below"),
        ({"files": {"": ENTRY}}, "not a path below"),
        ({"files": {}}, "names no files"),
        ({"files": [ENTRY]}, "names no files"),
        ({"files": {"x.pt": 3}}, "has an item without exactly the keys size, tensors, xxh3_64"),
        ({"files": {"x.pt": {**ENTRY, "more": 1}}}, "has an item without exactly the keys size, tensors, xxh3_64"),
        ({"files": {"x.pt": {**ENTRY, "size": 2**62}}}, f"the wrong number of checksums for a file of {2**62} bytes"),
        ({"files": {"x.pt": {**ENTRY, "size": 2**70}}}, "where a number must be"),
        ({"files": {"x.pt": {**ENTRY, "size": True}}}, "'True' where a number must be"),
        ({"files": {"x.pt": {**ENTRY, "size": -1}}}, "'-1' where a number must be"),
        ({"files": {"x.pt": {**ENTRY, "xxh3_64": ["0"]}}}, "'0' where a checksum must be"),
        ({"files": {"x.pt": {**ENTRY, "xxh3_64": [0]}}}, "'0' where a checksum must be"),
        ({"files": {"x.pt": {**ENTRY, "tensors": {"a": 1}}}}, "has tensors without a dtype and a shape"),
        ({"is_resumable": 1}, "does not say whether it is resumable"),
        ({"step": "7"}, "'7' where a number must be"),
        ({"versions": {"torch": 2}}, "has versions that are not text"),
        ({"more": 1}, "has an item without exactly the keys files, is_resumable, step, versions, world_size"),
        ({"format": 3}, "has format 3, of a newer hf_cwd, but this one reads format 2: resume with the version of hf"),
        ({"format": 1}, "has format 1, of an older hf_cwd, but this one reads format 2: resume with the version of hf"),
        ({"format": "1"}, "has no format"),
    ],
)
def test_hostile_manifests_are_refused(checkpoint, changes, said):
    path = checkpoint / manifest.NAME
    path.write_text(json.dumps(sealed(json.loads(path.read_text()), **changes)))
    assert said in error_of(checkpoint)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": 1, "format": 1}', "has a key twice"),
        ('{"format": NaN}', "NaN where a number must be"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"format": 1' + "0" * 5000 + "}", "is not valid JSON"),
        ("[1]", "has no format"),
    ],
)
def test_hostile_json_is_refused(checkpoint, text, said):
    (checkpoint / manifest.NAME).write_text(text)
    assert said in error_of(checkpoint)


def test_a_damaged_header_of_safetensors(checkpoint):
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    for damaged in (b"", b"\xff" * 8 + content[8:], content[:8] + b"\0" + content[9:], content[:-4]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors has "):
            manifest.describe(checkpoint)


def test_without_a_manifest(tmp_path):
    assert f"{manifest.NAME} is missing" in error_of(tmp_path)
    assert not manifest.exists(tmp_path)
