"""Images in, tensors out: the data of `classify_images.py`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, Features, Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.lm_args import SourceArguments, flag
from common.lm_data import hold_out, load_rows
from common.usage import UsageError

# What torchvision's ImageFolder takes for images, and .gif.
EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
MODES = {1: "L", 3: "RGB"}  # pillow's names, by number of channels


@dataclass
class ImageArguments:
    """Which images, and how they become tensors."""

    dataset_name: str | None = flag("A Hub id, a local directory of `datasets` or one written by save_to_disk.")
    dataset_config_name: str | None = flag("The configuration of --dataset_name.")
    train_dir: str | None = flag("A directory with one directory of images a class: TRAIN_DIR/CLASS/IMAGE.png.")
    validation_dir: str | None = flag("Held-out images, in the same layout.")
    train_val_split: float = flag("Share of the images to hold out where the data has no validation part.", 0.15)
    image_column_name: str = flag("The column that holds the image.", "image")
    label_column_name: str = flag("The column that holds the label.", "label")
    random_crop: bool = flag(
        "Train on random crops (of 0.08 of the area to all of it), resized to the model's size.", True
    )
    random_flip: bool = flag("Flip half of the training images left to right.", True)
    max_train_samples: int | None = flag("Use only so many training images, spread evenly.")
    max_eval_samples: int | None = flag("Use only so many held-out images, spread evenly.")


def load_folder(folder: str, args: ImageArguments) -> Dataset:
    """A directory of class directories as a dataset; the classes in alphabetical order are the labels."""
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(
            f"{folder}: no such directory; --train_dir and --validation_dir take DIRECTORY/CLASS/IMAGE.png"
        )
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise UsageError(f"{folder} holds no class directories: expected {root / 'CLASS/IMAGE.png'}")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(str(path) for path in (root / name).rglob("*") if path.suffix.lower() in EXTENSIONS)
        if not found:
            raise UsageError(f"{root / name} holds no images ({', '.join(sorted(EXTENSIONS))}): add some or remove it")
        files += found
        labels += [label] * len(found)
    for file in files:  # only the headers: now rather than hours into the first epoch
        try:
            with PIL.Image.open(file):
                pass
        except OSError as error:
            raise UsageError(f"{file} cannot be read as an image: mend or remove it ({error})") from error
    features = Features({args.image_column_name: Image(), args.label_column_name: ClassLabel(names=classes)})
    return Dataset.from_dict({args.image_column_name: files, args.label_column_name: labels}, features=features)


def load_images(args: ImageArguments, *, cache_dir: str | None, token: str | None) -> tuple[Dataset, Dataset]:
    """Training and held-out rows; where the data has no validation part, every n-th image is held out."""
    if args.dataset_name is not None:
        source = SourceArguments(dataset_name=args.dataset_name, dataset_config_name=args.dataset_config_name)
        train, validation = load_rows(source, cache_dir=cache_dir, token=token)
    else:
        train, validation = load_folder(args.train_dir, args), None
    if args.validation_dir is not None:
        validation = load_folder(args.validation_dir, args)
    for part in (train, validation):
        if part is not None:
            _check_columns(part, args)
    if validation is None:
        share = args.train_val_split
        if not 0 < share < 1 or share * len(train) < 1:
            raise UsageError(
                f"--train_val_split {share} of {len(train)} images: give a share between 0 and 1 that holds out at "
                "least one, or give --validation_dir"
            )
        train, validation = hold_out(train, percentage=100 * share)
    return spread(train, args.max_train_samples), spread(validation, args.max_eval_samples)


def _check_columns(rows: Dataset, args: ImageArguments) -> None:
    for name in ("image_column_name", "label_column_name"):
        if getattr(args, name) not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise UsageError(f"no column {getattr(args, name)!r} in the data; choose --{name} from: {columns}")
    feature = rows.features[args.image_column_name]
    if not isinstance(feature, Image):
        raise UsageError(f"--image_column_name {args.image_column_name}: the column holds {feature}, no images")


def spread(rows: Dataset, number: int | None) -> Dataset:
    """So many of the rows, evenly over all: the first ones would be of one class where the rows are sorted."""
    if number is None or number >= len(rows):
        return rows
    if number < 1:
        raise UsageError(f"--max_train_samples and --max_eval_samples: {number} is no number of images; give 1 or more")
    return rows.select([i * len(rows) // number for i in range(number)])


def read_labels(train: Dataset, validation: Dataset, column: str) -> tuple[list[str], list[int], list[int]]:
    """The names of the labels, and the index of each row's one; held-out rows are matched by name."""
    names, texts = _texts(train, column)
    if len(names) < 2:
        raise UsageError(f"all training images have the label {', '.join(names)}: classification needs two or more")
    index = {name: i for i, name in enumerate(names)}
    _, held_out = _texts(validation, column)
    unknown = sorted(set(held_out) - set(names))
    if unknown:
        raise UsageError(f"held-out images have labels that the training images lack: {', '.join(unknown[:10])}")
    return names, [index[text] for text in texts], [index[text] for text in held_out]


def _texts(rows: Dataset, column: str) -> tuple[list[str], list[str]]:
    """The labels that there are, and each row's one, as text."""
    feature, values = rows.features[column], rows[column][:]
    for i, value in enumerate(values):
        if value is None or (isinstance(feature, ClassLabel) and value == -1):  # -1: the mark of `datasets` for none
            raise UsageError(f"row {i} has no label in column {column!r}: remove the rows without one")
        if not isinstance(value, str | int):
            raise UsageError(f"column {column!r} holds {feature}: expected one name or number an image")
    if isinstance(feature, ClassLabel):
        return feature.names, [feature.names[value] for value in values]
    return [str(value) for value in sorted(set(values))], [str(value) for value in values]


def random_resized_crop(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of torchvision's RandomResizedCrop: 8 to 100 % of the area, 3:4 to 4:3."""
    for _ in range(10):
        area, ratio = width * height * rng.uniform(0.08, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # a long strip: its middle
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def input_size(processor) -> tuple[int, int]:
    """Width and height of the images that a processor gives to the model."""
    described = processor.to_dict()
    size = described["crop_size"] if described.get("do_center_crop") else described["size"]
    if "shortest_edge" in size:  # processors that have only this cut a square
        return size["shortest_edge"], size["shortest_edge"]
    if "height" not in size or "width" not in size:
        raise UsageError(f"the image processor's size {size} names no height and width: give --random_crop false")
    return size["width"], size["height"]


def augmentation(args: ImageArguments, processor) -> Callable[[PIL.Image.Image, np.random.Generator], PIL.Image.Image]:
    size = input_size(processor) if args.random_crop else None

    def augment(image: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
        if size is not None:
            box = random_resized_crop(*image.size, rng)
            image = image.resize(size, PIL.Image.Resampling.BILINEAR, box=box)
        if args.random_flip and rng.random() < 0.5:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    return augment


class Images(torch.utils.data.Dataset):
    """Rows as ``pixel_values`` and ``labels``, augmented where a seed is given.

    What is drawn depends on the seed, the epoch and the row, and on nothing else: neither on worker, rank and batch,
    nor on whether the run was resumed.
    """

    def __init__(
        self,
        rows: Dataset,
        labels: list[int],
        args: ImageArguments,
        *,
        processor,
        channels: int,
        augmentation_seed: int | None = None,
    ) -> None:
        self.column = args.image_column_name
        self.rows = rows.select_columns([self.column]).cast_column(self.column, Image(decode=False))
        self.labels, self.processor, self.mode = labels, processor, MODES[channels]
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers have copies of this object
        self.seed = augmentation_seed
        self.augment = None if augmentation_seed is None else augmentation(args, processor)
        self.options: dict[str, Any] = {"return_tensors": "pt", "input_data_format": "channels_last"}
        if self.augment is not None and args.random_crop:
            self.options["do_resize"] = False  # a crop comes in the right size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        image = self._read(row)
        if self.augment is not None:
            image = self.augment(image, np.random.default_rng([self.seed, int(self.epoch), row]))
        pixels = np.asarray(image)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        return {"pixel_values": self.processor(pixels, **self.options)["pixel_values"][0], "labels": self.labels[row]}

    def _read(self, row: int) -> PIL.Image.Image:
        cell = self.rows[row][self.column]
        if cell is None:
            raise UsageError(f"row {row} has no image in column {self.column!r}: remove the rows without one")
        try:
            return Image().decode_example(cell).convert(self.mode)
        except (OSError, SyntaxError, ValueError) as error:  # what pillow raises for broken files
            name = cell["path"] or f"the image of row {row}"
            raise UsageError(f"{name} cannot be read as an image: mend or remove it ({error})") from error


class EpochCallback(TrainerCallback):
    """Tells the training images which epoch it is: the Trainer itself tells only the sampler."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.images.epoch.fill_(int(state.epoch))  # a run resumed within an epoch begins at its fraction


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
