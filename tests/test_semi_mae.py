"""semi_mae.py: the parents' numbers, equations by hand, the branch, recipes, the dry runs.

[n] numbers what a faithful implementation has to be tested for.
"""

import copy
import json
import math
import os
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, SCRIPTS, ends, numbers, only_run, world
from PIL import Image
from safetensors import safe_open
from timm.data import create_transform
from timm.models.vision_transformer import VisionTransformer
from torchvision import transforms as T

import semi_mae as M
import semi_vit
from common import checkpoint, split_lists
from common.amp import Precision
from common.splits import UserError
from common.streams import seed_everything

PARITY = Path(__file__).parent / "parity" / "semi_mae.pt"
TIGHT, FP = dict(atol=1e-6, rtol=1e-5), dict(atol=2e-5, rtol=1e-4)
FP32, BF16 = (Precision(torch.device("cpu"), dtype) for dtype in ("fp32", "bf16"))
IMAGENET = "--dataset imagenet --data-path DIR"
STATS = torch.tensor([[0.13] * 3, [0.31] * 3]).view(2, 3, 1, 1) * 255


@pytest.fixture(scope="module")
def stored():
    return torch.load(PARITY, weights_only=True)


def parse(text=""):
    return M.parse_args(text.split())


def derived(text="", stage="semi"):
    return M.derive(parse(text), stage, 1)


def settings(stage="semi", **changed):
    """A stage's settings: the defaults, then small ones, then the change."""
    s = {name: default[stage] for name, (_, default, _) in M.SETTINGS.items()}
    s |= dict(tau=0.0, drop_path=0.0, dec_dim=32, dec_depth=1, dec_heads=4)
    s |= dict(lomar_window=3, lomar_windows=2)
    return types.SimpleNamespace(**{**s, **changed})


def tiny(seed=0, stage="semi", mim="mae", **changed):
    """vit_digits with a small branch, and its settings."""
    torch.manual_seed(seed)
    s = settings(stage, **changed)
    return M.build_model(parse(f"--mim {mim}"), s, 10, stage), s


def full(arch, mim="mae", **changed):
    """224 px, patch 16, and the paper's branch unless changed."""
    defaults = dict(dec_dim=512, dec_depth=8, dec_heads=16, lomar_window=7, lomar_windows=4)
    shape = dict(arch=arch, mim=mim, image_size=224, patch_size=16)
    return M.SemiMAE(settings(**{**defaults, **shape, **changed}), 1000, branch=True)


def fixmatch_loss(m, x_l, y_l, x_w, x_s, s):
    """FixMatch written anew: two losses on the logits of labelled, weak and strong views."""
    logits = m.classify(torch.cat([x_l, x_s]), drop=m.training)
    with torch.no_grad():
        o, y_hat = m.classify(x_w).softmax(-1).max(-1)
    loss_l = F.cross_entropy(logits[: len(x_l)], y_l)
    loss_u = F.cross_entropy(logits[len(x_l) :], y_hat, reduction="none")
    return loss_l + s.lambda_u * (loss_u * (o >= s.tau)).mean()


def batch(n_l=4, n_u=12, seed=1, size=28):
    g = torch.Generator().manual_seed(seed)
    images = [torch.randn(n, 3, size, size, generator=g) for n in (n_l, n_u, n_u)]
    return images[0], torch.arange(n_l) % 10, images[1], images[2]


def grads(model):
    return {
        k: None if p.grad is None else p.grad.clone()
        for k, p in model.named_parameters()
        if p.requires_grad
    }


def equal_state(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items())


# ===== parity =====================================================================================


def test_every_stored_case_has_a_test(stored):
    here = {
        "mae_pos_embed",
        "mae_patchify",
        "mae_random_masking",
        "mae_loss",
        "param_counts",
        "fixmatch_loss",
        "lomar_irpe",
        "lomar_windows",
        "semiformer_lr",
    }
    assert set(stored) == here


def test_parity_positions(stored):  # [3]
    c = stored["mae_pos_embed"]
    torch.testing.assert_close(M.sincos_pos_embed(32, 4)[0], c["tiny_dim32_grid4"], **TIGHT)
    for dim in (384, 512):
        table = M.sincos_pos_embed(dim, 14)[0]
        torch.testing.assert_close(table[c["rows"]], c[f"dim{dim}_grid14_rows"], **TIGHT)
        assert abs(table.double().sum().item() - c[f"dim{dim}_grid14_sum"]) < 1e-2
        assert abs(table.double().square().sum().item() - c[f"dim{dim}_grid14_sumsq"]) < 1e-2


def test_parity_patchify(stored):  # [2]
    c = stored["mae_patchify"]
    assert torch.equal(M.patchify(c["imgs"], c["patch_size"]), c["patches"])
    assert torch.equal(M.unpatchify(c["tokens"], c["patch_size"]), c["image"])
    assert torch.equal(M.unpatchify(M.patchify(c["imgs"], 8), 8), c["imgs"])


@pytest.mark.parametrize("ratio", [0.75, 0.5])
def test_parity_random_masking(stored, ratio):
    c = stored["mae_random_masking"]
    visible, mask, restore = M.random_masking(c["x"], ratio, c["noise"])
    assert torch.equal(visible, c[f"r{ratio}_x_masked"])
    assert torch.equal(mask, c[f"r{ratio}_mask"])
    assert torch.equal(restore, c[f"r{ratio}_ids_restore"])


def test_parity_kept_patches(stored):
    for length, ratio, kept in stored["mae_random_masking"]["len_keep_table"].tolist():
        if kept == 0:  # (10, 0.9): MAE's code would go on with the class token alone
            with pytest.raises(AssertionError, match="hides all 10"):
                M.random_masking(torch.zeros(1, 10, 2), ratio, torch.rand(1, 10))
            continue
        visible, mask, _ = M.random_masking(
            torch.zeros(1, int(length), 2), ratio, torch.rand(1, int(length))
        )
        assert visible.shape[1] == kept and mask.sum() == length - kept, (length, ratio)


def test_parity_mae_loss(stored):  # [5], also unequal counts per image
    c = stored["mae_loss"]
    target = M.patchify(c["imgs"], c["patch_size"])
    for norm_pix, key in ((False, "loss_plain"), (True, "loss_norm_pix")):
        loss = M.mae_loss(c["pred"], target, c["mask"], norm_pix).item()
        assert math.isclose(loss, c[key], rel_tol=1e-5, abs_tol=1e-6)


def count(parameters):
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize(
    "key, arch, dec",
    [
        ("mae_vits_dec512d8b16h", "vit_small", (512, 8, 16)),
        ("mae_vits_dec256d8b8h", "vit_small", (256, 8, 8)),
        ("mae_vitb_dec512d8b16h", "vit_base", (512, 8, 16)),
    ],
)
def test_parity_parameter_counts(stored, key, arch, dec):  # [12]
    c = stored["param_counts"][key]
    with torch.device("meta"):
        m = full(arch, dec_dim=dec[0], dec_depth=dec[1], dec_heads=dec[2])
    trainable = [p for p in m.parameters() if p.requires_grad]
    head = count(m.vit.head.parameters())
    assert count(trainable) - head == c["trainable"]
    assert count(p for p in m.vit.parameters() if p.requires_grad) - head == c["encoder"]
    assert (
        count(p for p in m.decoder.parameters() if p.requires_grad) == c["decoder_and_mask_token"]
    )
    assert count(p for p in m.parameters() if not p.requires_grad) == c["fixed_pos"]


def test_parity_parameter_counts_classifiers(stored):  # [12]
    c = stored["param_counts"]
    with torch.device("meta"):
        mae, lomar = full("vit_small"), full("vit_small", mim="lomar")
    trainable = lambda m: count(p for p in m.parameters() if p.requires_grad)  # noqa: E731
    assert trainable(mae.vit) == 21_975_016 and trainable(mae) == 47_786_728
    assert count(mae.vit.parameters()) == c["vits_classifier_1000_with_pos"] == 22_050_664
    assert trainable(lomar.vit) == c["lomar_vits_classifier_1000"] == 22_013_416
    tables = [p for n, p in lomar.named_parameters() if "rpe_k" in n]
    assert count(tables) == c["lomar_vits_pretrain"]["rpe_tables"] == 38_400
    assert count(lomar.decoder.encoder_pred.parameters()) == c["lomar_vits_pretrain"]["pixel_head"]
    assert lomar.decoder.mask_token.numel() == c["lomar_vits_pretrain"]["mask_token"]
    assert (
        trainable(lomar) - count(lomar.vit.head.parameters())
        == c["lomar_vits_pretrain"]["trainable"]
    )
    with torch.device("meta"):
        sizes = {
            d: count(M.MAEDecoder(384, 768, 14, *d).parameters()) - 197 * d[0]
            for d in ((192, 8, 16), (512, 1, 16))
        }
    assert sizes == {(192, 8, 16): 3_781_632, (512, 1, 16): 3_745_024}  # counted by hand


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.95])
def test_parity_fixmatch(stored, tau):  # [9], [10]
    c = stored["fixmatch_loss"]
    want = c[f"tau{tau}"]
    logits_s = c["logits_u_s"].clone().requires_grad_()
    o, y_hat = c["logits_u_w"].softmax(-1).max(-1)  # as in the step
    assert torch.equal(y_hat, want["pseudo_labels"])
    torch.testing.assert_close(o, want["max_probs"], **TIGHT)
    one_by_one = [
        M.pseudo_label_loss(z, y, p, tau)[1]
        for z, y, p in zip(logits_s.detach().split(1), y_hat.split(1), o.split(1))
    ]
    assert torch.equal(torch.stack(one_by_one), want["mask"])
    loss_l = M.supervised_loss(c["logits_x"], c["targets_x"])
    loss_u, kept = M.pseudo_label_loss(logits_s, y_hat, o, tau)
    loss = M.total_loss(loss_l, loss_u, torch.zeros(()), c["lambda_u"], 5.0)
    loss.backward()
    for got, key in (
        (loss_l, "loss_x"),
        (loss_u, "loss_u"),
        (loss_u, "loss_u_semiformer"),
        (loss, "loss"),
    ):
        assert math.isclose(got.item(), want[key], rel_tol=1e-5, abs_tol=1e-6), key
    torch.testing.assert_close(logits_s.grad, want["grad_logits_u_s"], **TIGHT)


def test_parity_label_smoothing(stored):
    c = stored["fixmatch_loss"]
    got = M.supervised_loss(c["logits_x"], c["targets_x"], 0.1).item()
    assert math.isclose(got, c["loss_x_label_smoothing_0.1"], rel_tol=1e-5)


def test_parity_irpe(stored):  # [18]
    c = stored["lomar_irpe"]
    for grid, key in ((7, "buckets_7x7_cls"), (14, "buckets_14x14_cls"), (4, "buckets_4x4_cls")):
        assert torch.equal(M.rpe_buckets(grid), c[key].long()), key
    # the piecewise index by itself: buckets of one row of patches, seen from the first and the last
    column = M.rpe_buckets(14)[1:15, 1:15] % 7 - 3  # query - key along a row of 14
    got = {q - k: column[q, k].item() for q in range(14) for k in range(14)}
    assert [got[d] for d in c["distance"].tolist()] == c["index"].tolist()
    assert M.rpe_buckets(7).unique().numel() == c["num_buckets"] == 50
    assert M.rpe_buckets(7)[0].eq(49).all() and M.rpe_buckets(7)[:, 0].eq(49).all()
    torch.testing.assert_close(
        M.rpe_bias(c["q"], c["table"], c["buckets_7x7_cls"].long()), c["bias"], **TIGHT
    )


@pytest.mark.parametrize("sub", ["N3_M2", "N4_M2"])
def test_parity_lomar_windows_official_pairing(stored, sub):  # [17]
    c, s = stored["lomar_windows"], stored["lomar_windows"][sub]
    n, grid, _, dim = s["x"].shape
    image_ids, ids = M.lomar_windows(n, grid, c["window_size"], s["top"], s["left"], "official")
    assert torch.equal(ids, s["patch_ids"].long())
    tokens = s["x"].view(n, -1, dim)[image_ids].gather(1, ids[:, :, None].expand(-1, -1, dim))
    x, mask = M.lomar_masking(
        tokens, c["mask_token"], c["mask_ratio"], s["noise"].view(len(ids), -1)
    )
    assert torch.equal(mask.bool(), s["mask"]) and mask.sum(1).eq(c["num_masked_per_window"]).all()
    torch.testing.assert_close(x, s["x_masked"], **TIGHT)


@pytest.mark.parametrize("sub", ["N3_M2", "N4_M2"])
def test_parity_lomar_windows_row_by_row(stored, sub):
    """The default pairing has the rows of theirs in another order: image 0 through all windows,
    then image 1; theirs (row r: image r mod N, window r mod 2) lack half of the pairs for N = 4."""
    c, s = stored["lomar_windows"], stored["lomar_windows"][sub]
    n, grid, _, dim = s["x"].shape
    image_ids, ids = M.lomar_windows(n, grid, 7, s["top"], s["left"])
    assert image_ids.tolist() == [i for i in range(n) for _ in range(2)]
    for r in range(n * 2):
        w, i = r % 2, r % n
        mine = ids[2 * i + w]
        assert torch.equal(mine, s["patch_ids"][r].long())
        tokens = s["x"][i].view(1, -1, dim).gather(1, mine[None, :, None].expand(-1, -1, dim))
        x, mask = M.lomar_masking(tokens, c["mask_token"], 0.8, s["noise"].view(-1, 49)[r : r + 1])
        torch.testing.assert_close(x[0], s["x_masked"][r], **TIGHT)
        assert torch.equal(mask[0].bool(), s["mask"][r])


def rate(epoch, epochs, **changed):
    s = dict(lr=1e-3, min_lr=1e-5, warmup_epochs=5, warmup_lr=1e-6, lr_shifted=0, lr_each="step")
    s |= dict(epochs_before=0, epochs_total=epochs)
    return M.lr_at(round(1000 * epoch), 1000, types.SimpleNamespace(**{**s, **changed}))


def test_parity_learning_rate(stored):  # [13]
    c = stored["semiformer_lr"]
    assert (c["lr"], c["min_lr"], c["warmup_lr"], c["warmup_epochs"]) == (1e-3, 1e-5, 1e-6, 5)
    for epochs, e, want in (
        (c["epochs_total"], c["epoch"], c["lr_at_epoch"]),
        (700, c["epoch_700"], c["lr_at_epoch_700"]),
    ):
        for epoch, lr in zip(e.tolist(), want.tolist()):
            assert abs(rate(epoch, epochs) - lr) < 1e-9, (epochs, epoch)
    # Their loop sets the rate after an epoch, by the finished one's number: 0 and 1 share it.
    for epoch, lr in zip(c["epoch_used"].tolist(), c["lr_used_while_training_epoch"].tolist()):
        assert abs(rate(max(0, epoch - 1), c["epochs_total"]) - lr) < 1e-9


# ===== masking ====================================================================================


def test_masking_keeps_the_right_number_and_order():  # [1], [4]
    noise = torch.rand(5, 196, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(5 * 196).view(5, 196, 1).float()
    visible, mask, restore = M.random_masking(tokens, 0.75, noise)
    assert visible.shape == (5, 49, 1) and mask.sum(1).eq(147).all()
    assert torch.equal(
        mask.bool(), noise > noise.sort(1).values[:, 48:49]
    )  # 0 exactly for the 49 smallest
    shuffle = noise.argsort(1)
    assert torch.equal(tokens[..., 0].gather(1, shuffle).gather(1, restore), tokens[..., 0])
    assert torch.equal(visible[..., 0], tokens[..., 0].gather(1, shuffle[:, :49]))


def test_every_patch_is_kept_or_predicted_in_its_place():
    """Encoder and decoder replaced by the identity: visible patches come back to their places."""
    m, _ = tiny(dec_dim=64)
    patches = torch.randn(3, 16, 64)
    visible, mask, restore = M.random_masking(patches, 0.75, torch.rand(3, 16))
    m.decoder.decoder_embed = m.decoder.decoder_norm = m.decoder.decoder_pred = torch.nn.Identity()
    m.decoder.decoder_blocks = torch.nn.ModuleList()
    out = m.decoder(F.pad(visible, (0, 0, 1, 0)), restore) - m.decoder.decoder_pos_embed[:, 1:]
    want = torch.where(mask[..., None] > 0, m.decoder.mask_token, patches)
    torch.testing.assert_close(out, want)


def test_lengths_of_the_sequences():  # [1]
    m = full("vit_digits", dec_dim=32, dec_depth=1, dec_heads=4)
    seen = []
    m.vit.blocks[0].attn.register_forward_hook(lambda _, i, o: seen.append(i[0].shape[1]))
    m.decoder.decoder_blocks[0].register_forward_hook(lambda _, i, o: seen.append(i[0].shape[1]))
    pred, *_ = m.reconstruct(torch.randn(2, 3, 224, 224), m.draw(2, "cpu"))
    m.classify(torch.randn(1, 3, 224, 224))
    assert seen == [50, 197, 197] and pred.shape == (
        2,
        196,
        768,
    )  # [20] hidden patches are not encoded
    lomar = full("vit_digits", mim="lomar")
    seen.clear()
    lomar.vit.blocks[0].attn.register_forward_hook(
        lambda _, i, o: seen.append(tuple(i[0].shape[:2]))
    )
    pred, target, mask, *_ = lomar.reconstruct(torch.randn(2, 3, 224, 224), lomar.draw(2, "cpu"))
    assert (
        seen == [(8, 50)]
        and pred.shape == target.shape == (8, 49, 768)
        and mask.sum(1).eq(39).all()
    )


@pytest.mark.parametrize("mim, rows", [("mae", (5, 16)), ("lomar", (10, 9))])
def test_each_row_of_the_branch_is_masked_by_its_own_draw(mim, rows):
    noise = tiny(mim=mim)[0].draw(5, "cpu")["noise"]
    assert noise.shape == rows and len(noise.unique(dim=0)) == len(noise)


def test_reconstruction_by_hand():
    """Embed with positions, gather the four patches of smallest noise, encode, decode."""
    m, _ = tiny()
    x, draw, (cls, pos) = torch.randn(2, 3, 28, 28), m.draw(2, "cpu"), (
        m.vit.cls_token, m.vit.pos_embed)
    order = draw["noise"].argsort(1)
    patches = m.vit.patch_embed(x) + pos[:, 1:]
    z = torch.stack([torch.cat([(cls + pos[:, :1])[0], patches[i, order[i, :4]]])
                     for i in range(2)])
    for block in m.vit.blocks:
        z = block(z)
    want = m.decoder(m.vit.norm(z), order.argsort(1))
    torch.testing.assert_close(m.reconstruct(x, draw)[0], want, **FP)


def test_position_rows_by_hand():  # [3]
    t = M.sincos_pos_embed(64, 4)[0]
    assert t[0].eq(0).all()
    torch.testing.assert_close(t[1:].square().sum(1), torch.full((16,), 32.0))
    first = t[1].view(2, 2, 16)  # halves x (sin, cos)
    assert first[:, 0].eq(0).all() and first[:, 1].eq(1).all()
    grid = t[1:].view(4, 4, 64)
    assert torch.equal(grid[0, :, :32], grid[3, :, :32])  # first half: column only
    assert torch.equal(grid[:, 0, 32:], grid[:, 3, 32:])


# ===== losses =====================================================================================


def test_eq2_divides_by_all_unlabelled():  # [9]
    o, y_hat = torch.tensor([0.9, 0.5, 0.1, 0.1]), torch.zeros(4, dtype=torch.long)
    loss, kept = M.pseudo_label_loss(torch.zeros(4, 10), y_hat, o, 0.5)
    assert kept == 0.5 and math.isclose(loss.item(), 0.5 * math.log(10), rel_tol=1e-6)
    assert M.pseudo_label_loss(torch.zeros(4, 10), y_hat, o, 0.5, strict=True)[1] == 0.25  # D2


def test_eq2_none_confident_is_zero_without_nan():  # [9], R10
    logits = torch.randn(4, 10, requires_grad=True)
    y_hat = torch.zeros(4, dtype=torch.long)
    loss, kept = M.pseudo_label_loss(logits, y_hat, torch.full((4,), 0.1), 0.7)
    loss.backward()
    assert loss == 0 and kept == 0 and logits.grad.eq(0).all()


def test_eq3_is_linear_in_its_weights():  # [10]
    s, u, r = torch.tensor(1.5), torch.tensor(0.25), torch.tensor(2.0)
    assert M.total_loss(s, u, r, 10, 5) == 1.5 + 2.5 + 10
    assert M.total_loss(s, u, r, 20, 5) - M.total_loss(s, u, r, 10, 5) == 2.5


def test_mae_loss_sees_hidden_patches_only():  # [5]
    pred, target = torch.randn(2, 4, 12, requires_grad=True), torch.randn(2, 4, 12)
    mask = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    loss = M.mae_loss(pred, target, mask, False)
    loss.backward()
    assert pred.grad[mask == 0].eq(0).all() and pred.grad[mask == 1].ne(0).all()
    changed = torch.where(mask[..., None] > 0, pred.detach(), torch.full((), 99.0))
    assert torch.equal(M.mae_loss(changed, target, mask, False), loss)
    assert M.mae_loss(target, target, mask, False) == 0
    # sum over all hidden patches of the batch by their number, not a mean of means per image
    pred = target + torch.tensor([[1.0, 0, 0, 2], [0, 3, 0, 0]])[..., None]
    assert math.isclose(M.mae_loss(pred, target, mask, False).item(), (1 + 4 + 9) / 3, rel_tol=1e-5)


def test_norm_pix_and_its_undoing():  # [6]
    target = torch.randn(2, 4, 192) * 3 + 5
    target[0, 0] = 0.25  # a constant patch
    mean, std = M.patch_statistics(target)
    normal = (target - mean) / std
    assert normal[0, 0].eq(0).all() and normal.isfinite().all()
    torch.testing.assert_close(normal[1].mean(1), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(normal[1].var(1, unbiased=True), torch.ones(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(M.undo_norm_pix(normal, target), target, atol=1e-5, rtol=1e-6)
    assert M.mae_loss(normal, target, torch.ones(2, 4), True) < 1e-12


# ===== LoMaR ======================================================================================


def test_lomar_windows_lie_inside_and_differ():  # [17]
    torch.manual_seed(0)
    m = full("vit_digits", mim="lomar")
    for _ in range(50):
        draw = m.draw(3, "cpu")
        assert len(set(draw["tops"].tolist())) == len(set(draw["lefts"].tolist())) == 4
        image_ids, ids = M.lomar_windows(3, 14, 7, draw["tops"], draw["lefts"])
        row, col = ids // 14, ids % 14
        assert ids.min() >= 0 and ids.max() < 196
        assert (row.amax(1) - row.amin(1)).eq(6).all() and (col.amax(1) - col.amin(1)).eq(
            6
        ).all()  # no wrap
        assert image_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert len({tuple(r.tolist()) for r in ids[:4]}) == 4  # an image sees four windows
    image_ids, ids = M.lomar_windows(4, 14, 7, draw["tops"], draw["lefts"], "official")
    assert all(
        len({tuple(r.tolist()) for r in ids[image_ids == i]}) == 1 for i in range(4)
    )  # the quirk


def test_lomar_targets_are_the_windows_own_pixels():  # [17]
    m, _ = tiny(mim="lomar")
    x = torch.arange(2 * 3 * 28 * 28).view(2, 3, 28, 28).float()
    draw = dict(tops=torch.tensor([1, 0]), lefts=torch.tensor([0, 1]), noise=torch.rand(4, 9))
    _, target, mask, ids, image_ids = m.reconstruct(x, draw)
    assert image_ids.tolist() == [0, 0, 1, 1] and mask.sum(1).eq(7).all()  # int(9 * 0.8)
    for r, (top, left) in enumerate([(1, 0), (0, 1)] * 2):
        crop = x[r // 2, :, 7 * top : 7 * top + 21, 7 * left : 7 * left + 21]
        assert torch.equal(M.unpatchify(target[r : r + 1], 7)[0], crop)


def test_lomar_zero_tables_know_no_positions():  # [18]
    m, _ = tiny(mim="lomar")
    x = torch.randn(2, 3, 28, 28)
    shuffled = M.unpatchify(M.patchify(x, 7)[:, torch.randperm(16)], 7)
    torch.testing.assert_close(m.classify(x), m.classify(shuffled), **FP)
    for b in m.vit.blocks:
        torch.nn.init.normal_(b.attn.rpe_k["lookup_table_weight"])
    assert not torch.allclose(m.classify(x), m.classify(shuffled), atol=1e-3)


def test_relative_attention_by_hand():
    """softmax(q k / sqrt(d) + q . table) v, as a loop over heads; q of the table is not scaled."""
    torch.manual_seed(0)
    a = M.RelativeAttention(8, num_heads=2, qkv_bias=True)
    table = torch.nn.init.normal_(a.rpe_k["lookup_table_weight"])
    x, buckets = torch.randn(2, 10, 8), M.rpe_buckets(3)
    q, k, v = a.qkv(x).view(2, 10, 3, 2, 4).unbind(2)
    out = []
    for h in range(2):
        logits = q[:, :, h] @ k[:, :, h].transpose(1, 2) / 2
        logits = logits + torch.einsum("nid,dij->nij", q[:, :, h], table[0][:, buckets])
        out.append(logits.softmax(-1) @ v[:, :, h])
    torch.testing.assert_close(a(x, buckets), a.proj(torch.cat(out, dim=-1)), **FP)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--mim lomar --lomar-windows 3", "do not fit a grid of 4"),
        ("--mim lomar --lomar-window 5", "do not fit a grid of 4"),
        ("--mim lomar --lomar-windows 0", "--lomar-windows 0"),
        ("--mim lomar --lomar-ratio 0.05", "--lomar-ratio 0.05: 0 of 9"),
        ("--mim lomar --lomar-ratio 1", "--lomar-ratio 1: 9 of 9"),
        ("--mask-ratio 0.95", "--mask-ratio 0.95: 0 of 16"),
        ("--mask-ratio 0", "--mask-ratio 0: 16 of 16"),
        ("--dec-heads 5", "--dec-dim 64"),
        ("--patch-size 5", "--image-size 28 .* --patch-size 5"),
        ("--pool max", "--pool max"),
        ("--labeled-aug none", "--labeled-aug none"),
        ("--unlabeled-ratio 0", "--unlabeled-ratio 0"),
        ("--dec-heads 0", "--dec-heads 0: at least 1"),
        ("--dec-dim 0", "--dec-dim 0: at least 1"),
        ("--dec-depth 0", "--dec-depth 0: at least 1"),
        ("--mim lomar --lomar-window -3", "--lomar-window -3: at least 1"),
        ("--norm-pix-loss 2", "--norm-pix-loss 2: one of 0, 1"),
        ("--tau-strict -1", "--tau-strict -1: one of 0, 1"),
        ("--tau 1.5", "--tau 1.5: from 0 to 1"),
        ("--lr-shifted 3", "--lr-shifted 3: one of 0, 1"),
        ("--decay-tokens 2", "--decay-tokens 2: one of 0, 1"),
    ],
)
def test_a_branch_or_a_shape_that_does_not_fit_is_refused_by_its_flag(flags, said):
    with pytest.raises(UserError, match=said):
        derived(flags)


def test_a_flag_that_a_stage_does_not_read_leaves_its_settings_alone():
    for stage, flags in {
        "pretrain": "--tau 0.9 --lambda-u 3 --drop-path 0.5 --pool avg --reprob 1 --ema-decay 0.9"
                    " --lr-span run",
        "sup": "--tau 0.9 --mae-weight 3 --mask-ratio 0.5 --norm-pix-loss 1 --lomar-window 2",
    }.items():
        before, after = derived(IMAGENET, stage), derived(f"{IMAGENET} {flags}", stage)
        assert vars(before) == vars(after), stage
    assert derived("--mask-ratio 0.5", "pretrain").mask_ratio == 0.5


def test_a_flag_of_the_other_branch_changes_nothing_and_is_not_checked():
    derived("--mim none --mask-ratio 1"), derived("--method fixmatch --mask-ratio 1")
    derived("--mim lomar --mask-ratio 1"), derived("--lomar-windows 99")
    with pytest.raises(UserError, match="--mim none"):
        derived("--method mae --mim none", "pretrain")


# ===== the model ==================================================================================


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_classifier_is_timms(pool):
    m, _ = tiny(pool=pool)
    x = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(m.classify(x), m.vit.eval()(x), **TIGHT)


def test_mask_ratio_zero_is_the_classifiers_feature():  # [7]
    m, _ = tiny()
    x = torch.randn(2, 3, 28, 28)
    patches, cls = m.embed(x)
    visible, mask, restore = M.random_masking(patches, 0.0, torch.rand(2, 16))
    z = m.encode(cls, visible)
    assert mask.sum() == 0
    torch.testing.assert_close(z[:, 0], m.vit.forward_features(x)[:, 0], atol=1e-5, rtol=1e-5)


def test_stochastic_depth_only_where_it_belongs():
    m, _ = tiny(drop_path=0.9)
    m.train()
    x, draw = torch.randn(8, 3, 28, 28), m.draw(8, "cpu")
    assert torch.equal(m.reconstruct(x, draw)[0], m.reconstruct(x, draw)[0])
    once, again = m(x, x, x), m(x, x, x)
    assert torch.equal(once["logits_w"], again["logits_w"])  # weak view: none
    assert not torch.equal(once["logits"], again["logits"])
    m.eval()
    torch.testing.assert_close(m(x)["logits"], m.classify(x))
    assert m.drop_rates == pytest.approx([0, 0.3, 0.6, 0.9])


@pytest.mark.parametrize("mim", ["mae", "lomar"])
@pytest.mark.parametrize("all_of_it", [False, True])
def test_published_format_round_trip(mim, all_of_it, tmp_path):
    a, b = tiny(0, mim=mim)[0], tiny(1, mim=mim)[0]
    before = copy.deepcopy(b.state_dict())
    torch.save(M.published_weights(a, all_of_it), tmp_path / "w.pth")
    assert M.load_init(b, str(tmp_path / "w.pth")) == "mae"
    for k, v in b.state_dict().items():
        new = k.startswith("vit.head.") or (k.startswith("decoder.") and not all_of_it)
        assert torch.equal(v, before[k] if new else a.state_dict()[k]), k


def test_published_names_are_maes():
    m, _ = tiny()
    small = set(M.published_weights(m, False)["model"])
    full = set(M.published_weights(m, True)["model"])
    assert {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.3.mlp.fc2.bias",
        "norm.weight",
    } <= small and not any(k.startswith(("decoder", "mask_token", "head")) for k in small)
    assert full - small >= {
        "mask_token",
        "decoder_embed.weight",
        "decoder_pos_embed",
        "decoder_norm.bias",
        "decoder_blocks.0.norm1.weight",
        "decoder_pred.weight",
    }
    plain = VisionTransformer(28, 7, num_classes=0, embed_dim=64, depth=4, num_heads=4)
    assert small == set(plain.state_dict())  # timm takes it as it is
    lomar, _ = tiny(mim="lomar")
    names = set(M.published_weights(lomar, True)["model"])
    assert {"blocks.0.attn.rpe_k.lookup_table_weight", "encoder_pred.weight", "mask_token"} <= names


def test_loading_refuses_what_does_not_fit(tmp_path):
    m, _ = tiny()
    state = M.published_weights(m, False)["model"]

    def load(model, state):
        torch.save(state, tmp_path / "w.pth")
        return M.load_init(model, str(tmp_path / "w.pth"))

    assert load(m, state) == "timm"  # flat
    for wrong, said in (
        (state | {"stem.conv1.weight": torch.zeros(1)}, "1 left over .*stem.conv1"),
        ({k: v for k, v in state.items() if "blocks.2" not in k}, "12 missing .*blocks.2"),
        (state | {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}, r"blocks.0.attn.qkv.*\(3, 3\)"),
        ({"a": torch.zeros(1)}, "not one of the formats mae, timm, run; its first keys are a"),
    ):
        with pytest.raises(UserError, match=said):
            load(m, wrong)
    lomar = tiny(mim="lomar")[0]
    with pytest.raises(UserError, match="positions are relative; add --mim lomar"):
        load(m, M.published_weights(lomar, False))
    with pytest.raises(UserError, match="positions are absolute; leave out --mim lomar"):
        load(lomar, state)
    bigger, _ = tiny(dec_dim=64)  # another decoder starts anew, all of it
    before = copy.deepcopy(bigger.decoder.state_dict())
    load(bigger, M.published_weights(m, True))
    assert equal_state(bigger.decoder.state_dict(), before)


def test_the_head_of_a_run_keeps_its_pooling(tmp_path):
    """Stage pretrain trains none, other classes have a new head: both take any."""
    file = tmp_path / "w.pth"
    state = dict(model=tiny(pool="avg")[0].state_dict(), stage="semi",
                 recipe={"pretrain.pool": "token", "sup.pool": "token", "semi.pool": "avg"})
    torch.save(state, file)
    assert M.load_init(tiny(pool="avg")[0], str(file)) == "run"
    with pytest.raises(UserError, match="reads --pool avg, here token; give --pool avg"):
        M.load_init(tiny(pool="token")[0], str(file))
    M.load_init(M.build_model(parse(), settings(pool="token"), 7, "semi"), str(file))
    M.load_init(tiny(stage="pretrain", pool="token")[0], str(file))
    torch.save(state | dict(stage="pretrain"), file)
    assert M.load_init(tiny(pool="avg")[0], str(file)) == "run"


def test_positions_of_another_grid_are_resized(tmp_path):
    torch.save(M.published_weights(tiny()[0], False), tmp_path / "w.pth")
    torch.manual_seed(3)
    m = M.build_model(parse("--image-size 42"), settings(), 10, "semi")
    M.load_init(m, str(tmp_path / "w.pth"))
    assert m.vit.pos_embed.shape == (1, 37, 64) and m.vit.pos_embed[0, 0].eq(0).all()
    assert not torch.allclose(m.vit.pos_embed, M.sincos_pos_embed(64, 6))
    assert not m.vit.pos_embed.requires_grad


def test_initialisation():
    m = full("vit_small")
    bound = math.sqrt(6 / (384 + 768))  # the convolution as a matrix
    w = m.vit.patch_embed.proj.weight
    assert w.abs().max() <= bound and w.abs().max() > 0.99 * bound
    assert m.vit.head.weight.abs().max() <= math.sqrt(6 / 1384) and m.vit.head.bias.eq(0).all()
    assert abs(m.vit.cls_token.std().item() - 0.02) < 0.004 and m.decoder.mask_token.ne(0).any()
    x = torch.randn(2, 3, 224, 224)  # magnitudes
    pred, target, mask, *_ = m.reconstruct(x, m.draw(2, "cpu"))
    assert (
        1.4 < M.mae_loss(pred, target, mask, False) < 2.1
        and 1.4 < M.mae_loss(pred, target, mask, True) < 2.2
    )


# ===== parameter groups, schedule, tables =========================================================


@pytest.mark.parametrize("mim", ["mae", "lomar"])
@pytest.mark.parametrize("decay_tokens", [False, True])
def test_each_parameter_in_one_group(mim, decay_tokens):
    m, _ = tiny(mim=mim)
    groups = M.parameter_groups(m, 0.05, decay_tokens)
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {
        id(p) for p in m.parameters() if p.requires_grad
    }
    decayed = {id(p) for p in groups[0]["params"]}
    for name, p in m.named_parameters():
        if p.requires_grad:
            token = name.endswith(("cls_token", "mask_token"))
            assert (id(p) in decayed) == (decay_tokens if token else p.ndim > 1), name
    assert groups[0]["weight_decay"] == 0.05 and groups[1]["weight_decay"] == 0


def test_learning_rate_by_hand():  # [13]
    assert rate(0, 600) == 1e-6
    assert math.isclose(rate(5, 600), 0.99983e-3, rel_tol=1e-5)
    assert math.isclose(rate(300, 600), 0.505e-3) and math.isclose(rate(600, 600), 1e-5)
    assert math.isclose(rate(100, 700), 0.95098e-3, rel_tol=1e-5)
    assert math.isclose(rate(350, 700), 0.505e-3)
    # D6: stage semi goes on where stage sup stopped
    assert rate(0, 700, epochs_before=100) == rate(100, 700)
    assert rate(2.7, 600, lr_each="epoch") == rate(2, 600) < rate(2.7, 600)  # D16
    mae = dict(lr=2.4e-3, min_lr=0.0, warmup_epochs=40, warmup_lr=0.0, lr_shifted=1)
    assert rate(20, 800, **mae) == 1.2e-3 and rate(40, 800, **mae) == 2.4e-3
    assert math.isclose(rate(420, 800, **mae), 1.2e-3) and rate(800, 800, **mae) < 1e-18


def test_recipe_arithmetic():  # [14]
    s, sup, mae = (derived(IMAGENET, stage) for stage in ("semi", "sup", "pretrain"))
    assert s.batch_size + s.batch_u == 3456 and s.batch_u == 3024 and 128_116 // s.batch_size == 296
    assert sup.batch_size == 3456 and 128_116 // sup.batch_size == 37
    assert math.isclose(mae.lr, 2.4e-3) and mae.sources["lr"] == "0.00015 x 4096 / 256"
    for number, (where, name, recommended, *_) in M.DEPARTURES.items():
        stage = where["stage"]
        for one in stage if isinstance(stage, tuple) else (stage,):
            assert getattr(derived(IMAGENET, one), name) == recommended, number
    assert len({d[1] for d in M.DEPARTURES.values()}) == len(M.DEPARTURES) == 19


TABLE = {  # the paper's main row; what it inherits
    "semi": dict(
        lambda_u=10, mae_weight=5, tau=0.7, unlabeled_ratio=7, epochs=600, lr=1e-3, min_lr=1e-5,
        weight_decay=0.05, batch_size=432, drop_path=0.1, warmup_epochs=5, labeled_aug="strong",
        label_smoothing=0, mask_ratio=0.75, dec_dim=512, dec_depth=8, dec_heads=16,
        norm_pix_loss=0, pool="token", beta2=0.999, unlabeled_pool="all", lomar_window=7,
        lomar_windows=4, lomar_ratio=0.8, ema_decay=0, warmup_lr=1e-6,
    ),
    "sup": dict(
        epochs=100, lr=1e-3, min_lr=1e-5, weight_decay=0.05, batch_size=3456, drop_path=0.1,
        warmup_epochs=5, labeled_aug="strong", label_smoothing=0, pool="token", beta2=0.999,
    ),
    "pretrain": dict(  # MAE's own recipe
        epochs=800, batch_size=4096, lr_per_256=1.5e-4, weight_decay=0.05, beta2=0.95, min_lr=0,
        warmup_epochs=40, mask_ratio=0.75, norm_pix_loss=1, crop_min=0.2, decay_tokens=1,
    ),
}


@pytest.mark.parametrize("mim", ["mae", "lomar"])
@pytest.mark.parametrize("stage", M.STAGES)
def test_recipe_is_the_papers_cell_by_cell(stage, mim):
    s = derived(f"{IMAGENET} --arch vit_small --labels 10 --mim {mim}", stage)
    for name, value in TABLE[stage].items():
        assert getattr(s, name) == value, name


@pytest.mark.parametrize("dataset", M.DATASETS)
@pytest.mark.parametrize("mim", ["mae", "lomar"])
def test_every_data_set_has_a_row_whose_branch_fits(dataset, mim):
    for arch in ("", "--arch vit_digits"):
        args = parse(f"--dataset {dataset} --data-path DIR {arch} --mim {mim}")
        for stage in M.STAGES:
            s = M.derive(args, stage, 1)
            with torch.device("meta"):
                m = M.build_model(args, s, 10, stage)
            if m.decoder is not None:
                pixels = torch.zeros(2, 3, m.s.image_size, m.s.image_size, device="meta")
                assert m.reconstruct(pixels, m.draw(2, "meta"))[0].shape[2] == 3 * m.s.patch_size**2


def test_stages_of_a_method():
    for flags, stages in {
        "": ["sup", "semi"], "--method fixmatch": ["sup", "semi"], "--method sup": ["sup"],
        "--method mae": ["pretrain"], "--stage pretrain": ["pretrain"], "--stage semi": ["semi"],
        "--pretrain": ["pretrain", "sup", "semi"], "--pretrain --method sup": ["pretrain", "sup"],
        "--method sup --stage semi": [],
        "--method mae --stage sup": [], "--epochs 3": ["sup", "semi"],
    }.items():
        assert M.stages_of(parse(flags)) == stages, flags


@pytest.mark.parametrize("stage", ["sup", "semi"])
def test_pretraining_beside_another_stage_alone_is_refused(stage, capsys):
    with pytest.raises(SystemExit):
        parse(f"--pretrain --stage {stage}")
    assert f"--pretrain: --stage {stage} trains that stage alone" in capsys.readouterr().err


def main_without_training(text, tmp_path, monkeypatch):
    """What main hands to each stage, whose training only adds 1 to every weight: by stage the
    weights before and after, the moments, the split."""
    got = {}

    def run_stage(stage, model, moments, data, split, *_):
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            for p in model.parameters():
                p += 1
        after = copy.deepcopy(model.state_dict())
        got[stage] = types.SimpleNamespace(before=before, after=after, moments=moments, split=split)
        return {"of": stage}

    monkeypatch.setattr(M, "run_stage", run_stage)
    monkeypatch.setattr(M.checkpoint, "StopSignal", lambda: None)
    for name in ("publish", "finish"):
        monkeypatch.setattr(M, name, lambda *_: None)
    M.main.__wrapped__(parse(f"{text} --output {tmp_path}/run"))
    return got


@pytest.mark.parametrize("epochs", ["sup=0", "sup=1"])
def test_what_goes_on_into_the_next_stage(epochs, tmp_path, monkeypatch):  # E5, E6
    """Moments from stage sup alone, and all weights but the decoder's, which start anew."""
    flags = f"--pretrain --epochs pretrain=1,semi=1,{epochs} --lr-span run"
    got = main_without_training(flags, tmp_path, monkeypatch)
    assert list(got) == (["pretrain", "sup", "semi"] if epochs == "sup=1" else ["pretrain", "semi"])
    last = None
    for stage, one in got.items():
        assert one.moments == ({"of": "sup"} if stage == "semi" and "sup" in got else {})
        torch.manual_seed(M.seed_of(0, "model", stage))
        new = M.build_model(parse(), derived("", stage), 10, stage).state_dict()
        for k, v in one.before.items():
            goes_on = last is not None and not k.startswith("decoder.")
            assert torch.equal(v, (last.after if goes_on else new)[k]), (stage, k)
        last = one
    assert any(k.startswith("decoder.") for k in got["semi"].before)


@pytest.mark.parametrize("flags, said, count", [
    ("", "8000 unlabelled", 8000), ("--unlabeled-pool rest", "7920 unlabelled", 7920),
    ("--follow D4=paper", "7920 unlabelled", 7920)])
def test_the_pool_of_a_run_is_the_one_that_was_asked_for(
        flags, said, count, tmp_path, monkeypatch):  # D4
    split = main_without_training(f"{flags} --epochs 1", tmp_path, monkeypatch)["semi"].split
    assert said in split.describe() and len(split.unlabeled) == count


def test_one_cosine_spans_both_stages():  # D6
    for flags, want in {
        "": ((0, 700), (100, 700)), "--epochs sup=30": ((0, 630), (30, 630)),
        "--lr-span stage": ((0, 100), (0, 600)), "--method sup": ((0, 100), None),
    }.items():
        for stage, one in zip(("sup", "semi"), want):
            if one:
                s = derived(f"{IMAGENET} {flags}", stage)
                assert (s.epochs_before, s.epochs_total) == one, (flags, stage)
    last, first = derived(IMAGENET, "sup"), derived(IMAGENET)
    assert M.lr_at(100 * 37, 37, last) == M.lr_at(0, 296, first)


def test_learning_rate_flags_and_the_rule_by_256():
    assert derived("--lr 0.5").lr == 0.5 and derived("--lr semi=0.5", "sup").lr == 2e-3
    s = derived("--lr-per-256 sup=0.1", "sup")  # wins over the recipe's rate
    assert s.lr == 0.1 * 64 / 256 and s.sources["lr"] == "0.1 x 64 / 256"
    assert derived("--lr-per-256 0.1 --lr 0.5").lr == 0.5
    assert derived("--lr-per-256 0.1 --lr 0").lr == 0


@pytest.mark.parametrize("number", M.DEPARTURES)
def test_follow_changes_what_it_says(number):
    where, name, recommended, paper, code, _ = M.DEPARTURES[number]
    stage = where["stage"] if isinstance(where["stage"], str) else where["stage"][-1]
    before = derived(IMAGENET, stage)
    derivatives = {"batch_u", "micro_batch", "epochs_before", "epochs_total", "sources", name}
    for whom, value in (("recommended", recommended), ("paper", paper), ("code", code)):
        s = derived(f"{IMAGENET} --follow {number}={whom}", stage)
        assert getattr(s, name) == (recommended if value is None else value)
        for k in vars(s).keys() - derivatives:
            assert getattr(s, k) == getattr(before, k), k
        if getattr(s, name) != recommended:
            assert s.sources[name].startswith(f"{number}={whom}")


def test_follow_leaves_the_numbers_of_the_digits_alone():
    s = derived("--follow code")
    assert (s.lambda_u, s.batch_size, s.unlabeled_ratio, s.tau) == (2.0, 24, 7.0, 0.7)
    s = derived("--follow paper")
    assert (s.labeled_aug, s.tau_strict, s.unlabeled_pool) == ("weak", 1, "rest")


# ===== the training step ==========================================================================


def several_steps(method, mae_weight, mim, steps=4):
    m, s = tiny(drop_path=0.3, mae_weight=mae_weight, mim=mim)
    m.train()
    opt, log = torch.optim.AdamW(M.parameter_groups(m, 0.05, False), lr=1e-3), []
    for step in range(steps):
        x_l, y_l, x_w, x_s = batch(seed=1 + step)
        if method == "fixmatch":
            loss = fixmatch_loss(m, x_l, y_l, x_w, x_s, s)
        else:
            draw = m.draw(len(x_w), "cpu")
            loss = M.semi_step(m, x_l, y_l, x_w, x_s, s, FP32, draw)[0]["loss"]
        opt.zero_grad()
        loss.backward()
        opt.step()
        log.append(loss.item())
    return m, log


@pytest.mark.parametrize("mim", ["mae", "lomar"])
def test_without_the_branch_it_is_fixmatch_bit_by_bit(mim):
    """From one seed, with stochastic depth, over several updates."""
    a, log_a = several_steps("semi_mae", 0.0, mim)
    b, log_b = several_steps("fixmatch", 0.0, mim)
    assert log_a == log_b and a.decoder is None
    assert a.state_dict().keys() == b.state_dict().keys() and equal_state(
        a.state_dict(), b.state_dict()
    )


def test_the_branch_leaves_the_other_losses_alone():
    """With the branch: the same L_s, L_u to the bit, whatever its weight."""
    m, s = tiny()
    b, draw = batch(), m.draw(12, "cpu")
    plain = M.semi_step(m, *b, s, FP32, None)[0]
    for mu in (5.0, 1.0):
        s.mae_weight = mu
        out = M.semi_step(m, *b, s, FP32, draw)[0]
        assert out["loss_l"] == plain["loss_l"] and out["loss_u"] == plain["loss_u"]
        want = plain["loss_l"] + 10 * plain["loss_u"] + mu * out["loss_mae"]
        torch.testing.assert_close(out["loss"].detach(), want, **TIGHT)  # [10]


def test_the_steps_read_their_settings():
    """A confidence that ties with tau (D2), label smoothing (D8), the normalised target (D9)."""
    m, s = tiny(label_smoothing=0.1)
    (x_l, y_l, x_w, x_s), draw = batch(), m.draw(12, "cpu")
    s.tau = m.classify(x_w).softmax(-1).max().item()
    pred, target, mask, *_ = m.reconstruct(x_w, draw)
    for strict, norm_pix in ((0, 1), (1, 0)):
        s.tau_strict, s.norm_pix_loss = strict, norm_pix
        out = M.semi_step(m, x_l, y_l, x_w, x_s, s, FP32, draw)[0]
        assert out["kept"].item() == pytest.approx((1 - strict) / 12)
        want = M.mae_loss(pred, target, mask, bool(norm_pix))
        for got in (out, M.mae_step(m, x_w, s, FP32, draw)):
            torch.testing.assert_close(got["loss_mae"], want)
        want = F.cross_entropy(m.classify(x_l), y_l, label_smoothing=0.1)
        for got in (out, M.sup_step(m, x_l, y_l, s, FP32)):
            torch.testing.assert_close(got["loss_l"], want, **FP)


@pytest.mark.parametrize("mim", ["mae", "lomar"])
def test_who_gets_whose_gradient(mim):  # [8]
    m, s = tiny(mim=mim)
    x_l, y_l, x_w, x_s = batch()
    M.mae_step(m, x_w, s, FP32, m.draw(12, "cpu"))["loss"].backward()
    g = grads(m)
    assert all((v is None) == k.startswith("vit.head.") for k, v in g.items()), "L_MAE alone"
    m.zero_grad()
    M.semi_step(m, x_l, y_l, x_w, x_s, s, FP32, None)[0]["loss"].backward()
    g = grads(m)
    assert all((v is None) == k.startswith("decoder.") for k, v in g.items()), "L_s + L_u alone"
    m.zero_grad()
    M.semi_step(m, x_l, y_l, x_w, x_s, s, FP32, m.draw(12, "cpu"))[0]["loss"].backward()
    assert all(v is not None for v in grads(m).values())


def test_pseudo_labels_send_no_gradient():  # [8], [16]
    m, s = tiny(tau=0.3)
    x_l, y_l, x_w, x_s = batch()
    losses, y_hat, o = M.semi_step(m, x_l, y_l, x_w, x_s, s, FP32, None)
    losses["loss"].backward()
    g = {k: v for k, v in grads(m).items() if v is not None}
    assert 0 < losses["kept"] < 1 and not o.requires_grad
    m.zero_grad()
    logits_l, logits_s = m.classify(torch.cat([x_l, x_s])).split([4, 12])
    loss_u, _ = M.pseudo_label_loss(logits_s, y_hat, o, s.tau)
    (M.supervised_loss(logits_l, y_l) + 10 * loss_u).backward()
    assert all(torch.equal(v, g[k]) for k, v in grads(m).items() if v is not None)


def test_the_reconstructed_tensor_is_the_pseudo_labelled_one():  # [11]
    m, s = tiny()
    x_l, y_l, x_w, x_s = batch()
    seen = []
    m.reconstruct = lambda x, draw, f=m.reconstruct: seen.append(("mae", x)) or f(x, draw)
    m.classify = lambda x, drop=False, f=m.classify: seen.append(("cls", x)) or f(x, drop)
    M.semi_step(m, x_l, y_l, x_w, x_s, s, FP32, m.draw(12, "cpu"))
    assert [k for k, _ in seen] == ["cls", "mae", "cls"]
    assert (
        seen[1][1] is x_w and seen[2][1] is x_w and len(seen[0][1]) == 16
    )  # joint: labelled and strong


def test_autocast_keeps_the_gradients():  # [16]
    m, s = tiny()
    (x_l, y_l, x_w, x_s), draw = batch(), m.draw(12, "cpu")
    losses, y_hat, o = M.semi_step(m, x_l, y_l, x_w, x_s, s, BF16, draw)
    losses["loss"].backward()
    g = grads(m)
    m.zero_grad()
    with BF16.autocast():  # no weak view in sight
        out = m(torch.cat([x_l, x_s]), x_u_w=x_w, draw=draw)
    loss_l = M.supervised_loss(out["logits"][:4], y_l)
    loss_u, _ = M.pseudo_label_loss(out["logits"][4:], y_hat, o, s.tau)
    loss_mae = M.mae_loss(out["pred"], out["target"], out["mask"], False)
    M.total_loss(loss_l, loss_u, loss_mae, 10, 5).backward()
    again = grads(m)
    assert all(v is not None and v.isfinite().all() for v in g.values())
    assert all(torch.equal(v, g[k]) for k, v in again.items())
    assert all(v.dtype == torch.float32 for v in (*losses.values(), o))


@pytest.mark.parametrize("mim", ["mae", "lomar"])
def test_the_residual_stream_stays_float32(mim):
    m, _ = tiny(mim=mim)
    with torch.autocast("cpu", torch.bfloat16):
        patches, cls = m.embed(torch.randn(2, 3, 28, 28))
        kept = patches[:, :9]
        buckets = m.window_buckets if mim == "lomar" else None
        m.vit.norm = torch.nn.Identity()
        assert m.encode(cls, kept, buckets).dtype == torch.float32


@pytest.mark.parametrize(
    "method, mim",
    [
        ("sup", "mae"),
        ("fixmatch", "mae"),
        ("semi_mae", "mae"),
        ("semi_mae", "lomar"),
        ("mae", "mae"),
        ("mae", "lomar"),
    ],
)
def test_loss_falls_on_one_batch(method, mim):
    stage = {"sup": "sup", "mae": "pretrain"}.get(method, "semi")
    weight = dict(mae_weight=0.0) if method == "fixmatch" else {}
    m, s = tiny(stage=stage, mim=mim, **weight)
    x_l, y_l, x_w, x_s = batch()
    draw = m.draw(12, "cpu")
    step = {
        "sup": lambda: M.sup_step(m, x_l, y_l, s, FP32),
        "mae": lambda: M.mae_step(m, x_w, s, FP32, draw),
        "fixmatch": lambda: M.semi_step(m, x_l, y_l, x_w, x_s, s, FP32, None)[0],
        "semi_mae": lambda: M.semi_step(m, x_l, y_l, x_w, x_s, s, FP32, draw)[0],
    }[method]
    opt = torch.optim.AdamW(M.parameter_groups(m, 0.05, False), lr=1e-3)
    losses = []
    for _ in range(8):
        opt.zero_grad()
        out = step()
        out["loss"].backward()
        opt.step()
        losses.append((out["loss_mae"] if method == "mae" else out["loss_l"]).item())
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def test_decoder_is_built_where_it_runs():  # [15]
    assert tiny(stage="sup")[0].decoder is None
    assert tiny(mae_weight=0.0)[0].decoder is None
    assert tiny(mim="none")[0].decoder is None
    assert tiny(mim="none")[0].draw(4, "cpu") is None
    assert isinstance(tiny()[0].decoder, M.MAEDecoder)
    assert isinstance(tiny(stage="pretrain", mim="lomar")[0].decoder, M.LomarHead)


def two_stages(out):
    """Child, one of two processes: two updates of stage sup, three of stage semi, own DDP each."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    ddp = torch.nn.parallel.DistributedDataParallel
    sup, s = tiny(stage="sup")
    wrapped = ddp(sup.double())
    x_l, y_l, x_w, x_s = (t.double() if t.is_floating_point() else t for t in batch(8, 16))
    mine = slice(rank, None, 2)
    opt = torch.optim.AdamW(M.parameter_groups(sup, 0.05, False), lr=1e-3)
    for _ in range(2):
        opt.zero_grad()
        M.sup_step(wrapped, x_l[mine], y_l[mine], s, FP32)["loss"].backward()
        opt.step()
    m, s = tiny()
    M.carry_weights(sup, m.double())
    torch.manual_seed(5)
    draw = dict(noise=m.draw(16, "cpu")["noise"].double()[mine])
    wrapped = ddp(m)
    opt, g = torch.optim.AdamW(M.parameter_groups(m, 0.05, False), lr=1e-3), None
    for _ in range(3):
        opt.zero_grad()
        b = x_l[mine], y_l[mine], x_w[mine], x_s[mine]
        M.semi_step(wrapped, *b, s, FP32, draw)[0]["loss"].backward()
        g = g or grads(m)
        opt.step()
    torch.save(dict(grads=g, state=m.state_dict(), sup=sup.state_dict()), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_after_the_switch_of_stages(tmp_path):  # [15], R9
    world(two_stages, 2 * [(str(tmp_path),)], tmp_path)
    a, b = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    assert equal_state(a["state"], b["state"])  # all ranks equal after 3 steps
    m, s = tiny()
    m = m.double()
    m.load_state_dict(a["sup"], strict=False)
    x_l, y_l, x_w, x_s = (t.double() if t.is_floating_point() else t for t in batch(8, 16))
    torch.manual_seed(5)
    draw = {k: v.double() for k, v in m.draw(16, "cpu").items()}
    M.semi_step(m, x_l, y_l, x_w, x_s, s, FP32, draw)[0]["loss"].backward()
    for k, v in grads(m).items():
        torch.testing.assert_close(v, a["grads"][k], atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("mim", ["mae", "lomar"])
def test_one_graph(mim):
    """--compile: the whole forward in one piece, same numbers (eager backend: no compiler)."""
    m, s = tiny(mim=mim)
    m.train()
    b, draw = batch(), m.draw(12, "cpu")
    want = M.semi_step(m, *b, s, FP32, draw)[0]
    m.compile(backend="eager", fullgraph=True)
    got = M.semi_step(m, *b, s, FP32, draw)[0]
    assert got["loss"] == want["loss"] and not any(k.startswith("_orig") for k in m.state_dict())
    got["loss"].backward()
    assert all(v is not None for v in grads(m).values())


# ===== the loop ===================================================================================

COLOURS = dict(labeled=1, weak=2, strong=3, mae=4, evaluate=5)


class Notes:
    """A log that keeps the numbers of each update, and the learning rates that it is told."""

    def __init__(self):
        self.numbers, self.lr = [], []

    def wait(self, batches):
        return batches

    def add(self, step, numbers):
        self.numbers.append({k: v.item() for k, v in numbers.items()})

    def report(self, stage, step, lr, **_):
        self.lr.append(lr)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def train(stage, text, monkeypatch, targets=None, found=None):
    """run_stage on 8 labelled and all of 48 digits, each view a picture of its own colour.

    targets: the true labels, instead of the digits' own; found: pseudo-labels and confidence,
    instead of the model's. Returns the log, the optimiser, the settings, and of each step its
    arguments and the optimiser's learning rates."""
    data, args = M.load_dataset("digits", None), parse(f"--print-every 1 --evals 1 {text}")
    data.train.targets = data.train.targets if targets is None else targets
    s, seen, made = M.derive(args, stage, 1), [], []
    name, adamw = dict(pretrain="mae_step").get(stage, f"{stage}_step"), torch.optim.AdamW
    step = getattr(M, name)

    def spy(model, *rest):
        seen.append((rest, [g["lr"] for g in made[0].param_groups]))
        out = step(model, *rest)
        return out if found is None else (out[0], *found)

    def flat(value):
        return lambda _: (torch.full((3, 28, 28), value, dtype=torch.uint8), torch.zeros(4))

    monkeypatch.setattr(M, name, spy)
    adam = lambda *a, **k: made.append(adamw(*a, **k)) or made[0]  # noqa: E731
    monkeypatch.setattr(torch.optim, "AdamW", adam)
    monkeypatch.setattr(M, "view_lists", lambda *_: {k: [flat(v)] for k, v in COLOURS.items()})
    for other in ("evaluate", "evaluate_branch", "draw_reconstructions"):
        monkeypatch.setattr(M, other, lambda *_: {})
    monkeypatch.setattr(M, "save", lambda *_: None)
    run = types.SimpleNamespace(
        rank=0, world=1, device=torch.device("cpu"), device_ids=None, image_size=28, workers=0,
        precision=Precision(torch.device("cpu"), "fp32"), log=Notes(), results={}, folder=None,
        stop=types.SimpleNamespace(asked=lambda: 0),
        stats=torch.stack([torch.zeros(3, 1, 1), torch.ones(3, 1, 1)]))
    split = types.SimpleNamespace(labeled=np.arange(8), unlabeled=np.arange(48))
    torch.manual_seed(0)
    model = M.build_model(args, s, 10, stage)
    M.run_stage(stage, model, {}, data, split, s, args, run, None)
    monkeypatch.undo()
    return types.SimpleNamespace(log=run.log, optimizer=made[0], s=s, steps=seen, model=model)


def test_each_view_reaches_its_place(monkeypatch):
    flags = "--batch-size pretrain=16,sup=4,semi=4 --unlabeled-ratio semi=2 --epochs 1"
    for stage, views in dict(pretrain=["mae"], sup=["labeled"],
                             semi=["labeled", "weak", "strong"]).items():
        for arguments, _ in train(stage, flags, monkeypatch).steps:
            pictures = [x for x in arguments if torch.is_tensor(x) and x.ndim == 4]
            assert [x.unique().tolist() for x in pictures] == [[COLOURS[v]] for v in views]


@pytest.mark.parametrize("stage", M.STAGES)
def test_the_optimiser_has_the_settings_and_the_rate_of_each_update(stage, monkeypatch):
    flags = "--batch-size pretrain=16,sup=4,semi=4 --unlabeled-ratio semi=2 --warmup-epochs 1"
    flags = f"{flags} --epochs 3 --beta2 0.7 --weight-decay 0.3 --lr-each step"
    per_epoch = 3 if stage == "pretrain" else 2  # of 48 pictures, of 8
    for decay_tokens in (0, 1):
        got = train(stage, f"{flags} --decay-tokens {decay_tokens}", monkeypatch)
        want = [M.lr_at(k, per_epoch, got.s) for k in range(3 * per_epoch)]
        assert [rates for _, rates in got.steps] == [[lr, lr] for lr in want] and len(set(want)) > 3
        assert got.log.lr == want
        token = got.model.vit.cls_token
        for group in got.optimizer.param_groups:
            assert group["betas"] == (0.9, 0.7) and group["eps"] == 1e-8
            if any(p is token for p in group["params"]):
                assert group["weight_decay"] == 0.3 * decay_tokens


def test_pseudo_labels_are_measured_where_all_the_truth_is_known(monkeypatch):
    """Of own pictures the labelled ones alone have a label, which stage sup has taught already."""
    flags = "--batch-size 4 --unlabeled-ratio semi=2 --epochs 1 --tau 0.5"
    y_hat = torch.tensor([3, 3, 3, 1, 1, 1, 1, 1])
    found = y_hat, torch.tensor([0.9, 0.5, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1])
    all_of_class_3 = np.full(8000, 3)
    for strict, kept_acc in ((0, 2 / 3), (1, 1 / 2)):
        got = train("semi", f"{flags} --tau-strict {strict}", monkeypatch, all_of_class_3, found)
        for line in got.log.numbers:
            assert line["pseudo_acc"] == 3 / 8 and line["kept_acc"] == pytest.approx(kept_acc)
    own = np.where(np.arange(8000) < 8, 3, -1)
    for line in train("semi", flags, monkeypatch, own).log.numbers:
        assert "kept" in line and not line.keys() & {"pseudo_acc", "kept_acc"}


# ===== the picture ================================================================================


@pytest.mark.parametrize("mim, pairing", [("mae", "all"), ("lomar", "all"), ("lomar", "official")])
@pytest.mark.parametrize("norm_pix", [0, 1])
def test_picture(mim, pairing, norm_pix):
    m, _ = tiny(mim=mim, norm_pix_loss=norm_pix, lomar_pairing=pairing)
    raw = torch.rand(3, 3, 28, 28)
    x, draw = (raw - 0.13) / 0.31, m.draw(3, "cpu")
    _, _, mask, ids, image_ids = m.reconstruct(x, draw)
    rows = M.reconstructions(m, x, STATS, draw)
    assert list(rows) == ["original", "masked", "reconstructed", "pasted"]
    assert all(v.shape == raw.shape and v.min() >= 0 and v.max() <= 1 for v in rows.values())
    torch.testing.assert_close(rows["original"], raw, atol=1e-6, rtol=0)
    patch = [M.patchify(v, 7) for v in rows.values()]
    for i in range(3):
        r = (image_ids == i).nonzero()[0, 0]
        hidden, shown = ids[r][mask[r] > 0], ids[r][mask[r] == 0]
        grey = torch.full_like(patch[1][i, hidden], 0.5)
        torch.testing.assert_close(patch[1][i, hidden], grey, atol=1e-6, rtol=0)
        torch.testing.assert_close(patch[1][i, shown], patch[0][i, shown])
        torch.testing.assert_close(patch[3][i, shown], patch[0][i, shown])
        torch.testing.assert_close(patch[3][i, hidden], patch[2][i, hidden])


def test_picture_of_a_perfect_model_is_the_image():
    """The normalised target undone gives the pixels back."""
    m, _ = tiny(norm_pix_loss=1)
    raw = torch.rand(2, 3, 28, 28)
    x = (raw - 0.13) / 0.31
    target = M.patchify(x, 7)
    mu, sd = M.patch_statistics(target)
    keep = m.reconstruct
    m.reconstruct = lambda x, draw: ((target - mu) / sd, *keep(x, draw)[1:])
    rows = M.reconstructions(m, x, STATS)
    torch.testing.assert_close(rows["reconstructed"], raw, atol=1e-5, rtol=0)
    torch.testing.assert_close(rows["pasted"], raw, atol=1e-5, rtol=0)


def test_cost_of_the_passes():
    """Dossier section 2, in GMAC an image: classifier 4.599, encoder of the branch 1.143 (with all
    patches embedded), decoder 5.363, LoMaR 4.502; counted on the meta device, as --dry-run does."""
    from torch.utils.flop_counter import FlopCounterMode

    def gmac(f):
        with FlopCounterMode(display=False) as counter:
            f()
        return counter.get_total_flops() / 2e9

    with torch.device("meta"):
        m, lomar = full("vit_small"), full("vit_small", mim="lomar")
        x, latent = torch.randn(1, 3, 224, 224), torch.randn(1, 50, 384)
        whole = gmac(lambda: m.reconstruct(x, m.draw(1, "meta")))
        decoder = gmac(lambda: m.decoder(latent, torch.zeros(1, 196, dtype=torch.long)))
        assert gmac(lambda: m.vit.forward_features(x)) == pytest.approx(4.599, abs=0.02)
        assert decoder == pytest.approx(5.363, abs=0.02)
        assert whole - decoder == pytest.approx(1.143, abs=0.02)
        assert gmac(lambda: lomar.reconstruct(x, lomar.draw(1, "meta"))) == pytest.approx(
            4.502, abs=0.1
        )


# ===== views ======================================================================================

NOISE = np.random.default_rng(0).integers(0, 255, (50, 75, 3), np.uint8)
PICTURE = Image.fromarray(NOISE).resize((300, 200))


def views(text=IMAGENET, stage="semi", dataset="imagenet", size=224):
    return M.view_lists(dataset, size, derived(text, stage))


def kinds(steps):
    return [type(step).__name__ for step in steps]


def test_views_hold_the_papers_steps_in_order():  # [19]
    lists = views()
    crop, flip = "RandomResizedCropAndInterpolation", "RandomHorizontalFlip"
    assert kinds(lists["strong"]) == [crop, flip, "RandAugment", "ToBytes"]
    assert kinds(lists["weak"]) == [flip, "Resize", "RandomCrop", "ToBytes"]
    assert kinds(lists["evaluate"]) == ["Resize", "CenterCrop", "ToBytes"]
    assert kinds(views(stage="pretrain")["mae"]) == [crop, flip, "ToBytes"]
    assert lists["labeled"] == lists["strong"]
    weak = views(IMAGENET + " --labeled-aug weak")
    assert weak["labeled"] == weak["weak"]  # D1
    reprob = {name: steps[-1].reprob for name, steps in lists.items()}
    assert reprob == dict(labeled=0.25, strong=0.25, weak=0, mae=0, evaluate=0)
    assert views(stage="pretrain")["mae"][0].scale == (0.2, 1)
    assert views(size=32)["weak"][1].size == 36 and kinds(views(size=32)["evaluate"]) == [
        "Resize", "ToBytes"]


def theirs(view):
    """The same views by Semiformer's calls, up to the tensor."""
    resize, flip = T.InterpolationMode.BICUBIC, T.RandomHorizontalFlip()
    if view == "strong":
        how = dict(color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic")
        return T.Compose(create_transform(224, is_training=True, **how).transforms[:3])
    crop = T.RandomCrop(224, padding=4, padding_mode="reflect")
    return T.Compose([flip, T.Resize(256, resize), crop])


@pytest.mark.parametrize("view", ["strong", "weak"])
def test_views_are_equal_to_the_parents_pixel_by_pixel(view):
    ours = T.Compose(views()[view][:-1])
    for seed in range(10):
        seed_everything(seed)
        want = np.asarray(theirs(view)(PICTURE))
        seed_everything(seed)
        assert np.array_equal(np.asarray(ours(PICTURE)), want), seed


def test_the_view_of_stage_pretrain_is_maes():
    """A crop of 0.2 to 1 of the area, bicubic, and a flip; timm draws the box from another
    generator than torchvision, so the pixels are compared for the box that was drawn."""
    crop, *rest = views(stage="pretrain")["mae"][:-1]
    flip, shares = T.RandomHorizontalFlip(), []
    for seed in range(200):
        seed_everything(seed)
        box = crop.get_params(PICTURE, crop.scale, crop.ratio)
        shares.append(box[2] * box[3] / (300 * 200))
        if seed < 10:
            bicubic = T.InterpolationMode.BICUBIC
            want = flip(T.functional.resized_crop(PICTURE, *box, [224, 224], bicubic))
            seed_everything(seed)
            assert np.array_equal(np.asarray(T.Compose([crop, *rest])(PICTURE)), np.asarray(want))
    assert 0.19 < min(shares) < 0.25 and max(shares) > 0.85  # of 3:2, all of it is never drawn


@pytest.mark.parametrize("size", [(1, 1), (3, 90), (90, 3), (40, 40)])
def test_views_of_small_pictures_never_fail(size):
    for dataset, pixels in (("digits", 28), ("folder", 224), ("cifar10", 32)):
        text = f"--dataset {dataset} --data-path DIR"
        for stage in M.STAGES:
            for steps in views(text, stage, dataset, pixels).values():
                image, box = T.Compose(steps)(Image.new("RGB", size))
                square = image.shape == (3, pixels, pixels)
                if dataset == "digits" and size[0] != size[1]:  # digits are square: no crop
                    square = min(image.shape[1:]) == pixels
                assert square, (dataset, stage, image.shape)


# ===== dry runs: the rows of Tables 1 (ours) and 3 ================================================


@pytest.mark.parametrize(
    "flags, number, parameters",
    [
        ("--arch vit_small --labels 10", 75.9, ("22,050,664", "47,963,240")),  # Tables 1 and 3
        ("--arch vit_small --labels 10 --mim lomar", 76.0, ("22,013,416", "22,309,480")),  # Table 3
    ],
)
def test_every_row_of_the_paper_shows_its_number(flags, number, parameters):
    text = M.dry_run(parse(f"{IMAGENET} {flags} --dry-run"))
    this_run, paper = text.split("== the paper's row")
    for part in (this_run, paper):
        assert f"the paper's own result: {number} top-1" in part
        stages = part.split("\nstage ")[1:]
        assert [x.split()[0] for x in stages] == ["sup", "semi"]
        for stage, count, updates in zip(stages, parameters, ("37", "296")):
            assert f"parameters {count}, of which" in stage
            assert f"{updates} updates per epoch" in stage
    assert "177,600 in all" in this_run and "432 labelled + 3024 unlabelled" in this_run
    assert {d["mae"] for d in M.PAPER.values()} | {d["lomar"] for d in M.PAPER.values()} == {
        75.9, 76.0}


def test_dry_run_counts_the_arithmetic_by_hand():
    """Section 2: 60.7 F a labelled image with the default decoder, 51.6 F with LoMaR, 31 F without
    a branch; F = 4.599 GMAC."""
    for mim, units in (("mae", 60.7), ("lomar", 51.6), ("none", 31.0)):
        args = parse(f"{IMAGENET} --mim {mim}")
        got = M.cost(args, M.derive(args, "semi", 1), 1000, "semi")["flops"]
        assert got / (2 * 432 * 4.599e9) == pytest.approx(units, rel=0.03), mim


@pytest.mark.parametrize("flags", ["--method fixmatch", "--mim none", "--tau 0.9", "--labels 1",
                                   "--arch vit_base", "--init mae.pth", "--pretrain",
                                   "--unlabeled-pool rest", "--stage sup", "--method mae",
                                   "--follow code", "--follow D1=paper", "--holdout 9",
                                   "--epochs sup=30", "--lr-per-256 1e-4", "--image-size 112",
                                   "--patch-size 8", "--num-labels 128000", "--labels-file L"])
def test_what_the_paper_does_not_have_shows_no_number(flags):
    assert M.paper_number(parse(f"{IMAGENET} {flags}")) is None


@pytest.mark.parametrize("flags", ["--lambda-u 10 --tau 0.7", "--epochs semi=600,sup=100",
                                   "--unlabeled-pool all", "--image-size 224 --patch-size 16",
                                   "--follow D7=paper,D4=code", "--lomar-windows 4",
                                   "--epochs pretrain=7"])
def test_a_flag_that_repeats_the_recipe_keeps_the_number(flags):
    assert M.paper_number(parse(f"{IMAGENET} {flags}")) == 75.9
    assert M.paper_number(parse(f"{IMAGENET} {flags} --mim lomar")) == 76.0


def test_a_published_list_has_the_recipe_of_its_percentage_without_the_number(
        tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("n01440764_1.JPEG\nn01440764_2.JPEG\n")
    monkeypatch.chdir(tmp_path)
    listed = f"{IMAGENET} --labels-file mine.txt"
    assert M.percent(parse(listed)) is None
    key = split_lists.fingerprint(["n01440764_1", "n01440764_2"])
    for name, labels in M.PUBLISHED.items():
        assert name in split_lists.KNOWN.values()
        monkeypatch.setitem(split_lists.KNOWN, key, name)
        M.list_name.cache_clear()
        args, same = parse(listed), parse(f"{IMAGENET} --labels {labels}")
        assert M.recipe(args) == M.recipe(same) and M.paper_number(args) is None
        for stage in M.STAGES:
            assert vars(M.derive(args, stage, 1)) == vars(M.derive(same, stage, 1))
        assert M.images_of_epoch(args, "sup") == round(12811.67 * labels)
    M.list_name.cache_clear()


def test_dry_run_on_digits_shows_the_papers_row_too():
    this_run, paper = M.dry_run(parse()).split("== the paper's row")
    assert "digits, vit_digits, 1% of the labels" in this_run and "top-1" not in this_run
    assert "75.9 top-1" in paper and "--arch vit_small --labels 10" in paper


def test_dry_run_hides_what_a_stage_does_not_read():
    text = M.dry_run(parse("--pretrain")).split("== the paper's row")[0]
    mae, sup, semi = (part for part in text.split("\nstage ")[1:])
    assert "mask_ratio" in mae and "tau" not in mae and "labeled_aug" not in mae
    assert "mask_ratio" not in sup and "labeled_aug" in sup and "lambda_u" not in sup
    assert "mask_ratio" in semi and "lomar" not in text and "tau" in semi
    text = M.dry_run(parse("--mim lomar"))
    assert "lomar_window" in text and "dec_dim" not in text
    for flags in ("--method fixmatch", "--mim none"):  # no branch, none of its settings
        text = M.dry_run(parse(flags))
        assert "lambda_u" in text
        assert not [n for n in (*M.MAE_ONLY, *M.LOMAR_ONLY, "norm_pix") if f"  {n}" in text], flags
    assert "mae_weight" not in M.dry_run(parse("--mim none"))


def test_dry_run_does_not_guess_the_length_of_a_list():
    text = M.dry_run(parse(f"{IMAGENET} --labels-file L")).split("== the paper's row")[0]
    assert "updates per epoch" not in text and "listed labels" in text
    assert "312 updates per epoch" in M.dry_run(parse(f"{IMAGENET} --labels-file L --method mae"))
    text = M.dry_run(parse(f"{IMAGENET} --labels-file L U --method mae"))
    assert "updates per epoch" not in text.split("== these flags")[0]  # those of L and U alone


@pytest.mark.parametrize("flags, updates", [  # of 100 images, of 8 labelled ones
    ("--holdout 4000", (40, 5)), ("--labels 0.01", (80, 1)),  # one of each class at least
    ("--num-labels 200", (80, 25)), ("--labels 100 --holdout 100", (79, 987))])
def test_dry_run_counts_the_updates_of_the_run(flags, updates):
    args = parse(f"{flags} --epochs 3 --batch-size pretrain=100,sup=8,semi=8")
    for stage, count in zip(("pretrain", "sup"), updates):
        text = "".join(M.cost_lines(args, stage, M.derive(args, stage, 1)))
        assert f", {count} updates per epoch, {3 * count:,} in all" in text
    assert M.images_of_epoch(parse("--holdout 9000"), "sup") == 0  # the run is refused
    assert M.images_of_epoch(parse("--dataset imagenet --labels 0.001"), "sup") == 1000


@pytest.mark.parametrize("flags, said", [("--method sup --stage semi", "no stage is left to train"),
                                         ("--epochs 0", "no stage is left to train"),
                                         ("--stage semi", "--stage semi: needs --init RUN")])
def test_a_dry_run_refuses_what_the_run_refuses(flags, said):
    for call in (M.dry_run, M.main.__wrapped__):
        with pytest.raises(UserError, match=said):
            call(parse(flags))


def test_dry_run_names_the_papers_row_where_there_is_one(monkeypatch):
    monkeypatch.setattr(M, "cost_lines", lambda *_: [])
    for flags, rows in (("", 1), ("--mim lomar", 1), ("--method fixmatch", 0), ("--tau 0.9", 0),
                        ("--stage semi --init old", 0), ("--holdout 9", 1)):
        text = M.dry_run(parse(flags))
        assert text.count("== the paper's row:") == text.count("the paper's own result") == rows
        assert text.count("== these flags on ImageNet:") == 1 - rows, flags
    assert "init RUN," in M.dry_run(parse("--stage semi --init old")).split("\n== ")[1]


@pytest.mark.parametrize("labels", [1, 10])
def test_vit_cifar_has_its_own_pretraining_and_no_row_of_the_paper(labels):
    flags = f"--dataset cifar10 --arch vit_cifar --labels {labels}"
    s = derived(flags, "pretrain")
    assert M.ARCHS["vit_cifar"][1] == dict(embed_dim=128, depth=6, num_heads=4)  # as in semi_vit.py
    assert (s.epochs, s.lr, s.batch_size, s.dec_dim) == (25, 1e-3, 256, 64)
    assert derived(flags, "semi").lr == 1e-3
    assert M.paper_args(parse(flags)).arch == "vit_small" and M.paper_number(parse(flags)) is None


def test_the_command_on_imagenet_keeps_every_flag_that_changes_the_numbers():
    text = ("--stage semi --mim lomar --follow D1=paper --unlabeled-pool rest --tau semi=0.9 "
            "--epochs 5 --init old.pth")
    command = M.command_of(M.paper_args(parse(text)))
    assert "--init RUN" in command  # of that arch: the one given fits the digits
    again = parse(command.split(".py ")[1])
    for name in ("stage", "mim", "follow", "unlabeled_pool", "tau", "epochs", "method"):
        assert getattr(again, name) == getattr(parse(text), name), name
    assert (again.dataset, again.arch, again.labels) == ("imagenet", "vit_small", 10)


def test_torchrun_commands_divide_the_batches():
    """A command with N processes is of no use where a batch does not divide by N."""
    pages = [M.__doc__] + [(ROOT / n).read_text() for n in ("README.md", "docs/semi_mae.md")]
    found = re.findall(r"--nproc-per-node (\d+) semi_mae\.py ([^\n`]*)", "\n".join(pages))
    assert found
    for processes, flags in found:
        args = parse(flags)
        for stage in M.stages_of(args):
            assert M.derive(args, stage, int(processes)).micro_batch > 0


# ===== whole runs =================================================================================

SCRIPT = next(s for s in SCRIPTS if s.name == "semi_mae")
BRANCH = "--dec-dim 32 --dec-depth 1 --dec-heads 4 --workers 0"
TINY = "--data-path {tiny} --arch vit_digits --image-size 28 --patch-size 7 --num-labels 20"
RUN = f"{TINY} {BRANCH}"


@pytest.fixture(scope="module")
def mae_run(tiny, tmp_path_factory):  # noqa: F811 - conftest's fixture of that name
    """A run of stage pretrain, with its pictures."""
    cwd = tmp_path_factory.mktemp("mae")
    argv = f"{RUN} --method mae --epochs 2 --batch-size 16 --evals 2".format(tiny=tiny).split()
    return ends("semi_mae", argv, cwd, pictures=True), only_run(cwd)


def test_pretraining_leaves_maes_files_and_pictures(mae_run):
    child, run = mae_run
    for name in ("mae_pretrain_vit_digits.pth", "mae_pretrain_vit_digits_full.pth",
                 "reconstructions.png", "views.png", "curves.png", "model.safetensors"):
        assert (run / name).stat().st_size > 100 and name in child.out, name
    lines = numbers(run)
    assert all(np.isfinite(x["val_loss_mae"]) for x in lines if "val_loss_mae" in x)
    assert lines[-1]["results"]["pretrain"].keys() == {"val_loss_mae", "updates"}
    with safe_open(run / "model.safetensors", "pt") as f:  # nothing taught its head: none is kept
        about = json.loads(f.metadata()["model"])
        assert "blocks.0.attn.qkv.weight" in f.keys() and "head.weight" not in f.keys()
    timm.create_model(about["timm_model"], **about["timm_arguments"],
                      checkpoint_path=str(run / "model.safetensors"))
    state = checkpoint.load_newest(run)["model"]
    small = torch.load(run / "mae_pretrain_vit_digits.pth", weights_only=True)["model"]
    assert small and all(torch.equal(v, state[f"vit.{k}"]) for k, v in small.items())


def test_evaluation_of_a_pretrained_run_repeats_its_loss(mae_run, tiny, tmp_path):  # noqa: F811
    child, run = mae_run
    last = numbers(run)[-1]["results"]["pretrain"]["val_loss_mae"]
    said = ends("semi_mae", RUN.format(tiny=tiny).split() + ["--eval", str(run)], tmp_path).out
    assert f"validation loss {last:.4f} on 21 pictures" in said
    argv = RUN.format(tiny=tiny).split() + ["--eval", str(run), "--predict", str(tiny)]
    child = ends("semi_mae", argv, tmp_path / "p", 2)
    assert "no classifier" in child.err and "validation loss" not in child.out


@pytest.mark.parametrize("script", ["semi_vit", "semi_mae"])
def test_pretrained_weights_start_both_scripts(script, mae_run, tiny, tmp_path):  # noqa: F811
    """Stage 1 of Semi-ViT's pipeline where no published weights fit."""
    file = mae_run[1] / "mae_pretrain_vit_digits.pth"
    given = torch.load(file, weights_only=True)["model"]
    for lr in ("0 --min-lr 0 --warmup-epochs 0", "1e-3"):
        argv = f"{RUN} --method sup --epochs 2 --batch-size 4 --init {file} --lr {lr}"
        argv = argv.replace(BRANCH, "--workers 0").format(tiny=tiny).split()
        cwd = tmp_path / lr[:2].strip()
        assert f"start: {file}, format mae" in ends(script, argv, cwd).out
        state = checkpoint.load_newest(only_run(cwd))["model"]
        for name, value in given.items():  # positions: Semi-ViT trains them once pretrained
            fixed = lr[0] == "0" or (script, name) == ("semi_mae", "pos_embed")
            if script == "semi_mae" or not name.startswith("norm."):
                mine = state[f"vit.{name}" if script == "semi_mae" else name]
                assert torch.equal(mine, value) == fixed, (lr, name)


def test_semi_vit_names_the_file_to_give_in_the_place_of_the_run(mae_run):
    args = semi_vit.parse_args(["--init", str(mae_run[1])])
    with pytest.raises(UserError, match=r"a run of semi_mae.py; give .* mae_pretrain_\*.pth"):
        semi_vit.load_init(semi_vit.build_model(args, 10), str(mae_run[1]))


def test_a_broken_validation_picture_is_counted_or_named(tiny, tmp_path):  # noqa: F811 - R13
    shutil.copytree(tiny, tmp_path / "data")
    broken = sorted((tmp_path / "data" / "val" / "c0").iterdir())[0]  # the first, also drawn
    broken.write_text("no picture")
    argv = f"{RUN} --method mae --epochs 1 --batch-size 16 --evals 1".format(tiny=tmp_path / "data")
    assert str(broken) in ends("semi_mae", argv.split(), tmp_path / "a", 2).err
    argv += " --max-bad-images 1"
    ends("semi_mae", argv.split(), tmp_path / "b", pictures=True)
    assert (only_run(tmp_path / "b") / "reconstructions.png").exists()


def test_eval_on_other_classes_is_refused(straight, tiny, tmp_path):  # noqa: F811
    shutil.copytree(tiny, tmp_path / "data")
    for part in ("train", "val"):
        (tmp_path / "data" / part / "c3").rename(tmp_path / "data" / part / "other")
    argv = ["--data-path", str(tmp_path / "data"), "--workers", "0"]
    child = ends("semi_mae", [*argv, "--eval", str(straight(SCRIPT))], tmp_path, 2)
    assert "--data-path holds other classes than the run" in child.err


def test_a_prediction_of_nothing_is_refused_before_training(tiny, tmp_path):  # noqa: F811
    child = ends("semi_mae", f"{RUN} --predict nowhere".format(tiny=tiny).split(), tmp_path, 2)
    assert child.err.startswith("error: --predict nowhere: no picture there")
    assert child.err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_warm_up_longer_than_the_cosine_is_said(tiny, tmp_path):  # noqa: F811
    argv = f"{RUN} --epochs sup=1,semi=1 --batch-size 10 --evals 1".format(tiny=tiny).split()
    for flags, stages in {"--lr-span run --warmup-epochs 2": ["sup"],  # of 2 epochs, one cosine
                          "--lr-span run --warmup-epochs 1": [],
                          "--lr-span stage --warmup-epochs 1": ["sup", "semi"]}.items():
        cwd = tmp_path / flags.replace(" ", "")
        said = ends("semi_mae", [*argv, *flags.split()], cwd).out
        assert re.findall(r"warning: (\w+): --warmup-epochs", said) == stages, flags


def test_fixmatch_has_three_spellings(tiny, tmp_path):  # noqa: F811
    """--method fixmatch, a weight of 0 and no branch give the same numbers, to the bit."""
    argv = f"{RUN} --epochs 2 --batch-size 10 --print-every 1 --evals 1 --tau semi=0.13"
    logs = []
    for k, flags in enumerate(("--method fixmatch", "--mae-weight 0", "--mim none")):
        ends("semi_mae", f"{argv} {flags}".format(tiny=tiny).split(), tmp_path / str(k))
        logs.append(numbers(only_run(tmp_path / str(k))))
    assert logs[0] == logs[1] == logs[2]
    assert any(x.get("kept", 0) > 0 for x in logs[0]) and "loss_mae" not in str(logs[0])


@pytest.mark.parametrize("flags, shown", [
    ("", ["labeled", "weak", "strong"]), ("--method sup", ["labeled"]), ("--method mae", ["mae"]),
    ("--pretrain", ["mae", "labeled", "weak", "strong"]),
    ("--stage pretrain --pretrain", ["mae"]), ("--stage sup", ["labeled"])])
def test_views_png_shows_what_the_stages_saw(flags, shown, tmp_path, monkeypatch):
    args, seen = parse(flags), {}
    data = M.load_dataset("digits", None)
    split = M.flags.choose_split(args, data, "all", 1)
    run = types.SimpleNamespace(image_size=28, stats=STATS, folder=tmp_path)
    monkeypatch.setattr(M.report, "contact_sheet", lambda rows, *_: seen.update(rows))
    M.draw_views(data, split, {x: M.derive(args, x, 1) for x in M.stages_of(args)}, args, run)
    assert list(seen) == shown and all(v.shape == (10, 3, 28, 28) for v in seen.values())
    rows = list(seen.values())
    assert all(not torch.equal(a, b) for k, a in enumerate(rows) for b in rows[:k])


def test_semi_vit_takes_all_but_the_norm_before_the_head(mae_run):
    file = mae_run[1] / "mae_pretrain_vit_digits.pth"
    args = semi_vit.parse_args(["--init", str(file)])
    assert (semi_vit.init_kind(args), semi_vit.position_embedding(args)) == ("mae", "learned")
    model = semi_vit.build_model(args, 10)
    assert semi_vit.load_init(model, str(file)) == ("mae", None) and model.pos_embed.requires_grad
    own = model.state_dict()
    for name, value in torch.load(file, weights_only=True)["model"].items():
        assert name.startswith("norm.") or torch.equal(own[name], value), name


def test_final_weights_are_a_timm_model_by_their_metadata(straight):
    file = straight(SCRIPT) / "model.safetensors"
    with safe_open(file, "pt") as f:
        about = json.loads(f.metadata()["model"])
    model = timm.create_model(about["timm_model"], checkpoint_path=str(file),
                              **about["timm_arguments"])
    assert about["classes"] == [f"c{k}" for k in range(10)] and about["image_size"] == 28
    state = checkpoint.load_newest(file.parent)["model"]
    vit = {k[4:]: v for k, v in state.items() if k.startswith("vit.")}
    assert equal_state(vit, model.state_dict())


def test_adamw_goes_on_where_one_cosine_spans_both_stages(straight):  # E5
    """8 updates of sup and 10 of semi: 18 for all but the decoder, none of stage pretrain's."""
    state = checkpoint.load_newest(straight(SCRIPT))
    m = M.build_model(parse(), settings(), 10, "semi")
    groups = M.parameter_groups(m, 0.05, False)
    names = {p: n for n, p in m.named_parameters()}
    order = [names[p] for g in groups for p in g["params"]]
    steps = {order[i]: int(v["step"]) for i, v in state["optimizer"]["state"].items()}
    assert {n: k for n, k in steps.items() if k != 18}.keys() == {
        n for n in order if n.startswith("decoder.")}
    assert {k for n, k in steps.items() if n.startswith("decoder.")} == {10}


def test_an_average_is_evaluated_and_changes_nothing_else(tiny, tmp_path):  # noqa: F811 - D17
    argv = f"{RUN} --epochs 2 --batch-size 10 --evals 1 --print-every 1".format(tiny=tiny).split()
    ends("semi_mae", argv, tmp_path / "a")
    ends("semi_mae", argv + ["--ema-decay", "0.9"], tmp_path / "b")
    a, b = (numbers(only_run(tmp_path / k)) for k in "ab")
    assert any("ema_top1" in x for x in b[:-1])
    strip = [{k: v for k, v in x.items() if not k.startswith("ema")} for x in b[:-1]]
    assert strip == a[:-1]


def test_epochs_count_passes_over_the_labelled_images(straight):  # E1, [14]
    lines = [x for x in numbers(straight(SCRIPT))
             if x.get("stage") == "semi" and "loss" in x]
    assert [(x["step"], x["epoch"]) for x in lines][-1] == (10, 2.0)  # 20 labels in batches of 4


def test_a_run_from_a_run_keeps_head_and_leaves_the_decoder(straight, tmp_path):
    folder = straight(SCRIPT)
    state = checkpoint.load_newest(folder)["model"]
    m, _ = tiny(5, stage="sup", pool="token")
    assert M.load_init(m, str(folder)) == "run" and torch.equal(
        m.vit.head.weight, state["vit.head.weight"]
    )
    m = M.build_model(parse(), settings(), 7, "sup")  # other classes
    M.load_init(m, str(folder))
    assert len(m.vit.head.weight) == 7


def test_predictions_and_lomar_through_the_script(tiny, tmp_path):  # noqa: F811
    argv = f"{RUN} --pretrain --mim lomar --lomar-window 3 --lomar-windows 2 --epochs 1"
    argv = f"{argv} --batch-size 4 --evals 1 --predict {tiny}/val".format(tiny=tiny).split()
    said = ends("semi_mae", argv, tmp_path).out
    run = only_run(tmp_path)
    assert (run / "lomar_pretrain_vit_digits.pth").exists() and "predictions" in said
    assert len((run / "predictions.csv").read_text().splitlines()) == 22
    with safe_open(run / "model.safetensors", "pt") as f:
        assert json.loads(f.metadata()["model"])["timm_model"] is None
    argv = [x for x in argv if x not in ("--predict", f"{tiny}/val")] + ["--eval", str(run)]
    top1 = numbers(run)[-1]["results"]["semi"]["top1"]
    assert f"top-1 {top1:.2f}," in ends("semi_mae", argv, tmp_path / "e").out


def test_the_digits_are_all_pretrained_on(tmp_path):
    argv = "--method mae --epochs 1 --batch-size 100 --holdout 7500 --evals 1 --print-every 1"
    ends("semi_mae", argv.split(), tmp_path)
    updates = [x["step"] for x in numbers(only_run(tmp_path)) if "loss" in x]
    assert updates == [1, 2, 3, 4, 5]  # 500 images, labelled ones too
