"""Streams, views and loaders: which picture stands at which place, and how it is looked at.

A *stream* is a pure function of (seed, name, step), so a run resumes in the middle of an epoch,
with any number of processes, knowing nothing but its step. A *view* is one random way of looking at
a picture; its draws are seeded by (seed, stream, pass, place) and by nothing else, so neither
workers nor processes change what is drawn.
"""

import contextlib
import hashlib
import os
import random
import signal
import threading
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.pictures import BadImages, Images, read_or_next
from common.splits import UserError


def seed_of(*parts) -> int:
    """A 63-bit seed from any printable parts, the same on every machine (hash() is salted)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


@contextlib.contextmanager
def own_draws():
    """Restore the generators of python, numpy and torch (CPU) after: a view must not disturb the
    step's own draws where pictures are loaded in the training process."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def seed_everything(seed: int):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@dataclass(frozen=True)
class Stream:
    """Endless shuffled passes over some pictures, cut into global batches; pure in the step.

    positions (N,) in the data set; batch: global; restart_every: a new pass begins at each multiple
    of this many steps (a labelled set is reshuffled at each epoch of the unlabelled one). A pass
    drops its last N mod batch pictures; where N < batch, or with straddle, batches run on over the
    end of a pass instead and nothing is dropped.
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
        """The global batch of a step: of each picture (pass, place in it, position in the data)."""
        n, epoch = len(self.positions), 0
        straddle = self.straddle or n < self.batch
        if self.restart_every:
            epoch, step = divmod(step, self.restart_every)
            whole, size = (n, self.batch) if straddle else (n // self.batch, 1)
            epoch *= -(-self.restart_every * size // whole)  # passes begun by each earlier epoch
        if straddle:
            places = [divmod(step * self.batch + j, n) for j in range(self.batch)]
        else:
            whole, at = divmod(step, n // self.batch)
            places = [(whole, at * self.batch + j) for j in range(self.batch)]
        order = (_order(self.seed, self.name, epoch + p, n) for p, _ in places)
        return [(epoch + p, k, int(self.positions[o[k]])) for (p, k), o in zip(places, order)]


@lru_cache(maxsize=4)
def _order(seed: int, name: str, pass_: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed_of(seed, name, pass_)).permutation(n)


class Views(Dataset):
    """items (pass, place, position) -> (one output per view, target, position if broken, else -1).

    A picture that cannot be read is replaced by another of its stream (a label must not come in
    from outside), and reported by its position, so that the loop can count it and name its path.
    """

    def __init__(self, images: Images, views: list, seed: int, stream: str, positions: np.ndarray):
        self.images, self.views, self.seed, self.stream = images, views, seed, stream
        self.positions = positions

    def __getitems__(self, keys):  # DataLoader asks for a whole batch: generators are saved once
        with own_draws():
            return [self[key] for key in keys]

    def __getitem__(self, key):
        pass_, place, i = key
        picture, i, broken = read_or_next(self.images.pil, i, self.positions)
        seed_everything(seed_of(self.seed, self.stream, pass_, place))
        return tuple(view(picture) for view in self.views), int(self.images.targets[i]), broken


class _Share:
    """The batches of a process: of every global batch, part a of --accum-steps, share r of all."""

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


def _start_worker(_):
    """A worker has one thread, and obeys no signal but SIGTERM from its own process: a batch
    system, torchrun and Ctrl-C reach the whole group, and the loop needs the worker up to its
    checkpoint."""
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int):
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _loader(views: Views, batches, workers: int, pin: bool = False) -> DataLoader:
    # the default generator belongs to the step: a resumed run must not draw from it
    return DataLoader(views, batch_sampler=batches, num_workers=workers, pin_memory=pin,
                      worker_init_fn=_start_worker, generator=torch.Generator())


def _checked(loader, bad):
    try:
        for seen, targets, broken in loader:
            bad.check(broken)
            yield seen, targets
    except UserError as error:  # a worker's message has its traceback before it: keep the one line
        raise UserError(str(error).rsplit("UserError: ")[-1].rstrip()) from None


def stream_loader(
    images, views, stream, *, start, stop, rank=0, world=1, accum=1, workers=0, pin=False,
    bad=None, of=Views
):
    """Micro-batches of steps start to stop as (views, targets), views a list of tensors.

    bad: a BadImages counter; without one, the first broken picture is an error. of: the dataset.
    """
    if stream.batch % (world * accum):
        what = f"batch {stream.batch} of the {stream.name} stream is not divisible by {world}"
        raise UserError(f"{what} processes x --accum-steps {accum}; change --batch-size")
    of_stream = of(images, views, stream.seed, stream.name, stream.positions)
    loader = _loader(of_stream, _Share(stream, start, stop, rank, world, accum), workers, pin)
    yield from _checked(loader, bad or BadImages(images))


def eval_loader(images, view, batch, *, rank=0, world=1, workers=0, bad=None, of=Views):
    """(pictures, targets), every picture once over all processes, in shards of any length."""
    share = [(0, i, i) for i in range(rank, len(images), world)]
    batches = [share[i : i + batch] for i in range(0, len(share), batch)]
    loader = _loader(of(images, [view], 0, "eval", np.arange(len(images))), batches, workers)
    for seen, targets in _checked(loader, bad or BadImages(images)):
        yield seen[0], targets
