"""semiformer.py: the authors' numbers, equations by hand, counts, recipes, the dry runs."""

import json
import math
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import transforms as T

import semiformer as S
from common import split_lists
from common.amp import Precision
from common.splits import UserError

PARITY = torch.load(Path(__file__).parent / "parity" / "semiformer.pt", weights_only=True)
FP32 = Precision(torch.device("cpu"), "fp32")
PAIR = ("conv_digits", "vit_digits")


def parse(text=""):
    return S.parse_args(text.split())


def imagenet(text=""):
    return parse(f"--dataset imagenet --data-path DIR {text}")


def settings(text="", stage="semi", **changes):
    s = S.derive(parse(text), stage, 1)
    vars(s).update(changes)
    return s


def small(streams=PAIR, **how):
    torch.manual_seed(0)
    return S.Semiformer(streams, 10, image_size=32, **how)


def meta_model(text):
    with torch.device("meta"):
        return S.build_model(imagenet(text), 1000)


def count(modules):
    return sum(p.numel() for m in modules for p in m.parameters())


def close(a, b, atol=1e-6):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


class Stub(nn.Module):
    """A model of given logits (S, N, K), in the order of its calls; it notes how it was called."""

    def __init__(self, *logits):
        super().__init__()
        self.logits, self.calls = list(logits), []

    def forward(self, x):
        self.calls.append((int(self.training), int(torch.is_grad_enabled()), len(x)))
        return self.logits[len(self.calls) - 1]


# ===== parity with the authors' code ==============================================================

COUNTED = {"semiformer": "", "semiformer_pe": "--pos-embed 1",
           "semiformer_convmixer": "--arch vit_convmixer"}


def parts_of(model) -> dict:
    """Modules of a two-stream model, by the names of the stored counts."""
    named = dict(model.named_children())
    depths = model.depths()
    own = [model.cls_token, *([model.pos_embed] if hasattr(model, "pos_embed") else [])]
    conv = [named[n] for n in ("conv_1", "mixer_conv", "mixer_bn") if n in named]
    trans = [named[n] for n in ("trans_patch_conv", "trans_1", "trans_norm")]
    conv += [b for d in depths for b in (d.cnn_block, d.fusion_block)]
    return dict(
        stem=count([model.conv1, model.bn1]), conv_stream=count(conv),
        trans_stream=count(trans + [d.trans_block for d in depths]) + sum(p.numel() for p in own),
        fcu_down=count(d.squeeze_block for d in depths),
        fcu_up=count(d.expand_block for d in depths),
        conv_cls_head=count([model.conv_cls_head]), trans_cls_head=count([model.trans_cls_head]),
        total=count([model]))


@pytest.mark.parametrize("name", COUNTED)
def test_parity_counts(name):
    found = parts_of(meta_model(COUNTED[name]))
    heads = found["conv_cls_head"] + found["trans_cls_head"]
    assert found | {"total_no_classifier": found["total"] - heads} == PARITY["counts"][name]


@pytest.mark.parametrize("arch, without", [
    ("vit_conv", 40_260_288), ("vit_convmixer", 39_795_392), ("pit_conv", 42_236_496),
    ("conv", 13_230_144), ("vit", 21_697_856), ("convmixer", 13_939_200),
    ("conv_conv", 35_267_904), ("vit_vit", 46_655_552),
    ("resnet50", PARITY["counts"]["r50"]["total_no_classifier"]),
    ("resnet101", PARITY["counts"]["r101"]["total_no_classifier"]),
    ("resnet152", PARITY["counts"]["r152"]["total_no_classifier"]),
])
def test_counts_without_classifiers(arch, without):
    model = meta_model(f"--arch {arch}")
    heads = sum(p.numel() for n, p in model.named_parameters()
                if "_cls_head." in n or n.startswith("fc."))
    assert count([model]) - heads == without


@pytest.mark.parametrize("name", COUNTED)
def test_parity_weight_decay_groups(name):
    groups = S.parameter_groups(meta_model(COUNTED[name]), 0.05)
    found = {}
    for group in groups:
        key = "decay" if group["weight_decay"] else "no_decay"
        found[f"{key}_tensors"] = len(group["params"])
        found[f"{key}_params"] = sum(p.numel() for p in group["params"])
    assert found == PARITY["wd_groups"][name]


@pytest.mark.parametrize("arch, key", [("vit_conv", "semiformer"),
                                       ("vit_convmixer", "convmixer_used")])
def test_parity_drop_path(arch, key):
    model = S.model_of(arch, 10, True, drop_path=0.1)
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in model.modules()
             if isinstance(b, S.Block)]
    close(rates, PARITY["drop_path"][key], 1e-7)


@pytest.mark.parametrize("total", [300, 600])
def test_parity_learning_rate(total):
    recipe = "R1" if total == 600 else "R2"
    stages = {x: S.derive(imagenet(f"--recipe {recipe}"), x, 1) for x in S.STAGES}
    assert stages["semi"].first_epoch == stages["sup"].epochs == 30  # phase B begins there
    found = [S.lr_at(e, stages["sup" if e < 30 else "semi"]) for e in range(total)]
    close(found, PARITY["lr"][f"used_lr_{total}"], 1e-12)


def test_parity_batch_composition():
    for batch, mu, labeled, unlabeled in PARITY["batch"]["rows"].tolist():
        ratio = round(1 / mu) - 1
        assert S.compose(int(batch), int(batch), ratio) == (labeled, unlabeled)
        assert S.compose(16 * int(batch), int(batch), ratio) == (16 * labeled, 16 * unlabeled)


def test_parity_smoothed_cross_entropy():
    c = PARITY["ls_ce"]
    y = c["target"]
    close(S.labeled_losses(c["logits"][None], y, c["smoothing"])[0], c["mean"])
    certain = torch.ones(len(y))
    losses, _ = S.pseudo_label_losses(c["logits"][None], y, certain, 0.7, c["smoothing"])
    close(losses[0], c["per_sample"].mean())


LOSSES = {"pl_cnn": "conv", "pl_transformer": "trans", "pl_fuse": "fuse",
          "pl_softmax_fuse": "softmax_fuse", "thr_0.8": "conv", "lam_1": "conv", "T_0.5": "conv",
          "unlabel_smooth": "conv"}


@pytest.mark.parametrize("name", LOSSES)
def test_parity_losses_gradients_labels_and_masks(name):
    c, case = PARITY["loss"], PARITY["loss"]["cases"][name]
    x, s = (c[k].clone().requires_grad_() for k in ("logits_x", "logits_s"))
    o, y_hat = S.pseudo_labels(c["logits_w"], LOSSES[name], case["temperature"])
    keep = o >= case["threshold"]
    assert torch.equal(keep.double(), case["mask"]) and torch.equal(y_hat, case["pseudo"])
    of_l = S.labeled_losses(x, c["target"], c["smoothing"])
    smoothing = 0.1 if case["unlabel_smooth"] else 0.0
    of_u, kept = S.pseudo_label_losses(s, y_hat, o, case["threshold"], smoothing)
    close(of_l / 2, [case["Lx_cnn"], case["Lx_trans"]])
    close(of_u / 2, [case["Lu_cnn"], case["Lu_trans"]])
    loss = S.over_streams(of_l, "mean") + case["lambda"] * S.over_streams(of_u, "mean")
    close(loss.detach(), case["loss"])
    loss.backward()
    close(x.grad, case["grad_x"])
    close(s.grad, case["grad_s"])
    assert not s.grad[:, ~keep].any() and kept == keep.double().mean()


@pytest.mark.parametrize("name, head", [("vanilla_cnn", 0), ("vanilla_trans", 1)])
def test_parity_single_streams_up_to_the_half(name, head):
    """E6: theirs is the two-stream model with the other stream's weights 0, so half our loss."""
    c, case = PARITY["loss"], PARITY["loss"]["cases"][name]
    x, s, w = (c[k][head : head + 1] for k in ("logits_x", "logits_s", "logits_w"))
    o, y_hat = S.pseudo_labels(w, "conv")
    of_u, _ = S.pseudo_label_losses(s, y_hat, o, case["threshold"])
    loss = S.labeled_losses(x, c["target"], c["smoothing"]) + case["lambda"] * of_u
    close(loss[0] / 2, case["loss"])


@pytest.mark.parametrize("how", ["mean", "sum"])  # D3: theirs is the mean of two heads
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "T_0.5"])
def test_parity_of_a_whole_step_and_its_forwards(name, how):
    c, case = PARITY["loss"], PARITY["loss"]["cases"][name]
    joint = torch.cat([c["logits_x"], c["logits_s"]], 1)
    model = Stub(joint, c["logits_w"]).train()
    s = settings(label_smoothing=c["smoothing"], label_smoothing_u=0.1 * case["unlabel_smooth"],
                 tau=case["threshold"], lambda_u=case["lambda"], pseudo_source=LOSSES[name],
                 stream_loss=how)
    x_u = torch.zeros(16, 3, 8, 8)
    losses, y_hat, o = S.semi_step(model, model, x_u[:3], c["target"], x_u, x_u, s, FP32)
    close(losses["loss"], case["loss"] * (2 if how == "sum" else 1))
    assert [list(x) for x in model.calls] == case["calls"].tolist() and model.training


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_parity_of_labels_alone(how):
    c, case = PARITY["loss"], PARITY["loss"]["cases"]["sup_only"]
    model = Stub(c["logits_x"]).train()
    s = settings(stage="sup", label_smoothing=c["smoothing"], stream_loss=how)
    loss = S.sup_step(model, torch.zeros(3, 3, 8, 8), c["target"], s, FP32)["loss"]
    close(loss, case["loss"] * (2 if how == "sum" else 1))
    assert [list(x) for x in model.calls] == case["calls"].tolist()


def test_parity_evaluation():
    c = PARITY["evaluate"]
    scores = S.predictions(c["logits"], ("head1", "head2"))
    for name, z in scores.items():
        hit = z.topk(5).indices == c["target"][:, None]
        close(100 * hit[:, 0].double().mean(), c["acc1" + name], 1e-4)
        if "acc5" + name in c:
            close(100 * hit.any(1).double().mean(), c["acc5" + name], 1e-4)
    assert c["acc1"] != c["acc1_softmax"]


@pytest.fixture
def tiny_streams(monkeypatch):
    """Streams whose depths 2 and 3 have the sizes of the stored blocks."""
    rows = ((1, 8, 1), (2, 16, 2))
    monkeypatch.setitem(S.STREAMS, "c", ("bottleneck", "small", 1, 3, rows))
    for patch in (2, 4):
        monkeypatch.setitem(S.STREAMS, f"v{patch}", ("attention", "small", patch, 4, ((3, 12, 1),)))


def block_of(name):
    if name == "trans_block":
        return S.Block(12, 3, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    return {
        "bottleneck_plain": lambda: S.Bottleneck(16, 16),
        "bottleneck_with_xt": lambda: S.Bottleneck(16, 16),
        "bottleneck_stride2": lambda: S.Bottleneck(8, 16, 2, project=True),
        "fcu_down": lambda: S.Squeeze(8, 12, 4),
        "fcu_up": lambda: S.Expand(8, 12, 2),
        "conv_trans_block": lambda: S.Depth("c", "v4", 1, True, 0.0, True),
        "conv_trans_block_no_fcu": lambda: S.Depth("c", "v4", 1, False, 0.0, True),
        "conv_trans_block_last": lambda: S.Depth("c", "v2", 2, True, 0.0, True),
        "convmixer_block": lambda: S.Mixer(6, 9),
        "convmixer_block_with_xt": lambda: S.Mixer(6, 9),
    }[name]()


@pytest.mark.parametrize("name", PARITY["blocks"])
def test_parity_blocks(name, tiny_streams):
    case = PARITY["blocks"][name]
    block, state = block_of(name), dict(case["state"])
    if name == "conv_trans_block_no_fcu":  # the authors keep the unused units, we do not build them
        state = {k: v for k, v in state.items() if "squeeze" not in k and "expand" not in k}
    block.load_state_dict(state)
    block = block.double()
    given = [v.double() if torch.is_tensor(v) else v for k, v in case["in"].items()
             if k not in ("return_x_2", "remove_fcu")]
    for mode, expected in ((False, case["out_eval"]), (True, case["out_train"])):
        found = block.train(mode)(*given)
        for a, b in zip(found if isinstance(found, tuple) else [found], expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    buffers = dict(block.named_buffers())
    for k, v in case["running_after_train"].items():
        if k in buffers:
            close(buffers[k], v)


# ===== the model ==================================================================================


def test_shapes_at_224_and_order_of_the_heads():
    model = S.model_of("vit_conv", 1000, True).eval()
    seen = []
    for depth in model.depths():
        depth.register_forward_hook(lambda m, i, o: seen.append((*o[0].shape[1:], o[1].shape[1])))
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 224, 224))
        small_logits = model(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 1, 1000) and small_logits.shape == (2, 2, 1000)
    expected = 3 * [(256, 56, 56, 197)] + 4 * [(512, 28, 28, 197)] + 3 * [(1024, 14, 14, 197)]
    assert seen[:11] == [*expected, (1024, 7, 7, 197)] and model.names == ("conv", "trans")
    assert [d.r for d in model.depths()] == [4] * 3 + [2] * 4 + [1] * 4


def test_factors_of_the_other_pairs():
    r = {a: [d.r for d in meta_model(f"--arch {a}").depths()]
         for a in ("vit_convmixer", "pit_conv")}
    assert r == {"vit_convmixer": [2] * 10, "pit_conv": [2] + [4] * 2 + [2] * 8}
    pit = meta_model("--arch pit_conv").depths()
    assert [k for k, d in enumerate(pit, 2) if isinstance(d.pool, S.Pool)] == [3, 9]


def test_the_published_names():
    names = {n.split(".")[0] for n in meta_model("").state_dict()}
    assert names == {"cls_token", "conv1", "bn1", "conv_1", "trans_patch_conv", "trans_1",
                     "trans_norm", "trans_cls_head", "conv_cls_head",
                     *(f"conv_trans_{i}" for i in range(2, 13))}
    of_depth = {n.split(".")[1] for n in meta_model("").state_dict() if "conv_trans_5" in n}
    assert of_depth == {"cnn_block", "fusion_block", "squeeze_block", "expand_block", "trans_block"}


@pytest.mark.parametrize("arch, power", [("vit_conv_digits", 3), ("vit_convmixer_digits", 3)])
def test_the_class_token_doubles_at_every_exchange(arch, power):
    """Dossier: 2048 = 2^11 at twelve depths; nothing but itself is ever added to it."""
    model = S.model_of(arch, 10, True, image_size=32).eval()
    for block in model.modules():
        if isinstance(block, S.Block):
            for layer in (block.attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    seen = []
    model.trans_norm.register_forward_hook(lambda m, i, o: seen.append(i[0][:, 0]))
    model(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(seen[0], 2.0**power * model.cls_token[0].expand(2, -1))
    assert len(S.model_of("vit_conv", 10, True).depths()) == 11


def test_a_fusion_bottleneck_leaves_the_residual_alone():
    block, x, up = S.Bottleneck(16, 16), torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    assert not torch.equal(block(x, up), block(x))
    nn.init.zeros_(block.bn3.weight)
    torch.testing.assert_close(block(x, up), F.relu(x))


def test_eq5_row_zero_is_the_token_itself_and_eq6_ignores_it():
    x, t = torch.randn(2, 8, 8, 8), torch.randn(2, 17, 12)
    down = S.Squeeze(8, 12, 2)(x, t)
    assert torch.equal(down[:, 0], t[:, 0]) and down.shape == t.shape
    up = S.Expand(8, 12, 2).eval()
    moved = t.clone()
    moved[:, 0] += 1
    assert torch.equal(up(t, 4, 4), up(moved, 4, 4)) and up(t, 4, 4).shape == x.shape
    cells = up(t, 4, 4).unfold(2, 2, 2).unfold(3, 2, 2)
    assert (cells == cells[..., :1, :1]).all() and cells.min() >= 0
    plain = S.Expand(8, 12, 2, act=False).eval()  # D4: the paper has no ReLU
    assert plain(t, 4, 4).min() < 0
    silent = S.Squeeze(8, 12, 2, act=False)
    close(silent(x, t)[:, 1:].mean(-1), torch.zeros(2, 16), 1e-5)  # Eq. 5 ends in the layer norm


def test_without_exchange_the_streams_share_the_stem_alone():
    x, model = torch.rand(2, 3, 32, 32), small(fuse=False).eval()
    before = model(x)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "trans" in name and "cnn_block" not in name and "fusion_block" not in name:
                p.add_(0.1)
    after = model(x)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "cnn_block" in name or "fusion_block" in name or name.startswith("conv_1."):
                p.add_(0.1)
    assert torch.equal(after[1], model(x)[1]) and not torch.equal(after[0], model(x)[0])
    assert not any("squeeze" in n or "expand" in n for n in model.state_dict())


def test_without_position_embedding_tokens_have_no_order():
    model, t = small(("vit_digits",)).eval(), torch.randn(2, 17, 64)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(16)])
    a, b = t, t[:, order]
    for depth in model.depths():
        (_, a), (_, b) = depth(None, a), depth(None, b)
    torch.testing.assert_close(a[:, 0], b[:, 0], atol=1e-5, rtol=1e-5)
    with_embedding = small(("vit_digits",), pos_embed=True)
    assert with_embedding.pos_embed.shape == (1, 16, 64)


@pytest.mark.parametrize("arch", [a for a in S.ARCHS if a.endswith("_digits")] + ["resnet50"])
def test_every_small_network_learns_with_all_its_parameters(arch):
    torch.manual_seed(0)
    model = S.model_of(arch, 10, True, **({"image_size": 32} if "_" in arch else {}))
    logits = S.heads_of(model, torch.rand(4, 3, 32, 32))
    assert logits.shape == (len(S.ARCHS[arch]), 4, 10) and logits.dtype == torch.float32
    S.labeled_losses(logits, torch.arange(4)).mean().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert not unused, unused  # DDP would wait for these


class ByHand:
    """A second reading of the whole forward in plain calls, from a state dict; evaluation mode."""

    def __init__(self, state, at=""):
        self.w, self.at = state, at

    def __getitem__(self, name):
        return self.w.get(f"{self.at}{name}")

    def __call__(self, name):  # what lies below a name
        return ByHand(self.w, f"{self.at}{name}.")

    def conv(self, name, x, **how):
        return F.conv2d(x, self[f"{name}.weight"], self[f"{name}.bias"], **how)

    def linear(self, name, x):
        return F.linear(x, self[f"{name}.weight"], self[f"{name}.bias"])

    def norm(self, name, x, eps=1e-6):
        weight, bias, mean = (self[f"{name}.{k}"] for k in ("weight", "bias", "running_mean"))
        if mean is None:
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return F.batch_norm(x, mean, self[f"{name}.running_var"], weight, bias, eps=eps)

    def bottleneck(self, x, stride=1, up=0):
        y = F.relu(self.norm("bn1", self.conv("conv1", x + up)))
        y = F.relu(self.norm("bn2", self.conv("conv2", y, stride=stride, padding=1)))
        if self["residual_conv.weight"] is not None:
            x = self.norm("residual_bn", self.conv("residual_conv", x, stride=stride))
        return F.relu(self.norm("bn3", self.conv("conv3", y)) + x)

    def mixer(self, x, _, up=0):
        y = F.gelu(self.conv("conv1", x + up, padding=2, groups=48))
        x = x + self.norm("norm1", y, 1e-5)
        return self.norm("norm2", F.gelu(self.conv("conv2", x)), 1e-5)

    def attend(self, t):
        qkv = self.linear("attn.qkv", self.norm("norm1", t)).unflatten(-1, (3, 4, 16))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        a = (q @ k.mT / 4).softmax(-1) @ v
        t = t + self.linear("attn.proj", a.transpose(1, 2).flatten(2))
        return t + self.linear("mlp.fc2", F.gelu(self.linear("mlp.fc1", self.norm("norm2", t))))

    def stem(self, x, pool):
        x = self.conv("conv1", x, stride=2, padding=self["conv1.weight"].shape[-1] // 2)
        x = F.relu(self.norm("bn1", x, 1e-5))
        return F.max_pool2d(x, 3, 2, 1) if pool else x

    def tokens(self, stem):
        patch = self["trans_patch_conv.weight"].shape[-1]
        t = self.conv("trans_patch_conv", stem, stride=patch).flatten(2).mT + self["pos_embed"]
        return self("trans_1").attend(torch.cat([self["cls_token"].expand(len(t), 1, -1), t], 1))

    def trans_head(self, t):  # the class token's, after the last norm
        return self.linear("trans_cls_head", self.norm("trans_norm", t, 1e-5)[:, 0])


def conv_and_trans(w, image, pool=False, mixer=False):
    """Both heads of vit_conv (also with the large stem) or vit_convmixer."""
    x = w.stem(image, pool)
    t = w.tokens(x)
    unit, depths = ByHand.bottleneck, ((2, 1, 2), (1, 1, 2), (2, 2, 1))  # strides of both units, r
    if mixer:
        unit, depths = ByHand.mixer, 3 * ((1, 1, 2),)
        x = w.norm("mixer_bn", F.gelu(w.conv("mixer_conv", image, stride=4)), 1e-5)
    x = unit(w("conv_1"), x, 1)
    for k, (first, second, r) in enumerate(depths, 2):
        d = w(f"conv_trans_{k}")
        x = unit(d("cnn_block"), x, first)
        down = F.avg_pool2d(d.conv("squeeze_block.conv_project", x), r).flatten(2).mT
        down = F.gelu(d.norm("squeeze_block.ln", down))
        t = d("trans_block").attend(t + torch.cat([t[:, :1], down], 1))
        up = t[:, 1:].mT.unflatten(2, 2 * (math.isqrt(t.shape[1] - 1),))
        up = F.relu(d.norm("expand_block.bn", d.conv("expand_block.conv_project", up)))
        up = up.repeat_interleave(r, 2).repeat_interleave(r, 3)
        x = unit(d("fusion_block"), x, second, up)
    return torch.stack([w.linear("conv_cls_head", x.mean((2, 3))), w.trans_head(t)])


def two_trans(w, image):
    """Both heads of vit_vit: at each depth both hear the other's tokens of before it."""
    stem = w("first").stem(image, False)
    a, b = w("first").tokens(stem), w("second").tokens(stem)
    for k in range(3):
        hears = []
        for name, other in (("to_first", b), ("to_second", a)):
            across = w(f"{name}.{k}")
            d = F.gelu(across.norm("norm", across.linear("project", other[:, 1:])))
            hears.append(torch.cat([torch.zeros_like(other[:, :1]), d], 1))
        a, b = (w(f"{stream}.conv_trans_{k + 2}.trans_block").attend(t + heard)
                for stream, t, heard in zip(("first", "second"), (a, b), hears))
    return torch.stack([w("first").trans_head(a), w("second").trans_head(b)])


@pytest.mark.parametrize("arch, how", [
    ("vit_conv_digits", conv_and_trans), ("vit_convmixer_digits", partial(conv_and_trans, mixer=1)),
    ("vit_vit_digits", two_trans), ("large stem", partial(conv_and_trans, pool=True))])
def test_the_whole_forward_by_hand(arch, how, monkeypatch):
    torch.manual_seed(0)
    if arch == "large stem":  # that of ImageNet, before the narrow streams
        arch = "vit_conv_digits"
        for name in PAIR:
            kind, _, *rest = S.STREAMS[name]
            monkeypatch.setitem(S.STREAMS, name, (kind, "stem", *rest))
    model = S.model_of(arch, 10, True, image_size=64, pos_embed=True).eval()
    drawn = {k: v.std().item() for k, v in model.state_dict().items() if k.endswith(
        ("cls_token", "pos_embed"))}
    assert drawn and all(0.015 < std < 0.025 for std in drawn.values())
    with torch.no_grad():
        for v in model.state_dict().values():  # norms, biases and tokens that do something
            if v.is_floating_point():
                v.add_(0.3 * torch.rand_like(v) if v.ndim == 1 else 0.02 * torch.randn_like(v))
        for name, v in model.named_parameters():
            if name.endswith(("cls_token", "pos_embed")):
                v.normal_()
        image = torch.rand(3, 3, 64, 64)
        found, expected = model(image), how(ByHand(model.state_dict()), image)
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_twins_hear_each_other_only_when_fused():
    for arch in ("vit_vit_digits", "conv_conv_digits"):
        for fuse in (True, False):
            model = S.model_of(arch, 10, fuse, image_size=32).eval()
            x = torch.rand(2, 3, 32, 32)
            before = model(x)
            with torch.no_grad():
                for p in model.second.parameters():
                    p.add_(0.05 * torch.randn_like(p))
            assert torch.equal(before[0], model(x)[0]) is not fuse, (arch, fuse)


def test_initial_weights():
    model = S.model_of("vit_conv", 10, True)
    head, conv = model.trans_cls_head.weight, model.conv_trans_2.cnn_block.conv2.weight
    assert abs(head.std() - 0.02) < 0.002 and not model.trans_cls_head.bias.any()
    assert abs(conv.std() / math.sqrt(2 / (64 * 9)) - 1) < 0.05
    assert model.trans_norm.eps == model.bn1.eps == 1e-5
    depth = model.conv_trans_3
    norms = depth.cnn_block.bn1, depth.expand_block.bn, depth.squeeze_block.ln
    assert {m.eps for m in norms} == {1e-6}
    assert depth.trans_block.norm1.eps == 1e-6 and model.conv_1.bn3.weight.eq(1).all()
    mixer = S.model_of("vit_convmixer", 10, True).conv_1.conv1.weight
    assert abs(mixer.std() - 0.0057) < 0.0002


# ===== losses and the step ========================================================================


def test_eq1_sums_or_averages_the_heads():
    logits = torch.zeros(2, 3, 10)
    losses = S.labeled_losses(logits, torch.tensor([0, 1, 2]))
    close(losses, [math.log(10)] * 2)
    close(S.over_streams(losses, "mean"), math.log(10))
    close(S.over_streams(losses, "sum"), 2 * math.log(10))


def test_eq2_takes_the_first_head_and_carries_no_gradient():
    logits = torch.tensor([[[0.0, 2.0]], [[3.0, 0.0]]], requires_grad=True)
    for source, label in (("conv", 1), ("trans", 0), ("fuse", 0)):
        o, y_hat = S.pseudo_labels(logits, source)
        assert y_hat.item() == label and not o.requires_grad
    close(S.pseudo_labels(logits, "fuse")[0][0], 1 / (1 + math.exp(-1 / 2)))
    a, b = 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-3))
    close(S.pseudo_labels(logits, "softmax_fuse")[0][0], (a + b) / 2)


def test_eq3_divides_by_all_unlabelled_and_keeps_the_threshold_itself():
    o = torch.tensor([0.9, 0.7, 0.69, 0.1])  # two of four reach tau = 0.7
    logits = torch.zeros(2, 4, 10, requires_grad=True)
    losses, kept = S.pseudo_label_losses(logits, torch.zeros(4, dtype=torch.long), o, 0.7)
    assert kept == 0.5
    close(losses.detach(), [0.5 * math.log(10)] * 2)
    losses.sum().backward()
    assert logits.grad[:, :2].abs().min() > 0 and not logits.grad[:, 2:].any()
    none, kept = S.pseudo_label_losses(logits, torch.zeros(4, dtype=torch.long), o, 1.1)
    assert none.sum() == 0 and kept == 0


def test_the_order_of_a_step():
    """BatchNorm moves once; labels come from eval mode after that and before the update."""
    model = small().train()
    bn = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    x_l, x_s, x_w = torch.rand(4, 3, 32, 32), torch.rand(12, 3, 32, 32), torch.rand(12, 3, 32, 32)
    s = settings("--drop-path 0 --tau semi=0")
    losses, y_hat, o = S.semi_step(model, model, x_l, torch.arange(4), x_w, x_s, s, FP32)
    assert {int(m.num_batches_tracked) for m in bn} == {1} and all(m.training for m in bn)
    again = small().train()
    with torch.no_grad():
        again(torch.cat([x_l, x_s]))  # the same statistics
        expected = again.eval()(x_w)[0].softmax(-1).max(-1)
        before = small().eval()(x_w)[0].softmax(-1).max(-1)
        in_train_mode = small().train()(x_w)[0].softmax(-1).max(-1)
    assert torch.equal(o, expected[0]) and torch.equal(y_hat, expected[1])
    assert not torch.equal(o, before[0]) and not torch.equal(o, in_train_mode[0])
    losses["loss"].backward()
    assert torch.equal(losses["loss"], losses["loss_l"] + s.lambda_u * losses["loss_u"])  # Eq. 4


def test_eval_mode_gives_every_module_its_own_mode_back():
    model = small().train()
    model.bn1.eval()  # frozen
    with S.eval_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m for m in model.modules() if not m.training] == [model.bn1]


def test_a_frozen_batch_norm_keeps_its_statistics(tmp_path):
    """--freeze-bn, through the loop: two updates leave all running statistics as they began."""
    S.main(parse("--freeze-bn 1 --epochs sup=2,semi=0 --num-labels 20 --batch-size sup=8,semi=24 "
                 f"--evals 1 --stage sup --output {tmp_path / 'run'}"))
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert all(v.eq(float("running_var" in k)).all() for k, v in state.items() if "running_" in k)


# ===== the branch of --mae-weight (E10) ===========================================================

BRANCH = "--mae-weight 0.5 --dec-dim 32 --dec-depth 1 --dec-heads 4"


def with_branch(streams=PAIR, **how):
    model = small(streams, **how)
    torch.manual_seed(1)
    S.add_branch(model, settings(BRANCH), 32)
    return model


def test_the_branch_hides_three_quarters_and_aims_at_the_pixels():
    x, noise = torch.rand(3, 3, 32, 32), torch.rand(3, 16)
    model, seen = with_branch(), []
    model.trans_norm.register_forward_hook(lambda m, i, o: seen.append(i[0].shape))
    pred, target, mask = model.reconstruct(x, noise)
    assert seen == [(3, 5, 64)]  # class token and 4 of 16: no hidden patch enters the blocks
    assert pred.shape == target.shape == (3, 16, 8 * 8 * 3)
    assert torch.equal(S.unpatchify(target, 8), x)
    order = noise.argsort(1)
    assert not mask.gather(1, order[:, :4]).any() and mask.gather(1, order[:, 4:]).all()


@pytest.mark.parametrize("streams", [PAIR, ("vit_digits",), ("convmixer_digits", "vit_digits")])
def test_nothing_of_the_hidden_pixels_reaches_the_prediction(streams):
    """The stem's windows are wider than its stride: leaving tokens out would not be enough."""
    model, noise = with_branch(streams).eval(), torch.rand(2, 16)
    x = torch.rand(2, 3, 32, 32)
    pred, target, mask = model.reconstruct(x, noise)
    hidden = mask.unsqueeze(2).bool()
    other = S.unpatchify(torch.where(hidden, torch.rand_like(target), target), 8)
    assert torch.equal(model.reconstruct(other, noise)[0], pred)
    other = S.unpatchify(torch.where(hidden, target, target + 0.1), 8)
    assert not torch.equal(model.reconstruct(other, noise)[0], pred)


def test_the_branch_has_running_statistics_and_no_stochastic_depth():
    x, noise = torch.rand(4, 3, 32, 32), torch.rand(4, 16)
    model = with_branch(drop_path=0.9).train()
    with torch.no_grad():
        model(torch.rand(4, 3, 32, 32) + 0.3)  # statistics that are neither 0, 1 nor the batch's
        before = {k: v.clone() for k, v in model.named_buffers()}
        found = model.reconstruct(x, noise)[0]
        assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
        torch.testing.assert_close(found, model.eval().reconstruct(x, noise)[0])


def test_who_learns_from_the_branch():
    """Not heads, convolutional stream and exchange; DDP finds all else used as well."""
    model = with_branch()
    x = torch.rand(2, 3, 32, 32)
    S.mae_loss(*model.reconstruct(x, torch.rand(2, 16)), False).backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    ours = re.compile(r"conv1|bn1|cls_token|trans_(patch_conv|1|norm)|decoder(?!.decoder_pos)"
                      r"|conv_trans_\d+\.trans_block")
    assert with_gradient == {n for n, _ in model.named_parameters() if ours.match(n)}
    out = model(x, x, torch.rand(2, 16))
    (out[0].sum() + S.mae_loss(*out[1:], False)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == [
        "decoder.decoder_pos_embed"]


def test_a_step_with_the_branch_adds_its_loss_and_changes_no_other():
    x_l, x_s, x_w = torch.rand(4, 3, 32, 32), torch.rand(12, 3, 32, 32), torch.rand(12, 3, 32, 32)
    s, y, noise = settings(f"{BRANCH} --tau semi=0"), torch.arange(4), torch.rand(12, 16)
    without, y_hat, o = S.semi_step(*2 * [small().train()], x_l, y, x_w, x_s, s, FP32)
    model = with_branch().train()
    found, *labels = S.semi_step(model, model, x_l, y, x_w, x_s, s, FP32, noise)
    assert torch.equal(labels[0], y_hat) and torch.equal(labels[1], o)
    for name in ("loss_l", "loss_u", "kept"):
        assert torch.equal(found[name], without[name]), name
    assert torch.equal(found["loss"], without["loss"] + 0.5 * found["loss_mae"])
    again = with_branch().train()
    again(torch.cat([x_l, x_s]))  # the weak view is what is reconstructed, and nothing else
    assert torch.equal(found["loss_mae"], S.mae_loss(*again.reconstruct(x_w, noise), False))
    assert "loss_mae" not in without and "decoder" not in "".join(small().state_dict())


def test_the_branch_learns_on_one_batch():
    torch.manual_seed(0)
    model, s = with_branch().train(), settings(f"{BRANCH} --drop-path 0")
    optimizer = torch.optim.AdamW(S.parameter_groups(model, 0.05), lr=1e-3)
    x, y, noise = torch.rand(8, 3, 32, 32), torch.arange(2), torch.rand(6, 16)
    found = []
    for _ in range(8):
        losses, _, _ = S.semi_step(model, model, x[:2], y, x[2:], x[2:].flip(-1), s, FP32, noise)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        found.append(losses["loss_mae"].item())
    assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize("build, noise", [(small, None), (with_branch, torch.rand(12, 16))])
def test_one_graph(build, noise):
    """--compile: each forward in one piece, same numbers (eager backend: no compiler)."""
    x = torch.rand(28, 3, 32, 32)
    batch = x[:4], torch.arange(4), x[4:16], x[16:]
    found = []
    for compiled in (False, True):
        model = build().train()
        if compiled:
            model.compile(backend="eager", fullgraph=True)
        found.append(S.semi_step(model, model, *batch, settings(), FP32, noise)[0])
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())
    found[1]["loss"].backward()
    assert not any(k.startswith("_orig") for k in model.state_dict())


def test_parameters_of_the_branch_are_in_one_group_each():
    model = with_branch()
    free, decayed = S.parameter_groups(model, 0.05)
    names = {p: n for n, p in model.named_parameters()}
    of_free, of_decayed = ({names[p] for p in g["params"]} for g in (free, decayed))
    assert not of_free & of_decayed
    assert of_free | of_decayed == set(names.values()) - {"decoder.decoder_pos_embed"}
    assert {"decoder.mask_token", "cls_token"} <= of_free
    assert "decoder.decoder_pred.weight" in of_decayed
    assert (free["weight_decay"], decayed["weight_decay"]) == (0, 0.05)


@pytest.mark.parametrize("flags, said", [
    ("--arch pit_conv_digits", "no single stream"), ("--arch vit_vit_digits", "no single stream"),
    ("--arch conv_digits", "no single stream"), ("--arch resnet50", "no single stream"),
    ("--mask-ratio 0.95", "0 of 16 patches stay"), ("--mask-ratio 0", "16 of 16 patches stay"),
    ("--dec-heads 5", "--dec-dim 64"), ("--dec-depth 0", "--dec-depth 0"),
])
def test_a_branch_that_does_not_fit_is_refused_by_its_flag(flags, said):
    with pytest.raises(UserError, match=said):
        S.derive(parse(f"--mae-weight 1 {flags}"), "semi", 1)
    S.derive(parse(flags), "semi", 1)  # without the branch nobody asks


# ===== schedule, batches, recipes =================================================================


def test_the_learning_rate_of_single_epochs():
    s = S.derive(imagenet("--recipe R1"), "semi", 1)
    expected = {0: 1e-6, 1: 1e-6, 2: 2.008e-4, 5: 8.002e-4, 6: 9.9983e-4, 30: 9.9430e-4,
                599: 1.00271e-5}
    for epoch, lr in expected.items():
        assert S.lr_at(epoch, s) == pytest.approx(lr, rel=1e-4)
    for world in (1, 16):
        assert S.derive(imagenet("--recipe R1"), "semi", world).lr == 1e-3
    paper = S.derive(imagenet("--recipe R1 --follow D6=paper"), "semi", 1)
    assert S.lr_at(5, paper) == pytest.approx(9.9983e-4, rel=1e-4)


@pytest.mark.parametrize("recipe, of_sup, of_semi, updates", [
    ("R1", (3456, 0), (416, 3040), (37, 308)), ("R1c", (864, 0), (104, 760), (148, 1231)),
    ("R2", (1728, 0), (288, 1440), (74, 444)), ("R2b", (1728, 0), (208, 1520), (74, 616)),
])
def test_batches_and_updates_of_the_recipes(recipe, of_sup, of_semi, updates):
    sup, semi = (S.derive(imagenet(f"--arch vit_conv --recipe {recipe}"), x, 1) for x in S.STAGES)
    assert ((sup.n_l, sup.n_u), (semi.n_l, semi.n_u)) == (of_sup, of_semi)
    assert tuple(S.updates_per_epoch(128116, s) for s in (sup, semi)) == updates
    named = S.derive(imagenet(f"--recipe {recipe} --follow D5=paper"), "semi", 1)
    assert named.n_u == semi.unlabeled_ratio * named.n_l


RECIPE_CELLS = [  # flags, recipe, epochs in all, batch, labelled of a group, smoothing of labels_u
    ("", "R1", 600, 3456, 13, 0.1),
    ("--recipe R1b", "R1b", 600, 3456, 13, 0.0),
    ("--recipe R1c", "R1c", 600, 864, 13, 0.1),
    ("--recipe R2", "R2", 300, 1728, 18, 0.0),
    ("--recipe R2b", "R2b", 300, 1728, 13, 0.0),
    ("--labels 5", "R3", 300, 1728, 10, 0.0),
    ("--labels 20", "R4", 300, 1728, 18, 0.0),
    ("--arch vit_convmixer", "R5", 300, 1344, 14, 0.0),
    ("--arch pit_conv", "R2", 300, 1728, 18, 0.0),
    ("--dataset places205 --data-path DIR", "R6", 300, 1728, 18, 0.0),
    ("--method conv_labeled", "R2", 300, 1728, 18, 0.0),
    ("--pseudo-source trans", "R2", 300, 1728, 18, 0.0),
    ("--fuse 0", "R2", 300, 1728, 18, 0.0),
]


@pytest.mark.parametrize("flags, name, epochs, batch, share, smoothing", RECIPE_CELLS)
def test_the_recipes_cell_by_cell(flags, name, epochs, batch, share, smoothing):
    args = imagenet(flags)
    assert S.recipe_name(args) == name
    assert not any(isinstance(part, float) for part in S.recipe(args)[0])  # 5, not 5.0
    sup, semi = (S.derive(args, x, 1) for x in S.STAGES)
    assert (sup.epochs, sup.epochs + semi.epochs) == (30, epochs)
    assert semi.batch_size == batch and semi.n_l == batch // semi.batch_group * share
    assert semi.label_smoothing_u == smoothing and semi.label_smoothing == 0.1
    assert semi.lr == (4e-3 if name == "R1b" else 1e-3) and semi.min_lr == 1e-5
    assert (semi.tau, semi.lambda_u, semi.warmup_epochs, semi.weight_decay, semi.drop_path) == (
        0.7, 4.0, 5.0, 0.05, 0.1)
    assert semi.unlabeled_pool == "all"
    assert semi.pseudo_source == ("trans" if "pseudo" in flags else "conv")


def test_supervised_alone_trains_all_epochs_on_full_batches_of_labels():
    s = S.derive(imagenet("--arch vit --method sup"), "sup", 1)  # R7
    assert (s.epochs, s.all_epochs, s.first_epoch, s.n_l, s.n_u) == (300, 300, 0, 1728, 0)
    for flags, epochs in (("", 500), ("--schedule one", 620), ("--schedule semi=one", 500)):
        assert S.derive(parse(f"--method sup {flags}"), "sup", 1).epochs == epochs
    assert S.derive(imagenet("--arch vit --method sup --schedule each"), "sup", 1).epochs == 30


def test_small_networks_have_a_small_decoder():
    for flags, dim in (("", 64), ("--dataset cifar10 --arch vit_conv_digits", 64),
                       ("--dataset cifar10 --arch vit_conv_digits --labels 1", 64),
                       ("--dataset imagenette --arch vit_conv_digits", 64),
                       ("--arch vit_conv", 512), ("--dataset cifar10", 512)):
        s = S.derive(parse(f"--mae-weight 1 {flags}"), "semi", 1)
        assert (s.dec_dim, s.dec_depth, s.dec_heads) == ((64, 1, 4) if dim == 64 else (512, 8, 16))


@pytest.mark.parametrize("follow, name, stage, value", [
    ("D1=paper", "color_jitter", "semi", 0.4), ("D2=paper", "unlabeled_pool", "semi", "rest"),
    ("D3=paper", "stream_loss", "sup", "sum"), ("D4=paper", "exchange_act", "sup", 0),
    ("D5=paper", "batch_group", "semi", 3456), ("D6=paper", "lr_lag", "sup", 0),
])
def test_departures(follow, name, stage, value):
    paper = S.derive(imagenet(f"--follow {follow}"), stage, 1)
    assert getattr(paper, name) == value and follow in paper.sources[name]
    default = S.derive(imagenet(), stage, 1)
    assert getattr(default, name) == getattr(S.derive(imagenet("--follow code"), stage, 1), name)
    assert getattr(default, name) != value


def test_departure_d4_reaches_the_model():
    assert S.build_model(parse(""), 10).conv_trans_2.squeeze_block.act
    assert not S.build_model(parse("--follow D4=paper"), 10).conv_trans_2.squeeze_block.act
    for arch in ("vit_vit_digits", "conv_conv_digits"):
        for follow, act in (("recommended", True), ("D4=paper", False)):
            across = S.build_model(parse(f"--arch {arch} --follow {follow}"), 10).to_first[0].eval()
            x = torch.randn(2, 5, 64) if across.tokens else torch.randn(2, 64, 3, 3)
            plain = across.norm(across.project(x[:, 1:] if across.tokens else x))
            last = (F.gelu if across.tokens else F.relu)(plain) if act else plain
            found = across(x)
            assert torch.equal(found[:, 1:] if across.tokens else found, last), (arch, follow)


def test_a_stage_that_is_not_run_need_not_fit():
    args = parse("--method sup --batch-size 4")
    assert S.derive(args, "sup", 1).n_l == 4 and S.build_model(args, 10).names
    args = parse("--stage semi --init RUN --batch-size sup=3,semi=96 --accum-steps 2")
    assert S.derive(args, "semi", 1).n_l == 16 and S.build_model(args, 10).names


@pytest.mark.parametrize("flags, named", [
    ("--method vanilla --arch vit_conv", "--method"),
    ("--method semiformer --arch vit", "--method"),
    ("--method conv_labeled --arch conv", "--method"), ("--fuse 2", "--fuse"),
    ("--arch conv --fuse 1", "--fuse: --arch conv has no second stream"),
    ("--arch conv --pos-embed 1", "--pos-embed: --arch conv has no transformer"),
    ("--arch resnet50 --attention x.png", "--attention: --arch resnet50 has no transformer"),
    ("--arch resnet50 --drop-path 0.1", "--drop-path: --arch resnet50 has no attention block"),
    ("--dataset imagenet --recipe R3", "--recipe R3: no such row for --dataset imagenet "
     "--arch vit_conv --labels 10"),
    ("--dataset imagenet --arch vit --recipe R1", "--recipe R1: no such row"),
    ("--dataset imagenet --recipe R1 --num-labels 50", "--arch vit_conv --num-labels 50"),
    ("--recipe R2", "--recipe R2: no such row for --dataset digits"),
])
def test_method_and_streams_must_fit(flags, named, capsys):
    with pytest.raises(SystemExit):
        parse(flags)
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("flags, named", [
    ("--pseudo-source semi=vote", "--pseudo-source"), ("--stream-loss max", "--stream-loss"),
    ("--batch-size semi=4", "--batch-size"), ("--accum-steps 7", "--accum-steps"),
    ("--unlabeled-ratio semi=0", "--unlabeled-ratio"), ("--lr-lag 2", "--lr-lag 2: one of 0, 1"),
    ("--freeze-bn -1", "--freeze-bn -1"), ("--batch-group semi=-8", "--batch-group -8: at least 0"),
    ("--exchange-act semi=0", "--exchange-act: one value for both"), ("--norm-pix-loss 2", "norm"),
    ("--tau 1.5", "--tau 1.5: from 0 to 1"),
])
def test_settings_that_cannot_be(flags, named):
    with pytest.raises(UserError, match=named):
        S.derive(parse(flags), "semi", 1)


def test_a_group_that_does_not_divide_the_batch_says_so():
    s = S.derive(imagenet("--recipe R2 --batch-size 200"), "semi", 1)
    assert (s.batch_group, s.n_l, s.n_u) == (200, 33, 167)
    assert s.sources["batch_group"] == "the whole batch: 108 does not divide it"


def test_the_papers_number_stands_beside_its_own_list_alone(tmp_path, monkeypatch, no_costs):
    (tmp_path / "L").write_text("n01440764_1.JPEG,0,0\nn01440764_2.JPEG,0,1\n")
    monkeypatch.chdir(tmp_path)
    key = split_lists.fingerprint(["n01440764_1", "n01440764_2"])
    assert set(S.PUBLISHED) <= set(split_lists.KNOWN.values())
    of_10, of_5 = "Semiformer 10% (FixMatch's ImageNet split 1)", "Semiformer 5%"
    for listed, flags, row, number in (  # the percentage of the list; those of the recipe
            (None, "", ("R1", 10), None), (None, "--mae-weight 5", ("R1", 10), None),
            (None, "--recipe R4", ("R4", 20), None), (None, "--recipe R3", ("R3", 5), None),
            (None, "--dataset places205", (None, None), None),
            (None, "--dataset places205 --recipe R6", ("R6", 5), None),
            ("SimCLR 10percent.txt", "", ("R1", 10), None),  # another draw of as many
            ("SimCLR 1percent.txt", "", (None, None), None),
            (of_10, "", ("R1", 10), "75.5 top-1, with the published list"),
            (of_10, "--mae-weight 5", ("R1", 10),
             "76.4 top-1 (Semi-MAE's, E10), with the published list"),
            (of_5, "", ("R3", 5), "66.3 top-1, with the published list")):
        monkeypatch.setitem(split_lists.KNOWN, key, listed)
        S.list_name.cache_clear()
        args = imagenet(f"--labels-file L {flags}")
        percent = int(re.search(r"\d+", listed)[0]) if listed else None
        assert S.percent(args) == percent and S.recipe(args)[0][2:] == row
        assert S.paper_number(args) == number
        paper = S.paper_args(args)
        fits = ("R6", 5) if "places" in flags else ("R1", 10) if percent == 1 else row
        assert S.recipe(paper)[0][2:] == fits
    text = S.dry_run(args).split("== the paper's row")  # the published 5%
    assert all("66.3 top-1" in x and "400 updates per epoch" in x for x in text)
    monkeypatch.setitem(split_lists.KNOWN, key, None)
    S.list_name.cache_clear()
    assert "updates per epoch" not in S.dry_run(args).split("== the paper's row")[0]
    S.list_name.cache_clear()


def test_an_image_size_that_the_streams_cannot_cut():
    with pytest.raises(UserError, match="multiple of 16"):
        S.build_model(imagenet("--image-size 200"), 10)


# ===== views ======================================================================================


def test_views_are_the_authors_lists():
    s = S.derive(imagenet(), "semi", 1)
    lists = S.view_lists("imagenet", 224, s)
    names = {k: [type(t).__name__ for t in v] for k, v in lists.items()}
    strong = ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment", "ToBytes"]
    assert names["labeled"] == names["strong"] == strong  # no colour jitter, erasing last
    assert names["weak"] == ["RandomHorizontalFlip", "Resize", "RandomCrop", "ToBytes"]
    assert names["evaluate"] == ["Resize", "CenterCrop", "ToBytes"]
    flip, resize, crop, last = lists["weak"]
    assert resize.size == 256 and crop.padding == 4 and crop.padding_mode == "reflect"
    assert tuple(crop.size) == (224, 224)
    assert last.reprob == 0 and lists["strong"][-1].reprob == 0.25
    bicubic, (crop, flip, *_) = T.InterpolationMode.BICUBIC, lists["strong"]
    assert crop.size == (224, 224) and crop.scale == (0.08, 1) and crop.ratio == (3 / 4, 4 / 3)
    assert crop.interpolation == resize.interpolation == bicubic and flip.p == 0.5
    larger, centre, last = lists["evaluate"]
    assert (larger.size, larger.interpolation) == (256, bicubic) and last.reprob == 0
    assert tuple(centre.size) == (224, 224)
    paper = S.derive(imagenet("--follow D1=paper --crop-min 0.5"), "semi", 1)
    jittered = S.view_lists("imagenet", 224, paper)
    for name in ("labeled", "strong"):
        jitter = jittered[name][3]
        assert isinstance(jitter, T.ColorJitter) and jitter.hue is None
        assert jitter.brightness == jitter.contrast == jitter.saturation == (0.6, 1.4)
        assert jittered[name][0].scale == (0.5, 1)
    cifar = S.view_lists("cifar10", 32, s)  # no enlarging below 64 pixels (E9)
    assert cifar["weak"][1].size == cifar["evaluate"][0].size == 32
    picture = Image.new("RGB", (500, 375))
    for view in lists.values():
        assert T.Compose(view)(picture)[0].shape == (3, 224, 224)


@pytest.mark.parametrize("dataset", S.DATASETS)
@pytest.mark.parametrize("size", [(90, 70), (70, 90), (1, 1), (28, 28)])
def test_any_picture_can_be_evaluated(dataset, size):
    """A digits model, too, is asked about a user's own pictures, which are no squares."""
    pixels = S.DATASETS[dataset][0]
    view = S.view_lists(dataset, pixels, settings())["evaluate"]
    assert T.Compose(view)(Image.new("RGB", size))[0].shape == (3, pixels, pixels)


# ===== weights ====================================================================================


def test_the_authors_checkpoint_loads(tmp_path):
    model = small()
    published = {"model": {f"module.{k}": v for k, v in small().state_dict().items()}, "epoch": 3}
    torch.save(published, tmp_path / "published.pth")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert S.load_init(model, str(tmp_path / "published.pth"))[0] == "semiformer"
    assert all(torch.equal(v, published["model"][f"module.{k}"])
               for k, v in model.state_dict().items())
    other = S.Semiformer(PAIR, 7, image_size=32)  # another number of classes: heads stay new
    S.load_init(other, str(tmp_path / "published.pth"))
    unfused = small(fuse=False)  # the exchange units of the file are left out
    S.load_init(unfused, str(tmp_path / "published.pth"))
    torch.save(dict(recipe={}, model=small().state_dict()), tmp_path / "run.pth")
    assert S.load_init(small(), str(tmp_path / "run.pth"))[1] is not None
    # AdamW's moments lie by place: with parameters left out they would go to others
    assert S.load_init(unfused, str(tmp_path / "run.pth")) == ("run", None)
    torch.save({"model": dict(list(published["model"].items())[9:])}, tmp_path / "part.pth")
    with pytest.raises(UserError, match="missing"):
        S.load_init(small(), str(tmp_path / "part.pth"))


# ===== attention maps =============================================================================


def test_rollout_by_hand():
    """With attention even in every block, each row is (I + 1/n) / 2 times itself, all maps flat."""
    model = small(("vit_digits",)).eval()
    for block in model.modules():
        if isinstance(block, S.Block):
            nn.init.zeros_(block.attn.qkv.weight), nn.init.zeros_(block.attn.qkv.bias)
    maps = S.attention_maps(model, torch.rand(3, 3, 32, 32))
    close(maps, torch.ones(3, 4, 4))


def test_rollout_is_the_product_of_the_blocks():
    model, x = small().eval(), torch.rand(1, 3, 32, 32)
    inputs = []
    for block in model.modules():
        if isinstance(block, S.Block):
            block.attn.register_forward_hook(lambda m, i, o: inputs.append((m, i[0])))
    found = S.attention_maps(model, x)
    total = torch.eye(17)
    with torch.no_grad():
        for attn, t in inputs:
            q, k, _ = attn.qkv(t)[0].chunk(3, -1)
            heads = [(q[:, h : h + 16] @ k[:, h : h + 16].T / 4).softmax(-1)
                     for h in range(0, 64, 16)]
            total = (sum(heads) / 4 + torch.eye(17)) / 2 @ total
    row = total[0, 1:]
    close(found[0], (row / row.max()).view(4, 4), 1e-5)
    assert len(inputs) == 4 and not model.training


def test_attention_of_each_kind_of_network():
    x = torch.rand(2, 3, 32, 32)
    for arch, grid in (("pit_conv_digits", 4), ("vit_vit_digits", 4), ("vit_convmixer_digits", 4),
                       ("conv_digits", None)):
        maps = S.attention_maps(S.model_of(arch, 10, True, image_size=32), x)
        assert maps is None if grid is None else maps.shape == (2, grid, grid)


# ===== dry runs ===================================================================================


@pytest.fixture
def no_costs(monkeypatch):
    """Arithmetic and memory are counted in one test, not in fifty."""
    monkeypatch.setattr(S.report, "cost", lambda model, size: dict(flops=1, kept=1, fixed=1))


@pytest.mark.parametrize("key", S.PAPER, ids=lambda k: "-".join(map(str, k)))
def test_every_row_of_the_tables_has_a_dry_run(key, no_costs):
    dataset, arch, method, source, labels, recipe = key
    flags = f"--dataset {dataset} --data-path DIR --arch {arch} --method {method} --labels {labels}"
    flags += f" --pseudo-source {source}" if source in ("trans", "fuse") else ""
    if (arch, method, labels) == ("vit_conv", "semiformer", 10):
        flags += f" --recipe {recipe}"
    text = S.dry_run(parse(flags))
    of_trans, both = S.PAPER[key]
    assert f"the paper's own result: {both} top-1" in text and f"'{recipe}'" in text
    assert (f"transformer head {of_trans}" in text) is bool(of_trans)
    total = {"imagenet": {5: 64058, 10: 128116, 20: 256233}[labels], "places205": 122444}[dataset]
    stage = "sup" if method == "sup" else "semi"
    s = S.derive(parse(flags), stage, 1)
    assert f", {S.updates_per_epoch(total, s)} updates per epoch" in text
    for name in ("tau", "lambda_u", "n_l", "n_u"):
        assert (f"\n  {name} " in text) is (method != "sup" or name == "n_l"), name


TABLES = """
table 2  imagenet    R1  10   semiformer    vit_conv  75.5
table 3  imagenet    R2  10   sup           vit 48.6        pit 50.0
table 3  imagenet    R2  10   vanilla       conv 68.5       vit 59.0   pit 63.0
table 3  imagenet    R5  10   vanilla       convmixer 69.3
table 3  imagenet    R2  10   conv_labeled  vit_conv 67.2/70.2   pit_conv 67.8/70.5
table 3  imagenet    R5  10   conv_labeled  vit_convmixer 66.7/70.2
table 3  imagenet    R2  10   semiformer    vit_conv 72.4/73.5   pit_conv 70.8/71.6
table 3  imagenet    R5  10   semiformer    vit_convmixer 72.9/73.8
table 4  imagenet    R3   5   sup           vit 28.6   conv 44.2
table 4  imagenet    R3   5   vanilla       vit 45.7   conv 61.3
table 4  imagenet    R3   5   conv_labeled  vit_conv 62.0
table 4  imagenet    R3   5   semiformer    vit_conv 66.3
table 4  imagenet    R2  10   sup           vit 48.6   conv 60.2
table 4  imagenet    R2  10   vanilla       vit 59.0   conv 68.5
table 4  imagenet    R2  10   conv_labeled  vit_conv 70.2
table 4  imagenet    R2  10   semiformer    vit_conv 73.5
table 4  imagenet    R4  20   sup           vit 52.9   conv 63.5
table 4  imagenet    R4  20   vanilla       vit 69.8   conv 73.6
table 4  imagenet    R4  20   conv_labeled  vit_conv 74.8
table 4  imagenet    R4  20   semiformer    vit_conv 78.1
table 5  places205   R6   5   sup           vit 36.0   conv 44.3
table 5  places205   R6   5   vanilla       vit 46.9   conv 51.6
table 5  places205   R6   5   conv_labeled  vit_conv 52.5
table 5  places205   R6   5   semiformer    vit_conv 53.8
table 6  imagenet    R2  10   semiformer    vit_conv 73.5   vit_conv+trans 67.4   vit_conv+fuse 71.1
table 7  imagenet    R2  10   vanilla       resnet50 68.3   resnet101 70.8   resnet152 71.8
table 7  imagenet    R2  10   vanilla       conv 68.5   vit 59.0
table 7  imagenet    R2  10   semiformer    conv_conv 66.9   vit_vit 59.6   vit_conv 73.5
"""


def test_the_numbers_of_the_tables_cell_by_cell():
    """Tables 2 to 7, typed once more (Table 1 is part of 3 and 4): no row more, none less."""
    rows = {}
    for line in TABLES.strip().splitlines():
        _, _, dataset, recipe, labels, method, *cells = line.split()
        for arch, number in zip(cells[::2], cells[1::2]):
            arch, _, source = arch.partition("+")
            key = (dataset, arch, method, "" if method == "sup" else source or "conv", int(labels),
                   recipe)
            *trans, both = map(float, number.split("/"))
            before = rows.get(key, (None, both))
            assert both == before[1], line  # the tables agree where they have the same row
            rows[key] = (trans[0] if trans else before[0], both)
    assert rows == S.PAPER


@pytest.mark.parametrize("flags", [
    f"--recipe R2 {x}" for x in ("--tau 0.65", "--tau 0.75", "--tau 0.8", "--lambda-u 1",
                                 "--lambda-u 2", "--lambda-u 3", "--unlabeled-ratio semi=3",
                                 "--unlabeled-ratio semi=7")])
def test_the_hyper_parameter_study_has_dry_runs_without_numbers(flags, no_costs):
    text = S.dry_run(imagenet(f"--arch vit_conv {flags}"))
    updates = {"semi=3": 296, "semi=7": 616}.get(flags.split()[-1], 444)
    assert "the paper's own result" not in text and f", {updates} updates per epoch" in text


@pytest.mark.parametrize("flags, number", [
    *((f"--recipe R2 {same}", 73.5) for same in (
        "--tau 0.7", "--lambda-u 4", "--unlabeled-ratio semi=5", "--follow code", "--fuse 1",
        "--unlabeled-pool all", "--image-size 224", "--labels 10", "--pseudo-source semi=conv")),
    *((f"--recipe R2 {other}", None) for other in (
        "--follow paper", "--unlabeled-pool rest", "--image-size 192", "--lr sup=2e-3",
        "--pos-embed 1", "--init FILE", "--holdout 50000", "--epochs sup=0", "--stage sup")),
    ("--epochs sup=30,semi=570", 75.5), ("--freeze-bn 0", 75.5), ("--holdout 50000", None),
    ("--mask-ratio 0.5", 75.5), ("--mae-weight 5 --mask-ratio 0.75", 76.4),
    ("--mae-weight 5 --mask-ratio 0.5", None), ("--mae-weight 5 --follow D3=paper", None),
    ("--recipe R2 --fuse 0", 70.2), ("--fuse 0", 70.2), ("--method conv_labeled --fuse 1", 73.5),
    ("--recipe R1 --fuse 0", None), ("--recipe R2 --pseudo-source semi=fuse", 71.1),
    ("--arch vit --method sup --tau semi=0.3 --lr semi=1 --unlabeled-pool rest", 48.6),
    ("--arch vit --method sup --lr sup=1", None), ("--arch vit --method sup --schedule each", None),
])
def test_the_number_stands_beside_what_is_computed(flags, number):
    """A flag that says what the recipe says anyway, or is of no use, hides nothing."""
    found = S.paper_number(imagenet(f"--arch vit_conv {flags}"))
    assert found is None if number is None else found.startswith(f"{number} top-1")


def test_semi_maes_row_has_a_dry_run(no_costs):
    """Semi-MAE's Table 2; its number stands beside R1 and weight 5 alone."""
    text = S.dry_run(imagenet("--arch vit_conv --mae-weight 5"))
    assert text.count("the paper's own result: 76.4 top-1 (Semi-MAE's, E10)") == 2
    assert "75.5" not in text.replace("authors' script of the 75.5", "")
    assert "decoder 25,811,712" in text and "308 updates per epoch, 175,560 in all" in text
    semi = text.split("stage semi")[1]
    for name, value in (("mae_weight", "5.0"), ("mask_ratio", "0.75"), ("dec_dim", "512"),
                        ("dec_depth", "8"), ("dec_heads", "16"), ("lambda_u", "4.0")):
        assert re.search(rf"\n  {name} +{value} ", semi), name
    assert "dec_dim" not in S.dry_run(imagenet("--arch vit_conv"))
    for other in ("--mae-weight 4", "--mae-weight 5 --recipe R2", "--mae-weight 5 --labels 5",
                  "--mae-weight 5 --arch vit", "--mae-weight 5 --tau 0.8"):
        assert S.paper_number(imagenet(other)) is None, other


def test_pictures_held_out_are_not_counted(no_costs):
    text = S.dry_run(parse("--arch vit_conv_digits --holdout 4000 --labels 4"))
    this, paper = text.split("== the paper's row")
    assert "160 labelled" not in this and ", 2 updates per epoch" in this  # 160 of 4,000, by 64
    assert ", 308 updates per epoch" in paper  # all of ImageNet
    assert "75.5 top-1" in paper and "75.5 top-1" not in this


def test_the_cost_of_the_branch():
    """Three passes over encoder and decoder of each unlabelled picture, at 50 of 197 tokens."""
    args = imagenet("--arch vit_conv --mae-weight 5")
    s = S.derive(args, "semi", 1)
    with_it = S.cost(args, s, 1000, 224)["flops"]
    s.mae_weight = 0.0
    branch = (with_it - S.cost(args, s, 1000, 224)["flops"]) / (3 * s.n_u)
    # blocks on 50 tokens as in Semi-MAE's ViT-S and its decoder; stem and patches are of here
    encoder, decoder, stem, patches = 1.143e9 - 58e6, 5.363e9, 118e6, 77e6
    assert branch / 2 == pytest.approx(encoder + decoder + stem + patches, rel=0.01)


def test_the_dry_run_shows_two_blocks_and_counts():
    text = S.dry_run(parse(""))
    assert text.count("== ") == 2 and "== this run: digits" in text
    assert "parameters 41,670,288, without classifiers 40,260,288" in text
    assert "75.5" in text and "308 updates per epoch, 175,560 in all" in text
    assert S.dry_run(parse("--arch conv_digits")).count("68.5 top-1") == 1


def test_the_first_line_names_the_papers_command():
    args = parse("--arch vit_conv_digits --method conv_labeled")
    command = S.command_of(S.paper_args(args))
    assert command == ("python semiformer.py --dataset imagenet --data-path DIR --arch vit_conv "
                       "--labels 10 --method conv_labeled")
    again = parse(command.split("semiformer.py ")[1])
    assert S.paper_number(again) == "70.2 top-1, transformer head 67.2"


# ===== a run, its pictures, its end ===============================================================

SHORT = ("--arch vit_conv_digits --image-size 32 --num-labels 20 --evals 1 --epochs sup=2,semi=1 "
         "--batch-size sup=8,semi=16 --unlabeled-ratio semi=3 --workers 0")


def test_a_run_and_its_pictures(tmp_path, tiny, capsys):
    flags = f"--data-path {tiny} {SHORT}"
    S.main(parse(f"{flags} --output {tmp_path / 'a'}"))
    S.main(parse(f"{flags} --method conv_labeled --output {tmp_path / 'b'}"))
    for name in ("attention.png", "views.png", "curves.png"):
        assert (tmp_path / "a" / name).stat().st_size > 1000, name
    said = capsys.readouterr().out
    assert "conv " in said and "trans " in said and "softmax " in said and "gain" in said
    picture = next((tiny / "val" / "c3").iterdir())
    S.main(parse(f"--eval {tmp_path / 'a'} --attention {picture} --compare {tmp_path / 'b'}"))
    assert "attention: " in capsys.readouterr().out
    both = Image.open(tmp_path / "a" / "attention.png").size
    S.main(parse(f"--eval {tmp_path / 'a'} --attention {picture}"))
    assert both[1] > Image.open(tmp_path / "a" / "attention.png").size[1]  # five rows, three rows
    for more in (f"--attention {tmp_path / 'nothing'}", f"--predict {tmp_path / 'nothing'}",
                 f"--attention {picture} --compare {tmp_path / 'nothing'}"):
        with pytest.raises(SystemExit):
            S.main(parse(f"--eval {tmp_path / 'a'} {more}"))
        name = more.split()[-2]
        assert f"error: {name} {tmp_path / 'nothing'}: no " in capsys.readouterr().err
    for name in ("odd.png", "broken.png"):  # 40 x 30 pixels; and one that is left out
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd" / name).write_text("no picture")
    Image.open(picture).resize((40, 30)).save(tmp_path / "odd" / "odd.png")
    S.main(parse(f"--eval {tmp_path / 'a'} --attention {tmp_path / 'odd'}"))
    assert "left out of attention.png" in capsys.readouterr().err
    save_file({"x": torch.zeros(1)}, tmp_path / "odd" / "model.safetensors", {"model": "{}"})
    with pytest.raises(SystemExit):  # another script's
        S.main(parse(f"--eval {tmp_path / 'a'} --attention {picture} --compare {tmp_path / 'odd'}"))
    assert "was not written by semiformer.py" in capsys.readouterr().err
    S.main(parse(f"--eval {tmp_path / 'b'} --predict {tiny / 'val' / 'c3'}"))
    rows = (tmp_path / "b" / "predictions.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[0].startswith("file,class_1,probability_1")


@pytest.mark.parametrize("more", ["--arch vit_digits --ema-decay 0.9", "--arch conv_conv_digits",
                                  "--pseudo-source softmax_fuse --follow paper --pos-embed 1"])
def test_runs_of_other_kinds(more, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(S.report, "curves", lambda *a, **k: None)
    S.main(parse(f"--data-path {tiny} {SHORT} {more} --output {tmp_path / 'run'}"))
    found = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["results"]["semi"]
    assert (", ema " in S.each(found)) is ("ema" in more)
    heads = {"top1_conv", "top1_trans"} if "source" in more else {"top1_first", "top1_second"}
    assert ("ema_top1" in found) if "ema" in more else heads <= found.keys()


def test_accuracy_of_pseudo_labels_is_logged_where_all_classes_are_known(
        tmp_path, tiny, monkeypatch):
    for source in sorted((tiny / "train").glob("*/*.png")):  # two of each class with a label
        folder = tmp_path / "own" / "labeled" / source.parent.name
        if len([*folder.glob("*")]) == 2:
            folder = tmp_path / "own" / "unlabeled"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder)
    short = SHORT.replace("--num-labels 20", "").replace("sup=2", "sup=0")
    load, step, classes = S.stream_loader, S.semi_step, []

    def spy_loader(*a, **k):
        for seen, y in load(*a, **k):
            classes.append(y)  # those of unlabelled pictures last
            yield seen, y

    def partly_right(*a):
        losses, y_hat, o = step(*a)
        y_hat, o = classes[-1].clone(), torch.ones_like(o)
        y_hat[:8:2] = (y_hat[:8:2] + 1) % 10
        o[6:], o[2] = 0, 0  # sure of 0, 1, 3, 4 and 5, of which 1, 3 and 5 are right
        return losses, y_hat, o

    monkeypatch.setattr(S, "stream_loader", spy_loader)
    monkeypatch.setattr(S, "semi_step", partly_right)
    for data, more, known in (("own", "", False), (tiny, "--num-labels 20", True)):
        run = tmp_path / f"run-{known}"
        with pytest.raises(SystemExit):
            S.main(parse(f"--data-path {tmp_path / data} {short} {more} --print-every 1 "
                         f"--stop-after 1 --output {run}"))
        lines = [json.loads(x) for x in (run / "log.jsonl").read_text().splitlines()]
        (line,) = [x for x in lines if "kept" in x]
        assert (known, known) == ("pseudo_acc" in line, "kept_acc" in line)
    assert line["pseudo_acc"] == pytest.approx(8 / 12, abs=1e-4)
    assert line["kept_acc"] == pytest.approx(3 / 5, abs=1e-4)


class Stamp:
    """The last part of a view, of which only this number is left."""

    def __init__(self, number):
        self.number = number

    def __call__(self, both):
        return torch.full_like(both[0], self.number), torch.zeros_like(both[1])


def stamp_of(x):
    """(pictures, the number they all have) of what a step was given."""
    mean, std = (255 * torch.tensor(v) for v in (S.IMAGENET_DEFAULT_MEAN, S.IMAGENET_DEFAULT_STD))
    (number,) = (x * std.view(3, 1, 1) + mean.view(3, 1, 1)).round().unique().tolist()
    return len(x), int(number)


def test_the_loop_hands_on_what_a_step_asks_for(tmp_path, tiny, monkeypatch):
    """One run of both stages in two parts per update, in which all that passes is noted."""
    seen = SimpleNamespace(x=[], losses=[], lr=[], adam=[], drop=[], streams={}, models=[],
                           averages=[], splits=[])

    def spy(where, name, note):  # note(result, *arguments) after each call
        real = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *a, **k: note(r := real(*a, **k), *a, **k) or r)

    def of_semi(result, student, labeler, x_l, y_l, x_u_w, x_u_s, *_):
        assert student is labeler
        seen.x.append(("semi", *map(stamp_of, (x_l, x_u_w, x_u_s))))
        seen.losses.append(result[0]["loss"].item())

    def of_sup(result, student, x_l, *_):
        seen.x.append(("sup", stamp_of(x_l)))
        seen.losses.append(result["loss"].item())

    numbers = dict(labeled=1, weak=2, strong=3, evaluate=4)
    spy(S, "view_lists", lambda views, *_: {k: [*v, Stamp(numbers[k])] for k, v in views.items()})
    spy(S, "sup_step", of_sup)
    spy(S, "semi_step", of_semi)
    spy(S, "set_lr", lambda _, optimizer, lr: seen.lr.append(lr))
    spy(S, "Ema", lambda average, model: seen.averages.append(average.module))
    spy(S, "Stream", lambda stream, *_, **__: seen.streams.update({stream.name: stream}))
    spy(S, "build_model", lambda _, args, classes, drop_path=0.0: seen.drop.append(drop_path))
    spy(S, "evaluate", lambda _, model, *__: seen.models.append(model) or dict(
        top1=float(len(seen.models))))
    spy(S.flags, "choose_split", lambda split, *_: seen.splits.append(split))
    spy(torch.optim, "AdamW", lambda _, groups, **how: seen.adam.append(how))
    spy(Precision, "backward", lambda _, precision, loss: seen.losses.append(loss.item()))
    monkeypatch.setattr(S, "finish", lambda *a: None)
    monkeypatch.setattr(S, "cost", lambda *a: dict(flops=1, kept=1, fixed=1))
    flags = (f"--data-path {tiny} {SHORT} --accum-steps 2 --ema-decay 0.9 --schedule one --lr 1e-2 "
             "--min-lr 1e-3 --warmup-epochs 0 --lr-lag 0 --drop-path sup=0.1,semi=0.2")
    S.main(parse(f"{flags} --unlabeled-pool rest --output {tmp_path / 'run'}"))

    # 20 labelled pictures by 8 and by 4: two epochs of 2 updates, one of 5, two parts of each
    assert seen.x == 8 * [("sup", (4, 1))] + 10 * [("semi", (2, 1), (6, 2), (6, 3))]
    assert seen.losses[1::2] == pytest.approx([loss / 2 for loss in seen.losses[::2]])
    curve = [1e-3 + 9e-3 * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)]
    assert seen.lr == pytest.approx([x for x in curve[:2] for _ in range(4)] + 10 * [curve[2]])
    assert seen.adam == 2 * [dict(lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)]
    assert seen.drop == [0.0, 0.1, 0.2]
    assert {name: (x.batch, x.restart_every, x.straddle) for name, x in seen.streams.items()} == {
        "sup/labeled": (8, 2, True), "semi/labeled": (4, 5, True), "semi/unlabeled": (12, 5, False)}
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert seen.models[1::2] == seen.averages and seen.models[0] is not seen.averages[0]
    assert {k: (v["top1"], v["ema_top1"]) for k, v in state["results"].items()} == dict(
        sup=(1, 2), semi=(3, 4))
    S.main(parse(f"{flags} --stage sup --output {tmp_path / 'all'}"))
    assert [len(split.unlabeled) for split in seen.splits] == [60, 80]


def test_stage_semi_goes_on_with_the_optimiser_of_stage_sup(tmp_path, tiny):
    """One training in two runs (schedule "one"): the same weights as in one."""
    flags = f"--data-path {tiny} {SHORT}"
    S.main(parse(f"{flags} --output {tmp_path / 'one'}"))
    S.main(parse(f"{flags} --stage sup --output {tmp_path / 'sup'}"))
    S.main(parse(f"{flags} --stage semi --init {tmp_path / 'sup'} --output {tmp_path / 'semi'}"))
    one, two = (torch.load(tmp_path / k / "checkpoint.pt", weights_only=True)
                for k in ("one", "semi"))
    assert all(torch.equal(v, two["model"][k]) for k, v in one["model"].items())
    assert one["stage"] == two["stage"] == "semi"


def test_evaluation_reports_heads_and_both_fusions(tiny):
    from common.data import load_dataset

    run = SimpleNamespace(rank=0, world=1, workers=0, device=torch.device("cpu"), precision=FP32,
                          max_bad_images=0,
                          stats=torch.ones(2, 3, 1, 1))
    data, s = load_dataset("digits", None), settings()
    view = T.Compose(S.view_lists("digits", 32, s)["evaluate"])
    y, shown = torch.as_tensor(data.val.targets[:50]), data.val.take(range(50))
    logits = torch.tensor([3.0, 1.0]).view(2, 1, 1) * torch.randn(
        2, 50, 10, generator=torch.Generator().manual_seed(0))
    logits[:, torch.arange(50), y] += 1
    scores = {"": logits.mean(0), "_conv": logits[0], "_trans": logits[1],
              "_softmax": logits.softmax(-1).mean(0)}
    above = {k: (z > z.gather(1, y[:, None])).sum(1) for k, z in scores.items()}
    expected = {f"top{n}{k}": 2.0 * int((v < n).sum()) for k, v in above.items() for n in (1, 5)}
    assert len({expected[f"top1{k}"] for k in scores}) == 4
    model = Stub(*logits.split(20, 1)).train()
    model.names = ("conv", "trans")
    assert S.evaluate(model, shown, view, run, batch=20) == expected
    assert model.training and [call[::2] for call in model.calls] == [(0, 20), (0, 20), (0, 10)]
    assert S.evaluate(small(("vit_digits",)), data.val.take(range(50)), view, run).keys() == {
        "top1", "top5"}


def keep_each_rank(script, folder):
    """Child: what every process holds at a save."""
    save = script.save

    def also(stage, step, seconds, model, *rest):
        rank = torch.distributed.get_rank()
        torch.save(model.state_dict(), f"{folder}/{stage}{step}-rank{rank}.pt")
        save(stage, step, seconds, model, *rest)

    script.save = also


def test_two_processes_hold_the_same_weights_and_statistics(tiny, tmp_path):
    """E8; and stopped in stage semi and resumed, both go on to the same end."""
    from conftest import SCRIPTS, assert_same_run, only_run, run_script, world

    argv = next(x for x in SCRIPTS if x.name == "semiformer").argv(tiny)
    world(run_script, 2 * [("semiformer", argv, keep_each_rank, (str(tmp_path),))], tmp_path / "a")
    saved = sorted(tmp_path.glob("*-rank0.pt"))
    assert len(saved) == 7  # 3, 6, 8 of stage sup; 3, 6, 9, 10 of stage semi
    for file in saved:
        one = torch.load(file, weights_only=True)
        two = torch.load(str(file).replace("rank0", "rank1"), weights_only=True)
        assert all(torch.equal(v, two[k]) for k, v in one.items()), file.name
    for more in (["--stop-after", "9"], ["--resume", "auto"]):
        world(run_script, 2 * [("semiformer", argv + more)], tmp_path / "b")
    assert_same_run(only_run(tmp_path / "a"), only_run(tmp_path / "b"))


# ===== runs with the branch =======================================================================


def branch_argv(tiny, more=""):
    from conftest import SCRIPTS

    return next(x for x in SCRIPTS if x.name == "semiformer").argv(tiny, f"{BRANCH} {more}")


def test_a_run_with_the_branch_and_its_end(tmp_path, tiny, capsys):
    """Decoder in stage semi alone and not among the final weights; moments of AdamW go on."""
    folder = tmp_path / "run"
    S.main(S.parse_args(branch_argv(tiny, f"--output {folder} --weight-decay sup=0.1,semi=0.2")))
    assert "reconstructions.png" in capsys.readouterr().out
    assert (folder / "reconstructions.png").stat().st_size > 1000
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    free, decayed = state["optimizer"]["param_groups"]
    assert (free["weight_decay"], decayed["weight_decay"]) == (0, 0.2)  # of this stage
    steps = {k: int(v["step"]) for k, v in state["optimizer"]["state"].items()}
    bare = [len(g["params"]) for g in S.parameter_groups(small(), 0.05)]
    for group, old in zip((free, decayed), bare, strict=True):
        assert {steps[k] for k in group["params"][:old]} == {18}  # 8 of stage sup and 10 of semi
        assert {steps[k] for k in group["params"][old:]} == {10}
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert not any("loss_mae" in line for line in lines if '"stage": "sup"' in line)
    assert any("loss_mae" in line for line in lines if '"stage": "semi"' in line)
    assert S.load_final(str(folder))[0].state_dict().keys() == small().state_dict().keys()
    S.main(parse(f"--eval {folder}"))
    model = small()
    assert S.load_init(model, str(folder))[0] == "run" and not hasattr(model, "decoder")
    assert all(torch.equal(v, state["model"][k]) for k, v in model.state_dict().items())


def killed(script, n):
    from test_promises import send

    send(script, n, signal.SIGKILL)


def test_a_killed_run_with_the_branch_goes_on_bitwise(tiny, tmp_path):
    from conftest import assert_same_run, ends, numbers, only_run

    argv = branch_argv(tiny, "--ema-decay semi=0.9")
    ends("semiformer", argv, tmp_path / "a")
    ends("semiformer", argv, tmp_path / "b", -signal.SIGKILL, killed, (8 + 5,))
    ends("semiformer", [*argv, "--resume", "auto"], tmp_path / "b")
    assert_same_run(only_run(tmp_path / "a"), only_run(tmp_path / "b"))
    losses = [x["loss_mae"] for x in numbers(only_run(tmp_path / "a")) if "loss_mae" in x]
    assert len(losses) == 5 and len(set(losses)) == 5


def test_two_processes_train_the_branch_alike(tiny, tmp_path):
    """The decoder is new in stage semi, with another wrap by DDP: no process waits for another."""
    from conftest import run_script, world

    argv = branch_argv(tiny, "--accum-steps 2")
    arguments = 2 * [("semiformer", argv, keep_each_rank, (str(tmp_path),))]
    world(run_script, arguments, tmp_path / "a")
    first, last = (torch.load(tmp_path / f"semi{k}-rank0.pt", weights_only=True) for k in (3, 10))
    for k, v in torch.load(tmp_path / "semi10-rank1.pt", weights_only=True).items():
        assert torch.equal(v, last[k]), k
    moved = {k for k in last if k.startswith("decoder.") and not torch.equal(last[k], first[k])}
    assert moved == {k for k in last if k.startswith("decoder.")} - {"decoder.decoder_pos_embed"}


def test_a_run_without_the_branch_is_named_as_before_there_was_one(tmp_path, tiny):
    """Its settings decide no number then: bands and earlier runs keep their settings."""
    flags = f"--data-path {tiny} {SHORT} --stop-after 1"
    with pytest.raises(SystemExit):
        S.main(parse(f"{flags} --output {tmp_path / 'run'}"))
    recipe = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["recipe"]
    assert not [k for k in recipe if k.split(".")[-1] in S.BRANCH]
    assert "semi.tau" in recipe
    with pytest.raises(SystemExit):
        S.main(parse(f"{flags} --mae-weight 1 --output {tmp_path / 'other'}"))
    recipe = torch.load(tmp_path / "other" / "checkpoint.pt", weights_only=True)["recipe"]
    assert {f"semi.{name}" for name in S.BRANCH} <= recipe.keys()
