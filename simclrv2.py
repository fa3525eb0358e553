"""SimCLRv2 (Chen et al., NeurIPS 2020, arXiv:2006.10029): contrast, fine-tune, distill a ResNet.

  stage pretrain   all images, no labels                                          Sec. 2, Eq. 1
    x --crop, flip, colour, blur--> x_1 --+              h              z_1 --+
      --crop, flip, colour, blur--> x_2 --+--> f, ResNet --> g, 3 layers      +--> NT-Xent / tau
                             one pass, BatchNorm over all images       z_2 --+     over all replicas
  stage finetune   the labelled images                                                   Sec. 2
    x_l --crop, flip--> f --> h --> first layer of g --> linear, zero at first --> CE(., y)
  stage distill    all images, no labels unless alpha < 1                             Eq. 2, 3
    x --crop, flip--+--> teacher, frozen --> softmax(. / tau) = P^T --+
                    +--> student f --> linear, softmax(. / tau) = P^S --+--> - sum P^T log P^S
    the fine-tuned network teaches the same ResNet without g (tau 0.1), that one a small one (tau 1)
  baselines        sup: the labels alone, from scratch; linear: a classifier on h, f fixed  Table 1

Notation  N images of the global batch, 2N views; R replicas (processes), b = N / R; K classes
          h (2b, D) representation; z (2b, 128) output of g; tau temperature
          P^T, P^S probabilities of teacher and student; alpha weight of the distillation loss

How to run
  python simclrv2.py                                      80 labelled digits, minutes on a laptop
  python simclrv2.py --data-path DIR --predict NEW        own pictures: labeled/<class>/, unlabeled/
  python simclrv2.py --arch resnet152 --width 3 --sk --labels 1 --dry-run    which recipe, what cost
  torchrun --nproc-per-node 8 simclrv2.py --dataset imagenet --data-path DIR \\
      --arch resnet50 --labels 1

  The paper's rows (--dataset imagenet --data-path DIR), top-1 as the paper states it
    --arch resnet50 --labels 1                  57.9   --labels 10   68.4   Table 1, fine-tuned
    --arch resnet152 --width 3 --sk --labels 1  74.9   --labels 10   80.1
      the same at the end of stage distill      76.6                 80.9   Table 3, self-distilled
    --arch resnet50 --labels 1 --stage distill --teacher RUN, that run    73.9   Table 3
    --arch resnet50 --labels 100 --stage linear --init RUN                71.7   Table 1
  Its networks were pretrained with the memory (--follow D1=paper; about a point, Sec. 2).

Departures. D1 to D5, where paper and authors' code disagree, are the table DEPARTURES below, chosen
with --follow. The rest, decided once:
  E1  The loss is the sum of both sides, twice the mean of Eq. 1 over the 2N views (code).
  E2  Temperature 0.1, 128 outputs, BatchNorm but no bias in g, no beta in its last, the trust
      coefficient 0.001; convolutions start from a truncated normal of variance 1 / fan-in, dense
      layers from N(0, 0.01^2), the last BatchNorm of a branch from 0: code, the paper is silent.
  E3  Pixels stay in [0, 1], without mean and deviation (code; the released weights expect it).
  E4  Crop and colour are torchvision's. The code's crops are smaller (on 375 x 500 a mean area of
      0.39, torchvision's 0.43), its contrast turns about each channel's mean, its saturation is
      that of HSV; its resizing is not antialiased. None of it is a switch.
  E5  Blur as in the code: one sigma for a view of a replica's batch, each image with probability
      0.5, zeros beyond the border, no blur on CIFAR.
  E6  LARS does not adapt the classifier in fine-tuning, and does in distillation (code, notebook).
  E7  The linear classifier: f in evaluation mode, SGD (README, TF1); TF2 moves its statistics.
  E8  The student starts from scratch, not from the pretrained weights (Table 2's 12.3 with labels
      alone is a level from scratch; the paper does not say). --student-init pretrained. So do the
      recipes measured on CIFAR-10 and Imagenette, where a run has such weights; they also distill
      with AutoAugment, and at 1% of CIFAR-10 fine-tune with it: the paper has crop and flip alone.
  E9  Of alpha and the labelled batch of Eq. 3 nothing is said: 1, which is Eq. 2, and N. Nor how
      long --kd-set labeled trains: here as many passes over its images, at 1% a hundredth of the
      updates.
  E10 T = floor(images x epochs / N) + 1 updates, and batches straddle passes (code).
  E11 The running variance is torch's, unbiased; theirs is biased.
  E12 Stage sup, 1% and 10%: AutoAugment and label smoothing (Fig. 4), here with any part of
      ImageNet's labels; the amount, 0.1, and 5 epochs of warm-up are ours. SGD, its rate, batch and
      1e-4 are the authors' answers to users, the 90 epochs Table 1's, all for 100%; that 1% and 10%
      keep them is ours.
  E13 resnet_digits is ours: four blocks of 16 to 128 channels, 0.3M parameters.
  E14 --labels draws a share of each class (12,820 and 128,118 of ImageNet's images), not the
      paper's subset: --labels-file takes its published lists (12,811 and 128,116).

--accum-steps: g and NT-Xent see the whole batch with all its negatives (two passes, representations
kept in between); the BatchNorm statistics of f are then per part. In the other stages those of all
layers are. Nothing else changes.
"""

import argparse
import contextlib
import json
import math
import os
import random
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import lecun_normal_
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import transforms as T
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1, conv3x3
from torchvision.transforms.functional import pil_to_tensor

from common import checkpoint, flags, log, report, weights
from common.amp import Precision, pick_device
from common.data import load_dataset
from common.ema import Ema
from common.pictures import BadImages
from common.split_lists import list_name
from common.splits import UserError
from common.streams import Stream, eval_loader, seed_of, stream_loader

# ===== 1. CONFIG  (paper Sec. 3.1; authors' README where it says so) ==============================

SCRIPT = "simclrv2"
CHECKPOINTS = checkpoint.NEWEST, checkpoint.PREVIOUS
STAGES = ("pretrain", "sup", "linear", "finetune", "distill")
METHODS = {"sup": {}, "linear": {}, "finetune": {}, "simclrv2": {}}  # no setting differs [Table 1]
PUBLISHED = {"SimCLR 1percent.txt": 1, "SimCLR 10percent.txt": 10}  # lists     [Sec. 3.1, note 3]
PIPELINES = {  # their stages; with --init, pretrain is left out                           [Table 1]
    "sup": ("sup",),
    "linear": ("pretrain", "linear"),
    "finetune": ("pretrain", "finetune"),
    "simclrv2": STAGES,
}
ARCHS = {  # name: block, blocks per stage, channels of the first stage at width 1
    "resnet_digits": (BasicBlock, (1, 1, 1, 1), 16),
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),  # torchvision's has its stride on the 3x3 too
    "resnet101": (Bottleneck, (3, 4, 23, 3), 64),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 64),
    "resnet200": (Bottleneck, (3, 24, 36, 3), 64),
}
DATASETS = {  # pixels, classes, training images
    "digits": (28, 10, 8000),
    "cifar10": (32, 10, 50000),
    "cifar100": (32, 100, 50000),
    "imagenette": (112, 10, 9469),
    "food101": (224, 101, 75750),
    "inat2019": (224, 1010, 265213),
    "imagenet": (224, 1000, 1281167),
    "folder": (224, None, None),
}


def _by(default, **of_stage):
    return dict.fromkeys(STAGES, default) | of_stage


SETTINGS = {  # name: (type, default of each stage, help); a recipe row or a flag changes them
    "epochs": (float, _by(90.0, pretrain=800.0, finetune=30.0, distill=400.0),
        "passes over all images (pretrain, distill), or the labelled ones (other stages, and "
        "--kd-set labeled) [Sec. 3.1]"),
    "batch_size": (int, _by(4096, finetune=1024),
        "images per update, over all processes and parts; two views each in pretrain [Sec. 3.1]"),
    "optimizer": (str, _by("lars", sup="sgd", linear="sgd"),
        "lars, or sgd with Nesterov momentum (sup, linear) [Sec. 3.1; authors' README]"),
    "lr": (float, _by(None), "peak learning rate, instead of --lr-base [Sec. 3.1]"),
    "lr_base": (float, _by(0.1, finetune=0.005),
        "learning rate before scaling by the batch; 0.002 in finetune where wider or SK "
        "[Sec. 3.1]"),
    "lr_scaling": (str, _by("sqrt", sup="linear", linear="linear"),
        "sqrt: base x sqrt(batch); linear: base x batch / 256 [Sec. 3.1; authors' code]"),
    "warmup_epochs": (float, _by(0.0, pretrain=40.0, sup=5.0, distill=20.0),
        "linear warm-up from 0, then half a cosine to 0 [Sec. 3.1: 5%%]"),
    "weight_decay": (float, _by(1e-4, finetune=0.0, linear=1e-6),
        "with lars on kernels alone, with sgd on all but BatchNorm [Sec. 3.1; authors' code]"),
    "crop_min": (float, _by(0.08), "smallest area of a random crop [authors' code]"),
    "augment": (str, _by("weak"),
        "weak: crop and flip; strong: AutoAugment too; digits: crop, or slight turns and shifts; "
        "not in pretrain [Sec. 3.1; Fig. 4]"),
    "jitter_strength": (float, _by(1.0), "of the colours in pretrain; CIFAR 0.5 [authors' code]"),
    "blur": (float, _by(0.5), "share of blurred views in pretrain; CIFAR 0 [authors' code]"),
    "temperature": (float, _by(0.1),
        "tau of Eq. 1; higher looks less at the hardest negatives [authors' code: 0.1; CIFAR 0.5]"),
    "memory_size": (int, _by(0),
        "negatives kept from earlier batches, outputs of an averaged network [Sec. 3.1: 65536; "
        "Fig. D.1]"),
    "ema_decay": (float, _by(0.999), "of the network that fills the memory [Sec. 3.1]"),
    "ft_proj_selector": (int, _by(0, finetune=1),
        "layers of g that are kept, -1: all; 0 at 100%% of the labels [Sec. 3.1; Fig. 5, E.1]"),
    "label_smoothing": (float, _by(0.0), "of the labels [Fig. 4: stage sup at 1%% and 10%%]"),
    "alpha": (float, _by(1.0), "weight of the teacher beside the labels; 1: no label [Eq. 3]"),
    "kd_temperature": (float, _by(None),
        "tau of Eq. 2; default 0.1 where teacher and student are the same network, else 1 "
        "[Sec. 3.1]"),
    "kd_set": (str, _by("all"), "images to distill on: all, or labeled: the epochs are then passes "
        "over those alone [Table 2]"),
    "student_init": (str, _by("scratch"), "scratch or pretrained [the paper is silent]"),
}
ONLY_IN = {  # settings that other stages do not have
    **dict.fromkeys(("jitter_strength", "blur", "temperature", "memory_size", "ema_decay"),
                    ("pretrain",)),
    "ft_proj_selector": ("linear", "finetune"),
    "freeze_proj": ("finetune",),
    "label_smoothing": ("sup", "linear", "finetune"),
    "augment": ("sup", "linear", "finetune", "distill"),
    **dict.fromkeys(("alpha", "kd_temperature", "kd_set", "student_init", "kd_tau_squared"),
                    ("distill",)),
    "unlabeled_pool": ("pretrain", "distill"),
}
_ANSWERS = "authors' answers, E12"
DEFAULT_FROM = {  # the source of a stage's default, where it is not that of the setting's help
    "sup": dict(epochs="Table 1, E12", batch_size=_ANSWERS, optimizer=_ANSWERS, lr_base=_ANSWERS,
                lr_scaling=_ANSWERS, weight_decay=_ANSWERS, warmup_epochs="ours, E12"),
    "linear": dict.fromkeys(("epochs", "batch_size", "optimizer", "lr_base", "lr_scaling",
                             "warmup_epochs", "weight_decay"), "authors' README"),
    "finetune": dict(warmup_epochs="Sec. 3.1: none", weight_decay="Sec. 3.1: none"),
}
CHOICES = dict(optimizer=("lars", "sgd"), lr_scaling=("sqrt", "linear"), augment=("weak", "strong"),
               kd_set=("all", "labeled"), student_init=("scratch", "pretrained"))

TABLE_1 = {  # row: parameters (M), fine-tuned on 1%, 10%, 100%, linear, supervised (top-1)
    "resnet50": (24, 57.9, 68.4, 76.3, 71.7, 76.6),
    "resnet50_sk": (35, 64.5, 72.1, 78.7, 74.6, 78.5),
    "resnet50_2x": (94, 66.3, 73.9, 79.1, 75.6, 77.8),
    "resnet50_2x_sk": (140, 70.6, 77.0, 81.3, 77.7, 79.3),
    "resnet101": (43, 62.1, 71.4, 78.2, 73.6, 78.0),
    "resnet101_sk": (65, 68.3, 75.1, 80.6, 76.3, 79.6),
    "resnet101_2x": (170, 69.1, 75.8, 80.7, 77.0, 78.9),
    "resnet101_2x_sk": (257, 73.2, 78.8, 82.4, 79.0, 80.1),
    "resnet152": (58, 64.0, 73.0, 79.3, 74.5, 78.3),
    "resnet152_sk": (89, 70.0, 76.5, 81.3, 77.2, 79.9),
    "resnet152_2x": (233, 70.2, 76.6, 81.1, 77.4, 79.1),
    "resnet152_2x_sk": (354, 74.2, 79.4, 82.9, 79.4, 80.4),
    "resnet152_3x_sk": (795, 74.9, 80.1, 83.1, 79.8, 80.5),
}
TABLE_2 = {  # (labels used, distilled on): 1%, 10%; student resnet50, teacher resnet50_2x_sk, tau 1
    (True, None): (12.3, 52.0),
    (True, "labeled"): (23.6, 66.2),
    (True, "all"): (69.0, 75.1),
    (False, "all"): (68.9, 74.3),  # Eq. 2, what the paper goes on with
}
TABLE_3 = {  # row: tau, top-1 with 1%, 10%, top-5 with 1%, 10%; the last one teaches the others
    "resnet50": (1.0, 73.9, 77.5, 91.5, 93.4),
    "resnet50_2x_sk": (1.0, 75.9, 80.2, 93.0, 95.0),
    "resnet152_3x_sk": (0.1, 76.6, 80.9, 93.4, 95.5),
}


def _imagenet(row: str, labels: int) -> dict:
    large = row.endswith(("x", "sk"))  # "width multiplier larger than 1 and/or SK"
    finetune = dict(lr_base=0.002 if large else 0.005, epochs=60 if labels == 1 else 30)
    sup = dict(augment="strong", label_smoothing=0.1) if labels < 100 else {}
    return dict(finetune=finetune, sup=sup, source="Sec. 3.1; sup: Fig. 4, E12")


_SMALL = dict(  # a start for data of thousands of images
    pretrain=dict(epochs=200, batch_size=256, warmup_epochs=10),
    sup=dict(epochs=100, batch_size=64, warmup_epochs=0),
    linear=dict(epochs=100, batch_size=64),
    finetune=dict(epochs=60, batch_size=64, lr_base=0.02),
    distill=dict(epochs=100, batch_size=256, warmup_epochs=5),
    source="not tuned")
_CIFAR = dict(  # the README's ResNet-18, pretrained and with a linear classifier; not the paper's
    pretrain=dict(lr_base=1.0, lr_scaling="linear", batch_size=512, epochs=1000, warmup_epochs=10,
                  temperature=0.5, jitter_strength=0.5, blur=0.0),
    sup=dict(epochs=100, batch_size=128, warmup_epochs=0),
    linear=dict(batch_size=512, epochs=100, weight_decay=0.0),
    finetune=dict(epochs=60, batch_size=128, lr_base=0.02),
    distill=dict(epochs=200, batch_size=512, warmup_epochs=10),
    source="authors' README (pretrain, linear); the other stages are not tuned")
_CIFAR_SMALL = dict(  # an hour of one core; found on 5,000 held-out pictures, see docs/results.md
    pretrain=dict(_CIFAR["pretrain"], lr_base=4.0, batch_size=128, epochs=20, warmup_epochs=1,
                  temperature=0.2, crop_min=0.3),
    sup=dict(lr_base=0.64, batch_size=50, epochs=200, warmup_epochs=0, crop_min=0.5,
             augment="strong"),
    linear=dict(lr_base=0.05, batch_size=50, epochs=100, weight_decay=0.0, crop_min=0.5),
    finetune=dict(lr_base=0.02, batch_size=25, epochs=100, crop_min=0.5, augment="strong"),
    distill=dict(lr_base=0.1, batch_size=128, epochs=3, warmup_epochs=0.2, crop_min=0.5,
                 augment="strong", kd_temperature=1.0, student_init="pretrained"),
    source="measured here")
_CIFAR_SMALL_10 = dict(  # with ten times the labels
    _CIFAR_SMALL,
    sup=dict(_CIFAR_SMALL["sup"], epochs=20, augment="weak"),
    linear=dict(_CIFAR_SMALL["linear"], epochs=10),
    finetune=dict(_CIFAR_SMALL["finetune"], batch_size=50, epochs=15, augment="weak"))
_NETTE_SMALL = dict(  # for 48 pixels; found on 1,500 held-out pictures, see docs/results.md
    pretrain=dict(_CIFAR_SMALL["pretrain"], epochs=60, warmup_epochs=3),
    sup=dict(_CIFAR_SMALL["sup"], lr_base=0.32, epochs=100),
    linear=dict(_CIFAR_SMALL["linear"], lr_base=0.008),
    finetune=dict(lr_base=0.005, batch_size=25, epochs=60, crop_min=0.5),
    distill=dict(_CIFAR_SMALL["distill"], epochs=20, warmup_epochs=1),
    source="measured here")
_DIGITS = dict(  # found on 1,000 held-out training images, see docs/results.md
    pretrain=dict(lr_base=0.3, batch_size=48, epochs=16, warmup_epochs=0.8, temperature=0.2,
                  crop_min=0.5, ema_decay=0.99),
    sup=dict(lr_base=0.64, batch_size=40, epochs=300, warmup_epochs=0, crop_min=0.8),
    linear=dict(lr_base=6.4, batch_size=40, epochs=150, weight_decay=0.0, crop_min=0.8),
    finetune=dict(lr_base=0.01, batch_size=10, epochs=100, crop_min=0.8),
    distill=dict(lr_base=0.3, batch_size=128, epochs=6.4, warmup_epochs=0.32, kd_temperature=1.0,
                 crop_min=0.8), source="measured here")

RECIPES = {  # (data set, row, init, labels %): {stage: settings that differ from the defaults}
    **{("imagenet", row, None, labels): _imagenet(row, labels)
       for row in TABLE_1 for labels in (1, 10, 100)},
    ("imagenet", None, None, None): dict(source="no row of the paper"),
    ("cifar10", "resnet_digits_2x", None, 1): _CIFAR_SMALL,
    ("cifar10", "resnet_digits_2x", None, 10): _CIFAR_SMALL_10,
    ("cifar10", "resnet_digits", None, 1): dict(
        _CIFAR_SMALL, source="as for twice the width; not tuned"),
    ("cifar10", None, None, None): _CIFAR,
    ("cifar100", None, None, None): _CIFAR,
    ("imagenette", "resnet_digits", None, 10): _NETTE_SMALL,
    ("imagenette", None, None, None): _SMALL,
    ("food101", None, None, None): _SMALL,
    ("inat2019", None, None, None): _SMALL,
    ("folder", None, None, None): _SMALL,
    ("digits", "resnet_digits", None, None): _DIGITS,
    ("digits", None, None, None): dict(_DIGITS, source="as for resnet_digits; not tuned"),
}

SCHEDULES = {  # D2
    "paper": dict(lr_base=0.1, epochs=800.0, warmup_epochs=40.0),
    "readme": dict(lr_base=0.075, epochs=100.0, warmup_epochs=10.0),
}
_PRETRAIN = dict(dataset="imagenet", stage="pretrain")
DEPARTURES = {  # where, setting, recommended, paper, code (None: silent, as recommended), source
    "D1": (_PRETRAIN, "memory_size", 0, 65536, 0,
           "Sec. 3.1, appendix D: about 1 point; not released, and details not stated"),
    "D2": (_PRETRAIN, "pretrain_schedule", "paper", "paper", "readme",
           "0.1 sqrt(N), 800 epochs, 40 warm-up; README: 0.075 sqrt(N), 100, 10"),
    "D3": (dict(stage="finetune"), "freeze_proj", 0, 0, 1,
           "Sec. 2 and TF2 train the kept layers of g; TF1 leaves them as they are"),
    "D4": (dict(stage="distill"), "kd_tau_squared", 0, 0, 1,
           "Eq. 2 has no factor; the authors' notebook multiplies by tau squared"),
    "D5": ({}, "tf_padding", 0, None, 1,
           "the authors' max-pool pads even sizes below and right only; so with their weights"),
}


def row_name(args) -> str:
    """--arch, --width and --sk as one word, a row of Table 1: resnet50_2x_sk."""
    return args.arch + (f"_{args.width:g}x" if args.width != 1 else "") + ("_sk" if args.sk else "")


def parse_args(argv=None):
    p = flags.Parser(prog=f"{SCRIPT}.py", description=__doc__.split("\n\n")[0],
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("what to train").add_argument
    add("--arch", choices=ARCHS, help="default resnet_digits on digits, else resnet50 [Table 1]")
    add("--width", type=float, default=1.0, help="channels times this [Table 1: 1, 2 or 3]")
    add("--sk", action="store_true", help="selective kernels and ResNet-D [Table 1]")
    add("--proj-layers", type=int, default=3, help="layers of g [Sec. 2: 3; Fig. 5, E.1: 2 to 4]")
    add("--method", choices=METHODS, default="simclrv2", help="which stages --stage all runs: sup "
        "alone; pretrain and linear; pretrain and finetune; all five [Table 1]")
    add("--stage", choices=("all", *STAGES), default="all", help="one stage; linear and finetune "
        "from --init, distill from --teacher [Sec. 2]")
    add("--init", metavar="FILE", help="pretrained weights instead of stage pretrain: a run, or a "
        "released checkpoint, converted; --stage pretrain goes on from it [README]")
    add("--teacher", metavar="RUN", help="finished run that teaches stage distill; default this "
        "run's fine-tuned network [Sec. 2]")
    add("--follow", default="recommended", metavar="WHOM", help="recommended, paper, code, or a "
        "list such as D1=paper,D3=code, where the two disagree [table DEPARTURES]")
    flags.add_data(p, DATASETS, "labelled percent of each class, at least one image; default 1 on "
                   "digits, else 10 [Sec. 3.1: 1, 10 and 100]")
    flags.add_settings(p, SETTINGS, STAGES)
    flags.add_running(p, SCRIPT)
    args = p.parse_args(argv)
    flags.check(p, args)
    args.dataset = args.dataset or ("folder" if args.data_path else "digits")
    args.arch = args.arch or ("resnet_digits" if args.dataset == "digits" else "resnet50")
    return args


def percent(args):
    """--labels, its default, or that of a published list; None for another list, or a count."""
    if args.num_labels or args.labels_file:
        return PUBLISHED.get(list_name(args.labels_file[0])) if args.labels_file else None
    return args.labels or (1 if args.dataset == "digits" else 10)


def stages_of(args) -> list[str]:
    """What these flags train, in order; stages of 0 epochs are still among them."""
    if args.stage != "all":
        return [args.stage]
    return [x for x in PIPELINES[args.method] if x != "pretrain" or not args.init]


def run_at(path) -> dict | None:
    """First line of the log of a run of this script: path is its folder, or its checkpoint."""
    folder = Path(path).parent if Path(path).name in CHECKPOINTS else Path(path)
    first = log.read_log(folder)[0] if (folder / "log.jsonl").exists() else {}
    return first if first.get("script") == SCRIPT else None


def init_kind(args) -> str:
    """Where weights come from: scratch, a run (a folder, or its checkpoint), or released ones."""
    if not args.init:
        return "scratch"
    path = Path(args.init)
    own = path.is_dir() or path.name in CHECKPOINTS or not path.suffix
    return "run" if own else "released"


def padding_of_init(args) -> tuple[str, dict]:
    """A layer of settings: a network goes on with the padding that it was pretrained with (D5)."""
    if init_kind(args) == "released":
        return "released weights", dict(tf_padding=1)
    run = args.init and run_at(args.init)
    padded = run and any(s["tf_padding"] for s in run["settings"].values())
    return f"as {args.init}", dict(tf_padding=1) if padded else {}


def teacher_row(args) -> str | None:
    """The teacher as a row of Table 1: the student's own, or told by the run or by its name."""
    if not args.teacher:
        return row_name(args)
    run = run_at(args.teacher)
    if run:
        return row_name(SimpleNamespace(**run["args"]))
    found = re.search(r"resnet\d+(_\dx)?(_sk)?", args.teacher)
    return found and found[0]


def teacher_ends_in(args, stage: str) -> bool:
    """Whether --teacher ends in this stage, on the same labels; True where it has no log to ask."""
    run = run_at(args.teacher) if args.teacher else None
    if not run:
        return True
    its = SimpleNamespace(**run["args"])
    same = (its.dataset, percent(its)) == (args.dataset, percent(args))
    return same and list(run["settings"])[-1] == stage


def recipe(args):
    """(key, row): the most special row of RECIPES for these flags."""
    row = row_name(args)
    for special in ((row, None, percent(args)), (row, None, None), (None, None, None)):
        if (args.dataset, *special) in RECIPES:
            return (args.dataset, *special), RECIPES[(args.dataset, *special)]


def check_ranges(args, s):
    """What flags.resolve, which knows types and shares, cannot see. Raises UserError."""
    for name, allowed in CHOICES.items():
        if getattr(s, name) not in allowed:
            flag = f"--{name.replace('_', '-')} {getattr(s, name)}"
            raise UserError(f"{flag}: one of {', '.join(allowed)}")
    for name, least in dict(epochs=0, batch_size=1, memory_size=0, ft_proj_selector=-1).items():
        if getattr(s, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name):g}: at least {least}")
    for name, most in dict(alpha=1, blur=1, jitter_strength=2.5).items():  # hue turns 0.2 of it
        if getattr(s, name) > most:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name):g}: from 0 to {most}")
    for name in ("temperature", "kd_temperature"):
        if getattr(s, name) == 0:
            raise UserError(f"--{name.replace('_', '-')} 0: above 0; logits are divided by it")
    if args.proj_layers < 1 or s.ft_proj_selector > args.proj_layers:
        raise UserError(f"--ft-proj-selector {s.ft_proj_selector}: there is no such layer with "
                        f"--proj-layers {args.proj_layers}")
    if not 2 <= ARCHS[args.arch][2] * args.width < math.inf:  # nan too; SK's stem starts with half
        raise UserError(f"--width {args.width:g}: the first stage of {args.arch} is left with less "
                        "than two channels, or endlessly many")


def derive(args, stage: str, world_size: int) -> SimpleNamespace:
    """All settings of a stage, with `sources`, lr and the share of a process. Raises UserError."""
    _, row = recipe(args)
    layers = [("default [Sec. 2: all images]", dict(unlabeled_pool="all")),
              *((f"{d}: {DEPARTURES[d][5]}", {DEPARTURES[d][1]: DEPARTURES[d][2]})
                for d in ("D5", "D3", "D4"))]  # no SETTINGS; also where --follow names others
    if (args.dataset, stage) == ("imagenet", "pretrain"):
        code = flags.follow(args.follow, DEPARTURES).get("D2") == "code"
        layers.append((f"D2{'=code' if code else ''}: {DEPARTURES['D2'][5]}",
                       SCHEDULES["readme" if code else "paper"]))
    if (args.dataset, stage) == ("imagenet", "finetune") and (args.width > 1 or args.sk):
        layers.append(("Sec. 3.1: wider, or SK", dict(lr_base=0.002)))
    if (args.dataset, stage, percent(args)) == ("imagenet", "finetune", 1):
        layers.append(("Sec. 3.1: 1%", dict(epochs=60.0)))
    if (args.dataset, stage) == ("imagenet", "sup") and percent(args) != 100:
        layers.append(("Fig. 4, E12: not all labels", dict(augment="strong", label_smoothing=0.1)))
    layers.append((row["source"], row.get(stage, {})))
    without = not args.init and "pretrain" not in stages_of(args)
    if without and row.get(stage, {}).get("student_init") == "pretrained":
        layers.append(("no pretrained weights in this run, E8", dict(student_init="scratch")))
    if stage == "finetune" and percent(args) == 100:
        layers.append(("Sec. 3.1: all labels", dict(ft_proj_selector=0)))
    layers.append(padding_of_init(args))
    facts = dict(dataset=args.dataset, stage=stage)
    of_others = {name for name, stages in ONLY_IN.items() if stage not in stages}
    s = flags.resolve(SETTINGS, stage, layers, DEPARTURES, facts, args, of_others)
    vars(s).pop("pretrain_schedule", None)  # D2's name for three settings
    if args.unlabeled_pool:
        s.unlabeled_pool, s.sources["unlabeled_pool"] = args.unlabeled_pool, "--unlabeled-pool"
    for name, source in DEFAULT_FROM.get(stage, {}).items():
        if s.sources[name].startswith("default"):
            s.sources[name] = f"default [{source}]"
    check_ranges(args, s)
    if stage == "distill" and s.kd_temperature is None:
        own = teacher_row(args) == row_name(args)
        s.kd_temperature = 0.1 if own else 1.0
        s.sources["kd_temperature"] = f"Sec. 3.1, {'self-distillation' if own else 'big to small'}"
    if s.lr is None:
        s.lr = peak_lr(s.lr_base, s.batch_size, s.lr_scaling)
        scale = f"sqrt({s.batch_size})" if s.lr_scaling == "sqrt" else f"{s.batch_size} / 256"
        s.sources["lr"] = f"{s.lr_base:g} x {scale}"
    parts = world_size * args.accum_steps
    s.micro_batch = s.batch_size // parts
    if s.batch_size % parts:
        raise UserError(f"--batch-size {s.batch_size} is not divisible by {world_size} processes x "
                        f"--accum-steps {args.accum_steps}")
    if s.batch_size // args.accum_steps < 2:
        raise UserError(f"--batch-size {s.batch_size} in --accum-steps {args.accum_steps}: "
                        "BatchNorm needs two images in a part")
    return s


# ===== 2. DATA  (paper Sec. 2 and 3.1) ============================================================


# <shared: to_bytes>
class ToBytes:
    """Last transform of a view: PIL -> (uint8 (3, H, W), box of random erasing (4,), y0 y1 x0 x1).

    Normalising and erasing happen on the device (`to_model`). The box is drawn as by timm's
    RandomErasing: area 2% to a third, aspect 0.3 to 3.3, ten attempts; all zeros: nothing erased.
    """

    def __init__(self, reprob: float = 0.0):
        self.reprob = reprob

    def __call__(self, picture):
        image = pil_to_tensor(picture)
        return image, self.draw_box(*image.shape[1:])

    def draw_box(self, height: int, width: int) -> Tensor:
        if self.reprob and random.random() <= self.reprob:
            for _ in range(10):
                area = random.uniform(0.02, 1 / 3) * height * width
                aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if h < height and w < width:
                    y, x = random.randint(0, height - h), random.randint(0, width - w)
                    return torch.tensor([y, y + h, x, x + w], dtype=torch.int16)
        return torch.zeros(4, dtype=torch.int16)


def to_model(images: Tensor, boxes: Tensor, stats: Tensor, noise: Tensor | None = None) -> Tensor:
    """Bytes to normalised pictures, with normal noise in the erasing boxes; on the device.

    images (N, 3, H, W) uint8, boxes (N, 4), stats (2, 3, 1, 1): mean and std in bytes
    returns (N, 3, H, W) float32; noise of that shape is drawn where None
    """
    x = (images.float() - stats[0]) / stats[1]
    y0, y1, x0, x1 = boxes.long().view(-1, 4, 1, 1).unbind(1)  # each (N, 1, 1)
    rows = torch.arange(x.shape[2], device=x.device).view(1, -1, 1)
    columns = torch.arange(x.shape[3], device=x.device).view(1, 1, -1)
    inside = (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)  # (N, H, W)
    return torch.where(inside.unsqueeze(1), torch.randn_like(x) if noise is None else noise, x)


# </shared>


def view_lists(dataset: str, size: int, s) -> dict[str, list]:
    """Each view as a list, in the paper's order, ending in (bytes, erasing box). s: settings.

    The blur of a pretraining view follows on the device. Fine-tuning, linear classifier and
    distillation: "only random crop and horizontal flips" (Sec. 3.1); strong: Fig. 4, for stage sup,
    and in some recipes of ours (E8).
    """
    bicubic, c = T.InterpolationMode.BICUBIC, s.jitter_strength
    crop = T.RandomResizedCrop(size, (s.crop_min, 1), (3 / 4, 4 / 3), bicubic, antialias=True)
    whole = T.Resize((size, size), bicubic)
    if dataset == "digits":  # fit for digits: a mirrored one is another sign, none has a colour
        affine = T.RandomAffine(20, shear=15, interpolation=T.InterpolationMode.BILINEAR)
        mild = T.RandomAffine(15, (0.1, 0.1), (0.85, 1.15), 10, T.InterpolationMode.BILINEAR)
        light = T.ColorJitter(0.4 * c, 0.4 * c)
        return dict(
            pretrain=[whole, affine, crop, T.RandomApply([light], 0.8), ToBytes()],
            weak=[crop, ToBytes()],
            strong=[whole, mild, ToBytes()],
            evaluate=[whole, ToBytes()],
        )
    flip, jitter = T.RandomHorizontalFlip(0.5), T.ColorJitter(0.8 * c, 0.8 * c, 0.8 * c, 0.2 * c)
    small = size <= 32
    policy = T.AutoAugmentPolicy.CIFAR10 if small else T.AutoAugmentPolicy.IMAGENET
    centre = [T.Resize(round(size / 0.875), bicubic), T.CenterCrop(size)]  # 256 -> 224 (code)
    return dict(
        pretrain=[crop, flip, T.RandomApply([jitter], 0.8), T.RandomGrayscale(0.2), ToBytes()],
        weak=[crop, flip, ToBytes()],
        strong=[crop, flip, T.AutoAugment(policy), ToBytes()],
        evaluate=[*([whole] if small else centre), ToBytes()],
    )


def draw_blur(n: int, share: float = 0.5, device="cpu") -> tuple[Tensor, Tensor]:
    """For one view of a replica's batch: sigma () ~ U(0.1, 2), and on or off (n,)."""
    sigma = torch.empty((), device=device).uniform_(0.1, 2.0)
    return sigma, torch.rand(n, device=device) < share


def gaussian_blur(x: Tensor, sigma: Tensor, on: Tensor) -> Tensor:
    """Blur the images where `on`, a whole batch at once (E5).

    x (n, C, H, W) in [0, 1]; sigma () one for the batch; on (n,) bool. Separable; zeros beyond the
    border, so edges darken; radius int((H // 10) / 2): 23 taps at 224 px, 3 at 32.
    """
    radius = x.shape[-1] // 10 // 2
    taps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    sigma, on = (t.to(x.device, non_blocking=True) for t in (sigma, on))
    kernel = torch.exp(-taps.square() / (2 * sigma.to(x.dtype).square()))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)  # (C, 1, 1, taps)
    y = F.conv2d(x, kernel, padding=(0, radius), groups=x.shape[1])
    y = F.conv2d(y, kernel.mT, padding=(radius, 0), groups=x.shape[1])
    return torch.where(on[:, None, None, None], y, x).clamp(0, 1)


# ===== 3. MODEL  (paper Sec. 2 and 3.1; layout of the authors' code) ==============================


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class NormaliseOverReplicas(torch.autograd.Function):
    """BatchNorm's training step with count, sum and sum of squares over all replicas.

    x (n, C) or (n, C, H, W), n may differ between replicas; bias may be None. Statistics in float32
    at least; one all-reduce forward, one backward; saves x and nothing else of its size.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        x_f = x if x.dtype == torch.float64 else x.float()
        count = x_f.new_full((1,), x.numel() / x.shape[1])
        total = torch.cat([count, x_f.sum(dims), x_f.square().sum(dims)])  # (1 + 2C,)
        dist.all_reduce(total)
        count, (mean, square) = total[:1], (total[1:] / total[:1]).chunk(2)
        var = (square - mean.square()).clamp_(min=0)
        rstd = (var + eps).rsqrt()
        scale = weight * rstd
        shift = -mean * scale if bias is None else bias - mean * scale
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.dims, ctx.shape, ctx.has_bias = dims, shape, bias is not None
        ctx.mark_non_differentiable(mean, var, count)
        y = torch.addcmul(shift.view(shape), x_f, scale.view(shape)).to(x.dtype)
        return y, mean, var, count

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, rstd, count = ctx.saved_tensors
        shape, grad_f = ctx.shape, grad.to(mean.dtype)
        x_hat = (x.to(mean.dtype) - mean.view(shape)) * rstd.view(shape)
        local = torch.cat([grad_f.sum(ctx.dims), (grad_f * x_hat).sum(ctx.dims)])  # (2C,)
        total = local.clone()
        dist.all_reduce(total)
        mean_g, mean_gx = (total / count).chunk(2)
        grad_x = grad_f - mean_g.view(shape) - x_hat * mean_gx.view(shape)
        grad_x = (grad_x * (rstd * weight).view(shape)).to(x.dtype)
        # this replica's share: parameters' gradients are averaged over replicas later
        grad_bias, grad_weight = local.chunk(2)
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm, 1d and 2d, "global" in training (Sec. 3.1), with gloo and NCCL; with one process,
    and in evaluation, torch's own. beta=False: no bias."""

    def __init__(self, channels: int, beta: bool = True):
        super().__init__(channels, eps=1e-5, momentum=0.1)
        if not beta:
            self.register_parameter("bias", None)

    def _check_input_dim(self, x):
        assert x.dim() in (2, 4), x.shape

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        y, mean, var, count = NormaliseOverReplicas.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)  # unbiased, E11
        return y


class SelectiveKernel(nn.Module):
    """SK unit of the authors: two plain 3x3 streams of F channels, weighed per channel; unlike
    timm's, without dilation or groups. (N, C, H, W) -> (N, F, H', W')"""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        mid = max(int(c_out * 0.0625), 32)  # sk_ratio of all released models
        self.conv = conv3x3(c_in, 2 * c_out, stride)
        self.bn = GlobalBatchNorm(2 * c_out)
        self.fc0 = conv1x1(c_out, mid)
        self.fcbn = GlobalBatchNorm(mid)
        self.fc1 = conv1x1(mid, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        streams = F.relu(self.bn(self.conv(x))).unflatten(1, (2, -1))  # (N, 2, F, H', W')
        s = streams.sum(1).mean((2, 3), keepdim=True)  # (N, F, 1, 1)
        a = self.fc1(F.relu(self.fcbn(self.fc0(s)))).unflatten(1, (2, -1))  # (N, 2, F, 1, 1)
        return (a.softmax(1) * streams).sum(1)  # (N, F, H', W')


class ShortcutPool(nn.Module):
    """ResNet-D's 2x2 mean before the 1x1 shortcut, in stage 1 too, with the authors' borders:
    stride 1 leaves them out of the mean, which is to repeat the edge; stride 2 counts zeros."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1)
        h, w = x.shape[-2:]
        return F.avg_pool2d(F.pad(x, (0, w % 2, 0, h % 2)), 2, 2)


class TfMaxPool(nn.Module):
    """D5: 3x3, stride 2: even sizes padded at the bottom and right only, odd ones all round."""

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        return F.max_pool2d(F.pad(x, (w % 2, 1, h % 2, 1), value=-math.inf), 3, 2)


def shortcut(c_in: int, c_out: int, stride: int, sk: bool) -> nn.Sequential:
    pool = [ShortcutPool(stride)] if sk else []
    return nn.Sequential(*pool, conv1x1(c_in, c_out, 1 if sk else stride), GlobalBatchNorm(c_out))


def initialise(m: nn.Module):
    """Code: truncated normal, variance 1 / fan-in; dense N(0, 0.01^2); a branch's last BN 0."""
    if isinstance(m, nn.Conv2d):
        lecun_normal_(m.weight)
    elif isinstance(m, nn.Linear):
        nn.init.normal_(m.weight, std=0.01)
        if m.bias is not None:
            nn.init.zeros_(m.bias)
    elif isinstance(m, (BasicBlock, Bottleneck)):
        nn.init.zeros_((m.bn2 if isinstance(m, BasicBlock) else m.bn3).weight)


class Encoder(nn.Module):
    """f: ResNet 18 to 200, `width` times as wide; `sk`: selective kernels and ResNet-D. x -> h.

    Parameters as Table 1 counts them (with running means and variances, up to the average pool):
    24M (resnet50) to 795M (resnet152_3x_sk), all 13 in the tests. Names are torchvision's, so that
    a plain resnet50 loads there and in timm. No convolution has a bias.
    """

    def __init__(self, arch: str, width: float = 1, sk=False, image_size=224, tf_padding=False):
        super().__init__()
        block, depths, base = ARCHS[arch]
        c, small = int(base * width), image_size <= 32

        if small:  # CIFAR's, also with SK; ours has stride 2
            self.conv1 = conv3x3(3, c, 2 if arch == "resnet_digits" else 1)
        elif sk:  # ResNet-D's
            self.conv1 = nn.Sequential(
                conv3x3(3, c // 2, 2), GlobalBatchNorm(c // 2), nn.ReLU(inplace=True),
                conv3x3(c // 2, c // 2), GlobalBatchNorm(c // 2), nn.ReLU(inplace=True),
                conv3x3(c // 2, c))
        else:
            self.conv1 = nn.Conv2d(3, c, 7, 2, 3, bias=False)
        self.bn1, self.relu = GlobalBatchNorm(c), nn.ReLU(inplace=True)
        pool = TfMaxPool() if tf_padding else nn.MaxPool2d(3, 2, 1)
        self.maxpool = nn.Identity() if small else pool

        self.stages, c_in = len(depths), c
        for i, depth in enumerate(depths):
            planes, stage = c * 2**i, nn.Sequential()
            for j in range(depth):
                stride, c_out = 2 if i > 0 and j == 0 else 1, planes * block.expansion
                # every stage's first block has a projection, also where the shape stays
                projection = shortcut(c_in, c_out, stride, sk) if j == 0 else None
                unit = block(c_in, planes, stride, projection, norm_layer=GlobalBatchNorm)
                if sk and block is Bottleneck:
                    # it ends in a convex sum of ReLUs, which the block's own ReLU leaves as it is
                    unit.conv2, unit.bn2 = SelectiveKernel(planes, planes, stride), nn.Identity()
                stage.append(unit)
                c_in = c_out
            setattr(self, f"layer{i + 1}", stage)
        self.dim = c_in  # D: 2048 or 512 times width
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return x.mean((2, 3))  # h  (N, D)


def projection_head(dim: int, layers: int = 3, out: int = 128) -> nn.Sequential:
    """g: dense layers D -> D -> ... -> out without bias, each with BN and, but the last, ReLU.

    The last BN has no beta. One middle layer is what Table 1 adds when fine-tuning on few labels:
    4,198,400 parameters at width 1, 16,785,408 at 2.
    """
    head = nn.Sequential()
    for _ in range(layers - 1):
        linear = nn.Linear(dim, dim, bias=False)
        head.append(nn.Sequential(linear, GlobalBatchNorm(dim), nn.ReLU(inplace=True)))
    linear = nn.Linear(dim, out, bias=False)
    head.append(nn.Sequential(linear, GlobalBatchNorm(out, beta=False)))
    return head.apply(initialise)


class Net(nn.Module):
    """encoder -> head (whole, its first layers, or none) -> classifier (or none)."""

    def __init__(self, encoder: Encoder, head: nn.Module, num_classes: int = 0, zero: bool = False):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.classifier = nn.Identity()
        if num_classes:
            width = head[-1][0].out_features if len(head) else encoder.dim
            self.classifier = nn.Linear(width, num_classes)
            initialise(self.classifier)
            if zero:
                nn.init.zeros_(self.classifier.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.encoder(x)))


def build_model(args, stage: str, s, num_classes: int) -> Net:
    """The network of a stage. s: its settings.

    pretrain: f and all of g. linear, finetune: f, the first ft_proj_selector layers of g ("a middle
    layer", Sec. 2; the rest is left behind, unused parameters stall DDP) and a classifier, zero at
    first (code). sup, distill: f and a classifier; not from zero, as LARS adapts a student's, whose
    steps would follow its tiny norm.
    """
    size = args.image_size or DATASETS[args.dataset][0]
    encoder = Encoder(args.arch, args.width, args.sk, size, bool(s.tf_padding))
    head = projection_head(encoder.dim, args.proj_layers)
    if stage == "pretrain":
        return Net(encoder, head)
    if stage in ("sup", "distill"):
        return Net(encoder, nn.Sequential(), num_classes)
    k = s.ft_proj_selector
    return Net(encoder, head if k == -1 else head[:k], num_classes, zero=True)


RELEASED = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean",
            "moving_variance": "running_var", "kernel": "weight"}  # TF's words -> torch's
RELEASED_PARTS = {"base_model.": "encoder", "resnet.net.": "encoder",
                  "head_contrastive.": "head", "head.": "head"}


@torch.no_grad()
def load_released(net: Net, state: dict, what: str):
    """Fill a pretraining net from a released checkpoint, module by module in order of creation.

    TF1 variables, name -> tensor: base_model/conv2d[_n], base_model/batch_normalization[_n] and
    head_contrastive/nl_j. Or the public PyTorch conversion, {"resnet": net.*; "head": layers.*}. In
    both the shortcut ("projection") comes before the main path, and numbers count.
    """
    if "resnet" in state:
        state = {f"{part}.{k}": v for part in ("resnet", "head") for k, v in state[part].items()}
    released = {"encoder": {}, "head": {}}
    for key, v in state.items():
        scope, _, word = key.replace("/", ".").rpartition(".")
        part = next((RELEASED_PARTS[p] for p in RELEASED_PARTS if scope.startswith(p)), None)
        if part and RELEASED.get(word, word) in RELEASED.values():
            if word == "kernel":
                v = v.permute(3, 2, 0, 1) if v.dim() == 4 else v.T  # HWIO -> OIHW
            released[part].setdefault(scope, {})[RELEASED.get(word, word)] = v

    def order(scope):
        words = re.split(r"(\d+)", scope.replace("projection", "!"))
        return [int(w) if i % 2 else w for i, w in enumerate(words)]

    def in_order(m):  # the shortcut first, else as registered
        if isinstance(m, (nn.Conv2d, nn.Linear, _BatchNorm)):
            return [m]
        children = sorted(m.named_children(), key=lambda child: child[0] != "downsample")
        return [leaf for _, child in children for leaf in in_order(child)]

    for part, modules in released.items():
        for norm in (False, True):
            own = [m.state_dict() for m in in_order(getattr(net, part))
                   if isinstance(m, _BatchNorm) == norm]
            own = [{k: v for k, v in m.items() if k != "num_batches_tracked"} for m in own]
            given = [modules[scope] for scope in sorted(modules, key=order)]
            given = [m for m in given if ("running_mean" in m) == norm]
            pairs = [(m[k], v.get(k)) for m, v in zip(own, given) for k in m]
            if len(own) != len(given) or any(v is None or v.shape != t.shape for t, v in pairs):
                kind = "norms" if norm else "kernels"
                raise UserError(f"{what}: its {len(given)} {kind} of the {part} are not the "
                                f"{len(own)} here; do --arch, --width, --sk, --proj-layers agree?")
            for mine, theirs in pairs:
                mine.copy_(theirs)


def load_init(net: Net, path: str) -> str:
    """Pretrained f and g from a run of ours or a released checkpoint; says which."""
    state = weights.read_init(path)
    state = state if isinstance(state, dict) else {}
    converted = isinstance(state.get("resnet"), dict) and isinstance(state.get("head"), dict)
    if converted or any(str(k).startswith("base_model/") for k in state):
        load_released(net, state, f"--init {path}")
        return "released checkpoint"
    if not isinstance(state.get("carried"), dict):
        raise UserError(f"--init {path}: none of the formats known: a run of this script, resnet "
                        "and head of the PyTorch conversion, base_model/... of TensorFlow")
    found = state["model"] if state["stage"] == "pretrain" else state["carried"].get("pretrain")
    if found is None:
        raise UserError(f"--init {path}: this run has no pretrained weights, only {state['stage']}")
    weights.load_exactly(net, found, set(), f"--init {path}")
    return "run of ours"


# ===== 4. LOSSES  (paper Sec. 2) ==================================================================


def normalise(z: Tensor) -> Tensor:
    """z / sqrt(max(|z|^2, 1e-12)), for sim(., .) of Eq. 1 is cosine similarity; zero stays zero."""
    return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=-1, eps=1e-6)


def nt_xent(z1: Tensor, z2: Tensor, z1_all: Tensor, z2_all: Tensor, rank: int, tau: float):
    """Contrastive loss over all replicas, paper Eq. 1: one positive, 2N - 2 negatives.

        l_i = -log( exp(sim(z_i, z_p(i)) / tau) / sum_{k != i} exp(sim(z_i, z_k) / tau) )

    z1, z2         (b, D)  views of this replica, normalised; z1[i] is z1_all[rank * b + i]
    z1_all, z2_all (N, D)  views of all, gathered with gradient
    returns the loss () and view 1's logits against the other views (b, N), detached
    """
    b = len(z1)
    target = torch.arange(rank * b, rank * b + b, device=z1.device)  # p(i)  (b,)
    itself = F.one_hot(target, len(z1_all)) * 1e9  # k != i  (b, N)
    logits_ab, logits_ba = z1 @ z2_all.T / tau, z2 @ z1_all.T / tau  # (b, N)
    logits_aa, logits_bb = z1 @ z1_all.T / tau - itself, z2 @ z2_all.T / tau - itself
    loss_1 = F.cross_entropy(torch.cat([logits_ab, logits_aa], 1), target)  # over (b, 2N)
    loss_2 = F.cross_entropy(torch.cat([logits_ba, logits_bb], 1), target)
    # E1, the sum: LARS hides a factor of 2 for the kernels it adapts, but without it gamma and beta
    # of BatchNorm would learn at half the rate.
    return loss_1 + loss_2, logits_ab.detach()


def nt_xent_memory(z1, z2, k1_all, k2_all, queue, rank: int, tau: float):
    """Eq. 1 with the memory of Sec. 3.1 and appendix D. D1: the details are our inference.

    Positive: the key of the other view. Negatives: all keys of the batch but the image's own two,
    and the queue. Keys carry no gradient.

    z1, z2 (b, D); k1_all, k2_all (N, D) the averaged network's keys; queue (M, D) older keys
    """
    b = len(z1)
    target = torch.arange(rank * b, rank * b + b, device=z1.device)
    itself = F.one_hot(target, len(k1_all)) * 1e9
    side_1 = [z1 @ k2_all.T / tau, z1 @ k1_all.T / tau - itself, z1 @ queue.T / tau]
    side_2 = [z2 @ k1_all.T / tau, z2 @ k2_all.T / tau - itself, z2 @ queue.T / tau]
    loss_1, loss_2 = (F.cross_entropy(torch.cat(side, 1), target) for side in (side_1, side_2))
    return loss_1 + loss_2, side_1[0].detach()


def contrast_statistics(logits_ab: Tensor, rank: int) -> dict[str, Tensor]:
    """Share of images whose other view is the nearest of all N; entropy of that choice."""
    target = torch.arange(len(logits_ab), device=logits_ab.device) + rank * len(logits_ab)
    log_p = logits_ab.log_softmax(1)
    return dict(contrast_acc=(logits_ab.argmax(1) == target).float().mean(),
                contrast_entropy=-(log_p.exp() * log_p).sum(1).mean())


def distill_loss(logits_s: Tensor, logits_t: Tensor, tau: float, tau_squared=False) -> Tensor:
    """Cross-entropy to the teacher, paper Eq. 2; the sum over D becomes the mean of the batch.

        L_distill = - sum_y P^T(y | x; tau) log P^S(y | x; tau)

    logits_s (N, K) student; logits_t (N, K) teacher, constant; returns ()
    """
    p_t = (logits_t.detach() / tau).softmax(1)  # P^T  (N, K)
    loss = -(p_t * (logits_s / tau).log_softmax(1)).sum(1).mean()
    return loss * tau**2 if tau_squared else loss  # D4


def mixed_loss(logits_l, y, logits_s, logits_t, alpha: float, tau: float, tau_squared=False):
    """Labels and distillation, paper Eq. 3; each sum becomes the mean of its batch.

        L = -(1 - alpha) sum_{D^L} log P^S(y_i | x_i) + alpha L_distill

    logits_l (N_l, K) student on labelled images, tau 1 (Eq. 3 has no tau there); y (N_l,)
    """
    loss_l = F.cross_entropy(logits_l, y)
    return (1 - alpha) * loss_l + alpha * distill_loss(logits_s, logits_t, tau, tau_squared)


# ===== 5. OPTIMISER AND SCHEDULES  (paper Sec. 3.1: LARS, momentum 0.9) ===========================


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling in the authors' form, a group's tensors at once.

        g <- g + wd p;  r = eta |p| / |g|, 1 where either norm is 0 or adapt is off
        v <- momentum v + lr r g;  p <- p - v

    Other ports keep lr outside v, which differs whenever lr changes, and stop adapting at wd = 0,
    which breaks fine-tuning. lr_in_velocity=False is a form of the authors' class that the paper
    does not use (v <- momentum v + g; p <- p - lr r v, r from the update's norm); with adapt=False
    it is plain momentum SGD, and serves as such.

    found_inf: None, or a float tensor () on the device. Where it is 1 the step changes neither
    parameters nor velocities, whatever the gradients hold, and the host is not asked.
    """

    found_inf: Tensor | None = None

    def __init__(self, params, lr=0.0, momentum=0.9, weight_decay=0.0, eta=0.001, adapt=True,
                 nesterov=False, lr_in_velocity=True):
        group = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta, adapt=adapt,
                     nesterov=nesterov, lr_in_velocity=lr_in_velocity)
        super().__init__(params, group)

    @staticmethod
    def scale_(updates: list, params: list, group: dict):
        """updates *= lr r"""
        if group["adapt"]:
            p_norm = torch.stack(torch._foreach_norm(params))
            u_norm = torch.stack(torch._foreach_norm(updates))
            # > 0 and not >= 0: a kernel that starts at zero must move
            r = torch.where((p_norm > 0) & (u_norm > 0), group["eta"] * p_norm / u_norm, 1.0)
            torch._foreach_mul_(updates, list(r.unbind()))
        torch._foreach_mul_(updates, group["lr"])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "velocity" not in self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            v, momentum = [self.state[p]["velocity"] for p in params], group["momentum"]

            g = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            if self.found_inf is not None:
                bad = self.found_inf.to(params[0].device) > 0
                momentum = torch.where(bad, 1.0, momentum).to(params[0].dtype)
                for t in g:
                    t.masked_fill_(bad, 0.0)  # 0 * NaN would be NaN

            if group["lr_in_velocity"]:
                self.scale_(g, params, group)
            torch._foreach_mul_(v, momentum)
            torch._foreach_add_(v, g)
            if group["nesterov"]:
                torch._foreach_add_(g, v, alpha=group["momentum"])
            else:
                torch._foreach_copy_(g, v)
            if not group["lr_in_velocity"]:
                self.scale_(g, params, group)
            if self.found_inf is not None:
                torch._foreach_mul_(g, (~bad).to(params[0].dtype))
            torch._foreach_sub_(params, g)


def parameter_groups(net: Net, weight_decay: float, optimizer: str, distill: bool) -> list[dict]:
    """Each trainable parameter once: kernels, the classifier's kernel, BatchNorm, biases.

    LARS: BatchNorm and biases neither adapted nor decayed; the classifier's kernel decayed, not
    adapted (the authors add its L2 to the loss: the same gradient), but adapted in distillation
    (E6). SGD, for sup and linear: all but BatchNorm decayed.
    """
    lars = optimizer == "lars"
    norms = {p for m in net.modules() if isinstance(m, _BatchNorm) for p in m.parameters()}
    rows = {  # name: adapt, weight decay, parameters
        "kernels": (lars, weight_decay, []),
        "classifier": (lars and distill, weight_decay, []),
        "norms": (False, 0.0, []),
        "biases": (False, 0.0 if lars else weight_decay, []),
    }
    for name, p in net.named_parameters():
        kind = "norms" if p in norms else "biases" if p.dim() == 1 else "kernels"
        if p.requires_grad:
            rows["classifier" if name == "classifier.weight" else kind][2].append(p)
    return [dict(name=name, adapt=adapt, weight_decay=wd, params=params)
            for name, (adapt, wd, params) in rows.items() if params]


def build_optimiser(net: Net, weight_decay: float, optimizer: str, distill: bool) -> LARS:
    """lars; or sgd: Nesterov momentum 0.9 as in torch, with found_inf from the first step on."""
    groups, sgd = parameter_groups(net, weight_decay, optimizer, distill), optimizer == "sgd"
    return LARS(groups, momentum=0.9, nesterov=sgd, lr_in_velocity=not sgd)


def peak_lr(base: float, batch_size: int, scaling: str) -> float:
    """sqrt: 6.4 = 0.1 * sqrt(4096) (Sec. 3.1); linear: base * N / 256."""
    return base * math.sqrt(batch_size) if scaling == "sqrt" else base * batch_size / 256


def total_steps(num_examples: int, epochs: float, batch_size: int) -> int:
    """E10; gives the step numbers of the released checkpoints: 250228, 751, 3754, 37535."""
    return int(num_examples * epochs // batch_size) + 1


def warmup_steps(num_examples: int, warmup_epochs: float, batch_size: int) -> int:
    return int(num_examples * warmup_epochs // batch_size)


def lr_at(step: int, peak: float, total: int, warmup: int) -> float:
    """Linear from 0 in `warmup` steps, then half a cosine to exactly 0 at `total` (Sec. 3.1)."""
    if step < warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr


# ===== 6. TRAINING STEP  (paper Sec. 2, Fig. 3) ===================================================


class GatherWithGradient(torch.autograd.Function):
    """(b, D) of each replica -> (N, D). Backward sums over replicas and keeps the own rows.

    With the local loss undivided and gradients averaged over replicas, this gives the gradient of
    the mean loss. A gather without it leaves the embeddings about half of their gradient.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)  # (N, D)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(world_size())[dist.get_rank()]  # (b, D)


def gather(x: Tensor) -> Tensor:
    return GatherWithGradient.apply(x) if world_size() > 1 else x


def contrast(z: Tensor, tau: float, keys=None, queue=None) -> dict[str, Tensor]:
    """z (2b, 128) = [views 1; views 2] of this replica -> the loss over all replicas."""
    rank = dist.get_rank() if world_size() > 1 else 0
    with torch.autocast(z.device.type, enabled=False):  # logits of 1 / tau need float32
        z1, z2 = normalise(z).chunk(2)  # (b, 128) each
        if queue is None:
            loss, logits_ab = nt_xent(z1, z2, gather(z1), gather(z2), rank, tau)  # Eq. 1
        else:
            loss, logits_ab = nt_xent_memory(z1, z2, *keys, queue, rank, tau)  # Eq. 1, D1
    return dict(loss=loss, **contrast_statistics(logits_ab, rank))


def pretrain_step(net, x1, x2, tau, precision, keys=None, queue=None) -> dict[str, Tensor]:
    """x1, x2 (b, 3, S, S). One pass for both views: BatchNorm's statistics cover both."""
    with precision.autocast():
        z = net(torch.cat([x1, x2]))  # (2b, 128)
    return contrast(z, tau, keys, queue)


@contextlib.contextmanager
def running_statistics_kept(module: nn.Module):
    """Normalise by the batch as usual, but leave the running mean and variance alone."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True


def encode_in_parts(encoder: Encoder, parts, precision) -> Tensor:
    """parts: pairs of views (n, 3, S, S), n may differ -> h (2b, D) = [views 1; views 2]."""
    halves = []
    for part in parts:
        with precision.autocast():
            halves.append(encoder(torch.cat(part)).chunk(2))
    return torch.cat([torch.cat(view) for view in zip(*halves)])


def pretrain_step_in_parts(net: Net, x1, x2, tau, precision, accum_steps, keys=None, queue=None):
    """--accum-steps: the loss of the whole batch with the activations of a part. Does backward.

    Pass 1 encodes all parts without a graph; g and NT-Xent see the whole batch, and leave dL/dh;
    pass 2 encodes each part again and hands its rows of dL/dh to the encoder. Other than in one
    pass are the encoder's BatchNorm statistics, per part; running ones move in pass 1 only. DDP
    cannot follow two passes: give the module within, then call average_gradients.
    """
    parts = list(zip(x1.chunk(accum_steps), x2.chunk(accum_steps)))
    with torch.no_grad():
        h = encode_in_parts(net.encoder, parts, precision)  # (2b, D)
    h.requires_grad_()
    with precision.autocast():
        z = net.head(h)  # (2b, 128)
    losses = contrast(z, tau, keys, queue)
    precision.backward(losses["loss"])  # g, and dL/dh

    sizes = [len(part) for part, _ in parts]
    grad_1, grad_2 = (grad.split(sizes) for grad in h.grad.chunk(2))
    with running_statistics_kept(net.encoder):
        for part, *grads in zip(parts, grad_1, grad_2):
            with precision.autocast():
                h_part = net.encoder(torch.cat(part))  # (2b / parts, D)
            h_part.backward(torch.cat(grads))
    return {name: value.detach() for name, value in losses.items()}


def average_gradients(net: nn.Module):
    """What DDP does in its backward, in one all-reduce."""
    if world_size() > 1:
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        pieces = (flat / world_size()).split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(pieces, grads)])


@torch.no_grad()
def memory_keys(key_net: Net, x1, x2, precision, accum_steps: int = 1):
    """D1: keys (N, 128) of both views by the averaged network, its BatchNorm in training mode."""
    parts = zip(x1.chunk(accum_steps), x2.chunk(accum_steps))
    h = encode_in_parts(key_net.encoder, parts, precision)  # (2b, D)
    with precision.autocast():
        z = key_net.head(h)
    k1, k2 = normalise(z).chunk(2)
    return gather(k1), gather(k2)


def remember(queue: Tensor, k1_all: Tensor, k2_all: Tensor, step: int):
    """After the loss: the 2N keys take the oldest places of queue (M, D), first in, first out."""
    keys = torch.cat([k1_all, k2_all]).to(queue.dtype)
    slots = (step * len(keys) + torch.arange(len(keys), device=queue.device)) % len(queue)
    queue[slots[-len(queue) :]] = keys[-len(queue) :]


def label_step(net, x_l, y_l, label_smoothing, precision) -> dict[str, Tensor]:
    """Stages sup, linear, finetune. x_l (N, 3, S, S), y_l (N,); train_mode says what learns."""
    with precision.autocast():
        logits = net(x_l).float()  # (N, K)
    return dict(loss=F.cross_entropy(logits, y_l, label_smoothing=label_smoothing),
                train_acc=(logits.detach().argmax(1) == y_l).float().mean())


def distill_step(student, teacher, x, s, precision, x_l=None, y_l=None):
    """x (N, 3, S, S), the same view for both networks. Where alpha < 1 also labels y_l, of images
    x_l (N_l, 3, S, S), or of x itself where x_l is None. Returns losses by name, and the teacher's
    labels (N,) for the log.
    """
    with torch.no_grad(), precision.autocast():
        logits_t = teacher(x).float()  # frozen  (N, K)
    with precision.autocast():  # one joint student forward
        logits = student(x if x_l is None else torch.cat([x, x_l])).float()
    logits_s, logits_l = logits[: len(x)], logits if x_l is None else logits[len(x) :]
    how = s.kd_temperature, bool(s.kd_tau_squared)
    if s.alpha == 1:
        loss = distill_loss(logits_s, logits_t, *how)  # Eq. 2
    else:
        loss = mixed_loss(logits_l, y_l, logits_s, logits_t, s.alpha, *how)  # Eq. 3
    y_t = logits_t.argmax(1)
    agreement = (logits_s.detach().argmax(1) == y_t).float().mean()
    confidence = logits_t.softmax(1).amax(1).mean()
    return dict(loss=loss, agreement=agreement, teacher_confidence=confidence), y_t


def train_mode(net: Net, stage: str, freeze_proj: bool = False):
    """Training mode of a stage; before the optimiser is built, as it says what learns."""
    net.train()
    if stage == "linear":  # f is fixed, its running statistics too (E7)
        for part in (net.encoder, net.head):
            part.eval().requires_grad_(False)
    elif stage == "finetune" and freeze_proj:  # D3, TF1: running statistics still move
        net.head.requires_grad_(False)


# ===== 7. EVALUATION  (authors' code: single centre crop, final weights) ==========================


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Evaluation mode; afterwards each module is as it was, and in stage linear they differ."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training


@torch.no_grad()
def evaluate(model, images, view, run, batch=250) -> dict[str, float]:
    """Top-1 and top-5 in percent, each image once over all processes. Restores training mode."""
    sums = torch.zeros(3, device=run.device)  # float32 counts exactly to 16 million
    share = dict(rank=run.rank, world=run.world, workers=run.workers,
                 bad=BadImages(images, run.max_bad_images))
    with evaluating(model):
        for seen, targets in eval_loader(images, view, batch, **share):
            logits = logits_of(model, seen, run)
            hit = logits.topk(min(5, logits.shape[1])).indices == targets.to(run.device)[:, None]
            sums += torch.stack([hit[:, 0].sum(), hit.sum(), torch.ones_like(hit[:, 0]).sum()])
    if run.world > 1:
        dist.all_reduce(sums)
    top1, top5, count = sums.tolist()
    return dict(top1=round(100 * top1 / count, 3), top5=round(100 * top5 / count, 3))


def logits_of(model, seen, run) -> Tensor:
    """(N, K) float32 of a batch of the evaluation view, (bytes, boxes) on the host."""
    x = to_model(*(t.to(run.device) for t in seen), run.stats)
    with run.precision.autocast():
        return model(x).float()


def look_at(data, positions, view, args, run):
    """Equal batches (bytes and boxes, targets) of training pictures, the same on every process;
    broken ones are replaced, and as many as do not divide evenly are left out."""
    steps = -(-len(positions) // 250)
    batch = len(positions) // steps
    stream = Stream("neighbours", positions[: steps * batch], batch, args.seed)
    loader = stream_loader(data.train, [view], stream, start=0, stop=steps, workers=run.workers,
                           bad=BadImages(data.train, args.max_bad_images))
    return ((seen, y) for (seen,), y in loader)


@torch.no_grad()
def representations(encoder, batches, run, keep=True) -> tuple[Tensor, ...]:
    """h (M, D) of unit length, targets (M,) and, where keep, bytes (M, 3, S, S) of pictures."""
    with evaluating(encoder):
        found = [(logits_of(encoder, seen, run), y, *[seen[0]] * keep) for seen, y in batches]
    h, y, *pictures = (torch.cat(x) for x in zip(*found))
    return F.normalize(h, dim=1), y.to(run.device), *pictures


class Neighbours(nn.Module):
    """Scores a class by its labelled image that is nearest to x in h: how stage pretrain, which has
    no classifier, is judged. The paper's measure is stage linear."""

    def __init__(self, encoder, data, split, view, args, run, at_most=10000):
        super().__init__()
        some = np.linspace(0, len(split.labeled) - 1, min(at_most, len(split.labeled))).astype(int)
        batches = look_at(data, split.labeled[some], view, args, run)
        self.encoder, self.num_classes = encoder, len(data.classes)
        # 10,000 pictures of 224 pixels would be 1.5 GB
        self.h, self.y = representations(encoder, batches, run, keep=False)

    def forward(self, x: Tensor) -> Tensor:
        sim = F.normalize(self.encoder(x).float(), dim=1) @ self.h.T  # (N, M)
        nearest = sim.new_full((len(x), self.num_classes), -1.0)
        return nearest.scatter_reduce(1, self.y.expand(len(x), -1), sim, "amax")  # (N, K)


# ===== 8. MAIN LOOP ===============================================================================


def run_stage(stage, model, teacher, data, split, s, args, run, resume):
    """Train one stage, in place. One loop serves all five.

    model: unwrapped, with the weights to start from. teacher: the frozen network of stage distill,
    else None. resume: a checkpoint of this very stage, or None.
    """
    distilling = stage == "distill" and s.kd_set == "all"
    images_of = split.unlabeled if stage == "pretrain" or distilling else split.labeled
    mixed = distilling and s.alpha < 1
    stream = Stream(f"{stage}/images", images_of, s.batch_size, args.seed, straddle=True)
    total = total_steps(len(images_of), s.epochs, s.batch_size)
    warmup = warmup_steps(len(images_of), s.warmup_epochs, s.batch_size)
    evaluate_at = {round(total * k / args.evals) for k in range(1, args.evals + 1)} - {0}

    torch.manual_seed(seed_of(args.seed, stage, run.rank))  # from here on draws are a process's own
    train_mode(model, stage, bool(s.freeze_proj))
    key_net = queue = None
    if stage == "pretrain" and s.memory_size:  # D1
        key_net = Ema(model)
        key_net.module.train()
        queue = torch.zeros(s.memory_size, model.head[-1][0].out_features, device=run.device)
    optimizer = build_optimiser(model, s.weight_decay, s.optimizer, stage == "distill")
    run.precision.reset()
    start, seconds_before, unprinted = 0, 0.0, []
    if resume:
        start, seconds_before, unprinted = resume["step"], resume["seconds"], resume["unprinted"]
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        if key_net is not None:
            key_net.module.load_state_dict(resume["key_net"])
            queue.copy_(resume["queue"])
        if run.precision.scaler is not None and resume["scaler"]:
            run.precision.scaler.load_state_dict(resume["scaler"])
        checkpoint.restore_rng(resume["rng"], run.rank, seed_of(args.seed, stage, run.rank, start))
    if args.compile:  # in place: the keys of the state dict stay clean
        torch.compiler.reset()  # a stage has its own sizes, and each size its own graph
        networks = [model] if teacher is None else [model, teacher]
        if stage == "pretrain" and args.accum_steps > 1:  # whose step calls f and g, not the whole
            networks = [model.encoder, model.head]
        for network in networks:
            network.compile(dynamic=False)
    student = model
    if run.world > 1:  # global BatchNorm keeps the buffers equal by itself
        student = nn.parallel.DistributedDataParallel(model, device_ids=run.device_ids,
                                                      broadcast_buffers=False)

    views = {k: T.Compose(v) for k, v in view_lists(args.dataset, run.image_size, s).items()}
    looks = 2 * [views["pretrain"]] if stage == "pretrain" else [views[s.augment]]
    bad = BadImages(data.train, args.max_bad_images)
    how = dict(start=start, stop=total, rank=run.rank, world=run.world, accum=args.accum_steps,
               workers=run.workers, pin=run.device.type == "cuda", bad=bad)
    batches = stream_loader(data.train, looks, stream, **how)
    if mixed:  # Eq. 3 on all images: as many labelled ones beside them (E9)
        labeled = Stream(f"{stage}/labeled", split.labeled, s.batch_size, args.seed, straddle=True)
        of_l = stream_loader(data.train, looks, labeled, **how)
        batches = ((*b, *b_l) for b, b_l in zip(batches, of_l))
    names = {p: n for n, p in model.named_parameters()}
    all_known = bool((data.train.targets[images_of] >= 0).all())  # else some batches have no class
    if resume:
        bad.seen.update(resume["bad_images"])

    def images(seen):  # (bytes, boxes) on the host -> pictures on the device
        x = to_model(*(t.to(run.device, non_blocking=True) for t in seen), run.stats)
        return x.to(memory_format=torch.channels_last) if run.device.type == "cuda" else x

    def contrast_update(parts):  # Eq. 1 is no sum over parts: they are joined, then cut again
        x1, x2 = (images([torch.cat(t) for t in zip(*view)]) for view in zip(*parts))
        if s.blur:
            x1, x2 = (gaussian_blur(x, *draw_blur(len(x), s.blur, x.device)) for x in (x1, x2))
        keys = now = None
        if key_net is not None:
            keys = memory_keys(key_net.module, x1, x2, run.precision, args.accum_steps)
            now = queue[: step * 2 * s.batch_size]  # its filled part
        of_batch = (x1, x2, s.temperature, run.precision)
        if args.accum_steps == 1:
            losses = pretrain_step(student, *of_batch, keys, now)
            run.precision.backward(losses["loss"])
        else:
            losses = pretrain_step_in_parts(model, *of_batch, args.accum_steps, keys, now)
            average_gradients(model)
        if key_net is not None:
            remember(queue, *keys, step)
        return losses

    quicker = "--arch resnet18 --image-size 64" if run.device.type == "cpu" else ""
    if args.dataset == "digits":
        quicker = "--arch resnet_digits" * (args.arch != "resnet_digits")
    run.log.start(stage, start, total, unprinted, run.device, quicker)
    step, parts, began = start, [], time.perf_counter()
    for batch in run.log.wait(batches):
        set_lr(optimizer, lr_at(step, s.lr, total, warmup))
        last_part = len(parts) + 1 == args.accum_steps
        if stage == "pretrain":
            parts.append([[t.to(run.device, non_blocking=True) for t in v] for v in batch[0]])
            if not last_part:
                continue
            parts = [contrast_update(parts)]
        else:
            (seen,), y, *of_l = batch
            y, x = y.to(run.device, non_blocking=True), images(seen)
            alone = run.world > 1 and not last_part
            with student.no_sync() if alone else contextlib.nullcontext():
                if stage == "distill":
                    x_l, y_l = None, None if distilling else y  # --kd-set labeled: x's own labels
                    if mixed:
                        x_l, y_l = images(of_l[0][0]), of_l[1].to(run.device, non_blocking=True)
                    losses, y_t = distill_step(student, teacher, x, s, run.precision, x_l, y_l)
                    # The only use of unlabelled images' true labels, where known: a logged number.
                    if all_known:
                        losses["teacher_acc"] = (y_t == y).float().mean()
                else:
                    losses = label_step(student, x, y, s.label_smoothing, run.precision)
                run.precision.backward(losses["loss"] / args.accum_steps)
            parts.append({k: v.detach() for k, v in losses.items()})
            if not last_part:
                continue
        means = {k: torch.stack([part[k].detach() for part in parts]).mean() for k in parts[0]}
        if run.world > 1:  # what is logged, and watched for NaN, is the mean over the processes
            together = torch.stack(list(means.values()))
            dist.all_reduce(together)
            means = dict(zip(means, together / run.world))
        watched = {k: v for k, v in means.items() if k.startswith("loss")}
        applied = run.precision.update(optimizer, watched)
        optimizer.zero_grad(set_to_none=True)
        if key_net is not None:
            key_net.update(model, s.ema_decay, applied)  # D1
        parts, step = [], step + 1
        run.log.add(step, means)

        signalled = run.stop.asked()
        stopping, printing = signalled or step == args.stop_after, step % args.print_every == 0
        saving = step % args.save_every == 0 or stopping or step == total
        if printing or saving:
            run.precision.check(optimizer, names, step)
        if printing or step == total:
            run.log.report(stage, step, images=s.batch_size * (1 + mixed),
                           epoch=round(step * s.batch_size / len(images_of), 3),
                           bad_images=len(bad.seen), lr=lr_at(step - 1, s.lr, total, warmup))
        if step in evaluate_at:
            before, judged = time.perf_counter(), model
            if stage == "pretrain":
                judged = Neighbours(model.encoder, data, split, views["evaluate"], args, run)
            results = evaluate(judged, data.val, views["evaluate"], run)
            run.log.evaluation(stage, step, results, time.perf_counter() - before)
            run.results[stage] = results
        if saving:
            seconds = seconds_before + time.perf_counter() - began
            run.results.setdefault(stage, {}).update(updates=step, seconds=round(seconds, 1))
            save(stage, step, seconds, model, key_net, queue, optimizer, bad, run)
        if stopping and step < total:
            run.log.say(f"stopped at {stage} step {step}; --resume {run.folder} goes on")
            raise SystemExit(128 + signalled if signalled else 0)


def save(stage, step, seconds, model, key_net, queue, optimizer, bad, run):
    """Checkpoint after an update: written by the first process, with the draws of all."""
    rng, scaler = checkpoint.rng_states(), run.precision.scaler
    if run.rank == 0:
        state = dict(
            stage=stage, step=step, seconds=seconds, model=model.state_dict(), rng=rng,
            carried=run.carried, queue=queue,
            key_net=None if key_net is None else key_net.module.state_dict(),
            optimizer=optimizer.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
            unprinted=run.log.unprinted(), bad_images=sorted(bad.seen), log_size=run.log.size,
            results=run.results, recipe=run.recipe)
        checkpoint.save(run.folder, state)


def check_stages(args, stages, settings):
    """Stages that cannot begin, and flags that none of them would look at. Raises UserError."""
    if not stages:
        raise UserError(f"--stage {args.stage}, --method {args.method}, --epochs: no stage is left "
                        "to train; raise --epochs or choose another stage")
    given = "pretrain" in stages or args.init
    if {"linear", "finetune"} & {*stages} and not given:
        raise UserError(f"--stage {args.stage}: needs --init RUN, a run of stage pretrain, or "
                        "released weights")
    if "distill" in stages and "finetune" not in stages and not args.teacher:
        raise UserError(f"--stage {args.stage}: needs --teacher RUN, a finished run that ends in "
                        "stage finetune, or distill")
    from_pretrained = "distill" in stages and settings["distill"].student_init == "pretrained"
    if from_pretrained and not given:
        raise UserError("--student-init pretrained: needs --init RUN, the pretrained weights")
    if args.init and stages in (["sup"], ["distill"]) and not from_pretrained:
        raise UserError(f"--init {args.init}: stage {stages[0]} starts from scratch; leave it out"
                        + ", or add --student-init pretrained" * (stages == ["distill"]))
    if args.teacher and "distill" not in stages:
        raise UserError(f"--teacher {args.teacher}: nothing is distilled in stage {stages[-1]}; "
                        "leave it out, or choose --stage distill")
    if args.predict and stages[-1] == "pretrain":
        raise UserError("--predict: stage pretrain has no classifier; choose --stage all")
    if args.predict and not Path(args.predict).exists():
        raise UserError(f"--predict {args.predict}: no such picture or folder")


@log.clear_errors
def main(args):
    if args.dry_run:
        return print(dry_run(args))
    if args.eval:
        args = flags.stored_args(args, SCRIPT)
    run = start_processes(args)
    data = load_dataset(args.dataset, args.data_path, seed=args.split_seed, holdout=args.holdout)
    if args.eval:
        return evaluate_run(args, data, run)

    # What will be trained, on what
    settings = {x: derive(args, x, run.world) for x in stages_of(args)}
    stages = [x for x in settings if settings[x].epochs > 0]
    check_stages(args, stages, settings)
    pool = settings[stages[0]].unlabeled_pool
    split = flags.choose_split(args, data, pool, 1 if args.dataset == "digits" else 10)
    if {"pretrain", "distill"} & {*stages} and not len(split.unlabeled):
        raise UserError("--unlabeled-pool rest: no image is left; lower --labels, or choose all")
    run.recipe = flags.mathematics(args, split.sha256, {x: settings[x] for x in stages})

    # A new run, or one that goes on
    state = None
    if args.resume:
        run.folder = Path(args.resume)
        if args.resume == "auto":
            run.folder = log.find_run(SCRIPT, run.recipe)
        if run.folder is None:
            print("--resume auto: no run with these settings yet; starting one", flush=True)
        else:
            state = checkpoint.load_newest(run.folder)
            if not isinstance(state, dict) or "recipe" not in state:
                raise UserError(f"--resume {run.folder}: its checkpoint is not of this project")
            wrong = checkpoint.differences(state["recipe"], run.recipe)
            if wrong:
                raise UserError(f"--resume {run.folder}: its settings were others "
                                f"({'; '.join(wrong)}); restore them, or start anew without "
                                "--resume")
    # The model; what can be refused is refused before a folder is made
    num_classes, some = len(data.classes), settings[stages[0]]
    costs = report.cost(on_meta(args, "pretrain", some, num_classes), run.image_size)
    largest = max(views_trained_on(x, settings[x]) * settings[x].micro_batch for x in stages)
    halved = run.precision.dtype != torch.float32
    report.refuse_too_large(costs, largest, halved, run.device, args.accum_steps)
    run.carried, start = state["carried"] if state else {}, None  # finished stages, for later ones
    if args.init and state is None:
        pretrained = build_model(args, "pretrain", some, num_classes)
        start = f"start: {args.init}, {load_init(pretrained, args.init)}"
        run.carried["pretrain"] = pretrained.state_dict()
    teacher = None
    if "distill" in stages and args.teacher:
        teacher = load_teacher(args, data.classes, run)

    if run.folder is None:
        run.folder = log.new_run(SCRIPT, args.output, run.rank)
    run.stop = checkpoint.StopSignal()
    run.log = log.RunLog(run.folder, state and state["log_size"], enabled=run.rank == 0)
    if state is None:
        written = {x: vars(settings[x]) for x in stages}
        run.log.write(dict(script=SCRIPT, command=sys.argv, args=vars(args), recipe=run.recipe,
                           settings=written, classes=data.classes, split=split.describe(),
                           world=run.world, **log.versions()))
    run.results = state["results"] if state else {}
    if start is not None:
        run.log.say(start)
    greet(args, split, {x: settings[x] for x in stages}, run)

    for stage in stages:
        if state and STAGES.index(stage) < STAGES.index(state["stage"]):
            continue
        s = settings[stage]
        torch.manual_seed(seed_of(args.seed, "model"))  # the same weights on every process
        model = build_model(args, stage, s, num_classes)
        if stage in ("pretrain", "linear", "finetune") or s.student_init == "pretrained":
            take_pretrained(model, run.carried)
        model = on_device(model, run)
        if stage == "distill" and not args.teacher:
            teacher = build_model(args, "finetune", settings["finetune"], num_classes)
            teacher.load_state_dict(run.carried["finetune"])
            teacher = on_device(teacher, run).eval().requires_grad_(False)
        resume = state if state and state["stage"] == stage else None
        run_stage(stage, model, teacher, data, split, s, args, run, resume)
        if stage in ("pretrain", "finetune"):
            run.carried[stage] = model.state_dict()
    if run.world > 1:  # before the pictures: waiting for them has a limit
        dist.barrier()
        dist.destroy_process_group()
    if run.rank == 0:
        finish(args, data, split, {x: settings[x] for x in stages}, model, run)


def take_pretrained(model: Net, carried: dict):
    """f, and the layers of g that the network has, from stage pretrain or --init."""
    if "pretrain" in carried:
        own = model.state_dict().keys()
        given = {k: v for k, v in carried["pretrain"].items() if k in own}
        model.load_state_dict(given, strict=False)


def on_device(model: nn.Module, run) -> nn.Module:
    if run.device.type == "cuda":
        return model.to(run.device, memory_format=torch.channels_last)
    return model.to(run.device)


def load_teacher(args, classes, run) -> nn.Module:
    """The frozen network of --teacher RUN, for stage distill."""
    teacher, about = load_final(args.teacher, "--teacher")
    if about["classes"] != classes:
        raise UserError(f"--teacher {args.teacher}: it has other classes than the data")
    return on_device(teacher, run).eval().requires_grad_(False)


def start_processes(args) -> SimpleNamespace:
    """What a run has before it knows what to train: processes, device, precision, signals."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    elif device.type == "cuda":
        tf32 = args.dtype != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True
    workers = args.workers
    if workers is None:  # digits are drawn more quickly here than they are sent between processes
        workers = 0 if args.dataset == "digits" else min(8, (os.cpu_count() or 1) // world)
    stats = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], device=device)  # E3
    return SimpleNamespace(
        rank=rank, world=world, device=device, workers=workers, folder=None, results={},
        max_bad_images=args.max_bad_images,
        device_ids=[device.index] if device.type == "cuda" else None,
        precision=Precision(device, args.dtype),
        image_size=args.image_size or DATASETS[args.dataset][0],
        stats=255.0 * stats.view(2, 3, 1, 1))


def on_meta(args, stage: str, s, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return build_model(args, stage, s, num_classes).eval()


def greet(args, split, settings, run):
    """First lines of a run: what it trains on, which recipe, which split, where."""
    key, row = recipe(args)
    if args.dataset == "digits":
        paper = paper_args(args)
        said = ", ".join(f"{stage} {top1}" for stage, (top1, _) in paper_numbers(paper).items())
        run.log.say(f"training on the embedded digits; on ImageNet: {command_of(paper)}"
                    + (f"   (the paper, top-1: {said})" if said else ""))
    run.log.say(f"recipe {key}: {row['source']}")
    run.log.say(split.describe())
    for stage, s in settings.items():
        if s.warmup_epochs >= s.epochs:
            run.log.say(f"warning: {stage}: --warmup-epochs {s.warmup_epochs:g} of --epochs "
                        f"{s.epochs:g}: the learning rate never reaches its peak")
        views = ", two views each" if stage == "pretrain" else ""
        run.log.say(f"{stage}: {s.epochs:g} epochs, batch {s.batch_size}{views} = {run.world} "
                    f"processes x {args.accum_steps} parts x {s.micro_batch}, lr {s.lr:g} "
                    f"({s.sources['lr']})")
    dtype = str(run.precision.dtype).split(".")[-1]
    run.log.say(f"{run.folder}: {row_name(args)} on {run.device}, {dtype}, {run.workers} workers")


def finish(args, data, split, settings, model, run):
    """Weights, curves, views, neighbours, predictions, and the summary."""
    run.log.bar.close()

    s = list(settings.values())[-1]
    name = timm_name(args, model, s)
    about = dict(timm_model=name, timm_arguments=dict(num_classes=len(data.classes)),
                 classes=data.classes, image_size=run.image_size, mean=[0, 0, 0], std=[1, 1, 1],
                 encoder=[args.arch, args.width, args.sk, run.image_size, bool(s.tf_padding)],
                 head=[args.proj_layers, len(model.head)],
                 classifier=isinstance(model.classifier, nn.Linear))
    metadata = {"model": json.dumps(about)}  # one key: several have no fixed order in the file
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    if name:
        tensors = weights.rename(tensors, [], [(r"encoder\.(.*)", r"\1"),
                                               (r"classifier\.(.*)", r"fc.\1")])
    checkpoint.save_weights(run.folder / "model.safetensors", tensors, metadata)
    run.log.write(dict(results=run.results))
    panels = {"losses": ["loss"], "top-1 (%)": ["top1"], "which view belongs": ["contrast_acc"],
              "distillation": ["agreement", "teacher_acc"], "learning rate": ["lr"]}
    report.curves(log.read_log(run.folder), run.folder / "curves.png", panels)
    draw_views(data, split, settings, args, run)
    draw_neighbours(data, split, model, s, args, run)

    names = dict(pretrain="pretrained, nearest labelled image", sup="labels only (stage sup)",
                 linear="linear classifier (stage linear)", finetune="fine-tuned (stage finetune)",
                 distill="distilled (stage distill)")
    run.log.say("")
    for stage, r in run.results.items():
        run.log.say(f"{names[stage]:<34} top-1 {r['top1']:6.2f}, top-5 {r['top5']:6.2f}   "
                    f"{r['updates']} updates, {r['seconds']:.0f} s")
    for stage in [x for x in ("finetune", "distill") if {x, "sup"} <= run.results.keys()]:
        gain = run.results[stage]["top1"] - run.results["sup"]["top1"]
        run.log.say(f"{f'gain of {stage} over labels only':<34}       {gain:+6.2f}")
    run.log.say(report.band(Path(__file__).parent / "docs" / "bands.json", run.recipe))
    run.log.say(f"{run.folder}: curves.png, views.png, neighbours.png, log.jsonl, "
                "model.safetensors")
    if args.predict:
        predict(args, model, data.classes, s, run, run.folder)
    run.log.close()


def timm_name(args, model: Net, s) -> str | None:
    """timm's name of the network, where it is one of timm's: an unchanged bottleneck ResNet."""
    plain = not args.sk and args.width == 1 and not s.tf_padding and not len(model.head)
    plain &= (args.image_size or DATASETS[args.dataset][0]) > 32
    plain &= ARCHS[args.arch][0] is Bottleneck and isinstance(model.classifier, nn.Linear)
    return args.arch if plain else None


def predict(args, model, classes, s, run, folder):
    view = T.Compose(view_lists(args.dataset, run.image_size, s)["evaluate"])
    model.eval()
    with torch.no_grad():
        report.predict(args.predict, lambda seen: logits_of(model, seen, run).softmax(-1).cpu(),
                       view, classes, folder, run.workers)


def load_final(folder: str, flag: str) -> tuple[nn.Module, dict]:
    """A finished run's network and its metadata, from model.safetensors alone. Raises UserError."""
    from safetensors import safe_open

    file = Path(folder) / "model.safetensors"
    if not Path(folder).is_dir():
        raise UserError(f"{flag} {folder}: no such folder; give that of a finished run")
    if not file.exists():
        raise UserError(f"{flag} {folder}: no model.safetensors; finish it: --resume {folder}")
    tensors = checkpoint.read(file)
    with safe_open(file, "pt") as opened:
        about = json.loads((opened.metadata() or {}).get("model", "null"))
    if about is None or "encoder" not in about:
        raise UserError(f"{flag} {folder}: its model.safetensors was not written by {SCRIPT}.py")
    if not about["classifier"]:
        raise UserError(f"{flag} {folder}: stage pretrain has no classifier; --init takes this run")
    if about["timm_model"]:
        tensors = weights.rename(tensors, [], [(r"fc\.(.*)", r"classifier.\1"),
                                               (r"(.*)", r"encoder.\1")])
    encoder, (layers, kept) = Encoder(*about["encoder"]), about["head"]
    model = Net(encoder, projection_head(encoder.dim, layers)[:kept], len(about["classes"]))
    weights.load_exactly(model, tensors, set(), f"{flag} {folder}")
    return model, about


def evaluate_run(args, data, run):
    """--eval RUN: the final weights on the validation set, and --predict; nothing is trained."""
    model, about = load_final(args.eval, "--eval")
    model, s = model.to(run.device), derive(args, STAGES[0], 1)
    run.image_size = about["image_size"]
    if data.classes != about["classes"]:
        raise UserError(f"--eval {args.eval}: --data-path holds other classes than the run; "
                        "use the run's own data")
    view = T.Compose(view_lists(args.dataset, run.image_size, s)["evaluate"])
    r = evaluate(model, data.val, view, run)
    if run.rank == 0:
        pictures = len(data.val)
        print(f"{args.eval}: top-1 {r['top1']:.2f}, top-5 {r['top5']:.2f} on {pictures} pictures")
        if args.predict:
            predict(args, model, about["classes"], s, run, Path(args.eval))


def draw_views(data, split, settings, args, run, count=10):
    """views.png: pairs of views as stage pretrain compares them; labelled images as trained on."""
    shown, shown_l = (np.random.default_rng(args.seed).permutation(some)
                      for some in (split.unlabeled, split.labeled))

    def look(name, s, positions, times=1):
        of_picture = times * [T.Compose(view_lists(args.dataset, run.image_size, s)[name])]
        stream = Stream(f"picture/{name}", positions[:count], min(count, len(positions)), args.seed)
        bad = BadImages(data.train, count)
        seen, _ = next(stream_loader(data.train, of_picture, stream, start=0, stop=1, bad=bad))
        return [to_model(*v, run.stats.cpu()) for v in seen]

    rows = {}
    if "pretrain" in settings:
        s = settings["pretrain"]
        pair = [gaussian_blur(x, *draw_blur(len(x), s.blur)) for x in look("pretrain", s, shown, 2)]
        rows |= {"view 1": pair[0], "view 2": pair[1]}
    for s in [s for stage, s in settings.items() if stage not in ("pretrain", "distill")]:
        rows[s.augment] = look(s.augment, s, shown_l)[0]
    if not rows:  # stage distill alone
        rows["distill"] = look(settings["distill"].augment, settings["distill"], shown)[0]
    report.contact_sheet(rows, run.folder / "views.png", f"views of {args.dataset}")


def draw_neighbours(data, split, model, s, args, run, count=8, nearest=9, at_most=2000):
    """neighbours.png: in each row a validation image and the training images nearest to it in h, as
    it was after pretraining where the run has that."""
    net = on_device(build_model(args, "pretrain", s, len(data.classes)), run)
    take_pretrained(net, run.carried)
    encoder = net.encoder if "pretrain" in run.carried else model.encoder
    view = T.Compose(view_lists(args.dataset, run.image_size, s)["evaluate"])
    rng = np.random.default_rng(args.seed)
    asked = data.val.take(np.sort(rng.permutation(len(data.val))[:count]))
    among = rng.permutation(np.union1d(split.labeled, split.unlabeled))[:at_most]
    loader = eval_loader(asked, view, count, bad=BadImages(asked, args.max_bad_images))
    h, y, pictures = representations(encoder, loader, run)
    h_all, _, all_pictures = representations(encoder, look_at(data, among, view, args, run), run)
    found = (h @ h_all.T).topk(min(nearest, len(h_all))).indices.cpu()
    rows = {f"{data.classes[y[i]]} ({i + 1})": torch.cat([pictures[i : i + 1], all_pictures[of_i]])
            for i, of_i in enumerate(found)}
    report.contact_sheet({k: v / 255 for k, v in rows.items()}, run.folder / "neighbours.png",
                         "first column: validation images")


# The paper's rows: what --dry-run prints, and the first line of a run on digits


def paper_args(args) -> SimpleNamespace:
    """The same flags on ImageNet; pretraining with the memory, as all of the paper's networks."""
    arch = "resnet50" if args.arch == "resnet_digits" else args.arch
    labels = percent(args) if percent(args) in (1, 10, 100) else 10
    changed = dict(arch=arch, dataset="imagenet", labels=labels, num_labels=None, labels_file=None,
                   image_size=None, holdout=0, accum_steps=1)  # parts are this run's
    pretrains = "pretrain" in stages_of(args)
    if pretrains and args.follow == "recommended" and not args.memory_size:
        changed["follow"] = "D1=paper"
    return SimpleNamespace(**{**vars(args), **changed})


def paper_numbers(args) -> dict[str, tuple[float, str]]:
    """The paper's top-1 at the end of a stage, for exactly these flags: {stage: (top-1, table)}.

    Its networks were pretrained with the memory, which is not the default here (D1): that is said.
    """
    row, labels = row_name(args), percent(args)
    if args.dataset != "imagenet" or labels not in (1, 10, 100) or args.proj_layers != 3:
        return {}
    if args.holdout or len(args.labels_file or ()) > 1 or args.image_size not in (None, 224):
        return {}
    # The stages that run, with these flags and without: other stages' flags need not fit
    plain = dict.fromkeys((*SETTINGS, "unlabeled_pool")) | dict(follow="recommended")
    own, paper = ({x: derive(SimpleNamespace(**{**vars(args), **less, "accum_steps": 1}), x, 1)
                   for x in stages_of(args)} for less in ({}, plain))
    apart = {"sources", "lr_base", "lr_scaling", "memory_size", "alpha", "kd_set"}
    changed = {x for x, s in own.items() for n, v in vars(s).items()
               if n not in apart and x in ONLY_IN.get(n, STAGES) and v != getattr(paper[x], n)}
    before = run_at(args.init or args.teacher) if args.init or args.teacher else None
    log_of = before["settings"].get("pretrain", {}) if before else {}
    word = 65536 if flags.follow(args.follow, DEPARTURES).get("D1") == "paper" else 0
    memory = (vars(own["pretrain"]) if "pretrain" in own else log_of).get("memory_size", word)
    changed |= set() if memory in (0, 65536) else {"pretrain"}
    numbers = {}
    known = memory or init_kind(args) == "released"
    pretrained = "" if known else ", pretrained with the memory: --follow D1=paper"
    if row in TABLE_1:
        _, *finetuned, linear, sup = TABLE_1[row]
        numbers["finetune"] = finetuned[(1, 10, 100).index(labels)], "Table 1" + pretrained
        if labels == 100:
            numbers |= {"linear": (linear, "Table 1" + pretrained), "sup": (sup, "Table 1")}
    if labels < 100 and "distill" in own:
        s, teacher, column = own["distill"], teacher_row(args), (1, 10).index(labels)
        # "label only" is a student that sees no other image, so not alpha 0 beside all images
        only = None if s.kd_set == "labeled" else "seen, not learned"
        mixing = s.alpha < 1, s.kd_set if s.alpha else only
        tuned, distilled = (teacher_ends_in(args, x) for x in ("finetune", "distill"))
        taught = teacher == "resnet152_3x_sk" and (tuned if row == teacher else distilled)
        if taught and row in TABLE_3 and mixing == (False, "all"):
            numbers["distill"] = TABLE_3[row][1 + column], "Table 3" + pretrained
        if (row, teacher) == ("resnet50", "resnet50_2x_sk") and tuned and mixing in TABLE_2:
            alpha = ", its alpha is not stated" if 0 < s.alpha < 1 else ""
            numbers["distill"] = TABLE_2[mixing][column], "Table 2" + alpha
    needs = PIPELINES | dict(distill=("pretrain", "finetune", "distill"))
    return {stage: number for stage, number in numbers.items()
            if stage in own and not changed & {*needs[stage]}}


def command_of(args) -> str:
    """The command with these flags."""
    parts = [f"python {SCRIPT}.py --dataset {args.dataset} --data-path DIR --arch {args.arch}"]
    parts += [f"--width {args.width:g}"] if args.width != 1 else []
    parts += ["--sk"] if args.sk else []
    parts += [f"--labels {args.labels:g}"]
    usual = ("simclrv2", "all", "recommended", 3, None)
    for name in ("method", "stage", "init", "teacher", "proj_layers", "follow", "unlabeled_pool"):
        value = getattr(args, name)
        parts += [f"--{name.replace('_', '-')} {value}"] if value not in usual else []
    for name in SETTINGS:
        given = getattr(args, name) or {}
        values = {str(v) for v in given.values()}
        one = len(given) == len(STAGES) and len(values) == 1
        text = values.pop() if one else ",".join(f"{k}={v}" for k, v in given.items())
        parts += [f"--{name.replace('_', '-')} {text}"] if given else []
    return " ".join(parts)


def dry_run(args) -> str:
    """Two blocks: the run that these flags start, and the paper's row for this arch and labels."""
    lines = []
    for title, a in (("this run", args), ("the paper's row", paper_args(args))):
        share = f"{a.num_labels or 'listed'} labels"
        share = f"{percent(a):g}% of the labels" if percent(a) else share
        lines.append(f"== {title}: {a.dataset}, {row_name(a)}, {share}, init {init_kind(a)}")
        lines += [f"   {command_of(a)}"] if title != "this run" else []
        lines += [f"   the paper's own result of stage {stage}: {top1} top-1 ({where})"
                  for stage, (top1, where) in paper_numbers(a).items()]
        lines.append(f"   recipe {recipe(a)[0]}: {recipe(a)[1]['source']}")
        for stage in stages_of(a):
            s = derive(a, stage, 1)
            hidden = {"sources", "micro_batch"}
            hidden |= {k for k, stages in ONLY_IN.items() if stage not in stages}
            values = {k: v for k, v in vars(s).items() if k not in hidden}
            lines.append(report.settings_table(f"stage {stage}", values, s.sources))
            lines += cost_lines(a, stage, s)
    return "\n".join(lines)


def views_trained_on(stage: str, s) -> int:
    """For each image of a batch, how many pictures have activations that wait for the backward."""
    if stage == "linear":  # f is fixed
        return 0
    beside = stage == "distill" and s.kd_set == "all" and s.alpha < 1  # labelled ones, Eq. 3
    return 2 if stage == "pretrain" or beside else 1


def cost_lines(args, stage, s) -> list[str]:
    """Parameters, images, updates, arithmetic and memory of a stage, on one process."""
    size, classes, total = DATASETS[args.dataset]
    model = on_meta(args, stage, s, classes or 1000)
    costs = report.cost(model, args.image_size or size)
    train_mode(model, stage, bool(s.freeze_proj))
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    table_1 = sum(v.numel() for k, v in model.encoder.state_dict().items() if "tracked" not in k)
    on_all = stage == "pretrain" or stage == "distill" and s.kd_set == "all"
    trained_on = s.batch_size * views_trained_on(stage, s)
    seen = trained_on or s.batch_size
    passes = 3 if trained_on else 1  # forward one, backward two
    passes += (stage == "pretrain") * ((s.memory_size > 0) + (args.accum_steps > 1))
    flops = costs["flops"] * passes * seen
    kept = costs["kept"] * trained_on / args.accum_steps
    gib = [(costs["fixed"] + kept * share) / 2**30 for share in (1, 0.5)]
    updates, listed = "", len(args.labels_file or ())
    counted = args.num_labels or percent(args) or on_all and s.unlabeled_pool == "all"
    if total and counted and not (on_all and listed > 1):  # known without the data or own lists
        images, exact = total - args.holdout, {}
        if (args.dataset, args.holdout) == ("imagenet", 0):  # the published lists; --labels, E14
            exact = {1: 12811, 10: 128116} if listed else {1: 12820, 10: 128118}
        share = round(images * (percent(args) or 0) / 100)
        labeled = args.num_labels or exact.get(percent(args), share)
        pool = images - labeled * (s.unlabeled_pool == "rest") if on_all else labeled
        updates = f", {total_steps(pool, s.epochs, s.batch_size):,} updates in all"
    teacher = " without the teacher" if stage == "distill" else ""
    return [f"  parameters {count:,}, of which {trained:,} are trained; as Table 1 counts "
            f"{table_1:,}",
            f"  per update {seen} images or views{updates}",
            f"  per update {flops / 1e12:.4g} TFLOP{teacher}; memory about {gib[0]:.1f} GiB in "
            f"float32, {gib[1]:.1f} GiB in 16 bit"]


# ===== 9. ENTRY POINT =============================================================================

if __name__ == "__main__":
    main(parse_args())
