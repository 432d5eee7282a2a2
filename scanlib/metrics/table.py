"""What a comparison found, as a table: means, bootstrap intervals, who beats whom; Markdown, CSV, a notebook's cell.

found.mean("SCAN", "deletion"), found.interval("SCAN", "deletion"), found.win("deletion")["SCAN"]["Grad-CAM"]
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from scanlib.metrics.removal import compute_win


@dataclass(repr=False)
class Comparison:
    """What ``compare`` found. values[explainer][metric] is (N,), one figure per picture; maps and curves likewise.

    better: 1 where high is good, -1 where low is. milliseconds: per image, of the explainer alone.
    """

    values: dict[str, dict[str, Tensor]]
    better: dict[str, int]
    milliseconds: dict[str, float]
    maps: dict[str, Tensor]
    curves: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    note: str = ""
    seed: int = 0

    def mean(self, explainer: str, metric: str) -> float:
        """Over the pictures where the figure is a number."""
        return float(self.values[explainer][metric].double().nanmean())

    def interval(self, explainer: str, metric: str, draws: int = 2000) -> tuple[float, float]:
        """Bootstrap 95 % interval of the mean: what other pictures of the same kind might have given; nan of a single picture."""
        values = self.values[explainer][metric].double()
        if len(values) < 2:
            return float("nan"), float("nan")
        drawn = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(self.seed))
        low, high = values[drawn].nanmean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high

    def win(self, metric: str) -> dict[str, dict[str, float]]:
        """Win %: on how many pictures the explainer of the row is better than the column's, ties a half each."""
        figures = {name: -self.better[metric] * each[metric] for name, each in self.values.items()}
        return {a: {b: float(compute_win(figures[a], figures[b]).mean()) for b in figures if b != a} for a in figures}

    def leader(self, metric: str) -> str:
        """The best mean, baselines included: one that leads is a warning about the metric, or about the explainers."""
        return max(self.values, key=lambda name: self.better[metric] * self.mean(name, metric))

    def rows(self) -> list[dict[str, float | str]]:
        """The table as it is saved: mean, low and high of every metric, and the time."""
        rows = []
        for name in self.values:
            row: dict[str, float | str] = {"explainer": name}
            for metric in self.better:
                low, high = self.interval(name, metric)
                row |= {metric: self.mean(name, metric), f"{metric} low": low, f"{metric} high": high}
            rows.append(row | {"ms an image": self.milliseconds.get(name, float("nan"))})
        return rows

    def to_csv(self, path: str | Path) -> None:
        """Full precision, one row an explainer."""
        rows = self.rows()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """Means and half the 95 % interval's width; the leader of each column bold. Written to ``path`` if given."""
        arrow = {1: "high", -1: "low"}
        heads = ["map", *(f"{metric} ({arrow[way]})" for metric, way in self.better.items()), "ms an image"]
        lines = [" | ".join(heads), "|".join("---" for _ in heads)]
        leaders = {metric: self.leader(metric) for metric in self.better}
        for row in self.rows():
            cells = [row["explainer"].replace("|", "\\|")]
            for metric in self.better:
                digits = 1 if "%" in metric else 3
                half = (row[f"{metric} high"] - row[f"{metric} low"]) / 2
                text = f"{row[metric]:.{digits}f}" + (f" ± {half:.{digits}f}" if half == half else "")
                cells.append(f"**{text}**" if leaders[metric] == row["explainer"] else text)
            taken = row["ms an image"]
            lines.append(" | ".join([*cells, f"{taken:.{0 if taken >= 10 else 1}f}" if taken == taken else "-"]))
        text = "\n".join(f"| {line} |" for line in lines) + (f"\n\n{self.note}\n" if self.note else "\n")
        if path is not None:
            Path(path).write_text(text, "utf-8", newline="\n")
        return text

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    __repr__ = __str__ = to_markdown
