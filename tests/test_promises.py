"""The promises that every script keeps (R1 to R17), on runs of a second each, on a CPU."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import (
    NAMES,
    ROOT,
    SCRIPTS,
    STAGES,
    Child,
    assert_same_run,
    ends,
    free_port,
    last_step,
    numbers,
    only_run,
    run_copy,
    run_script,
    wait_for,
    world,
)
from torch import nn

from common import checkpoint, log
from common.amp import Precision

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
each_stage = pytest.mark.parametrize("script, stage", STAGES)
confident = [s for s in SCRIPTS if s.confident]  # those with a threshold
each_with_threshold = pytest.mark.parametrize("script", confident, ids=[s.name for s in confident])


def before(script, stage) -> int:
    """Updates of all stages before this one."""
    return sum(list(script.updates.values())[: list(script.updates).index(stage)])


# ----- faults, put into a script by its child ---------------------------------------------------


def at_update(_, n, fault):
    """fault(optimizer) at the n-th update of a run, all stages counted, before it is applied."""
    update, seen = Precision.update, [0]

    def faulty(self, optimizer, losses):
        seen[0] += 1
        if seen[0] == n:
            fault(optimizer)
        return update(self, optimizer, losses)

    Precision.update = faulty


def send(script, n, number, to_group=False):
    """A signal at update n: to this process, or from another one to its group, workers included."""

    def fault(_):
        if not to_group:
            return os.kill(os.getpid(), number)
        sender = os.fork()  # a worker obeys its own process, which must not be the sender here
        if sender == 0:
            os.killpg(0, number)
            os._exit(0)
        os.waitpid(sender, 0)

    at_update(script, n, fault)


def inf_in_a_gradient(script, n):
    def fault(optimizer):
        optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = float("inf")

    at_update(script, n, fault)


def nan_in_a_batch(script, function, n, rank=0):
    """The n-th call of the function that makes float pictures has a NaN in them, on one process."""
    original, seen = getattr(script, function), [0]

    def faulty(*args, **kwargs):
        x, seen[0] = original(*args, **kwargs), seen[0] + 1
        if seen[0] == n and int(os.environ.get("RANK", 0)) == rank:
            x[0, 0, 0, 0] = float("nan")
        return x

    setattr(script, function, faulty)


# ----- R1, R2, R8: killed, stopped, repeated ----------------------------------------------------


@pytest.mark.parametrize(
    "script, stage, workers",
    [pytest.param(*p.values, 0, id=p.id) for p in STAGES]
    + [pytest.param(s, list(s.updates)[-1], 2, id=f"{s.name}-workers") for s in SCRIPTS],
)
def test_r1_killed_and_resumed_is_the_straight_run(
    script, stage, workers, tiny, straight, tmp_path
):
    """Killed with -9 in the middle of an epoch, after more prints than the checkpoint has."""
    argv, n = script.argv(tiny, f"--workers {workers}"), before(script, stage) + 6
    ends(script.name, argv, tmp_path, -signal.SIGKILL, send, (n, signal.SIGKILL))
    folder = only_run(tmp_path)
    state = checkpoint.load_newest(folder)
    assert (state["stage"], state["step"]) == (stage, 3) and last_step(folder, stage) >= 4
    ends(script.name, [*argv, "--resume", "auto"], tmp_path)
    assert only_run(tmp_path) == folder  # it went on in the same run
    lines = [(x.get("stage"), x.get("step"), "loss" in x) for x in log.read_log(folder)[1:]]
    assert len(lines) == len(set(lines)), "the log was not cut back to the checkpoint"
    assert_same_run(straight(script), folder)


@each_script
def test_r1_killed_twice_and_fallen_back_to_the_previous_one(script, tiny, straight, tmp_path):
    """The second time before the resumed run prints, and with its newest checkpoint torn."""
    argv = script.argv(tiny, "--print-every 1000 --save-every 1 --evals 3")
    again = [*argv, "--resume", "auto"]
    ends(script.name, argv, tmp_path / "a", -signal.SIGKILL, send, (4, signal.SIGKILL))
    ends(script.name, again, tmp_path / "a", -signal.SIGKILL, send, (3, signal.SIGKILL))
    folder = only_run(tmp_path / "a")
    size = (folder / checkpoint.NEWEST).stat().st_size
    os.truncate(folder / checkpoint.NEWEST, size // 2)  # R4
    child = ends(script.name, again, tmp_path / "a")
    assert "cannot be read" in child.err and checkpoint.PREVIOUS in child.err
    ends(script.name, argv, tmp_path / "b")
    assert_same_run(only_run(tmp_path / "b"), folder)


@each_script
@pytest.mark.parametrize(
    "number, to_group", [("SIGTERM", True), ("SIGUSR1", True), ("SIGINT", False)]
)
def test_r2_a_signal_leaves_a_checkpoint_of_its_step(
    script, number, to_group, tiny, straight, tmp_path
):
    """At a random step, with workers; a batch system sends the signal to all processes it sees."""
    updates = [(s, k) for s, count in script.updates.items() for k in range(1, count)]
    stage, step = random.choice(updates)
    code, n = 128 + getattr(signal, number), before(script, stage) + step
    argv = script.argv(tiny, "--workers 2")
    ends(script.name, argv, tmp_path, code, send, (n, getattr(signal, number), to_group))
    folder = only_run(tmp_path)
    state = checkpoint.load_newest(folder)
    assert (state["stage"], state["step"]) == (stage, step)
    ends(script.name, [*argv, "--resume", str(folder)], tmp_path)
    assert_same_run(straight(script), folder)


@each_script
def test_r2_a_signal_under_torchrun(script, tiny, tmp_path):
    """torchrun passes SIGTERM on to two processes and their workers; both stop at the same step."""
    argv = script.argv(tiny, f"{script.long} --workers 1 --print-every 1 --save-every 100000")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-port", free_port(), str(ROOT / f"{script.name}.py"), *argv]
    (tmp_path / "a").mkdir()
    with open(tmp_path / "a" / "out.txt", "wb") as out:
        process = subprocess.Popen(command, cwd=tmp_path / "a", stdout=out, stderr=out)
    try:
        folder = tmp_path / "a" / "runs" / f"{script.name}-001"
        wait_for(lambda: process.poll() is not None or last_step(folder, script.first))
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
    said = (tmp_path / "a" / "out.txt").read_text()
    state = checkpoint.load_newest(folder)
    step = state["step"]
    assert f"stopped at {script.first} step {step};" in said and len(state["rng"]) == 2, said
    assert last_step(folder, script.first) == step  # every step was printed, none after the last

    # R1 with two processes: one after another, against both at once without the stop
    go_on = [*argv, "--stop-after", str(step + 3)]
    world(run_script, 2 * [(script.name, [*go_on, "--resume", "auto"])], tmp_path / "a")
    world(run_script, 2 * [(script.name, go_on)], tmp_path / "b")
    assert_same_run(only_run(tmp_path / "b"), folder)
    assert last_step(folder, script.first) == step + 3


@each_script
def test_r8_two_runs_with_one_seed_are_equal(script, tiny, straight, tmp_path):
    ends(script.name, script.argv(tiny, "--output same --workers 2"), tmp_path)
    assert_same_run(straight(script), tmp_path / "same")
    argv = script.argv(tiny, f"--seed 1 --stage {script.first} --output other")
    ends(script.name, argv, tmp_path)
    a, b = numbers(straight(script)), numbers(tmp_path / "other")
    assert a[0]["step"] == b[0]["step"] and a[1]["loss"] != b[1]["loss"]


# ----- R5, R6: what a resume or an --output refuses ---------------------------------------------


@pytest.mark.parametrize(
    "script, flag",
    [pytest.param(s, flag, id=f"{s.name} {flag}") for s in SCRIPTS for flag in s.refused],
)
def test_r5_a_resume_with_other_mathematics_is_refused(script, flag, tiny, straight, tmp_path):
    key, values = script.refused[flag]
    folder = straight(script)
    contents = {f.name: f.read_bytes() for f in folder.iterdir()}
    child = ends(script.name, script.argv(tiny, f"{flag} --resume {folder}"), tmp_path, 2)
    assert child.err.startswith("error: ") and child.err.count("\n") == 1
    assert f"{key}: " in child.err and values in child.err and "--resume" in child.err
    assert contents == {f.name: f.read_bytes() for f in folder.iterdir()}


@each_script
def test_r5_flags_that_change_no_number_are_not_refused(script, tiny, straight, tmp_path):
    shutil.copytree(straight(script), tmp_path / "run")
    more = f"--workers 1 --print-every 3 --save-every 4 --resume {tmp_path / 'run'}"
    child = ends(script.name, script.argv(tiny, more), tmp_path)
    assert child.err == ""


@each_script
def test_r6_an_output_that_is_not_empty_is_refused_and_not_touched(script, tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "checkpoint.pt.part").write_text("a file of mine")
    child = ends(script.name, script.argv(tiny, "--output mine"), tmp_path, 2)
    assert (
        "--output mine" in child.err and "--resume mine" in child.err and child.err.count("\n") == 1
    )
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["checkpoint.pt.part"]
    assert (tmp_path / "mine" / "checkpoint.pt.part").read_text() == "a file of mine"
    assert not (tmp_path / "runs").exists()
    ends(script.name, script.argv(tiny, "--output mine/checkpoint.pt.part"), tmp_path, 2)  # a file


# ----- R7: not finite ---------------------------------------------------------------------------


@each_stage
def test_r7_inf_in_one_gradient_stops_at_the_next_print(script, stage, tiny, tmp_path):
    """Update 4 is bad; 3 was saved, 5 is printed: the run stops there and names step and tensor."""
    argv = script.argv(tiny, "--print-every 5 --save-every 3")
    child = ends(script.name, argv, tmp_path, 2, inf_in_a_gradient, (before(script, stage) + 4,))
    assert re.fullmatch(r"error: step 4: not finite: gradient of [a-z_0-9.]+; .*\n", child.err)
    state = checkpoint.load_newest(only_run(tmp_path))
    assert (state["stage"], state["step"]) == (stage, 3)
    assert last_step(only_run(tmp_path), stage) == 0


@each_script
def test_r7_a_nan_in_one_batch_stops_before_the_next_save(script, tiny, tmp_path):
    argv = script.argv(tiny, f"--stage {script.first} --print-every 100 --save-every 3")
    child = ends(script.name, argv, tmp_path, 2, nan_in_a_batch, (script.to_model, 2))
    assert "error: step 2: not finite: loss" in child.err and child.err.count("\n") == 1
    assert [f.name for f in only_run(tmp_path).iterdir()] == ["log.jsonl"]


@each_script
def test_r7_a_nan_on_one_process_stops_all(script, tiny, tmp_path):
    argv = script.argv(tiny, f"--stage {script.first}")
    fault = (nan_in_a_batch, (script.to_model, 1, 1))
    for child in world(run_script, 2 * [(script.name, argv, *fault)], tmp_path, 2):
        assert "error: step 1: not finite: " in child.err
    assert [f.name for f in only_run(tmp_path).iterdir()] == ["log.jsonl"]


# ----- R9: processes ----------------------------------------------------------------------------


def semi_vit_case(script, stage):
    """(student, teacher, batch): float64, everything drawn given; each row of batch is an image."""
    argv = (
        "--arch vit_digits --num-labels 20 --mix-labeled 0 --drop-path 0 --lambda-u semi=2".split()
    )
    args = script.parse_args(argv)
    s = script.derive(args, stage, 1)
    torch.manual_seed(0)
    student, teacher = (script.build_model(args, 10, 0.0).double() for _ in range(2))
    for model in (student, teacher):
        nn.init.normal_(model.head.weight, std=0.3)
    x_l, x_u = torch.rand(8, 3, 28, 28).double(), torch.rand(16, 3, 28, 28).double()
    batch = dict(x_l=x_l, y_l=torch.arange(8))
    if stage == "semi":
        corner = torch.randint(0, 14, (16, 2))
        size = torch.randint(0, 15, (16, 2))
        boxes = torch.stack([corner, corner + size], 2).view(16, 4)  # y0, y1, x0, x1
        batch |= dict(x_u_w=x_u, x_u_s=x_u.flip(-1), boxes=boxes, cut=torch.arange(16) % 3 == 0)
        batch["partner"] = torch.cat([torch.randperm(8), torch.randperm(8)])
        s.tau = teacher(x_u).softmax(-1).amax(-1).median().item()

    def losses(student, b):
        """Pairs are made within 8 images: the pool of a process in the two-process run."""
        precision = Precision(torch.device("cpu"), "fp32")
        if stage == "sup":
            return script.sup_step(student, b["x_l"], b["y_l"], 10, s, precision)
        perm = b["partner"] + 8 * (torch.arange(len(b["partner"])) // 8)
        draws = dict(perm=perm, use_cutmix=b["cut"], boxes=b["boxes"])
        return script.semi_step(student, teacher.eval(), b["x_l"], b["y_l"], b["x_u_w"], b["x_u_s"],
                                10, s, precision, mix_u=draws)[0]

    return student.eval(), batch, losses


def semi_mae_case(script, stage):
    """(model, batch, losses): float64, the noise of the masks given; a row of batch is an image."""
    argv = "--arch vit_digits --num-labels 20 --drop-path 0 --reprob 0".split()
    args = script.parse_args(argv)
    s = script.derive(args, stage, 1)
    torch.manual_seed(0)
    model = script.build_model(args, s, 10, stage).double()
    x_l, x_u = torch.rand(8, 3, 28, 28).double(), torch.rand(16, 3, 28, 28).double()
    noise = torch.rand(16, 16)
    batch = dict(x=x_u, noise=noise) if stage == "pretrain" else dict(x_l=x_l, y_l=torch.arange(8))
    if stage == "semi":
        batch |= dict(x_u_w=x_u, x_u_s=x_u.flip(-1), noise=noise)
        s.tau = model.classify(x_u).softmax(-1).amax(-1).median().item()

    def losses(model, b):
        precision, draw = Precision(torch.device("cpu"), "fp32"), dict(noise=b.get("noise"))
        if stage == "pretrain":
            return script.mae_step(model, b["x"], s, precision, draw)
        if stage == "sup":
            return script.sup_step(model, b["x_l"], b["y_l"], s, precision)
        views = b["x_u_w"], b["x_u_s"]
        return script.semi_step(model, b["x_l"], b["y_l"], *views, s, precision, draw)[0]

    return model, batch, losses


def semiformer_case(script, stage):
    """(model, batch, losses): float64, BatchNorm in eval mode; each row of batch is an image."""
    argv = "--arch vit_conv_digits --num-labels 20 --drop-path 0 --lambda-u semi=2".split()
    s = script.derive(script.parse_args(argv), stage, 1)
    torch.manual_seed(0)
    model = script.build_model(script.parse_args(argv), 10).double().eval()
    for name, p in model.named_parameters():
        if "_cls_head.weight" in name:
            nn.init.normal_(p, std=0.3)
    x_l, x_u = torch.rand(8, 3, 32, 32).double(), torch.rand(16, 3, 32, 32).double()
    batch = dict(x_l=x_l, y_l=torch.arange(8))
    if stage == "semi":
        batch |= dict(x_u_w=x_u, x_u_s=x_u.flip(-1))
        s.tau = model(x_u)[0].softmax(-1).amax(-1).median().item()

    def losses(student, b):
        precision = Precision(torch.device("cpu"), "fp32")
        if stage == "sup":
            return script.sup_step(student, b["x_l"], b["y_l"], s, precision)
        views = b["x_u_w"], b["x_u_s"]
        return script.semi_step(student, model, b["x_l"], b["y_l"], *views, s, precision)[0]

    return model, batch, losses


def simclrv2_case(script, stage):
    """(model, batch, losses): float64, global BatchNorm in train mode; a batch row is an image."""
    flags = "--arch resnet_digits --width 0.5 --num-labels 20 --alpha 0.5 --temperature 0.5"
    args = script.parse_args(flags.split())
    s = script.derive(args, stage, 1)
    torch.manual_seed(0)
    model, teacher = (script.build_model(args, stage, s, 10).double() for _ in range(2))
    for m in (*model.modules(), *teacher.modules()):
        if isinstance(m, nn.modules.batchnorm._BatchNorm):  # no branch at zero
            nn.init.uniform_(m.weight, 0.5, 1.5)
        elif isinstance(m, nn.Linear) and m.out_features == 10:
            nn.init.normal_(m.weight, std=0.3)
    script.train_mode(model, stage)
    x = torch.rand(8, 3, 28, 28).double()
    batch = dict(x=x, x2=x + 0.3 * torch.rand_like(x), y=torch.arange(8))
    batch["y"][0] = model.eval()(x)[0, :10].argmax()  # one is right, in the mean that is logged
    script.train_mode(model, stage)

    def losses(model, b):
        precision = Precision(torch.device("cpu"), "fp32")
        if stage == "pretrain":
            return script.pretrain_step(model, b["x"], b["x2"], s.temperature, precision)
        if stage == "distill":
            labelled = b["x2"], b["y"]
            return script.distill_step(model, teacher.eval(), b["x"], s, precision, *labelled)[0]
        return script.label_step(model, b["x"], b["y"], 0.1, precision)

    return model, batch, losses


def s4former_case(script, stage):
    """(model, batch, losses): float64, BatchNorm in eval mode, the permutations of tiles given, no
    CutMix, whose partners are a process's own; a batch row is an image."""
    flags = "--image-size 32 --shuffle-tile 16 --num-labels 20 --lambda-u semi=2"
    args = script.parse_args(flags.split())
    s = script.derive(args, stage, 1)
    run = SimpleNamespace(device=torch.device("cpu"))
    torch.manual_seed(0)
    student, teacher = (script.stage_model(args, stage, s, 11, None, run).double().eval()
                        for _ in range(2))
    for model in (student, teacher):
        nn.init.normal_((model.classifier if stage == "pretrain" else model.head.classifier).weight)
    x = torch.rand(8, 3, 32, 32).double()
    batch = dict(x=x, y=torch.arange(32).view(8, 4) % 10)
    if stage == "pretrain":
        batch["y"][0, 0] = student(x)[0, 0].argmax()  # one is right, in the mean that is logged
    else:
        batch["y"] = torch.randint(0, 11, (8, 32, 32))
    if stage == "semi":
        perm = torch.rand(8, 4).argsort(1)
        batch |= dict(x_w=torch.rand(8, 3, 32, 32).double(), perm=perm, on=torch.arange(8) % 2 == 0)
        s.tau = teacher(batch["x_w"]).softmax(1).amax(1).median().item()

    def losses(model, b):
        precision = Precision(torch.device("cpu"), "fp32")
        if stage == "pretrain":
            return script.pretrain_step(model, b["x"], b["y"], True, precision)
        if stage == "sup":
            return script.sup_step(model, b["x"], b["y"], s, precision)
        draws = dict(cut=torch.tensor(False), perm=b["perm"], on=b["on"])
        views = [b["x_w"], b["x_w"].flip(1)]
        return script.s4former_step(model, teacher, b["x"], b["y"], views, s, precision, draws)[0]

    return student, batch, losses


CASES = {"semi_vit": semi_vit_case, "semi_mae": semi_mae_case, "semiformer": semiformer_case,
         "simclrv2": simclrv2_case, "s4former": s4former_case}


def share_of_a_step(script, stage, rank, ranks, port, path):
    """Child: losses (averaged over processes) and gradients of a step on a share of the batch."""
    student, batch, losses = CASES[script.name](script.module(), stage)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    parallel = nn.parallel.DistributedDataParallel(student, broadcast_buffers=False)
    found = losses(parallel, {k: v.chunk(ranks)[rank] for k, v in batch.items()})
    found["loss"].backward()
    averages = torch.stack([v.detach().double() for v in found.values()])
    dist.all_reduce(averages)
    if rank == 0:
        grads = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
        torch.save(dict(losses=dict(zip(found, averages / ranks)), grads=grads), path)
    dist.destroy_process_group()


@each_stage
def test_r9_two_processes_of_four_are_one_of_eight(script, stage, tmp_path):
    port = free_port()
    children = [
        Child(
            share_of_a_step,
            script,
            stage,
            rank,
            2,
            port,
            str(tmp_path / "two.pt"),
            cwd=tmp_path / str(rank),
        )
        for rank in range(2)
    ]
    student, batch, losses = CASES[script.name](script.module(), stage)
    one = losses(student, batch)
    one["loss"].backward()
    assert [c.wait() for c in children] == [0, 0], children[0].err + children[1].err
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert two["losses"].keys() == one.keys()
    for name, value in one.items():
        assert value.item() != 0, name
        near = max(1e-6, torch.finfo(torch.float32).eps * abs(value.item()))  # losses are float32
        assert abs(value.item() - two["losses"][name].item()) < near, name
    grads = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    least = 2 if stage == "linear" else 10
    assert grads.keys() == two["grads"].keys() and len(grads) >= least
    for name, value in grads.items():
        assert (two["grads"][name] - value).abs().max() < 1e-6, name
    assert max(v.abs().max() for v in grads.values()) > 1e-2  # not all are below the tolerance


@each_script
def test_r9_the_log_speaks_of_the_global_batch(script, tiny, tmp_path):
    """Where a step draws nothing, two processes log the losses of one (float32, small steps)."""
    argv = script.argv(tiny, f"{script.no_draws} --print-every 1 --lr 1e-4 --stage {script.first}")
    ends(script.name, argv, tmp_path / "one")
    world(run_script, 2 * [(script.name, argv)], tmp_path / "two")
    one, two = (
        [x["loss"] for x in numbers(only_run(tmp_path / k)) if "loss" in x] for k in ("one", "two")
    )
    assert len(one) == script.updates[script.first]
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert max(one) - min(one) > 1e-3


@each_script
def test_r9_evaluation_counts_every_image_once(script, tiny, straight, tmp_path):
    """21 pictures in shards of 11 and 10: the same number, and a multiple of 1/21."""
    argv = script.argv(tiny, f"--eval {straight(script)}")
    one = ends(script.name, argv, tmp_path / "one").out
    two = world(run_script, 2 * [(script.name, argv)], tmp_path / "two")[0].out
    assert one == two and "on 21 pictures" in one
    if "mIoU" in one:
        assert f"on 21 pictures, {21 * 32 * 32} pixels" in one  # all of them have a class
        return
    top1, top5 = (float(re.search(rf"{k} ([\d.]+)", one)[1]) * 21 / 100 for k in ("top-1", "top-5"))
    assert abs(top1 - round(top1)) < 0.01 and abs(top5 - round(top5)) < 0.01 and 0 < top5


def test_r9_semi_vit_mixes_within_a_process_on_purpose():
    """Partners are a process's own images: nothing is sent; more processes mean other pairs."""
    script = next(s for s in SCRIPTS if s.name == "semi_vit").module()
    x, y = torch.rand(8, 3, 28, 28), torch.arange(8)
    s = SimpleNamespace(
        label_smoothing=0.0, mix_labeled=1, mixup=0.8, cutmix=0.0, mix_lam="batch", cutmix_half_up=1
    )
    draws = dict(use_cutmix=torch.tensor([False]), lam=torch.tensor([0.75]))
    both = [script.labeled_targets(x[i : i + 4], y[i : i + 4], 10, s, draws) for i in (0, 4)]
    pairs = [[3, 2, 1, 0], [7, 6, 5, 4]]  # labelled: the reversed batch of this process
    for (mixed, targets), first, partners in zip(both, (0, 4), pairs):
        own = slice(first, first + 4)
        torch.testing.assert_close(mixed, 0.75 * x[own] + 0.25 * x[partners])
        assert (targets[:, partners].diagonal() == 0.25).all() and (
            targets[:, own].diagonal() == 0.75
        ).all()
    alone, _ = script.labeled_targets(x, y, 10, s, draws)
    assert not torch.equal(alone[:4], both[0][0])  # one process of eight pairs 0 with 7
    torch.manual_seed(0)
    keep = torch.tensor([True, False, True, True])
    partner = script.confident_partners(keep)  # mixup+: among the confident of a process
    assert sorted(partner.tolist()) == [0, 1, 2, 3] and partner[1] == 1


# ----- R10, R14: nobody is sure, few labels -----------------------------------------------------


@each_with_threshold
def test_r10_no_confident_pseudo_label_at_all(script, tiny, tmp_path):
    ends(script.name, script.argv(tiny, script.confident), tmp_path)
    lines = [x for x in numbers(only_run(tmp_path)) if "kept" in x]
    assert lines and all(x["kept"] == 0 and np.isfinite(x["loss"]) for x in lines)


@each_with_threshold
def test_r10_no_confident_pseudo_label_on_one_process(script, tiny, tmp_path):
    argv = script.argv(tiny)
    both = [(script.name, argv), (script.name, [*argv, *script.confident.split()])]  # rank 1: none
    world(run_script, both, tmp_path)
    lines = [x for x in numbers(only_run(tmp_path)) if "kept" in x]
    assert len(lines) == 5 and all(np.isfinite(x["loss"]) for x in lines)
    assert any(x["kept"] > 0 for x in lines)


@each_script
def test_r14_fewer_labels_than_a_batch(script, tiny, tmp_path):
    ends(script.name, script.argv(tiny, script.too_few), tmp_path)
    results = numbers(only_run(tmp_path))[-1]["results"]
    assert results.keys() == script.updates.keys()
    assert all(r["updates"] > 0 for r in results.values())
    losses = [x["loss"] for x in numbers(only_run(tmp_path)) if "loss" in x]
    assert losses and np.isfinite(losses).all()


@each_script
def test_r14_accumulation_makes_the_same_number_of_updates_or_refuses(script, tiny, tmp_path):
    ends(script.name, script.argv(tiny, f"--accum-steps 2 {script.no_draws}"), tmp_path)
    results = numbers(only_run(tmp_path))[-1]["results"]
    assert {k: r["updates"] for k, r in results.items()} == script.updates
    child = ends(script.name, script.argv(tiny, "--accum-steps 64"), tmp_path / "refused", 2)
    assert (
        "--batch-size" in child.err
        and "--accum-steps 64" in child.err
        and child.err.count("\n") == 1
    )


@each_script
@pytest.mark.parametrize(
    "flags", ["--batch-size 0", "--epochs 0", "--epochs -1", "--accum-steps 0"]
)
def test_r14_a_run_of_no_updates_is_refused(script, flags, tiny, tmp_path):
    child = ends(script.name, script.argv(tiny, flags), tmp_path, 2)
    assert flags.split()[0] in child.err and "Traceback" not in child.err
    assert not list(tmp_path.glob("runs/*/model.safetensors"))


# ----- R11, R13 through a script ----------------------------------------------------------------


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@each_script
@pytest.mark.parametrize("flag", ["--init", "--resume", "--eval"])
def test_r11_a_hostile_file_is_named_and_never_executed(script, flag, tiny, straight, tmp_path):
    shutil.copytree(straight(script), tmp_path / "run")
    (tmp_path / "run" / checkpoint.PREVIOUS).unlink()
    for name in (checkpoint.NEWEST, "model.safetensors"):
        torch.save(dict(model=Hostile()), tmp_path / "run" / name)
    child = ends(script.name, script.argv(tiny, f"{flag} run"), tmp_path, 2)
    name = "model.safetensors" if flag == "--eval" else checkpoint.NEWEST
    assert f"run/{name}" in child.err and child.err.count("\n") == 1
    assert not (tmp_path / "executed").exists()


@each_script
@pytest.mark.parametrize("content", [[1, 2], dict(a=1), dict(model=3), torch.zeros(3)])
def test_a_checkpoint_of_something_else_is_one_line(script, content, tiny, tmp_path):
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / checkpoint.NEWEST)
    for flag in ("--init", "--resume"):
        argv = script.argv(tiny, f"{flag} {tmp_path / 'run'}")
        child = ends(script.name, argv, tmp_path / flag[2:], 2)
        said = child.err
        assert said.startswith(f"error: {flag} {tmp_path / 'run'}") and said.count("\n") == 1, said


@each_script
def test_r13_a_broken_picture_is_named_or_counted(script, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "data")
    folder, labelled = script.broken
    broken = sorted((tmp_path / "data" / folder).iterdir())[:7]
    for file in broken:
        file.write_text("no picture")
    more = f"{script.files} --stage {script.first} --print-every 1"
    argv = script.argv(tmp_path / "data", more)
    child = ends(script.name, argv, tmp_path / "a", 2)
    assert any(str(f) in child.err for f in broken) and "--max-bad-images 1" in child.err
    ends(script.name, [*argv, "--max-bad-images", "7"], tmp_path / "b", pictures=False)
    counts = [x["bad_images"] for x in numbers(only_run(tmp_path / "b")) if "bad_images" in x]
    assert 1 <= counts[-1] <= labelled and counts == sorted(counts)


# ----- R17: copied ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """copied(script): path of the script in a folder that holds it and common/, no more."""

    def copy(script) -> Path:
        folder = tmp_path_factory.mktemp(f"copy of {script.name}")
        shutil.copytree(
            ROOT / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__")
        )
        shutil.copy(ROOT / f"{script.name}.py", folder)
        return folder / f"{script.name}.py"

    return copy


@each_script
def test_r17_a_copy_trains_from_another_folder(script, copied, tiny, tmp_path):
    """As a user would: a program of its own, with its pictures and final weights."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(copied(script)), *script.argv(tiny)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    folder = only_run(tmp_path)
    for name in ("log.jsonl", "checkpoint.pt", "model.safetensors", "curves.png", "views.png"):
        assert (folder / name).stat().st_size > 100, name
    assert str(folder.relative_to(tmp_path)) in run.stdout
    results = numbers(folder)[-1]["results"]
    assert {k: r["updates"] for k, r in results.items()} == script.updates


def help_of_a_copy(path):
    """Child: --help where sockets, a GPU and the embedded data are out of reach."""

    def refuse(*args, **kwargs):
        raise AssertionError("--help may not do this")

    socket.socket = socket.getaddrinfo = torch.cuda._lazy_init = np.load = refuse
    run_copy(path, ["--help"])


@each_script
def test_r17_help_of_a_copy_needs_no_network_no_gpu_and_no_data(script, copied, tmp_path):
    path = copied(script)
    (path.parent / "common" / "digits.npz").unlink()
    child = Child(help_of_a_copy, str(path), cwd=tmp_path)
    assert child.wait() == 0, child.err
    assert "--labels" in child.out and "--resume" in child.out and child.err == ""
    assert sorted(f.name for f in tmp_path.iterdir()) == ["stderr.txt", "stdout.txt"]
