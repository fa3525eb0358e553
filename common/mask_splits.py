"""Which training pictures of a segmentation set are labelled, by the flags of all scripts.

Any layout of split_lists.py names them: bare ids of VOC or Cityscapes, or a picture and a mask a
line. The mask column is only checked, for paths that leave the data: which folder masks come from
is the layout's affair, so a list that says SegmentationClass serves SegmentationClassAug too.
"""

import numpy as np

from common import flags
from common.data import DataSet
from common.mask_layouts import MASKED
from common.masks import PairSet
from common.pictures import Images
from common.splits import Split, split_of


def as_images(data: PairSet) -> DataSet:
    """The training part as flags.choose_split knows it: target 0 with a mask, -1 without."""
    targets = np.where(data.train.has_mask, 0, -1)
    return DataSet(Images(data.train.ids, targets, data.train.root), None, MASKED)


def choose_split(args, data: PairSet, pool: str, percent: float) -> Split:
    """As flags.choose_split, for pictures with masks: --labels P counts percent of the pictures
    that have a mask, --num-labels N pictures, --labels-file L [U] reads lists."""
    drawn = args.labels_file or args.labels is not None or args.num_labels is not None
    if data.labeled is not None and not drawn:  # images/unlabeled/ says what is not labelled
        images = as_images(data).train
        ids = [images.name(i) for i in range(len(images))]
        return split_of("images/train and images/unlabeled", ids, images.targets, MASKED,
                        data.labeled, None, pool)
    return flags.choose_split(args, as_images(data), pool, percent)
