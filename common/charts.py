"""Bars beside each other."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed, or used


def bars(groups: dict[str, dict[str, float]], path: Path, title: str = ""):
    """A bar for each name and group, {group: {name: value}}; over the last group's bars their gain
    over the first group's. A nan leaves its place empty."""
    from matplotlib import pyplot as plt

    names, width = list(next(iter(groups.values()))), 0.8 / len(groups)
    figure, axis = plt.subplots(figsize=(max(5.0, 0.6 * len(names) + 2), 3.4))
    places = np.arange(len(names))
    for k, (group, values) in enumerate(groups.items()):
        heights = [values[n] for n in names]
        axis.bar(places + (k - (len(groups) - 1) / 2) * width, heights, width, label=group)
    if len(groups) > 1:
        first, *_, last = groups.values()
        for place, name in zip(places, names):
            if np.isfinite(first[name]) and np.isfinite(last[name]):
                top = max(first[name], last[name])
                axis.annotate(f"{last[name] - first[name]:+.1f}", (place, top), ha="center",
                              va="bottom", fontsize=7)
    rotation = 0 if max(map(len, names)) < 4 else 60
    axis.set_xticks(places, names, fontsize=8, rotation=rotation,
                    ha="right" if rotation else "center")
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=7, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
