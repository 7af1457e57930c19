"""How large is report.html, and how long does a browser take to open it?

    python -m benchmarks.report_page                # 12 and 1,000 trials of `toy`

The page is that of a simulated sweep with early stopping; the rows of its trials are files, as after a real one. Time
to make it is from the ledger to the file. Time to open it is the browser's own, from the opening of the file until
the last figure is drawn: the median and the longest of five, each in a fresh Chromium without a GPU.
"""

import argparse
import re
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil

from sweep import page, spec
from sweep.place import Place
from tests import browser, sweeps
from tests.ledgers import swept

OPENINGS = 5


def opening_seconds(report: Path) -> float:
    html, console = browser.dom(report)
    assert not console, console
    drawn = re.search(r'<html[^>]* data-drawn="(\d+)"', html)
    assert drawn, "not every figure was drawn"
    return int(drawn.group(1)) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=(12, 1000))
    asked = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("optuna", "plotly"))
    print(f"{time.strftime('%Y-%m-%d')}, {psutil.cpu_count()} cores, {packages}")
    print("trials   MB   s to make   s to open   longest")
    for trials in asked.trials:
        with tempfile.TemporaryDirectory() as directory:
            space = Path(directory, "toy.yaml")
            space.write_text(sweeps.TOY)
            toy = spec.load(space, ["search.sampler=random", f"search.trials={trials}"])
            status = swept(toy, Place.at(f"{directory}/sweeps/toy"))
            began = time.monotonic()
            page.write(status)
            made = time.monotonic() - began
            report = status.place.paths.report
            opened = [opening_seconds(report) for _ in range(OPENINGS)]
            size, usual, longest = report.stat().st_size / 1e6, statistics.median(opened), max(opened)
            print(f"{trials:6,} {size:4.1f} {made:11.1f} {usual:11.1f} {longest:9.1f}", flush=True)


if __name__ == "__main__":
    main()
