"""S4Former (Hu et al., CVPR 2024, openaccess.thecvf.com): semi-supervised segmentation with a ViT.

  stage pretrain  digit scenes alone: the encoder learns to classify digits; elsewhere --init FILE
  stage sup       the labelled images alone                                     "Sup-Only", Table S1
  stage semi      everything; one step of it:                                    supp. Algorithm 1

  x_l --jitter--> student ------------------> z_l (main, 4 aux) --CE(., y_l)--> L_l + 0.4 L_aux --+
  x_u --jitter--> teacher --> z_T --max, argmax--> c, y (255 where c <= tau)                      |
  x_u --jitter--> student, attention + M(c) --> z_P --------------CE(., y)----> 1/2 L_P --+       |
      PASA: unsure patches look at unsure patches                                         |       |
  the same --CutMix--> PatchShuffle --> encoder --> tiles back --> decoder --> z_A    +-> L_u -+
      z_A --CE(., mixed y)--> 1/2 L_A,   --NCR(., mixed z_T) without class y--> 1/2 L_N --+
  teacher <- m teacher + (1 - m) student                            L = L_l + 0.4 L_aux + beta L_u

Notation  x_l, x_u labelled, unlabelled images; K classes; z logits (N, K, H, W); y a pixel's class,
          255: none; c confidence; tau threshold; C_j share of sure pixels in patch j; M (N, Q, Q)
          added to the attention scores, row: query, column: key; alpha its strength; Eq. n is the
          n-th equation of the supplement (Eq. 1 to 4 masks, Eq. 5 and 6 losses to compare with)
          beta weight of L_u (--lambda-u); m EMA decay (--ema-decay)

How to run
  python s4former.py                                        30 labelled digit scenes, minutes
  python s4former.py --data-path DIR --init deit_base.pth --predict NEW     images/, masks/
  python s4former.py --arch mit_b4 --dataset cityscapes --dry-run           which recipe, what cost
  torchrun --nproc-per-node 2 s4former.py --dataset voc --data-path DIR --init deit_base.pth \\
      --labels-file splits/pascal/92/labeled.txt

  The paper's rows (--dataset voc --data-path DIR --init FILE --labels-file LIST), mIoU as it states
    --method sup           92 images 67.7    1464 images 82.5       Table S1, SETR, DeiT-B
    --method base                    75.8                83.9
    --method s4former                80.1                85.0
    --method unimatch --with-ours    79.3                84.7
    --method augseg --with-ours      80.3                84.6
    --method base --shuffle 0.5 --pasa ours          79.6 (92)      Table S2: any combination
    --method mean_teacher --strong classmix          77.0 (92)      Table S3: any strong view
    --arch vit_large       92 images 77.6                           Table S4
    --arch deeplabv3plus_r101 --method fixmatch --ncr ncr   60.7    Table S5

Departures. D1 to D15, where the paper (of which we have the supplement) and the authors' code
disagree, are the table DEPARTURES below, chosen with --follow. The rest, decided once:
  E1  The code crops unlabelled images with the help of their masks (cat_max_ratio). Here nothing
      opens those masks (of the digit scenes: two logged numbers); no switch. One exception: in a
      folder without classes.txt every mask is opened once, before training, to count the classes.
  E2  Single-branch methods (no PASA) weigh L_A by 1: as released they train supervised only.
      fixmatch (Table S5) is not UniMatch's baseline to the letter: that halves L_l + L_u, divides
      by the valid pixels, does not jitter the teacher's view and has other distortions and boxes.
  E3  UniMatch + Ours: the supplement has one sentence, that PASA replaces feature dropout. Streams
      and weights are those of the code, but a box is filled from the other image (there all
      around it is). The teacher is the EMA teacher; the code's is not released.
  E4  AugSeg: labelled pixels pasted into a scene carry their label; NCR skips them (no z_T there).
      Its random intensity operations are in AugSeg's own code alone; the distortion stays.
  E5  Mix/UnMix is not in the released code: tiles at one place are permuted among the images of a
      process and put back before the decoder. CutOut is: its result is never used; here it is.
  E6  ViT-L has the four auxiliary heads of DeiT-B: the paper does not say.
  E7  DeepLabV3+: 384 pixels, not 321, so that tiles of 128 fit; torchvision's ASPP (Dropout where
      UniMatch's has Dropout2d). MiT's norms after patches and reductions have NVlabs' eps 1e-5,
      the code's 1e-6.
  E8  The classifier stands before the last bilinear upsampling: the two commute, at a quarter
      of the arithmetic. PASA's mask goes once through torch's attention, broadcast over heads.
  E9  T is the number of updates, 80,000; the code's schedule has T = 80,001.
  E10 BatchNorm normalises by the images of one process (SyncBatchNorm on GPUs), and each student
      pass by itself; running statistics are averaged over the processes.
  E11 Equally confident patches: the earlier one counts as the more confident.
  E12 The class token's query counts as unsure, with confidence 0; no query is pushed towards it.
  E13 vit_digits, the scenes and stage pretrain are ours.
  E14 On the paper's data (voc, cityscapes, coco) stage semi starts from --init, as in Algorithm 1
      and the code, and stage sup is a baseline beside it; --stage semi leaves that out. Elsewhere
      stage semi goes on from stage sup: short runs need a teacher that knows something.

--accum-steps: CutMix partners, BatchNorm statistics and the coin of CutMix are then of a part.
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
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import build_sincos2d_pos_embed
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import tv_tensors
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.transforms.v2 import Compose
from torchvision.transforms.v2 import functional as TF

from common import charts, checkpoint, class_names, flags, log, report, weights
from common.amp import Precision, pick_device
from common.class_names import IGNORE
from common.data import load_dataset
from common.ema import Ema
from common.mask_splits import choose_split
from common.mask_views import (
    colours,
    confusion,
    iou,
    overlay,
    pair_eval_loader,
    pair_loader,
    save_mask,
    windows,
)
from common.masks import Pairs, PairSet, load_pairs
from common.pictures import BadImages, find_pictures, pictures_at, read_or_next
from common.split_lists import list_name
from common.splits import UserError
from common.streams import Stream, seed_of, stream_loader

# ===== 1. CONFIG  (supp. S1.2; authors' configs) ==================================================

SCRIPT = "s4former"
STAGES = ("pretrain", "sup", "semi")
OURS = dict(shuffle=0.5, pasa="ours", ncr="ncr")  # image, feature and output end
METHODS = {  # what each changes in stage semi                                [Tables S1, S3 and S5]
    "sup": {},  # no stage semi
    "fixmatch": dict(ema_decay=0.0, strong="cutmix"),  # m = 0: the teacher is the student
    "mean_teacher": {},
    "base": dict(strong="cutmix"),
    "s4former": dict(strong="cutmix", **OURS),
    "unimatch": dict(strong="cutmix"),
    "augseg": dict(strong="adaptive"),
}


def _setr(dim, depth, heads, outputs, name=None, patch=16, width=256, aux=4, **more):
    """A ViT with SETR-PUP's decoder: as many upsamplings by 2 as the patch needs."""
    vit = dict(embed_dim=dim, depth=depth, num_heads=heads, patch_size=patch, outputs=outputs,
               **more)
    return dict(family="vit", encoder=vit, width=width, aux=aux, stride=patch, timm=name)


def _mit(depths, dims=(64, 128, 320, 512)):
    mit = dict(depths=depths, embed_dims=dims)
    return dict(family="mit", encoder=mit, width=256, stride=32, timm=None)


ARCHS = {
    "vit_digits": _setr(64, 4, 4, (3,), patch=8, width=32, aux=0, small=True),
    "deit_tiny": _setr(192, 12, 3, (4, 7, 9, 11), "deit_tiny_patch16_224"),
    "deit_small": _setr(384, 12, 6, (4, 7, 9, 11), "deit_small_patch16_224"),
    "deit_base": _setr(768, 12, 12, (4, 7, 9, 11), "deit_base_patch16_224"),
    "vit_large": _setr(1024, 24, 16, (9, 14, 19, 23), "vit_large_patch16_224.augreg_in21k"),
    "mit_b0": _mit((2, 2, 2, 2), (32, 64, 160, 256)),
    "mit_b1": _mit((2, 2, 2, 2)),
    "mit_b2": _mit((3, 4, 6, 3)),
    "mit_b3": _mit((3, 4, 18, 3)),
    "mit_b4": _mit((3, 8, 27, 3)),
    "mit_b5": _mit((3, 6, 40, 3)),
    "deeplabv3plus_r101": dict(family="deeplab", encoder={}, width=256, stride=16, timm=None),
}
DATASETS = {  # crop, (long, short) side that ratio 1 is scaled to, classes, train images
    "digits": (64, (64, 64), 11, 1000),
    "voc": (512, (2048, 512), 21, 10582),
    "cityscapes": (768, (2049, 1025), 19, 2975),
    "coco": (512, (2048, 512), 81, 118287),
    "camvid": (256, (480, 360), 11, 367),
    "folder": (512, (2048, 512), None, None),
}
SCENES = dict(  # the digit scenes: found with the recipe, see docs/results.md
    train=1000, val=300,
    digits=(2, 4),  # in a scene, each in a quarter of its own
    fat=5,  # a mask is the stroke, made so many pixels wide
)
LOOK = dict(  # of the scenes; shares are of the picture's side
    side=(0.48, 0.656), rotation=12.0, shift=0.08,  # a digit's 28 x 28 frame; degrees; off-centre
    texture=0.2, tint=0.4, noise=0.04)  # of the ground; of a digit's colour; of every pixel
LOOK_PRETRAIN = dict(  # tamer: what stage pretrain learns must not be all that there is to learn
    side=(0.525, 0.656), rotation=8.0, shift=0.06, texture=0.15, tint=0.3, noise=0.02)


def _by(default, **of_stage):
    return dict.fromkeys(STAGES, default) | of_stage


SETTINGS = {  # name: (type, default of each stage, help); a recipe row or a flag changes them
    "iterations": (int, _by(80000), "updates; there are no epochs [supp. S1.2]"),
    "epochs": (float, _by(None), "instead of --iterations: passes over the unlabelled images in "
        "semi, labelled ones in sup, digits in pretrain [UniMatch's recipes]"),
    "batch_size": (int, _by(8),
        "labelled images per update, over all processes and parts [supp. S1.2: 8 + 8]"),
    "unlabeled_ratio": (int, _by(0, semi=1), "N_u / N_l [supp. S1.2: 1]"),
    "optimizer": (str, _by("sgd"), "sgd (momentum 0.9), adamw or adam [supp. S1.2; D9]"),
    "lr": (float, _by(1e-3), "of the encoder; pseudo_acc that falls early: too large "
        "[supp. S1.2: 1e-3 SETR, 6e-5 SegFormer]"),
    "head_lr_scale": (float, _by(10.0), "times this for decoder and heads [supp. S1.2: 10]"),
    "min_lr": (float, _by(1e-4), "floor of the decay, of both groups [authors' code]"),
    "power": (float, _by(0.9), "of the polynomial decay [authors' code]"),
    "warmup_iterations": (int, _by(0), "linear warm-up from a millionth [authors' code]"),
    "warmup_epochs": (float, _by(None), "instead of --warmup-iterations [UniMatch's recipes]"),
    "weight_decay": (float, _by(0.0), "with adamw and adam not on norms [authors' code]"),
    "drop_path": (float, _by(0.0), "stochastic depth of ViT and MiT [NVlabs: 0.1 for MiT]"),
    "aux_weight": (float, _by(0.4), "of each auxiliary head's CE [authors' code]"),
    "freeze_bn": (int, _by(0), "1: BatchNorm keeps the running statistics that it starts with; for "
        "very small batches [README]"),
    "scale_min": (float, _by(0.5), "smallest random scale [authors' code]"),
    "scale_max": (float, _by(2.0), "largest random scale [authors' code]"),
    "flip": (float, _by(0.5), "share of mirrored images [authors' code]"),
    "cat_max_ratio": (float, _by(0.75), "labelled crops: redrawn while one class has more; 1: "
        "never [authors' code]"),
    "weak_jitter": (int, _by(1), "1: the teacher's view is jittered too [authors' code]"),
    "tau": (float, _by(0.95), "a pixel is labelled where the teacher is surer than this: too low "
        "teaches errors (kept_acc), too high starves (kept) [authors' code: 0.95]"),
    "lambda_u": (float, _by(1.0), "beta, weight of L_u [authors' code: 1]"),
    "ema_decay": (float, _by(0.999), "m; 0: FixMatch; 0.99 for a thousand updates [supp. S1.2]"),
    "strong": (str, _by("none"), "none, cutout, cutmix, mixunmix, classmix or adaptive; colour "
        "jitter is always on [Table S3]"),
    "strong_prob": (float, _by(0.5), "share of batches that it mixes [authors' code]"),
    "shuffle": (float, _by(0.0), "share of images whose tiles are permuted, PatchShuffle "
        "[Table S2; authors' code: 0.5]"),
    "shuffle_tile": (int, _by(128), "side of a tile in pixels [authors' code: 128]"),
    "pasa": (str, _by("off"), "off, ours, plain, rand, reverse1, reverse2 or product [Table S2; "
        "Eq. 1 to 4]"),
    "pasa_alpha": (float, _by(5.0), "alpha, added to the scores at most [authors' code: 5; "
        "supp. S1.3: 50 or 100 for product]"),
    "ncr": (str, _by("off"), "off, ncr, ncr_sq, all, all_sq, kl or kl_neg [Table S2; Eq. 6]"),
    "ncr_weight": (float, _by(0.5), "of each NCR term in L_u [supp. Algorithm 1]"),
    "pseudo": (str, _by("hard"), "hard: the teacher's class; soft [supp. S1.3]"),
    "alone": (float, _by(0.0), "share of stage pretrain in which each quarter of a scene is "
        "seen for itself [measured here]"),
    "eval_mode": (str, _by("whole"), "whole or slide [supp. S1.2: slide on Cityscapes]"),
    "eval_stride": (int, _by(512), "of sliding windows, in pixels; never more than the crop "
        "[authors' code]"),
}
SEMI_ONLY = set("""unlabeled_ratio weak_jitter tau lambda_u ema_decay strong strong_prob shuffle
    shuffle_tile pasa pasa_alpha ncr ncr_weight pseudo unlabeled_pool ncr_branches ncr_teacher
    pasa_conf pasa_rows pasa_mit_quirk teacher_init ema_first cutout_used soft_form""".split())
NOT_PRETRAIN = set("aux_weight scale_min scale_max flip cat_max_ratio".split())
ONLY_PRETRAIN = {"alone"}
CHOICES = dict(
    optimizer=("sgd", "adamw", "adam"), pseudo=("hard", "soft"), eval_mode=("whole", "slide"),
    strong=("none", "cutout", "cutmix", "mixunmix", "classmix", "adaptive"),
    pasa=("off", "ours", "plain", "rand", "reverse1", "reverse2", "product"),
    ncr=("off", "ncr", "ncr_sq", "all", "all_sq", "kl", "kl_neg"))

PASSES = dict(epochs="iterations", warmup_epochs="warmup_iterations")  # a length, and in updates

_SEGFORMER = dict(optimizer="adamw", lr=6e-5, min_lr=0.0, power=1.0, warmup_iterations=1500,
                  weight_decay=0.01, drop_path=0.1)
_CITY = dict(iterations=40000, eval_mode="slide")
_R101 = dict(epochs=80.0, weight_decay=1e-4, min_lr=0.0)
_DIGITS = dict(  # found on scenes of held-out training digits, see docs/results.md
    pretrain=dict(iterations=2000, alone=0.5, batch_size=16, optimizer="adamw", lr=1.5e-3,
                  weight_decay=0.05, min_lr=2e-5, warmup_iterations=50),
    sup=dict(iterations=600, lr=0.02),
    semi=dict(iterations=800, lr=0.02, tau=0.7, ema_decay=0.99, shuffle_tile=32, weak_jitter=0))
for _stage in ("sup", "semi"):
    _DIGITS[_stage] |= dict(min_lr=1e-4, warmup_iterations=50, scale_min=0.85, scale_max=1.25,
                            flip=0.0, cat_max_ratio=1.0)


def _both(source, **changes):
    return dict(sup=dict(changes), semi=dict(changes), source=source)


_S = "supp. S1.2; authors' code"
RECIPES = {  # (data set, arch's family, init, labels): {stage: settings that differ}
    ("voc", "vit", None, None): _both(_S),
    ("voc", "mit", None, None): _both(_S + " of Cityscapes", **_SEGFORMER),
    ("voc", "deeplab", None, None): _both("UniMatch's config, Table S5", **_R101),
    ("cityscapes", "vit", None, None): _both(_S, **_CITY),
    ("cityscapes", "mit", None, None): _both(_S, **_SEGFORMER, **_CITY),
    ("coco", "vit", None, None): _both(_S, iterations=160000),
    ("coco", "mit", None, None): _both(_S, **_SEGFORMER | dict(iterations=160000)),
    ("camvid", "vit", None, None): _both("not tuned yet", iterations=8000, shuffle_tile=64,
                                         ema_decay=0.99),
    ("camvid", None, None, None): _both("not tuned yet", **_SEGFORMER | dict(
        iterations=8000, shuffle_tile=64, ema_decay=0.99)),
    ("folder", "vit", None, None): _both("as VOC, shorter; not tuned", iterations=8000,
                                         ema_decay=0.99),
    ("folder", None, None, None): _both("as Cityscapes, shorter; not tuned", **_SEGFORMER | dict(
        iterations=8000, ema_decay=0.99)),
    ("digits", "vit", None, None): dict(_DIGITS, source="measured here"),
    ("digits", None, None, None): dict(_DIGITS, source="as for vit_digits; not tuned"),
    **{(name, None, None, None): _both("no row of the paper", iterations=_n)
       for name, _n in (("voc", 80000), ("cityscapes", 40000), ("coco", 160000))},
}

# The paper's own mIoU on the validation set of Pascal VOC, by number of labelled images
_CLASSIC, _BLEND = (92, 183, 366, 732, 1464), (662, 1323, 2646)
UNIMATCH_LISTS = {662: "1_16", 1323: "1_8", 2646: "1_4"}  # folders of the blend lists on VOC
LISTS = {f"UniMatch VOC classic {n}": n for n in _CLASSIC} | {  # common/known_splits.json
    f"UniMatch VOC blend {folder.replace('_', '/')}": n for n, folder in UNIMATCH_LISTS.items()}


def _row(text, numbers=_CLASSIC + _BLEND):
    return dict(zip(numbers, map(float, text.split())))


TABLE_S1 = {  # (arch, method, with ours)
    ("deeplabv3plus_r101", "sup", False): _row("50.7 59.1 65.0 70.6 74.1 67.5 71.1 74.2"),
    ("deit_base", "sup", False): _row("67.7 72.8 77.4 80.7 82.5 76.6 77.8 79.9"),
    ("deit_base", "base", False): _row("75.8 77.4 80.0 81.7 83.9 79.0 80.1 80.7"),
    ("deit_base", "base", True): _row("80.1 81.3 82.4 83.2 85.0 79.9 80.5 81.3"),
    ("deit_base", "unimatch", False): _row("76.2 77.6 80.6 82.5 83.6 78.3 80.5 80.5"),
    ("deit_base", "unimatch", True): _row("79.3 80.4 81.9 83.4 84.7 78.9 80.7 80.9"),
    ("deit_base", "augseg", False): _row("77.7 80.1 82.1 82.5 83.9 79.3 80.4 80.9"),
    ("deit_base", "augseg", True): _row("80.3 81.3 82.8 83.2 84.6 80.0 80.8 81.3"),
}
TABLE_S2 = {  # (shuffle, PASA, NCR) on Base
    (False, False, False): _row("75.8 77.4"), (True, False, False): _row("78.4 80.7"),
    (False, True, False): _row("77.9 79.4"), (False, False, True): _row("77.5 78.7"),
    (True, True, False): _row("79.6 81.1"), (False, True, True): _row("78.3 79.7"),
    (True, False, True): _row("79.6 79.3"), (True, True, True): _row("80.1 81.3"),
}
TABLE_S3 = {  # (strong view, shuffle), 92 labelled images
    ("none", False): 73.1, ("cutout", False): 73.5, ("cutmix", False): 75.8,
    ("mixunmix", False): 76.0, ("classmix", False): 77.0, ("none", True): 76.6,
    ("mixunmix", True): 78.0, ("classmix", True): 77.8, ("cutmix", True): 78.4,
}
TABLE_S4 = {  # ViT-L
    ("sup", False): _row("74.3 76.8 79.7"), ("base", False): _row("76.2 79.9 80.3"),
    ("base", True): _row("77.6 80.5 81.1"),
}
TABLE_S5 = {  # DeepLabV3+: (shuffle, NCR) on FixMatch
    (False, False): _row("64.5 73.0 75.6"), (True, False): _row("68.5 72.6 75.4"),
    (False, True): _row("60.7 69.4 74.6"),
}
PRODUCT = {50.0: 78.8, 100.0: 78.4}  # alpha of Eq. 4, PASA alone, 92 labelled images  [supp. S1.3]

PAPERS = ("voc", "cityscapes", "coco")  # the paper's data
_SEMI = dict(stage="semi")
DEPARTURES = {  # where, setting, recommended, paper, code (None: silent, as recommended), source
    "D1": (dict(_SEMI, method=("fixmatch", "mean_teacher", "base", "s4former", "augseg")),
           "ncr_branches", "aug", "both", "aug",
           "Algorithm 1 sums both branches; code: that of PASA is computed and dropped"),
    "D2": (dict(_SEMI, ncr="ncr"), "ncr", "ncr", "ncr_sq", "ncr",
           "All-CR (Eq. 6) is squared, NCR alike (our reading); code: root of the sum of squares"),
    "D3": (_SEMI, "ncr_teacher", "mixed", None, "unmixed",
           "code: z_T is not mixed with the image; in the box NCR, and with --pseudo soft the CE, "
           "compare unrelated pixels"),
    "D4": (_SEMI, "pasa_conf", "binary", "soft", "binary",
           "Algorithm 1: C is the largest probability; code: 1 where it exceeds tau"),
    "D5": (_SEMI, "pasa_rows", "half", "median", "half",
           "supp. S1.3: strictly above the median; code: exactly half of the patches"),
    "D6": (dict(_SEMI, family="mit", pasa="ours"), "pasa_mit_quirk", 0, 0, 1,
           "code: Reverse2's values, half of the rows counted from the second patch and shifted"),
    "D7": (_SEMI, "teacher_init", "copy", "copy", "separate",
           "Algorithm 1: theta_T = theta_S; code: another random decoder"),
    "D8": (dict(_SEMI, dataset=PAPERS), "tau", 0.95, None, 0.95, "no threshold in Algorithm 1"),
    "D9": (dict(family="mit", dataset=PAPERS), "optimizer", "adamw", "adam", "adamw",
           "supp. S1.2: Adam, whose weight decay is L2 in the gradient; code: AdamW"),
    "D10": (dict(_SEMI, family="vit", method="mean_teacher", dataset="voc"), "lr", 1e-3, 1e-3, 1e-2,
            "the released config of the mean teacher does not override 0.01"),
    "D11": (dict(family="vit", dataset=PAPERS), "min_lr", 1e-4, None, 1e-4, "code"),
    "D12": (dict(family="vit", dataset=PAPERS), "weight_decay", 0.0, None, 0.0, "code"),
    "D13": (_SEMI, "ema_first", 0, 0, 1,
            "code: before the forward; differs at the first and the last update alone"),
    "D14": (dict(_SEMI, strong="cutout"), "cutout_used", 1, 1, 0,
            "Table S3's row of CutOut; in the code its result is never used"),
    "D15": (dict(_SEMI, pseudo="soft"), "soft_form", "teacher", "label", "teacher",
            "Eq. 5 as printed: hard labels, temperature 2; code: CE to the teacher's softmax"),
}


def parse_args(argv=None):
    p = flags.Parser(prog=f"{SCRIPT}.py", description=__doc__.split("\n\n")[0],
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("what to train").add_argument
    add("--arch", choices=ARCHS, help="default vit_digits on digits, mit_b4 on cityscapes, else "
        "deit_base [supp. S1.2]")
    add("--method", choices=METHODS, default="s4former", help="sets --strong, --shuffle, --pasa, "
        "--ncr and --ema-decay, which still win [Tables S1, S3, S5]")
    add("--with-ours", action="store_true", help="PatchShuffle, PASA and NCR with --method "
        "unimatch or augseg [Table S1]")
    add("--stage", choices=("all", *STAGES), default="all",
        help="semi: from --init RUN or FILE; pretrain: digits alone [supp. S1.2]")
    add("--init", metavar="FILE", help="encoder weights: DeiT's, timm's, OpenMMLab's or MiT's "
        "files, a run of this project, or the word timm [supp. S1.2]")
    add("--follow", default="recommended", metavar="WHOM", help="recommended, paper, code, or a "
        "list such as D3=code,D5=paper, where the two disagree [table DEPARTURES]")
    add("--train-scenes", type=int, metavar="N", help="digit scenes to train on [table SCENES]")
    add("--val-scenes", type=int, metavar="N", help="digit scenes to validate on [table SCENES]")
    add("--compare", metavar="RUN", help="with --eval: this run's masks beside the other's, and "
        "the gain per class [supp. Figures S2, S4]")
    flags.add_data(p, DATASETS, "labelled percent of the images; default 3 on digits, else 12.5 "
                   "[supp. S2: 1/16 to 1/2]",
                   "images/{train,val}/ and masks/{train,val}/, perhaps images/unlabeled/; or the "
                   "data set as published [common/masks.py]",
                   "labelled images in all, instead of --labels [README]")
    flags.add_settings(p, SETTINGS, STAGES)
    flags.add_running(p, SCRIPT)
    args = p.parse_args(argv)
    flags.check(p, args)
    for name in ("train_scenes", "val_scenes"):
        if (getattr(args, name) or 1) < 1 or getattr(args, name) == 0:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    if args.with_ours and args.method not in ("unimatch", "augseg"):
        p.error(f"--with-ours: for --method unimatch or augseg; {args.method} needs none")
    if args.stage == "semi" and args.method == "sup":
        p.error("--stage semi, --method sup: no stage is left to train; choose another stage")
    for names in PASSES.items():
        if set.intersection(*(set(getattr(args, name) or ()) for name in names)):
            a, b = (f"--{name.replace('_', '-')}" for name in names)
            p.error(f"{a}, {b}: two lengths of one stage; keep one")
    if args.compare and not args.eval:
        p.error(f"--compare {args.compare}: needs --eval RUN")
    args.dataset = args.dataset or ("folder" if args.data_path else "digits")
    arch = dict(digits="vit_digits", cityscapes="mit_b4").get(args.dataset, "deit_base")
    args.arch = args.arch or arch
    return args


def percent(args):
    """--labels, or its default; None where an absolute count or a list was given."""
    if args.num_labels or args.labels_file:
        return None
    return args.labels or (3 if args.dataset == "digits" else 12.5)


def image_size(args) -> int:
    """Side of a training crop in pixels."""
    if args.arch.startswith("deeplab") and args.dataset == "voc":
        return args.image_size or 384  # E7
    return args.image_size or DATASETS[args.dataset][0]


def stages_of(args) -> list[str]:
    """What these flags train, in order; stages of no updates are still among them."""
    if args.stage != "all":
        return [args.stage]
    first = ["pretrain"] if args.dataset == "digits" and not args.init else []
    return [*first, "sup"] + ["semi"] * (args.method != "sup")


def semi_goes_on(args) -> bool:
    """Whether stage semi starts from the end of stage sup, or from --init as that did (E14)."""
    return args.dataset not in PAPERS


def recipe(args):
    """(key, row): the most special row of RECIPES for these flags."""
    family = ARCHS[args.arch]["family"]
    if args.dataset == "digits" and args.arch != "vit_digits":
        family = None
    key = (args.dataset, family, None, None)
    key = key if key in RECIPES else (args.dataset, None, None, None)
    return key, RECIPES[key]


def derive(args, stage: str, world_size: int) -> SimpleNamespace:
    """All settings of a stage, with `sources` and one process's share. Raises UserError."""
    arch, (_, row) = ARCHS[args.arch], recipe(args)
    silent = {name: value for _, name, value, *_ in DEPARTURES.values() if name not in SETTINGS}
    layers = [("default [table DEPARTURES]", dict(silent, unlabeled_pool="rest")),
              (row["source"], row.get(stage, {}))]
    if stage == "semi":
        layers += [(f"--method {args.method}", METHODS[args.method])]
        layers += [("--with-ours", OURS)] if args.with_ours else []
    facts = dict(dataset=args.dataset, family=arch["family"], stage=stage, method=args.method)
    for name in ("ncr", "strong", "pseudo", "pasa"):  # what a departure may depend on
        usual = {k: v for _, changes in layers for k, v in changes.items()}.get(name)
        facts[name] = (getattr(args, name) or {}).get(stage, usual or SETTINGS[name][1][stage])
    ignored = (SEMI_ONLY if stage != "semi" else set()) | (
        NOT_PRETRAIN if stage == "pretrain" else ONLY_PRETRAIN)
    s = flags.resolve(SETTINGS, stage, layers, DEPARTURES, facts, args, ignored)
    for epochs, updates in PASSES.items():
        if stage in (getattr(args, updates) or ()):  # a flag, against the passes of a recipe
            setattr(s, epochs, None)
    if args.unlabeled_pool:
        s.unlabeled_pool, s.sources["unlabeled_pool"] = args.unlabeled_pool, "--unlabeled-pool"
    check_settings(s, stage, args, arch)
    parts = world_size * args.accum_steps
    s.micro_batch = s.batch_size // parts
    if s.batch_size % parts:
        raise UserError(f"--batch-size {s.batch_size} is not divisible by {world_size} processes x "
                        f"--accum-steps {args.accum_steps}")
    if arch["family"] == "deeplab" and s.micro_batch < 2:
        raise UserError(f"--batch-size {s.batch_size}: the pooling branch of {args.arch} needs two "
                        "images in a part for its BatchNorm")
    return s


def check_settings(s, stage, args, arch):
    """Raises UserError for values that name nothing, or that do not fit together."""
    def flag(name):
        return f"--{name.replace('_', '-')} {getattr(s, name)}"

    for name, allowed in CHOICES.items():
        if getattr(s, name) not in allowed:
            raise UserError(f"{flag(name)}: one of {', '.join(allowed)}")
    least = dict(iterations=0, batch_size=1, unlabeled_ratio=int(stage == "semi"), shuffle_tile=1,
                 warmup_iterations=0, eval_stride=1)
    for name, value in least.items():
        if getattr(s, name) < value:
            raise UserError(f"{flag(name)}: at least {value}")
    for name in ("shuffle", "strong_prob", "flip", "alone", "tau"):
        if getattr(s, name) > 1:
            raise UserError(f"{flag(name)}: from 0 to 1")
    if not 0 < s.scale_min <= s.scale_max:
        raise UserError(f"{flag('scale_min')}, {flag('scale_max')}: above 0 and in this order")
    if s.min_lr > s.lr:
        raise UserError(f"{flag('lr')}: below its floor, {flag('min_lr')}; give both")
    if stage == "semi" and args.method == "augseg" and (s.pseudo, s.soft_form) == (
            "soft", "teacher"):
        raise UserError("--pseudo soft: --method augseg pastes labelled pixels, of which the "
                        "teacher says nothing; choose another --method")
    if s.drop_path and arch["family"] == "deeplab":
        raise UserError(f"{flag('drop_path')}: {args.arch} has none")
    size, tile = image_size(args), s.shuffle_tile
    if size % arch["stride"]:
        raise UserError(f"--image-size {size}: no multiple of {arch['stride']}, the coarsest grid "
                        f"of {args.arch}")
    tiled = stage == "semi" and (s.shuffle > 0 or s.strong == "mixunmix")
    if tiled and (size % tile or tile % arch["stride"]):
        raise UserError(f"--shuffle-tile {tile}: must divide --image-size {size} and be a multiple "
                        f"of {arch['stride']}, the coarsest grid of {args.arch}")
    if stage == "semi" and s.pasa != "off" and arch["family"] == "deeplab":
        raise UserError(f"--pasa {s.pasa}: {args.arch} has no attention; choose --pasa off")
    if stage == "semi" and (args.method == "augseg") != (s.strong == "adaptive"):
        raise UserError(f"--strong {s.strong}: adaptive CutMix is what --method augseg does, and "
                        "no other")


def unlabeled_passes(args, s) -> int:
    """Passes of the student over unlabelled images in a step, for each labelled image of it."""
    return s.unlabeled_ratio * (3 if args.method == "unimatch" else 1 + (s.pasa != "off"))


def in_updates(s, images: int | None):
    """Where --epochs or --warmup-epochs is given: that many passes over so many images; None: not
    known without the data, and so are the updates."""
    batch = s.batch_size * max(1, s.unlabeled_ratio)
    per_pass = None if images is None else max(1, images // batch)
    for epochs, updates in PASSES.items():
        if getattr(s, epochs) is not None:
            setattr(s, updates, per_pass and round(getattr(s, epochs) * per_pass))
            s.sources[updates] = f"{getattr(s, epochs):g} x {per_pass or 'a pass'}"


# ===== 2. DATA  (authors' configs; the digit scenes are ours) =====================================


class RandomScale:
    """Resize so that (long, short) x ratio bounds the two sides, ratio uniform in [low, high)."""

    def __init__(self, bounds: tuple[int, int], low: float, high: float):
        self.bounds, self.low, self.high = bounds, low, high

    def __call__(self, image, mask):
        ratio = random.uniform(self.low, self.high)
        height, width = image.shape[-2:]
        long, short = (int(side * ratio) for side in self.bounds)
        factor = min(long / max(height, width), short / min(height, width))
        size = [max(1, int(side * factor + 0.5)) for side in (height, width)]
        # OpenCV's resizing, that of the authors, is not antialiased
        return (TF.resize(image, size, TF.InterpolationMode.BILINEAR, antialias=False),
                TF.resize(mask, size, TF.InterpolationMode.NEAREST))


class RandomCrop:
    """At most size x size; labelled images: up to ten redraws until no class, so not a lone one
    either, has more than a share cat_max_ratio of the valid pixels. 1: no look at the mask (E1)."""

    def __init__(self, size: int, cat_max_ratio: float = 1.0):
        self.size, self.cat_max_ratio = size, cat_max_ratio

    def __call__(self, image, mask):
        for _ in range(11 if self.cat_max_ratio < 1 else 1):
            top, left = (random.randint(0, max(0, side - self.size)) for side in image.shape[-2:])
            box = top, left, *(min(side, self.size) for side in image.shape[-2:])
            cut = TF.crop(mask, *box)
            if self.cat_max_ratio < 1:
                counts = torch.bincount(cut.flatten().long(), minlength=256)[:IGNORE]
                if counts.max() / counts.sum() < self.cat_max_ratio:
                    break
        return TF.crop(image, *box), cut


class RandomFlip:
    def __init__(self, share: float):
        self.share = share

    def __call__(self, image, mask):
        if random.random() < self.share:
            return TF.horizontal_flip(image), TF.horizontal_flip(mask)
        return image, mask


def to_bytes(values: Tensor) -> Tensor:
    """What a cast of OpenCV's float images to bytes does: clipped, then cut off."""
    return values.clamp(0, 255).to(torch.uint8)


def photometric(image: Tensor) -> Tensor:
    """Photometric distortion [authors' code] of (3, H, W) bytes; each step with probability 0.5.

    Brightness is added, up to 32; contrast comes first or last; saturation is that of HSV; hue
    turns by up to 36 degrees. torchvision's RandomPhotometricDistort is another thing in each.
    """
    def coin():
        return random.random() < 0.5

    if coin():
        image = to_bytes(image + random.uniform(-32, 32))
    contrast_first = coin()
    if contrast_first and coin():
        image = to_bytes(image * random.uniform(0.5, 1.5))
    if coin():  # V = max stays, the distance of the others to it grows with the saturation
        value = image.float().amax(0, keepdim=True)
        image = to_bytes(value - (value - image) * random.uniform(0.5, 1.5))
    if coin():
        image = TF.adjust_hue(image, random.randint(-18, 17) / 180)
    if not contrast_first and coin():
        image = to_bytes(image * random.uniform(0.5, 1.5))
    return image


class Looks:
    """Last step of a training view: some looks at one crop, each jittered by itself or not.

    Returns (3, S, S) uint8 a look, padded below and on the right; the extent (2,) height and width
    of what is no padding; the mask (S, S) uint8, 255 in the padding.
    """

    def __init__(self, size: int, jitter: tuple[bool, ...]):
        self.size, self.jitter = size, jitter

    def __call__(self, image, mask):
        plain, height, width = image.as_subclass(Tensor), *image.shape[-2:]
        room = (0, self.size - width, 0, self.size - height)
        looks = [F.pad(photometric(plain) if on else plain, room) for on in self.jitter]
        return *looks, torch.tensor([height, width]), F.pad(mask[0], room, value=IGNORE)


class Whole:
    """Last step of the evaluation view: the picture, its extent, the mask at its own size."""

    def __init__(self, bounds=None):
        self.resize = RandomScale(bounds, 1.0, 1.0) if bounds else None

    def __call__(self, image, mask):
        if self.resize:
            image, _ = self.resize(image, mask)
        return image.as_subclass(Tensor), torch.tensor(image.shape[-2:]), mask[0]


class FromPIL:
    """First step: picture and mask as tensors; without a mask all pixels are to be ignored."""

    def __call__(self, picture, mask):
        image = tv_tensors.Image(TF.pil_to_tensor(picture))
        ids = TF.pil_to_tensor(mask) if mask is not None else torch.full_like(image[:1], IGNORE)
        return image, tv_tensors.Mask(ids)


def view_lists(dataset: str, size: int, s, looks: int = 2) -> dict[str, list]:
    """Each view as a list, in the order of the authors' configs. s: settings; looks: at an
    unlabelled crop, the first is the teacher's. Image and mask go through one draw."""
    bounds = DATASETS[dataset][1]
    if dataset == "digits":
        bounds = (size, size)
    scale, flip = RandomScale(bounds, s.scale_min, s.scale_max), RandomFlip(s.flip)
    weak = bool(getattr(s, "weak_jitter", 1))
    return dict(
        labeled=[FromPIL(), scale, RandomCrop(size, s.cat_max_ratio), flip, Looks(size, (True,))],
        unlabeled=[FromPIL(), scale, RandomCrop(size), flip,
                   Looks(size, (weak, *[True] * (looks - 1)))],
        evaluate=[FromPIL(), Whole(None if s.eval_mode == "slide" else bounds)],
    )


def to_model(images: Tensor, extent: Tensor, stats: Tensor) -> Tensor:
    """Bytes to normalised pictures, 0 in the padding [authors' code]; on the device.

    images (N, 3, H, W) uint8, extent (N, 2) height and width before padding, stats (2, 3, 1, 1)
    mean and std in bytes -> (N, 3, H, W) float32
    """
    x = (images.float() - stats[0]) / stats[1]
    rows = torch.arange(x.shape[2], device=x.device)[:, None] < extent[:, :1, None]  # (N, H, 1)
    columns = torch.arange(x.shape[3], device=x.device) < extent[:, 1:, None]  # (N, 1, W)
    return x * (rows & columns).unsqueeze(1)


# The digit scenes


def compose(digits: Tensor, labels: Tensor, size: int, of: dict, shown=None, g=None):
    """Scenes of four digits each, one in each quarter, on a textured ground.

    digits (N, 4, 28, 28) in [0, 1], labels (N, 4); of: LOOK or LOOK_PRETRAIN; shown (N, 4) bool, or
    None: all; g: a generator, or None
    returns pictures (N, 3, S, S) in [0, 1], masks (N, S, S) uint8: 0 ground, 1 + digit
    """
    n, device = len(digits), digits.device

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=g, device=device)

    coarse = F.interpolate(uniform(-0.5, 0.5, n, 3, 5, 5), size=size, mode="bicubic")
    fine = F.interpolate(uniform(-0.5, 0.5, n, 1, 16, 16), size=size, mode="bilinear")
    picture = (0.25 + of["texture"] * (coarse + fine)).clamp(0, 1)
    mask = torch.zeros(n, size, size, dtype=torch.uint8, device=device)
    side = uniform(*of["side"], n, 4)
    angle = uniform(-1, 1, n, 4) * math.radians(of["rotation"])
    k = torch.arange(4, device=device)  # a list would be copied to a GPU, which waits for it
    quarter = torch.stack([k % 2, k // 2], 1) - 0.5  # (4, 2): x, y of each quarter's middle
    centre = quarter + 2 * of["shift"] * uniform(-1, 1, n, 4, 2)  # x, y in [-1, 1]
    colour = 1.0 - uniform(0.0, of["tint"], n, 4, 3)
    # affine_grid maps a place of the scene to one of the digit: turn, then magnify by 1 / side
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], -1).view(n, 4, 2, 2)
    turn = turn / side[..., None, None]
    theta = torch.cat([turn, -turn @ centre.unsqueeze(-1)], -1).flatten(0, 1)  # (4N, 2, 3)
    grid = F.affine_grid(theta, (4 * n, 1, size, size), align_corners=False)
    ink = F.grid_sample(digits.flatten(0, 1).unsqueeze(1), grid, align_corners=False)
    fat = F.max_pool2d(ink, SCENES["fat"], 1, SCENES["fat"] // 2)
    ink, fat = ink.view(n, 4, size, size), fat.view(n, 4, size, size)
    for k in range(4):
        on = ink[:, k] if shown is None else ink[:, k] * shown[:, k, None, None]
        picture = torch.lerp(picture, colour[:, k, :, None, None].expand_as(picture),
                             on.unsqueeze(1))
        here = fat[:, k] > 0.4 if shown is None else (fat[:, k] > 0.4) & shown[:, k, None, None]
        mask = torch.where(here, (1 + labels[:, k, None, None]).to(torch.uint8), mask)
    noise = torch.randn(picture.shape, generator=g, device=device)
    return (picture + of["noise"] * noise).clamp(0, 1), mask


def scenes(images, count: int, size: int, seed: int, name: str) -> Pairs:
    """count scenes in memory, made of the digits in `images` (common.pictures.Images); the same
    for one seed."""
    g = torch.Generator().manual_seed(seed)
    pixels, masks = [], []
    for first in range(0, count, 250):
        n = min(250, count - first)
        chosen = torch.randint(len(images), (n, 4), generator=g)
        number = torch.randint(SCENES["digits"][0], SCENES["digits"][1] + 1, (n, 1), generator=g)
        shown = torch.rand(n, 4, generator=g).argsort(1) < number
        digits = torch.from_numpy(images.pixels[chosen.numpy()]).float() / 255
        labels = torch.from_numpy(images.targets[chosen.numpy()])
        picture, mask = compose(digits, labels, size, LOOK, shown, g)
        pixels.append((255 * picture).round().byte().permute(0, 2, 3, 1).numpy())
        masks.append(mask.numpy())
    ids = np.array([f"{name}/{k:05d}".encode() for k in range(count)])
    return Pairs(ids, 11, pixels=np.concatenate(pixels), masks=np.concatenate(masks))


def load_data(args) -> tuple[PairSet, object]:
    """Pictures with masks, and the single digits for stage pretrain (None elsewhere)."""
    if args.dataset != "digits":
        return load_pairs(args.dataset, args.data_path, seed=args.split_seed,
                          holdout=args.holdout), None
    # --holdout N: N scenes of 1,000 training digits that no scene of training then shows
    digits = load_dataset("digits", None, seed=args.split_seed, holdout=1000 * bool(args.holdout))
    size, judged = image_size(args), args.holdout or args.val_scenes or SCENES["val"]
    data = PairSet(scenes(digits.train, args.train_scenes or SCENES["train"], size, 0, "train"),
                   scenes(digits.val, judged, size, 1, "val"),
                   class_names.DIGITS, class_names.palette("digits"))
    return data, digits


def one_digit(picture) -> Tensor:
    """The view of stage pretrain: (28, 28) uint8."""
    return TF.pil_to_tensor(picture)[0]


# ===== 3. MODEL  (supp. S1.2; authors' code) ======================================================


def resize_pos_embed(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embedding (1, 1 + h w, D) for another grid: bilinear, not antialiased [authors'
    code]; timm's own is bicubic. The class token's entry stays."""
    if tuple(old) == tuple(new):
        return table
    grid = table[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), new, mode="bilinear", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)], 1)


class ViT(VisionTransformer):
    """timm's ViT; returns the raw tokens after some blocks, (N, D, h, w) each.

    mask (N, 1 + P, 1 + P): added to the scores of every head of every block, by torch's attention.
    Without the final norm DeiT-B has 86,433,024 parameters at 512 pixels, ViT-L 304,147,456.
    """

    tokens = 1  # the class token stands before the patches

    def __init__(self, size, outputs, small=False, **arguments):
        super().__init__(img_size=size, num_classes=0, global_pool="", final_norm=False,
                         dynamic_img_size=True, dynamic_img_pad=True,
                         weight_init="jax" if small else "", **arguments)
        self.outputs = list(outputs)
        if small:  # E13: with one 8 x 8 convolution a narrow ViT learns digits several times slower
            dim, halvings = self.embed_dim, round(math.log2(arguments["patch_size"]))
            widths = [3, *(dim >> k for k in range(halvings - 1, 0, -1)), dim]
            self.patch_embed.proj = nn.Sequential(
                *(conv_bn(a, b, 3, stride=2) for a, b in zip(widths, widths[1:])),
                nn.Conv2d(dim, dim, 1))
            table = build_sincos2d_pos_embed(self.patch_embed.grid_size, dim)
            self.pos_embed.data[0, 1:] = 0.5 * table.to(self.pos_embed.device)

    def _pos_embed(self, x):  # (N, h, w, D)
        table = resize_pos_embed(self.pos_embed, self.patch_embed.grid_size, x.shape[1:3])
        first = self.cls_token.expand(len(x), -1, -1)
        return torch.cat([first, x.flatten(1, 2)], 1) + table

    def forward(self, x, mask=None):
        mask = None if mask is None else mask.unsqueeze(1)  # (N, 1, Q, Q): the same for all heads
        return self.forward_intermediates(x, self.outputs, norm=False, intermediates_only=True,
                                          attn_mask=mask)


class MiT(PyramidVisionTransformerV2):
    """SegFormer's encoder: timm's PVTv2 with MLPs four times as wide. B4: 60,842,688 parameters.

    Returns (N, C, H / r, W / r) for r = 4, 8, 16, 32. mask (N, P, P): in the last stage alone,
    where attention is over the patches themselves [authors' code].
    """

    tokens = 0

    def __init__(self, depths, embed_dims, drop_path_rate=0.0):
        super().__init__(num_classes=0, depths=depths, embed_dims=embed_dims,
                         num_heads=(1, 2, 5, 8), mlp_ratios=(4, 4, 4, 4),
                         drop_path_rate=drop_path_rate)

    def forward(self, x, mask=None):
        x, features = self.patch_embed(x), []
        for k, stage in enumerate(self.stages):
            x = stage(x) if mask is None or k < 3 else masked_stage(stage, x, mask)
            features.append(x)
        return features


def masked_stage(stage: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """A stage of timm's PVTv2 without spatial reduction, with a mask on its attention scores."""
    x = stage.downsample(x)  # (N, h, w, C)
    size, x = x.shape[1:3], x.flatten(1, 2)
    for block in stage.blocks:
        attn, normed = block.attn, block.norm1(x)
        heads = (*normed.shape[:2], attn.num_heads, attn.head_dim)
        q = attn.q(normed).view(heads).transpose(1, 2)
        k, v = (part.view(heads).transpose(1, 2) for part in attn.kv(normed).chunk(2, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, mask.unsqueeze(1).to(q.dtype))
        x = x + block.drop_path1(attn.proj(mixed.transpose(1, 2).flatten(2)))
        x = x + block.drop_path2(block.mlp(block.norm2(x), size))
    return stage.norm(x).transpose(1, 2).unflatten(2, size)


class ResNet101(nn.Module):
    """UniMatch's trunk: three convolutions in the stem, stride 16. 42,623,936 parameters."""

    tokens = 0

    def __init__(self):
        super().__init__()
        self.net = timm.create_model("resnet101", features_only=True, out_indices=(1, 4),
                                     output_stride=16, stem_type="deep", stem_width=64)

    def forward(self, x, mask=None):
        assert mask is None, "a ResNet has no attention"
        return self.net(x)


def retile(x: Tensor, source: Tensor, per_side: int) -> Tensor:
    """Tile k of the batch becomes tile source[k]; with source.argsort() all go back.

    x (N, C, H, W), cut into per_side x per_side tiles an image, numbered row by row, image after
    image; source (N * per_side^2,), a permutation: within images PatchShuffle, between them Mix.
    """
    n, c, h, w = x.shape
    p, th, tw = per_side, h // per_side, w // per_side
    tiles = x.view(n, c, p, th, p, tw).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, th, tw)[source]
    return tiles.view(n, p, p, c, th, tw).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def restore(feature: Tensor, source: Tensor | None, per_side: int) -> Tensor:
    """Feature restoration: the tiles of a feature map back to where they were in the image."""
    return feature if source is None else retile(feature, source.argsort(), per_side)


def conv_bn(dim: int, width: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(dim, width, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


class PUPHead(nn.Module):
    """SETR-PUP: norm, then convolutions, each followed by a bilinear upsampling.

    Main: as many x 2 as the patch needs. Auxiliary: two x 4. K = 21, 768 wide: 3,547,925 and
    2,367,253 parameters. Tiles go back before the norm: a 3 x 3 convolution would see wrong seams.
    """

    def __init__(self, dim, width, num_classes, index, stages, scale):
        super().__init__()
        self.index, self.scale = index, scale
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.convs = nn.ModuleList(conv_bn(width if k else dim, width, 3) for k in range(stages))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features, source=None, per_side=0):
        x = restore(features[self.index], source, per_side)
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for k, conv in enumerate(self.convs, 1):
            x = conv(x)
            if k == len(self.convs):
                x = self.classifier(x)  # E8
            x = F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return x


class SegFormerHead(nn.Module):
    """Every level to 256 channels and stride 4, joined. K = 21 after MiT-B4: 532,245 parameters."""

    def __init__(self, dims, width, num_classes):
        super().__init__()
        self.levels = nn.ModuleList(conv_bn(dim, width, 1) for dim in dims)
        self.fuse, self.dropout = conv_bn(len(dims) * width, width, 1), nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features, source=None, per_side=0):
        size = features[0].shape[-2:]
        levels = [restore(level(f), source, per_side) for level, f in zip(self.levels, features)]
        levels = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in levels]
        return self.classifier(self.dropout(self.fuse(torch.cat(levels, 1))))


class DeepLabHead(nn.Module):
    """DeepLabV3+: ASPP on the last features, joined with the first ones; 59,468,085 with ResNet."""

    def __init__(self, num_classes):
        super().__init__()
        self.aspp, self.reduce = ASPP(2048, (6, 12, 18), 256), conv_bn(256, 48, 1)
        self.fuse = nn.Sequential(conv_bn(304, 256, 3), conv_bn(256, 256, 3))
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def forward(self, features, source=None, per_side=0):
        low, high = (restore(f, source, per_side) for f in features)
        high, size = self.aspp(high), low.shape[-2:]
        high = F.interpolate(high, size, mode="bilinear", align_corners=True)
        z = self.classifier(self.fuse(torch.cat([self.reduce(low), high], 1)))
        return F.interpolate(z, [4 * side for side in size], mode="bilinear", align_corners=True)


class SegModel(nn.Module):
    """Encoder, decoder, auxiliary heads (supervised passes alone)."""

    def __init__(self, encoder, head, aux=()):
        super().__init__()
        self.encoder, self.head, self.aux = encoder, head, nn.ModuleList(aux)

    def forward(self, x, mask=None, source=None, per_side=0, aux=False, dropout=0.0):
        """x (N, 3, S, S) -> logits (N, K, h, w), h = S or S / 4; with aux a list, main first.

        mask: PASA's, (N, Q, Q); source, per_side: x was retiled so, put the features back;
        dropout: share of channels of every output of the encoder [UniMatch].
        """
        features = self.encoder(x, mask)
        if dropout:
            features = [F.dropout2d(f, dropout) for f in features]
        z = self.head(features, source, per_side)
        return [z, *(head(features) for head in self.aux)] if aux else z


class DigitClassifier(nn.Module):
    """Stage pretrain: the mean feature of each quarter of a picture names its digit."""

    def __init__(self, encoder, dim):
        super().__init__()
        self.encoder, self.norm, self.classifier = encoder, nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x, alone=False):
        """x (N, 3, S, S) -> (N, 4, 10); alone: a ViT's patch sees its own quarter and no more."""
        mask = None
        if alone and isinstance(self.encoder, ViT):
            h, w = self.encoder.patch_embed.grid_size
            row, column = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
            quarter = (2 * (2 * row // h)[:, None] + 2 * column // w).flatten()
            other = F.pad(quarter[:, None] != quarter, (1, 0, 1, 0), value=True)
            other[0, 0] = False  # nobody sees the class token, and it sees nobody
            mask = torch.where(other, -math.inf, 0.0).expand(len(x), -1, -1)
        feature = self.norm(self.encoder(x, mask)[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        h, w = feature.shape[-2:]
        if h % 2 or w % 2:
            means = F.adaptive_avg_pool2d(feature, 2)
        else:  # the same means, and with --deterministic a GPU has a backward pass for them
            means = F.avg_pool2d(feature, (h // 2, w // 2))
        return self.classifier(means.flatten(2).transpose(1, 2))


def build_encoder(args, drop_path: float = 0.0):
    """(encoder, channels of each output)."""
    arch = ARCHS[args.arch]
    if arch["family"] == "vit":
        return (ViT(image_size(args), drop_path_rate=drop_path, **arch["encoder"]),
                [arch["encoder"]["embed_dim"]] * len(arch["encoder"]["outputs"]))
    if arch["family"] == "mit":
        return MiT(**arch["encoder"], drop_path_rate=drop_path), list(arch["encoder"]["embed_dims"])
    return ResNet101(), [256, 2048]


def build_model(args, num_classes: int, drop_path: float = 0.0) -> SegModel:
    """Random weights. With K = 21: SETR, DeiT-B 99,449,961 parameters, 89,980,949 without the
    auxiliary heads; the paper gives no count. Init of the heads: authors' code."""
    arch = ARCHS[args.arch]
    encoder, dims = build_encoder(args, drop_path)
    aux = []
    if arch["family"] == "vit":
        stages = round(math.log2(arch["stride"]))
        head = PUPHead(dims[-1], arch["width"], num_classes, len(dims) - 1, stages, 2)
        aux = [PUPHead(dims[k], arch["width"], num_classes, k, 2, 4) for k in range(arch["aux"])]
    elif arch["family"] == "mit":
        head = SegFormerHead(dims, arch["width"], num_classes)
    else:
        head = DeepLabHead(num_classes)
    model = SegModel(encoder, head, aux)
    for part in (model.head, model.aux):
        for name, m in part.named_modules():
            if isinstance(m, nn.Conv2d) and name.endswith("classifier"):
                nn.init.normal_(m.weight, std=0.01)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return model


# Published formats: the keys to enter in turn, then patterns of parameter names with replacements
# (the first that fits a whole name wins; None drops it).
_MMLAB_BLOCK = r"(?:backbone\.)?layers\.(\d+)\."
_OLD_STAGE = [  # MiT: stages 1 to 4 there, 0 to 3 here
    pattern for s in (1, 2, 3, 4) for pattern in (
        (rf"block{s}\.(\d+)\.mlp\.dwconv\.dwconv\.(.*)",
         rf"stages.{s - 1}.blocks.\1.mlp.dwconv.\2"),
        (rf"block{s}\.(\d+)\.(.*)", rf"stages.{s - 1}.blocks.\1.\2"),
        (rf"norm{s}\.(.*)", rf"stages.{s - 1}.norm.\1"),
        (rf"patch_embed{s}\.(.*)",
         r"patch_embed.\1" if s == 1 else rf"stages.{s - 1}.downsample.\1"))]
_NEW_STAGE = [
    pattern for s in range(4) for pattern in (
        (rf"(?:backbone\.)?layers\.{s}\.0\.projection\.(.*)",
         r"patch_embed.proj.\1" if s == 0 else rf"stages.{s}.downsample.proj.\1"),
        (rf"(?:backbone\.)?layers\.{s}\.0\.norm\.(.*)",
         r"patch_embed.norm.\1" if s == 0 else rf"stages.{s}.downsample.norm.\1"),
        (rf"(?:backbone\.)?layers\.{s}\.2\.(.*)", rf"stages.{s}.norm.\1"),
        *((rf"(?:backbone\.)?layers\.{s}\.1\.(\d+)\.{theirs}", rf"stages.{s}.blocks.\1.{ours}")
          for theirs, ours in (
              (r"attn\.attn\.in_proj_(.*)", r"attn.qkv.\2"), (r"attn\.attn\.out_proj\.(.*)",
              r"attn.proj.\2"), (r"ffn\.layers\.0\.(.*)", r"mlp.fc1.\2"),
              (r"ffn\.layers\.1\.(.*)", r"mlp.dwconv.\2"), (r"ffn\.layers\.4\.(.*)", r"mlp.fc2.\2"),
              (r"(.*)", r"\2"))))]
_CLASSIFIER = (r"(?:backbone\.)?(?:norm|ln1)\.(weight|bias)|head(_dist)?\..*|fc\..*|dist_token|"
               r"fc_norm\..*", None)
FORMATS = {
    "deit": (["model"], [_CLASSIFIER]),
    "timm": ([], [_CLASSIFIER]),
    "mmlab": ([], [
        _CLASSIFIER,
        (r"(?:backbone\.)?(cls_token|pos_embed)", r"\1"),
        (r"(?:backbone\.)?patch_embed\.projection\.(.*)", r"patch_embed.proj.\1"),
        (_MMLAB_BLOCK + r"ln(\d)\.(.*)", r"blocks.\1.norm\2.\3"),
        (_MMLAB_BLOCK + r"attn\.(?:attn\.)?in_proj_(.*)", r"blocks.\1.attn.qkv.\2"),
        (_MMLAB_BLOCK + r"attn\.(?:attn\.)?out_proj\.(.*)", r"blocks.\1.attn.proj.\2"),
        (_MMLAB_BLOCK + r"attn\.(qkv|proj)\.(.*)", r"blocks.\1.attn.\2.\3"),
        (_MMLAB_BLOCK + r"ffn\.layers\.0\.0\.(.*)", r"blocks.\1.mlp.fc1.\2"),
        (_MMLAB_BLOCK + r"ffn\.layers\.1\.(.*)", r"blocks.\1.mlp.fc2.\2"),
        (r"(?:decode_head|auxiliary_head|ema).*", None)]),
    "mit": ([], [_CLASSIFIER, *_OLD_STAGE]),
    "mmlab_mit": ([], [(r"(?:decode_head|ema).*", None), *_NEW_STAGE]),
    "resnet": ([], [_CLASSIFIER, (r"(.*)", r"net.\1")]),  # UniMatch's resnet101.pth
    "run": (["model"], []),  # checkpoint.pt of this project
}


def detect_format(state: dict) -> tuple[str | None, dict]:
    """(key of FORMATS that a file's content has, or None; the dict in which the keys stand)."""
    if not isinstance(state, dict):
        return None, {}
    if "recipe" in state and isinstance(state.get("model"), dict):
        return "run", state
    outer = state
    if isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    keys = {str(k).removeprefix("backbone.") for k in state}
    if "layers.0.ln1.weight" in keys:
        return "mmlab", state
    if "layers.0.0.projection.weight" in keys:
        return "mmlab_mit", state
    if "patch_embed1.proj.weight" in keys:
        return "mit", state
    if "conv1.0.weight" in keys:
        return "resnet", state
    if "patch_embed.proj.weight" in keys:
        return "timm", state
    inner = outer.get("model")
    if isinstance(inner, dict) and "patch_embed.proj.weight" in inner:
        return "deit", outer
    return None, state


def split_qkv(new: dict) -> dict:
    """OpenMMLab's MiT keeps q, k and v in one matrix and MLPs as 1 x 1 convolutions."""
    out = {}
    for name, value in new.items():
        if ".attn.qkv." in name:
            c = len(value) // 3
            out[name.replace(".qkv.", ".q.")], out[name.replace(".qkv.", ".kv.")] = value.split(
                [c, 2 * c])
        else:
            square = re.search(r"\.fc[12]\.weight$", name) and value.ndim == 4
            out[name] = value[:, :, 0, 0] if square else value
    return out


def load_init(model: SegModel, args) -> str:
    """Load --init into the encoder, of a run of stage sup or semi into the whole model; returns the
    format. All of a file's weights must find their place, but a classifier's and a last norm's.
    Raises UserError with the keys."""
    if args.init == "timm":
        name = ARCHS[args.arch]["timm"]
        if name is None:
            raise UserError(f"--init timm: timm has no weights of {args.arch}; give a file")
        try:
            state = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
        except (OSError, RuntimeError) as error:
            raise UserError(f"--init timm: {name}: {str(error).splitlines()[0]}") from None
    else:
        state = weights.read_init(args.init)
    kind, state = detect_format(state)
    if kind is None:
        known, first = ", ".join(FORMATS), ", ".join(str(k)[:40] for k in list(state)[:4])
        raise UserError(f"--init {args.init}: not one of the formats {known}; "
                        f"its first keys are {first}")
    what, new = f"--init {args.init} (format {kind})", weights.rename(state, *FORMATS[kind])
    part = model
    if kind != "run" or not any(k.startswith("head.") for k in new):  # of stage pretrain: encoder
        part = model.encoder
        new = {k.removeprefix("encoder."): v for k, v in new.items()
               if kind != "run" or k.startswith("encoder.")}
    new = split_qkv(new) if kind == "mmlab_mit" else new
    own = part.state_dict()
    keys = state["model"] if kind in ("deit", "run") else state
    if any(str(k).endswith("dist_token") for k in keys):  # the distilled DeiT's second token
        new["pos_embed"] = torch.cat([new["pos_embed"][:, :1], new["pos_embed"][:, 2:]], 1)
    for name in [k for k in ("pos_embed", "encoder.pos_embed") if k in new and k in own]:
        if new[name].shape[1] != own[name].shape[1]:
            side = math.isqrt(new[name].shape[1] - 1)
            if side * side != new[name].shape[1] - 1:
                raise UserError(f"{what}: {new[name].shape[1] - 1} positions are no square grid")
            new[name] = resize_pos_embed(new[name], (side, side),
                                         model.encoder.patch_embed.grid_size)
    weights.load_exactly(part, new, set(), what)
    return kind


# ===== 4. LOSSES  (supp. S1.3 and Algorithm 1; authors' code) =====================================


def pixel_ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with classes (N, H, W), 255: ignored; logits (N, K, h, w).

    The mean is over ALL pixels, ignored ones too [authors' code]: fewer sure pixels, smaller loss.
    Coarser logits are brought to the size of the labels, bilinearly.
    """
    if logits.shape[-2:] != y.shape[-2:]:
        logits = F.interpolate(logits.float(), y.shape[-2:], mode="bilinear", align_corners=False)
    ce = F.cross_entropy(logits.float(), y.long(), ignore_index=IGNORE, reduction="none")
    return ce.mean()


def soft_ce(logits: Tensor, z_t: Tensor, y: Tensor, form: str = "teacher") -> Tensor:
    """CE with soft labels, mean over all pixels (D15).

    form "teacher": the teacher's softmax where y is not 255 [authors' code]; "label", Eq. 5:
        L_Soft = -log(exp(p_y / T) / sum_k exp(p_k / T)),   T = 2
    """
    if form == "label":
        return pixel_ce(logits.float() / 2.0, y)  # Eq. 5
    ce = -(z_t.float().softmax(1) * logits.float().log_softmax(1)).sum(1)
    return (ce * (y != IGNORE)).mean()


def ncr_loss(z_s: Tensor, z_t: Tensor, y: Tensor, mode: str = "ncr") -> Tensor:
    """Negative class ranking: teacher and student agree on the classes that y is not.

    ncr     sqrt(sum_{k != y} (s_k - t_k + 1e-6)^2), s and t softmax over the K - 1 classes without
            y [authors' code]; ncr_sq: without the root, and without 1e-6
    all     the same over all K classes; all_sq: sum_k (t_k - s_k)^2, the paper's All-CR (Eq. 6)
    kl_neg  KL(t || s) over the K - 1; kl: over all K

    z_s, z_t (N, K, H, W), y (N, H, W), 255: no pseudo-label; mean over all pixels, in float32: in
    16 bit the squares of small differences vanish, and the root of 0 has no gradient.
    """
    keep = y != IGNORE
    drop = torch.zeros_like(z_s, dtype=torch.bool)
    if mode in ("ncr", "ncr_sq", "kl_neg"):
        drop.scatter_(1, torch.where(keep, y, 0).long().unsqueeze(1), True)  # class y of each pixel
    log_s, log_t = (z.float().masked_fill(drop, -math.inf).log_softmax(1).masked_fill(drop, 0.0)
                    for z in (z_s, z_t))
    s, t = (log_p.exp().masked_fill(drop, 0.0) for log_p in (log_s, log_t))
    if mode in ("kl", "kl_neg"):
        distance = (t * (log_t - log_s)).sum(1)
    elif mode in ("ncr_sq", "all_sq"):
        distance = (t - s).square().sum(1)  # Eq. 6, where mode is all_sq
    else:
        distance = (s - t + 1e-6).masked_fill(drop, 0.0).square().sum(1).sqrt()
    return (distance * keep).mean()


# PASA's masks, before alpha: c_i, c_j confidences of query and key, sure_i: is the query among the
# confident ones, rand uniform; (N, Q, 1), (N, 1, P), (N, Q, 1), (N, Q, P)
PASA = {
    "ours": lambda c_i, c_j, sure_i, rand: torch.where(sure_i, 0.0, 1.0 - c_j),
    "plain": lambda c_i, c_j, sure_i, rand: (1.0 - c_j).expand_as(rand),
    "rand": lambda c_i, c_j, sure_i, rand: rand,  # Eq. 1
    "reverse1": lambda c_i, c_j, sure_i, rand: torch.where(sure_i, c_j, 0.0),  # Eq. 2
    "reverse2": lambda c_i, c_j, sure_i, rand: torch.where(sure_i, 0.0, c_j),  # Eq. 3
    "product": lambda c_i, c_j, sure_i, rand: (1.0 - c_j) * (1.0 - c_i),  # Eq. 4
}


def confident_half(c: Tensor, rows: str = "half") -> Tensor:
    """(N, P) bool: queries that PASA leaves alone. half: the floor(P / 2) most confident, of equal
    ones the earlier (E11); median: strictly above the median, the lower of the two middle ones."""
    if rows == "median":
        # by a sort: on a GPU torch's median with its places is not deterministic
        return c > c.sort(1).values[:, [(c.shape[1] - 1) // 2]]
    order = c.argsort(dim=1, descending=True, stable=True)[:, : c.shape[1] // 2]
    return torch.zeros_like(c, dtype=torch.bool).scatter_(1, order, True)


def pasa_mask(c: Tensor, alpha: float, kind: str = "ours", rows: str = "half", tokens: int = 1,
              rand: Tensor | None = None) -> Tensor:
    """M (N, Q, Q), added to attention scores: low-confidence queries look at such keys.

        M_ij = 0 where C_i is in the more confident half, else alpha (1 - C_j)

    c (N, P) confidence of each patch; tokens: 1 with a class token (E12: its row is biased, its
    column 0), Q = P + tokens; rand (N, Q, P): the draws of kind "rand".
    """
    sure = F.pad(confident_half(c, rows), (tokens, 0))[:, :, None]
    c_i, c_j = F.pad(c, (tokens, 0))[:, :, None], c[:, None, :]
    if rand is None:  # fresh for each image, query, key and step; one for all heads and layers
        shape = len(c), c.shape[1] + tokens, c.shape[1]
        rand = torch.rand(shape, device=c.device) if kind == "rand" else c.new_zeros(shape)
    return F.pad(alpha * PASA[kind](c_i, c_j, sure, rand), (tokens, 0))


def quirk_mask(c: Tensor, alpha: float) -> Tensor:
    """D6: the released SegFormer's mask (N, P, P), Reverse2's values with its rows off by one."""
    p = c.shape[1]
    rows = c[:, 1:].argsort(dim=1, descending=True, stable=True)[:, : (p - 1) // 2]
    alone = torch.zeros_like(c, dtype=torch.bool).scatter_(1, rows, True)
    return torch.where(alone[:, :, None], 0.0, alpha * c[:, None, :])


def patch_confidence(conf: Tensor, grid: tuple[int, int]) -> Tensor:
    """C_j (N, P): mean over each patch of conf (N, H, W), the sure pixels or their probability."""
    return F.adaptive_avg_pool2d(conf.float().unsqueeze(1), grid).flatten(1)


# Strong views: which pixels stay; the next image of the batch, or nothing, fills the others


def cutmix_boxes(n: int, size: int, w: Tensor | None = None, at: Tensor | None = None, device=None):
    """Boxes (n, 4) as y0, y1, x0, x1 of half the area: w uniform in S/2 + 1 .. S - 1, h = S^2/2w.

    w (n,), at (n, 2) uniform in [0, 1): drawn where None. [authors' code]
    """
    w = torch.randint(size // 2 + 1, size, (n,), device=device) if w is None else w
    at = torch.rand(n, 2, device=device) if at is None else at
    h = (size * size / 2 / w).round().long()
    y0, x0 = (at[:, 0] * (size - h + 1)).long(), (at[:, 1] * (size - w + 1)).long()
    return torch.stack([y0, y0 + h, x0, x0 + w], 1)


def outside(boxes: Tensor, size: int) -> Tensor:
    """(N, S, S) bool: pixels that are not in the box (N, 4)."""
    at = torch.arange(size, device=boxes.device)
    y0, y1, x0, x1 = boxes.unsqueeze(2).unbind(1)  # each (N, 1)
    inside = ((at >= y0) & (at < y1)).unsqueeze(2) & ((at >= x0) & (at < x1)).unsqueeze(1)
    return ~inside


def class_keep(y: Tensor, scores: Tensor | None = None) -> Tensor:
    """ClassMix: (N, H, W) bool, pixels of floor(n / 2) + 1 of an image's n classes.

    y (N, H, W), 255 is a class only where it is alone; scores (N, 256) uniform: the highest win.
    """
    flat = y.flatten(1).long()
    present = torch.zeros(len(y), 256, dtype=torch.bool, device=y.device).scatter_(1, flat, True)
    present[:, IGNORE] &= ~present[:, :IGNORE].any(1)
    scores = torch.rand(present.shape, device=y.device) if scores is None else scores
    rank = torch.where(present, scores, -1.0).argsort(1, descending=True).argsort(1)
    chosen = present & (rank < present.sum(1, keepdim=True) // 2 + 1)
    return chosen.gather(1, flat).view_as(y)


def mix(x: Tensor, other: Tensor | float, keep: Tensor) -> Tensor:
    """Own pixels where keep (N, S, S), else the other's; x (N, C, H, W) or (N, H, W), H = S / r."""
    r = keep.shape[-1] // x.shape[-1]
    keep = keep[:, ::r, ::r]  # nearest neighbour, as labels of a quarter of the size go through it
    return torch.where(keep.unsqueeze(1) if x.ndim == 4 else keep, x, other)


def shuffle_source(n: int, per_side: int, share: float, perm=None, on=None, device=None) -> Tensor:
    """PatchShuffle as a permutation of the batch's tiles (n * per_side^2,), see `retile`.

    perm (n, T): tile k of the shuffled image is tile perm[k]; on (n,) bool: shuffled at all.
    """
    tiles = per_side * per_side
    perm = torch.rand(n, tiles, device=device).argsort(1) if perm is None else perm
    on = torch.rand(n, device=device) < share if on is None else on
    perm = torch.where(on[:, None], perm, torch.arange(tiles, device=perm.device))
    return (perm + tiles * torch.arange(n, device=perm.device)[:, None]).flatten()


def unmix_source(n: int, per_side: int, among=None, device=None) -> Tensor:
    """Mix/UnMix (E5): at each place the tiles of n images are permuted; among (n, T) says whose."""
    tiles = per_side * per_side
    among = torch.rand(n, tiles, device=device).argsort(0) if among is None else among
    return (among * tiles + torch.arange(tiles, device=among.device)).flatten()


def adaptive_keep(rho: Tensor, size: int, lam_l, lam_u, centres, paste) -> tuple[Tensor, Tensor]:
    """AugSeg's adaptive CutMix: pixels that stay (N, S, S) of the labelled and the second paste.

    rho (N,) confidence of an image: unsure ones get a labelled box; lam_l ~ Beta(8, 2), lam_u ~
    Beta(4, 4) (N,); centres (2, N, 2) uniform in [0, 1), paste (N,) uniform.
    A box has side floor(S sqrt(1 - lam)) around a centre in [S/8, S), clipped.
    """
    keeps = []
    for lam, centre in zip((lam_l, lam_u), centres):
        side = (size * (1.0 - lam).sqrt()).long()[:, None]
        at = (size / 8 + centre * (size - size / 8)).long()  # (N, 2): y, x
        low, high = (at - side // 2).clamp(0, size), (at + side // 2).clamp(0, size)
        box = torch.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)
        keeps.append(outside(box, size))
    labelled = paste < 1.0 - rho
    return keeps[0] | ~labelled[:, None, None], keeps[1]


def image_confidence(z_t: Tensor) -> Tensor:
    """AugSeg's rho (N,): mean over the pixels of (1 - H(p) / ln K) max p. z_t (N, K, H, W)."""
    p = z_t.float().softmax(1)
    entropy = -torch.xlogy(p, p).sum(1) / math.log(p.shape[1])
    return ((1.0 - entropy) * p.amax(1)).mean((1, 2))


# ===== 5. OPTIMISER AND SCHEDULES  (supp. S1.2; authors' configs) =================================


def parameter_groups(model: nn.Module, s) -> list[dict]:
    """Encoder and heads, with `lr_scale` 1 and s.head_lr_scale; adaptive optimisers do not decay
    norms [authors' code], nor position embedding and class token (ours)."""
    exempt = set()
    if s.optimizer != "sgd":
        norms = [m for m in model.modules() if isinstance(m, (nn.LayerNorm, _BatchNorm))]
        exempt = {id(p) for m in norms for p in m.parameters(recurse=False)}
        exempt |= {id(p) for n, p in model.named_parameters() if n.endswith(("_embed", "_token"))}
    groups = {}
    for name, p in model.named_parameters():
        scale = 1.0 if name.startswith("encoder.") else s.head_lr_scale
        decay = 0.0 if id(p) in exempt else s.weight_decay
        new = dict(params=[], lr_scale=scale, weight_decay=decay)
        groups.setdefault((scale, decay), new)["params"].append(p)
    return list(groups.values())


def build_optimiser(model: nn.Module, s) -> torch.optim.Optimizer:
    groups = parameter_groups(model, s)
    if s.optimizer != "sgd":
        kind = torch.optim.AdamW if s.optimizer == "adamw" else torch.optim.Adam
        return kind(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
    for group in groups:  # else torch leaves the buffer as it finds it where update 1 is masked
        for p in group["params"]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def lr_at(step: int, total: int, lr: float, s) -> float:
    """Learning rate of an update: polynomial decay to s.min_lr, times a warm-up from 1e-6."""
    decayed = s.min_lr + (lr - s.min_lr) * (1.0 - step / total) ** s.power
    if step < s.warmup_iterations:
        decayed *= 1.0 - (1.0 - step / s.warmup_iterations) * (1.0 - 1e-6)
    return decayed


def set_lr(optimizer, step: int, total: int, s):
    for group in optimizer.param_groups:  # the floor is that of both groups [authors' code]
        group["lr"] = lr_at(step, total, s.lr * group["lr_scale"], s)


# ===== 6. TRAINING STEP  (supp. Algorithm 1; authors' code) =======================================


def pretrain_step(model, x: Tensor, y: Tensor, alone: bool, precision) -> dict[str, Tensor]:
    """x (N, 3, S, S) scenes of four digits, y (N, 4); alone: each quarter for itself (E13)."""
    with precision.autocast():
        logits = model(x, alone=alone).float()  # (N, 4, 10)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    return dict(loss=loss, train_acc=(logits.argmax(-1) == y).float().mean())


def sup_step(student, x_l, y_l, s, precision) -> dict[str, Tensor]:
    """x_l (N_l, 3, S, S), y_l (N_l, S, S), 255: ignored. BatchNorm: of this process's images."""
    with precision.autocast():
        z_l, *z_aux = student(x_l, aux=True)
    loss_l = loss = pixel_ce(z_l, y_l)
    losses = dict(loss_l=loss_l)
    if z_aux:
        losses["loss_aux"] = sum(pixel_ce(z, y_l) for z in z_aux)
        loss = loss_l + s.aux_weight * losses["loss_aux"]
    return dict(loss=loss, **losses)


@torch.no_grad()
def teach(teacher, x_w, tau: float, precision):
    """The teacher's logits z_T, confidence c, class y_hat, and y: y_hat where c > tau, else 255."""
    with precision.autocast():
        z_t = teacher(x_w)
    z_t = z_t.float()  # before softmax and threshold: autocast would leave them in 16 bit
    c, y_hat = z_t.softmax(1).max(1)  # (N_u, h, w)
    return z_t, c, y_hat, torch.where(c > tau, y_hat, IGNORE)


def strong_view(x, y, z_t, s, draws, other=None):
    """Image, pseudo-label and teacher logits through one mask (D3: or logits unmixed).

    other: image, label and logits that fill in; None: those of the next image of this process.
    draws: cut () bool, does this batch mix; boxes (N, 4) or scores (N, 256).
    """
    if s.strong in ("none", "mixunmix", "adaptive") or s.strong == "cutout" and not s.cutout_used:
        return x, y, z_t
    n, size = len(x), x.shape[-1]
    cut = draws.get("cut", torch.rand((), device=x.device) < s.strong_prob)
    if s.strong == "classmix":
        keep, r = class_keep(y, draws.get("scores")), size // y.shape[-1]
        keep = keep.repeat_interleave(r, 1).repeat_interleave(r, 2)
    else:
        boxes = draws.get("boxes", cutmix_boxes(n, size, device=x.device))
        keep = outside(boxes, size)
    keep = keep | ~cut
    if s.strong == "cutout":
        return mix(x, 0.0, keep), mix(y, IGNORE, keep), z_t
    x_o, y_o, z_o = other or (t.roll(-1, 0) for t in (x, y, z_t))
    z_t = mix(z_t, z_o, keep) if s.ncr_teacher == "mixed" else z_t
    return mix(x, x_o, keep), mix(y, y_o, keep), z_t


def augmented_pass(student, x, s, precision, draws):
    """Student logits on the strong view, its tiles moved, its features put back before the decoder.

    draws: perm (N, T) and on (N,) of PatchShuffle; among (N, T) and cut () of Mix/UnMix.
    """
    source, per_side = None, x.shape[-1] // s.shuffle_tile
    if s.strong == "mixunmix":
        source = unmix_source(len(x), per_side, draws.get("among"), x.device)
        cut = draws.get("cut", torch.rand((), device=x.device) < s.strong_prob)
        source = torch.where(cut, source, torch.arange(len(source), device=x.device))
    if s.shuffle:
        shuffled = shuffle_source(len(x), per_side, s.shuffle, draws.get("perm"), draws.get("on"),
                                  x.device)
        source = shuffled if source is None else source[shuffled]
    if source is not None:
        x = retile(x, source, per_side)
    with precision.autocast():
        return student(x, source=source, per_side=per_side)


def pasa_pass(student, x, c, s, precision, draws):
    """Student logits with M on the scores of its attention. c (N_u, h, w) the teacher's confidence.

    draws: rand (N, Q, P) of kind rand.
    """
    encoder = getattr(student, "module", student).encoder  # under DDP too
    side = x.shape[-1] // (32 if isinstance(encoder, MiT) else encoder.patch_embed.patch_size[0])
    conf = c if s.pasa_conf == "soft" else (c > s.tau).float()
    c_patch = patch_confidence(conf, (side, side))
    if s.pasa_mit_quirk:
        mask = quirk_mask(c_patch, s.pasa_alpha)
    else:
        mask = pasa_mask(c_patch, s.pasa_alpha, s.pasa, s.pasa_rows, encoder.tokens,
                         draws.get("rand"))
    with precision.autocast():
        return student(x, mask=mask)


def label_loss(z, y, z_t, s) -> Tensor:
    return pixel_ce(z, y) if s.pseudo == "hard" else soft_ce(z, z_t, y, s.soft_form)


def both_branches(student, x_s, c, y, z_t, strong, y_ncr, s, precision, draws):
    """L_u of S4Former: 1/2 L_P + 1/2 L_A + 1/2 L_N, without PASA L_A + 1/2 L_N (E2).

    x_s the unmixed student view, strong: (x, y, z_t) after mixing, y_ncr: where NCR looks.
    """
    losses, share = {}, 1.0
    if s.pasa != "off":
        z_p = pasa_pass(student, x_s, c, s, precision, draws)
        losses["loss_pasa"], share = label_loss(z_p, y, z_t, s), 0.5
    x_a, y_a, z_m = strong
    z_a = augmented_pass(student, x_a, s, precision, draws)
    losses["loss_aug"] = label_loss(z_a, y_a, z_m, s)
    loss_u = share * losses["loss_aug"] + 0.5 * losses.get("loss_pasa", 0.0)
    if s.ncr != "off":
        losses["loss_ncr"] = ncr_loss(z_a, z_m, y_ncr, s.ncr)
        if s.ncr_branches == "both" and s.pasa != "off":  # D1
            losses["loss_ncr"] = losses["loss_ncr"] + ncr_loss(z_p, z_t, y, s.ncr)
        loss_u = loss_u + s.ncr_weight * losses["loss_ncr"]
    return dict(loss_u=loss_u, **losses)


def s4former_step(student, teacher, x_l, y_l, x_u, s, precision, draws=None):
    """Algorithm 1; with parts switched off Base, mean teacher and FixMatch.

    x_u: [x_w, x_s], weak and strong look (N_u, 3, S, S) at the same crops. draws: see the passes;
    made where absent. CutMix partners and BatchNorm: of this process's images. Returns losses by
    name, and y_hat and c (N_u, h, w) for the log.
    """
    draws, (x_w, x_s) = draws or {}, x_u
    losses = sup_step(student, x_l, y_l, s, precision)
    z_t, c, y_hat, y = teach(teacher, x_w, s.tau, precision)
    strong = strong_view(x_s, y, z_t, s, draws)
    losses |= both_branches(student, x_s, c, y, z_t, strong, strong[1], s, precision, draws)
    losses["loss"] = losses["loss"] + s.lambda_u * losses["loss_u"]  # L_l + 0.4 L_aux + beta L_u
    return dict(losses, kept=(y != IGNORE).float().mean()), y_hat, c


def augseg_step(student, teacher, x_l, y_l, x_u, s, precision, draws=None):
    """AugSeg: the same with adaptive CutMix [AugSeg's code and its issue 24].

    draws: perm_q (N_u,) partners, lam_l, lam_u (N_u,), centres (2, N_u, 2), paste (N_u,), and those
    of the passes. The rest as in s4former_step.
    """
    draws, (x_w, x_s) = draws or {}, x_u
    n, size, device = len(x_s), x_s.shape[-1], x_s.device
    losses = sup_step(student, x_l, y_l, s, precision)
    z_t, c, y_hat, _ = teach(teacher, x_w, s.tau, precision)
    y = torch.where(c >= s.tau, y_hat, IGNORE)  # here not strictly above

    def beta(name, a, b):
        if name in draws:
            return draws[name]
        of = torch.full((n,), float(a), device=device), torch.full((n,), float(b), device=device)
        return torch.distributions.Beta(*of, validate_args=False).sample()

    q = draws.get("perm_q", torch.randperm(n, device=device))
    keep_l, keep_u = adaptive_keep(
        image_confidence(z_t), size, beta("lam_l", 8, 2), beta("lam_u", 4, 4),
        draws.get("centres", torch.rand(2, n, 2, device=device)),
        draws.get("paste", torch.rand(n, device=device)))
    r, of_l = size // y.shape[-1], q % len(x_l)
    y_small = y_l.long()[:, ::r, ::r]
    # a copy of image i with a labelled box; then a box of copy q(i) in image i itself
    x_copy, y_copy = mix(x_s, x_l[of_l], keep_l), mix(y, y_small[of_l], keep_l)
    y_ncr = mix(y, IGNORE, keep_l)  # E4
    strong = (mix(x_s, x_copy[q], keep_u), mix(y, y_copy[q], keep_u),
              mix(z_t, z_t[q], keep_u) if s.ncr_teacher == "mixed" else z_t)
    losses |= both_branches(student, x_s, c, y, z_t, strong, mix(y, y_ncr[q], keep_u), s,
                            precision, draws)
    losses["loss"] = losses["loss"] + s.lambda_u * losses["loss_u"]
    return dict(losses, kept=(y != IGNORE).float().mean()), y_hat, c


def unimatch_step(student, teacher, x_l, y_l, x_u, s, precision, draws=None):
    """UniMatch: 1/2 feature dropout, or PASA, + 1/4 each strong view (+ 1/4 NCR each) (E3).

    x_u: [x_w, x_s1, x_s2] and the same looks at other crops, whose images fill CutMix's boxes.
    draws: dicts "first" and "second" of the strong views, rand of PASA. The rest as above.
    """
    draws, (x_w, *strong), (m_w, *others) = draws or {}, x_u[:3], x_u[3:]
    losses = sup_step(student, x_l, y_l, s, precision)
    both = teach(teacher, torch.cat([x_w, m_w]), s.tau, precision)
    (z_t, z_m), (c, _), (y_hat, _), (y, y_m) = (t.split([len(x_w), len(m_w)]) for t in both)
    if s.pasa != "off":
        z_p = pasa_pass(student, x_w, c, s, precision, draws)
        losses["loss_pasa"] = label_loss(z_p, y, z_t, s)
        loss_u = 0.5 * losses["loss_pasa"]
    else:
        with precision.autocast():
            z_p = student(x_w, dropout=0.5)
        losses["loss_features"] = label_loss(z_p, y, z_t, s)
        loss_u = 0.5 * losses["loss_features"]
    aug, ncr = [], []
    for name, x_s, x_m in zip(("first", "second"), strong, others):
        mine = draws.get(name, {})
        x_a, y_a, z_a_t = strong_view(x_s, y, z_t, s, mine, other=(x_m, y_m, z_m))
        z_a = augmented_pass(student, x_a, s, precision, mine)
        aug.append(label_loss(z_a, y_a, z_a_t, s))
        if s.ncr != "off":
            ncr.append(ncr_loss(z_a, z_a_t, y_a, s.ncr))
    losses["loss_aug"] = (aug[0] + aug[1]) / 2
    loss_u = loss_u + 0.5 * losses["loss_aug"]
    if ncr:
        losses["loss_ncr"] = (ncr[0] + ncr[1]) / 2
        loss_u = loss_u + s.ncr_weight * losses["loss_ncr"]
    losses |= dict(loss_u=loss_u, loss=losses["loss"] + s.lambda_u * loss_u)
    return dict(losses, kept=(y != IGNORE).float().mean()), y_hat, c


SEMI_STEPS = {"unimatch": unimatch_step, "augseg": augseg_step}  # the others: s4former_step


# ===== 7. EVALUATION  (supp. S1.2; authors' code: last weights of the student) ====================


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Evaluation mode; afterwards each module is as it was: with --freeze-bn they differ."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training


def logits_of(model, x: Tensor, s, run) -> Tensor:
    """(N, K, H, W) float32 logits of pictures (N, 3, H, W), whole or by sliding windows, whose
    logits are averaged by how many windows cover a pixel [authors' code]."""
    def once(part):
        with run.precision.autocast():
            z = model(part).float()
        if z.shape[-2:] == part.shape[-2:]:
            return z
        return F.interpolate(z, part.shape[-2:], mode="bilinear", align_corners=False)

    if s.eval_mode == "whole":
        return once(x)
    # with a longer stride no window would cover the pixels between two
    return slide(x, once, run.image_size, min(s.eval_stride, run.image_size))


def slide(x: Tensor, network, crop: int, stride: int) -> Tensor:
    """Mean over windows of network(window) -> (N, K, crop, crop), for x (N, 3, H, W)."""
    total, count = 0.0, x.new_zeros(1, 1, *x.shape[-2:])
    for top, left in windows(*x.shape[-2:], crop, stride):
        part = x[..., top : top + crop, left : left + crop]
        around = (left, x.shape[-1] - left - part.shape[-1],
                  top, x.shape[-2] - top - part.shape[-2])
        total = total + F.pad(network(part), around)
        count = count + F.pad(torch.ones_like(part[:1, :1]), around)
    return total / count


def probabilities(model, seen, size, s, run) -> Tensor:
    """(N, K, *size): softmax of the logits, brought to the size of the picture's file."""
    picture, extent = (t.to(run.device) for t in seen[:2])
    z = logits_of(model, to_model(picture, extent, run.stats), s, run)
    if z.shape[-2:] != tuple(size):
        z = F.interpolate(z, size, mode="bilinear", align_corners=False)
    return z.softmax(1)


@torch.no_grad()
def evaluate(model, pairs, view, s, run, classes) -> dict[str, float]:
    """mIoU, pixel accuracy and IoU per class in percent: one confusion matrix over all pictures and
    processes; a class that occurs nowhere is left out. Restores training mode."""
    k, batch = len(classes), 50 if pairs.pixels is not None else 1  # files: each its own size
    matrix = torch.zeros(k, k, dtype=torch.long, device=run.device)
    share = dict(rank=run.rank, world=run.world, workers=run.workers,
                 bad=BadImages(pairs, run.max_bad_images))
    with evaluating(model):
        for seen, _ in pair_eval_loader(pairs, view, batch, **share):
            truth = seen[2].to(run.device)
            p = probabilities(model, seen, truth.shape[-2:], s, run)
            matrix += confusion(p.argmax(1), truth, k)
    if run.world > 1:
        dist.all_reduce(matrix)
    of_class = 100 * iou(matrix)
    run.pixels = int(matrix.sum())
    named = {f"iou_{name}": round(value, 3)
             for name, value in zip(classes, of_class.tolist()) if math.isfinite(value)}
    right = 100.0 * matrix.diagonal().sum() / matrix.sum().clamp(min=1)
    return dict(miou=round(of_class.nanmean().item(), 3), pixel_acc=round(right.item(), 3), **named)


@torch.no_grad()
def evaluate_digits(model, digits, run, count=500) -> dict[str, float]:
    """Accuracy of stage pretrain on scenes of four, made of the validation digits."""
    right, g = 0, torch.Generator(run.device).manual_seed(0)
    for chosen in np.random.default_rng(0).integers(len(digits), size=(10, count // 10, 4)):
        pixels, y = (torch.from_numpy(a[chosen]) for a in (digits.pixels, digits.targets))
        x, y = digit_scenes(pixels.to(run.device), y.to(run.device), run, g)
        with evaluating(model), run.precision.autocast():
            right = right + (model(x).argmax(-1) == y).sum()
    return dict(digit_acc=round(100.0 * int(right) / (4 * count), 3))


def digit_scenes(digits: Tensor, y: Tensor, run, g=None):
    """digits (N, 4, 28, 28) uint8, y (N, 4) -> pictures for the model (N, 3, S, S), y."""
    pictures, _ = compose(digits.float() / 255, y, run.image_size, LOOK_PRETRAIN, g=g)
    return (255 * pictures - run.stats[0]) / run.stats[1], y


@torch.no_grad()
def attention_of(vit: ViT, x: Tensor, query: Tensor) -> Tensor:
    """Where the last block looks from patch query (N,): (N, h, w), mean of the heads, sum <= 1."""
    tokens = vit.patch_embed(x)
    grid = tokens.shape[1:3]
    tokens = vit._pos_embed(tokens)
    for block in vit.blocks[:-1]:
        tokens = block(tokens)
    attn, normed = vit.blocks[-1].attn, vit.blocks[-1].norm1(tokens)
    qkv = attn.qkv(normed).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q = qkv[0][torch.arange(len(x)), :, 1 + query].unsqueeze(2)  # (N, heads, 1, d)
    weights_ = (q @ qkv[1].transpose(-2, -1) * attn.scale).softmax(-1).mean(1)[:, 0]  # (N, 1 + P)
    return weights_[:, 1:].unflatten(1, tuple(grid))


# ===== 8. MAIN LOOP ===============================================================================


def stage_batches(stage, data, digits, split, s, args, run, start, total, bad):
    """Batches of a stage: tensors of each update and part, on the host.

    pretrain (digits, y); sup the labelled view; semi that and the unlabelled ones. Files with masks
    of unlabelled pictures are not opened; the scenes' masks, in memory, serve two logged numbers.
    """
    how = dict(start=start, stop=total, rank=run.rank, world=run.world, accum=args.accum_steps,
               workers=run.workers, pin=run.device.type == "cuda", bad=bad)
    if stage == "pretrain":
        everything = np.arange(len(digits.train))
        stream = Stream("pretrain", everything, 4 * s.batch_size, args.seed, straddle=True)
        return (((seen[0], y),) for seen, y in
                stream_loader(digits.train, [one_digit], stream, **how))

    def of(name, positions, batch, view, masked=True):
        stream = Stream(f"{stage}/{name}", positions, batch, args.seed, straddle=True)
        return (seen[0] for seen, _ in pair_loader(data.train, [view], stream, with_masks=masked,
                                                   **how))

    host = args.method == "unimatch" and stage == "semi"
    views = {k: Compose(v) for k, v in
             view_lists(args.dataset, run.image_size, s, 3 if host else 2).items()}
    loaders = [of("labeled", split.labeled, s.batch_size, views["labeled"])]
    if stage == "semi":
        known = data.train.masks is not None
        for name in ("unlabeled", "mix")[: 1 + host]:
            loaders.append(of(name, split.unlabeled, s.unlabeled_ratio * s.batch_size,
                              views["unlabeled"], masked=known and name == "unlabeled"))
    return zip(*loaders)


def run_stage(stage, model, data, digits, split, s, args, run, resume):
    """Train one stage, in place; returns the teacher, or None. One loop serves all three.

    model: unwrapped, with the weights to start from. resume: a checkpoint of this stage, or None.
    """
    total, classes = s.iterations, data.classes
    evaluate_at = {round(total * k / args.evals) for k in range(1, args.evals + 1)} - {0}
    teacher = None
    if stage == "semi":
        teacher = Ema(model)
        teacher.module.aux = nn.ModuleList()  # auxiliary heads serve supervised passes alone
        if s.teacher_init == "separate":  # D7
            teacher.module.head.load_state_dict(build_model(args, len(classes)).head.state_dict())
        if 0 < s.ema_decay < 1 and total < 3 / (1 - s.ema_decay):
            run.log.say(f"warning: semi: {total} updates are few for --ema-decay {s.ema_decay:g}: "
                        "the teacher will hardly move")

    torch.manual_seed(seed_of(args.seed, stage, run.rank))  # from here on draws are a process's own
    optimizer = build_optimiser(model, s)
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
    if args.compile:
        model.compile()  # in place: the keys of the state dict stay clean
    student = model
    if run.world > 1:  # several passes before one backward: buffers must not be broadcast (E10)
        student = nn.parallel.DistributedDataParallel(model, device_ids=run.device_ids,
                                                      broadcast_buffers=False)
    moving = [b for b in model.buffers() if b.is_floating_point()]  # BatchNorm's statistics
    names = {p: n for n, p in model.named_parameters()}
    bad = BadImages(digits.train if stage == "pretrain" else data.train, args.max_bad_images)
    if resume:
        bad.seen.update(resume["bad_images"])
    batches = stage_batches(stage, data, digits, split, s, args, run, start, total, bad)
    semi_step = SEMI_STEPS.get(args.method, s4former_step)

    def on_device(seen):  # what a view returned -> (looks on the device, mask)
        *looks, extent, mask = (t.to(run.device, non_blocking=True) for t in seen)
        looks = [to_model(x, extent, run.stats) for x in looks]
        if run.device.type == "cuda":
            looks = [x.to(memory_format=torch.channels_last) for x in looks]
        return looks, mask

    quicker = "--arch vit_digits" if args.dataset == "digits" and args.arch != "vit_digits" else ""
    run.log.start(stage, start, total, unprinted, run.device, quicker)
    step, parts, began = start, [], time.perf_counter()
    student.train()
    for module in model.modules():
        if s.freeze_bn and isinstance(module, _BatchNorm):
            module.eval()
    for batch in run.log.wait(batches):
        set_lr(optimizer, step, total, s)
        if teacher is not None and s.ema_first and not parts:
            teacher.update(model, s.ema_decay)  # D13
        last_part = len(parts) + 1 == args.accum_steps
        with student.no_sync() if run.world > 1 and not last_part else contextlib.nullcontext():
            if stage == "pretrain":
                digit, y = (t.to(run.device, non_blocking=True) for t in batch[0])
                x, y = digit_scenes(digit.view(-1, 4, 28, 28), y.view(-1, 4), run)
                alone = step < s.alone * total
                losses = pretrain_step(student, x, y, alone, run.precision)
            else:
                (x_l,), y_l = on_device(batch[0])
                if stage == "sup":
                    losses = sup_step(student, x_l, y_l, s, run.precision)
                else:
                    x_u, truth = on_device(batch[1])
                    x_u += [x for seen in batch[2:] for x in on_device(seen)[0]]
                    losses, y_hat, c = semi_step(student, teacher, x_l, y_l, x_u, s, run.precision)
                    if data.train.masks is not None:  # digit scenes
                        losses |= pseudo_accuracy(y_hat, c > s.tau, truth)
            run.precision.backward(losses["loss"] / args.accum_steps)
        parts.append({k: v.detach() for k, v in losses.items()})
        if not last_part:
            continue
        means = {k: torch.stack([part[k] for part in parts]).mean() for k in parts[0]}
        if run.world > 1:  # what is logged, and watched for NaN, is the mean over the processes
            average(means, moving, run.world)
        watched = {k: v for k, v in means.items() if k.startswith("loss")}
        applied = run.precision.update(optimizer, watched)
        optimizer.zero_grad(set_to_none=True)
        if teacher is not None and not s.ema_first:
            teacher.update(model, s.ema_decay, applied)  # theta_T <- m theta_T + (1 - m) theta_S
        parts, step = [], step + 1
        run.log.add(step, means)

        signalled = run.stop.asked()
        stopping, printing = signalled or step == args.stop_after, step % args.print_every == 0
        saving = step % args.save_every == 0 or stopping or step == total
        if printing or saving:
            run.precision.check(optimizer, names, step)
        if printing or step == total:
            run.log.report(stage, step, images=s.batch_size * (1 + s.unlabeled_ratio),
                           bad_images=len(bad.seen), lr=lr_at(step - 1, total, s.lr, s))
        if step in evaluate_at:
            before = time.perf_counter()
            results = judge(stage, model, teacher, data, digits, s, args, run)
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


def average(means: dict, moving: list, world: int):
    """In place: logged numbers, and BatchNorm's running statistics (E10), over all processes."""
    together = torch.stack(list(means.values()))
    dist.all_reduce(together)
    means |= dict(zip(means, together / world))
    if moving:
        flat = torch.cat([b.flatten() for b in moving])
        dist.all_reduce(flat)
        for b, mean in zip(moving, (flat / world).split([b.numel() for b in moving])):
            b.copy_(mean.view_as(b))


def pseudo_accuracy(y_hat: Tensor, sure: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """The only use of unlabelled images' masks, of digit scenes alone: two logged numbers."""
    r = truth.shape[-1] // y_hat.shape[-1]
    truth = truth[:, ::r, ::r]
    known, right = truth != IGNORE, (y_hat == truth)
    return dict(pseudo_acc=(right & known).sum() / known.sum().clamp(min=1),
                kept_acc=(right & known & sure).sum() / (known & sure).sum().clamp(min=1))


def judge(stage, model, teacher, data, digits, s, args, run) -> dict[str, float]:
    """Results of a stage: of the student, and the teacher's mIoU."""
    if stage == "pretrain":
        return evaluate_digits(model, digits.val, run)
    view = Compose(view_lists(args.dataset, run.image_size, s)["evaluate"])
    results = evaluate(model, data.val, view, s, run, data.classes)
    if teacher is not None:
        of_teacher = evaluate(teacher.module, data.val, view, s, run, data.classes)
        results = dict(miou=results.pop("miou"), ema_miou=of_teacher["miou"], **results)
    return results


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
    if args.dataset != "digits" and args.stage == "pretrain":
        raise UserError("--stage pretrain: of the digit scenes alone; give --init FILE instead")
    data, digits = load_data(args)
    if args.eval:
        return evaluate_run(args, data, run)

    # What will be trained, on what
    stages = stages_of(args)
    settings = {x: derive(args, x, run.world) for x in stages}
    pool = settings["semi"].unlabeled_pool if "semi" in stages else args.unlabeled_pool or "rest"
    split = choose_split(args, data, pool, 3 if args.dataset == "digits" else 12.5)
    scenes = len(digits.train) // 4 if digits else 0  # stage pretrain: four digits in each
    images = dict(pretrain=scenes, sup=len(split.labeled), semi=len(split.unlabeled))
    for x, s in settings.items():
        in_updates(s, images[x])
    stages = [x for x in stages if settings[x].iterations > 0]
    if not stages:
        raise UserError(f"--stage {args.stage}, --method {args.method}, --iterations, --epochs: no "
                        "stage is left to train; raise --epochs or choose another stage")
    if args.stage == "semi" and not args.init:
        raise UserError("--stage semi: needs --init RUN, a run of stage sup, or FILE")
    if args.predict and stages[-1] == "pretrain":
        raise UserError("--predict: stage pretrain has no decoder; choose --stage all")
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
    costs = report.cost(on_meta(args, len(data.classes)), run.image_size)
    largest = max(
        settings[x].micro_batch * (1 + unlabeled_passes(args, settings[x])) for x in stages)
    halved = run.precision.dtype != torch.float32
    report.refuse_too_large(costs, largest, halved, run.device, args.accum_steps)
    first = start = None  # what the first stage starts from; later ones from `before`
    ahead = state is None or "semi" in stages and state["stage"] == "sup" and not semi_goes_on(args)
    if args.init and ahead:
        torch.manual_seed(seed_of(args.seed, "model"))
        first = build_model(args, len(data.classes))
        start = f"start: {args.init}, format {load_init(first, args)}"

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

    before = first
    for stage in stages:
        if state and STAGES.index(stage) < STAGES.index(state["stage"]):
            continue
        if stage == "semi" and not semi_goes_on(args):
            before = first  # E14
        torch.manual_seed(seed_of(args.seed, "model"))  # the same weights on every process
        model = stage_model(args, stage, settings[stage], len(data.classes), before, run)
        resume = state if state and state["stage"] == stage else None
        teacher = run_stage(stage, model, data, digits, split, settings[stage], args, run, resume)
        before = model
    if run.world > 1:  # before the pictures: waiting for them has a limit
        dist.barrier()
        dist.destroy_process_group()
    if run.rank == 0:
        finish(args, data, split, settings[stages[-1]], model, teacher, run)


def stage_model(args, stage, s, num_classes, before, run) -> nn.Module:
    """The network of a stage; before: that of the stage before, or --init's; None: random weights,
    or those of a checkpoint soon."""
    if stage == "pretrain":
        encoder, dims = build_encoder(args, s.drop_path)
        model = DigitClassifier(encoder, dims[-1])
    else:
        model = build_model(args, num_classes, s.drop_path)
    if before is not None:
        whole = isinstance(before, SegModel) and stage != "pretrain"
        part = (model, before) if whole else (model.encoder, before.encoder)
        part[0].load_state_dict(part[1].state_dict())
    if run.device.type == "cuda":
        if run.world > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model.to(run.device, memory_format=torch.channels_last)
    return model.to(run.device)


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
        rank=rank, world=world, device=device, workers=workers, folder=None, results={}, pixels=0,
        max_bad_images=args.max_bad_images,
        device_ids=[device.index] if device.type == "cuda" else None,
        precision=Precision(device, args.dtype), image_size=image_size(args),
        stats=255.0 * stats.view(2, 3, 1, 1))


def on_meta(args, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return build_model(args, num_classes).eval()


def greet(args, split, settings, run):
    """First lines of a run: what it trains on, which recipe, which split, where."""
    key, row = recipe(args)
    if args.dataset == "digits":
        paper = paper_args(args)
        number = paper_number(paper)
        run.log.say(f"training on the embedded digit scenes; on Pascal VOC: {command_of(paper)}"
                    + (f"   (the paper: {number[0]} mIoU)" if number else ""))
    elif not args.init:
        run.log.say("warning: no --init: the encoder starts from random weights")
    run.log.say(f"recipe {key}: {row['source']}")
    run.log.say(split.describe())
    semi = settings.get("semi")
    if semi and semi.micro_batch * semi.unlabeled_ratio < 2 and args.method != "unimatch" and (
            semi.strong in ("cutmix", "classmix", "mixunmix")):
        run.log.say(f"warning: --strong {semi.strong} mixes the images of one process and part, "
                    "and there is one: it does nothing; raise --batch-size")
    for stage, s in settings.items():
        unlabeled = f" + {s.unlabeled_ratio} x unlabelled" if stage == "semi" else ""
        what = "scenes of four digits" if stage == "pretrain" else "labelled"
        run.log.say(f"{stage}: {s.iterations} updates, batch {s.batch_size} {what}{unlabeled} = "
                    f"{run.world} processes x {args.accum_steps} parts x {s.micro_batch}, "
                    f"{s.optimizer}, lr {s.lr:g} ({s.sources['lr']})")
    dtype = str(run.precision.dtype).split(".")[-1]
    run.log.say(f"{run.folder}: {args.arch} on {run.device}, {dtype}, {run.workers} workers")


def finish(args, data, split, s, model, teacher, run):
    """Weights, curves, pictures, predictions, and the summary. s: settings of the last stage."""
    run.log.bar.close()

    decoder = isinstance(model, SegModel)
    about = dict(timm_model=None, classes=data.classes, arch=args.arch, dataset=args.dataset,
                 image_size=run.image_size, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
                 decoder=decoder)
    metadata = {"model": json.dumps(about)}  # one key: several have no fixed order in the file
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    checkpoint.save_weights(run.folder / "model.safetensors", tensors, metadata)
    run.log.write(dict(results=run.results))
    panels = {"losses": ["loss", "loss_l", "loss_u", "loss_ncr"], "mIoU (%)": ["miou", "ema_miou"],
              "pseudo-labels": ["kept", "pseudo_acc", "kept_acc"], "learning rate": ["lr"]}
    report.curves(log.read_log(run.folder), run.folder / "curves.png", panels)
    draw_views(data, split, s, args, run)
    drawn = "curves.png, views.png"
    if decoder:
        draw_masks({"prediction": model}, teacher, data, s, args, run, run.folder / "masks.png")
        drawn += ", masks.png"
        if draw_attention({"attention": model}, data, s, args, run, run.folder):
            drawn += ", attention.png"

    names = dict(pretrain="encoder on digits (stage pretrain)", sup="labels only (stage sup)",
                 semi=f"{args.method}{' + ours' * args.with_ours} (stage semi)")
    run.log.say("")
    for stage, r in run.results.items():
        shown = (f"accuracy {r['digit_acc']:6.2f}" if stage == "pretrain" else
                 f"mIoU {r['miou']:6.2f}, pixels {r['pixel_acc']:6.2f}")
        shown += f", teacher {r['ema_miou']:.2f}" if "ema_miou" in r else ""
        run.log.say(f"{names[stage]:<35} {shown}   {r['updates']} updates, {r['seconds']:.0f} s")
    if {"sup", "semi"} <= run.results.keys():
        both = {names[k]: of_classes(run.results[k], data.classes) for k in ("sup", "semi")}
        gain = run.results["semi"]["miou"] - run.results["sup"]["miou"]
        run.log.say(f"{'gain':<35}      {gain:+6.2f}")
        charts.bars(both, run.folder / "gain.png", "IoU per class (%)")
        drawn += ", gain.png"
    run.log.say(report.band(Path(__file__).parent / "docs" / "bands.json", run.recipe))
    run.log.say(f"{run.folder}: {drawn}, log.jsonl, model.safetensors")
    if args.predict:
        predict(args, model, data, s, run, run.folder)
    run.log.close()


def of_classes(results: dict, classes) -> dict[str, float]:
    return {name: results.get(f"iou_{name}", math.nan) for name in classes}


def load_final(folder: str, flag: str) -> tuple[SegModel, dict]:
    """A finished run's model and its metadata, from model.safetensors alone. Raises UserError."""
    from safetensors import safe_open

    file = Path(folder) / "model.safetensors"
    if not file.exists():
        raise UserError(f"{flag} {folder}: no model.safetensors; finish it: --resume {folder}")
    tensors = checkpoint.read(file)
    with safe_open(file, "pt") as opened:
        about = json.loads((opened.metadata() or {}).get("model", "null"))
    if about is None or "decoder" not in about:
        raise UserError(f"{flag} {folder}: its model.safetensors was not written by {SCRIPT}.py")
    if not about["decoder"]:
        raise UserError(f"{flag} {folder}: stage pretrain has no decoder; --init takes this run")
    model = build_model(SimpleNamespace(**about), len(about["classes"]))
    weights.load_exactly(model, tensors, set(), f"{flag} {folder}")
    return model, about


def evaluate_run(args, data, run):
    """--eval RUN: the final weights on the validation set, --compare and --predict."""
    model, about = load_final(args.eval, "--eval")
    *_, last = log.read_log(Path(args.eval))[0]["settings"]  # the stage that gave these weights
    model, s = model.to(run.device), derive(args, last, 1)
    run.image_size = about["image_size"]
    if data.classes != about["classes"]:
        raise UserError(f"--eval {args.eval}: --data-path holds other classes than the run; "
                        "use the run's own data")
    view = Compose(view_lists(args.dataset, run.image_size, s)["evaluate"])
    results = {args.eval: evaluate(model, data.val, view, s, run, data.classes)}
    models = {args.eval: model}
    if args.compare:
        other, its = load_final(args.compare, "--compare")
        if its["classes"] != data.classes:
            raise UserError(f"--compare {args.compare}: a run with other classes")
        models[args.compare] = other.to(run.device)
        results[args.compare] = evaluate(models[args.compare], data.val, view, s, run, data.classes)
    if run.rank:
        return
    for name, r in results.items():
        print(f"{name}: mIoU {r['miou']:.2f}, pixel accuracy {r['pixel_acc']:.2f} on "
              f"{len(data.val)} pictures, {run.pixels} pixels")
        print("IoU  " + "  ".join(f"{c} {v:.2f}" for c, v in of_classes(r, data.classes).items()))
    if args.compare:
        folder = Path(args.eval)
        charts.bars({n: of_classes(r, data.classes) for n, r in reversed(results.items())},
                    folder / "compare_gain.png", "IoU per class (%)")
        draw_masks(dict(reversed(models.items())), None, data, s, args, run, folder / "compare.png")
        draw_attention(dict(reversed(models.items())), data, s, args, run, folder)
        print(f"{folder}: compare.png, compare_gain.png, attention.png")
    if args.predict:
        predict(args, model, data, s, run, Path(args.eval))


@torch.no_grad()
def predict(args, model, data, s, run, folder):
    """--predict: predictions/masks/NAME.png, class ids and a palette, and predictions/overlays."""
    source, pictures = Path(args.predict), pictures_at(args.predict)
    view = Compose(view_lists(args.dataset, run.image_size, s)["evaluate"])
    model.eval()
    # a class 0 that is (nearly) black in the palette is background: a veil would only darken it
    clear = (IGNORE, 0) if data.palette[0].max() <= 32 else (IGNORE,)
    for i in range(len(pictures)):
        file, picture = Path(os.fsdecode(pictures.ids[i])), pictures.pil(i)
        seen = [t.unsqueeze(0) for t in view(picture, None)]
        ids = probabilities(model, seen, picture.size[::-1], s, run).argmax(1)[0].cpu()
        name = file.relative_to(source) if source.is_dir() else Path(file.name)
        name = name.with_name(name.name + ".png")  # a.jpg and a.png must not meet
        masks, overlays = (folder / "predictions" / k / name for k in ("masks", "overlays"))
        for path in (masks, overlays):
            path.parent.mkdir(parents=True, exist_ok=True)
        save_mask(ids, masks, data.palette)
        shown = overlay(TF.pil_to_tensor(picture), ids, data.palette, clear=clear)
        TF.to_pil_image(shown).save(overlays)
    print(f"predictions: {folder / 'predictions'}: masks, overlays")


# Pictures


def look(name, view, pairs, positions, args, run, count, masked):
    """What a view makes of some pictures: its outputs, each a batch on the CPU."""
    stream = Stream(f"picture/{name}", positions[:count], min(count, len(positions)), args.seed)
    seen, _ = next(pair_loader(pairs, [view], stream, start=0, stop=1, with_masks=masked,
                               bad=BadImages(pairs, count)))
    return seen[0]


def draw_views(data, split, s, args, run, count=8):
    """views.png, as Figure S3: labelled crops, their masks; looks at unlabelled ones, mixed and
    shuffled."""
    views = {k: Compose(v) for k, v in view_lists(args.dataset, run.image_size, s).items()}
    x, _, mask = look("labeled", views["labeled"], data.train, split.labeled, args, run, count,
                      True)
    rows = {"labelled": x / 255, "its mask": colours(mask, data.palette) / 255}
    if len(split.unlabeled):
        shown = np.random.default_rng(args.seed).permutation(split.unlabeled)
        weak, strong, _, _ = look("unlabeled", views["unlabeled"], data.train, shown, args, run,
                                  count, False)
        torch.manual_seed(args.seed)
        n, size, per_side = len(strong), strong.shape[-1], run.image_size // s.shuffle_tile
        mixed = mix(strong, strong.roll(-1, 0), outside(cutmix_boxes(n, size), size))
        rows |= {"teacher's view": weak / 255, "student's view": strong / 255,
                 "CutMix": mixed / 255}
        if per_side and size % s.shuffle_tile == 0:
            source = shuffle_source(n, per_side, 1.0)
            rows |= {"PatchShuffle": retile(strong, source, per_side) / 255,
                     "both": retile(mixed, source, per_side) / 255}
    report.contact_sheet(rows, run.folder / "views.png", f"views of {args.dataset}")


def validation_looks(data, s, args, run, count):
    """(bytes (n, 3, S, S), extent, truth (n, S, S)) of some validation pictures, made square; in
    the place of a broken one stands the next, as in `evaluate`."""
    def read(i):
        picture = data.val.pil(i)
        return picture, data.val.mask(i, picture.size)

    size, chosen = run.image_size, np.linspace(0, len(data.val) - 1, min(count, len(data.val)))
    view, parts = Compose(view_lists(args.dataset, size, s)["evaluate"]), []
    for i in chosen.astype(int):
        pair, *_ = read_or_next(read, i, np.arange(len(data.val)))
        image, _, truth = view(*pair)
        truth = TF.resize(truth.unsqueeze(0), [size, size], TF.InterpolationMode.NEAREST)[0]
        image = TF.resize(image, [size, size], antialias=True)
        parts.append((image, torch.tensor([size, size]), truth))
    return [torch.stack(part) for part in zip(*parts)]


@torch.no_grad()
def draw_masks(models, teacher, data, s, args, run, path, count=8):
    """Rows: picture, truth, each model's masks, the teacher's confidence (white: 1).

    One model: the picture of a run; two, as Figure S4: "compare.png" of --compare.
    """
    seen = validation_looks(data, s, args, run, count)
    rows = {"picture": seen[0] / 255, "truth": colours(seen[2], data.palette) / 255}

    def ask(model):
        with evaluating(model):
            return probabilities(model, seen, seen[2].shape[-2:], s, run).max(1)

    for title, model in models.items():
        c, y = ask(model)
        rows[title] = colours(y, data.palette) / 255
    if teacher is not None:
        c, _ = ask(teacher.module)
    if len(models) == 1:
        title = "confidence" if teacher is None else "teacher's\nconfidence"
        rows[title] = c.cpu().unsqueeze(1).expand(-1, 3, -1, -1)
    report.contact_sheet(rows, path, f"validation pictures of {args.dataset}")


@torch.no_grad()
def draw_attention(models, data, s, args, run, folder, count=8) -> bool:
    """attention.png, as Figure S1: where the last block looks from the patch under a yellow cross,
    the one that holds most of the rarest class in a picture. False where there is no ViT."""
    models = {k: m for k, m in models.items() if isinstance(m.encoder, ViT)}
    if not models:
        return False
    picture, extent, truth = validation_looks(data, s, args, run, count)
    patch = next(iter(models.values())).encoder.patch_embed.patch_size[0]
    size = picture.shape[-1]
    per_side = -(-size // patch)  # a ViT pads what its patches do not fill
    counts = torch.stack([torch.bincount(t.flatten().long(), minlength=256) for t in truth])
    counts[:, IGNORE] = 0
    rarest = torch.where(counts > 0, counts, 1 << 60).argmin(1)
    of_rarest = (truth == rarest[:, None, None]).float()
    query = F.adaptive_avg_pool2d(of_rarest.unsqueeze(1), per_side).flatten(1).argmax(1)
    at = (torch.stack([query // per_side, query % per_side], 1) + 0.5) * patch  # (n, 2) y, x
    grid = torch.arange(size) + 0.5
    dy, dx = ((grid - at[:, k : k + 1]).abs() for k in (0, 1))  # (n, S) each
    arm, thick = patch / 2, max(1.0, patch / 8)
    cross = ((dy[:, :, None] < arm) & (dx[:, None] < thick)
             | (dx[:, None] < arm) & (dy[:, :, None] < thick))
    yellow = torch.tensor([1.0, 1.0, 0.0]).view(1, 3, 1, 1)
    marked = torch.where(cross.unsqueeze(1), yellow, picture / 255)
    rows = {"marked patch": marked, "truth": colours(truth, data.palette) / 255}
    x = to_model(picture, extent, run.stats.cpu()).to(run.device)
    for title, model in models.items():
        # each model is asked for its own patch with the middle of the cross: patches differ in size
        patch = model.encoder.patch_embed.patch_size[0]
        per_side = -(-size // patch)
        place = (at // patch).long().clamp(max=per_side - 1)  # (n, 2) y, x
        query = place[:, 0] * per_side + place[:, 1]
        with evaluating(model):
            heat = attention_of(model.encoder, x, query.to(run.device)).cpu()
        heat = heat / heat.amax((1, 2), keepdim=True)
        heat = F.interpolate(heat.unsqueeze(1), (size, size), mode="bilinear")
        rows[title] = torch.cat([heat, heat, 1 - heat], 1) * 0.6 + 0.4 * picture / 255
    report.contact_sheet(rows, folder / "attention.png", "attention of the last block")
    return True


# The paper's rows: what --dry-run prints, and the first line of a run on digits


def listed(file: str) -> int | None:
    """How many images a list has; None where there is no such file."""
    lines = Path(file).read_bytes().splitlines() if Path(file).is_file() else ()
    return sum(bool(line.strip()) for line in lines) or None


def labelled_images(args) -> int | None:
    """How many images these flags label: --num-labels, or the list's; None: not known here. A list
    that is not there may be a published one of VOC, by its folder's name."""
    if args.num_labels or not args.labels_file:
        return args.num_labels
    file = args.labels_file[0]
    folders = {name: n for n in LISTS.values() for name in (str(n), UNIMATCH_LISTS.get(n))}
    by_name = folders.get(Path(file).parent.name) if args.dataset == "voc" else None
    return listed(file) or by_name


def images_of(args, pool: str) -> dict[str, int | None]:
    """What a pass of each stage shows, as `main` counts it; None: not known without the data."""
    total, labeled, unlabeled = DATASETS[args.dataset][3], labelled_images(args), None
    if args.dataset == "digits":  # of its own digits are the scenes that --holdout judges by
        total = args.train_scenes or total
    elif total:
        total -= args.holdout
    if percent(args) and total:
        labeled = max(1, round(total * percent(args) / 100))
    if args.labels_file and len(args.labels_file) > 1:
        unlabeled = listed(args.labels_file[1])
    elif total and labeled:
        unlabeled = total - labeled
    if pool == "all":
        unlabeled = unlabeled + labeled if labeled and unlabeled is not None else None
    scenes = (8000 - 1000 * bool(args.holdout)) // 4  # of four digits each
    return dict(pretrain=scenes, sup=labeled, semi=unlabeled)


def published(args) -> bool:
    """Whether --init can be weights that others published: a file, and not of a run of ours."""
    file = Path(args.init or "")
    ours = file.is_dir() or (file.parent / "log.jsonl").exists()
    return args.init == "timm" or bool(file.suffix) and not ours


def paper_args(args) -> SimpleNamespace:
    """The same flags on the paper's data, from its weights; on VOC with the published list nearest
    in size. The digit scenes' usual 3% stand for the smallest one."""
    arch = "deit_base" if args.arch in ("vit_digits", "deit_tiny", "deit_small") else args.arch
    family = ARCHS[arch]["family"]
    init = dict(mit=f"{arch}.pth", deeplab="resnet101.pth").get(family, "deit_base.pth")
    init = "timm" if arch == "vit_large" else init
    changed = dict(arch=arch, init=args.init if published(args) and arch == args.arch else init,
                   stage="all" if args.stage == "pretrain" else args.stage, image_size=None,
                   shuffle_tile=None, train_scenes=None, val_scenes=None, holdout=0)
    if args.dataset not in ("cityscapes", "coco"):
        share = 0 if (args.dataset, percent(args)) == ("digits", 3) else percent(args) or 0
        n = labelled_images(args) or share / 100 * DATASETS["voc"][3] or 1
        n = min(_CLASSIC + _BLEND, key=lambda of: abs(math.log(n / of)))
        files = [f"splits/pascal/{UNIMATCH_LISTS.get(n, n)}/labeled.txt"]
        changed |= dict(dataset="voc", labels=None, num_labels=None, labels_file=files)
    return SimpleNamespace(**{**vars(args), **changed})


def paper_number(args) -> tuple[float, str] | None:
    """(the paper's own mIoU, its table) for exactly these flags, or None."""
    n, arch, (first, *second) = labelled_images(args), args.arch, args.labels_file or [""]
    everything = DATASETS["voc"][3]
    if args.dataset != "voc" or args.stage == "pretrain" or args.holdout or not published(args) or (
            n is None or listed(first) and LISTS.get(list_name(first)) != n or
            second and listed(second[0]) not in (None, everything - n)):
        return None
    # not which flags are given but what comes of them: one may say what the row says
    stage = "sup" if "sup" in (args.method, args.stage) else "semi"
    parts = {"shuffle", "pasa", "ncr", "strong", "pasa_alpha"}
    plain = SimpleNamespace(**{
        **vars(args), **dict.fromkeys(SETTINGS.keys() - parts), "follow": "recommended",
        "unlabeled_pool": None, "image_size": None, "accum_steps": 1})
    s, row = derive(args, stage, 1), derive(plain, stage, 1)
    s.sources, s.micro_batch = row.sources, row.micro_batch
    if s != row or image_size(args) != image_size(plain):
        return None
    # the row of each table that these parts stand for
    host = "base" if args.method in ("mean_teacher", "s4former") else args.method
    host, usual = ("sup", True) if stage == "sup" else (host, s.strong == METHODS[host]["strong"])
    shuffle, ncr = {0.0: False, 0.5: True}.get(s.shuffle), dict(off=False, ncr=True).get(s.ncr)
    pasa = {("off", 5.0): False, ("ours", 5.0): True}.get((s.pasa, s.pasa_alpha))
    ours = {(False,) * 3: False, (True,) * 3: True}.get((shuffle, pasa, ncr))
    rows = {"Table S1": usual and TABLE_S1.get((arch, host, ours))}
    if arch == "vit_large":
        rows["Table S4"] = usual and TABLE_S4.get((host, ours))
    if (arch, host, pasa) == ("deeplabv3plus_r101", "fixmatch", False):
        rows["Table S5"] = usual and TABLE_S5.get((shuffle, ncr))
    if (arch, host) == ("deit_base", "base"):
        rows["Table S2"] = usual and TABLE_S2.get((shuffle, pasa, ncr))
        if (pasa, ncr) == (False, False):
            rows["Table S3"] = {92: TABLE_S3.get((s.strong, shuffle))}
        if (s.pasa, shuffle, ncr) == ("product", False, False):
            rows["supp. S1.3"] = usual and {92: PRODUCT.get(s.pasa_alpha)}
    return next(((row[n], where) for where, row in rows.items() if row and row.get(n)), None)


def command_of(args) -> str:
    """The command with these flags."""
    parts = [f"python {SCRIPT}.py --dataset {args.dataset} --data-path DIR --arch {args.arch}"]
    usual = dict(method="s4former", stage="all", follow="recommended")
    for name in ("init", "labels_file", "labels", "num_labels", "method", "stage", "follow",
                 "unlabeled_pool"):
        value = getattr(args, name)
        text = " ".join(value) if isinstance(value, list) else value
        text = f"{value:g}" if isinstance(value, float) else text
        known = value is None or value == usual.get(name)
        parts += [] if known else [f"--{name.replace('_', '-')} {text}"]
    parts += ["--with-ours"] if args.with_ours else []
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
        share = f"{percent(a):g}% of the images" if percent(a) else (
            f"{labelled_images(a) or 'listed'} images")
        lines.append(f"== {title}: {a.dataset}, {a.arch}, {share} labelled, "
                     f"init {a.init or 'stage pretrain' * (a.dataset == 'digits') or 'none'}")
        lines += [f"   {command_of(a)}"] if title != "this run" else []
        number = paper_number(a)
        if number:
            lines.append(f"   the paper's own result: {number[0]} mIoU ({number[1]}), with the "
                         "published list")
        lines.append(f"   recipe {recipe(a)[0]}: {recipe(a)[1]['source']}")
        for stage in stages_of(a):
            s = derive(a, stage, 1)
            hidden = {"sources", "micro_batch"}
            hidden |= SEMI_ONLY if stage != "semi" else set()
            hidden |= NOT_PRETRAIN if stage == "pretrain" else ONLY_PRETRAIN
            cost = cost_lines(a, stage, s)  # first: it turns passes into updates
            values = {k: v for k, v in vars(s).items() if k not in hidden}
            lines += [report.settings_table(f"stage {stage}", values, s.sources), *cost]
    return "\n".join(lines)


def cost_lines(args, stage, s) -> list[str]:
    """Parameters, images, updates, arithmetic and memory of a stage, on one process."""
    model, n_l = on_meta(args, DATASETS[args.dataset][2] or 21), s.batch_size
    in_updates(s, images_of(args, s.unlabeled_pool)[stage])
    known = s.iterations is not None
    length = f"{s.iterations:,} updates" if known else f"{s.epochs:g} passes"
    costs = report.cost(model, image_size(args))
    of_labeled = report.cost(model, image_size(args), aux=stage != "pretrain")
    count = sum(p.numel() for p in model.parameters())
    aux = sum(p.numel() for p in model.aux.parameters())
    n_u = n_l * s.unlabeled_ratio
    passes = n_l * unlabeled_passes(args, s)
    taught = n_u * (2 if args.method == "unimatch" else 1)  # forward alone; a backward costs two
    flops = 3 * n_l * of_labeled["flops"] + (3 * passes + taught) * costs["flops"]
    kept = (of_labeled["kept"] * n_l + costs["kept"] * passes) / args.accum_steps
    gib = [(costs["fixed"] + kept * share) / 2**30 for share in (1, 0.5)]
    return [f"  parameters {count:,}, without the auxiliary heads {count - aux:,}",
            f"  per update {n_l} labelled + {n_u} unlabelled images, {length} in all",
            f"  per update {flops / 1e12:.4g} TFLOP; memory about {gib[0]:.1f} GiB "
            f"in float32, {gib[1]:.1f} GiB in 16 bit"]


# ===== 9. ENTRY POINT =============================================================================

if __name__ == "__main__":
    main(parse_args())
