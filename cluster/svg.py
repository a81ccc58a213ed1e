"""The parts of an SVG drawing: no script, no style of their own beyond class names.

Invariant: every text is escaped (tests/cluster/test_report.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup


def draw_svg(width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    """Returns a drawing; its label is for a screen reader."""
    head = Markup('<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">')
    return head.format(width, height, width, height, label) + Markup("").join(parts) + Markup("</svg>")


def draw_line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """Draws a straight line of a class."""
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        kind, x1, y1, x2, y2
    )


def draw_circle(x: float, y: float, radius: float, kind: str, title: str = "") -> Markup:
    """Draws a disc of a class, with a title that a pointer brings up."""
    inside = Markup("<title>{}</title>").format(title) if title else Markup("")
    return (
        Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}">').format(kind, x, y, radius)
        + inside
        + Markup("</circle>")
    )


def draw_text(x: float, y: float, text: str, kind: str) -> Markup:
    """Writes text from a point on; classes ``middle`` and ``end`` anchor it there instead."""
    # Markup.format escapes its arguments.
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, text)
