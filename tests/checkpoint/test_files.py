"""The disk is asked early, for what this process writes and nothing else, and what it answers is not lost."""

import errno
import os
import time

import pytest

from hf_cwd.checkpoint import files
from hf_cwd.checkpoint.files import checksums, written_early


@pytest.fixture
def asked(monkeypatch):
    """The files that the disk was asked for, by their names when they were."""
    seen, fsync = [], os.fsync

    def watched(descriptor):
        seen.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    return seen


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_files_that_are_being_written(tmp_path, asked):
    (tmp_path / "link").symlink_to(tmp_path / "staging")
    (tmp_path / "staging" / "global_step1").mkdir(parents=True)
    elsewhere = tmp_path / "staging.txt"
    with written_early(tmp_path / "link"), open(elsewhere, "w") as other:
        other.write("x" * 10_000)
        for name in ("model", "global_step1/states"):
            with open(tmp_path / "staging" / name, "w") as file:
                file.write("x" * 10_000)
                wait_for(lambda name=name: os.path.basename(name) in asked)
        asked.clear()
    assert "staging.txt" not in asked
    before = list(asked)
    time.sleep(3 * files.INTERVAL)
    assert asked == before  # it has ended


def test_a_file_that_is_gone_is_no_error(tmp_path, asked):
    with written_early(tmp_path), open(tmp_path / "temporary", "w"):
        (tmp_path / "temporary").unlink()
        with open(tmp_path / "model", "w"):
            wait_for(lambda: "model" in asked)


def test_an_error_of_the_disk_is_raised_although_it_is_told_only_once(tmp_path, monkeypatch):
    told, fsync = [], os.fsync

    def once(descriptor):
        if not told:
            told.append(descriptor)
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", once)
    with pytest.raises(OSError, match="Input/output error"), written_early(tmp_path), open(tmp_path / "model", "w"):
        wait_for(lambda: told)
    with pytest.raises(KeyError), written_early(tmp_path), open(tmp_path / "model", "w"):
        raise KeyError  # what is being written has its own


def test_without_proc_nothing_is_asked(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(files, "OPEN_FILES", str(tmp_path / "no proc"))
    with written_early(tmp_path), open(tmp_path / "model", "w"):
        time.sleep(3 * files.INTERVAL)
    assert asked == []


def test_checksums_are_xxh3_of_each_chunk(tmp_path, monkeypatch):
    """Of nothing and of an "a", as xxhsum -H3 prints them."""
    monkeypatch.setattr(files, "CHUNK", 1)
    (tmp_path / "empty").touch()
    (tmp_path / "file").write_bytes(b"aa")
    found = checksums(tmp_path, ["empty", "file"], sync=False)
    assert found == {"empty": ("2d06800538d394c2",), "file": ("e6c632b61e964e1f", "e6c632b61e964e1f")}
