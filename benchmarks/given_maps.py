"""torchcam's metrics judge maps by its own extractors; this lets them judge any."""

import contextlib


class GivenMaps:
    """As much of a torchcam extractor as its metrics use; the maps are given."""

    def __init__(self, model, maps):
        self.model, self.maps = model, maps

    def __call__(self, *arguments, **options):
        return [self.maps]

    def fuse_cams(self, maps):
        return maps[0]

    def _hooks_off(self):
        return contextlib.nullcontext()
