"""Result of a comparison: means, bootstrap intervals and wins, as Markdown, CSV or a notebook's table.

found.mean("SCAN", "deletion"), found.interval("SCAN", "deletion"), found.win("deletion")["SCAN"]["Grad-CAM"]
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from scanlib.metrics.removal import compute_win


def _bootstrap(values: Tensor, draws: int, seed: int) -> tuple[float, float]:
    """Return the bootstrap 95 % interval of the mean of values (N,)."""
    drawn = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed), device="cpu")
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu")).tolist()
    return low, high


@dataclass(repr=False)
class Comparison:
    """Result of ``compare``: values[explainer][metric] is (N,), one value per image; maps (N, H, W) and curves (N, K) likewise.

    better: 1 if high is good, -1 if low is. milliseconds: per image, of the explainer alone. note: printed below the table.
    """

    values: dict[str, dict[str, Tensor]]
    better: dict[str, int]
    milliseconds: dict[str, float]
    maps: dict[str, Tensor]
    curves: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    note: str = ""
    seed: int = 0

    def mean(self, explainer: str, metric: str) -> float:
        """Return the mean over the images, without nan."""
        return float(self.values[explainer][metric].double().nanmean())

    def interval(self, explainer: str, metric: str, draws: int = 2000) -> tuple[float, float]:
        """Return the bootstrap 95 % interval of the mean, for other images of the same kind; nan with fewer than two values."""
        values = self.values[explainer][metric].double()
        values = values[~values.isnan()]
        return _bootstrap(values, draws, self.seed) if len(values) > 1 else (float("nan"), float("nan"))

    def win(self, metric: str) -> dict[str, dict[str, float]]:
        """Return win %: on how many images the row's explainer is better than the column's; a tie counts half for each.

        Images where one of the two is nan do not count; without any other image the entry is nan.
        """
        costs = {name: -self.better[metric] * each[metric] for name, each in self.values.items()}
        return {a: {b: float(compute_win(costs[a], costs[b]).nanmean()) for b in costs if b != a} for a in costs}

    def leader(self, metric: str) -> str:
        """Return the name with the best mean, or "" if all are nan. If it is a baseline, doubt the metric or the explainers.

        The row "ceiling" does not count: it is no explainer.
        """
        means = {name: self.better[metric] * self.mean(name, metric) for name in self.values if name != "ceiling"}
        return max((name for name, mean in means.items() if mean == mean), key=lambda name: means[name], default="")

    def leaders(self, metric: str, draws: int = 2000) -> list[str]:
        """Return the leader and all that tie with it: the bootstrap 95 % interval of the difference, image by image, holds 0."""
        explainers = {name: each[metric].double() for name, each in self.values.items() if name != "ceiling"}
        best, tied = self.leader(metric), []
        for name in explainers if best else ():
            difference = explainers[name] - explainers[best]
            difference = difference[~difference.isnan()]
            low, high = _bootstrap(difference, draws, self.seed) if len(difference) > 1 else (1.0, 1.0)
            if name == best or low <= 0 <= high:
                tied.append(name)
        return tied

    def rows(self) -> list[dict[str, float | str]]:
        """Return the table as it is saved: mean, low and high of every metric, and the time."""
        rows = []
        for name in self.values:
            row: dict[str, float | str] = {"explainer": name}
            for metric in self.better:
                low, high = self.interval(name, metric)
                row |= {metric: self.mean(name, metric), f"{metric} low": low, f"{metric} high": high}
            rows.append(row | {"ms per image": self.milliseconds.get(name, float("nan"))})
        return rows

    def to_csv(self, path: str | Path) -> None:
        """Write ``rows`` in full precision."""
        rows = self.rows()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """Return means ± half the width of the 95 % interval, ``leaders`` bold; also write it to ``path`` if given.

        The column of times is left out if no time was measured.
        """
        heads = ["map", *(f"{metric} ({'high' if way > 0 else 'low'})" for metric, way in self.better.items())]
        heads += ["ms per image"] if self.milliseconds else []
        lines = [" | ".join(heads), "|".join("---" for _ in heads)]
        leaders = {metric: self.leaders(metric) for metric in self.better}
        for name in self.values:
            cells = [name.replace("|", "\\|")]
            for metric in self.better:
                digits, (low, high) = 1 if "%" in metric else 3, self.interval(name, metric)
                half = f" ± {(high - low) / 2:.{digits}f}" if low == low else ""
                text = f"{self.mean(name, metric):.{digits}f}{half}"
                cells.append(f"**{text}**" if name in leaders[metric] else text)
            if self.milliseconds:
                taken = self.milliseconds.get(name)
                cells.append("-" if taken is None else f"{taken:.{0 if taken >= 10 else 1}f}")
            lines.append(" | ".join(cells))
        text = "\n".join(f"| {line} |" for line in lines) + (f"\n\n{self.note}\n" if self.note else "\n")
        if path is not None:
            Path(path).write_text(text, "utf-8", newline="\n")
        return text

    __repr__ = _repr_markdown_ = to_markdown
