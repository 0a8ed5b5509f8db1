"""Data for training a segmentation network: files, generated images, augmentation, class balance and pictures."""

from fastseg.data.balance import class_frequencies, class_weights
from fastseg.data.config import DataConfig, Splits, open_splits
from fastseg.data.dataset import MaskDataset
from fastseg.data.errors import DataError
from fastseg.data.files import read_image
from fastseg.data.labels import CAMVID_CLASSES, CAMVID_IGNORE_INDEX, PairReader, read_label_map
from fastseg.data.pairs import LAYOUTS, Pair, find_layout, find_pairs, images_by_stem
from fastseg.data.pictures import PALETTES, colorize, overlay, palette, save_mask, with_legend
from fastseg.data.shapes import ShapesDataset
from fastseg.data.summary import Summary
from fastseg.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Augment, Normalize

__all__ = [
    "CAMVID_CLASSES",
    "CAMVID_IGNORE_INDEX",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "LAYOUTS",
    "PALETTES",
    "Augment",
    "DataConfig",
    "DataError",
    "MaskDataset",
    "Normalize",
    "Pair",
    "PairReader",
    "ShapesDataset",
    "Splits",
    "Summary",
    "class_frequencies",
    "class_weights",
    "colorize",
    "find_layout",
    "find_pairs",
    "images_by_stem",
    "open_splits",
    "overlay",
    "palette",
    "read_image",
    "read_label_map",
    "save_mask",
    "with_legend",
]
