"""Semi-ViT (Cai et al., NeurIPS 2022, arXiv:2208.05688): EMA teacher + probabilistic pseudo mixup.

  stage 1, optional     self-pretrained weights (MAE, DINO, MoCo-v3), loaded with --init
  stage 2, --stage sup  fine-tuning on the labelled images alone                          Table 12
  stage 3, --stage semi fine-tuning on everything; one step of it:                        Table 13

  x_l --strong--> mixup, CutMix -----------> student --CE(., y)-----------> L_l --+    (E11)
  x_u --weak----> teacher --max, argmax----> o, y_hat --+                         +-> L_l + mu L_u
  x_u --strong--> mix pairs by o (Eq. 3-5) --> student -+-[o* >= tau] CE--> L_u --+   (Sec. 2.3)
                  teacher <- m * teacher + (1 - m) * student   (Eq. 1)      (Eq. 2)

Notation  x_l, x_u  labelled, unlabelled images; N_l, N_u their batch sizes, N_u = 5 N_l; K classes
          y_hat, o  pseudo-label and its confidence, (N_u,); tau threshold; lam mixing ratio
          m, mu     EMA decay (--ema-decay); weight of L_u (--lambda-u, as in all our scripts)

How to run
  python semi_vit.py                                        80 labelled digits, minutes on a laptop
  python semi_vit.py --data-path DIR --predict NEW          your own: labeled/<class>/, unlabeled/
  python semi_vit.py --arch vit_huge --labels 1 --dry-run   which recipe, from where, at what cost
  torchrun --nproc-per-node 8 semi_vit.py --dataset imagenet --data-path DIR \\
      --init mae_pretrain_vit_base.pth --arch vit_base --labels 10

  The paper's rows (--dataset imagenet --data-path DIR --init FILE), top-1 as the paper states it
    --arch vit_base  --labels 10   79.7      --arch vit_base  --labels 1   71.0     Table 1, MAE
    --arch vit_large --labels 10   83.3      --arch vit_large --labels 1   77.3
    --arch vit_huge  --labels 10   84.3      --arch vit_huge  --labels 1   80.0
    --arch vit_small --labels 10   77.1      --arch vit_small --labels 1   68.0     Table 7, DINO
    --method sup | fixmatch | ema_teacher; --unlabeled-mix none | mixup | mixup+ | prob  Tables 2, 3

Departures. D1 to D14, where paper and authors' code disagree, are the table DEPARTURES below,
chosen with --follow. The rest, decided once:
  E1  L counts 304.3M parameters; the paper says 307M.
  E2  Average pooling: over the patch tokens without the class token, LayerNorm after it (code).
  E3  A CutMix box is clipped at the border; the target follows the area that is left (code).
  E4  Pseudo Mixup+ has no released code: the confident samples of a batch are permuted among
      themselves, all others stay unmixed and masked, the divisor stays N_u (our reading of
      Fig. 3b).
  E5  Silent in the paper, from the code: floor of 1e-6 under the learning rate, linear warm-up from
      0, head initialised with std 2e-5, no gradient clipping, stage 3 from the last checkpoint of
      stage 2, labelled images reshuffled at each epoch, Resize 256 before the evaluation crop.
  E6  The paper does not say which weights it evaluates: both are logged, the headline is the
      student.
  E7  Labelled and strong images pass the student in one forward (LayerNorm only: equal to two).
  E8  One split for all processes; the authors' code, without a list, draws another one on each.
  E9  vit_digits (width 64, depth 4) and vit_cifar (width 128, depth 6) are ours: Xavier weights and
      a learnable position embedding. So are the digits' views (no flip) and the evaluation of
      pictures under 64 pixels as a whole; RandAugment's posterize keeps one bit at least.
  E10 An update that the fp16 scaler skips leaves the EMA alone too; in the authors' code it moves.
  E11 --labeled-aug weak is ours: App. A has RandAugment on labelled images too, which our networks
      (E9) are slow to fit. The digits' recipe leaves it out; those for CIFAR-10 at 10% after
      pretraining do so in stage semi, vit_cifar's in stage sup as well.
  E12 prob needs neither --mixup nor --cutmix; in the authors' code one of them at 0 makes every
      pair the other kind, both at 0 turn prob off.
  E13 MoCo-v3's ViT-S has 12 heads, as it was pretrained; the authors' ViT-S has 6, and the paper
      does not say what Table 7 used.
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
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data.auto_augment import rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from timm.layers import resample_abs_pos_embed
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

# ===== 1. CONFIG  (paper App. A, Tables 12 and 13) ================================================

SCRIPT = "semi_vit"
STAGES = ("sup", "semi")
PUBLISHED = {  # lists of ImageNet, and the row that fits them; the paper's own are not among them
    "SimCLR 1percent.txt": 1,
    "SimCLR 10percent.txt": 10,
    "Semiformer 10% (FixMatch's ImageNet split 1)": 10,
}
METHODS = {  # what each changes in stage semi                                     [Tables 2 and 3]
    "sup": {},  # stage sup alone
    "fixmatch": dict(ema_decay=0.0, unlabeled_mix="none"),  # m = 0: the teacher is the student
    "ema_teacher": dict(unlabeled_mix="none"),
    "semi_vit": {},
}
ARCHS = {  # name: timm's model, arguments that differ from it, pooling         [App. A; Sec. 4.2]
    "vit_digits": ("vit_tiny_patch16_224", dict(embed_dim=64, depth=4, num_heads=4), "avg"),
    "vit_cifar": ("vit_tiny_patch16_224", dict(embed_dim=128, depth=6, num_heads=4), "avg"),
    "vit_tiny": ("vit_tiny_patch16_224", {}, "avg"),
    "vit_small": ("vit_small_patch16_224", {}, "avg"),
    "vit_base": ("vit_base_patch16_224", {}, "avg"),
    "vit_large": ("vit_large_patch16_224", {}, "avg"),
    "vit_huge": ("vit_huge_patch14_224", {}, "token"),  # the class token for Huge only
    "convnext_tiny": ("convnext_tiny", {}, "avg"),
    "convnext_small": ("convnext_small", {}, "avg"),
}
OURS = ("vit_digits", "vit_cifar")  # E9
DATASETS = {  # pixels, patch of a ViT and a ConvNeXt's stem (None: its own), classes, train images
    "digits": (28, (7, 2), 10, 8000),
    "cifar10": (32, (4, 2), 10, 50000),
    "cifar100": (32, (4, 2), 100, 50000),
    "imagenette": (112, (8, 2), 10, 9469),
    "food101": (224, (None, None), 101, 75750),
    "inat2019": (224, (None, None), 1010, 265213),
    "imagenet": (224, (None, None), 1000, 1281167),
    "landmarks": (224, (None, None), 256, 200000),  # GoogleLandmark, a folder; subset unpublished
    "folder": (224, (None, None), None, None),
}

SETTINGS = {  # name: (type, default of each stage, help); a recipe row or a flag changes them
    "epochs": (int, dict(sup=100, semi=100),
        "passes over the labelled (sup) or unlabelled (semi) images [Tables 12, 13]"),
    "batch_size": (int, dict(sup=512, semi=128),
        "labelled images per update, over all processes and parts [Tables 12, 13]"),
    "unlabeled_ratio": (int, dict(sup=0, semi=5), "N_u / N_l [Sec. 4: 5]"),
    "lr": (float, dict(sup=None, semi=None),
        "peak learning rate, instead of --lr-per-256 [App. A]"),
    "lr_per_256": (float, dict(sup=2.5e-4, semi=1e-3),
        "base learning rate: lr = this x batch / 256; too large shows as pseudo_acc falling early "
        "[App. A; Tables 12, 13]"),
    "min_lr": (float, dict(sup=1e-6, semi=1e-6), "floor of the cosine [authors' code]"),
    "warmup_epochs": (float, dict(sup=5.0, semi=5.0), "linear warm-up from 0 [Tables 12, 13]"),
    "schedule": (str, dict(sup="fraction", semi="fraction"),
        "fraction: of an epoch, as for ViT; table: over updates, as for ConvNeXt [authors' code]"),
    "weight_decay": (float, dict(sup=0.05, semi=0.05),
        "AdamW; none on biases, norms, position and class token [Sec. 4; Tables 12, 13]"),
    "beta2": (float, dict(sup=0.999, semi=0.999), "AdamW [Tables 12, 13]"),
    "layer_decay": (float, dict(sup=0.65, semi=0.75),
        "factor on the learning rate for each layer below the head [Tables 12, 13]"),
    "drop_path": (float, dict(sup=0.1, semi=0.1),
        "stochastic depth of the last block, linear from 0 [Tables 12, 13]"),
    "label_smoothing": (float, dict(sup=0.1, semi=0.1), "of labelled targets [Tables 12, 13]"),
    "label_smoothing_u": (float, dict(sup=0.1, semi=0.1),
        "of mixed pseudo-labels; unmixed ones stay hard [authors' code]"),
    "mixup": (float, dict(sup=0.8, semi=0.8),
        "alpha of Beta for mixup, 0: off; prob goes without [Tables 12, 13]"),
    "cutmix": (float, dict(sup=1.0, semi=1.0),
        "alpha of Beta for CutMix, 0: off; prob goes without [Tables 12, 13]"),
    "mix_labeled": (int, dict(sup=1, semi=1),
        "1: mix labelled images too [App. A: not for S and B at 1%% in stage semi]"),
    "mix_lam": (str, dict(sup="batch", semi="batch"),
        "batch: one ratio per batch; element: one per image [Sec. 3.1 allows both]"),
    "unlabeled_mix": (str, dict(sup="none", semi="prob"),
        "none, mixup, mixup+ or prob [Sec. 3, Fig. 3; Table 3]"),
    "unlabeled_cutmix": (float, dict(sup=0.0, semi=0.5),
        "share of pairs that prob cuts instead of blending [Eq. 4: 0; authors' code: 0.5]"),
    "cutmix_half_up": (int, dict(sup=1, semi=1),
        "1: the longer half of an odd box lies below, as in today's timm; 0: it is cut off, as in "
        "timm 0.4.5 [authors' code]"),
    "fixmatch_teacher": (str, dict(sup="eval", semi="eval"),
        "with --ema-decay 0: pseudo-labels in eval or train mode [Sec. 2.2; authors' code: train]"),
    "reprob": (float, dict(sup=0.25, semi=0.25),
        "random erasing of labelled and strong views [Tables 12, 13]"),
    "crop_min": (float, dict(sup=0.08, semi=0.08), "smallest area of a random crop [App. A, timm]"),
    "labeled_aug": (str, dict(sup="strong", semi="strong"),
        "weak: the same view without RandAugment, for small networks [App. A: strong]"),
    "tau": (float, dict(sup=0.0, semi=0.5),
        "drop a pseudo-label less confident than this: too low teaches errors (watch pseudo_acc), "
        "too high starves (watch kept) [Eq. 2; Table 4]"),
    "lambda_u": (float, dict(sup=0.0, semi=5.0), "mu, weight of L_u [Sec. 4: 5]"),
    "ema_decay": (float, dict(sup=0.0, semi=0.9999),
        "m of Eq. 1, 0 in stage sup: no EMA, 0 in stage semi: FixMatch; try 0.99 for a thousand "
        "updates, 0.999 for ten thousand [Table 5]"),
}
SEMI_ONLY = {"unlabeled_ratio", "label_smoothing_u", "unlabeled_mix", "unlabeled_cutmix",
             "fixmatch_teacher", "tau", "lambda_u", "unlabeled_pool"}

_T = "Tables 12, 13; App. A"
_WEAK = dict(mixup=0.0, cutmix=0.0, drop_path=0.0, reprob=0.0)  # App. A: at 1%, no regularisation
_WEAK_SEMI = dict(mix_labeled=0, drop_path=0.0, reprob=0.0)  # the same, S and B in stage semi
_LARGE = dict(layer_decay=0.75, epochs=50)  # Table 12, L and H
_SCRATCH = dict(  # last columns of Tables 12 and 13
    sup=dict(lr_per_256=1e-4, batch_size=1024, epochs=500, warmup_epochs=50, weight_decay=0.3,
             beta2=0.95, layer_decay=1.0, ema_decay=0.9999),
    semi=dict(lr_per_256=1e-3, layer_decay=0.85, tau=0.5), source="Tables 12, 13 (scratch)")
_CONVNEXT = dict(  # the authors' commands and defaults, D5 to D7
    sup=dict(lr=1e-3, batch_size=1024, epochs=500, warmup_epochs=50, layer_decay=1.0,
             ema_decay=0.9999, schedule="table"),
    semi=dict(lr_per_256=1e-3, warmup_epochs=10, layer_decay=1.0, tau=0.7, lambda_u=10.0,
              schedule="table"), source="Sec. 4.2; authors' commands")
_OTHER = dict(  # base learning rate of stage sup: one of the four that App. A searched
    sup=dict(lr_per_256=2.5e-4), semi=dict(lr_per_256=1e-3, tau=0.5, ema_decay=0.999),
    source="Tables 12, 13; App. A, other data sets")
_OTHER_1 = dict(_OTHER, semi=dict(_OTHER["semi"], tau=0.6, **_WEAK_SEMI))
_INAT_1 = dict(_OTHER_1, sup=dict(lr_per_256=2.5e-4, **_WEAK))
_FOLDER = dict(  # a few hundred pictures: smaller batches, so more updates; faster EMA
    sup=dict(lr_per_256=1e-3, batch_size=64), semi=dict(lr_per_256=2e-3, batch_size=32, tau=0.5,
                                                        ema_decay=0.99),
    source="App. A, other data sets; batches and EMA for small sets, not tuned")
_DIGITS = dict(  # found on 1,000 held-out training images, see docs/results.md
    sup=dict(epochs=1000, batch_size=64, lr=3e-3, warmup_epochs=50, layer_decay=1.0, drop_path=0.0,
             label_smoothing=0.0, mixup=0.0, cutmix=0.0, reprob=0.0, labeled_aug="weak"),
    semi=dict(epochs=24, batch_size=32, lr=4e-3, warmup_epochs=1, layer_decay=1.0, drop_path=0.0,
              label_smoothing=0.0, mix_labeled=0, reprob=0.0, tau=0.7, lambda_u=3.0,
              ema_decay=0.99, crop_min=0.6, labeled_aug="weak"), source="measured here")
_DIGITS_LARGE = dict(sup=dict(_DIGITS["sup"], lr=3e-4), semi=dict(_DIGITS["semi"], lr=3e-4),
                     source="as for vit_digits, smaller steps; not tuned")
_CIFAR = dict(sup=dict(lr_per_256=5e-4, layer_decay=1.0, batch_size=128, crop_min=0.35),
              semi=dict(tau=0.9, layer_decay=1.0, ema_decay=0.999, crop_min=0.35),
              source="not tuned")
_CIFAR_SMALL = dict(  # minutes on a CPU; found on 5,000 held-out pictures, see docs/results.md
    sup=dict(epochs=20, batch_size=64, lr=2e-3, warmup_epochs=1, layer_decay=0.8, drop_path=0.0,
             label_smoothing=0.0, mixup=0.0, cutmix=0.0, reprob=0.0, crop_min=0.5),
    semi=dict(epochs=3, batch_size=64, unlabeled_ratio=2, lr=2e-3, warmup_epochs=0.1,
              layer_decay=0.9, drop_path=0.0, label_smoothing=0.0, mix_labeled=0, reprob=0.0,
              tau=0.8, lambda_u=1.0, ema_decay=0.998, crop_min=0.5),
    source="measured here")
_CIFAR_SMALL_10 = dict(  # with 5,000 labels: four times as long, then labels without RandAugment
    sup=dict(_CIFAR_SMALL["sup"], epochs=83),
    semi=dict(_CIFAR_SMALL["semi"], epochs=5, labeled_aug="weak"), source="measured here")
_CIFAR_SMALL_1 = dict(  # with 500 labels
    sup=dict(_CIFAR_SMALL["sup"], epochs=100, warmup_epochs=5),
    semi=dict(_CIFAR_SMALL["semi"], epochs=4, ema_decay=0.99),
    source="measured here; two trials")
_CIFAR_WIDE = dict(  # 1.2 million weights
    sup=dict(_CIFAR_SMALL["sup"], epochs=34, labeled_aug="weak"),
    semi=dict(_CIFAR_SMALL["semi"], epochs=3, labeled_aug="weak"),
    source="measured here; hardly searched")
_CIFAR_SCRATCH = dict(  # not searched
    sup=dict(_CIFAR_SMALL["sup"], layer_decay=1.0),
    semi=dict(_CIFAR_SMALL["semi"], epochs=1, lr=5e-4, layer_decay=1.0, ema_decay=0.99),
    source="measured here")
_NETTE_SMALL = dict(  # for 64 pixels in patches of 8; found on 1,500 held-out pictures
    sup=dict(_CIFAR_SMALL["sup"], epochs=100, warmup_epochs=5),
    semi=dict(_CIFAR_SMALL["semi"], epochs=20, warmup_epochs=1, ema_decay=0.99),
    source="measured here")

RECIPES = {  # (data set, arch, init, labels %): {stage: settings that differ from the defaults}
    ("imagenet", "vit_small", "self", 10): dict(
        sup=dict(lr_per_256=1e-4), semi=dict(lr_per_256=2e-4, tau=0.5), source=_T),
    ("imagenet", "vit_base", "self", 10): dict(
        sup=dict(lr_per_256=2.5e-4), semi=dict(lr_per_256=1e-3, tau=0.5),
        fixmatch=dict(tau=0.7), ema_teacher=dict(tau=0.7), source=_T),  # Table 4: Table 2's
    ("imagenet", "vit_large", "self", 10): dict(
        sup=dict(lr_per_256=1e-3, **_LARGE),
        semi=dict(lr_per_256=2e-3, tau=0.6, drop_path=0.2), source=_T),
    ("imagenet", "vit_huge", "self", 10): dict(
        sup=dict(lr_per_256=1e-3, batch_size=256, drop_path=0.2, ema_decay=0.9998, **_LARGE),
        semi=dict(lr_per_256=2.5e-3, tau=0.6, epochs=50), source=_T),
    ("imagenet", "vit_small", "self", 1): dict(
        sup=dict(lr_per_256=1e-4), semi=dict(lr_per_256=5e-4, tau=0.6, **_WEAK_SEMI), source=_T),
    ("imagenet", "vit_base", "self", 1): dict(
        sup=dict(lr_per_256=5e-5, **_WEAK),
        semi=dict(lr_per_256=1e-3, tau=0.6, **_WEAK_SEMI), source=_T),
    ("imagenet", "vit_large", "self", 1): dict(
        sup=dict(lr_per_256=1e-3, **_LARGE, **_WEAK),
        semi=dict(lr_per_256=1e-3, tau=0.6), source=_T),
    ("imagenet", "vit_huge", "self", 1): dict(
        sup=dict(lr_per_256=1e-2, batch_size=128, **_LARGE, **_WEAK),
        semi=dict(lr_per_256=5e-3, batch_size=64, tau=0.6, epochs=50, drop_path=0.05), source=_T),
    ("imagenet", "vit_small", "scratch", 10): _SCRATCH,
    ("imagenet", "vit_base", "scratch", 10): _SCRATCH,
    ("imagenet", "convnext_tiny", "scratch", 10): _CONVNEXT,
    ("imagenet", "convnext_small", "scratch", 10): _CONVNEXT,
    ("imagenet", None, None, None): dict(sup={}, semi={}, source="no row of the paper"),
    ("food101", None, None, 1): _OTHER_1,
    ("food101", None, None, None): _OTHER,
    ("inat2019", None, None, 1): _INAT_1,
    ("inat2019", None, None, None): _OTHER,
    ("landmarks", None, None, 1): _OTHER_1,
    ("landmarks", None, None, None): _OTHER,
    ("folder", None, None, None): _FOLDER,
    ("digits", "vit_digits", None, None): _DIGITS,
    ("digits", None, None, None): _DIGITS_LARGE,
    ("cifar10", "vit_digits", "self", 10): _CIFAR_SMALL_10,
    ("cifar10", "vit_digits", "self", 1): _CIFAR_SMALL_1,
    ("cifar10", "vit_digits", "scratch", 10): _CIFAR_SCRATCH,
    ("cifar10", "vit_cifar", "self", 10): _CIFAR_WIDE,
    ("cifar10", None, None, None): _CIFAR,
    ("cifar100", None, None, None): _CIFAR,
    ("imagenette", "vit_digits", "self", 10): _NETTE_SMALL,
    ("imagenette", None, None, None): _FOLDER,
}


def _row(sup=None, fixmatch=None, none=None, mixup=None, mixup_plus=None, prob=None):
    row = dict(sup=sup, fixmatch=fixmatch, none=none, mixup=mixup, prob=prob)
    return {k: v for k, v in (row | {"mixup+": mixup_plus}).items() if v is not None}


PAPER = {  # the paper's own top-1 (data set, arch, init, labels %)        [Tables 1 to 3, 7, 8, 11]
    ("imagenet", "vit_base", "mae", 1): _row(57.4, None, 65.3, 69.5, 70.1, 71.0),
    ("imagenet", "vit_base", "mae", 10): _row(73.7, 74.8, 78.1, 78.3, 78.7, 79.7),
    ("imagenet", "vit_base", "mae", 100): _row(83.7),
    ("imagenet", "vit_large", "mae", 1): _row(67.1, prob=77.3),
    ("imagenet", "vit_large", "mae", 10): _row(79.2, prob=83.3),
    ("imagenet", "vit_large", "mae", 100): _row(86.0),
    ("imagenet", "vit_huge", "mae", 1): _row(71.5, prob=80.0),
    ("imagenet", "vit_huge", "mae", 10): _row(81.4, prob=84.3),
    ("imagenet", "vit_huge", "mae", 100): _row(86.9),
    ("imagenet", "vit_small", "mocov3", 1): _row(51.2, none=61.9, prob=64.7),
    ("imagenet", "vit_small", "mocov3", 10): _row(69.1, none=72.3, prob=72.9),
    ("imagenet", "vit_small", "dino", 1): _row(58.7, none=66.3, prob=68.0),
    ("imagenet", "vit_small", "dino", 10): _row(73.9, none=76.3, prob=77.1),
    ("imagenet", "vit_base", "mocov3", 1): _row(66.3, none=68.9, prob=72.3),
    ("imagenet", "vit_base", "mocov3", 10): _row(74.5, none=77.7, prob=79.2),
    ("imagenet", "vit_base", "dino", 1): _row(65.0, none=70.8, prob=73.1),
    ("imagenet", "vit_base", "dino", 10): _row(76.0, none=78.1, prob=80.2),
    ("imagenet", "vit_small", "scratch", 10): _row(None, None, 65.6, 68.3, 68.8, 70.9),
    ("imagenet", "vit_base", "scratch", 10): _row(None, None, 68.9, 71.6, 72.1, 73.5),
    ("imagenet", "convnext_tiny", "scratch", 10): _row(61.2, none=70.4, prob=74.1),
    ("imagenet", "convnext_tiny", "scratch", 100): _row(80.7),
    ("imagenet", "convnext_small", "scratch", 10): _row(64.1, none=71.7, prob=75.1),
    ("imagenet", "convnext_small", "scratch", 100): _row(81.4),
    ("food101", "vit_base", "supervised", 1): _row(60.9, prob=82.1),
    ("food101", "vit_base", "supervised", 10): _row(84.5, prob=91.3),
    ("food101", "vit_base", "supervised", 100): _row(93.1),
    ("inat2019", "vit_base", "supervised", 1): _row(19.6, prob=32.3),
    ("inat2019", "vit_base", "supervised", 10): _row(57.3, prob=67.7),
    ("inat2019", "vit_base", "supervised", 100): _row(81.2),
    ("landmarks", "vit_base", "supervised", 1): _row(45.3, prob=61.0),
    ("landmarks", "vit_base", "supervised", 10): _row(74.0, prob=81.0),
    ("landmarks", "vit_base", "supervised", 100): _row(91.5),
}
_TAU, _M, _E = ((0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), (0, 0.9, 0.99, 0.999, 0.9999, 0.99999),
                (0, 10, 50, 100, 200))
SWEEPS = {  # ViT-B, MAE: (setting, mixing or sup, labels %): {value: top-1}    [Tables 4, 5 and 6]
    ("tau", "none", 1): dict(zip(_TAU, (63.1, 64.4, 64.6, 65.1, 65.3, 65.1, 64.4))),
    ("tau", "none", 10): dict(zip(_TAU, (75.4, 76.7, 77.2, 77.7, 77.9, 78.1, 78.2, 77.9))),
    ("tau", "prob", 1): dict(zip(_TAU, (70.8, 71.4, 71.3, 71.3, 71.0, 70.4, 68.6))),
    ("tau", "prob", 10): dict(zip(_TAU, (79.4, 79.5, 79.7, 79.7, 79.6, 79.4))),
    ("ema_decay", "none", 1): dict(zip(_M[1:], (23.5, 49.3, 63.1, 65.3, 59.7))),  # 0 diverges
    ("ema_decay", "none", 10): dict(zip(_M, (74.8, 75.3, 76.4, 77.2, 78.1, 77.9))),
    ("ema_decay", "prob", 1): dict(zip(_M, (69.3, 69.7, 71.1, 71.6, 71.0, 63.1))),
    ("ema_decay", "prob", 10): dict(zip(_M, (79.5, 79.5, 79.6, 79.8, 79.7, 79.0))),
    ("epochs", "sup", 1): dict(zip(_E[1:], (24.7, 53.6, 57.4, 56.9))),
    ("epochs", "sup", 10): dict(zip(_E[1:], (66.3, 72.9, 73.7, 73.2))),
    ("epochs", "none", 1): dict(zip(_E, (62.7, 62.5, 60.9, 65.3, 66.9))),
    ("epochs", "none", 10): dict(zip(_E, (76.5, 74.2, 77.7, 78.1, 78.2))),
    ("epochs", "prob", 1): dict(zip(_E, (69.7, 69.8, 70.4, 71.0, 70.9))),
    ("epochs", "prob", 10): dict(zip(_E, (79.3, 79.4, 79.6, 79.7, 79.6))),
}

_CONV = ("convnext_tiny", "convnext_small")
_HUGE_1 = dict(dataset="imagenet", arch="vit_huge", init="self", labels=1, stage="semi")
_HUGE_10 = dict(dataset="imagenet", arch="vit_huge", init="self", labels=10, stage="sup")
_CONV_SUP = dict(dataset="imagenet", arch=_CONV, stage="sup")
_CONV_SEMI = dict(_CONV_SUP, stage="semi")
_SCRATCH_SUP = dict(dataset="imagenet", init="scratch", stage="sup")
DEPARTURES = {  # where, setting, recommended, paper, code (None: silent, as recommended), source
    "D1": (_HUGE_1, "tau", 0.6, 0.6, 0.7, "Table 13; authors' command"),
    "D2": (_HUGE_10, "batch_size", 256, 256, 128, "Table 12; authors' command"),
    "D3": (_HUGE_10, "ema_decay", 0.9998, 0.0, 0.9998,
           "only in the authors' command; warms the teacher"),
    "D4": (dict(_SCRATCH_SUP, arch=("vit_small", "vit_base", *_CONV)), "ema_decay",
           0.9999, 0.0, 0.9999, "only in the authors' commands"),
    "D5": (_CONV_SUP, "epochs", 500, 100, 500,
           "Sec. 4.2: 100 for every ConvNeXt; authors' command beside Table 8's numbers: 500"),
    "D6": (_CONV_SEMI, "lambda_u", 10.0, 5.0, 10.0,
           "Sec. 4; default of the authors' ConvNeXt script"),
    "D7": (_CONV_SEMI, "tau", 0.7, None, 0.7, "default of the authors' ConvNeXt script"),
    "D8": (dict(stage="semi"), "unlabeled_cutmix", 0.5, 0.0, 0.5,
           "Eq. 4 blends every pair; the code cuts half of them"),
    "D9": ({}, "mix_lam", "batch", None, "batch", "Sec. 3.1 allows both; code: one per batch"),
    "D10": (dict(stage="semi"), "fixmatch_teacher", "eval", None, "train",
            "Sec. 2.2: the same network; code: with drop path on; equal where drop path is 0"),
    "D11": (dict(stage="semi"), "label_smoothing_u", 0.1, None, 0.1,
            "code: mixed pseudo-labels only"),
    "D12": (dict(_SCRATCH_SUP, arch=("vit_small", "vit_base")), "weight_decay",
            0.3, 0.05, 0.3, "Sec. 4: 0.05 throughout; Table 12 and code: 0.3"),
    "D13": ({}, "cutmix_half_up", 1, None, 0, "timm 0.4.5 cut an odd box short"),
    "D14": ({}, "unlabeled_pool", "rest", "all", "rest",
            "Sec. 2.1: all data; code: the complement of the labelled images"),
}


def parse_args(argv=None):
    p = flags.Parser(prog=f"{SCRIPT}.py", description=__doc__.split("\n\n")[0],
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("what to train").add_argument
    add("--arch", choices=ARCHS,
        help="backbone; default vit_digits on digits, else vit_base [App. A]")
    add("--method", choices=METHODS, default="semi_vit",
        help="sets --unlabeled-mix and --ema-decay, which still win [Tables 2, 3]")
    add("--stage", choices=("all", *STAGES), default="all",
        help="sup: stage 2 of the pipeline, semi: stage 3, from --init RUN [Sec. 2.1]")
    add("--init", metavar="FILE", help="weights to start from: MAE, DINO, MoCo-v3, an ImageNet-"
        "supervised ViT, a run of this project, or the word timm [App. A; Table 7]")
    add("--heads", type=int, help="attention heads; MoCo-v3's ViT-S has 12, not 6 [MoCo-v3's code]")
    add("--pool", choices=("avg", "token"), help="what the head reads [App. A: avg; Huge: token]")
    add("--pos-embed", choices=("learned", "sincos"),
        help="learnable, or fixed sine-cosine [App. A: learned with --init, else sincos]")
    add("--patch-size", type=int, help="pixels of a patch, or of a ConvNeXt's stem; default by "
        "architecture and data set [App. A]")
    add("--follow", default="recommended", metavar="WHOM", help="recommended, paper, code, or a "
        "list such as D3=code,D5=paper, where the two disagree [table DEPARTURES]")
    flags.add_data(p, DATASETS, "labelled percent of each class, at least one image; default 1 on "
                   "digits, else 10 [Sec. 4: 1 and 10]")
    flags.add_settings(p, SETTINGS, STAGES)
    flags.add_running(p, SCRIPT)
    p.add_argument("--checkpoint-blocks", action="store_true", help="keep the inputs of blocks and "
        "compute the rest again in the backward pass: much less memory, a third more time; for L "
        "and H [README]")
    args = p.parse_args(argv)
    flags.check(p, args)
    args.dataset = args.dataset or ("folder" if args.data_path else "digits")
    args.arch = args.arch or ("vit_digits" if args.dataset == "digits" else "vit_base")
    return args


def percent(args):
    """--labels, its default, or that of a published list; None for another list, or a count."""
    if args.num_labels or args.labels_file:
        return PUBLISHED.get(list_name(args.labels_file[0])) if args.labels_file else None
    return args.labels or (1 if args.dataset == "digits" else 10)


def init_kind(args) -> str:
    """Where weights come from, told by the file's name: the columns of Tables 7, 12 and 13.

    A run of this script stays in the column that it started in.
    """
    folder = Path(args.init or "")
    if folder.name in (checkpoint.NEWEST, checkpoint.PREVIOUS):
        folder = folder.parent
    if args.init and (folder / "log.jsonl").exists():
        first = log.read_log(folder)[0]
        return init_kind(SimpleNamespace(**first["args"])) if first["script"] == SCRIPT else "run"
    name = Path(args.init).name.lower() if args.init else ""
    patterns = {"scratch": r"^$", "mocov3": r"moco|^vit-[sb]-\d+ep", "dino": "dino",
                "supervised": r"deit|augreg|finetuned?|supervised|timm", "mae": "mae"}
    return next((kind for kind, pattern in patterns.items() if re.search(pattern, name)), "run")


def column(args) -> str:
    """scratch, self (self-pretrained, also a run of ours) or supervised."""
    kind = init_kind(args)
    return "self" if kind in ("mae", "dino", "mocov3", "run") else kind


def recipe(args):
    """(key, row): the most special row of RECIPES for these flags."""
    for special in ((args.arch, column(args), percent(args)), (args.arch, None, None),
                    (None, None, percent(args)), (None, None, None)):
        if (args.dataset, *special) in RECIPES:
            return (args.dataset, *special), RECIPES[(args.dataset, *special)]


def settings_of(args, stage: str) -> SimpleNamespace:
    """Default < recipe < method < --follow < flag, with `sources`."""
    _, row = recipe(args)
    layers = [("default [Sec. 2.1]", dict(unlabeled_pool="rest")), (row["source"], row[stage])]
    if stage == "semi":
        layers += [(f"--method {args.method}", METHODS[args.method]),
                   ("Tables 4, 5", row.get(args.method, {}))]
    facts = dict(dataset=args.dataset, arch=args.arch, init=column(args), labels=percent(args),
                 stage=stage)
    s = flags.resolve(SETTINGS, stage, layers, DEPARTURES, facts, args,
                      SEMI_ONLY if stage == "sup" else ())
    if args.unlabeled_pool:
        s.unlabeled_pool, s.sources["unlabeled_pool"] = args.unlabeled_pool, "--unlabeled-pool"
    return s


def derive(args, stage: str, world_size: int) -> SimpleNamespace:
    """All settings of a stage, with `sources`, lr and one process's share. Raises UserError."""
    s = settings_of(args, stage)
    for name, allowed in (("unlabeled_mix", ("none", "mixup", "mixup+", "prob")),
                          ("mix_lam", ("batch", "element")), ("schedule", ("fraction", "table")),
                          ("fixmatch_teacher", ("eval", "train")),
                          ("labeled_aug", ("strong", "weak"))):
        if getattr(s, name) not in allowed:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)}: "
                            f"one of {', '.join(allowed)}")
    if stage == "semi" and s.unlabeled_mix.startswith("mixup") and not (s.mixup or s.cutmix):
        raise UserError(f"--unlabeled-mix {s.unlabeled_mix}: needs --mixup or --cutmix above 0")
    for name, least in dict(epochs=0, batch_size=1, unlabeled_ratio=int(stage == "semi")).items():
        if getattr(s, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)}: at least {least}")
    if s.tau > 1:
        raise UserError(f"--tau {s.tau:g}: from 0 to 1")
    if args.arch.startswith("convnext"):
        for name in ("heads", "pool", "pos_embed"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')}: {args.arch} has none; leave it out")
        if s.layer_decay != 1 and stage in (args.layer_decay or {}):
            raise UserError(f"--layer-decay {s.layer_decay:g}: its layers are those of a ViT; "
                            f"{args.arch} takes 1")
        if s.layer_decay != 1:
            s.layer_decay, s.sources["layer_decay"] = 1.0, "ConvNeXt: all layers alike"
    if args.init == "timm" and args.pos_embed == "sincos":
        raise UserError("--pos-embed sincos: --init timm brings its own embedding; leave it out")
    per_256, absolute = (getattr(args, name) or {} for name in ("lr_per_256", "lr"))
    if stage in per_256 and stage not in absolute:
        s.lr = None  # the flag wins over an absolute rate of the row
    if s.lr is None:  # linear scaling, by the labelled batch                               [App. A]
        s.lr = s.lr_per_256 * s.batch_size / 256
        s.sources["lr"] = f"{s.lr_per_256:g} x {s.batch_size} / 256"
    parts = world_size * args.accum_steps
    s.micro_batch = s.batch_size // parts
    if s.batch_size % parts:
        raise UserError(f"--batch-size {s.batch_size} is not divisible by {world_size} processes x "
                        f"--accum-steps {args.accum_steps}")
    if s.micro_batch % 2 and s.mix_labeled and (s.mixup or s.cutmix):
        raise UserError(f"--batch-size {s.batch_size}: {s.micro_batch} labelled images per process "
                        "and part; mixing needs an even number: change it, or --mix-labeled 0")
    return s


# ===== 2. DATA  (paper App. A, Data Augmentation) =================================================


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
    augment = [rand_augment(size)] if s.labeled_aug == "strong" else []  # E11
    if dataset == "digits":  # numbers fit for digits: no flip; mild affine for labels, small shift
        linear = T.InterpolationMode.BILINEAR
        affine = T.RandomAffine(15, (0.1, 0.1), (0.85, 1.15), 10, linear)
        return dict(
            labeled=[T.Resize(size), affine, *augment, ToBytes(s.reprob)],
            weak=[T.Resize(size), T.RandomAffine(0, (0.08, 0.08)), ToBytes()],
            strong=[crop, rand_augment(size), ToBytes(s.reprob)],
            evaluate=[T.Resize(size), ToBytes()],
        )
    flip, jitter = T.RandomHorizontalFlip(0.5), T.ColorJitter(0.4, 0.4, 0.4)
    bicubic = T.InterpolationMode.BICUBIC
    whole = [T.Resize((size, size), bicubic)]  # small pictures are evaluated whole
    centre = [T.Resize(round(size / 0.875), bicubic), T.CenterCrop(size)]  # 256 -> 224
    return dict(
        labeled=[crop, flip, *augment, ToBytes(s.reprob)],
        weak=[crop, flip, jitter, ToBytes()],
        strong=[crop, flip, rand_augment(size), ToBytes(s.reprob)],
        evaluate=[*(whole if size < 64 else centre), ToBytes()],
    )


# ===== 3. MODEL  (paper App. A, ViT Architectures) ================================================


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


def timm_arguments(args, num_classes: int) -> tuple[str, dict]:
    """timm's name and arguments of the model that the flags ask for. Raises UserError."""
    name, arguments, pool = ARCHS[args.arch]
    size, patches, *_ = DATASETS[args.dataset]
    size, vit = args.image_size or size, args.arch.startswith("vit")
    patch = args.patch_size or patches[0 if vit else 1]
    arguments = dict(arguments, num_classes=num_classes)
    if patch:
        arguments["patch_size"] = patch
    if vit:
        patch = patch or int(re.search(r"patch(\d+)", name)[1])
        if size % patch:
            raise UserError(f"--image-size {size} is no multiple of the patch of {patch} pixels: "
                            "change one, see --patch-size")
        arguments |= dict(img_size=size, global_pool=args.pool or pool)
        heads = 12 if init_kind(args) == "mocov3" and args.arch == "vit_small" else None
        if args.heads or heads:
            arguments["num_heads"] = args.heads or heads
    return name, arguments


def build_model(args, num_classes: int, drop_path: float = 0.0, pretrained=True) -> nn.Module:
    """timm's model with the paper's pooling and position embedding, initialised as by the authors.

    Parameters with 1000 classes: S 22,050,664, B 86,567,656, L 304,326,632, H 632,045,800,
    ConvNeXt-T 28,589,128, ConvNeXt-S 50,223,688; a fixed position embedding is not trained.
    """
    name, arguments = timm_arguments(args, num_classes)
    # With 1000 classes timm loads strictly, and its files have no fc_norm: that starts at 1 and 0.
    lenient = dict(pretrained_strict=False) if args.arch.startswith("vit") else {}
    try:
        model = timm.create_model(name, pretrained=pretrained and args.init == "timm",
                                  drop_path_rate=drop_path, **arguments, **lenient)
    except (OSError, RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--arch {args.arch}: timm cannot build it with these flags: "
                        f"{reason}") from None
    model.set_grad_checkpointing(args.checkpoint_blocks)
    if args.arch.startswith("convnext"):
        return model  # layer scale 1e-6, head scale 1: timm's own are the authors'
    with torch.no_grad():
        nn.init.trunc_normal_(model.head.weight, std=2e-5)  # E5
        nn.init.zeros_(model.head.bias)
        if args.init == "timm":
            return model
        nn.init.trunc_normal_(model.cls_token, std=0.02)  # timm today: 1e-6; at the time: 0.02
        if args.arch in OURS:  # E9: std 0.02 costs ten points at width 64 (at 128: not measured)
            for p in model.blocks.parameters():
                if p.ndim == 2:
                    nn.init.xavier_uniform_(p)
        if position_embedding(args) == "sincos":
            table = sincos_pos_embed(model.embed_dim, model.patch_embed.grid_size[0])
            model.pos_embed.copy_(table.to(model.pos_embed.device))
            model.pos_embed.requires_grad_(False)
    return model


def position_embedding(args) -> str:
    """App. A: learnable when self-pretrained, fixed from scratch; E9: learnable for ours."""
    fixed = init_kind(args) == "scratch" and args.arch not in OURS
    return args.pos_embed or ("sincos" if fixed else "learned")


# Published formats: the keys to enter in turn, then patterns of parameter names with replacements
# (the first that fits a whole name wins; None drops it).
HEAD = (r"head(_dist)?\..*|dist_token", None)
FORMATS = {
    "mae": (["model"], [(r"mask_token|decoder.*", None)]),
    "dino": ([], []),  # the backbone files: flat, without a head
    "dino_full": (["teacher"], [(r"(?:module\.)?backbone\.(.*)", r"\1"), (r".*", None)]),
    "mocov3": (["state_dict"], [(r"module\.base_encoder\.head\..*", None),  # the projector
                                (r"module\.base_encoder\.(.*)", r"\1"), (r".*", None)]),
    "supervised": ([], [HEAD]),  # flat: timm's files
    "supervised_model": (["model"], [HEAD]),  # DeiT's
    "run": (["model"], []),  # checkpoint.pt of this project
}


def detect_format(state: dict) -> str | None:
    """The key of FORMATS that a file's content has, or None."""
    if not isinstance(state, dict):
        return None
    inner = state["model"] if isinstance(state.get("model"), dict) else state
    if "recipe" in state and inner is not state:
        return "run"
    if "teacher" in state and "student" in state:
        return "dino_full"
    if any(str(k).startswith("module.base_encoder.") for k in state.get("state_dict", ())):
        return "mocov3"
    if "patch_embed.proj.weight" not in inner:
        return None
    if inner is state:
        return "supervised" if "head.weight" in state else "dino"
    return "supervised_model" if "head.weight" in inner else "mae"


def refuse_other_form(model: nn.Module, path: str, recipe: dict):
    """A run of this script goes on only with the pooling, heads and positions that it had."""
    was = SimpleNamespace(**recipe)
    ours = {"pool", "heads", "pos_embed"} <= recipe.keys() and was.arch.startswith("vit")
    if not ours or not hasattr(model, "blocks"):
        return  # of another script, or of or for a ConvNeXt: the keys will not fit
    with torch.device("meta"):
        name, arguments = timm_arguments(was, 1)
        theirs = timm.create_model(name, **arguments)
    now = "learned" if model.pos_embed.requires_grad else "sincos"
    for flag, had, has in (("pool", theirs.global_pool, model.global_pool),
                           ("heads", theirs.blocks[0].attn.num_heads,
                            model.blocks[0].attn.num_heads),
                           ("pos-embed", position_embedding(was), now)):
        if had != has:
            raise UserError(f"--init {path}: that run has --{flag} {had}, this one {has}; "
                            f"give --{flag} {had}")


def load_init(model: nn.Module, path: str) -> tuple[str, dict | None]:
    """Load --init FILE; returns its format and, from a run of ours with an EMA, the teacher.

    Position embedding and patch kernel are resized where grid or patch differ (bicubic). What may
    be missing is exactly the head and, where the average is pooled, fc_norm, which then starts at 1
    and 0 while the file's last norm is dropped [authors' code]. Raises UserError with the keys.
    """
    state = weights.read_init(path)
    kind = detect_format(state)
    if kind is None:
        first = ", ".join(str(k)[:40] for k in list(state)[:4]) if isinstance(state, dict) else "-"
        raise UserError(f"--init {path}: not one of the formats {', '.join(FORMATS)}; its first "
                        f"keys are {first}")
    if kind == "run" and "vit.cls_token" in state["model"]:
        raise UserError(f"--init {path}: a run of semi_mae.py; give the file that it has written "
                        "for this, mae_pretrain_*.pth")
    if kind == "run":
        refuse_other_form(model, path, state["recipe"])
    own, new = model.state_dict(), weights.rename(state, *FORMATS[kind])
    if "dist_token" in (state.get("model") or state) and "pos_embed" in new:  # DeiT's second token
        new["pos_embed"] = torch.cat([new["pos_embed"][:, :1], new["pos_embed"][:, 2:]], 1)
    if "head.weight" in new and new["head.weight"].shape != own.get("head.weight", Tensor()).shape:
        new = {k: v for k, v in new.items() if not k.startswith("head.")}
    may_miss = {"head.weight", "head.bias"} - new.keys()
    if kind != "run" and "fc_norm.weight" in own and "fc_norm.weight" not in new:
        new = {k: v for k, v in new.items() if k not in ("norm.weight", "norm.bias")}
        may_miss |= {"fc_norm.weight", "fc_norm.bias"}
    if ("pos_embed" in new and "pos_embed" in own
            and new["pos_embed"].shape[1] != own["pos_embed"].shape[1]):
        grid = list(model.patch_embed.grid_size)
        new["pos_embed"] = resample_abs_pos_embed(new["pos_embed"], grid, num_prefix_tokens=1,
                                                  antialias=False)
    name = "patch_embed.proj.weight"
    if name in new and name in own and new[name].shape[-2:] != own[name].shape[-2:]:
        new[name] = F.interpolate(new[name].float(), own[name].shape[-2:], mode="bicubic")
    weights.load_exactly(model, new, may_miss, f"--init {path} (format {kind})")
    if kind == "mocov3" and model.embed_dim == 384 and model.blocks[0].attn.num_heads != 12:
        raise UserError(f"--init {path}: MoCo-v3's ViT-S has 12 heads; add --heads 12")
    teacher = state.get("teacher") if kind == "run" else None
    if teacher and {k: v.shape for k, v in teacher.items()} != {k: v.shape for k, v in own.items()}:
        teacher = None  # of another size or other classes: it starts as a copy of the student
    return kind, teacher


# ===== 4. LOSSES  (paper Sec. 2.3 and 3) ==========================================================


def smooth_one_hot(y: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """(N,) -> (N, K): 1 - s + s/K at y, s/K elsewhere."""
    return F.one_hot(y, num_classes).float() * (1.0 - smoothing) + smoothing / num_classes


def pseudo_label_loss(logits_s: Tensor, target: Tensor, o: Tensor, tau: float):
    """Cross-entropy on confident pseudo-labels, paper Eq. 2.

        L_u = 1/N_u * sum_i [o_i >= tau] * CE(x_i^{u,s}, y_hat_i)

    logits_s (N_u, K)  student, strong view        o  (N_u,)  confidence, detached
    target   (N_u, K)  pseudo-labels, maybe mixed  returns L_u () and the kept fraction ()
    """
    keep = (o >= tau).float()  # [o_i >= tau]  (N_u,)
    ce = F.cross_entropy(logits_s.float(), target, reduction="none")  # float32 under autocast
    # Mean over N_u, not over the kept ones: Eq. 2 lets L_u grow as the teacher gets confident.
    return (keep * ce).mean(), keep.mean()


def cutmix_boxes(lam: Tensor, size: int, cy: Tensor, cx: Tensor, half_up: bool = True) -> Tensor:
    """Boxes of side int(S sqrt(1 - lam)) around (cy, cx), clipped at the border.

    lam, cy, cx (n,) -> (n, 4) as y0, y1, x0, x1. half_up: the setting cutmix_half_up (D13).
    """
    cut = (size * (1.0 - lam).clamp(min=0.0).sqrt()).long()
    below = (cut + 1) // 2 if half_up else cut // 2
    edges = cy - cut // 2, cy + below, cx - cut // 2, cx + below
    return torch.stack(edges, 1).clamp(0, size)


def ratio_left(boxes: Tensor, size: int) -> Tensor:
    """Share of a picture outside its box, (n,): lam after clipping (E3)."""
    y0, y1, x0, x1 = boxes.unbind(1)
    return 1.0 - (y1 - y0) * (x1 - x0) / (size * size)


def mix_images(x: Tensor, partner: Tensor, lam: Tensor, use_cutmix: Tensor,
               boxes: Tensor) -> Tensor:
    """Blend as in Eq. 3, or paste the partner's box; per image, in one pass.

    x, partner (N, C, S, S); lam, use_cutmix (n,), boxes (n, 4) with n = N, or 1: one for the batch.
    """
    at = torch.arange(x.shape[-1], device=x.device)
    y0, y1, x0, x1 = boxes.unsqueeze(2).unbind(1)  # each (n, 1)
    # rows and columns of the box: (n, S, 1) & (n, 1, S)
    inside = ((at >= y0) & (at < y1)).unsqueeze(2) & ((at >= x0) & (at < x1)).unsqueeze(1)
    own = torch.where(use_cutmix[:, None, None], 1.0 - inside.float(), lam[:, None, None].float())
    return torch.lerp(partner, x, own.unsqueeze(1).to(x.dtype))  # Eq. 3: own x + (1 - own) partner


def mix_targets(t: Tensor, t_partner: Tensor, lam: Tensor) -> Tensor:
    """Eq. 3, second line: lam y_i + (1 - lam) y_j. t, t_partner (N, K), lam (N,) or (1,)."""
    return lam[:, None] * t + (1.0 - lam[:, None]) * t_partner


def batch_mix(x, t, partner, *, mixup, cutmix, element=False, half_up=True,
              use_cutmix=None, lam=None, boxes=None):
    """Mixup or CutMix, lam ~ Beta(alpha, alpha), Eq. 3; the draws of timm's Mixup.

    x (N, 3, S, S), t (N, K) targets, partner (N,) index of each image's partner; one coin, ratio
    and box for the batch, or one per image (element); drawn where None. Returns mixed x and t.
    """
    n, size, device = (len(x) if element else 1), x.shape[-1], x.device
    if use_cutmix is None:
        chance = 0.5 if mixup > 0 and cutmix > 0 else float(cutmix > 0)
        use_cutmix = torch.rand(n, device=device) < chance
    if lam is None:
        alpha = torch.where(use_cutmix, float(cutmix or 1.0), float(mixup or 1.0))
        lam = torch.distributions.Beta(alpha, alpha, validate_args=False).sample()
    if boxes is None:
        boxes = cutmix_boxes(lam, size, *torch.randint(size, (2, n), device=device), half_up)
    x = mix_images(x, x[partner], lam, use_cutmix, boxes)
    return x, mix_targets(t, t[partner], torch.where(use_cutmix, ratio_left(boxes, size), lam))


def confident_partners(keep: Tensor, keys: Tensor | None = None) -> Tensor:
    """Pseudo Mixup+ (Fig. 3b, E4): permute the confident samples among themselves.

    keep (N,) bool; keys (N,) uniform, they rank the samples -> partner (N,), itself where not kept.
    How many are kept is known to the device alone; two sorts fix shapes and keep the host unaware.
    """
    keys = torch.rand(len(keep), device=keep.device) if keys is None else keys
    shuffled = torch.argsort(torch.where(keep, keys, keys + 2.0))  # confident ones first, shuffled
    in_order = torch.argsort((~keep).long(), stable=True)  # confident ones first, in order
    partner = torch.empty_like(shuffled).scatter_(0, in_order, shuffled)
    return torch.where(keep, partner, torch.arange(len(keep), device=keep.device))


def prob_pseudo_mixup(x, t, o, *, cutmix_prob=0.5, half_up=True, perm=None, use_cutmix=None,
                      boxes=None):
    """Probabilistic pseudo mixup, paper Sec. 3.3: who is more confident weighs more.

        lam_i = o_i / (o_i + o_j)    (Eq. 4)         o*_i = max(o_i, o_j)    (Eq. 5)

    x (N, 3, S, S) strong views, t (N, K) pseudo-labels, o (N,); j = perm(i), a random permutation.
    D8: a share cutmix_prob of the pairs is not blended; a box of area 1 - lam is pasted from the
    partner, and the target follows the area that it has. Returns mixed x, mixed t and o* (N,).
    """
    n, size, device = len(x), x.shape[-1], x.device
    perm = torch.randperm(n, device=device) if perm is None else perm
    use_cutmix = torch.rand(n, device=device) < cutmix_prob if use_cutmix is None else use_cutmix
    lam = o / (o + o[perm])  # Eq. 4
    o_star = torch.maximum(o, o[perm])  # Eq. 5
    if boxes is None:
        boxes = cutmix_boxes(lam, size, *torch.randint(size, (2, n), device=device), half_up)
    x = mix_images(x, x[perm], lam, use_cutmix, boxes)
    return x, mix_targets(t, t[perm], torch.where(use_cutmix, ratio_left(boxes, size), lam)), o_star


# ===== 5. OPTIMISER AND SCHEDULES  (paper App. A) =================================================


def layer_of(name: str, depth: int) -> int:
    """0 for the embeddings, i + 1 for block i, depth + 1 for the last norm and the head."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Groups with `lr_scale`; no weight decay on 1-D parameters, position and class token.

    timm's own layer decay puts the last norm of a class-token model with its last block, the
    authors' code with the head; and torch's schedulers ignore lr_scale, so `set_lr` applies it.
    """
    depth, groups = len(getattr(model, "blocks", ())), {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            scale = layer_decay ** (depth + 1 - layer_of(name, depth)) if depth else 1.0
            decay = 0.0 if p.ndim == 1 or name in ("pos_embed", "cls_token") else weight_decay
            new = dict(params=[], lr_scale=scale, weight_decay=decay)
            groups.setdefault((scale, decay), new)["params"].append(p)
    return list(groups.values())


def lr_at(step: int, steps_per_epoch: int, s) -> float:
    """Learning rate of an update, before lr_scale: linear warm-up from 0, cosine to min_lr.

    s.schedule "fraction": by fractional epochs (ViT). "table": by updates, where the warm-up ends
    on the peak and the cosine starts at it again (ConvNeXt) [both: authors' code].
    """
    if s.schedule == "table":
        warm, total = round(s.warmup_epochs * steps_per_epoch), s.epochs * steps_per_epoch
        if step < warm:
            return s.lr * step / max(1, warm - 1)
        progress = (step - warm) / max(1, total - warm)
    else:
        epoch = step / steps_per_epoch
        if epoch < s.warmup_epochs:
            return s.lr * epoch / s.warmup_epochs
        progress = (epoch - s.warmup_epochs) / max(1e-9, s.epochs - s.warmup_epochs)
    return s.min_lr + (s.lr - s.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


# ===== 6. TRAINING STEP  (paper Sec. 2.3) =========================================================


def labeled_targets(x_l, y_l, num_classes, s, draws):
    """Smoothed targets (N_l, K); images and targets mixed with the reversed batch if s says so."""
    t_l = smooth_one_hot(y_l, num_classes, s.label_smoothing)
    if s.mix_labeled and (s.mixup or s.cutmix):
        reverse = torch.arange(len(x_l) - 1, -1, -1, device=x_l.device)
        x_l, t_l = batch_mix(x_l, t_l, reverse, mixup=s.mixup, cutmix=s.cutmix,
                             element=s.mix_lam == "element", half_up=bool(s.cutmix_half_up),
                             **(draws or {}))
    return x_l, t_l


def sup_step(student, x_l, y_l, num_classes, s, precision, mix_l=None) -> dict[str, Tensor]:
    """Stage 2. x_l (N_l, 3, S, S), y_l (N_l,); mix_l: draws of batch_mix, made where None.

    N_l is the part of one process and accumulation step: mixing pairs images within it.
    """
    x_l, t_l = labeled_targets(x_l, y_l, num_classes, s, mix_l)
    with precision.autocast():
        logits_l = student(x_l).float()
    loss_l = F.cross_entropy(logits_l, t_l)  # L_l
    return dict(loss=loss_l, loss_l=loss_l)


def semi_step(student, teacher, x_l, y_l, x_u_w, x_u_s, num_classes, s, precision,
              mix_l=None, mix_u=None):
    """Stage 3. x_l (N_l, 3, S, S), y_l (N_l,); x_u_w, x_u_s (N_u, 3, S, S): weak and strong views
    of the same images; mix_l, mix_u: draws, made where None. Mixing pairs images within the part of
    one process and accumulation step. Returns losses by name, and y_hat and o (N_u,) for the log.
    """
    with torch.no_grad(), precision.autocast():
        logits_w = teacher(x_u_w)
    # float32 before softmax and threshold: autocast on a CPU would leave them in bf16
    o, y_hat = logits_w.float().softmax(-1).max(-1)  # (N_u,), (N_u,)

    o_star, half_up, mix_u = o, bool(s.cutmix_half_up), dict(mix_u or {})
    smoothing = 0.0 if s.unlabeled_mix == "none" else s.label_smoothing_u  # D11
    t_u = smooth_one_hot(y_hat, num_classes, smoothing)
    if s.unlabeled_mix == "prob":  # Fig. 3c: the threshold sees o*
        x_u_s, t_u, o_star = prob_pseudo_mixup(x_u_s, t_u, o, cutmix_prob=s.unlabeled_cutmix,
                                               half_up=half_up, **mix_u)
    elif s.unlabeled_mix in ("mixup", "mixup+"):  # Fig. 3a: any two; Fig. 3b: confident ones
        reverse = torch.arange(len(o) - 1, -1, -1, device=o.device)
        partner = reverse if s.unlabeled_mix == "mixup" else confident_partners(o >= s.tau)
        x_u_s, t_u = batch_mix(x_u_s, t_u, mix_u.pop("partner", partner), mixup=s.mixup,
                               cutmix=s.cutmix, element=s.mix_lam == "element", half_up=half_up,
                               **mix_u)

    x_l, t_l = labeled_targets(x_l, y_l, num_classes, s, mix_l)
    with precision.autocast():  # one joint student forward (E7)
        logits = student(torch.cat([x_l, x_u_s])).float()
    logits_l, logits_s = logits.split([len(x_l), len(x_u_s)])
    loss_l = F.cross_entropy(logits_l, t_l)  # L_l
    loss_u, kept = pseudo_label_loss(logits_s, t_u, o_star, s.tau)  # L_u, Eq. 2
    loss = loss_l + s.lambda_u * loss_u  # L = L_l + mu L_u
    return dict(loss=loss, loss_l=loss_l, loss_u=loss_u, kept=kept), y_hat, o


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
        return model(x).float()


# ===== 8. MAIN LOOP ===============================================================================


def run_stage(stage, model, warm_teacher, data, split, s, args, run, resume):
    """Train one stage, in place; returns the teacher, or None. One loop serves both stages.

    model: unwrapped, with the weights to start from. warm_teacher: EMA weights of the stage before,
    or None. resume: a checkpoint of this very stage, or None.
    """
    if stage == "sup":
        labeled = Stream("sup/labeled", split.labeled, s.batch_size, args.seed)
        steps_per_epoch = labeled.steps_per_pass
    else:  # an epoch is a pass over the unlabelled images; the labelled ones start again with each
        unlabeled = Stream("semi/unlabeled", split.unlabeled, s.unlabeled_ratio * s.batch_size,
                           args.seed)
        steps_per_epoch = unlabeled.steps_per_pass
        if s.ema_decay < 1 and s.epochs * steps_per_epoch < 3 / (1 - s.ema_decay):
            run.log.say(f"warning: semi: {s.epochs * steps_per_epoch} updates are few for "
                        f"--ema-decay {s.ema_decay:g}: the teacher will hardly move")
        labeled = Stream("semi/labeled", split.labeled, s.batch_size, args.seed,
                         restart_every=steps_per_epoch)
    total, num_classes = s.epochs * steps_per_epoch, len(data.classes)
    evaluate_at = {round(total * k / args.evals) for k in range(1, args.evals + 1)} - {0}

    torch.manual_seed(seed_of(args.seed, stage, run.rank))  # from here on draws are a process's own
    teacher = Ema(model) if stage == "semi" or s.ema_decay else None
    if stage == "semi" and warm_teacher is not None and s.ema_decay:  # D3, D4; m = 0: the student
        teacher.module.load_state_dict(warm_teacher)
    groups = parameter_groups(model, s.weight_decay, s.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, s.beta2), eps=1e-8, fused=True)
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
        for network in (model, teacher.module) if stage == "semi" else (model,):
            network.compile(dynamic=False)
    student = model
    if run.world > 1:
        student = nn.parallel.DistributedDataParallel(model, device_ids=run.device_ids)

    views = {k: T.Compose(v) for k, v in view_lists(args.dataset, run.image_size, s).items()}
    bad = BadImages(data.train, args.max_bad_images)
    how = dict(start=start, stop=total, rank=run.rank, world=run.world, accum=args.accum_steps,
               workers=run.workers, pin=run.device.type == "cuda", bad=bad)
    batches = stream_loader(data.train, [views["labeled"]], labeled, **how)
    if stage == "semi":
        of_u = stream_loader(data.train, [views["weak"], views["strong"]], unlabeled, **how)
        batches = ((*b_l, *b_u) for b_l, b_u in zip(batches, of_u))
    names = {p: n for n, p in model.named_parameters()}
    some_known = bool((data.train.targets[split.unlabeled] >= 0).any())
    if resume:
        bad.seen.update(resume["bad_images"])

    def images(seen):  # (bytes, boxes) on the host -> pictures on the device
        x = to_model(*(t.to(run.device, non_blocking=True) for t in seen), run.stats)
        return x.to(memory_format=torch.channels_last) if args.arch.startswith("convnext") else x

    quicker = "--arch vit_digits" if args.dataset == "digits" and args.arch != "vit_digits" else ""
    run.log.start(stage, start, total, unprinted, run.device, quicker)
    step, parts, began = start, [], time.perf_counter()
    student.train()
    for batch in run.log.wait(batches):
        set_lr(optimizer, lr_at(step, steps_per_epoch, s))
        last_part = len(parts) + 1 == args.accum_steps
        with student.no_sync() if run.world > 1 and not last_part else contextlib.nullcontext():
            if stage == "sup":
                (seen_l,), y_l = batch
                y_l = y_l.to(run.device, non_blocking=True)
                losses = sup_step(student, images(seen_l), y_l, num_classes, s, run.precision)
            else:
                (seen_l,), y_l, (seen_w, seen_s), y_u = batch
                y_l, y_u = (y.to(run.device, non_blocking=True) for y in (y_l, y_u))
                labeler = model if s.ema_decay == 0 and s.fixmatch_teacher == "train" else teacher
                losses, y_hat, o = semi_step(
                    student, labeler, images(seen_l), y_l, images(seen_w), images(seen_s),
                    num_classes, s, run.precision)
                # The only use of unlabelled images' true labels, where known: two logged numbers.
                right, sure = (y_hat == y_u) & (y_u >= 0), (o >= s.tau) & (y_u >= 0)
                if some_known:
                    losses["pseudo_acc"] = right.sum() / (y_u >= 0).sum().clamp(min=1)
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
        if teacher is not None:
            teacher.update(model, s.ema_decay, applied)  # Eq. 1
        parts, step = [], step + 1
        run.log.add(step, means)

        signalled = run.stop.asked()
        stopping, printing = signalled or step == args.stop_after, step % args.print_every == 0
        saving = step % args.save_every == 0 or stopping or step == total
        if printing or saving:
            run.precision.check(optimizer, names, step)
        if printing or step == total:
            run.log.report(stage, step, images=s.batch_size * (1 + s.unlabeled_ratio),
                           epoch=round(step / steps_per_epoch, 3), bad_images=len(bad.seen),
                           lr=lr_at(step - 1, steps_per_epoch, s))
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
    return teacher


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
    if args.predict:
        find_pictures(args.predict, "--predict")  # now, not after hours of training
    if args.eval:
        args = flags.stored_args(args, SCRIPT)
    run = start_processes(args)
    data = load_dataset(args.dataset, args.data_path, seed=args.split_seed, holdout=args.holdout)
    if args.eval:
        return evaluate_run(args, data, run)

    # What will be trained, on what
    stages = [x for x in STAGES
              if args.stage in ("all", x) and (x == "sup" or args.method != "sup")]
    stages = [x for x in stages if settings_of(args, x).epochs]  # Table 6: --epochs sup=0
    settings = {x: derive(args, x, run.world) for x in stages}
    if not stages:
        raise UserError(f"--stage {args.stage}, --method {args.method}, --epochs: no stage is left "
                        "to train; raise --epochs or choose another stage")
    if args.stage == "semi" and not args.init:
        raise UserError("--stage semi: needs --init RUN, a run of stage sup, or self-pretrained "
                        "weights")
    pool = settings_of(args, "semi").unlabeled_pool
    split = flags.choose_split(args, data, pool, 1 if args.dataset == "digits" else 10)
    if "semi" in stages and not len(split.unlabeled):
        raise UserError("--labels: no image is left unlabelled; lower it, or --unlabeled-pool all")
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
    torch.manual_seed(seed_of(args.seed, "model"))  # the same weights on every process
    model = build_model(args, len(data.classes), pretrained=state is None)
    costs = report.cost(on_meta(args, len(data.classes)), run.image_size)
    largest = max(settings[x].micro_batch * (1 + settings[x].unlabeled_ratio) for x in stages)
    halved = run.precision.dtype != torch.float32
    report.refuse_too_large(costs, largest, halved, run.device, args.accum_steps)
    warm_teacher = start = None
    if args.init and args.init != "timm" and state is None:
        kind, warm_teacher = load_init(model, args.init)
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
        weights_now = model.state_dict()
        drop_path = settings[stage].drop_path
        model = build_model(args, len(data.classes), drop_path, pretrained=False).to(run.device)
        model.load_state_dict(weights_now)
        if args.arch.startswith("convnext"):
            model = model.to(memory_format=torch.channels_last)
        resume = state if state and state["stage"] == stage else None
        teacher = run_stage(stage, model, warm_teacher, data, split, settings[stage], args, run,
                            resume)
        warm_teacher = None if teacher is None else teacher.module.state_dict()
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
    return SimpleNamespace(
        rank=rank, world=world, device=device, workers=workers, folder=None, results={},
        max_bad_images=args.max_bad_images,
        device_ids=[device.index] if device.type == "cuda" else None,
        precision=Precision(device, args.dtype),
        image_size=args.image_size or DATASETS[args.dataset][0],
        stats=255.0 * stats.view(2, 3, 1, 1))


def on_meta(args, num_classes: int, drop_path: float = 0.0) -> nn.Module:
    with torch.device("meta"):
        return build_model(args, num_classes, drop_path, pretrained=False)


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
        if s.warmup_epochs >= s.epochs:
            run.log.say(f"warning: {stage}: --warmup-epochs {s.warmup_epochs:g} of --epochs "
                        f"{s.epochs}: the learning rate never reaches its peak")
        unlabeled = f" + {s.unlabeled_ratio} x unlabelled" if stage == "semi" else ""
        run.log.say(f"{stage}: {s.epochs} epochs, batch {s.batch_size} labelled{unlabeled} = "
                    f"{run.world} processes x {args.accum_steps} parts x {s.micro_batch}, "
                    f"lr {s.lr:g} ({s.sources['lr']})")
    dtype = str(run.precision.dtype).split(".")[-1]
    run.log.say(f"{run.folder}: {args.arch} on {run.device}, {dtype}, {run.workers} workers")


def finish(args, data, split, s, model, run):
    """Weights, curves, views, predictions, and the summary. s: settings of the last stage."""
    run.log.bar.close()

    name, arguments = timm_arguments(args, len(data.classes))
    about = dict(timm_model=name, timm_arguments=arguments, classes=data.classes, arch=args.arch,
                 image_size=run.image_size, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    metadata = {"model": json.dumps(about)}  # one key: several have no fixed order in the file
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    checkpoint.save_weights(run.folder / "model.safetensors", tensors, metadata)
    run.log.write(dict(results=run.results))
    panels = {"losses": ["loss", "loss_l", "loss_u"], "top-1 (%)": ["top1", "ema_top1"],
              "pseudo-labels": ["kept", "pseudo_acc", "kept_acc"], "learning rate": ["lr"]}
    report.curves(log.read_log(run.folder), run.folder / "curves.png", panels)
    draw_views(data, split, s, args, run)

    names = {"sup": "supervised baseline (stage sup)", "semi": f"{args.method} (stage semi)"}
    run.log.say("")
    for stage, r in run.results.items():
        teacher = f", teacher {r['ema_top1']:.2f}" if "ema_top1" in r else ""
        run.log.say(f"{names[stage]:<33} top-1 {r['top1']:6.2f}, top-5 {r['top5']:6.2f}{teacher}   "
                    f"{r['updates']} updates, {r['seconds']:.0f} s")
    if {"sup", "semi"} <= run.results.keys():
        gain = run.results["semi"]["top1"] - run.results["sup"]["top1"]
        run.log.say(f"{'gain':<33}       {gain:+6.2f}")
    run.log.say(report.band(Path(__file__).parent / "docs" / "bands.json", run.recipe))
    run.log.say(f"{run.folder}: curves.png, views.png, log.jsonl, model.safetensors")
    if args.predict:
        predict(args, model, data.classes, s, run, run.folder)
    run.log.close()


def predict(args, model, classes, s, run, folder):
    view = T.Compose(view_lists(args.dataset, run.image_size, s)["evaluate"])
    model.eval()
    with torch.no_grad():
        report.predict(args.predict, lambda seen: logits_of(model, seen, run).softmax(-1).cpu(),
                       view, classes, folder, run.workers)


def load_final(folder: str) -> tuple[nn.Module, dict]:
    """A finished run's model and its metadata, from model.safetensors alone. Raises UserError."""
    from safetensors import safe_open

    file = Path(folder) / "model.safetensors"
    if not file.exists():
        raise UserError(f"--eval {folder}: no model.safetensors; finish it: --resume {folder}")
    tensors = checkpoint.read(file)
    with safe_open(file, "pt") as opened:
        about = json.loads((opened.metadata() or {}).get("model", "null"))
    if about is None:
        raise UserError(f"--eval {folder}: its model.safetensors was not written by this project")
    model = timm.create_model(about["timm_model"], **about["timm_arguments"])
    weights.load_exactly(model, tensors, set(), f"--eval {folder}")
    return model, about


def evaluate_run(args, data, run):
    """--eval RUN: the final weights on the validation set, and --predict; nothing is trained."""
    model, about = load_final(args.eval)
    model, s = model.to(run.device), settings_of(args, STAGES[0])
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


def draw_views(data, split, s, args, run, count=10):
    """views.png: labelled pictures, and the same unlabelled ones weak, strong and mixed."""
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
        if s.unlabeled_mix == "prob":  # as with equal confidences
            n = len(rows["strong"])
            rows["mixed"], _, _ = prob_pseudo_mixup(
                rows["strong"], torch.zeros(n, 1), torch.ones(n), cutmix_prob=s.unlabeled_cutmix)
    mean, std = run.stats.cpu() / 255.0
    pictures = {name: row * std + mean for name, row in rows.items()}
    report.contact_sheet(pictures, run.folder / "views.png", f"views of {args.dataset}")


# The paper's rows: what --dry-run prints, and the first line of a run on digits


def published(args, arch: str) -> bool:
    """Whether --init is a file that others published for this very arch, by its name."""
    file = Path(args.init or "")
    if file.is_dir() or (file.parent / "log.jsonl").exists():  # of a run of ours
        return False
    size = {"vit_small": "small|^vit-s-", "vit_base": "base|^vit-b-", "vit_large": "large",
            "vit_huge": "huge"}.get(arch)
    return bool(size and re.search(size, file.name.lower())) and init_kind(args) != "run"


def paper_args(args) -> SimpleNamespace:
    """The same flags on ImageNet, from the initial weights that the paper has for this arch."""
    arch = "vit_base" if args.arch in (*OURS, "vit_tiny") else args.arch
    dataset = args.dataset if args.dataset in ("food101", "inat2019", "landmarks") else "imagenet"
    inits = {"vit_small": "dino_deitsmall16_pretrain.pth",
             "convnext_tiny": None, "convnext_small": None}
    init = inits.get(arch, f"mae_pretrain_{arch}.pth")
    if dataset != "imagenet":
        init = f"{arch}_supervised.pth"
    if published(args, arch):  # a run of ours has no row in the paper
        init = args.init
    labels = percent(args) if percent(args) in (1, 10, 100) else 10
    changed = dict(arch=arch, dataset=dataset, init=init, labels=labels, num_labels=None,
                   labels_file=None, image_size=None, patch_size=None, holdout=0)
    return SimpleNamespace(**{**vars(args), **changed})


def paper_number(args) -> float | None:
    """The paper's own top-1 for exactly these flags; None where it has none, or training failed."""
    others = ("heads", "pool", "pos_embed", "patch_size", "image_size", "unlabeled_pool")
    if args.follow != "recommended" or any(getattr(args, n) is not None for n in others):
        return None
    if args.holdout or args.labels_file or args.init and not published(args, args.arch):
        return None
    labels, kind = percent(args), init_kind(args)
    methods = {"sup": "sup", "fixmatch": "fixmatch", "ema_teacher": "none", "semi_vit": "prob"}
    what = "sup" if args.stage == "sup" or labels == 100 else methods[args.method]
    plain = SimpleNamespace(**{**vars(args), **dict.fromkeys(SETTINGS)})  # without these flags
    rows = {stage: vars(settings_of(plain, stage)) for stage in STAGES}
    changed = {(n, stage): v for n in SETTINGS for stage, v in (getattr(args, n) or {}).items()
               if (stage == "sup" and n not in SEMI_ONLY or stage == "semi" and what != "sup")
               and v != rows[stage][n]}
    mix = changed.pop(("unlabeled_mix", "semi"), None)
    if mix and what == "fixmatch":  # FixMatch is decay 0, without mixing
        changed["ema_decay", "semi"] = 0.0
    what = mix or what
    if args.stage == "semi" and args.init:
        changed["epochs", "sup"] = 0  # stage 3 straight from self-pretrained weights
    if (args.dataset, args.arch, kind) == ("imagenet", "vit_base", "mae"):
        if not changed and ("tau", what, labels) in SWEEPS:  # Table 4 has the recipe's tau too
            changed["tau", "semi"] = derive(args, "semi", 1).tau
        for key in (("tau", "semi"), ("ema_decay", "semi"), ("epochs", "sup")):
            if changed.keys() == {key} and (key[0], what, labels) in SWEEPS:
                return SWEEPS[key[0], what, labels].get(changed[key])
    return None if changed else PAPER.get((args.dataset, args.arch, kind, labels), {}).get(what)


def command_of(args) -> str:
    """The command with these flags."""
    parts = [f"python {SCRIPT}.py --dataset {args.dataset} --data-path DIR"]
    parts += [f"--init {args.init}"] if args.init else []
    parts += [f"--arch {args.arch} --labels {args.labels:g}"]
    parts += [f"--method {args.method}"] if args.method != "semi_vit" else []
    parts += [f"--stage {args.stage}"] if args.stage != "all" else []
    parts += [f"--follow {args.follow}"] if args.follow != "recommended" else []
    for name in ("unlabeled_pool", "heads", "pool", "pos_embed"):
        value = getattr(args, name)
        parts += [f"--{name.replace('_', '-')} {value}"] if value is not None else []
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
        lines.append(f"== {title}: {a.dataset}, {a.arch}, {share}, init {init_kind(a)}")
        lines += [f"   {command_of(a)}"] if title != "this run" else []
        number = paper_number(a)
        lines += [f"   the paper's own result: {number} top-1"] if number is not None else []
        if title != "this run" and percent(a) == 100:
            lines.append("   100% of the labels: quoted by the paper, which gives no recipe for it")
            continue
        lines.append(f"   recipe {recipe(a)[0]}: {recipe(a)[1]['source']}")
        stages = [x for x in STAGES if a.stage in ("all", x) and (x == "sup" or a.method != "sup")]
        for stage in stages:
            s = derive(a, stage, 1)
            hidden = {"sources", "micro_batch"} | (SEMI_ONLY if stage == "sup" else set())
            values = {k: v for k, v in vars(s).items() if k not in hidden}
            lines.append(report.settings_table(f"stage {stage}", values, s.sources))
            lines += cost_lines(a, stage, s)
    return "\n".join(lines)


def cost_lines(args, stage, s) -> list[str]:
    """Parameters, images, updates, arithmetic and memory of a stage, on one process."""
    size, _, classes, total = DATASETS[args.dataset]
    model = on_meta(args, classes or 1000, s.drop_path)
    costs = report.cost(model, args.image_size or size)
    count = sum(p.numel() for p in model.parameters())
    fixed = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    n_u = s.batch_size * s.unlabeled_ratio
    flops = costs["flops"] * (3 * (s.batch_size + n_u) + n_u)  # backward costs two; teacher one
    kept = costs["kept"] * (s.batch_size + n_u) / args.accum_steps
    gib = [(costs["fixed"] + kept * share) / 2**30 for share in (1, 0.5)]
    updates = ""
    if total and not args.labels_file:  # known without the data
        images = total - args.holdout
        exact = {("imagenet", 1, 0): 12820, ("imagenet", 10, 0): 128118}  # App. A, Dataset Sampling
        labeled = exact.get((args.dataset, percent(args), args.holdout),
                            round(images * (percent(args) or 0) / 100))
        labeled = args.num_labels or labeled
        pool = images - labeled * (s.unlabeled_pool == "rest")
        steps = max(1, labeled // s.batch_size if stage == "sup" else pool // n_u)
        updates = f", {steps} updates per epoch, {steps * s.epochs:,} in all"
    return [f"  parameters {count:,}, of which {count - fixed:,} are trained",
            f"  per update {s.batch_size} labelled + {n_u} unlabelled images{updates}",
            f"  per update {flops / 1e12:.4g} TFLOP; memory about {gib[0]:.1f} GiB in float32, "
            f"{gib[1]:.1f} GiB in 16 bit"]


# ===== 9. ENTRY POINT =============================================================================

if __name__ == "__main__":
    main(parse_args())
