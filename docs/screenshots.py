"""The pictures in docs/, of a sweep that has run: python -m docs.screenshots sweeps/pricer"""

import argparse
import io
import re
import tempfile
from pathlib import Path

from sweep import page, status
from sweep.progress import Console
from tests import browser

DOCS = Path(__file__).parent
PAGE = 1000
"""Width of a page on a screen, CSS pixels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", help="directory of the sweep")
    found = status.look(parser.parse_args().sweep)
    page.write(found)
    report = found.place.paths.report
    browser.screenshot(report, DOCS / "report.png", PAGE, 960)
    browser.screenshot(report, DOCS / "report-curves.png", PAGE, 1000, "how-they-learned")
    browser.screenshot(report, DOCS / "report-cost.png", PAGE, 1000, "how-the-search-went")
    browser.screenshot(report, DOCS / "report-phone.png", browser.PHONE, 1080)

    console = Console(record=True, file=io.StringIO(), width=100, markup=False, emoji=False)
    status.show(console, found)
    with tempfile.TemporaryDirectory() as directory:
        svg = Path(directory, "status.svg")
        svg.write_text(console.export_svg(title=f"python -m sweep status {status.shown(found.place)}"))
        _, _, width, height = re.search('viewBox="(.*?)"', svg.read_text()).group(1).split()
        browser.screenshot(svg, DOCS / "status.png", PAGE, round(PAGE * float(height) / float(width)))


if __name__ == "__main__":
    main()
