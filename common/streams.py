"""Streams, views and loaders: which picture stands at which place, and how it is looked at.

A *stream* is a pure function of (seed, name, step), so a run resumes in the middle of an epoch, with
any number of processes, knowing nothing but its step. A *view* is one random way of looking at a
picture; its draws are seeded by (seed, stream, pass, place) and by nothing else, so neither workers
nor processes change what is drawn.
"""

import contextlib
import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.data import BadImage, Images
from common.splits import UserError


def seed_of(*parts) -> int:
    """A 63-bit seed from any printable parts, the same on every machine (Python's own hash is salted)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


@contextlib.contextmanager
def seeded(seed: int):
    """Seed python, numpy and torch (CPU) inside, restore them after: a view must not disturb the step's own draws."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0]), np.random.set_state(before[1]), torch.set_rng_state(before[2])


@dataclass(frozen=True)
class Stream:
    """Endless shuffled passes over some pictures, cut into global batches; a pure function of the step.

    positions (N,) in the data set; batch: global; restart_every: a new pass begins at each multiple of this many
    steps (a labelled set is reshuffled at each epoch of the unlabelled one). A pass drops its last N mod batch
    pictures; where N < batch, or with straddle, batches run on over the end of a pass instead and nothing is dropped.
    """

    name: str
    positions: np.ndarray
    batch: int
    seed: int
    restart_every: int | None = None
    straddle: bool = False

    @property
    def steps_per_pass(self) -> int:
        return max(1, len(self.positions) // self.batch)

    def keys(self, step: int) -> list[tuple[int, int, int]]:
        """The global batch of a step: (pass, place in the pass, position in the data set) of each picture."""
        n, epoch = len(self.positions), 0
        straddle = self.straddle or n < self.batch
        if self.restart_every:
            epoch, step = divmod(step, self.restart_every)
            steps = (
                -(-self.restart_every * self.batch // n)
                if straddle
                else -(-self.restart_every // (n // self.batch))
            )
            epoch *= steps  # passes begun by each earlier epoch
        if straddle:
            places = [divmod(step * self.batch + j, n) for j in range(self.batch)]
        else:
            whole, at = divmod(step, n // self.batch)
            places = [(whole, at * self.batch + j) for j in range(self.batch)]
        return [
            (epoch + p, k, int(self.positions[_order(self.seed, self.name, epoch + p, n)[k]]))
            for p, k in places
        ]


@lru_cache(maxsize=4)
def _order(seed: int, name: str, pass_: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed_of(seed, name, pass_)).permutation(n)


class Views(Dataset):
    """items (pass, place, position) -> (one output per view, target, position of a broken picture or -1).

    A picture that cannot be read is replaced by the next readable one of the data set, and reported by its position,
    so that the loop can count it and name its path.
    """

    def __init__(self, images: Images, views: list, seed: int, stream: str):
        self.images, self.views, self.seed, self.stream = images, views, seed, stream

    def __getitem__(self, key):
        pass_, place, i = key
        broken = -1
        for _ in range(100):
            try:
                picture = self.images.pil(i)
                break
            except BadImage:
                broken, i = (i if broken < 0 else broken), (i + 1) % len(self.images)
        else:
            raise UserError(f"{self.images.path(i)}: a hundred pictures in a row cannot be read")
        with seeded(seed_of(self.seed, self.stream, pass_, place)):
            return tuple(view(picture) for view in self.views), int(self.images.targets[i]), broken


class _Share:
    """The batches of one process: of every global batch, part a of --accum-steps, share r of the processes."""

    def __init__(self, stream: Stream, start: int, stop: int, rank: int, world: int, accum: int):
        self.stream, self.start, self.stop = stream, start, stop
        self.rank, self.world, self.accum = rank, world, accum

    def __len__(self):
        return (self.stop - self.start) * self.accum

    def __iter__(self):
        size = self.stream.batch // (self.world * self.accum)
        for step in range(self.start, self.stop):
            keys = self.stream.keys(step)
            for a in range(self.accum):
                first = (a * self.world + self.rank) * size
                yield keys[first : first + size]


def _one_thread(_):
    torch.set_num_threads(1)


def stream_loader(
    images, views, stream, *, start, stop, rank=0, world=1, accum=1, workers=0, pin=False, bad=None
):
    """Micro-batches of steps start to stop as (views, targets), views a list of tensors; draws nothing of its own.

    bad: a BadImages counter; without one, the first broken picture is an error.
    """
    if stream.batch % (world * accum):
        raise UserError(f"batch {stream.batch} of the {stream.name} stream is not divisible by {world} processes x "
                        f"--accum-steps {accum}; change --batch-size")  # fmt: skip
    loader = DataLoader(
        Views(images, views, stream.seed, stream.name),
        batch_sampler=_Share(stream, start, stop, rank, world, accum),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_one_thread,
        persistent_workers=False,
        generator=torch.Generator(),  # the default one belongs to the step: a resumed run must not draw from it
    )
    bad = bad or BadImages(images)
    for seen, targets, broken in loader:
        bad.check(broken)
        yield seen, targets


class BadImages:
    """Counts pictures that could not be read; past --max-bad-images the run ends with the path of the last."""

    def __init__(self, images: Images, allowed: int = 0):
        self.images, self.allowed, self.seen = images, allowed, set()

    def check(self, broken):
        for i in broken[broken >= 0].tolist():  # usually none
            self.seen.add(i)
            if len(self.seen) > self.allowed:
                try:
                    self.images.pil(i)
                    reason = self.images.path(i)
                except BadImage as error:
                    reason = str(error)
                raise UserError(
                    f"{reason}; remove the file, or let {len(self.seen)} pass with --max-bad-images {len(self.seen)}"
                )


def eval_loader(images, view, batch, *, rank=0, world=1, workers=0):
    """(pictures, targets) with every picture once over all processes: the shards may be of unequal length."""
    share = [(0, i, i) for i in range(rank, len(images), world)]
    batches = [share[i : i + batch] for i in range(0, len(share), batch)]
    loader = DataLoader(
        Views(images, [view], 0, "eval"),
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),
    )
    bad = BadImages(images)
    for seen, targets, broken in loader:
        bad.check(broken)
        yield seen[0], targets
