"""Which training images are labelled: make a split, read a published list, write or check one.

  python -m common.splits make  --data-path DIR (--labels P | --num-labels N) --output FOLDER
  python -m common.splits check [--data-path DIR] --labels-file LABELED [UNLABELED]
DIR holds train/<class>/, <class>/ or a layout of mask_layouts.py; layouts of lists: split_lists.py.
"""

import argparse
import functools
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import split_lists
from common.split_lists import KNOWN, UserError, _bad, _read_lists, fingerprint, sha256, stem


@dataclass(frozen=True, eq=False)
class Split:
    name: str              # "10% seed 0", "92 images seed 1", a published list's or the file's
    labeled: np.ndarray    # (N_l,) int64 positions in the training ids, sorted
    unlabeled: np.ndarray  # (N_u,) int64 positions, sorted: the stream of unlabelled images
    counts: dict           # labelled images per class name; {} where there are masks instead
    sha256: str            # of the sorted labelled ids; see `split_of` for a given unlabelled list

    def describe(self) -> str:
        n = sorted(self.counts.values())
        per_class = f" ({n[0]} to {n[-1]} in each of {len(n)} classes)" if n else ""
        return (f"split {self.name}: {len(self.labeled)} labelled{per_class}, "
                f"{len(self.unlabeled)} unlabelled, sha256 {self.sha256[:16]}")


def split_of(name, ids, targets, classes, labeled, given, pool) -> Split:
    """labeled, given: positions (given: the unlabelled list's, or None: all other images)."""
    if pool not in ("rest", "all"):
        raise UserError(f"--unlabeled-pool must be rest or all, not {pool!r}")
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise UserError(f"--data-path: the id {twice!r} comes twice: rename one of the files")
    labeled = np.unique(np.asarray(labeled, np.int64))
    rest = np.setdiff1d(np.arange(len(ids), dtype=np.int64), labeled)
    unlabeled = rest if given is None else np.unique(np.asarray(given, np.int64))
    lines = sorted(ids[i] for i in labeled)
    if len(unlabeled) < len(rest):  # a list that says no more than "the rest" leaves the hash alone
        lines += ["--", *sorted(ids[i] for i in unlabeled)]
    counts = {} if targets is None or len(classes) < 2 else dict(
        zip(classes, np.bincount(np.asarray(targets)[labeled], minlength=len(classes)).tolist()))
    unlabeled = np.union1d(labeled, unlabeled) if pool == "all" else unlabeled
    return Split(name, labeled, unlabeled, counts, sha256(lines))


def make_split(ids, targets, classes, *, percent=None, number=None, seed=0, pool="rest") -> Split:
    """Draw the labelled images; the same ones whatever the order of `ids` or the process.

    ids      N str, unique           percent  of each class, (0, 100]: max(1, round(p n_c))
    targets  (N,) int, -1: no label; number   of images in all, equal per class
             None: segmentation, percent and number then count images. Raises UserError.
    A class is shuffled by (seed, class) and cut, so the 1% of a seed lie within its 10%.
    """
    if (percent is None) == (number is None):
        raise UserError("give one of --labels (percent) and --num-labels")
    if percent is not None and not 0 < percent <= 100:  # nan too
        raise UserError(f"--labels {percent} is no percentage: give more than 0 and at most 100")
    if seed < 0:
        raise UserError(f"--split-seed {seed}: give 0 or more")
    order = np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)
    groups = [order] if targets is None else [
        order[np.asarray(targets)[order] == c] for c in range(len(classes))]
    if not len(ids) or not groups:
        raise UserError("--data-path: no training images there")
    if number is not None and (number < 1 or number % len(groups)):
        raise UserError(f"--num-labels {number}: give a positive multiple of {len(groups)}")
    labeled = []
    for c, group in enumerate(groups):
        # Semi-ViT's code counts like this; Python's round takes a tie to the even number.
        n = number // len(groups) if number else max(1, round(percent / 100 * len(group)))
        if number and n > len(group):
            where = "" if targets is None else f" in {classes[c]!r}"
            raise UserError(f"--num-labels {number}: {n} of {len(group)} images wanted{where}: "
                            "give fewer")
        labeled += group[np.random.default_rng((seed, c)).permutation(len(group))[:n]].tolist()
    name = f"{number} images seed {seed}" if number else f"{percent:g}% seed {seed}"
    return split_of(name, ids, targets, classes, labeled, None, pool)


def read_split(ids, targets, classes, labeled_file, unlabeled_file=None, *, pool="rest",
               root=None) -> Split:
    """The split of one or two lists. ids, targets, classes as in `make_split`.

    pool  "all" puts the labelled images into the unlabelled stream, whatever the second list says
    root  folder of the ids: an image that is a link to outside of it is refused
    Raises UserError with the line number.
    """
    find, real = split_lists._finder(ids), functools.cache(os.path.realpath)
    # torchvision sorts classes, folders in them, files in those: not the order of the whole paths.
    in_order = functools.cache(lambda: sorted(
        range(len(ids)), key=lambda i: (ids[i].split("/")[0], *os.path.split(ids[i]))))

    def inside(path):  # a folder's links are resolved once, a file's own link only where it is one
        folder, name = os.path.split(os.path.join(root, path))
        path = os.path.join(real(folder), name)
        return (os.path.realpath(path) if os.path.islink(path) else path).startswith(
            os.path.join(real(root), ""))

    def place(file, n, kind, image, extra):
        found = find(image) if kind != "index" else in_order()[max(image, 0):image + 1]
        if not found:
            raise _bad(file, n, f"missing file: {image!r:.99} is not among the {len(ids)} training "
                       "images", "delete the line or check --data-path")
        if len(found) > 1:
            raise _bad(file, n, f"{image!r:.99} can be {ids[found[0]]} or {ids[found[1]]}",
                       "write the folder too")
        i, = found
        label = 0 if targets is None else int(targets[i])
        if file == labeled_file and label < 0:
            raise _bad(file, n, f"{ids[i]!r} has no class or mask", "add it, or delete the line")
        if kind == "labels" and targets is not None and label not in (extra, -1):
            raise _bad(file, n, f"label {extra}, but {ids[i]!r} is in class {label} "
                       f"({classes[label]})", "count sorted folders from 0, or delete the column")
        if root and not all(map(inside, [ids[i]] + [extra] * (kind == "pairs"))):
            raise _bad(file, n, f"{ids[i]!r} is a link that leaves {root}", "put the file there")
        return i

    files = [labeled_file] + [unlabeled_file] * (unlabeled_file is not None)
    labeled, *given = map(list, _read_lists(files, lambda text: len(find(text)) == 1, place))
    name = KNOWN.get(fingerprint(ids[i] for i in labeled), os.path.basename(labeled_file))
    return split_of(name, ids, targets, classes, labeled, given[0] if given else None, pool)


def write_split(split: Split, ids, folder) -> None:
    """folder/labeled.txt and unlabeled.txt (images not labelled), one id a line, sorted."""
    rest = np.setdiff1d(split.unlabeled, split.labeled)
    for file, positions in (("labeled.txt", split.labeled), ("unlabeled.txt", rest)):
        lines = sorted(ids[i] for i in positions)
        for line in lines:
            if line != line.strip() or not line.isprintable():  # a line break, a name not in UTF-8
                raise UserError(f"{file} (--output): {line!r} does not fit on a line: rename it")
        os.makedirs(folder, exist_ok=True)
        path = Path(folder, file)
        path.unlink(missing_ok=True)
        if lines:  # an empty list would be refused: no unlabelled images, no second list
            path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, as for every other bad input
        raise UserError(f"{message}: see python -m common.splits --help")


def main(argv=None) -> int:
    """Runs a command; returns 0, or 2 after one line about bad input."""
    parser = _Parser(prog="python -m common.splits", description="make or check a labelled split")
    commands = parser.add_subparsers(dest="command", required=True)
    make, check = (commands.add_parser(name) for name in ("make", "check"))
    make.add_argument("--data-path", required=True, help="folder with train/<class>/ or <class>/")
    make.add_argument("--labels", type=float, help="percent of each class")
    make.add_argument("--num-labels", type=int, help="images in all, equal per class")
    make.add_argument("--split-seed", type=int, default=0)
    make.add_argument("--unlabeled-pool", choices=("rest", "all"), default="rest")
    make.add_argument("--output", required=True, help="folder for labeled.txt and unlabeled.txt")
    check.add_argument("--data-path", help="as for make; without it only the lists are checked")
    check.add_argument("--labels-file", nargs="+", required=True, help="LABELED [UNLABELED]")
    try:
        args = parser.parse_args(argv)
        if args.command == "make":
            ids, targets, classes, _ = split_lists._image_folder(args.data_path)
            split = make_split(ids, targets, classes, percent=args.labels, number=args.num_labels,
                               seed=args.split_seed, pool=args.unlabeled_pool)
            if os.path.exists(os.path.join(args.output, "labeled.txt")):
                raise UserError(f"--output {args.output} holds a labeled.txt: give another folder")
            write_split(split, ids, args.output)
            return print(split.describe()) or 0
        if len(args.labels_file) > 2:
            raise UserError("--labels-file takes one or two lists: LABELED [UNLABELED]")
        if args.data_path:
            ids, targets, classes, root = split_lists._image_folder(args.data_path)
            print(read_split(ids, targets, classes, *args.labels_file, root=root).describe())
            return 0
        as_written = _read_lists(args.labels_file, lambda text: False,
                                 lambda file, n, kind, image, extra: str(image))
        for file, images in zip(args.labels_file, as_written):
            wnids = Counter(re.findall(r"(?m)^n\d{8}(?=_)", "\n".join(map(stem, images)))).values()
            text = f"{KNOWN.get(fingerprint(images), 'not a known list')}: {len(images)} images"
            if wnids:
                text += f" ({min(wnids)} to {max(wnids)} in each of {len(wnids)} classes)"
            print(f"{file}: {text}, sha256 {sha256(sorted(images))[:16]}")
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
