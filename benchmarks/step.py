"""Time the real training step of a script, on data that is already on the device.

  python benchmarks/step.py semi_vit                            its digits recipe
  python benchmarks/step.py semi_vit --dataset imagenet --arch vit_base --compile
  python benchmarks/step.py --preset digits                     all scripts, minutes on a CPU
  python benchmarks/step.py --preset all                        the table of docs/speed.md, on a GPU

What stands after SCRIPT are the script's own flags. No step is written here: the script's `main`
runs as always, with its settings, model, optimiser, loop and log. Only three things are replaced:
--data-path (pictures of noise, unless the data are the digits), the loader (one batch, loaded and
cut as always, then handed out again and again from the device) and the end (after enough steps).

What is measured. A step is the time from one request for a batch to the next, so it holds all that
the loop does, logging included. Where a part begins and ends, a mark is set: on a GPU a CUDA event,
which nobody waits for, so the parts are times of the GPU's own queue and their sum is the step.
Arithmetic: torch.utils.flop_counter over one eager step (matrix products, convolutions and
attention; recomputed blocks count). Matmul rate: a square product of the step's type, in the same
run. After the timed steps, some more run with every wait of the host for the GPU made an error.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import io
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from timm.layers import Attention
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.amp import Precision  # noqa: E402
from common.data import DataSet  # noqa: E402
from common.ema import Ema  # noqa: E402
from common.log import versions  # noqa: E402
from common.masks import Pairs, PairSet  # noqa: E402
from common.pictures import Images  # noqa: E402

# A further script needs a row here, and one in PRESETS. First, flags that lead straight to the step
# of the paper's method, unless --stage, --method or --epochs is given. Then what its parts are,
# beside those of all scripts: name of a function or Class.method -> name of the part (None: student
# or teacher forward, as it wants a gradient or not).
SCRIPTS = {
    "semi_vit": ("--epochs sup=0", {"prob_pseudo_mixup": "mixing", "batch_mix": "mixing"}),
    "semi_mae": ("--epochs sup=0", {"SemiMAE.classify": None,
                                    "SemiMAE.reconstruct": "student forward, masked branch"}),
    "semiformer": ("--epochs sup=0", {}),
    "simclrv2": ("--stage pretrain", {"gaussian_blur": "blur", "contrast": "NT-Xent",
                                      "memory_keys": "teacher forward"}),
    "s4former": ("--iterations pretrain=0,sup=0", {"strong_view": "mixing", "pasa_mask": "mixing"}),
}
PARTS = ("waiting for data", "bytes to pictures", "blur", "teacher forward", "mixing",
         "student forward", "student forward, masked branch", "NT-Xent", "backward",
         "optimiser, finite check", "EMA", "the rest of the loop")

# name: (what, script, flags, another's step in ms and GiB and whose, flags of the naive step)
_AUTHORS = "the authors' own step and package versions"
_BIG = "--dataset imagenet --labels 10"
PRESETS = {
    "semi_vit_base": ("Semi-ViT, ViT-B, 128 + 640 images", "semi_vit",
                      f"{_BIG} --arch vit_base --batch-size semi=128", (596, 76, _AUTHORS), None),
    "semi_vit_small": ("Semi-ViT, ViT-S, 128 + 640 images", "semi_vit",
                       f"{_BIG} --arch vit_small --batch-size semi=128", (306, 39, _AUTHORS), None),
    "semiformer": ("Semiformer, ViT-S + Conv, 64 + 320 images", "semiformer",
                   f"{_BIG} --arch vit_conv --recipe R2 --batch-size 384 --batch-group 0",
                   (574, 58, _AUTHORS), None),
    "simclrv2": ("SimCLRv2, ResNet-50, 512 x 2 views, head, NT-Xent, LARS", "simclrv2",
                 f"{_BIG} --arch resnet50 --batch-size 512",
                 (337, None, "a plain PyTorch step: fp16, NCHW, no head, SGD"), None),
    "semi_mae": ("Semi-MAE, ViT-S, 64 + 448 images", "semi_mae",
                 f"{_BIG} --arch vit_small --batch-size semi=64", None, "--dtype fp16"),
    "s4former": ("S4Former, SETR-PUP DeiT-B, 8 + 8 images of 512 px", "s4former",
                 "--dataset voc --num-labels 92 --arch deit_base", None, "--dtype fp16"),
    **{f"digits_{name}": (f"{name}, digits", name, "", None, None) for name in SCRIPTS},
}


# ===== the naive step of Semi-MAE =================================================================


def naive_semi_mae(script):
    """What the script's forward saves: labelled and strong images pass one by one, and the masked
    branch sends all patches through the encoder, the hidden ones as zeros."""

    def reconstruct(self, x, draw):
        patches, cls = self.embed(x)
        mask = script.random_masking(patches, self.s.mask_ratio, draw["noise"])[1]  # (N, L)
        latent = self.encode(cls, patches * (1 - mask)[:, :, None])
        in_place = torch.arange(mask.shape[1], device=x.device).expand(len(x), -1)
        target = script.patchify(x, self.s.patch_size)
        return self.decoder(latent, in_place), target, mask, None, None

    def forward(self, x_l, x_u_s, x_u_w, draw):
        out = {"logits": torch.cat([self.classify(x, drop=self.training) for x in (x_l, x_u_s)])}
        out["pred"], out["target"], out["mask"], _, _ = self.reconstruct(x_u_w, draw)
        with torch.no_grad():
            out["logits_w"] = self.classify(x_u_w)
        return out

    return [(script.SemiMAE, "forward", forward), (script.SemiMAE, "reconstruct", reconstruct)]


# ===== the naive step of S4Former =================================================================


def naive_s4former(script):
    """Attention as the formula is written: scores, mask and weights of every head in memory."""

    def forward(self, x, attn_mask=None, **_):
        n, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if attn_mask is not None:
            scores = scores + attn_mask.expand_as(scores).contiguous()
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, dim))

    return [(Attention, "forward", forward)]


NAIVE = {"semi_mae": naive_semi_mae, "s4former": naive_s4former}


# ===== the clock ==================================================================================


class Done(Exception):
    """Enough steps: ends the script's loop."""


class Clock:
    """Which part the loop is in, from the first timed step to the last.

    skip: steps before the first timed one; steps: timed ones; checked: steps after them in which a
    wait of the host for the GPU is an error. counter: a FlopCounterMode, on during the timed ones.
    """

    def __init__(self, skip: int, steps: int, checked: int = 0, counter=None):
        self.skip, self.steps, self.checked, self.counter = skip, steps, checked, counter
        self.begun, self.part, self.marks = 0, PARTS[-1], []  # marks of a step: (part, moment)
        self.cpu_time = time.perf_counter
        self.device, self.run, self.images = torch.device("cpu"), None, 0
        self.graphs = self.late_graphs = self.peak = 0

    def now(self):
        if self.device.type != "cuda":
            return self.cpu_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, part: str):
        """From now on time belongs to this part."""
        self.part = part
        if self.marks and self.begun <= self.skip + self.steps:
            self.marks[-1].append((part, self.now()))

    def step(self):
        """The loop asks for the next batch. Raises Done where there were enough."""
        before, self.begun = self.begun, self.begun + 1
        cuda, last = self.device.type == "cuda", self.skip + self.steps
        if before == self.skip:
            self.graphs = graphs_compiled()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            if self.counter:
                self.counter.__enter__()
        if self.skip <= before <= last:
            self.marks.append([(PARTS[-1], self.now())])
        if before == last:
            if self.counter:
                self.counter.__exit__(None, None, None)
            self.late_graphs = graphs_compiled() - self.graphs
            self.peak = (torch.cuda.max_memory_allocated() if cuda
                         else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            if cuda and self.checked:
                torch.cuda.set_sync_debug_mode("error")
        if before == last + (self.checked if cuda else 0):
            raise Done

    def timed(self, call, part: str | None = None):
        """call, as a part; a network without a name is the teacher where no gradient is wanted."""

        @functools.wraps(call)
        def timed_call(*args, **kwargs):
            outer = self.part
            self.mark(part or ("student forward" if torch.is_grad_enabled() else "teacher forward"))
            try:
                return call(*args, **kwargs)
            finally:
                self.mark(outer)

        return timed_call

    def results(self) -> list[dict[str, float]]:
        """Of each timed step its parts in milliseconds; their sum is the step."""
        found = []
        for marks, after in zip(self.marks, self.marks[1:]):
            parts = dict.fromkeys(PARTS, 0.0)
            times = self.between([moment for _, moment in [*marks, after[0]]])
            for (part, _), time_of_part in zip(marks, times):
                parts[part] += time_of_part
            found.append(parts)
        return found

    def between(self, moments: list) -> list[float]:
        """Milliseconds from each moment to the next."""
        pairs = zip(moments, moments[1:])
        if self.device.type != "cuda":
            return [1000 * (end - begin) for begin, end in pairs]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]


def graphs_compiled() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


# ===== the script =================================================================================


def noise_data(script, dataset: str) -> DataSet:
    """As many classes as the data set has, a hundred pictures each, all the same noise."""
    classes = script.DATASETS[dataset][-2] or 10
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)

    def images(part, count):
        ids = [f"{part}/{c:04d}/{k:03d}" for c in range(classes) for k in range(count)]
        pixels = np.broadcast_to(noise, (len(ids), *noise.shape))  # of one picture's size
        return Images(np.array(ids, np.bytes_), np.arange(len(ids)) // count, pixels=pixels)

    return DataSet(images("train", 100), images("val", 1), [f"{c:04d}" for c in range(classes)])


def noise_pairs(script, dataset: str) -> PairSet:
    """A hundred pictures and masks of noise; for segmentation."""
    classes, rng = script.DATASETS[dataset][-2] or 10, np.random.default_rng(0)

    def pairs(part, count):
        picture = rng.integers(0, 256, (375, 500, 3), np.uint8)
        mask = rng.integers(0, classes, (375, 500), np.uint8)
        return Pairs(np.array([f"{part}/{k:03d}".encode() for k in range(count)]), classes,
                     pixels=np.broadcast_to(picture, (count, *picture.shape)),
                     masks=np.broadcast_to(mask, (count, *mask.shape)))

    return PairSet(pairs("train", 200), pairs("val", 4), [str(c) for c in range(classes)],
                   rng.integers(0, 256, (classes, 3), np.uint8))


def same_batch(clock: Clock, stream_loader):
    """A stream_loader that loads one batch and hands it out from the device for ever."""

    def load(*args, **how):
        leads = clock.images == 0  # of loaders in step with each other the first one is asked first
        own = dict(how, workers=0, pin=False)
        batch = next(stream_loader(*args, **own))
        batch = pytree.tree_map_only(torch.Tensor, lambda t: t.to(clock.device), batch)
        clock.images += how["accum"] * len(batch[1])

        def batches():
            while True:
                for part in range(how["accum"]):
                    if leads and part == 0:
                        clock.step()
                    yield batch

        return batches()

    return load


def loaded_batches(clock: Clock, stream_loader):
    """The script's own stream_loader, watched; for benchmarks/data.py."""

    def load(*args, **how):
        leads = clock.images == 0
        clock.images += args[2].batch
        batches = iter(stream_loader(*args, **how))
        for k in itertools.count():
            if leads and k % how["accum"] == 0:
                clock.step()
            clock.mark("waiting for data")
            batch = next(batches)
            clock.mark(PARTS[-1])
            yield batch

    return load


@contextlib.contextmanager
def replaced(changes: list):
    """Attributes replaced inside: [(owner, name, value)]."""
    old = [(owner, name, vars(owner).get(name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in old:
            delattr(owner, name) if value is None else setattr(owner, name, value)


def drive(name: str, flags: list[str], clock: Clock, naive=False, loader=same_batch):
    """Run the script's main with these flags until the clock has enough."""
    script, (_, of_script) = importlib.import_module(name), SCRIPTS[name]
    args = script.parse_args(flags)
    loads = "pair_loader" if hasattr(script, "pair_loader") else "stream_loader"
    changes = [
        (script, loads, loader(clock, getattr(script, loads))),
        (script, "to_model", clock.timed(script.to_model, "bytes to pictures")),
        (Precision, "backward", clock.timed(Precision.backward, "backward")),
        (Precision, "update", clock.timed(Precision.update, "optimiser, finite check")),
        (Ema, "update", clock.timed(Ema.update, "EMA")),
    ]
    if not args.data_path and args.dataset != "digits":
        if loads == "pair_loader":
            data = noise_pairs(script, args.dataset), None
            changes.append((script, "load_data", lambda *_: data))
        else:
            data = noise_data(script, args.dataset)
            changes.append((script, "load_dataset", lambda *_, **__: data))
    changes += NAIVE[name](script) if naive else []
    for path, part in of_script.items():
        owner, _, attribute = path.rpartition(".")
        owner = getattr(script, owner) if owner else script
        if owner is script or not args.compile:  # a mark inside a compiled forward would cut it
            call = next((c for o, a, c in changes if (o, a) == (owner, attribute)), None)
            call = clock.timed(call or getattr(owner, attribute), part)
            changes.append((owner, attribute, call))
    networks = set()

    def start_processes(args):
        clock.run = start(args)
        clock.device = clock.run.device
        return clock.run

    def build_model(*args, **kwargs):
        model = build(*args, **kwargs)
        if type(model) not in networks:
            networks.add(type(model))
            type(model).__call__ = clock.timed(torch.nn.Module.__call__)
        return model

    start, build = script.start_processes, script.build_model
    changes += [(script, "start_processes", start_processes), (script, "build_model", build_model)]
    said = io.StringIO()
    try:
        with tempfile.TemporaryDirectory() as folder, replaced(changes):
            args.output, args.evals = f"{folder}/run", 1
            args.print_every = args.save_every = 10**9
            with contextlib.redirect_stdout(said), contextlib.suppress(Done):
                script.main(args)
                raise SystemExit(f"{name} ended before enough steps were timed: more --epochs")
    finally:
        if clock.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        for network in networks:
            del network.__call__
    if clock.run.precision.first_bad is not None and int(clock.run.precision.first_bad):
        raise SystemExit(f"{name}: update {int(clock.run.precision.first_bad)} was not finite and "
                         "was skipped; the times would be of no training step")


def straight_to_the_step(name: str, flags: list[str]) -> list[str]:
    """The flags, after those that leave out the stages before the paper's method."""
    chosen = {"--stage", "--method", "--epochs", "--iterations"} & {f.split("=")[0] for f in flags}
    return flags if chosen else [*SCRIPTS[name][0].split(), *flags]


def matmul_rate(clock: Clock, dtype) -> float:
    """TFLOP/s of a square matrix product on the clock's device, the median of 20."""
    size = 8192 if clock.device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=clock.device, dtype=dtype).unbind()
    moments = [clock.now()]
    for _ in range(25):
        a @ b
        moments.append(clock.now())
    times = clock.between(moments)[5:]
    return 2 * size**3 / (statistics.median(times) / 1000) / 1e12


def measure(name: str, flags: list[str], steps: int, skip: int, naive=False,
            processor_time=False) -> dict:
    """All numbers of one script with these flags."""
    flags = straight_to_the_step(name, flags)
    eager = [f for f in flags if f != "--compile"]
    counter = FlopCounterMode(display=False)
    drive(name, eager, Clock(0, 1, counter=counter), naive)
    flops = counter.get_total_flops()
    gc.collect()
    torch.cuda.empty_cache()  # without a GPU: nothing
    clock, waits = Clock(skip, steps, checked=3), None
    clock.cpu_time = time.process_time if processor_time else time.perf_counter
    try:
        drive(name, flags, clock, naive)
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        where = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename]
        waits = f"{Path(where[-1].filename).name}:{where[-1].lineno}: {where[-1].line}"
    parts = clock.results()
    if len(parts) < steps:
        raise SystemExit(f"{name}: {len(parts)} of {steps} steps: {waits}")
    times, dtype = [sum(p.values()) for p in parts], clock.run.precision.dtype
    seconds, matmul = statistics.median(times) / 1000, matmul_rate(clock, dtype)
    return dict(
        script=name, flags=" ".join(flags), naive=naive, stage=clock.run.log.stage,
        device=str(clock.device), dtype=str(dtype).split(".")[-1], compiled="--compile" in flags,
        images=clock.images, steps=steps, ms=statistics.median(times), ms_min=min(times),
        ms_max=max(times), images_per_s=clock.images / seconds, peak_gib=clock.peak / 2**30,
        tflop=flops / 1e12, tflop_per_s=flops / 1e12 / seconds, matmul_tflop_per_s=matmul,
        share_of_matmul=flops / 1e12 / seconds / matmul,
        parts={k: statistics.mean(p[k] for p in parts) for k in PARTS if any(p[k] for p in parts)},
        graphs=clock.graphs, late_graphs=clock.late_graphs,
        waits=waits if clock.device.type == "cuda" else "no GPU", **versions())


# ===== what is printed ============================================================================


def as_text(r: dict) -> str:
    total = sum(r["parts"].values())
    outside = 1 - sum(v for k, v in r["parts"].items() if "forward" in k or k == "backward") / total
    lines = [
        f"{r['script']} {r['flags']}{' (naive)' if r['naive'] else ''}",
        f"  stage {r['stage']}, {r['images']} images, {r['device']} ({r['hardware']}), "
        f"{r['dtype']}, {'compiled' if r['compiled'] else 'eager'}, torch {r['torch']}, "
        f"timm {r['timm']}, commit {(r['commit'] or '-')[:12]}",
        f"  step {r['ms']:.1f} ms (median of {r['steps']}; {r['ms_min']:.1f} to {r['ms_max']:.1f})"
        f", {r['images_per_s']:.0f} images/s, peak {r['peak_gib']:.1f} GiB",
        f"  {r['tflop']:.4g} TFLOP, {r['tflop_per_s']:.3g} TFLOP/s = "
        f"{100 * r['share_of_matmul']:.0f}% of the matmul rate of {r['matmul_tflop_per_s']:.3g}",
        *(f"    {name:<32}{ms:>9.2f} ms {100 * ms / total:>5.1f}%"
          for name, ms in r["parts"].items()),
        f"  outside forward and backward: {100 * outside:.1f}%",
        f"  host waits for the GPU: {r['waits'] or 'none in 3 steps'}"]
    if r["compiled"]:
        lines.append(f"  graphs compiled: {r['graphs']}, after the first steps {r['late_graphs']}")
    return "\n".join(lines)


def as_table(rows: list[tuple[str, dict]]) -> str:
    """Markdown: rows (preset, result of `measure`)."""
    found = ["| step | how | ms (min to max) | GiB | images/s | TFLOP/s | of the matmul rate | "
             "another's step | times as fast |", "|---|---|---|---|---|---|---|---|---|"]
    for preset, r in rows:
        what, _, _, other, _ = PRESETS[preset]
        how = "naive" if r["naive"] else "compiled" if r["compiled"] else "eager"
        naive = next((x for p, x in rows if p == preset and x["naive"]), None)
        theirs, ratio = "-", "-"
        if other:
            gib = f", {other[1]} GiB" if other[1] else ""
            theirs, ratio = f"{other[0]} ms{gib} ({other[2]})", f"{other[0] / r['ms']:.2f}"
        elif naive and naive is not r:
            theirs, ratio = f"{naive['ms']:.1f} ms (naive)", f"{naive['ms'] / r['ms']:.2f}"
        found.append(
            f"| {what} | {how}, {r['dtype']} | {r['ms']:.1f} ({r['ms_min']:.1f} to "
            f"{r['ms_max']:.1f}) | {r['peak_gib']:.1f} | {r['images_per_s']:.0f} | "
            f"{r['tflop_per_s']:.3g} | {100 * r['share_of_matmul']:.0f}% | {theirs} | {ratio} |")
    r = rows[0][1]
    found.append(f"\n{r['hardware']}, torch {r['torch']}, timm {r['timm']}, Python {r['python']}, "
                 f"commit {r['commit']}; medians of {r['steps']} steps.")
    return "\n".join(found)


def run_presets(names: list[str], own: list[str], compiled: bool):
    """Each step in a process of its own: eager, compiled, and naive where there is such a one."""
    rows = []
    for preset in names:
        _, script, flags, _, naive = PRESETS[preset]
        ways = [flags.split()] + ([[*flags.split(), "--compile"]] if compiled else [])
        ways += [[*flags.split(), *naive.split(), "--naive"]] if naive else []
        for way in ways:
            command = [sys.executable, __file__, script, *way, *own, "--json"]
            child = subprocess.run(command, capture_output=True, text=True)
            if child.returncode:
                last = (child.stderr.strip().splitlines() or ["?"])[-1]
                print(f"{preset} {' '.join(way)}: not measured: {last}", flush=True)
                continue
            rows.append((preset, json.loads(child.stdout.splitlines()[-1])))
            print(as_text(rows[-1][1]), flush=True)
    if rows:
        print("\n" + as_table(rows))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("script", nargs="?", choices=SCRIPTS, help="its own flags may follow")
    p.add_argument("--preset", choices=("all", "digits", *PRESETS), help="instead of a script: "
                   "rows of docs/speed.md, eager and compiled; all: those of the papers' size")
    p.add_argument("--steps", type=int, default=20, help="timed ones")
    p.add_argument("--skip", type=int, default=5, help="steps before them, not timed")
    p.add_argument("--eager", action="store_true", help="presets: do not compile as well")
    p.add_argument("--naive", action="store_true", help=f"the naive step of {', '.join(NAIVE)}")
    p.add_argument("--processor-time", action="store_true", help="on a CPU: count this process's "
                   "seconds of the processor, on a machine that has other work; with one thread")
    p.add_argument("--json", action="store_true", help="all numbers in one line")
    args, flags = p.parse_known_args(argv)
    if bool(args.script) == bool(args.preset):
        p.error("either SCRIPT with its flags, or --preset")
    if args.naive and args.script not in NAIVE:
        p.error(f"--naive: there is one of {', '.join(NAIVE)}")
    if args.preset:
        digits = args.preset == "digits"
        names = [n for n in PRESETS if n.startswith("digits_") == digits]
        names = names if args.preset in ("all", "digits") else [args.preset]
        own = [f"--steps={args.steps}", f"--skip={args.skip}", *flags]
        return run_presets(names, own, not args.eager)
    result = measure(args.script, flags, args.steps, args.skip, args.naive, args.processor_time)
    print(json.dumps(result) if args.json else as_text(result))


if __name__ == "__main__":
    main()
