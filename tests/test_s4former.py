"""S4Former: equations by hand, stored numbers of the authors' code, one step of each host, layouts.

tests/parity/s4former.pt holds what the authors' functions returned (released repository, CPU, torch
2.15); its draws are stored, so no random stream is compared.
"""

import json
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SCRIPTS, ends, numbers, only_run
from PIL import Image
from torch import nn

import s4former as S
from common import checkpoint
from common.amp import Precision
from common.ema import Ema
from common.mask_views import confusion, iou, windows
from common.masks import Pairs
from common.pictures import BadImage
from common.splits import UserError

PARITY = torch.load(ROOT / "tests" / "parity" / "s4former.pt", weights_only=True)
SCRIPT = next(x for x in SCRIPTS if x.name == "s4former")
FP32 = Precision(torch.device("cpu"), "fp32")
IGNORE = 255


def close(a, b, tol):
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    assert a.shape == b.shape and (a - b).abs().max() <= tol, (a - b).abs().max()


def parse(text=""):
    return S.parse_args(text.split())


def settings(text="", stage="semi"):
    return S.derive(parse(text), stage, 1)


def model_of(text="", num_classes=11, seed=0):
    torch.manual_seed(seed)
    return S.build_model(parse(text), num_classes)


def whose(perm):
    """(N, T) permutations within images -> the flat source of `retile`."""
    n, tiles = perm.shape
    return (perm + tiles * torch.arange(n)[:, None]).flatten()


# ----- stored numbers ---------------------------------------------------------------------------


def test_parity_patch_shuffle():
    case = PARITY["patch_shuffle_full"]
    out = S.retile(case["img"], whose(case["index"]), case["n_per_side"])
    assert torch.equal(out, case["out"])
    assert torch.equal(S.restore(out, whose(case["index"]), case["n_per_side"]), case["img"])


def test_parity_feature_restoration():
    case = PARITY["restore_tokens"]
    feature = case["tokens"].transpose(1, 2).unflatten(2, (8, 8))
    assert 8 // case["tile_tokens"] == 4
    out = S.restore(feature, whose(case["index"]), 4)
    assert torch.equal(out.flatten(2).transpose(1, 2), case["out"])


@pytest.mark.parametrize("kind, stored", [("ours", "mask_adaptive"), ("plain", "mask_plain")])
def test_parity_pasa_mask(kind, stored):
    case = PARITY["pasa_mask_vit"]
    mask = S.pasa_mask(1 - case["unconf"].flatten(1), case["alpha"], kind)
    close(mask.repeat_interleave(case["num_heads"], 0), case[stored], 1e-6)


def test_parity_one_block_with_and_without_the_mask():
    case = PARITY["pasa_encoder_layer"]
    vit = S.ViT(8, (0,), embed_dim=24, depth=1, num_heads=3, patch_size=2, mlp_ratio=2.0)
    names = {"ln": "norm", "attn.attn.in_proj_": "attn.qkv.", "attn.attn.out_proj": "attn.proj",
             "ffn.layers.0.0": "mlp.fc1", "ffn.layers.1": "mlp.fc2"}
    state = {}
    for name, value in case["state"].items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        state[name] = value
    vit.blocks[0].load_state_dict(state)
    mask = case["mask"].view(2, 3, 17, 17)
    assert torch.equal(mask[:, 0], mask[:, 2])  # one mask for all heads
    close(vit.blocks[0](case["x"]).detach(), case["out_nomask"], 1e-4)
    close(vit.blocks[0](case["x"], attn_mask=mask[:, :1]).detach(), case["out_mask"], 1e-4)


@pytest.mark.parametrize("grid, stored", [((32, 32), "to_32x32"), ((9, 13), "to_9x13")])
def test_parity_position_embedding(grid, stored):
    case = PARITY["pos_embed_resize"]
    close(S.resize_pos_embed(case["pe"], tuple(case["src_hw"].tolist()), grid), case[stored], 1e-5)


def test_parity_patch_confidence():
    case = PARITY["conf_to_patch_vit"]
    c = case["teacher_logits"].softmax(1).amax(1)
    close(1 - S.patch_confidence(c > case["tau"], (2, 2)), case["unconf"].flatten(1), 1e-6)


@pytest.mark.parametrize("mode, stored", [
    ("ncr", "unsup_only"), ("all", "all"), ("kl", "kl"), ("kl_neg", "unsup_only_kl")])
def test_parity_ncr(mode, stored):
    case = PARITY["ncr"]
    z = case["student_logits"].clone().requires_grad_()
    loss = S.ncr_loss(z, case["teacher_logits"], case["hard_label"].long(), mode)
    close(loss.detach(), case[f"ncr_{stored}"], 1e-5)
    close(torch.autograd.grad(loss, z)[0], case[f"grad_ncr_{stored}"], 1e-6)
    if mode == "kl_neg":
        close(loss.detach() / 2, case["ncr_reweight_unsup_only_kl"], 1e-5)


def test_parity_pseudo_labels_and_their_cross_entropy():
    case = PARITY["ncr"]
    z = case["student_logits"].clone().requires_grad_()
    teacher = nn.Identity()
    _, _, _, y = S.teach(teacher, case["teacher_logits"], case["tau"], FP32)
    assert torch.equal(y, case["hard_label"].long())
    close((y != IGNORE).float().mean(), case["mask_ratio"], 1e-6)
    loss = S.pixel_ce(z, y)
    close(loss.detach(), case["ce_unsup"], 1e-5)
    close(torch.autograd.grad(loss, z)[0], case["grad_ce"], 1e-6)


def test_parity_ncr_limits():
    case, z = PARITY["ncr_limits"], torch.randn(1, PARITY["ncr_limits"]["K"], 7, 12)
    y = torch.full((1, 7, 12), IGNORE)
    assert S.ncr_loss(z, z, y) == case["all_ignored_ncr"] == 0
    assert S.pixel_ce(z, y) == case["all_ignored_ce"] == 0
    y.view(-1)[: case["n_conf"]] = 2
    assert y.numel() == case["n_pixels"]
    close(S.ncr_loss(z, z, y), case["identical"], 1e-9)


def test_parity_supervised_ce():
    case = PARITY["sup_ce"]
    loss = case["loss_weight"] * S.pixel_ce(case["logits"], case["label"][:, 0].long())
    close(loss, case["loss"], 1e-5)


def test_parity_cutmix_and_labels_of_a_quarter_of_the_size():
    case = PARITY["cutmix"]
    keep = S.outside(case["box_y0y1x0x1"], 24)
    img, label = case["img"], case["label"]
    assert case["partner"].tolist() == [1, 2, 0]
    assert torch.equal(S.mix(img, img.roll(-1, 0), keep), case["out_img"])
    out = S.mix(label, label.roll(-1, 0), keep)
    assert torch.equal(out, case["out_label"])
    small = label[:, ::4, ::4]  # nearest up, mix, nearest down
    up = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    mixed = S.mix(up, up.roll(-1, 0), keep)[:, ::4, ::4]
    assert torch.equal(S.mix(small, small.roll(-1, 0), keep), mixed)


def test_parity_classmix():
    case = PARITY["classmix"]
    img, label = case["img"], case["label"]
    keep = case["keep_mask"].bool()
    assert torch.equal(S.mix(img, img.roll(-1, 0), keep), case["out_img"])
    assert torch.equal(S.mix(label, label.roll(-1, 0), keep), case["out_label"])
    scores = torch.zeros(3, 256)  # the classes that were kept get the highest draws
    for i in range(3):
        scores[i, label[i][keep[i]].unique().long()] = 1.0
    assert torch.equal(S.class_keep(label, scores), keep)


def test_parity_ema():
    case = PARITY["ema"]
    net = nn.Module()
    net.conv, net.bn, net.other_norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    net.load_state_dict(case["teacher_before"])
    teacher = Ema(net)
    net.load_state_dict(case["student"])
    teacher.update(net, case["momentum"])
    for name, value in teacher.module.state_dict().items():
        if not name.startswith("other_norm.running") and "tracked" not in name:
            close(value, case["teacher_after"][name], 1e-6)  # those two: by their name in the code


def test_parity_learning_rates():
    case = PARITY["lr"]
    setr = settings("--dataset voc --arch deit_base", "sup")
    for name, base in (("setr_backbone", 1e-3), ("setr_head", 1e-2),
                       ("setr_mt_config_backbone", 1e-2)):
        for t, rate in zip(case["iters_setr"].tolist(), case[name].tolist()):
            assert abs(S.lr_at(t, 80001, base, setr) - rate) < 1e-10  # E9
    segformer = settings("--dataset cityscapes --arch mit_b4", "sup")
    for name, scale in (("segformer_backbone", 1), ("segformer_head", segformer.head_lr_scale)):
        for t, rate in zip(case["iters_segformer"].tolist(), case[name].tolist()):
            assert abs(S.lr_at(t, 40000, segformer.lr * scale, segformer) - rate) < 1e-10
    assert S.lr_at(0, 40000, 6e-5, segformer) == pytest.approx(6e-11)
    assert S.lr_at(80000, 80000, 1e-3, setr) == S.lr_at(80000, 80000, 1e-2, setr) == 1e-4


def test_parity_sliding_windows():
    case, seen = PARITY["slide"], []

    def network(x):
        seen.append(x)
        return torch.cat([x * len(seen), x + len(seen), -x], 1)

    close(S.slide(case["x_small"], network, 12, 8), case["pred_small"], 1e-5)
    for height, width in ((1024, 2048), (1025, 2049)):
        at = [[t, t + 768, left, left + 768] for t, left in windows(height, width, 768, 512)]
        assert at == case[f"windows_{height}x{width}_768_512"].tolist() and len(at) == 8


def test_parity_miou():
    case = PARITY["miou"]
    matrix = sum(confusion(p, y, 5) for p, y in zip(case["pred"], case["label"]))
    close(iou(matrix), case["iou"], 1e-5)
    close(iou(matrix).nanmean(), case["miou"], 1e-5)
    close(matrix.diagonal().sum() / matrix.sum(), case["aacc"], 1e-5)
    without = confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 3)  # class 2 nowhere
    assert iou(without)[2].isnan() and not iou(without).nanmean().isnan()


COUNTS = {  # of build_model, by what is counted
    ("deit_base", 21, 512): dict(encoder="deitb_backbone_512", head="pup_decode_768_21",
                                 aux="pup_aux_768_21", all="setr_deitb_student_trainable_4aux_voc"),
    ("deit_base", 81, 512): dict(head="pup_decode_768_81", aux="pup_aux_768_81"),
    ("deit_base", 19, 768): dict(encoder="deitb_backbone_768", head="pup_decode_768_19",
                                 aux="pup_aux_768_19"),
    ("vit_large", 21, 512): dict(encoder="vitl_backbone_512", head="pup_decode_1024_21",
                                 aux="pup_aux2_1024_21"),
    ("vit_large", 81, 512): dict(head="pup_decode_1024_81", aux="pup_aux2_1024_81"),
    ("vit_large", 19, 512): dict(head="pup_decode_1024_19", aux="pup_aux2_1024_19"),
    ("mit_b4", 21, 512): dict(encoder="mit_b4", head="segformer_head_256_21"),
    ("mit_b4", 81, 512): dict(head="segformer_head_256_81"),
    ("mit_b4", 19, 512): dict(head="segformer_head_256_19"),
    ("deeplabv3plus_r101", 21, 384): dict(encoder="deeplabv3plus_r101_backbone",
                                          all="deeplabv3plus_r101_voc"),
}


@pytest.mark.parametrize("arch, k, size", COUNTS)
def test_parity_parameter_counts(arch, k, size):
    model = S.on_meta(parse(f"--dataset voc --arch {arch} --image-size {size}"), k)
    parts = dict(encoder=model.encoder, head=model.head, all=model)
    parts |= {"aux": model.aux[0]} if model.aux else {}
    stored = PARITY["param_counts"]
    for part, name in COUNTS[arch, k, size].items():
        assert sum(p.numel() for p in parts[part].parameters()) == stored[name], part
    if (arch, k) == ("deit_base", 21):
        at_test = sum(p.numel() for part in (model.encoder, model.head) for p in part.parameters())
        assert at_test == stored["setr_deitb_inference_voc"]


@pytest.mark.parametrize("k", [21, 81, 19])
def test_parity_counts_of_heads_that_no_arch_here_has(k):
    heads = {f"pup_aux1_1024_{k}": S.PUPHead(1024, 256, k, 0, 1, 4),
             f"segformer_head_768_{k}": S.SegFormerHead((64, 128, 320, 512), 768, k)}
    for name, head in heads.items():
        assert sum(p.numel() for p in head.parameters()) == PARITY["param_counts"][name], name


# ----- PatchShuffle -----------------------------------------------------------------------------


def test_shuffle_then_restore_is_the_identity_at_full_size():
    x = torch.arange(2 * 3 * 512 * 512).view(2, 3, 512, 512)
    source = S.shuffle_source(2, 512 // settings("--dataset voc").shuffle_tile, 1.0)
    assert len(source) == 2 * 16 and not torch.equal(source, torch.arange(32))
    assert (source[:16] < 16).all() and (source[16:] >= 16).all()  # within images
    shuffled = S.retile(x, source, 4)
    assert not torch.equal(shuffled, x) and torch.equal(S.restore(shuffled, source, 4), x)
    pooled = F.avg_pool2d(shuffled.double(), 16)  # features of a 16 x 16 patch go the same way
    torch.testing.assert_close(S.restore(pooled, source, 4), F.avg_pool2d(x.double(), 16))


def test_shuffle_is_drawn_for_each_image_and_may_fail():
    assert torch.equal(S.shuffle_source(3, 4, 0.0), torch.arange(48))
    perm = torch.rand(3, 16).argsort(1)
    source = S.shuffle_source(3, 4, 0.5, perm, torch.tensor([True, False, True])).view(3, 16)
    assert source[1].tolist() == list(range(16, 32)) and torch.equal(source[0], perm[0])
    torch.manual_seed(0)
    share = (S.shuffle_source(4000, 2, 0.5).view(4000, 4) != torch.arange(16000).view(4000, 4))
    assert 0.44 < share.any(1).float().mean() < 0.52  # half of them, less the 1 in 24 identities


@pytest.mark.parametrize("arch, size", [("vit_digits", 64), ("mit_b0", 64)])
def test_an_identical_permutation_changes_nothing(arch, size):
    model = model_of(f"--arch {arch} --image-size {size}").eval()
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        plain = model(x)
        same = model(x, source=torch.arange(8), per_side=2)
    torch.testing.assert_close(plain, same)


def test_a_constant_image_without_positions_is_the_same_when_shuffled():
    model = model_of("--arch deit_tiny --image-size 64").eval()
    nn.init.zeros_(model.encoder.pos_embed)
    x, source = torch.full((1, 3, 64, 64), 0.3), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(S.retile(x, source, 2), source=source,
                                                   per_side=2))


def test_position_embeddings_stay_where_they_are_and_features_come_back_before_the_decoder():
    model, source = model_of("--arch deit_tiny --image-size 64").eval(), torch.tensor([1, 0, 2, 3])
    x = torch.rand(1, 3, 64, 64)
    seen = []
    model.head.convs[0].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(S.retile(x, source, 2), source=source, per_side=2)
        feature = model.encoder(S.retile(x, source, 2))[-1]  # tokens get the place where they sit
        expected = model.head.norm(S.restore(feature, source, 2).permute(0, 2, 3, 1))
    torch.testing.assert_close(seen[0], expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize("arch", ["deit_tiny", "mit_b0", "deeplabv3plus_r101"])
def test_every_decoder_gets_all_its_features_back_in_their_places(arch):
    model = model_of(f"--arch {arch} --image-size 64 --dataset voc").eval()
    nn.init.normal_(model.head.classifier.weight, std=0.5)
    x, source = torch.randn(2, 3, 64, 64), torch.tensor([2, 0, 3, 1, 5, 4, 7, 6])
    shuffled = S.retile(x, source, 2)
    with torch.no_grad():
        seen, features = model(shuffled, source=source, per_side=2), model.encoder(shuffled)
        at_home = model.head([S.restore(f, source, 2) for f in features])
        torch.testing.assert_close(seen, at_home, rtol=1e-4, atol=1e-4)
        for k in range(len(features)):  # each level counts that the decoder looks at
            if arch != "deit_tiny" or k == 3:
                mixed = [f if j == k else S.restore(f, source, 2) for j, f in enumerate(features)]
                assert (model.head(mixed) - at_home).abs().max() > 1e-2, k


@pytest.mark.parametrize("shuffle", [0.0, 1.0])
def test_mixed_and_shuffled_tiles_are_put_back(shuffle):
    """A student that shows its input: put back with what it is given, that is the image."""
    s = settings(f"--image-size 64 --shuffle-tile 32 --strong mixunmix --shuffle {shuffle}")
    x, seen = torch.rand(3, 3, 64, 64), []
    among, perm = torch.rand(3, 4).argsort(0), torch.rand(3, 4).argsort(1)
    draws = dict(among=among, perm=perm, on=torch.tensor([shuffle > 0] * 3))

    def student(x, source, per_side):
        seen.append(x)
        return S.restore(x, source, per_side)

    for cut in (True, False):
        out = S.augmented_pass(student, x, s, FP32, dict(draws, cut=torch.tensor(cut)))
        mixed = S.retile(x, S.unmix_source(3, 2, among), 2) if cut else x  # first, then the shuffle
        expected = S.retile(mixed, whose(perm), 2) if shuffle else mixed
        assert torch.equal(out, x) and torch.equal(seen[-1], expected)


def test_mix_unmix_moves_tiles_between_images_at_equal_places():
    among = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]])
    source = S.unmix_source(2, 2, among)
    x = torch.arange(2)[:, None, None, None].expand(2, 1, 4, 4).clone()  # image i is all i
    mixed = S.retile(x, source, 2)
    assert mixed[0, 0, :2, :2].eq(1).all() and mixed[0, 0, :2, 2:].eq(0).all()
    assert torch.equal(S.restore(mixed, source, 2), x)
    drawn = S.unmix_source(4, 2).view(4, 4)
    assert torch.equal(drawn % 4, torch.arange(4).expand(4, 4))  # places stay
    assert torch.equal(drawn.sort(0).values // 4, torch.arange(4)[:, None].expand(4, 4))


# ----- PASA -------------------------------------------------------------------------------------


def test_pasa_at_512_pixels_leaves_exactly_half_of_the_patches_alone():
    c = torch.rand(2, 1024)
    mask = S.pasa_mask(c, 5.0)
    assert mask.shape == (2, 1025, 1025) and not mask[:, :, 0].any()  # no query to the class token
    zero = (mask[:, 1:] == 0).all(2)
    assert (zero.sum(1) == 512).all()
    assert c[zero].view(2, 512).min(1).values.ge(c[~zero].view(2, 512).max(1).values).all()
    torch.testing.assert_close(mask[:, 0, 1:], 5 * (1 - c))  # the class token's query is biased
    same = S.pasa_mask(torch.full((1, 10), 0.5), 1.0)
    assert (same[0, 1:6] == 0).all() and (same[0, 6:, 1:] == 0.5).all()  # E11: the earlier ones


@pytest.mark.parametrize("kind", S.PASA)
def test_pasa_kinds_by_hand(kind):
    c = torch.tensor([[0.75, 0.25]])  # patch 0 is the confident half
    rand = torch.arange(6.0).view(1, 3, 2) / 10
    rows = {  # class token, sure patch, unsure patch; before alpha = 4
        "ours": [[0.25, 0.75], [0, 0], [0.25, 0.75]],
        "plain": [[0.25, 0.75]] * 3,
        "rand": [[0.0, 0.1], [0.2, 0.3], [0.4, 0.5]],  # Eq. 1
        "reverse1": [[0, 0], [0.75, 0.25], [0, 0]],  # Eq. 2
        "reverse2": [[0.75, 0.25], [0, 0], [0.75, 0.25]],  # Eq. 3
        "product": [[0.25, 0.75], [0.0625, 0.1875], [0.1875, 0.5625]],  # Eq. 4
    }[kind]
    mask = S.pasa_mask(c, 4.0, kind, rand=rand)
    torch.testing.assert_close(mask[0], F.pad(4 * torch.tensor(rows), (1, 0)))
    assert S.pasa_mask(c, 4.0, kind, tokens=0).shape == (1, 2, 2)
    torch.manual_seed(0)
    a, b = (S.pasa_mask(torch.rand(2, 9), 1.0, "rand") for _ in range(2))
    assert not torch.equal(a, b) and not torch.equal(a[0], a[1]) and a.max() <= 1


def test_pasa_rows_by_the_median_are_strictly_above_it():
    c = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert S.confident_half(c).tolist() == [[True, True, False, False]]
    assert not S.confident_half(c, "median").any()  # then every row is biased
    assert S.confident_half(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), "median").sum() == 2
    for c in (torch.rand(3, 9), torch.rand(3, 16).round(decimals=1)):
        assert torch.equal(S.confident_half(c, "median"), c > c.median(1, keepdim=True).values)


def test_the_released_segformers_mask_has_its_rows_off_by_one():
    c = torch.linspace(1, 0, 256).view(1, 256)
    mask = S.quirk_mask(c, 5.0)
    zero = (mask == 0).all(2)[0]
    assert zero.sum() == 127 and zero[:127].all()  # patches 1 to 127, counted from 0
    torch.testing.assert_close(mask[0, 200], 5 * c[0])


@pytest.mark.parametrize("arch", ["vit_digits", "deit_tiny", "mit_b0"])
def test_a_mask_of_zeros_is_plain_attention_and_another_one_is_not(arch):
    model = model_of(f"--arch {arch} --image-size 64").eval()
    side = 64 // S.ARCHS[arch]["stride"]
    x, c = torch.rand(2, 3, 64, 64), torch.rand(2, side * side)
    with torch.no_grad():
        plain = model(x)
        for conf, alpha in ((c, 0.0), (torch.ones_like(c), 5.0)):
            mask = S.pasa_mask(conf, alpha, tokens=model.encoder.tokens)
            torch.testing.assert_close(model(x, mask=mask), plain, rtol=1e-4, atol=1e-5)
        mask = S.pasa_mask(c, 50.0, tokens=model.encoder.tokens)
        assert (model(x, mask=mask) - plain).abs().max() > 1e-5


def test_the_mask_is_added_once_in_every_layer():
    model, seen = model_of("--arch deit_tiny --image-size 64").eval(), []
    for block in model.encoder.blocks:
        block.attn.register_forward_pre_hook(
            lambda m, a, k: seen.append(k["attn_mask"]), with_kwargs=True)
    mask = S.pasa_mask(torch.rand(2, 16), 5.0)
    model(torch.rand(2, 3, 64, 64), mask=mask)
    assert len(seen) == 12 and all(m.shape == (2, 1, 17, 17) for m in seen)
    assert all(torch.equal(m[:, 0], mask) for m in seen)


def test_pasa_makes_unsure_patches_look_at_unsure_patches():
    vit = model_of("--arch deit_tiny --image-size 64").eval().encoder
    c = torch.zeros(1, 16)
    c[0, :8] = 1.0
    mask = S.pasa_mask(c, 5.0)[:, None]
    with torch.no_grad():
        x = vit.blocks[0].norm1(vit._pos_embed(vit.patch_embed(torch.rand(1, 3, 64, 64))))
    attn = vit.blocks[0].attn
    qkv = attn.qkv(x).unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    scores = qkv[0] @ qkv[1].transpose(-2, -1) * attn.scale
    before, after = scores.softmax(-1), (scores + mask).softmax(-1)
    for weights, given in ((before, None), (after, mask)):  # the network's rows are queries too
        by_hand = attn.proj((weights @ qkv[2]).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attn(x, attn_mask=given), by_hand, rtol=1e-4, atol=1e-5)
    assert (after[0, :, 9:, 9:].sum(-1) > before[0, :, 9:, 9:].sum(-1) + 0.1).all()
    torch.testing.assert_close(after[0, :, 1:9], before[0, :, 1:9])  # sure queries: untouched


def test_patch_confidence_counts_pixels():
    sure = torch.rand(2, 512, 512) > 0.3
    c = S.patch_confidence(sure, (32, 32))
    assert torch.equal(c * 256, (c * 256).round()) and c.shape == (2, 1024)
    torch.testing.assert_close(c[1, 33], sure[1, 16:32, 16:32].float().mean())
    quarter = S.patch_confidence(sure[:, ::4, ::4], (16, 16))  # SegFormer: 8 x 8 at stride 4
    assert torch.equal(quarter * 64, (quarter * 64).round()) and quarter.shape == (2, 256)


# ----- losses -----------------------------------------------------------------------------------


def test_ncr_does_not_see_the_positive_class():
    torch.manual_seed(0)
    z_s, z_t = torch.randn(2, 5, 4, 4).requires_grad_(), torch.randn(2, 5, 4, 4)
    y = torch.randint(0, 5, (2, 4, 4))
    y[0, :2] = IGNORE
    loss = S.ncr_loss(z_s, z_t, y)
    grad = torch.autograd.grad(loss, z_s)[0]
    hot = F.one_hot(torch.where(y == IGNORE, 0, y), 5).permute(0, 3, 1, 2).bool()
    assert grad.isfinite().all() and not grad[hot].any() and not grad[0, :, :2].any()
    assert grad[1].abs().max() > 0
    other = torch.where(hot, 50.0, z_s.detach())  # any change of the positive class's logit
    close(S.ncr_loss(other, z_t, y), loss.detach(), 1e-7)
    close(S.ncr_loss(z_s + 7.0, z_t - 3.0, y).detach(), loss.detach(), 1e-6)


def test_ncr_by_hand():
    z_s, z_t = torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2)
    z_t[0, 1, 0, 0] = math.log(3.0)  # without class 0: teacher 3/4, 1/4, student 1/2, 1/2
    y = torch.tensor([[[0, IGNORE]]])  # one of two pixels
    for mode, value in (
        ("ncr", math.sqrt(2 / 16) / 2), ("ncr_sq", 2 / 16 / 2),
        ("kl_neg", (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2),
        ("all_sq", ((0.2 - 1 / 3) ** 2 * 2 + (0.6 - 1 / 3) ** 2) / 2),  # Eq. 6: 1/5, 3/5, 1/5
        ("all", math.sqrt((0.2 - 1 / 3) ** 2 * 2 + (0.6 - 1 / 3) ** 2) / 2),
    ):
        close(S.ncr_loss(z_s, z_t, y, mode), value, 1e-5)


def test_ncr_at_equality_has_a_finite_gradient_also_from_16_bit():
    z = torch.randn(1, 21, 8, 8)
    y = torch.full((1, 8, 8), IGNORE)
    y[0, :4] = 3
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        z_s = z.to(dtype).requires_grad_()
        loss = S.ncr_loss(z_s, z_s.detach(), y)
        close(loss.detach(), 1e-6 * math.sqrt(20) / 2, 1e-9)
        assert loss.dtype == torch.float32 and torch.autograd.grad(loss, z_s)[0].isfinite().all()


def test_cross_entropy_is_a_mean_over_all_pixels():
    z = torch.zeros(1, 10, 4, 4).requires_grad_()
    y = torch.zeros(1, 4, 4, dtype=torch.long)
    full = S.pixel_ce(z, y)
    y[0, 2:] = IGNORE  # half of the pixels, half of the loss
    close(S.pixel_ce(z, y).detach(), full.detach() / 2, 1e-7)
    assert full.item() == pytest.approx(math.log(10))
    assert not torch.autograd.grad(S.pixel_ce(z, y), z)[0][0, :, 2:].any()  # ignored: no gradient


def test_soft_labels_in_both_forms():
    z, z_t = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    z[0, 0], z_t[0, 0] = math.log(9.0), math.log(3.0)  # student 0.9, teacher 0.75
    y = torch.tensor([[[0, IGNORE]]])
    teacher = -(0.75 * math.log(0.9) + 0.25 * math.log(0.1)) / 2
    close(S.soft_ce(z, z_t, y), teacher, 1e-6)
    close(S.soft_ce(z, z_t, y, "label"), -math.log(3 / 4) / 2, 1e-6)  # Eq. 5: sqrt(9) to 1


def test_the_threshold_is_strict():
    _, c, y_hat, y = S.teach(nn.Identity(), torch.zeros(1, 2, 1, 1), 0.5, FP32)
    assert c == 0.5 and y == IGNORE and y_hat in (0, 1)


# ----- strong views -----------------------------------------------------------------------------


def test_cutmix_boxes_have_half_of_the_area():
    torch.manual_seed(0)
    boxes = S.cutmix_boxes(4000, 512)
    w, h = boxes[:, 3] - boxes[:, 2], boxes[:, 1] - boxes[:, 0]
    assert w.min() >= 257 and w.max() <= 511 and {257, 511} <= set(w.tolist())
    assert torch.equal(h, (131072 / w).round().long())
    assert ((w * h - 131072).abs() <= w / 2).all()
    assert boxes.min() == 0 and boxes[:, [1, 3]].max() == 512


@pytest.mark.parametrize("strong", ["cutmix", "classmix", "cutout", "none"])
def test_one_mask_mixes_image_label_and_teacher_logits(strong):
    torch.manual_seed(0)
    y = torch.randint(0, 3, (4, 8, 8))
    x, z = (y.unsqueeze(1).expand(4, k, 8, 8).float() for k in (3, 5))  # all say the same
    s = settings(f"--dataset voc --strong {strong}")
    x_m, y_m, z_m = S.strong_view(x, y, z, s, dict(cut=torch.tensor(True)))
    if strong == "cutout":
        assert (y_m == IGNORE).any() and torch.equal(x_m[:, 0] == 0, (y_m == IGNORE) | (y == 0))
        assert torch.equal(z_m, z)
    else:
        assert torch.equal(x_m[:, 0], y_m.float()) and torch.equal(z_m[:, 0], y_m.float())
        assert torch.equal(y_m, y) == (strong == "none")
        assert ((y_m == y) | (y_m == y.roll(-1, 0))).all()  # the next image of the batch
    kept = S.strong_view(x, y, z, s, dict(cut=torch.tensor(False)))
    assert torch.equal(kept[0], x) and torch.equal(kept[1], y)
    s.ncr_teacher = "unmixed"
    assert torch.equal(S.strong_view(x, y, z, s, dict(cut=torch.tensor(True)))[2], z)


def test_classmix_keeps_half_of_the_classes_and_one():
    y = torch.tensor([[[0, 1, 2, 3]], [[0, 1, 2, 255]], [[255, 255, 255, 255]], [[7, 7, 7, 255]]])
    for _ in range(20):
        keep = S.class_keep(y)
        assert [len(set(k[0].tolist())) for k in (y[0][keep[0]][None], y[1][keep[1]][None])] == [
            3, 2]
        assert not keep[1, 0, 3] and keep[2].all() and keep[3].tolist() == [[True] * 3 + [False]]


def test_adaptive_cutmix_with_given_draws():
    """rho 1: no labelled paste; side floor(S sqrt(1 - lam)), centre at S/8 + draw * 7/8 S."""
    lam = torch.tensor([0.75, 0.75])
    centres = torch.tensor([[[0.0, 0.0]] * 2, [[0.5, 0.5]] * 2])
    paste = torch.tensor([0.5, 0.5])
    keep_l, keep_u = S.adaptive_keep(torch.tensor([0.0, 1.0]), 64, lam, lam, centres, paste)
    box = torch.zeros(64, 64, dtype=torch.bool)
    box[:24, :24] = True  # side 32 around (8, 8), clipped
    assert torch.equal(~keep_l[0], box) and keep_l[1].all()
    assert (~keep_u[0]).sum() == 32 * 32 and not keep_u[0, 36, 36]
    assert S.image_confidence(torch.zeros(1, 4, 2, 2)) == 0
    assert S.image_confidence(100 * F.one_hot(torch.zeros(1, 2, 2).long(), 4).permute(
        0, 3, 1, 2).float()) == pytest.approx(1.0)


# ----- views ------------------------------------------------------------------------------------


def picture(height, width, masks=3):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    return image, Image.fromarray(rng.integers(0, masks, (height, width)).astype(np.uint8))


def test_image_and_mask_go_through_one_draw():
    s = settings("--dataset voc --image-size 96", "sup")
    s.scale_min, s.scale_max = 0.1, 0.4
    ids = np.random.default_rng(0).integers(0, 200, (12, 16)).astype(np.uint8)
    ids = np.kron(ids, np.ones((20, 20), np.uint8))
    image, mask = Image.fromarray(np.stack([ids] * 3, 2)), Image.fromarray(ids)
    *steps, last = S.view_lists("voc", 96, s)["labeled"]
    last.jitter = (False,)
    for seed in range(20):
        random.seed(seed)
        x, extent, y = S.Compose([*steps, last])(image, mask)
        inside = y != IGNORE
        assert inside.sum() == extent.prod() and x.shape == (3, 96, 96)
        agree = ((x[0].int() - y.int()).abs() <= 2)[inside].float().mean()
        assert agree > 0.5, seed  # away from the edges of the 20-pixel squares


def test_padding_is_zero_after_normalising_and_has_no_class():
    s = settings("--dataset voc --image-size 64", "sup")
    s.scale_min = s.scale_max = 0.05  # 512 x 0.05: smaller than the crop
    random.seed(0)
    x, extent, y = S.Compose(S.view_lists("voc", 64, s)["labeled"])(*picture(40, 60))
    assert extent.tolist() == [25, 38] and (y[25:] == IGNORE).all() and (y[:, 38:] == IGNORE).all()
    stats = torch.tensor([100.0, 50.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    out = S.to_model(x[None], extent[None], stats)[0]
    assert not out[:, 25:].any() and not out[:, :, 38:].any()
    torch.testing.assert_close(out[:, :25, :38], (x[:, :25, :38].float() - 100) / 50)


def test_unlabelled_views_never_look_at_a_mask():
    """E1: with any mask, or none, the looks are the same; the looks share crop and flip."""
    s = settings("--dataset voc --image-size 64 --shuffle-tile 32")
    image, mask = picture(200, 300)
    view, looks = S.Compose(S.view_lists("voc", 64, s)["unlabeled"]), []
    for given in (mask, Image.new("L", (300, 200), 3), None):
        random.seed(4)
        looks.append(view(image, given))
    for other in looks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(looks[0][:3], other[:3]))
    assert (looks[2][3] == IGNORE).all() and not torch.equal(looks[0][0], looks[0][1])
    steps = S.view_lists("voc", 64, s, looks=3)["unlabeled"]
    steps[-1].jitter = (False,) * 3
    weak, strong, third, *_ = S.Compose(steps)(image, None)
    assert torch.equal(weak, strong) and torch.equal(weak, third)


def test_labelled_crops_are_redrawn_where_one_class_fills_them():
    ids = torch.zeros(1, 200, 200, dtype=torch.uint8)
    ids[:, 90:110, 90:110] = 1
    ids[:, 100:, 90:110] = 2
    image = torch.zeros(3, 200, 200)
    def share(ratio):
        random.seed(0)
        return sum(len(S.RandomCrop(20, ratio)(image, ids)[1].unique()) > 1 for _ in range(200))
    assert share(0.75) > share(1.0) + 50


def test_scales_are_those_of_the_released_config():
    """(2048, 512) x ratio bounds the long and the short side; sizes are rounded."""
    scale = S.RandomScale((2048, 512), 1.0, 1.0)
    image, mask = torch.zeros(3, 375, 500), torch.zeros(1, 375, 500, dtype=torch.uint8)
    assert scale(image, mask)[0].shape[-2:] == (512, 683)
    scale = S.RandomScale((2049, 1025), 1.0, 1.0)
    image, mask = torch.zeros(3, 1024, 2048), torch.zeros(1, 1024, 2048, dtype=torch.uint8)
    assert scale(image, mask)[1].shape[-2:] == (1025, 2049)


def test_photometric_distortion_keeps_to_its_ranges(monkeypatch):
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    monkeypatch.setattr(S.random, "random", lambda: 0.9)  # every coin fails
    assert torch.equal(S.photometric(image), image)
    for seed in range(50):
        monkeypatch.undo()
        random.seed(seed)
        assert S.photometric(image).dtype == torch.uint8
    coins = iter([0.1, 0.9, 0.9, 0.9, 0.9])  # brightness alone
    monkeypatch.setattr(S.random, "random", lambda: next(coins))
    monkeypatch.setattr(S.random, "uniform", lambda a, b: -31.5)
    close(S.photometric(image), (image.float() - 31.5).clamp(min=0).floor(), 0)  # cut off
    coins = iter([0.9, 0.9, 0.1, 0.9, 0.9])  # saturation alone, to 0: grey of the largest channel
    monkeypatch.setattr(S.random, "uniform", lambda a, b: 0.0)
    assert torch.equal(S.photometric(image), image.amax(0, keepdim=True).expand(3, -1, -1))
    monkeypatch.setattr(S.random, "uniform", lambda a, b: 1.5)
    for coins in ([0.9, 0.1, 0.1, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9, 0.1]):  # contrast, first or last
        coins = iter(coins)
        close(S.photometric(image), (image * 1.5).clamp(max=255).floor(), 0)
    bounds, coins = [], iter([0.9, 0.9, 0.9, 0.1, 0.9])  # hue alone, a third of the circle
    monkeypatch.setattr(S.random, "randint", lambda a, b: bounds.append((a, b)) or 60)
    red, green = (torch.tensor(x, dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 2)
                  for x in ((255, 0, 0), (0, 255, 0)))
    assert torch.equal(S.photometric(red), green) and bounds == [(-18, 17)]


# ----- scenes -----------------------------------------------------------------------------------


def test_scenes_are_deterministic_and_hold_what_they_say():
    digits = S.load_dataset("digits", None)
    a, b = (S.scenes(digits.train, 30, 64, 0, "train") for _ in range(2))
    assert np.array_equal(a.pixels, b.pixels) and np.array_equal(a.masks, b.masks)
    other = S.scenes(digits.train, 30, 64, 1, "train")
    assert not np.array_equal(a.masks, other.masks)
    assert a.masks.max() <= 10 and (a.masks == 0).mean() > 0.4
    counts = [len(np.unique(m)) - 1 for m in a.masks]
    assert 1 <= min(counts) and max(counts) <= 4
    light = a.pixels.mean(3)
    assert light[a.masks > 0].mean() > light[a.masks == 0].mean() + 40


def test_validation_scenes_are_made_of_other_digits():
    args = parse("--train-scenes 5 --val-scenes 4 --image-size 32")
    data, digits = S.load_data(args)
    assert (len(data.train), len(data.val)) == (5, 4) and data.train.pixels.shape[1:] == (32, 32, 3)
    assert len(digits.train) == 8000 and len(digits.val) == 2000
    held, digits = S.load_data(parse("--train-scenes 50 --image-size 32 --holdout 20"))
    assert (len(held.train), len(held.val)) == (50, 20)  # scenes of training digits, not shared
    assert (len(digits.train), len(digits.val)) == (7000, 1000)
    assert not set(digits.train.ids) & set(digits.val.ids)
    assert all(i.startswith(b"train/") for i in digits.val.ids)


# ----- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, size, out", [
    ("vit_digits", 64, 64), ("deit_tiny", 64, 64), ("mit_b0", 64, 16)])
def test_logits_have_the_size_of_the_crop_or_stride_four(arch, size, out):
    model = model_of(f"--arch {arch} --image-size {size}", 5).eval()
    z = model(torch.rand(1, 3, size, size), aux=True)
    assert all(x.shape == (1, 5, out, out) for x in z) and len(z) == 1 + S.ARCHS[arch].get("aux", 0)
    odd = model(torch.rand(1, 3, size + 7, size + 20))  # padded to whole patches
    assert odd.shape[0] == 1 and odd.shape[2] >= out


def test_the_vit_is_timms_and_takes_any_size():
    """forward_intermediates on the trained grid; bilinear position embedding on another."""
    vit = model_of("--arch deit_tiny --image-size 64").encoder.eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        ours = vit(x)
        tokens = vit.patch_embed(x).flatten(1, 2)
        tokens = torch.cat([vit.cls_token.expand(2, -1, -1), tokens], 1) + vit.pos_embed
        for k, block in enumerate(vit.blocks):
            tokens = block(tokens)
            if k == 4:
                expected = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
                torch.testing.assert_close(ours[0], expected)  # the raw stream after block 4
        torch.testing.assert_close(ours[-1].flatten(2).transpose(1, 2), tokens[:, 1:])
        assert vit(torch.rand(1, 3, 50, 90))[-1].shape == (1, 192, 4, 6)
    assert vit.outputs == [4, 7, 9, 11] and isinstance(vit.norm, nn.Identity)


@pytest.mark.parametrize("arch, blocks", [
    ("deit_tiny", [4, 7, 9, 11]), ("deit_base", [4, 7, 9, 11]), ("vit_large", [9, 14, 19, 23])])
def test_auxiliary_heads_stand_on_the_four_outputs(arch, blocks):
    model = S.on_meta(parse(f"--dataset voc --arch {arch}"), 21)
    assert model.encoder.outputs == blocks and model.head.index == 3
    assert [head.index for head in model.aux] == [0, 1, 2, 3]


def test_the_supervised_loss_has_five_terms():
    model, features = model_of("--arch deit_tiny --image-size 32").eval(), {}
    for k in (4, 7, 9, 11):
        model.encoder.blocks[k].register_forward_hook(
            lambda m, given, out, k=k: features.update({k: out[:, 1:].transpose(1, 2)}))
    for head in (model.head, *model.aux):
        nn.init.normal_(head.classifier.weight, std=0.5)
    x, y = torch.randn(2, 3, 32, 32), torch.randint(0, 11, (2, 32, 32))
    y[0, :9] = IGNORE
    s = settings("--arch deit_tiny --aux-weight 0.3", "sup")
    losses = S.sup_step(model, x, y, s, FP32)
    terms = [F.cross_entropy(head([features[k].unflatten(2, (2, 2))] * 4), y, ignore_index=IGNORE,
                             reduction="sum") / y.numel()
             for head, k in zip((model.head, *model.aux), (11, 4, 7, 9, 11))]
    close(losses["loss_l"].detach(), terms[0].detach(), 1e-5)
    close(losses["loss"].detach(), (terms[0] + 0.3 * sum(terms[1:])).detach(), 1e-5)


def test_the_classifier_commutes_with_the_last_upsampling():  # E8
    head = model_of("--arch deit_tiny --image-size 64", 7).eval().head
    x = torch.rand(2, 192, 4, 4)
    with torch.no_grad():
        y = head.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for conv in head.convs:
            y = F.interpolate(conv(y), scale_factor=2, mode="bilinear", align_corners=False)
        torch.testing.assert_close(head([x] * 4), head.classifier(y), rtol=1e-4, atol=1e-6)


def test_heads_start_as_in_the_released_code():
    model = model_of("--arch deit_base --image-size 32 --dataset voc", 21)
    conv = model.head.convs[1][0].weight
    assert conv.std().item() == pytest.approx(0.0295, rel=0.02)  # fan out 256 x 9, ReLU
    assert model.aux[0].classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not model.head.classifier.bias.any() and model.head.norm.eps == 1e-6


def test_the_masked_stage_of_mit_is_timms_stage():
    mit = S.MiT((1, 1, 1, 2), (32, 64, 160, 256)).eval()
    x = torch.rand(2, 160, 4, 4)
    with torch.no_grad():
        plain = mit.stages[3](x)
        rows, columns = torch.zeros(2, 2, 4, 4)
        rows[:, 0], columns[:, :, 0] = 50.0, 50.0
        for mask in (torch.zeros(2, 4, 4), rows):  # equal for all keys of a query: no difference
            torch.testing.assert_close(S.masked_stage(mit.stages[3], x, mask), plain)
        assert (S.masked_stage(mit.stages[3], x, columns) - plain).abs().max() > 0.01


def test_attention_of_a_patch_sums_to_what_the_class_token_leaves():
    vit = model_of("--arch deit_tiny --image-size 64").encoder.eval()
    a = S.attention_of(vit, torch.rand(2, 3, 64, 64), torch.tensor([0, 9]))
    assert a.shape == (2, 4, 4) and (a >= 0).all() and (a.sum((1, 2)) < 1).all()
    assert (a.sum((1, 2)) > 0.8).all()


@pytest.mark.parametrize("size", [64, 24])  # 8 x 8 patches; 3 x 3, which no cut in two divides
def test_stage_pretrain_takes_the_mean_of_each_quarter(size):
    torch.manual_seed(0)
    encoder, dims = S.build_encoder(parse(f"--image-size {size}"))
    model = S.DigitClassifier(encoder, dims[-1]).eval()
    x = torch.rand(2, 3, size, size)
    feature = model.norm(model.encoder(x)[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    means = F.adaptive_avg_pool2d(feature, 2).flatten(2).transpose(1, 2)
    assert torch.equal(model(x), model.classifier(means))  # to the bit


# ----- published weights ------------------------------------------------------------------------


def renamed(state, table):
    """Keys by (pattern of ours -> theirs), the other way round from FORMATS."""
    out = {}
    for name, value in state.items():
        for pattern, replacement in table:
            if re.fullmatch(pattern, name):
                name = re.sub(pattern, replacement, name)
                break
        out[name] = value
    return out


MMLAB = [
    (r"patch_embed\.proj\.(.*)", r"backbone.patch_embed.projection.\1"),
    (r"blocks\.(\d+)\.norm(\d)\.(.*)", r"backbone.layers.\1.ln\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(.*)", r"backbone.layers.\1.attn.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(.*)", r"backbone.layers.\1.attn.proj.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(.*)", r"backbone.layers.\1.ffn.layers.0.0.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(.*)", r"backbone.layers.\1.ffn.layers.1.\2"),
    (r"(cls_token|pos_embed)", r"backbone.\1"),
]
NVLABS = [(rf"stages\.{s}\.blocks\.(\d+)\.mlp\.dwconv\.(.*)",
           rf"block{s + 1}.\1.mlp.dwconv.dwconv.\2") for s in range(4)] + [
    (rf"stages\.{s}\.blocks\.(.*)", rf"block{s + 1}.\1") for s in range(4)] + [
    (rf"stages\.{s}\.downsample\.(.*)", rf"patch_embed{s + 1}.\1") for s in range(1, 4)] + [
    (rf"stages\.{s}\.norm\.(.*)", rf"norm{s + 1}.\1") for s in range(4)] + [
    (r"patch_embed\.(.*)", r"patch_embed1.\1")]
MMLAB_MIT = [
    (rf"stages\.{s}\.blocks\.(\d+)\.{ours}", rf"layers.{s}.1.\1.{theirs}")
    for s in range(4) for ours, theirs in (
        (r"attn\.proj\.(.*)", r"attn.attn.out_proj.\2"), (r"mlp\.fc1\.(.*)", r"ffn.layers.0.\2"),
        (r"mlp\.dwconv\.(.*)", r"ffn.layers.1.\2"), (r"mlp\.fc2\.(.*)", r"ffn.layers.4.\2"),
        (r"(.*)", r"\2"))] + [
    (rf"stages\.{s}\.downsample\.proj\.(.*)", rf"layers.{s}.0.projection.\1") for s in (1, 2, 3)
] + [(rf"stages\.{s}\.downsample\.norm\.(.*)", rf"layers.{s}.0.norm.\1") for s in (1, 2, 3)] + [
    (rf"stages\.{s}\.norm\.(.*)", rf"layers.{s}.2.\1") for s in range(4)] + [
    (r"patch_embed\.proj\.(.*)", r"layers.0.0.projection.\1"),
    (r"patch_embed\.norm\.(.*)", r"layers.0.0.norm.\1")]


def published(kind, state):
    """An encoder's weights as a file of that kind has them."""
    head = {"head.weight": torch.zeros(1000, 4), "head.bias": torch.zeros(1000)}
    last = {"norm.weight": torch.ones(4), "norm.bias": torch.zeros(4)}
    if kind == "deit":
        return dict(model=state | head | last)
    if kind == "timm":
        return state | head | last
    if kind == "mmlab":
        named = renamed(state, MMLAB)
        return dict(meta={}, state_dict=named | {
            "backbone.ln1.weight": torch.ones(4), "backbone.ln1.bias": torch.zeros(4),
            "head.layers.head.weight": torch.zeros(1000, 4)})
    if kind == "mit":
        return renamed(state, NVLABS) | head
    if kind == "mmlab_mit":
        joined = {}
        for name, value in state.items():
            if ".attn.q." in name:
                joined[name.replace(".attn.q.", ".attn.attn.in_proj_")] = torch.cat(
                    [value, state[name.replace(".attn.q.", ".attn.kv.")]])
            elif ".attn.kv." not in name:
                conv = ".mlp.fc" in name and name.endswith("weight")
                joined[name] = value[:, :, None, None] if conv else value
        return renamed(joined, MMLAB_MIT)
    return {k.removeprefix("net."): v for k, v in state.items()} | {"fc.weight": torch.ones(2, 2)}


@pytest.mark.parametrize("kind, arch", [
    ("deit", "deit_tiny"), ("timm", "deit_tiny"), ("mmlab", "deit_tiny"), ("mit", "mit_b0"),
    ("mmlab_mit", "mit_b0"), ("resnet", "deeplabv3plus_r101")])
def test_published_weights_reach_the_encoder(kind, arch, tmp_path):
    donor = model_of(f"--arch {arch} --image-size 32 --dataset voc", seed=1).encoder.state_dict()
    torch.save(published(kind, donor), tmp_path / "w.pth")
    model = model_of(f"--arch {arch} --image-size 64 --dataset voc", seed=2)
    head = {k: v.clone() for k, v in model.head.state_dict().items()}
    args = parse(f"--arch {arch} --image-size 64 --dataset voc --init {tmp_path / 'w.pth'}")
    assert S.load_init(model, args) == kind
    for name, value in model.encoder.state_dict().items():
        if name == "pos_embed":
            close(value, S.resize_pos_embed(donor[name], (2, 2), (4, 4)), 1e-6)
        else:
            assert torch.equal(value, donor[name]), name
    assert all(torch.equal(v, head[k]) for k, v in model.head.state_dict().items())
    broken = published(kind, {k: v for k, v in list(donor.items())[:-1]})
    torch.save(broken, tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth.*missing"):
        S.load_init(model, args)


def test_weights_of_a_run_reach_encoder_and_decoder(tiny, straight, tmp_path):
    ends(SCRIPT.name, SCRIPT.argv(tiny, "--stage sup --output sup"), tmp_path)
    state = checkpoint.load_newest(tmp_path / "sup")["model"]
    args = parse("--image-size 32 --init " + str(tmp_path / "sup"))
    model = S.build_model(args, 11)
    assert S.load_init(model, args) == "run"
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    ends(SCRIPT.name, SCRIPT.argv(tiny, "--stage pretrain --output pre"), tmp_path)
    state = checkpoint.load_newest(tmp_path / "pre")["model"]
    args.init, model = str(tmp_path / "pre"), S.build_model(args, 11)
    S.load_init(model, args)
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, state[f"encoder.{name}"]), name


# ----- optimiser --------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["--arch deit_tiny", "--arch mit_b0 --dataset cityscapes",
                                   "--arch deeplabv3plus_r101 --dataset voc"])
def test_every_parameter_is_in_one_group_and_heads_learn_ten_times_as_fast(flags):
    args = parse(flags)
    s, model = S.derive(args, "sup", 1), S.on_meta(args, 19)
    groups, names = S.parameter_groups(model, s), {p: n for n, p in model.named_parameters()}
    grouped = [p for g in groups for p in g["params"]]
    assert len(grouped) == len(set(grouped)) == len(names)
    for group in groups:
        for p in group["params"]:
            assert (group["lr_scale"] == 1) == names[p].startswith("encoder.")
            if s.optimizer == "adamw":
                norm = re.search(r"norm\d?\.|(fuse|levels\.\d)\.1\.", names[p])
                assert group["weight_decay"] == (0 if norm else 0.01), names[p]
    assert {g["lr_scale"] for g in groups} == {1.0, s.head_lr_scale}


@pytest.mark.parametrize("name, kind", [
    ("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_optimisers_are_what_they_are_called_and_all_groups_have_one_floor(name, kind):
    s = settings(f"--dataset voc --optimizer {name} --weight-decay 0.1", "sup")
    optimizer = S.build_optimiser(model_of("--arch deit_tiny --image-size 32"), s)
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert group.get("momentum", 0.9) == 0.9 and not group.get("nesterov")
        assert group.get("betas", (0.9, 0.999)) == (0.9, 0.999)
    for step, rates in ((0, {1e-3, 1e-2}), (80000, {1e-4})):
        S.set_lr(optimizer, step, 80000, s)
        assert {group["lr"] for group in optimizer.param_groups} == rates


def test_a_masked_first_update_leaves_sgd_as_it_was():
    model = nn.Linear(2, 2)
    s = settings("--dataset voc", "sup")
    optimizer = S.build_optimiser(model, s)
    before = model.weight.detach().clone()
    for value in (math.nan, 1.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        S.set_lr(optimizer, 0, 10, s)
        loss = torch.tensor(value)
        Precision(torch.device("cpu"), "fp32").update(optimizer, dict(loss=loss))
        if math.isnan(value):
            assert torch.equal(model.weight, before)
    torch.testing.assert_close(model.weight.detach(), before - 0.01)  # heads: 10 x 1e-3


# ----- one step of each method ------------------------------------------------------------------


HOSTS = {
    "fixmatch": "--method fixmatch", "mean_teacher": "--method mean_teacher",
    "base": "--method base", "s4former": "", "soft": "--pseudo soft",
    "classmix": "--strong classmix", "cutout": "--strong cutout", "mixunmix": "--strong mixunmix",
    "both": "--follow D1=paper", "soft_conf": "--follow D4=paper,D5=paper",
    "unimatch": "--method unimatch", "unimatch_ours": "--method unimatch --with-ours",
    "augseg": "--method augseg", "augseg_ours": "--method augseg --with-ours",
    **{f"pasa_{k}": f"--pasa {k}" for k in S.PASA},
    **{f"ncr_{k}": f"--ncr {k}" for k in ("ncr_sq", "all", "all_sq", "kl", "kl_neg")},
}


def step_of(flags, arch="vit_digits", size=64, seed=0, **more):
    """(losses of one semi step, student, teacher) on stored tensors."""
    args = parse(f"--arch {arch} --image-size {size} --shuffle-tile 32 --tau semi=0.1 {flags}")
    s = S.derive(args, "semi", 1)
    for name, value in more.items():
        setattr(s, name, value)
    torch.manual_seed(seed)
    student = S.build_model(args, 11).train()
    nn.init.normal_(student.head.classifier.weight, std=0.5)
    teacher = Ema(student)
    x = torch.randn(10, 4, 3, size, size)
    y = torch.randint(0, 11, (4, size, size))
    looks = list(x[1:7]) if args.method == "unimatch" else list(x[1:3])
    step = S.SEMI_STEPS.get(args.method, S.s4former_step)
    losses, y_hat, c = step(student, teacher, x[0], y, looks, s, FP32)
    return losses, student, teacher, y_hat, c, s


@pytest.mark.parametrize("name", HOSTS)
def test_one_step_of_every_host_and_variant(name):
    weights = " --lambda-u semi=3 --ncr-weight semi=0.2"
    losses, student, teacher, y_hat, c, s = step_of(HOSTS[name] + weights)
    assert all(v.isfinite() for v in losses.values()) and 0 < losses["kept"] <= 1
    assert y_hat.shape == c.shape == (4, 64, 64)
    for part, on in (("loss_pasa", s.pasa != "off"), ("loss_ncr", s.ncr != "off"),
                     ("loss_features", name == "unimatch")):
        assert (part in losses) == on
    share = 0.5 if s.pasa != "off" or "unimatch" in name else 1.0
    first = losses.get("loss_pasa", losses.get("loss_features", 0.0))
    expected = share * losses["loss_aug"] + 0.5 * first + 0.2 * losses.get("loss_ncr", 0.0)
    close(losses["loss_u"].detach(), torch.as_tensor(expected).detach(), 1e-6)
    close(losses["loss"].detach(), (losses["loss_l"] + 3 * losses["loss_u"]).detach(), 1e-5)
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    passes = {"unimatch": 4, "unimatch_ours": 4}.get(name, 2 + (s.pasa != "off"))
    assert student.head.convs[0][1].num_batches_tracked == passes  # BatchNorm: for each pass
    assert teacher.module.head.convs[0][1].num_batches_tracked == 0


@pytest.mark.parametrize("part, arch, variants", [
    ("loss_pasa", "vit_digits", ["", "--follow D4=paper", "--follow D5=paper", "--pasa-alpha 9",
                                 *(f"--pasa {k}" for k in S.PASA if k != "ours")]),
    ("loss_pasa", "mit_b0", ["", "--follow D6=code"]),
    ("loss_ncr", "vit_digits", ["", "--follow D1=paper", "--follow D3=code", *(
        f"--ncr {k}" for k in ("ncr_sq", "all", "all_sq", "kl", "kl_neg"))]),
    ("loss_aug", "vit_digits", ["", "--pseudo soft", "--pseudo soft --follow D15=paper"]),
])
def test_each_variant_reaches_its_loss(part, arch, variants):
    """The same images and draws: the named loss alone differs, and from every other variant."""
    plain = "--method base --pasa ours --ncr ncr --tau semi=0.6"
    found = [step_of(f"{plain} {flags}", arch)[0] for flags in variants]
    assert len({losses[part].item() for losses in found}) == len(variants)
    for name in {"loss_l", "loss_pasa", "loss_aug", "loss_ncr"} - {part}:
        same = len({losses[name].item() for losses in found}) == 1
        assert same or "--pasa rand" in variants or (part, name) == ("loss_aug", "loss_pasa"), name


@pytest.mark.parametrize("flags, conf, rows, kind", [
    ("", "binary", "half", "ours"), ("--follow D4=paper", "soft", "half", "ours"),
    ("--follow D5=paper", "binary", "median", "ours"),
    ("--pasa reverse1", "binary", "half", "reverse1")])
def test_the_mask_of_the_pass_is_the_one_that_is_asked_for(flags, conf, rows, kind):
    s = settings(f"--tau 0.5 --pasa-alpha 3 {flags}")
    student, c, seen = model_of("--arch vit_digits"), torch.rand(2, 64, 64), []
    student.register_forward_pre_hook(lambda m, a, k: seen.append(k["mask"]), with_kwargs=True)
    S.pasa_pass(student, torch.randn(2, 3, 64, 64), c, s, FP32, {})
    c_j = F.avg_pool2d((c if conf == "soft" else (c > 0.5).float())[:, None], 8).flatten(1)
    torch.testing.assert_close(seen[0], S.pasa_mask(c_j, 3.0, kind, rows))


@pytest.mark.parametrize("arch, flags", [
    ("deit_tiny", ""), ("mit_b0", ""), ("mit_b0", "--follow D6=code"),
    ("deeplabv3plus_r101", "--method fixmatch --shuffle 0.5 --ncr ncr")])
def test_one_step_of_every_family(arch, flags):
    losses, student, *_, c, s = step_of(flags, arch)
    assert c.shape[-1] == (16 if arch == "mit_b0" else 64)  # SegFormer: at stride 4
    losses["loss"].backward()
    assert all(p.grad is not None for p in student.parameters())
    assert ("loss_aux" in losses) == (arch == "deit_tiny")
    if arch == "deit_tiny":
        total = losses["loss_l"] + 0.4 * losses["loss_aux"] + losses["loss_u"]
        close(losses["loss"].detach(), total.detach(), 1e-5)


def test_a_step_with_given_draws_is_what_the_algorithm_says():
    """The whole of supp. Algorithm 1 again, from its parts, with CutMix and one shuffled image."""
    args = parse("--image-size 64 --tau semi=0.3 --shuffle-tile 32")
    s = S.derive(args, "semi", 1)
    torch.manual_seed(0)
    student = S.build_model(args, 11).eval()
    nn.init.normal_(student.head.classifier.weight, std=0.5)
    teacher = S.build_model(args, 11).eval()
    nn.init.normal_(teacher.head.classifier.weight, std=0.5)
    x_l, x_w, x_s = torch.randn(3, 2, 3, 64, 64)
    y_l = torch.randint(0, 11, (2, 64, 64))
    boxes, perm = torch.tensor([[0, 60, 10, 44], [4, 40, 0, 57]]), torch.tensor([[3, 1, 0, 2]] * 2)
    draws = dict(cut=torch.tensor(True), boxes=boxes, perm=perm, on=torch.tensor([True, False]))
    losses, *_ = S.s4former_step(student, teacher, x_l, y_l, [x_w, x_s], s, FP32, draws)

    with torch.no_grad():
        z_t = teacher(x_w)
        p, y = z_t.softmax(1).max(1)
        y = torch.where(p > 0.3, y, 255)
        u = 1 - F.avg_pool2d((p > 0.3).float()[:, None], 8).flatten(1)
        mask = torch.zeros(2, 65, 65)
        for i in range(2):
            sure = u[i].sort(stable=True).indices[:32].tolist()
            for row in range(65):
                if row == 0 or row - 1 not in sure:
                    mask[i, row, 1:] = 5 * u[i]
        loss_p = F.cross_entropy(student(x_s, mask=mask), y, ignore_index=255,
                                 reduction="sum") / y.numel()
        x_a, y_a, z_a_t = x_s.clone(), y.clone(), z_t.clone()
        for i, (y0, y1, x0, x1) in enumerate(boxes.tolist()):
            at = (..., slice(y0, y1), slice(x0, x1))
            x_a[i][at], y_a[i][at], z_a_t[i][at] = x_s[1 - i][at], y[1 - i][at], z_t[1 - i][at]
        tiles = [(slice(0, 32), slice(0, 32)), (slice(0, 32), slice(32, 64)),
                 (slice(32, 64), slice(0, 32)), (slice(32, 64), slice(32, 64))]
        x_0 = x_a[0].clone()
        for k, of in enumerate([3, 1, 0, 2]):  # shuffled tile k is original tile perm[k]
            x_0[(slice(None), *tiles[k])] = x_a[0][(slice(None), *tiles[of])]
        feature = student.encoder(torch.stack([x_0, x_a[1]]))[-1]
        back = feature.clone()
        small = [(slice(None), slice(a.start // 8, a.stop // 8), slice(b.start // 8, b.stop // 8))
                 for a, b in tiles]
        for k, of in enumerate([3, 1, 0, 2]):
            back[0][small[of]] = feature[0][small[k]]
        z_a = student.head([back])
        loss_a = F.cross_entropy(z_a, y_a, ignore_index=255, reduction="sum") / y.numel()
        loss_n = 0.0
        for i, r, c in (y_a != 255).nonzero().tolist():
            rest = [k for k in range(11) if k != y_a[i, r, c]]
            a, b = (z[i, rest, r, c].double().softmax(0) for z in (z_a, z_a_t))
            loss_n += (a - b + 1e-6).norm().item()
        loss_l = F.cross_entropy(student(x_l), y_l)
    close(losses["loss_pasa"].detach(), loss_p, 1e-6)
    close(losses["loss_aug"].detach(), loss_a, 1e-6)
    close(losses["loss_ncr"].detach(), loss_n / y.numel(), 1e-6)
    total = loss_l + 0.5 * (loss_p + loss_a + loss_n / y.numel())
    close(losses["loss"].detach(), total, 1e-5)


def test_augsegs_labelled_pixels_carry_their_label_and_no_ncr(monkeypatch):
    args = parse("--image-size 64 --method augseg --with-ours --tau semi=0.1")
    s = S.derive(args, "semi", 1)
    seen = {}
    monkeypatch.setattr(S, "both_branches", lambda student, x, c, y, z, strong, y_ncr, *a:
                        seen.update(strong=strong, y_ncr=y_ncr) or dict(loss_u=torch.zeros(())))
    torch.manual_seed(0)
    model = S.build_model(args, 11).eval()
    x_l, x_s = torch.full((2, 3, 64, 64), 9.0), torch.zeros(2, 3, 64, 64)
    draws = dict(perm_q=torch.tensor([1, 0]), lam_l=torch.zeros(2), lam_u=torch.full((2,), 0.5),
                 centres=torch.full((2, 2, 2), 0.5), paste=torch.zeros(2))
    S.augseg_step(model, model, x_l, torch.full((2, 64, 64), 7), [x_s, x_s], s, FP32, draws)
    x, y, _ = seen["strong"]
    pasted = x[:, 0] == 9.0
    assert 0.2 < pasted.float().mean() < 0.6  # the labelled box seen through the second box
    assert (y[pasted] == 7).all() and (seen["y_ncr"][pasted] == IGNORE).all()
    assert (seen["y_ncr"][~pasted] == y[~pasted]).all()


def test_the_fixmatch_teacher_is_the_student_of_the_step_before():
    model = nn.BatchNorm1d(3)
    teacher = Ema(model)
    model(torch.randn(8, 3))
    nn.init.normal_(model.weight)
    teacher.update(model, settings("--method fixmatch").ema_decay)
    assert torch.equal(teacher.module.weight, model.weight)
    assert torch.equal(teacher.module.running_mean, model.running_mean)


# ----- the paper's tables -----------------------------------------------------------------------


def walk():
    """(table, flags, the paper's mIoU) of its own rows."""
    voc = "--dataset voc --labels-file splits/pascal/{}/labeled.txt --init deit_base.pth"
    ours = {"base": "--method s4former", "unimatch": "--method unimatch --with-ours",
            "augseg": "--method augseg --with-ours"}
    for (arch, method, with_ours), row in S.TABLE_S1.items():
        method = ours[method] if with_ours else f"--method {method}"
        for n, miou in row.items():
            yield "S1", f"{voc.format(n)} --arch {arch} {method}", miou
    for (shuffle, pasa, ncr), row in S.TABLE_S2.items():
        parts = "--shuffle 0.5 " * shuffle + "--pasa ours " * pasa + "--ncr ncr" * ncr
        for n, miou in row.items():
            yield "S2", f"{voc.format(n)} --method base {parts}", miou
    for (strong, shuffle), miou in S.TABLE_S3.items():
        more = "--shuffle 0.5" * shuffle
        yield "S3", f"{voc.format(92)} --method mean_teacher --strong {strong} {more}", miou
    for (method, with_ours), row in S.TABLE_S4.items():
        method = "s4former" if with_ours else method
        for n, miou in row.items():
            yield "S4", f"{voc.format(n)} --arch vit_large --method {method}", miou
    for (shuffle, ncr), row in S.TABLE_S5.items():
        more = "--shuffle 0.5 " * shuffle + "--ncr ncr" * ncr
        for n, miou in row.items():
            flags = f"{voc.format(n)} --arch deeplabv3plus_r101 --method fixmatch {more}"
            yield "S5", flags, miou
    for alpha, miou in S.PRODUCT.items():
        flags = f"{voc.format(92)} --method base --pasa product --pasa-alpha {alpha:g}"
        yield "supp. S1.3", flags, miou


@pytest.mark.parametrize("table, flags, miou", list(walk()))
def test_every_row_of_the_paper_shows_its_number(table, flags, miou):
    args = parse(flags)
    found, where = S.paper_number(args)
    assert found == miou
    twice = table in ("S2", "S3") and where in ("Table S1", "Table S2")  # the same run, again
    assert where.removeprefix("Table ") == table or twice
    for stage in S.stages_of(args):
        assert S.derive(args, stage, 1).iterations >= 0


def test_the_walk_has_all_numbers_and_dry_run_prints_them():
    tables = [table for table, *_ in walk()]
    assert {t: tables.count(t) for t in dict.fromkeys(tables)} == {
        "S1": 64, "S2": 16, "S3": 9, "S4": 9, "S5": 9, "supp. S1.3": 2}
    args = parse("--arch vit_digits --num-labels 183 --dry-run")
    said = S.dry_run(args)
    assert "81.3 mIoU (Table S1)" in said and "99,449,961" in said and "89,980,949" in said
    assert "80,000 updates in all" in said and "supp. S1.2; authors' code" in said
    assert S.paper_number(parse("--dataset voc --num-labels 92 --tau 0.9")) is None
    assert S.paper_number(parse("--dataset cityscapes --num-labels 92")) is None
    assert S.paper_number(parse("--dataset voc --num-labels 92 --follow code")) is None


def test_the_dry_run_counts_as_the_run_does():
    args = parse("--dataset voc --num-labels 92 --epochs semi=80")
    for flags, images in (("", 10582 - 92), (" --unlabeled-pool all", 10582)):
        s = settings("--dataset voc --num-labels 92 --epochs semi=80" + flags)
        assert f"{80 * (images // 8):,} updates" in S.cost_lines(args, "semi", s)[1]
    said = S.dry_run(parse("--epochs pretrain=1 --shuffle-tile 24 --image-size 72"))
    assert "= 125 updates" in said.replace(" + 0 unlabelled images,", " =")  # 8000 / 4 / 16
    assert "the paper's row" in said  # whose crop no tile of 24 pixels divides
    args = parse("--dataset voc --arch deit_tiny --image-size 64")
    s, model = S.derive(args, "sup", 1), S.on_meta(args, 21)
    plain, with_aux = (S.report.cost(model, 64, aux=aux)["flops"] for aux in (False, True))
    assert with_aux > 1.5 * plain
    assert f"{3 * 8 * with_aux / 1e12:.4g} TFLOP" in S.cost_lines(args, "sup", s)[2]


def caught(monkeypatch, owner, name, flags):
    """What a run gives to the function owner.name, at whose call it ends."""
    def end(*given, **_):
        raise Caught(given)

    monkeypatch.setattr(owner, name, end)
    with pytest.raises(Caught) as found:
        S.main.__wrapped__(parse(f"--train-scenes 30 --val-scenes 4 --image-size 32 "
                                 f"--shuffle-tile 16 --num-labels 20 {flags}"))
    return found.value.args[0]


class Caught(Exception):
    pass


def test_a_pass_of_stage_pretrain_shows_each_digit_once(monkeypatch):
    flags = "--stage pretrain --batch-size 8 --epochs 3"
    *_, of_stage = caught(monkeypatch, S.flags, "mathematics", flags)
    assert of_stage["pretrain"].iterations == 3 * (8000 // 4 // 8)


@pytest.mark.parametrize("flags, images", [
    ("--method unimatch", 4), ("--method base", 2), ("", 3), ("--pasa off", 2),
    ("--unlabeled-ratio 3", 7), ("--method unimatch --unlabeled-ratio 2", 7)])
def test_what_a_step_holds_is_counted_before_it_starts(monkeypatch, flags, images):
    more = f"--batch-size pretrain=1,sup=1,semi=2 {flags}"
    _, largest, *_ = caught(monkeypatch, S.report, "refuse_too_large", more)
    assert largest == 2 * images


def test_what_stage_pretrain_takes_from_the_flags():
    text = "--head-lr-scale 3 --drop-path pretrain=0.2"
    s, table = settings(text, "pretrain"), S.dry_run(parse(text))
    assert (s.head_lr_scale, s.drop_path) == (3, 0.2)
    assert table.split("stage sup")[0].count("head_lr_scale") == 1
    run = SimpleNamespace(device=torch.device("cpu"), world=1)
    model = S.stage_model(parse(text), "pretrain", s, 11, None, run)
    assert model.encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert {g["lr_scale"] for g in S.parameter_groups(model, s)} == {1, 3}


def test_stage_semi_of_method_sup_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--method sup --stage semi --init run")
    said = capsys.readouterr().err
    assert "--stage semi, --method sup: no stage is left" in said and said.count("\n") == 1


RECIPE_CELLS = [  # flags, stage, {setting: value}: section 7 and 6 of the configs
    ("--dataset voc", "semi", dict(iterations=80000, batch_size=8, unlabeled_ratio=1, lr=1e-3,
        optimizer="sgd", head_lr_scale=10, min_lr=1e-4, power=0.9, weight_decay=0, tau=0.95,
        lambda_u=1, ema_decay=0.999, strong="cutmix", strong_prob=0.5, shuffle=0.5,
        shuffle_tile=128, pasa="ours", pasa_alpha=5, ncr="ncr", ncr_weight=0.5, aux_weight=0.4,
        pseudo="hard", eval_mode="whole", scale_min=0.5, scale_max=2, flip=0.5,
        cat_max_ratio=0.75, warmup_iterations=0, ncr_branches="aug", ncr_teacher="mixed",
        pasa_conf="binary", pasa_rows="half", teacher_init="copy", ema_first=0)),
    ("--dataset voc --method base", "semi", dict(strong="cutmix", shuffle=0, pasa="off",
                                                 ncr="off")),
    ("--dataset voc --method mean_teacher", "semi", dict(strong="none", ema_decay=0.999)),
    ("--dataset voc --method fixmatch", "semi", dict(strong="cutmix", ema_decay=0)),
    ("--dataset coco --arch deit_base", "semi", dict(iterations=160000)),
    ("--dataset cityscapes", "sup", dict(iterations=40000, optimizer="adamw", lr=6e-5, power=1,
        warmup_iterations=1500, weight_decay=0.01, min_lr=0, eval_mode="slide", eval_stride=512,
        drop_path=0.1)),
    ("--dataset cityscapes --follow paper", "sup", dict(optimizer="adam")),
    ("--dataset voc --follow paper", "semi", dict(ncr_branches="both", ncr="ncr_sq",
        pasa_conf="soft", pasa_rows="median", tau=0.95)),
    ("--dataset voc --follow code", "semi", dict(ncr_teacher="unmixed", teacher_init="separate",
        ema_first=1, ncr="ncr", lr=1e-3)),
    ("--dataset voc --follow code --method mean_teacher", "semi", dict(lr=1e-2)),
    ("--dataset voc --follow code --strong cutout", "semi", dict(cutout_used=0)),
    ("--dataset voc --follow paper --pseudo soft", "semi", dict(soft_form="label")),
    ("--dataset voc --follow code --arch mit_b4", "semi", dict(pasa_mit_quirk=1)),
]


@pytest.mark.parametrize("flags, stage, cells", RECIPE_CELLS)
def test_recipes_against_the_paper_cell_by_cell(flags, stage, cells):
    s = settings(flags, stage)
    assert {k: getattr(s, k) for k in cells} == cells
    assert S.image_size(parse(flags)) == {"voc": 512, "coco": 512, "cityscapes": 768}[
        flags.split()[1]]


@pytest.mark.parametrize("flags, named", [
    ("--strong blur", "--strong"), ("--pasa none", "--pasa"), ("--ncr 1", "--ncr"),
    ("--arch deeplabv3plus_r101 --dataset voc", "--pasa ours"), ("--shuffle 1.5", "--shuffle"),
    ("--image-size 100", "--image-size 100"), ("--shuffle-tile 24", "--shuffle-tile 24"),
    ("--shuffle-tile 4", "--shuffle-tile 4"), ("--method base --strong adaptive", "adaptive"),
    ("--scale-min 2 --scale-max 1", "--scale-min")])
def test_settings_that_do_not_fit_are_refused_by_name(flags, named):
    with pytest.raises(UserError, match=named):
        settings(flags)


# ----- layouts, pictures, predictions -----------------------------------------------------------


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def tree(root, dataset):
    """Three training and one validation picture of 48 x 64 in the layout of a data set; a list."""
    rng = np.random.default_rng(0)
    names = dict(voc=["2007_000001", "2007_000002", "2007_000003", "2007_000004"],
                 cityscapes=[f"aachen_00000{k}_000019" for k in range(4)],
                 coco=[f"{k:012d}" for k in range(4)])[dataset]
    for k, name in enumerate(names):
        part = "val" if k == 3 else "train"
        image = rng.integers(0, 256, (48, 64, 3)).astype(np.uint8)
        mask = np.kron(rng.integers(0, 19, (6, 8)), np.ones((8, 8))).astype(np.uint8)
        mask[:2] = 255
        if dataset == "voc":
            write(root / "JPEGImages" / f"{name}.jpg", image)
            write(root / "SegmentationClass" / f"{name}.png", mask)
        elif dataset == "cityscapes":
            write(root / "leftImg8bit" / part / "aachen" / f"{name}_leftImg8bit.png", image)
            write(root / "gtFine" / part / "aachen" / f"{name}_gtFine_labelTrainIds.png", mask)
        else:
            write(root / f"{part}2017" / f"{name}.jpg", image)
            write(root / "masks" / f"{name}.png", mask)
    if dataset == "voc":
        lists = root / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("\n".join(names[:3]))
        (lists / "val.txt").write_text(names[3])
    listed = {"cityscapes": f"aachen/{names[0]}"}.get(dataset, names[0])
    (root / "labeled.txt").write_text(listed)
    return root


@pytest.mark.parametrize("dataset, more", [
    ("voc", "--arch deit_tiny --tau 0.01"), ("coco", "--arch deit_tiny --method unimatch"),
    ("cityscapes", "--arch mit_b0 --eval-stride 32 --method base")])
def test_one_update_on_a_tree_of_each_layout(dataset, more, tmp_path):
    root = tree(tmp_path / "data", dataset)
    argv = (f"--dataset {dataset} --data-path {root} --labels-file {root}/labeled.txt "
            f"--image-size 64 --shuffle-tile 32 --iterations 1 --batch-size 2 --workers 0 --evals 1"
            f" --scale-min 0.1 --scale-max 0.3 --print-every 1 {more}").split()
    child = ends("s4former", argv, tmp_path)
    assert "as published" in child.out  # one validation picture is not the published set
    lines = numbers(only_run(tmp_path))
    last = lines[-1]["results"]
    assert set(last) == {"sup", "semi"} and np.isfinite(last["semi"]["miou"])
    assert any(k.startswith("iou_") for k in last["semi"])
    assert "kept" in lines[-3] and "pseudo_acc" not in lines[-3]  # no mask to compare with
    assert "1 labelled" in child.out and "2 unlabelled" in child.out


def test_pictures_predictions_and_the_comparison_of_two_runs(tiny, straight, tmp_path):
    first, files = straight(SCRIPT), tmp_path / "new" / "deep"
    files.mkdir(parents=True)
    write(files / "a.png", np.zeros((40, 70, 3), np.uint8))
    write(tmp_path / "new" / "b.jpg", np.full((64, 64, 3), 200, np.uint8))
    more = "--stage sup --method sup --output other"
    ends("s4former", SCRIPT.argv(tiny, more), tmp_path, pictures=True)
    for name in ("curves.png", "views.png", "masks.png", "attention.png"):
        assert (tmp_path / "other" / name).stat().st_size > 1000, name
    argv = SCRIPT.argv(tiny, f"--eval other --compare {first} --predict new")
    child = ends("s4former", argv, tmp_path, pictures=True)
    for name in ("compare.png", "compare_gain.png", "attention.png"):
        assert (tmp_path / "other" / name).stat().st_size > 1000, name
    assert child.out.count("pixel accuracy") == 2 and child.out.count("IoU  ground") == 2
    folder = tmp_path / "other" / "predictions"
    with Image.open(folder / "masks" / "deep" / "a.png.png") as mask:
        assert mask.mode == "P" and mask.size == (70, 40) and np.asarray(mask).max() <= 10
    assert Image.open(folder / "overlays" / "b.jpg.png").size == (64, 64)


def test_iou_of_every_class_is_in_the_log_and_printed(straight):
    lines = numbers(straight(SCRIPT))
    judged = [x for x in lines if "miou" in x]
    assert judged and all("iou_ground" in x and "iou_9" in x for x in judged)
    first = [x for x in lines if x.get("stage") == "pretrain"]
    assert any("digit_acc" in x for x in first) and not any("miou" in x for x in first)


def test_evaluation_by_hand_and_the_mode_it_leaves():
    model = nn.Sequential(nn.Identity(), nn.BatchNorm2d(3))
    model[1].eval()
    y = np.zeros((3, 8, 8), np.uint8)
    y[:, :4] = 1
    y[:, 0, 0] = IGNORE
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    pixels[:, :4, :, 1] = 255
    pixels[:, 4:, :, 0] = 255
    pixels[2, :4] = (255, 0, 0)  # the third is wrong above
    pairs = Pairs(np.array([b"a", b"b", b"c"]), 3, pixels=pixels, masks=y)
    run = SimpleNamespace(rank=0, world=1, workers=0, device=torch.device("cpu"), precision=FP32,
                          max_bad_images=0, stats=torch.tensor([0.0, 255.0]).view(2, 1, 1, 1),
                          image_size=8)
    s = SimpleNamespace(eval_mode="whole")
    view = S.Compose([S.FromPIL(), S.Whole()])
    r = S.evaluate(model, pairs, view, s, run, ["a", "b", "c"])
    upper, lower = 3 * 31, 3 * 32
    assert r["pixel_acc"] == pytest.approx(100 * (lower + 2 * 31) / (upper + lower), abs=1e-3)
    assert r["iou_b"] == pytest.approx(100 * 2 / 3, abs=1e-3) and "iou_c" not in r
    assert r["iou_a"] == pytest.approx(100 * lower / (lower + 31), abs=1e-3)
    assert r["miou"] == pytest.approx((r["iou_a"] + r["iou_b"]) / 2, abs=1e-3)
    assert model[0].training and not model[1].training and run.pixels == upper + lower


def test_windows_never_leave_holes():
    run, s = SimpleNamespace(precision=FP32, image_size=4), settings("--eval-mode slide")
    z = S.logits_of(nn.Identity(), torch.rand(1, 2, 9, 11), s, run)
    assert s.eval_stride == 512 and z.isfinite().all()


def test_a_run_is_evaluated_by_the_settings_of_its_last_stage(tmp_path, monkeypatch):
    about, asked = dict(image_size=8, classes=["others"]), []
    monkeypatch.setattr(S, "load_final", lambda *a: (nn.Identity(), about))
    monkeypatch.setattr(S, "derive", lambda args, stage, world: asked.append(stage))
    args = parse(f"--eval {tmp_path}")
    for stages in (["pretrain", "sup", "semi"], ["pretrain", "sup"]):
        line = dict(settings={x: {} for x in stages})
        (tmp_path / "log.jsonl").write_text(json.dumps(line))
        with pytest.raises(UserError, match="other classes"):
            S.evaluate_run(args, SimpleNamespace(classes=["a"]),
                           SimpleNamespace(device=torch.device("cpu")))
    assert asked == ["semi", "sup"]


def looks_at(size, monkeypatch):
    """(data of digit scenes, args, settings, run, list of the rows drawn) for the pictures."""
    args = parse(f"--train-scenes 4 --val-scenes 3 --image-size {size}")
    run = SimpleNamespace(device=torch.device("cpu"), image_size=size, precision=FP32,
                          stats=torch.tensor([127.0, 64.0]).view(2, 1, 1, 1))
    drawn = []
    monkeypatch.setattr(S.report, "contact_sheet", lambda rows, *_: drawn.append(rows))
    return S.load_data(args)[0], args, S.derive(args, "sup", 1), run, drawn


def test_attention_is_drawn_of_the_evaluated_network_and_at_each_models_own_patch(
        monkeypatch, tmp_path):
    data, args, s, run, drawn = looks_at(64, monkeypatch)
    fine, coarse = model_of("--arch vit_digits").train(), model_of("--arch deit_tiny").train()
    before = {k: v.clone() for k, v in fine.state_dict().items()}
    asked, plain = [], S.attention_of

    def attention_of(vit, x, query):
        asked.append(query)
        assert not vit.training and query.max() < (64 // vit.patch_embed.patch_size[0]) ** 2
        return plain(vit, x, query)

    monkeypatch.setattr(S, "attention_of", attention_of)
    for models in (dict(a=fine, b=coarse), dict(a=coarse, b=fine)):
        assert S.draw_attention(models, data, s, args, run, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in fine.state_dict().items()) and fine.training
    for first, second, per_row, factor in ((*asked[:2], 8, 0.5), (*asked[2:], 4, 2)):
        row, column = ((f + 0.5) * factor for f in (first // per_row, first % per_row))
        own = int(per_row * factor)
        assert torch.equal(second, (row.long() * own + column.long()))
    assert list(drawn[0]) == ["marked patch", "truth", "a", "b"]


def test_a_broken_validation_picture_is_replaced_in_the_pictures_too(monkeypatch):
    data, args, s, run, _ = looks_at(32, monkeypatch)
    whole, read = S.validation_looks(data, s, args, run, 8), Pairs.pil

    def pil(self, i):
        if i == 1:
            raise BadImage("b.png: broken")
        return read(self, i)

    monkeypatch.setattr(Pairs, "pil", pil)
    for a, b in zip(whole, S.validation_looks(data, s, args, run, 8)):
        assert torch.equal(b, a[[0, 2, 2]])


def test_pictures_to_predict_are_looked_for_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--predict nowhere: no picture there"):
        S.main.__wrapped__(parse("--predict nowhere"))
    assert not (tmp_path / "runs").exists()


def test_bars_of_short_names(tmp_path):
    S.charts.bars({"sup": {"0": 1.0, "1": 2.0}, "semi": {"0": 2.0, "1": 2.5}}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0
