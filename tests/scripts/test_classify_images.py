"""classify_images.py: real runs of a tiny ViT on scikit-learn's digits, 1797 real images of 8 x 8 pixels."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import classify_images
import numpy as np
import PIL.Image
import pytest
import torch
from common.usage import UsageError
from datasets import Dataset, DatasetDict, Features, Image, Value
from digits import CLASSES
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, TrainerCallback, pipeline

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/classify_images.py"

# Mirrored digits are no digits, and a tenth of one may be of any: both augmentations off.
LEARNING = {"random_crop": "false", "random_flip": "false", "max_steps": 120, "lr_scheduler_type": "cosine"}


@pytest.fixture(scope="module")
def learned(digits, image_flags):
    output = digits / "learned"
    return output, classify_images.main(image_flags(output_dir=output, **LEARNING))


def predictions(model: Path, files: list[Path]) -> list[str]:
    classify = pipeline("image-classification", model=str(model), device="cpu")
    return [answers[0]["label"] for answers in classify([str(file) for file in files], top_k=1)]


def test_pipeline_reads_the_result_and_agrees_with_the_metrics(learned, digits):
    output, metrics = learned
    files = sorted((digits / "validation").glob("*/*.png"))
    right = sum(label == file.parent.name for label, file in zip(predictions(output, files), files, strict=True))
    assert right / len(files) == metrics["eval_accuracy"] > 0.8
    model = AutoModelForImageClassification.from_pretrained(output)
    assert model.config.label2id == {word: i for i, word in enumerate(sorted(CLASSES))}
    assert metrics["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert (metrics["num_labels"], metrics["train_images"], metrics["eval_images"]) == (10, 1438, 359)
    saved = json.loads((output / "all_results.json").read_text())
    assert {"train_loss", "eval_loss", "eval_accuracy"} <= saved.keys()
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    fractions = [entry["cwd/decayed_fraction"] for entry in history if "loss" in entry]
    assert len(fractions) == 120
    assert all(0 < fraction < 1 for fraction in fractions)


class Epochs(TrainerCallback):
    """Which epoch the training images believe it is, at the end of each."""

    def __init__(self):
        self.seen = []

    def on_epoch_end(self, args, state, control, train_dataloader=None, **kwargs):
        self.seen.append(int(train_dataloader.dataset.epoch))


def test_resumed_run_equals_the_uninterrupted_one(digits, image_flags):
    """From the middle of the second of three epochs, and with the images now read by two other processes."""
    options = {"max_train_samples": 64, "per_device_train_batch_size": 16, "max_steps": 10}
    options |= {"save_strategy": "steps", "save_steps": 6, "max_eval_samples": 10}
    whole, resumed = digits / "whole", digits / "resumed"
    epochs = Epochs()
    classify_images.main(image_flags(output_dir=whole, **options), callbacks=[epochs])
    assert epochs.seen == [0, 1, 2]
    shutil.copytree(whole / "checkpoint-6", resumed / "checkpoint-6")
    options |= {"resume_from_checkpoint": "true", "dataloader_num_workers": 2, "dataloader_persistent_workers": "true"}
    epochs = Epochs()
    classify_images.main(image_flags(output_dir=resumed, **options), callbacks=[epochs])
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


def test_best_model_is_the_one_saved_at_the_end(digits, image_flags):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": "true", "metric_for_best_model": "loss", "max_eval_samples": 50}
    # The larger loss is the better one, after a step that overshoots: so that the best checkpoint is not the last.
    options |= {"greater_is_better": "true", "learning_rate": 0.3}
    metrics = classify_images.main(image_flags(output_dir=digits / "best", **options))
    state = json.loads((digits / "best/trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-2"
    assert metrics["eval_loss"] == state["best_metric"]
    best, final, last = (
        AutoModelForImageClassification.from_pretrained(digits / "best" / name).state_dict()
        for name in ("checkpoint-2", "", "checkpoint-4")
    )
    assert all(torch.equal(best[key], final[key]) for key in best)
    assert not any(torch.equal(last[key], final[key]) for key in best)


def test_two_processes_see_the_images_of_one(digits, image_flags):
    options = {"max_train_samples": 32, "max_steps": None, "num_train_epochs": 2, "max_eval_samples": 50}
    options |= {"config_overrides": "hidden_dropout_prob=0.0"}
    one = classify_images.main(image_flags(output_dir=digits / "one", per_device_train_batch_size=16, **options))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    argv = image_flags(output_dir=digits / "two", per_device_train_batch_size=8, ddp_backend="gloo", **options)
    done = subprocess.run([*launcher, SCRIPT, *argv], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    state = json.loads((digits / "two/trainer_state.json").read_text())
    assert state["global_step"] == 4  # 2 epochs of 32 images by 8: 4 steps of 2 ranks, or 8 of one
    two = json.loads((digits / "two/all_results.json").read_text())
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)  # means of 2 x 8 and of 16 float32 losses
    assert two["eval_accuracy"] == pytest.approx(one["eval_accuracy"], abs=1.5 / 50)  # one near tie may fall otherwise


def test_held_out_labels_are_matched_by_name(learned, digits, image_flags):
    """`eight` comes first in the alphabet: without it, every index moves."""
    few = digits / "few"
    for word in ("zero", "nine", "two"):
        shutil.copytree(digits / "validation" / word, few / word)
    options = {"config_name": None, "model_name_or_path": learned[0], "learning_rate": 0, "max_steps": 1}
    metrics = classify_images.main(image_flags(output_dir=digits / "named", validation_dir=few, **options))
    files = sorted(few.glob("*/*.png"))
    right = sum(label == file.parent.name for label, file in zip(predictions(learned[0], files), files, strict=True))
    assert metrics["eval_accuracy"] == pytest.approx(right / len(files))


def test_other_labels_want_a_new_head(learned, digits, image_flags):
    """From a directory that `datasets` reads itself, with a split for training only."""
    few = digits / "three"
    for word in ("zero", "nine", "two"):
        shutil.copytree(digits / "train" / word, few / "train" / word)
    options = {"config_name": None, "model_name_or_path": learned[0], "learning_rate": 0, "train_dir": None}
    options |= {"dataset_name": few, "validation_dir": None, "cache_dir": digits / "cache"}
    options |= {"output_dir": digits / "new"}
    with pytest.raises(UsageError, match="head for 10 labels, the data has 3: give --ignore_mismatched_sizes true"):
        classify_images.main(image_flags(**options))
    metrics = classify_images.main(image_flags(ignore_mismatched_sizes="true", **options))
    number = len(list(few.glob("train/*/*.png")))
    assert (metrics["train_images"], metrics["eval_images"]) == (number - number * 15 // 100, number * 15 // 100)
    old, new = (load_file(folder / "model.safetensors") for folder in (learned[0], digits / "new"))
    assert new["classifier.weight"].shape == (3, 48)
    assert all(torch.equal(old[key], new[key]) for key in old if not key.startswith("classifier"))
    assert AutoConfig.from_pretrained(digits / "new").id2label == {0: "nine", 1: "two", 2: "zero"}


def test_grey_images_of_a_saved_dataset(digits, image_flags):
    """Numbers as labels, in the order of numbers; columns of other names; a model with one channel."""
    data = load_digits()
    images = [PIL.Image.fromarray(pixels.astype(np.uint8) * 15) for pixels in data.images[:200]]
    rows = {"picture": images, "number": [int(target) + 5 for target in data.target[:200]], "note": ["x"] * 200}
    features = Features({"picture": Image(), "number": Value("int64"), "note": Value("string")})
    DatasetDict(train=Dataset.from_dict(rows, features=features)).save_to_disk(digits / "saved")
    options = {"train_dir": None, "validation_dir": None, "dataset_name": digits / "saved"}
    with pytest.raises(UsageError, match=r"no column 'image'.*--image_column_name from: picture, number, note"):
        classify_images.main(image_flags(**options))
    options |= {"image_column_name": "picture", "config_overrides": "num_channels=1"}
    with pytest.raises(UsageError, match=r"no column 'label'.*--label_column_name from: picture, number, note"):
        classify_images.main(image_flags(**options))
    metrics = classify_images.main(image_flags(output_dir=digits / "grey", label_column_name="number", **options))
    assert (metrics["train_images"], metrics["eval_images"]) == (170, 30)
    config = AutoConfig.from_pretrained(digits / "grey")
    assert list(config.id2label.values()) == [str(number) for number in range(5, 15)]
    assert list(AutoImageProcessor.from_pretrained(digits / "grey").image_mean) == [0.5]
    with pytest.raises(UsageError, match=r"--image_column_name note: the column holds .*string.*, no images"):
        classify_images.main(image_flags(**options | {"image_column_name": "note", "label_column_name": "number"}))


def test_model_without_an_image_size(digits, image_flags):
    """A ResNet, its image processor from a file; that one resizes the shortest edge and crops."""
    config = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    processor = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 16}, "crop_pct": 0.5}
    (digits / "resnet.json").write_text(json.dumps(config | {"layer_type": "basic"}))
    (digits / "processor.json").write_text(json.dumps(processor))
    options = {"config_name": digits / "resnet.json", "image_processor_name": digits / "processor.json"}
    metrics = classify_images.main(image_flags(output_dir=digits / "resnet", **options))
    assert metrics["num_labels"] == 10
    assert AutoImageProcessor.from_pretrained(digits / "resnet").crop_pct == 0.5


@pytest.mark.parametrize(("name", "millions"), [("vit-small-16", 22.05), ("vit-base-16", 86.57)])
def test_sizes_of_the_configurations(name, millions):
    config = AutoConfig.from_pretrained(ROOT / f"configs/models/{name}.json")
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        classify_images.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--image_processor_name", "--random_crop", "--weight_decay", "cwd_muon"))
