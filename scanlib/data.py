"""The data sets in one place: Signs, which is embedded, and PhotoFolder, your own pictures."""

from scanlib.photos import PhotoFolder, read_image
from scanlib.signs import SHAPES, Scene, Signs

__all__ = ["SHAPES", "PhotoFolder", "Scene", "Signs", "read_image"]
