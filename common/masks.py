"""Pictures with masks: one class id per pixel, 255 where a pixel has no class. Layouts of sets.

  folder      images/{train,val}/ and masks/{train,val}/, equal stems; perhaps classes.txt (a name a
              line) and images/unlabeled/, pictures without masks
  camvid      a folder with 11 classes; 11 in its masks means no class
  voc         JPEGImages, SegmentationClassAug and SegmentationClass or one of both, ImageSets
  cityscapes  leftImg8bit/{train,val}/CITY/ and gtFine/, with labelTrainIds or labelIds
  coco        train2017/, val2017/, and masks/ with ids 0 to 80, a png a picture
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common import class_names
from common.class_names import IGNORE
from common.mask_layouts import LAYOUTS, layout_of
from common.pictures import BadImage, open_image
from common.splits import UserError

MASK_SETS = tuple(LAYOUTS)
VAL_SIZES = dict(camvid=101, voc=1449, cityscapes=500, coco=5000)  # as published


@dataclass
class Pairs:
    """Pictures and their masks. A mask is opened by `mask` and by nothing else."""

    ids: np.ndarray  # (N,) bytes: path relative to root, or a name for pictures in memory
    classes: int  # K: class ids are 0 to K - 1
    root: Path | None = None
    mask_ids: np.ndarray | None = None  # (N,) bytes: path relative to root, b"" for no mask
    pixels: np.ndarray | None = None  # (N, H, W, 3) uint8
    masks: np.ndarray | None = None  # (N, H, W) uint8
    lookup: np.ndarray | None = None  # (256,) uint8: value in a file -> class id or 255

    def __len__(self):
        return len(self.ids)

    def name(self, i: int) -> str:
        return os.fsdecode(self.ids[i])

    def path(self, i: int) -> str:
        return self.name(i) if self.root is None else str(self.root / self.name(i))

    @property
    def has_mask(self) -> np.ndarray:
        """(N,) bool: where a mask is listed (or in memory)."""
        if self.mask_ids is None:
            return np.full(len(self), self.masks is not None)
        return self.mask_ids != b""

    def pil(self, i: int) -> Image.Image:
        """Picture i as upright 8-bit RGB. Raises BadImage with the path."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[i]).convert("RGB")
        return open_image(self.path(i))

    def mask(self, i: int, size: tuple[int, int] | None = None) -> Image.Image:
        """Mask i, mode "L": class ids and 255. Raises BadImage with the path and the remedy.

        size: (width, height) of picture i, where the caller has read it already.
        """
        if self.masks is not None:
            path, values = f"mask of {self.path(i)}", self.masks[i]
        elif self.mask_ids is not None and self.mask_ids[i]:
            path = self.root / os.fsdecode(self.mask_ids[i])
            values = read_ids(path)
        else:
            raise BadImage(f"{self.path(i)}: has no mask")
        if self.lookup is not None:
            values = self.lookup[values]
        size = size or self.pil(i).size
        if values.shape[::-1] != tuple(size):
            shape = "{} x {}".format(*values.shape[::-1])
            raise BadImage(f"{path}: is {shape}, its picture {size[0]} x {size[1]}; make them "
                           "equal, resizing masks by nearest neighbour")
        largest = values.max(where=values != IGNORE, initial=0)
        if largest >= self.classes:
            raise BadImage(f"{path}: holds the value {largest}, but there are {self.classes} "
                           f"classes: 0 to {self.classes - 1}, and 255 for pixels to ignore")
        return Image.fromarray(values)

    def check(self, i: int):
        """Read all that there is of place i. Raises BadImage."""
        size = self.pil(i).size
        if self.has_mask[i]:
            self.mask(i, size)

    def take(self, positions) -> "Pairs":
        arrays = (self.mask_ids, self.pixels, self.masks)
        mask_ids, pixels, masks = (None if a is None else a[positions] for a in arrays)
        return Pairs(self.ids[positions], self.classes, self.root, mask_ids, pixels, masks,
                     self.lookup)


@dataclass
class PairSet:
    train: Pairs
    val: Pairs
    classes: list[str]
    palette: np.ndarray  # (256, 3) uint8
    labeled: np.ndarray | None = None  # positions in train, where the layout says what is labelled


def read_ids(path) -> np.ndarray:
    """(H, W) uint8: the values in a mask's file, a palette's places and not its colours."""
    try:
        with Image.open(path) as image:
            kind, image = image.format, ImageOps.exif_transpose(image)
            mode, values = image.mode, np.asarray(image)
    except Exception as error:  # each format of a broken file has its own class of error
        raise BadImage(f"{path}: {type(error).__name__}: {error}") from None
    if mode not in ("L", "P") or kind == "JPEG":
        raise BadImage(f"{path}: a {kind} in mode {mode}; a mask holds one class id per pixel, in "
                       "8 bits and not compressed with loss: turn colours into ids, save as png")
    return values


def load_pairs(name: str, data_path: str | None, *, seed: int = 0, holdout: int = 0) -> PairSet:
    """The pictures and masks of --dataset NAME (one of MASK_SETS) below --data-path.

    holdout > 0 takes that many training pictures with masks out of training and puts them in the
    place of the validation set. Masks are listed here and not opened, with one exception: without
    classes.txt a folder's masks are searched once for the largest id. Raises UserError with the
    folder, the flag and the remedy.
    """
    if name not in MASK_SETS:
        raise UserError(f"--dataset {name}: one of {', '.join(MASK_SETS)}")
    if not data_path:
        raise UserError(f"--dataset {name} needs --data-path DIR (without both: the digits)")
    root = Path(data_path)
    if not root.is_dir():
        raise UserError(f"--data-path {root}: no such folder")
    try:
        listed, classes, table = LAYOUTS[name](root)
    except UserError as error:
        other = layout_of(root)
        hint = f"; is it --dataset {other}?" if other not in (None, name) else ""
        raise UserError(f"--dataset {name}: {error}{hint}") from None
    classes = classes or _count_classes(root, [m for _, masks in listed.values() for m in masks])
    parts = [_pairs(root, *listed[part], len(classes), table) for part in ("train", "val")]
    data = PairSet(*parts, classes, class_names.palette(name))
    for part, pairs in zip(("training", "validation"), parts):
        if not pairs.has_mask.any():
            raise UserError(f"--data-path {root}: no {part} picture has a mask")
    without = np.flatnonzero(~data.val.has_mask)
    if len(without):
        path = data.val.path(without[0])
        raise UserError(f"{path} (--data-path): no mask for this picture of the validation set")
    if len(data.val) != VAL_SIZES.get(name, len(data.val)):
        print(f"--dataset {name}: {len(data.val)} validation pictures in {root}, as published "
              f"{VAL_SIZES[name]}: results do not compare with published ones")
    if (root / "images" / "unlabeled").is_dir():
        data.labeled = np.flatnonzero(data.train.has_mask)
    return hold_out(data, holdout, seed) if holdout else data


def _pairs(root: Path, ids, mask_ids, classes: int, table) -> Pairs:
    ids, mask_ids = (np.array([os.fsencode(f) for f in files]) for files in (ids, mask_ids))
    return Pairs(ids, classes, root, mask_ids, lookup=table)


def _count_classes(root: Path, masks: list[str]) -> list[str]:
    """Names "0", "1", ... up to the largest id in any mask of a folder without classes.txt."""
    largest = 0
    for file in filter(None, masks):
        try:
            values = read_ids(root / file)
        except BadImage as error:
            raise UserError(f"{error} (--data-path)") from None
        largest = max(largest, int(values.max(where=values != IGNORE, initial=0)))
    if not largest:
        raise UserError(f"--data-path {root}: no mask in masks/ holds an id above 0: no classes")
    print(f"no classes.txt in {root}: the largest id in its {len(masks)} masks is {largest}, so "
          f"{largest + 1} classes; a name a line in classes.txt saves this search")
    return [str(k) for k in range(largest + 1)]


def hold_out(data: PairSet, number: int, seed: int) -> PairSet:
    """number training pictures with masks, drawn by seed, validate instead of the val part."""
    masked = np.flatnonzero(data.train.has_mask)
    if not 0 < number < len(masked):
        raise UserError(f"--holdout {number}: the training set has {len(masked)} masks")
    held = np.sort(np.random.default_rng([seed, 1]).permutation(masked)[:number])
    keep = np.setdiff1d(np.arange(len(data.train)), held)
    labeled = None if data.labeled is None else np.flatnonzero(np.isin(keep, data.labeled))
    return PairSet(data.train.take(keep), data.train.take(held), data.classes, data.palette,
                   labeled)
