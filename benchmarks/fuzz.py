"""Run the cases of tests/test_fuzz.py many times: `python benchmarks/fuzz.py --examples 10000 --seed 0`.

Prints how many maps were right and how many cases were refused. A failing case is printed by hypothesis.
"""

import argparse
import collections
import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.test_fuzz import check_example


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--longest", type=int, default=512, help="largest side of an image")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: collections.Counter = collections.Counter()
    bar = tqdm(total=options.examples)

    @seed(options.seed)
    @settings(
        max_examples=options.examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # a failing case is shown as it is; to make it smaller takes minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        counts[check_example(data.draw, options.longest)] += 1
        bar.update()

    run()
    bar.close()
    for kind, count in counts.most_common():
        print(f"{count:6} {kind}")


if __name__ == "__main__":
    main()
