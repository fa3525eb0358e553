"""The rows of docs/results.md: what each is, and the command that makes it."""

# name: (table, what, command, seeds); --seed and --split-seed vary together. No table: a
# pretraining, for others to start from. A list of commands: all but the last prepare it, and
# {pretrain} stands for the folder of the first one's run; the first may be another row's name,
# whose runs are then used. A fifth entry: the stages that the row is about, the last of them its
# result; rows with one command share its runs.
ROWS = {
    "semi_vit/digits/sup": (
        "Semi-ViT on the digits, 80 labels", "supervised, the stage that all start from",
        "semi_vit.py --method sup", 3),
    "semi_vit/digits/sup_long": (
        "Semi-ViT on the digits, 80 labels", "supervised, as many updates as both stages",
        "semi_vit.py --method sup --epochs 2176", 3),
    "semi_vit/digits/fixmatch": (
        "Semi-ViT on the digits, 80 labels", "FixMatch (m = 0)",
        "semi_vit.py --method fixmatch", 1),
    "semi_vit/digits/ema_teacher": (
        "Semi-ViT on the digits, 80 labels", "EMA-Teacher, no mixing",
        "semi_vit.py --method ema_teacher", 3),
    "semi_vit/digits/mixup": (
        "Semi-ViT on the digits, 80 labels", "EMA-Teacher + Pseudo Mixup",
        "semi_vit.py --unlabeled-mix mixup", 1),
    "semi_vit/digits/mixup+": (
        "Semi-ViT on the digits, 80 labels", "EMA-Teacher + Pseudo Mixup+",
        "semi_vit.py --unlabeled-mix mixup+", 1),
    "semi_vit/digits/prob": (
        "Semi-ViT on the digits, 80 labels", "Semi-ViT (probabilistic pseudo mixup)",
        "semi_vit.py", 3),
    "semi_vit/digits/mae_prob": (
        "Semi-ViT on the digits, 80 labels", "the same after MAE on all images (stage 1)",
        ["semi_mae.py --method mae",
         "semi_vit.py --init {pretrain}/mae_pretrain_vit_digits.pth"], 3),
    "semi_mae/digits/sup": (
        "Semi-MAE on the digits, 80 labels", "supervised, the stage that all start from",
        "semi_mae.py --method sup", 3),
    "semi_mae/digits/sup_long": (
        "Semi-MAE on the digits, 80 labels", "supervised, as many updates as both stages",
        "semi_mae.py --method sup --epochs 2200", 3),
    "semi_mae/digits/fixmatch": (
        "Semi-MAE on the digits, 80 labels", "FixMatch (no branch)",
        "semi_mae.py --method fixmatch", 3),
    "semi_mae/digits/semi_mae": (
        "Semi-MAE on the digits, 80 labels", "Semi-MAE", "semi_mae.py", 3),
    "simclrv2/digits/sup": (
        "SimCLRv2 on the digits, 80 labels", "labels only, weak augmentation as for fine-tuning",
        "simclrv2.py", 3, ["sup"]),
    "simclrv2/digits/sup_strong": (
        "SimCLRv2 on the digits, 80 labels", "labels only, strong augmentation",
        "simclrv2.py --method sup --augment strong", 3),
    "simclrv2/digits/linear": (
        "SimCLRv2 on the digits, 80 labels", "pretrained, linear classifier on h",
        "simclrv2.py", 3, ["pretrain", "linear"]),
    "simclrv2/digits/finetune": (
        "SimCLRv2 on the digits, 80 labels", "pretrained, fine-tuned",
        "simclrv2.py", 3, ["pretrain", "finetune"]),
    "simclrv2/digits/distill": (
        "SimCLRv2 on the digits, 80 labels", "pretrained, fine-tuned, distilled",
        "simclrv2.py", 3, ["pretrain", "finetune", "distill"]),
    "semiformer/digits/sup": (
        "Semiformer on the digits, 80 labels", "supervised, the stage that all start from",
        "semiformer.py --method sup", 3),
    "semiformer/digits/sup_long": (
        "Semiformer on the digits, 80 labels", "supervised, as many updates as both stages",
        "semiformer.py --method sup --epochs 1100", 3),
    "semiformer/digits/semiformer": (
        "Semiformer on the digits, 80 labels", "Semiformer", "semiformer.py", 3),
    "semiformer/third/cnn_sup": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 1: CNN, supervised",
        "semiformer.py --arch conv_digits --method sup --epochs 367", 3),
    "semiformer/third/cnn_vanilla": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 1: CNN, Vanilla",
        "semiformer.py --arch conv_digits --epochs sup=167,semi=40", 3),
    "semiformer/third/trans_sup": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 1: transformer, supervised",
        "semiformer.py --arch vit_digits --method sup --epochs 367", 3),
    "semiformer/third/trans_vanilla": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 1: transformer, Vanilla",
        "semiformer.py --arch vit_digits --epochs sup=167,semi=40", 3),
    "semiformer/third/conv_labeled": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 1: both, Conv-labeled",
        "semiformer.py --method conv_labeled --epochs sup=167,semi=40", 3),
    "semiformer/third/semiformer": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 1: Semiformer",
        "semiformer.py --epochs sup=167,semi=40", 3),
    "semiformer/third/convmixer": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 3: ViT + ConvMixer",
        "semiformer.py --arch vit_convmixer_digits --epochs sup=167,semi=40", 1),
    "semiformer/third/pit": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 3: PiT + Conv",
        "semiformer.py --arch pit_conv_digits --epochs sup=167,semi=40", 1),
    "semiformer/third/pl_trans": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 6: labels from the transformer",
        "semiformer.py --pseudo-source trans --epochs sup=167,semi=40", 1),
    "semiformer/third/pl_fuse": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 6: labels from both",
        "semiformer.py --pseudo-source fuse --epochs sup=167,semi=40", 1),
    "semiformer/third/conv_conv": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 7: C+C",
        "semiformer.py --arch conv_conv_digits --epochs sup=167,semi=40", 1),
    "semiformer/third/vit_vit": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 7: V+V",
        "semiformer.py --arch vit_vit_digits --epochs sup=167,semi=40", 1),
    "semiformer/third/mae": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Semi-MAE's Table 2: with the MAE branch",
        "semiformer.py --mae-weight 1 --epochs sup=167,semi=40", 1),
    "s4former/scenes/sup": (
        "S4Former on digit scenes, 30 of 1,000 labelled",
        "pretraining and supervised stage, that all start from",
        "s4former.py --method sup", 3),
    "s4former/scenes/sup_long": (
        "S4Former on digit scenes, 30 of 1,000 labelled",
        "supervised, as many updates as both stages",
        "s4former.py --method sup --iterations sup=1400", 3),
    "s4former/scenes/s4former": (
        "S4Former on digit scenes, 30 of 1,000 labelled", "S4Former",
        "s4former.py", 3),
}

_THIRD = {  # Tables S2 and S3 and the supplement's variants: all from one supervised stage
    "mean_teacher": ("mean teacher (Table S3: colour jitter alone)", "--method mean_teacher", 3),
    "base": ("Base: CutMix (Table S2, no part)", "--method base", 3),
    "shuffle": ("Base + PatchShuffle", "--method base --shuffle 0.5", 3),
    "pasa": ("Base + PASA", "--method base --pasa ours", 3),
    "ncr": ("Base + NCR", "--method base --ncr ncr", 3),
    "s4former": ("Base + all three: S4Former", "", 3),
    "shuffle_pasa": ("Base + PatchShuffle + PASA", "--ncr off", 1),
    "pasa_ncr": ("Base + PASA + NCR", "--shuffle 0", 1),
    "shuffle_ncr": ("Base + PatchShuffle + NCR", "--pasa off", 1),
    "s3_cutout": ("Table S3: CutOut", "--method base --strong cutout", 1),
    "s3_mixunmix": ("Table S3: Mix/UnMix", "--method base --strong mixunmix", 1),
    "s3_classmix": ("Table S3: ClassMix", "--method base --strong classmix", 1),
    "s3_shuffle": ("Table S3: PatchShuffle alone", "--method mean_teacher --shuffle 0.5", 1),
    "s3_shuffle_mixunmix": ("Table S3: PatchShuffle + Mix/UnMix",
                            "--method base --strong mixunmix --shuffle 0.5", 1),
    "s3_shuffle_classmix": ("Table S3: PatchShuffle + ClassMix",
                            "--method base --strong classmix --shuffle 0.5", 1),
    "pasa_rand": ("Base + PASA, mask rand", "--method base --pasa rand", 1),
    "pasa_reverse1": ("Base + PASA, mask reverse1", "--method base --pasa reverse1", 1),
    "pasa_reverse2": ("Base + PASA, mask reverse2", "--method base --pasa reverse2", 1),
    "pasa_product": ("Base + PASA, product, alpha 50",
                     "--method base --pasa product --pasa-alpha 50", 1),
    "ncr_all": ("Base + All-CR in the place of NCR", "--method base --ncr all_sq", 1),
    "soft": ("Base, soft pseudo-labels", "--method base --pseudo soft", 1),
    "unimatch": ("UniMatch", "--method unimatch", 1),
    "unimatch_ours": ("UniMatch + ours", "--method unimatch --with-ours", 1),
    "augseg": ("AugSeg", "--method augseg", 1),
    "augseg_ours": ("AugSeg + ours", "--method augseg --with-ours", 1),
}
ROWS |= {f"s4former/third/{name}": (
    "S4Former on digit scenes, a third of stage semi's iterations", what,
    ["s4former/scenes/sup",
     f"s4former.py --stage semi --init {{pretrain}} --iterations semi=267 {flags}".strip()], seeds)
    for name, (what, flags, seeds) in _THIRD.items()}


# ----- photographs on a CPU: small networks, minutes --------------------------------------------

_C10 = "--dataset cifar10 --data-path $SSL_DATA/cifar10"
_NETTE = "--dataset imagenette --data-path $SSL_DATA/imagenette"
_LONG = "supervised, as many updates as both stages"


def _simclr(name, title, flags, long, pretrain=None):
    """SimCLRv2's rows: all seeds after one pretraining; long: epochs of sup_long.

    pretrain: the row whose pretraining is used; its own where None.
    """
    command = f"simclrv2.py {flags} --dtype bf16"
    own, pretrain = not pretrain, pretrain or f"simclrv2/{name}/pretrain"
    after = [pretrain, f"{command} --init {{pretrain}} --evals 2"]
    rows = {
        "pretrain": (None, "contrastive pretraining on all pictures", f"{command} --stage pretrain",
                     1),
        "sup": (title, "labels only", after, 3, ["sup"]),
        "sup_long": (title, "labels only, as many updates as fine-tuning and distillation",
                     f"{command} --method sup --epochs {long} --evals 2", 3),
        "linear": (title, "pretrained, linear classifier on h", after, 3, ["linear"]) if not own
        else (title, "pretrained, linear classifier on h",
              [after[0], f"{after[1]} --method linear"], 3),
        "finetune": (title, "pretrained, fine-tuned", after, 3, ["finetune"]),
        "distill": (title, "pretrained, fine-tuned, distilled", after, 3, ["finetune", "distill"])}
    return {f"simclrv2/{name}/{row}": about for row, about in rows.items()
            if own or row != "pretrain"}


def _mae(name, data, arch="vit_digits"):
    return {f"semi_mae/{name}/mae": (
        None, "MAE on all pictures",
        f"semi_mae.py --method mae {data} --arch {arch} --dtype bf16", 1)}


def _after_mae(script, name, title, data, rows, labels=10, arch="vit_digits"):
    """Rows that start from one MAE on all pictures; rows: what each is, its flags, seeds, ..."""
    init = "{pretrain}" + f"/mae_pretrain_{arch}.pth" * (script == "semi_vit")
    command = f"{script}.py {data} --arch {arch} --labels {labels} --dtype bf16 --evals 2"
    command += f" --init {init}"
    mae = f"semi_mae/{name.removesuffix('_1')}/mae"  # one for all fractions of labels
    return {f"{script}/{name}/{row}": (title, what, [mae, f"{command} {flags}"], seeds, *stages)
            for row, (what, flags, seeds, *stages) in rows.items()}


ROWS |= _simclr("cifar10_1", "SimCLRv2 on CIFAR-10, 1% of the labels, an hour of a CPU",
                f"{_C10} --arch resnet_digits --width 2 --labels 1", 318)
ROWS |= _simclr("cifar10", "SimCLRv2 on CIFAR-10, 10% of the labels, an hour of a CPU",
                f"{_C10} --arch resnet_digits --width 2 --labels 10", 27,
                "simclrv2/cifar10_1/pretrain")
ROWS |= _mae("cifar10", _C10)
_TITLE = "Semi-ViT on CIFAR-10, 10% of the labels, minutes on a CPU"
_SCRATCH = f"semi_vit.py {_C10} --arch vit_digits --labels 10 --evals 2"
ROWS["semi_vit/cifar10/sup"] = (_TITLE, "from scratch: supervised stage", _SCRATCH, 1, ["sup"])
ROWS["semi_vit/cifar10/prob"] = (_TITLE, "from scratch: Semi-ViT", _SCRATCH, 1)
ROWS |= _after_mae("semi_vit", "cifar10", _TITLE, _C10, {
    "mae_sup": ("after MAE: supervised stage", "--method sup --epochs 83 --labeled-aug strong", 3),
    "mae_sup_long": (f"after MAE: {_LONG}", "--method sup --epochs 106 --labeled-aug strong", 3),
    "mae_sup150": ("after MAE: supervised stage, 150 epochs",
                   "--method sup --epochs 150 --labeled-aug strong", 3),
    "mae_sup150_long": (
        "after MAE: supervised, as many updates as these 150 epochs and 3 of stage semi, with an "
        "EMA as well", "--method sup --epochs 164 --labeled-aug strong --ema-decay 0.998", 3)})


def _from_sup(start, rows, arch="vit_digits"):
    """Rows of stage semi alone, from the supervised stage of another row, under its title."""
    command = f"semi_vit.py {_C10} --arch {arch} --labels 10 --dtype bf16 --evals 2"
    command += " --stage semi --init {pretrain}"
    return {f"{start.rpartition('/')[0]}/{row}": (ROWS[start][0], f"after MAE: {what}",
                                                  [start, f"{command} {flags}"], seeds)
            for row, (what, flags, seeds) in rows.items()}


ROWS |= _from_sup("semi_vit/cifar10/mae_sup", {
    "mae_labels": ("stage semi without pseudo-labels (mu = 0)", "--lambda-u 0", 1),
    "mae_fixmatch": ("FixMatch (m = 0, no mixing)", "--method fixmatch", 3),
    "mae_none": ("EMA-Teacher, no mixing", "--unlabeled-mix none", 1),
    "mae_mixup": ("EMA-Teacher, Pseudo Mixup", "--unlabeled-mix mixup", 1),
    "mae_mixup+": ("EMA-Teacher, Pseudo Mixup+", "--unlabeled-mix mixup+", 1),
    "mae_prob5": ("Semi-ViT, five unlabelled pictures a labelled one, ten epochs",
                  "--unlabeled-ratio 5 --epochs 10", 2),
    "mae_prob": ("Semi-ViT", "", 3)})
ROWS |= _from_sup("semi_vit/cifar10/mae_sup150", {
    "mae_labels150": ("stage semi without pseudo-labels (mu = 0), 3 epochs from those 150",
                      "--epochs 3 --lambda-u 0", 2),
    "mae_prob150": ("Semi-ViT, 3 epochs from those 150", "--epochs 3", 3)})
ROWS |= _mae("cifar10_wide", _C10, "vit_cifar")
ROWS |= _after_mae(
    "semi_vit", "cifar10_wide", "Semi-ViT on CIFAR-10, 10% of the labels, 1.2 million weights, an "
    "hour of a CPU", _C10, {
        "mae_sup": ("after MAE: supervised stage", "--method sup --epochs 34", 3),
        "mae_sup_long": (f"after MAE: {_LONG}", "--method sup --epochs 48", 3),
        "mae_sup_long_strong": (f"after MAE: {_LONG}, with RandAugment",
                                "--method sup --epochs 48 --labeled-aug strong", 3)},
    arch="vit_cifar")
ROWS |= _from_sup("semi_vit/cifar10_wide/mae_sup", {
    "mae_labels": ("stage semi without pseudo-labels (mu = 0)", "--lambda-u 0", 1),
    "mae_fixmatch": ("FixMatch (m = 0, no mixing)", "--method fixmatch", 1),
    "mae_prob": ("Semi-ViT", "", 3)}, "vit_cifar")
ROWS |= _after_mae(
    "semi_vit", "cifar10_1", "Semi-ViT on CIFAR-10, 1% of the labels, minutes on a CPU", _C10, {
        "mae_sup": ("after MAE: supervised stage", "", 3, ["sup"]),
        "mae_sup_long": (f"after MAE: {_LONG}", "--method sup --epochs 321", 3),
        "mae_prob": ("after MAE: Semi-ViT", "", 3)}, labels=1)
ROWS |= _after_mae(
    "semi_mae", "cifar10", "Semi-MAE on CIFAR-10, 10% of the labels, after MAE, minutes on a CPU",
    _C10, {"sup": ("supervised stage", "", 3, ["sup"]),
           "sup_long": (_LONG, "--method sup --epochs 32", 3),
           "fixmatch": ("FixMatch (no branch)", "--method fixmatch", 3),
           "semi_mae": ("Semi-MAE", "", 3)})
ROWS |= _after_mae(
    "semi_mae", "cifar10_1", "Semi-MAE on CIFAR-10, 1% of the labels, after MAE, minutes on a CPU",
    _C10, {"sup": ("supervised stage", "", 3, ["sup"]),
           "sup_long": (_LONG, "--method sup --epochs 280", 3),
           "semi_mae": ("Semi-MAE", "", 3)}, labels=1)
_FORMER = f"semiformer.py {_C10} --labels 10 --evals 2 --arch"
ROWS |= {f"semiformer/cifar10/{name}": (
    "Semiformer on CIFAR-10, 10% of the labels, minutes on a CPU", what, f"{_FORMER} {flags}",
    seeds, *stages)
    for name, (what, flags, seeds, *stages) in {
        "sup": ("supervised stage", "vit_conv_digits", 3, ["sup"]),
        "sup_long": (_LONG, "vit_conv_digits --method sup --epochs 38", 3),
        "semiformer": ("Semiformer", "vit_conv_digits", 3),
        "vanilla": ("FixMatch on the CNN stream", "conv_digits", 1),
        "conv_labeled": ("both streams, labels from the CNN, no exchange (Conv-labeled)",
                         "vit_conv_digits --method conv_labeled", 1)}.items()}
_FORMER = f"semiformer.py {_C10} --labels 1 --dtype bf16 --evals 2 --arch vit_conv_digits"
ROWS |= {f"semiformer/cifar10_1/{name}": (
    "Semiformer on CIFAR-10, 1% of the labels, minutes on a CPU", what, f"{_FORMER} {flags}", 3,
    *stages) for name, (what, flags, *stages) in {
        "sup": ("supervised stage", "", ["sup"]),
        "sup_long": (_LONG, "--method sup --epochs 180"),
        "semiformer": ("Semiformer", "")}.items()}
_SMALL = f"{_NETTE} --image-size 64 --patch-size 8"
ROWS |= _mae("imagenette", _SMALL)
ROWS |= _after_mae(
    "semi_vit", "imagenette", "Semi-ViT on Imagenette at 64 pixels, 10% of the labels, minutes on "
    "a CPU", _SMALL, {"mae_sup": ("after MAE: supervised stage", "", 3, ["sup"]),
                      "mae_sup_long": (f"after MAE: {_LONG}", "--method sup --epochs 195", 3),
                      "mae_prob": ("after MAE: Semi-ViT", "", 3)})
ROWS |= _after_mae(
    "semi_mae", "imagenette", "Semi-MAE on Imagenette at 64 pixels, 10% of the labels, after MAE, "
    "minutes on a CPU", _SMALL, {"sup": ("supervised stage", "", 3, ["sup"]),
                                 "sup_long": (_LONG, "--method sup --epochs 140", 3),
                                 "semi_mae": ("Semi-MAE", "", 3)})
_FORMER = (f"semiformer.py {_NETTE} --labels 10 --dtype bf16 --evals 2 --image-size 32 "
           "--arch vit_conv_digits")
ROWS |= {f"semiformer/imagenette/{name}": (
    "Semiformer on Imagenette at 32 pixels, 10% of the labels, minutes on a CPU", what,
    f"{_FORMER} {flags}", 3, *stages) for name, (what, flags, *stages) in {
        "sup": ("supervised stage", "", ["sup"]),
        "sup_long": (_LONG, "--method sup --epochs 304"),
        "semiformer": ("Semiformer", "")}.items()}
ROWS |= _simclr("imagenette", "SimCLRv2 on Imagenette at 48 pixels, 10% of the labels, minutes on "
                "a CPU", f"{_NETTE} --image-size 48 --arch resnet_digits --labels 10", 198)
_CAMVID = ("s4former.py --dataset camvid --data-path $SSL_DATA/camvid --labels 12.5 --arch mit_b0 "
           "--image-size 128 --lr 1e-3 --head-lr-scale 1 --warmup-iterations 50 --tau 0.8 "
           "--evals 2")
ROWS |= {f"s4former/camvid/{name}": (
    "S4Former on CamVid, 1/8 of the masks, minutes on a CPU", what, f"{_CAMVID} {flags}", 3,
    *stages) for name, (what, flags, *stages) in {
        "sup": ("supervised stage", "--iterations sup=300,semi=200", ["sup"]),
        "sup_long": ("supervised, as many updates as both stages",
                     "--method sup --iterations sup=500"),
        "s4former": ("S4Former", "--iterations sup=300,semi=200")}.items()}


# ----- photographs on a GPU: larger networks, more updates. Settings that nobody has tried yet ----


def _gpu(name, title, data, sup, semi, semi_l, both, mae_row=None):
    """Rows of one data set; batches of 64 labelled pictures; mae_row: whose pretraining is used.

    Epochs: sup, of stage sup; semi, over the unlabelled pictures (semi_vit.py); semi_l, over the
    labelled ones (semi_mae.py, semiformer.py); both, over the labelled ones for as many updates as
    both stages.
    """
    vit = f"semi_vit.py {data} --arch vit_tiny --batch-size 64"
    mae = f"semi_mae.py {data} --arch vit_tiny --batch-size 64 --epochs sup={sup},semi={semi_l}"
    former = f"semiformer.py {data} --batch-size sup=64,semi=512 --batch-group 0"
    former += " --schedule each --arch"
    simclr = f"simclrv2.py {data} --arch resnet18 --epochs pretrain=300,distill=100"
    steps, long = f"--epochs sup={sup},semi={semi}", f"--method sup --epochs {both}"
    of_former = f"--epochs sup={sup},semi={semi_l}"
    pretrained = mae_row or f"gpu/{name}/mae", "--init {pretrain}/mae_pretrain_vit_tiny.pth"
    rows = {  # what, command, seeds, stages where the row is about some of them
        "mae": ("MAE on all pictures", f"semi_mae.py {data} --method mae --arch vit_tiny", 1),
        "semi_vit/sup": ("Semi-ViT: supervised stage", f"{vit} {steps}", 3, ["sup"]),
        "semi_vit/sup_long": ("supervised, as many updates as both stages", f"{vit} {long}", 3),
        "semi_vit/prob": ("Semi-ViT", f"{vit} {steps}", 3),
        "semi_vit/mae_sup": ("after MAE: supervised stage",
                             [pretrained[0], f"{vit} {steps} {pretrained[1]}"], 3, ["sup"]),
        "semi_vit/mae_sup_long": ("after MAE: supervised, as many updates as both stages",
                                  [pretrained[0], f"{vit} {long} {pretrained[1]}"], 3),
        "semi_vit/mae_prob": ("after MAE: Semi-ViT",
                              [pretrained[0], f"{vit} {steps} {pretrained[1]}"], 3),
        "semi_mae/sup": ("Semi-MAE: supervised stage", mae, 3, ["sup"]),
        "semi_mae/sup_long": ("supervised, as many updates as both stages", f"{mae} {long}", 3),
        "semi_mae/semi_mae": ("Semi-MAE", mae, 3),
        "semiformer/sup": ("Semiformer: supervised stage", f"{former} vit_conv {of_former}", 3,
                           ["sup"]),
        "semiformer/sup_long": ("supervised, as many updates as both stages",
                                f"{former} vit_conv {long}", 3),
        "semiformer/semiformer": ("Semiformer", f"{former} vit_conv {of_former}", 3),
        **{f"simclrv2/{stages[-1]}": (f"SimCLRv2: {what}", simclr, 3, stages) for what, stages in {
            "labels only": ["sup"], "linear": ["pretrain", "linear"],
            "fine-tuned": ["pretrain", "finetune"],
            "distilled": ["pretrain", "finetune", "distill"]}.items()},
        "simclrv2/sup_strong": ("labels only, strong augmentation",
                                f"{simclr} --method sup --augment strong", 3),
    }
    if name == "cifar10_10":  # the others too: FixMatch over seeds, the rest as single runs
        rows |= {
            "semi_vit/fixmatch": ("Semi-ViT's FixMatch (m = 0)", f"{vit} {steps} --method fixmatch",
                                  3),
            **{f"semi_vit/{mix}": (f"EMA-Teacher, mixing: {mix}",
                                   f"{vit} {steps} --unlabeled-mix {mix}", 1)
               for mix in ("none", "mixup", "mixup+")},
            "semi_mae/fixmatch": ("Semi-MAE's FixMatch (no branch)", f"{mae} --method fixmatch", 3),
            "semi_mae/lomar": ("Semi-MAE with LoMaR's branch", f"{mae} --mim lomar", 1),
            "semi_mae/pretrained": ("Semi-MAE after MAE", [pretrained[0], f"{mae} {pretrained[1]}"],
                                    1),
            "semiformer/vanilla": ("FixMatch on the CNN stream", f"{former} conv {of_former}", 3),
            "semiformer/conv_labeled": ("Conv-labeled", f"{former} vit_conv {of_former} "
                                        "--method conv_labeled", 1),
        }
    return {f"gpu/{name}/{row}": (title if row != "mae" else None, *rest)
            for row, rest in rows.items() if row != "mae" or not mae_row}


ROWS |= {
    **_gpu("cifar10_10", "CIFAR-10, 10% of the labels, on a GPU", f"{_C10} --labels 10", 100, 40,
           72, 172),
    **_gpu("cifar10_1", "CIFAR-10, 1% of the labels, on a GPU", f"{_C10} --labels 1", 1000, 40,
           880, 1880, mae_row="gpu/cifar10_10/mae"),
    **_gpu("imagenette_10", "Imagenette, 10% of the labels, on a GPU", f"{_NETTE} --labels 10",
           300, 150, 279, 579),
}
_CAMVID = "s4former.py --dataset camvid --data-path $SSL_DATA/camvid --labels 12.5 --arch mit_b0"
ROWS |= {f"gpu/camvid/{name}": ("CamVid, 1/8 of the masks, on a GPU", what, f"{_CAMVID}{flags}",
                                seeds, *stages) for name, (what, flags, seeds, *stages) in {
    "sup": ("supervised stage", "", 3, ["sup"]),
    "sup_long": ("supervised, as many updates as both stages",
                 " --method sup --iterations sup=16000", 3),
    "base": ("FixMatch with CutMix (Base)", " --method base", 3),
    "mean_teacher": ("mean teacher", " --method mean_teacher", 1),
    "s4former": ("S4Former", "", 3)}.items()}
ROWS = {name: (title, what, " ".join(command.split()) if isinstance(command, str) else
               [" ".join(c.split()) for c in command], *rest)
        for name, (title, what, command, *rest) in ROWS.items()}  # no double blanks
