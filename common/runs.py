"""Run folders: new ones, the one to resume, their log's lines, what a number depends on."""

import contextlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from common.splits import UserError


def new_run(script: str, output: str | None, rank: int = 0) -> Path:
    """--output, empty or absent, or the next free runs/SCRIPT-NNN. Raises UserError."""
    if rank:  # only the first process writes
        return Path(output or "runs")
    if output:
        folder = Path(output)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--output {folder} is not empty; name another folder, or "
                            f"--resume {folder} goes on")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {folder}: {error.strerror}; name another folder") from None
        return folder
    try:
        Path("runs").mkdir(exist_ok=True)
        for n in range(1, 100_000):
            folder = Path("runs") / f"{script}-{n:03d}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:  # no permission, or a file of that name
        raise UserError(f"runs/: {error.strerror}; name a folder with --output") from None


def find_run(script: str, recipe: dict) -> Path | None:
    """The newest runs/SCRIPT-NNN with a checkpoint and equal mathematics (--resume auto)."""
    folders = sorted(Path("runs").glob(f"{script}-*"), key=os.path.getmtime, reverse=True)
    saved = (f for f in folders if any(f.glob("checkpoint*.pt")))
    return next((f for f in saved if _settings(f).get("recipe") == recipe), None)


def _settings(folder: Path) -> dict:
    """A log's first line; {} where it is damaged. The last line of a killed run may be torn."""
    try:
        with open(folder / "log.jsonl") as file:
            return json.loads(file.readline())
    except (OSError, ValueError):
        return {}


def read_log(folder: Path) -> list[dict]:
    """All lines of a run's log.jsonl; the first holds its settings. Raises UserError."""
    path = Path(folder) / "log.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return lines if isinstance(lines[0], dict) else lines[0]["?"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not the log of a run: {error}") from None


def versions() -> dict:
    """What a number depends on: Python, the libraries, the commit, the hardware."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    asked = [*git, "rev-parse", "HEAD"], [*git, "status", "--porcelain", "-uno"]
    try:
        said = [subprocess.run(a, capture_output=True, text=True).stdout.strip() for a in asked]
        commit = said[0] + ("+changes" if said[1] else "")
    except OSError:
        commit = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    libraries = {n: version(n) for n in ("torch", "torchvision", "timm", "numpy")}
    hardware = gpu or f"cpu, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return libraries | dict(python=sys.version.split()[0], commit=commit or None, hardware=hardware)
