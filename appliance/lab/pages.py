"""How reports for a browser look: one style, and plots drawn as SVG here; nothing fetched, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

WIDTH, LABELS, VALUES, ROW = 720, 120, 90, 26
PLOT = WIDTH - LABELS - VALUES
_CURVES, _ABOVE, _LINE = 220, 12, 14
_TICKS = 5

_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #ffffff; --ink: #1b1b19; --soft: #62625c; --line: #dddcd6;
  --ours: #2a78d6; --plain: #c9541c; --bound: #62625c; --other: #8d9aab; }
@media (prefers-color-scheme: dark) { :root { --page: #141413; --card: #1e1e1c; --ink: #f1f0ec; --soft: #a5a49c;
  --line: #383833; --ours: #4d97ee; --plain: #ec7d48; --bound: #a5a49c; --other: #6b7786; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 820px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 17px; margin: 0 0 2px; }
p { margin: 0 0 12px; color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px;
  margin-top: 18px; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(135px, 1fr)); gap: 12px; margin-top: 18px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px;
  color: var(--soft); font-size: 13px; line-height: 1.35; }
.tile b { display: block; white-space: nowrap; font-size: 26px; line-height: 1.3; color: var(--ink); font-weight: 600; }
svg { display: block; margin-bottom: 8px; width: 100%; min-width: 560px; height: auto; }
svg { font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .soft { fill: var(--soft); }
svg .grid { stroke: var(--line); } svg .mark { stroke: var(--ink); stroke-width: 2; }
.ours { fill: var(--ours); stroke: var(--ours); } .plain { fill: var(--plain); stroke: var(--plain); }
.bound { fill: var(--bound); stroke: var(--bound); } .other { fill: var(--other); stroke: var(--other); }
svg rect, svg circle { stroke: none; } svg path[d] { fill: none; } svg path.curve { stroke-width: 2; }
svg path.first { opacity: 0.4; } svg .here { stroke-dasharray: 3 4; stroke-width: 1; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: 5px 8px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
tr.ours td:first-child { color: var(--ours); font-weight: 600; }
li { color: var(--soft); margin-bottom: 4px; } ul { padding-left: 20px; margin: 8px 0 0; }
"""


def document(title: str, content: str) -> str:
    """One file of HTML, which is also XML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{escape(title)}</title><style>{_STYLE}</style></head>
<body><main>
{content}
</main></body></html>
"""


def section(title: str, says: str, content: str) -> str:
    return f"<section><h2>{title}</h2><p>{says}</p>{content}</section>"


def tile(value: str, says: str) -> str:
    return f'<div class="tile"><b>{value}</b>{escape(says)}</div>'


class Scale:
    """From nothing to the largest value, across the plot unless told otherwise, with round ticks."""

    def __init__(self, largest: float, begin: float = LABELS, length: float = PLOT, ticks: int = _TICKS) -> None:
        self._largest, self._begin, self._length = max(largest, 1e-9), begin, length
        rough = self._largest / ticks
        unit = 10.0 ** floor(log10(rough))
        self.step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough)

    def at(self, value: float) -> float:
        return self._begin + min(value / self._largest, 1.0) * self._length

    def ticks(self) -> list[float]:
        return [number * self.step for number in range(int(self._largest / self.step) + 1)]


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of `bars`; `mark` is a line across it, such as a bound. `kind` is a class of the style: a colour."""

    name: str
    kind: str
    value: float
    shown: str
    mark: float | None = None


def bars(rows: Sequence[Bar]) -> str:
    scale = Scale(max(max(row.value, row.mark or 0.0) for row in rows))
    drawn = []
    for number, row in enumerate(rows):
        top, end = number * ROW, scale.at(row.value)
        drawn.append(label(row.name, top))
        drawn.append(
            f'<rect class="{row.kind}" x="{LABELS}" y="{top + 5}" width="{max(end - LABELS, 1):.1f}" '
            f'height="{ROW - 10}" rx="2"><title>{escape(row.name)}: {row.shown}</title></rect>'
        )
        if row.mark is not None:
            at = scale.at(row.mark)
            drawn.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{top + 2}" y2="{top + ROW - 2}"/>')
        drawn.append(f'<text x="{WIDTH - 4}" y="{top + 17}" text-anchor="end">{row.shown}</text>')
    return drawing(len(rows) * ROW, scale, drawn)


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of `curves`, in order; a line joins them, or lies beside them, or there is none, and then only who points
    at one sees the name."""

    name: str
    kind: str
    points: Sequence[tuple[float, float]]
    line: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Marked:
    """A value that is drawn as a line through the whole plot, and named at its end."""

    value: float
    shown: str


def curves(
    drawn_curves: Sequence[Curve],
    unit: str,
    up_unit: str,
    *,
    bound: Marked | None = None,
    here: Marked | None = None,
    right: float | None = None,
) -> str:
    """Values over values. `bound` is a height and takes the place of the ticks there, `here` a place on the axis."""
    known = [point for curve in drawn_curves for point in (*curve.points, *curve.line)]
    across = Scale(right or max(x for x, _ in known))
    top = max(*(y for _, y in known), bound.value if bound else 0.0)
    up = Scale(top, _CURVES, _ABOVE - _CURVES, ticks=4)
    drawn = [_bound(bound, up)] if bound else [_level(tick, up, up_unit) for tick in up.ticks()[1:]]
    if here is not None:
        at = f"{across.at(here.value):.1f}"
        drawn.append(f'<line class="mark here" x1="{at}" x2="{at}" y1="{_ABOVE}" y2="{_CURVES}"/>')
        drawn.append(f'<text class="soft" dx="6" x="{at}" y="{_CURVES - 8}">{escape(here.shown)}</text>')
    ends: list[tuple[float, float, str]] = []
    for curve in drawn_curves:
        if curve.line:
            path = "L".join(f"{across.at(x):.1f} {up.at(y):.1f}" for x, y in curve.line)
            drawn.append(f'<path class="curve {curve.kind}" d="M{path}"/>')
            x, y = curve.line[-1]
            ends.append((up.at(y), across.at(x), curve.name))
        drawn += [
            f'<circle class="{curve.kind}" cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="4">'
            f"<title>{escape(curve.name)} {y:.1f}{up_unit}</title></circle>"
            for x, y in curve.points
        ]
    below = 0.0
    for y, x, name in sorted(ends):
        below = max(y + 4, below + _LINE)  # lines that end beside each other are named below each other
        drawn.append(f'<text x="{x + 8:.1f}" y="{below:.1f}">{escape(name)}</text>')
    return drawing(_CURVES, across, drawn, unit)


def _bound(bound: Marked, up: Scale) -> str:
    at = up.at(bound.value)
    return (
        f'<line class="mark" x1="{LABELS}" x2="{LABELS + PLOT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text x="{LABELS - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(bound.shown)}</text>'
    )


def _level(tick: float, up: Scale, unit: str) -> str:
    at = up.at(tick)
    return (
        f'<line class="grid" x1="{LABELS}" x2="{LABELS + PLOT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="soft" x="{LABELS - 8}" y="{at + 4:.1f}" text-anchor="end">{tick:g}{unit}</text>'
    )


def label(name: str, top: float) -> str:
    return f'<text x="{LABELS - 8}" y="{top + 17}" text-anchor="end">{escape(name)}</text>'


def drawing(height: float, scale: Scale, drawn: Iterable[str], unit: str = "") -> str:
    grid = [
        f'<line class="grid" x1="{scale.at(tick):.1f}" x2="{scale.at(tick):.1f}" y1="0" y2="{height}"/>'
        f'<text class="soft" x="{scale.at(tick):.1f}" y="{height + 16}" text-anchor="middle">{tick:g}{unit}</text>'
        for tick in scale.ticks()
    ]
    return f'<svg viewBox="0 0 {WIDTH} {height + 24}" role="img">{"".join(grid)}{"".join(drawn)}</svg>'


def table(heads: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Each line with its kind."""
    body = "".join(
        f'<tr class="{kind}">{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>' for kind, cells in lines
    )
    return f"<table><tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>{body}</table>"


def notes(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"
