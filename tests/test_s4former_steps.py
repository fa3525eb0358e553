"""S4Former: the hosts' steps a second time from their descriptions; starts, lists and refusals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ends, only_run
from PIL import Image
from test_s4former import FP32, IGNORE, close, model_of, parse, settings

import s4former as S
from common import checkpoint
from common.splits import UserError


def speaking(args, seed):
    """A model in eval mode whose logits differ from pixel to pixel."""
    torch.manual_seed(seed)
    model = S.build_model(args, 11).eval()
    torch.nn.init.normal_(model.head.classifier.weight, std=0.5)
    return model


def ce(z, y):
    return F.cross_entropy(z, y, ignore_index=IGNORE, reduction="sum") / y.numel()


def ncr(z_s, z_t, y):
    """Pixel by pixel, as the words say it."""
    total = 0.0
    for i, r, c in (y != IGNORE).nonzero().tolist():
        rest = [k for k in range(z_s.shape[1]) if k != y[i, r, c]]
        a, b = (z[i, rest, r, c].double().softmax(0) for z in (z_s, z_t))
        total += (a - b + 1e-6).norm().item()
    return total / y.numel()


@pytest.mark.parametrize("ours", [False, True])
def test_unimatchs_step_is_what_the_supplement_says(ours):
    """1/2 the weak view with PASA (or dropout) + 1/4 each strong view + 1/4 each NCR; the box is
    filled from the other draw, its labels are the teacher's of that draw's weak look."""
    more = " --with-ours" * ours
    args = parse(f"--image-size 32 --shuffle-tile 16 --method unimatch --tau semi=0.3{more}")
    s = S.derive(args, "semi", 1)
    student, teacher = speaking(args, 0), speaking(args, 1)
    x_l, w, s1, s2, m_w, m1, m2 = torch.randn(7, 2, 3, 32, 32)
    y_l = torch.randint(0, 11, (2, 32, 32))
    none = dict(on=torch.tensor([False, False]))
    boxes = dict(first=[[2, 18, 0, 32], [0, 20, 3, 29]], second=[[0, 32, 8, 24], [6, 31, 5, 25]])
    draws = {k: dict(none, cut=torch.tensor(True), boxes=torch.tensor(v)) for k, v in boxes.items()}
    torch.manual_seed(5)
    losses, *_ = S.unimatch_step(student, teacher, x_l, y_l, [w, s1, s2, m_w, m1, m2], s, FP32,
                                 draws)

    def labels(x):
        z = teacher(x)
        c, y = z.softmax(1).max(1)
        return z, c, torch.where(c > 0.3, y, IGNORE)

    with torch.no_grad():
        (z_t, c, y), (z_m, _, y_m) = labels(w), labels(m_w)
        if ours:
            sure = F.avg_pool2d((c > 0.3).float()[:, None], 8).flatten(1)
            first = ce(student(w, mask=S.pasa_mask(sure, 5.0)), y)
        else:
            torch.manual_seed(5)  # dropout is the first draw
            first = ce(student(w, dropout=0.5), y)
        total = ce(student(x_l), y_l) + first / 2
        for name, x, other in (("first", s1, m1), ("second", s2, m2)):
            x, y_x, z_x = x.clone(), y.clone(), z_t.clone()
            for i, (y0, y1, x0, x1) in enumerate(boxes[name]):
                at = (..., slice(y0, y1), slice(x0, x1))
                x[i][at], y_x[i][at], z_x[i][at] = other[i][at], y_m[i][at], z_m[i][at]
            z = student(x)
            total = total + ce(z, y_x) / 4 + (ncr(z, z_x, y_x) / 4 if ours else 0)
    close(losses["loss"].detach(), total, 1e-5)


def test_augsegs_step_is_what_its_code_does():
    """A labelled box in a copy of an unsure image, a box of the partner's copy in the image."""
    args = parse("--image-size 32 --shuffle-tile 16 --method augseg --with-ours --tau semi=0.3")
    s = S.derive(args, "semi", 1)
    student, teacher = speaking(args, 0), speaking(args, 1)
    x_l, x_w, x_s = torch.randn(3, 2, 3, 32, 32)
    y_l = torch.randint(0, 11, (2, 32, 32))
    q = [1, 0]
    draws = dict(perm_q=torch.tensor(q), lam_l=torch.tensor([0.75, 0.75]),
                 lam_u=torch.tensor([0.5, 0.25]), paste=torch.tensor([0.0, 1.0]),
                 centres=torch.full((2, 2, 2), 0.4), on=torch.tensor([False, False]))
    losses, *_ = S.augseg_step(student, teacher, x_l, y_l, [x_w, x_s], s, FP32, draws)

    def box(side):  # centre int(4 + 0.4 * 28) = 15
        return ..., slice(15 - side // 2, 15 + side // 2), slice(15 - side // 2, 15 + side // 2)

    with torch.no_grad():
        z_t = teacher(x_w)
        c, y = z_t.softmax(1).max(1)
        y = torch.where(c >= 0.3, y, IGNORE)
        copy_x, copy_y, copy_n = x_s.clone(), y.clone(), y.clone()
        at = box(16)  # 32 sqrt(1 - 0.75); only image 0 draws below 1 - rho
        copy_x[0][at], copy_y[0][at], copy_n[0][at] = x_l[1][at], y_l[1][at], IGNORE
        x_a, y_a, y_n, z_a_t = x_s.clone(), y.clone(), y.clone(), z_t.clone()
        for i, side in enumerate([22, 27]):  # floor of 32 sqrt(1/2) and of 32 sqrt(3/4)
            at = box(side)
            for mine, of in ((x_a, copy_x), (y_a, copy_y), (y_n, copy_n), (z_a_t, z_t)):
                mine[i][at] = of[q[i]][at]
        sure = F.avg_pool2d((c > 0.3).float()[:, None], 8).flatten(1)
        z_p, z_a = student(x_s, mask=S.pasa_mask(sure, 5.0)), student(x_a)
        total = ce(student(x_l), y_l) + (ce(z_p, y) + ce(z_a, y_a) + ncr(z_a, z_a_t, y_n)) / 2
    close(losses["loss"].detach(), total, 1e-5)


# ----- where stage semi starts (E14) ------------------------------------------------------------


def voc(root):
    """Three training pictures and one to validate; only the first one's mask can be read (E1)."""
    rng = np.random.default_rng(0)
    names = [f"2007_00000{k}" for k in range(4)]
    lists = root / "ImageSets" / "Segmentation"
    for folder in (root / "JPEGImages", root / "SegmentationClass", lists):
        folder.mkdir(parents=True)
    for name in names:
        image, mask = rng.integers(0, 256, (48, 64, 3)), rng.integers(0, 21, (48, 64))
        Image.fromarray(image.astype(np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        Image.fromarray(mask.astype(np.uint8)).save(root / "SegmentationClass" / f"{name}.png")
    for name in names[1:3]:  # unlabelled: opening one of these ends the run
        (root / "SegmentationClass" / f"{name}.png").write_text("no picture")
    (lists / "train.txt").write_text("\n".join(names[:3]))
    (lists / "val.txt").write_text(names[3])
    (root / "labeled.txt").write_text(names[0])
    return root


def test_on_the_papers_data_stage_semi_starts_from_init_and_not_from_stage_sup(tmp_path):
    """A learning rate of 0 leaves what a stage starts from; stage sup's heads do learn. Also after
    a resume from the end of stage sup, where only that stage's weights are in the checkpoint. No
    mask of an unlabelled picture is opened on the way."""
    root = voc(tmp_path / "data")
    flags = ("--dataset voc --arch deit_tiny --image-size 64 --shuffle-tile 32 --batch-size 2 "
             "--scale-min 0.1 --scale-max 0.3 --iterations sup=2,semi=1 --lr sup=0.01,semi=0 "
             f"--min-lr 0 --workers 0 --evals 1 --eval-mode slide --data-path {root} "
             f"--labels-file {root}/labeled.txt --init {tmp_path}/start.pth")
    args = parse(flags)
    start = S.build_model(args, 21).encoder.state_dict()
    torch.save(start, tmp_path / "start.pth")
    assert not S.semi_goes_on(args) and S.semi_goes_on(parse(""))
    ends("s4former", [*flags.split(), "--output", "whole"], tmp_path)
    ends("s4former", [*flags.split(), "--output", "cut", "--stop-after", "2"], tmp_path)
    ends("s4former", [*flags.split(), "--resume", "cut"], tmp_path)
    whole, cut = (checkpoint.load_newest(tmp_path / name) for name in ("whole", "cut"))
    assert whole["stage"] == cut["stage"] == "semi"
    for name, value in start.items():
        assert torch.equal(whole["model"][f"encoder.{name}"], value), name
    assert all(torch.equal(v, cut["model"][k]) for k, v in whole["model"].items())
    assert not any(k.startswith("aux.") for k in whole["teacher"])  # they teach nothing
    assert any(k.startswith("aux.") for k in whole["model"])


def test_stage_sup_alone_asks_nothing_of_stage_semi(tmp_path):
    """96 pixels hold no whole tile of 128, DeepLab has no attention: neither matters to stage
    sup."""
    root = voc(tmp_path / "data")
    argv = (f"--stage sup --dataset voc --data-path {root} --labels-file {root}/labeled.txt "
            "--arch deit_tiny --image-size 96 --batch-size 1 --iterations 1 --workers 0 --evals 1 "
            "--scale-min 0.1 --scale-max 0.3 --eval-mode slide").split()
    ends("s4former", argv, tmp_path)
    assert only_run(tmp_path)


# ----- flags ------------------------------------------------------------------------------------


def test_stochastic_depth_reaches_the_vit():
    args = parse("--arch deit_tiny --image-size 32")
    rates = [getattr(b.drop_path1, "drop_prob", 0.0)
             for b in S.build_model(args, 11, 0.2).encoder.blocks]
    assert rates[-1] == pytest.approx(0.2) and rates == sorted(rates)
    assert isinstance(S.build_model(args, 11).encoder.blocks[-1].drop_path1, torch.nn.Identity)


@pytest.mark.parametrize("flags, named", [
    ("--dataset voc --optimizer adamw --lr 6e-5", "--min-lr 0.0001"),
    ("--method augseg --pseudo soft", "--pseudo soft"),
    ("--arch deeplabv3plus_r101 --dataset voc --method fixmatch --drop-path 0.1", "--drop-path")])
def test_settings_that_would_do_nothing_or_harm_are_refused(flags, named):
    with pytest.raises(UserError, match=named):
        settings(flags)
    settings("--method augseg --pseudo soft --follow D15=paper")  # hard labels: nothing missing


def test_departures_apply_only_where_they_are_computed():
    assert settings("--method unimatch --with-ours --follow D1=paper").ncr_branches == "aug"
    assert settings("--method augseg --with-ours --follow D1=paper").ncr_branches == "both"
    mit = "--dataset voc --arch mit_b0 --follow D6=code"
    assert settings(mit).pasa_mit_quirk == 1
    assert settings(f"{mit} --pasa rand").pasa_mit_quirk == 0


def test_the_blend_lists_are_known_by_unimatchs_names():
    for folder, n, miou in (("1_16", 662, 79.9), ("1_8", 1323, 80.5), ("1_4", 2646, 81.3)):
        args = parse(f"--dataset voc --labels-file splits/pascal/{folder}/labeled.txt")
        assert S.labelled_images(args) == n and S.paper_number(args) == (miou, "Table S1")
        assert f"splits/pascal/{folder}/labeled.txt" in S.dry_run(parse(f"--num-labels {n}"))
    city = parse("--dataset cityscapes --labels-file splits/cityscapes/1_16/labeled.txt")
    assert S.labelled_images(city) is None


@pytest.mark.parametrize("whole_file", [False, True])
def test_distilled_deits_have_a_second_token_in_any_file(whole_file, tmp_path):
    model = model_of("--arch deit_tiny --image-size 32 --dataset voc", 21)
    state = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    state["pos_embed"] = torch.randn(1, 198, 192)
    state["dist_token"] = torch.zeros(1, 1, 192)
    torch.save(dict(model=state) if whole_file else state, tmp_path / "w.pth")
    args = parse(f"--arch deit_tiny --image-size 32 --dataset voc --init {tmp_path / 'w.pth'}")
    S.load_init(model, args)
    own = torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 2:]], 1)
    close(model.encoder.pos_embed.detach(), S.resize_pos_embed(own, (14, 14), (2, 2)), 1e-6)
    state.pop("dist_token")  # 197 patches: no square
    torch.save(dict(model=state) if whole_file else state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="197 positions"):
        S.load_init(model, args)
