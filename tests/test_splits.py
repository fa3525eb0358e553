"""common/splits.py: counts by hand, equal draws everywhere, all layouts, hostile lists (R12)."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import split_lists, splits
from common.data import load_dataset
from common.splits import UserError, main, make_split, read_split, write_split

HERE = Path(__file__).parent
DATA = os.environ.get("SSL_DATA", "")
IDS = ["n01440764/n01440764_1.JPEG", "n01440764/n01440764_2.JPEG", "n01440764/n01440764_10.JPEG",
       "n01443537/n01443537_5.JPEG", "n01443537/n01443537_6.JPEG"]
TARGETS, CLASSES = np.array([0, 0, 0, 1, 1]), ["n01440764", "n01443537"]


def data_set(sizes):
    """ids, targets, classes of classes with these numbers of images."""
    ids = [f"c{c:02}/{i:05}.png" for c, n in enumerate(sizes) for i in range(n)]
    return ids, np.repeat(np.arange(len(sizes)), sizes), [f"c{c:02}" for c in range(len(sizes))]


def save(folder, content, name="list.txt"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def chosen(split, ids):
    return {ids[i] for i in split.labeled}


# ----- drawing ---------------------------------------------------------------------------------
@pytest.mark.parametrize("n, percent, want", [(25, 10, 2), (35, 10, 4), (3, 1, 1), (1300, 1, 13),
                                              (50, 1, 1), (5, 100, 5), (250, 1, 2), (150, 1, 2)])
def test_counts_by_hand_take_a_tie_to_the_even_number(n, percent, want):
    split = make_split(*data_set([n, 40]), percent=percent)
    assert split.counts["c00"] == want
    assert len(split.labeled) == want + split.counts["c01"]
    assert np.array_equal(np.union1d(split.labeled, split.unlabeled), np.arange(n + 40))
    assert len(split.unlabeled) == n + 40 - len(split.labeled)


def test_counts_equal_the_authors_code():
    case = torch.load(HERE / "parity" / "semi_vit.pt", weights_only=True)["split"]
    for percent, key in ((1, "p0.01"), (10, "p0.1")):
        split = make_split(*data_set(case["class_sizes"]), percent=percent)
        want = case[key]
        assert list(split.counts.values()) == want["labelled_per_class"]
        assert len(split.labeled) == want["n_labelled"]
        assert len(split.unlabeled) == want["n_unlabelled"]
        assert len(np.intersect1d(split.labeled, split.unlabeled)) == want["overlap"] == 0


def test_number_is_equal_per_class_and_counts_images_without_classes():
    ids, targets, classes = data_set([30, 9, 12])
    split = make_split(ids, targets, classes, number=27, seed=3)
    assert split.counts == {"c00": 9, "c01": 9, "c02": 9} and split.name == "27 images seed 3"
    scenes = make_split(ids, None, [], number=7)
    assert len(scenes.labeled) == 7 and scenes.counts == {} and len(scenes.unlabeled) == 44
    assert len(make_split(ids, None, [], percent=10).labeled) == 5


def test_same_images_in_any_order_and_process():
    ids, targets, classes = data_set([40, 25, 7])
    split = make_split(ids, targets, classes, percent=20, seed=1)
    mixed = np.random.default_rng(0).permutation(len(ids))
    again = make_split([ids[i] for i in mixed], targets[mixed], classes, percent=20, seed=1)
    assert chosen(again, [ids[i] for i in mixed]) == chosen(split, ids)
    assert again.sha256 == split.sha256 and (np.diff(again.labeled) > 0).all()
    code = ("import numpy as np; np.random.seed(7); from common.splits import make_split; "
            "from tests.test_splits import data_set; "
            "print(make_split(*data_set([40, 25, 7]), percent=20, seed=1).sha256)")
    env = dict(os.environ, RANK="3", WORLD_SIZE="4", PYTHONHASHSEED="5", OMP_NUM_THREADS="1")
    out = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, env=env, text=True,
                         capture_output=True, check=True)
    assert out.stdout.strip() == split.sha256


def test_seeds_differ_and_a_smaller_split_lies_within_a_larger():
    ids, targets, classes = data_set([100, 100])
    one, ten, other = (make_split(ids, targets, classes, percent=p, seed=s)
                       for p, s in ((1, 0), (10, 0), (10, 1)))
    assert chosen(one, ids) < chosen(ten, ids) and other.sha256 != ten.sha256
    # Classes of one size must not get the same places either.
    first, second = ten.labeled[:10], ten.labeled[10:] - 100
    assert not np.array_equal(first, second)


def test_pool_and_everything_labelled():
    both = make_split(*data_set([4, 4]), percent=50, pool="all")
    assert both.unlabeled.tolist() == list(range(8)) and len(both.labeled) == 4
    assert len(make_split(*data_set([4, 4]), percent=100).unlabeled) == 0


def test_describe_is_one_line_with_name_counts_and_hash():
    split = make_split(*data_set([40, 25]), percent=10)
    assert split.describe() == ("split 10% seed 0: 6 labelled (2 to 4 in each of 2 classes), "
                                f"59 unlabelled, sha256 {split.sha256[:16]}")


@pytest.mark.parametrize("flags, named", [
    (dict(percent=0), "--labels 0"), (dict(percent=101), "--labels 101"),
    (dict(percent=float("nan")), "--labels nan"), (dict(), "--num-labels"),
    (dict(percent=1, number=2), "--num-labels"), (dict(number=3), "--num-labels 3"),
    (dict(number=0), "--num-labels 0"), (dict(number=20), "--num-labels 20"),
    (dict(percent=1, seed=-1), "--split-seed"), (dict(percent=1, pool="x"), "--unlabeled-pool")])
def test_bad_flags_are_named(flags, named):
    with pytest.raises(UserError, match=named):
        make_split(*data_set([8, 12]), **flags)


def test_no_images_are_refused():
    for targets in (None, np.array([], int)):
        with pytest.raises(UserError, match="--data-path: no training images"):
            make_split([], targets, [], number=1)


def test_an_id_that_comes_twice_is_refused():
    with pytest.raises(UserError, match="'a/x.png' comes twice"):
        make_split(["a/x.png", "a/x.png"], None, [], number=1)


# ----- layouts ---------------------------------------------------------------------------------
@pytest.mark.parametrize("text", [
    "n01443537_5.JPEG\nn01440764_10.JPEG\n",                                    # SimCLR
    "n01443537_5.JPEG,0,0\nn01440764_10.JPEG,7,1\n",                            # Semiformer
    "n01443537/n01443537_5.JPEG 1\nn01440764/n01440764_10.JPEG 0\n",            # Places365
    "n01443537/n01443537_5.JPEG,1\nn01440764/n01440764_10.JPEG,0\n",            # Places205
    "train/n01443537/n01443537_5.JPEG\n./n01440764//n01440764_10.JPEG\n",       # paths
    "n01443537_5\nn01440764_10\n",                                              # bare ids
    "Index\n3\n1\n",                                                  # EMAN: _10 sorts before _2
    ",Index,Label\n0,3,1\n1,1,0\n",                                         # as pandas writes it
    "n01443537_5.JPEG m/n01443537_5.png\nn01440764_10.JPEG m/n01440764_10.png\n"])  # UniMatch
@pytest.mark.parametrize("edit", [
    lambda text: text, lambda text: text.replace("\n", "\r\n"), lambda text: "\ufeff" + text,
    lambda text: text.rstrip("\n"), lambda text: text.replace("\n", "\n\n")],
    ids=["as is", "CRLF", "BOM", "no final newline", "blank lines"])
def test_every_layout_means_the_same_images(tmp_path, text, edit):
    split = read_split(IDS, TARGETS, CLASSES, save(tmp_path, edit(text)))
    assert split.labeled.tolist() == [2, 3] and split.unlabeled.tolist() == [0, 1, 4]
    assert split.counts == {"n01440764": 1, "n01443537": 1} and split.name == "list.txt"
    assert split.labeled.dtype == split.unlabeled.dtype == np.int64


@pytest.mark.parametrize("pattern", ["{}", "{}.jpg", "JPEGImages/{}.jpg"])
def test_voc_ids_and_pairs_find_each_other(tmp_path, pattern):
    ids = [pattern.format(name) for name in ("2007_000733", "2007_000032")]
    pairs = "JPEGImages/2007_000733.jpg SegmentationClass/2007_000733.png"
    for text in (pairs, "2007_000733"):
        split = read_split(ids, None, [], save(tmp_path, text))
        assert split.labeled.tolist() == [0] and split.counts == {}


def test_index_counts_in_torchvision_order(tmp_path):
    ids = ["a-b/x.png", "a/x.png", "a/y.png"]  # as paths a-b/ sorts before a/, as folders after
    split = read_split(ids, None, [], save(tmp_path, "Index\n0\n"))
    assert chosen(split, ids) == {"a/x.png"}


def test_names_with_spaces_and_commas_are_no_columns(tmp_path):
    ids = ["my cat/a b.png", "my cat/c,d.png", "my cat/e 7", "my cat/ü.png"]
    split = make_split(ids, None, [], percent=50)
    write_split(split, ids, tmp_path)
    again = read_split(ids, None, [], tmp_path / "labeled.txt", tmp_path / "unlabeled.txt")
    assert again.sha256 == split.sha256 and np.array_equal(again.unlabeled, split.unlabeled)


@pytest.mark.parametrize("pool", ["rest", "all"])
def test_round_trip_keeps_the_hash(tmp_path, pool):
    ids, targets, classes = data_set([30, 20])
    split = make_split(ids, targets, classes, percent=10, pool=pool)
    write_split(split, ids, tmp_path)
    for lists in (["labeled.txt"], ["labeled.txt", "unlabeled.txt"]):
        again = read_split(ids, targets, classes, *[tmp_path / f for f in lists], pool=pool)
        assert again.sha256 == split.sha256 and again.counts == split.counts
        assert np.array_equal(again.labeled, split.labeled)
        assert np.array_equal(again.unlabeled, split.unlabeled)


def test_a_shorter_unlabelled_list_changes_the_hash_and_the_stream(tmp_path):
    lists = save(tmp_path, "n01440764_1.JPEG"), save(tmp_path, "n01443537_6.JPEG", "u.txt")
    alone, both = (read_split(IDS, TARGETS, CLASSES, *lists[:k]) for k in (1, 2))
    assert both.unlabeled.tolist() == [4] and both.sha256 != alone.sha256
    pool = read_split(IDS, TARGETS, CLASSES, *lists, pool="all")
    assert pool.unlabeled.tolist() == [0, 4] and pool.sha256 == both.sha256


def test_all_labelled_writes_one_list_and_takes_away_an_older_second(tmp_path):
    ids, targets, classes = data_set([3, 3])
    for percent in (50, 100):
        write_split(make_split(ids, targets, classes, percent=percent), ids, tmp_path)
    assert os.listdir(tmp_path) == ["labeled.txt"]


@pytest.mark.parametrize("name", ["a/x\ny.png", " a.png", "a/\udcff.png"])
def test_a_name_that_would_not_read_back_is_not_written(tmp_path, name):
    with pytest.raises(UserError, match="--output"):
        write_split(make_split([name], None, [], number=1), [name], tmp_path)
    assert os.listdir(tmp_path) == []


# ----- R12: hostile lists ----------------------------------------------------------------------
GOOD = b"n01440764_1.JPEG\n"


@pytest.mark.parametrize("content, line, what", [
    (GOOD + b"\nn01443537_5.JPEG\nn01440764_1.JPEG\n", 4, "duplicate of line 1"),
    (GOOD + b"n01440764/n01440764_1.JPEG\n", 2, "duplicate of line 1"),
    (GOOD + b"n01440764_99.JPEG\n", 2, "missing file"),
    (GOOD + b"n01443537/n01440764_2.JPEG\n", 2, "missing file"),
    (GOOD + b"n01443537_5.png\n", 2, "missing file"),
    (GOOD + b"../n01440764_2.JPEG\n", 2, "leaves"),
    (GOOD + b"n01440764/../../n01440764_2.JPEG\n", 2, "leaves"),
    (GOOD + b"..\\n01440764_2.JPEG\n", 2, "leaves"),
    (GOOD + b"/n01440764/n01440764_2.JPEG\n", 2, "absolute"),
    (GOOD + b"C:\\n01440764_2.JPEG\n", 2, "absolute"),
    (GOOD + b"n01440764_2.JPEG\0\n", 2, "NUL"),
    (GOOD + b"n01440764_2.JPEG\rn01443537_5.JPEG\n", 2, "control character"),
    (GOOD + b"\xff.JPEG\n", 2, "UTF-8"),
    (GOOD.decode().encode("utf-16"), 1, "UTF-8"),
    (GOOD + b"x" * 20_000, 2, "endless"),
    (GOOD + b"n01440764_2.JPEG 0\n", 2, "column count"),
    (GOOD + b"n01440764_2.JPEG,0,1\n", 2, "column count"),
    (b"n01440764_1.JPEG,0,0\nn01440764_2.JPEG,0\n", 2, "column count"),
    (b"n01440764_1.JPEG,0,0,0\n", 1, "column count"),
    (b"n01440764_1.JPEG 0\nn01440764_2.JPEG\n", 2, "column count"),
    (b"n01440764_1.JPEG n01440764_1.png\nn01440764_2.JPEG m.png m.png\n", 2, "column count"),
    (b"n01440764_1.JPEG n01440764_1.png\nn01440764_2.JPEG ../m.png\n", 2, "leaves"),
    (b"n01440764_1.JPEG m/n01440764_1.png\nn01440764_2.JPEG m/n01440764_1.png\n", 2, "as a mask"),
    (b"n01440764_1.JPEG n01440764_1_id.png\nn01440764_2.JPEG n01440764_20.png\n", 2, "as a mask"),
    (b"n01440764_1.JPEG 0\nn01440764_2.JPEG cat\n", 2, "not an integer"),
    (b"n01440764_1.JPEG,0,0\nn01440764_2.JPEG,0,x\n", 2, "not an integer"),
    (b"n01440764_1.JPEG 0\nn01440764_2.JPEG 1\n", 2, "label 1, but"),
    (b"n01440764_1.JPEG,0\nn01440764_2.JPEG,-1\n", 2, "label -1, but"),
    (b"Index\n0\n5\n", 3, "missing file: 5"),
    (b"Index\n0\n-1\n", 3, "missing file: -1"),
    (b"Index\n0\n1.0\n", 3, "not an integer"),
    (b"Index\n0\n" + b"9" * 5000, 3, "not an integer"),
    (b",Index\n0,0\n1\n", 3, "column count"),
    (b"Index\n2\n2\n", 3, "duplicate of line 2")])
def test_hostile_list_is_refused_with_its_line(tmp_path, content, line, what):
    file = save(tmp_path, content)
    with pytest.raises(UserError) as e:
        read_split(IDS, TARGETS, CLASSES, file)
    message = str(e.value)
    assert message.startswith(f"{file}, line {line} (--labels-file): ") and what in message
    assert "\n" not in message and len(message) < len(file) * 2 + 400


@pytest.mark.parametrize("content", [b"", b"\n\r\n", b"\xef\xbb\xbf", b"Index\n"])
def test_empty_list_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="list.txt .*empty list"):
        read_split(IDS, TARGETS, CLASSES, save(tmp_path, content))


def test_unreadable_list_is_named(tmp_path):
    for file in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match=f"{file.name} .--labels-file"):
            read_split(IDS, TARGETS, CLASSES, file)


def test_an_image_in_both_lists_is_refused_with_both_lines(tmp_path):
    lists = save(tmp_path, GOOD), save(tmp_path, b"n01443537_5.JPEG\nn01440764/" + GOOD, "u.txt")
    with pytest.raises(UserError, match="u.txt, line 2 .*overlap with line 1 of .*list.txt"):
        read_split(IDS, TARGETS, CLASSES, *lists)


def test_an_ambiguous_name_is_refused_and_its_folder_helps(tmp_path):
    ids = ["a/x.png", "b/x.png", "b/y.png"]
    with pytest.raises(UserError, match="line 2 .*a/x.png or b/x.png: write the folder"):
        read_split(ids, None, [], save(tmp_path, "y.png\nx.png\n"))
    assert read_split(ids, None, [], save(tmp_path, "b/x.png")).labeled.tolist() == [1]


def test_an_image_without_a_class_cannot_be_labelled(tmp_path):
    targets = np.array([0, 0, -1, 1, 1])
    with pytest.raises(UserError, match="line 1 .*has no class"):
        read_split(IDS, targets, CLASSES, save(tmp_path, "n01440764_10.JPEG"))
    assert 2 in make_split(IDS, targets, CLASSES, percent=100).unlabeled


def test_a_link_out_of_the_data_is_refused_and_one_within_is_not(tmp_path):
    root, out = tmp_path / "data", tmp_path / "out"
    (root / "a").mkdir(parents=True), out.mkdir()
    for path in (root / "a" / "x.png", out / "secret.png"):
        path.write_bytes(b"")
    (root / "a" / "bad.png").symlink_to(out / "secret.png")
    (root / "a" / "fine.png").symlink_to("x.png")
    (root / "b").symlink_to(out)
    ids = ["a/x.png", "a/bad.png", "a/fine.png", "b/secret.png"]
    good = save(tmp_path, "a/x.png\na/fine.png\n", "good.txt")
    assert len(read_split(ids, None, [], good, root=root).labeled) == 2
    for bad in ("a/bad.png", "b/secret.png", "a/x.png b/x.png"):
        with pytest.raises(UserError, match="line 1 .*link that leaves"):
            read_split(ids, None, [], save(tmp_path, bad), root=root)
    moved = tmp_path / "moved"
    moved.symlink_to(root)  # the data folder itself may be a link
    assert len(read_split(ids, None, [], good, root=moved).labeled) == 2


# ----- published lists -------------------------------------------------------------------------
def test_a_known_list_is_named_in_any_layout(tmp_path, monkeypatch):
    mark = splits.fingerprint(["n01440764_1", "n01443537_6"])
    monkeypatch.setattr(splits, "KNOWN", {mark: "mine"})
    for text in ("n01443537_6.JPEG\nn01440764_1.JPEG", "Index\n0\n4",
                 "n01440764/n01440764_1.JPEG 0\nn01443537_6 1"):
        assert read_split(IDS, TARGETS, CLASSES, save(tmp_path, text)).name == "mine"
    assert read_split(IDS, TARGETS, CLASSES, save(tmp_path, "n01440764_1")).name == "list.txt"


@pytest.mark.skipif(not DATA, reason="SSL_DATA is not set to a folder with splits/")
def test_published_lists_are_recognised(capsys):
    root = Path(DATA, "splits")
    names = {"imagenet/1percent.txt": "SimCLR 1percent.txt: 12811 images (12 to 13 in each of 1000",
             "imagenet/10percent.txt": "SimCLR 10percent.txt: 128116 images (128 to 129 in each of",
             "imagenet/semiformer_10percent.txt": "FixMatch's ImageNet split 1): 128116 images (73",
             "imagenet/semiformer_5percent.txt": "Semiformer 5%: 64058 images (37 to 65 in each of",
             "voc/classic/92/labeled.txt": "UniMatch VOC classic 92: 92 images",
             "voc/blend/1_16/labeled.txt": "UniMatch VOC blend 1/16: 662 images",
             "cityscapes/1_16/labeled.txt": "UniMatch Cityscapes 1/16: 186 images",
             "coco/1_512/labeled.txt": "UniMatch COCO 1/512: 232 images"}
    for file, text in names.items():
        assert main(["check", "--labels-file", str(root / file)]) == 0
        assert text in capsys.readouterr().out, file
    rest = [p for p in root.rglob("labeled.txt") if str(p.relative_to(root)) not in names]
    assert len(rest) + len(names) == len(splits.KNOWN) == 21
    for path in rest:  # e.g. voc/classic/183: its folder's number or fraction ends its name
        assert main(["check", "--labels-file", str(path)]) == 0
        assert f" {path.parent.name.replace('_', '/')}: " in capsys.readouterr().out


# ----- command line ----------------------------------------------------------------------------
@pytest.fixture
def photos(tmp_path):
    for c in ("cat", "dog"):
        (tmp_path / "data" / "train" / c).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "data" / "train" / c / f"{c}_{i}.jpg").write_bytes(b"")
        (tmp_path / "data" / "train" / c / "notes.txt").write_bytes(b"")
    return str(tmp_path / "data")


def test_make_then_check(photos, tmp_path, capsys):
    out = str(tmp_path / "out")
    make = ["make", "--data-path", photos, "--labels", "20", "--split-seed", "5", "--output", out]
    assert main(make) == 0
    made = capsys.readouterr().out
    assert "split 20% seed 5: 4 labelled (2 to 2 in each of 2 classes), 16 unlabelled" in made
    lists = [os.path.join(out, f) for f in ("labeled.txt", "unlabeled.txt")]
    for args in (["--data-path", photos], ["--data-path", photos + "/train"], []):
        assert main(["check", *args, "--labels-file", *lists]) == 0
        assert made.split()[-1] in capsys.readouterr().out  # the hash, also without the data
    assert main(make) == 2 and "holds a labeled.txt" in capsys.readouterr().err


def test_make_lists_the_pictures_of_a_run(tmp_path):
    root = tmp_path / "data"
    for file in ("train/cat/a.jpg", "train/cat/deep/b.jpg", "train/dog/c.jpg", "train/.old/d.jpg",
                 "val/cat/e.jpg"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"")
    run = load_dataset("folder", str(root))
    for path in (root, root / "train"):
        ids, targets, classes, _ = split_lists._image_folder(path)
        assert ids == [i.decode() for i in run.train.ids] and classes == run.classes
        assert np.array_equal(targets, run.train.targets)
    (root / "train").rename(root / "photos")
    ids, targets, classes, _ = split_lists._image_folder(root / "photos")
    assert ids == ["cat/a.jpg", "dog/c.jpg"] and classes == ["cat", "dog"]


@pytest.mark.parametrize("argv, named", [
    ([], "command"), (["make", "--data-path", "DIR"], "--output"),
    (["make", "--data-path", "DIR", "--output", "o"], "--num-labels"),
    (["make", "--data-path", "DIR", "--labels", "x", "--output", "o"], "--labels"),
    (["make", "--data-path", "DIR/none", "--labels", "1", "--output", "o"], "none"),
    (["make", "--data-path", "DIR/train/cat", "--labels", "1", "--output", "o"],
     "no class folders"),
    (["make", "--data-path", "DIR", "--labels", "1", "--output", "DIR/f.txt/o"], "f.txt"),
    (["check", "--labels-file", "DIR/none.txt"], "none.txt"),
    (["check", "--labels-file", "a", "b", "c"], "one or two"),
    (["check", "--labels-file", "DIR/twice.txt"], "twice.txt, line 2"),
    (["check", "--data-path", "DIR", "--labels-file", "DIR/twice.txt"], "twice.txt, line 2")])
def test_bad_input_is_one_line_and_exit_code_2(photos, tmp_path, capsys, monkeypatch, argv, named):
    monkeypatch.chdir(tmp_path)
    save(Path(photos), "cat_1.jpg\ncat_1.jpg\n", "twice.txt"), save(Path(photos), "", "f.txt")
    assert main([a.replace("DIR", photos) for a in argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and named in shown.err


def test_the_module_runs_and_ends_with_2():
    argv = [sys.executable, "-m", "common.splits", "check", "--labels-file", "none.txt"]
    run = subprocess.run(argv, cwd=HERE.parent, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "none.txt" in run.stderr
