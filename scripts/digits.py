#!/usr/bin/env python
"""Write 1797 real images of handwritten digits for `classify_images.py`.

scikit-learn carries them (UCI's Optical Recognition of Handwritten Digits, 8 x 8 grey pixels), so that nothing is
downloaded. They become DIRECTORY/train/CLASS/NUMBER.png and, every fifth one, DIRECTORY/validation/CLASS/NUMBER.png.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from common.usage import OneLineErrors, check_writable, command, writing
from sklearn.datasets import load_digits

# Words, whose alphabetical order is not that of the numbers: labels that are mixed up show.
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write(directory: Path) -> None:
    """Writes the images; those of an earlier call are written again."""
    data = load_digits()
    for number, (pixels, digit) in enumerate(zip(data.images, data.target, strict=True)):
        part = "validation" if number % 5 == 4 else "train"
        path = directory / part / CLASSES[digit] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(path)  # the data's values are 0 to 16


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineErrors(description=__doc__)
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="where they go; made if it is not there")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of a mistake, not one line")
    directory = parser.parse_args(argv).directory
    check_writable(directory, "DIRECTORY")
    with writing(directory, "DIRECTORY"):
        write(directory)


if __name__ == "__main__":
    command(main)
