"""The benchmarks run on the CPU, and what they print adds up. No test says how fast anything is."""

import importlib
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT, Child
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "benchmarks"))

import data as loading  # noqa: E402
import step as stepping  # noqa: E402

TINY = {  # flags of a step in a fraction of a second, and its images
    "semi_vit": ("--batch-size 4", 4 + 20),
    "semi_mae": ("--batch-size 4", 4 + 28),
    "semiformer": ("--batch-size 12", 12),
    "simclrv2": ("--batch-size 4", 4),
    "s4former": ("--batch-size 2", 2 + 2),
}
ALWAYS = {"bytes to pictures", "student forward", "backward", "optimiser, finite check",
          "the rest of the loop"}
MORE = {  # parts beside these
    "semi_vit": {"teacher forward", "mixing", "EMA"},
    "semi_mae": {"teacher forward", "student forward, masked branch"},
    "semiformer": {"teacher forward"},
    "simclrv2": {"blur", "NT-Xent"},
    "s4former": {"teacher forward", "mixing", "EMA"},
}


def in_child(call, *arguments, cwd) -> str:
    child = Child(call, *arguments, cwd=cwd)
    assert child.wait(300) == 0, child.out + child.err
    return child.out


# ----- the clock --------------------------------------------------------------------------------


class Counting(stepping.Clock):
    """Its time moves by a second at each look."""

    moment = 0.0

    def now(self):
        self.moment += 1.0
        return self.moment


def test_parts_of_a_step_by_hand():
    clock = Counting(skip=1, steps=1)
    inner = clock.timed(lambda: None, "mixing")
    outer = clock.timed(inner, "NT-Xent")
    clock.step()  # not timed
    outer()
    assert clock.moment == 0.0
    clock.step()  # 1
    outer()  # 2 begins, 3 mixing begins, 4 it ends, 5 ends
    with pytest.raises(stepping.Done):
        clock.step()  # 6
    (parts,) = clock.results()
    assert sum(parts.values()) == 5000.0  # milliseconds
    found = {k: v for k, v in parts.items() if v}
    assert found == {"NT-Xent": 2000.0, "mixing": 1000.0, "the rest of the loop": 2000.0}


def test_a_network_is_the_teacher_where_no_gradient_is_wanted():
    clock = Counting(0, 1)
    network = clock.timed(lambda: None)
    clock.step()
    network()
    with torch.no_grad():
        network()
        network()
    with pytest.raises(stepping.Done):
        clock.step()
    (parts,) = clock.results()
    assert parts["student forward"] == 1000.0 and parts["teacher forward"] == 2000.0


def test_a_part_that_fails_ends_too():
    clock = Counting(0, 1)

    def fails():
        raise ValueError

    clock.step()
    with pytest.raises(ValueError):
        clock.timed(fails, "mixing")()
    assert clock.part == "the rest of the loop"


def test_arithmetic_of_a_known_product():
    counter = FlopCounterMode(display=False)
    clock = stepping.Clock(1, 1, counter=counter)
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    for _ in range(2):
        clock.step()
        a @ b  # the first is not counted
    with pytest.raises(stepping.Done):
        clock.step()
    a @ b
    assert counter.get_total_flops() == 2 * 3 * 5 * 7


def test_replaced_attributes_come_back():
    class Owner:
        here = 1

    with pytest.raises(ValueError), stepping.replaced([(Owner, "here", 2), (Owner, "new", 3)]):
        assert (Owner.here, Owner.new) == (2, 3)
        raise ValueError
    assert Owner.here == 1 and not hasattr(Owner, "new")


# ----- the scripts' steps -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_step_of_each_script(name, tmp_path):
    flags, images = TINY[name]
    argv = [name, *flags.split(), "--steps=2", "--skip=1", "--processor-time", "--json"]
    r = json.loads(in_child(stepping.main, argv, cwd=tmp_path).splitlines()[-1])
    assert r["images"] == images and r["steps"] == 2 and r["device"] == "cpu"
    assert set(r["parts"]) == ALWAYS | MORE[name]
    assert all(ms > 0 for ms in r["parts"].values())
    assert math.isclose(sum(r["parts"].values()), r["ms"], rel_tol=1e-6)  # two steps: mean = median
    assert r["ms_min"] <= r["ms"] <= r["ms_max"]
    assert math.isclose(r["images_per_s"] * r["ms"], 1000 * images, rel_tol=1e-6)
    assert r["tflop"] > 0 and 0 < r["share_of_matmul"]
    assert r["stage"] == ("pretrain" if name == "simclrv2" else "semi")
    assert r["torch"] == torch.__version__.split("+")[0] or r["torch"] == torch.__version__
    assert not list(tmp_path.glob("runs")), "a benchmark leaves no run behind"
    text = stepping.as_text(r)
    assert f"{images} images" in text and all(part in text for part in r["parts"])


def compiled_step(name, flags):
    """In a child: the step with --compile, traced but not built (that takes minutes)."""
    from torch._dynamo.utils import counters

    real = nn.Module.compile
    nn.Module.compile = lambda self, **how: real(self, backend="eager", **how)
    clock = stepping.Clock(skip=2, steps=2)
    stepping.drive(name, stepping.straight_to_the_step(name, [*flags.split(), "--compile"]), clock)
    print(json.dumps([clock.graphs, clock.late_graphs, dict(counters["graph_break"])]))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_compiled_again_after_the_first_steps(name, tmp_path):
    said = in_child(compiled_step, name, TINY[name][0], cwd=tmp_path).splitlines()[-1]
    networks = {"semi_vit": 2, "semiformer": 2, "s4former": 3}.get(name, 1)
    # as student, as teacher; as student with PASA's mask
    assert json.loads(said) == [networks, 0, {}]  # graphs at first, later ones, breaks in them


def test_the_naive_step_of_semi_mae_is_the_same_step(tmp_path):
    script = importlib.import_module("semi_mae")
    args = script.parse_args([])
    torch.manual_seed(0)
    model = script.build_model(args, script.derive(args, "semi", 1), 10, "semi").eval()
    x_l, x_s, x_w = torch.randn(3, 2, 3, 28, 28)
    draw = model.draw(2, "cpu")
    want = model(x_l, x_s, x_w, draw)
    with stepping.replaced(stepping.naive_semi_mae(script)):
        found = model(x_l, x_s, x_w, draw)
    for name in ("logits", "logits_w", "target", "mask"):
        torch.testing.assert_close(found[name], want[name])
    assert found["pred"].shape == want["pred"].shape  # of an encoder that saw zeros as well
    assert script.SemiMAE.forward.__module__ == "semi_mae"


def test_the_naive_step_of_s4former_is_the_same_step():
    script = importlib.import_module("s4former")
    model = script.build_model(script.parse_args([]), 11).eval()
    x, c = torch.randn(2, 3, 64, 64), torch.rand(2, 64)
    mask = script.pasa_mask(c, 5.0)
    want = model(x, mask=mask)
    with stepping.replaced(stepping.naive_s4former(script)):
        found = model(x, mask=mask)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x), want)  # the mask is no zero


def test_presets_are_what_they_are_called():
    found = {}
    for preset, (_, name, flags, _, naive) in stepping.PRESETS.items():
        script = importlib.import_module(name)
        stage = "pretrain" if name == "simclrv2" else "semi"
        args = script.parse_args([*stepping.SCRIPTS[name][0].split(), *flags.split(),
                                  *(naive or "").split()])
        s = script.derive(args, stage, 1)
        found[preset] = args.arch, dict(
            semi_vit=lambda s: (s.batch_size, s.batch_size * s.unlabeled_ratio),
            semi_mae=lambda s: (s.batch_size, s.batch_u),
            semiformer=lambda s: (s.n_l, s.n_u), simclrv2=lambda s: (s.batch_size,),
            s4former=lambda s: (s.batch_size, s.batch_size * s.unlabeled_ratio))[name](s)
    assert {k: v for k, v in found.items() if not k.startswith("digits_")} == {
        "semi_vit_base": ("vit_base", (128, 640)),
        "semi_vit_small": ("vit_small", (128, 640)),
        "semiformer": ("vit_conv", (64, 320)),
        "simclrv2": ("resnet50", (512,)),
        "semi_mae": ("vit_small", (64, 448)),
        "s4former": ("deit_base", (8, 8)),
    }
    assert {k for k in found if k.startswith("digits_")} == {f"digits_{n}" for n in NAMES}


def test_pictures_of_noise_take_the_place_of_imagenet():
    found = stepping.noise_data(importlib.import_module("semi_vit"), "imagenet")
    assert len(found.classes) == 1000 and len(found.train) == 100_000 and len(found.val) == 1000
    assert found.train.pil(99_999).size == (500, 375)
    assert (np.bincount(found.train.targets) == 100).all()


def test_presets_make_a_table(monkeypatch, capsys):
    """Each way in its own process; a way that fails is said and left out."""
    ran = []

    def run(command, **_):
        ran.append(command[2:])
        r = dict(script="semi_mae", flags="", naive="--naive" in command, stage="semi",
                 compiled="--compile" in command, dtype="bfloat16", device="cuda:0", images=512,
                 steps=20, ms=200.0 if "--naive" in command else 80.0, ms_min=70.0, ms_max=90.0,
                 images_per_s=1.0, peak_gib=2.0, tflop=3.0, tflop_per_s=4.0, share_of_matmul=0.5,
                 matmul_tflop_per_s=8.0, parts={"backward": 1.0}, graphs=1, late_graphs=0,
                 waits=None, torch="2", timm="1", python="3", commit="abc", hardware="a card")
        if "semiformer" in command:
            return SimpleNamespace(returncode=1, stderr="x\nout of memory\n", stdout="")
        return SimpleNamespace(returncode=0, stderr="", stdout=json.dumps(r) + "\n")

    monkeypatch.setattr(stepping.subprocess, "run", run)
    stepping.run_presets(["semi_vit_base", "semiformer", "semi_mae"], ["--steps=3"], True)
    assert [("--compile" in c, "--naive" in c) for c in ran] == [
        (False, False), (True, False)] * 3 + [(False, True)]
    assert all(c[-1] == "--json" and "--steps=3" in c for c in ran)
    out = capsys.readouterr().out
    assert out.count("not measured: out of memory") == 2
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2 + 3 and len({line.count("|") for line in table}) == 1
    assert "596 ms, 76 GiB (the authors' own" in table[2] and table[2].endswith("| 7.45 |")
    assert table[-3].endswith("| 200.0 ms (naive) | 2.50 |") and table[-1].endswith("| - | - |")


# ----- loading ----------------------------------------------------------------------------------


def test_views_of_each_script_are_counted(tiny, tmp_path):
    argv = [f"--data-path={tiny}", "--workers=0", "--batch=2", "--batches=2", "--rounds=1"]
    out = in_child(loading.main, argv, cwd=tmp_path)
    rows = [line.split("|") for line in out.splitlines() if line.startswith("|")][2:]
    assert [(r[1].strip(), r[2].strip()) for r in rows] == [
        (name, " + ".join(views)) for name, (_, *looks) in loading.LOOKS.items() for views in looks]
    assert all(float(r[5]) > 0 and float(r[6]) > 0 and float(r[-2]) > 0 for r in rows)
    assert set(loading.LOOKS) == set(NAMES)


def test_the_plain_pipeline_does_the_same_work():
    script = importlib.import_module("semi_vit")
    s = script.derive(script.parse_args(["--dataset", "imagenet"]), "semi", 1)
    lists = script.view_lists("imagenet", 224, s)
    plain = loading.Plain(None, [lists["weak"], lists["strong"]], False)
    weak, strong = (view.transforms for view in plain.views)
    assert weak[:-2] == lists["weak"][:-1] and strong[:-3] == lists["strong"][:-1]
    assert [type(t).__name__ for t in strong[-3:]] == ["ToTensor", "Normalize", "RandomErasing"]
    assert strong[-1].probability == lists["strong"][-1].reprob == 0.25


@pytest.mark.parametrize("one_decode", [False, True])
def test_the_plain_pipeline_gives_what_ours_gives(tmp_path, one_decode):
    """Views without chance: the same numbers, once ours are normalised."""
    script = importlib.import_module("semi_vit")
    images = loading.pictures_below(loading.make_jpegs(tmp_path, classes=1, each=2) / "train")
    assert images.pil(0).size == (500, 375)
    view = [loading.T.CenterCrop(224), script.ToBytes()]
    ways = loading.loaders(images, [view, view], batch=2, batches=1, workers=0)
    ((seen, _),) = ways["ours"]()
    stats = 255 * torch.tensor([loading.IMAGENET_DEFAULT_MEAN, loading.IMAGENET_DEFAULT_STD])
    want = script.to_model(*seen[1], stats.view(2, 3, 1, 1))
    ((views, _),) = ways["plain, one decode" if one_decode else "plain"]()
    assert len(views) == 2 and views[1].dtype == torch.float32
    torch.testing.assert_close(views[1], want)


def test_the_share_of_a_step(tiny, tmp_path):
    argv = ["semi_vit", "--share", f"--data-path={tiny}", "--workers=0", "--steps=2",
            "--arch=vit_digits", "--image-size=28", "--patch-size=7", "--num-labels=20",
            "--batch-size=4"]
    out = in_child(loading.main, argv, cwd=tmp_path)
    assert "24 images a step, 0 workers" in out and "of a step is waiting for data" in out
