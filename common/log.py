"""Run folders, log.jsonl, progress, and one clear line instead of a traceback for bad input."""

import errno
import functools
import json
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.runs import find_run, new_run, read_log, versions  # noqa: F401  scripts: log.read_log
from common.splits import UserError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def clear_errors(main):
    """Decorator of a script's main: bad input ends in one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            said = str(error)
        except OSError as error:  # of a log or a picture; a checkpoint's own error says more
            if error.errno not in UNWRITABLE:
                raise
            said = f"--output cannot be written ({error}); make room, then go on with --resume"
        print(f"error: {said}", file=sys.stderr)
        raise SystemExit(2)

    return run


class RunLog:
    """log.jsonl and the terminal; on every process but the first it does nothing.

    A checkpoint stores `size`; a resumed run cuts the file back to it, so the log has no gap and no
    repetition. Numbers between two prints are kept on the device and averaged when printed: the
    only moment at which the host waits for it.
    """

    def __init__(self, folder: Path, size: int | None, enabled: bool = True):
        self.file, self.bar, self.kept = None, None, []
        if enabled:
            self.file = open(folder / "log.jsonl", "ab")
            if size is not None:
                self.file.truncate(size)
                self.file.seek(0, os.SEEK_END)  # else `size` is the old end until the next write
        self.started = self.waited = 0.0

    @property
    def size(self) -> int:
        return self.file.tell() if self.file else 0

    def write(self, line: dict):
        if self.file:
            self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()

    def say(self, text: str):
        if self.file:
            shown = self.bar is not None and not self.bar.disable
            tqdm.write(text) if shown else print(text, flush=True)

    def start(self, stage: str, step: int, steps: int, kept: list, device, quicker: str = ""):
        """A stage begins, or goes on, at `step` of `steps`; kept: `unprinted` of the checkpoint;
        quicker: said when it would take hours."""
        if self.bar is not None:
            self.bar.close()
        shown = self.file is not None and sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=step, desc=stage, disable=not shown, leave=False)
        self.kept = [{k: v.to(device) for k, v in numbers.items()} for numbers in kept]
        self.waited, self.started = 0.0, time.perf_counter()
        self.stage, self.steps, self.timed = stage, steps, 0
        self.quicker, self.second = quicker, step + 2

    def wait(self, batches):
        """Iterate over a loader, adding up the time that the step waits for data."""
        batches = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - began
            yield batch

    def add(self, step: int, numbers: dict):
        """Keep a step's numbers (0-dim, on the device). After two, says how long it will take."""
        self.kept.append({k: v.detach().float() for k, v in numbers.items()})
        self.timed += 1
        self.bar.update()
        if step == self.second - 1:
            self.one = time.perf_counter()  # the first update also warms up
        elif step == self.second and self.file:
            seconds = (time.perf_counter() - self.one) * (self.steps - step)
            hours = seconds > 7200
            text = f"{seconds / 3600:.1f} hours" if hours else f"{seconds / 60:.1f} minutes"
            more = f"; quicker: {self.quicker}" if hours and self.quicker else ""
            self.say(f"{self.stage}: about {text} here{more}")

    def unprinted(self) -> list[dict]:
        """Numbers since the last print, for the checkpoint: the next line averages all of them."""
        return [{k: v.cpu() for k, v in numbers.items()} for numbers in self.kept]

    def report(self, stage: str, step: int, images: int, **more):
        """Write and print averages since the last call, with speed, waiting, memory, ETA."""
        names = list(self.kept[0])
        stacked = torch.stack([torch.stack([k[n] for n in names]) for k in self.kept])
        means = stacked.cpu().double().mean(0).tolist()  # the only wait for the device
        line = dict(stage=stage, step=step, **dict(zip(names, means)), **more)
        seconds = time.perf_counter() - self.started
        rate = seconds / max(1, self.timed)
        line["images_per_s"] = round(images / rate, 1)
        line["data_wait"] = round(self.waited / seconds, 4)
        if torch.cuda.is_available():
            line["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        line["eta_s"] = round((self.steps - step) * rate, 1)
        self.kept, self.timed, self.waited, self.started = [], 0, 0.0, time.perf_counter()
        self.write(line)
        hidden = {"stage", "step"} | ({"bad_images"} if not line.get("bad_images") else set())
        shown = (f"{k} {v:.4g}" for k, v in line.items() if k not in hidden)
        self.say(f"{stage} {step:>6}/{self.steps}  " + "  ".join(shown))

    def evaluation(self, stage: str, step: int, results: dict, seconds: float):
        """Write and print an evaluation; the seconds it took do not count as training."""
        self.started += seconds
        self.write(dict(stage=stage, step=step, **results))
        shown = "  ".join(f"{k} {v:.2f}" for k, v in results.items())
        self.say(f"{stage} {step:>6}/{self.steps}  {shown}")

    def close(self):
        if self.bar is not None:
            self.bar.close()
        if self.file:
            self.file.close()
