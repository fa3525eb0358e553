"""Pictures in files or in memory, read as upright 8-bit RGB; broken ones are named and counted."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common.splits import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class BadImage(OSError):
    """A picture that cannot be read; the message names its path."""


@dataclass
class Images:
    """Pictures with their ids and targets. The ids are one array of bytes: a list of a million
    paths would be copied into every worker, page by page, as Python touches reference counts."""

    ids: np.ndarray  # (N,) bytes: path relative to root, or "train/00012" for pictures in memory
    targets: np.ndarray  # (N,) int64, -1 where the label is unknown
    root: Path | None = None
    pixels: np.ndarray | None = None  # (N, H, W) or (N, H, W, 3) uint8

    def __len__(self):
        return len(self.ids)

    def name(self, i: int) -> str:
        return self.ids[i].decode()

    def path(self, i: int) -> str:
        return self.name(i) if self.root is None else str(self.root / self.name(i))

    def pil(self, i: int) -> Image.Image:
        """Picture i as upright 8-bit RGB. Raises BadImage with the path."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[i]).convert("RGB")
        return open_image(self.path(i))

    def check(self, i: int):
        """Read all that there is of place i. Raises BadImage."""
        self.pil(i)

    def take(self, positions) -> "Images":
        pixels = None if self.pixels is None else self.pixels[positions]
        return Images(self.ids[positions], self.targets[positions], self.root, pixels)


def open_image(path) -> Image.Image:
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)  # no copy of the upright ones
            if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip at 255
                grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255)
                image = Image.fromarray(grey.astype(np.uint8))
            return image if image.mode == "RGB" else image.convert("RGB")  # which copies too
    except Exception as error:  # each format of a broken file has its own class of error
        raise BadImage(f"{path}: {type(error).__name__}: {error}") from None


def find_pictures(source: str, flag: str) -> list[Path]:
    """A picture, or all below a folder, sorted. Raises UserError where there is none."""
    path = Path(source)
    found = path.rglob("*") if path.is_dir() else [path]
    files = sorted(f for f in found if f.suffix.lower() in EXTENSIONS and f.is_file())
    if not files:
        raise UserError(f"{flag} {source}: no picture there ({' '.join(EXTENSIONS)})")
    return files


def pictures_at(source) -> Images:
    """The picture, or all below a folder, that --predict names; a broken one is left out, and said.

    Raises UserError where nothing is found.
    """
    files = find_pictures(source, "--predict")
    readable = []
    for file in files:
        try:
            open_image(file)
            readable.append(os.fsencode(file))
        except BadImage as error:
            print(f"warning: left out of the predictions: {error}", file=sys.stderr)
    if not readable:
        raise UserError(f"--predict {source}: none of its pictures can be read")
    return Images(np.array(readable), np.full(len(readable), -1))


def read_or_next(read, i: int, positions: np.ndarray):
    """(read(i), i, -1), or of the next of positions that can be read, and the i that could not."""
    broken = -1
    for _ in range(100):
        try:
            return read(i), i, broken
        except BadImage as error:
            broken, reason = (i if broken < 0 else broken), error
            at = np.flatnonzero(positions == i)[0] + 1
            i = int(positions[at % len(positions)])
    raise UserError(f"{reason}: a hundred pictures in a row cannot be read")


class BadImages:
    """Counts pictures that could not be read; past --max-bad-images the run ends with a path."""

    def __init__(self, images: Images, allowed: int = 0):
        self.images, self.allowed, self.seen = images, allowed, set()

    def check(self, broken):
        """broken (N,): positions of pictures that were replaced, -1 where the picture was read."""
        for i in broken[broken >= 0].tolist():  # usually none
            self.seen.add(i)
            if len(self.seen) > self.allowed:
                try:
                    self.images.check(i)
                    reason = f"{self.images.path(i)}: could not be read a moment ago"
                except BadImage as error:
                    reason = str(error)
                n = len(self.seen)
                remedy = f"remove the file, or let {n} pass with --max-bad-images {n}"
                raise UserError(f"{reason}; {remedy}")
