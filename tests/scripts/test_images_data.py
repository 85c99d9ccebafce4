"""images_data.py: the images that a model sees, and their augmentations."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from classify_images import ViTImageProcessor
from common.images_data import ImageArguments, Images, load_folder, random_resized_crop, spread
from common.usage import UsageError
from datasets import Dataset, Features, Image
from transformers import AutoImageProcessor


def images(digits, *, seed: int | None = 0, processor=None, **options) -> Images:
    arguments = ImageArguments(**options)
    rows = load_folder(str(digits / "validation"), arguments)
    processor = processor or ViTImageProcessor(size={"height": 12, "width": 10})
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


def test_row_without_an_image():
    rows = Dataset.from_dict({"image": [None]}, features=Features({"image": Image()}))
    data = Images(rows, [0], ImageArguments(), processor=ViTImageProcessor(), channels=3)
    with pytest.raises(UsageError, match="row 0 has no image in column 'image'"):
        data[0]
