"""Data sets: Signs, collages, folders of images, and the data sets of the SCOUTER paper."""

from scanlib.data.collages import Collages as Collages
from scanlib.data.photos import PhotoFolder as PhotoFolder, RandomParts as RandomParts, read_image as read_image
from scanlib.data.published import CUB200 as CUB200, MNIST as MNIST, ConText as ConText, ImageNetSubset as ImageNetSubset
from scanlib.data.signs import SHAPES as SHAPES, Scene as Scene, Signs as Signs
