"""classify_images.py: what it refuses, and says."""

import runpy
import shutil
import sys
from pathlib import Path

import classify_images
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from usage import UsageError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/classify_images.py"

ERRORS = {
    "no data": ({"train_dir": None}, "no data.*--dataset_name and --train_dir"),
    "two data": ({"dataset_name": "x"}, "exactly one of --dataset_name and --train_dir"),
    "no model": ({"config_name": None}, "exactly one of --config_name"),
    "two models": ({"model_name_or_path": "x"}, "exactly one of --config_name"),
    "no config": ({"config_name": "nowhere.json"}, "--config_name nowhere.json: no such file"),
    "no directory": ({"train_dir": "nowhere"}, "nowhere: no such directory.*DIRECTORY/CLASS/IMAGE"),
    "no held-out directory": ({"validation_dir": "nowhere"}, "nowhere: no such directory"),
    "no classes": ({"train_dir": "{digits}/train/one"}, "train/one holds no class directories"),
    "no images": ({"train_dir": "{digits}/bad/empty"}, "bad/empty/one holds no images .*png"),
    "no image": ({"train_dir": "{digits}/bad/text"}, "bad/text/one/1.png cannot be read as an image"),
    "one class": ({"train_dir": "{digits}/bad/single"}, "all training images have the label one"),
    "unknown label": ({"validation_dir": "{digits}/bad/new"}, "labels that the training images lack: eleven, ten$"),
    "split": ({"validation_dir": None, "train_val_split": 0}, "--train_val_split 0.0 of 1438 images"),
    "small split": ({"validation_dir": None, "train_val_split": 1e-4}, "--train_val_split 0.0001 of 1438 images"),
    "number": ({"max_eval_samples": 0}, "0 is no number of images"),
    "patch": ({"config_overrides": "patch_size=16"}, "image_size 8 is smaller than patch_size 16"),
    "channels": ({"config_overrides": "num_channels=4"}, "num_channels 4: .*1 channel .* or 3"),
    "nothing to resume": ({"resume_from_checkpoint": "true"}, "no checkpoint in"),
    "unknown flag": ({"train_folder": "x"}, "--train_folder x"),
}


@pytest.fixture(scope="module")
def bad(digits):
    """Directories that hold mistakes."""
    image = next((digits / "train/one").iterdir())
    for path in ("bad/single/one/1.png", "bad/new/one/1.png", "bad/new/ten/1.png", "bad/new/eleven/1.PNG"):
        (digits / path).parent.mkdir(parents=True)
        shutil.copy(image, digits / path)
    for path in ("bad/empty/one/notes.txt", "bad/text/one/1.png"):
        (digits / path).parent.mkdir(parents=True)
        (digits / path).write_text("this is no image")


@pytest.mark.usefixtures("bad")
@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=ERRORS)
def test_mistakes(digits, image_flags, changes, message):
    changes = {key: value.format(digits=digits) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(UsageError, match=message):
        classify_images.main(image_flags(output_dir=digits / "mistakes", **changes))


def test_overrides_belong_to_a_config(image_flags):
    with pytest.raises(UsageError, match="--config_overrides changes a --config_name"):
        classify_images.main(image_flags(config_name=None, model_name_or_path="x", config_overrides="image_size=16"))


def test_image_that_breaks_off_is_named(digits, image_flags):
    """Its header is fine: found only when a worker reads it."""
    for word in ("one", "two"):
        (digits / "broken" / word).mkdir(parents=True)
        for name, file in zip("abcd", (digits / "train" / word).iterdir(), strict=False):
            (digits / "broken" / word / f"{name}.png").write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UsageError, match=r"broken/(one|two)/[abcd]\.png cannot be read as an image"):
        classify_images.main(image_flags(train_dir=digits / "broken", validation_dir=None, dataloader_num_workers=1))


@pytest.mark.parametrize(
    ("feature", "labels", "message"),
    [
        (ClassLabel(names=["a", "b"]), [0, 1, -1], "row 2 has no label in column 'label'"),
        (Value("string"), ["a", None, "b"], "row 1 has no label"),
        (Value("float32"), [0.5, 1.0, 2.0], "'label' holds .*float32.*: expected one name or number an image"),
    ],
    ids=["unlabelled", "missing", "numbers with a fraction"],
)
def test_rows_without_a_class(digits, image_flags, feature, labels, message, tmp_path):
    image = PIL.Image.new("L", (8, 8))
    features = Features({"image": Image(), "label": feature})
    Dataset.from_dict({"image": [image] * 3, "label": labels}, features=features).save_to_disk(tmp_path / "rows")
    with pytest.raises(UsageError, match=message):
        classify_images.main(image_flags(train_dir=None, dataset_name=tmp_path / "rows"))


def test_command_line_tells_a_mistake_in_one_line(monkeypatch, image_flags):
    monkeypatch.setattr(sys, "argv", ["classify_images.py", *image_flags(train_dir="nowhere")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code.startswith("classify_images.py: error: nowhere: no such directory")
