"""common/ for segmentation: layouts, splits, one draw for picture and mask, measures, pictures."""

import os
import pickle
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import class_names, mask_layouts
from common.mask_splits import choose_split
from common.mask_views import (
    PairViews,
    colours,
    confusion,
    iou,
    mean_iou,
    overlay,
    pair_eval_loader,
    pair_loader,
    save_mask,
    windows,
)
from common.masks import Pairs, PairSet, load_pairs, read_ids
from common.pictures import BadImage, BadImages, pictures_at
from common.splits import UserError, main
from common.streams import Stream

DATA = os.environ.get("SSL_DATA", "")
PARTS = ("train", "val")


def picture(path, size=(6, 4), value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


def mask(path, values=((0, 1), (255, 1)), mode="P", size=(6, 4)):
    """An index mask with a palette, of a few values repeated to the size (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.resize(np.array(values, np.uint8), size[::-1]))
    if mode == "P":
        image.putpalette(class_names.voc_palette().tobytes())
    image.save(path)


# ----- trees of three training pictures and one to validate -------------------------------------


def folder_tree(root, names="ground\nthing\n"):
    for part, stems in (("train", ("a", "sub/b", "c")), ("val", ("v",))):
        for k, name in enumerate(stems):
            picture(root / "images" / part / f"{name}.png", value=k)
            mask(root / "masks" / part / f"{name}.png", mode="L")
    if names:
        (root / "classes.txt").write_text(names)
    return root


VOC_IDS = ("2007_000032", "2008_000002", "2009_000006", "2007_000033")  # the last validates


def voc_tree(root, aug=True, train_list=False):
    for k, name in enumerate(VOC_IDS):
        picture(root / f"JPEGImages/{name}.jpg", value=k)
        if k in (0, 3):
            mask(root / f"SegmentationClass/{name}.png", ((0, 20),))
        if aug and k < 3:
            mask(root / f"SegmentationClassAug/{name}.png", mode="L")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text(VOC_IDS[3])
    if train_list:
        (lists / "train_aug.txt").write_text("\n".join(VOC_IDS[:3]))
    return root


CITY_IDS = ("jena/jena_000078_000019", "jena/jena_000055_000019", "ulm/ulm_000001_000019")


def cityscapes_tree(root, kind="labelTrainIds", values=((0, 18), (255, 3))):
    for part, ids in (("train", CITY_IDS), ("val", ("lindau/lindau_000000_000019",))):
        for name in ids:
            picture(root / f"leftImg8bit/{part}/{name}_leftImg8bit.png")
            mask(root / f"gtFine/{part}/{name}_gtFine_{kind}.png", values, mode="L")
            mask(root / f"gtFine/{part}/{name}_gtFine_instanceIds.png", mode="L")
    return root


def coco_tree(root):
    for part, ids in (("train", (9, 25, 30)), ("val", (139,))):
        for k in ids:
            picture(root / f"{part}2017/{k:012d}.jpg")
            mask(root / f"masks/{k:012d}.png", ((0, 80), (255, 1)), mode="L")
    return root


TREES = dict(folder=folder_tree, voc=voc_tree, cityscapes=cityscapes_tree, coco=coco_tree)


@pytest.mark.parametrize("name", TREES)
def test_each_layout_pairs_every_picture_with_its_mask(tmp_path, name, capsys):
    data = load_pairs(name, TREES[name](tmp_path))
    assert (len(data.train), len(data.val)) == (3, 1) and data.labeled is None
    assert data.train.has_mask.all() and data.val.has_mask.all()
    known = dict(folder=2, voc=21, cityscapes=19, coco=81)[name]
    assert len(data.classes) == len(set(data.classes)) == data.train.classes == known
    for pairs in (data.train, data.val):
        for i in range(len(pairs)):
            assert pairs.pil(i).mode == "RGB" and pairs.pil(i).size == (6, 4)
            image = pairs.mask(i)
            assert image.mode == "L" and image.size == (6, 4) and Path(pairs.path(i)).is_file()
            pairs.check(i)
    said = capsys.readouterr().out
    published = dict(voc="1449", cityscapes="500", coco="5000").get(name)
    assert (f"as published {published}" in said) == bool(published)
    assert mask_layouts.layout_of(tmp_path) == name


def test_voc_trains_on_the_larger_masks_and_validates_on_the_original_ones(tmp_path):
    data = load_pairs("voc", voc_tree(tmp_path))
    assert data.train.name(0) == "JPEGImages/2007_000032.jpg"
    assert data.train.mask_ids[0] == b"SegmentationClassAug/2007_000032.png"
    assert data.val.mask_ids.tolist() == [b"SegmentationClass/2007_000033.png"]
    assert set(np.unique(data.val.mask(0))) == {0, 20}


def test_voc_without_the_larger_masks_knows_its_own_or_a_list(tmp_path):
    data = load_pairs("voc", voc_tree(tmp_path / "original", aug=False))
    assert [data.train.name(i) for i in range(len(data.train))] == ["JPEGImages/2007_000032.jpg"]
    data = load_pairs("voc", voc_tree(tmp_path / "listed", aug=False, train_list=True))
    assert data.train.has_mask.tolist() == [True, False, False]
    with pytest.raises(BadImage, match="2008_000002.jpg: has no mask"):
        data.train.mask(1)


def test_cityscapes_label_ids_are_read_as_train_ids(tmp_path):
    root = cityscapes_tree(tmp_path, "labelIds", ((7, 33, 0, 1, 11, 24),))
    values = np.asarray(load_pairs("cityscapes", root).train.mask(0))
    assert values[0].tolist() == [0, 18, 255, 255, 2, 11]


def test_camvid_reads_its_twelfth_value_as_no_class(tmp_path):
    root = folder_tree(tmp_path, names=None)
    mask(root / "masks/train/a.png", ((10, 11),), mode="L")
    data = load_pairs("camvid", root)
    assert len(data.classes) == 11 and data.classes[:2] == ["sky", "building"]
    assert set(np.unique(data.train.mask(0))) == {10, 255}


@pytest.mark.skipif(not DATA, reason="SSL_DATA is not set to a folder with camvid.tar.gz")
def test_camvid_as_packed(tmp_path, capsys):
    shutil.unpack_archive(Path(DATA, "camvid.tar.gz"), tmp_path)
    data = load_pairs("camvid", tmp_path)
    assert (len(data.train), len(data.val)) == (367, 101) and capsys.readouterr().out == ""
    matrix = sum(confusion(t, t, 11) for t in
                 (torch.from_numpy(np.array(data.val.mask(i))).clamp(max=10) for i in range(101)))
    assert matrix.trace() == matrix.sum() == 101 * 360 * 480 and (matrix.diagonal() > 0).all()
    # sky is at the top of a street scene, road at the bottom
    rows = np.stack([np.asarray(data.val.mask(i)) for i in range(0, 101, 5)])
    assert (rows[:, :60] == 0).sum() > 10 * (rows[:, -60:] == 0).sum()
    assert (rows[:, -60:] == 3).sum() > 10 * (rows[:, :60] == 3).sum()


def test_a_folder_without_names_is_searched_for_its_largest_id(tmp_path, capsys):
    root = folder_tree(tmp_path, names=None)
    mask(root / "masks/val/v.png", ((6, 255),))
    data = load_pairs("folder", root)
    assert data.classes == list("0123456") and data.train.classes == 7
    assert "largest id in its 4 masks is 6, so 7 classes" in capsys.readouterr().out
    (root / "classes.txt").write_text("\ufeffone\r\ntwo\r\n\r\n", encoding="utf-8")
    assert load_pairs("folder", root).classes == ["one", "two"]


def test_pictures_of_images_unlabeled_need_no_mask(tmp_path):
    root = folder_tree(tmp_path)
    picture(root / "images/unlabeled/deep/x.jpg")
    data = load_pairs("folder", root)
    assert data.labeled.tolist() == [0, 1, 2] and data.train.has_mask.tolist() == [1, 1, 1, 0]
    held = load_pairs("folder", root, holdout=1, seed=4)
    assert held.labeled.tolist() == [0, 1] and len(held.train) == 3 and held.val.has_mask.all()


def test_a_holdout_leaves_training_and_has_masks(tmp_path):
    data, again = (load_pairs("folder", folder_tree(tmp_path / str(k)), holdout=2, seed=1)
                   for k in range(2))
    names = [{p.name(i) for i in range(len(p))} for p in (data.train, data.val)]
    assert len(names[0]) == 1 and len(names[1]) == 2 and not names[0] & names[1]
    assert (again.val.ids == data.val.ids).all()
    for wrong in (3, -1):
        with pytest.raises(UserError, match=f"--holdout {wrong}: .* 3 masks"):
            load_pairs("folder", tmp_path / "0", holdout=wrong)


def all_zero_without_names(root):
    (root / "classes.txt").unlink()
    for path in (root / "masks").rglob("*.png"):
        mask(path, ((0, 255),))


@pytest.mark.parametrize("name, spoil, words", [
    ("folder", all_zero_without_names, "no mask in masks/ holds an id above 0"),
    ("folder", lambda r: (r / "classes.txt").write_bytes(b"a\n\xff\na\n"), "classes.txt.*3 names"),
    ("folder", lambda r: shutil.rmtree(r / "masks/val"), "no folder masks/val/"),
    ("folder", lambda r: (r / "masks/train/a.png").unlink(), r"images/train/a.png.*no mask.*unlab"),
    ("folder", lambda r: (r / "masks/val/v.png").unlink(), "masks/val/ holds no picture"),
    ("folder", lambda r: (r / "images/train/c.png").unlink(), "masks/train/c.png.*no picture c "),
    ("folder", lambda r: picture(r / "images/train/a.jpg"), "a.png.*same name but for"),
    ("folder", lambda r: shutil.rmtree(r / "images/train"), "no folder images/train/"),
    ("folder", lambda r: (r / "classes.txt").write_text("a\na\n"), "classes.txt.*2 names"),
    ("voc", lambda r: (r / "ImageSets/Segmentation/val.txt").unlink(), "val.txt .--data-path"),
    ("voc", lambda r: (r / "ImageSets/Segmentation/val.txt").write_text("x\n../x"),
     "val.txt, line 2 .--data-path.*leaves"),
    ("voc", lambda r: (r / "ImageSets/Segmentation/val.txt").write_text("x\ny\ny"),
     "y comes twice"),
    ("voc", lambda r: (r / f"JPEGImages/{VOC_IDS[1]}.jpg").unlink(), f"JPEGImages/{VOC_IDS[1]}"),
    ("voc", lambda r: (r / f"SegmentationClass/{VOC_IDS[3]}.png").unlink(), "2007_000033.*no mask|"
     "no validation picture has a mask"),
    ("voc", lambda r: [shutil.rmtree(r / f"SegmentationClass{x}") for x in ("", "Aug")],
     "SegmentationClass/"),
    ("voc", lambda r: (r / "ImageSets/Segmentation/trainaug.txt").write_text(VOC_IDS[3]),
     "trainaug.txt.*2007_000033 is in .*val.txt too"),
    ("cityscapes", lambda r: shutil.rmtree(r / "gtFine/val"), "no folder gtFine/val/"),
    ("cityscapes", lambda r: [f.unlink() for f in r.rglob("*_labelTrainIds.png")],
     "no training picture has a mask"),
    ("cityscapes", lambda r: [f.rename(f.with_name(f"{k}.png")) for k, f in
                              enumerate(list(r.rglob("*_leftImg8bit.png")))], "X_leftImg8bit.png"),
    ("coco", lambda r: (r / "masks/000000000139.png").unlink(), "no validation picture has a mask"),
    ("coco", lambda r: picture(r / "val2017/7.jpg"), "val2017/7.jpg.*no mask"),
    ("coco", lambda r: shutil.rmtree(r / "masks"), "no folder masks/"),
])
def test_a_wrong_tree_is_one_clear_line(tmp_path, name, spoil, words):
    spoil(TREES[name](tmp_path))
    with pytest.raises(UserError, match=words) as error:
        load_pairs(name, tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert "--data-path" in str(error.value)


def test_a_wrong_name_or_path_is_one_clear_line(tmp_path):
    voc_tree(tmp_path / "voc")
    for name, path, words in (
        ("kitti", tmp_path, "--dataset kitti: one of folder, camvid, voc"),
        ("voc", None, "--dataset voc needs --data-path"),
        ("voc", tmp_path / "none", "none: no such folder"),
        ("folder", tmp_path / "voc", "no folder images/train/ there; is it --dataset voc?"),
    ):
        with pytest.raises(UserError, match=words.replace("?", r"\?")):
            load_pairs(name, path)


# ----- R13: masks -------------------------------------------------------------------------------


def save_as(image, path, **options):
    image.save(path, **options)


@pytest.mark.parametrize("spoil, words", [
    (lambda p: p.write_bytes(b""), "UnidentifiedImageError"),
    (lambda p: p.write_text("no mask"), "UnidentifiedImageError"),
    (lambda p: p.write_bytes(p.read_bytes()[:-30]), "Error"),
    (lambda p: p.unlink(), "FileNotFoundError"),
    (lambda p: Image.new("RGB", (6, 4)).save(p), "mode RGB.*one class id per pixel.*turn colours"),
    (lambda p: Image.new("RGBA", (6, 4)).save(p), "mode RGBA"),
    (lambda p: Image.new("1", (6, 4)).save(p), "mode 1"),
    (lambda p: Image.fromarray(np.zeros((4, 6), np.uint16)).save(p), "mode I;16"),
    (lambda p: Image.new("L", (6, 4)).save(p, "JPEG"), "JPEG in mode L.*save as png"),
    (lambda p: mask(p, size=(4, 6)), "is 4 x 6, its picture 6 x 4.*nearest"),
    (lambda p: mask(p, ((2,),)), "holds the value 2, but there are 2 classes: 0 to 1, and 255"),
    (lambda p: mask(p, ((254, 0),), mode="L"), "holds the value 254"),
])
def test_r13_a_bad_mask_is_named_with_its_remedy(tmp_path, spoil, words):
    data = load_pairs("folder", folder_tree(tmp_path))
    path = tmp_path / "masks/train/a.png"
    spoil(path)
    for read in (data.train.mask, data.train.check):
        with pytest.raises(BadImage, match=words) as error:
            read(0)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_r13_without_names_a_bad_mask_ends_the_search_for_ids(tmp_path):
    root = folder_tree(tmp_path, names=None)
    Image.new("RGB", (6, 4)).save(root / "masks/train/a.png")
    with pytest.raises(UserError, match="masks/train/a.png: .*mode RGB.*--data-path"):
        load_pairs("folder", root)


def test_r13_unusual_masks_are_read_right(tmp_path):
    path, want = tmp_path / "m.png", np.resize(np.array([[0, 1, 255]], np.uint8), (4, 6))
    image = Image.fromarray(want)
    for options in ({}, dict(compress_level=0)):
        image.save(path, **options)
        assert (read_ids(path) == want).all()
    image.putpalette([7, 8, 9] * 256)  # equal colours: places in the palette count
    image.save(path)
    assert (read_ids(path) == want).all()
    few = Image.fromarray(want % 2)
    few.putpalette([5] * 6)
    few.save(path, bits=1)  # one bit a pixel
    assert (read_ids(path) == want % 2).all()
    image.save(tmp_path / "m.bmp")
    assert (read_ids(tmp_path / "m.bmp") == want).all()
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter, like the picture
    Image.fromarray(want).save(path, exif=exif)
    assert (read_ids(path) == np.rot90(want, -1)).all()
    Image.new("L", (1, 1), 3).save(path)
    assert read_ids(path).tolist() == [[3]]


def test_a_mask_of_only_ignored_pixels_is_no_error(tmp_path):
    data = load_pairs("folder", folder_tree(tmp_path))
    mask(tmp_path / "masks/train/a.png", ((255,),))
    assert set(np.unique(data.train.mask(0))) == {255}


# ----- splits -----------------------------------------------------------------------------------


def flags_of(**given):
    usual = dict(labels=None, num_labels=None, labels_file=None, split_seed=0)
    return SimpleNamespace(**usual | given)


def in_memory(n, k=3, size=8):
    rng = np.random.default_rng(0)
    return Pairs(np.array([b"scene/%05d" % i for i in range(n)]), k,
                 pixels=rng.integers(0, 256, (n, size, size, 3), np.uint8),
                 masks=rng.integers(0, k, (n, size, size)).astype(np.uint8))


def test_labels_count_pictures():
    data = PairSet(in_memory(40), in_memory(5), ["a", "b", "c"], class_names.voc_palette())
    split = choose_split(flags_of(labels=12.5), data, "rest", 10)
    assert len(split.labeled) == 5 and len(split.unlabeled) == 35 and split.counts == {}
    assert split.describe().startswith("split 12.5% seed 0: 5 labelled, 35 unlabelled, sha256 ")
    assert len(choose_split(flags_of(), data, "rest", 10).labeled) == 4
    seven = choose_split(flags_of(num_labels=7, split_seed=2), data, "all", 10)
    assert len(seven.labeled) == 7 and len(seven.unlabeled) == 40
    assert seven.name == "7 images seed 2"
    with pytest.raises(UserError, match="--num-labels 41: 41 of 40 images wanted"):
        choose_split(flags_of(num_labels=41), data, "rest", 10)


def test_only_pictures_with_masks_are_labelled(tmp_path):
    root = folder_tree(tmp_path)
    for k in range(5):
        picture(root / f"images/unlabeled/{k}.png")
    data = load_pairs("folder", root)
    own = choose_split(flags_of(), data, "rest", 10)
    assert own.labeled.tolist() == [0, 1, 2] and own.unlabeled.tolist() == [3, 4, 5, 6, 7]
    assert own.name == "images/train and images/unlabeled" and own.counts == {}
    drawn = choose_split(flags_of(labels=100), data, "rest", 10)
    assert drawn.labeled.tolist() == [0, 1, 2] and drawn.sha256 == own.sha256
    with pytest.raises(UserError, match="4 of 3 images wanted in 'pictures with a mask'"):
        choose_split(flags_of(num_labels=4), data, "rest", 10)
    (root / "list.txt").write_text("a\nunlabeled/3.png\n")
    with pytest.raises(UserError, match="line 2 .*unlabeled/3.png' has no class or mask"):
        choose_split(flags_of(labels_file=[str(root / "list.txt")]), data, "rest", 10)


LISTS = {
    "voc": ("2008_000002", "JPEGImages/2008_000002.jpg SegmentationClass/2008_000002.png"),
    "cityscapes": (
        "jena/jena_000078_000019", "jena_000078_000019",
        "leftImg8bit/train/jena/jena_000078_000019_leftImg8bit.png"
        " gtFine/train/jena/jena_000078_000019_gtFine_labelTrainIds.png"),
    "coco": ("train2017/000000000025.jpg masks/000000000025.png", "000000000025"),
    "folder": ("b", "sub/b.png", "images/train/sub/b.png masks/train/sub/b.png"),
}


@pytest.mark.parametrize("name", TREES)
def test_published_ways_to_write_a_list_mean_the_same_pictures(tmp_path, name):
    data = load_pairs(name, TREES[name](tmp_path / "data"))
    hashes = set()
    for text in LISTS[name]:
        file = tmp_path / "list.txt"
        file.write_text(text)  # no final newline
        split = choose_split(flags_of(labels_file=[str(file)]), data, "rest", 10)
        assert len(split.labeled) == 1 and len(split.unlabeled) == 2
        assert Path(text.split()[0]).stem in data.train.name(split.labeled[0])
        hashes.add(split.sha256)
    assert len(hashes) == 1


@pytest.mark.parametrize("text, words", [
    ("2008_000002\n2009_000006\n2008_000002", "line 3 .*duplicate of line 1"),
    ("2008_000002\n2009_000007", "line 2 .*missing file"),
    ("2008_000002\n2007_000033", "line 2 .*missing file"),  # validates
    ("2008_000002.jpg 2008_000002.png\n2009_000006.jpg ../m.png", "line 2 .*leaves"),
    ("2008_000002.jpg 2008_000002.png\n/x/2009_000006.jpg m.png", "line 2 .*absolute"),
    ("2008_000002.jpg 2008_000002.png\n2009_000006.jpg out/2009_000006.png", "line 2 .*link"),
    ("2008_000002.jpg 2008_000002.png\n2009_000006.jpg 2008_000002.png", "line 2 .*as a mask of"),
    ("2008_000002\n2009_000006\0", "line 2 .*NUL"),
    ("", "empty list"),
])
def test_r12_a_hostile_list_is_refused_with_its_line(tmp_path, text, words):
    data = load_pairs("voc", voc_tree(tmp_path / "data"))
    (tmp_path / "data" / "out").symlink_to(tmp_path)
    file = tmp_path / "list.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=f"list.txt.*{words}"):
        choose_split(flags_of(labels_file=[str(file)]), data, "rest", 10)


def test_r12_two_lists_must_not_overlap_and_a_shorter_second_is_kept(tmp_path):
    data = load_pairs("voc", voc_tree(tmp_path / "data"))
    files = [str(tmp_path / f) for f in ("l.txt", "u.txt")]
    Path(files[0]).write_text("2008_000002")
    Path(files[1]).write_text("2009_000006\n2008_000002")
    with pytest.raises(UserError, match="u.txt, line 2 .*overlap with line 1 of .*l.txt"):
        choose_split(flags_of(labels_file=files), data, "rest", 10)
    Path(files[1]).write_text("2009_000006")
    split = choose_split(flags_of(labels_file=files), data, "rest", 10)
    assert split.labeled.tolist() == [1] and split.unlabeled.tolist() == [2]


@pytest.mark.skipif(not DATA, reason="SSL_DATA is not set to a folder with splits/")
@pytest.mark.parametrize("lists, images, want", [
    ("voc/classic/92", "voc/train_aug.txt", ("UniMatch VOC classic 92", 92, 10_490)),
    ("voc/classic/1464", "voc/train_aug.txt", ("UniMatch VOC classic 1464", 1464, 9118)),
    ("voc/blend/1_8", "voc/train_aug.txt", ("UniMatch VOC blend 1/8", 1323, 9259)),
    ("cityscapes/1_16", None, ("UniMatch Cityscapes 1/16", 186, 2789)),
    ("cityscapes/1_2", None, ("UniMatch Cityscapes 1/2", 1488, 1487)),
    ("coco/1_512", None, ("UniMatch COCO 1/512", 232, 0))])
def test_published_lists_are_read_and_named(lists, images, want, tmp_path):
    """On pictures of the published names, in memory: the two lists, and their bare ids, agree."""
    folder = Path(DATA, "splits", lists)
    files = [f for f in (folder / "labeled.txt", folder / "unlabeled.txt") if f.exists()]
    every = [Path(DATA, "splits", images)] if images else files
    ids = sorted(line.split()[0] for f in every for line in f.read_text().split("\n") if line)
    pairs = Pairs(np.array([i.encode() for i in ids]), 21, masks=np.zeros((len(ids), 1, 1)))
    data = PairSet(pairs, pairs, class_names.VOC, class_names.voc_palette())
    split = choose_split(flags_of(labels_file=list(map(str, files))), data, "rest", 10)
    assert (split.name, len(split.labeled), len(split.unlabeled)) == want
    bare = tmp_path / "bare.txt"
    stems = [Path(ids[i]).stem.removesuffix("_leftImg8bit") for i in split.labeled]
    bare.write_text("\n".join(stems))
    again = choose_split(flags_of(labels_file=[str(bare)]), data, "rest", 10)
    assert again.name == split.name and again.sha256 == split.sha256
    assert np.array_equal(again.unlabeled, split.unlabeled)


@pytest.mark.parametrize("name", TREES)
def test_the_command_line_makes_and_checks_a_split_of_masks(tmp_path, capsys, name):
    root, out = str(TREES[name](tmp_path / "data")), str(tmp_path / "out")
    assert main(["make", "--data-path", root, "--num-labels", "2", "--output", out]) == 0
    made = capsys.readouterr().out
    assert made.startswith("split 2 images seed 0: 2 labelled, 1 unlabelled, sha256 ")
    lists = [f"{out}/labeled.txt", f"{out}/unlabeled.txt"]
    assert main(["check", "--data-path", root, "--labels-file", *lists]) == 0
    assert made.split()[-1] in capsys.readouterr().out
    data = load_pairs(name, root)
    split = choose_split(flags_of(num_labels=2), data, "rest", 10)
    assert split.describe() + "\n" == made  # a run draws and records the same
    shutil.rmtree(Path(root, dict(voc="JPEGImages", folder="masks/train").get(name, "masks")),
                  ignore_errors=True)
    shutil.rmtree(Path(root, "gtFine"), ignore_errors=True)
    assert main(["check", "--data-path", root, "--labels-file", *lists]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ----- views ------------------------------------------------------------------------------------


class Corner:
    """A view: the pixel of one random place in picture and mask, and draws of all generators."""

    def __call__(self, picture, mask):
        place = random.randrange(picture.width), random.randrange(picture.height)
        drawn = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])
        of_mask = -1 if mask is None else mask.getpixel(place)
        return torch.tensor(picture.getpixel(place)), torch.tensor(of_mask), drawn


def red_is_class(tmp_path, count=8, size=(6, 4)):
    """A folder whose pictures hold in red the class id of each pixel's mask."""
    draws = np.random.default_rng(0)
    for part, n in (("train", count), ("val", 2)):
        for k in range(n):
            values = draws.integers(0, 5, size[::-1]).astype(np.uint8)
            for kind, image in (("images", np.stack([values, 0 * values + k, 0 * values], 2)),
                                ("masks", values)):
                path = tmp_path / kind / part / f"{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    return load_pairs("folder", tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_draw_serves_picture_and_mask(tmp_path, workers):
    data = red_is_class(tmp_path)
    stream = Stream("s", np.arange(8), 4, seed=0)
    loader = pair_loader(data.train, [Corner()], stream, start=0, stop=3, workers=workers)
    for step, (seen, positions) in enumerate(loader):
        (pixels, of_mask, _), = seen
        assert pixels.shape == (4, 3) and torch.equal(pixels[:, 0], of_mask)
        assert positions.tolist() == [k[2] for k in stream.keys(step)] == pixels[:, 1].tolist()


def test_draws_depend_on_seed_stream_pass_and_place_alone(tmp_path):
    data = red_is_class(tmp_path)

    def draws(seed=0, name="s", **how):
        stream = Stream(name, np.arange(8), 4, seed=seed)
        loader = pair_loader(data.train, [Corner(), Corner()], stream, start=1, stop=4, **how)
        return [torch.cat([view[2] for view in seen], 1) for seen, _ in loader]

    one = draws()
    torch.manual_seed(3), random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    for other in (draws(workers=2), draws(with_masks=False)):
        assert all(torch.equal(a, b) for a, b in zip(one, other))
    halves = [draws(rank=r, world=2) for r in range(2)]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(one, zip(*halves)))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    numbers = torch.cat(one)
    assert len(numbers.unique()) == numbers.numel()
    assert not torch.equal(draws(seed=1)[0], one[0]) and not torch.equal(draws(name="t")[0], one[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_without_masks_none_is_opened(tmp_path, workers):
    """The stream of unlabelled pictures: their masks are deleted, and nothing changes."""
    data = red_is_class(tmp_path)
    stream = Stream("u", np.arange(2, 8), 3, seed=0)
    how = dict(start=0, stop=4, with_masks=False, workers=workers)
    before = [seen[0] for seen, _ in pair_loader(data.train, [Corner()], stream, **how)]
    shutil.rmtree(tmp_path / "masks")
    after = [seen[0] for seen, _ in pair_loader(data.train, [Corner()], stream, **how)]
    assert all(torch.equal(x, y) for a, b in zip(before, after) for x, y in zip(a, b))
    assert all((a[1] == -1).all() for a in after)
    with pytest.raises(UserError, match="^[^\n]*png: FileNotFound[^\n]*a hundred[^\n]*$"):
        list(pair_loader(data.train, [Corner()], stream, start=0, stop=1, workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_r13_a_broken_mask_or_picture_is_replaced_from_its_own_stream(tmp_path, workers):
    data = red_is_class(tmp_path)
    (tmp_path / "masks/train/2.png").write_bytes(b"")
    Image.new("RGB", (6, 4)).save(tmp_path / "masks/train/5.png")
    (tmp_path / "images/train/6.png").write_bytes(b"")
    stream = Stream("s", np.array([1, 2, 5, 6]), 4, seed=0)
    bad = BadImages(data.train, allowed=3)
    how = dict(start=0, stop=3, workers=workers)
    for seen, positions in pair_loader(data.train, [Corner()], stream, bad=bad, **how):
        assert positions.tolist() == [1] * 4 == seen[0][0][:, 1].tolist()
        assert torch.equal(seen[0][0][:, 0], seen[0][1])
    assert bad.seen == {2, 5, 6}
    for k, allowed, words in ((2, 0, r"masks.*2\.png: Unid.*--max-bad-images 1"),
                              (5, 0, r"masks.*5\.png: .*mode RGB.*; remove the file, or let 1 "),
                              (6, 0, r"images.*6\.png: .*--max-bad-images 1")):
        one = Stream("s", np.array([k, 1]), 2, seed=0)
        with pytest.raises(UserError, match=words):
            bad = BadImages(data.train, allowed=allowed)
            list(pair_loader(data.train, [Corner()], one, bad=bad, **how))
    bad = BadImages(data.train, allowed=1)  # masks are not looked at: one broken picture
    list(pair_loader(data.train, [Corner()], stream, bad=bad, with_masks=False, **how))
    assert bad.seen == {6}


def test_when_nothing_can_be_read_the_run_ends(tmp_path):
    data = red_is_class(tmp_path)
    shutil.rmtree(tmp_path / "masks")
    views = PairViews(data.train, [Corner()], 0, "s", np.arange(8))
    with pytest.raises(UserError, match="masks/train/.*: a hundred pictures in a row"):
        views[(0, 0, 3)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_shards_hold_every_pair_once(world):
    pairs, seen = in_memory(7), []
    for rank in range(world):
        for (_, of_mask, _), positions in pair_eval_loader(pairs, Corner(), 2, rank=rank,
                                                           world=world):
            assert (of_mask >= 0).all()
            seen += positions.tolist()
    assert sorted(seen) == list(range(7))


def test_pairs_in_memory_and_what_is_taken_of_them():
    pairs = in_memory(6)
    some = pairs.take(np.array([4, 1]))
    assert some.name(0) == some.path(0) == "scene/00004" and len(some) == 2
    assert np.array_equal(np.asarray(some.pil(1)), pairs.pixels[1])
    assert np.array_equal(np.asarray(some.mask(0)), pairs.masks[4])
    table = class_names.lookup({0: 2, 1: 0}, other=255)
    read = Pairs(pairs.ids, 3, pixels=pairs.pixels, masks=pairs.masks, lookup=table).mask(0)
    assert np.array_equal(np.asarray(read), table[pairs.masks[0]])
    bare = Pairs(pairs.ids, 3, pixels=pairs.pixels)
    assert not bare.has_mask.any()
    with pytest.raises(BadImage, match="scene/00000: has no mask"):
        bare.mask(0)
    pairs.masks[2, 0, 0] = 3
    with pytest.raises(BadImage, match="mask of scene/00002: holds the value 3"):
        pairs.mask(2)


def test_views_travel_to_spawned_workers():
    views = pickle.loads(pickle.dumps(PairViews(in_memory(2), [Corner()], 0, "s", np.arange(2))))
    assert views.stream == "s" and len(views.pairs) == 2


# ----- measures ---------------------------------------------------------------------------------


def test_confusion_and_iou_by_hand():
    target = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 255]])
    pred = torch.tensor([[0, 0, 1, 1], [1, 2, 0, 1]])
    matrix = confusion(pred, target, 4)
    want = [[2, 1, 0, 0], [0, 2, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]  # row: truth
    assert matrix.tolist() == want and matrix.dtype == torch.int64
    # 0: 2 / (3 + 3 - 2), 1: 2 / (3 + 3 - 2), 2: 0 / (1 + 1 - 0), 3: nowhere
    assert iou(matrix)[:3].tolist() == [0.5, 0.5, 0] and iou(matrix)[3].isnan()
    assert mean_iou(matrix).item() == pytest.approx(1 / 3)


def test_confusion_adds_up_over_batches_and_takes_bytes():
    rng = torch.Generator().manual_seed(0)
    pred = torch.randint(0, 21, (3, 40, 50), generator=rng)
    target = torch.randint(0, 22, (3, 40, 50), generator=rng)
    target[target == 21] = 255
    whole = confusion(pred, target, 21)
    parts = [confusion(p.byte(), t.byte(), 21) for p, t in zip(pred, target)]
    assert torch.equal(sum(parts), whole) and whole.sum() == (target != 255).sum()
    for truth, given in ((0, 0), (3, 20), (20, 20)):
        assert whole[truth, given] == ((target == truth) & (pred == given)).sum()
    assert confusion(pred, torch.full_like(pred, 255), 21).sum() == 0
    assert mean_iou(confusion(pred, torch.full_like(pred, 255), 21)).isnan()


def test_a_class_that_is_only_predicted_has_zero_and_an_absent_one_does_not_count():
    target, pred = torch.zeros(10, dtype=torch.long), torch.zeros(10, dtype=torch.long)
    assert mean_iou(confusion(pred, target, 5)).item() == 1
    pred[:5] = 1
    assert mean_iou(confusion(pred, target, 5)).item() == 0.25


@pytest.mark.parametrize("size, crop, stride, want", [
    ((1024, 2048), 768, 512, [(y, x) for y in (0, 256) for x in (0, 512, 1024, 1280)]),
    ((768, 768), 768, 512, [(0, 0)]),
    ((769, 768), 768, 512, [(0, 0), (1, 0)]),
    ((500, 300), 512, 341, [(0, 0)]),
    ((5, 4), 2, 2, [(0, 0), (0, 2), (2, 0), (2, 2), (3, 0), (3, 2)]),
])
def test_windows_by_hand(size, crop, stride, want):
    assert windows(*size, crop, stride) == want


@pytest.mark.parametrize("size", [(37, 64), (64, 65), (100, 16)])
def test_windows_cover_every_pixel_and_stay_inside(size):
    seen = torch.zeros(size)
    for top, left in windows(*size, 16, 11):
        assert seen[top : top + 16, left : left + 16].shape == (16, 16)
        seen[top : top + 16, left : left + 16] += 1
    assert (seen > 0).all()


# ----- pictures ---------------------------------------------------------------------------------


def test_palettes_have_the_published_colours():
    voc, city = class_names.palette("voc"), class_names.palette("cityscapes")
    assert voc.shape == (256, 3) and voc.dtype == np.uint8
    assert voc[[0, 1, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]]
    assert city[[0, 10, 13, 18]].tolist() == [
        [128, 64, 128], [70, 130, 180], [0, 0, 142], [119, 11, 32]]
    for name, classes in (("voc", 21), ("cityscapes", 19), ("coco", 81), ("camvid", 11),
                          ("digits", 11), ("folder", 254)):
        used = class_names.palette(name)[[*range(classes), 255]]
        assert len({tuple(c) for c in used.tolist()}) == classes + 1, name
    names = [class_names.VOC, class_names.CITYSCAPES, class_names.COCO, class_names.CAMVID]
    assert [len(set(n)) for n in names] == [21, 19, 81, 11]
    assert class_names.COCO[1] == "person" and class_names.COCO[80] == "toothbrush"
    assert all(n == n.strip() and n for classes in names for n in classes)


def test_a_saved_mask_is_a_mask_again_and_shows_colours(tmp_path):
    ids = torch.tensor([[0, 1, 20], [255, 15, 7]])
    palette = class_names.palette("voc")
    save_mask(ids, tmp_path / "m.png", palette)
    assert read_ids(tmp_path / "m.png").tolist() == ids.tolist()
    with Image.open(tmp_path / "m.png") as image:
        shown = np.asarray(image.convert("RGB"))
    assert (shown == palette[ids.numpy()]).all()
    assert np.array_equal(colours(ids, palette).permute(1, 2, 0).numpy(), shown)
    assert colours(ids[None].expand(4, -1, -1), palette).shape == (4, 3, 2, 3)


def test_an_overlay_mixes_colours_and_leaves_clear_pixels_alone():
    palette = class_names.palette("voc")
    image = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    ids = torch.tensor([[0, 1], [255, 1]])
    shown = overlay(image, ids, palette, alpha=0.5, clear=(0, 255))
    assert shown.dtype == torch.uint8 and shown[:, 0, 1].tolist() == [114, 50, 50]
    assert (shown[:, :, 0] == 100).all() and (image == 100).all()
    assert overlay(image, ids, palette, alpha=0.5)[:, 0, 0].tolist() == [50] * 3
    assert torch.equal(overlay(image, torch.full((2, 2), 255), palette), image)


def test_pictures_to_predict_are_found_and_broken_ones_left_out(tmp_path, capsys):
    picture(tmp_path / "in/deep/b.png"), picture(tmp_path / "in/a.jpg")
    (tmp_path / "in/c.jpg").write_text("no picture"), (tmp_path / "in/d.txt").write_text("x")
    found = pictures_at(tmp_path / "in")
    assert [Path(found.path(i)).name for i in range(len(found))] == ["a.jpg", "b.png"]
    assert "c.jpg" in capsys.readouterr().err
    with pytest.raises(UserError, match="--predict .*none of its pictures"):
        pictures_at(tmp_path / "in/c.jpg")
    with pytest.raises(UserError, match="--predict .*no picture there"):
        pictures_at(tmp_path / "in/d.txt")
