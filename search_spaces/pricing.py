"""How far off are the prices? For `metric:` of a sweep whose completions are prices in dollars."""

import re
import statistics
from collections.abc import Sequence

CLOSE = 0.2
"""Of the price: an answer that is no further off counts as close."""


def errors(prompts: Sequence[str], references: Sequence[str], completions: Sequence[str]) -> dict[str, float]:
    """Mean absolute error in dollars, and the share of answers within 20 % of the price.

    The price is the first number of a text; an answer without one counts as 0 dollars. Raises ValueError when a
    reference has none.
    """
    prices = [_price(reference) for reference in references]
    if None in prices:
        raise ValueError(f"the reference {references[prices.index(None)]!r} has no price")
    pairs = [(price, _price(answer) or 0.0) for price, answer in zip(prices, completions, strict=True) if price]
    off = [abs(answer - price) for price, answer in pairs]
    return {
        "mean absolute error, $": statistics.mean(off),
        "share within 20 %": statistics.mean(
            float(each <= CLOSE * price) for each, (price, _) in zip(off, pairs, strict=True)
        ),
    }


def _price(text: str) -> float | None:
    """The first number, with or without commas between thousands."""
    found = re.search(r"\d[\d,]*(?:\.\d+)?", text)
    return float(found[0].replace(",", "")) if found else None
