"""Data for training a segmentation network: files, generated images, augmentation, class balance and pictures."""

from fastseg.data.balance import class_frequencies, class_weights
from fastseg.data.camvid import CAMVID_CLASSES, CAMVID_COLORS, CAMVID_IGNORE_INDEX
from fastseg.data.errors import DataError
from fastseg.data.files import MaskDataset, infer_num_classes, read_image
from fastseg.data.pairs import Pair, camvid_layout, find_pairs, images_by_stem
from fastseg.data.pictures import colorize, overlay, palette, save_mask
from fastseg.data.shapes import ShapesDataset
from fastseg.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Augment, Normalize

__all__ = [
    "CAMVID_CLASSES",
    "CAMVID_COLORS",
    "CAMVID_IGNORE_INDEX",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Augment",
    "DataError",
    "MaskDataset",
    "Normalize",
    "Pair",
    "ShapesDataset",
    "camvid_layout",
    "class_frequencies",
    "class_weights",
    "colorize",
    "find_pairs",
    "images_by_stem",
    "infer_num_classes",
    "overlay",
    "palette",
    "read_image",
    "save_mask",
]
