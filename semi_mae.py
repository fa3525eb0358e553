"""Semi-MAE (Yu, Zhao, Xu, 2023, arXiv:2301.01431): FixMatch on a plain ViT + a masked autoencoder.

  stage pretrain        MAE alone on all images (--method mae, or before the others: --pretrain)
  stage sup             the 100 warm-up epochs (Sec. 4.1), on labelled images alone            (E1)
  stage semi            everything; one step of it:                                       (Fig. 1)

  x_l --strong--> ViT --CE(., y)------------------------------> L_s  (Eq. 1) --+
  x_u --strong--> ViT --CE(., y_hat) where o >= tau ----------> L_u  (Eq. 2) --+--> L = L_s
  x_u --weak--+-> ViT, no gradient --softmax, max--> o, y_hat --^              |    + lambda L_u
              +-> hide 3/4 of the patches -> ViT -> decoder --MSE--> L_MAE ----+    + mu L_MAE
                                                                                    (Eq. 3)
  One ViT, four times. Its head learns from L_s and L_u, decoder and mask token from L_MAE. There is
  no teacher. The weak view is one tensor: what is pseudo-labelled is also what is masked.

Notation  x_l, x_u  labelled, unlabelled images; N_l, N_u their batch sizes, N_u = 7 N_l; K classes
          y_hat, o  pseudo-label and its confidence, (N_u,); tau threshold; L patches, D width
          lambda, mu  weights of L_u and L_MAE: --lambda-u, --mae-weight (FixMatch's mu is the
          ratio N_u / N_l, here --unlabeled-ratio)

How to run
  python semi_mae.py                                       80 labelled digits, minutes on a laptop
  python semi_mae.py --data-path DIR --predict NEW         own pictures: labeled/<class>/, ...
  python semi_mae.py --dataset imagenet --dry-run          which recipe, from where, at what cost
  python semi_mae.py --method mae                          weights for semi_vit.py --init
  torchrun --nproc-per-node 8 semi_mae.py --dataset imagenet --data-path DIR --labels 10

  The paper's rows (--dataset imagenet --data-path DIR), top-1 as the paper states it
    --arch vit_small --labels 10               75.9    Tables 1, 3
    --arch vit_small --labels 10 --mim lomar   76.0    Table 3
    --method sup | fixmatch                    ours: the paper has no such run

Departures. No authors' code is known. What the paper leaves out comes from the works that it builds
on (MAE, LoMaR, Semiformer, FixMatch): D1 to D19, the table DEPARTURES below, chosen with --follow.
The four that matter most: D1 labelled images are augmented strongly (digits: mildly, E9); D3 tau is
0.7, as in FixMatch's ImageNet code beside lambda = 10; D4 labelled images are unlabelled ones too;
D9 plain pixels as target. The rest, decided once:
  E1  An epoch of sup and semi is a pass over the labelled images. The warm-up epochs of Sec. 4.1
      train on labels alone, with the whole batch labelled (both: Semiformer's code).
  E2  Positions are MAE's sine-cosine table, those of an --init FILE where it has some, and never
      trained. Weights start as MAE's, the head as well; the patch convolution's bias starts at 0
      (MAE's keeps torch's draw).
  E3  The last LayerNorm serves the head and the decoder (MAE: one module); with --pool avg it comes
      before the mean, where MAE's fine-tuning has a new one after it.
  E4  The weak view passes without stochastic depth (Semiformer's code), the branch as well (MAE).
  E5  Where one cosine spans sup and semi (D6), AdamW's moments go on too: it is one run. With
      --stage semi --init RUN the cosine goes on as well, the moments start anew.
  E6  The decoder of stage semi starts anew, also after stage pretrain: its target differs (D9).
      That of an --init FILE is taken where the first stage has one and its size fits (--stage
      semi, --method mae).
  E7  Evaluated are the last raw weights, on the middle 224 pixels of 256 (Semiformer's code; small
      pictures: E9). An average (--ema-decay, D17) is only ever evaluated.
  E8  LoMaR: positions come from relative tables alone, in the classifier too, as in its own; the
      query is not scaled there (LoMaR's code; iRPE's code scales it).
  E9  vit_digits (width 64, depth 4) and vit_cifar (width 128, depth 6) are ours; in their own rows
      the head reads the mean of the patches. So are the digits' views (no flip; labelled images
      without crop and RandAugment) and the evaluation of digits and of pictures under 64 pixels as
      a whole. RandAugment's posterize keeps one bit at least.
  E10 No clipping of gradients, no mixup, no CutMix (Semiformer's code has none).
  E11 The decoder is MAE's (512 wide, 8 deep), larger than ViT-S, though the paper calls it small.
With --accum-steps A the sums are split into A parts and nothing else: LayerNorm has no statistics
of a batch. LoMaR draws its windows once a part and once a process.
"""

import argparse
import contextlib
import json
import math
import os
import random
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data.auto_augment import rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from timm.layers import Attention, calculate_drop_path_rates, drop_path, resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torchvision import transforms as T
from torchvision.transforms.functional import pil_to_tensor

from common import checkpoint, flags, log, report, weights
from common.amp import Precision, pick_device
from common.data import load_dataset
from common.ema import Ema
from common.pictures import BadImages, find_pictures
from common.split_lists import list_name
from common.splits import UserError
from common.streams import Stream, eval_loader, seed_of, stream_loader

# ===== 1. CONFIG  (paper Sec. 4.1) ================================================================

SCRIPT = "semi_mae"
STAGES = ("pretrain", "sup", "semi")
PUBLISHED = {  # lists of ImageNet, and the row that fits them; the paper does not name its own
    "SimCLR 1percent.txt": 1,
    "SimCLR 10percent.txt": 10,
    "Semiformer 10% (FixMatch's ImageNet split 1)": 10,
}
METHODS = {  # what each changes in stage semi
    "sup": {},  # stage sup alone
    "fixmatch": dict(mae_weight=0.0),  # Eq. 3 without its last term
    "semi_mae": {},
    "mae": {},  # stage pretrain alone
}
ARCHS = {  # name: timm's model, arguments that differ from it
    "vit_digits": ("vit_tiny_patch16_224", dict(embed_dim=64, depth=4, num_heads=4)),
    "vit_cifar": ("vit_tiny_patch16_224", dict(embed_dim=128, depth=6, num_heads=4)),
    "vit_tiny": ("vit_tiny_patch16_224", {}),
    "vit_small": ("vit_small_patch16_224", {}),  # the paper's: "ViT-Small, 22M"
    "vit_base": ("vit_base_patch16_224", {}),
}
DATASETS = {  # pixels, patch, classes, training images
    "digits": (28, 7, 10, 8000),
    "cifar10": (32, 4, 10, 50000),
    "cifar100": (32, 4, 100, 50000),
    "imagenette": (112, 8, 10, 9469),  # 14 x 14 patches, as many as in the paper
    "imagenet": (224, 16, 1000, 1281167),
    "folder": (224, 16, None, None),
}


def _by_stage(pretrain, sup, semi):
    return dict(pretrain=pretrain, sup=sup, semi=semi)


# name: (type, default of each stage, help); a recipe row or a flag changes them. The defaults are
# the ImageNet row: MAE's own recipe in stage pretrain, the paper's Sec. 4.1 in sup and semi.
SETTINGS = {
    "epochs": (int, _by_stage(800, 100, 600),
        "passes over all images (pretrain) or the labelled ones (sup, semi) [Sec. 4.1: 100 + 600; "
        "MAE: 800]"),
    "batch_size": (int, _by_stage(4096, 3456, 432),
        "images (pretrain) or labelled images (sup, semi) per update, over all processes and parts "
        "[D14; MAE: 4096]"),
    "unlabeled_ratio": (float, _by_stage(0.0, 0.0, 7.0), "N_u / N_l [Sec. 4.1: 7; D13]"),
    "lr": (float, _by_stage(None, 1e-3, 1e-3),
        "peak learning rate, whatever the batch [Sec. 4.1: 1e-3]"),
    "lr_per_256": (float, _by_stage(1.5e-4, None, None),
        "instead of it: lr = this x batch / 256 [MAE: 1.5e-4]"),
    "min_lr": (float, _by_stage(0.0, 1e-5, 1e-5), "floor of the cosine [Sec. 4.1: 1e-5; MAE: 0]"),
    "warmup_lr": (float, _by_stage(0.0, 1e-6, 1e-6), "where the linear warm-up begins [D15]"),
    "warmup_epochs": (float, _by_stage(40.0, 5.0, 5.0),
        "linear warm-up; of the whole run with --lr-span run [D15; MAE: 40]"),
    "lr_span": (str, _by_stage("stage", "run", "run"),
        "run: one cosine over sup and semi; stage: one for each [D6]"),
    "lr_each": (str, _by_stage("step", "step", "step"),
        "step or epoch: when the learning rate moves [D16]"),
    "lr_shifted": (int, _by_stage(1, 0, 0),
        "1: the cosine begins where the warm-up ends; 0: with it [MAE code: 1; Semiformer code: "
        "0]"),
    "weight_decay": (float, _by_stage(0.05, 0.05, 0.05),
        "AdamW; none on vectors, biases, tokens [D10, D11]"),
    "decay_tokens": (int, _by_stage(1, 0, 0), "1: class and mask token decay as well [D11]"),
    "beta2": (float, _by_stage(0.95, 0.999, 0.999), "AdamW [MAE: 0.95; Semiformer code: 0.999]"),
    "pool": (str, _by_stage("token", "token", "token"),
        "what the head reads: token, or avg of the patches [D18]"),
    "drop_path": (float, _by_stage(0.0, 0.1, 0.1),
        "stochastic depth of the last block, linear from 0; labelled and strong views only [D12]"),
    "label_smoothing": (float, _by_stage(0.0, 0.0, 0.0), "of the true labels [D8]"),
    "labeled_aug": (str, _by_stage("strong", "strong", "strong"),
        "view of labelled images: strong, or weak as pseudo-labels have it [D1]"),
    "crop_min": (float, _by_stage(0.2, 0.08, 0.08),
        "smallest area of a random crop [MAE: 0.2; Semiformer code: 0.08]"),
    "reprob": (float, _by_stage(0.0, 0.25, 0.25),
        "random erasing of strong views [Semiformer code: 0.25]"),
    "tau": (float, _by_stage(0.0, 0.0, 0.7),
        "drop a pseudo-label less confident than this: too low teaches errors (watch kept_acc), "
        "too high starves (watch kept) [Eq. 2; D3]"),
    "tau_strict": (int, _by_stage(0, 0, 0), "1: a confidence of exactly tau is dropped [D2]"),
    "lambda_u": (float, _by_stage(0.0, 0.0, 10.0),
        "weight of L_u; where it is too large, own errors drown 80 labels within a hundred updates "
        "[Eq. 3; Sec. 4.1: 10; D7]"),
    "mae_weight": (float, _by_stage(0.0, 0.0, 5.0),
        "mu, weight of L_MAE; 0: no branch, FixMatch [Eq. 3; Sec. 4.1: 5]"),
    "norm_pix_loss": (int, _by_stage(1, 0, 0),
        "1: each patch of the target has mean 0, variance 1 [D9; MAE README: 1]"),
    "mask_ratio": (float, _by_stage(0.75, 0.75, 0.75), "share of hidden patches [MAE: 0.75]"),
    "dec_dim": (int, _by_stage(512, 512, 512), "width of the decoder [MAE: 512]"),
    "dec_depth": (int, _by_stage(8, 8, 8), "blocks of the decoder; 1 saves a third of a step "
        "[MAE: 8]"),
    "dec_heads": (int, _by_stage(16, 16, 16), "attention heads of the decoder [MAE: 16]"),
    "lomar_window": (int, _by_stage(7, 7, 7), "side of a window in patches [LoMaR: 7]"),
    "lomar_windows": (int, _by_stage(4, 4, 4), "windows per image [LoMaR: 4]"),
    "lomar_ratio": (float, _by_stage(0.8, 0.8, 0.8), "share of hidden patches in one [LoMaR: 0.8]"),
    "lomar_pairing": (str, _by_stage("all", "all", "all"),
        "which windows an image sees, all or official [D19]"),
    "ema_decay": (float, _by_stage(0.0, 0.0, 0.0),
        "average of the weights, evaluated and no more; 0: none [D17]"),
}
MAE_ONLY = {"mask_ratio", "dec_dim", "dec_depth", "dec_heads"}
LOMAR_ONLY = {"lomar_window", "lomar_windows", "lomar_ratio", "lomar_pairing"}
SEMI_ONLY = {"unlabeled_ratio", "tau", "tau_strict", "lambda_u", "mae_weight", "unlabeled_pool"}
NOT_READ = {  # settings that a stage does not look at
    "pretrain": SEMI_ONLY | {"pool", "drop_path", "label_smoothing", "labeled_aug", "reprob",
                             "ema_decay", "lr_span"},
    "sup": SEMI_ONLY | MAE_ONLY | LOMAR_ONLY | {"norm_pix_loss"},
    "semi": set(),
}

# Where the paper is silent or its parents disagree; reached through --follow. None: that side says
# nothing, and the recommended value holds. "Code" is a parent's: there is none of Semi-MAE.
_TRAIN, _SEMI = dict(stage=("sup", "semi")), dict(stage="semi")
_BIG, _BIG_SEMI = dict(_TRAIN, dataset="imagenet"), dict(_SEMI, dataset="imagenet")
DEPARTURES = {  # where, setting, recommended, paper, code (None: silent, as recommended), source
    "D1": (_TRAIN, "labeled_aug", "strong", "weak", "strong",
           "Eq. 1: weak; Sec. 4.1: as Semiformer, whose labelled images are strong"),
    "D2": (_SEMI, "tau_strict", 0, 1, 0, "Eq. 2: >; FixMatch and Semiformer code: >="),
    "D3": (_BIG_SEMI, "tau", 0.7, None, 0.7, "FixMatch ImageNet code (beside lambda 10) and "
           "Semiformer default; 0.95 is for CIFAR"),
    "D4": (_SEMI, "unlabeled_pool", "all", "rest", "all",
           "Sec. 4.1: the rest; FixMatch authors and Semiformer code: all training images"),
    "D5": (dict(stage="sup", dataset="imagenet"), "epochs", 100, 100, 30,
           "Sec. 4.1: 100, before the 600; Semiformer: 30 (of its 600; here before --epochs semi)"),
    "D6": (_TRAIN, "lr_span", "run", None, "run", "Semiformer code: one cosine over both"),
    "D7": (_BIG_SEMI, "lambda_u", 10.0, 10.0, 4.0, "Sec. 4.1: 10; Semiformer scripts: 4"),
    "D8": (_TRAIN, "label_smoothing", 0.0, 0.0, 0.1,
           "Eq. 1: plain cross-entropy; Semiformer code: 0.1 on labelled images"),
    "D9": (_SEMI, "norm_pix_loss", 0, None, 1,
           "Sec. 4.1: MAE's defaults (plain pixels in its paper); MAE README's command: on"),
    "D10": (_TRAIN, "weight_decay", 0.05, None, 0.05, "MAE and Semiformer code"),
    "D11": (_TRAIN, "decay_tokens", 0, None, 1,
            "Semiformer code exempts the class token; MAE code decays class and mask token"),
    "D12": (_BIG, "drop_path", 0.1, None, 0.1,
            "Semiformer code, for the views that train the head; never in weak view and branch"),
    "D13": (_BIG_SEMI, "unlabeled_ratio", 7.0, 7.0, 95 / 13,
            "Sec. 4.1: 1:7; Semiformer code: 13 + 95 images per GPU"),
    "D14": (_BIG_SEMI, "batch_size", 432, None, 416,
            "Semiformer code: 13 labelled on each of 32 GPUs"),
    "D15": (_BIG, "warmup_epochs", 5.0, None, 5.0, "Semiformer code: linear from 1e-6"),
    "D16": (_TRAIN, "lr_each", "step", None, "epoch",
            "MAE code: each step; Semiformer code: each epoch (one late, which is not copied)"),
    "D17": (_SEMI, "ema_decay", 0.0, None, 0.999,
            "paper: none; FixMatch code evaluates an average, which never makes pseudo-labels; "
            "Semiformer code keeps one, of 0.99996, and evaluates the raw weights"),
    "D18": (_TRAIN, "pool", "token", None, "avg",
            "ViT, Semiformer: class token; MAE fine-tuning code: mean of the patches"),
    "D19": (dict(stage=("pretrain", "semi")), "lomar_pairing", "all", None, "official",
            "evident intent: each image through every window; LoMaR code, where the number of "
            "windows divides the batch: through one of them, masked anew each time"),
}

_SMALL = dict(dec_dim=64, dec_depth=1, dec_heads=4, lomar_window=3, lomar_windows=2)  # 16 patches
_DIGITS = dict(  # found on 1,000 held-out training images, see docs/semi_mae.md
    pretrain=dict(_SMALL, epochs=39, batch_size=256, lr=2e-3, warmup_epochs=2, crop_min=0.6,
                  decay_tokens=0),
    sup=dict(epochs=1000, batch_size=64, lr=2e-3, min_lr=2e-5, warmup_epochs=50, lr_span="stage",
             pool="avg", drop_path=0.0, crop_min=0.6),
    semi=dict(_SMALL, epochs=400, batch_size=24, lr=1e-3, warmup_epochs=17, lr_span="stage",
              pool="avg", drop_path=0.0, crop_min=0.6, lambda_u=2.0, mae_weight=1.0),
    source="measured here")
_SMALLER_STEPS = {stage: dict(_DIGITS[stage], lr=3e-4) for stage in STAGES}
_DECODER = dict(dec_dim=192, dec_depth=4, dec_heads=6)  # of the size of the encoder, not of MAE's


def _untuned(batch, **branch):
    """Small pictures, own pictures: no published weights fit, few labels; MAE first: --pretrain."""
    branch = dict(_DECODER, **branch)
    return dict(
        pretrain=dict(branch, epochs=400, batch_size=batch, lr_per_256=6e-4, warmup_epochs=20),
        sup=dict(epochs=200, batch_size=128, warmup_epochs=10, lr_span="stage", crop_min=0.35),
        semi=dict(branch, epochs=300, batch_size=32, warmup_epochs=5, lr_span="stage",
                  crop_min=0.35, lambda_u=1.0, mae_weight=1.0, tau=0.9),
        source="not tuned")


_SMALL_BRANCH = dict(dec_dim=64, dec_depth=1, dec_heads=4, lomar_window=5)
_CIFAR_SMALL = dict(  # minutes on a CPU; stages sup and semi share one cosine (D6)
    pretrain=dict(_SMALL_BRANCH, epochs=40, batch_size=256, lr=2e-3, warmup_epochs=2),
    sup=dict(epochs=16, batch_size=64, lr=2e-3, warmup_epochs=1, pool="avg", drop_path=0.0,
             reprob=0.0, crop_min=0.5),
    semi=dict(_SMALL_BRANCH, epochs=16, batch_size=64, unlabeled_ratio=2.0, lr=2e-3,
              warmup_epochs=1, pool="avg", drop_path=0.0, reprob=0.0, crop_min=0.5, tau=0.8,
              lambda_u=1.0, mae_weight=1.0),
    source="measured here; not searched")
_CIFAR_SMALL_1 = dict(  # the same with 500 labels
    pretrain=_CIFAR_SMALL["pretrain"],
    sup=dict(_CIFAR_SMALL["sup"], epochs=140, warmup_epochs=5),
    semi=dict(_CIFAR_SMALL["semi"], epochs=140, warmup_epochs=5, tau=0.95),
    source="measured here; not searched")
_CIFAR_WIDE = dict(  # only its stage pretrain was measured
    pretrain=dict(_CIFAR_SMALL["pretrain"], epochs=25, lr=1e-3),
    sup=dict(_CIFAR_SMALL["sup"], lr=1e-3), semi=dict(_CIFAR_SMALL["semi"], lr=1e-3),
    source="stage pretrain measured here; the others as for vit_digits, smaller steps; not tuned")
_NETTE_SMALL = dict(  # for 64 pixels in patches of 8
    pretrain=dict(_CIFAR_SMALL["pretrain"], epochs=80, warmup_epochs=4),
    sup=dict(_CIFAR_SMALL["sup"], epochs=80, warmup_epochs=5),
    semi=dict(_CIFAR_SMALL["semi"], epochs=60, warmup_epochs=5),
    source="measured here; not searched")

RECIPES = {  # (data set, arch, init, labels %): {stage: settings that differ from the defaults}
    ("imagenet", "vit_small", None, 10): dict(pretrain={}, sup={}, semi={},
                                              source="Sec. 4.1; stage pretrain: MAE"),
    ("imagenet", None, None, None): dict(pretrain={}, sup={}, semi={},
                                         source="as for vit_small at 10%; no row of the paper"),
    ("digits", "vit_digits", None, None): _DIGITS,
    ("digits", None, None, None): dict(
        _SMALLER_STEPS, source="as for vit_digits, smaller steps; not tuned"),
    ("cifar10", "vit_digits", None, 10): _CIFAR_SMALL,
    ("cifar10", "vit_digits", None, 1): _CIFAR_SMALL_1,
    ("cifar10", "vit_cifar", None, None): _CIFAR_WIDE,
    ("cifar10", None, None, None): _untuned(512, lomar_window=5),  # 8 x 8 patches
    ("cifar100", None, None, None): _untuned(512, lomar_window=5),
    ("imagenette", "vit_digits", None, 10): _NETTE_SMALL,
    ("imagenette", None, None, None): _untuned(256),
    ("folder", None, None, None): _untuned(256),
}
PAPER = {  # the paper's own top-1 (data set, arch, labels %): {--mim: number}      [Tables 1 and 3]
    ("imagenet", "vit_small", 10): dict(mae=75.9, lomar=76.0),
}


def parse_args(argv=None):
    p = flags.Parser(prog=f"{SCRIPT}.py", description=__doc__.split("\n\n")[0],
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("what to train").add_argument
    add("--arch", choices=ARCHS,
        help="backbone; default vit_digits on digits, else vit_small [Sec. 4.1]")
    add("--method", choices=METHODS, default="semi_mae",
        help="sup: labels alone; fixmatch: without the branch; mae: stage pretrain alone [Sec. 3]")
    add("--stage", choices=("all", *STAGES), default="all",
        help="one stage of the method; semi from --init RUN [Sec. 4.1]")
    add("--pretrain", action="store_true",
        help="stage pretrain before the others: MAE on all images [MAE]")
    add("--mim", choices=("mae", "lomar", "none"), default="mae",
        help="masked image modelling of the branch, and of stage pretrain [Table 3]")
    add("--init", metavar="FILE", help="weights to start from: in the format of MAE, LoMaR or "
        "timm, or a run of this script [MAE]")
    add("--patch-size", type=int, help="pixels of a patch; default by data set [Sec. 4.1: 16]")
    add("--follow", default="recommended", metavar="WHOM", help="recommended, paper, code, or a "
        "list such as D1=paper,D7=code, where the sources disagree [table DEPARTURES]")
    flags.add_data(p, DATASETS, "labelled percent of each class, at least one image; default 1 on "
                   "digits, else 10 [Table 1: 10]")
    flags.add_settings(p, SETTINGS, STAGES)
    flags.add_running(p, SCRIPT)
    args = p.parse_args(argv)
    flags.check(p, args)
    if args.pretrain and args.stage in ("sup", "semi"):
        p.error(f"--pretrain: --stage {args.stage} trains that stage alone; leave out one of them")
    args.dataset = args.dataset or ("folder" if args.data_path else "digits")
    args.arch = args.arch or ("vit_digits" if args.dataset == "digits" else "vit_small")
    return args


def percent(args):
    """--labels, its default, or that of a published list; None for another list, or a count."""
    if args.num_labels or args.labels_file:
        return PUBLISHED.get(list_name(args.labels_file[0])) if args.labels_file else None
    return args.labels or (1 if args.dataset == "digits" else 10)


def stages_of(args) -> list[str]:
    """The stages of --method, or the one of them that --stage names."""
    of = {"sup": ("sup",), "mae": ("pretrain",)}.get(args.method, ("sup", "semi"))
    first = args.pretrain or args.stage == "pretrain"
    of = ("pretrain", *of) if first else of
    return [x for x in STAGES if x in of and args.stage in ("all", x)]


def recipe(args):
    """(key, row): the most special row of RECIPES for these flags."""
    for special in ((args.arch, None, percent(args)), (args.arch, None, None),
                    (None, None, percent(args)), (None, None, None)):
        if (args.dataset, *special) in RECIPES:
            return (args.dataset, *special), RECIPES[(args.dataset, *special)]


def settings_of(args, stage: str) -> SimpleNamespace:
    """Default < recipe < method < --follow < flag, with `sources`."""
    _, row = recipe(args)
    layers = [("default [D4]", dict(unlabeled_pool="all")), (row["source"], row[stage])]
    if stage == "semi":
        layers += [(f"--method {args.method}", METHODS[args.method])]
    s = flags.resolve(SETTINGS, stage, layers, DEPARTURES, dict(dataset=args.dataset, stage=stage),
                      args, NOT_READ[stage])
    if args.unlabeled_pool:
        s.unlabeled_pool, s.sources["unlabeled_pool"] = args.unlabeled_pool, "--unlabeled-pool"
    return s


def derive(args, stage: str, world_size: int) -> SimpleNamespace:
    """All settings of a stage, with `sources`, lr and one process's share. Raises UserError."""
    s = settings_of(args, stage)
    for name, allowed in (("labeled_aug", ("strong", "weak")), ("lr_span", ("run", "stage")),
                          ("lr_each", ("step", "epoch")), ("pool", ("token", "avg")),
                          ("lomar_pairing", ("all", "official")), ("lr_shifted", (0, 1)),
                          ("decay_tokens", (0, 1)), ("tau_strict", (0, 1)),
                          ("norm_pix_loss", (0, 1))):
        if getattr(s, name) not in allowed:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)}: "
                            f"one of {', '.join(map(str, allowed))}")
    s.batch_u = round(s.unlabeled_ratio * s.batch_size) if stage == "semi" else 0
    for name, value, least in (("epochs", s.epochs, 0), ("batch_size", s.batch_size, 1),
                               ("unlabeled_ratio", s.batch_u, int(stage == "semi"))):
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name):g}: at least {least}")
    if s.tau > 1:
        raise UserError(f"--tau {s.tau:g}: from 0 to 1")
    per_256, absolute = (getattr(args, name) or {} for name in ("lr_per_256", "lr"))
    if stage in per_256 and stage not in absolute:
        s.lr = None  # the flag wins over an absolute rate of the row
    if s.lr is None:  # MAE's rule, by the whole batch
        s.lr = s.lr_per_256 * s.batch_size / 256
        s.sources["lr"] = f"{s.lr_per_256:g} x {s.batch_size} / 256"
    parts = world_size * args.accum_steps
    s.micro_batch = s.batch_size // parts
    for text, size in ((f"--batch-size {s.batch_size}", s.batch_size),
                       (f"--unlabeled-ratio {s.unlabeled_ratio:g}: {s.batch_u} images", s.batch_u)):
        if size % parts:
            raise UserError(f"{text} is not divisible by {world_size} processes x "
                            f"--accum-steps {args.accum_steps}")
    s.epochs_before, s.epochs_total = 0, s.epochs  # where the stage lies in its cosine
    if s.lr_span == "run" and stage != "pretrain" and args.method != "sup":  # D6
        s.epochs_total = sum(settings_of(args, x).epochs for x in ("sup", "semi"))
        s.epochs_before = s.epochs_total - s.epochs if stage == "semi" else 0
    shape = shape_of(args)
    if shape["image_size"] % shape["patch_size"]:
        raise UserError(f"--image-size {shape['image_size']} is no multiple of --patch-size "
                        f"{shape['patch_size']}: change one")
    if has_branch(args, s, stage):
        check_branch(args.mim, shape["image_size"] // shape["patch_size"], s)
    elif stage == "pretrain":
        raise UserError("--mim none: stage pretrain has nothing to learn from; mae or lomar")
    return s


def plan(args, world_size: int) -> dict[str, SimpleNamespace]:
    """The stages that these flags train, with all their settings. Raises UserError."""
    settings = {x: derive(args, x, world_size) for x in stages_of(args)}
    settings = {x: s for x, s in settings.items() if s.epochs > 0}
    if not settings:
        raise UserError(f"--stage {args.stage}, --method {args.method}, --epochs: no stage is left "
                        "to train; raise --epochs or choose another stage")
    if args.stage == "semi" and not args.init:
        raise UserError("--stage semi: needs --init RUN, a run of stage sup, or pretrained weights")
    return settings


def shape_of(args) -> dict:
    """What the model is, beside its settings."""
    size, patch, *_ = DATASETS[args.dataset]
    return dict(arch=args.arch, mim=args.mim, image_size=args.image_size or size,
                patch_size=args.patch_size or patch)


def has_branch(args, s, stage: str) -> bool:
    """A decoder exists only where its loss runs, so that no process waits for its gradient."""
    return args.mim != "none" and (stage == "pretrain" or (stage == "semi" and s.mae_weight > 0))


def check_branch(mim: str, grid: int, s):
    """A branch that would hide nothing or everything, or does not fit, is refused by its flag."""
    for name in sorted(MAE_ONLY - {"mask_ratio"} if mim == "mae" else {"lomar_window"}):
        if getattr(s, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)}: at least 1")
    if mim == "mae":
        kept = int(grid**2 * (1 - s.mask_ratio))  # as in `random_masking`
        if not 0 < kept < grid**2:
            raise UserError(f"--mask-ratio {s.mask_ratio:g}: {kept} of {grid**2} patches stay "
                            "visible; at least one must, and one must be hidden")
        if s.dec_dim % s.dec_heads or s.dec_dim % 4:
            raise UserError(f"--dec-dim {s.dec_dim}: a multiple of 4 and of --dec-heads "
                            f"{s.dec_heads}")
        return
    hidden = int(s.lomar_window**2 * s.lomar_ratio)  # as in `lomar_masking`
    if not 0 < hidden < s.lomar_window**2:
        raise UserError(f"--lomar-ratio {s.lomar_ratio:g}: {hidden} of {s.lomar_window**2} patches "
                        "are hidden; at least one must be, and one must stay")
    if not 0 < s.lomar_windows <= grid - s.lomar_window + 1:
        raise UserError(f"--lomar-windows {s.lomar_windows} of --lomar-window {s.lomar_window} do "
                        f"not fit a grid of {grid} patches")


# ===== 2. DATA  (paper Sec. 4.1) ==================================================================


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


# <shared: rand_augment>
def rand_augment(size: int):
    """timm's `rand-m9-mstd0.5-inc1`: two of 15 operations, each applied with probability 0.5.

    At the top of its range it asks for posterize(bits=0), which Pillow 13 refuses: one at least.
    """
    hparams = dict(translate_const=int(0.45 * size), img_mean=(124, 116, 104),
                   interpolation=str_to_pil_interp("bicubic"))
    policy = rand_augment_transform("rand-m9-mstd0.5-inc1", hparams)
    for op in policy.ops:
        if op.name.startswith("Posterize"):
            op.level_fn = AtLeastOneBit(op.level_fn)
    return policy


class AtLeastOneBit:  # a class, not a closure: spawned workers receive it by pickle
    def __init__(self, level_fn):
        self.level_fn = level_fn

    def __call__(self, level, hparams):
        return (max(1, self.level_fn(level, hparams)[0]),)


# </shared>


def view_lists(dataset: str, size: int, s) -> dict[str, list]:
    """Each view as a list, in the paper's order, ending in (bytes, erasing box). s: settings."""
    crop = RandomResizedCropAndInterpolation(size, (s.crop_min, 1), (3 / 4, 4 / 3), "bicubic")
    if dataset == "digits":  # numbers fit for digits: no flip; mild affine for labels, small shift
        linear = T.InterpolationMode.BILINEAR
        affine = T.RandomAffine(15, (0.1, 0.1), (0.85, 1.15), 10, linear)
        views = dict(
            strong=[crop, rand_augment(size), ToBytes(s.reprob)],
            weak=[T.Resize(size), T.RandomAffine(0, (0.08, 0.08)), ToBytes()],
            mae=[crop, ToBytes()],
            evaluate=[T.Resize(size), ToBytes()],
        )
        strong_labeled = [T.Resize(size), affine, ToBytes(s.reprob)]
    else:  # Sec. 4.1: Semiformer's views
        flip, bicubic = T.RandomHorizontalFlip(0.5), T.InterpolationMode.BICUBIC
        larger = T.Resize(int(256 / 224 * size), bicubic)  # the shorter side: 256 for 224
        shifted = T.RandomCrop(size, padding=4, padding_mode="reflect")
        whole = [T.Resize((size, size), bicubic)]  # small pictures are evaluated whole
        views = dict(
            strong=[crop, flip, rand_augment(size), ToBytes(s.reprob)],
            weak=[flip, larger, shifted, ToBytes()],
            mae=[crop, flip, ToBytes()],  # stage pretrain alone; the branch has the weak view
            evaluate=[*(whole if size < 64 else [larger, T.CenterCrop(size)]), ToBytes()],
        )
        strong_labeled = views["strong"]
    views["labeled"] = strong_labeled if s.labeled_aug == "strong" else views["weak"]  # D1
    return views


# ===== 3. MODEL  (paper Sec. 3, Fig. 1) ===========================================================


# <shared: sincos_pos_embed>
def sincos_pos_embed(dim: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding, the class token's row of zeros first: (1, 1 + grid^2, dim).

    First half of dim: sin, then cos of the column index; second half: of the row index; frequencies
    10000^(-k / (dim/4)), as in MAE's code. timm's has another order.
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # (grid, dim/4)
    axis = torch.cat([angle.sin(), angle.cos()], 1)  # (grid, dim/2)
    table = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], 1)  # columns, rows
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table]).unsqueeze(0).float()

# </shared>


# <shared: masked_patches>
def patchify(x: Tensor, p: int) -> Tensor:
    """(N, 3, H, W) -> (N, L, p * p * 3); inside a patch: row, column, channel (MAE's order)."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * c)


def unpatchify(tokens: Tensor, p: int) -> Tensor:
    """(N, L, p * p * 3) -> (N, 3, H, W) of a square image; undoes `patchify` exactly."""
    n, g = len(tokens), math.isqrt(tokens.shape[1])
    x = tokens.reshape(n, g, g, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, g * p, g * p)


def random_masking(tokens: Tensor, mask_ratio: float, noise: Tensor):
    """Keep the patches of smallest noise, by gather: every shape is known before the draw.

    tokens (N, L, D), noise (N, L) float32 (196 draws in bf16: only about 155 different values)
    returns visible (N, L_keep, D) in the order of the noise; mask (N, L), 1 = hidden;
            ids_restore (N, L): where each patch stands in that order
    """
    length = tokens.shape[1]
    keep = int(length * (1 - mask_ratio))  # as in MAE's code: (196, 0.75) -> 49, (10, 0.9) -> 0
    assert keep >= 1, f"mask ratio {mask_ratio} hides all {length} patches"
    ids_shuffle = noise.argsort(dim=1)  # (N, L)
    ids_restore = ids_shuffle.argsort(dim=1)  # its inverse  (N, L)
    index = ids_shuffle[:, :keep, None].expand(-1, -1, tokens.shape[2])
    return tokens.gather(1, index), (ids_restore >= keep).float(), ids_restore


class MAEDecoder(nn.Module):
    """MAE's decoder: visible tokens to the pixels of all patches.  512 / 8 / 16 for ViT-S: 25.8M.

    MAE has one decoder for all sizes, made for ViT-L; beside ViT-S it is two fifths of the
    step. Width, depth, heads 256 / 8 / 8 (6.6M) saves 30% of the step's compute.
    Parameters carry the names of MAE's published files.
    """

    def __init__(self, enc_dim: int, patch_dim: int, grid: int, dim=512, depth=8, heads=16):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_embed = nn.Linear(enc_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))  # one, of the decoder's width
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(dim, grid), requires_grad=False)
        blocks = (Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = norm(dim)
        self.decoder_pred = nn.Linear(dim, patch_dim)

    def forward(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """latent (N, 1 + L_keep, D), ids_restore (N, L) -> predicted patches (N, L, p * p * 3)."""
        z = self.decoder_embed(latent)  # (N, 1 + L_keep, dim)
        n, length, dim = *ids_restore.shape, z.shape[2]
        hidden = self.mask_token.to(z.dtype).expand(n, length + 1 - z.shape[1], dim)
        patches = torch.cat([z[:, 1:], hidden], dim=1)  # (N, L, dim), still in the noise's order
        patches = patches.gather(1, ids_restore[:, :, None].expand(-1, -1, dim))
        # Positions only now that patches are back in their places; visible ones get them anew.
        z = torch.cat([z[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            z = block(z)
        return self.decoder_pred(self.decoder_norm(z))[:, 1:]  # without the class token


# </shared>


def rpe_buckets(grid: int) -> Tensor:
    """iRPE's "product" buckets of a grid behind a class token, (1 + grid^2, 1 + grid^2) integers.

    An offset d of query minus key becomes 0, +-1, +-2 (|d| = 2, 3) or +-3 (|d| >= 4), for rows
    and columns: 7 * 7 buckets, and number 49 for every pair with the class token.
    """
    alpha, beta, gamma = 1.9, 3.8, 15.2  # LoMaR code
    d = torch.arange(-(grid - 1), grid).double()
    far = (d.abs().clamp(min=1) / alpha).log() / math.log(gamma / alpha)
    far = d.sign() * (alpha + (beta - alpha) * far).round().clamp(max=beta)
    index = torch.where(d.abs() <= alpha, d, far).long() + 3  # .long() truncates 3.8 to 3
    row, col = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    row, col = (index[a.reshape(-1, 1) - a.reshape(1, -1) + grid - 1] for a in (row, col))
    return F.pad(row * 7 + col, (1, 0, 1, 0), value=49)


def rpe_bias(q: Tensor, table: Tensor, buckets: Tensor) -> Tensor:
    """iRPE on keys, contextual: bias[b, h, i, j] = q[b, h, i] . table[:, buckets[i, j]].

    q (B, H, T, d), table (1, d, 50) shared over heads, buckets (T, T) -> (B, H, T, T).
    q is not scaled by 1 / sqrt(d) here: LoMaR code; iRPE's own scales it first.
    """
    return (q @ table).gather(3, buckets.expand(*q.shape[:2], -1, -1))


class RelativeAttention(Attention):
    """timm's attention + iRPE; `attn_mask` carries the integer buckets of the grid at hand.

    The grid is handed over, never guessed from the number of tokens: MAE's 49 visible patches and
    LoMaR's 7 x 7 windows both make 50 tokens, and wrong buckets would go unnoticed.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rpe_k = nn.ParameterDict({"lookup_table_weight": torch.zeros(1, self.head_dim, 50)})

    def forward(self, x: Tensor, attn_mask: Tensor, is_causal: bool = False) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = rpe_bias(q, self.rpe_k["lookup_table_weight"], attn_mask).to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # scales q . k, not the bias
        return self.proj(x.transpose(1, 2).reshape(n, t, -1))


class LomarHead(nn.Module):
    """LoMaR has no decoder: mask tokens enter the encoder, one linear layer gives the pixels."""

    def __init__(self, enc_dim: int, patch_dim: int):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, enc_dim))
        self.encoder_pred = nn.Linear(enc_dim, patch_dim)


def lomar_windows(n: int, grid: int, size: int, tops: Tensor, lefts: Tensor, pairing="all"):
    """Image and patches that each row of the branch sees: (N * M,), (N * M, size^2) raster order.
    tops, lefts (M,): corners of the windows, one draw for all images of a process.
    """
    m, rows = len(tops), torch.arange(n * len(tops), device=tops.device)
    # "all": every image through all M windows. "official": row r holds image r mod N and window
    # r mod M, as LoMaR code does; where M divides N an image sees one window, M times (D19).
    image_ids = rows // m if pairing == "all" else rows % n
    cell = torch.arange(size, device=tops.device)
    window = (cell[:, None] * grid + cell).flatten()  # patches seen from its corner  (size^2,)
    return image_ids, (tops * grid + lefts)[rows % m][:, None] + window


def lomar_masking(tokens: Tensor, mask_token: Tensor, mask_ratio: float, noise: Tensor):
    """Mask token on the patches of smallest noise: tokens (R, T, D) -> the same, mask (R, T)."""
    hidden = int(tokens.shape[1] * mask_ratio)  # (49, 0.8) -> 39; MAE truncates the kept ones
    assert 0 < hidden < tokens.shape[1], f"{mask_ratio} hides {hidden} of {tokens.shape[1]}"
    mask = noise.argsort(dim=1).argsort(dim=1) < hidden
    return torch.where(mask[:, :, None], mask_token, tokens), mask.float()


class SemiMAE(nn.Module):
    """ViT classifier that also reconstructs.  ViT-S, 1000 classes: 21,975,016; the paper: 22M.

    `vit` is a plain timm model with MAE's positions; for --mim lomar it has iRPE in each block and
    no absolute positions (22,013,416). `decoder`: MAEDecoder, LomarHead, or None (no branch).
    s: settings and `shape_of`.
    """

    def __init__(self, s, num_classes: int, branch: bool):
        super().__init__()
        lomar, (name, arguments) = s.mim == "lomar", timm_arguments(s, num_classes)
        self.s, self.grid = s, s.image_size // s.patch_size
        self.vit = timm.create_model(
            name, **arguments, weight_init="skip", pos_embed="none" if lomar else "learn",
            attn_layer=RelativeAttention if lomar else Attention)
        # Applied in `encode`, not by timm's blocks: only two of the four passes have it (D12).
        self.drop_rates = calculate_drop_path_rates(s.drop_path, len(self.vit.blocks))
        self.decoder, dims = None, (self.vit.embed_dim, 3 * s.patch_size**2)
        if lomar:
            self.register_buffer("buckets", rpe_buckets(self.grid), persistent=False)
            self.register_buffer("window_buckets", rpe_buckets(s.lomar_window), persistent=False)
        if branch:
            self.decoder = LomarHead(*dims) if lomar else MAEDecoder(
                *dims, self.grid, s.dec_dim, s.dec_depth, s.dec_heads)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """MAE's: xavier-uniform, for the patch convolution as a matrix; here also for the head, and
        the convolution's bias is 0."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.view(len(m.weight), -1))
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.LayerNorm):
                m.reset_parameters()
        for name, p in self.named_parameters():
            if name.endswith(("cls_token", "mask_token")):
                nn.init.normal_(p, std=0.02)
        if self.vit.pos_embed is not None:  # fixed, yet a parameter: MAE's files hold it
            self.vit.pos_embed.copy_(sincos_pos_embed(self.vit.embed_dim, self.grid))
            self.vit.pos_embed.requires_grad_(False)

    def embed(self, x: Tensor):
        """(N, 3, H, W) -> patches (N, L, D), class token (1, 1, D), positions added to both."""
        patches, cls, pos = self.vit.patch_embed(x), self.vit.cls_token, self.vit.pos_embed
        return (patches, cls) if pos is None else (patches + pos[:, 1:], cls + pos[:, :1])

    def encode(self, cls: Tensor, patches: Tensor, buckets=None, drop=False) -> Tensor:
        """The blocks and the last norm, on any set of patches: (N, T, D) -> (N, 1 + T, D)."""
        z = torch.cat([cls.expand(len(patches), -1, -1), patches], dim=1)  # fp32 under autocast
        for block, rate in zip(self.vit.blocks, self.drop_rates):
            z = z + drop_path(block.attn(block.norm1(z), attn_mask=buckets), rate, drop)
            z = z + drop_path(block.mlp(block.norm2(z)), rate, drop)
        return self.vit.norm(z)

    def classify(self, x: Tensor, drop=False) -> Tensor:
        """(N, 3, H, W) -> logits (N, K)."""
        patches, cls = self.embed(x)
        z = self.encode(cls, patches, getattr(self, "buckets", None), drop)
        return self.vit.forward_head(z)

    def draw(self, n: int, device):
        """Random numbers of the branch for n images, drawn outside a compiled forward."""
        if self.decoder is None:
            return None
        if self.s.mim == "mae":
            return dict(noise=torch.rand(n, self.grid**2, device=device))
        size, m = self.s.lomar_window, self.s.lomar_windows  # distinct tops, distinct lefts:
        tops, lefts = (torch.randperm(self.grid - size + 1, device=device)[:m] for _ in range(2))
        return dict(tops=tops, lefts=lefts, noise=torch.rand(n * m, size**2, device=device))

    def reconstruct(self, x: Tensor, draw: dict):
        """Hide patches of x (N, 3, H, W) and predict them.

        returns pred, target (R, T, p * p * 3), mask (R, T), 1 = hidden; what a row shows:
        patch_ids (R, T), image_ids (R,). MAE: R = N, T = L. LoMaR: a row per image and window.
        """
        patches, cls = self.embed(x)
        target, (n, length, _) = patchify(x, self.s.patch_size), patches.shape
        if self.s.mim == "mae":
            visible, mask, restore = random_masking(patches, self.s.mask_ratio, draw["noise"])
            pred = self.decoder(self.encode(cls, visible), restore)  # encoder: visible ones only
            ids = torch.arange(max(n, length), device=x.device)
            return pred, target, mask, ids[:length].expand(n, -1), ids[:n]
        image_ids, ids = lomar_windows(n, self.grid, self.s.lomar_window, draw["tops"],
                                       draw["lefts"], self.s.lomar_pairing)
        flat = (image_ids[:, None] * length + ids).flatten()  # index_select: a cheap backward
        seen, target = (v.flatten(0, 1).index_select(0, flat).view(*ids.shape, -1)
                        for v in (patches, target))
        seen, mask = lomar_masking(
            seen, self.decoder.mask_token, self.s.lomar_ratio, draw["noise"])
        pred = self.decoder.encoder_pred(self.encode(cls, seen, self.window_buckets)[:, 1:])
        return pred, target, mask, ids, image_ids

    def forward(self, x_l=None, x_u_s=None, x_u_w=None, draw=None) -> dict:
        """Every branch of a step behind one call, so that DDP sees one forward for one backward.

        x_l (N_l, 3, H, W) and x_u_s (N_u, ...) share one joint pass; x_u_w (N_u, ...) is classified
        without gradient where x_u_s is there, and reconstructed where `draw` is.
        """
        out = {}
        if x_l is not None:
            joint = x_l if x_u_s is None else torch.cat([x_l, x_u_s])
            out["logits"] = self.classify(joint, drop=self.training)
        if draw is not None:
            out["pred"], out["target"], out["mask"], _, _ = self.reconstruct(x_u_w, draw)
        if x_u_s is not None:
            # Last, not first: autocast caches the weights that it casts, and a cast made without
            # gradient that the joint pass found there would have lost the way to its weight.
            with torch.no_grad():
                out["logits_w"] = self.classify(x_u_w)  # no stochastic depth (E4)
        return out


def timm_arguments(s, num_classes: int) -> tuple[str, dict]:
    """timm's name and arguments of `vit`, as they are stored beside the final weights."""
    name, arguments = ARCHS[s.arch]
    return name, dict(arguments, img_size=s.image_size, patch_size=s.patch_size,
                      num_classes=num_classes, global_pool=s.pool, fc_norm=False)


def build_model(args, s, num_classes: int, stage: str) -> SemiMAE:
    """The model of a stage; with --mae-weight 0 it is FixMatch's."""
    s = SimpleNamespace(**vars(s), **shape_of(args))
    model = SemiMAE(s, num_classes, has_branch(args, s, stage))
    if stage == "pretrain":  # no loss reaches the head
        model.vit.head.requires_grad_(False)
    return model


# Formats that --init reads: the keys to enter in turn, then patterns of names with replacements
# (the first that fits a whole name wins; None drops it).
NAMES = [(r"head\..*", None), (r"(mask_token|decoder.*|encoder_pred.*)", r"decoder.\1"),
         (r"(.*)", r"vit.\1")]
FORMATS = {
    "mae": (["model"], NAMES),  # also LoMaR's
    "timm": ([], NAMES),  # flat
    "run": (["model"], []),  # checkpoint.pt of this script
}


def load_init(model: SemiMAE, path: str) -> str:
    """Load --init FILE, or a run; returns its format. Raises UserError with the keys.

    The encoder must be complete, its positions are resized where the grid differs (bicubic); a head
    of other classes and a decoder of another size are left out.
    """
    state = weights.read_init(path)
    inner = state.get("model", state) if isinstance(state, dict) else None
    known = isinstance(inner, dict) and "patch_embed.proj.weight" in inner
    kind = ("mae" if inner is not state else "timm") if known else None
    if isinstance(inner, dict) and "vit.patch_embed.proj.weight" in inner:
        kind = "run"
    if kind is None:
        first = ", ".join(str(k)[:40] for k in list(state)[:4]) if isinstance(state, dict) else "-"
        raise UserError(f"--init {path}: not one of the formats {', '.join(FORMATS)}; its first "
                        f"keys are {first}")
    relative = any("rpe_k" in name for name in inner)
    if relative != (model.s.mim == "lomar"):
        raise UserError(f"--init {path}: its positions are {'relative' if relative else 'absolute'}"
                        f"; {'add' if relative else 'leave out'} --mim lomar")
    own, new, may_miss = model.state_dict(), weights.rename(state, *FORMATS[kind]), set()
    for part in ("vit.head.", "decoder."):
        shapes = [{k: v.shape for k, v in w.items() if k.startswith(part)} for w in (own, new)]
        if shapes[0] != shapes[1]:
            new = {k: v for k, v in new.items() if not k.startswith(part)}
            may_miss |= shapes[0].keys()
    has_head = kind == "run" and state.get("stage") != "pretrain" and "vit.head.weight" in new
    pool = state["recipe"].get(f"{state.get('stage')}.pool") if has_head else None
    if pool not in (None, model.s.pool) and model.vit.head.weight.requires_grad:
        raise UserError(f"--init {path}: the head of that run reads --pool {pool}, here "
                        f"{model.s.pool}; give --pool {pool}")
    pos = "vit.pos_embed"
    if pos in new and pos in own and new[pos].shape[1] != own[pos].shape[1]:
        new[pos] = resample_abs_pos_embed(new[pos], [model.grid] * 2, num_prefix_tokens=1,
                                          antialias=False)
    weights.load_exactly(model, new, may_miss, f"--init {path} (format {kind})")
    return kind


def published_weights(model: SemiMAE, full: bool) -> dict:
    """MAE's file format (LoMaR's for --mim lomar): {"model": encoder}, or all that reconstructs."""
    parts = ("vit.", "decoder.") if full else ("vit.",)
    return {"model": {k.split(".", 1)[1]: v.detach().cpu().clone()  # names inside: the published
                      for k, v in model.state_dict().items()
                      if k.startswith(parts) and not k.startswith("vit.head.")}}


# ===== 4. LOSSES  (paper Eq. 1-3) =================================================================


def supervised_loss(logits_l: Tensor, y_l: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy on labelled images, paper Eq. 1.

        L_s = 1/N_l * sum_i H(y_i, f(x_i^l))

    logits_l (N_l, K), y_l (N_l,) -> ()
    """
    return F.cross_entropy(logits_l.float(), y_l, label_smoothing=label_smoothing)  # Eq. 1


def pseudo_label_loss(logits_s: Tensor, y_hat: Tensor, o: Tensor, tau: float, strict=False):
    """Cross-entropy of the strong view against confident pseudo-labels, paper Eq. 2.

        L_u = 1/N_u * sum_i H(y_hat_i, f(A(x_i^u))) * [max(p_i) > tau]

    logits_s (N_u, K)  strong view             o  (N_u,)  confidence max(p_i), detached
    y_hat    (N_u,)    argmax(p_i), weak view  returns L_u () and the kept fraction ()
    """
    keep = (o > tau if strict else o >= tau).float()  # D2: > in Eq. 2, >= in all codes  (N_u,)
    ce = F.cross_entropy(logits_s.float(), y_hat, reduction="none")  # H(y_hat, f(A(x)))  (N_u,)
    # Over all N_u, not over the kept: L_u grows with confidence, and is 0, not NaN, where none is.
    return (keep * ce).mean(), keep.mean()  # Eq. 2


# <shared: mae_loss>
def patch_statistics(target: Tensor):
    """Mean and deviation of each patch: (N, L, P) -> two of (N, L, 1); unbiased, as in MAE code."""
    target = target.float()
    return target.mean(dim=-1, keepdim=True), (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def mae_loss(pred: Tensor, target: Tensor, mask: Tensor, norm_pix: bool) -> Tensor:
    """Mean squared error on the hidden patches: MAE's loss, L_MAE of Semi-MAE's Eq. 3.

        L_MAE = sum(mask * mean_P((pred - target)^2)) / sum(mask)

    pred, target (N, L, P), mask (N, L), 1 = hidden -> ()
    norm_pix: each patch of the target is brought to mean 0 and variance 1 first.
    """
    target = target.float()
    if norm_pix:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    error = (pred.float() - target).square().mean(dim=-1)  # (N, L)
    return (error * mask).sum() / mask.sum()  # visible patches do not count


def undo_norm_pix(pred: Tensor, target: Tensor) -> Tensor:
    """A normalised prediction back to pixels, by the statistics of the true patch; for pictures.
    (Drawn as it is it looks like noise, although nothing is wrong with it.)"""
    mean, std = patch_statistics(target)
    return pred.float() * std + mean


# </shared>


def total_loss(loss_l: Tensor, loss_u: Tensor, loss_mae, lambda_u: float, mu: float) -> Tensor:
    """L = L_s + lambda * L_u + mu * L_MAE, paper Eq. 3."""
    return loss_l + lambda_u * loss_u + mu * loss_mae  # Eq. 3


# ===== 5. OPTIMISER AND SCHEDULES  (paper Sec. 4.1) ===============================================


def parameter_groups(model: nn.Module, weight_decay: float, decay_tokens: bool) -> list[dict]:
    """AdamW's groups: vectors, biases, class and mask token do not decay (D11); tables of relative
    positions do. Fixed positions need no gradient and are in no group."""
    decay, no_decay = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            token = name.endswith(("cls_token", "mask_token")) and not decay_tokens
            (no_decay if p.ndim <= 1 or token else decay).append(p)
    return [dict(params=decay, weight_decay=weight_decay), dict(params=no_decay, weight_decay=0.0)]


def lr_at(step: int, steps_per_epoch: int, s) -> float:
    """Learning rate of an update: linear warm-up, then half a cosine.

        lr(t) = min_lr + (lr - min_lr) * (1 + cos(pi * t / T)) / 2

    s.epochs_before, s.epochs_total: where this stage lies in the span of the cosine (D6).
    s.lr_shifted 0: t is the epoch, so that the cosine is under way when the warm-up ends
    (Semiformer: 0.99983e-3 at epoch 5 of 600); 1: t and T count from that end (MAE).
    """
    epoch = s.epochs_before + (
        step // steps_per_epoch if s.lr_each == "epoch" else step / steps_per_epoch)  # D16
    if epoch < s.warmup_epochs:
        return s.warmup_lr + (s.lr - s.warmup_lr) * epoch / s.warmup_epochs
    start = s.warmup_epochs if s.lr_shifted else 0
    t = min(1.0, (epoch - start) / max(1e-9, s.epochs_total - start))
    return s.min_lr + (s.lr - s.min_lr) * 0.5 * (1 + math.cos(math.pi * t))


def set_lr(optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr


# ===== 6. TRAINING STEP  (paper Sec. 3, Fig. 1) ===================================================
# model: a SemiMAE or its DDP wrap; draw: the bare model's draw() for as many images.


def mae_step(model, x, s, precision, draw) -> dict[str, Tensor]:
    """Stage pretrain: MAE, or LoMaR, alone. x (N, 3, S, S)."""
    with precision.autocast():
        out = model(x_u_w=x, draw=draw)
    loss_mae = mae_loss(out["pred"], out["target"], out["mask"], s.norm_pix_loss)  # L_MAE
    return dict(loss=loss_mae, loss_mae=loss_mae)


def sup_step(model, x_l, y_l, s, precision) -> dict[str, Tensor]:
    """Stage sup, the warm-up of Sec. 4.1. x_l (N_l, 3, S, S), y_l (N_l,)."""
    with precision.autocast():
        logits_l = model(x_l)["logits"]
    loss_l = supervised_loss(logits_l, y_l, s.label_smoothing)  # L_s, Eq. 1
    return dict(loss=loss_l, loss_l=loss_l)


def semi_step(model, x_l, y_l, x_u_w, x_u_s, s, precision, draw):
    """Stage semi. x_l (N_l, 3, S, S), y_l (N_l,); x_u_w, x_u_s (N_u, 3, S, S): weak and strong view
    of the same images. Without a branch draw is None, and this is FixMatch, bit by bit. Returns
    losses by name, and y_hat and o (N_u,) for the log.
    """
    with precision.autocast():
        out = model(x_l, x_u_s, x_u_w, draw)  # x_u_w is pseudo-labelled and reconstructed
    logits_l, logits_s = out["logits"].split([len(x_l), len(x_u_s)])
    # float32 before softmax and threshold: autocast on a CPU would leave them in bf16
    o, y_hat = out["logits_w"].float().softmax(-1).max(-1)  # max(p_i), argmax(p_i)  (N_u,), (N_u,)
    loss_l = supervised_loss(logits_l, y_l, s.label_smoothing)  # L_s, Eq. 1
    loss_u, kept = pseudo_label_loss(logits_s, y_hat, o, s.tau, s.tau_strict)  # L_u, Eq. 2
    if draw is None:
        loss = total_loss(loss_l, loss_u, 0.0, s.lambda_u, 0.0)
        return dict(loss=loss, loss_l=loss_l, loss_u=loss_u, kept=kept), y_hat, o
    loss_mae = mae_loss(out["pred"], out["target"], out["mask"], s.norm_pix_loss)  # L_MAE
    loss = total_loss(loss_l, loss_u, loss_mae, s.lambda_u, s.mae_weight)  # L, Eq. 3
    return dict(loss=loss, loss_l=loss_l, loss_u=loss_u, loss_mae=loss_mae, kept=kept), y_hat, o


# ===== 7. EVALUATION ==============================================================================


@torch.no_grad()
def evaluate(model, images, view, run, batch=250) -> dict[str, float]:
    """Top-1 and top-5 in percent, each image once over all processes. Restores training mode."""
    training = model.training
    model.eval()
    sums = torch.zeros(3, device=run.device)  # float32 counts exactly to 16 million
    share = dict(rank=run.rank, world=run.world, workers=run.workers,
                 bad=BadImages(images, run.max_bad_images))
    for seen, targets in eval_loader(images, view, batch, **share):
        logits = logits_of(model, seen, run)
        hit = logits.topk(min(5, logits.shape[1])).indices == targets.to(run.device)[:, None]
        sums += torch.stack([hit[:, 0].sum(), hit.sum(), torch.ones_like(hit[:, 0]).sum()])
    if run.world > 1:
        dist.all_reduce(sums)
    model.train(training)
    top1, top5, count = sums.tolist()
    return dict(top1=round(100 * top1 / count, 3), top5=round(100 * top5 / count, 3))


def logits_of(model, seen, run) -> Tensor:
    """(N, K) float32 of a batch of the evaluation view, (bytes, boxes) on the host."""
    x = to_model(*(t.to(run.device) for t in seen), run.stats)
    with run.precision.autocast():
        return model(x)["logits"].float()


@torch.no_grad()
def evaluate_branch(model, images, view, run, batch=250) -> dict[str, float]:
    """L_MAE on all images, the measure of stage pretrain; always the same draws."""
    sums = torch.zeros(2, device=run.device)
    share = dict(rank=run.rank, world=run.world, workers=run.workers,
                 bad=BadImages(images, run.max_bad_images))
    with torch.random.fork_rng(run.device_ids or []):
        torch.manual_seed(0)
        for seen, _ in eval_loader(images, view, batch, **share):
            x = to_model(*(t.to(run.device) for t in seen), run.stats)
            with run.precision.autocast():
                pred, target, mask, _, _ = model.reconstruct(x, model.draw(len(x), x.device))
            error = mae_loss(pred, target, mask, model.s.norm_pix_loss)
            sums += torch.stack([error * len(x), torch.tensor(float(len(x)), device=x.device)])
    if run.world > 1:
        dist.all_reduce(sums)
    return dict(val_loss_mae=round((sums[0] / sums[1]).item(), 5))


@torch.no_grad()
def reconstructions(model: SemiMAE, x: Tensor, stats: Tensor, draw=None) -> dict[str, Tensor]:
    """Rows of reconstructions.png, {label: (N, 3, H, W) in 0..1}.

    x (N, 3, H, W) was normalised by stats (2, 3, 1, 1), mean and std in bytes.
    "reconstructed" shows all predictions, also of visible patches, which no loss ever asked for;
    "pasted" the hidden ones in place. LoMaR: one window of each image, what lies outside is grey
    (in "pasted": original).
    """
    p, (mean, std) = model.s.patch_size, stats / 255.0
    pred, target, mask, ids, image_ids = model.reconstruct(x, draw or model.draw(len(x), x.device))
    pred = undo_norm_pix(pred, target) if model.s.norm_pix_loss else pred.float()
    pixels = patchify(x.float(), p)  # (N, L, P)
    of_image = image_ids == torch.arange(len(x), device=x.device)[:, None]
    row = of_image.int().argmax(dim=1)  # the first row of each image  (N,)
    pred, mask, ids = pred[row], mask[row, :, None], ids[row, :, None].expand(-1, -1, 3 * p * p)
    grey = patchify(((0.5 - mean) / std).expand_as(x), p)
    seen = pixels.gather(1, ids)
    rows = {"original": pixels,
            "masked": grey.scatter(1, ids, torch.where(mask > 0, grey.gather(1, ids), seen)),
            "reconstructed": grey.scatter(1, ids, pred),
            "pasted": pixels.scatter(1, ids, torch.where(mask > 0, pred, seen))}
    return {k: (unpatchify(v, p) * std + mean).clamp(0, 1) for k, v in rows.items()}


def draw_reconstructions(model, images, view, run, title: str, count=10):
    """reconstructions.png of some validation pictures of several classes, always the same draws."""
    spread = np.linspace(0, len(images) - 1, min(count, len(images)))  # folders are sorted by class
    chosen = images.take(spread.astype(int))
    ((seen, _),) = eval_loader(chosen, view, count, bad=BadImages(chosen, count))
    x = to_model(*(t.to(run.device) for t in seen), run.stats)
    with torch.random.fork_rng(run.device_ids or []):
        torch.manual_seed(0)
        rows = reconstructions(model, x, run.stats)
    report.contact_sheet(rows, run.folder / "reconstructions.png", title)


# ===== 8. MAIN LOOP ===============================================================================


def run_stage(stage, model, moments, data, split, s, args, run, resume):
    """Train one stage, in place; returns AdamW's state by name. One loop serves all stages.

    model: unwrapped, with the weights to start from. moments: AdamW's state of the stage before, or
    {}. resume: a checkpoint of this very stage, or None.
    """
    if stage == "pretrain":
        everything = np.union1d(split.labeled, split.unlabeled)
        counted = Stream("pretrain", everything, s.batch_size, args.seed)
    else:  # an epoch is a pass over the labelled images (E1)
        counted = Stream(f"{stage}/labeled", split.labeled, s.batch_size, args.seed)
    steps_per_epoch = counted.steps_per_pass
    total = s.epochs * steps_per_epoch
    evaluate_at = {round(total * k / args.evals) for k in range(1, args.evals + 1)} - {0}

    torch.manual_seed(seed_of(args.seed, stage, run.rank))  # from here on draws are a process's own
    average = Ema(model) if s.ema_decay and stage != "pretrain" else None  # D17
    names = {p: n for n, p in model.named_parameters()}
    groups = parameter_groups(model, s.weight_decay, s.decay_tokens)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, s.beta2), eps=1e-8, fused=True)
    if stage == "semi" and s.lr_span == "run":  # E5
        optimizer.state.update({p: moments[n] for p, n in names.items() if n in moments})
    run.precision.reset()
    start, seconds_before, unprinted = 0, 0.0, []
    if resume:
        start, seconds_before, unprinted = resume["step"], resume["seconds"], resume["unprinted"]
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        if average is not None:
            average.module.load_state_dict(resume["average"])
        if run.precision.scaler is not None and resume["scaler"]:
            run.precision.scaler.load_state_dict(resume["scaler"])
        checkpoint.restore_rng(resume["rng"], run.rank, seed_of(args.seed, stage, run.rank, start))
    if args.compile:  # in place: the keys of the state dict stay clean
        torch.compiler.reset()  # a stage has its own sizes, and each size its own graph
        model.compile(dynamic=False)
    student = model
    if run.world > 1:  # the only buffers are LoMaR's constant tables
        student = nn.parallel.DistributedDataParallel(model, device_ids=run.device_ids,
                                                      broadcast_buffers=False)

    views = {k: T.Compose(v) for k, v in view_lists(args.dataset, run.image_size, s).items()}
    bad = BadImages(data.train, args.max_bad_images)
    how = dict(start=start, stop=total, rank=run.rank, world=run.world, accum=args.accum_steps,
               workers=run.workers, pin=run.device.type == "cuda", bad=bad)
    view = views["mae" if stage == "pretrain" else "labeled"]
    batches = stream_loader(data.train, [view], counted, **how)
    if stage == "semi":
        unlabeled = Stream("semi/unlabeled", split.unlabeled, s.batch_u, args.seed)
        of_u = stream_loader(data.train, [views["weak"], views["strong"]], unlabeled, **how)
        batches = ((*b_l, *b_u) for b_l, b_u in zip(batches, of_u))
        # Of own pictures none is known but the labelled ones, which say nothing of pseudo-labels.
        known = bool((data.train.targets[split.unlabeled] >= 0).all())
    if resume:
        bad.seen.update(resume["bad_images"])

    def images(seen):  # (bytes, boxes) on the host -> pictures on the device
        return to_model(*(t.to(run.device, non_blocking=True) for t in seen), run.stats)

    quicker = "--arch vit_digits" if args.dataset == "digits" and args.arch != "vit_digits" else ""
    run.log.start(stage, start, total, unprinted, run.device, quicker)
    step, parts, began = start, [], time.perf_counter()
    student.train()
    for batch in run.log.wait(batches):
        set_lr(optimizer, lr_at(step, steps_per_epoch, s))
        last_part = len(parts) + 1 == args.accum_steps
        with student.no_sync() if run.world > 1 and not last_part else contextlib.nullcontext():
            (seen, *_), y, *of_u = batch
            x, y = images(seen), y.to(run.device, non_blocking=True)
            if stage == "pretrain":
                draw = model.draw(len(x), run.device)
                losses = mae_step(student, x, s, run.precision, draw)
            elif stage == "sup":
                losses = sup_step(student, x, y, s, run.precision)
            else:
                (seen_w, seen_s), y_u = of_u
                x_w, x_s = images(seen_w), images(seen_s)
                draw = model.draw(len(x_w), run.device)
                losses, y_hat, o = semi_step(student, x, y, x_w, x_s, s, run.precision, draw)
                if known:  # the only use of unlabelled images' true labels: two logged numbers
                    right = y_hat == y_u.to(run.device, non_blocking=True)
                    sure = o > s.tau if s.tau_strict else o >= s.tau
                    losses["pseudo_acc"] = right.sum() / len(right)
                    losses["kept_acc"] = (right & sure).sum() / sure.sum().clamp(min=1)
            run.precision.backward(losses["loss"] / args.accum_steps)
        parts.append({k: v.detach() for k, v in losses.items()})
        if not last_part:
            continue
        means = {k: torch.stack([part[k] for part in parts]).mean() for k in parts[0]}
        if run.world > 1:  # what is logged, and watched for NaN, is the mean over the processes
            together = torch.stack(list(means.values()))
            dist.all_reduce(together)
            means = dict(zip(means, together / run.world))
        watched = {k: v for k, v in means.items() if k.startswith("loss")}
        applied = run.precision.update(optimizer, watched)
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update(model, s.ema_decay, applied)
        parts, step = [], step + 1
        run.log.add(step, means)

        signalled = run.stop.asked()
        stopping, printing = signalled or step == args.stop_after, step % args.print_every == 0
        saving = step % args.save_every == 0 or stopping or step == total
        if printing or saving:
            run.precision.check(optimizer, names, step)
        if printing or step == total:
            run.log.report(stage, step, images=s.batch_size + s.batch_u,
                           epoch=round(step / steps_per_epoch, 3), bad_images=len(bad.seen),
                           lr=optimizer.param_groups[0]["lr"])
        if step in evaluate_at:
            before = time.perf_counter()
            measure = evaluate_branch if stage == "pretrain" else evaluate
            results = measure(model, data.val, views["evaluate"], run)
            if average is not None:
                of_average = evaluate(average.module, data.val, views["evaluate"], run)
                results |= {f"ema_{k}": v for k, v in of_average.items()}
            if model.decoder is not None and run.rank == 0:
                draw_reconstructions(model, data.val, views["evaluate"], run, f"{stage} {step}")
            run.log.evaluation(stage, step, results, time.perf_counter() - before)
            run.results[stage] = results
        if saving:
            seconds = seconds_before + time.perf_counter() - began
            run.results.setdefault(stage, {}).update(updates=step, seconds=round(seconds, 1))
            save(stage, step, seconds, model, average, optimizer, bad, run)
        if stopping and step < total:
            run.log.say(f"stopped at {stage} step {step}; --resume {run.folder} goes on")
            raise SystemExit(128 + signalled if signalled else 0)
    return {names[p]: state for p, state in optimizer.state.items()}


def save(stage, step, seconds, model, average, optimizer, bad, run):
    """Checkpoint after an update: written by the first process, with the draws of all."""
    rng, scaler = checkpoint.rng_states(), run.precision.scaler
    if run.rank == 0:
        state = dict(
            stage=stage, step=step, seconds=seconds, model=model.state_dict(), rng=rng,
            average=None if average is None else average.module.state_dict(),
            optimizer=optimizer.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
            unprinted=run.log.unprinted(), bad_images=sorted(bad.seen), log_size=run.log.size,
            results=run.results, recipe=run.recipe)
        checkpoint.save(run.folder, state)


@log.clear_errors
def main(args):
    if args.dry_run:
        return print(dry_run(args))
    if args.predict:
        find_pictures(args.predict, "--predict")  # now, not after hours of training
    if args.eval:
        args = flags.stored_args(args, SCRIPT)
    run = start_processes(args)
    data = load_dataset(args.dataset, args.data_path, seed=args.split_seed, holdout=args.holdout)
    if args.eval:
        return evaluate_run(args, data, run)

    # What will be trained, on what
    settings = plan(args, run.world)
    stages = list(settings)
    if args.predict and stages[-1] == "pretrain":
        raise UserError("--predict: stage pretrain trains no classifier; add a stage, or leave it")
    pool = settings[stages[-1]].unlabeled_pool
    split = flags.choose_split(args, data, pool, 1 if args.dataset == "digits" else 10)
    if "semi" in stages and not len(split.unlabeled):
        raise UserError("--labels: no image is left unlabelled; lower it, or --unlabeled-pool all")
    run.recipe = flags.mathematics(args, split.sha256, settings)

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
    # What can be refused is refused before a folder is made
    halved, kind = run.precision.dtype != torch.float32, None
    for stage in stages:
        s = settings[stage]
        costs = cost(args, s, len(data.classes), stage)
        largest = s.micro_batch + s.batch_u // (run.world * args.accum_steps)
        report.refuse_too_large(costs, largest, halved, run.device, args.accum_steps)
    if args.init and state is None:
        kind = load_init(build_model(args, settings[stages[0]], len(data.classes), stages[0]),
                         args.init)

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
    if kind:
        run.log.say(f"start: {args.init}, format {kind}")
    greet(args, split, settings, run)

    model, moments = None, {}
    for stage in stages:
        if state and STAGES.index(stage) < STAGES.index(state["stage"]):
            continue
        before = model
        torch.manual_seed(seed_of(args.seed, "model", stage))  # the same weights on every process
        model = build_model(args, settings[stage], len(data.classes), stage)
        if before is not None:
            carry_weights(before, model)
        elif args.init and state is None:
            load_init(model, args.init)
        model.to(run.device)
        resume = state if state and state["stage"] == stage else None
        last = run_stage(stage, model, moments, data, split, settings[stage], args, run, resume)
        moments = last if stage == "sup" else {}  # E5: stage pretrain is a run of its own
        if stage == "pretrain" and run.rank == 0:
            publish(args, model, run)
    if run.world > 1:  # before the pictures: waiting for them has a limit
        dist.barrier()
        dist.destroy_process_group()
    if run.rank == 0:
        finish(args, data, split, settings, model, run)


def carry_weights(before: SemiMAE, model: SemiMAE):
    """From a stage to the next: everything but the decoder, which starts anew (E6)."""
    weights_now = {k: v for k, v in before.state_dict().items() if not k.startswith("decoder.")}
    own = {k for k in model.state_dict() if k.startswith("decoder.")}
    weights.load_exactly(model, weights_now, own, "the stage before")


def published_files(args, folder) -> tuple[Path, Path]:
    """Encoder; encoder and decoder: named as MAE's, so that semi_vit.py --init knows the format."""
    name = folder / f"{args.mim}_pretrain_{args.arch}.pth"
    return name, name.with_stem(f"{name.stem}_full")


def publish(args, model, run):
    for full, file in enumerate(published_files(args, run.folder)):
        checkpoint.save_weights(file, published_weights(model, bool(full)))
        run.log.say(f"{file}: {'all of it' if full else 'the encoder, for --init'}")


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
    stats = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], device=device)
    return SimpleNamespace(
        rank=rank, world=world, device=device, workers=workers, folder=None, results={},
        max_bad_images=args.max_bad_images,
        device_ids=[device.index] if device.type == "cuda" else None,
        precision=Precision(device, args.dtype),
        image_size=args.image_size or DATASETS[args.dataset][0],
        stats=255.0 * stats.view(2, 3, 1, 1))


def on_meta(args, s, num_classes: int, stage: str) -> SemiMAE:
    with torch.device("meta"):
        return build_model(args, s, num_classes, stage)


def greet(args, split, settings, run):
    """First lines of a run: what it trains on, which recipe, which split, where."""
    key, row = recipe(args)
    if args.dataset == "digits":
        paper = paper_args(args)
        number = paper_number(paper)
        run.log.say(f"training on the embedded digits; on ImageNet: {command_of(paper)}"
                    + (f"   (the paper: {number} top-1)" if number else ""))
    run.log.say(f"recipe {key}: {row['source']}")
    run.log.say(split.describe())
    for stage, s in settings.items():
        if s.epochs_before == 0 and s.warmup_epochs >= s.epochs_total:
            run.log.say(f"warning: {stage}: --warmup-epochs {s.warmup_epochs:g} of --epochs "
                        f"{s.epochs_total}: the learning rate never reaches its peak")
        what = {"pretrain": "images", "sup": "labelled",
                "semi": f"labelled + {s.unlabeled_ratio:g} x unlabelled"}[stage]
        run.log.say(f"{stage}: {s.epochs} epochs, batch {s.batch_size} {what} = "
                    f"{run.world} processes x {args.accum_steps} parts x {s.micro_batch}, "
                    f"lr {s.lr:g} ({s.sources['lr']})")
    dtype = str(run.precision.dtype).split(".")[-1]
    run.log.say(f"{run.folder}: {args.arch} on {run.device}, {dtype}, {run.workers} workers")


def finish(args, data, split, settings, model, run):
    """Weights, curves, views, predictions, and the summary. settings: {stage: those it had}."""
    run.log.bar.close()

    last = list(settings)[-1]  # no loss of stage pretrain reached its head: it is not kept
    name, arguments = timm_arguments(model.s, 0 if last == "pretrain" else len(data.classes))
    name = name if args.mim != "lomar" else None  # relative positions are not timm's
    about = dict(timm_model=name, timm_arguments=arguments, classes=data.classes, arch=args.arch,
                 image_size=run.image_size, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    metadata = {"model": json.dumps(about)}  # one key: several have no fixed order in the file
    tensors = {k: v.contiguous() for k, v in model.vit.state_dict().items()
               if last != "pretrain" or not k.startswith("head.")}
    checkpoint.save_weights(run.folder / "model.safetensors", tensors, metadata)
    run.log.write(dict(results=run.results))
    panels = {"losses": ["loss_l", "loss_u", "loss_mae", "val_loss_mae"],
              "top-1 (%)": ["top1", "ema_top1"],
              "pseudo-labels": ["kept", "pseudo_acc", "kept_acc"], "learning rate": ["lr"]}
    report.curves(log.read_log(run.folder), run.folder / "curves.png", panels)
    draw_views(data, split, settings, args, run)

    names = {"pretrain": f"{args.mim} (stage pretrain)", "sup": "supervised baseline (stage sup)",
             "semi": f"{args.method} (stage semi)"}
    run.log.say("")
    for stage, r in run.results.items():
        shown = (f"top-1 {r['top1']:6.2f}, top-5 {r['top5']:6.2f}" if "top1" in r
                 else f"validation loss {r['val_loss_mae']:.4f}")
        shown += f", average {r['ema_top1']:.2f}" if "ema_top1" in r else ""
        run.log.say(f"{names[stage]:<33} {shown}   {r['updates']} updates, {r['seconds']:.0f} s")
    if {"sup", "semi"} <= run.results.keys():
        gain = run.results["semi"]["top1"] - run.results["sup"]["top1"]
        run.log.say(f"{'gain':<33}       {gain:+6.2f}")
    run.log.say(report.band(Path(__file__).parent / "docs" / "bands.json", run.recipe))
    files = "reconstructions.png, " if model.decoder is not None else ""
    run.log.say(f"{run.folder}: curves.png, views.png, {files}log.jsonl, model.safetensors")
    if args.predict:
        predict(args, model, data.classes, settings[last], run, run.folder)
    run.log.close()


def predict(args, model, classes, s, run, folder):
    view = T.Compose(view_lists(args.dataset, run.image_size, s)["evaluate"])
    model.eval()
    with torch.no_grad():
        report.predict(args.predict, lambda seen: logits_of(model, seen, run).softmax(-1).cpu(),
                       view, classes, folder, run.workers)


def final_weights(folder: str) -> tuple[dict, dict]:
    """A finished run's model.safetensors: tensors of `vit` and metadata. Raises UserError."""
    from safetensors import safe_open

    file = Path(folder) / "model.safetensors"
    if not file.exists():
        raise UserError(f"--eval {folder}: no model.safetensors; finish it: --resume {folder}")
    tensors = checkpoint.read(file)
    with safe_open(file, "pt") as opened:
        about = json.loads((opened.metadata() or {}).get("model", "null"))
    if about is None:
        raise UserError(f"--eval {folder}: its model.safetensors was not written by this project")
    return tensors, about


def evaluate_run(args, data, run):
    """--eval RUN: the final weights on the validation set, and --predict; nothing is trained."""
    stage = [x for x in stages_of(args) if settings_of(args, x).epochs > 0][-1]
    s, mae = derive(args, stage, 1), stage == "pretrain"
    tensors, about = final_weights(args.eval)
    if mae and args.predict:
        raise UserError("--predict: stage pretrain trained no classifier")
    if not mae and data.classes != about["classes"]:
        raise UserError(f"--eval {args.eval}: --data-path holds other classes than the run; "
                        "use the run's own data")
    model = build_model(args, s, len(data.classes), stage if mae else "sup")
    if mae:
        load_init(model, str(published_files(args, Path(args.eval))[1]))
    else:
        weights.load_exactly(model.vit, tensors, set(), f"--eval {args.eval}")
    view = T.Compose(view_lists(args.dataset, run.image_size, s)["evaluate"])
    r = (evaluate_branch if mae else evaluate)(model.to(run.device), data.val, view, run)
    shown = (f"validation loss {r['val_loss_mae']:.4f}" if mae
             else f"top-1 {r['top1']:.2f}, top-5 {r['top5']:.2f}")
    if run.rank == 0:
        print(f"{args.eval}: {shown} on {len(data.val)} pictures")
        if args.predict:
            predict(args, model, data.classes, s, run, Path(args.eval))


def draw_views(data, split, settings, args, run, count=10):
    """views.png: what each stage saw; the weak and strong view are of the same pictures."""
    shown = np.random.default_rng(args.seed).permutation(split.unlabeled)
    rows = {}

    def look(stage, names, positions):
        lists = view_lists(args.dataset, run.image_size, settings[stage])
        stream = Stream(f"picture/{names[0]}", positions[:count], min(count, len(positions)),
                        args.seed)
        of_picture, bad = [T.Compose(lists[n]) for n in names], BadImages(data.train, count)
        seen, _ = next(stream_loader(data.train, of_picture, stream, start=0, stop=1, bad=bad))
        rows.update({n: to_model(*x, run.stats.cpu()) for n, x in zip(names, seen)})

    if "pretrain" in settings:
        look("pretrain", ["mae"], shown if len(shown) else split.labeled)
    if settings.keys() & {"sup", "semi"}:
        look("semi" if "semi" in settings else "sup", ["labeled"], split.labeled)
    if "semi" in settings:
        look("semi", ["weak", "strong"], shown)
    mean, std = run.stats.cpu() / 255.0
    pictures = {name: row * std + mean for name, row in rows.items()}
    report.contact_sheet(pictures, run.folder / "views.png", f"views of {args.dataset}")


# The paper's rows: what --dry-run prints, and the first line of a run on digits


def paper_args(args) -> SimpleNamespace:
    """The same flags on ImageNet from scratch with 10% of the labels, all that the paper has."""
    arch = "vit_small" if args.arch in ("vit_digits", "vit_cifar", "vit_tiny") else args.arch
    changed = dict(arch=arch, dataset="imagenet", labels=10, num_labels=None, labels_file=None,
                   image_size=None, patch_size=None, holdout=0, pretrain=False,
                   init="RUN" if args.stage == "semi" else None)  # of that arch
    return SimpleNamespace(**{**vars(args), **changed})


def paper_number(args) -> float | None:
    """The paper's own top-1 for exactly these flags; None where it has none."""
    given = any(getattr(args, n) for n in ("init", "pretrain", "labels_file", "holdout"))
    if given or args.method != "semi_mae" or args.stage != "all":
        return None
    free = (*SETTINGS, "unlabeled_pool", "image_size", "patch_size")
    plain = SimpleNamespace(**{**vars(args), **dict.fromkeys(free), "follow": "recommended"})
    run, row = ([shape_of(a), *({**vars(settings_of(a, x)), "sources": None}
                                for x in ("sup", "semi"))] for a in (args, plain))
    numbers = PAPER.get((args.dataset, args.arch, percent(args)), {})
    return numbers.get(args.mim) if run == row else None


def command_of(args) -> str:
    """The command with these flags."""
    parts = [f"python {SCRIPT}.py --dataset {args.dataset} --data-path DIR"]
    parts += [f"--init {args.init}"] if args.init else []
    parts += [f"--arch {args.arch} --labels {args.labels:g}"]
    parts += [f"--method {args.method}"] if args.method != "semi_mae" else []
    parts += [f"--stage {args.stage}"] if args.stage != "all" else []
    parts += ["--pretrain"] if args.pretrain else []
    parts += [f"--mim {args.mim}"] if args.mim != "mae" else []
    parts += [f"--follow {args.follow}"] if args.follow != "recommended" else []
    parts += [f"--unlabeled-pool {args.unlabeled_pool}"] if args.unlabeled_pool else []
    for name in SETTINGS:
        given = getattr(args, name) or {}
        values = {str(v) for v in given.values()}
        one = len(given) == len(STAGES) and len(values) == 1
        text = values.pop() if one else ",".join(f"{k}={v}" for k, v in given.items())
        parts += [f"--{name.replace('_', '-')} {text}"] if given else []
    return " ".join(parts)


def dry_run(args) -> str:
    """Two blocks: the run that these flags start, and the same on ImageNet, the paper's row."""
    lines = []
    for a in (args, paper_args(args)):
        number = paper_number(a)
        title = "the paper's row" if number else "these flags on ImageNet"
        title = title if a is not args else "this run"
        share = (f"{percent(a):g}% of the labels" if percent(a)
                 else f"{a.num_labels or 'listed'} labels")
        lines.append(f"== {title}: {a.dataset}, {a.arch}, {share}, init {a.init or 'scratch'}, "
                     f"method {a.method}, branch {a.mim}")
        lines += [f"   {command_of(a)}"] if a is not args else []
        lines += [f"   the paper's own result: {number} top-1"] if number else []
        lines.append(f"   recipe {recipe(a)[0]}: {recipe(a)[1]['source']}")
        for stage, s in plan(a, 1).items():
            hidden = {"sources", "micro_batch", "batch_u", "epochs_before", "epochs_total"}
            branch = a.mim if has_branch(a, s, stage) else "none"
            hidden |= NOT_READ[stage] | (LOMAR_ONLY if branch != "lomar" else set())
            hidden |= MAE_ONLY if branch != "mae" else set()
            hidden |= {"norm_pix_loss"} if branch == "none" else set()
            hidden |= {"mae_weight"} if a.mim == "none" else set()
            values = {k: v for k, v in vars(s).items() if k not in hidden}
            lines.append(report.settings_table(f"stage {stage}", values, s.sources))
            lines += cost_lines(a, stage, s)
    return "\n".join(lines)


def cost(args, s, num_classes: int, stage: str) -> dict[str, float]:
    """What an update costs: flops; fixed; kept, the mean over the images of its batch."""
    model, n_l, n_u = on_meta(args, s, num_classes, stage), s.batch_size, s.batch_u
    branch, size = model.decoder is not None, shape_of(args)["image_size"]
    model.forward = model.classify  # what `report.cost` calls
    whole = report.cost(model, size)
    if branch:
        model.forward = lambda x: model.reconstruct(x, model.draw(len(x), x.device))
        hidden = report.cost(model, size)
    if stage == "pretrain":
        return dict(hidden, flops=3 * n_l * hidden["flops"])
    flops, kept = whole["flops"] * (3 * (n_l + n_u) + n_u), whole["kept"]  # weak views: once
    if branch:
        flops += 3 * n_u * hidden["flops"]
        kept += hidden["kept"] * n_u / (n_l + n_u)
    return dict(flops=flops, kept=kept, fixed=whole["fixed"])


def images_of_epoch(args, stage) -> int | None:
    """How many images an epoch passes over; None where only the data can tell."""
    _, _, classes, total = DATASETS[args.dataset]
    total = total and max(0, total - args.holdout)
    if stage == "pretrain":  # of two lists: those of both, and no others
        return total if len(args.labels_file or ()) < 2 else None
    listed = total and percent(args) and max(classes, round(total * percent(args) / 100))
    return args.num_labels or listed


def cost_lines(args, stage, s) -> list[str]:
    """Parameters, images, updates, arithmetic and memory of a stage, on one process."""
    classes = DATASETS[args.dataset][2]
    model = on_meta(args, s, classes or 1000, stage)
    costs = cost(args, s, classes or 1000, stage)
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    decoder = sum(p.numel() for p in model.decoder.parameters()) if model.decoder else 0
    kept = costs["kept"] * (s.batch_size + s.batch_u) / args.accum_steps
    gib = [(costs["fixed"] + kept * share) / 2**30 for share in (1, 0.5)]
    updates, passed = "", images_of_epoch(args, stage)
    if passed:
        steps = max(1, passed // s.batch_size)
        updates = f", {steps} updates per epoch, {steps * s.epochs:,} in all"
    images = {"pretrain": f"{s.batch_size} images", "sup": f"{s.batch_size} labelled images",
              "semi": f"{s.batch_size} labelled + {s.batch_u} unlabelled images"}[stage]
    return [f"  parameters {count:,}, of which {trained:,} are trained; decoder {decoder:,}",
            f"  per update {images}{updates}",
            f"  per update {costs['flops'] / 1e12:.4g} TFLOP; memory about {gib[0]:.1f} GiB in "
            f"float32, {gib[1]:.1f} GiB in 16 bit"]


# ===== 9. ENTRY POINT =============================================================================

if __name__ == "__main__":
    main(parse_args())
