"""classify_images.py: real runs of a tiny ViT on scikit-learn's digits, 1797 real images of 8 x 8 pixels."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import classify_images
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from images_data import ImageArguments, Images, load_folder, random_resized_crop, spread
from lm_args import UsageError
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, TrainerCallback, pipeline

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/classify_images.py"
# Words, whose alphabetical order is not that of the numbers.
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CONFIG = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "hidden_dropout_prob": 0.1,  # so that a resumed run must also restore the state of the random numbers
    "initializer_range": 0.1,  # the default is for wider layers
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """train/ and validation/, every fifth image, as WORD/NUMBER.png; config.json."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    data = load_digits()
    for i, (pixels, target) in enumerate(zip(data.images, data.target, strict=True)):
        path = folder / ("validation" if i % 5 == 4 else "train") / WORDS[target] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def flags(digits):
    """`flags(output_dir=..., optim=...)`: arguments of the script, on top of tiny defaults; None leaves one out."""
    defaults = {
        "config_name": digits / "config.json",
        "train_dir": digits / "train",
        "validation_dir": digits / "validation",
        "output_dir": digits / "unused",
        "optim": "cwd_adamw",
        "weight_decay": 0.1,
        "learning_rate": 5e-3,
        "max_steps": 2,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        "use_cpu": "true",
        "dataloader_pin_memory": "false",
    }

    def build(**changes) -> list[str]:
        return [
            str(part)
            for key, value in (defaults | changes).items()
            if value is not None
            for part in (f"--{key}", value)
        ]

    return build


# Mirrored digits are no digits, and a tenth of one may be of any: both augmentations off.
LEARNING = {"random_crop": "false", "random_flip": "false", "max_steps": 120, "lr_scheduler_type": "cosine"}


@pytest.fixture(scope="module")
def learned(digits, flags):
    output = digits / "learned"
    return output, classify_images.main(flags(output_dir=output, **LEARNING))


def predictions(model: Path, files: list[Path]) -> list[str]:
    classify = pipeline("image-classification", model=str(model), device="cpu")
    return [answers[0]["label"] for answers in classify([str(file) for file in files], top_k=1)]


def test_pipeline_reads_the_result_and_agrees_with_the_metrics(learned, digits):
    output, metrics = learned
    files = sorted((digits / "validation").glob("*/*.png"))
    right = sum(label == file.parent.name for label, file in zip(predictions(output, files), files, strict=True))
    assert right / len(files) == metrics["eval_accuracy"] > 0.8
    model = AutoModelForImageClassification.from_pretrained(output)
    assert model.config.label2id == {word: i for i, word in enumerate(sorted(WORDS))}
    assert metrics["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert (metrics["num_labels"], metrics["train_images"], metrics["eval_images"]) == (10, 1438, 359)
    saved = json.loads((output / "all_results.json").read_text())
    assert {"train_loss", "eval_loss", "eval_accuracy"} <= saved.keys()
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    fractions = [entry["cwd/decayed_fraction"] for entry in history if "loss" in entry]
    assert len(fractions) == 120
    assert all(0 < fraction < 1 for fraction in fractions)


# Lion: a learning rate 5 times smaller, a decay as much larger.
@pytest.mark.parametrize(("optim", "learning_rate", "weight_decay"), [("cwd_lion", 1e-3, 0.5), ("cwd_muon", 5e-3, 0.1)])
def test_other_rules_learn(digits, flags, optim, learning_rate, weight_decay):
    options = {"optim": optim, "learning_rate": learning_rate, "weight_decay": weight_decay, **LEARNING}
    assert classify_images.main(flags(output_dir=digits / optim, **options))["eval_accuracy"] > 0.8


class Epochs(TrainerCallback):
    """Which epoch the training images believe it is, at the end of each."""

    def __init__(self):
        self.seen = []

    def on_epoch_end(self, args, state, control, train_dataloader=None, **kwargs):
        self.seen.append(int(train_dataloader.dataset.epoch))


def test_resumed_run_equals_the_uninterrupted_one(digits, flags):
    """From the middle of the second of three epochs, and with the images now read by two other processes."""
    options = {"max_train_samples": 64, "per_device_train_batch_size": 16, "max_steps": 10}
    options |= {"save_strategy": "steps", "save_steps": 6, "max_eval_samples": 10}
    whole, resumed = digits / "whole", digits / "resumed"
    epochs = Epochs()
    classify_images.main(flags(output_dir=whole, **options), callbacks=[epochs])
    assert epochs.seen == [0, 1, 2]
    shutil.copytree(whole / "checkpoint-6", resumed / "checkpoint-6")
    options |= {"resume_from_checkpoint": "true", "dataloader_num_workers": 2, "dataloader_persistent_workers": "true"}
    epochs = Epochs()
    classify_images.main(flags(output_dir=resumed, **options), callbacks=[epochs])
    assert epochs.seen == [1, 2]
    halfway, one, other = (
        load_file(folder / "model.safetensors") for folder in (resumed / "checkpoint-6", whole, resumed)
    )
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key
    assert any(not torch.equal(halfway[key], one[key]) for key in one)
    saved = AutoModelForImageClassification.from_pretrained(resumed / "checkpoint-10").state_dict()
    final = AutoModelForImageClassification.from_pretrained(resumed).state_dict()
    assert all(torch.equal(saved[key], final[key]) for key in final)


def test_best_model_is_the_one_saved_at_the_end(digits, flags):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": "true", "metric_for_best_model": "loss", "max_eval_samples": 50}
    # The larger loss is the better one, after a step that overshoots: so that the best checkpoint is not the last.
    options |= {"greater_is_better": "true", "learning_rate": 0.3}
    metrics = classify_images.main(flags(output_dir=digits / "best", **options))
    state = json.loads((digits / "best/trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-2"
    assert metrics["eval_loss"] == state["best_metric"]
    best, final, last = (
        AutoModelForImageClassification.from_pretrained(digits / "best" / name).state_dict()
        for name in ("checkpoint-2", "", "checkpoint-4")
    )
    assert all(torch.equal(best[key], final[key]) for key in best)
    assert not any(torch.equal(last[key], final[key]) for key in best)


def test_two_processes_see_the_images_of_one(digits, flags):
    options = {"max_train_samples": 32, "max_steps": None, "num_train_epochs": 2, "max_eval_samples": 50}
    options |= {"config_overrides": "hidden_dropout_prob=0.0"}
    one = classify_images.main(flags(output_dir=digits / "one", per_device_train_batch_size=16, **options))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    argv = flags(output_dir=digits / "two", per_device_train_batch_size=8, ddp_backend="gloo", **options)
    done = subprocess.run([*launcher, SCRIPT, *argv], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    state = json.loads((digits / "two/trainer_state.json").read_text())
    assert state["global_step"] == 4  # 2 epochs of 32 images by 8: 4 steps of 2 ranks, or 8 of one
    two = json.loads((digits / "two/all_results.json").read_text())
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)  # means of 2 x 8 and of 16 float32 losses
    assert two["eval_accuracy"] == pytest.approx(one["eval_accuracy"], abs=1.5 / 50)  # one near tie may fall otherwise


def test_held_out_labels_are_matched_by_name(learned, digits, flags):
    """`eight` comes first in the alphabet: without it, every index moves."""
    few = digits / "few"
    for word in ("zero", "nine", "two"):
        shutil.copytree(digits / "validation" / word, few / word)
    options = {"config_name": None, "model_name_or_path": learned[0], "learning_rate": 0, "max_steps": 1}
    metrics = classify_images.main(flags(output_dir=digits / "named", validation_dir=few, **options))
    files = sorted(few.glob("*/*.png"))
    right = sum(label == file.parent.name for label, file in zip(predictions(learned[0], files), files, strict=True))
    assert metrics["eval_accuracy"] == pytest.approx(right / len(files))


def test_other_labels_want_a_new_head(learned, digits, flags):
    """From a directory that `datasets` reads itself, with a split for training only."""
    few = digits / "three"
    for word in ("zero", "nine", "two"):
        shutil.copytree(digits / "train" / word, few / "train" / word)
    options = {"config_name": None, "model_name_or_path": learned[0], "learning_rate": 0, "train_dir": None}
    options |= {"dataset_name": few, "validation_dir": None, "cache_dir": digits / "cache"}
    options |= {"output_dir": digits / "new"}
    with pytest.raises(UsageError, match="head for 10 labels, the data has 3: give --ignore_mismatched_sizes true"):
        classify_images.main(flags(**options))
    metrics = classify_images.main(flags(ignore_mismatched_sizes="true", **options))
    number = len(list(few.glob("train/*/*.png")))
    assert (metrics["train_images"], metrics["eval_images"]) == (number - number * 15 // 100, number * 15 // 100)
    old, new = (load_file(folder / "model.safetensors") for folder in (learned[0], digits / "new"))
    assert new["classifier.weight"].shape == (3, 48)
    assert all(torch.equal(old[key], new[key]) for key in old if not key.startswith("classifier"))
    assert AutoConfig.from_pretrained(digits / "new").id2label == {0: "nine", 1: "two", 2: "zero"}


def test_grey_images_of_a_saved_dataset(digits, flags):
    """Numbers as labels, in the order of numbers; columns of other names; a model with one channel."""
    data = load_digits()
    images = [PIL.Image.fromarray(pixels.astype(np.uint8) * 15) for pixels in data.images[:200]]
    rows = {"picture": images, "number": [int(target) + 5 for target in data.target[:200]], "note": ["x"] * 200}
    features = Features({"picture": Image(), "number": Value("int64"), "note": Value("string")})
    DatasetDict(train=Dataset.from_dict(rows, features=features)).save_to_disk(digits / "saved")
    options = {"train_dir": None, "validation_dir": None, "dataset_name": digits / "saved"}
    with pytest.raises(UsageError, match=r"no column 'image'.*--image_column_name from: picture, number, note"):
        classify_images.main(flags(**options))
    options |= {"image_column_name": "picture", "config_overrides": "num_channels=1"}
    with pytest.raises(UsageError, match=r"no column 'label'.*--label_column_name from: picture, number, note"):
        classify_images.main(flags(**options))
    metrics = classify_images.main(flags(output_dir=digits / "grey", label_column_name="number", **options))
    assert (metrics["train_images"], metrics["eval_images"]) == (170, 30)
    config = AutoConfig.from_pretrained(digits / "grey")
    assert list(config.id2label.values()) == [str(number) for number in range(5, 15)]
    assert list(AutoImageProcessor.from_pretrained(digits / "grey").image_mean) == [0.5]
    with pytest.raises(UsageError, match=r"--image_column_name note: the column holds .*string.*, no images"):
        classify_images.main(flags(**options | {"image_column_name": "note", "label_column_name": "number"}))


def test_model_without_an_image_size(digits, flags):
    """A ResNet, its image processor from a file; that one resizes the shortest edge and crops."""
    config = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    processor = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 16}, "crop_pct": 0.5}
    (digits / "resnet.json").write_text(json.dumps(config | {"layer_type": "basic"}))
    (digits / "processor.json").write_text(json.dumps(processor))
    options = {"config_name": digits / "resnet.json", "image_processor_name": digits / "processor.json"}
    metrics = classify_images.main(flags(output_dir=digits / "resnet", **options))
    assert metrics["num_labels"] == 10
    assert AutoImageProcessor.from_pretrained(digits / "resnet").crop_pct == 0.5


@pytest.mark.parametrize(("name", "millions"), [("vit-small-16", 22.05), ("vit-base-16", 86.57)])
def test_sizes_of_the_configurations(name, millions):
    config = AutoConfig.from_pretrained(ROOT / f"configs/models/{name}.json")
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def images(digits, *, seed: int | None = 0, processor=None, **options) -> Images:
    arguments = ImageArguments(**options)
    rows = load_folder(str(digits / "validation"), arguments)
    processor = processor or classify_images.ViTImageProcessor(size={"height": 12, "width": 10})
    return Images(rows, rows["label"][:], arguments, processor=processor, channels=3, augmentation_seed=seed)


def test_images_are_those_of_the_image_processor(digits):
    data = images(digits, seed=None)
    file = sorted((digits / "validation/eight").iterdir())[1]
    expected = data.processor(PIL.Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert expected.shape == (3, 12, 10)
    assert torch.equal(data[1]["pixel_values"], expected)
    assert data[1]["labels"] == 0


def test_flipped_images_are_mirrored(digits):
    plain, flipped = images(digits, seed=None), images(digits, random_crop=False)
    mirrored = 0
    for row in range(100):
        one, other = plain[row]["pixel_values"], flipped[row]["pixel_values"]
        if torch.equal(one, other):
            continue
        # Resizing a mirrored image rounds a few of its 8-bit values the other way: 1/127.5 after normalisation.
        torch.testing.assert_close(one.flip(-1), other, rtol=0, atol=1.01 / 127.5)
        mirrored += 1
    assert 30 < mirrored < 70  # of 100: over 4 standard deviations on each side


def test_crops_depend_on_seed_epoch_and_row_only(digits):
    data, again, other_seed = images(digits), images(digits), images(digits, seed=1)
    data.rows = again.rows = other_seed.rows = data.rows.select([0] * 8)  # one image as eight rows
    torch.manual_seed(5)
    assert all(torch.equal(data[row]["pixel_values"], again[row]["pixel_values"]) for row in reversed(range(8)))
    rows = [data[row]["pixel_values"] for row in range(8)]
    assert all(not torch.equal(rows[0], pixels) for pixels in rows[1:])
    assert rows[0].shape == (3, 12, 10)
    assert not torch.equal(other_seed[0]["pixel_values"], rows[0])
    data.epoch.fill_(1)
    assert not torch.equal(data[0]["pixel_values"], rows[0])
    data.epoch.fill_(0)
    assert torch.equal(data[0]["pixel_values"], rows[0])


@pytest.mark.parametrize(
    "description",
    [
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 16}, "crop_pct": 0.5},
        {"image_processor_type": "DeiTImageProcessor", "size": 20, "crop_size": {"height": 16, "width": 16}},
    ],
    ids=lambda description: description["image_processor_type"],
)
def test_crops_are_not_cut_again(digits, tmp_path, description):
    """As these processors do to an image that comes whole."""
    (tmp_path / "processor.json").write_text(json.dumps(description))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "processor.json")
    data = images(digits, processor=processor, random_flip=False)
    file = sorted((digits / "validation/eight").iterdir())[3]
    box = random_resized_crop(8, 8, np.random.default_rng([0, 0, 3]))
    crop = PIL.Image.open(file).convert("RGB").resize((16, 16), PIL.Image.Resampling.BILINEAR, box=box)
    expected = (np.asarray(crop) / 255 - np.array(processor.image_mean)) / np.array(processor.image_std)
    expected = torch.tensor(expected, dtype=torch.float32).movedim(-1, 0)
    torch.testing.assert_close(data[3]["pixel_values"], expected)


def test_crops_have_the_standard_areas_and_shapes():
    rng = np.random.default_rng(0)
    boxes = np.array([random_resized_crop(400, 400, rng) for _ in range(1000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() == 0
    assert boxes.max() == 400
    areas, ratios = widths * heights / 400**2, widths / heights
    # A side is rounded to a pixel: 1 in 98, the shortest one possible.
    assert 0.079 < areas.min() < 0.1
    assert 0.95 < areas.max() <= 1
    assert 0.75 * 0.98 < ratios.min() < 0.78
    assert 1.3 < ratios.max() < 4 / 3 * 1.02
    assert random_resized_crop(300, 12, rng) == (142, 0, 158, 12)  # no crop of a strip fits: its middle, 4:3
    assert random_resized_crop(12, 300, rng) == (0, 142, 12, 158)


def test_fewer_images_are_spread_over_all():
    rows = Dataset.from_dict({"i": range(10)})
    assert spread(rows, 4)["i"][:] == [0, 2, 5, 7]
    assert spread(rows, 20) is rows


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
def test_mistakes(digits, flags, changes, message):
    changes = {key: value.format(digits=digits) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(UsageError, match=message):
        classify_images.main(flags(output_dir=digits / "mistakes", **changes))


def test_overrides_belong_to_a_config(flags):
    with pytest.raises(UsageError, match="--config_overrides changes a --config_name"):
        classify_images.main(flags(config_name=None, model_name_or_path="x", config_overrides="image_size=16"))


def test_image_that_breaks_off_is_named(digits, flags):
    """Its header is fine: found only when a worker reads it."""
    for word in ("one", "two"):
        (digits / "broken" / word).mkdir(parents=True)
        for name, file in zip("abcd", (digits / "train" / word).iterdir(), strict=False):
            (digits / "broken" / word / f"{name}.png").write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UsageError, match=r"broken/(one|two)/[abcd]\.png cannot be read as an image"):
        classify_images.main(flags(train_dir=digits / "broken", validation_dir=None, dataloader_num_workers=1))


@pytest.mark.parametrize(
    ("feature", "labels", "message"),
    [
        (ClassLabel(names=["a", "b"]), [0, 1, -1], "row 2 has no label in column 'label'"),
        (Value("string"), ["a", None, "b"], "row 1 has no label"),
        (Value("float32"), [0.5, 1.0, 2.0], "'label' holds .*float32.*: expected one name or number an image"),
    ],
    ids=["unlabelled", "missing", "numbers with a fraction"],
)
def test_rows_without_a_class(digits, flags, feature, labels, message, tmp_path):
    image = PIL.Image.new("L", (8, 8))
    features = Features({"image": Image(), "label": feature})
    Dataset.from_dict({"image": [image] * 3, "label": labels}, features=features).save_to_disk(tmp_path / "rows")
    with pytest.raises(UsageError, match=message):
        classify_images.main(flags(train_dir=None, dataset_name=tmp_path / "rows"))


def test_row_without_an_image():
    rows = Dataset.from_dict({"image": [None]}, features=Features({"image": Image()}))
    data = Images(rows, [0], ImageArguments(), processor=classify_images.ViTImageProcessor(), channels=3)
    with pytest.raises(UsageError, match="row 0 has no image in column 'image'"):
        data[0]


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        classify_images.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--image_processor_name", "--random_crop", "--weight_decay", "cwd_muon"))


def test_command_line_tells_a_mistake_in_one_line(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["classify_images.py", *flags(train_dir="nowhere")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code.startswith("classify_images.py: error: nowhere: no such directory")
