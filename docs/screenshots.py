"""The pictures in docs/, of a sweep that has run: python -m docs.screenshots sweeps/pricer"""

import argparse
import io
import re
import tempfile
import time
from pathlib import Path

from optuna.trial import TrialState

from sweep import page, status
from sweep.progress import Console, Progress
from sweep.study import Entry, read_journal
from tests import browser
from trainables.protocol import Slice

DOCS = Path(__file__).parent
PAGE = 1000
"""Width of a page on a screen, CSS pixels."""
MOMENT = 0.65
"""Share of the ledger that was written when the live table is looked at."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", help="directory of the sweep")
    found = status.look(parser.parse_args().sweep)
    page.write(found)
    report = found.place.paths.report
    browser.screenshot(report, DOCS / "report.png", PAGE, 1050)
    browser.screenshot(report, DOCS / "report-curves.png", PAGE, 1000, "how-they-learned")
    browser.screenshot(report, DOCS / "report-cost.png", PAGE, 1000, "how-the-search-went")
    browser.screenshot(report, DOCS / "report-phone.png", browser.PHONE, 1080)

    screen = console()
    status.show(screen, found)
    picture(screen, f"python -m sweep status {found.place.shown}", DOCS / "status.png")
    live(found)


def live(found: status.Status) -> None:
    """The live table as it was at `MOMENT`, from what the ledger had by then."""
    spec, screen, entries = found.spec, console(), earlier(found)
    dates = [date for e in entries for date in (e.trial.datetime_start, e.trial.datetime_complete) if date]
    progress = Progress(
        console(),
        spec.space.searched,
        spec.search.trials,
        spec.budget.evaluations,
        spec.early_stopping or None,
        spec.verify,
        _began=time.monotonic() - (max(dates) - min(dates)).total_seconds(),
    )
    progress.resumed(entries)
    for entry in entries:
        if entry.state is TrialState.RUNNING:
            progress.started(entry)
            progress.advanced(entry, Slice((), None, None, False, entry.cost.peak_memory))
    screen.print(progress.table())
    picture(screen, f"python -m sweep run search_spaces/{spec.name}.yaml", DOCS / "live.png")


def earlier(found: status.Status) -> list[Entry]:
    """The trials, as the first part of the ledger has them."""
    lines = found.place.paths.ledger.read_bytes().splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as directory:
        journal = Path(directory, "study.log")
        journal.write_bytes(b"".join(lines[: round(MOMENT * len(lines))]))
        return read_journal(journal, found.spec.name).entries()


def console() -> Console:
    return Console(record=True, file=io.StringIO(), width=100, markup=False, emoji=False)


def picture(screen: Console, title: str, png: Path) -> None:
    """What was printed, as a terminal shows it."""
    with tempfile.TemporaryDirectory() as directory:
        svg = Path(directory, "screen.svg")
        svg.write_text(screen.export_svg(title=title))
        _, _, width, height = re.search('viewBox="(.*?)"', svg.read_text()).group(1).split()
        browser.screenshot(svg, png, PAGE, round(PAGE * float(height) / float(width)))


if __name__ == "__main__":
    main()
