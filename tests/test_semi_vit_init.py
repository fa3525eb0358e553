"""semi_vit.py --init: small files built like the published ones; all of a file, or an error."""

import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import semi_vit as S
from common import checkpoint, log
from common.splits import UserError

K = 10
HEAD, FC_NORM = {"head.weight", "head.bias"}, {"fc_norm.weight", "fc_norm.bias"}


def backbone(seed=0, dim=64, depth=4, size=28, patch=7):
    """A ViT's weights in the names all the published files share, with a final norm and no head."""
    model = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=dim, depth=depth, num_heads=4, img_size=size,
        patch_size=patch, num_classes=0
    )
    torch.manual_seed(seed)
    return {k: torch.randn_like(v) for k, v in model.state_dict().items()}


def prefixed(prefix, weights):
    return {prefix + k: v for k, v in weights.items()}


def projector(layers):
    return {f"head.{layer}.weight": torch.randn(4, 4) for layer in layers}


def mae_encoder(w):
    return {"model": w}


def mae_full(w):
    decoder = dict(mask_token=torch.zeros(1, 1, 8), decoder_pos_embed=torch.zeros(1, 17, 8))
    for name in ("decoder_embed", "decoder_blocks.0.attn.qkv", "decoder_norm", "decoder_pred"):
        decoder[f"{name}.weight"] = torch.randn(8, 8)
    return {"model": {**w, **decoder}}


def dino_backbone(w):
    return w


def dino_full(w, teacher="backbone."):
    head = {"head.mlp.0.weight": torch.randn(4, 4), "head.last_layer.weight_g": torch.randn(4, 1)}
    student = prefixed("module.", {**prefixed("backbone.", backbone(seed=9)), **head})
    return {
        "student": student, "teacher": {**prefixed(teacher, w), **head}, "epoch": 100,
        "optimizer": {"state": {}, "param_groups": []}, "dino_loss": {"center": torch.zeros(1, 4)}
    }


def dino_full_of_a_wrapped_teacher(w):
    return dino_full(w, "module.backbone.")


def dino_full_with_its_settings(w):
    return {**dino_full(w), "args": argparse.Namespace(arch="vit_small", lr=5e-4)}


def mocov3(w):
    momentum = prefixed("module.momentum_encoder.", {**backbone(seed=9), **projector((0, 1, 3))})
    base = prefixed("module.base_encoder.", {**w, **projector((0, 1, 3, 4, 6, 7))})
    predictor = prefixed("module.predictor.", {"0.weight": torch.randn(4, 4)})
    return {
        "epoch": 300, "arch": "vit_small", "state_dict": {**momentum, **base, **predictor},
        "optimizer": {"state": {}, "param_groups": []}, "scaler": {"scale": 1.0}
    }


def mocov3_converted(w):
    return {"model": w}


def supervised_flat(w, classes=1000):
    return {**w, "head.weight": torch.randn(classes, 64), "head.bias": torch.randn(classes)}


def supervised_deit(w):
    return {"model": supervised_flat(w)}


FORMATS = {  # what writes it -> its published name, the format it is read as
    mae_encoder: ("mae_pretrain_vit_base.pth", "mae"),
    mae_full: ("mae_pretrain_vit_base_full.pth", "mae"),
    dino_backbone: ("dino_deitsmall16_pretrain.pth", "dino"),
    dino_full: ("dino_deitsmall16_pretrain_full_checkpoint.pth", "dino_full"),
    dino_full_of_a_wrapped_teacher: ("dino_own_checkpoint.pth", "dino_full"),
    dino_full_with_its_settings: ("dino_deitsmall16_pretrain_full_checkpoint.pth", "dino_full"),
    mocov3: ("vit-s-300ep.pth.tar", "mocov3"),
    mocov3_converted: ("moco_v3_converted.pth", "mae"),
    supervised_flat: ("vit_base_augreg.pth", "supervised"),
    supervised_deit: ("deit_base_patch16_224-b5f2ef4d.pth", "supervised_model"),
}
each_format = pytest.mark.parametrize("wrap", FORMATS, ids=lambda f: f.__name__)
each_pool = pytest.mark.parametrize("pool", ["avg", "token"])


@pytest.fixture
def load(tmp_path):
    """load(state, name, pool=..., arch=...) -> (model, weights before, kind, teacher)."""

    def call(state, name="mae_pretrain.pth", pool="avg", arch="vit_digits"):
        path = tmp_path / name
        if state is not None:
            torch.save(state, path)
        args = S.parse_args(["--init", str(path), "--pool", pool, "--arch", arch])
        torch.manual_seed(1)
        model = S.build_model(args, K)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        kind, teacher = S.load_init(model, args.init)
        return model, before, kind, teacher

    return call


# ===== what is loaded, and what is not ============================================================


@each_pool
@each_format
def test_all_of_the_encoder_is_loaded_and_only_the_head_is_new(load, wrap, pool):
    w, (name, format) = backbone(), FORMATS[wrap]
    model, before, kind, teacher = load(wrap(w), name, pool)
    assert kind == format and teacher is None
    own = model.state_dict()
    loaded = {k for k in own if k in w and torch.equal(own[k], w[k])}
    new = HEAD | (FC_NORM if pool == "avg" else set())
    assert own.keys() - loaded == new  # the authors' assertion
    assert all(torch.equal(own[k], before[k]) for k in new)
    assert w.keys() - loaded == ({"norm.weight", "norm.bias"} if pool == "avg" else set())


@each_format
def test_the_new_head_is_nearly_zero_and_fc_norm_neutral(load, wrap):
    model, *_ = load(wrap(backbone()), FORMATS[wrap][0])
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert not model.head.bias.any()
    assert (model.fc_norm.weight == 1).all() and not model.fc_norm.bias.any()


@each_format
def test_the_position_embedding_is_trained_after_loading(load, wrap):
    model, *_ = load(wrap(backbone()), FORMATS[wrap][0])
    groups = S.parameter_groups(model, 0.05, 0.65)
    assert model.pos_embed.requires_grad
    assert any(p is model.pos_embed for g in groups for p in g["params"])


def test_safetensors_are_read_too(load, tmp_path):
    w = backbone()
    save_file(w, tmp_path / "dino.safetensors")
    model, _, kind, _ = load(None, "dino.safetensors")
    assert kind == "dino" and torch.equal(
        model.blocks[2].attn.qkv.weight, w["blocks.2.attn.qkv.weight"]
    )


def test_a_supervised_head_is_dropped_even_where_the_classes_agree(load):
    model, before, *_ = load(supervised_flat(backbone(), classes=K), "vit_augreg.pth")
    assert torch.equal(model.head.weight, before["head.weight"])


def test_a_distilled_deit_loses_its_second_token_and_head(load):
    w = backbone()
    grid = torch.cat([w["pos_embed"][:, :1], torch.full((1, 1, 64), 7.0), w["pos_embed"][:, 1:]], 1)
    state = supervised_flat({**w, "pos_embed": grid, "dist_token": torch.zeros(1, 1, 64)})
    state |= {"head_dist.weight": torch.randn(1000, 64), "head_dist.bias": torch.randn(1000)}
    model, *_ = load({"model": state}, "deit_base_distilled_patch16_224.pth")
    assert torch.equal(model.pos_embed, w["pos_embed"])


def test_pooled_by_timm_means_that_fc_norm_is_in_the_file_and_loaded(load):
    w = supervised_flat(backbone())
    w["fc_norm.weight"], w["fc_norm.bias"] = w.pop("norm.weight"), w.pop("norm.bias")
    model, *_ = load({"model": w}, "mae_finetuned_vit_base.pth")
    assert torch.equal(model.fc_norm.weight, w["fc_norm.weight"])
    assert model.head.weight.abs().max() < 1e-3


# ===== other sizes ================================================================================


def test_position_embedding_is_resized_and_the_class_token_kept(load):
    w = backbone(size=98)  # 14 x 14 patches of 7 pixels, for 4 x 4
    model, *_ = load(mae_encoder(w))
    grid = w["pos_embed"][:, 1:].reshape(1, 14, 14, 64).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (4, 4), mode="bicubic", align_corners=False)
    want = torch.cat([w["pos_embed"][:, :1], grid.permute(0, 2, 3, 1).reshape(1, 16, 64)], 1)
    torch.testing.assert_close(model.pos_embed.data, want, atol=1e-6, rtol=0)


def test_patch_kernel_is_resized(load):
    w = backbone(size=64, patch=16)  # 4 x 4 patches of 16 pixels, for 7
    model, *_ = load(mae_encoder(w))
    want = F.interpolate(w["patch_embed.proj.weight"], (7, 7), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.patch_embed.proj.weight.data, want, atol=1e-6, rtol=0)
    assert torch.equal(model.pos_embed.data, w["pos_embed"])


def test_parity_of_the_resized_position_embedding(tmp_path):
    parity = Path(__file__).parent / "parity" / "semi_vit.pt"
    c = torch.load(parity, weights_only=True)["interp_pos"]
    build = lambda size: timm.create_model(  # noqa: E731
        "vit_tiny_patch16_224",
        embed_dim=8,
        depth=1,
        num_heads=1,
        patch_size=4,
        img_size=size,
        num_classes=0,
    )
    torch.save({"model": {**build(16).state_dict(), "pos_embed": c["inp"]}}, tmp_path / "mae.pth")
    model = build(24)
    S.load_init(model, str(tmp_path / "mae.pth"))
    torch.testing.assert_close(model.pos_embed.data, c["out"], atol=1e-6, rtol=0)


# ===== runs of this project =======================================================================


@pytest.fixture(scope="module")
def run_from_scratch(tmp_path_factory):
    """The folder of a run of stage sup with an EMA, from scratch, ended after one update."""
    folder = tmp_path_factory.mktemp("runs") / "semi_vit-001"
    flags = (
        "--arch vit_tiny --stage sup --ema-decay 0.5 --stop-after 1 --epochs 3 --lr 0.1"
        f" --warmup-epochs 0 --evals 1 --output {folder}"
    )
    with pytest.raises(SystemExit) as end:
        S.main(S.parse_args(flags.split()))
    assert end.value.code == 0
    return folder


def start_from(run, classes=K):
    args = S.parse_args(["--arch", "vit_tiny", "--init", str(run), "--stage", "semi"])
    model = S.build_model(args, classes)
    return model, *S.load_init(model, args.init)


def test_a_run_gives_student_head_and_teacher(run_from_scratch):
    model, kind, teacher = start_from(run_from_scratch)
    state = checkpoint.load_newest(run_from_scratch)
    assert kind == "run"
    own = model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in state["model"].items())
    assert all(torch.equal(teacher[k], v) for k, v in state["teacher"].items())
    assert not torch.equal(teacher["head.weight"], own["head.weight"])


def test_a_run_from_scratch_keeps_its_fixed_position_embedding(run_from_scratch):
    model, *_ = start_from(run_from_scratch)
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed, S.sincos_pos_embed(192, 4))


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--pool token", "--pool avg, this one token; give --pool avg"),
        ("--heads 2", "--heads 3, this one 2"), ("--heads 3 --pool avg", ""),
        ("--pos-embed learned", "--pos-embed sincos, this one learned")
    ],
)
def test_a_run_goes_on_with_its_own_pooling_heads_and_positions(run_from_scratch, flags, said):
    argv = f"--arch vit_tiny --init {run_from_scratch} --stage semi {flags}"
    args = S.parse_args(argv.split())
    model = S.build_model(args, K)
    if not said:
        assert S.load_init(model, args.init)[0] == "run"
        return
    with pytest.raises(UserError, match=said):
        S.load_init(model, args.init)


def write_run(folder, init, dataset="imagenet", arch="vit_base"):
    """Log and checkpoint of a run, as far as --init reads them."""
    folder.mkdir()
    args = vars(
        S.parse_args(["--dataset", dataset, "--arch", arch] + (["--init", init] if init else []))
    )
    file = log.RunLog(folder, None)
    file.write(dict(script="semi_vit", args=args))
    file.close()
    recipe = {k: v for k, v in args.items() if not isinstance(v, dict)}
    checkpoint.save(folder, dict(stage="sup", step=1, model={}, teacher=None, recipe=recipe))
    return folder


@pytest.mark.parametrize("init, decay", [(None, 0.85), ("mae_pretrain_vit_base.pth", 0.75)])
def test_stage_semi_from_a_run_has_the_column_of_that_run(tmp_path, init, decay):
    folder = write_run(tmp_path / "one", init)
    args = S.parse_args(
        ["--dataset", "imagenet", "--labels", "10", "--stage", "semi", "--init", str(folder)]
    )
    assert S.derive(args, "semi", 1).layer_decay == decay


def test_a_run_with_other_classes_gives_its_body_and_no_teacher_of_another_shape(run_from_scratch):
    model, _, teacher = start_from(run_from_scratch, classes=3)
    body = checkpoint.load_newest(run_from_scratch)["model"]
    assert torch.equal(model.blocks[1].norm1.weight, body["blocks.1.norm1.weight"])
    assert model.head.weight.shape == (3, 192) and model.head.weight.abs().max() < 1e-3
    assert teacher is None or teacher["head.weight"].shape == (3, 192)


def test_a_checkpoint_file_is_a_run_too(run_from_scratch):
    model, kind, _ = start_from(run_from_scratch / "checkpoint.pt")
    assert kind == "run" and not model.pos_embed.requires_grad


def test_final_weights_are_a_timm_model_by_their_metadata(straight):
    folder = straight(next(s for s in SCRIPTS if s.name == "semi_vit"))
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    assert metadata.keys() == {"model"}  # one key: several have no fixed order in the file
    about = json.loads(metadata["model"])
    assert about["classes"] == [f"c{k}" for k in range(10)] and about["image_size"] == 28
    model = timm.create_model(
        about["timm_model"], checkpoint_path=str(file), **about["timm_arguments"]
    )
    own, trained = model.state_dict(), checkpoint.load_newest(folder)["model"]
    assert own.keys() == trained.keys()
    assert all(torch.equal(own[k], trained[k]) for k in own)


# ===== what does not fit is refused ===============================================================


def test_another_width_names_both_shapes(load):
    with pytest.raises(UserError) as error:
        load(mae_encoder(backbone(dim=32)))
    text = str(error.value)
    assert "(1, 1, 32)" in text and "(1, 1, 64)" in text and "the --arch of the file" in text
    assert "mae_pretrain.pth" in text


def test_missing_blocks_are_listed(load):
    with pytest.raises(UserError, match=r"12 missing \['blocks\.3\..*, 0 left over.*--arch"):
        load(mae_encoder(backbone(depth=3)))


def test_left_over_blocks_are_listed(load):
    with pytest.raises(UserError, match=r"0 missing .*, 12 left over \['blocks\.4\..*--arch"):
        load(mae_encoder(backbone(depth=5)))


@each_pool
@pytest.mark.parametrize(
    "key", ["pos_embed", "cls_token", "patch_embed.proj.bias", "blocks.0.attn.qkv.bias"]
)
def test_one_missing_key_is_an_error(load, pool, key):
    w = backbone()
    del w[key]
    with pytest.raises(UserError, match=f"missing .*{key}"):
        load(dino_backbone(w), "dino.pth", pool)


def test_the_class_token_needs_the_final_norm_of_the_file(load):
    w = backbone()
    del w["norm.bias"]
    with pytest.raises(UserError, match="missing .*norm.bias"):
        load(mae_encoder(w), pool="token")


def test_a_key_that_no_one_knows_is_an_error(load):
    with pytest.raises(UserError, match=r"left over .*blocks\.0\.ls1\.gamma"):
        load(dino_backbone({**backbone(), "blocks.0.ls1.gamma": torch.ones(64)}), "dino.pth")


@pytest.mark.parametrize(
    "state",
    [
        {"weights": torch.zeros(3)}, {"state_dict": {"encoder.weight": torch.zeros(3)}},
        {"model": torch.zeros(3)}, {"model": {"encoder.weight": torch.zeros(3)}}, {},
        torch.zeros(3), torch.tensor(3.0), 7, [1, 2]
    ],
)
def test_a_file_of_no_known_format_is_refused(load, state):
    with pytest.raises(UserError, match="--init .*mae_pretrain.pth.*not one of the formats mae, "):
        load(state)


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_a_key_without_weights_is_refused_in_one_line(load, key):
    state = {"teacher": backbone(), "student": backbone()} | {key: torch.zeros(3)}
    said = "'teacher' .* no weights by name" if key == "teacher" else "missing"
    with pytest.raises(UserError, match=said):
        load(state)


def test_a_file_that_is_not_there_is_refused(load):
    with pytest.raises(UserError, match="no such file"):
        load(None)


def test_a_convnext_takes_no_vit(load):
    with pytest.raises(UserError, match=r"missing \['head\.fc.*left over \['blocks\.0.*--arch"):
        load(mae_encoder(backbone()), arch="convnext_tiny")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"no checkpoint at all"])
def test_a_broken_file_is_named(tmp_path, content, load):
    (tmp_path / "mae.pth").write_bytes(content)
    with pytest.raises(UserError, match="mae.pth"):
        load(None, "mae.pth")


# ===== R11: a hostile file ========================================================================


class Touch:
    """Unpickling this makes a folder: what an attacker's file would do with any command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "write",
    [
        torch.save, lambda x, f: f.write_bytes(pickle.dumps(x, 2)),
        lambda x, f: torch.save(x, f, _use_new_zipfile_serialization=False)
    ],
    ids=["zip", "plain", "legacy"],
)
@pytest.mark.parametrize(
    "name", ["mae_pretrain_vit_base.pth", "vit-s-300ep.pth.tar", "run/checkpoint.pt"]
)
def test_a_hostile_pickle_is_never_executed_and_named(tmp_path, load, write, name):
    (tmp_path / "run").mkdir()
    trap = tmp_path / "executed"
    write({"model": Touch(str(trap))}, tmp_path / name)
    init = name.split("/")[0]
    with pytest.raises(UserError, match=f"{init}.*never executed"):
        load(None, init)
    assert not trap.exists()


def test_the_trap_would_have_worked(tmp_path):
    pickle.loads(pickle.dumps(Touch(str(tmp_path / "executed"))))
    assert (tmp_path / "executed").exists()


def test_nothing_but_plain_settings_is_let_through(tmp_path, load):
    trap = tmp_path / "executed"
    state = dino_full(backbone()) | {"args": argparse.Namespace(command=Touch(str(trap)))}
    with pytest.raises(UserError, match="dino_full.pth"):
        load(state, "dino_full.pth")
    assert not trap.exists()


def test_a_loaded_model_computes(load):
    model, *_ = load(mae_encoder({k: 0.02 * v for k, v in backbone().items()}))
    assert isinstance(model, nn.Module) and model.eval()(torch.randn(2, 3, 28, 28)).isfinite().all()
