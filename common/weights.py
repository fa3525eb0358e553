"""Weights files of other projects: find the format, rename the keys, load all or refuse."""

import re
from pathlib import Path

from torch import nn

from common import checkpoint
from common.splits import UserError


def read_init(path: str) -> dict:
    """The content of --init FILE, or of a run's folder. Raises UserError."""
    file = Path(path) / checkpoint.NEWEST if Path(path).is_dir() else Path(path)
    if file.name == checkpoint.NEWEST:
        if not any(file.parent.glob("checkpoint*.pt")):
            raise UserError(f"--init {path}: no checkpoint in that folder; give a run or a file")
        return checkpoint.load_newest(file.parent, tidy=False)  # the run may be going on
    if file.name == "model.safetensors" and (file.parent / "log.jsonl").exists():
        raise UserError(f"--init {path}: a run of this project; give its folder, {file.parent}")
    if not file.exists():
        raise UserError(f"--init {path}: no such file; the README's table names the published ones")
    return checkpoint.read(file)


def rename(state: dict, enter: list[str], patterns: list[tuple[str, str | None]]) -> dict:
    """Enter the keys in turn; rename by the first pattern that fits a whole key, None drops it.

    Raises UserError where a key holds something else than weights by name.
    """
    for key in enter:
        state = state[key]
        if not isinstance(state, dict):
            raise UserError(f"--init: {key!r} of the file holds no weights by name, but a "
                            f"{type(state).__name__}")
    weights = {}
    for name, value in state.items():
        for pattern, replacement in patterns:
            match = re.fullmatch(pattern, name)
            if match:
                name = match.expand(replacement) if replacement else None
                break
        if name is not None:
            weights[name] = value
    return weights


def load_exactly(model: nn.Module, weights: dict, may_miss: set[str], what: str):
    """Load; only `may_miss` may be missing, nothing left over. Raises UserError with the keys."""
    own = model.state_dict()
    wrong = [k for k in weights if k in own and weights[k].shape != own[k].shape]
    if wrong:
        raise UserError(
            f"{what}: {wrong[0]} has shape {tuple(weights[wrong[0]].shape)}, the model needs"
            f" {tuple(own[wrong[0]].shape)} ({len(wrong)} such); choose the --arch of the file"
        )
    missing, extra = own.keys() - weights.keys() - may_miss, weights.keys() - own.keys()
    if missing or extra:
        raise UserError(
            f"{what} does not fit the model: {len(missing)} missing {sorted(missing)[:4]},"
            f" {len(extra)} left over {sorted(extra)[:4]}; choose the --arch of the file"
        )
    model.load_state_dict(weights, strict=False)
