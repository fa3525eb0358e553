"""Semiformer (Weng et al., ECCV 2022, arXiv:2111.11067): a CNN stream teaches and feeds a ViT.

  stage 1, --stage sup   5 + 25 epochs on the labelled images alone                     (Sec. 5.1)
  stage 2, --stage semi  everything, to epoch 300 or 600; one step of it:          (Sec. 4, Fig. 3)

  x_l, u_s --strong--> one forward of both streams, BatchNorm learns --+-> CE(., y)     (Eq. 1) L_l
                         conv <== exchange at depths 2-12 ==> trans    +-> CE(., y_hat) (Eq. 3) L_u
  u_w ------weak-----> the same network, eval mode, then --conv head--> p, y_hat        (Eq. 2)
  L = L_l + lambda L_u  (Eq. 4), AdamW; both heads learn from the conv head's labels

Notation  x_l, u_w, u_s  labelled, unlabelled weak and strong views; B_l, B_u images of an update
          logits (S, N, K): S heads in the order conv, trans; p_j, y_hat pseudo-label and its
          confidence o = max p; tau threshold (--tau); lambda weight of L_u (--lambda-u)
          x map of the conv stream (N, C, H, W), M_C; t tokens (N, 1 + L, D), M_T, class token first

How to run
  python semiformer.py                                        80 labelled digits, minutes
  python semiformer.py --data-path DIR --predict NEW          your own: labeled/<class>/, unlabeled/
  python semiformer.py --arch vit_conv --dry-run              which recipe, from where, at what cost
  torchrun --nproc-per-node 8 semiformer.py --dataset imagenet --data-path DIR \\
      --labels-file files2shards_train_size128116_split1.txt

  The paper's rows (--dataset imagenet --data-path DIR), top-1: trans head / mean of both heads
    --arch vit_conv                         - / 75.5  Table 2, recipe R1: 600 epochs
    --arch vit_conv --mae-weight 5          - / 76.4  Semi-MAE's Table 2, in our reading (E10)
    --arch vit_conv --recipe R2          72.4 / 73.5  Table 3, 300 epochs; so all below
    --arch vit_conv --method conv_labeled   67.2 / 70.2    --arch vit --method vanilla   59.0
    --arch pit_conv                         70.8 / 71.6    --arch conv --method vanilla  68.5
    --arch vit_convmixer                    72.9 / 73.8    --arch vit --method sup       48.6
    --pseudo-source trans | fuse  Table 6;  --arch vit_vit | conv_conv | resnet50  Table 7

Departures. D1 to D6, where paper and authors' code disagree, are the table DEPARTURES below, chosen
with --follow. The rest, decided once:
  E1  ViT-S alone has 21.7M parameters without classifier (code); the paper says 23M.
  E2  The paper is silent, from the code: no position embedding, the stem of convolutions, which
      depths exchange, the norms' epsilons, initial weights, AdamW and its constants, drop path, the
      order of the forwards, one BatchNorm for labelled and strong images, all augmentation numbers.
  E3  The class token gets no information from the other stream: it is added to itself instead, so
      it doubles at every exchange (code; in vit_vit nothing is added). In the S-to-C unit BatchNorm
      comes before the upsampling (code; Eq. 6: after it, which normalises to the same map).
  E4  "Averaged predictions": the mean of logits is the headline (code), the mean of softmaxes is
      logged beside it. --pseudo-source fuse means logits, softmax_fuse probabilities.
  E5  No code was released for pit_conv, vit_vit and conv_conv: our design, see build_model. The
      last exchange of conv_conv is left out: only so it has the paper's 35M parameters.
  E6  Single-stream rows are single streams. The authors' code trains both and gives one weight 0,
      which halves the loss and decays the idle stream.
  E7  An epoch is a pass over the labelled images; its length is that of the authors' processes
      (108 or 84 images each), however many there are here.
  E8  BatchNorm normalises by the images of one process and part: 108 in the authors' code, 432 in
      the command above, or 108 with --accum-steps 4. Its running statistics are averaged over the
      processes after each update, so that all evaluate and save with the same ones, and label with
      the same ones but for what this step's own images moved.
  E9  The *_digits streams are ours: narrow, 4 depths, half the stem's stride, Xavier for attention.
      So are the digits' views (labelled ones mildly affine, no flip) and that pictures under 64
      pixels are not enlarged before a crop; RandAugment's posterize keeps one bit at least.
  E10 --mae-weight: Semi-MAE (Yu et al., 2023) adds its branch to Semiformer in one line of text, so
      the row cannot be repeated faithfully. Ours: hidden *pixels* become 0, as the stem would leak
      them; stem with BatchNorm's running statistics; the visible tokens through the attention
      blocks without exchange and stochastic depth; last norm; MAE's decoder. All else as in R1,
      also lambda = 4 where Semi-MAE has 10, and 30 epochs on labels where it has 100.
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
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torchvision import transforms as T
from torchvision.transforms.functional import pil_to_tensor

from common import checkpoint, flags, log, report, weights
from common.amp import Precision, pick_device
from common.data import load_dataset
from common.ema import Ema
from common.pictures import BadImage, BadImages, find_pictures, open_image
from common.split_lists import list_name
from common.splits import UserError
from common.streams import Stream, eval_loader, seed_of, stream_loader

# ===== 1. CONFIG  (paper Sec. 5.1) ================================================================

SCRIPT = "semiformer"
STAGES = ("sup", "semi")
PUBLISHED = {  # lists of ImageNet and their percentage; SimCLR's have no number of the paper's
    "Semiformer 10% (FixMatch's ImageNet split 1)": 10,  # [Sec. 5.1]
    "Semiformer 5%": 5,
    "SimCLR 10percent.txt": 10,
    "SimCLR 1percent.txt": 1,
}
METHODS = {  # Tables 1 and 3
    "sup": {},  # stage sup alone; where both stages are one training, for all its epochs
    "vanilla": {},  # one stream, labelled by itself (Sec. 3)
    "conv_labeled": {},  # two streams without exchange, both labelled by the first (Sec. 3)
    "semiformer": {},  # the same with the exchange (Sec. 4)
}
STEMS = {  # kernel, width, max pooling; stride 2 each                           [authors' code; E9]
    "stem": (7, 64, True),
    "small": (3, 16, False),
}
STREAMS = {  # block, stem, patch, channels of a head or pixels of a kernel, rows; a row: (depths,
    # width, stride of the first of them). Depth i of one stream meets depth i of the other, and r
    # of the exchange is the ratio of their cells              [authors' code; pit: E5; digits: E9]
    "conv": ("bottleneck", "stem", 1, 3, ((4, 256, 1), (4, 512, 2), (4, 1024, 2))),
    "convmixer": ("mixer", None, 8, 9, ((11, 768, 1),)),  # on the image itself
    "vit": ("attention", "stem", 4, 64, ((12, 384, 1),)),
    "pit": ("attention", "stem", 2, 48, ((2, 144, 1), (6, 288, 2), (4, 576, 2))),
    "conv_digits": ("bottleneck", "small", 1, 3, ((1, 32, 1), (2, 64, 2), (1, 128, 2))),
    "convmixer_digits": ("mixer", None, 4, 5, ((4, 48, 1),)),
    "vit_digits": ("attention", "small", 4, 16, ((4, 64, 1),)),
    "pit_digits": ("attention", "small", 2, 16, ((1, 32, 1), (2, 64, 2), (1, 96, 1))),
}
ARCHS = {  # name: the streams of its heads, or timm's model                     [Tables 2, 3 and 7]
    "vit_conv": ("conv", "vit"),
    "vit_convmixer": ("convmixer", "vit"),
    "pit_conv": ("conv", "pit"),
    "conv_conv": ("conv", "conv"),
    "vit_vit": ("vit", "vit"),
    "conv": ("conv",),
    "convmixer": ("convmixer",),
    "vit": ("vit",),
    "pit": ("pit",),
}
ARCHS |= {f"{name}_digits": tuple(f"{s}_digits" for s in found) for name, found in ARCHS.items()}
ARCHS |= {f"resnet{depth}": ("timm",) for depth in (50, 101, 152)}
DATASETS = {  # pixels, classes, train images
    "digits": (32, 10, 8000),
    "cifar10": (32, 10, 50000),
    "cifar100": (32, 100, 50000),
    "imagenette": (128, 10, 9469),  # of 112; a PiT needs a multiple of 32
    "imagenet": (224, 1000, 1281167),
    "places205": (224, 205, 2448873),
    "folder": (224, None, None),
}

SETTINGS = {  # name: (type, default of each stage, help); a recipe row or a flag changes them
    "epochs": (int, dict(sup=30, semi=270),
        "passes over the labelled images [Sec. 5.1: 5 + 25 on labels, 300 or 600 in all]"),
    "batch_size": (int, dict(sup=1728, semi=1728),
        "images per update, labelled and unlabelled together, over all processes and parts "
        "[Sec. 5.1: 108 a GPU; authors' scripts: 16 or 32 of them]"),
    "batch_group": (int, dict(sup=108, semi=108),
        "so many images at a time get their labelled share, rounded down; 0: the whole batch "
        "[authors' code: one GPU's]"),
    "unlabeled_ratio": (int, dict(sup=0, semi=5), "B_u / B_l [Sec. 5.1: 5, 7 or 9]"),
    "lr": (float, dict(sup=1e-3, semi=1e-3),
        "peak learning rate, whatever the batch [Sec. 5.1: 1e-3]"),
    "min_lr": (float, dict(sup=1e-5, semi=1e-5), "floor of the cosine [Sec. 5.1: 1e-5]"),
    "warmup_lr": (float, dict(sup=1e-6, semi=1e-6), "where the warm-up begins [authors' code]"),
    "warmup_epochs": (float, dict(sup=5.0, semi=5.0), "linear warm-up [Sec. 5.1: 5]"),
    "lr_lag": (int, dict(sup=1, semi=1),
        "1: an epoch trains with the rate of the one before, so two epochs crawl "
        "[authors' code; paper: 0]"),
    "schedule": (str, dict(sup="one", semi="one"),
        "one: a single cosine and optimiser over both stages; each: one for each stage [Sec. 5.1]"),
    "weight_decay": (float, dict(sup=0.05, semi=0.05),
        "AdamW; none on biases, norms and class token [authors' code]"),
    "drop_path": (float, dict(sup=0.1, semi=0.1),
        "stochastic depth of the last attention block, linear from 0; an --arch without such a "
        "block has none, resnet50 too [authors' code]"),
    "label_smoothing": (float, dict(sup=0.1, semi=0.1), "of true labels [Sec. 5.1]"),
    "label_smoothing_u": (float, dict(sup=0.0, semi=0.0),
        "of pseudo-labels [Table 3: none; main run: 0.1 by the authors' script]"),
    "tau": (float, dict(sup=0.0, semi=0.7),
        "drop a pseudo-label less confident than this: too low teaches errors (watch pseudo_acc), "
        "too high starves (watch kept) [Eq. 3; Sec. 5.4: 0.7 of 0.65 to 0.8]"),
    "lambda_u": (float, dict(sup=0.0, semi=4.0), "lambda, weight of L_u [Eq. 4; Sec. 5.4: 4]"),
    "pseudo_source": (str, dict(sup="conv", semi="conv"),
        "conv, trans, fuse (mean of logits) or softmax_fuse: whose prediction becomes the label; "
        "conv is the first head where both are alike [Eq. 2; Table 6]"),
    "stream_loss": (str, dict(sup="mean", semi="mean"),
        "mean or sum of the heads' losses [authors' code; Eq. 1, 3: sum]"),
    "exchange_act": (int, dict(sup=1, semi=1),
        "1: GELU and ReLU end the exchange units [authors' code; Eq. 5, 6: none]"),
    "freeze_bn": (int, dict(sup=0, semi=0),
        "1: BatchNorm keeps the running statistics that it starts with; for tuning published "
        "weights with small batches [ours; docs/semiformer.md]"),
    "reprob": (float, dict(sup=0.25, semi=0.25),
        "random erasing of labelled and strong views [Sec. 5.1; authors' code: 0.25]"),
    "color_jitter": (float, dict(sup=0.0, semi=0.0),
        "strength, in labelled and strong views [Sec. 5.1; inactive in the authors' code]"),
    "crop_min": (float, dict(sup=0.08, semi=0.08), "smallest area of a random crop [timm]"),
    "ema_decay": (float, dict(sup=0.0, semi=0.0),
        "above 0: an average of the weights is kept and evaluated, never trained on "
        "[authors' code: 0.99996, unused]"),
    "mae_weight": (float, dict(sup=0.0, semi=0.0),
        "weight of L_MAE, in a branch that reconstructs the weak view; 0: no branch "
        "[E10; Semi-MAE, Sec. 4.1: 5]"),
    "mask_ratio": (float, dict(sup=0.75, semi=0.75), "share of hidden patches [MAE: 0.75]"),
    "norm_pix_loss": (int, dict(sup=0, semi=0),
        "1: each patch of the target has mean 0, variance 1 [MAE: 0 in its paper]"),
    "dec_dim": (int, dict(sup=512, semi=512), "width of the branch's decoder [MAE: 512]"),
    "dec_depth": (int, dict(sup=8, semi=8), "its blocks [MAE: 8]"),
    "dec_heads": (int, dict(sup=16, semi=16), "its attention heads [MAE: 16]"),
}
BRANCH = {"mae_weight", "mask_ratio", "norm_pix_loss", "dec_dim", "dec_depth", "dec_heads"}
SWITCHES = ("lr_lag", "exchange_act", "freeze_bn", "norm_pix_loss")
SEMI_ONLY = BRANCH | {"unlabeled_ratio", "label_smoothing_u", "pseudo_source", "tau", "lambda_u",
                      "unlabeled_pool", "n_u"}

_MAIN = dict(sup=dict(batch_size=3456),
             semi=dict(batch_size=3456, epochs=570, unlabeled_ratio=7, label_smoothing_u=0.1),
             source="Sec. 5.1; authors' script of the 75.5")
_R2 = dict(sup={}, semi={}, source="Sec. 5.1; Table 3; GPUs from the authors' scripts")
_MIXER = dict(batch_size=1344, batch_group=84)
_DECODER = dict(dec_dim=64, dec_depth=1, dec_heads=4)  # of --mae-weight, beside a small network
_DIGITS = dict(  # found on 1,000 held-out training images, see docs/results.md
    sup=dict(epochs=500, batch_size=64, batch_group=0, lr=3e-3, warmup_epochs=20, schedule="each",
             drop_path=0.0, label_smoothing=0.0, reprob=0.0),
    semi=dict(epochs=120, batch_size=96, batch_group=0, lr=2e-3, warmup_epochs=5,
              schedule="each", drop_path=0.0, label_smoothing=0.0, reprob=0.0, tau=0.9,
              lambda_u=2.0, crop_min=0.6, **_DECODER),
    source="measured here")
_DIGITS_LARGE = dict(
    sup=dict(_DIGITS["sup"], lr=3e-4),
    semi={k: v for k, v in _DIGITS["semi"].items() if k not in _DECODER} | dict(lr=3e-4),
    source="as for the small ones, smaller steps; not tuned")
_OWN = dict(  # a folder of one's own has few labels: batches for one GPU
    sup=dict(batch_size=108), semi=dict(batch_size=108), source="as R2, one GPU; not tuned")
_CIFAR = dict(sup=dict(batch_size=108, crop_min=0.35),
              semi=dict(batch_size=216, unlabeled_ratio=7, tau=0.9, crop_min=0.35),
              source="not tuned")
_CIFAR_SMALL = dict(  # minutes on a CPU; found on 5,000 held-out pictures, see docs/results.md
    sup=dict(epochs=30, batch_size=64, batch_group=0, lr=3e-3, warmup_epochs=1, schedule="each",
             lr_lag=0, drop_path=0.0, label_smoothing=0.0, reprob=0.0, crop_min=0.5),
    semi=dict(epochs=8, batch_size=128, batch_group=0, unlabeled_ratio=1, lr=1e-3, warmup_epochs=0,
              schedule="each", lr_lag=0, drop_path=0.0, label_smoothing=0.0, reprob=0.0, tau=0.8,
              lambda_u=1.0, crop_min=0.5, **_DECODER), source="measured here")
_CIFAR_SMALL_1 = dict(  # the same with 500 labels; one cosine over both stages, as in the paper
    sup=dict(_CIFAR_SMALL["sup"], epochs=90, warmup_epochs=5, crop_min=0.35, schedule="one"),
    semi=dict(_CIFAR_SMALL["semi"], epochs=90, batch_size=256, unlabeled_ratio=3, lr=3e-3,
              warmup_epochs=5, tau=0.9, crop_min=0.35, schedule="one"),
    source="measured here; not searched")
_NETTE_SMALL = dict(  # for 32 pixels; found on 1,500 held-out pictures, see docs/results.md
    sup=dict(_CIFAR_SMALL["sup"], epochs=200, warmup_epochs=5, crop_min=0.35),
    semi=dict(_CIFAR_SMALL["semi"], epochs=50, batch_size=256, unlabeled_ratio=7, lr=2e-3, tau=0.9,
              crop_min=0.35), source="measured here")

RECIPES = {  # (data set, arch, recipe, labels %): {stage: settings that differ from the defaults}
    ("imagenet", "vit_conv", "R1", 10): _MAIN,
    ("imagenet", "vit_conv", "R1b", 10): dict(
        sup=dict(batch_size=3456, lr=4e-3),
        semi=dict(batch_size=3456, epochs=570, unlabeled_ratio=7, lr=4e-3),
        source="authors' script, a variant"),
    ("imagenet", "vit_conv", "R1c", 10): dict(
        sup=dict(batch_size=864), semi=dict(_MAIN["semi"], batch_size=864),
        source="authors' script for 8 GPUs"),
    ("imagenet", None, "R2", 10): _R2,
    ("imagenet", None, "R2b", 10): dict(sup={}, semi=dict(unlabeled_ratio=7), source="Sec. 5.4"),
    ("imagenet", None, "R3", 5): dict(sup={}, semi=dict(unlabeled_ratio=9), source="Sec. 5.1, 5.2"),
    ("imagenet", None, "R4", 20): dict(_R2, source="Sec. 5.2"),
    ("imagenet", None, "R5", 10): dict(sup=_MIXER, semi=_MIXER, source="Sec. 5.1: 84 a GPU"),
    ("places205", None, "R6", 5): dict(_R2, source="Sec. 5.2; ratio alone, rest as R2"),
    ("imagenet", None, None, None): dict(_R2, source="as R2; no row of the paper"),
    ("places205", None, None, None): dict(_R2, source="as R2; no row of the paper"),
    ("folder", None, None, None): _OWN,
    ("digits", None, "digits", None): _DIGITS,
    ("digits", None, None, None): _DIGITS_LARGE,
    ("cifar10", None, "small", 10): _CIFAR_SMALL,
    ("cifar10", None, "small", 1): _CIFAR_SMALL_1,
    ("cifar10", None, None, None): _CIFAR,
    ("cifar100", None, None, None): _CIFAR,
    ("imagenette", None, "small", 10): _NETTE_SMALL,
    ("imagenette", None, None, None): dict(_OWN, source="as for a folder; not tuned"),
}

_FULL = ("semiformer", "conv")
PAPER = {  # the paper's own top-1, (trans head, mean of heads): (data set, arch, method, source of
    # the pseudo-labels, labels %, recipe)                                          [Tables 1 to 7]
    ("imagenet", "vit_conv", *_FULL, 10, "R1"): (None, 75.5),
    ("imagenet", "vit_conv", *_FULL, 10, "R2"): (72.4, 73.5),
    ("imagenet", "pit_conv", *_FULL, 10, "R2"): (70.8, 71.6),
    ("imagenet", "vit_convmixer", *_FULL, 10, "R5"): (72.9, 73.8),
    ("imagenet", "vit_conv", "conv_labeled", "conv", 10, "R2"): (67.2, 70.2),
    ("imagenet", "pit_conv", "conv_labeled", "conv", 10, "R2"): (67.8, 70.5),
    ("imagenet", "vit_convmixer", "conv_labeled", "conv", 10, "R5"): (66.7, 70.2),
    ("imagenet", "conv", "sup", "", 10, "R2"): (None, 60.2),
    ("imagenet", "vit", "sup", "", 10, "R2"): (None, 48.6),
    ("imagenet", "pit", "sup", "", 10, "R2"): (None, 50.0),
    ("imagenet", "conv", "vanilla", "conv", 10, "R2"): (None, 68.5),
    ("imagenet", "convmixer", "vanilla", "conv", 10, "R5"): (None, 69.3),
    ("imagenet", "vit", "vanilla", "conv", 10, "R2"): (None, 59.0),
    ("imagenet", "pit", "vanilla", "conv", 10, "R2"): (None, 63.0),
    ("imagenet", "vit", "sup", "", 5, "R3"): (None, 28.6),
    ("imagenet", "vit", "vanilla", "conv", 5, "R3"): (None, 45.7),
    ("imagenet", "conv", "sup", "", 5, "R3"): (None, 44.2),
    ("imagenet", "conv", "vanilla", "conv", 5, "R3"): (None, 61.3),
    ("imagenet", "vit_conv", "conv_labeled", "conv", 5, "R3"): (None, 62.0),
    ("imagenet", "vit_conv", *_FULL, 5, "R3"): (None, 66.3),
    ("imagenet", "vit", "sup", "", 20, "R4"): (None, 52.9),
    ("imagenet", "vit", "vanilla", "conv", 20, "R4"): (None, 69.8),
    ("imagenet", "conv", "sup", "", 20, "R4"): (None, 63.5),
    ("imagenet", "conv", "vanilla", "conv", 20, "R4"): (None, 73.6),
    ("imagenet", "vit_conv", "conv_labeled", "conv", 20, "R4"): (None, 74.8),
    ("imagenet", "vit_conv", *_FULL, 20, "R4"): (None, 78.1),
    ("places205", "vit", "sup", "", 5, "R6"): (None, 36.0),
    ("places205", "vit", "vanilla", "conv", 5, "R6"): (None, 46.9),
    ("places205", "conv", "sup", "", 5, "R6"): (None, 44.3),
    ("places205", "conv", "vanilla", "conv", 5, "R6"): (None, 51.6),
    ("places205", "vit_conv", "conv_labeled", "conv", 5, "R6"): (None, 52.5),
    ("places205", "vit_conv", *_FULL, 5, "R6"): (None, 53.8),
    ("imagenet", "vit_conv", "semiformer", "trans", 10, "R2"): (None, 67.4),
    ("imagenet", "vit_conv", "semiformer", "fuse", 10, "R2"): (None, 71.1),
    ("imagenet", "resnet50", "vanilla", "conv", 10, "R2"): (None, 68.3),
    ("imagenet", "resnet101", "vanilla", "conv", 10, "R2"): (None, 70.8),
    ("imagenet", "resnet152", "vanilla", "conv", 10, "R2"): (None, 71.8),
    ("imagenet", "conv_conv", *_FULL, 10, "R2"): (None, 66.9),
    ("imagenet", "vit_vit", *_FULL, 10, "R2"): (None, 59.6),
}
PAPER_MAE = 76.4  # Semi-MAE, Table 2: the first row with --mae-weight 5 (E10)

_PAPERS = ("imagenet", "places205")
DEPARTURES = {  # where, setting, recommended, paper, code (None: silent, as recommended), source
    "D1": (dict(dataset=_PAPERS), "color_jitter", 0.0, 0.4, 0.0,
           "Sec. 5.1 lists it; the code's is ignored by timm beside RandAugment"),
    "D2": ({}, "unlabeled_pool", "all", "rest", "all", "Sec. 5.1: the other 90%; code: all images"),
    "D3": ({}, "stream_loss", "mean", "sum", "mean", "Eq. 1, 3; code divides by the heads"),
    "D4": ({}, "exchange_act", 1, 0, 1, "Eq. 5, 6 have no activation; the code has GELU, ReLU"),
    "D5": (dict(dataset=_PAPERS, stage="semi"), "batch_group", None, 0, None,
           "Sec. 5.1: 1:7 as named; code: 13:95 of a GPU's 108, 10:98 for 1:9"),
    "D6": (dict(dataset=_PAPERS), "lr_lag", 1, 0, 1,
           "Sec. 5.1: 5 epochs; the code's scheduler lags by one epoch"),
}


def parse_args(argv=None):
    p = flags.Parser(prog=f"{SCRIPT}.py", description=__doc__.split("\n\n")[0],
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("what to train").add_argument
    add("--arch", choices=ARCHS,
        help="streams; default vit_conv_digits on digits, else vit_conv [Tables 2, 3, 7]")
    add("--method", choices=METHODS, help="default semiformer, with a single stream vanilla "
        "[Tables 1, 3]")
    add("--stage", choices=("all", *STAGES), default="all",
        help="sup: labels alone, semi: the rest, from --init RUN [Sec. 5.1]")
    add("--recipe", choices=("R1", "R1b", "R1c", "R2", "R2b", "R3", "R4", "R5", "R6", "digits"),
        help="R1: 600 epochs, the headline; R2: 300, the ablations; default by arch, method, "
        "labels [Sec. 5.1; --dry-run shows it]")
    add("--fuse", type=int, choices=(0, 1),
        help="exchange between the streams; default 1, with conv_labeled 0 [Eq. 5, 6; Table 3]")
    add("--pos-embed", type=int, choices=(0, 1), default=0,
        help="1: learnable position embedding, for one image size [authors' code: 0]")
    add("--init", metavar="FILE", help="weights to start from: the authors' checkpoint, or a run "
        "of this script [README]")
    add("--attention", metavar="PATH", help="picture or folder: attention maps of the transformer "
        "stream, at the end or with --eval RUN [Fig. 4]")
    add("--compare", metavar="RUN", help="with --eval and --attention: a second run's maps below "
        "[Fig. 4]")
    add("--follow", default="recommended", metavar="WHOM", help="recommended, paper, code, or a "
        "list such as D1=paper,D3=code, where the two disagree [table DEPARTURES]")
    flags.add_data(p, DATASETS, "labelled percent of each class, at least one image; default 1 on "
                   "digits, 5 on places205, else 10 [Sec. 5.1: 10; Table 4: 5, 20]")
    flags.add_settings(p, SETTINGS, STAGES)
    flags.add_running(p, SCRIPT)
    args = p.parse_args(argv)
    flags.check(p, args)
    args.dataset = args.dataset or ("folder" if args.data_path else "digits")
    args.arch = args.arch or ("vit_conv_digits" if args.dataset == "digits" else "vit_conv")
    pair, trans = len(ARCHS[args.arch]) == 2, attention_streams(args.arch)
    args.method = args.method or ("semiformer" if pair else "vanilla")
    if args.method != "sup" and (args.method == "vanilla") == pair:
        p.error(f"--method {args.method} --arch {args.arch}: vanilla trains one stream, "
                "conv_labeled and semiformer train two")
    for flag, has, what in (("fuse", pair, "second stream"), ("pos_embed", trans, "transformer"),
                            ("attention", trans, "transformer")):
        if getattr(args, flag) and not has and not args.eval:
            p.error(f"--{flag.replace('_', '-')}: --arch {args.arch} has no {what}")
    if any((args.drop_path or {}).values()) and not trans and not args.eval:
        p.error(f"--drop-path: --arch {args.arch} has no attention block to leave out")
    if args.recipe and recipe(args)[0][2] != args.recipe and not args.eval:
        share = f"--num-labels {args.num_labels}" if args.num_labels else "--labels-file LIST"
        share = f"--labels {percent(args):g}" if percent(args) else share
        p.error(f"--recipe {args.recipe}: no such row for --dataset {args.dataset} "
                f"--arch {args.arch} {share}")
    if args.fuse is None:
        args.fuse = int(pair and args.method != "conv_labeled")
    return args


def attention_streams(arch: str) -> list[str]:
    return [s for s in ARCHS[arch] if s != "timm" and STREAMS[s][0] == "attention"]


def default_percent(args):
    return {"digits": 1, "places205": 5}.get(args.dataset, 10)


def percent(args):
    """--labels, its default, or that of a published list; None for another list, or a count."""
    if args.num_labels or args.labels_file:
        return PUBLISHED.get(list_name(args.labels_file[0])) if args.labels_file else None
    return args.labels or default_percent(args)


def recipe_name(args) -> str:
    """--recipe, or the paper's row for these flags: R1 for the headline, R3 to R6 as they fit."""
    if args.recipe:
        return args.recipe
    if args.dataset == "digits":
        return "digits" if args.arch.endswith("_digits") else "none"
    if args.dataset in ("cifar10", "imagenette") and args.arch.endswith("_digits"):
        return "small"
    fits = {("imagenet", 5): "R3", ("imagenet", 20): "R4", ("places205", 5): "R6"}
    if (args.dataset, percent(args)) in fits:
        return fits[args.dataset, percent(args)]
    if "convmixer" in args.arch:
        return "R5"
    usual = (args.pseudo_source or {}).get("semi", "conv") == "conv" and args.fuse != 0
    headline = (args.arch, args.method) == ("vit_conv", "semiformer") and usual
    return "R1" if headline else "R2"


def recipe(args):
    """(key, row): the most special row of RECIPES for these flags; an unknown list counts as what
    its recipe was made for, 10% by default."""
    name, labels = recipe_name(args), percent(args)
    if args.labels_file and labels is None and args.dataset in _PAPERS:
        labels = {"R3": 5, "R4": 20, "R6": 5}.get(name, 10)
    for special in ((args.arch, name, labels), (None, name, labels), (None, name, None),
                    (None, None, None)):
        for key, row in RECIPES.items():  # its own key: 10, where --labels says 10.0
            if key == (args.dataset, *special):
                return key, row


def resolve(args, stage: str) -> SimpleNamespace:
    """The settings of a stage, with `sources`, before anything is derived from them."""
    _, row = recipe(args)
    layers = [("default [authors' code]", dict(unlabeled_pool="all")), (row["source"], row[stage])]
    schedule = (args.schedule or {}).get("sup", row["sup"].get("schedule"))
    if args.method == "sup" and schedule != "each":  # R7                      [Table 3's caption]
        whole = SETTINGS["epochs"][1] | {x: row[x]["epochs"] for x in STAGES if "epochs" in row[x]}
        layers.append(("--method sup: all epochs", dict(epochs=sum(whole.values()))))
    facts = dict(dataset=args.dataset, arch=args.arch, init=None, labels=percent(args), stage=stage)
    s = flags.resolve(SETTINGS, stage, layers, DEPARTURES, facts, args,
                      SEMI_ONLY if stage == "sup" else ())
    if args.unlabeled_pool:
        s.unlabeled_pool, s.sources["unlabeled_pool"] = args.unlabeled_pool, "--unlabeled-pool"
    return s


def derive(args, stage: str, world_size: int) -> SimpleNamespace:
    """All settings of a stage, with `sources`, what follows from them, and one process's share.

    n_l, n_u: B_l and B_u of an update over all processes; first_epoch, all_epochs: where the stage
    lies on the learning rate's curve. Raises UserError.
    """
    s = resolve(args, stage)
    for name, allowed in (("pseudo_source", ("conv", "trans", "fuse", "softmax_fuse")),
                          ("stream_loss", ("mean", "sum")), ("schedule", ("one", "each")),
                          *((name, (0, 1)) for name in SWITCHES)):
        if getattr(s, name) not in allowed:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)}: "
                            f"one of {', '.join(map(str, allowed))}")
    for name, least in dict(epochs=0, batch_size=1, batch_group=0,
                            unlabeled_ratio=int(stage == "semi")).items():
        if getattr(s, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)}: at least {least}")
    if s.tau > 1:
        raise UserError(f"--tau {s.tau:g}: from 0 to 1")
    if len({resolve(args, x).exchange_act for x in STAGES}) > 1:
        raise UserError("--exchange-act: one value for both stages, which train one network")
    if s.mae_weight:
        check_branch(args, s)
    if not s.batch_group or s.batch_size % s.batch_group:
        if s.batch_group:
            s.sources["batch_group"] = f"the whole batch: {s.batch_group} does not divide it"
        s.batch_group = s.batch_size
    s.n_l, s.n_u = compose(s.batch_size, s.batch_group, s.unlabeled_ratio)
    if not s.n_l:
        raise UserError(f"--batch-size {s.batch_size}: no labelled image is left at "
                        f"--unlabeled-ratio {s.unlabeled_ratio}")
    parts = world_size * args.accum_steps
    if s.n_l % parts or s.n_u % parts:
        raise UserError(f"--batch-size {s.batch_size}: {s.n_l} labelled + {s.n_u} unlabelled images"
                        f" are not divisible by {world_size} processes x --accum-steps "
                        f"{args.accum_steps}")
    s.micro_batch = (s.n_l + s.n_u) // parts
    s.first_epoch, s.all_epochs = 0, s.epochs
    if s.schedule == "one" and args.method != "sup":
        lengths = {x: resolve(args, x).epochs for x in STAGES}
        s.first_epoch, s.all_epochs = (stage == "semi") * lengths["sup"], sum(lengths.values())
    return s


def check_branch(args, s):
    """A branch that has no stream, or would hide nothing or everything, is refused by its flag."""
    trans = attention_streams(args.arch)
    if len(trans) != 1 or len(STREAMS[trans[0]][4]) > 1:
        raise UserError(f"--mae-weight {s.mae_weight:g}: --arch {args.arch} has no single stream "
                        "whose tokens can be left out; vit_conv, vit_convmixer and vit have")
    patches = ((args.image_size or DATASETS[args.dataset][0]) // depths_of(trans[0])[0][3]) ** 2
    kept = int(patches * (1 - s.mask_ratio))  # as in `random_masking`
    if not 0 < kept < patches:
        raise UserError(f"--mask-ratio {s.mask_ratio:g}: {kept} of {patches} patches stay visible; "
                        "at least one must, and one must be hidden")
    if s.dec_heads < 1 or s.dec_dim < 1 or s.dec_dim % s.dec_heads or s.dec_dim % 4:
        raise UserError(f"--dec-dim {s.dec_dim}: a multiple of 4 and of --dec-heads {s.dec_heads}")
    if s.dec_depth < 1:
        raise UserError(f"--dec-depth {s.dec_depth}: at least 1")


def compose(batch: int, group: int, ratio: int) -> tuple[int, int]:
    """B_l, B_u of a batch: of each group of images int(group / (1 + ratio)) are labelled (D5)."""
    labeled = batch // group * (group // (1 + ratio))
    return labeled, batch - labeled


def updates_per_epoch(images: int, s) -> int:
    """A pass over the labelled images, as cut by the authors' processes of one group each (E7)."""
    groups = s.batch_size // s.batch_group
    return max(1, -(-images // groups) // (s.n_l // groups))


# ===== 2. DATA  (paper Sec. 5.1) ==================================================================


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
    """Each view as a list, in the order of the authors' code, ending in (bytes, erasing box)."""
    crop = RandomResizedCropAndInterpolation(size, (s.crop_min, 1), (3 / 4, 4 / 3), "bicubic")
    if dataset == "digits":  # numbers fit for digits: no flip; mild affine for labels, small shift
        affine = T.RandomAffine(15, (0.1, 0.1), (0.85, 1.15), 10, T.InterpolationMode.BILINEAR)
        return dict(
            labeled=[T.Resize(size), affine, ToBytes(s.reprob)],
            weak=[T.Resize(size), T.RandomAffine(0, (0.08, 0.08)), ToBytes()],
            strong=[crop, rand_augment(size), ToBytes(s.reprob)],
            evaluate=[T.Resize((size, size)), ToBytes()],  # to predict, pictures of any shape
        )
    flip, bicubic = T.RandomHorizontalFlip(0.5), T.InterpolationMode.BICUBIC
    larger = T.Resize(size if size < 64 else int(256 / 224 * size), bicubic)  # small: as they are
    jitter = [T.ColorJitter(*[s.color_jitter] * 3)] if s.color_jitter else []  # D1
    strong = [crop, flip, rand_augment(size), *jitter, ToBytes(s.reprob)]
    cut = T.RandomCrop(size, padding=4, padding_mode="reflect")
    return dict(labeled=strong, weak=[flip, larger, cut, ToBytes()], strong=strong,
                evaluate=[larger, T.CenterCrop(size), ToBytes()])


# ===== 3. MODEL  (paper Sec. 4, Stream fusion; Sec. 5.1, Models) ==================================


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


def norm2d(width: int) -> nn.Module:
    return nn.BatchNorm2d(width, eps=1e-6)  # 1e-5 in the stem and the mixers [authors' code]


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a quarter of the width, and the residual."""

    def __init__(self, before: int, width: int, stride: int = 1, project: bool = False):
        super().__init__()
        inner = width // 4
        self.conv1 = nn.Conv2d(before, inner, 1, bias=False)
        self.bn1 = norm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = norm2d(inner)
        self.conv3 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn3 = norm2d(width)
        if project:
            self.residual_conv = nn.Conv2d(before, width, 1, stride, bias=False)
            self.residual_bn = norm2d(width)

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """x (N, C, H, W); up: the other stream's map, in the branch but not in the residual."""
        y = F.relu(self.bn1(self.conv1(x if up is None else x + up)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        x = self.residual_bn(self.residual_conv(x)) if hasattr(self, "residual_conv") else x
        return F.relu(y + x)


class Mixer(nn.Module):
    """ConvMixer's unit: depth-wise convolution with a residual, then a point-wise one."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        x = x + self.norm1(F.gelu(self.conv1(x if up is None else x + up)))
        return self.norm2(F.gelu(self.conv2(x)))


class Squeeze(nn.Module):
    """C to S, paper Eq. 5:  M_T += layernorm(pooling(align(M_C))); then GELU (D4)."""

    def __init__(self, conv_width: int, width: int, r: int, act: bool = True):
        super().__init__()
        self.conv_project = nn.Conv2d(conv_width, width, 1)
        self.ln = nn.LayerNorm(width, eps=1e-6)
        self.r, self.act = r, act

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (N, C, rH, rW), t (N, 1 + HW, D) -> what is added to t; the class token to itself."""
        d = F.avg_pool2d(self.conv_project(x), self.r).flatten(2).transpose(1, 2)  # (N, HW, D)
        d = self.ln(d)
        return torch.cat([t[:, :1], F.gelu(d) if self.act else d], 1)  # E3


class Expand(nn.Module):
    """S to C, paper Eq. 6:  M_C += upsample(batchnorm(align(M_T))), ReLU before it (D4, E3)."""

    def __init__(self, conv_width: int, width: int, r: int, act: bool = True):
        super().__init__()
        self.conv_project = nn.Conv2d(width, conv_width, 1)
        self.bn = norm2d(conv_width)
        self.r, self.act = r, act

    def forward(self, t: Tensor, height: int, width: int) -> Tensor:
        """t (N, 1 + HW, D) -> (N, C, rH, rW), constant in each r x r cell."""
        up = t[:, 1:].transpose(1, 2).unflatten(2, (height, width))
        up = self.bn(self.conv_project(up))
        return F.interpolate(F.relu(up) if self.act else up, scale_factor=self.r)  # nearest


class Pool(nn.Module):
    """PiT between its stages: half the grid, twice the width (any width for the digits)."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(before, width, 3, stride, 1, groups=math.gcd(before, width))
        self.fc = nn.Linear(before, width)

    def forward(self, t: Tensor) -> Tensor:
        side = math.isqrt(t.shape[1] - 1)
        patches = self.conv(t[:, 1:].transpose(1, 2).unflatten(2, (side, side)))
        return torch.cat([self.fc(t[:, :1]), patches.flatten(2).transpose(1, 2)], 1)


def depths_of(stream: str) -> list[tuple[int, int, int, int]]:
    """(width before, width, stride, pixels of the image under one cell) at each depth."""
    block, stem, patch, _, rows = STREAMS[stream]
    cell = patch * ((4 if STEMS[stem][2] else 2) if stem else 1)
    before = STEMS[stem][1] if block == "bottleneck" else rows[0][1]
    found = []
    for count, width, stride in rows:
        for k in range(count):
            step = stride if k == 0 else 1
            cell *= step
            found.append((before, width, step, cell))
            before = width
    return found


def attention(stream: str, i: int, drop_path: float) -> nn.Module:
    """timm's pre-norm block for depth i (from 0) of a stream; drop path linear over its depths."""
    found = depths_of(stream)
    width, rate = found[i][1], drop_path * i / (len(found) - 1)
    return Block(width, width // STREAMS[stream][3], qkv_bias=True, drop_path=rate,
                 norm_layer=partial(nn.LayerNorm, eps=1e-6))


def unit(stream: str, i: int, second: bool = False) -> nn.Module:
    """First or second unit of depth i (from 0) of a convolutional stream."""
    block, _, _, kernel, _ = STREAMS[stream]
    before, width, stride, _ = depths_of(stream)[i]
    if block == "mixer":
        return Mixer(width, kernel)
    if second:  # the stream ends in a stride of its own
        last = i == len(depths_of(stream)) - 1
        return Bottleneck(width, width, 2 if last else 1, project=last)
    return Bottleneck(before, width, stride, project=before != width or stride > 1)


class Depth(nn.Module):
    """Depth i of one stream or two: C to S before the attention block, S to C after it."""

    def __init__(self, conv, trans, i: int, fuse: bool, drop_path: float, act: bool):
        super().__init__()
        if conv:
            self.cnn_block, self.fusion_block = unit(conv, i), unit(conv, i, second=True)
        if trans:
            before, width, stride, cell = depths_of(trans)[i]
            self.pool = Pool(before, width, stride) if before != width else nn.Identity()
            self.trans_block = attention(trans, i, drop_path)
        self.r = 0
        if fuse and conv and trans:
            self.r = cell // depths_of(conv)[i][3]
            sizes = depths_of(conv)[i][1], width, self.r, act
            self.squeeze_block, self.expand_block = Squeeze(*sizes), Expand(*sizes)

    def forward(self, x, t):
        """x (N, C, H, W) or None, t (N, 1 + L, D) or None -> the same after this depth."""
        x = x if x is None else self.cnn_block(x)
        if t is not None:
            t = self.pool(t)
            t = self.trans_block(t + self.squeeze_block(x, t) if self.r else t)  # Eq. 5
        if x is not None:
            up = None
            if self.r:
                up = self.expand_block(t, x.shape[2] // self.r, x.shape[3] // self.r)  # Eq. 6
            x = self.fusion_block(x, up)
        return x, t


class Semiformer(nn.Module):
    """One stream or two, with a head each; names as in the authors' published checkpoint.

    forward: pictures (N, 3, S, S) -> logits (streams, N, K), the convolutional head first; with
    `masked` pictures and `noise` (see `reconstruct`) also pred, target and mask of the branch.
    """

    def __init__(self, streams, num_classes, fuse=True, drop_path=0.0, pos_embed=False,
                 image_size=224, act=True, stem=True):
        super().__init__()
        attends = [STREAMS[s][0] == "attention" for s in streams]
        conv = next((s for s, is_t in zip(streams, attends) if not is_t), None)
        trans = next((s for s, is_t in zip(streams, attends) if is_t), None)
        self.names = tuple("trans" if is_t else "conv" for is_t in attends)
        self.n = min(len(depths_of(s)) for s in streams)
        stem_of = next((STREAMS[s][1] for s in streams if STREAMS[s][1]), None)
        if stem_of and stem:
            kernel, width, self.max_pool = STEMS[stem_of]
            self.conv1 = nn.Conv2d(3, width, kernel, 2, kernel // 2, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
        if conv:
            self.mixer = STREAMS[conv][0] == "mixer"
            width = depths_of(conv)[self.n - 1][1]
            if self.mixer:
                patch = STREAMS[conv][2]
                self.mixer_conv = nn.Conv2d(3, width, patch, patch)
                self.mixer_bn = nn.BatchNorm2d(width)
            self.conv_1 = unit(conv, 0)
            self.conv_cls_head = nn.Linear(width, num_classes)
        if trans:
            first, patch = depths_of(trans)[0][1], STREAMS[trans][2]
            self.cell = depths_of(trans)[0][3]
            self.cls_token = nn.Parameter(torch.zeros(1, 1, first))
            if pos_embed:
                cells = (image_size // self.cell) ** 2
                self.pos_embed = nn.Parameter(torch.zeros(1, cells, first))
            self.trans_patch_conv = nn.Conv2d(STEMS[stem_of][1], first, patch, patch)
            self.trans_1 = attention(trans, 0, drop_path)
            width = depths_of(trans)[self.n - 1][1]
            self.trans_norm = nn.LayerNorm(width)  # eps 1e-5, unlike the blocks [authors' code]
            self.trans_cls_head = nn.Linear(width, num_classes)
        for i in range(1, self.n):
            depth = Depth(conv, trans, i, fuse, drop_path, act)
            self.add_module(f"conv_trans_{i + 1}", depth)
        self.apply(init_weights)
        if trans and trans.endswith("_digits"):  # E9: 0.02 is too small for narrow attention
            for module in self.modules():
                if isinstance(module, Block):
                    for p in module.parameters():
                        if p.ndim == 2:
                            nn.init.xavier_uniform_(p)
        for p in (getattr(self, "cls_token", None), getattr(self, "pos_embed", None)):
            if p is not None:
                nn.init.trunc_normal_(p, std=0.02)

    def stem(self, image: Tensor, frozen: bool = False) -> Tensor:
        """frozen: BatchNorm uses its running statistics and leaves them alone."""
        x, bn = self.conv1(image), self.bn1
        x = bn(x) if not frozen else F.batch_norm(
            x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        x = F.relu(x)
        return F.max_pool2d(x, 3, 2, 1) if self.max_pool else x

    def tokens(self, stem: Tensor) -> Tensor:
        """Patch tokens (N, L, D) of the stem's map."""
        t = self.trans_patch_conv(stem).flatten(2).transpose(1, 2)
        return t + self.pos_embed if hasattr(self, "pos_embed") else t

    def begin(self, image: Tensor, stem: Tensor | None):
        """Depth 1, without exchange: (x or None, t or None)."""
        x = t = None
        if hasattr(self, "conv_1"):
            first = self.mixer_bn(F.gelu(self.mixer_conv(image))) if self.mixer else stem
            x = self.conv_1(first)
        if hasattr(self, "trans_1"):
            t = self.tokens(stem)
            t = self.trans_1(torch.cat([self.cls_token.expand(len(t), -1, -1), t], 1))
        return x, t

    def depths(self) -> list[Depth]:
        return [getattr(self, f"conv_trans_{i + 1}") for i in range(1, self.n)]

    def heads(self, x, t) -> Tensor:
        logits = [] if x is None else [self.conv_cls_head(x.mean((2, 3)))]
        logits += [] if t is None else [self.trans_cls_head(self.trans_norm(t)[:, 0])]
        return torch.stack(logits)  # (S, N, K)

    def reconstruct(self, image: Tensor, noise: Tensor):
        """Hide patches of pictures (N, 3, S, S) and predict them (E10). noise (N, L): who hides.

        returns pred, target (N, L, p * p * 3), mask (N, L), 1 = hidden; p: pixels of a cell.
        """
        target = patchify(image, self.cell)
        _, mask, restore = random_masking(target, self.mask_ratio, noise)
        # Zero pixels, not tokens left out alone: the stem's windows reach into the next cells.
        seen = unpatchify(target * (1 - mask).unsqueeze(2), self.cell)
        t = self.tokens(self.stem(seen, frozen=True))
        t, _, _ = random_masking(t, self.mask_ratio, noise)  # the same patches  (N, L_keep, D)
        t = torch.cat([self.cls_token.expand(len(t), -1, -1), t], 1)
        for block in [self.trans_1, *(depth.trans_block for depth in self.depths())]:
            t = t + block.attn(block.norm1(t))  # neither exchange nor stochastic depth
            t = t + block.mlp(block.norm2(t))
        return self.decoder(self.trans_norm(t), restore), target, mask

    def forward(self, image: Tensor, masked: Tensor | None = None, noise: Tensor | None = None):
        x, t = self.begin(image, self.stem(image) if hasattr(self, "conv1") else None)
        for depth in self.depths():
            x, t = depth(x, t)
        logits = self.heads(x, t)
        # One call for both, so that DDP sees one forward for one backward. The branch comes second:
        # its backward needs BatchNorm's running statistics unmoved, and the stem above moves them.
        return logits if noise is None else (logits, *self.reconstruct(masked, noise))


class Across(nn.Module):
    """Exchange between two streams of one kind, at equal size (E5), as Eq. 5 or Eq. 6; GELU or ReLU
    last (D4)."""

    def __init__(self, width: int, tokens: bool, act: bool = True):
        super().__init__()
        self.project = nn.Linear(width, width) if tokens else nn.Conv2d(width, width, 1)
        self.norm = nn.LayerNorm(width, eps=1e-6) if tokens else norm2d(width)
        self.tokens, self.act = tokens, act

    def forward(self, other: Tensor) -> Tensor:
        if not self.tokens:
            d = self.norm(self.project(other))
            return F.relu(d) if self.act else d
        d = self.norm(self.project(other[:, 1:]))
        d = F.gelu(d) if self.act else d
        return F.pad(d, (0, 0, 1, 0))  # nothing for the class token  (N, 1 + L, D)


class Twins(nn.Module):
    """C+C and V+V of Table 7: two equal streams behind one stem, both directions at once (E5)."""

    names = ("first", "second")

    def __init__(self, streams, num_classes, fuse=True, act=True, **how):
        super().__init__()
        self.first, self.second = (Semiformer(streams[:1], num_classes, fuse, stem=k == 0, **how)
                                   for k in (0, 1))
        self.tokens = STREAMS[streams[0]][0] == "attention"
        widths = [width for _, width, _, _ in depths_of(streams[0])][1:]
        widths = widths if self.tokens else widths[:-1]
        self.to_first, self.to_second = (
            nn.ModuleList(Across(w, self.tokens, act) for w in widths if fuse).apply(init_weights)
            for _ in (0, 1))

    def forward(self, image: Tensor) -> Tensor:
        stem = self.first.stem(image)
        both, kind = (self.first, self.second), int(self.tokens)
        a, b = (s.begin(image, stem)[kind] for s in both)
        for k, (of_a, of_b) in enumerate(zip(*(s.depths() for s in both))):
            if not self.tokens:
                a, b = of_a.cnn_block(a), of_b.cnn_block(b)
            to_a = to_b = None
            if k < len(self.to_first):
                to_a, to_b = self.to_first[k](b), self.to_second[k](a)
            if not self.tokens:
                a, b = of_a.fusion_block(a, to_a), of_b.fusion_block(b, to_b)
            else:
                a = of_a.trans_block(a if to_a is None else a + to_a)
                b = of_b.trans_block(b if to_b is None else b + to_b)
        pairs = [(None, y) if self.tokens else (y, None) for y in (a, b)]
        return torch.cat([s.heads(*pair) for s, pair in zip(both, pairs)])  # (2, N, K)


def init_weights(module: nn.Module):
    """Linear: normal, std 0.02; convolutions: Kaiming by fan-out, their biases torch's own."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def model_arguments(args, num_classes: int) -> dict:
    """What a model file must remember to build the model again. Raises UserError."""
    size = args.image_size or DATASETS[args.dataset][0]
    cells = {depths_of(s)[-1][3] for s in ARCHS[args.arch] if s != "timm"}
    if any(size % cell for cell in cells):
        raise UserError(f"--image-size {size}: --arch {args.arch} needs a multiple of {max(cells)}")
    return dict(arch=args.arch, num_classes=num_classes, fuse=bool(args.fuse), image_size=size,
                pos_embed=bool(args.pos_embed), act=bool(resolve(args, "sup").exchange_act))


def model_of(arch, num_classes, fuse, drop_path=0.0, **how) -> nn.Module:
    streams = ARCHS[arch]
    if streams == ("timm",):
        return timm.create_model(arch, num_classes=num_classes)
    kind = Twins if len(streams) == 2 and streams[0] == streams[1] else Semiformer
    return kind(streams, num_classes, fuse, drop_path=drop_path, **how)


def build_model(args, num_classes: int, drop_path: float = 0.0) -> nn.Module:
    """The network of --arch. Parameters without classifiers, as the paper's Table 2 counts:
    vit_conv 40,260,288, vit_convmixer 39,795,392, pit_conv 42,236,496, conv 13,230,144,
    vit 21,697,856, conv_conv 35,267,904, vit_vit 46,655,552, resnet50/101/152 23.5/42.5/58.1M.

    Our inference, as no code was released for them (E5): pit_conv is PiT-S with its 16-pixel
    embedding replaced by a 2 x 2 convolution on the shared stem (28 x 28 tokens), pooled before
    depths 3 and 9, pooling first, then the exchange; conv_conv and vit_vit, see Twins.
    """
    return model_of(drop_path=drop_path, **model_arguments(args, num_classes))


def add_branch(model: Semiformer, s, image_size: int) -> set[str]:
    """Give a model the decoder of --mae-weight; returns the names of its parameters.

    Only stage semi has it, and a run without the branch never: DDP would wait for gradients that do
    not come, and AdamW would decay weights that nobody trains. Initial weights as MAE's.
    """
    model.mask_ratio = s.mask_ratio
    model.decoder = MAEDecoder(model.trans_norm.normalized_shape[0], 3 * model.cell**2,
                               image_size // model.cell, s.dec_dim, s.dec_depth, s.dec_heads)
    for module in model.decoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.decoder.mask_token, std=0.02)
    return {f"decoder.{name}" for name in model.decoder.state_dict()}


def heads_of(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (S, N, K) float32, also of a plain timm model."""
    return as_heads(model(x))


def as_heads(logits: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if logits.ndim == 3 else logits.unsqueeze(0)


# Published formats: the keys to enter in turn, then patterns of parameter names with replacements.
FORMATS = {
    "semiformer": (["model"], [(r"module\.(.*)", r"\1")]),  # the authors' checkpoint
    "run": (["model"], []),  # checkpoint.pt of this script
}


def load_init(model: nn.Module, path: str) -> tuple[str, dict | None]:
    """Load --init FILE; returns its format and, from a run of ours, its whole checkpoint.

    Heads of another number of classes may be missing; exchange units of a model without exchange
    may be left over (the authors' code keeps them), and a decoder. Raises UserError with the keys.
    """
    state = weights.read_init(path)
    inner = state.get("model") if isinstance(state, dict) else None
    if not isinstance(inner, dict) or not any(
            "recipe" in state or re.search(r"(trans_1|conv_1|conv_cls_head)\.", k) for k in inner):
        first = ", ".join(str(k)[:40] for k in list(state)[:4]) if isinstance(state, dict) else "-"
        raise UserError(f"--init {path}: not one of the formats {', '.join(FORMATS)}; its first "
                        f"keys are {first}")
    kind = "run" if "recipe" in state else "semiformer"
    own, new = model.state_dict(), weights.rename(state, *FORMATS[kind])
    heads = [k for k in own if re.search(r"(_cls_head|^fc)\.", k)]
    may_miss = {k for k in heads if k not in new or new[k].shape != own[k].shape}
    unused = {k for k in new.keys() - own.keys()
              if re.search(r"(squeeze|expand)_block|^decoder\.", k)}
    new = {k: v for k, v in new.items() if k not in may_miss | unused}
    weights.load_exactly(model, new, may_miss, f"--init {path} (format {kind})")
    return kind, state if kind == "run" and not may_miss | unused else None


# ===== 4. LOSSES  (paper Sec. 4) ==================================================================


def labeled_losses(logits_l: Tensor, y_l: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each head on labelled images, paper Eq. 1: (S, B_l, K), (B_l,) -> (S,)."""
    return torch.stack([F.cross_entropy(z, y_l, label_smoothing=smoothing) for z in logits_l])


def pseudo_labels(logits_w: Tensor, source: str = "conv", temperature: float = 1.0):
    """Confidence and class of the weak view, paper Eq. 2:  p_j = f_C(g(u_j)).

    logits_w (S, B_u, K); the first head is the convolutional one -> o = max p, y_hat, each (B_u,)
    """
    z = logits_w.detach() / temperature
    p = {"conv": lambda: z[0].softmax(-1), "trans": lambda: z[-1].softmax(-1),
         "fuse": lambda: z.mean(0).softmax(-1),  # E4
         "softmax_fuse": lambda: z.softmax(-1).mean(0)}[source]()
    return p.max(-1)


def pseudo_label_losses(logits_s: Tensor, y_hat: Tensor, o: Tensor, tau: float,
                        smoothing: float = 0.0):
    """Cross-entropy of each head on confident pseudo-labels, paper Eq. 3.

        L_u = sum_j ( CE(y_hat_j, f_T(g+(u_j))) + CE(y_hat_j, f_C(g+(u_j))) ) [o_j >= tau]

    logits_s (S, B_u, K)  strong view       o (B_u,)  confidence, detached
    y_hat    (B_u,)       pseudo-labels     returns (S,) and the kept fraction ()
    """
    keep = (o >= tau).to(logits_s.dtype)  # [o_j >= tau]  (B_u,)
    ce = torch.stack([F.cross_entropy(z, y_hat, reduction="none", label_smoothing=smoothing)
                      for z in logits_s])  # (S, B_u)
    # Mean over all B_u images, not over the kept ones [authors' code]: with none, L_u is 0.
    return (keep * ce).mean(1), keep.mean()


def over_streams(losses: Tensor, how: str) -> Tensor:
    """(S,) -> (): Eq. 1 and 3 sum the streams, the authors' code takes their mean (D3)."""
    return losses.sum() if how == "sum" else losses.mean()


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


# ===== 5. OPTIMISER AND SCHEDULES  (paper Sec. 5.1) ===============================================


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """No weight decay on 1-D parameters and tokens; a learnable position embedding is decayed."""
    free, decayed = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:  # the decoder's positions are fixed
            one_d = p.ndim == 1 or name.endswith(("cls_token", "mask_token", ".bias"))
            (free if one_d else decayed).append(p)
    return [dict(params=free, weight_decay=0.0), dict(params=decayed, weight_decay=weight_decay)]


def carry_moments(optimizer, before: dict):
    """AdamW's moments of the stage before, a state dict; the rest stays this stage's own.

    Parameters that are new (the branch's, the last of each group) start without any.
    """
    own = optimizer.state_dict()
    for new, old in zip(own["param_groups"], before["param_groups"], strict=True):
        places = dict(zip(old["params"], new["params"]))
        own["state"] |= {places[k]: v for k, v in before["state"].items() if k in places}
    optimizer.load_state_dict(own)


def lr_at(epoch: int, s) -> float:
    """Learning rate of an epoch of the whole training: linear warm-up, cosine to min_lr.

    Constant within an epoch. D6: the authors' scheduler is asked with the finished epoch's number,
    so that epochs 0 and 1 both train at warmup_lr and the peak comes in epoch 6.
    """
    t = max(0, epoch - s.lr_lag)
    if t < s.warmup_epochs:
        return s.warmup_lr + t * (s.lr - s.warmup_lr) / s.warmup_epochs
    cosine = 0.5 * (1.0 + math.cos(math.pi * t / s.all_epochs))
    return s.min_lr + (s.lr - s.min_lr) * cosine


def set_lr(optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr


# ===== 6. TRAINING STEP  (paper Sec. 4) ===========================================================


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """Evaluation mode inside; every module's own mode again after."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    yield
    for module, mode in modes.items():
        module.training = mode


def sup_step(student, x_l, y_l, s, precision) -> dict[str, Tensor]:
    """Epochs on labels alone. x_l (B_l, 3, S, S), y_l (B_l,).

    BatchNorm normalises by the images of one process and accumulation step.
    """
    with precision.autocast():
        logits_l = heads_of(student, x_l)  # (S, B_l, K)
    loss_l = over_streams(labeled_losses(logits_l, y_l, s.label_smoothing), s.stream_loss)  # Eq. 1
    return dict(loss=loss_l, loss_l=loss_l)


def semi_step(student, labeler, x_l, y_l, x_u_w, x_u_s, s, precision, noise=None):
    """Fig. 3. x_l (B_l, 3, S, S), y_l (B_l,); x_u_w, x_u_s (B_u, 3, S, S): views of one image each;
    noise (B_u, L): which patches the branch hides, None without one (E10).

    labeler: the same network as student, not wrapped: DDP would broadcast buffers before each
    forward. Returns losses by name, and y_hat and o (B_u,) for the log. The order is the authors':
    the strong forward moves BatchNorm's statistics, then the weak view is labelled with them and
    with the weights of before the update; it never moves them itself. BatchNorm normalises by the
    labelled and strong images of one process and accumulation step together.
    """
    branch = () if noise is None else (x_u_w, noise)
    with precision.autocast():
        out = student(torch.cat([x_l, x_u_s]), *branch)
        logits = as_heads(out[0] if branch else out)  # (S, B_l + B_u, K)
    with torch.no_grad(), eval_mode(labeler), precision.autocast():
        logits_w = heads_of(labeler, x_u_w)
    o, y_hat = pseudo_labels(logits_w, s.pseudo_source)  # Eq. 2
    logits_l, logits_s = logits.split([len(x_l), len(x_u_s)], 1)
    loss_l = over_streams(labeled_losses(logits_l, y_l, s.label_smoothing), s.stream_loss)  # Eq. 1
    losses_u, kept = pseudo_label_losses(logits_s, y_hat, o, s.tau, s.label_smoothing_u)
    loss_u = over_streams(losses_u, s.stream_loss)  # Eq. 3
    loss = loss_l + s.lambda_u * loss_u  # Eq. 4
    losses = dict(loss=loss, loss_l=loss_l, loss_u=loss_u, kept=kept)
    if branch:
        losses["loss_mae"] = mae_loss(*out[1:], bool(s.norm_pix_loss))  # L_MAE
        losses["loss"] = loss + s.mae_weight * losses["loss_mae"]  # E10
    return losses, y_hat, o


# ===== 7. EVALUATION  (paper Sec. 4, Inference) ===================================================


def predictions(logits: Tensor, names: tuple) -> dict[str, Tensor]:
    """Scores (N, K) by name: "" the headline, the mean of logits; each head; mean of softmaxes."""
    scores = {"": logits.mean(0)}
    if len(logits) > 1:
        scores |= {f"_{name}": z for name, z in zip(names, logits)}
        scores["_softmax"] = logits.softmax(-1).mean(0)
    return scores


@torch.no_grad()
def evaluate(model, images, view, run, batch=250) -> dict[str, float]:
    """Top-1 and top-5 in percent, each image once over all processes: of both heads together and,
    as top1_conv, top1_trans, top1_softmax, of each and of the other fusion. Restores the mode."""
    share = dict(rank=run.rank, world=run.world, workers=run.workers,
                 bad=BadImages(images, run.max_bad_images))
    heads = getattr(model, "names", ())
    names = [""] + ([f"_{n}" for n in (*heads, "softmax")] if len(heads) > 1 else [])
    totals = torch.zeros(len(names), 3, device=run.device)  # float32 counts exactly to 16 million
    with eval_mode(model):
        for seen, targets in eval_loader(images, view, batch, **share):
            y = targets.to(run.device)[:, None]
            for k, z in enumerate(predictions(logits_of(model, seen, run), heads).values()):
                hit = z.topk(min(5, z.shape[1])).indices == y
                totals[k] += torch.stack([hit[:, 0].sum(), hit.sum(), y.new_tensor(len(y))])
    if run.world > 1:
        dist.all_reduce(totals)
    results = {}
    for name, (top1, top5, count) in zip(names, totals.tolist()):
        results["top1" + name] = round(100 * top1 / count, 3)
        results["top5" + name] = round(100 * top5 / count, 3)
    return results


def logits_of(model, seen, run) -> Tensor:
    """(S, N, K) float32 of a batch of the evaluation view, (bytes, boxes) on the host."""
    x = to_model(*(t.to(run.device) for t in seen), run.stats)
    with run.precision.autocast():
        return heads_of(model, x)


@torch.no_grad()
def attention_maps(model, x: Tensor) -> Tensor | None:
    """Where the class token looks, by attention rollout (Fig. 4): (N, g, g), the largest 1.

    The paper does not say how; rollout is what the author of the related Conformer used: the mean
    over heads, plus the identity, rows normalised, multiplied over the blocks, row of the class
    token. Behind a pooling (pit) the grid is another: blocks before it are left out (ours).
    """
    maps, handles = [], []

    def watch(attn, inputs, _):
        t = inputs[0]
        q, k, _ = attn.qkv(t).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        a = (q.float() @ k.float().transpose(-2, -1) * attn.scale).softmax(-1).mean(1)
        a = a + torch.eye(a.shape[-1], device=a.device)
        maps.append(a / a.sum(-1, keepdim=True))  # (N, 1 + L, 1 + L)

    of = model.first if isinstance(model, Twins) else model
    for module in of.modules():
        if isinstance(module, Block):
            handles.append(module.attn.register_forward_hook(watch))
    try:
        with eval_mode(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    if not maps:
        return None
    maps = [a for a in maps if a.shape == maps[-1].shape]
    total = maps[0]
    for a in maps[1:]:
        total = a @ total
    row = total[:, 0, 1:]
    side = math.isqrt(row.shape[1])
    return (row / row.amax(1, keepdim=True)).view(-1, side, side)


# ===== 8. MAIN LOOP ===============================================================================


def run_stage(stage, model, warm, data, split, s, args, run, resume):
    """Train one stage, in place; returns what the next one goes on with. One loop serves both.

    model: unwrapped, with the weights to start from. warm: {optimizer, teacher} of the stage
    before, or None. resume: a checkpoint of this very stage, or None.
    """
    of_branch = {k for k in model.state_dict() if k.startswith("decoder.")}
    # an epoch is a pass over the labelled images; the unlabelled ones start again with each  (E7)
    steps_per_epoch = updates_per_epoch(len(split.labeled), s)
    labeled = Stream(f"{stage}/labeled", split.labeled, s.n_l, args.seed,
                     restart_every=steps_per_epoch, straddle=True)
    if stage == "semi":
        unlabeled = Stream("semi/unlabeled", split.unlabeled, s.n_u, args.seed,
                           restart_every=steps_per_epoch)
    total = s.epochs * steps_per_epoch
    if s.ema_decay and s.ema_decay < 1 and total < 3 / (1 - s.ema_decay):
        run.log.say(f"warning: {stage}: {total} updates are few for --ema-decay {s.ema_decay:g}: "
                    "the average will hardly move")
    evaluate_at = {round(total * k / args.evals) for k in range(1, args.evals + 1)} - {0}

    torch.manual_seed(seed_of(args.seed, stage, run.rank))  # from here on draws are a process's own
    teacher = Ema(model) if s.ema_decay else None  # evaluated, never trained on
    groups = parameter_groups(model, s.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    if warm and s.schedule == "one":  # one training, whose second part has more images
        carry_moments(optimizer, warm["optimizer"])
        if teacher is not None and warm["teacher"] is not None:
            weights.load_exactly(teacher.module, warm["teacher"], of_branch, "the stage before")
    run.precision.reset()
    start, seconds_before, unprinted = 0, 0.0, []
    if resume:
        start, seconds_before, unprinted = resume["step"], resume["seconds"], resume["unprinted"]
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        if teacher is not None:
            teacher.module.load_state_dict(resume["teacher"])
        if run.precision.scaler is not None and resume["scaler"]:
            run.precision.scaler.load_state_dict(resume["scaler"])
        checkpoint.restore_rng(resume["rng"], run.rank, seed_of(args.seed, stage, run.rank, start))
    if args.compile:  # in place: the keys of the state dict stay clean
        torch.compiler.reset()  # a stage has its own sizes, and each size its own graph
        model.compile(dynamic=False)
    student = model
    if run.world > 1:
        student = nn.parallel.DistributedDataParallel(
            model, device_ids=run.device_ids, broadcast_buffers=False)  # E8

    views = {k: T.Compose(v) for k, v in view_lists(args.dataset, run.image_size, s).items()}
    bad = BadImages(data.train, args.max_bad_images)
    how = dict(start=start, stop=total, rank=run.rank, world=run.world, accum=args.accum_steps,
               workers=run.workers, pin=run.device.type == "cuda", bad=bad)
    batches = stream_loader(data.train, [views["labeled"]], labeled, **how)
    if stage == "semi":
        of_u = stream_loader(data.train, [views["weak"], views["strong"]], unlabeled, **how)
        batches = ((*b_l, *b_u) for b_l, b_u in zip(batches, of_u))
    names = {p: n for n, p in model.named_parameters()}
    # Beside an unlabeled/ folder the known ones are the labelled pictures, learned by heart.
    all_known = bool((data.train.targets[split.unlabeled] >= 0).all())
    if resume:
        bad.seen.update(resume["bad_images"])

    def images(seen):  # (bytes, boxes) on the host -> pictures on the device
        x = to_model(*(t.to(run.device, non_blocking=True) for t in seen), run.stats)
        return x.to(memory_format=run.layout)

    small = args.dataset != "digits" or args.arch.endswith("_digits")
    quicker = "" if small else "--arch vit_conv_digits"
    moving = [b for b in model.buffers() if b.is_floating_point()]  # BatchNorm's statistics
    run.log.start(stage, start, total, unprinted, run.device, quicker)
    step, parts, began = start, [], time.perf_counter()
    student.train()
    for module in model.modules():
        if s.freeze_bn and isinstance(module, nn.BatchNorm2d):
            module.eval()
    for batch in run.log.wait(batches):
        lr = lr_at(s.first_epoch + step // steps_per_epoch, s)
        set_lr(optimizer, lr)
        last_part = len(parts) + 1 == args.accum_steps
        with student.no_sync() if run.world > 1 and not last_part else contextlib.nullcontext():
            if stage == "sup":
                (seen_l,), y_l = batch
                y_l = y_l.to(run.device, non_blocking=True)
                losses = sup_step(student, images(seen_l), y_l, s, run.precision)
            else:
                (seen_l,), y_l, (seen_w, seen_s), y_u = batch
                y_l, y_u = (y.to(run.device, non_blocking=True) for y in (y_l, y_u))
                noise = None
                if of_branch:
                    noise = torch.rand(len(y_u), (run.image_size // model.cell) ** 2,
                                       device=run.device)
                losses, y_hat, o = semi_step(
                    student, model, images(seen_l), y_l, images(seen_w), images(seen_s), s,
                    run.precision, noise)
                # The only use of unlabelled images' true labels, where known: two logged numbers.
                right, sure = y_hat == y_u, o >= s.tau
                if all_known:
                    losses["pseudo_acc"] = right.float().mean()
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
            flat = torch.cat([b.flatten() for b in moving])  # E8
            dist.all_reduce(flat)
            for b, mean in zip(moving, (flat / run.world).split([b.numel() for b in moving])):
                b.copy_(mean.view_as(b))
        watched = {k: v for k, v in means.items() if k.startswith("loss")}
        applied = run.precision.update(optimizer, watched)
        optimizer.zero_grad(set_to_none=True)
        if teacher is not None:
            teacher.update(model, s.ema_decay, applied)
        parts, step = [], step + 1
        run.log.add(step, means)

        signalled = run.stop.asked()
        stopping, printing = signalled or step == args.stop_after, step % args.print_every == 0
        saving = step % args.save_every == 0 or stopping or step == total
        if printing or saving:
            run.precision.check(optimizer, names, step)
        if printing or step == total:
            run.log.report(stage, step, images=s.batch_size,
                           epoch=round(s.first_epoch + step / steps_per_epoch, 3),
                           bad_images=len(bad.seen), lr=lr)
        if step in evaluate_at:
            before = time.perf_counter()
            results = evaluate(model, data.val, views["evaluate"], run)
            if teacher is not None:
                of_teacher = evaluate(teacher.module, data.val, views["evaluate"], run)
                results |= {f"ema_{k}": v for k, v in of_teacher.items()}
            run.log.evaluation(stage, step, results, time.perf_counter() - before)
            run.results[stage] = results
        if saving:
            seconds = seconds_before + time.perf_counter() - began
            run.results.setdefault(stage, {}).update(updates=step, seconds=round(seconds, 1))
            save(stage, step, seconds, model, teacher, optimizer, bad, run)
        if stopping and step < total:
            run.log.say(f"stopped at {stage} step {step}; --resume {run.folder} goes on")
            raise SystemExit(128 + signalled if signalled else 0)
    return dict(optimizer=optimizer.state_dict(),
                teacher=None if teacher is None else teacher.module.state_dict())


def save(stage, step, seconds, model, teacher, optimizer, bad, run):
    """Checkpoint after an update: written by the first process, with the draws of all."""
    rng, scaler = checkpoint.rng_states(), run.precision.scaler
    if run.rank == 0:
        state = dict(
            stage=stage, step=step, seconds=seconds, model=model.state_dict(), rng=rng,
            teacher=None if teacher is None else teacher.module.state_dict(),
            optimizer=optimizer.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
            unprinted=run.log.unprinted(), bad_images=sorted(bad.seen), log_size=run.log.size,
            results=run.results, recipe=run.recipe)
        checkpoint.save(run.folder, state)


@log.clear_errors
def main(args):
    if args.dry_run:
        return print(dry_run(args))
    if args.compare and not (args.eval and args.attention):
        raise UserError(f"--compare {args.compare}: needs --eval RUN and --attention PATH")
    for flag in ("predict", "attention"):  # now, not after hours of training
        if getattr(args, flag):
            find_pictures(getattr(args, flag), f"--{flag}")
    if args.eval:
        args = flags.stored_args(args, SCRIPT)
    run = start_processes(args)
    data = load_dataset(args.dataset, args.data_path, seed=args.split_seed, holdout=args.holdout)
    if args.eval:
        return evaluate_run(args, data, run)

    # What will be trained, on what
    stages = [x for x in STAGES
              if args.stage in ("all", x) and (x == "sup" or args.method != "sup")]
    settings = {x: derive(args, x, run.world) for x in stages}
    stages = [x for x in stages if settings[x].epochs > 0]
    if not stages:
        raise UserError(f"--stage {args.stage}, --method {args.method}, --epochs: no stage is left "
                        "to train; raise --epochs or choose another stage")
    if args.stage == "semi" and not args.init:
        raise UserError("--stage semi: needs --init RUN, a run of stage sup")
    pool = resolve(args, "semi").unlabeled_pool  # not derived: a stage left out need not fit
    split = flags.choose_split(args, data, pool, default_percent(args))
    if "semi" in stages and not len(split.unlabeled):
        raise UserError("--labels: no image is left unlabelled; lower it, or --unlabeled-pool all")
    run.recipe = flags.mathematics(args, split.sha256, {x: settings[x] for x in stages})
    if not any(s.mae_weight for s in settings.values()):  # what is not run decides no number
        run.recipe = {k: v for k, v in run.recipe.items() if k.split(".")[-1] not in BRANCH}

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
    torch.manual_seed(seed_of(args.seed, "model"))  # the same weights on every process
    model = build_model(args, len(data.classes))
    halved = run.precision.dtype != torch.float32
    for s in (settings[x] for x in stages):
        costs = cost(args, s, len(data.classes), run.image_size)
        report.refuse_too_large(costs, s.micro_batch, halved, run.device, args.accum_steps)
    warm = start = None
    if args.init and state is None:
        kind, before = load_init(model, args.init)
        warm = before if before and args.stage == "semi" and before["stage"] == "sup" else None
        start = f"start: {args.init}, format {kind}"

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
        s, weights_now = settings[stage], model.state_dict()
        model = build_model(args, len(data.classes), s.drop_path)
        torch.manual_seed(seed_of(args.seed, "decoder"))
        new = add_branch(model, s, run.image_size) if s.mae_weight else set()
        weights.load_exactly(model, weights_now, new, "the stage before")
        model = model.to(run.device, memory_format=run.layout)
        resume = state if state and state["stage"] == stage else None
        warm = run_stage(stage, model, warm, data, split, s, args, run, resume)
    if run.world > 1:  # before the pictures: waiting for them has a limit
        dist.barrier()
        dist.destroy_process_group()
    if run.rank == 0:
        finish(args, data, split, settings[stages[-1]], model, run)


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
    precision = Precision(device, args.dtype)
    # docs/results.md was measured so; in bf16 channels_last is a third quicker (docs/speed.md)
    plain = device.type == "cpu" and precision.dtype == torch.float32
    return SimpleNamespace(
        rank=rank, world=world, device=device, workers=workers, folder=None, results={},
        max_bad_images=args.max_bad_images,
        device_ids=[device.index] if device.type == "cuda" else None,
        precision=precision,
        layout=torch.contiguous_format if plain else torch.channels_last,
        image_size=args.image_size or DATASETS[args.dataset][0],
        stats=255.0 * stats.view(2, 3, 1, 1))


def on_meta(args, num_classes: int, drop_path: float = 0.0) -> nn.Module:
    with torch.device("meta"):
        return build_model(args, num_classes, drop_path)


def greet(args, split, settings, run):
    """First lines of a run: what it trains on, which recipe, which split, where."""
    key, row = recipe(args)
    if args.dataset == "digits":
        paper = paper_args(args)
        number = paper_number(paper)
        run.log.say(f"training on the embedded digits; on ImageNet: {command_of(paper)}"
                    + (f"   (the paper: {number})" if number else ""))
    run.log.say(f"recipe {key}: {row['source']}")
    run.log.say(split.describe())
    for stage, s in settings.items():
        if s.warmup_epochs >= s.all_epochs:
            run.log.say(f"warning: {stage}: --warmup-epochs {s.warmup_epochs:g} of {s.all_epochs} "
                        "epochs: the learning rate never reaches its peak")
        unlabeled = f" + {s.n_u} unlabelled" if stage == "semi" else ""
        run.log.say(f"{stage}: {s.epochs} epochs, batch {s.n_l} labelled{unlabeled} = "
                    f"{run.world} processes x {args.accum_steps} parts x {s.micro_batch}, "
                    f"lr {s.lr:g} ({s.sources['lr']})")
    dtype = str(run.precision.dtype).split(".")[-1]
    run.log.say(f"{run.folder}: {args.arch}, {args.method} on {run.device}, {dtype}, "
                f"{run.workers} workers")


def finish(args, data, split, s, model, run):
    """Weights, curves, pictures, predictions, and the summary. s: settings of the last stage."""
    run.log.bar.close()
    about = dict(timm_model=None, arguments=model_arguments(args, len(data.classes)),
                 classes=data.classes, image_size=run.image_size, mean=IMAGENET_DEFAULT_MEAN,
                 std=IMAGENET_DEFAULT_STD)
    metadata = {"model": json.dumps(about)}  # one key: several have no fixed order in the file
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()
               if not k.startswith("decoder.")}  # it predicts nothing that anyone asks for
    checkpoint.save_weights(run.folder / "model.safetensors", tensors, metadata)
    run.log.write(dict(results=run.results))
    panels = {"losses": ["loss", "loss_l", "loss_u", "loss_mae"],
              "top-1 (%)": ["top1", "top1_conv", "top1_trans", "top1_first", "top1_second",
                            "ema_top1"],
              "pseudo-labels": ["kept", "pseudo_acc", "kept_acc"], "learning rate": ["lr"]}
    report.curves(log.read_log(run.folder), run.folder / "curves.png", panels)
    draw_views(data, split, s, args, run)
    pictures = args.attention or data.val
    drawn = draw_attention({"": model}, pictures, s, args, run, run.folder)
    if s.mae_weight:
        draw_reconstructions(model, data.val, s, args, run)

    names = {"sup": "supervised baseline (stage sup)", "semi": f"{args.method} (stage semi)"}
    run.log.say("")
    for stage, r in run.results.items():
        run.log.say(f"{names[stage]:<33} top-1 {r['top1']:6.2f}, top-5 {r['top5']:6.2f}{each(r)}   "
                    f"{r['updates']} updates, {r['seconds']:.0f} s")
    if {"sup", "semi"} <= run.results.keys():
        gain = run.results["semi"]["top1"] - run.results["sup"]["top1"]
        run.log.say(f"{'gain':<33}       {gain:+6.2f}")
    run.log.say(report.band(Path(__file__).parent / "docs" / "bands.json", run.recipe))
    files = "attention.png, " * drawn + "reconstructions.png, " * bool(s.mae_weight)
    run.log.say(f"{run.folder}: curves.png, views.png, {files}log.jsonl, model.safetensors")
    if args.predict:
        predict(args, model, data.classes, s, run, run.folder)
    run.log.close()


def each(results: dict) -> str:
    """The other top-1 of an evaluation, as text: both heads, the mean of their probabilities, and
    all of these of the average of the weights."""
    names = {k: k.replace("_top1", "").replace("top1_", "")
             for k in results if k.startswith(("top1_", "ema_top1"))}
    return "".join(f", {name} {results[k]:.2f}" for k, name in names.items())


def predict(args, model, classes, s, run, folder):
    view = T.Compose(view_lists(args.dataset, run.image_size, s)["evaluate"])
    model.eval()
    with torch.no_grad():
        report.predict(args.predict,
                       lambda seen: logits_of(model, seen, run).mean(0).softmax(-1).cpu(),
                       view, classes, folder, run.workers)


def load_final(folder: str, flag: str = "--eval") -> tuple[nn.Module, dict]:
    """A finished run's model and its metadata, from model.safetensors alone. Raises UserError."""
    from safetensors import safe_open

    file = Path(folder) / "model.safetensors"
    if not file.exists():
        raise UserError(f"{flag} {folder}: no model.safetensors; finish it: --resume {folder}")
    tensors = checkpoint.read(file)
    with safe_open(file, "pt") as opened:
        about = json.loads((opened.metadata() or {}).get("model", "null"))
    if about is None or "arguments" not in about:
        raise UserError(f"{flag} {folder}: its model.safetensors was not written by {SCRIPT}.py")
    model = model_of(**about["arguments"])
    weights.load_exactly(model, tensors, set(), f"{flag} {folder}")
    return model, about


def evaluate_run(args, data, run):
    """--eval RUN: the final weights on the validation set, and --predict; nothing is trained."""
    model, about = load_final(args.eval)
    model, s = model.to(run.device), derive(args, STAGES[0], 1)
    run.image_size = about["image_size"]
    if data.classes != about["classes"]:
        raise UserError(f"--eval {args.eval}: --data-path holds other classes than the run; "
                        "use the run's own data")
    models = {args.eval: model}
    if args.compare:
        models[args.compare], other = load_final(args.compare, "--compare")
        models[args.compare].to(run.device)
        if other["image_size"] != run.image_size:
            raise UserError(f"--compare {args.compare}: it saw pictures of {other['image_size']} "
                            f"pixels, --eval {args.eval} of {run.image_size}")
    for folder, m in models.items():
        if args.attention and not any(isinstance(b, Block) for b in m.modules()):
            raise UserError(f"--attention: {folder} has no transformer")
    view = T.Compose(view_lists(args.dataset, run.image_size, s)["evaluate"])
    r = evaluate(model, data.val, view, run)
    if run.rank == 0:
        pictures = len(data.val)
        print(f"{args.eval}: top-1 {r['top1']:.2f}, top-5 {r['top5']:.2f} on {pictures} pictures"
              + each(r))
        if args.predict:
            predict(args, model, about["classes"], s, run, Path(args.eval))
        if args.attention:
            if not draw_attention(models, args.attention, s, args, run, Path(args.eval)):
                raise UserError(f"--attention {args.attention}: no picture there can be read")
            print(f"attention: {Path(args.eval) / 'attention.png'}")


def draw_views(data, split, s, args, run, count=10):
    """views.png: labelled pictures, and the same unlabelled ones weak and strong."""
    lists = view_lists(args.dataset, run.image_size, s)

    def look(names, positions):
        stream = Stream(f"picture/{names[0]}", positions[:count], min(count, len(positions)),
                        args.seed)
        of_picture, bad = [T.Compose(lists[n]) for n in names], BadImages(data.train, count)
        seen, _ = next(stream_loader(data.train, of_picture, stream, start=0, stop=1, bad=bad))
        return {n: to_model(*x, run.stats.cpu()) for n, x in zip(names, seen)}

    rows = look(["labeled"], split.labeled)
    if len(split.unlabeled):
        shown = np.random.default_rng(args.seed).permutation(split.unlabeled)
        rows |= look(["weak", "strong"], shown)
    mean, std = run.stats.cpu() / 255.0
    pictures = {name: row * std + mean for name, row in rows.items()}
    report.contact_sheet(pictures, run.folder / "views.png", f"views of {args.dataset}")


def draw_attention(models, source, s, args, run, folder, count=8) -> bool:
    """attention.png, as in Fig. 4: pictures, then heat map and overlay of each model.

    models: {title: network}; source: a path, or the validation pictures. False, and no picture,
    where no network has a transformer stream or nothing can be read.
    """
    view = T.Compose(view_lists(args.dataset, run.image_size, s)["evaluate"])
    if isinstance(source, str):
        read, chosen = open_image, find_pictures(source, "--attention")
    else:  # from all over the set: a folder's pictures come class by class
        read, chosen = source.pil, np.linspace(0, len(source) - 1, min(count, len(source)))
        chosen = chosen.astype(int)
    shown = []
    for which in chosen:
        try:
            shown += [read(which)] if len(shown) < count else []
        except BadImage as error:
            print(f"warning: left out of attention.png: {error}", file=sys.stderr)
    if not shown:
        return False
    seen = [torch.stack(parts) for parts in zip(*map(view, shown))]
    x = to_model(*seen, run.stats.cpu())
    mean, std = run.stats.cpu() / 255.0
    rows = {"picture": x * std + mean}
    for title, model in models.items():
        with run.precision.autocast():
            maps = attention_maps(model, x.to(run.device))
        if maps is None:
            continue
        low = maps.amin((1, 2), keepdim=True)  # for the eye: from the least to the most, 0 to 1
        maps = (maps - low) / (1 - low).clamp(min=1e-6)
        heat = F.interpolate(maps.float().cpu().unsqueeze(1), x.shape[-2:], mode="bilinear")
        colour = torch.cat([heat, 1 - (2 * heat - 1).abs(), 1 - heat], 1).clamp(0, 1)
        more = {"attention": colour, "overlay": 0.5 * rows["picture"] + 0.5 * colour}
        rows |= {f"{name} {title}".strip(): row for name, row in more.items()}
    if len(rows) > 1:
        report.contact_sheet(rows, folder / "attention.png", "attention rollout (Fig. 4)")
    return len(rows) > 1


@torch.no_grad()
def draw_reconstructions(model, images, s, args, run, count=10):
    """reconstructions.png: original, hidden in grey, hidden patches as predicted; fixed draws."""
    view = T.Compose(view_lists(args.dataset, run.image_size, s)["evaluate"])
    chosen = images.take(np.arange(min(count, len(images))))
    ((seen, _),) = eval_loader(chosen, view, count, bad=BadImages(chosen, count))
    x = to_model(*(t.to(run.device) for t in seen), run.stats)
    draws = torch.Generator().manual_seed(0)
    noise = torch.rand(len(x), (run.image_size // model.cell) ** 2, generator=draws)
    pred, target, mask = model.reconstruct(x, noise.to(run.device))
    pred = undo_norm_pix(pred, target) if s.norm_pix_loss else pred
    mean, std = run.stats / 255.0
    grey = patchify(((0.5 - mean) / std).expand_as(x), model.cell)
    hidden = mask.unsqueeze(2) > 0
    rows = {"original": target, "masked": torch.where(hidden, grey, target),
            "reconstructed": torch.where(hidden, pred, target)}
    rows = {k: (unpatchify(v, model.cell) * std + mean).clamp(0, 1) for k, v in rows.items()}
    report.contact_sheet(rows, run.folder / "reconstructions.png", "hidden patches (E10)")


# The paper's rows: what --dry-run prints, and the first line of a run on digits


def paper_args(args) -> SimpleNamespace:
    """The same flags on the paper's data."""
    arch = args.arch.removesuffix("_digits")
    dataset = "places205" if args.dataset == "places205" else "imagenet"
    allowed = (5,) if dataset == "places205" else (5, 10, 20)
    changed = dict(arch=arch, dataset=dataset, init=None, num_labels=None, labels_file=None,
                   image_size=None, recipe=None if args.recipe == "digits" else args.recipe,
                   holdout=0, accum_steps=1)  # parts are made of this run's batch
    paper = SimpleNamespace(**{**vars(args), **changed})
    labels = percent(args) or recipe(args)[0][3]
    paper.labels = labels if labels in allowed else default_percent(paper)
    return paper


def paper_number(args) -> str | None:
    """The paper's own top-1 for what these flags compute, as text; None where it has none."""
    listed = args.labels_file and (list_name(args.labels_file[0]) or "another")
    if listed and not listed.startswith("Semiformer") or args.holdout or args.init:
        return None
    if args.pos_embed or args.image_size not in (None, DATASETS[args.dataset][0]):
        return None
    if args.stage == "sup" and args.method != "sup":
        return None  # the first 30 epochs of a training
    bare = SimpleNamespace(**{**vars(args), **dict.fromkeys(SETTINGS), "unlabeled_pool": None,
                              "follow": "recommended", "recipe": recipe_name(args)})
    of_semi = resolve(args, "semi")
    method, source, branch = args.method, of_semi.pseudo_source, of_semi.mae_weight
    if method == "sup":
        source, branch = "", 0.0
    elif method != "vanilla":  # what sets the two apart
        method = "semiformer" if args.fuse else "conv_labeled"
    for stage in STAGES[: 1 if method == "sup" else 2]:
        now, row = (vars(resolve(a, stage)) for a in (args, bare))
        free = {"pseudo_source", "mae_weight"} | (set() if branch else BRANCH)  # are in the key
        free = SEMI_ONLY if stage == "sup" else free  # what this stage has no use for
        if any(now[k] != row[k] for k in now.keys() - free - {"sources"}):
            return None
    more = ", with the published list" if listed else ""
    key = (args.dataset, args.arch, method, source, percent(args), bare.recipe)
    if branch:
        fits = branch == 5.0 and key == ("imagenet", "vit_conv", *_FULL, 10, "R1")
        return f"{PAPER_MAE} top-1 (Semi-MAE's, E10){more}" if fits else None
    if key not in PAPER:
        return None
    of_trans, both = PAPER[key]
    return f"{both} top-1" + (f", transformer head {of_trans}" if of_trans else "") + more


def command_of(args) -> str:
    """The command with these flags."""
    parts = [f"python {SCRIPT}.py --dataset {args.dataset} --data-path DIR"]
    parts += [f"--init {args.init}"] if args.init else []
    parts += [f"--arch {args.arch} --labels {args.labels:g}"]
    single = len(ARCHS[args.arch]) == 1
    parts += [f"--method {args.method}"] * (args.method != ("vanilla" if single else "semiformer"))
    parts += [f"--recipe {args.recipe}"] if args.recipe else []
    parts += [f"--stage {args.stage}"] if args.stage != "all" else []
    parts += [f"--follow {args.follow}"] if args.follow != "recommended" else []
    parts += [f"--unlabeled-pool {args.unlabeled_pool}"] if args.unlabeled_pool else []
    parts += ["--pos-embed 1"] if args.pos_embed else []
    usual = int(not single and args.method != "conv_labeled")
    parts += [f"--fuse {args.fuse}"] if args.fuse != usual else []
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
        share = (f"{percent(a):g}% of the labels" if percent(a)
                 else f"{a.num_labels or 'listed'} labels")
        lines.append(f"== {title}: {a.dataset}, {a.arch}, {a.method}, {share}")
        lines += [f"   {command_of(a)}"] if title != "this run" else []
        number = paper_number(a)
        lines += [f"   the paper's own result: {number}"] if number else []
        lines.append(f"   recipe {recipe(a)[0]}: {recipe(a)[1]['source']}")
        stages = [x for x in STAGES if a.stage in ("all", x) and (x == "sup" or a.method != "sup")]
        for stage in stages:
            s = derive(a, stage, 1)
            hidden = {"sources", "micro_batch"} | (SEMI_ONLY if stage == "sup" else set())
            hidden |= set() if s.mae_weight else BRANCH - {"mae_weight"}
            s.sources |= dict.fromkeys(("n_l", "n_u"), "batch_size, batch_group, unlabeled_ratio")
            s.sources |= dict.fromkeys(("first_epoch", "all_epochs"), "epochs of both stages")
            values = {k: v for k, v in vars(s).items() if k not in hidden}
            lines.append(report.settings_table(f"stage {stage}", values, s.sources))
            lines += cost_lines(a, stage, s)
    return "\n".join(lines)


def cost(args, s, num_classes: int, size: int) -> dict[str, float]:
    """What an update costs: flops; fixed; kept, the mean over the images of its batch."""
    model = on_meta(args, num_classes, s.drop_path)
    costs = report.cost(model, size)
    flops = costs["flops"] * (3 * s.n_l + 4 * s.n_u)  # backward costs two forwards; weak view one
    if s.mae_weight:
        with torch.device("meta"):
            add_branch(model, s, size)
        noise = torch.empty(2, (size // model.cell) ** 2, device="meta")
        model.forward = lambda x: model.reconstruct(x, noise)
        whole, costs = costs, report.cost(model, size)
        flops += 3 * s.n_u * costs["flops"]
        costs["kept"] = whole["kept"] + costs["kept"] * s.n_u / (s.n_l + s.n_u)
    return dict(costs, flops=flops)


def cost_lines(args, stage, s) -> list[str]:
    """Parameters, images, updates, arithmetic and memory of a stage, on one process."""
    size, classes, total = DATASETS[args.dataset]
    model = on_meta(args, classes or 1000, s.drop_path)
    costs = cost(args, s, classes or 1000, args.image_size or size)
    count = sum(p.numel() for p in model.parameters())
    of_heads = sum(p.numel() for n, p in model.named_parameters()
                   if re.search(r"(_cls_head|^fc)\.", n))
    n_l, n_u = s.n_l, s.n_u if stage == "semi" else 0
    flops, kept = costs["flops"], costs["kept"] * (n_l + n_u) / args.accum_steps
    gib = [(costs["fixed"] + kept * share) / 2**30 for share in (1, 0.5)]
    updates = ""
    if total and (args.num_labels or percent(args)):  # known without the data
        exact = {("imagenet", 10, 0): 128116, ("imagenet", 5, 0): 64058}  # the published lists
        labeled = exact.get((args.dataset, percent(args), args.holdout),
                            round((total - args.holdout) * (percent(args) or 0) / 100))
        steps = updates_per_epoch(args.num_labels or labeled, s)
        updates = f", {steps} updates per epoch, {steps * s.epochs:,} in all"
    decoder = ""
    if s.mae_weight:
        with torch.device("meta"):
            add_branch(model, s, args.image_size or size)
        extra = sum(p.numel() for p in model.decoder.parameters() if p.requires_grad)
        decoder = f"; of the branch's decoder {extra:,}"
    return [f"  parameters {count:,}, without classifiers {count - of_heads:,}{decoder}",
            f"  per update {n_l} labelled + {n_u} unlabelled images{updates}",
            f"  per update {flops / 1e12:.4g} TFLOP; memory about {gib[0]:.1f} GiB in float32, "
            f"{gib[1]:.1f} GiB in 16 bit"]


# ===== 9. ENTRY POINT =============================================================================

if __name__ == "__main__":
    main(parse_args())
