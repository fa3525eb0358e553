"""The layouts that pictures come in: embedded digits, torchvision's sets, folders."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.pictures import EXTENSIONS, Images
from common.splits import UserError

NAMED_SETS = ("cifar10", "cifar100", "food101", "inat2019")  # read through torchvision


@dataclass
class DataSet:
    train: Images
    val: Images
    classes: list[str]
    labeled: np.ndarray | None = None  # positions in train, where the layout says what is labelled


def load_dataset(name: str, data_path: str | None, *, seed: int = 0, holdout: int = 0) -> DataSet:
    """The pictures of --dataset NAME below --data-path.

    name: "digits" (embedded), one of NAMED_SETS, "imagenet", "imagenette" or "folder"
    (train/<class>/ and val/ or test/<class>/; or labeled/<class>/, unlabeled/ and perhaps
    val/<class>/). holdout > 0 takes that
    many training pictures, equally many per class where the classes allow it, out of training and
    puts them in the place of the validation set: hyper-parameters are chosen there. Raises
    UserError with the folder, the flag and the remedy.
    """
    if name == "digits":
        data = _digits()
    else:
        if not data_path:
            raise UserError(f"--dataset {name} needs --data-path DIR (without both: the digits)")
        root = Path(data_path)
        if not root.is_dir():
            raise UserError(f"--data-path {root}: no such folder")
        if (root / "labeled").is_dir():
            data = _own_folder(root, seed)
        elif name in NAMED_SETS and not (root / "train").is_dir():
            data = _torchvision(name, root)
        else:
            data = _image_folder(root)
    if holdout:
        if not 0 < holdout < len(data.train):
            raise UserError(f"--holdout {holdout}: the training set has {len(data.train)} pictures")
        order = np.random.default_rng([seed, 1]).permutation(len(data.train))
        rank_in_class = np.empty(len(order), np.int64)
        targets = data.train.targets[order]
        for c in np.unique(targets):
            rank_in_class[targets == c] = np.arange((targets == c).sum())
        # one of each class, then a second of each, ...
        held = order[np.argsort(rank_in_class, kind="stable")[:holdout]]
        keep = np.setdiff1d(np.arange(len(data.train)), held)
        labeled = None if data.labeled is None else np.flatnonzero(np.isin(keep, data.labeled))
        data = DataSet(data.train.take(keep), data.train.take(np.sort(held)), data.classes, labeled)
    return data


def _digits() -> DataSet:
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        arrays = [(file[f"{part}_images"], file[f"{part}_labels"]) for part in ("train", "test")]
    return DataSet(*_in_memory(arrays), [str(c) for c in range(10)])


def _in_memory(arrays) -> list[Images]:
    """[(pixels, labels) of train, of test] -> Images with ids such as train/00012."""
    return [
        Images(np.array([f"{part}/{i:05d}" for i in range(len(labels))], dtype=np.bytes_),
               np.asarray(labels, np.int64), pixels=pixels)
        for part, (pixels, labels) in zip(("train", "test"), arrays)
    ]


def _scan(folder: Path) -> list[str]:
    """All pictures below a folder, relative to it, in the order torchvision's ImageFolder has."""
    found = []
    for where, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        pictures = [f for f in sorted(files) if f.lower().endswith(EXTENSIONS)]
        found += [str((Path(where) / f).relative_to(folder)) for f in pictures]
    return found


def class_files(root: Path, part: str, classes=None) -> tuple[list[str], list[int], list[str]]:
    """Paths below root, targets and classes of root/part/<class>/..., where part may be "": classes
    are the sorted folder names, or given and no others."""
    say, part = f"--data-path {root}: ", part and f"{part}/"
    folders = (d for d in (root / part).iterdir() if d.is_dir())
    names = sorted(d.name for d in folders if not d.name.startswith("."))
    if not names:
        raise UserError(f"{say}{part or 'it'} has no class folders; put pictures in {part}<class>/")
    for name in names:
        if classes is not None and name not in classes:
            raise UserError(f"{say}{part}{name} is no class of training; rename or remove it")
    classes = classes or names
    ids, targets = [], []
    for name in names:
        files = _scan(root / part / name)
        if not files:
            raise UserError(f"{say}class folder {part}{name} holds no picture; fill or remove it")
        ids += [f"{part}{name}/{f}" for f in files]
        targets += [classes.index(name)] * len(files)
    return ids, targets, classes


def _class_folder(root: Path, part: str, classes=None) -> tuple[Images, list[str]]:
    ids, targets, classes = class_files(root, part, classes)
    return Images(np.array([i.encode() for i in ids]), np.array(targets, np.int64), root), classes


def _image_folder(root: Path) -> DataSet:
    part = next((p for p in ("val", "test") if (root / p).is_dir()), None)
    if not (root / "train").is_dir() or part is None:
        raise UserError(
            f"--data-path {root}: expected train/<class>/ with val/<class>/ (or test/), or "
            "labeled/<class>/ with unlabeled/"
        )
    train, classes = _class_folder(root, "train")
    return DataSet(train, _class_folder(root, part, classes)[0], classes)


def _own_folder(root: Path, seed: int) -> DataSet:
    labeled, classes = _class_folder(root, "labeled")
    if not (root / "unlabeled").is_dir():
        raise UserError(f"--data-path {root}: labeled/ needs unlabeled/ beside it, of any depth")
    extra = [f"unlabeled/{f}".encode() for f in _scan(root / "unlabeled")]
    if not extra:
        raise UserError(f"--data-path {root}: unlabeled/ holds no picture; fill it")
    if (root / "val").is_dir():
        val = _class_folder(root, "val", classes)[0]
    else:  # a tenth of the labelled pictures, at least one of each class, leaves training
        rng, held = np.random.default_rng([seed, 2]), []
        for c, name in enumerate(classes):
            of_class = np.flatnonzero(labeled.targets == c)
            if len(of_class) < 2:
                what = f"labeled/{name} has one picture; add a second, or val/"
                raise UserError(f"--data-path {root}: {what}")
            held += rng.permutation(of_class)[: max(1, round(len(of_class) / 10))].tolist()
        keep = np.setdiff1d(np.arange(len(labeled)), held)
        val, labeled = labeled.take(np.sort(held)), labeled.take(keep)
        print(f"no val/ in {root}: {len(val)} labelled pictures validate instead (seed {seed})")
    ids = np.concatenate([labeled.ids, np.array(extra)])
    targets = np.concatenate([labeled.targets, np.full(len(extra), -1)])
    return DataSet(Images(ids, targets, root), val, classes, np.arange(len(labeled)))


def _torchvision(name: str, root: Path) -> DataSet:
    from torchvision import datasets

    try:
        if name in ("cifar10", "cifar100"):
            kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
            sets = [kind(str(root), train=train) for train in (True, False)]
            return DataSet(*_in_memory([(s.data, s.targets) for s in sets]), list(sets[0].classes))
        if name == "food101":
            sets = [datasets.Food101(str(root), split=split) for split in ("train", "test")]
            base, parts = sets[0]._images_folder, []
            for s in sets:
                ids = [str(f.relative_to(base)).encode() for f in s._image_files]
                parts.append(Images(np.array(ids), np.array(s._labels, np.int64), base))
            return DataSet(*parts, list(sets[0].classes))
        # iNaturalist 2019 is one archive; the competition's two json files say what is for training
        everything = datasets.INaturalist(str(root), version="2019")
        base = Path(everything.root)
        files = [Path(everything.all_categories[c]) / f for c, f in everything.index]
        number_of = {f.name: i for i, f in enumerate(files)}
        parts = []
        for part in ("train2019.json", "val2019.json"):
            listed = json.loads((root / part).read_text())["images"]
            chosen = [number_of[Path(i["file_name"]).name] for i in listed]
            ids = [str(files[i]).encode() for i in chosen]
            targets = np.array([everything.index[i][0] for i in chosen], np.int64)
            parts.append(Images(np.array(ids), targets, base))
        return DataSet(*parts, list(everything.all_categories))
    except (RuntimeError, OSError, KeyError, json.JSONDecodeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UserError(
            f"--dataset {name}: torchvision cannot read it below --data-path {root} ({said}); "
            "unpack the archive there as it is published"
        ) from None
