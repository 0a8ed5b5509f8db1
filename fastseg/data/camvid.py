"""What CamVid's label numbers mean: names, colours and the ignored label, in SegNet's order."""

CAMVID_CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)

CAMVID_IGNORE_INDEX = 11  # "void": pixels that the annotators left unlabelled

CAMVID_COLORS = (  # RGB, one for each of CAMVID_CLASSES, as in SegNet's published pictures
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)
