"""Names and colours of the classes of the segmentation sets, in the order of their class ids."""

import numpy as np

IGNORE = 255  # in a mask: this pixel has no class and counts nowhere

VOC = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
 motorbike person pottedplant sheep sofa train tvmonitor""".split()
CITYSCAPES = """road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,
terrain,sky,person,rider,car,truck,bus,train,motorcycle,bicycle""".replace("\n", "").split(",")
COCO = """void,person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,
fire hydrant,stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,
backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,
baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,
banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,
dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush
""".replace("\n", "").split(",")
CAMVID = """sky building pole road pavement tree sign fence car pedestrian bicyclist""".split()
DIGITS = ["ground", *map(str, range(10))]

# Cityscapes is published with label ids; training and evaluation know 19 of these 34.
CITYSCAPES_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def lookup(changes: dict[int, int], other: int | None = None) -> np.ndarray:
    """(256,) uint8: class id of each value in a mask's file; other: of the rest, None: itself."""
    table = np.arange(256) if other is None else np.full(256, other)
    table[list(changes)] = list(changes.values())
    return table.astype(np.uint8)


def voc_palette() -> np.ndarray:
    """(256, 3) uint8: bits 0, 3, 6 of an id are the top bits of its red; 1, 4, 7 green; blue."""
    ids = np.arange(256)
    rgb = np.zeros((256, 3), np.uint8)
    for place in range(3):
        for channel in range(3):
            rgb[:, channel] |= ((ids >> (3 * place + channel) & 1) << (7 - place)).astype(np.uint8)
    return rgb


def palette(name: str) -> np.ndarray:
    """(256, 3) uint8 RGB of a set: its usual colours, else those of VOC for any number of ids."""
    rgb = voc_palette()
    own = {
        "cityscapes": "804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4"
        " dc143c ff0000 00008e 000046 003c64 005064 0000e6 770b20",
        "camvid": "808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0",
        "digits": "202020 e6194b 3cb44b ffe119 4363d8 f58231 911eb4 46f0f0 f032e6 bcf60c 9a6324",
    }.get(name)
    if own:
        rgb[:] = 0
        colours = [[*bytes.fromhex(colour)] for colour in own.split()]
        rgb[: len(colours)] = colours
        rgb[IGNORE] = 224, 224, 192  # as VOC has it
    return rgb
