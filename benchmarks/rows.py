"""The rows of docs/results.md: what each is, and the command that makes it."""

# name: (table, what, command, seeds); --seed and --split-seed vary together. A list of commands:
# all but the last prepare it, and {pretrain} stands for the folder of the first one's run; the
# first may be another row's name, whose runs are then used. A fifth entry: the stages that the row
# is about, the last of them its result; rows with one command share its runs.
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
