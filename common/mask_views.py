"""Pictures and masks through one random draw; measures, windows and pictures of segmentation."""

from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.utils import draw_segmentation_masks

from common.class_names import IGNORE
from common.masks import Pairs
from common.pictures import read_or_next
from common.streams import eval_loader, own_draws, seed_everything, seed_of, stream_loader


class PairViews(Dataset):
    """items (pass, place, position) -> (output of each view, position, position if broken or -1).

    A view is called as view(picture, mask), both PIL ("RGB" and "L"), and draws once for both; it
    returns whatever a batch can be made of. with_masks=False: no mask is opened, views get None.
    Seeds, and the replacement of a broken picture or mask, are those of streams.Views.
    """

    def __init__(self, pairs: Pairs, views: list, seed: int, stream: str, positions: np.ndarray,
                 with_masks: bool = True):
        self.pairs, self.views, self.seed, self.stream = pairs, views, seed, stream
        self.positions, self.with_masks = positions, with_masks

    def _read(self, i: int):
        picture = self.pairs.pil(i)
        return picture, self.pairs.mask(i, picture.size) if self.with_masks else None

    def __getitems__(self, keys):
        with own_draws():
            return [self[key] for key in keys]

    def __getitem__(self, key):
        pass_, place, i = key
        (picture, mask), i, broken = read_or_next(self._read, i, self.positions)
        seed_everything(seed_of(self.seed, self.stream, pass_, place))
        return tuple(view(picture, mask) for view in self.views), i, broken


def pair_loader(pairs, views, stream, *, with_masks=True, **how):
    """streams.stream_loader for pairs: yields (outputs of the views, positions in pairs)."""
    of = partial(PairViews, with_masks=with_masks)
    return stream_loader(pairs, views, stream, of=of, **how)


def pair_eval_loader(pairs, view, batch=1, *, with_masks=True, **how):
    """streams.eval_loader for pairs: (output of the view, positions), every pair once over all
    processes. batch 1 serves pictures of any size."""
    return eval_loader(pairs, view, batch, of=partial(PairViews, with_masks=with_masks), **how)


# ----- measures -----------------------------------------------------------------------------------


def confusion(pred: Tensor, target: Tensor, num_classes: int, ignore: int = IGNORE) -> Tensor:
    """(K, K) int64, on their device: pixels of true class (row) that were given a class (column).

    pred, target: ids 0 to K - 1 (target also ignore) of one shape and any integer type. Matrices of
    batches and processes add up exactly.
    """
    k = num_classes
    place = target.long() * k + pred.long()
    place = torch.where(target == ignore, k * k, place)  # one place more, cut off: no indexing
    return torch.bincount(place.flatten(), minlength=k * k + 1)[: k * k].view(k, k)


def iou(matrix: Tensor) -> Tensor:
    """(K,) float64 in [0, 1]: intersection over union of each class of a `confusion` matrix; nan
    for a class that is in no mask and no prediction."""
    matrix = matrix.cpu().double()  # some devices have no float64
    both = matrix.diagonal()
    return both / (matrix.sum(0) + matrix.sum(1) - both)


def mean_iou(matrix: Tensor) -> Tensor:
    """() float64 in [0, 1]: mean of `iou` over the classes that occur."""
    return iou(matrix).nanmean()


def windows(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """(top, left) of square windows over a picture; the last of each row and column is shifted
    inside. A side shorter than the crop has one window, at 0: pad the picture."""

    def starts(size):
        last = max(size - crop, 0)
        return [min(k * stride, last) for k in range(-(-last // stride) + 1)]

    return [(top, left) for top in starts(height) for left in starts(width)]


# ----- pictures -----------------------------------------------------------------------------------


def save_mask(mask: Tensor, path, palette: np.ndarray):
    """A png whose pixels are the ids of mask (H, W) and whose palette (256, 3) shows colours: it is
    a mask again when it is read."""
    image = Image.fromarray(mask.cpu().numpy().astype(np.uint8))
    image.putpalette(palette.tobytes())
    image.save(path)


def colours(masks: Tensor, palette: np.ndarray) -> Tensor:
    """Masks (..., H, W) -> (..., 3, H, W) uint8 in the colours of a palette (256, 3)."""
    return torch.from_numpy(palette)[masks.cpu().long()].movedim(-1, -3)


def overlay(picture: Tensor, mask: Tensor, palette: np.ndarray, alpha: float = 0.6,
            clear=(IGNORE,)) -> Tensor:
    """(3, H, W) uint8: a picture (3, H, W) uint8 with a mask (H, W) over it; ids of clear show the
    picture alone."""
    ids = [i for i in mask.unique().tolist() if i not in clear]
    if not ids:
        return picture
    each = torch.stack([mask == i for i in ids])
    of_class = [tuple(palette[i].tolist()) for i in ids]
    return draw_segmentation_masks(picture, each, alpha=alpha, colors=of_class)
