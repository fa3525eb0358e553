"""Checkpoints that survive a kill, a full disk and a flipped bit; weights files; stop signals."""

import os
import pickle
import signal
import sys
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

from common.splits import UserError

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.prev.pt"


def save(folder: Path, state: dict):
    """Write folder/checkpoint.pt, keeping the one before as checkpoint.prev.pt.

    At every moment a complete checkpoint exists under one of the two names: the new one is written
    and synced beside them, then two renames move it into place. A failed write leaves nothing behind.
    """
    new, part = folder / NEWEST, folder / (NEWEST + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if new.exists():
            os.replace(new, folder / PREVIOUS)
        os.replace(part, new)
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        part.unlink(missing_ok=True)
        kept = next((n for n in (NEWEST, PREVIOUS) if (folder / n).exists()), None)
        state = f"{folder / kept} is intact" if kept else "there is no earlier checkpoint"
        raise UserError(
            f"--output {folder}: checkpoint cannot be written ({error}); {state}. Make room, then --resume {folder}"
        ) from None


def load_newest(folder: Path) -> dict:
    """The newest checkpoint that is whole; says so when that is not the newest. Raises UserError."""
    (folder / (NEWEST + ".part")).unlink(missing_ok=True)
    reasons = []
    for name in (NEWEST, PREVIOUS):
        if not (folder / name).exists():
            continue
        try:
            state = read(folder / name)
        except UserError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            print(f"warning: {reason}; continuing from {folder / name}", file=sys.stderr)
        return state
    raise UserError("; ".join(reasons) or f"--resume {folder}: no checkpoint there")


def read(path: Path) -> dict:
    """A file of torch.save or safetensors, never executed, every record's checksum verified first."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # comes with timm

            return load_file(path)
        if zipfile.is_zipfile(path):  # files older than torch 1.6 are plain pickles without checksums
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken:
                raise zipfile.BadZipFile(f"checksum of {broken} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ")[:160]
        if "Unsupported global" in reason or "GLOBAL" in reason:
            reason = "it holds code or objects, which are never executed; ask for a plain state dict"
        raise UserError(f"{path} cannot be read: {reason}") from None
    except Exception as error:  # truncated, flipped, not a checkpoint: each library has its own class
        raise UserError(
            f"{path} cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from None


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
    """Back to the saved draws; a process that was not there at the save starts from its own seed."""
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
    """SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint of the current step; a second one ends at once.

    Exit code 128 + the signal's number: 143, 130 or 138 (Linux).
    """

    def __init__(self):
        self.number = 0
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._ask)

    def _ask(self, number, _):
        if self.number:
            raise SystemExit(128 + number)
        self.number = number

    def asked(self) -> int:
        """The signal's number, agreed between processes (a signal reaches them at different steps)."""
        if self.group is None:
            return self.number
        number = torch.tensor(self.number)  # on the CPU, through gloo: the device is not waited for
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        return int(number)
