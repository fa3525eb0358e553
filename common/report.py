"""Pictures and tables of a run: contact sheets, curves, predictions, costs."""

import csv
import hashlib
import json
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

matplotlib.use("Agg")  # no display is needed, or used


def contact_sheet(rows: dict[str, Tensor], path: Path, title: str = ""):
    """One labelled row of pictures each: rows {label: (N, 3, H, W) float in [0, 1]}."""
    from matplotlib import pyplot as plt

    count = max(len(v) for v in rows.values())
    size = (1 + count, 1.15 * len(rows) + 0.4)
    figure, axes = plt.subplots(len(rows), figsize=size, squeeze=False)
    for axis, (label, pictures) in zip(axes[:, 0], rows.items()):
        grid = make_grid(pictures.float().cpu().clamp(0, 1), nrow=count, padding=1, pad_value=1.0)
        axis.imshow(to_pil_image(grid), interpolation="nearest")
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
        axis.set_xticks([]), axis.set_yticks([])
        axis.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, bbox_inches="tight", dpi=120)
    plt.close(figure)


def captioned_grid(pictures: Tensor, captions: list[str], path: Path, columns: int = 8):
    """Pictures (N, 3, H, W) uint8 with a line of text under each."""
    from matplotlib import pyplot as plt

    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.8 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, caption in zip(axes.flat, pictures, captions):
        axis.imshow(picture.permute(1, 2, 0), interpolation="nearest")
        axis.set_title(caption, fontsize=8, y=-0.18)
    figure.savefig(path, bbox_inches="tight", dpi=110)
    plt.close(figure)


def band(path: Path, recipe: dict) -> str:
    """What these settings gave before, over seeds: a line from docs/bands.json, if it has them."""
    bands = json.loads(path.read_text()) if path.exists() else {}
    found = bands.get(recipe_hash(recipe))
    if not found:
        return "no reference band for these settings; benchmarks/reproduce.py measures one"
    parts = [f"{stage} {mean:.1f} +- {sd:.1f}" for stage, (mean, sd) in found["top1"].items()]
    return f"expected here ({found['seeds']} seeds, docs/results.md): {', '.join(parts)}"


def recipe_hash(recipe: dict) -> str:
    """Equal for runs that differ in seed and split seed alone."""
    same = {k: v for k, v in recipe.items() if k not in ("seed", "split_seed", "split")}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]


def curves(log: list[dict], path: Path, panels: dict[str, list[str]]):
    """One panel each over the steps of all stages: panels {title: names of logged numbers}."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
    starts, at = {}, 0
    for line in log[1:]:
        if "stage" in line and line["stage"] not in starts:
            starts[line["stage"]] = at
        if "step" in line:
            at = max(at, starts[line["stage"]] + line["step"])
    for axis, (title, names) in zip(axes[0], panels.items()):
        for name in names:
            having = [x for x in log[1:] if x.get(name) is not None and "step" in x]
            points = [(starts[x["stage"]] + x["step"], x[name]) for x in having]
            if points:
                axis.plot(*zip(*points), label=name, lw=1.2)
        for stage, begin in starts.items():
            axis.axvline(begin, color="0.8", lw=0.8, zorder=0)
            at_top = axis.get_xaxis_transform()
            axis.text(begin, 1.0, " " + stage, transform=at_top, fontsize=7, va="top")
        axis.set_title(title, fontsize=10), axis.set_xlabel("updates", fontsize=9)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_predictions(path: Path, files: list[str], probabilities: Tensor, classes: list[str]):
    """A csv: file, then the five most likely classes (or all) with their probabilities."""
    top = probabilities.topk(min(5, len(classes)))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        columns = range(1, top.indices.shape[1] + 1)
        head = [h for k in columns for h in (f"class_{k}", f"probability_{k}")]
        writer.writerow(["file", *head])
        for name, values, indices in zip(files, top.values.tolist(), top.indices.tolist()):
            pairs = [x for v, i in zip(values, indices) for x in (classes[i], f"{v:.4f}")]
            writer.writerow([name, *pairs])


def settings_table(title: str, settings: dict, sources: dict) -> str:
    """Name, value and origin of each setting, aligned."""
    names, values = list(settings), [json.dumps(v) for v in settings.values()]
    width, room = max(map(len, names)), min(28, max(map(len, values)))
    rows = ((n, v, sources.get(n, "")) for n, v in zip(names, values))
    return "\n".join([title, *(f"  {n:<{width}}  {v:<{room}}  {s}".rstrip() for n, v, s in rows)])


def forward_cost(model: nn.Module, shape: tuple[int, ...]) -> tuple[float, float]:
    """(FLOPs, bytes kept for backward in float32) of one forward; use a model on "meta"."""
    from torch.utils.flop_counter import FlopCounterMode

    kept = {}  # one entry per storage: several views of an activation are kept once

    def keep(t):
        kept[t.untyped_storage()._cdata] = t
        return t

    x = torch.empty(shape, device=next(model.parameters()).device)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    saved = sum(t.untyped_storage().nbytes() for i, t in kept.items() if i not in own)
    return float(counter.get_total_flops()), float(saved)
