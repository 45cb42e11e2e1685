"""Pages that figures are made for: the widths of a venue's column and text, and the smallest font that can be read."""

from dataclasses import dataclass

LEAST_FONT = 7.0
"""Points, at the width a figure is printed in."""
LEAST_PANEL = 2.0
"""Inches of a panel that has an axis of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Venue:
    """A page: inches of one column (of the text where the page has one column), of the text, and of its height."""

    name: str
    column: float
    text: float
    height: float

    @property
    def across(self) -> int:
        """How many panels stand side by side over the whole text."""
        return max(1, min(3, int(self.text / LEAST_PANEL)))

    def width(self, panels: int, *, wide: bool = False) -> float:
        """Inches of a figure of so many panels side by side: one takes a column, several, or a `wide` one, the text."""
        return self.column if panels == 1 and not wide else self.text


# icml2025.sty, neurips_2025.sty; acl.sty is in centimetres: A4, margins of 2.5, 0.6 between columns
VENUES = {
    "icml": Venue(name="icml", column=3.25, text=6.75, height=9.0),
    "neurips": Venue(name="neurips", column=5.5, text=5.5, height=9.0),
    "acl": Venue(name="acl", column=7.7 / 2.54, text=16.0 / 2.54, height=24.7 / 2.54),
}
DEFAULT = VENUES["icml"]


def venue(name: str) -> Venue:
    """The venue of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in VENUES:
        raise ValueError(f"venue {name}: no such venue. Choose from {', '.join(VENUES)}.")
    return VENUES[name]
