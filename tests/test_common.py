"""common/: checkpoints (R3, R4, R11, R15), pictures (R13), streams, layouts, EMA, precision."""

import errno
import gc
import hashlib
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import time
import zlib
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType

import numpy as np
import pytest
import timm
import torch
from conftest import Child
from PIL import Image
from torch import nn

from common import checkpoint, log, streams
from common.amp import Precision
from common.data import load_dataset
from common.ema import Ema
from common.pictures import BadImage, BadImages, Images, open_image
from common.splits import UserError
from common.streams import Stream, Views, eval_loader, own_draws, seed_of, stream_loader

# ----- R3: a save that fails or is killed at every call it makes --------------------------------


def state(k: int) -> dict:
    return dict(step=k, weights=torch.full((200,), float(k)), text="x" * 50)


class Faulty:
    """Counts write, fsync and rename calls of a save; at the n-th one `fault` happens first."""

    def __init__(self, n, fault):
        self.n, self.fault, self.calls = n, fault, []

    def wrap(self, name, function):
        def call(*args, **kwargs):
            self.calls.append(name)
            if len(self.calls) == self.n:
                self.fault()
            return function(*args, **kwargs)

        return call

    def open(self, path, mode="r"):
        file = open(path, mode, buffering=0)
        wrap = self.wrap

        class Writer:  # what torch.save needs of a file
            write, flush = staticmethod(wrap("write", file.write)), staticmethod(file.flush)
            fileno, close, name = staticmethod(file.fileno), staticmethod(file.close), path

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

        return Writer()

    def install(self, patch):
        patch(checkpoint, "open", self.open)
        patch(os, "fsync", self.wrap("fsync", os.fsync))
        patch(os, "replace", self.wrap("replace", os.replace))


def calls_of_a_save(folder, monkeypatch) -> list[str]:
    checkpoint.save(folder, state(1)), checkpoint.save(folder, state(2))
    with monkeypatch.context() as patch:
        faulty = Faulty(0, None)
        faulty.install(partial(patch.setattr, raising=False))
        checkpoint.save(folder, state(3))
    return faulty.calls


def refuse():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_r3_a_save_that_fails_anywhere_leaves_a_checkpoint_and_no_stray_file(
    tmp_path, monkeypatch, capfd
):
    (tmp_path / "count").mkdir()
    calls = calls_of_a_save(tmp_path / "count", monkeypatch)
    assert calls.count("write") > 5 and calls.count("fsync") == 2 and calls.count("replace") == 2
    for n in range(1, len(calls) + 1):
        folder = tmp_path / str(n)
        folder.mkdir()
        checkpoint.save(folder, state(1)), checkpoint.save(folder, state(2))
        with monkeypatch.context() as patch, pytest.raises(UserError) as error:
            Faulty(n, refuse).install(partial(patch.setattr, raising=False))
            checkpoint.save(folder, state(3))
        assert f"--output {folder}" in str(error.value) and "is intact" in str(error.value)
        found = checkpoint.load_newest(folder)
        assert found["step"] == (3 if n == len(calls) else 2)  # the last call syncs the folder
        assert torch.equal(found["weights"], state(found["step"])["weights"])
        assert {f.name for f in folder.iterdir()} <= {checkpoint.NEWEST, checkpoint.PREVIOUS}
        checkpoint.save(folder, state(4))  # with room again it goes on
        assert checkpoint.load_newest(folder)["step"] == 4
    assert capfd.readouterr().err == ""  # nothing was broken on the way


def killed_in_each_save(count):
    """Child: forks for each call of a save; the fork dies at that call, without clean-up."""
    for n in range(1, count + 1):
        folder = Path(str(n))
        folder.mkdir()
        checkpoint.save(folder, state(1)), checkpoint.save(folder, state(2))
        child = os.fork()
        if child == 0:
            Faulty(n, lambda: os._exit(9)).install(setattr)
            checkpoint.save(folder, state(3))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_r3_a_save_that_is_killed_anywhere_leaves_a_checkpoint_and_no_stray_file(
    tmp_path, monkeypatch
):
    (tmp_path / "count").mkdir()
    count = len(calls_of_a_save(tmp_path / "count", monkeypatch))
    child = Child(killed_in_each_save, count, cwd=tmp_path)
    assert child.wait() == 0, child.err
    strays = 0
    for n in range(1, count + 1):
        folder = tmp_path / str(n)
        strays += (folder / (checkpoint.NEWEST + ".part")).exists()
        found = checkpoint.load_newest(folder)
        assert found["step"] == (3 if n == count else 2)
        assert {f.name for f in folder.iterdir()} <= {checkpoint.NEWEST, checkpoint.PREVIOUS}
    assert strays >= count - 3  # the kills really came in the middle


def saves_for_ever(folder):
    folder = Path(folder)
    folder.mkdir()
    for k in range(1, 1_000_000):
        checkpoint.save(folder, state(k))
        if k == 2:
            (folder / "ready").touch()


def test_r3_a_real_kill_at_random_moments(tmp_path):
    for n in range(8):
        child = Child(saves_for_ever, "run", cwd=tmp_path / str(n))
        while not (child.cwd / "run" / "ready").exists():
            assert child.process.exitcode is None, child.err
            time.sleep(0.002)
        time.sleep(random.random() * 0.02)
        child.process.kill()
        assert child.wait() == -signal.SIGKILL
        found = checkpoint.load_newest(child.cwd / "run")
        assert found["step"] >= 2 and torch.equal(found["weights"], state(found["step"])["weights"])
        assert "checkpoint.pt.part" not in os.listdir(child.cwd / "run")


def test_r3_a_save_after_a_fallback_does_not_lose_the_good_one(tmp_path, monkeypatch, capsys):
    """Newest torn, previous used; the next save is killed between its renames."""
    checkpoint.save(tmp_path, state(1)), checkpoint.save(tmp_path, state(2))
    os.truncate(tmp_path / checkpoint.NEWEST, 100)
    assert checkpoint.load_newest(tmp_path)["step"] == 1 and "warning: " in capsys.readouterr().err
    rename = os.replace

    def killed(source, target):
        rename(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        checkpoint.save(tmp_path, state(3))
    assert checkpoint.load_newest(tmp_path)["step"] in (1, 3)
    checkpoint.save(tmp_path, state(4)), checkpoint.save(tmp_path, state(5))
    assert checkpoint.load_newest(tmp_path)["step"] == 5
    assert checkpoint.read(tmp_path / checkpoint.PREVIOUS)["step"] == 4


# ----- R4: damaged ------------------------------------------------------------------------------


def test_r4_a_flipped_byte_is_said_and_never_silent(tmp_path, capsys):
    checkpoint.save(tmp_path, state(1)), checkpoint.save(tmp_path, state(2))
    good = (tmp_path / checkpoint.NEWEST).read_bytes()
    places = random.Random(0).sample(range(len(good)), 150)
    fallen_back = 0
    for place in [*range(0, 8), *range(len(good) - 30, len(good)), *places]:
        bad = bytearray(good)
        bad[place] ^= 0x5A
        (tmp_path / checkpoint.NEWEST).write_bytes(bad)
        found = checkpoint.load_newest(tmp_path)
        said = capsys.readouterr().err
        if found["step"] == 2:  # a byte of padding, or a date in the archive's index
            assert (
                torch.equal(found["weights"], state(2)["weights"])
                and found["text"] == state(2)["text"]
            )
        else:
            fallen_back += 1
            assert (
                found["step"] == 1
                and "warning: " in said
                and str(tmp_path / checkpoint.NEWEST) in said
            )
            assert str(tmp_path / checkpoint.PREVIOUS) in said and said.count("\n") == 1
    assert fallen_back > 50


@pytest.mark.parametrize("size", [0, 1, 100, 2000, -1])
def test_r4_a_truncated_file_is_said_and_the_previous_used(tmp_path, capsys, size):
    checkpoint.save(tmp_path, state(1)), checkpoint.save(tmp_path, state(2))
    length = (tmp_path / checkpoint.NEWEST).stat().st_size
    os.truncate(tmp_path / checkpoint.NEWEST, size if size >= 0 else length + size)
    assert checkpoint.load_newest(tmp_path)["step"] == 1
    assert "warning: " in capsys.readouterr().err
    (tmp_path / checkpoint.PREVIOUS).write_bytes(b"also broken")
    with pytest.raises(UserError) as error:  # never a silent restart
        checkpoint.load_newest(tmp_path)
    assert checkpoint.NEWEST in str(error.value) and checkpoint.PREVIOUS in str(error.value)


def test_r4_nothing_to_resume_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(UserError, match=f"--resume {tmp_path}: no checkpoint"):
        checkpoint.load_newest(tmp_path)


def test_a_run_that_may_be_going_on_is_left_alone(tmp_path):
    checkpoint.save(tmp_path, state(1))
    part = tmp_path / (checkpoint.NEWEST + ".part")
    part.write_bytes(b"being written")
    assert checkpoint.load_newest(tmp_path, tidy=False)["step"] == 1 and part.exists()
    assert checkpoint.load_newest(tmp_path)["step"] == 1 and not part.exists()


# ----- R11: hostile -----------------------------------------------------------------------------


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle", "safetensors name"])
def test_r11_a_hostile_pickle_is_never_executed(tmp_path, kind):
    path, target = tmp_path / "weights.pth", tmp_path / "executed"
    content = dict(model=Hostile(str(target)))
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        path = path.with_suffix(".safetensors") if kind == "safetensors name" else path
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(UserError) as error:
        checkpoint.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not target.exists()
    if kind in ("zip", "legacy"):
        torch.load(path, weights_only=False)
        assert target.exists()  # the file was dangerous


def test_old_and_new_files_and_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    weights = dict(a=torch.arange(3.0), b=torch.ones(2, 2, dtype=torch.long))
    for k, new in enumerate((True, False)):
        torch.save(weights, tmp_path / f"{k}.pth", _use_new_zipfile_serialization=new)
    save_file(weights, tmp_path / "2.safetensors")
    for path in sorted(tmp_path.iterdir()):
        assert all(torch.equal(checkpoint.read(path)[k], v) for k, v in weights.items())


# ----- R15: no room -----------------------------------------------------------------------------


def saves_into_a_limit(share):
    """Child: files may grow to a share of a checkpoint, as on a disk that becomes full."""
    folder = Path("run")
    folder.mkdir()
    checkpoint.save(folder, state(1))
    limit = round((folder / checkpoint.NEWEST).stat().st_size * share)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        checkpoint.save(folder, state(2))
    except UserError as error:  # printing would meet the limit too
        raise SystemExit(2 if "run/checkpoint.pt is intact" in str(error) else 3) from None


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_r15_a_full_disk_is_said_and_the_previous_checkpoint_intact(tmp_path, share):
    child = Child(saves_into_a_limit, share, cwd=tmp_path)
    assert child.wait() == 2, child.err
    found = checkpoint.load_newest(tmp_path / "run")
    assert found["step"] == 1 and os.listdir(tmp_path / "run") == [checkpoint.NEWEST]


def weights_into_a_limit(name):
    """Child: the final weights where there is no room for them."""
    Path("run").mkdir()
    (Path("run") / name).write_bytes(b"before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        checkpoint.save_weights(Path("run") / name, {"weights": torch.zeros(2000)})
    except UserError as error:
        said = f"--output run: {name} cannot be written ("
        raise SystemExit(
            2 if str(error).startswith(said) and "--resume run" in str(error) else 3) from None


@pytest.mark.parametrize("name", ["model.safetensors", "mae_pretrain_vit_digits.pth"])
def test_r15_final_weights_on_a_full_disk_are_one_line_and_no_half_file(tmp_path, name):
    child = Child(weights_into_a_limit, name, cwd=tmp_path)
    assert child.wait() == 2, child.err
    assert (tmp_path / "run" / name).read_bytes() == b"before"
    assert os.listdir(tmp_path / "run") == [name]


@pytest.mark.parametrize("name", ["model.safetensors", "mae_pretrain_vit_digits.pth"])
def test_final_weights_are_read_again(tmp_path, name):
    content = {"weights": torch.arange(5.0)}
    checkpoint.save_weights(tmp_path / name, content)
    assert torch.equal(checkpoint.read(tmp_path / name)["weights"], content["weights"])
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("first", [True, False])
def test_r15_a_read_only_folder_is_said(tmp_path, monkeypatch, first):
    if not first:
        checkpoint.save(tmp_path, state(1))

    def refuse(path, mode):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(checkpoint, "open", refuse, raising=False)
        checkpoint.save(tmp_path, state(2))
    assert "Read-only" in str(error.value) and "--resume" in str(error.value)
    assert ("no earlier checkpoint" if first else "is intact") in str(error.value)
    assert first or checkpoint.load_newest(tmp_path)["step"] == 1


def test_r15_a_log_on_a_full_disk_is_one_line_and_other_errors_keep_their_traceback(capsys):
    def fails(number):
        raise OSError(number, os.strerror(number), "log.jsonl")

    with pytest.raises(SystemExit) as end:
        log.clear_errors(fails)(errno.ENOSPC)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: --output") and said.count("\n") == 1
    with pytest.raises(FileNotFoundError):
        log.clear_errors(fails)(errno.ENOENT)


# ----- the run log and stop signals -------------------------------------------------------------


def test_a_log_that_was_cut_back_knows_its_size(tmp_path):
    first = log.RunLog(tmp_path, None)
    first.write(dict(a=1))
    size = first.size
    first.write(dict(b="after the checkpoint"))
    first.close()
    again = log.RunLog(tmp_path, size)
    assert again.size == size  # a save before the next line must not store the old end
    again.write(dict(c=3))
    again.close()
    assert log.read_log(tmp_path) == [dict(a=1), dict(c=3)]


def test_resume_auto_finds_the_newest_equal_run_past_damaged_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = json.dumps(dict(recipe=dict(lr=1.0)))
    logs = [
        first + '\n{"torn": ',
        first + "\n",
        "",
        "no json\n",
        json.dumps(dict(recipe=dict(lr=2.0))),
    ]
    for k, text in enumerate(logs):
        folder = log.new_run("s", None)
        (folder / "log.jsonl").write_text(text)
        (folder / checkpoint.NEWEST).touch()
        os.utime(folder, (k, k))
    log.new_run("s", None)  # started, but without a checkpoint
    assert log.find_run("s", dict(lr=1.0)) == Path("runs/s-002")
    (Path("runs/s-002") / checkpoint.NEWEST).unlink()
    assert log.find_run("s", dict(lr=1.0)) == Path("runs/s-001")  # its last line was torn by a kill
    assert log.find_run("s", dict(lr=3.0)) is None


def test_a_runs_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [log.new_run("s", None).name for _ in range(2)] == ["s-001", "s-002"]
    (tmp_path / "file").mkdir()
    monkeypatch.chdir(tmp_path / "file")
    Path("runs").touch()
    with pytest.raises(UserError, match="^runs/: File exists; name a folder with --output$"):
        log.new_run("s", None)


def test_a_signal_that_comes_twice_at_once_still_asks(monkeypatch):
    old = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        stop = checkpoint.StopSignal()
        assert stop.asked() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun and the batch system
        assert stop.asked() == signal.SIGTERM
        with pytest.raises(SystemExit) as end:  # a person who presses Ctrl-C again
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        assert end.value.code == 130
        stop.since -= 3
        with pytest.raises(SystemExit) as end:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert end.value.code == 143
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# ----- EMA --------------------------------------------------------------------------------------


def test_ema_averages_floats_copies_integers_and_obeys_its_mask():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = Ema(model)
    first = {k: v.clone() for k, v in ema.module.state_dict().items()}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in first.items())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    model(torch.randn(8, 3))  # moves running averages and the counter
    ema.update(model, 0.9, torch.tensor(0.0))
    assert all(torch.equal(v, first[k]) for k, v in ema.module.state_dict().items())
    ema.update(model, 0.9, torch.tensor(1.0))
    for k, v in ema.module.state_dict().items():
        now = model.state_dict()[k]
        want = 0.9 * first[k] + 0.1 * now if v.is_floating_point() else now
        torch.testing.assert_close(v, want, msg=k)
    assert ema.module[1].num_batches_tracked == 1
    ema.update(model, 0.0)  # FixMatch: the teacher is the student
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in ema.module.state_dict().items())
    assert not ema.train().module.training and not any(p.requires_grad for p in ema.parameters())


# ----- precision --------------------------------------------------------------------------------


def trained(dtype="fp32"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    return model, optimizer, Precision(torch.device("cpu"), dtype)


def one_update(model, optimizer, precision, fault=None):
    x = torch.randn(5, 3)
    with precision.autocast():
        loss = model(x).float().square().mean()
    if fault == "loss":
        loss = loss * float("nan")
    precision.backward(loss)
    if fault == "gradient":
        model[1].weight.grad[0, 0] = float("inf")
    applied = precision.update(optimizer, dict(loss=loss))
    optimizer.zero_grad(set_to_none=True)
    return applied.item()


def test_bf16_on_a_cpu_attends_in_plain_products():  # the fused kernel's backward pass is slow
    draws = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=draws).requires_grad_()
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()

    def gradient(precision):
        with precision.autocast():
            with precision.autocast():  # as where a step encloses a helper's pass
                out = nn.functional.scaled_dot_product_attention(q, k, v)
            fused = torch.backends.cuda.flash_sdp_enabled()
        return torch.cat(torch.autograd.grad(out.float().square().sum(), (q, k, v))), fused

    want, fused = gradient(Precision(torch.device("cpu"), "fp32"))
    assert fused
    precision = Precision(torch.device("cpu"), "bf16")
    got, fused = gradient(precision)
    assert not fused
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)
    with pytest.raises(ZeroDivisionError), precision.autocast():
        raise ZeroDivisionError
    assert torch.backends.cuda.flash_sdp_enabled()  # within autocast alone
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == before


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_blocks_computed_again_take_the_same_attention(dtype):
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=8, depth=2, num_heads=2,
                              img_size=8, patch_size=4, num_classes=2)
    x, precision = torch.randn(2, 3, 8, 8), Precision(torch.device("cpu"), dtype)

    def gradients(again):
        model.set_grad_checkpointing(again)
        model.zero_grad()
        with precision.autocast():
            loss = model(x).float().square().sum()
        precision.backward(loss)
        return [p.grad.clone() for p in model.parameters()]

    assert all(map(torch.equal, gradients(False), gradients(True)))


@pytest.mark.parametrize("fault, named", [("loss", "loss"), ("gradient", "gradient of 1.weight")])
def test_r7_an_update_that_is_not_finite_is_masked_and_named(fault, named):
    model, optimizer, precision = trained()
    names = {p: n for n, p in model.named_parameters()}
    assert one_update(model, optimizer, precision) == one_update(model, optimizer, precision) == 1.0
    precision.check(optimizer, names, 12)
    before = [p.clone() for p in model.parameters()]
    moments = {k: {n: t.clone() for n, t in s.items()} for k, s in optimizer.state.items()}
    assert one_update(model, optimizer, precision, fault) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(
        torch.equal(t, optimizer.state[k][n]) for k, s in moments.items() for n, t in s.items()
    )
    assert one_update(model, optimizer, precision) == 1.0  # a later good one does not hide it
    with pytest.raises(UserError) as error:
        precision.check(optimizer, names, 14)
    assert str(error.value).startswith("step 13: not finite: ") and named in str(error.value)
    if fault == "gradient":
        assert "loss" not in str(error.value) and "0.weight" not in str(error.value)
    precision.reset()
    precision.check(optimizer, names, 0)


def test_r7_fp16_overflows_are_skipped_and_fifty_in_a_row_are_an_error():
    model, optimizer, precision = trained("fp16")
    before, scale = model[0].weight.clone(), precision.scaler.get_scale()
    for _ in range(49):
        assert one_update(model, optimizer, precision, "gradient") == 0.0
    assert torch.equal(before, model[0].weight)
    assert precision.scaler.get_scale() == scale * 0.5**49
    precision.check(optimizer, {}, 49)  # the scaler's own business
    assert one_update(model, optimizer, precision, "gradient") == 0.0
    with pytest.raises(UserError, match="step 50: .* 50 times in a row"):
        precision.check(optimizer, {}, 50)


def test_r7_fp16_a_good_update_ends_the_row_and_a_bad_loss_is_no_overflow():
    model, optimizer, precision = trained("fp16")
    for _ in range(3):
        one_update(model, optimizer, precision, "gradient")
    before = model[0].weight.clone()
    assert one_update(model, optimizer, precision) == 1.0
    assert precision.skipped == 0 and not torch.equal(before, model[0].weight)
    assert one_update(model, optimizer, precision, "loss") == 0.0
    with pytest.raises(UserError, match="step 5: not finite: loss"):
        precision.check(optimizer, {}, 5)


# ----- R13: pictures ----------------------------------------------------------------------------

GRADIENT = np.add.outer(np.arange(24) * 5, np.arange(30) * 4).astype(np.uint8)  # at most 231


def jpeg(mode="RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(GRADIENT).convert(mode).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def png_header(width, height) -> bytes:
    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"x"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "name, content",
    [
        ("empty.jpg", b""),
        ("text.jpg", b"this is no picture\n" * 50),
        ("half.jpg", jpeg()[: len(jpeg()) // 2]),
        ("header.jpg", jpeg()[:20]),
        ("huge.png", png_header(100_000, 100_000)),
        ("lying.png", png_header(50, 50)),
        ("zeros.webp", bytes(500)),
        ("page.tif", b"II*\0" + b"\xff" * 40),
    ],
)
def test_r13_a_broken_picture_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadImage) as error:
        open_image(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it finds
def test_r13_a_damaged_picture_is_read_or_named_and_nothing_else(tmp_path):
    """Bytes changed at random in each format: it is read, or it is a BadImage."""
    draws, path, broken = random.Random(0), tmp_path / "picture", 0
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM"):
        file = io.BytesIO()
        exif = {"exif": Image.Exif()} if kind in ("JPEG", "PNG", "WEBP") else {}
        for tag in exif.values():
            tag[274], tag[282] = 6, 72.0
        Image.fromarray(GRADIENT).convert("RGB").save(file, kind, **exif)
        for _ in range(40):
            bad = bytearray(file.getvalue())
            for _ in range(draws.choice((1, 4, 20))):
                bad[draws.randrange(min(len(bad), 300))] = draws.randrange(256)
            path.write_bytes(bad)
            try:
                assert open_image(path).mode == "RGB"
            except BadImage as error:
                broken += 1
                assert str(path) in str(error)
    assert 60 < broken < 240


def test_r13_unusual_pictures_are_read_right(tmp_path):
    path, want = tmp_path / "picture.png", np.stack([GRADIENT] * 3, 2)

    def read():
        image = open_image(path)
        assert image.mode == "RGB"
        return np.asarray(image).astype(int)

    Image.fromarray(GRADIENT).save(path, "PNG")
    assert (read() == want).all()
    Image.fromarray(GRADIENT).convert("P").save(path, "PNG")  # palette
    assert (read() == want).all()
    Image.fromarray(GRADIENT).convert("LA").save(path, "PNG")
    assert (read() == want).all()
    Image.fromarray(GRADIENT.astype(np.uint16) * 256 + 77).save(path, "PNG")  # 16 bit
    assert (read() == want).all()
    Image.fromarray(GRADIENT > 100).save(path, "PNG")  # one bit
    assert (read() == 255 * (want > 100)).all()
    Image.fromarray(GRADIENT[:1, :1]).save(path, "PNG")
    assert read().shape == (1, 1, 3)
    path.write_bytes(jpeg("CMYK"))
    assert abs(read() - want).max() < 12
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    path.write_bytes(jpeg(exif=exif))
    assert read().shape == (30, 24, 3) and abs(read() - np.rot90(want, -1)).max() < 12


class Size:
    """A view: (3,) the first pixel, and three draws of the three generators."""

    def __call__(self, picture):
        pixel = torch.tensor(picture.getpixel((0, 0)))
        return pixel, torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])


def folder_of(tmp_path, count, broken=()):
    for k in range(count):
        path = tmp_path / f"{k:02d}.png"
        Image.new("RGB", (4, 4), (k, k, k)).save(path)
        if k in broken:
            path.write_text("no picture")
    ids = np.array([f"{k:02d}.png".encode() for k in range(count)])
    return Images(ids, np.arange(count), tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_r13_a_broken_picture_is_replaced_from_its_own_stream(tmp_path, workers):
    """1 is unlabelled and stands right behind 0: its label must not come in instead of 0's."""
    images = folder_of(tmp_path, 12, broken=(0, 5))
    stream = Stream("s", np.array([0, 2, 5, 7]), 4, seed=0)
    bad = BadImages(images, allowed=2)
    for seen, targets in stream_loader(
        images, [Size()], stream, start=0, stop=3, workers=workers, bad=bad
    ):
        assert set(targets.tolist()) == {2, 7}
        assert seen[0][0][:, 0].tolist() == targets.tolist()
    assert bad.seen == {0, 5}
    with pytest.raises(UserError, match=r"0[05]\.png: .*--max-bad-images 2"):
        bad = BadImages(images, allowed=1)
        list(stream_loader(images, [Size()], stream, start=0, stop=3, workers=workers, bad=bad))
    with pytest.raises(UserError, match=r"00\.png: .*--max-bad-images 1"):
        list(eval_loader(images, Size(), 3, workers=workers))


# ----- streams ----------------------------------------------------------------------------------


def stream(n=22, batch=4, **more):
    return Stream("s", np.arange(100, 100 + n), batch, seed=3, **more)


def test_a_stream_is_a_function_of_the_step():
    for s in (stream(), stream(n=3), stream(straddle=True), stream(restart_every=3)):
        forward = [s.keys(k) for k in range(40)]
        assert forward == [s.keys(k) for k in reversed(range(40))][::-1]
        assert all(len(keys) == 4 for keys in forward)
    assert stream().keys(0) != Stream("t", stream().positions, 4, seed=3).keys(0)
    assert stream().keys(0) != Stream("s", stream().positions, 4, seed=4).keys(0)


def test_a_pass_shows_every_picture_once_and_drops_the_rest():
    s = stream()  # 22 pictures, 4 at a time: five batches a pass, two pictures left out
    assert s.steps_per_pass == 5
    orders = []
    for p in range(3):
        keys = [key for step in range(5 * p, 5 * p + 5) for key in s.keys(step)]
        assert {k[0] for k in keys} == {p} and [k[1] for k in keys] == list(range(20))
        assert len({k[2] for k in keys}) == 20 and {k[2] for k in keys} <= set(range(100, 122))
        orders.append([k[2] for k in keys])
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize(
    "s", [stream(straddle=True), stream(n=3)], ids=["straddle", "fewer than a batch"]
)
def test_a_stream_that_straddles_drops_nothing(s):
    n = len(s.positions)
    keys = [key for step in range(2 * n) for key in s.keys(step)]  # 8 passes
    assert keys[: len(keys)] == sorted(keys, key=lambda k: k[:2])
    for p in range(8):
        assert sorted(k[2] for k in keys if k[0] == p) == s.positions.tolist()


@pytest.mark.parametrize("n", [22, 3])
def test_a_stream_that_restarts_begins_a_new_pass_at_each_epoch(n):
    s, seen = stream(n=n, restart_every=7), set()
    for epoch in range(4):
        keys = [key for step in range(7 * epoch, 7 * epoch + 7) for key in s.keys(step)]
        passes = sorted({k[0] for k in keys})
        assert keys[0][1] == 0 and not seen & set(passes)  # other passes, so other views
        seen |= set(passes)
        first = [k[2] for k in keys if k[0] == passes[0]]
        assert len(first) == len(set(first))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accum", [1, 2])
def test_shares_of_processes_and_parts_are_the_global_batch(tmp_path, world, accum):
    """Also after a resume at another number of processes: a stream knows only its step."""
    images, s = folder_of(tmp_path, 20), Stream("s", np.arange(20), 8, seed=0)
    want = [[k[2] for k in s.keys(step)] for step in range(5)]
    shares = []
    for rank in range(world):
        loader = stream_loader(
            images, [Size()], s, start=2, stop=5, rank=rank, world=world, accum=accum
        )
        shares.append([targets.tolist() for _, targets in loader])
    assert all(len(share) == 3 * accum for share in shares)
    for step in range(3):
        parts = [share[step * accum + a] for a in range(accum) for share in shares]
        assert [t for part in parts for t in part] == want[2 + step]
    with pytest.raises(UserError, match="batch 8 .*3 processes.*--batch-size"):
        next(stream_loader(images, [Size()], s, start=0, stop=1, world=3))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_shards_hold_every_picture_once(tmp_path, world):
    images, seen = folder_of(tmp_path, 7), []
    for rank in range(world):
        for _, targets in eval_loader(images, Size(), 2, rank=rank, world=world):
            seen += targets.tolist()
    assert sorted(seen) == list(range(7))


def test_views_depend_on_seed_stream_pass_and_place_alone(tmp_path):
    images = folder_of(tmp_path, 10)

    def draws(seed=0, name="s", **how):
        s = Stream(name, np.arange(10), 5, seed=seed)
        loader = stream_loader(images, [Size(), Size()], s, start=0, stop=4, **how)
        return [torch.cat([view[1] for view in seen], 1) for seen, _ in loader]

    torch.manual_seed(0)
    one = draws()
    torch.manual_seed(1)
    for other in (draws(workers=2), draws(workers=1)):
        assert all(torch.equal(a, b) for a, b in zip(one, other))
    halves = [draws(rank=r, world=5) for r in range(5)]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(one, zip(*halves)))
    numbers = torch.cat(one)
    assert len(numbers.unique()) == numbers.numel()  # no two pictures, passes or views share a draw
    assert not torch.equal(draws(seed=1)[0], one[0]) and not torch.equal(draws(name="t")[0], one[0])


def test_loading_does_not_disturb_the_draws_of_the_step(tmp_path):
    images = folder_of(tmp_path, 10)

    def draws(workers):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        s = Stream("s", np.arange(10), 5, seed=0)
        for _ in stream_loader(images, [Size()], s, start=0, stop=3, workers=workers):
            yield random.random(), np.random.rand(), torch.rand(()).item()
        list(eval_loader(images, Size(), 4, workers=workers))
        yield random.random(), np.random.rand(), torch.rand(()).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    want = [(random.random(), np.random.rand(), torch.rand(()).item()) for _ in range(4)]
    assert list(draws(0)) == list(draws(2)) == want


def test_own_draws_are_given_back_after_an_error_too():
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    want = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    with pytest.raises(ValueError), own_draws():
        torch.rand(3), random.random(), np.random.rand()
        raise ValueError
    assert torch.equal(torch.get_rng_state(), want[0]) and random.getstate() == want[1]
    assert (np.random.get_state()[1] == want[2]).all()


def test_seeds_are_the_same_on_every_machine():
    assert seed_of(0, "sup", 1) == seed_of(0, "sup", 1) != seed_of(0, "sup", 2)
    assert (
        seed_of("a", 1)
        == int.from_bytes(hashlib.blake2b(b"('a', 1)", digest_size=8).digest(), "big") >> 1
    )


def reachable(thing) -> int:
    """How many Python objects a thing holds; their reference counts change when they are read."""
    seen, waiting = {}, [thing]
    while waiting:
        one = waiting.pop()
        if id(one) not in seen and not isinstance(one, (type, ModuleType, FunctionType)):
            seen[id(one)] = one
            waiting += gc.get_referents(one)
    return len(seen)


def test_a_worker_holds_no_python_object_per_picture():
    """A forked worker shares pages with its parent until it touches them: arrays stay shared."""

    def held(count):
        ids = np.array([f"train/c/{k:07d}.jpg".encode() for k in range(count)])
        images = Images(ids, np.zeros(count, np.int64), Path("root"))
        stream = Stream("s", np.arange(count), 4, 0)
        views = Views(images.take(stream.positions), [Size()], 0, "s", stream.positions)
        return reachable((views, streams._Share(stream, 0, 10, 0, 1, 1)))

    assert held(100_000) == held(100) < 1000
    assert reachable([str(k) for k in range(100)]) > 100  # what it would see


def test_views_travel_to_spawned_workers():
    views = Views(Images(np.array([b"x"]), np.array([0])), [Size()], 0, "s", np.arange(1))
    assert pickle.loads(pickle.dumps(views)).stream == "s"


# ----- layouts ----------------------------------------------------------------------------------


def make(root, *files):
    for k, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (k, 0, 0)).save(root / name)
    return root


def test_train_and_val_folders(tmp_path):
    make(
        tmp_path,
        "train/dog/a.png",
        "train/cat/deep/b.JPG",
        "train/cat/a.png",
        "val/cat/c.png",
        "val/dog/d.png",
    )
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no picture")
    for name in ("folder", "imagenet", "imagenette", "cifar10", "inat2019"):  # any, by class
        data = load_dataset(name, str(tmp_path))
        assert data.classes == ["cat", "dog"] and data.labeled is None
        assert data.train.ids.tolist() == [
            b"train/cat/a.png",
            b"train/cat/deep/b.JPG",
            b"train/dog/a.png",
        ]
        assert data.train.targets.tolist() == [0, 0, 1] and data.val.targets.tolist() == [0, 1]
    assert data.train.pil(2).getpixel((0, 0)) == (0, 0, 0)
    (tmp_path / "val").rename(tmp_path / "test")
    assert len(load_dataset("folder", str(tmp_path)).val) == 2


def own_folder(root, val=True):
    labeled = [f"labeled/{c}/{k}.png" for c in ("cat", "dog") for k in range(12)]
    val = ["val/cat/x.png", "val/dog/y.png"] if val else []
    return make(root, *labeled, "unlabeled/a.png", "unlabeled/deep/er/b.png", *val)


def test_labeled_and_unlabeled_folders(tmp_path):
    data = load_dataset("folder", str(own_folder(tmp_path)))
    assert data.labeled.tolist() == list(range(24)) and len(data.train) == 26 and len(data.val) == 2
    assert data.train.targets.tolist() == [0] * 12 + [1] * 12 + [-1, -1]
    assert data.train.ids[-1] == b"unlabeled/deep/er/b.png" and data.classes == ["cat", "dog"]


def test_without_val_a_tenth_is_held_out_and_said(tmp_path, capsys):
    data = load_dataset("folder", str(own_folder(tmp_path, val=False)), seed=3)
    said = capsys.readouterr().out
    assert "2 labelled pictures" in said and "seed 3" in said
    assert sorted(data.val.targets.tolist()) == [0, 1] and len(data.labeled) == 22
    assert not set(data.val.ids.tolist()) & set(data.train.ids.tolist())
    again = load_dataset("folder", str(tmp_path), seed=3)
    assert again.val.ids.tolist() == data.val.ids.tolist()
    others = {load_dataset("folder", str(tmp_path), seed=k).val.ids[0] for k in range(8)}
    assert len(others) > 1


@pytest.mark.parametrize(
    "name, files, words",
    [
        ("folder", None, ["no such folder"]),
        ("imagenet", ["train/cat/a.png"], ["train/<class>/", "val/<class>/"]),
        ("folder", ["cat/a.png"], ["labeled/<class>/"]),
        ("folder", ["train/a.png", "val/cat/a.png"], ["train/", "put pictures in"]),
        ("folder", ["train/cat/a.png", "val/dog/a.png"], ["val/dog", "rename or remove"]),
        ("folder", ["train/cat/a.png", "train/dog/.keep.png", "val/cat/a.png"], None),
        ("folder", ["labeled/cat/a.png"], ["unlabeled/"]),
        (
            "folder",
            ["labeled/cat/a.png", "unlabeled/a.png"],
            ["labeled/cat", "one picture", "val/"],
        ),
        ("cifar10", ["x/a.png"], ["--dataset cifar10", "unpack"]),
        ("food101", ["x/a.png"], ["--dataset food101", "unpack"]),
        ("inat2019", ["x/a.png"], ["--dataset inat2019", "unpack"]),
    ],
)
def test_a_wrong_layout_names_folder_flag_and_remedy(tmp_path, name, files, words):
    root = make(tmp_path / "data", *files) if files else tmp_path / "none"
    if words is None:  # hidden pictures are pictures
        assert len(load_dataset(name, str(root)).train) == 2
        return
    with pytest.raises(UserError) as error:
        load_dataset(name, str(root))
    said = str(error.value)
    assert f"--data-path {root}" in said and all(w in said for w in words) and "\n" not in said


def test_empty_folders_are_named(tmp_path):
    make(tmp_path / "a", "train/cat/a.png", "val/cat/a.png")
    (tmp_path / "a" / "train" / "dog").mkdir()
    with pytest.raises(UserError, match="train/dog holds no picture; fill or remove"):
        load_dataset("folder", str(tmp_path / "a"))
    make(tmp_path / "b", "labeled/cat/a.png")
    (tmp_path / "b" / "unlabeled").mkdir()
    with pytest.raises(UserError, match="--data-path .*unlabeled/ holds no picture"):
        load_dataset("folder", str(tmp_path / "b"))
    with pytest.raises(UserError, match="--dataset imagenet needs --data-path"):
        load_dataset("imagenet", None)


def test_a_holdout_leaves_training_and_is_equal_per_class(tmp_path):
    digits, held = load_dataset("digits", None), load_dataset("digits", None, seed=1, holdout=1000)
    assert (len(digits.train), len(digits.val)) == (8000, 2000)
    assert (len(held.train), len(held.val)) == (7000, 1000)
    assert np.bincount(held.val.targets).tolist() == [100] * 10
    assert not set(held.val.ids.tolist()) & set(held.train.ids.tolist())
    k = digits.train.ids.tolist().index(held.val.ids[7])
    assert (held.val.pixels[7] == digits.train.pixels[k]).all()
    assert held.val.targets[7] == digits.train.targets[k] and held.val.pil(7).mode == "RGB"
    again = load_dataset("digits", None, seed=1, holdout=1000)
    other = load_dataset("digits", None, seed=2, holdout=1000)
    assert again.val.ids.tolist() == held.val.ids.tolist() != other.val.ids.tolist()
    data = load_dataset("folder", str(own_folder(tmp_path)), holdout=4)
    assert all(data.train.targets[data.labeled] >= 0) and len(data.train) == 22
    for count in (8000, -1):
        with pytest.raises(UserError, match=f"--holdout {count}"):
            load_dataset("digits", None, holdout=count)


# ----- torchvision's sets, from tiny files of their published format ----------------------------


def test_cifar10_as_published(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder, draws = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    sums = {}

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    batches = {}
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        batches[name] = (
            draws.integers(0, 256, (2, 3072), dtype=np.uint8),
            draws.integers(0, 10, 2).tolist(),
        )
        write(name, dict(data=batches[name][0], labels=batches[name][1]))
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    write("batches.meta", dict(label_names=names))
    monkeypatch.setattr(CIFAR10, "train_list", [[n, sums[n]] for n, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[n, sums[n]] for n, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", dict(CIFAR10.meta, md5=sums["batches.meta"]))
    data = load_dataset("cifar10", str(tmp_path))
    assert data.classes == names and (len(data.train), len(data.val)) == (10, 2)
    assert data.train.ids[9] == b"train/00009" and data.val.ids[1] == b"test/00001"
    assert data.train.targets[2:4].tolist() == batches["data_batch_2"][1]
    pixels = batches["data_batch_2"][0][1].reshape(3, 32, 32).transpose(1, 2, 0)
    assert (np.asarray(data.train.pil(3)) == pixels).all()
    (folder / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"--dataset cifar10: .*--data-path {tmp_path}"):
        load_dataset("cifar10", str(tmp_path))


def test_food101_as_published(tmp_path):
    root = tmp_path / "food-101"
    lists = dict(
        train={"pie": ["pie/1", "pie/2"], "apple": ["apple/3"]},
        test={"pie": ["pie/4"], "apple": ["apple/5"]},
    )
    make(
        root,
        *(f"images/{i}.jpg" for part in lists.values() for names in part.values() for i in names),
    )
    (root / "meta").mkdir()
    for part, names in lists.items():
        (root / "meta" / f"{part}.json").write_text(json.dumps(names))
    data = load_dataset("food101", str(tmp_path))
    assert data.classes == ["apple", "pie"]
    assert dict(zip(data.train.ids.tolist(), data.train.targets.tolist())) == {
        b"pie/1.jpg": 1, b"pie/2.jpg": 1, b"apple/3.jpg": 0}
    assert data.val.ids.tolist() == [b"pie/4.jpg", b"apple/5.jpg"] and data.val.pil(0).size == (
        4,
        4,
    )


def test_inat2019_as_published(tmp_path):
    """One archive of Super/id/file; the competition's two json files say what is for training."""
    files = dict(
        train=["Birds/0/aa", "Birds/2/bb", "Plants/1/cc"], val=["Birds/2/dd", "Plants/1/ee"]
    )
    make(
        tmp_path / "2019",
        *(f"{f}.jpg" for part in files.values() for f in part),
        "Birds/0/unlisted.jpg",
    )
    for part, names in files.items():
        images = [dict(id=k, file_name=f"train_val2019/{n}.jpg") for k, n in enumerate(names)]
        (tmp_path / f"{part}2019.json").write_text(json.dumps(dict(images=images)))
    data = load_dataset("inat2019", str(tmp_path))
    assert data.classes == ["Birds/0", "Plants/1", "Birds/2"]
    assert data.train.ids.tolist() == [b"Birds/0/aa.jpg", b"Birds/2/bb.jpg", b"Plants/1/cc.jpg"]
    assert data.train.targets.tolist() == [0, 2, 1] and data.val.targets.tolist() == [2, 1]
    assert data.val.pil(1).size == (4, 4)
    (tmp_path / "val2019.json").unlink()
    with pytest.raises(UserError, match="--dataset inat2019: .*val2019.json"):
        load_dataset("inat2019", str(tmp_path))
