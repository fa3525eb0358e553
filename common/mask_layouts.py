"""Where each segmentation set keeps a picture and its mask: lists of files, none of them opened.

A layout is a function of the folder; it returns {"train": (ids, mask_ids), "val": (ids, mask_ids)},
lists of paths relative to the folder ("" for no mask), the names of the classes (None: not known
without the masks), and a table from values in the files to class ids, or None.
"""

import os
from pathlib import Path

import numpy as np

from common import class_names
from common.data import _scan
from common.split_lists import parse, stem
from common.splits import UserError


def _files(root: Path, *folders: str) -> dict[str, str]:
    """{path in the folder, without extension: path in root} of root/folders/..., sorted."""
    folder = "/".join(folders)
    if not (root / folder).is_dir():
        raise UserError(f"--data-path {root}: no folder {folder}/ there")
    found = {}
    for file in _scan(root / folder):
        key = os.path.splitext(file)[0]
        if key in found:
            raise UserError(f"{root / folder / file} (--data-path): {found[key]} has the same "
                            "name but for the extension; rename or remove one")
        found[key] = f"{folder}/{file}"
    if not found:
        raise UserError(f"--data-path {root}: {folder}/ holds no picture; fill it")
    return found


def folder(root: Path, classes: list[str] | None = None, table=None):
    """images/{train,val}/ with masks/{train,val}/; perhaps images/unlabeled/ and classes.txt."""
    listed = {}
    for part in ("train", "val"):
        images, masks = _files(root, "images", part), _files(root, "masks", part)
        for key, file in images.items():
            if key not in masks:
                where = " or move it to images/unlabeled/" * (part == "train")
                raise UserError(f"{root / file} (--data-path): no mask masks/{part}/{key}.png for "
                                f"this picture; add it{where}")
        for key, file in masks.items():
            if key not in images:
                raise UserError(f"{root / file} (--data-path): no picture {key} in images/{part}/ "
                                "for this mask; add the picture or remove the mask")
        listed[part] = list(images.values()), [masks[key] for key in images]
    if (root / "images" / "unlabeled").is_dir():
        extra = list(_files(root, "images", "unlabeled").values())
        ids, masks = listed["train"]
        listed["train"] = ids + extra, masks + [""] * len(extra)
    names = root / "classes.txt"
    if classes is None and names.exists():
        lines = names.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        classes = [line.strip() for line in lines if line.strip()]
        if len(set(classes)) < len(classes) or not 2 <= len(classes) <= 255:
            raise UserError(f"{names} (--data-path): {len(classes)} names; write 2 to 255 "
                            "different ones, one a line, in the order of the ids")
    return listed, classes, table


def camvid(root: Path):
    return folder(root, class_names.CAMVID, class_names.lookup({11: class_names.IGNORE}))


def voc(root: Path):
    """JPEGImages with SegmentationClassAug (training) and SegmentationClass (validation).

    Training pictures are those of ImageSets/Segmentation/train_aug.txt (or trainaug.txt), also
    without a mask; where that list is missing, those with a mask that are not in val.txt.
    """
    pictures = {stem(f): f for f in _files(root, "JPEGImages").values()}
    folders = [f for f in ("SegmentationClassAug", "SegmentationClass") if (root / f).is_dir()]
    if not folders:
        raise UserError(f"--data-path {root}: no folder SegmentationClass/ there; unpack the "
                        "whole archive")
    of_train, of_val = _files(root, folders[0]), _files(root, folders[-1])
    lists = root / "ImageSets" / "Segmentation"
    val = _listed(lists / "val.txt")
    given = [lists / f for f in ("train_aug.txt", "trainaug.txt") if (lists / f).exists()]
    train = _listed(given[0]) if given else sorted(of_train.keys() - set(val))
    both = set(train) & set(val)
    if both:
        raise UserError(f"{given[0]} (--data-path): {min(both)} is in {lists / 'val.txt'} too; "
                        "remove it from one")
    listed = {}
    for part, names, masks in (("train", train, of_train), ("val", val, of_val)):
        for name in names:
            if name not in pictures:
                raise UserError(f"--data-path {root}: no picture JPEGImages/{name}.jpg for the "
                                f"{part} part; unpack the whole archive")
        listed[part] = [pictures[n] for n in names], [masks.get(n, "") for n in names]
    return listed, class_names.VOC, None


def _listed(file: Path) -> list[str]:
    """Stems of the pictures that a list of the set names. Raises UserError with the line."""
    try:
        names = [stem(str(image)) for _, _, image, _ in parse(file)]
    except UserError as error:
        raise UserError(str(error).replace("--labels-file", "--data-path")) from None
    if len(set(names)) < len(names):
        twice = next(n for k, n in enumerate(names) if n in names[:k])
        raise UserError(f"{file} (--data-path): {twice} comes twice; delete a line")
    return names


def cityscapes(root: Path):
    """leftImg8bit/PART/CITY/X_leftImg8bit.png with gtFine/PART/CITY/X_gtFine_labelTrainIds.png.

    Where no training mask has train ids, as in the published archive, the labelIds are read through
    a table.
    """
    listed, table = {}, None
    of_part = {part: _files(root, "gtFine", part) for part in ("train", "val")}
    kind = "labelTrainIds"
    if not any(key.endswith(kind) for key in of_part["train"]):
        kind = "labelIds"
        ids = class_names.CITYSCAPES_LABEL_IDS
        table = class_names.lookup({i: k for k, i in enumerate(ids)}, other=class_names.IGNORE)
    for part, masks in of_part.items():
        files, end = _files(root, "leftImg8bit", part), "_leftImg8bit"
        keys = [key for key in files if key.endswith(end)]
        if not keys:
            raise UserError(f"--data-path {root}: no CITY/X{end}.png in leftImg8bit/{part}/")
        masks = [masks.get(f"{key.removesuffix(end)}_gtFine_{kind}", "") for key in keys]
        listed[part] = [files[key] for key in keys], masks
    return listed, class_names.CITYSCAPES, table


def coco(root: Path):
    """train2017/, val2017/ and masks/, one png a picture with 0 (no thing) and the 80 things."""
    masks, listed = _files(root, "masks"), {}
    for part in ("train", "val"):
        files = _files(root, f"{part}2017")
        listed[part] = list(files.values()), [masks.get(key, "") for key in files]
    return listed, class_names.COCO, None


MASKED = ["pictures with a mask"]  # for a split they are one class: what may be labelled
LAYOUTS = dict(folder=folder, camvid=camvid, voc=voc, cityscapes=cityscapes, coco=coco)


def layout_of(root) -> str | None:
    """The segmentation layout that a folder has, by its subfolders; None: another kind of set."""
    signs = dict(voc="JPEGImages", cityscapes="leftImg8bit", coco="train2017", folder="masks/train")
    return next((name for name, sign in signs.items() if Path(root, sign).is_dir()), None)


def training_part(root, layout: str):
    """ids, targets (0 with a mask, -1 without), classes, root: what `splits.make_split` takes."""
    ids, masks = LAYOUTS[layout](Path(root))[0]["train"]
    return ids, np.array([0 if mask else -1 for mask in masks]), MASKED, Path(root)
