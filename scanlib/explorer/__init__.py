"""The explorer: how do I play with it?"""

from scanlib.explorer.view import FILM_PERCENTILES as FILM_PERCENTILES, MapRenderer as MapRenderer, View as View
from scanlib.explorer.widgets import Explorer as Explorer, TrainingCarousel as TrainingCarousel
