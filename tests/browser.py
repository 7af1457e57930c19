"""Pages in a real browser without a screen: Chromium, by its command line."""

import shutil
import subprocess
import tempfile
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""Its program; None where there is none."""
PHONE = 390
"""Width of a phone, CSS pixels."""


def opened(page: Path, *options: str) -> tuple[str, list[str]]:
    """The page when everything on it has run, as HTML, and what it wrote to the console, its errors among it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        assert CHROMIUM is not None, "there is no browser; with Debian: apt-get install chromium"
        done = subprocess.run(
            [
                CHROMIUM,
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"),
                *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
                *("--enable-logging=stderr", *options, page.absolute().as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def dom(page: Path) -> tuple[str, list[str]]:
    """See `opened`."""
    return opened(page, "--dump-dom")


def screenshot(page: Path, png: Path, width: int, height: int, section: str = "") -> None:
    """So many pixels of the page, from its top or that of the section with this id, as a PNG file."""
    with tempfile.TemporaryDirectory() as directory:
        frame = Path(directory, "frame.html")  # a window is never narrower than 500 pixels, a frame is
        style = f"border: 0; width: {width}px; height: {height}px"
        source = f"{page.absolute().as_uri()}{section and '#'}{section}"
        frame.write_text(f'<body style="margin: 0"><iframe src="{source}" style="{style}"></iframe>')
        opened(frame, f"--screenshot={png.absolute()}", f"--window-size={width},{height}")
