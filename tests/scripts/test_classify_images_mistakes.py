"""classify_images.py: what it refuses, and says."""

import re
import shutil
from pathlib import Path

import classify_images
import digits as digits_script
import PIL.Image
import pytest
from classify_images import ViTImageProcessor
from common.usage import UsageError
from datasets import ClassLabel, Dataset, Features, Image, Value

ROOT = Path(__file__).resolve().parents[2]

ERRORS = {
    "no data": ({"train_dir": None}, "no data.*--dataset_name and --train_dir"),
    "two data": ({"dataset_name": "x"}, "exactly one of --dataset_name and --train_dir"),
    "no model": ({"config_name": None}, "exactly one of --config_name"),
    "two models": ({"model_name_or_path": "x"}, "exactly one of --config_name"),
    "no config": ({"config_name": "nowhere.json"}, "--config_name nowhere.json: no such file or directory"),
    "no directory": ({"train_dir": "nowhere"}, "nowhere: no such directory.*DIRECTORY/CLASS/IMAGE"),
    "no held-out directory": ({"validation_dir": "nowhere"}, "nowhere: no such directory"),
    "no classes": ({"train_dir": "{digits}/train/one"}, "train/one holds no class directories"),
    "no images": ({"train_dir": "{digits}/bad/empty"}, "bad/empty/one holds no images .*png"),
    "no image": ({"train_dir": "{digits}/bad/text"}, "bad/text/one/1.png cannot be read as an image"),
    "one class": ({"train_dir": "{digits}/bad/single"}, "all training images have the label one"),
    "unknown label": ({"validation_dir": "{digits}/bad/new"}, "labels that the training images lack: eleven, ten$"),
    "split": ({"validation_dir": None, "train_val_split": 0}, "--train_val_split 0.0 of 1438 images"),
    "small split": ({"validation_dir": None, "train_val_split": 1e-4}, "--train_val_split 0.0001 of 1438 images"),
    "number": ({"max_eval_samples": 0}, "--max_eval_samples 0: give 1 or more"),
    "patch": ({"config_overrides": "patch_size=16"}, "image_size 8 is smaller than patch_size 16"),
    "channels": ({"config_overrides": "num_channels=4"}, "num_channels 4: .*1 channel .* or 3"),
    "another model": (
        {"config_name": "{root}/configs/models/llama-1m.json"},
        "makes no model of this kind: ",
    ),
    "no processor": ({"image_processor_name": "{digits}/train"}, "train has no image processor that can be read"),
    "broken processor": (
        {"image_processor_name": "{digits}/bad/cut"},
        "bad/cut has no image processor ",
    ),
    "large processor": (
        {"image_processor_name": "{digits}/bad/large"},
        "images of 3 x 16 x 16, which the model does",
    ),
    "optimizer": ({"optim": "cwd_adamv"}, "cwd_adamv does not exist. Did you mean cwd_adamw"),
    "metric": ({"metric_for_best_model": "f1"}, "--metric_for_best_model f1: give one of loss, accuracy"),
    "batch": ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0: give 1 or more"),
    "output is a file": ({"output_dir": "{digits}/config.json"}, "config.json is a file. Give a directory"),
    "negative rate": ({"learning_rate": -1}, "--learning_rate -1.0: give 0 or more"),
    "nothing to resume": ({"resume_from_checkpoint": "true"}, "no checkpoint in"),
    "unknown flag": ({"train_folder": "x"}, "--train_folder x"),
}


@pytest.fixture(scope="module")
def bad(digits):
    """Directories that hold mistakes."""
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(digits / "bad/large")
    (digits / "bad/cut").mkdir()
    (digits / "bad/cut/preprocessor_config.json").write_text("{")
    image = next((digits / "train/one").iterdir())
    for path in ("bad/single/one/1.png", "bad/new/one/1.png", "bad/new/ten/1.png", "bad/new/eleven/1.PNG"):
        (digits / path).parent.mkdir(parents=True)
        shutil.copy(image, digits / path)
    for path in ("bad/empty/one/notes.txt", "bad/text/one/1.png"):
        (digits / path).parent.mkdir(parents=True)
        (digits / path).write_text("this is no image")


@pytest.mark.usefixtures("bad")
@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=ERRORS)
def test_mistakes(digits, image_flags, refused, changes, message):
    changes = {k: v.format(digits=digits, root=ROOT) if isinstance(v, str) else v for k, v in changes.items()}
    assert re.search(message, refused(classify_images, image_flags(**({"output_dir": digits / "mistakes"} | changes))))


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: DIRECTORY"),
        (["a", "b"], "unrecognized arguments: b"),
        (["--size", "3"], "--size"),
        ([__file__], "is a file. Give a directory, or remove the file"),
        (["/proc/digits"], "DIRECTORY /proc/digits cannot be written: "),
    ],
)
def test_digits(arguments, message, refused):
    assert message in refused(digits_script, arguments)


def test_help_of_digits_makes_no_directory(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        digits_script.main(["--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")
    assert list(tmp_path.iterdir()) == []
