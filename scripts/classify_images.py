#!/usr/bin/env python
"""Train an image classifier, from scratch or from pretrained weights, with the Hugging Face Trainer and any `--optim`.

From scratch, on a directory with one directory of images a class:

    python scripts/classify_images.py --config_name configs/models/vit-small-16.json --train_dir images/train \\
        --validation_dir images/val --output_dir runs/vit-small-16 \\
        --optim cwd_adamw --learning_rate 1e-3 --weight_decay 0.1 --num_train_epochs 90

It always trains, then evaluates on the held-out images and saves model and image processor. Field names are those of
transformers' `run_image_classification.py`; every flag of TrainingArguments works; a .json or .yaml file of flags may
come first. It needs pillow, not torchvision.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from common.images_data import MODES, EpochCallback, ImageArguments, Images, collate, load_images, read_labels
from common.lm_args import ModelArguments, ScriptArguments, find_checkpoint, flag, parse_flags
from common.lm_model import load_config, load_model
from common.run_trainer import check_metric, count, load_accuracy, run, seed, set_up_logging, trainer_class
from common.usage import UsageError, command, in_words, told
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

try:
    from transformers import ViTImageProcessorPil as ViTImageProcessor
except ImportError:  # an older transformers, whose ViTImageProcessor itself is the one that needs no torchvision
    from transformers import ViTImageProcessor


@dataclass
class ImageModelArguments(ModelArguments):
    """Which model and image processor."""

    image_processor_name: str | None = flag(
        "A directory, JSON file or Hub id; by default the one of --model_name_or_path, or one made for --config_name: "
        "its image_size, else 224, and values from -1 to 1."
    )
    ignore_mismatched_sizes: bool = flag("Start with a new head where --model_name_or_path has other labels.", False)


def parse(argv: Sequence[str] | None) -> tuple[ImageModelArguments, ImageArguments, ScriptArguments]:
    kinds = (ImageModelArguments, ImageArguments, ScriptArguments)
    model, data, training = parse_flags(argv, kinds, __doc__.splitlines()[0])
    model.check()
    if (data.dataset_name is None) == (data.train_dir is None):
        raise UsageError("no data, or two: give exactly one of --dataset_name and --train_dir")
    return model, data, training


def check_config(config) -> None:
    """Refuses, before any data is read, what the model could not do with an image."""
    if getattr(config, "num_channels", 3) not in MODES:
        raise UsageError(f"num_channels {config.num_channels}: images are read with 1 channel (grey) or 3 (RGB)")
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if image is not None and patch is not None and any(i < p for i, p in zip(_pair(image), _pair(patch), strict=False)):
        raise UsageError(
            f"image_size {image} is smaller than patch_size {patch}: change one, e.g. by --config_overrides patch_size="
        )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def set_labels(config, names: list[str], args: ImageModelArguments) -> None:
    """Writes the data's labels into the configuration; a trained head of another size is given up only when asked."""
    head = any(name.endswith("ForImageClassification") for name in config.architectures or ())
    if args.model_name_or_path and head and config.num_labels != len(names) and not args.ignore_mismatched_sizes:
        raise UsageError(
            f"{args.model_name_or_path} has a head for {config.num_labels} labels, the data has {len(names)}: give "
            "--ignore_mismatched_sizes true to start with a new head"
        )
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.problem_type = "single_label_classification"


def load_processor(args: ImageModelArguments, config):
    name = args.image_processor_name or args.model_name_or_path
    if name is not None:
        hub = {"cache_dir": args.cache_dir, "token": args.token, "trust_remote_code": args.trust_remote_code}
        revision = args.model_revision if name == args.model_name_or_path else "main"
        with told(f"{name} has no image processor that can be read", "Give another --image_processor_name"):
            return AutoImageProcessor.from_pretrained(name, revision=revision, **hub)
    height, width = _pair(getattr(config, "image_size", 224))
    half = [0.5] * getattr(config, "num_channels", 3)
    return ViTImageProcessor(size={"height": height, "width": width}, image_mean=half, image_std=half)


def check_images(config, trust_remote_code: bool, *parts: Images) -> None:
    """Refuses a processor whose images have a size that the model does not take; what it takes, its forward says."""
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config, trust_remote_code=trust_remote_code)
    for part in parts:
        shape = part[0]["pixel_values"].shape
        try:
            with contextlib.suppress(RuntimeError):  # of a model that needs more than shapes
                model(pixel_values=torch.empty(1, *shape, device="meta"))
        except ValueError as error:
            raise UsageError(
                f"the image processor makes images of {' x '.join(map(str, shape))}, which the model does not take: "
                f"{in_words(error)} Give another --image_processor_name, or --config_overrides image_size={shape[-1]}"
            ) from error


def accuracy(training: TrainingArguments):
    """`compute_metrics` for argmax predictions."""
    metric = load_accuracy(training)

    def compute(output) -> dict[str, float]:
        result = metric.compute(predictions=output.predictions, references=output.label_ids)
        return {"accuracy": result["token_accuracy"]}  # one label an image, as one token a position

    return compute


def main(argv: Sequence[str] | None = None, callbacks: Sequence[transformers.TrainerCallback] = ()) -> dict:
    """Train, evaluate and save; the metrics. UsageError, a ValueError, is raised for what the caller can mend."""
    model_args, data_args, training = parse(argv)
    check_metric(training, "loss", "accuracy")
    set_up_logging(training)
    checkpoint = find_checkpoint(training)
    config = load_config(model_args)
    check_config(config)
    with training.main_process_first(desc="load the images"):
        rows = load_images(data_args, cache_dir=model_args.cache_dir, token=model_args.token)
    names, *labels = read_labels(*rows, data_args.label_column_name)
    set_labels(config, names, model_args)
    processor = load_processor(model_args, config)
    drawn_by = training.seed if training.data_seed is None else training.data_seed
    options = {"processor": processor, "channels": getattr(config, "num_channels", 3)}
    train = Images(rows[0], labels[0], data_args, augmentation_seed=drawn_by, **options)
    validation = Images(rows[1], labels[1], data_args, **options)

    seed(training)
    mismatch = {"ignore_mismatched_sizes": model_args.ignore_mismatched_sizes}
    model = load_model(model_args, config, AutoModelForImageClassification, **mismatch)
    check_images(config, model_args.trust_remote_code, train, validation)
    with told("the Trainer takes no such flags"):
        trainer = trainer_class(Trainer, training)(
            model=model,
            args=training,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=processor,
            data_collator=collate,
            compute_metrics=accuracy(training),
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
            callbacks=[EpochCallback(train), *callbacks],
        )
    sizes = {"num_parameters": count(model), "num_labels": len(names)}
    sizes |= {"train_images": len(train), "eval_images": len(validation)}
    return run(trainer, checkpoint, lambda metrics: sizes, of_language=False)


if __name__ == "__main__":
    command(main)
