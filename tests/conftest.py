"""What all tests share: the list of scripts, and children that run one in a fraction of a second.

A further script adds one `Script` to SCRIPTS, and its steps to tests/test_promises.py where a test
calls them by name. A child is forked from a server that has loaded the libraries once, has a
working directory and a process group of its own, and may be killed: its log and checkpoints are
what a test looks at.
"""

import dataclasses
import importlib
import multiprocessing
import os
import re
import runpy
import socket
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, here and in the server of children
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the promises are tested on the CPU
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = f"{ROOT / 'tests'}{os.pathsep}{ROOT}"  # for the server's imports

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from common import checkpoint, log  # noqa: E402
from common.data import load_dataset  # noqa: E402

torch.set_num_threads(1)


class Quiet:
    """A log that keeps nothing."""

    def wait(self, batches):
        return batches

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", None)


@dataclasses.dataclass(frozen=True)
class Script:
    """A script and a run of it that takes about a second. {tiny} is the folder of fixture `tiny`.

    flags: every stage, a few updates each, with every source of randomness on; the log is printed
    and the checkpoint written at different steps. updates: of each stage, with these flags.
    """

    name: str
    flags: str
    updates: dict[str, int]
    first: str  # the stage that trains from nothing, alone: --stage FIRST
    methods: tuple[str, ...]
    equations: tuple[int, ...]  # the paper's numbered equations
    to_model: str  # name of the function that makes float pictures from bytes, for a NaN in a batch
    confident: str  # a flag after which no pseudo-label is confident; empty: there are none
    no_draws: str  # flags after which a step draws nothing: only the views are random
    long: str  # flags after which stage `first` takes thousands of updates
    refused: dict[str, tuple[str, str]]  # flag -> key and what it says on a resume
    too_few: str  # flags that leave fewer labelled images than a batch has
    files: str = ""  # flags after which it reads picture files, where `flags` alone do not
    broken: tuple[str, int] = ("train/c3", 2)  # below {tiny}: seven pictures, so many are labelled

    def argv(self, tiny, more="", **stages) -> list[str]:
        argv = f"{self.flags} {more}".format(tiny=tiny).split()  # a stage alone has none before it
        return [x for x in argv if x != "--pretrain" or "--stage" not in argv]

    def module(self):
        return importlib.import_module(self.name)


SCRIPTS = [
    Script(
        name="semi_vit",
        flags="--data-path {tiny} --arch vit_digits --image-size 28 --patch-size 7 --num-labels 20"
        " --epochs sup=4,semi=2 --batch-size sup=8,semi=4 --unlabeled-ratio semi=3 --evals 1"
        " --lr sup=5e-2,semi=1e-3 --warmup-epochs 1 --tau semi=0.13 --ema-decay semi=0.9"
        " --workers 0 --print-every 2 --save-every 3",
        updates=dict(sup=8, semi=10),
        first="sup",
        methods=("sup", "fixmatch", "ema_teacher", "semi_vit"),
        equations=(1, 2, 3, 4, 5),
        to_model="to_model",
        confident="--tau semi=1",
        no_draws="--mix-labeled 0 --drop-path 0 --reprob 0 --unlabeled-mix none",
        long="--stage sup --epochs sup=2000",
        refused={
            "--arch vit_tiny": ("arch", "vit_digits -> vit_tiny"),
            "--split-seed 1": ("split", " -> "),
            "--num-labels 30": ("num_labels", "20 -> 30"),
            "--lr sup=0.5": ("sup.lr", "0.05 -> 0.5"),
            "--seed 7": ("seed", "0 -> 7"),
        },
        too_few="--num-labels 10 --batch-size sup=16,semi=16",
    ),
    Script(
        name="semi_mae",
        flags="--data-path {tiny} --arch vit_digits --image-size 28 --patch-size 7 --num-labels 20"
        " --pretrain --epochs pretrain=2,sup=4,semi=2 --batch-size pretrain=16,sup=8,semi=4"
        " --unlabeled-ratio semi=3 --evals 1 --lr pretrain=1e-3,sup=5e-2,semi=1e-3"
        " --lr-span sup=run,semi=run --warmup-epochs 1 --tau semi=0.13 --ema-decay semi=0.9"
        " --dec-dim 32 --dec-depth 1 --dec-heads 4 --workers 0 --print-every 2 --save-every 3",
        updates=dict(pretrain=10, sup=8, semi=10),
        first="sup",
        methods=("sup", "fixmatch", "semi_mae", "mae"),
        equations=(1, 2, 3),
        to_model="to_model",
        confident="--tau semi=1",
        no_draws="--drop-path 0 --reprob 0",
        long="--stage sup --epochs sup=2000",
        refused={
            "--arch vit_tiny": ("arch", "vit_digits -> vit_tiny"),
            "--split-seed 1": ("split", " -> "),
            "--lambda-u semi=2": ("semi.lambda_u", "1.0 -> 2.0"),
            "--mask-ratio 0.5": ("pretrain.mask_ratio", "0.75 -> 0.5"),
            "--seed 7": ("seed", "0 -> 7"),
        },
        too_few="--num-labels 10 --batch-size sup=16,semi=16",
    ),
    Script(
        name="semiformer",
        flags="--data-path {tiny} --arch vit_conv_digits --image-size 32 --num-labels 20"
        " --epochs sup=4,semi=2 --batch-size sup=8,semi=16 --unlabeled-ratio semi=3 --evals 1"
        " --lr sup=1e-2,semi=1e-3 --warmup-epochs 1 --tau semi=0.13"
        " --workers 0 --print-every 2 --save-every 3",
        updates=dict(sup=8, semi=10),
        first="sup",
        methods=("sup", "vanilla", "conv_labeled", "semiformer"),
        equations=(1, 2, 3, 4, 5, 6),
        to_model="to_model",
        confident="--tau semi=1",
        no_draws="--drop-path 0 --reprob 0 --freeze-bn 1",
        long="--stage sup --epochs sup=2000",
        refused={
            "--arch pit_conv_digits": ("arch", "vit_conv_digits -> pit_conv_digits"),
            "--split-seed 1": ("split", " -> "),
            "--num-labels 30": ("num_labels", "20 -> 30"),
            "--fuse 0": ("fuse", "1 -> 0"),
            "--lr sup=0.5": ("sup.lr", "0.01 -> 0.5"),
            "--seed 7": ("seed", "0 -> 7"),
        },
        too_few="--num-labels 10 --batch-size sup=16,semi=64",
    ),
    Script(
        name="simclrv2",
        flags="--data-path {tiny} --arch resnet_digits --width 0.5 --image-size 28 --num-labels 20"
        " --epochs pretrain=0.7,sup=2.8,linear=2.8,finetune=2.8,distill=0.7 --batch-size 8"
        " --lr pretrain=1,sup=0.05,linear=0.5,finetune=0.1,distill=0.5 --warmup-epochs 0.2"
        " --memory-size 40 --ema-decay 0.9 --alpha 0.5 --evals 1 --workers 0 --print-every 2"
        " --save-every 3",
        updates=dict(pretrain=8, sup=8, linear=8, finetune=8, distill=8),
        first="sup",
        methods=("sup", "linear", "finetune", "simclrv2"),
        equations=(1, 2, 3),
        to_model="to_model",
        confident="",  # no confidence threshold anywhere
        no_draws="--blur 0",
        long="--stage sup --epochs sup=5000",
        refused={
            "--arch resnet18": ("arch", "resnet_digits -> resnet18"),
            "--split-seed 1": ("split", " -> "),
            "--temperature 0.3": ("pretrain.temperature", "0.1 -> 0.3"),
            "--lr sup=0.5": ("sup.lr", "0.05 -> 0.5"),
            "--seed 7": ("seed", "0 -> 7"),
        },
        too_few="--num-labels 10 --batch-size 16",
    ),
    Script(
        name="s4former",
        flags="--image-size 32 --shuffle-tile 16 --train-scenes 60 --val-scenes 21 --num-labels 20"
        " --evals 1 --iterations pretrain=8,sup=8,semi=10 --batch-size pretrain=4,sup=8,semi=4"
        " --lr pretrain=1e-3,sup=1e-2,semi=5e-3 --warmup-iterations 2 --tau semi=0.12"
        " --ema-decay semi=0.9 --workers 0 --print-every 2 --save-every 3",
        updates=dict(pretrain=8, sup=8, semi=10),
        first="sup",
        methods=("sup", "fixmatch", "mean_teacher", "base", "s4former", "unimatch", "augseg"),
        equations=(1, 2, 3, 4, 5, 6),
        to_model="to_model",
        confident="--tau semi=1",
        no_draws="--shuffle 0 --strong none --freeze-bn 1",
        long="--stage sup --iterations sup=5000",
        refused={
            "--arch deit_tiny": ("arch", "vit_digits -> deit_tiny"),
            "--split-seed 1": ("split", " -> "),
            "--num-labels 30": ("num_labels", "20 -> 30"),
            "--pasa plain": ("semi.pasa", "ours -> plain"),
            "--lr sup=0.5": ("sup.lr", "0.01 -> 0.5"),
            "--seed 7": ("seed", "0 -> 7"),
        },
        too_few="--num-labels 10 --batch-size sup=16,semi=16",
        files="--dataset folder --data-path {tiny}/scenes --arch vit_digits --num-labels 40",
        broken=("scenes/images/train", 7),
    ),
]
NAMES = [s.name for s in SCRIPTS]
STAGES = [pytest.param(s, stage, id=f"{s.name}-{stage}") for s in SCRIPTS for stage in s.updates]


# ----- pictures ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Ten classes in ImageFolder layout: 80 pictures to train on, 21 (odd) to validate; below
    scenes/ 40 and 3 pictures with masks of three classes."""
    root = tmp_path_factory.mktemp("tiny")
    with np.load(ROOT / "common" / "digits.npz") as file:
        pixels, labels = file["train_images"], file["train_labels"]
    for digit in range(10):
        of_class = np.flatnonzero(labels == digit)
        for part, first, count in (("train", 0, 8), ("val", 8, 3 if digit == 0 else 2)):
            (root / part / f"c{digit}").mkdir(parents=True)
            for k in of_class[first : first + count]:
                Image.fromarray(pixels[k]).save(root / part / f"c{digit}" / f"{k:05d}.png")
    for part, first, count in (("train", 0, 40), ("val", 40, 3)):
        for k in range(first, first + count):
            picture = np.zeros((32, 40), np.uint8)
            picture[2:30, 2:30] = pixels[k]
            masks = {"images": picture, "masks": (picture > 99) * np.uint8(1 + labels[k] % 2)}
            for kind, values in masks.items():
                (root / "scenes" / kind / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(root / "scenes" / kind / part / f"{k:05d}.png")
    return root


# ----- children ---------------------------------------------------------------------------------

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["conftest", *NAMES])


def _child(call, arguments, cwd, environment, group):
    """First function of a child: its own output files, folder and environment, then the call."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        path = f"{cwd}/{name}{environment.get('RANK', '')}.txt"
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))
    if group:
        os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # of loading workers: quick
    os.chdir(cwd)
    os.environ.update(environment)
    torch.set_num_threads(1)
    call(*arguments)


class Child:
    """A call in a process of its own, started at once."""

    def __init__(self, call, *arguments, cwd, environment=None, group=True):
        self.cwd, self.rank = Path(cwd), (environment or {}).get("RANK", "")
        self.cwd.mkdir(parents=True, exist_ok=True)
        arguments = (call, arguments, str(self.cwd), environment or {}, group)
        self.process = CHILDREN.Process(target=_child, args=arguments)
        self.process.start()

    def wait(self, seconds=120) -> int:
        """The exit code, negative for a signal; a child that hangs is killed and fails the test."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            pytest.fail(f"a child hangs:\n{self.out}{self.err}")
        return self.process.exitcode

    @property
    def out(self) -> str:
        return (self.cwd / f"stdout{self.rank}.txt").read_text()

    @property
    def err(self) -> str:
        return (self.cwd / f"stderr{self.rank}.txt").read_text()


def run_script(name, argv, setup=None, setup_arguments=(), pictures=False):
    """In a child: what `python NAME.py ARGV` does. setup(script, ...): a fault to put in first."""
    script = importlib.import_module(name)
    if not pictures:  # drawing takes longer than these runs, and one test looks at the real ones
        script.report.curves = script.report.contact_sheet = lambda *a, **k: None
        if hasattr(script, "charts"):
            script.charts.bars = lambda *a, **k: None
    if setup is not None:
        setup(script, *setup_arguments)
    script.main(script.parse_args(argv))


def ends(name, argv, cwd, code=0, setup=None, setup_arguments=(), pictures=False) -> Child:
    """Run a script in a child to its end, which must be this exit code."""
    child = Child(run_script, name, argv, setup, setup_arguments, pictures, cwd=cwd)
    assert child.wait() == code, child.out + child.err
    return child


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def world(call, arguments_of_rank, cwd, code=0) -> list[Child]:
    """call(*arguments) in a process of each rank, with the environment that torchrun gives."""
    common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    common["WORLD_SIZE"] = str(len(arguments_of_rank))
    children = [
        Child(call, *a, cwd=cwd, environment=dict(common, RANK=str(r), LOCAL_RANK=str(r)))
        for r, a in enumerate(arguments_of_rank)
    ]
    codes = [c.wait() for c in children]
    if code is not None:
        assert codes == [code] * len(codes), "".join(c.out + c.err for c in children)
    return children


def run_copy(path, argv):
    """In a child: run a script file as a program, with nothing of this repository importable."""
    for name in [m for m in sys.modules if m in NAMES or m.split(".")[0] in ("common", "conftest")]:
        del sys.modules[name]
    sys.path = [str(Path(path).parent)] + [p for p in sys.path if not str(p).startswith(str(ROOT))]
    sys.argv = [str(path), *argv]
    runpy.run_path(str(path), run_name="__main__")


# ----- looking at a run -------------------------------------------------------------------------

TIMING = {"images_per_s", "data_wait", "eta_s", "peak_gib", "seconds"}


def only_run(cwd) -> Path:
    """The one run folder below a working directory."""
    (folder,) = (Path(cwd) / "runs").iterdir()
    return folder


def numbers(folder) -> list[dict]:
    """Every line of a log after the first, without what depends on the clock."""
    lines = log.read_log(folder)[1:]
    for line in lines:
        for stage in line.get("results", {}).values():
            stage.pop("seconds", None)
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def flatten(tree, prefix="") -> dict:
    """Nested dicts and lists -> {path: leaf}."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    return {k: v for name, part in items for k, v in flatten(part, f"{prefix}/{name}").items()}


def assert_equal(a, b, but=()):
    """Bitwise equal trees of tensors and plain values, except for leaves of these names."""
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for key in a:
        if key.rsplit("/", 1)[-1] in but:
            continue
        if torch.is_tensor(a[key]):
            assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key
        else:
            assert a[key] == b[key], key


def assert_same_run(a, b):
    """Log, weights, EMA, optimiser and generators of two runs' ends are bitwise equal."""
    assert numbers(a) == numbers(b)
    states = [checkpoint.load_newest(Path(f)) for f in (a, b)]
    assert_equal(*states, but=("seconds", "log_size"))


@pytest.fixture(scope="session")
def straight(tiny, tmp_path_factory):
    """straight(script): folder of an undisturbed run of all its stages, made once."""
    made = {}

    def run(script) -> Path:
        if script.name not in made:
            cwd = tmp_path_factory.mktemp(script.name)
            ends(script.name, script.argv(tiny), cwd)
            made[script.name] = only_run(cwd)
        return made[script.name]

    return run


def wait_for(condition, seconds=120):
    """Poll until condition() is true; a test fails where it never becomes so."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail("waited in vain")
        time.sleep(0.02)


def last_step(folder, stage) -> int:
    """The last printed step of a stage, 0 before the first; a half-written line is left out."""
    file = Path(folder) / "log.jsonl"
    text = file.read_text() if file.exists() else ""
    found = re.findall(rf'^{{"stage": "{stage}", "step": (\d+),.*}}$', text, re.M)
    return int(found[-1]) if found else 0
