"""Features of the regions of training images, which their codes are fitted on: what a Ray Data task does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from simla_ray.config.schema import Run
from simla_ray.data.augment import evaluation_view, to_array
from simla_ray.data.decode import DropRow, decode
from simla_ray.data.index import Index
from simla_ray.data.regions import WHOLE, RegionMaker, region_columns
from simla_ray.data.sources import read_rows

#: images (n, 3, px, px) uint8, boxes (n, R, 4) float32 -> (n, R, d) float32
RegionFeaturise = Callable[[np.ndarray, np.ndarray], np.ndarray]


class RegionReader:
    """Stretches of ``ordinals`` in, (n, d) features of the regions of their images out.

    Args:
        featurise: makes them from images; not asked where they are a column.
    """

    def __init__(self, run: Run, index: Index, ordinals: np.ndarray, featurise: RegionFeaturise):
        self.run, self.index, self.ordinals, self.featurise = run, index, ordinals, featurise

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        make, columns = RegionMaker(self.run), ("uid", "image", *region_columns(self.run))
        for first, last in zip(batch["first"].tolist(), batch["last"].tolist(), strict=True):
            images, found = [], []
            for unit, places, _ in self.index.locate(self.ordinals[first:last]):
                for row in read_rows(unit, places, columns, self.index.roots):
                    try:
                        regions = make(row, np.array(WHOLE), False)
                        if "regions" not in regions:
                            images.append(self._view(row["image"]))
                        found.append(regions)
                    except DropRow:
                        continue  # counted where it is trained on
            if not found:
                continue
            there = np.arange(len(found[0]["region_boxes"])) < np.stack([r["n_regions"] for r in found])[:, None]
            if images:
                features = self.featurise(np.stack(images), np.stack([r["region_boxes"] for r in found]))
            else:
                features = np.stack([r["regions"] for r in found])
            yield {"features": features[there]}

    def _view(self, image: object) -> np.ndarray:
        decoded = decode(image, self.run.data.max_pixels)  # type: ignore[arg-type]
        return to_array(evaluation_view(decoded, self.run.vision.image_px))
