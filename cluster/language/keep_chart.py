"""The plan of keep policies as a picture: what bytes buy.

Side by side for each teacher and codec: total variation and the student's gradient angle over bytes a token.
Dense stores take hundreds of times the bytes of others, so that they are named in place of drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from schemas.keep_trial import CandidateTrial, KeepPlan, LossTrial, name_policy

_INK: Final = "#1d1f21"
_SOFT: Final = "#6b7075"
_RULE: Final = "#e3e4e2"
_PANEL: Final = (5.2, 3.9)
_DPI: Final = 144
# Below, angles are drawn on a linear scale, which has a 0.
_LINEAR_DEGREES: Final = 0.1


@dataclass(frozen=True, slots=True)
class _Family:
    """Policies that share a colour; those that differ in one number are joined by a line."""

    label: str
    colour: str
    marker: str
    is_hollow: bool = False
    # Of the points' names, in points.
    offset: tuple[int, int] = (0, 7)


# By kind of policy and loss, in the order of the legend.
_FAMILIES: Final = {
    ("top_k", "ghost_kl"): _Family("top k, tail as one token", "#1f5fa8", "o", offset=(-9, -11)),
    ("top_k", "support_kl"): _Family("top k, renormalised", "#1f5fa8", "o", is_hollow=True),
    ("top_p", "ghost_kl"): _Family("top p, tail as one token", "#2a8c82", "s", offset=(-11, -12)),
    ("top_p", "support_kl"): _Family("top p, renormalised", "#2a8c82", "s", is_hollow=True),
    ("sampled", "unbiased_kl"): _Family("sampled", "#b3541e", "^", offset=(16, 5)),
    ("hybrid", "unbiased_kl"): _Family("hybrid", "#8a4fa3", "D", offset=(-18, -12)),
}
_OWN: Final = "the recipe's"
_Measure = Callable[[LossTrial], float | None]


def draw_plan(plan: KeepPlan, path: Path) -> None:
    """Writes the picture as PNG; nothing where no teacher was tried."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not plan.trials:
        return
    rows = [(trial, codec) for trial in plan.trials for codec in trial.codecs]
    size = (2 * _PANEL[0], _PANEL[1] * len(rows) + 0.9)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 2, squeeze=False)
    for (left, right), (trial, codec) in zip(panels, rows, strict=True):
        tried = [one for one in trial.candidates if one.codec == codec]
        _draw_panel(left, tried, _variation)
        left.set_title(f"{trial.teacher}, {codec}: total variation to the whole", loc="left")
        left.set_ylabel("%")
        _draw_panel(right, tried, _angle)
        right.set_title(f"gradient angle, {trial.sample.num_positions:,} positions", loc="left")
        right.set_ylabel("degrees")
        right.set_yscale("symlog", linthresh=_LINEAR_DEGREES, linscale=0.4)
        right.yaxis.set_major_formatter("{x:g}")
        right.set_ylim(0, 180)
        for panel in (left, right):
            panel.set_xlabel("bytes of kept entries a token")
    # The same family has one entry, whichever panels it is in.
    marks = {label: handle for panel in panels.flat for label, handle in _marks(panel)}
    order = [*(family.label for family in _FAMILIES.values()), _OWN]
    labels = [label for label in order if label in marks]
    figure.legend(
        [marks[label] for label in labels], labels, loc="outside lower center", ncols=4, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def _variation(loss: LossTrial) -> float:
    return 100 * loss.total_variation


def _angle(loss: LossTrial) -> float | None:
    return loss.gradient_angle


def _draw_panel(panel: Any, tried: Sequence[CandidateTrial], measure: _Measure) -> None:
    panel.set_xscale("log")
    panel.grid(visible=True, which="major", color=_RULE, linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.tick_params(colors=_SOFT, labelcolor=_INK)
    for (kind, loss), family in _FAMILIES.items():
        points = sorted(_points(tried, kind, loss, measure), key=lambda point: point[0])
        if points:
            _draw_family(panel, family, points)
    for one in tried:
        value = measure(one.losses[0])
        if one.is_recipe and one.policy.kind != "dense" and value is not None:
            panel.scatter(
                one.entry_bytes, value, s=170, facecolors="none", edgecolors=_INK, linewidths=1.3, label=_OWN
            )
        if one.policy.kind == "dense":
            note = f"dense, {one.entry_bytes:,.0f} bytes: 0"
            panel.text(
                0.99, 0.97, note, transform=panel.transAxes, ha="right", va="top", color=_SOFT, fontsize=8
            )
    panel.margins(x=0.12, y=0.12)
    panel.set_ylim(bottom=0)
    _label_bytes(panel)


def _points(
    tried: Sequence[CandidateTrial], kind: str, loss: str, measure: _Measure
) -> Iterator[tuple[float, float, CandidateTrial]]:
    for one in tried:
        for found in one.losses:
            value = measure(found)
            if one.policy.kind == kind and found.loss == loss and value is not None:
                yield one.entry_bytes, value, one


def _draw_family(panel: Any, family: _Family, points: list[tuple[float, float, CandidateTrial]]) -> None:
    face = "white" if family.is_hollow else family.colour
    panel.plot(
        [point[0] for point in points],
        [point[1] for point in points],
        color=family.colour,
        linestyle=(0, (4, 3)) if family.is_hollow else "-",
        linewidth=1.2,
        marker=family.marker,
        markersize=6,
        markerfacecolor=face,
        markeredgecolor=family.colour,
        label=family.label,
        zorder=3,
    )
    if family.is_hollow:
        return
    for x, y, one in points:
        panel.annotate(
            _short_name(one),
            (x, y),
            family.offset,
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color=_SOFT,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )


def _short_name(one: CandidateTrial) -> str:
    policy = one.policy
    match policy.kind:
        case "top_k":
            return str(policy.k)
        case "top_p":
            return f"{policy.p:g}"
        case _:
            return name_policy(policy).partition(" ")[2]


def _label_bytes(panel: Any) -> None:
    """Writes ticks as 50, 200, 100k: powers of ten are not what bytes are thought of in."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
    )
    panel.xaxis.set_minor_formatter(NullFormatter())


def _marks(panel: Any) -> Iterator[tuple[str, Any]]:
    handles, labels = panel.get_legend_handles_labels()
    yield from zip(labels, handles, strict=True)
