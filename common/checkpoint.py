"""Checkpoints that survive a kill, a full disk and a flipped bit; weights files; stop signals."""

import argparse
import os
import pickle
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

from common.splits import UserError

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.prev.pt"
_broken = set()  # newest checkpoints that could not be read: the next save must not keep those


def save(folder: Path, state: dict):
    """Write folder/checkpoint.pt, keeping the one before as checkpoint.prev.pt.

    At every moment a complete checkpoint exists under one of the two names: the new one is written
    and synced beside them, then two renames move it into place. A failed write leaves nothing.
    """
    new, part = folder / NEWEST, folder / (NEWEST + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if new.exists() and new.resolve() not in _broken:
            os.replace(new, folder / PREVIOUS)
        os.replace(part, new)
        _broken.discard(new.resolve())
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into the latter
        part.unlink(missing_ok=True)
        kept = next((n for n in (NEWEST, PREVIOUS) if (folder / n).exists()), None)
        state = f"{folder / kept} is intact" if kept else "there is no earlier checkpoint"
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--output {folder}: checkpoint cannot be written ({reason}); {state}. "
            f"Make room, then --resume {folder}"
        ) from None


def save_weights(file: Path, content: dict, metadata: dict | None = None):
    """A weights file, all of it or nothing: safetensors by its name, else by torch.save.

    Raises UserError where it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # comes with timm

    part = file.with_name(file.name + ".part")
    try:
        if file.suffix == ".safetensors":
            save_file(content, part, metadata=metadata)
        else:
            torch.save(content, part)
        os.replace(part, file)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk: each has its own class
        part.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"--output {file.parent}: {file.name} cannot be written ({reason}); "
                        f"make room, then --resume {file.parent}") from None


def load_newest(folder: Path, tidy: bool = True) -> dict:
    """The newest checkpoint that is whole; says so when that is not the newest. Raises UserError.

    tidy: a half-written file that a kill left is removed; not where the run may be going on.
    """
    if tidy:
        (folder / (NEWEST + ".part")).unlink(missing_ok=True)
    reasons = []
    for name in (NEWEST, PREVIOUS):
        if not (folder / name).exists():
            continue
        try:
            state = read(folder / name)
        except UserError as error:
            reasons.append(str(error))
            _broken.add((folder / name).resolve())
            continue
        for reason in reasons:
            print(f"warning: {reason}; continuing from {folder / name}", file=sys.stderr)
        return state
    raise UserError("; ".join(reasons) or f"--resume {folder}: no checkpoint there")


def read(path: Path) -> dict:
    """A file of torch.save or safetensors; never executed, each record's checksum verified."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # comes with timm

            return load_file(path)
        if zipfile.is_zipfile(path):  # files before torch 1.6 are plain pickles without checksums
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken:
                raise zipfile.BadZipFile(f"checksum of {broken} is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):  # published files hold flags
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ")
        if "Unsupported " in reason or "GLOBAL" in reason:  # torch's text goes on to ways around it
            reason = "it holds code or objects, never executed here; ask for a plain state dict"
        raise UserError(f"{path} cannot be read: {reason}") from None
    except Exception as error:  # truncated, flipped, not a checkpoint: each library has its class
        reason = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
        raise UserError(f"{path} cannot be read: {reason}") from None


def rng_states() -> list[dict]:
    """The state of the generators that a step draws from, of every process, in order of rank."""
    mine = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        mine["cuda"] = torch.cuda.get_rng_state()
    if not dist.is_initialized():
        return [mine]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def restore_rng(states: list[dict], rank: int, fallback_seed: int):
    """Back to the saved draws; a process that was not there then starts from its own seed."""
    if rank < len(states):
        torch.set_rng_state(states[rank]["cpu"])
        if "cuda" in states[rank] and torch.cuda.is_available():
            torch.cuda.set_rng_state(states[rank]["cuda"])
    else:
        torch.manual_seed(fallback_seed)


def differences(saved: dict, now: dict) -> list[str]:
    """Settings that are not equal, as `name: saved -> now`, for refusing a resume."""
    keys = sorted(saved.keys() | now.keys())
    return [f"{k}: {saved.get(k)} -> {now.get(k)}" for k in keys if saved.get(k) != now.get(k)]


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint of this step; a second one ends at once.

    A batch system and torchrun may each send the first one: for two seconds it counts as one,
    unless a person presses Ctrl-C again. Exit code: 128 + the signal's number,
    143, 130 or 138 (Linux).
    """

    def __init__(self):
        self.number = 0
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._ask)

    def _ask(self, number, _):
        now = time.monotonic()
        if not self.number:
            self.number, self.since = number, now
        elif number == signal.SIGINT or now > self.since + 2:
            raise SystemExit(128 + number)

    def asked(self) -> int:
        """The signal's number, agreed between processes: it reaches them at different steps."""
        if self.group is None:
            return self.number
        number = torch.tensor(self.number)  # on the CPU, through gloo: the device is not waited for
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        return int(number)
