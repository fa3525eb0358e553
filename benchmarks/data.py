"""How quickly pictures are loaded, and how much of a step is lost to it.

  python benchmarks/data.py                                    views of all scripts, noise as JPEG
  python benchmarks/data.py semi_vit --data-path DIR --workers 16          any folder; 0, 1, 16
  python benchmarks/data.py semi_vit --share --data-path DIR --workers 16 \\
      --dataset imagenet --labels 10 --arch vit_base           share of the step; the script's flags

Views. Each script's own lists of transforms, on 224 px (s4former: 512, and the plain pipeline draws
a crop for each look), as many views of a picture as its step asks for. Ours is the scripts' loader:
one decode for all views of a picture, bytes out, the erasing box beside them. The plain pipeline
does the same work as most code does it: the same transforms on PIL pictures, then ToTensor,
Normalize and timm's RandomErasing, floats out. It is measured twice, with a decode for each view
and with one for all. The three run in turn, round by round; what is printed is the median of each
and of the ratios within a round. Normalising and erasing on the device, which the plain pipeline
does not need, are in the times of benchmarks/step.py.

Share. The script's step (as in benchmarks/step.py) on one batch from the device, then on what its
loader brings; what the second takes longer is lost to loading.
"""

import argparse
import importlib
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.transforms import v2

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from step import Clock, drive, loaded_batches, straight_to_the_step  # noqa: E402

from common.log import versions  # noqa: E402
from common.mask_views import PairViews  # noqa: E402
from common.masks import Pairs  # noqa: E402
from common.pictures import EXTENSIONS, Images  # noqa: E402
from common.streams import Stream, Views, stream_loader  # noqa: E402

LOOKS = {  # script: stage whose settings hold, then the views that its step asks of one picture
    "semi_vit": ("semi", ("weak", "strong"), ("labeled",)),
    "semi_mae": ("semi", ("weak", "strong"), ("labeled",)),
    "semiformer": ("semi", ("weak", "strong"), ("labeled",)),
    "simclrv2": ("pretrain", ("pretrain", "pretrain"), ("weak",)),
    "s4former": ("semi", ("unlabeled", "unlabeled"), ("labeled",)),  # two looks at one crop
}


def make_jpegs(root: Path, classes=10, each=10) -> Path:
    """train/<class>/ and val/<class>/ of 500 x 375 JPEGs, of 105 kB like ImageNet's: noise at every
    scale, most of it coarse."""
    rng = np.random.default_rng(0)
    for part, count in (("train", each), ("val", 1)):
        for c in range(classes):
            folder = root / part / f"c{c}"
            folder.mkdir(parents=True)
            for k in range(count):
                picture = np.zeros((375, 500, 3), np.float32)
                for scale in (1, 4, 16, 64):
                    small = rng.normal(0, 8 * scale**0.4, (375 // scale + 2, 500 // scale + 2, 3))
                    size = ((500 // scale + 2) * scale, (375 // scale + 2) * scale)
                    planes = [Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)
                              for p in small.astype(np.float32).transpose(2, 0, 1)]
                    picture += np.stack([np.asarray(p)[:375, :500] for p in planes], 2)
                pixels = (128 + picture).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{k}.jpg", quality=95)
    return root


def pictures_below(folder: str) -> Images:
    """All pictures below a folder, whatever its layout; without labels."""
    root = Path(folder)
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in EXTENSIONS)
    if not files:
        raise SystemExit(f"--data-path {folder}: no picture there ({' '.join(EXTENSIONS)})")
    ids = np.array([os.fsencode(f.relative_to(root)) for f in files])
    return Images(ids, np.full(len(files), -1), root)


class PlainLook:
    """One look of a segmentation view at a picture without a mask: normalised floats."""

    def __init__(self, steps: list):
        self.steps = steps
        self.normalise = T.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def __call__(self, picture):
        seen = picture, None
        for step in self.steps:
            seen = step(*seen)
        return self.normalise(seen[0] / 255)


def looks_of(view: list) -> list | None:
    """A segmentation view once for each of its looks; None for a view of another kind."""
    last = view[-1]
    if not hasattr(last, "jitter"):
        return None
    return [[*view[:-1], type(last)(last.size, (on,))] for on in last.jitter]


class Plain(Dataset):
    """Picture -> its views as float tensors, normalised and erased, the usual way."""

    def __init__(self, images: Images, views: list[list], one_decode: bool):
        self.images, self.one_decode = images, one_decode
        self.views = []
        for v in views:
            if looks := looks_of(v):
                self.views += [PlainLook(steps) for steps in looks]
                continue
            end = [T.ToTensor(), T.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
            erasing = RandomErasing(v[-1].reprob, mode="pixel", device="cpu")
            self.views.append(T.Compose([*v[:-1], *end, *[erasing] * bool(v[-1].reprob)]))

    def __len__(self):
        return len(self.images)

    def open(self, i):
        with Image.open(self.images.path(i)) as picture:
            return picture.convert("RGB")

    def __getitem__(self, i):
        once = self.open(i) if self.one_decode else None
        return [view(once or self.open(i)) for view in self.views], int(self.images.targets[i])


def loaders(images: Images, views: list[list], batch: int, batches: int, workers: int) -> dict:
    """name: call that begins to load so many batches."""
    everything = np.arange(len(images))
    stream = Stream("benchmark", everything, batch, 0, straddle=True)
    order = [i for k in range(batches) for _, _, i in stream.keys(k)]
    pairs = looks_of(views[0]) is not None
    composed = [(v2.Compose if pairs else T.Compose)(v) for v in views]
    of = partial(PairViews, with_masks=False) if pairs else Views
    ours = Pairs(images.ids, 21, images.root) if pairs else images

    def plain(one_decode):
        how = dict(batch_size=batch, sampler=order, num_workers=workers)
        return DataLoader(Plain(images, views, one_decode), **how)

    return {
        "ours": lambda: stream_loader(ours, composed, stream, start=0, stop=batches,
                                      workers=workers, of=of),
        "plain": lambda: plain(False),
        "plain, one decode": lambda: plain(True),
    }


def rate(begin, batch: int, batches: int, workers: int) -> float:
    """Pictures (with all their views) per second, once the workers are under way.

    Without workers: per second of this process's processor time, whatever else the machine does.
    """
    now = time.perf_counter if workers else time.process_time
    first = 1 + 2 * workers if workers else 0  # what was prepared while nobody took the time
    started = now()
    for k, _ in enumerate(begin(), 1):
        if k == first:
            started = now()
    return (batches - first) * batch / (now() - started)


def measure_views(script: str, images: Images, names: tuple, stage: str, args, workers: int):
    """{name: [pictures per second of each round]}"""
    module = importlib.import_module(script)
    dataset, size = ("voc", 512) if script == "s4former" else ("imagenet", 224)
    s = module.derive(module.parse_args(["--dataset", dataset]), stage, 1)
    lists = module.view_lists(dataset, size, s)
    if looks_of(lists[next(iter(names))]):
        names = dict.fromkeys(names)  # one view has all looks
    batches = max(args.batches, 4 * workers + 2)
    ways = loaders(images, [lists[n] for n in names], args.batch, batches, workers)
    found = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, begin in ways.items():
            found[name].append(rate(begin, args.batch, batches, workers))
    return found


def views_table(rows: list) -> str:
    """rows: (script, views, workers, {way: [rates of the rounds]}) -> Markdown."""
    lines = ["| script | views of a picture | workers | ours, views/s (per worker) | plain | "
             "plain, one decode | ours / plain (min to max) | ours / one decode |",
             "|---|---|---|---|---|---|---|---|"]
    for script, names, workers, found in rows:
        n, each = len(names), max(1, workers)
        ours, plain, once = (n * statistics.median(r) for r in found.values())
        over = [sorted(a / b for a, b in zip(found["ours"], found[w]))
                for w in ("plain", "plain, one decode")]
        lines.append(
            f"| {script} | {' + '.join(names)} | {workers or 'none'} | {ours:.0f} "
            f"({ours / each:.0f}) | {plain:.0f} | {once:.0f} | {statistics.median(over[0]):.2f} "
            f"({over[0][0]:.2f} to {over[0][-1]:.2f}) | {statistics.median(over[1]):.2f} |")
    return "\n".join(lines)


def share(script: str, flags: list[str], steps: int, workers: int) -> dict:
    """Milliseconds of a step with one batch from the device, and with the loader."""
    flags, found = straight_to_the_step(script, [*flags, f"--workers={workers}"]), {}
    for name, how in (("device", {}), ("loader", dict(loader=loaded_batches))):
        clock = Clock(5 if name == "device" else 5 + 2 * workers, steps)
        drive(script, flags, clock, **how)
        parts = clock.results()
        found[name] = statistics.mean(sum(p.values()) for p in parts)
        found["images"] = clock.images
        found["waited"] = statistics.mean(p["waiting for data"] for p in parts)
    return found


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("script", nargs="?", choices=LOOKS, help="default: all")
    p.add_argument("--data-path", metavar="DIR", help="pictures; default: a hundred JPEGs of noise")
    p.add_argument("--workers", type=int, default=0, help="loading processes; 0: in this one, and "
                   "seconds of the processor instead of the clock's: the rate of one core")
    p.add_argument("--batch", type=int, default=32, help="pictures of a batch")
    p.add_argument("--batches", type=int, default=6, help="of a round")
    p.add_argument("--rounds", type=int, default=5, help="each is the three loaders in turn")
    p.add_argument("--share", action="store_true", help="the share of a step instead")
    p.add_argument("--steps", type=int, default=20, help="timed ones, for --share")
    args, flags = p.parse_known_args(argv)
    if args.share and not args.script:
        p.error("--share: of which script?")
    if flags and not args.share:
        p.error(f"{' '.join(flags)}: flags of a script go with --share")
    about = versions()
    with tempfile.TemporaryDirectory() as temporary:
        if args.share:
            path = args.data_path or make_jpegs(Path(temporary), each=100)
            own = flags if "--dataset" in flags else ["--dataset", "folder", *flags]
            r = share(args.script, [*own, f"--data-path={path}"], args.steps, args.workers)
            kept, waited = (100 * r[name] / r["loader"] for name in ("device", "waited"))
            print(f"{args.script} {' '.join(flags)}: {r['images']} images a step, {args.workers} "
                  f"workers\n  {r['device']:.1f} ms from the device, {r['loader']:.1f} ms from the "
                  f"loader: {kept:.1f}% of the rate; {waited:.1f}% of a step is waiting for data")
        else:
            torch.set_num_threads(1)
            images = pictures_below(args.data_path or make_jpegs(Path(temporary)))
            rows = []
            for script in [args.script] if args.script else LOOKS:
                stage, *looks = LOOKS[script]
                for names in looks:
                    for workers in sorted({0, min(1, args.workers), args.workers}):
                        found = measure_views(script, images, names, stage, args, workers)
                        rows.append((script, names, workers, found))
            print(views_table(rows))
    print(f"\n{about['hardware']}, torch {about['torch']}, torchvision {about['torchvision']}, "
          f"timm {about['timm']}, commit {about['commit']}; medians of {args.rounds} rounds")


if __name__ == "__main__":
    main()
