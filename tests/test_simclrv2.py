"""SimCLRv2: equations by hand, stored numbers of the authors' code, replicas, the paper's rows.

tests/parity/simclrv2.pt holds what the authors' functions returned (TensorFlow 2.15, CPU).
"""

import contextlib
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, SCRIPTS, Child, Quiet, ends, numbers, only_run, run_script, world
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import resnet50
from torchvision.transforms import functional as TF

import simclrv2 as S
from common import checkpoint, split_lists
from common.amp import Precision
from common.splits import UserError

PARITY = torch.load(ROOT / "tests" / "parity" / "simclrv2.pt", weights_only=True)
SCRIPT = next(x for x in SCRIPTS if x.name == "simclrv2")
TINY = dict(arch="resnet18", width=0.125, image_size=32)
FP32 = Precision(torch.device("cpu"), "fp32")


def close(a, b, rtol=1e-5, atol=1e-7):
    torch.testing.assert_close(torch.as_tensor(a).float(), torch.as_tensor(b).float(),
                               rtol=rtol, atol=atol, check_dtype=False)


def parse(text=""):
    return S.parse_args(text.split())


def settings(text="", stage="pretrain"):
    return S.derive(parse(text), stage, 1)


def tiny_net(sk=False, seed=0, image_size=32):
    torch.manual_seed(seed)
    encoder = S.Encoder("resnet50" if sk else "resnet18", 0.125, sk, image_size)
    return alive(S.Net(encoder, S.projection_head(encoder.dim, 3, 16)).double())


def alive(net):
    """No branch at zero: every path carries gradient."""
    for m in net.modules():
        if isinstance(m, _BatchNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
    return net


def student_net(**more):
    return S.Net(S.Encoder(**TINY | more), nn.Sequential(), 10)


# ----- 1. CONFIG -------------------------------------------------------------------------------


def row_flags(row):
    arch, *more = row.split("_")
    width = next((f" --width {m[0]}" for m in more if m.endswith("x")), "")
    return f"--dataset imagenet --arch {arch}{width}" + (" --sk" if "sk" in more else "")


@pytest.mark.parametrize("row", S.TABLE_1)
@pytest.mark.parametrize("labels", [1, 10, 100])
def test_recipes_against_the_paper_cell_by_cell(row, labels):
    args = parse(f"{row_flags(row)} --labels {labels}")
    assert S.row_name(args) == row and S.recipe(args)[0] == ("imagenet", row, None, labels)
    p, f, d, linear, sup = (
        S.derive(args, x, 1) for x in ("pretrain", "finetune", "distill", "linear", "sup")
    )
    assert p.lr == pytest.approx(6.4) and p.optimizer == "lars" and p.temperature == 0.1
    assert (p.batch_size, p.epochs, p.warmup_epochs, p.weight_decay) == (4096, 800, 40, 1e-4)
    assert p.warmup_epochs / p.epochs == 0.05 and args.proj_layers == 3
    peak = 0.16 if row in ("resnet50", "resnet101", "resnet152") else 0.064
    assert f.lr == pytest.approx(peak) and f.optimizer == "lars" and f.batch_size == 1024
    assert f.epochs == {1: 60, 10: 30, 100: 30}[labels]
    assert f.ft_proj_selector == {1: 1, 10: 1, 100: 0}[labels]
    assert (f.weight_decay, f.warmup_epochs, f.augment, f.freeze_proj) == (0, 0, "weak", 0)
    assert d.lr == pytest.approx(6.4) and d.optimizer == "lars" and d.augment == "weak"
    assert (d.epochs, d.warmup_epochs, d.weight_decay, d.alpha) == (400, 20, 1e-4, 1)
    assert (d.kd_set, d.unlabeled_pool, d.student_init) == ("all", "all", "scratch")
    assert linear.lr == pytest.approx(1.6) and linear.optimizer == "sgd"  # README
    assert (linear.epochs, linear.weight_decay, linear.ft_proj_selector) == (90, 1e-6, 0)
    assert sup.epochs == 90 and sup.optimizer == "sgd" and sup.lr == pytest.approx(1.6)
    assert sup.augment == ("strong" if labels < 100 else "weak")  # Fig. 4


STEPS = [  # updates of a stage: the step numbers of the released checkpoints, 752 apart
    ("pretrain", "--labels 1", "250,228"), ("distill", "--labels 1", "125,114"),
    ("finetune", "--labels-file 1.txt", "751"), ("finetune", "--labels-file 10.txt", "3,754"),
    ("finetune", "--labels 1", "752"), ("finetune", "--labels 10", "3,754"),  # E14
    ("finetune", "--labels 100", "37,535"), ("sup", "--labels 100", "28,151"),
]
LISTS = {"1.txt": "SimCLR 1percent.txt", "10.txt": "SimCLR 10percent.txt"}


@pytest.mark.parametrize("stage, labels, updates", STEPS)
def test_dry_run_counts_the_updates_of_the_released_checkpoints(
    stage, labels, updates, monkeypatch
):
    monkeypatch.setattr(S, "list_name", LISTS.get)
    ours = S.dry_run(parse(f"--dataset imagenet --arch resnet50 {labels} --stage {stage}"))
    assert f", {updates} updates in all" in ours.split("== the paper's row")[0]


def test_cifar_is_the_readmes():
    p = settings("--dataset cifar10 --arch resnet18 --labels 100")
    assert p.lr == pytest.approx(2.0) and (p.temperature, p.blur) == (0.5, 0)
    assert p.jitter_strength == 0.5
    assert S.total_steps(50000, p.epochs, p.batch_size) == 97657
    linear = settings("--dataset cifar10 --arch resnet18 --labels 100", "linear")
    assert linear.lr == pytest.approx(0.2) and linear.epochs == 100 and linear.weight_decay == 0


def test_temperature_of_distillation_follows_from_teacher_and_student():
    for flags, tau in (
        ("--arch resnet50", 0.1),
        ("--arch resnet50 --teacher runs/resnet50", 0.1),
        ("--arch resnet50 --teacher runs/resnet152_3x_sk", 1.0),
        ("--arch resnet50 --width 2 --teacher runs/resnet50_2x_sk", 1.0),
        ("--arch resnet50 --teacher x --kd-temperature 2", 2.0),
    ):
        assert settings(f"--dataset imagenet {flags}", "distill").kd_temperature == tau, flags


def test_a_student_starts_from_pretrained_weights_where_there_are_some():
    """What a recipe says, as on CIFAR-10, is no flag: distilling alone is not refused."""
    for row in ("cifar10 --arch resnet_digits --labels 1", "imagenette --arch resnet_digits"):
        for more, init in (("--stage distill --teacher RUN", "scratch"), ("", "pretrained"),
                           ("--stage distill --teacher RUN --init RUN", "pretrained"),
                           ("--init RUN", "pretrained"), ("--student-init scratch", "scratch"),
                           ("--stage distill --teacher R --student-init pretrained", "pretrained")):
            args = parse(f"--dataset {row} {more}")
            s = S.derive(args, "distill", 1)
            assert s.student_init == init, (row, more)
            if "--student-init" in more:
                assert s.sources["student_init"] == "--student-init"
            elif init == "scratch":
                assert s.sources["student_init"] == "no pretrained weights in this run, E8"
                S.check_stages(args, ["distill"], {"distill": s})
            else:
                assert s.sources["student_init"] == S.recipe(args)[1]["source"]


TABLE_1 = {  # fine-tuned on 1%, 10%, 100%, linear, supervised
    "resnet50": (57.9, 68.4, 76.3, 71.7, 76.6),
    "resnet50_sk": (64.5, 72.1, 78.7, 74.6, 78.5),
    "resnet50_2x": (66.3, 73.9, 79.1, 75.6, 77.8),
    "resnet50_2x_sk": (70.6, 77.0, 81.3, 77.7, 79.3),
    "resnet101": (62.1, 71.4, 78.2, 73.6, 78.0),
    "resnet101_sk": (68.3, 75.1, 80.6, 76.3, 79.6),
    "resnet101_2x": (69.1, 75.8, 80.7, 77.0, 78.9),
    "resnet101_2x_sk": (73.2, 78.8, 82.4, 79.0, 80.1),
    "resnet152": (64.0, 73.0, 79.3, 74.5, 78.3),
    "resnet152_sk": (70.0, 76.5, 81.3, 77.2, 79.9),
    "resnet152_2x": (70.2, 76.6, 81.1, 77.4, 79.1),
    "resnet152_2x_sk": (74.2, 79.4, 82.9, 79.4, 80.4),
    "resnet152_3x_sk": (74.9, 80.1, 83.1, 79.8, 80.5),
}
TABLE_2 = {  # 1%, 10%; the paper gives no alpha for the two mixed rows: 0.5 is ours
    "--alpha 0 --kd-set labeled": (12.3, 52.0),
    "--alpha 0.5 --kd-set labeled": (23.6, 66.2),
    "--alpha 0.5 --kd-set all": (69.0, 75.1),
    "--alpha 1 --kd-set all": (68.9, 74.3),
}
TABLE_3 = {  # 1%, 10%
    "resnet50": (73.9, 77.5), "resnet50_2x_sk": (75.9, 80.2), "resnet152_3x_sk": (76.6, 80.9),
}  # fmt: skip


def walk():
    """(item, flags, stage, the paper's number or None) of its tables and figures.

    Items marked "recalled" rest on memory of an appendix: no number of theirs is shown.
    """
    columns = [("finetune", 1), ("finetune", 10), ("finetune", 100), ("linear", 100), ("sup", 100)]
    for row, cells in TABLE_1.items():
        for (stage, labels), top1 in zip(columns, cells):
            yield "Table 1", f"{row_flags(row)} --stage {stage} --labels {labels}", stage, top1
    r50 = row_flags("resnet50")
    for kd, cells in TABLE_2.items():
        flags = f"{r50} --stage distill --teacher runs/resnet50_2x_sk {kd}"
        for labels, top1 in zip((1, 10), cells):
            yield "Table 2", f"{flags} --labels {labels}", "distill", top1
    for row, cells in TABLE_3.items():
        teacher = "" if row == "resnet152_3x_sk" else "--stage distill --teacher resnet152_3x_sk"
        for labels, top1 in zip((1, 10), cells):
            yield "Table 3", f"{row_flags(row)} {teacher} --labels {labels}", "distill", top1

    plain = [row for row in TABLE_1 if not row.endswith("sk")]
    fractions = [f"--labels {labels}" for labels in (1, 10, 100)]
    one, kd = f"{r50} --labels 1", f"{r50} --labels 1 --stage distill --teacher runs/resnet50_2x_sk"
    for row in plain:
        for labels, top1 in zip((1, 10, 100), TABLE_1[row]):
            flags = f"{row_flags(row)} --labels {labels}"
            yield "Figure 1", f"{flags} --stage finetune", "finetune", top1
            yield "Figure 4", f"{flags} --method finetune", "finetune", top1
            sup = TABLE_1[row][4] if labels == 100 else None
            yield "Figure 4", f"{flags} --method sup", "sup", sup
    used = {(1, "--labels 1"): 57.9, (1, "--labels 10"): 68.4, (0, "--labels 100"): 76.3}
    for (k, f), top1 in used.items():  # Table 1's layer, named
        yield "Figure 5b", f"{r50} --ft-proj-selector {k} {f}", "finetune", top1
    plots = {
        "Figure 5a": [f"{r50} --proj-layers {n} {f}" for n in (2, 4) for f in fractions],
        "Figure 5b": [f"{r50} --ft-proj-selector {k} {f}" for k in (0, 1, 2) for f in fractions
                      if (k, f) not in used],
        "Figure 6": [
            f"{row_flags(row)} --stage distill --teacher {teacher} --labels {labels}"
            for row in TABLE_1 if row not in TABLE_3
            for labels in (1, 10) for teacher in (row, "runs/resnet152_2x_sk")
        ],
        "Figure E.1": [
            f"{row_flags(row)} --labels 1 --proj-layers 2 --ft-proj-selector 0" for row in plain
        ],
        "Figure F.1 (recalled)": [f"{kd} --kd-set all --alpha 0.5 --kd-temperature 2"],
        "Figure F.2 (recalled)": [f"{kd} --kd-temperature {tau}" for tau in (0.1, 2)],  # 1: Table 2
        "Appendix G (recalled)": [
            f"--dataset cifar10 --arch resnet{depth} --temperature 0.2 --proj-layers 2"
            f" --num-labels {n}{sk}"
            for depth in (18, 34, 50, 101, 152, 200) for n in (250, 4000, 50000)
            for sk in ("", " --sk")
        ],
    }
    for item, lines in plots.items():
        for flags in lines:
            yield item, flags, "finetune" if "--stage" not in flags else "distill", None
    # Table 1's networks were pretrained with the memory; without it that is said beside the number
    for size in (0, 65536):
        yield "Figure D.1", f"{one} --memory-size {size}", "finetune", 57.9
    yield "Figure E.1", one, "finetune", 57.9


@pytest.mark.parametrize("item, flags, stage, number", list(walk()))
def test_every_row_of_the_paper_shows_its_number(item, flags, stage, number, monkeypatch):
    """In --dry-run, but for the costs, which another test looks at: they take half a second."""
    monkeypatch.setattr(S, "cost_lines", lambda *a: [])
    args = parse(flags)
    assert S.paper_numbers(args).get(stage, (None,))[0] == number
    ours = S.dry_run(args).split("== the paper's row")[0]
    assert (f"result of stage {stage}: " in ours) == (number is not None)
    assert number is None or f"result of stage {stage}: {number} top-1 (" in ours
    assert all(f"stage {x}\n" in ours for x in S.stages_of(args))


def test_the_walk_has_every_item_and_every_number_once_in_its_table():
    items = {item.removesuffix(" (recalled)") for item, *_ in walk()}
    assert items == {
        "Table 1", "Table 2", "Table 3", "Figure 1", "Figure 4", "Figure 5a", "Figure 5b",
        "Figure 6", "Figure D.1", "Figure E.1", "Figure F.1", "Figure F.2", "Appendix G",
    }
    tables = [number for item, _, _, number in walk() if item.startswith("Table")]
    assert len(tables) == 13 * 5 + 4 * 2 + 3 * 2 and None not in tables
    assert all(number is None for item, _, _, number in walk() if "recalled" in item)


DRY_RUNS = [
    "", "--labels 10",
    "--dataset imagenet --arch resnet50 --labels 100 --method linear",
    "--dataset cifar10 --arch resnet18 --num-labels 250", "--dataset cifar100 --arch resnet34 --sk",
    "--dataset imagenet --labels 1 --follow paper", "--dataset imagenet --labels 1 --follow code",
    "--dataset imagenet --labels 1 --stage distill --teacher resnet50_2x_sk --alpha 0.5",
    "--dataset food101", "--dataset inat2019 --memory-size 65536",
]  # fmt: skip


@pytest.mark.parametrize("flags", DRY_RUNS)
def test_dry_run_shows_two_blocks_with_sources_and_costs(flags):
    text = S.dry_run(parse(f"{flags} --dry-run"))
    ours, paper = text.split("== the paper's row")
    assert "== this run" in ours and "python simclrv2.py --dataset imagenet" in paper
    for stage in S.stages_of(parse(flags)):
        assert f"stage {stage}\n" in ours and f"stage {stage}\n" in paper
    assert ours.count("TFLOP") == ours.count(" updates in all") == len(S.stages_of(parse(flags)))


def test_dry_run_of_the_largest():
    flags = "--dataset imagenet --arch resnet152 --width 3 --sk --labels 1"
    text = S.dry_run(parse(f"{flags} --dry-run"))
    ours, paper = text.split("== the paper's row")
    remark = ", pretrained with the memory: --follow D1=paper"
    assert f"stage finetune: 74.9 top-1 (Table 1{remark})" in ours
    assert f"stage distill: 76.6 top-1 (Table 3{remark})" in ours
    assert "--labels 1 --follow D1=paper\n" in paper
    assert "stage finetune: 74.9 top-1 (Table 1)" in paper
    assert "stage distill: 76.6 top-1 (Table 3)" in paper
    assert "as Table 1 counts 795,235,360" in text


def test_dry_run_names_the_source_of_every_value():
    """A default has the source of its own stage: SGD and a rate of 1.6 are not Sec. 3.1's."""
    args = parse("--dataset imagenet --arch resnet50 --labels 1")
    sources = {x: S.derive(args, x, 1).sources for x in S.STAGES}
    for name in ("epochs", "lr_base", "warmup_epochs"):
        assert sources["pretrain"][name].startswith("D2: 0.1 sqrt(N), 800 epochs")
        assert sources["linear"][name] == "default [authors' README]"
        assert sources["distill"][name].startswith("default [Sec. 3.1")
    assert sources["sup"]["epochs"] == "default [Table 1, E12]"
    assert sources["sup"]["optimizer"] == "default [authors' answers, E12]"
    assert sources["sup"]["warmup_epochs"] == "default [ours, E12]"
    assert sources["sup"]["label_smoothing"] == "Sec. 3.1; sup: Fig. 4, E12"
    assert sources["finetune"]["warmup_epochs"] == "default [Sec. 3.1: none]"
    assert sources["finetune"]["epochs"].startswith("Sec. 3.1")
    for number, stage in (("D1", "pretrain"), ("D3", "finetune"), ("D4", "distill"), ("D5", "sup")):
        name = S.DEPARTURES[number][1]
        assert sources[stage][name] == f"{number}: {S.DEPARTURES[number][5]}"
        if number != "D1":  # a list that leaves it out is no reason for another source
            listed = S.derive(parse("--dataset imagenet --follow D2=code"), stage, 1).sources
            assert listed[name] == sources[stage][name]
    code = S.derive(parse("--dataset imagenet --follow code"), "pretrain", 1).sources
    assert code["epochs"].startswith("D2=code: ") and code["memory_size"].startswith("D1=code: ")
    assert not hasattr(settings("--dataset imagenet --follow code"), "pretrain_schedule")


@pytest.mark.parametrize("flags, pictures", [
    ("pretrain", 2), ("sup", 1), ("finetune", 1), ("linear", 0),  # f is fixed: nothing is kept
    ("distill", 1), ("distill --alpha 0.5", 2), ("distill --alpha 0.5 --kd-set labeled", 1),
])
def test_memory_counts_what_waits_for_the_backward(flags, pictures):
    stage, _, more = flags.partition(" ")
    assert S.views_trained_on(stage, settings(more, stage)) == pictures
    text = S.dry_run(parse(f"--dataset imagenet --arch resnet50 --stage {flags} --dry-run"))
    parts = S.dry_run(parse(f"--dataset imagenet --arch resnet50 --stage {flags} --accum-steps 16"))
    memory = [float(re.search(r"about ([\d.]+) GiB", x)[1]) for x in (text, parts)]
    assert memory[0] > 10 * memory[1] if pictures else memory[0] == memory[1] < 1


def test_numbers_stand_only_beside_their_very_flags():
    flags = "--dataset imagenet --arch resnet50 --labels 1"
    said = "Table 1, pretrained with the memory: --follow D1=paper"
    assert S.paper_numbers(parse(flags)) == {"finetune": (57.9, said)}
    for more in ("--epochs finetune=10", "--proj-layers 2", "--follow code", "--image-size 128",
                 "--unlabeled-pool rest", "--temperature 0.2", "--width 1.5", "--holdout 1000",
                 "--memory-size 4096", "--follow D3=code", "--lr finetune=0.1", "--lr-base 0.2",
                 "--labels 5", "--dataset folder", "--epochs finetune=0"):
        assert S.paper_numbers(parse(f"{flags} {more}")) == {}, more
    assert S.paper_numbers(parse("--dataset imagenet --arch resnet50 --num-labels 1000")) == {}
    for more in ("--follow paper", "--follow D1=paper", "--memory-size pretrain=65536",
                 "--init r50_1x_sk0.pth"):
        assert S.paper_numbers(parse(f"{flags} {more}")) == {"finetune": (57.9, "Table 1")}, more
    # labels only means no other image; and a mixture is told apart from the paper's unknown alpha
    student = f"{flags} --stage distill --teacher resnet50_2x_sk"
    assert S.paper_numbers(parse(f"{student} --alpha 0")) == {}
    assert S.paper_numbers(parse(f"{student} --alpha 0 --kd-set labeled"))["distill"][0] == 12.3
    mixed = S.paper_numbers(parse(f"{student} --alpha 0.9"))["distill"]
    assert mixed == (69.0, "Table 2, its alpha is not stated")
    assert S.paper_numbers(parse(f"{student} --alpha 1 --kd-set labeled")) == {}
    assert S.paper_numbers(parse(f"{student} --student-init pretrained --init RUN")) == {}


@pytest.mark.parametrize("more", [  # what these flags say is so without them, or of no account
    "--temperature 0.1", "--epochs pretrain=800", "--batch-size finetune=1024", "--image-size 224",
    "--unlabeled-pool all", "--student-init scratch", "--follow D1=code", "--follow D5=paper",
    "--memory-size 0", "--lr finetune=0.16", "--accum-steps 4", "--kd-temperature 0.1",
    "--epochs sup=0,linear=0,distill=0", "--epochs sup=9,linear=9,distill=9", "--kd-set labeled",
    "--stage finetune --init RUN --temperature 0.5 --memory-size 9 --unlabeled-pool rest",
    "--stage finetune --init RUN --batch-size pretrain=6 --epochs sup=3 --follow D4=code",
])  # fmt: skip
def test_flags_that_change_nothing_hide_no_number(more):
    flags = "--dataset imagenet --arch resnet50 --labels 1"
    said = "Table 1, pretrained with the memory: --follow D1=paper"
    assert S.paper_numbers(parse(f"{flags} {more}")) == {"finetune": (57.9, said)}
    taught = f"{flags} --stage distill --teacher resnet50_2x_sk --kd-temperature 1 --blur 0"
    assert S.paper_numbers(parse(taught)) == {"distill": (68.9, "Table 2")}


def write_run(folder, flags, stages, **pretrain):
    """The first line of a run's log, as its --teacher or --init is read."""
    settings = {x: dict(tf_padding=0) for x in stages}
    settings |= dict(pretrain=dict(tf_padding=0, **pretrain)) if pretrain else {}
    args = vars(parse(f"--dataset imagenet {flags}"))
    folder.mkdir(exist_ok=True)
    first = dict(script="simclrv2", args=args, settings=settings)
    (folder / "log.jsonl").write_text(json.dumps(first) + "\n")
    return folder


TEACHERS = [  # the student, its teacher's flags and last stage, the number
    ("resnet50", "resnet50_2x_sk", "--labels 1", "finetune", 68.9),
    ("resnet50", "resnet50_2x_sk", "--labels 1", "distill", None),
    ("resnet50", "resnet50_2x_sk", "--labels 1", "sup", None),
    ("resnet50", "resnet50_2x_sk", "--labels 10", "finetune", None),
    ("resnet50", "resnet152_3x_sk", "--labels 1", "distill", 73.9),
    ("resnet50", "resnet152_3x_sk", "--labels 1", "finetune", None),
    ("resnet50_2x_sk", "resnet152_3x_sk", "--labels 1", "distill", 75.9),
    ("resnet50_2x_sk", "resnet152_3x_sk", "--num-labels 9000", "distill", None),
    ("resnet152_3x_sk", "resnet152_3x_sk", "--labels 1", "finetune", 76.6),
    ("resnet152_3x_sk", "resnet152_3x_sk", "--labels 1", "distill", None),  # once more
]


@pytest.mark.parametrize("row, teacher, labels, last, number", TEACHERS)
def test_a_number_needs_the_papers_teacher(row, teacher, labels, last, number, tmp_path):
    write_run(tmp_path, f"{row_flags(teacher)} {labels}", ["finetune", last])
    args = parse(f"{row_flags(row)} --labels 1 --stage distill --teacher {tmp_path}")
    assert S.paper_numbers(args).get("distill", (None,))[0] == number


def test_whether_a_run_was_pretrained_with_the_memory_is_in_its_log(tmp_path):
    flags = "--dataset imagenet --arch resnet50 --labels 1 --stage finetune"
    remark = ", pretrained with the memory: --follow D1=paper"
    for size, said in ((65536, "Table 1"), (0, "Table 1" + remark), (4096, None)):
        run = write_run(tmp_path / f"{size}", flags, [], memory_size=size)
        for more in ("", "--follow D1=paper", "--memory-size 65536"):
            found = S.paper_numbers(parse(f"{flags} --init {run} {more}"))
            assert found.get("finetune", (0, None))[1] == said
    assert S.paper_numbers(parse(f"{flags} --init R --follow D1=paper"))["finetune"][1] == "Table 1"


def test_a_published_list_has_the_recipe_and_numbers_of_its_percentage(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("n01440764_1.JPEG\nn01440764_2.JPEG\n")
    monkeypatch.chdir(tmp_path)
    flags = "--dataset imagenet --arch resnet50 --labels-file mine.txt"
    assert S.percent(parse(flags)) is None and S.paper_numbers(parse(flags)) == {}
    assert S.percent(parse(flags.replace("mine", "absent"))) is None
    key = split_lists.fingerprint(["n01440764_1", "n01440764_2"])
    for name, labels in S.PUBLISHED.items():
        assert name in split_lists.KNOWN.values()
        monkeypatch.setitem(split_lists.KNOWN, key, name)
        S.list_name.cache_clear()
        args, same = parse(flags), parse(f"--dataset imagenet --arch resnet50 --labels {labels}")
        assert S.recipe(args) == S.recipe(same)
        assert vars(S.derive(args, "finetune", 1)) == vars(S.derive(same, "finetune", 1))
        assert S.paper_numbers(args) == S.paper_numbers(same) != {}
        # another list of images to pretrain on, or images kept back, is no row of the paper
        for other in (f"{flags} absent.txt", f"{flags} --holdout 9"):
            assert S.paper_numbers(parse(other)) == {}
            assert S.paper_numbers(S.paper_args(parse(other))) != {}
    S.list_name.cache_clear()


def test_wider_or_sk_networks_beyond_table_1_take_its_smaller_rate():
    for flags, peak in (("--width 3", 0.064), ("--sk --labels 5", 0.064), ("--labels 5", 0.16)):
        s = settings(f"--dataset imagenet --arch resnet50 {flags}", "finetune")
        assert s.lr == pytest.approx(peak), flags


def test_networks_beyond_table_1_train_on_part_of_the_labels_as_those_in_it():
    for labels, epochs, augment, smoothing in ((1, 60, "strong", 0.1), (5, 30, "strong", 0.1),
                                               (10, 30, "strong", 0.1), (100, 30, "weak", 0)):
        for arch in ("resnet18", "resnet50 --width 1.5"):
            flags = f"--dataset imagenet --arch {arch} --labels {labels}"
            f, sup = (settings(flags, stage) for stage in ("finetune", "sup"))
            assert (f.epochs, sup.augment, sup.label_smoothing) == (epochs, augment, smoothing)
            assert f.augment == "weak"


def test_parts_and_batches_of_a_run_need_not_fit_the_papers():
    args = parse("--stage sup --accum-steps 5")
    assert S.derive(args, "sup", 1).micro_batch == 8
    assert S.paper_numbers(S.paper_args(args)) == {}
    flags = "--dataset imagenet --stage finetune --init RUN --labels 1 --accum-steps 3"
    args = parse(f"{flags} --batch-size finetune=1023")
    assert S.derive(args, "finetune", 1) and S.paper_numbers(args) == {}


COUNTED = [  # stage, flags, updates of two images in one pass; None: not known without the data
    ("sup", "--labels-file L", None), ("sup", "--labels-file 10.txt U", "64,059"),
    ("sup", "--labels 10", "64,060"), ("sup", "--num-labels 9", "5"),
    ("sup", "--labels 10 --holdout 1167", "64,001"), ("sup", "--labels 5", "32,030"),
    ("pretrain", "", "640,584"), ("pretrain", "--labels-file L", "640,584"),
    ("pretrain", "--holdout 1167", "640,001"), ("pretrain", "--unlabeled-pool rest", "576,525"),
    ("pretrain", "--labels-file 10.txt --unlabeled-pool rest", "576,526"),
    ("pretrain", "--labels-file L --unlabeled-pool rest", None),
    ("pretrain", "--labels-file L U", None), ("pretrain", "--labels-file 10.txt U", None),
    ("distill", "--labels-file 10.txt U --unlabeled-pool rest", None),
    ("distill", "--labels-file 10.txt U --kd-set labeled", "64,059"),
]


@pytest.mark.parametrize("stage, more, updates", COUNTED)
def test_updates_are_counted_where_the_labels_are(stage, more, updates, monkeypatch):
    monkeypatch.setattr(S, "list_name", LISTS.get)
    monkeypatch.setattr(S.report, "cost", lambda model, size: dict(flops=1, kept=1, fixed=1))
    args = parse(f"--dataset imagenet --arch resnet18 --epochs 1 --batch-size 2 {more}")
    text = "".join(S.cost_lines(args, stage, S.derive(args, stage, 1)))
    found = re.search(r", ([\d,]+) updates in all", text)
    assert (found and found[1]) == updates


def test_all_labels_start_from_the_input_of_the_head():
    for dataset in ("digits", "cifar10", "imagenet"):
        layers = [settings(f"--dataset {dataset} --labels {n}", "finetune").ft_proj_selector
                  for n in (10, 100)]
        assert layers == [1, 0], dataset


def test_the_printed_imagenet_command_gives_the_number_beside_it():
    for flags in ("", "--labels 10", "--arch resnet101 --width 2 --sk --labels 1"):
        paper = S.paper_args(parse(flags))
        again = S.parse_args(S.command_of(paper).split()[2:])
        assert S.paper_numbers(again) == S.paper_numbers(paper) != {}


DIFFER = {  # departure: flags, stage, then the setting recommended, by the paper, by the code
    "D1": ("--dataset imagenet", "pretrain", 0, 65536, 0),
    "D3": ("", "finetune", 0, 0, 1),
    "D4": ("", "distill", 0, 0, 1),
    "D5": ("", "sup", 0, 0, 1),
}


@pytest.mark.parametrize("number", DIFFER)
def test_follow_changes_what_it_says(number):
    flags, stage, *values = DIFFER[number]
    name = S.DEPARTURES[number][1]
    for whom, value in zip(("recommended", "paper", "code"), values):
        for text in (f"--follow {whom}", f"--follow {number}={whom}"):
            assert getattr(settings(f"{flags} {text}", stage), name) == value, text
    assert f"    {number} " not in S.__doc__ and S.DEPARTURES[number][5]


def test_follow_d2_takes_rate_and_epochs_of_one_source_together():
    ours = settings("--dataset imagenet")
    code = settings("--dataset imagenet --follow D2=code")
    assert (ours.lr, ours.epochs, ours.warmup_epochs) == (pytest.approx(6.4), 800, 40)
    assert (code.lr, code.epochs, code.warmup_epochs) == (pytest.approx(4.8), 100, 10)
    assert S.total_steps(1281167, code.epochs, code.batch_size) == 31279
    assert settings("--dataset imagenet --follow D2=code --epochs 50").epochs == 50
    assert settings("--follow D2=code").epochs == settings("").epochs  # the digits are not ImageNet
    assert set(DIFFER) | {"D2"} == set(S.DEPARTURES)


def test_every_setting_is_a_flag_that_wins_for_the_named_stage():
    for name, (kind, _, _) in S.SETTINGS.items():
        value = {str: S.CHOICES.get(name, ("",))[-1], int: 2, float: 0.5}[kind]
        flag = f"--{name.replace('_', '-')}"
        stage = S.ONLY_IN.get(name, S.STAGES)[-1]
        s = settings(f"{flag} {stage}={value}", stage)
        assert getattr(s, name) == value and s.sources[name] == flag
        for other in S.STAGES:
            if other != stage:
                assert settings(f"{flag} {stage}={value}", other).sources[name] != flag, name
            if other not in S.ONLY_IN.get(name, S.STAGES):  # a flag that the stage does not have
                assert settings(f"{flag} {value}", other).sources[name] != flag, name
    assert set(S.ONLY_IN) <= set(vars(settings())) and set(S.CHOICES) <= set(S.SETTINGS)


@pytest.mark.parametrize(
    "text, flag",
    [
        ("--optimizer adam", "--optimizer"), ("--kd-set some", "--kd-set"),
        ("--ft-proj-selector 4", "--ft-proj-selector"), ("--proj-layers 0", "--proj-layers"),
        ("--ft-proj-selector -2", "--ft-proj-selector"), ("--batch-size 1", "--batch-size"),
        ("--batch-size 10 --accum-steps 4", "--accum-steps"), ("--alpha -1", "--alpha"),
        ("--batch-size 4 --accum-steps 4", "BatchNorm"), ("--alpha 2", "--alpha"),
        ("--blur 1.1", "--blur"), ("--memory-size -1", "--memory-size"),
        ("--temperature 0", "--temperature"), ("--kd-temperature 0", "--kd-temperature"),
        ("--jitter-strength 3", "--jitter-strength"), ("--width 0", "--width"),
        ("--width nan", "--width"), ("--width -1", "--width"), ("--width inf", "--width"),
        ("--width 0.1", "--width"), ("--crop-min 1.5", "--crop-min"), ("--blur nan", "--blur"),
    ],
)  # fmt: skip
def test_contradictory_settings_are_refused(text, flag):
    with pytest.raises(UserError, match=flag):
        for stage in S.STAGES:
            settings(text, stage)


# ----- 2. DATA ---------------------------------------------------------------------------------


def picture(width=50, height=40):
    g = torch.Generator().manual_seed(0)
    return TF.to_pil_image(torch.randint(0, 256, (3, height, width), generator=g).byte())


def steps(views):
    return [type(t).__name__ for t in views]


@pytest.mark.parametrize("dataset, size", [("digits", 28), ("cifar10", 32), ("imagenet", 64)])
def test_views_are_bytes_of_one_size(dataset, size):
    torch.manual_seed(0)
    for view in S.view_lists(dataset, size, settings()).values():
        for shape in ((28, 28), (50, 40), (3, 70), (1, 1)):
            for _ in range(20):
                x = picture(*shape)
                for step in view:
                    x = step(x)
                assert x[0].shape == (3, size, size) and x[0].dtype == torch.uint8


def test_views_hold_the_papers_steps_in_order():
    views = S.view_lists("imagenet", 224, settings("--dataset imagenet"))
    assert steps(views["pretrain"]) == [
        "RandomResizedCrop", "RandomHorizontalFlip", "RandomApply", "RandomGrayscale", "ToBytes"
    ]  # fmt: skip
    assert steps(views["weak"]) == ["RandomResizedCrop", "RandomHorizontalFlip", "ToBytes"]
    assert steps(views["strong"])[2] == "AutoAugment"
    crop, _, apply, grey, _ = views["pretrain"]
    assert crop.scale == (0.08, 1) and crop.ratio == (3 / 4, 4 / 3) and crop.size == (224, 224)
    assert apply.p == 0.8 and grey.p == 0.2
    for flip in (views["pretrain"][1], views["weak"][1], views["strong"][1]):
        assert flip.p == 0.5
    digits = S.view_lists("digits", 28, settings())
    assert [steps(digits[name])[:-1] for name in ("weak", "strong")] == [
        ["RandomResizedCrop"], ["Resize", "RandomAffine"]]
    for view in (*views.values(), *digits.values()):
        for step in view:
            if hasattr(step, "size") and hasattr(step, "interpolation"):  # what resizes
                assert step.interpolation == TF.InterpolationMode.BICUBIC and step.antialias
    resize, centre, _ = views["evaluate"]
    assert resize.size == 256 and centre.size == (224, 224)
    whole = S.view_lists("cifar10", 32, settings("--dataset cifar10"))["evaluate"]
    assert steps(whole) == ["Resize", "ToBytes"]
    small = picture(32, 32)
    assert torch.equal(whole[1](whole[0](small))[0], TF.pil_to_tensor(small))


@pytest.mark.parametrize("strength, factors, hue", [(1.0, (0.2, 1.8), 0.2), (0.5, (0.6, 1.4), 0.1)])
def test_colour_distortion_by_strength(strength, factors, hue):
    s = settings(f"--dataset imagenet --jitter-strength {strength}")
    (jitter,) = S.view_lists("imagenet", 224, s)["pretrain"][2].transforms
    for found in (jitter.brightness, jitter.contrast, jitter.saturation):
        assert tuple(found) == pytest.approx(factors)
    assert tuple(jitter.hue) == pytest.approx((-hue, hue))


def test_pixels_stay_between_0_and_1():
    stats = torch.tensor([0.0, 255.0]).view(2, 1, 1, 1)  # E3, as start_processes makes it
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    x = S.to_model(bytes_, torch.zeros(2, 4), stats)
    close(x[0, 0].flatten(), torch.arange(256) / 255)
    run = S.start_processes(parse("--dtype fp32 --device cpu"))
    close(run.stats, torch.tensor([0.0, 255.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))


@pytest.mark.parametrize(("size", "taps"), [(224, 23), (32, 3)])
def test_blur_taps_and_kernel(size, taps):
    x = torch.zeros(2, 3, size, size, dtype=torch.float64)
    mid = size // 2
    x[:, :, mid, mid] = 1
    sigma = torch.tensor(50.0)                                   # flat: the support shows
    y = S.gaussian_blur(x, sigma, torch.tensor([True, False]))
    assert (y[0, 0, mid] > 0).sum() == taps and (y[0, 0, :, mid] > 0).sum() == taps
    assert torch.equal(y[1], x[1])
    k = torch.exp(-torch.arange(-(taps // 2), taps // 2 + 1).double() ** 2 / (2 * 1.3**2))
    k = k / k.sum()
    y = S.gaussian_blur(x, torch.tensor(1.3, dtype=torch.float64), torch.tensor([True, True]))
    r = taps // 2
    close(y[0, 1, mid - r:mid + r + 1, mid - r:mid + r + 1], torch.outer(k, k))


def test_blur_border_is_dark_and_drawn_per_image():
    y = S.gaussian_blur(torch.ones(1, 3, 32, 32), torch.tensor(2.0), torch.tensor([True]))
    assert y[0, 0, 0, 0] < 0.7 and y[0, 0, 16, 16] == pytest.approx(1)
    torch.manual_seed(0)
    for share in (0.5, 0.2):
        sigma, on = S.draw_blur(20000, share)
        assert sigma.shape == () and 0.1 <= sigma <= 2
        assert on.float().mean() == pytest.approx(share, abs=0.02)
    drawn = torch.stack([S.draw_blur(1)[0] for _ in range(2000)])
    assert 0.1 <= drawn.min() < 0.11 and 1.99 < drawn.max() <= 2  # U(0.1, 2)
    assert drawn.mean() == pytest.approx(1.05, abs=0.05)


# ----- 3. MODEL --------------------------------------------------------------------------------
def counts(module):
    trainable = sum(p.numel() for p in module.parameters())
    buffers = sum(b.numel() for n, b in module.named_buffers() if "running" in n)
    convs = sum(isinstance(m, nn.Conv2d) for m in module.modules())
    norms = sum(isinstance(m, _BatchNorm) for m in module.modules())
    return trainable, trainable + buffers, convs, norms


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in PARITY["param_counts"]
                                             for n in PARITY["param_counts"][g]])
def test_parity_param_counts(group, name):
    c = PARITY["param_counts"][group][name]
    depth, second, sk = name.split("_")
    width = 1 if group == "small" else int(second[0])
    with torch.device("meta"):
        size = 32 if "cifar" in second else 224
        encoder = S.Encoder(f"resnet{depth[1:]}", width, sk == "sk1", size)
        head = S.projection_head(encoder.dim)
    want = c["trainable"], c["trainable_plus_bn_buffers"], c["n_conv"], c["n_bn"]
    assert counts(encoder) == want and encoder.dim == c["feature_dim"]
    layers = [sum(p.numel() for p in layer.parameters()) for layer in head]
    assert layers == list(c["proj_head_layers"])
    row = S.row_name(SimpleNamespace(arch=f"resnet{depth[1:]}", width=width, sk=sk == "sk1"))
    if group == "imagenet" and row in S.TABLE_1:
        assert S.TABLE_1[row][0] == c["paper_millions"]
        # Table 1 counts the buffers; two of its thirteen are rounded up
        assert abs(counts(encoder)[1] / 1e6 - S.TABLE_1[row][0]) < 0.6


def test_all_thirteen_of_table_1_are_in_the_parity_file():
    small = PARITY["param_counts"]["imagenet"]
    assert sum(c["paper_millions"] > 0 for c in small.values()) == 13


def test_middle_layer_adds_what_table_1_says():
    for width, extra in ((1, 4_198_400), (2, 16_785_408)):
        with torch.device("meta"):
            kept = S.projection_head(2048 * width)[:1]
        assert sum(p.numel() for p in kept.parameters()) == extra


@pytest.mark.parametrize(("size", "sizes"), [(32, [32, 16, 8, 4]), (224, [56, 28, 14, 7])])
@pytest.mark.parametrize("sk", [False, True])
def test_stage_sizes(size, sizes, sk):
    encoder = S.Encoder("resnet50", 0.125, sk, size).eval()
    seen = []
    for i in range(4):
        getattr(encoder, f"layer{i + 1}").register_forward_hook(
            lambda m, a, out: seen.append(out.shape[-1]))
    assert encoder(torch.rand(1, 3, size, size)).shape == (1, 256) and seen == sizes


def test_plain_resnet50_is_torchvisions():
    torch.manual_seed(0)
    encoder = S.Encoder("resnet50").eval()
    other = resnet50().eval()
    other.fc = nn.Identity()
    for m in encoder.modules():
        if isinstance(m, _BatchNorm):
            nn.init.uniform_(m.weight, 0.5, 1)
            m.running_mean.uniform_(-0.1, 0.1)
    other.load_state_dict(encoder.state_dict())
    x = torch.rand(2, 3, 64, 64)
    close(encoder(x), other(x))


def test_fresh_identity_block_passes_its_input():
    block = S.Encoder("resnet50", 0.125).layer1[1].train()
    x = torch.randn(4, 32, 8, 8)
    assert torch.equal(block(x), x.relu())


def test_initialisation_of_the_authors():
    torch.manual_seed(0)
    w = nn.Conv2d(512, 512, 3, bias=False)
    S.initialise(w)
    assert w.weight.std().item() == pytest.approx(math.sqrt(1 / 4608), rel=0.01)
    assert w.weight.abs().max() <= 2.28 * math.sqrt(1 / 4608)
    encoder = S.Encoder("resnet50", 0.25, True)
    for name, m in encoder.named_modules():
        if isinstance(m, _BatchNorm):
            assert (m.weight == (0 if name.endswith("bn3") else 1)).all(), name
            assert m.eps == 1e-5 and m.momentum == 0.1
        if isinstance(m, nn.Conv2d):
            assert m.bias is None
    head = S.projection_head(64, 3)
    assert all(layer[0].bias is None for layer in head)
    assert [layer[1].bias is not None for layer in head] == [True, True, False]
    assert head[0][0].weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("case", PARITY["pooling"])
def test_parity_pooling(case):
    c = PARITY["pooling"][case]
    for module, key in ((S.TfMaxPool(), "maxpool3_s2"),
                        (S.ShortcutPool(1), "shortcut_avgpool_stride1"),
                        (S.ShortcutPool(2), "shortcut_avgpool_stride2")):
        close(module(c["x"]), c[key], rtol=1e-6, atol=1e-6)


def test_every_stage_of_an_sk_network_averages_before_its_shortcut():
    """2 x 2 from each place on, in stage 1 too, at stride 1; what is beyond the edge is no 0."""
    torch.manual_seed(0)
    encoder = S.Encoder("resnet50", 0.125, sk=True, image_size=64).eval()
    for k, stride in enumerate((1, 2, 2, 2), 1):
        shortcut = getattr(encoder, f"layer{k}")[0].downsample
        conv, bn = shortcut[-2:]
        x = torch.rand(2, conv.in_channels, 6, 6)
        mean = torch.stack([x[..., i:i + 2, j:j + 2].mean((2, 3)) for i in range(0, 6, stride)
                            for j in range(0, 6, stride)], -1).unflatten(-1, (6 // stride, -1))
        assert conv.kernel_size == conv.stride == (1, 1)
        close(shortcut(x), bn(conv(mean)), atol=1e-6)


def fill_bn(bn, rows):
    with torch.no_grad():
        for p, row in zip((bn.weight, bn.bias, bn.running_mean, bn.running_var), rows):
            p.copy_(row)


@pytest.mark.parametrize("case", PARITY["sk_block"])
def test_parity_sk_block(case):
    c = PARITY["sk_block"][case]
    w = {k: v.float() for k, v in c["weights"].items()}
    unit = S.SelectiveKernel(6, c["filters"], c["stride"])
    assert unit.fc0.out_channels == c["mid_dim"]
    with torch.no_grad():
        for name in ("conv", "fc0", "fc1"):
            getattr(unit, name).weight.copy_(w[f"{name}.weight"])
    fill_bn(unit.bn, w["bn"])
    fill_bn(unit.fcbn, w["fcbn"])
    for mode, rtol in (("eval", 1e-5), ("train", 1e-4)):
        out = unit.train(mode == "train")(c["x"].float())
        close(out, c[f"out_{mode}"], rtol=rtol, atol=rtol * c[f"out_{mode}"].abs().max().item())


@pytest.mark.parametrize("case", PARITY["projection_head"])
def test_parity_projection_head(case):
    c = PARITY["projection_head"][case]
    n, w = c["num_layers"], c["weights"]
    head = S.projection_head(12, n, 8)
    assert [layer[0].bias is not None for layer in head] == c["has_dense_bias"]
    assert [layer[1].bias is not None for layer in head] == c["bn_has_beta"]
    names = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean",
             "running_var": "running_var"}
    with torch.no_grad():
        for j, layer in enumerate(head):
            layer[0].weight.copy_(w[f"layer{j}.weight"])
            for ours, theirs in names.items():
                if getattr(layer[1], ours) is not None:
                    getattr(layer[1], ours).copy_(w[f"layer{j}.bn.{theirs}"])
    x = c["x"]
    head.eval()
    for k in range(n + 1):
        close(head[:k](x), c[f"eval.selector{k}"])
    close(head(x), c["eval.projection"])
    close(head(x), c["eval.selector_minus1"])
    head.train()
    with S.running_statistics_kept(head):
        close(head[:1](x), c["train.selector1"], atol=1e-6)
        assert torch.equal(head[0][1].running_mean, w["layer0.bn.running_mean"])
    close(head(x), c["train.projection"], atol=2e-6)
    for j, layer in enumerate(head):             # exactly one training call since the start
        close(layer[1].running_mean, c[f"after_train.layer{j}.running_mean"], atol=1e-6)
        old, b = w[f"layer{j}.bn.running_var"], len(x)
        theirs = c[f"after_train.layer{j}.running_var"]    # biased; torch's is unbiased
        close(layer[1].running_var - 0.9 * old, (theirs - 0.9 * old) * b / (b - 1), atol=1e-6)


def as_tf(net, prefix=""):
    """A state as the authors' checkpoint names it, written down from its description."""
    state, counter = {}, {"conv2d": 0, "batch_normalization": 0}

    def put(kind, tensors):
        n = counter[kind]
        counter[kind] += 1
        scope = f"{prefix}base_model/{kind}" + (f"_{n}" if n else "")
        state.update({f"{scope}/{k}": v.detach().clone() for k, v in tensors.items()})

    def conv(m):
        put("conv2d", {"kernel": m.weight.permute(2, 3, 1, 0), "kernel/Momentum": torch.zeros(1)})

    def bn(m):
        put("batch_normalization", {"gamma": m.weight, "beta": m.bias,
                                    "moving_mean": m.running_mean,
                                    "moving_variance": m.running_var})

    def units(block):
        yield from [m for m in block.downsample if not isinstance(m, S.ShortcutPool)] \
            if block.downsample is not None else []
        yield block.conv1
        yield block.bn1
        if isinstance(block.conv2, S.SelectiveKernel):
            unit = block.conv2
            yield from (unit.conv, unit.bn, unit.fc0, unit.fcbn, unit.fc1)
        else:
            yield from (block.conv2, block.bn2)
        if hasattr(block, "conv3"):
            yield from (block.conv3, block.bn3)

    e = net.encoder
    stem = [m for m in e.conv1.modules() if isinstance(m, (nn.Conv2d, _BatchNorm))]
    stages = [e.layer1, e.layer2, e.layer3, e.layer4]
    for m in [*stem, e.bn1, *(u for stage in stages for b in stage for u in units(b))]:
        (conv if isinstance(m, nn.Conv2d) else bn)(m)
    for j, layer in enumerate(net.head):
        scope = f"{prefix}head_contrastive/nl_{j}"
        state[f"{scope}/dense/kernel"] = layer[0].weight.detach().T.clone()
        for theirs, ours in (("gamma", "weight"), ("beta", "bias"), ("moving_mean", "running_mean"),
                             ("moving_variance", "running_var")):
            if getattr(layer[1], ours) is not None:
                tensor = getattr(layer[1], ours).detach().clone()
                state[f"{scope}/batch_normalization/{theirs}"] = tensor
    return state


def as_pytorch(net, sk, fc):
    """The same as the public conversion names it."""
    resnet = {}

    def put(scope, m):
        resnet.update({f"{scope}.{k}": v.clone() for k, v in m.state_dict().items()})

    e = net.encoder
    if sk:
        for i, j in enumerate((0, 3, 6)):
            put(f"net.0.{2 * i}", e.conv1[j])
        put("net.0.1.0", e.conv1[1])
        put("net.0.3.0", e.conv1[4])
        put("net.0.5.0", e.bn1)
    else:
        put("net.0.0", e.conv1)
        put("net.0.1.0", e.bn1)
    for i in range(4):
        for j, b in enumerate(getattr(e, f"layer{i + 1}")):
            scope = f"net.{i + 1}.blocks.{j}"
            if b.downsample is not None:
                put(f"{scope}.projection.shortcut" + (".2" if sk else ""), b.downsample[-2])
                put(f"{scope}.projection.bn", b.downsample[-1])
            put(f"{scope}.net.0", b.conv1)
            put(f"{scope}.net.1.0", b.bn1)
            if sk:
                put(f"{scope}.net.2.main_conv.0", b.conv2.conv)
                put(f"{scope}.net.2.main_conv.1.0", b.conv2.bn)
                put(f"{scope}.net.2.mixing_conv.0", b.conv2.fc0)
                put(f"{scope}.net.2.mixing_conv.1.0", b.conv2.fcbn)
                put(f"{scope}.net.2.mixing_conv.2", b.conv2.fc1)
                last = 3
            else:
                put(f"{scope}.net.2", b.conv2)
                put(f"{scope}.net.3.0", b.bn2)
                last = 4
            put(f"{scope}.net.{last}", b.conv3)
            put(f"{scope}.net.{last + 1}.0", b.bn3)
    put("fc", fc)
    head = {}
    for j, layer in enumerate(net.head):
        head[f"layers.{3 * j}.weight"] = layer[0].weight.detach().clone()
        bn = {k: v.clone() for k, v in layer[1].state_dict().items()}
        bn.setdefault("bias", torch.zeros(layer[1].num_features))
        head.update({f"layers.{3 * j + 1}.{k}": v for k, v in bn.items()})
    return {"resnet": resnet, "head": head}


def scrambled(sk):
    encoder = S.Encoder("resnet50", 0.125, sk)
    net = S.Net(encoder, S.projection_head(encoder.dim, 3))
    with torch.no_grad():
        for t in net.state_dict().values():
            if t.is_floating_point():
                t.uniform_(0.1, 1)
    return net


@pytest.mark.parametrize("sk", [False, True])
@pytest.mark.parametrize("form", ["tf1", "pytorch", "pytorch, keys in another order"])
def test_released_checkpoints_load(sk, form, tmp_path):
    torch.manual_seed(0)
    net, other, fc = scrambled(sk), scrambled(sk), nn.Linear(256, 7)
    if form == "tf1":
        # an averaged copy beside it, of other values, and a classifier: not to be taken
        state = as_tf(net) | as_tf(other, "ema_model/")
        state |= {"head_supervised/linear_layer/dense/kernel": fc.weight.detach().T,
                  "head_supervised/linear_layer/dense/bias": fc.bias.detach(),
                  "global_step": torch.tensor(1)}
    else:
        state = as_pytorch(net, sk, fc)
        if "order" in form:  # safetensors sorts names
            state = {k: dict(sorted(v.items())) for k, v in state.items()}
    torch.save(state, tmp_path / "r50.pth")
    fresh = S.Net(S.Encoder("resnet50", 0.125, sk), S.projection_head(256, 3))
    assert S.load_init(fresh, str(tmp_path / "r50.pth")) == "released checkpoint"
    want = net.state_dict()
    for name, tensor in fresh.state_dict().items():
        assert "tracked" in name or torch.equal(tensor, want[name]), name
    for sk_too, layers in ((not sk, 3), (sk, 2)):
        wrong = S.Net(S.Encoder("resnet50", 0.125, sk_too), S.projection_head(256, layers))
        with pytest.raises(UserError, match=r"--init .*--sk.*--proj-layers"):
            S.load_init(wrong, str(tmp_path / "r50.pth"))


@pytest.mark.parametrize("padded", [0, 1])
def test_what_starts_from_a_run_has_its_padding(padded, tmp_path):
    """However it came by it; a checkpoint of the run, also the one before, is the run."""
    first = dict(script="simclrv2", args=dict(arch="resnet50", width=2.0, sk=True),
                 settings=dict(pretrain=dict(tf_padding=padded)))
    (tmp_path / "log.jsonl").write_text(json.dumps(first) + "\n")
    for name in ("", checkpoint.NEWEST, checkpoint.PREVIOUS):
        args = parse(f"--init {tmp_path / name} --stage finetune")
        s = S.derive(args, "finetune", 1)
        assert (S.init_kind(args), s.tf_padding) == ("run", padded), name
        assert not padded or s.sources["tf_padding"] == f"as {tmp_path / name}"
    assert S.teacher_row(parse(f"--teacher {tmp_path}")) == "resnet50_2x_sk"


def test_a_run_of_another_script_is_no_teacher_and_no_start(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps(dict(script="semi_vit", args={})) + "\n")
    s = settings(f"--teacher {tmp_path} --init {tmp_path} --dataset imagenet", "distill")
    assert (s.kd_temperature, s.tf_padding) == (1.0, 0)  # what the weights are is said on loading


def test_released_weights_bring_the_authors_padding():
    s = settings("--dataset imagenet --init r50_1x_sk0.pth", "finetune")
    assert s.tf_padding == 1 and s.sources["tf_padding"] == "released weights"
    model = S.build_model(parse("--arch resnet50 --width 0.125 --image-size 64"), "pretrain", s, 10)
    assert isinstance(model.encoder.maxpool, S.TfMaxPool)
    assert settings("--init runs/x/checkpoint.pt", "finetune").tf_padding == 0
    assert settings("", "finetune").tf_padding == 0


def test_fine_tuning_from_the_middle():
    args = parse("--arch resnet18 --width 0.125 --image-size 32")
    tuned = alive(S.build_model(args, "finetune", S.derive(args, "finetune", 1), 10))
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)
    S.train_mode(tuned, "finetune")
    out = S.label_step(tuned, x, y, 0.0, FP32)
    assert out["loss"].item() == pytest.approx(math.log(10), rel=1e-6)      # classifier at zero
    out["loss"].backward()
    assert len(tuned.head) == 1 and tuned.classifier.weight.grad.abs().sum() > 0
    nn.init.normal_(tuned.classifier.weight)
    S.label_step(tuned, x, y, 0.0, FP32)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.parameters())

    S.train_mode(tuned, "finetune", freeze_proj=True)
    assert not any(p.requires_grad for p in tuned.head.parameters())
    before = tuned.head[0][1].running_mean.clone()
    tuned(x)
    assert not torch.equal(before, tuned.head[0][1].running_mean)          # D3: statistics move


def test_classifiers_start_at_zero_where_lars_does_not_adapt_them():
    """A student's steps would follow its tiny norm: it starts from N(0, 0.01^2), as in sup."""
    torch.manual_seed(0)
    args = parse("--width 2")
    for stage in ("sup", "linear", "finetune", "distill"):
        layer = S.build_model(args, stage, S.derive(args, stage, 1), 10).classifier
        assert (layer.bias == 0).all()
        std = layer.weight.std().item()
        assert std == 0 if stage in ("linear", "finetune") else 0.0095 < std < 0.0105, stage
        assert layer.weight.mean().abs() < 0.001


def test_linear_leaves_the_representation_alone():
    net = tiny_net().float()
    probe = S.Net(net.encoder, net.head[:0], 10, zero=True)
    S.train_mode(probe, "linear")
    optimiser = S.build_optimiser(probe, 1e-6, "sgd", distill=False)
    before = {k: v.clone() for k, v in net.encoder.state_dict().items()}
    for _ in range(3):
        for group in optimiser.param_groups:
            group["lr"] = 0.5
        x, y = torch.rand(8, 3, 32, 32), torch.arange(8)
        S.label_step(probe, x, y, 0.0, FP32)["loss"].backward()
        optimiser.step()
    assert all(torch.equal(v, before[k]) for k, v in net.encoder.state_dict().items())
    assert probe.classifier.weight.abs().sum() > 0


# ----- 4. LOSSES -------------------------------------------------------------------------------
def one_process(hidden, tau, norm=True):
    z1, z2 = (S.normalise(hidden) if norm else hidden).chunk(2)
    return S.nt_xent(z1, z2, z1, z2, 0, tau)


@pytest.mark.parametrize("case", PARITY["nt_xent"])
def test_parity_nt_xent(case):
    c = PARITY["nt_xent"][case]
    hidden = c["hidden"].clone().requires_grad_()
    loss, logits_ab = one_process(hidden, c.get("temperature", 0.1), c.get("hidden_norm", True))
    close(loss, c["loss"])
    close(logits_ab, c["logits_ab"], atol=1e-6)
    loss.backward()
    assert hidden.grad.isfinite().all()
    if "grad" in c:
        close(hidden.grad, c["grad"], atol=1e-6)
        stats = S.contrast_statistics(logits_ab, 0)
        close(stats["contrast_acc"], c["contrast_acc"])
        close(stats["contrast_entropy"], c["contrast_entropy"])
        assert c["labels_index"].tolist() == list(range(len(logits_ab)))


@pytest.mark.parametrize("case", PARITY["nt_xent_multi_replica"])
def test_parity_nt_xent_of_replicas(case):
    """The pure function, the other replicas' rows given; the gather is tested with processes."""
    c = PARITY["nt_xent_multi_replica"][case]
    hidden = c["hidden"].clone().requires_grad_()
    z1, z2 = zip(*(S.normalise(h).chunk(2) for h in hidden))
    outs = [S.nt_xent(z1[r], z2[r], torch.cat(z1), torch.cat(z2), r, c["temperature"])
            for r in range(c["num_replicas"])]
    close(torch.stack([loss for loss, _ in outs]), c["loss_per_replica"])
    close(torch.stack([logits for _, logits in outs]), c["logits_ab"], atol=1e-6)
    mean = sum(loss for loss, _ in outs) / c["num_replicas"]
    close(mean, c["loss_single_process"])
    mean.backward()
    close(hidden.grad, c["grad_of_mean_loss"], atol=1e-6)


def test_eq1_by_hand_with_loops():
    torch.manual_seed(0)
    n, tau = 3, 0.3
    hidden = torch.randn(2 * n, 5, dtype=torch.float64)
    loss, _ = one_process(hidden, tau)
    total = 0.0
    for i in range(2 * n):
        sim = [F.cosine_similarity(hidden[i], hidden[k], dim=0).item() / tau for k in range(2 * n)]
        denominator = sum(math.exp(sim[k]) for k in range(2 * n) if k != i)     # 2N - 1 terms
        total += -math.log(math.exp(sim[(i + n) % (2 * n)]) / denominator)
    assert loss.item() == pytest.approx(2 * total / (2 * n), rel=1e-12)          # sum of both sides


@pytest.mark.parametrize("n", [4, 256])
def test_eq1_limits(n):
    same = torch.ones(2 * n, 8, dtype=torch.float64)
    assert one_process(same, 0.1)[0].item() == pytest.approx(2 * math.log(2 * n - 1))
    far = torch.randn(2 * n, 8, dtype=torch.float64)
    assert one_process(far, 1e9)[0].item() == pytest.approx(2 * math.log(2 * n - 1))
    a, b = far.chunk(2)
    perm = torch.randperm(n)
    loss = one_process(far, 0.2)[0].item()
    assert one_process(torch.cat([a[perm], b[perm]]), 0.2)[0].item() == pytest.approx(loss)
    assert one_process(torch.cat([b, a]), 0.2)[0].item() == pytest.approx(loss)


def test_memory_loss_by_hand():
    torch.manual_seed(0)
    n, m, tau = 3, 4, 0.5
    z1, z2, k1, k2, queue = (F.normalize(torch.randn(r, 5, dtype=torch.float64), dim=1)
                             for r in (n, n, n, n, m))
    z1.requires_grad_()
    loss, _ = S.nt_xent_memory(z1, z2, k1, k2, queue, 0, tau)
    total = 0.0
    for q, positive, other in ((z1, k2, k1), (z2, k1, k2)):
        for i in range(n):
            pos = torch.exp(q[i] @ positive[i] / tau)
            negatives = [k[j] for k in (positive, other) for j in range(n) if j != i]
            negatives += list(queue)                     # the image's own two keys are no negatives
            below = pos + sum(torch.exp(q[i] @ k / tau) for k in negatives)
            total = total - torch.log(pos / below) / n
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)
    loss.backward()
    assert z1.grad.abs().sum() > 0


@pytest.mark.parametrize("parts", [1, 2])
def test_keys_have_unit_norm_and_no_gradient(parts):
    net, (x1, x2) = tiny_net().train(), two_views()
    keys = S.memory_keys(net, x1, x2, FP32, parts)
    for k in keys:
        assert k.shape == (8, 16) and not k.requires_grad
        close(k.norm(dim=1), torch.ones(8))
    if parts == 1:
        close(torch.cat(keys), F.normalize(net(torch.cat([x1, x2])), dim=1))


def test_memory_is_first_in_first_out():
    queue = torch.zeros(5, 1)
    for step in range(4):  # keys 0 1 | 2 3 | 4 5 | 6 7
        k = torch.tensor([[2.0 * step]])
        S.remember(queue, k, k + 1, step)
        if step == 1:
            assert queue.flatten().tolist() == [0, 1, 2, 3, 0]  # filled from the start
    assert sorted(queue.flatten().tolist()) == [3, 4, 5, 6, 7]
    k = torch.arange(4.0)[:, None]
    S.remember(queue, k, k + 10, 0)  # 8 keys in 5 places
    assert sorted(queue.flatten().tolist()) == [3, 10, 11, 12, 13]


@pytest.mark.parametrize("case", PARITY["distill"]["cases"])
def test_parity_distill(case):
    c, d = PARITY["distill"]["cases"][case], PARITY["distill"]
    for squared, loss_key, grad_key in ((True, "loss_with_tau_sq", "grad_student_with_tau_sq"),
                                        (False, "loss_eq2_mean", "grad_student_eq2")):
        logits = d["student_logits"].clone().requires_grad_()
        loss = S.distill_loss(logits, d["teacher_logits"], c["temperature"], squared)
        loss.backward()
        close(loss, c[loss_key])
        close(logits.grad, c[grad_key], atol=1e-5 * c[grad_key].abs().max().item())


def test_parity_supervised_loss():
    d = PARITY["distill"]
    out = S.label_step(nn.Identity(), d["student_logits"], d["labels"], 0.0, FP32)
    close(out["loss"], d["supervised_loss"])


def test_eq2_and_eq3_by_hand():
    t = torch.tensor([[2.0, 0.0], [0.0, 0.0]], requires_grad=True)
    logits = t.detach().clone().requires_grad_()
    loss = S.distill_loss(logits, t, 0.5)
    p = 1 / (1 + math.exp(-4.0))
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert loss.item() == pytest.approx((entropy + math.log(2)) / 2, rel=1e-6)
    loss.backward()
    assert t.grad is None and logits.grad.abs().max() < 1e-7        # equal logits: at the minimum
    logits_l, y = torch.zeros(3, 2), torch.tensor([0, 1, 1])
    mixed = S.mixed_loss(logits_l, y, torch.zeros(2, 2), t, 0.25, 0.5)
    assert mixed.item() == pytest.approx(0.75 * math.log(2) + 0.25 * math.log(2), rel=1e-6)
    assert S.mixed_loss(logits_l + y[:, None], y, torch.zeros(2, 2), t * 9, 0.0, 1.0).item() \
        == pytest.approx(math.log(2), rel=1e-6)
    assert S.mixed_loss(logits_l * 9, y, logits, t, 1.0, 0.5).item() == pytest.approx(loss.item())


# ----- 5. OPTIMISER AND SCHEDULES --------------------------------------------------------------
def run_lars(c, dtype=torch.float32):
    names = list(c["params_init"])
    params = {n: nn.Parameter(c["params_init"][n].to(dtype)) for n in names}
    out = [n for n in names if n in c["excluded"]]
    groups = [dict(params=[params[n] for n in names if n not in out]),
              dict(params=[params[n] for n in out], adapt=False, weight_decay=0.0)]
    optimiser = S.LARS(groups, momentum=c["momentum"], eta=c["eta"], weight_decay=c["weight_decay"],
                       nesterov=c["nesterov"], lr_in_velocity=c["classic_momentum"])
    for t, lr in enumerate(c["lrs"]):
        for n in names:
            params[n].grad = c["grads"][n][t].to(dtype)
        for group in optimiser.param_groups:
            group["lr"] = lr
        optimiser.step()
        yield t, names, params, optimiser


@pytest.mark.parametrize("case", PARITY["lars"])
def test_parity_lars(case):
    c = PARITY["lars"][case]
    for t, names, params, optimiser in run_lars(c):
        for n in names:
            want = c["params_after"][n][t]
            close(params[n], want, atol=1e-6 * want.abs().max().item())
            want = c["momentum_after"][n][t]
            close(optimiser.state[params[n]]["velocity"], want, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("case", ["pretrain_wd1e-4", "finetune_wd0", "big_wd"])
def test_lars_by_hand_in_float64(case):
    c = PARITY["lars"][case]
    hand = {n: (p.double(), torch.zeros_like(p.double())) for n, p in c["params_init"].items()}
    for t, names, params, _ in run_lars(c, torch.float64):
        for n in names:
            p, v = hand[n]
            g, r = c["grads"][n][t].double(), 1.0
            if n not in c["excluded"]:
                g = g + c["weight_decay"] * p
                if p.norm() > 0 and g.norm() > 0:
                    r = c["eta"] * math.sqrt((p * p).sum()) / math.sqrt((g * g).sum())
            v = c["momentum"] * v + c["lrs"][t] * r * g
            hand[n] = (p - v, v)
            torch.testing.assert_close(params[n].detach(), hand[n][0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_found_inf_changes_nothing(optimizer, bad):
    torch.manual_seed(0)
    def build():
        torch.manual_seed(1)
        net = student_net()
        return net, S.build_optimiser(net, 1e-4, optimizer, distill=True)

    def step(net, optimiser, flag, value=None):
        for i, p in enumerate(net.parameters()):
            p.grad = torch.full_like(p, value) if value is not None else torch.sin(p + i)
        for group in optimiser.param_groups:
            group["lr"] = 0.3
        optimiser.found_inf = flag
        optimiser.step()

    net, optimiser = build()
    twin, plain = build()
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    start = [p.detach().clone() for p in net.parameters()]
    step(net, optimiser, one, bad)                              # at the very first step too
    assert all(torch.equal(a, b) for a, b in zip(start, net.parameters()))
    for _ in range(2):
        step(net, optimiser, zero)
        step(net, optimiser, one, bad)
        step(net, optimiser, one, 1.0)                      # a sound gradient is skipped as well
        step(twin, plain, None)
    for a, b in zip(net.parameters(), twin.parameters()):
        assert torch.equal(a, b)
        assert torch.equal(optimiser.state[a]["velocity"], plain.state[b]["velocity"])


def test_sgd_is_torchs():
    torch.manual_seed(0)
    a, b = nn.Linear(5, 4), nn.Linear(5, 4)
    b.load_state_dict(a.state_dict())
    same_for_both = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    ours = S.LARS(a.parameters(), adapt=False, lr_in_velocity=False, **same_for_both)
    theirs = torch.optim.SGD(b.parameters(), **same_for_both)
    for t in range(5):
        for optimiser, m in ((ours, a), (theirs, b)):
            optimiser.param_groups[0]["lr"] = 0.1 / (t + 1)
            optimiser.zero_grad()
            m(torch.linspace(0, 1, 10).view(2, 5)).square().sum().backward()
            optimiser.step()
    close(a.weight, b.weight, rtol=1e-6)
    close(a.bias, b.bias, rtol=1e-6)


def test_lars_scale_of_the_gradient_does_not_matter():
    torch.manual_seed(0)
    p1, p2 = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    g = torch.randn(3, 3)
    for p, scale in ((p1, 1.0), (p2, 1000.0)):
        optimiser = S.LARS([p], lr=1.0)
        p.grad = g * scale
        optimiser.step()
    close(p1, p2, rtol=1e-6)
    close((p1 - 1).norm(), 0.001 * 3.0, rtol=1e-4)               # eta |p| lr, whatever the gradient


def test_lars_asks_the_host_nothing():
    """No item() and no boolean of a tensor: the meta device cannot answer either."""
    with torch.device("meta"):
        net = student_net()
        optimiser = S.build_optimiser(net, 1e-4, "lars", distill=False)
        for p in net.parameters():
            p.grad = torch.empty_like(p)
        optimiser.found_inf = torch.empty(())
        optimiser.step()


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
@pytest.mark.parametrize("distill", [False, True])
def test_every_parameter_in_one_group(optimizer, distill):
    encoder = S.Encoder("resnet50", 0.125, sk=True)
    net = S.Net(encoder, S.projection_head(encoder.dim)[:1], 10)
    groups = {g["name"]: g for g in S.parameter_groups(net, 0.3, optimizer, distill)}
    ids = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in net.parameters())
    lars = optimizer == "lars"
    assert {n: (g["adapt"], g["weight_decay"]) for n, g in groups.items()} == {
        "kernels": (lars, 0.3), "classifier": (lars and distill, 0.3), "norms": (False, 0.0),
        "biases": (False, 0.0 if lars else 0.3)}
    assert groups["classifier"]["params"][0] is net.classifier.weight
    kernels = {id(p) for p in groups["kernels"]["params"]}
    assert id(encoder.layer1[0].conv2.fc0.weight) in kernels
    assert id(net.head[0][0].weight) in kernels


@pytest.mark.parametrize("distill", [False, True])
def test_momentum_and_trust_of_the_two_optimisers(distill):
    for name, nesterov, inside in (("lars", False, True), ("sgd", True, False)):
        for group in S.build_optimiser(student_net(), 1e-4, name, distill).param_groups:
            assert (group["momentum"], group["eta"]) == (0.9, 0.001)
            assert (group["nesterov"], group["lr_in_velocity"]) == (nesterov, inside)


@pytest.mark.parametrize("case", PARITY["lr_schedule"])
def test_parity_lr_schedule(case):
    c = PARITY["lr_schedule"][case]
    peak = S.peak_lr(c["base_lr"], c["batch_size"], c["scaling"])
    total = S.total_steps(c["num_examples"], c["epochs"], c["batch_size"])
    warmup = S.warmup_steps(c["num_examples"], c["warmup_epochs"], c["batch_size"])
    assert (total, warmup) == (c["total_steps"], c["warmup_steps"])
    for step, lr in zip(c["steps"], c["lr"]):
        assert S.lr_at(int(step), peak, total, warmup) == pytest.approx(float(lr), abs=1e-6 * peak)


def test_lr_ends():
    assert S.lr_at(0, 6.4, 100, 5) == 0 and S.lr_at(5, 6.4, 100, 5) == 6.4
    assert S.lr_at(100, 6.4, 100, 5) == 0 and S.lr_at(999, 6.4, 100, 5) == 0
    assert S.lr_at(0, 0.16, 10, 0) == 0.16
    assert S.peak_lr(0.075, 4096, "sqrt") == pytest.approx(S.peak_lr(0.3, 4096, "linear")) == 4.8


# ----- 6. TRAINING STEP ------------------------------------------------------------------------
def two_views(n=8, seed=3, size=32):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(2, n, 3, size, size, generator=g, dtype=torch.float64)


def gradients(net):
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def same(a, b, tolerance=1e-9):
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=tolerance, atol=tolerance, msg=k)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("memory", [False, True])
def test_accumulation_is_the_plain_step_with_fixed_statistics(parts, memory):
    """Encoder's BatchNorm in eval mode; the head's in training mode: it sees the whole batch."""
    x1, x2 = two_views(8 if parts != 3 else 9)
    keys = queue = None
    if memory:
        keys = S.memory_keys(tiny_net(seed=5), x1, x2, FP32)
        queue = F.normalize(torch.randn(6, 16, dtype=torch.float64), dim=1)
    plain, split = tiny_net(), tiny_net()
    for net in (plain, split):
        net.train()
        net.encoder.eval()
    want = S.pretrain_step(plain, x1, x2, 0.2, FP32, keys, queue)
    want["loss"].backward()
    got = S.pretrain_step_in_parts(split, x1, x2, 0.2, FP32, parts, keys, queue)
    same({k: v.detach() for k, v in want.items()}, got)
    same(gradients(plain), gradients(split))
    same(dict(plain.named_buffers()), dict(split.named_buffers()))


def test_accumulation_has_statistics_per_part_and_moves_running_ones_once():
    x1, x2 = two_views()
    net, by_hand = tiny_net().train(), tiny_net().train()
    got = S.pretrain_step_in_parts(net, x1, x2, 0.2, FP32, 2)
    parts = zip(x1.chunk(2), x2.chunk(2))
    halves = [by_hand.encoder(torch.cat(p)).chunk(2) for p in parts]
    h = torch.cat([halves[0][0], halves[1][0], halves[0][1], halves[1][1]])
    want = S.contrast(by_hand.head(h), 0.2)
    want["loss"].backward()
    same({k: v.detach() for k, v in want.items()}, got)
    same(gradients(by_hand), gradients(net))
    same(dict(by_hand.named_buffers()), dict(net.named_buffers()))


class Scaled(Precision):
    """bf16 autocast, and a scaler that multiplies by 8."""

    def __init__(self):
        super().__init__(torch.device("cpu"), "bf16")
        self.scaler = SimpleNamespace(scale=lambda loss: loss * 8)


def test_accumulation_under_autocast_and_scale():
    x1, x2 = (x.float() for x in two_views())
    plain, split, precision = tiny_net().float().eval(), tiny_net().float().eval(), Scaled()
    want = S.pretrain_step(plain, x1, x2, 0.2, precision)
    assert want["loss"].dtype == torch.float32
    (want["loss"] * 8).backward()
    S.pretrain_step_in_parts(split, x1, x2, 0.2, precision, 2)
    for (name, a), b in zip(gradients(plain).items(), gradients(split).values()):
        assert F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.98, name  # bf16
        assert (a.norm() / b.norm()).item() == pytest.approx(1, abs=0.1), name


def test_one_pass_covers_both_views():
    net = tiny_net().train()
    seen = []
    net.encoder.conv1.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    S.pretrain_step(net, *two_views(), 0.2, FP32)
    assert seen == [16]


def test_distill_step_freezes_the_teacher():
    student, teacher = student_net(), student_net().eval()
    nn.init.normal_(teacher.classifier.weight)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    s = SimpleNamespace(kd_temperature=1.0, kd_tau_squared=0, alpha=1.0)
    x = torch.rand(4, 3, 32, 32)
    out, y_t = S.distill_step(student, teacher, x, s, FP32)
    out["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert torch.equal(y_t, teacher(x).argmax(1))
    assert "classifier" in {g["name"] for g in S.parameter_groups(student, 0, "lars", True)}


@pytest.mark.parametrize("own_images", [True, False])
def test_distill_step_mixes_labels_in_by_alpha(own_images):
    student, teacher = student_net().eval(), student_net().eval()
    for net in (student, teacher):
        nn.init.normal_(net.classifier.weight)
    s = SimpleNamespace(kd_temperature=2.0, kd_tau_squared=0, alpha=0.25)
    x, x_l, y_l = torch.rand(4, 3, 32, 32), torch.rand(3, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    x_l, y_l = (x_l, y_l[:3]) if own_images else (None, y_l)
    loss = S.distill_step(student, teacher, x, s, FP32, x_l, y_l)[0]["loss"]
    labelled = F.cross_entropy(student(x if x_l is None else x_l), y_l)
    taught = F.cross_entropy(student(x) / 2, (teacher(x) / 2).softmax(1))
    close(loss, 0.75 * labelled + 0.25 * taught)
    s.alpha = 1.0  # no label, whatever they are
    wrong = None if y_l is None else 9 - y_l
    losses = [S.distill_step(student, teacher, x, s, FP32, x_l, y)[0]["loss"] for y in (y_l, wrong)]
    close(losses[0], taught)
    assert losses[0] == losses[1]


def test_pretraining_learns_in_a_few_steps():
    net = tiny_net().float().train()
    optimiser = S.build_optimiser(net, 1e-4, "lars", distill=False)
    x1, x2 = (x.float() for x in two_views())
    losses = []
    for step in range(12):
        for group in optimiser.param_groups:
            group["lr"] = S.lr_at(step, 3.0, 12, 2)
        optimiser.zero_grad()
        out = S.pretrain_step(net, x1, x2, 0.2, FP32)
        out["loss"].backward()
        optimiser.step()
        losses.append(out["loss"].item())
    assert losses[-1] < losses[0] - 0.5


# ----- the loop --------------------------------------------------------------------------------


def train(monkeypatch, data, stage, text):
    """run_stage on 8 labelled and 40 unlabelled digits; what each part and update saw."""
    seen = SimpleNamespace(lr=[], grads=[], keys=[], queues=[], key_nets=[], students=[])
    args = parse(f"--width 0.5 --evals 1 --weight-decay 0 {text}")
    s = S.derive(args, stage, 1)
    run = SimpleNamespace(
        rank=0, world=1, device=torch.device("cpu"), device_ids=None, image_size=28, workers=0,
        precision=Precision(torch.device("cpu"), "fp32"), stop=SimpleNamespace(asked=lambda: 0),
        stats=torch.tensor([0.0, 255.0]).view(2, 1, 1, 1), log=Quiet(), results={}, folder=None)
    torch.manual_seed(0)
    model, teacher = (alive(S.build_model(args, x, s, 10)) for x in (stage, "sup"))
    for net in (model, teacher):  # else all logits are nearly equal
        for p in net.classifier.parameters():
            nn.init.normal_(p)
    update, spied = run.precision.update, (S.set_lr, S.train_mode, S.memory_keys, S.pretrain_step)
    set_lr, train_mode, memory_keys, pretrain_step = spied

    def spy_update(optimizer, losses):
        seen.grads.append([p.grad.clone() for g in optimizer.param_groups for p in g["params"]])
        return update(optimizer, losses)

    def spy_set_lr(optimizer, lr):
        seen.lr.append(lr)
        set_lr(optimizer, lr)

    def mode_without_batch_statistics(net, *rest):  # theirs are a part's, not the batch's
        train_mode(net, *rest)
        for m in net.modules():
            m.training = m.training and (stage == "pretrain" or not isinstance(m, _BatchNorm))

    def spy_keys(key_net, *rest):
        assert all(m.training for m in key_net.modules())
        seen.key_nets.append({k: v.clone() for k, v in key_net.state_dict().items()})
        seen.keys.append(memory_keys(key_net, *rest))
        return seen.keys[-1]

    def spy_step(student, x1, x2, tau, precision, keys, queue):
        assert keys is seen.keys[-1]
        seen.students.append({k: v.clone() for k, v in student.state_dict().items()})
        seen.queues.append(queue.clone())
        return pretrain_step(student, x1, x2, tau, precision, keys, queue)

    run.precision.update = spy_update
    for name, spy in (("set_lr", spy_set_lr), ("train_mode", mode_without_batch_statistics),
                      ("memory_keys", spy_keys), ("pretrain_step", spy_step),
                      ("Neighbours", lambda *a: None), ("save", lambda *a: None),
                      ("evaluate", lambda *a: dict(top1=0.0, top5=0.0))):
        monkeypatch.setattr(S, name, spy)
    split = SimpleNamespace(labeled=np.arange(8), unlabeled=np.arange(8, 48))
    teacher = teacher.eval().requires_grad_(False) if stage == "distill" else None
    S.run_stage(stage, model, teacher, data, split, s, args, run, None)
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("stage, more", [
    ("sup", ""), ("finetune", "--optimizer sgd"), ("distill", "--optimizer sgd"),
    ("distill", "--alpha 0.4"), ("distill", "--alpha 0.4 --kd-set labeled"),
])
def test_accumulated_gradients_are_the_mean_over_the_parts(monkeypatch, digits, stage, more):
    flags = f"--batch-size 8 --lr 0.01 --warmup-epochs 0 --epochs 0.25 {more}"
    whole, parts = (train(monkeypatch, digits, stage, f"{flags} --accum-steps {k}") for k in (1, 4))
    assert len(whole.grads) == len(parts.grads) > 0
    largest = max(g.abs().max().item() for g in whole.grads[0])
    assert largest > 0.01
    for a, b in zip(whole.grads[0], parts.grads[0]):
        close(b, a, atol=1e-5 * largest)


def test_the_learning_rate_is_that_of_the_update(monkeypatch, digits):
    flags = "--batch-size 8 --epochs 3 --warmup-epochs 2 --lr 1e-4"
    for parts in (1, 2):  # three passes over the eight images, and one update more
        seen = train(monkeypatch, digits, "sup", f"{flags} --accum-steps {parts}").lr
        assert seen == pytest.approx(np.repeat([0, 5e-5, 1e-4, 5e-5], parts))


def test_the_memory_in_the_loop(monkeypatch, digits):
    """D1: the first update has no memory yet; then it is the last 40 keys of earlier updates."""
    flags = "--memory-size 40 --ema-decay 0.6 --batch-size 8 --epochs 1 --lr 1 --warmup-epochs 0"
    seen = train(monkeypatch, digits, "pretrain", flags)
    assert len(seen.keys) == len(seen.queues) == 6
    old = torch.zeros(0, 128)
    for keys, queue in zip(seen.keys, seen.queues):
        assert len(queue) == min(len(old), 40)
        close(sorted(queue.tolist()), torch.tensor(sorted(old[-40:].tolist())))
        close(torch.cat(keys).norm(dim=1), torch.ones(16))
        old = torch.cat([old, *keys])
    name = "head.0.0.weight"
    average = seen.students[0][name]
    assert torch.equal(seen.key_nets[0][name], average)
    for student, key_net in zip(seen.students[1:], seen.key_nets[1:]):
        average = 0.6 * average + 0.4 * student[name]  # after the update
        close(key_net[name], average)
        assert not torch.equal(key_net[name], student[name])


# ----- processes -------------------------------------------------------------------------------


def worker(job, folder):
    """In a child of a world: what job(rank, world) returns, for the test to look at."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        torch.save(job(rank, dist.get_world_size()), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_processes(job, count, tmp_path):
    world(worker, count * [(job, str(tmp_path))], tmp_path / "children")
    return [torch.load(tmp_path / f"{r}.pt") for r in range(count)]


def job_gather_parity(rank, world):
    out = {}
    for name, c in PARITY["nt_xent_multi_replica"].items():
        if c["num_replicas"] == world:
            hidden = c["hidden"][rank].clone().requires_grad_()
            losses = S.contrast(hidden, c["temperature"])
            losses["loss"].backward()
            out[name] = losses["loss"].detach(), hidden.grad / world
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_gather_with_processes_against_the_authors(world, tmp_path):
    outs = on_processes(job_gather_parity, world, tmp_path)
    assert outs[0]
    for name in outs[0]:
        c = PARITY["nt_xent_multi_replica"][name]
        for rank in range(world):
            close(outs[rank][name][0], c["loss_per_replica"][rank])
            close(outs[rank][name][1], c["grad_of_mean_loss"][rank], atol=1e-6)


def one_step(x1, x2, sk, memory, ddp=False):
    net = tiny_net(sk).train()
    keys = queue = None
    if memory:
        keys = S.memory_keys(tiny_net(sk, seed=5).train(), x1, x2, FP32)
        g = torch.Generator().manual_seed(1)
        queue = F.normalize(torch.randn(6, 16, generator=g, dtype=torch.float64), dim=1)
    model = nn.parallel.DistributedDataParallel(net) if ddp else net
    out = S.pretrain_step(model, x1, x2, 0.2, FP32, keys, queue)
    out["loss"].backward()
    return {k: v.detach() for k, v in out.items()}, gradients(net), dict(net.named_buffers())


def job_plain(rank, world):
    x1, x2 = (x.chunk(world)[rank] for x in two_views())
    return {(sk, memory): one_step(x1, x2, sk, memory, ddp=True)
            for sk in (False, True) for memory in (False, True)}


def test_two_processes_equal_one(tmp_path):
    """float64, global BatchNorm in training mode: losses, gradients, statistics (R9)."""
    outs = on_processes(job_plain, 2, tmp_path)
    for key in outs[0]:
        losses, grads, buffers = one_step(*two_views(), *key)
        for name in losses:
            close(sum(out[key][0][name] for out in outs) / 2, losses[name], rtol=1e-9)
        for out in outs:
            same(grads, out[key][1], 1e-6)
            same(buffers, out[key][2], 1e-9)
        assert max(g.abs().max() for g in grads.values()) > 1e-3


def local_encoder(net):
    """The encoder's BatchNorm per process: torch's own, whatever the number of processes."""
    for m in net.encoder.modules():
        if isinstance(m, S.GlobalBatchNorm):
            m.__class__ = nn.BatchNorm2d
    return net


def job_local(rank, world):
    x1, x2 = (x.chunk(world)[rank] for x in two_views())
    net = local_encoder(tiny_net().train())
    S.pretrain_step(net, x1, x2, 0.2, FP32)["loss"].backward()
    S.average_gradients(net)
    return gradients(net)


def test_accumulation_is_as_many_processes_with_local_statistics(tmp_path):
    outs = on_processes(job_local, 2, tmp_path)
    net = tiny_net().train()
    S.pretrain_step_in_parts(net, *two_views(), 0.2, FP32, 2)
    for grads in outs:
        same(gradients(net), grads, 1e-6)


def job_accumulated(rank, world):
    x1, x2 = (x.chunk(world)[rank] for x in two_views())
    net = tiny_net().train()
    net.encoder.eval()
    out = S.pretrain_step_in_parts(net, x1, x2, 0.2, FP32, 2)
    S.average_gradients(net)
    return out, gradients(net)


def test_accumulation_on_two_processes(tmp_path):
    outs = on_processes(job_accumulated, 2, tmp_path)
    net = tiny_net().train()
    net.encoder.eval()
    want = S.pretrain_step(net, *two_views(), 0.2, FP32)
    want["loss"].backward()
    close(sum(out[0]["loss"] for out in outs) / 2, want["loss"].detach(), rtol=1e-9)
    for out in outs:
        same(gradients(net), out[1], 1e-6)


def job_batch_norm(rank, world):
    torch.manual_seed(0)
    x = torch.randn(7, 3, 4, 4, dtype=torch.float64) * 3 + 5
    mine = (x[:2] if rank == 0 else x[2:]).clone().requires_grad_()          # uneven shares
    out = {}
    for beta in (True, False):
        bn = S.GlobalBatchNorm(3, beta).double()
        nn.init.uniform_(bn.weight, generator=torch.Generator().manual_seed(1))
        y = bn(mine)
        y.pow(3).sum().backward()
        out[beta] = y.detach(), mine.grad.clone(), bn.running_mean, bn.running_var, bn.weight.grad
        mine.grad = None
    bn = S.GlobalBatchNorm(3)
    half = bn(mine.detach().bfloat16())
    out["bf16"] = half.dtype, half.float(), bn.running_mean
    out["2d"] = S.GlobalBatchNorm(3)(mine.detach().float().mean((2, 3)))
    return out


def test_global_batch_norm_with_uneven_replicas(tmp_path):
    outs = on_processes(job_batch_norm, 2, tmp_path)
    torch.manual_seed(0)
    x = (torch.randn(7, 3, 4, 4, dtype=torch.float64) * 3 + 5).requires_grad_()
    for beta in (True, False):
        bn = nn.BatchNorm2d(3).double()
        nn.init.uniform_(bn.weight, generator=torch.Generator().manual_seed(1))
        x.grad = None
        y = bn(x)
        y.pow(3).sum().backward()
        got = [torch.cat([out[beta][i] for out in outs]) for i in (0, 1)]
        torch.testing.assert_close(got[0], y.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got[1], x.grad, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(outs[0][beta][2], bn.running_mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(outs[1][beta][3], bn.running_var, rtol=1e-10, atol=0)
        grad = outs[0][beta][4] + outs[1][beta][4]
        torch.testing.assert_close(grad, bn.weight.grad, rtol=1e-9, atol=1e-9)
    dtype, half, mean = outs[0]["bf16"]
    assert dtype == torch.bfloat16 and mean.dtype == torch.float32
    reference = nn.BatchNorm2d(3)(x.detach().bfloat16().float())
    assert (half - reference[:2]).abs().max() < 0.03                         # bf16 output rounding
    close(mean, x.detach().bfloat16().float().mean((0, 2, 3)) * 0.1, rtol=1e-5)
    flat = nn.BatchNorm1d(3)(x.detach().float().mean((2, 3)))
    close(torch.cat([out["2d"] for out in outs]), flat, rtol=1e-4, atol=1e-5)


# ----- runs ------------------------------------------------------------------------------------


def lines_of(folder, stage):
    return [x for x in numbers(folder) if x.get("stage") == stage]


@pytest.mark.parametrize("more", ["--memory-size 0", ""])
def test_pretraining_on_two_processes_is_that_on_one(more, tiny, tmp_path):
    """Through the loop: losses, weights and BatchNorm's buffers (R9); nothing drawn but views."""
    argv = SCRIPT.argv(tiny, f"--stage pretrain --blur 0 --lr 1e-3 --print-every 1 {more}")
    ends("simclrv2", argv, tmp_path / "one")
    world(run_script, 2 * [("simclrv2", argv)], tmp_path / "two")
    folders = [only_run(tmp_path / k) for k in ("one", "two")]
    one, two = ([x["loss"] for x in lines_of(f, "pretrain") if "loss" in x] for f in folders)
    np.testing.assert_allclose(one, two, rtol=1e-4)
    assert len(one) == 8 and max(one) - min(one) > 1e-3
    states = [checkpoint.load_newest(f)["model"] for f in folders]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("more", ["--memory-size 0", ""])
def test_pretraining_in_parts_on_two_processes_is_that_on_one(more, tiny, tmp_path):
    """Four parts on one process are two parts on each of two: a part's statistics are global."""
    argv = SCRIPT.argv(tiny, f"--stage pretrain --blur 0 --lr 1e-3 --print-every 1 {more}")
    argv += ["--accum-steps", "2"]
    ends("simclrv2", argv, tmp_path / "one")
    world(run_script, 2 * [("simclrv2", argv)], tmp_path / "two")
    losses = [[x["loss"] for x in lines_of(only_run(tmp_path / k), "pretrain") if "loss" in x]
              for k in ("one", "two")]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_a_run_carries_weights_from_stage_to_stage(straight):
    state = checkpoint.load_newest(straight(SCRIPT))
    assert state["stage"] == "distill" and state["carried"].keys() == {"pretrain", "finetune"}
    pretrained, tuned = state["carried"]["pretrain"], state["carried"]["finetune"]
    assert pretrained["encoder.bn1.num_batches_tracked"] == 8
    assert tuned["encoder.bn1.num_batches_tracked"] == 16  # its statistics go on moving
    assert state["model"]["encoder.bn1.num_batches_tracked"] == 8  # the student's begin anew
    assert "head.2.0.weight" in pretrained and "head.1.0.weight" not in tuned
    assert "head.0.0.weight" in tuned and "head.0.0.weight" not in state["model"]


def test_fine_tuning_without_a_step_is_the_pretrained_network(tiny, tmp_path):
    ends("simclrv2", SCRIPT.argv(tiny, "--method finetune --lr pretrain=1,finetune=0"), tmp_path)
    state = checkpoint.load_newest(only_run(tmp_path))
    given, now = state["carried"]["pretrain"], state["model"]
    same = [k for k in now if "running" not in k and "tracked" not in k and "classifier" not in k]
    assert len(same) > 20 and all(torch.equal(now[k], given[k]) for k in same)
    assert (now["classifier.weight"] == 0).all()


@pytest.mark.parametrize("stage", ["linear", "finetune"])
def test_a_stage_alone_is_that_of_the_whole_run(stage, tiny, straight, tmp_path):
    argv = SCRIPT.argv(tiny, f"--stage {stage} --init {straight(SCRIPT)}")
    ends("simclrv2", argv, tmp_path)
    assert lines_of(only_run(tmp_path), stage) == lines_of(straight(SCRIPT), stage)


@pytest.mark.parametrize("kept", [-1, 0, 2])
def test_a_finished_run_is_read_back_with_the_layers_it_kept(kept, tiny, straight, tmp_path):
    argv = f"--stage finetune --init {straight(SCRIPT)} --ft-proj-selector {kept}"
    ends("simclrv2", SCRIPT.argv(tiny, argv), tmp_path)
    model, about = S.load_final(str(only_run(tmp_path)), "--eval")
    state = checkpoint.load_newest(only_run(tmp_path))["model"]
    assert about["head"] == [3, kept % 4] and len(model.head) == kept % 4
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.classifier.in_features == (128 if kept == -1 else 64)


def test_a_finished_run_teaches_as_the_run_itself_does(tiny, straight, tmp_path):
    ends("simclrv2", SCRIPT.argv(tiny, "--method finetune --output teacher"), tmp_path)
    ends("simclrv2", SCRIPT.argv(tiny, "--stage distill --teacher teacher"), tmp_path)
    assert lines_of(only_run(tmp_path), "distill") == lines_of(straight(SCRIPT), "distill")
    # another student, of the first one's student, starts from its pretrained weights
    argv = SCRIPT.argv(tiny, f"--stage distill --teacher {only_run(tmp_path)} --output next"
                       f" --init {straight(SCRIPT)} --student-init pretrained --kd-set labeled")
    ends("simclrv2", argv, tmp_path)
    losses = [x["loss"] for x in lines_of(tmp_path / "next", "distill") if "loss" in x]
    assert losses and np.isfinite(losses).all()


@pytest.fixture(scope="module")
def pretrained(tiny, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("pretrained")
    ends("simclrv2", SCRIPT.argv(tiny, "--stage pretrain"), cwd)
    return only_run(cwd)


@pytest.mark.parametrize("flags, said", [
    ("--stage finetune", "--stage finetune: needs --init"),
    ("--stage distill", "--stage distill: needs --teacher"),
    ("--stage pretrain --predict .", "--predict: stage pretrain has no classifier"),
    ("--eval {pretrained}", "--eval {pretrained}: stage pretrain has no classifier"),
    ("--stage distill --teacher {pretrained}", "--teacher {pretrained}: stage pretrain has no"),
    ("--stage linear --init {pretrained} --width 1", "--init {pretrained}"),
    ("--stage distill --teacher nowhere", "--teacher nowhere: no such folder"),
    ("--stage distill --teacher {pretrained} --student-init pretrained", "--student-init"),
    ("--stage sup --init {pretrained}", "--init {pretrained}: stage sup starts from scratch"),
    ("--stage distill --teacher x --init {pretrained}", "--init {pretrained}: stage distill"),
    ("--method linear --teacher {pretrained}", "--teacher {pretrained}: nothing is distilled"),
    ("--predict nowhere", "--predict nowhere: no such picture or folder"),
    ("--stage sup --width 0.05", "--width 0.05: the first stage of resnet_digits"),
])  # fmt: skip
def test_what_cannot_be_done_is_one_line(flags, said, tiny, pretrained, tmp_path):
    flags, said = (text.format(pretrained=pretrained) for text in (flags, said))
    child = ends("simclrv2", SCRIPT.argv(tiny, flags), tmp_path, 2)
    assert child.err.startswith(f"error: {said}") and child.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()  # refused before a folder is made


def test_a_run_of_labels_alone_holds_no_pretrained_weights(tiny, tmp_path):
    ends("simclrv2", SCRIPT.argv(tiny, "--method sup --output sup"), tmp_path)
    child = ends("simclrv2", SCRIPT.argv(tiny, "--stage linear --init sup"), tmp_path, 2)
    assert "--init sup: this run has no pretrained weights, only sup" in child.err


def other_labels(script, wrong):
    """The labels of all images that are not labelled become `wrong`."""
    choose = script.flags.choose_split

    def choose_and_change(args, data, pool, percent):
        split = choose(args, data, pool, percent)
        hidden = np.setdiff1d(np.arange(len(data.train)), split.labeled)
        data.train.targets[hidden] = wrong
        return split

    script.flags.choose_split = choose_and_change


def test_labels_of_unlabelled_images_change_nothing_but_one_logged_number(tiny, straight, tmp_path):
    ends("simclrv2", SCRIPT.argv(tiny), tmp_path, setup=other_labels, setup_arguments=(3,))
    seen = [numbers(straight(SCRIPT)), numbers(only_run(tmp_path))]
    assert any(a != b for a, b in zip(*seen))
    for lines in seen:
        for line in lines:
            line.pop("teacher_acc", None)
    assert seen[0] == seen[1]


CHANGES = {  # flags that must change the first losses of a stage
    "pretrain": "--epochs 2; --batch-size 4; --optimizer sgd; --lr 0.5; --warmup-epochs 0.4;"
    " --weight-decay 0.5; --crop-min 0.9; --jitter-strength 0.1; --blur 0; --temperature 0.5;"
    " --memory-size 0; --memory-size 20; --ema-decay 0; --unlabeled-pool rest; --proj-layers 2",
    "sup": "--epochs 9; --batch-size 4; --optimizer lars; --lr 0.5; --warmup-epochs 1;"
    " --weight-decay 0.5; --crop-min 0.9; --augment strong; --label-smoothing 0.1",
    "linear": "--epochs 9; --batch-size 4; --optimizer lars; --lr 0.1; --warmup-epochs 1;"
    " --weight-decay 0.5; --crop-min 0.9; --augment strong; --label-smoothing 0.1;"
    " --ft-proj-selector 1",
    "finetune": "--epochs 9; --batch-size 4; --optimizer sgd; --lr 0.5; --warmup-epochs 1;"
    " --weight-decay 0.5; --crop-min 0.9; --augment strong; --label-smoothing 0.1;"
    " --ft-proj-selector 0; --ft-proj-selector 2; --follow D3=code",
    "distill": "--epochs 2; --batch-size 4; --optimizer sgd; --lr 0.1; --warmup-epochs 0.4;"
    " --weight-decay 0.5; --crop-min 0.9; --augment strong; --alpha 0.9; --alpha 1;"
    " --kd-temperature 3; --student-init pretrained; --unlabeled-pool rest; --follow D4=code;"
    " --kd-set labeled --epochs 2.8 --warmup-epochs 0.8",  # as many updates, the same rates
}


def run_each(base, changes):
    """In a child: six updates with each of the changed flags, into folders 0, 1, ..."""
    for k, change in enumerate(changes):
        with contextlib.suppress(SystemExit):
            argv = [*base, *change.split(), "--output", str(k), "--stop-after", "6"]
            run_script("simclrv2", argv)


def test_each_stage_has_its_optimiser_and_trains_what_it_says(tiny, straight, tmp_path):
    run = straight(SCRIPT)
    starts = dict(pretrain="", sup="", linear=f"--init {run}", finetune=f"--init {run}",
                  distill=f"--teacher {run}")
    flags = [f"--stage {stage} {start}" for stage, start in starts.items()]
    child = Child(run_each, SCRIPT.argv(tiny), flags, cwd=tmp_path)
    assert child.wait() == 0, child.err
    states = [checkpoint.load_newest(tmp_path / str(k)) for k in range(5)]
    found = {x["stage"]: {g["name"]: (g["adapt"], g["weight_decay"], g["nesterov"])
                          for g in x["optimizer"]["param_groups"]} for x in states}
    excluded, sgd = (False, 0.0, False), (False, 1e-4, True)
    assert found == {
        "pretrain": dict(kernels=(True, 1e-4, False), norms=excluded),
        "sup": dict(kernels=sgd, classifier=sgd, norms=(False, 0.0, True), biases=sgd),
        "linear": dict.fromkeys(("classifier", "biases"), (False, 1e-6, True)),  # f is fixed
        "finetune": dict(kernels=(True, 0.0, False), classifier=excluded, norms=excluded,
                         biases=excluded),
        "distill": dict(kernels=(True, 1e-4, False), classifier=(True, 1e-4, False),  # E6
                        norms=excluded, biases=excluded),
    }
    given, now = states[2]["carried"]["pretrain"], states[2]["model"]
    assert all(torch.equal(v, given[k]) for k, v in now.items() if k.startswith("encoder"))  # E7
    assert now["classifier.weight"].any()


@pytest.mark.parametrize("stage", CHANGES)
def test_every_setting_of_a_stage_reaches_its_updates(stage, tiny, straight, tmp_path):
    """No flag that does nothing: each changes the losses, but the first change, which is none."""
    start = dict(distill=f"--teacher {straight(SCRIPT)}", pretrain="", sup="")
    base = SCRIPT.argv(tiny, f"--stage {stage} " + start.get(stage, f"--init {straight(SCRIPT)}"))
    changes = ["", *(c.strip() for c in CHANGES[stage].split(";"))]
    pretrained = f" --init {straight(SCRIPT)}"
    given = [c + pretrained if "pretrained" in c else c for c in changes]
    child = Child(run_each, base, given, cwd=tmp_path)
    assert child.wait() == 0, child.err
    losses = [[x["loss"] for x in lines_of(tmp_path / str(k), stage) if "loss" in x]
              for k in range(len(changes))]
    if stage != "distill":  # there it has another teacher
        whole = [x["loss"] for x in lines_of(straight(SCRIPT), stage) if "loss" in x]
        assert losses[0] == whole[:3]
    unchanged = [c for c, x in zip(changes[1:], losses[1:]) if x == losses[0] or len(x) != 3]
    assert not unchanged
    named = {f"--{n.replace('_', '-')}" for n in S.SETTINGS if stage in S.ONLY_IN.get(n, S.STAGES)}
    missing = named - {c.split()[0] for c in changes[1:]} - {"--lr-base", "--lr-scaling"}
    assert not missing  # those two make the default of --lr


def steps_see_no_label(script):
    """Eq. 2 alone: a distillation step is given no label at all."""
    step = script.distill_step

    def watched(student, teacher, x, s, precision, x_l=None, y_l=None):
        assert x_l is None and y_l is None
        return step(student, teacher, x, s, precision)

    script.distill_step = watched


def test_distilling_without_labels_is_given_none(tiny, straight, tmp_path):
    argv = SCRIPT.argv(tiny, f"--stage distill --teacher {straight(SCRIPT)} --alpha 1")
    ends("simclrv2", argv, tmp_path, setup=steps_see_no_label)
    assert "teacher_acc" in lines_of(only_run(tmp_path), "distill")[0]


def test_the_teachers_accuracy_is_logged_where_all_classes_are_known(tiny, straight, tmp_path):
    argv = SCRIPT.argv(tiny, f"--stage distill --teacher {straight(SCRIPT)} --stop-after 2")
    ends("simclrv2", argv, tmp_path, setup=other_labels, setup_arguments=(-1,))
    (line,) = [x for x in lines_of(only_run(tmp_path), "distill") if "loss" in x]
    assert "agreement" in line and "teacher_acc" not in line


@pytest.mark.parametrize("parts, compiled", [(1, ["Net"]), (2, ["Encoder", "Sequential"])])
def test_what_a_step_calls_is_compiled(parts, compiled, tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(nn.Module, "compile", lambda m, **how: seen.append(type(m).__name__))
    flags = f"--stage pretrain --compile --accum-steps {parts} --stop-after 1 --output {tmp_path}/r"
    with pytest.raises(SystemExit):
        S.main(S.parse_args(SCRIPT.argv(tiny, flags)))
    assert seen == compiled


def test_a_plain_resnet_is_timms(tiny, tmp_path):
    """model.safetensors of stage sup, as the README says; and --eval and --teacher read it too."""
    import timm
    from safetensors import safe_open

    argv = (
        f"--data-path {tiny} --arch resnet50 --image-size 48 --num-labels 20 --method sup"
        " --epochs 0.3 --batch-size 8 --warmup-epochs 0 --lr 0.01 --evals 1"
    )
    ends("simclrv2", argv.split(), tmp_path)
    folder = only_run(tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as f:
        about = json.loads(f.metadata()["model"])
    model = timm.create_model(about["timm_model"], checkpoint_path=folder / "model.safetensors",
                              **about["timm_arguments"]).eval()
    ours, again = S.load_final(str(folder), "--eval")
    x = torch.rand(2, 3, 48, 48)
    close(ours.eval()(x), model(x))
    assert again == about and about["image_size"] == 48 and about["std"] == [1, 1, 1]


def test_neighbours_are_judged_by_labelled_images_alone():
    class Identity(nn.Module):
        def forward(self, x):
            return x

    scores = S.Neighbours.__new__(S.Neighbours)
    nn.Module.__init__(scores)
    scores.encoder, scores.num_classes = Identity(), 3
    scores.h = F.normalize(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), dim=1)
    scores.y = torch.tensor([0, 0, 2])
    found = scores(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    close(found, [[1.0, -1.0, 0.0], [0.6, -1.0, 1.0]])  # the nearest of a class; none: -1


def test_evaluation_restores_the_mode_of_every_module():
    net = student_net()
    S.train_mode(net, "linear")
    before = {m: m.training for m in net.modules()}
    with S.evaluating(net):
        assert not any(m.training for m in net.modules())
    assert before == {m: m.training for m in net.modules()}
    assert net.training and not net.encoder.training
