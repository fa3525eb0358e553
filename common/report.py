"""Pictures and tables of a run: contact sheets, curves, predictions, costs."""

import csv
import hashlib
import json
import os
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from common.amp import available_memory
from common.pictures import pictures_at
from common.splits import UserError
from common.streams import eval_loader

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
    axes[0, 0].set_title(title, fontsize=10)  # not a suptitle, which stays far above many rows
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
    parts = [f"{stage} {mean:.1f} +- {sd:.1f}" for stage, (mean, sd) in found["stages"].items()]
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
        if axis.get_legend_handles_labels()[0]:
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


def predict(source: str, probabilities_of, view, classes: list[str], folder: Path, workers: int):
    """Classify a picture, or all pictures below a folder, into predictions.csv and predictions.png.

    probabilities_of: batch of a view -> (N, K) on the CPU. Raises UserError where nothing is found.
    """
    pictures = pictures_at(source)
    probabilities, shown = [], []
    for seen, _ in eval_loader(pictures, view, 250, workers=workers):
        probabilities.append(probabilities_of(seen))
        shown.append(seen[0][: max(0, 40 - sum(map(len, shown)))])
    probabilities = torch.cat(probabilities)
    csv_file, sheet = folder / "predictions.csv", folder / "predictions.png"
    write_predictions(csv_file, list(map(os.fsdecode, pictures.ids)), probabilities, classes)
    best = zip(*(x.tolist() for x in probabilities.max(1)))
    captioned_grid(torch.cat(shown), [f"{classes[i]} {p:.2f}" for p, i in best], sheet)
    print(f"predictions: {csv_file}, {sheet}")


def settings_table(title: str, settings: dict, sources: dict) -> str:
    """Name, value and origin of each setting, aligned."""
    names, values = list(settings), [json.dumps(v) for v in settings.values()]
    width, room = max(map(len, names)), min(28, max(map(len, values)))
    rows = ((n, v, sources.get(n, "")) for n, v in zip(names, values))
    return "\n".join([title, *(f"  {n:<{width}}  {v:<{room}}  {s}".rstrip() for n, v, s in rows)])


def cost(model: nn.Module, size: int, **how) -> dict[str, float]:
    """What an update costs, from one forward, model(x, **how), on "meta" (nothing is computed).

    Returns per image: flops of a forward, bytes that wait for the backward pass in float32; and
    fixed: bytes of weights, gradients, Adam's two moments and an EMA.
    """
    from torch.utils.flop_counter import FlopCounterMode

    kept = {}  # one entry per storage: several views of an activation are kept once

    def keep(t):
        kept[t.untyped_storage()._cdata] = t
        return t

    own = {p.untyped_storage()._cdata for p in model.parameters()}
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(torch.empty(2, 3, size, size, device=next(model.parameters()).device), **how)
    saved = sum(t.untyped_storage().nbytes() for i, t in kept.items() if i not in own)
    fixed = 20 * sum(p.numel() for p in model.parameters())
    return dict(flops=counter.get_total_flops() / 2, kept=saved / 2, fixed=fixed)


def refuse_too_large(costs: dict, images: int, halved: bool, device, accum: int):
    """A clear line before the first step instead of a crash after the loading. Raises UserError.

    images: of one part of a step; halved: activations are 16-bit.
    """
    per_image = costs["kept"] * (0.5 if halved else 1.0)
    need, room = costs["fixed"] + per_image * images, available_memory(device)
    if need > room:
        left = room - costs["fixed"]
        parts = accum * -(-per_image * images // left) if left > per_image else 0
        remedy = (f"--accum-steps {1 << int(parts - 1).bit_length()}" if parts
                  else "a smaller --arch")
        raise UserError(
            f"--batch-size: {images} images in one part of a step need about "
            f"{need / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are free; {remedy} would fit"
        )
