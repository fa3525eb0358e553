"""Semi-ViT (Cai et al., NeurIPS 2022, arXiv:2208.05688): EMA teacher + probabilistic pseudo mixup.

  stage 1, optional   self-pretrained weights (MAE, DINO, MoCo-v3), loaded with --init
  stage 2, --stage sup    fine-tuning on the labelled images alone                       Table 12
  stage 3, --stage semi   fine-tuning on everything; one step of it:                     Table 13

  x_l --strong--> mixup/CutMix ----------> student --CE(., y)-----------> L_l --+
  x_u --weak----> teacher --max, argmax--> o, y_hat --+                         +--> L = L_l + mu L_u
  x_u --strong--> mix pairs by o (Eq. 4, 5) --> student --[o* >= tau] CE--> L_u +         (Sec. 2.3)
                  teacher <- m * teacher + (1 - m) * student                                 (Eq. 1)

Notation   x_l, x_u labelled and unlabelled images; N_l, N_u their batch sizes, N_u = 5 N_l; K classes;
           y_hat pseudo-label; o its confidence, (N_u,); lam mixing ratio; tau threshold; m EMA decay;
           mu weight of L_u (flag --lambda-u: the same name in all scripts of this project)

How to run
  python semi_vit.py                                         digits, 80 labels, minutes on a laptop
  python semi_vit.py --data-path DIR --predict NEW           own pictures: labeled/<class>/, unlabeled/
  torchrun --nproc-per-node 8 semi_vit.py --dataset imagenet --data-path DIR \\
      --init mae_pretrain_vit_base.pth --arch vit_base --labels 10
  python semi_vit.py --arch vit_huge --labels 1 --dry-run    which recipe, from where, at what cost

  the paper's rows, --dataset imagenet --data-path DIR --init FILE, top-1 as the paper states it
    --arch vit_base  --labels 10   79.7        --arch vit_base  --labels 1   71.0      Table 1, MAE
    --arch vit_large --labels 10   83.3        --arch vit_large --labels 1   77.3
    --arch vit_huge  --labels 10   84.3        --arch vit_huge  --labels 1   80.0
    --arch vit_small --labels 10   77.1        --arch vit_small --labels 1   68.0      Table 7, DINO
    --method fixmatch | ema_teacher | sup; --unlabeled-mix none | mixup | mixup+ | prob   Tables 2, 3

Where the paper and the authors' code disagree, or the paper is silent (D1 to D13 are the table
DEPARTURES below, chosen with --follow; the rest is decided as follows):
  E1  L counts 304.3M parameters, the paper says 307M.
  E2  Average pooling: over the patch tokens without the class token, LayerNorm after it (code).
  E3  CutMix inside Eq. 4 is clipped at the border; the target follows the pasted area (code).
  E4  Pseudo Mixup+ has no released code: the confident samples of a batch are permuted among
      themselves; all others stay unmixed and masked; the divisor stays N_u (our reading of Fig. 3b).
  E5  Silent in the paper, from the code: floor of 1e-6 under the learning rate, linear warm-up from 0,
      head initialised with std 2e-5, no gradient clipping, stage 3 from the last checkpoint, labelled
      images reshuffled at each epoch of the unlabelled ones, Resize 256 before the evaluation crop.
  E6  The paper does not say which weights it evaluates. Both are logged; the headline is the student.
  E7  Labelled and strong images go through the student in one forward (LayerNorm only: equal to two).
  E8  One split for all processes; the authors' code would draw another one on each.
  E9  vit_digits is ours (width 64, depth 4): Xavier weights and a learnable position embedding.
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
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torchvision import transforms as T
from torchvision.transforms.functional import pil_to_tensor

from common import checkpoint, log, report
from common.amp import Precision, available_memory, pick_device
from common.data import EXTENSIONS, NAMED_SETS, Images, load_dataset
from common.ema import Ema
from common.splits import UserError, make_split, read_split, split_of
from common.streams import BadImages, Stream, eval_loader, seed_of, stream_loader

# ===== 1. CONFIG  (paper App. A, Tables 12 and 13) ================================================

STAGES = ("sup", "semi")
METHODS = {  # what each method changes in stage semi                                  [Tables 2, 3]
    "sup": {},  # stage sup alone
    "fixmatch": dict(ema_decay=0.0, unlabeled_mix="none"),  # m = 0: the teacher is the student
    "ema_teacher": dict(unlabeled_mix="none"),
    "semi_vit": {},
}
ARCHS = {  # name: timm's model, arguments that differ from it, pooling           [App. A; Sec. 4.4]
    "vit_digits": ("vit_tiny_patch16_224", dict(embed_dim=64, depth=4, num_heads=4), "avg"),
    "vit_tiny": ("vit_tiny_patch16_224", {}, "avg"),
    "vit_small": ("vit_small_patch16_224", {}, "avg"),
    "vit_base": ("vit_base_patch16_224", {}, "avg"),
    "vit_large": ("vit_large_patch16_224", {}, "avg"),
    "vit_huge": ("vit_huge_patch14_224", {}, "token"),  # App. A: class token for Huge only
    "convnext_tiny": ("convnext_tiny", {}, "avg"),
    "convnext_small": ("convnext_small", {}, "avg"),
}
DATASETS = {  # pixels, patch (ViT / stem of a ConvNeXt; None: the architecture's), views, classes
    "digits": (28, (7, 2), "digits", 10),
    "cifar10": (32, (4, 2), "photos", 10),
    "cifar100": (32, (4, 2), "photos", 100),
    "food101": (224, (None, None), "photos", 101),
    "inat2019": (224, (None, None), "photos", 1010),
    "imagenet": (224, (None, None), "photos", 1000),
    "folder": (224, (None, None), "photos", None),
}

# Settings of a stage: name -> (type, default {stage: value}, help). A recipe row changes them, a flag
# changes them last; `--epochs 10` holds for every stage, `--epochs sup=100,semi=50` for the named ones.
SETTINGS = {
    "epochs": (int, dict(sup=100, semi=100), "passes over the labelled (sup) or unlabelled (semi) "
               "images [Tables 12, 13]"),
    "batch_size": (int, dict(sup=512, semi=128), "labelled images per update, over all processes and "
                   "accumulation steps [Tables 12, 13]"),
    "unlabeled_ratio": (int, dict(sup=0, semi=5), "N_u / N_l [Sec. 4: 5]"),
    "lr": (float, dict(sup=None, semi=None), "peak learning rate; given, it replaces --lr-per-256 "
           "[App. A]"),
    "lr_per_256": (float, dict(sup=2.5e-4, semi=1e-3), "base learning rate: lr = this x batch / 256; "
                   "too large shows as pseudo_acc falling early [App. A, Tables 12, 13]"),
    "min_lr": (float, dict(sup=1e-6, semi=1e-6), "floor of the cosine [authors' code]"),
    "warmup_epochs": (float, dict(sup=5, semi=5), "linear warm-up from 0 [Tables 12, 13]"),
    "schedule": (str, dict(sup="fraction", semi="fraction"), "fraction: of an epoch, as for ViT; "
                 "table: over updates, as for ConvNeXt [authors' code]"),
    "weight_decay": (float, dict(sup=0.05, semi=0.05), "AdamW; none on biases, norms, position and "
                     "class token [Sec. 4; Tables 12, 13]"),
    "beta2": (float, dict(sup=0.999, semi=0.999), "AdamW [Tables 12, 13: 0.95 in stage sup from "
              "scratch]"),
    "layer_decay": (float, dict(sup=0.65, semi=0.75), "learning rate is multiplied by this per layer "
                    "below the head [Tables 12, 13]"),
    "drop_path": (float, dict(sup=0.1, semi=0.1), "stochastic depth of the last block, linear from 0 "
                  "[Tables 12, 13]"),
    "label_smoothing": (float, dict(sup=0.1, semi=0.1), "of the labelled targets [Tables 12, 13]"),
    "label_smoothing_u": (float, dict(sup=0.1, semi=0.1), "of mixed pseudo-labels; unmixed ones stay "
                          "hard [authors' code]"),
    "mixup": (float, dict(sup=0.8, semi=0.8), "alpha of Beta for mixup, 0: off [Tables 12, 13]"),
    "cutmix": (float, dict(sup=1.0, semi=1.0), "alpha of Beta for CutMix, 0: off [Tables 12, 13]"),
    "mix_labeled": (int, dict(sup=1, semi=1), "1: mixup and CutMix on labelled images too [App. A: not "
                    "for S and B at 1%% in stage semi]"),
    "mix_lam": (str, dict(sup="batch", semi="batch"), "batch: one ratio per batch; element: one per "
                "image [Sec. 3.1 allows both; authors' code: batch]"),
    "unlabeled_mix": (str, dict(sup="none", semi="prob"), "none, mixup, mixup+ or prob [Sec. 3, Fig. 3]"),
    "unlabeled_cutmix": (float, dict(sup=0.0, semi=0.5), "share of pairs that --unlabeled-mix prob cuts "
                         "instead of blending [Eq. 4 blends all; authors' code: half]"),
    "cutmix_half_up": (int, dict(sup=1, semi=1), "1: an odd CutMix box has its longer half below, as in "
                       "today's timm; 0: it loses a pixel, as in timm 0.4.5 [authors' code]"),
    "fixmatch_teacher": (str, dict(sup="eval", semi="eval"), "with --ema-decay 0: pseudo-labels from the "
                         "student in eval or train mode [Sec. 2.2; authors' code: train]"),
    "reprob": (float, dict(sup=0.25, semi=0.25), "random erasing, labelled and strong views "
               "[Tables 12, 13]"),
    "crop_min": (float, dict(sup=0.08, semi=0.08), "smallest area of a random crop [App. A via timm]"),
    "tau": (float, dict(sup=0.0, semi=0.5), "drop a pseudo-label less confident than this: too low "
            "teaches errors (watch pseudo_acc), too high starves (watch kept) [Eq. 2; Table 4]"),
    "lambda_u": (float, dict(sup=0.0, semi=5.0), "mu, weight of L_u [Sec. 4: 5]"),
    "ema_decay": (float, dict(sup=0.0, semi=0.9999), "m of Eq. 1; 0 in stage semi: FixMatch; about "
                  "0.99 for a thousand updates, 0.999 for ten thousand [Table 5]"),
}  # fmt: skip

SEMI_ONLY = {"unlabeled_ratio", "label_smoothing_u", "unlabeled_mix", "unlabeled_cutmix", "fixmatch_teacher",
             "tau", "lambda_u", "unlabeled_pool"}  # fmt: skip

_NONE = dict(mixup=0.0, cutmix=0.0, drop_path=0.0, reprob=0.0)  # App. A: 1%, "regularization" off
_SCRATCH = dict(  # Tables 12 and 13, last column, S and B
    sup=dict(lr_per_256=1e-4, batch_size=1024, epochs=500, warmup_epochs=50, weight_decay=0.3,
             beta2=0.95, layer_decay=1.0, ema_decay=0.9999),
    semi=dict(lr_per_256=1e-3, layer_decay=0.85, tau=0.5),
    source="Tables 12, 13 (scratch)")  # fmt: skip
_CONVNEXT = dict(  # Sec. 4.2, else the authors' commands and defaults; D5 to D7
    sup=dict(lr=1e-3, batch_size=1024, epochs=500, warmup_epochs=50, layer_decay=1.0, ema_decay=0.9999,
             schedule="table"),
    semi=dict(lr_per_256=1e-3, warmup_epochs=10, layer_decay=1.0, tau=0.7, lambda_u=10.0,
              schedule="table"),
    source="Sec. 4.2 and authors' commands")  # fmt: skip
_OTHER = dict(  # Sec. 4.4, App. A; base learning rate: the middle of the range that was searched
    sup=dict(lr_per_256=2.5e-4), semi=dict(lr_per_256=1e-3, tau=0.5, ema_decay=0.999),
    source="Tables 12, 13; App. A (other data sets)")  # fmt: skip
_T = "Tables 12, 13; App. A"
RECIPES = {  # (data set, arch, init, labels %): stage -> settings that differ from the defaults above
    ("imagenet", "vit_small", "self", 10): dict(
        sup=dict(lr_per_256=1e-4), semi=dict(lr_per_256=2e-4, tau=0.5), source=_T),
    ("imagenet", "vit_base", "self", 10): dict(
        sup=dict(lr_per_256=2.5e-4), semi=dict(lr_per_256=1e-3, tau=0.5),
        ema_teacher=dict(tau=0.7), source=_T),  # Table 4: the 78.1 of Tables 2 and 3 is at tau 0.7
    ("imagenet", "vit_large", "self", 10): dict(
        sup=dict(lr_per_256=1e-3, layer_decay=0.75, epochs=50),
        semi=dict(lr_per_256=2e-3, tau=0.6, drop_path=0.2), source=_T),
    ("imagenet", "vit_huge", "self", 10): dict(
        sup=dict(lr_per_256=1e-3, layer_decay=0.75, epochs=50, batch_size=256, drop_path=0.2,
                 ema_decay=0.9998),
        semi=dict(lr_per_256=2.5e-3, tau=0.6, epochs=50), source=_T),
    ("imagenet", "vit_small", "self", 1): dict(
        sup=dict(lr_per_256=1e-4),
        semi=dict(lr_per_256=5e-4, tau=0.6, mix_labeled=0, drop_path=0.0, reprob=0.0), source=_T),
    ("imagenet", "vit_base", "self", 1): dict(
        sup=dict(lr_per_256=5e-5, **_NONE),
        semi=dict(lr_per_256=1e-3, tau=0.6, mix_labeled=0, drop_path=0.0, reprob=0.0), source=_T),
    ("imagenet", "vit_large", "self", 1): dict(
        sup=dict(lr_per_256=1e-3, layer_decay=0.75, epochs=50, **_NONE),
        semi=dict(lr_per_256=1e-3, tau=0.6, drop_path=0.1), source=_T),
    ("imagenet", "vit_huge", "self", 1): dict(
        sup=dict(lr_per_256=1e-2, layer_decay=0.75, epochs=50, batch_size=128, **_NONE),
        semi=dict(lr_per_256=5e-3, tau=0.6, epochs=50, batch_size=64, drop_path=0.05), source=_T),
    ("imagenet", "vit_small", "scratch", 10): _SCRATCH,
    ("imagenet", "vit_base", "scratch", 10): _SCRATCH,
    ("imagenet", "convnext_tiny", "scratch", 10): _CONVNEXT,
    ("imagenet", "convnext_small", "scratch", 10): _CONVNEXT,
    ("imagenet", None, None, None): dict(sup={}, semi={}, source="flag defaults: no row of the paper"),
    ("food101", None, None, 10): _OTHER,
    ("food101", None, None, 1): dict(_OTHER, semi=dict(_OTHER["semi"], tau=0.6)),
    ("inat2019", None, None, 10): _OTHER,
    ("inat2019", None, None, 1): dict(  # App. A: no mixup, drop path, erasing at 1%, on iNaturalist only
        sup=dict(lr_per_256=2.5e-4, **_NONE),
        semi=dict(lr_per_256=1e-3, tau=0.6, ema_decay=0.999, mix_labeled=0, drop_path=0.0, reprob=0.0),
        source=_OTHER["source"]),
    ("folder", None, None, None): _OTHER,
    ("food101", None, None, None): _OTHER,
    ("inat2019", None, None, None): _OTHER,
}  # fmt: skip
_DIGITS = dict(  # found on 1,000 held-out training images
    sup=dict(epochs=1000, batch_size=64, lr=1e-3, warmup_epochs=50, layer_decay=1.0, mixup=0.0, cutmix=0.0,
             drop_path=0.0, label_smoothing=0.0, reprob=0.0, crop_min=0.6),
    semi=dict(epochs=24, batch_size=32, lr=2e-3, warmup_epochs=1, layer_decay=1.0, tau=0.7, ema_decay=0.99,
              lambda_u=1.0, mix_labeled=0, drop_path=0.0, label_smoothing=0.0, crop_min=0.6),
    source="measured here")  # fmt: skip
RECIPES[("digits", "vit_digits", None, None)] = _DIGITS
RECIPES[("digits", None, None, None)] = {  # bigger models on digits: the same with a smaller step
    **_DIGITS,
    "sup": dict(_DIGITS["sup"], lr=3e-4),
    "semi": dict(_DIGITS["semi"], lr=3e-4),
    "source": "measured here for vit_digits; lr smaller",
}
for _name in ("cifar10", "cifar100"):
    RECIPES[(_name, None, None, None)] = dict(
        sup=dict(lr_per_256=5e-4, layer_decay=1.0, batch_size=128, crop_min=0.35),
        semi=dict(lr_per_256=1e-3, layer_decay=1.0, tau=0.9, ema_decay=0.999, crop_min=0.35),
        source="not tuned yet",
    )

PAPER = {  # the paper's own ImageNet top-1 (data set, arch, init, labels): {method or mixing: number}
    ("imagenet", "vit_base", "mae", 1): dict(sup=57.4, none=65.3, mixup=69.5, **{"mixup+": 70.1}, prob=71.0),
    ("imagenet", "vit_base", "mae", 10): dict(sup=73.7, fixmatch=74.8, none=78.1, mixup=78.3,
                                              **{"mixup+": 78.7}, prob=79.7),
    ("imagenet", "vit_base", "mae", 100): dict(sup=83.7),
    ("imagenet", "vit_large", "mae", 1): dict(sup=67.1, prob=77.3),
    ("imagenet", "vit_large", "mae", 10): dict(sup=79.2, prob=83.3),
    ("imagenet", "vit_large", "mae", 100): dict(sup=86.0),
    ("imagenet", "vit_huge", "mae", 1): dict(sup=71.5, prob=80.0),
    ("imagenet", "vit_huge", "mae", 10): dict(sup=81.4, prob=84.3),
    ("imagenet", "vit_huge", "mae", 100): dict(sup=86.9),
    ("imagenet", "vit_small", "mocov3", 1): dict(sup=51.2, none=61.9, prob=64.7),
    ("imagenet", "vit_small", "mocov3", 10): dict(sup=69.1, none=72.3, prob=72.9),
    ("imagenet", "vit_small", "dino", 1): dict(sup=58.7, none=66.3, prob=68.0),
    ("imagenet", "vit_small", "dino", 10): dict(sup=73.9, none=76.3, prob=77.1),
    ("imagenet", "vit_base", "mocov3", 1): dict(sup=66.3, none=68.9, prob=72.3),
    ("imagenet", "vit_base", "mocov3", 10): dict(sup=74.5, none=77.7, prob=79.2),
    ("imagenet", "vit_base", "dino", 1): dict(sup=65.0, none=70.8, prob=73.1),
    ("imagenet", "vit_base", "dino", 10): dict(sup=76.0, none=78.1, prob=80.2),
    ("imagenet", "vit_small", "scratch", 10): dict(none=65.6, mixup=68.3, **{"mixup+": 68.8}, prob=70.9),
    ("imagenet", "vit_base", "scratch", 10): dict(none=68.9, mixup=71.6, **{"mixup+": 72.1}, prob=73.5),
    ("imagenet", "convnext_tiny", "scratch", 10): dict(sup=61.2, none=70.4, prob=74.1),
    ("imagenet", "convnext_tiny", "scratch", 100): dict(sup=80.7),
    ("imagenet", "convnext_small", "scratch", 10): dict(sup=64.1, none=71.7, prob=75.1),
    ("imagenet", "convnext_small", "scratch", 100): dict(sup=81.4),
    ("food101", "vit_base", "supervised", 1): dict(sup=60.9, prob=82.1),
    ("food101", "vit_base", "supervised", 10): dict(sup=84.5, prob=91.3),
    ("food101", "vit_base", "supervised", 100): dict(sup=93.1),
    ("inat2019", "vit_base", "supervised", 1): dict(sup=19.6, prob=32.3),
    ("inat2019", "vit_base", "supervised", 10): dict(sup=57.3, prob=67.7),
    ("inat2019", "vit_base", "supervised", 100): dict(sup=81.2),
}  # fmt: skip

SWEEPS = {  # (setting, mixing or sup, labels %): {value: the paper's top-1}, ViT-B, MAE   [Tables 4, 5, 6]
    ("tau", "none", 1): {0: 63.1, 0.3: 64.4, 0.4: 64.6, 0.5: 65.1, 0.6: 65.3, 0.7: 65.1, 0.8: 64.4},
    ("tau", "none", 10): {0: 75.4, 0.3: 76.7, 0.4: 77.2, 0.5: 77.7, 0.6: 77.9, 0.7: 78.1, 0.8: 78.2, 0.9: 77.9},
    ("tau", "prob", 1): {0: 70.8, 0.3: 71.4, 0.4: 71.3, 0.5: 71.3, 0.6: 71.0, 0.7: 70.4, 0.8: 68.6},
    ("tau", "prob", 10): {0: 79.4, 0.3: 79.5, 0.4: 79.7, 0.5: 79.7, 0.6: 79.6, 0.7: 79.4},
    ("ema_decay", "none", 1): {0.9: 23.5, 0.99: 49.3, 0.999: 63.1, 0.9999: 65.3, 0.99999: 59.7},
    ("ema_decay", "none", 10): {0: 74.8, 0.9: 75.3, 0.99: 76.4, 0.999: 77.2, 0.9999: 78.1, 0.99999: 77.9},
    ("ema_decay", "prob", 1): {0: 69.3, 0.9: 69.7, 0.99: 71.1, 0.999: 71.6, 0.9999: 71.0, 0.99999: 63.1},
    ("ema_decay", "prob", 10): {0: 79.5, 0.9: 79.5, 0.99: 79.6, 0.999: 79.8, 0.9999: 79.7, 0.99999: 79.0},
    ("epochs", "sup", 1): {10: 24.7, 50: 53.6, 100: 57.4, 200: 56.9},
    ("epochs", "sup", 10): {10: 66.3, 50: 72.9, 100: 73.7, 200: 73.2},
    ("epochs", "none", 1): {0: 62.7, 10: 62.5, 50: 60.9, 100: 65.3, 200: 66.9},
    ("epochs", "none", 10): {0: 76.5, 10: 74.2, 50: 77.7, 100: 78.1, 200: 78.2},
    ("epochs", "prob", 1): {0: 69.7, 10: 69.8, 50: 70.4, 100: 71.0, 200: 70.9},
    ("epochs", "prob", 10): {0: 79.3, 10: 79.4, 50: 79.6, 100: 79.7, 200: 79.6},
}  # fmt: skip

DEPARTURES = {  # where, setting, recommended, paper, code (None: silent, takes the recommended), source
    "D1": (dict(arch="vit_huge", init="self", labels=1, stage="semi"), "tau", 0.6, 0.6, 0.7,
           "Table 13; authors' command for H at 1%"),
    "D2": (dict(arch="vit_huge", init="self", labels=10, stage="sup"), "batch_size", 256, 256, 128,
           "Table 12; authors' command for H at 10%"),
    "D3": (dict(arch="vit_huge", init="self", labels=10, stage="sup"), "ema_decay", 0.9998, 0.0, 0.9998,
           "not in the paper; authors' command; gives the teacher a warm start"),
    "D4": (dict(init="scratch", stage="sup"), "ema_decay", 0.9999, 0.0, 0.9999,
           "not in the paper; authors' commands"),
    "D5": (dict(arch=("convnext_tiny", "convnext_small"), stage="sup"), "epochs", 500, 100, 500,
           "Sec. 4.2 says 100 for every ConvNeXt; authors' command beside Table 8's numbers"),
    "D6": (dict(arch=("convnext_tiny", "convnext_small"), stage="semi"), "lambda_u", 10.0, 5.0, 10.0,
           "Sec. 4: mu = 5; default of the authors' ConvNeXt script"),
    "D7": (dict(arch=("convnext_tiny", "convnext_small"), stage="semi"), "tau", 0.7, None, 0.7,
           "default of the authors' ConvNeXt script"),
    "D8": (dict(stage="semi"), "unlabeled_cutmix", 0.5, 0.0, 0.5,
           "Eq. 4 blends every pair; the code cuts half of them"),
    "D9": (dict(), "mix_lam", "batch", "element", "batch", "Sec. 3.1 allows both; code: one per batch"),
    "D10": (dict(stage="semi"), "fixmatch_teacher", "eval", None, "train",
            "Sec. 2.2: the same network; code: with drop path on; equal where drop path is 0"),
    "D11": (dict(stage="semi"), "label_smoothing_u", 0.1, None, 0.1, "only mixed pseudo-labels"),
    "D12": (dict(init="scratch", stage="sup", arch=("vit_small", "vit_base")), "weight_decay", 0.3, 0.05,
            0.3, "Sec. 4 says 0.05 throughout, Table 12 and the code 0.3"),
    "D13": (dict(), "cutmix_half_up", 1, None, 0, "timm 0.4.5 rounded an odd box down"),
    "D14": (dict(), "unlabeled_pool", "rest", "all", "rest",
            "Sec. 2.1: all data; code: the complement of the labelled images"),
}  # fmt: skip

HOW_TO_RUN = {"device", "dtype", "compile", "workers", "deterministic", "output", "resume", "save_every",
              "print_every", "max_bad_images", "predict", "eval", "dry_run", "data_path",
              "stop_after", "accum_steps"}  # fmt: skip


def per_stage(kind):
    """Type of a flag that takes `10` for every stage, or `sup=10,semi=5`."""

    def parse(text):
        if "=" not in text:
            return dict.fromkeys(STAGES, kind(text))
        given = dict(part.split("=", 1) for part in text.split(","))
        if not given.keys() <= set(STAGES):
            raise ValueError(text)
        return {stage: kind(value) for stage, value in given.items()}

    parse.__name__ = f"{kind.__name__}, or sup={kind.__name__},semi={kind.__name__}"
    return parse


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="semi_vit.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                                description=__doc__.split("\n\n")[0])  # fmt: skip
    g = p.add_argument_group("what to train")
    g.add_argument("--arch", choices=ARCHS, help="backbone; default vit_digits on digits, else vit_base [App. A]")
    g.add_argument("--method", choices=METHODS, default="semi_vit", help="sets --unlabeled-mix and --ema-decay, "
                   "which still win [Tables 2, 3]")  # fmt: skip
    g.add_argument("--stage", choices=("all", *STAGES), default="all", help="sup is stage 2, semi stage 3 of the "
                   "pipeline; semi alone starts from --init RUN [Sec. 2.1]")  # fmt: skip
    g.add_argument("--init", metavar="FILE", help="weights to start from: MAE, DINO, MoCo-v3, an ImageNet-supervised "
                   "ViT, a run of this project (folder), or the word timm [App. A, Table 7]")  # fmt: skip
    g.add_argument("--heads", type=int, help="attention heads; MoCo-v3's ViT-S has 12, not 6 [its authors' issue 7]")
    g.add_argument("--pool", choices=("avg", "token"), help="what the classifier reads [App. A: avg, token for Huge]")
    g.add_argument("--pos-embed", choices=("learned", "sincos"), help="learnable, or fixed sine-cosine [App. A: learned "
                   "with --init, else sincos]")  # fmt: skip
    g.add_argument("--follow", default="recommended", metavar="WHOM", help="recommended, paper, code, or a list such "
                   "as D3=code,D5=paper, where the two disagree [table DEPARTURES in this file]")  # fmt: skip
    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=DATASETS, help="default: digits, or folder with --data-path [design]")
    g.add_argument("--data-path", metavar="DIR", help="train/<class>/ and val/<class>/; or labeled/<class>/, "
                   "unlabeled/ and perhaps val/; or what torchvision expects [README]")  # fmt: skip
    g.add_argument("--labels", type=float, metavar="PERCENT", help="labelled percent of each class, at least one "
                   "image; default 1 on digits, else 10 [Sec. 4: 1 and 10]")  # fmt: skip
    g.add_argument("--num-labels", type=int, metavar="N", help="labelled images in all, equally many per class; instead "
                   "of --labels [custom splits]")  # fmt: skip
    g.add_argument("--labels-file", nargs="+", metavar="LIST", help="published list of the labelled images, and "
                   "perhaps one of the unlabelled [README, splits]")  # fmt: skip
    g.add_argument("--split-seed", type=int, default=0, help="draw of the labelled subset [App. A: three subsets]")
    g.add_argument("--unlabeled-pool", choices=("rest", "all"), help="whether labelled images are in the unlabelled "
                   "stream too; default rest [D14]")  # fmt: skip
    g.add_argument("--holdout", type=int, default=0, metavar="N", help="validate on N training images, which leave "
                   "training, for choosing settings [README]")  # fmt: skip
    g.add_argument("--image-size", type=int, help="pixels; default by data set, 224 [App. A]")
    g.add_argument("--patch-size", type=int, help="pixels of a patch, or of a ConvNeXt's stem; default by "
                   "architecture and data set [App. A]")  # fmt: skip
    g = p.add_argument_group("recipe: each default depends on the row of RECIPES; see --dry-run")
    for name, (kind, default, text) in SETTINGS.items():
        g.add_argument("--" + name.replace("_", "-"), type=per_stage(kind), metavar="X", help=text)
    g = p.add_argument_group("how to run; never what is computed")
    g.add_argument("--accum-steps", type=int, default=1, help="the same batch in so many parts; mixing pairs images "
                   "within a part and a process [README]")  # fmt: skip
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 [README]")
    g.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="auto: bf16 where native, "
                   "else fp16 with a scaler; fp32 on a CPU [authors' code: fp16]")  # fmt: skip
    g.add_argument("--compile", action="store_true", help="torch.compile, in place [README]")
    g.add_argument("--workers", type=int, help="loading processes per process; default 0 for pictures in "
                   "memory, else up to 8 [README]")  # fmt: skip
    g.add_argument("--seed", type=int, default=0, help="of weights, order, views and mixing [App. A: three seeds]")
    g.add_argument("--deterministic", action="store_true", help="deterministic kernels on a GPU too [README]")
    g.add_argument("--max-bad-images", type=int, default=0, metavar="N", help="let N unreadable pictures pass [README]")
    g = p.add_argument_group("a run and its life")
    g.add_argument("--output", metavar="DIR", help="new folder; default the next free runs/semi_vit-NNN [README]")
    g.add_argument("--resume", metavar="RUN", help="auto, or a run's folder: go on exactly where it stopped [README]")
    g.add_argument("--save-every", type=int, default=500, metavar="N", help="updates between checkpoints [README]")
    g.add_argument("--print-every", type=int, default=50, metavar="N", help="updates between log lines [README]")
    g.add_argument("--evals", type=int, default=10, metavar="N", help="evaluations per stage, the last at its end "
                   "[authors' code: every epoch, or every fifth]")  # fmt: skip
    g.add_argument("--stop-after", type=int, metavar="N", help="end with a checkpoint after N updates of a stage, as "
                   "a signal would; for scripts with a time limit [README]")  # fmt: skip
    g.add_argument("--eval", metavar="RUN", help="train nothing: evaluate a run's final weights [README]")
    g.add_argument("--predict", metavar="PATH", help="picture or folder: csv and contact sheet at the end, or with "
                   "--eval RUN at once [README]")  # fmt: skip
    g.add_argument("--dry-run", action="store_true", help="print the run and the paper's row, with cost; no data [README]")
    args = p.parse_args(argv)
    if args.num_labels is not None and args.labels is not None:
        p.error("--labels and --num-labels exclude each other; leave one out")
    if args.labels is not None and not 0 < args.labels <= 100:
        p.error(f"--labels {args.labels:g}: a percentage above 0, up to 100")
    if args.accum_steps < 1 or (args.print_every < 1) or args.save_every < 1 or args.evals < 1:
        p.error("--accum-steps, --print-every, --save-every and --evals start at 1")
    args.dataset = args.dataset or ("folder" if args.data_path else "digits")
    args.arch = args.arch or ("vit_digits" if args.dataset == "digits" else "vit_base")
    return args


def init_kind(args):
    """self (self-pretrained), supervised, or scratch: the column of Tables 12 and 13. By file name."""
    name = Path(args.init).name.lower() if args.init else ""
    for kind in ("mae", "dino", "mocov3", "supervised"):
        patterns = {"mocov3": r"moco|^vit-[sb]-\d+ep", "supervised": r"deit|augreg|finetuned|supervised|timm"}
        if name and re.search(patterns.get(kind, kind), name):
            return kind
    return "run" if name else "scratch"


def recipe(args):
    """The most special row of RECIPES for these flags: (key, row)."""
    kind = init_kind(args)
    column = "self" if kind in ("mae", "dino", "mocov3", "run") else kind
    labels = args.labels or (1 if args.dataset == "digits" else 10)
    labels = None if args.num_labels or args.labels_file else labels
    for arch, init, percent in ((args.arch, column, labels), (args.arch, None, None), (None, None, labels),
                                (None, None, None)):  # fmt: skip
        key = (args.dataset, arch, init, percent)
        if key in RECIPES:
            return key, RECIPES[key]


def derive(args, stage, world_size):
    """All settings of one stage as a namespace, with `sources`: where each value comes from.

    flag > --follow > method > recipe row > default. Raises UserError where they contradict.
    """
    key, row = recipe(args)
    facts = dict(arch=args.arch, stage=stage, labels=args.labels, init={"mae": "self", "dino": "self",
                 "mocov3": "self"}.get(init_kind(args), init_kind(args)))  # fmt: skip
    s = SimpleNamespace(**{name: default[stage] for name, (_, default, _) in SETTINGS.items()})
    s.unlabeled_pool = args.unlabeled_pool or "rest"
    s.sources = {name: "default [" + text.rsplit("[", 1)[1] for name, (_, _, text) in SETTINGS.items()}
    s.sources["unlabeled_pool"] = "default [D14]"
    where = f"{row['source']}"
    for source, changes in ((where, row[stage]), (f"--method {args.method}", METHODS[args.method] if stage == "semi" else {}),
                            (where, row.get(args.method, {}) if stage == "semi" else {})):  # fmt: skip
        for name, value in changes.items():
            setattr(s, name, value)
            s.sources[name] = source
    for number, whom in follow(args.follow).items():
        where, name, recommended, paper, code, source = DEPARTURES[number]
        applies = all(facts[k] in (v if isinstance(v, tuple) else (v,)) for k, v in where.items())
        value = {"recommended": None, "paper": paper, "code": code}[whom]
        if applies and value is not None:
            setattr(s, name, value)
            s.sources[name] = f"{number}={whom}: {source}"
    for name in SETTINGS:
        given = getattr(args, name)
        if given and stage in given:
            setattr(s, name, given[stage])
            s.sources[name] = f"--{name.replace('_', '-')}"
    if args.unlabeled_pool:
        s.unlabeled_pool, s.sources["unlabeled_pool"] = args.unlabeled_pool, "--unlabeled-pool"

    for name, allowed in (("unlabeled_mix", ("none", "mixup", "mixup+", "prob")), ("mix_lam", ("batch", "element")),
                          ("schedule", ("fraction", "table")), ("fixmatch_teacher", ("eval", "train"))):  # fmt: skip
        if getattr(s, name) not in allowed:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)}: one of {', '.join(allowed)}")
    if s.lr is None:  # linear scaling rule, by the labelled batch                          [App. A]
        s.lr = s.lr_per_256 * s.batch_size / 256
        s.sources["lr"] = f"{s.lr_per_256:g} x {s.batch_size} / 256"
    share = world_size * args.accum_steps
    s.micro_batch = s.batch_size // share
    if s.batch_size % share:
        raise UserError(f"--batch-size {s.batch_size} is not divisible by {world_size} processes x --accum-steps "
                        f"{args.accum_steps}")  # fmt: skip
    if s.micro_batch % 2 and (s.mixup or s.cutmix) and s.mix_labeled:
        raise UserError(f"--batch-size {s.batch_size} leaves {s.micro_batch} labelled images per process and part; mixing "
                        "needs an even number: change it, or set --mix-labeled 0")  # fmt: skip
    return s


def follow(text):
    """'code' or 'D3=code,D5=paper' -> {departure: whom}."""
    if "=" not in text:
        chosen = dict.fromkeys(DEPARTURES, text)
    else:
        chosen = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    for number, whom in chosen.items():
        if number not in DEPARTURES or whom not in ("recommended", "paper", "code"):
            raise UserError(f"--follow {text}: recommended, paper, code, or D1=code,... up to D{len(DEPARTURES)}")
    return chosen


# ===== 2. DATA  (paper App. A, Data Augmentation) =================================================


class ToBytes:
    """Last transform of a view: PIL -> (uint8 (3, H, W), box of random erasing (4,) as y0, y1, x0, x1).

    Normalising and erasing happen on the device; the box is drawn as in timm's RandomErasing
    (area 2% to a third, aspect 0.3 to 3.3, ten attempts), all zeros where nothing is erased.
    """

    def __init__(self, reprob: float):
        self.reprob = reprob

    def __call__(self, picture):
        image = pil_to_tensor(picture)
        return image, self.draw_box(*image.shape[1:])

    def draw_box(self, height: int, width: int) -> Tensor:
        if random.random() <= self.reprob and self.reprob > 0:
            for _ in range(10):
                area = random.uniform(0.02, 1 / 3) * height * width
                aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if h < height and w < width:
                    y, x = random.randint(0, height - h), random.randint(0, width - w)
                    return torch.tensor([y, y + h, x, x + w], dtype=torch.int16)
        return torch.zeros(4, dtype=torch.int16)


# <shared: rand_augment>
def rand_augment(size: int):
    """timm's `rand-m9-mstd0.5-inc1`: two of 15 operations, each applied with probability 0.5.

    At the top of its range timm asks for posterize(bits=0), which Pillow 13 refuses: one bit at least.
    """
    policy = rand_augment_transform(
        "rand-m9-mstd0.5-inc1", dict(translate_const=int(0.45 * size), img_mean=(124, 116, 104))
    )
    for op in policy.ops:
        if op.name.startswith("Posterize"):
            op.level_fn = _AtLeastOneBit(op.level_fn)
    return policy


class _AtLeastOneBit:  # a class, not a closure: workers that are spawned receive it by pickle
    def __init__(self, level_fn):
        self.level_fn = level_fn

    def __call__(self, level, hparams):
        return (max(1, self.level_fn(level, hparams)[0]),)


# </shared>


def view_lists(kind: str, size: int, s) -> dict[str, list]:
    """The paper's views in the paper's order, each ending in (bytes, erasing box). s: a stage's settings."""
    crop = RandomResizedCropAndInterpolation(size, (s.crop_min, 1), (3 / 4, 4 / 3), "bicubic")
    if kind == "digits":  # numbers fit for digits: no flip, mild affine for labels, small shift as weak view
        affine = T.RandomAffine(15, (0.1, 0.1), (0.85, 1.15), 10, T.InterpolationMode.BILINEAR)
        shift = T.RandomAffine(0, (0.08, 0.08))
        return dict(
            labeled=[T.Resize(size), affine, ToBytes(s.reprob)],
            weak=[T.Resize(size), shift, ToBytes(0)],
            strong=[crop, rand_augment(size), ToBytes(s.reprob)],
            evaluate=[T.Resize(size), ToBytes(0)],
        )
    flip, jitter = T.RandomHorizontalFlip(0.5), T.ColorJitter(0.4, 0.4, 0.4)
    strong = [crop, flip, rand_augment(size), ToBytes(s.reprob)]
    middle = [T.Resize(round(size / 0.875), T.InterpolationMode.BICUBIC), T.CenterCrop(size)]  # 256 -> 224
    if size < 64:  # small pictures are evaluated whole
        middle = [T.Resize((size, size), T.InterpolationMode.BICUBIC)]
    return dict(labeled=strong, weak=[crop, flip, jitter, ToBytes(0)], strong=strong, evaluate=[*middle, ToBytes(0)])


def to_model(images: Tensor, boxes: Tensor, stats: Tensor, noise: Tensor | None = None) -> Tensor:
    """Bytes to normalised pictures with normal noise in the erasing boxes, on the device.

    images (N, 3, H, W) uint8; boxes (N, 4); stats (2, 3, 1, 1) mean and std in bytes -> (N, 3, H, W) float32.
    """
    x = (images.float() - stats[0]) / stats[1]
    y0, y1, x0, x1 = boxes.long().view(-1, 4, 1, 1).unbind(1)  # each (N, 1, 1)
    rows = torch.arange(x.shape[2], device=x.device).view(1, -1, 1)
    columns = torch.arange(x.shape[3], device=x.device).view(1, 1, -1)
    inside = (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)  # (N, H, W)
    return torch.where(inside.unsqueeze(1), torch.randn_like(x) if noise is None else noise, x)


# ===== 3. MODEL  (paper App. A, ViT Architectures) ================================================


def sincos_pos_embed(dim: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding, class token's row of zeros first: (1, 1 + grid^2, dim).

    First half of dim: sin then cos of the column index, second half: of the row index, with
    frequencies 10000^(-k / (dim/4)); the layout of MAE [authors' code]. timm's has another order.
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # (grid, dim/4)
    one_axis = torch.cat([angle.sin(), angle.cos()], 1)  # (grid, dim/2)
    columns, rows = one_axis.repeat(grid, 1), one_axis.repeat_interleave(grid, 0)  # row-major patches
    table = torch.cat([columns, rows], 1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table]).unsqueeze(0).float()


def position_embedding(args) -> str:
    """App. A: learnable from self-pretrained weights, fixed sine-cosine from scratch. E9: learnable for vit_digits."""
    scratch = init_kind(args) == "scratch" and args.arch != "vit_digits"
    return args.pos_embed or ("sincos" if scratch else "learned")


def create(name, args, **arguments) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=args.init == "timm", **arguments)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--init {args.init}, --arch {args.arch}: timm cannot build it: {reason}") from None


def build_model(args, num_classes: int, drop_path: float = 0.0) -> nn.Module:
    """timm's model with the paper's pooling and position embedding, initialised as by the authors.

    Parameters with 1000 classes: S 22,050,664, B 86,567,656, L 304,326,632, H 632,045,800,
    ConvNeXt-T 28,589,128, ConvNeXt-S 50,223,688. From scratch a ViT's position embedding is the fixed
    sine-cosine one, else it is learnable (App. A); the head starts with std 2e-5.
    """
    name, arguments, pool = ARCHS[args.arch]
    size, patches, *_ = DATASETS[args.dataset]
    arguments = dict(arguments, num_classes=num_classes, drop_path_rate=drop_path)
    vit = args.arch.startswith("vit")
    patch = args.patch_size or patches[0 if vit else 1]
    if patch:
        arguments["patch_size"] = patch
    if not vit:
        return create(name, args, **arguments)  # head_init_scale 1, layer scale 1e-6: timm's own
    heads = args.heads
    if init_kind(args) == "mocov3" and args.arch == "vit_small" and not heads:
        heads = 12
    if heads:
        arguments["num_heads"] = heads
    size = args.image_size or size
    if patch and size % patch:
        raise UserError(f"--image-size {size} is not a multiple of --patch-size {patch}")
    model = create(name, args, img_size=size, global_pool=args.pool or pool, **arguments)
    with torch.no_grad():
        nn.init.trunc_normal_(model.cls_token, std=0.02)  # timm today: 1e-6; the authors' version: 0.02
        if args.arch == "vit_digits":  # E9: at width 64 a std of 0.02 costs ten points, Xavier does not
            for p in model.blocks.parameters():
                if p.ndim == 2:
                    nn.init.xavier_uniform_(p)
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
        nn.init.zeros_(model.head.bias)
        if position_embedding(args) == "sincos":
            table = sincos_pos_embed(model.embed_dim, model.patch_embed.grid_size[0])
            model.pos_embed.copy_(table.to(model.pos_embed.device))
            model.pos_embed.requires_grad_(False)
    return model


# Published formats: the keys to enter in turn, then patterns of parameter names with their replacement
# (first match wins, None drops); which of them a file has is seen from its keys (`detect_format`).
FORMATS = {
    "mae": (["model"], [(r"mask_token|decoder.*", None)]),
    "dino": ([], []),
    "dino_full": (["teacher"], [(r"(?:module\.)?backbone\.(.*)", r"\1"), (r".*", None)]),  # not the student
    "mocov3": (["state_dict"], [(r"module\.base_encoder\.head\..*", None), (r"module\.base_encoder\.(.*)", r"\1"),
                                (r".*", None)]),  # projector, momentum encoder and predictor stay behind
    "supervised": ([], [(r"head(_dist)?\..*|dist_token", None)]),  # flat: timm's own files
    "supervised_model": (["model"], [(r"head(_dist)?\..*|dist_token", None)]),  # DeiT, MAE fine-tuned
    "run": (["model"], []),  # checkpoint.pt of this project
}  # fmt: skip


def detect_format(state: dict) -> str | None:
    keys = state.get("model") if isinstance(state.get("model"), dict) else state
    if "recipe" in state and "model" in state:
        return "run"
    if "teacher" in state and "student" in state:
        return "dino_full"
    if any(k.startswith("module.base_encoder.") for k in state.get("state_dict", {})):
        return "mocov3"
    if "patch_embed.proj.weight" not in keys:
        return None
    headless = "head.weight" not in keys
    if "model" in state:
        return "mae" if headless else "supervised_model"
    return "dino" if headless else "supervised"


def load_init(model: nn.Module, path: str, arch: str) -> tuple[str, dict | None]:
    """Load published weights; all of them and nothing else, or UserError with the keys.

    Returns the format and, from a run of this project that kept an EMA, its teacher's weights.

    Position embedding and patch kernel are resized where the grid or the patch differs. What may be
    missing is exactly the head, and fc_norm where the average is pooled (then the file's last norm
    is not used): the same as the authors' assertion.
    """
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise UserError(f"--init {path}: no such file; the README's table names the published ones")
    state = checkpoint.load_newest(file.parent) if file.name == "checkpoint.pt" else checkpoint.read(file)
    kind = detect_format(state)
    if kind is None:
        raise UserError(f"--init {path}: not a format this script knows ({', '.join(FORMATS)}); its first keys are "
                        f"{', '.join(list(state)[:4])}")  # fmt: skip
    teacher = state.get("teacher") if kind == "run" else None
    enter, patterns = FORMATS[kind]
    for key in enter:
        state = state[key]
    weights = {}
    for name, value in state.items():
        for pattern, replacement in patterns:
            match = re.fullmatch(pattern, name)
            if match:
                name = match.expand(replacement) if replacement else None
                break
        if name is not None:
            weights[name] = value
    own = model.state_dict()
    if "head.weight" in weights and weights["head.weight"].shape != own["head.weight"].shape:
        weights = {k: v for k, v in weights.items() if not k.startswith("head.")}
    allowed = {"head.weight", "head.bias"} - weights.keys()
    if "fc_norm.weight" in own and "fc_norm.weight" not in weights:  # average pooling: fc_norm starts at 1, 0
        weights = {k: v for k, v in weights.items() if k not in ("norm.weight", "norm.bias")}
        allowed |= {"fc_norm.weight", "fc_norm.bias"}
    if "pos_embed" in weights and "pos_embed" in own and weights["pos_embed"].shape[1] != own["pos_embed"].shape[1]:
        grid = list(model.patch_embed.grid_size)
        weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], grid, num_prefix_tokens=1, antialias=False)
    kernel = weights.get("patch_embed.proj.weight")
    if kernel is not None and kernel.shape[-1] != own["patch_embed.proj.weight"].shape[-1]:
        size = own["patch_embed.proj.weight"].shape[-2:]
        weights["patch_embed.proj.weight"] = F.interpolate(kernel.float(), size, mode="bicubic", align_corners=False)
    wrong = [k for k in weights if k in own and weights[k].shape != own[k].shape]
    if wrong:
        raise UserError(f"--init {path}: {wrong[0]} has shape {tuple(weights[wrong[0]].shape)}, --arch {arch} needs "
                        f"{tuple(own[wrong[0]].shape)} ({len(wrong)} such); choose the --arch of the file")  # fmt: skip
    missing, extra = own.keys() - weights.keys() - allowed, weights.keys() - own.keys()
    if missing or extra:
        raise UserError(f"--init {path} (read as {kind}) does not fit --arch {arch}: missing {sorted(missing)[:4]}, left over "
                        f"{sorted(extra)[:4]} ({len(missing)} and {len(extra)} in all)")  # fmt: skip
    model.load_state_dict(weights, strict=False)
    return kind, teacher


# ===== 4. LOSSES  (paper Sec. 2.3 and 3) ==========================================================


def smooth_one_hot(y: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """(N,) -> (N, K): 1 - s + s/K at y, s/K elsewhere."""
    off = smoothing / num_classes
    return F.one_hot(y, num_classes).float() * (1.0 - smoothing) + off


def pseudo_label_loss(logits_s: Tensor, target: Tensor, o: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy on confident pseudo-labels, paper Eq. 2.

        L_u = 1/N_u * sum_i [o_i >= tau] * CE(x_i^{u,s}, y_hat_i)

    logits_s (N_u, K)  student, strong view       o  (N_u,)  confidence, detached
    target   (N_u, K)  pseudo-labels, maybe mixed  returns L_u () and the kept fraction ()
    """
    keep = (o >= tau).float()  # [o_i >= tau]  (N_u,)
    ce = F.cross_entropy(logits_s.float(), target, reduction="none")  # float32 under autocast  (N_u,)
    # Mean over N_u, not over the kept ones: Eq. 2 lets L_u grow as the teacher gets confident.
    return (keep * ce).mean(), keep.mean()


def cutmix_boxes(lam: Tensor, size: int, cy: Tensor, cx: Tensor, half_up: bool = True) -> tuple[Tensor, Tensor]:
    """Boxes of side int(S * sqrt(1 - lam)) around (cy, cx), clipped at the border; CutMix.

    lam, cy, cx (n,) -> boxes (n, 4) as y0, y1, x0, x1 and the ratio that is left after clipping,
    lam = 1 - area / S^2, (n,). half_up: see the setting cutmix_half_up.
    """
    cut = (size * (1.0 - lam).clamp(min=0).sqrt()).long()
    low, high = cut // 2, (cut + 1) // 2 if half_up else cut // 2
    y0, y1 = (cy - low).clamp(0, size), (cy + high).clamp(0, size)
    x0, x1 = (cx - low).clamp(0, size), (cx + high).clamp(0, size)
    return torch.stack([y0, y1, x0, x1], 1), 1.0 - ((y1 - y0) * (x1 - x0)) / (size * size)


def mix_images(x: Tensor, partner: Tensor, lam: Tensor, use_cutmix: Tensor, boxes: Tensor) -> Tensor:
    """Blend (Eq. 3) or paste the partner's box, per image, in one pass; x, partner (N, C, S, S).

    lam, use_cutmix (n,), boxes (n, 4) with n = N, or n = 1 for one draw per batch.
    """
    at = torch.arange(x.shape[-1], device=x.device)
    y0, y1, x0, x1 = boxes.unsqueeze(2).unbind(1)  # each (n, 1)
    inside = ((at >= y0) & (at < y1)).unsqueeze(2) & ((at >= x0) & (at < x1)).unsqueeze(1)  # (n, S, S)
    own = torch.where(use_cutmix[:, None, None], 1.0 - inside.float(), lam[:, None, None].float())
    return torch.lerp(partner, x, own.unsqueeze(1).to(x.dtype))  # own * x + (1 - own) * partner


def mix_targets(t: Tensor, t_partner: Tensor, lam: Tensor) -> Tensor:
    """Eq. 3, second line: lam * y_i + (1 - lam) * y_j. t (N, K), lam (N,) or (1,)."""
    return lam[:, None] * t + (1.0 - lam[:, None]) * t_partner


def batch_mix(x, t, partner, *, mixup, cutmix, element=False, half_up=True, use_cutmix=None, lam=None, boxes=None):
    """Mixup or CutMix with a ratio from Beta(alpha, alpha), Eq. 3, as in timm's Mixup.

    x (N, 3, S, S), t (N, K) targets, partner (N,) index of each image's partner. One coin, ratio and
    box for the batch, or one per image (element). Draws are made where None. Returns x, t.
    """
    n, size, device = (len(x) if element else 1), x.shape[-1], x.device
    if use_cutmix is None:
        chance = 0.5 if mixup > 0 and cutmix > 0 else float(cutmix > 0)
        use_cutmix = torch.rand(n, device=device) < chance
    if lam is None:
        alpha = torch.where(use_cutmix, cutmix if cutmix > 0 else 1.0, mixup if mixup > 0 else 1.0)
        lam = torch.distributions.Beta(alpha, alpha, validate_args=False).sample()  # lam ~ Beta(alpha, alpha)
    if boxes is None:
        centre = torch.randint(size, (2, n), device=device)
        boxes, _ = cutmix_boxes(lam, size, *centre, half_up)
    left = 1.0 - (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / (size * size)
    x = mix_images(x, x[partner], lam, use_cutmix, boxes)
    return x, mix_targets(t, t[partner], torch.where(use_cutmix, left, lam))


def confident_partners(keep: Tensor, keys: Tensor | None = None) -> Tensor:
    """A random permutation of the confident samples among themselves, all others their own partner (Fig. 3b).

    keep (N,) bool, keys (N,) uniform numbers that rank them -> partner (N,). The number of confident
    samples is known to the device alone: two sorts keep every shape fixed and the host unaware.
    """
    keys = torch.rand(len(keep), device=keep.device) if keys is None else keys
    shuffled = torch.argsort(torch.where(keep, keys, keys + 2.0))  # confident ones first, in random order
    in_order = torch.argsort((~keep).long(), stable=True)  # confident ones first, in their own order
    partner = torch.empty_like(shuffled).scatter_(0, in_order, shuffled)
    return torch.where(keep, partner, torch.arange(len(keep), device=keep.device))


def prob_pseudo_mixup(x, t, o, *, cutmix_prob=0.5, half_up=True, perm=None, use_cutmix=None, boxes=None):
    """Probabilistic pseudo mixup, paper Sec. 3.3: who is more confident weighs more.

        lam_i = o_i / (o_i + o_j)      (Eq. 4)
        o*_i  = max(o_i, o_j)          (Eq. 5)

    x (N, 3, S, S) strong views, t (N, K) pseudo-labels, o (N,). j = perm(i) is a random permutation
    of the batch. Returns mixed x, t and the new confidences o*. D8: half of the pairs are not blended:
    a box of area 1 - lam is pasted from the partner, and the target follows the area that it has.
    """
    n, size, device = len(x), x.shape[-1], x.device
    perm = torch.randperm(n, device=device) if perm is None else perm
    use_cutmix = torch.rand(n, device=device) < cutmix_prob if use_cutmix is None else use_cutmix
    lam = o / (o + o[perm])  # Eq. 4
    o_star = torch.maximum(o, o[perm])  # Eq. 5
    if boxes is None:
        boxes, _ = cutmix_boxes(lam, size, *torch.randint(size, (2, n), device=device), half_up)
    left = 1.0 - (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / (size * size)
    x = mix_images(x, x[perm], lam, use_cutmix, boxes)  # Eq. 3 with lam_i; pasted from the unmixed x
    return x, mix_targets(t, t[perm], torch.where(use_cutmix, left, lam)), o_star


# ===== 5. OPTIMISER AND SCHEDULES  (paper App. A) =================================================


def layer_of(name: str, depth: int) -> int:
    """0 for embeddings, i + 1 for block i, depth + 1 for final norm and head (layer-wise decay, [5])."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Groups with `lr_scale`; no weight decay on 1-D parameters, position and class token.

    timm's own layer decay puts the last norm of a class-token model with its last block; the authors'
    code with the head. torch's schedulers ignore lr_scale: `set_lr` applies it.
    """
    depth, groups = len(getattr(model, "blocks", [])), {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            scale = layer_decay ** (depth + 1 - layer_of(name, depth)) if depth else 1.0
            decay = 0.0 if p.ndim == 1 or name in ("pos_embed", "cls_token") else weight_decay
            group = groups.setdefault((scale, decay), dict(params=[], lr_scale=scale, weight_decay=decay))
            group["params"].append(p)
    return list(groups.values())


def lr_at(step: int, steps_per_epoch: int, s) -> float:
    """Learning rate of an update, before the layer scale: linear warm-up from 0, then cosine to min_lr.

    s.schedule "fraction": by fractional epochs (ViT). "table": by updates, the warm-up ending on the
    peak and the cosine starting at it again (ConvNeXt) [both: authors' code].
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


def labeled_targets(x_l, y_l, num_classes, s, **draws):
    """Labelled images and smoothed targets, mixed by reversed batch if the recipe says so."""
    t_l = smooth_one_hot(y_l, num_classes, s.label_smoothing)
    if s.mix_labeled and (s.mixup or s.cutmix):
        partner = torch.arange(len(x_l) - 1, -1, -1, device=x_l.device)
        x_l, t_l = batch_mix(x_l, t_l, partner, mixup=s.mixup, cutmix=s.cutmix, element=s.mix_lam == "element",
                             half_up=bool(s.cutmix_half_up), **draws)  # fmt: skip
    return x_l, t_l


def sup_step(student, x_l, y_l, num_classes, s, precision, mix_l=None) -> dict[str, Tensor]:
    """Stage 2. x_l (N_l, 3, S, S), y_l (N_l,); mix_l: given draws of batch_mix. Returns named losses."""
    x_l, t_l = labeled_targets(x_l, y_l, num_classes, s, **(mix_l or {}))
    with precision.autocast():
        logits_l = student(x_l).float()
    loss_l = F.cross_entropy(logits_l, t_l)  # L_l
    return dict(loss=loss_l, loss_l=loss_l)


def semi_step(student, teacher, x_l, y_l, x_u_w, x_u_s, num_classes, s, precision, mix_l=None, mix_u=None):
    """Stage 3. x_l (N_l, 3, S, S), y_l (N_l,), x_u_w and x_u_s (N_u, 3, S, S): weak and strong views of
    the same images; mix_l, mix_u: given draws. Returns named losses, then y_hat and o (N_u,) for the log."""
    with torch.no_grad(), precision.autocast():
        logits_w = teacher(x_u_w)
    # float32 before softmax: autocast on a CPU would leave it in bf16
    o, y_hat = logits_w.float().softmax(-1).max(-1)  # (N_u,), (N_u,)

    smoothing = 0.0 if s.unlabeled_mix == "none" else s.label_smoothing_u  # D11
    own_o, half_up, mix_u = o, bool(s.cutmix_half_up), dict(mix_u or {})
    t_u = smooth_one_hot(y_hat, num_classes, smoothing)
    if s.unlabeled_mix == "prob":  # Fig. 3c; the threshold then sees o*
        x_u_s, t_u, o = prob_pseudo_mixup(x_u_s, t_u, o, cutmix_prob=s.unlabeled_cutmix, half_up=half_up, **mix_u)
    elif s.unlabeled_mix != "none":  # Fig. 3a: any two; Fig. 3b: confident ones only. The threshold sees o.
        reverse = torch.arange(len(o) - 1, -1, -1, device=o.device)
        partner = mix_u.pop("partner", reverse if s.unlabeled_mix == "mixup" else confident_partners(o >= s.tau))
        x_u_s, t_u = batch_mix(x_u_s, t_u, partner, mixup=s.mixup or 0.8, cutmix=s.cutmix,
                               element=s.mix_lam == "element", half_up=half_up, **mix_u)  # fmt: skip

    x_l, t_l = labeled_targets(x_l, y_l, num_classes, s, **(mix_l or {}))
    with precision.autocast():  # one joint student forward
        logits_l, logits_s = student(torch.cat([x_l, x_u_s])).float().split([len(x_l), len(x_u_s)])
    loss_l = F.cross_entropy(logits_l, t_l)  # L_l
    loss_u, kept = pseudo_label_loss(logits_s, t_u, o, s.tau)  # L_u, Eq. 2
    loss = loss_l + s.lambda_u * loss_u  # L = L_l + mu L_u
    return dict(loss=loss, loss_l=loss_l, loss_u=loss_u, kept=kept), y_hat, own_o


# ===== 7. EVALUATION ==============================================================================


@torch.no_grad()
def evaluate(model, images: Images, view, run, batch=250) -> dict[str, float]:
    """Top-1 and top-5 in percent over all processes, every image once. Restores the training mode."""
    training = model.training
    model.eval()
    sums = torch.zeros(3, device=run.device, dtype=torch.float64)
    for (bytes_, boxes), targets in eval_loader(images, view, batch, rank=run.rank, world=run.world,
                                                workers=run.workers):  # fmt: skip
        x = to_model(bytes_.to(run.device), boxes.to(run.device), run.stats)
        with run.precision.autocast():
            logits = model(x).float()
        hit = logits.topk(min(5, logits.shape[1])).indices == targets.to(run.device)[:, None]  # (N, 5)
        sums += torch.stack([hit[:, 0].sum(), hit.sum(), hit.new_tensor(len(hit), dtype=torch.long)])
    if run.world > 1:
        dist.all_reduce(sums)
    model.train(training)
    top1, top5, count = sums.tolist()
    return dict(top1=round(100 * top1 / count, 3), top5=round(100 * top5 / count, 3))


# ===== 8. MAIN LOOP ===============================================================================


def run_stage(stage, model, warm_teacher, data, split, s, args, run, resume):
    """Train one stage; returns the teacher (or None) and the results. One loop serves both stages.

    model: unwrapped, with the weights to start from. warm_teacher: EMA weights of the stage before, or
    None. resume: a checkpoint of this very stage, or None.
    """
    if stage == "sup":
        labeled = Stream("sup/labeled", split.labeled, s.batch_size, args.seed)
        steps_per_epoch = labeled.steps_per_pass
    else:
        unlabeled = Stream("semi/unlabeled", split.unlabeled, s.unlabeled_ratio * s.batch_size, args.seed)
        steps_per_epoch = unlabeled.steps_per_pass  # an epoch is a pass over the unlabelled images
        labeled = Stream("semi/labeled", split.labeled, s.batch_size, args.seed, restart_every=steps_per_epoch)
    total, num_classes = s.epochs * steps_per_epoch, len(data.classes)

    torch.manual_seed(seed_of(args.seed, stage, run.rank))  # from here on draws are a process's own
    teacher = Ema(model) if stage == "semi" or s.ema_decay else None
    if teacher is not None and warm_teacher is not None:  # D3, D4
        teacher.module.load_state_dict(warm_teacher)
    optimizer = torch.optim.AdamW(parameter_groups(model, s.weight_decay, s.layer_decay), lr=0.0,
                                  betas=(0.9, s.beta2), eps=1e-8, fused=True)  # fmt: skip
    run.precision.reset()
    start, seconds, kept = 0, 0.0, []
    if resume:
        start, seconds, kept = resume["step"], resume["seconds"], resume["kept"]
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        if teacher is not None:
            teacher.module.load_state_dict(resume["teacher"])
        if run.precision.scaler is not None and resume["scaler"]:
            run.precision.scaler.load_state_dict(resume["scaler"])
        checkpoint.restore_rng(resume["rng"], run.rank, seed_of(args.seed, stage, run.rank, start))
    if args.compile:
        model.compile()  # in place: the keys of the state dict stay clean
    student = model
    if run.world > 1:
        student = nn.parallel.DistributedDataParallel(model, device_ids=run.device_ids)

    views = {name: T.Compose(steps) for name, steps in view_lists(run.views, run.image_size, s).items()}
    bad = BadImages(data.train, args.max_bad_images)
    how = dict(start=start, stop=total, rank=run.rank, world=run.world, accum=args.accum_steps,
               workers=run.workers, pin=run.device.type == "cuda", bad=bad)  # fmt: skip
    batches = stream_loader(data.train, [views["labeled"]], labeled, **how)
    if stage == "semi":
        pairs = stream_loader(data.train, [views["weak"], views["strong"]], unlabeled, **how)
        batches = ((*of_labeled, *of_unlabeled) for of_labeled, of_unlabeled in zip(batches, pairs))
    names = {p: n for n, p in model.named_parameters()}
    evaluate_at = {round(total * k / args.evals) for k in range(1, args.evals + 1)} - {0}
    run.log.start(stage, start, total, kept)
    step, parts, results, began = start, [], {}, time.perf_counter()

    def images(seen):  # (bytes, boxes) on the host -> pictures on the device
        x = to_model(*(t.to(run.device, non_blocking=True) for t in seen), run.stats)
        return x.to(memory_format=torch.channels_last) if args.arch.startswith("convnext") else x

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
                labeler = model if s.ema_decay == 0 and s.fixmatch_teacher == "train" else teacher  # D10
                losses, y_hat, o = semi_step(student, labeler, images(seen_l), y_l, images(seen_w), images(seen_s),
                                             num_classes, s, run.precision)  # fmt: skip
                # The only use of unlabelled images' true labels, where they are known: two logged numbers.
                right, sure = (y_hat == y_u) & (y_u >= 0), (o >= s.tau) & (y_u >= 0)
                losses["pseudo_acc"] = right.sum() / (y_u >= 0).sum().clamp(min=1)
                losses["kept_acc"] = (right & sure).sum() / sure.sum().clamp(min=1)
            run.precision.backward(losses["loss"] / args.accum_steps)
        parts.append({k: v.detach() for k, v in losses.items()})
        if not last_part:
            continue
        means = {k: torch.stack([part[k] for part in parts]).mean() for k in parts[0]}
        applied = run.precision.update(optimizer, {k: v for k, v in means.items() if k.startswith("loss")})
        optimizer.zero_grad(set_to_none=True)
        if teacher is not None:
            teacher.update(model, s.ema_decay, applied)  # Eq. 1
        run.log.add(means)
        parts, step = [], step + 1

        signalled = run.stop.asked()
        stopping = signalled or step == args.stop_after
        printing, saving = step % args.print_every == 0, step % args.save_every == 0
        if printing or saving or stopping or step == total:
            run.precision.check(optimizer, names, step)
        if printing or step == total:
            run.log.report(stage, step, images=s.batch_size * (1 + s.unlabeled_ratio),
                           epoch=round(step / steps_per_epoch, 3), lr=lr_at(step - 1, steps_per_epoch, s),
                           bad_images=len(bad.seen))  # fmt: skip
        if step in evaluate_at:
            results = evaluate(model, data.val, views["evaluate"], run)
            if teacher is not None:
                of_teacher = evaluate(teacher.module, data.val, views["evaluate"], run)
                results |= {f"ema_{k}": v for k, v in of_teacher.items()}
            run.log.evaluation(stage, step, results)
        if step == start + 2:
            announce_time(stage, (time.perf_counter() - second) * (total - step), args, run)
        second = time.perf_counter()
        if saving or stopping or step == total:
            run.results[stage] = dict(results, updates=step, seconds=round(seconds + second - began, 1))
            save_checkpoint(stage, step, model, teacher, optimizer, run)
        if stopping and step < total:
            run.log.say(f"stopped at {stage} step {step}; the same command with --resume {run.folder} goes on")
            raise SystemExit(128 + signalled if signalled else 0)
    return teacher


def save_checkpoint(stage, step, model, teacher, optimizer, run):
    """The state of a stage after an update; written by the first process, with the draws of all."""
    rng = checkpoint.rng_states()
    if run.rank == 0:
        scaler = run.precision.scaler
        state = dict(
            stage=stage, step=step, model=model.state_dict(), optimizer=optimizer.state_dict(), rng=rng,
            teacher=None if teacher is None else teacher.module.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(), seconds=run.results[stage]["seconds"],
            kept=run.log.unprinted(), log_size=run.log.size, results=run.results, recipe=run.recipe,
        )  # fmt: skip
        checkpoint.save(run.folder, state)


def announce_time(stage, seconds, args, run):
    run.log.say(f"{stage}: about {seconds / 60:.1f} minutes here" if seconds < 7200 else
                f"{stage}: about {seconds / 3600:.1f} hours here")  # fmt: skip
    if seconds > 7200 and args.dataset == "digits" and args.arch != "vit_digits":
        run.log.say("quicker: --arch vit_digits, the default, takes minutes")


@log.clear_errors
def main(args):
    if args.dry_run:
        return print(dry_run(args))
    if args.eval:
        args = stored_args(args)
    run = start(args)
    data = load_dataset(args.dataset, args.data_path, seed=args.split_seed, holdout=args.holdout)
    if args.eval:
        return evaluate_run(args, data, run)
    split = choose_split(args, data)
    stages = [x for x in STAGES if args.stage in ("all", x) and (x == "sup" or args.method != "sup")]
    settings = {x: derive(args, x, run.world) for x in stages}
    stages = [x for x in stages if settings[x].epochs]  # Table 6: --epochs sup=0 skips stage 2
    if not stages:
        raise UserError(f"--stage {args.stage} with --method {args.method} leaves no stage to train")
    if "semi" in stages and not len(split.unlabeled):
        raise UserError("no unlabelled images are left; lower --labels, or set --unlabeled-pool all")
    if stages == ["semi"] and not args.init:
        raise UserError("--stage semi needs --init RUN, a run that ended stage sup (or --epochs sup=0 without --stage)")
    run.recipe = mathematics(args, split, settings)

    # A new run, or one that goes on
    state, size, name = None, None, Path(__file__).stem
    if args.resume:
        run.folder = Path(args.resume) if args.resume != "auto" else log.find_run(name, run.recipe)
        if run.folder is None:
            print("--resume auto: no run with these settings; starting one", flush=True)
        else:
            state = checkpoint.load_newest(run.folder)
            wrong = checkpoint.differences(state["recipe"], run.recipe)
            if wrong:
                raise UserError(f"--resume {run.folder}: other settings ({'; '.join(wrong)}); restore them, or start anew")
            size = state["log_size"]
    if run.folder is None:
        run.folder = log.new_run(name, args.output, run.rank)
    run.log = log.RunLog(run.folder, size, enabled=run.rank == 0)
    run.results = state["results"] if state else {}
    if state is None:
        run.log.write(dict(script=name, command=sys.argv, args=vars(args), recipe=run.recipe, classes=data.classes,
                           settings={x: vars(settings[x]) for x in stages}, split=split.describe(),
                           world=run.world, **log.versions()))  # fmt: skip
    greet(args, data, split, settings, run)

    torch.manual_seed(seed_of(args.seed, "model"))  # the same weights on every process
    first = settings[stages[0]]
    model = build_model(args, len(data.classes), first.drop_path).to(run.device)
    refuse_too_large(args, settings[stages[-1]], model, run)
    warm_teacher = None
    if args.init and state is None and args.init != "timm":
        kind, warm_teacher = load_init(model, args.init, args.arch)
        run.log.say(f"start: {args.init}, read as {kind}")
    for stage in stages:
        done = state and STAGES.index(stage) < STAGES.index(state["stage"])
        if done:
            continue
        before, model = model, build_model(args, len(data.classes), settings[stage].drop_path).to(run.device)
        model.load_state_dict(before.state_dict())
        here = state if state and state["stage"] == stage else None
        teacher = run_stage(stage, model, warm_teacher, data, split, settings[stage], args, run, here)
        warm_teacher = None if teacher is None else teacher.module.state_dict()
    finish(args, data, split, settings, model, run)
    if run.world > 1:
        dist.destroy_process_group()


def start(args):
    """Processes, device, precision: what a run needs before it knows what to train."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    elif device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    size, _, views, _ = DATASETS[args.dataset]
    workers = args.workers
    if workers is None:  # digits are quicker drawn in the process itself than sent between processes
        workers = 0 if args.dataset == "digits" else min(8, (os.cpu_count() or 1) // world)
    stats = 255 * torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], device=device).view(2, 3, 1, 1)
    return SimpleNamespace(
        rank=rank, world=world, device=device, device_ids=[device.index] if device.type == "cuda" else None,
        precision=Precision(device, args.dtype), stop=checkpoint.StopSignal(), folder=None, results={}, stats=stats,
        workers=workers, views=views, image_size=args.image_size or size,
    )  # fmt: skip


def choose_split(args, data):
    pool = args.unlabeled_pool or derive(args, "semi", 1).unlabeled_pool
    ids = [i.decode() for i in data.train.ids]
    if args.labels_file:
        if len(args.labels_file) > 2:
            raise UserError("--labels-file takes a list of labelled images and perhaps one of unlabelled ones")
        return read_split(ids, data.train.targets, data.classes, *args.labels_file, pool=pool, root=data.train.root)
    if data.labeled is not None and args.labels is None and args.num_labels is None:
        return split_of("labeled/ and unlabeled/", ids, data.train.targets, data.classes, data.labeled, None, pool)
    percent = None if args.num_labels else args.labels or (1 if args.dataset == "digits" else 10)
    return make_split(ids, data.train.targets, data.classes, percent=percent, number=args.num_labels,
                      seed=args.split_seed, pool=pool)  # fmt: skip


def mathematics(args, split, settings) -> dict:
    """Everything that decides the numbers, flat: compared on a resume, hashed for the reference band."""
    flat = {k: v for k, v in vars(args).items() if k not in HOW_TO_RUN and k not in SETTINGS}
    flat["split"] = split.sha256
    for stage, s in settings.items():
        flat |= {f"{stage}.{k}": v for k, v in vars(s).items() if k not in ("sources", "micro_batch")}
    return flat


def refuse_too_large(args, s, model, run):
    """An estimate before the first step: better than a crash after the first epoch of loading."""
    with torch.device("meta"):
        probe = build_model(args, model.num_classes, s.drop_path)
    size = run.image_size
    _, kept = report.forward_cost(probe, (2, 3, size, size))
    per_image = kept / 2 * (1 if run.precision.dtype == torch.float32 else 0.5)
    fixed = 20 * sum(p.numel() for p in model.parameters())  # weights, gradients, two moments, teacher
    images, room = s.micro_batch * (1 + s.unlabeled_ratio), available_memory(run.device)
    if fixed + per_image * images > room:
        fits = [a for a in range(args.accum_steps, s.batch_size + 1) if s.batch_size % (a * run.world) == 0
                and fixed + per_image * images * args.accum_steps / a <= room]  # fmt: skip
        remedy = f"--accum-steps {fits[0]} would fit" if fits else "a smaller --arch would fit"
        raise UserError(f"{images} images per step need about {(fixed + per_image * images) / 2**30:.1f} GiB, "
                        f"{room / 2**30:.1f} are free; {remedy}")  # fmt: skip


def stored_args(args):
    """The flags of the run that --eval names, with today's flags for how and where to run."""
    stored = log.read_log(Path(args.eval))[0]
    if stored.get("script") != Path(__file__).stem:
        raise UserError(f"--eval {args.eval}: a run of {stored.get('script')}, not of this script")
    now = {k: v for k, v in vars(args).items() if k in HOW_TO_RUN and (k != "data_path" or v)}
    return SimpleNamespace(**{**stored["args"], **now})


def evaluate_run(args, data, run):
    """--eval RUN: the final weights on the validation set, and --predict; nothing is trained."""
    model = build_model(args, len(data.classes)).to(run.device)
    file = Path(args.eval) / "model.safetensors"
    if not file.exists():
        raise UserError(f"--eval {args.eval}: no model.safetensors there; finish the run first with --resume {args.eval}")
    model.load_state_dict(checkpoint.read(file))
    view = T.Compose(view_lists(run.views, run.image_size, derive(args, STAGES[0], 1))["evaluate"])
    result = evaluate(model, data.val, view, run)
    if run.rank == 0:
        print(f"{args.eval}: top-1 {result['top1']:.2f}, top-5 {result['top5']:.2f} on {len(data.val)} pictures")
        if args.predict:
            predict(args.predict, model, data.classes, view, run, Path(args.eval))


@torch.no_grad()
def predict(source, model, classes, view, run, folder):
    """Classify a picture, or all pictures below a folder, into predictions.csv and predictions.png."""
    source = Path(source)
    files = sorted(f for f in source.rglob("*") if f.suffix.lower() in EXTENSIONS) if source.is_dir() else [source]
    if not files or not files[0].exists():
        raise UserError(f"--predict {source}: no picture there ({', '.join(EXTENSIONS)})")
    pictures = Images(np.array([os.fsencode(f) for f in files]), np.full(len(files), -1))
    model.eval()
    probabilities, shown = [], []
    for (bytes_, boxes), _ in eval_loader(pictures, view, 250, workers=run.workers):
        with run.precision.autocast():
            logits = model(to_model(bytes_.to(run.device), boxes.to(run.device), run.stats))
        probabilities.append(logits.float().softmax(-1).cpu())
        shown.append(bytes_[: max(0, 40 - sum(map(len, shown)))])
    probabilities = torch.cat(probabilities)
    report.write_predictions(folder / "predictions.csv", [str(f) for f in files], probabilities, classes)
    best = probabilities.max(1)
    captions = [f"{classes[i]} {p:.2f}" for p, i in zip(best.values.tolist(), best.indices.tolist())]
    report.captioned_grid(torch.cat(shown), captions, folder / "predictions.png")
    print(f"predictions: {folder / 'predictions.csv'}, {folder / 'predictions.png'}")


def paper_args(args):
    """The same flags on ImageNet, with the initial weights the paper uses for this architecture."""
    init = args.init or {"vit_small": "dino.pth", "convnext_tiny": None, "convnext_small": None}.get(args.arch, "mae.pth")
    arch = args.arch if args.arch not in ("vit_digits", "vit_tiny") else "vit_base"
    labels = args.labels if args.labels in (1, 10, 100) else 10
    dataset = args.dataset if args.dataset not in ("digits", "folder", "cifar10", "cifar100") else "imagenet"
    if dataset != "imagenet" and not args.init:
        init = "supervised.pth"
    return SimpleNamespace(**{**vars(args), "dataset": dataset, "arch": arch, "labels": labels, "init": init,
                              "num_labels": None, "image_size": None, "patch_size": None})  # fmt: skip


def paper_number(args):
    """The paper's own top-1 for these flags and where it stands, or None."""
    kind, methods = init_kind(args), {"sup": "sup", "fixmatch": "fixmatch", "ema_teacher": "none", "semi_vit": "prob"}
    what = methods[args.method] if args.stage != "sup" else "sup"
    if args.unlabeled_mix and what not in ("sup", "fixmatch"):
        what = args.unlabeled_mix["semi"]
    if (args.dataset, args.arch, kind) == ("imagenet", "vit_base", "mae"):
        for setting, stage in (("tau", "semi"), ("ema_decay", "semi"), ("epochs", "sup")):
            given = getattr(args, setting)
            sweep = SWEEPS.get((setting, "sup" if what == "sup" else what, args.labels), {})
            if given and given.get(stage) in sweep:
                return sweep[given[stage]]
    return PAPER.get((args.dataset, args.arch, kind, args.labels), {}).get(what)


def command_of(args):
    """The ImageNet command for these flags."""
    init = {"mae.pth": f"mae_pretrain_{args.arch}.pth", "dino.pth": "dino_deitsmall16_pretrain.pth"}.get(args.init, args.init)
    parts = ["python semi_vit.py", f"--dataset {args.dataset} --data-path DIR", f"--init {init}" if init else "",
             f"--arch {args.arch} --labels {args.labels:g}", f"--method {args.method}" if args.method != "semi_vit" else ""]
    return " ".join(p for p in parts if p)  # fmt: skip


def greet(args, data, split, settings, run):
    """First lines of a run: what it trains on, which recipe, which split, where."""
    key, row = recipe(args)
    if args.dataset == "digits":
        paper = paper_args(args)
        number = paper_number(paper)
        run.log.say(f"training on the embedded digits; on ImageNet: {command_of(paper)}"
                    + (f"   (the paper: {number} top-1)" if number else ""))  # fmt: skip
    run.log.say(f"recipe {key}: {row['source']}")
    run.log.say(split.describe())
    for stage, s in settings.items():
        share = f"{run.world} processes x {args.accum_steps} parts x {s.micro_batch}"
        run.log.say(f"{stage}: {s.epochs} epochs, batch {s.batch_size} = {share} labelled"
                    + (f" + {s.unlabeled_ratio} x unlabelled" if stage == "semi" else "")
                    + f", lr {s.lr:g} ({s.sources['lr']})")  # fmt: skip
    run.log.say(f"{run.folder}: {args.arch} on {run.device}, {str(run.precision.dtype).split('.')[-1]}")


def finish(args, data, split, settings, model, run):
    """Weights, curves, views and the summary; by the first process."""
    if run.rank:
        return
    from safetensors.torch import save_file  # comes with timm

    patch = model.patch_embed.patch_size[0] if args.arch.startswith("vit") else None
    name, arguments, pool = ARCHS[args.arch]
    create = dict(arguments, num_classes=len(data.classes))
    create |= dict(img_size=run.image_size, patch_size=patch, global_pool=args.pool or pool) if patch else {}
    metadata = dict(classes=json.dumps(data.classes), image_size=str(run.image_size), arch=args.arch,
                    timm_model=name, timm_arguments=json.dumps(create))  # fmt: skip
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(weights, run.folder / "model.safetensors", metadata=metadata)
    run.log.write(dict(results=run.results))
    lines = log.read_log(run.folder)
    report.curves(lines, run.folder / "curves.png", {
        "loss": ["loss", "loss_l", "loss_u"], "pseudo-labels": ["kept", "pseudo_acc", "kept_acc"],
        "top-1 (%)": ["top1", "ema_top1"], "learning rate": ["lr"],
    })  # fmt: skip
    last = list(settings)[-1]
    draw_views(data, split, settings[last], args, run)
    say, names = run.log.say, {"sup": "supervised baseline (stage sup)", "semi": f"{args.method} (stage semi)"}
    say("")
    for stage, r in run.results.items():
        teacher = f", teacher {r['ema_top1']:.2f}" if "ema_top1" in r else ""
        say(f"{names[stage]:<34} top-1 {r['top1']:6.2f}  top-5 {r['top5']:6.2f}{teacher}"
            f"   {r['updates']} updates, {r['seconds']:.0f} s")  # fmt: skip
    if {"sup", "semi"} <= run.results.keys():
        say(f"{'gain':<34}       {run.results['semi']['top1'] - run.results['sup']['top1']:+6.2f}")
    say(report.band(Path(__file__).parent / "docs" / "bands.json", run.recipe))
    say(f"in {run.folder}: curves.png, views.png, log.jsonl, model.safetensors")
    if args.predict:
        view = T.Compose(view_lists(run.views, run.image_size, settings[last])["evaluate"])
        predict(args.predict, model, data.classes, view, run, run.folder)
    run.log.close()


def draw_views(data, split, s, args, run, count=10):
    """views.png: the same unlabelled pictures as the networks see them, and the labelled ones."""
    lists = view_lists(run.views, run.image_size, s)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(args.seed, "picture"))

        def look(name, positions):
            stream = Stream(f"picture/{name}", positions[:count], min(count, len(positions)), args.seed)
            seen, _ = next(stream_loader(data.train, [T.Compose(lists[name])], stream, start=0, stop=1))
            return to_model(*seen[0], run.stats.cpu())

        rows = {"labelled": look("labeled", split.labeled)}
        if len(split.unlabeled):
            shown = np.random.default_rng(args.seed).permutation(split.unlabeled)
            rows |= {name: look(name, shown) for name in ("weak", "strong")}
            if s.unlabeled_mix == "prob":
                n = len(rows["strong"])
                rows["mixed"], *_ = prob_pseudo_mixup(rows["strong"], torch.zeros(n, 1), torch.full((n,), 0.5),
                                                      cutmix_prob=s.unlabeled_cutmix)  # fmt: skip
    mean, std = run.stats.cpu() / 255
    report.contact_sheet({k: v * std + mean for k, v in rows.items()}, run.folder / "views.png", f"views of {args.dataset}")


def dry_run(args) -> str:
    """Two blocks: the run that these flags start, and the paper's row for this architecture and labels."""
    blocks = []
    for title, a in (("this run", args), ("the paper's row", paper_args(args))):
        blocks.append(f"== {title}: {a.dataset}, {a.arch}, {a.labels or 1:g}% of the labels, init {init_kind(a)}")
        number = paper_number(a)
        if title != "this run":
            blocks.append(f"   {command_of(a)}")
        if number is not None:
            blocks.append(f"   the paper's own result: {number} top-1 (Tables 1 to 8, 11)")
        if a.labels == 100:
            blocks.append("   100% of the labels: quoted by the paper, which gives no recipe for it")
            continue
        size, patches, _, classes = DATASETS[a.dataset]
        size, classes = a.image_size or size, classes or 1000
        images, labeled = known_size(a)
        for stage in STAGES:
            if a.stage not in ("all", stage) or (a.method == "sup" and stage == "semi"):
                continue
            s = derive(a, stage, 1)
            with torch.device("meta"):
                model = build_model(a, classes, s.drop_path)
            flops, kept = report.forward_cost(model, (2, 3, size, size))
            flops, kept, count = flops / 2, kept / 2, sum(p.numel() for p in model.parameters())
            n_u = s.batch_size * s.unlabeled_ratio
            hidden = {"sources", "micro_batch"} | (SEMI_ONLY if stage == "sup" else set())
            values = {k: v for k, v in vars(s).items() if k not in hidden}
            blocks.append(report.settings_table(f"stage {stage}", values, s.sources))
            steps = max(1, (labeled // s.batch_size if stage == "sup" else (images - labeled) // n_u)) if images else None
            train = 3 * flops * (s.batch_size + n_u) + flops * n_u  # backward costs two forwards
            memory = 20 * count + kept * (s.batch_size + n_u) / args.accum_steps
            blocks.append(f"  parameters {count:,} ({sum(p.numel() for p in model.parameters() if p.requires_grad):,} trained)\n"
                          f"  per update {s.batch_size} labelled + {n_u} unlabelled images"
                          + (f", {steps} updates per epoch, {steps * s.epochs:,} in all" if steps else "") + "\n"
                          f"  per update {train / 1e12:.4g} TFLOP; memory about {memory / 2**30:.1f} GiB in float32, "
                          f"{(20 * count + (memory - 20 * count) / 2) / 2**30:.1f} GiB in 16 bit, one process")  # fmt: skip
    return "\n".join(blocks)


def known_size(args) -> tuple[int, int]:
    """(training images, labelled ones), where they are known without the data; else (0, 0)."""
    total, classes = {"digits": (8000, 10), "cifar10": (50000, 10), "cifar100": (50000, 100), "food101": (75750, 101),
                      "inat2019": (265213, 1010), "imagenet": (1281167, 1000)}.get(args.dataset, (0, 1))  # fmt: skip
    exact = {("imagenet", 1): 12820, ("imagenet", 10): 128118}  # App. A, Dataset Sampling
    percent = args.labels or (1 if args.dataset == "digits" else 10)
    return total, args.num_labels or exact.get((args.dataset, percent), round(total * percent / 100))


# ===== 9. ENTRY POINT =============================================================================

if __name__ == "__main__":
    main(parse_args())
