"""Explore maps in a notebook: controls that change one ``View``, and a function that draws it."""

from scanlib.explorer.view import FILM_PERCENTILES as FILM_PERCENTILES, MapRenderer as MapRenderer, View as View
from scanlib.explorer.widgets import Explorer as Explorer, TrainingCarousel as TrainingCarousel
