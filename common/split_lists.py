"""Lists of labelled or unlabelled images: read any layout, refuse a bad one with its line.

A list is UTF-8 text; its first line tells the layout:
  names   n03794056_10253.JPEG, a/x.jpg or 2007_000733      SimCLR, VOC, `write_split`
  shards  n01770081_5195.JPEG,0,0      Semiformer = FixMatch: TFRecord shard, place in it; no class
  labels  a/abbey/x.jpg 0 (or comma)   Places: the label must be the class's place in the data
  pairs   JPEGImages/x.jpg SegmentationClass/x.png          UniMatch
  index   csv whose column Index counts torchvision's ImageFolder order      EMAN, Semi-ViT
"""
import csv
import functools
import hashlib
import json
import os
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

IMAGE = frozenset(".jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp".split())  # as torchvision's
KNOWN = json.loads(Path(__file__).with_name("known_splits.json").read_text())  # fingerprint -> name


class UserError(ValueError):
    """Bad input: one line that names the file, the flag and the remedy; a script exits with 2."""


def sha256(lines) -> str:  # surrogateescape: a file name on a disk need not be UTF-8
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def stem(path: str) -> str:
    """'a/x.jpg' -> 'x'. Only an image's extension is cut: '2007.v2' stays whole.

    Cityscapes' 'ulm_000001_000019_leftImg8bit.png' -> 'ulm_000001_000019', as lists of ids say."""
    root, extension = os.path.splitext(path.rpartition("/")[2])
    root = root if extension.lower() in IMAGE else root + extension
    return root.removesuffix("_leftImg8bit")


def fingerprint(paths) -> str:
    """16 hex digits, the same for a list in any layout: with or without folders and extensions."""
    return sha256(sorted(map(stem, paths)))[:16]


def _bad(file, n, what, remedy):
    return UserError(f"{file}, line {n} (--labels-file): {what}: {remedy}")


def _path(file, n, path):
    """'./a//b' -> 'a/b'; UserError for a path that could leave the data folder."""
    if re.match(r"[/\\]|[A-Za-z]:[/\\]", path) or ".." in re.split(r"[/\\]", path):
        what = "leaves the data folder" if ".." in path else "is absolute"
        raise _bad(file, n, f"path {path!r:.99} {what}", "write it relative to the data, no '..'")
    return "/".join(p for p in path.split("/") if p not in ("", ".")) or path


def parse(file, is_id=lambda text: False):
    """Yields (line number, layout, image's path or index, label or mask or None) of a list.

    is_id(text): whether text is one image, to tell a name with a space from two columns.
    Raises UserError with the line number.
    """
    try:
        raw = Path(file).read_bytes().removeprefix(b"\xef\xbb\xbf")  # a BOM, from Windows editors
    except OSError as e:
        raise UserError(f"{file} (--labels-file): {e.strerror}: give a readable file") from e
    kind, count = None, 0
    for n, line in enumerate(raw.split(b"\n"), 1):
        try:
            text = line.decode("utf-8").strip(" \t\r")
        except UnicodeDecodeError:
            raise _bad(file, n, "not UTF-8", "save the list as UTF-8 text") from None
        if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", text) or len(text) > 10_000:
            raise _bad(file, n, "NUL, control character or endless line", "is this a list?")
        if not text:
            continue
        whole = kind in (None, "names") and is_id(text)
        cells = [text] if whole else next(csv.reader([text])) if "," in text else text.split()
        cells = [cell.strip() for cell in cells]
        if kind is None:  # the first line decides
            width, comma = len(cells), "," in text and not whole
            mask = width == 2 and not comma and os.path.splitext(cells[1])[1].lower() in IMAGE
            kind = "index" if "Index" in cells else "pairs" if mask else {
                1: "names", 2: "labels", 3: "shards" if comma else None}.get(width)
            if kind == "index":
                column = cells.index("Index")
                continue
        if kind is None or len(cells) != width or (kind != "index" and "" in cells):
            raise _bad(file, n, f"wrong column count, {len(cells)}, in {text!r:.99}", "use one of "
                       "`name`, `name,shard,place`, `path label` or `image mask`")
        cells = [cells[column]] if kind == "index" else cells
        for cell in {"index": cells, "labels": cells[1:], "shards": cells[1:]}.get(kind, ()):
            if not re.fullmatch(r"-?[0-9]{1,18}", cell):
                raise _bad(file, n, f"{kind}: {cell!r:.99} is not an integer", "correct the column")
        image = int(cells[0]) if kind == "index" else _path(file, n, cells[0])
        second = {"labels": int, "pairs": functools.partial(_path, file, n)}.get(kind)
        second = second and second(cells[1])
        # x_gtFine_labelTrainIds.png is a mask of x_leftImg8bit.png, x1.png is none of x.png
        if kind == "pairs" and not re.match(f"{re.escape(stem(image))}(?![^\\W_])", stem(second)):
            raise _bad(file, n, f"{second!r:.99} is not named as a mask of {image!r:.99}",
                       "pair each picture with its own mask")
        yield n, kind, image, second
        count += 1
    if not count:
        raise UserError(f"{file} (--labels-file): an empty list: give one image a line")


def _finder(ids):
    """find(entry) -> positions of the ids it can mean: 'x', 'x.jpg', 'a/x.jpg', 'train/a/x.jpg'."""
    first, more = {}, defaultdict(list)  # a list only where a name comes twice: saves memory
    for i, name in enumerate(ids):
        key = stem(name)
        if first.setdefault(key, i) != i:
            more[key].append(i)

    def same(name, entry):  # one path is the other's tail; an extension may be missing in one
        a, b = name.split("/")[::-1], entry.split("/")[::-1]
        bare = stem(a[0]) == a[0] or stem(b[0]) == b[0]
        return (a[0] == b[0] or bare) and all(x == y for x, y in zip(a[1:], b[1:]))

    def find(entry):
        key = stem(entry)
        found = [first[key], *more.get(key, ())] if key in first else []
        return [i for i in found if ids[i] == entry] or [i for i in found if same(ids[i], entry)]
    return find


@functools.cache
def list_name(file: str) -> str | None:
    """The name of a published list, known by its hash, whatever the file is called."""
    try:
        return KNOWN.get(fingerprint(str(image) for _, _, image, _ in parse(file)))
    except UserError:  # reading the split will say what is wrong with it
        return None


def _read_lists(files, is_id, place):
    """[{image: line number}] of one or two lists; place(file, *parsed line) names an image.

    Raises UserError with the line for an image that comes twice, in one list or in both.
    """
    lists = []
    for file in files:
        lists.append({})
        for n, *parsed in parse(file, is_id):
            image = place(file, n, *parsed)
            for other, lines in zip(files, lists):
                if image in lines:
                    what = "duplicate of" if lines is lists[-1] else "overlap with"
                    raise _bad(file, n, f"{what} line {lines[image]} of {other}", "delete one")
            lists[-1][image] = n
    return lists


def _image_folder(data):
    """ids, targets, classes, root of DIR/train/<class>/ or DIR/<class>/, listed as a run does."""
    from common import data as layouts  # both stand on this file
    from common import mask_layouts

    if layout := mask_layouts.layout_of(data):
        return mask_layouts.training_part(data, layout)
    if Path(data).name == "train" and not Path(data, "train").is_dir():
        data = Path(data).parent
    part = "train" if Path(data, "train").is_dir() else ""
    try:
        ids, targets, classes = layouts.class_files(Path(data), part)
    except OSError as e:
        raise UserError(f"--data-path {data}: {e.strerror}: give a folder that can be read") from e
    if not part:  # no run reads it so: deeper folders may be the parts of another layout
        found = [(i, c) for i, c in zip(ids, targets) if i.count("/") == 1]
        ids, targets = map(list, zip(*found)) if found else ([], [])
    if not ids:
        raise UserError(f"--data-path {data}: no images: give a folder with train/<class>/x.jpg")
    return ids, np.array(targets), classes, Path(data)
