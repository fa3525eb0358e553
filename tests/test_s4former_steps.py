"""S4Former: the hosts' steps a second time from their descriptions; starts, lists and refusals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ends, only_run
from PIL import Image
from test_s4former import FP32, IGNORE, SCRIPT, close, model_of, parse, settings

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
def test_unimatchs_step_is_what_the_code_does(ours):
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
    x_l, x_w, x_s = torch.randn(2, 3, 32, 32), *torch.randn(2, 3, 3, 32, 32)
    y_l = torch.randint(0, 11, (2, 32, 32))
    q = [1, 2, 0]  # no exchange of two: its inverse is another
    draws = dict(perm_q=torch.tensor(q), lam_l=torch.full((3,), 0.75), on=torch.tensor([False] * 3),
                 lam_u=torch.tensor([0.5, 0.25, 0.5]), paste=torch.tensor([0.0, 1.0, 1.0]),
                 centres=torch.full((2, 3, 2), 0.4))
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
        for i, side in enumerate([22, 27, 22]):  # floor of 32 sqrt(1/2) and of 32 sqrt(3/4)
            at = box(side)
            for mine, of in ((x_a, copy_x), (y_a, copy_y), (y_n, copy_n), (z_a_t, z_t)):
                mine[i][at] = of[q[i]][at]
        sure = F.avg_pool2d((c > 0.3).float()[:, None], 8).flatten(1)
        z_p, z_a = student(x_s, mask=S.pasa_mask(sure, 5.0)), student(x_a)
        total = ce(student(x_l), y_l) + (ce(z_p, y) + ce(z_a, y_a) + ncr(z_a, z_a_t, y_n)) / 2
    close(losses["loss"].detach(), total, 1e-5)


def test_augseg_keeps_labels_at_the_threshold_and_draws_from_its_two_betas(monkeypatch):
    args = parse("--image-size 32 --shuffle-tile 16 --method augseg")
    s, model, x = S.derive(args, "semi", 1), speaking(args, 1), torch.randn(2, 3, 32, 32)
    s.tau = S.teach(model, x, 0.0, FP32)[1].max().item()  # one pixel reaches it, none is above
    drawn, beta = [], torch.distributions.Beta
    monkeypatch.setattr(torch.distributions, "Beta", lambda a, b, **how: drawn.append(
        (a[0].item(), b[0].item())) or beta(a, b, **how))
    losses, *_ = S.augseg_step(model, model, x, torch.zeros(2, 32, 32), [x, x], s, FP32)
    assert losses["kept"] == pytest.approx(1 / (2 * 32 * 32)) and drawn == [(8, 2), (4, 4)]


# ----- shares and views -------------------------------------------------------------------------


@pytest.mark.parametrize("strong", ["cutmix", "classmix", "cutout", "mixunmix"])
def test_a_share_of_the_batches_is_mixed(strong):
    s = settings(f"--image-size 32 --shuffle-tile 16 --strong {strong} --strong-prob 0.2 "
                 "--shuffle 0")
    torch.manual_seed(0)
    x, y, mixed = torch.rand(2, 3, 32, 32), torch.randint(0, 9, (2, 32, 32)), 0
    for _ in range(200):
        seen = S.strong_view(x, y, torch.zeros(2, 11, 32, 32), s, {})[0]
        mixed += not torch.equal(S.augmented_pass(lambda x, **how: x, seen, s, FP32, {}), x)
    assert 20 <= mixed <= 60


def test_a_share_of_the_images_is_shuffled():
    s, x = settings("--image-size 32 --shuffle-tile 16 --shuffle 0.25"), torch.rand(2000, 1, 32, 32)
    torch.manual_seed(0)
    shown = S.augmented_pass(lambda x, **how: x, x, s, FP32, {})
    share = (shown != x).flatten(1).any(1).float().mean()
    assert 0.2 < share < 0.28  # 0.25, less the 1 in 24 permutations that move nothing


def test_the_teachers_view_is_jittered_where_it_is_asked_for():
    for flags, jitter in (("", (True, True)), ("--weak-jitter 0", (False, True))):
        view = S.view_lists("voc", 64, settings(f"--dataset voc {flags}"))
        assert view["unlabeled"][-1].jitter == jitter and view["labeled"][-1].jitter == (True,)


def test_pictures_are_resized_as_opencv_does_and_evaluated_at_the_whole_short_side():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8))
    image, extent, mask = S.Compose(S.view_lists("voc", 64, settings("--dataset voc"))["evaluate"])(
        noise, Image.new("L", (500, 375)))
    assert image.shape == (3, 512, 683) and extent.tolist() == [512, 683]
    assert mask.shape == (375, 500)
    image, mask = S.FromPIL()(noise, None)
    small = S.RandomScale((2048, 512), 0.25, 0.25)(image, mask)[0]
    plain = F.interpolate(image[None].float(), small.shape[-2:], mode="bilinear")[0]
    assert (small - plain).abs().max() <= 1  # antialiased noise would be nearly grey


def test_stage_pretrain_at_first_shows_each_quarter_alone():
    """Far from the first quarter, where no convolution of its patches looks, anything may stand."""
    torch.manual_seed(0)
    encoder, dims = S.build_encoder(parse(""))
    model, x = S.DigitClassifier(encoder, dims[-1]).eval(), torch.randn(2, 3, 64, 64)
    other = x.clone()
    other[:, :, 48:, 48:] = 5.0
    for alone in (True, False):
        moved = (model(other, alone=alone) - model(x, alone=alone)).abs().amax((0, 2))
        assert (moved[0] < 1e-5) == alone and moved[3] > 1e-3
    losses = [S.pretrain_step(model, x, torch.zeros(2, 4).long(), alone, FP32)["loss"]
              for alone in (True, False)]
    assert (losses[0] - losses[1]).abs() > 1e-6


# ----- what run_stage does with teacher and statistics ------------------------------------------


@pytest.mark.parametrize("flags", ["", "--follow D13=code --freeze-bn 1", "--follow D7=code"])
def test_one_update_of_the_teacher(flags, tiny, straight, tmp_path):
    """m = 0.75: a quarter of the student's way; before the forward (D13) nothing has moved yet;
    a separate decoder (D7) is another one from the start."""
    start = straight(SCRIPT)
    argv = SCRIPT.argv(tiny, f"--stage semi --init {start} --iterations 2 --warmup-iterations 0 "
                             f"--ema-decay semi=0.75 {flags}")
    ends(SCRIPT.name, [*argv, "--stop-after", "1", "--output", "one"], tmp_path)
    before = checkpoint.load_newest(start)["model"]
    after = checkpoint.load_newest(tmp_path / "one")
    student, teacher = after["model"], after["teacher"]
    far = 0
    for name, value in teacher.items():
        if "tracked" in name:
            continue
        expected = before[name] + (0 if "D13" in flags else 0.25) * (student[name] - before[name])
        far += (value - expected).abs().max() > 1e-4
        if "D7" not in flags or name.startswith("encoder."):
            close(value, expected, 1e-6)
        moved = (student[name] != before[name]).any()
        if "running" in name:
            assert moved == ("freeze" not in flags), name
    assert (far > 5) == ("D7" in flags) and any((v != before[k]).any() for k, v in student.items())
    if "D13" in flags:  # before the second forward: what the first update made of the student
        ends(SCRIPT.name, [*argv, "--resume", "one"], tmp_path)
        teacher = checkpoint.load_newest(tmp_path / "one")["teacher"]
        close(teacher["head.classifier.weight"], torch.lerp(
            before["head.classifier.weight"], student["head.classifier.weight"], 0.25), 1e-6)
        assert not torch.equal(teacher["head.classifier.weight"], before["head.classifier.weight"])


def test_running_statistics_are_averaged_over_the_processes(monkeypatch):
    """E10: as of two processes, of which the other has 1 more everywhere."""
    monkeypatch.setattr(S.dist, "all_reduce", lambda t: t.mul_(2).add_(1))
    means = dict(loss=torch.tensor(3.0), kept=torch.tensor(0.5))
    moving = [torch.tensor([1.0, 2.0]), torch.tensor([[4.0]])]
    same = list(moving)
    S.average(means, moving, 2)
    assert {k: v.item() for k, v in means.items()} == dict(loss=3.5, kept=1.0)
    assert same[0].tolist() == [1.5, 2.5] and same[1].tolist() == [[4.5]]


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
    for dataset, tau in (("digits", 0.7), ("voc", 0.95), ("cityscapes", 0.95), ("coco", 0.95)):
        assert settings(f"--dataset {dataset} --follow code").tau == tau  # D8


def test_the_blend_lists_are_known_by_unimatchs_names():
    for folder, n, miou in (("1_16", 662, 79.9), ("1_8", 1323, 80.5), ("1_4", 2646, 81.3)):
        args = parse(f"--dataset voc --labels-file splits/pascal/{folder}/labeled.txt --init a.pth")
        assert S.labelled_images(args) == n and S.paper_number(args) == (miou, "Table S1")
        assert f"/{folder}/labeled.txt" in S.command_of(S.paper_args(parse(f"--num-labels {n}")))
    for flags in ("cityscapes --labels-file splits/cityscapes/1_16/labeled.txt",
                  "folder --labels-file lists/1464/labeled.txt",
                  "voc --labels-file splits/pascal/u2pl_1_16/labeled.txt"):
        assert S.labelled_images(parse(f"--dataset {flags}")) is None


def test_lists_are_counted_where_they_are(tmp_path):
    for name, n in (("92/labeled.txt", 92), ("92/unlabeled.txt", 40)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n\n".join(f"x{n}_{k}" for k in range(n)))
    flags = f"--dataset voc --init a.pth --labels-file {tmp_path}/92/labeled.txt"
    args = parse(flags)
    assert S.labelled_images(args) == 92 and S.paper_number(args) is None  # not the published 92
    assert S.images_of(args, "rest") == dict(pretrain=2000, sup=92, semi=10582 - 92)
    both = parse(f"{flags} {tmp_path}/92/unlabeled.txt")
    assert [S.images_of(both, pool)["semi"] for pool in ("rest", "all")] == [40, 132]


VOC = "--dataset voc --labels-file splits/pascal/92/labeled.txt --init deit_base.pth "


@pytest.mark.parametrize("flags", [
    "--stage pretrain", "--holdout 100", "--init runs/encoder", "--tau 0.9", "--iterations 1000",
    "--epochs 3", "--image-size 256", "--unlabeled-pool all", "--follow code", "--pasa-alpha 7",
    "--method unimatch --shuffle 0.5", "--shuffle 0.3", "--pasa plain", "--ncr kl"])
def test_other_runs_than_the_papers_show_no_number(flags):
    assert S.paper_number(parse(VOC + flags)) is None
    assert S.paper_number(parse("--dataset voc --num-labels 92")) is None  # from no weights


@pytest.mark.parametrize("flags", [
    "", "--tau 0.95", "--lr 1e-3", "--batch-size 8", "--iterations 80000", "--ema-decay 0.999",
    "--shuffle-tile 128", "--image-size 512", "--unlabeled-pool rest", "--follow D8=code",
    "--stage semi", "--iterations sup=10", "--accum-steps 4"])
def test_flags_that_say_what_the_row_says_leave_its_number(flags):
    assert S.paper_number(parse(VOC + flags)) == (80.1, "Table S1")


@pytest.mark.parametrize("flags, shown, miou", [
    ("", "--init deit_base.pth --labels-file splits/pascal/92/labeled.txt", 80.1),
    ("--stage pretrain --init runs/encoder", "--init deit_base.pth --labels-file", 80.1),
    ("--num-labels 30 --holdout 9", "splits/pascal/92/", 80.1),
    ("--labels 50", "pascal/1_4/", 81.3), ("--num-labels 400", "pascal/366/", 82.4),
    ("--dataset camvid --init my.pth", "--init my.pth --labels-file splits/pascal/1_8/", 80.5),
    ("--dataset cityscapes --num-labels 186", "--init mit_b4.pth --num-labels 186", None),
    ("--dataset coco --labels 2", "--dataset coco --data-path DIR --arch deit_base --init "
     "deit_base.pth --labels 2", None)])
def test_the_papers_row_is_a_command_that_has_its_number(flags, shown, miou):
    paper = S.paper_args(parse(flags))
    command = S.command_of(paper)
    assert shown in command
    again = S.paper_number(parse(command.removeprefix("python s4former.py ")))
    assert again == S.paper_number(paper) == (miou and (miou, "Table S1"))


R101 = "--dataset voc --arch deeplabv3plus_r101 --method fixmatch --num-labels 92 "


@pytest.mark.parametrize("flags, stage, length", [
    (R101, "semi", "104,880 updates"), (R101 + "--iterations 1000", "semi", "1,000 updates"),
    (R101 + "--iterations semi=0", "semi", "0 updates"),
    (R101 + "--iterations semi=0", "sup", "880 updates"),
    ("--dataset folder --epochs 10", "sup", "10 passes"),
    ("--dataset folder --epochs 10", "semi", "10 passes"),
    ("--dataset voc --labels-file none.txt --epochs 2", "semi", "2 passes"),
    ("--dataset voc --num-labels 92 --holdout 100 --epochs 2", "semi", "2,596 updates"),
    ("--holdout 20 --epochs 2", "pretrain", "218 updates"),  # 7,000 digits / 4 / 16
    ("--holdout 20 --epochs 2", "semi", "242 updates")])
def test_the_length_that_a_dry_run_shows(flags, stage, length, monkeypatch):
    identity = torch.nn.Identity()
    monkeypatch.setattr(S, "on_meta", lambda *a: S.SegModel(identity, identity))
    monkeypatch.setattr(S.report, "cost", lambda *a, **k: dict(flops=0, kept=0, fixed=0))
    args = parse(flags)
    assert f" images, {length} in all" in S.cost_lines(args, stage, S.derive(args, stage, 1))[1]


@pytest.mark.parametrize("flags", ["--iterations 10 --epochs 2", "--iterations sup=1 --epochs 3",
                                   "--warmup-iterations 9 --warmup-epochs semi=1"])
def test_two_lengths_of_a_stage_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as end:
        parse(flags)
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    parse("--iterations sup=10 --epochs semi=2")


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
