"""What `appliance bench task` found, as one page for a browser: plots drawn here, nothing fetched, light and dark.

Numbers are those of the medians; distributions and timelines are of one round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from math import floor, log10
from typing import Any

from appliance.core.policies import APPLIANCE, COSERVE
from appliance.lab import paper
from appliance.lab.contenders import ALL
from appliance.lab.laps import Lap, Stay
from appliance.lab.plain import PLAIN

_WIDTH, _LABELS, _VALUES, _ROW = 720, 120, 90, 26
_PLOT = _WIDTH - _LABELS - _VALUES
_CURVES, _LINE = 220, 14
_TICKS = 5
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

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
.tile b { display: block; font-size: 26px; line-height: 1.3; color: var(--ink); font-weight: 600; }
svg { display: block; margin-bottom: 8px; width: 100%; min-width: 560px; height: auto; }
svg { font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .soft { fill: var(--soft); }
svg .grid { stroke: var(--line); } svg .mark { stroke: var(--ink); stroke-width: 2; }
.ours { fill: var(--ours); stroke: var(--ours); } .plain { fill: var(--plain); stroke: var(--plain); }
.bound { fill: var(--bound); stroke: var(--bound); } .other { fill: var(--other); stroke: var(--other); }
svg rect, svg circle { stroke: none; } svg path[d] { fill: none; } svg path.curve { stroke-width: 2; }
svg path.first { opacity: 0.4; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: 5px 8px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
tr.ours td:first-child { color: var(--ours); font-weight: 600; }
li { color: var(--soft); margin-bottom: 4px; } ul { padding-left: 20px; margin: 8px 0 0; }
"""


def page(found: Mapping[str, Any], laps: Sequence[Lap]) -> str:
    """One file of HTML, which is also XML."""
    rows = found["policies"]
    by_policy = {lap.policy: lap for lap in laps}
    ordered = [by_policy[row["policy"]] for row in rows]
    experts, gap = f"{found['experts']} experts of {found['shape']}", f"{found['gap_seconds'] * 1e3:g} ms"
    budget = f"{found['budget_bytes'] / found['weights_bytes']:.0%}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{escape(experts)} in {budget} of their memory</title><style>{_STYLE}</style></head>
<body><main>
<h1>{escape(experts)}, served from {budget} of their memory</h1>
<p>{found["requests"]:,} pictures, one every {gap}; {found["checked_share"]:.0%} go on to one of two detectors;
{found["cores"]} cores, {escape(found["runtime"])}, disk {found["disk_bytes_per_second"] / 1e9:.2f} GB/s.
Every policy in turn, live: real sessions, real reads, the memory budget enforced.</p>
<div class="tiles">{"".join(_tiles(rows))}</div>
{_section("Throughput", "Pictures answered per second; the line is a box that holds everything.", _throughput(rows))}
{_by_budget(found)}
{_section("Loads", "Experts brought from the disk; the line is what no policy can do without.", _loads(rows))}
{_section("Waiting", _WAITING, _waits(ordered))}
{_section("Who is in memory", _RESIDENCY, "".join(_timelines(by_policy, found["experts"])))}
{_section("Numbers", _rounds(found["pairs"]), _table(rows))}
{_section("How it was measured", "", _notes(found))}
</main></body></html>
"""


_MEMORY = (
    "Pictures per second over the share of the experts that memory holds; the line is a box that holds everything."
)
_WAITING = "From a picture to its verdict: nine tenths of them, the middle half, and the median."
_RESIDENCY = (
    "Each line is an expert while it is in memory, the most asked at the top, the detectors at the bottom; "
    "pale are those that were there at the start. Time in seconds."
)


def _section(title: str, says: str, content: str) -> str:
    return f"<section><h2>{title}</h2><p>{says}</p>{content}</section>"


def _rounds(count: int) -> str:
    return "One round." if count == 1 else f"Medians of {count} rounds, every other one in reverse order."


def _kind(policy: str) -> str:
    return {APPLIANCE.name: "ours", PLAIN: "plain", ALL: "bound"}.get(policy, "other")


def _tiles(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    rates = {row["policy"]: row["images_per_second"] for row in rows}
    ours = next((row for row in rows if row["policy"] == APPLIANCE.name), None)
    if ours is None:
        return
    yield _tile(f"{ours['fraction_of_all_resident']:.0%}", "of the throughput with everything in memory")
    for other, says in ((COSERVE.name, "of CoServe's, on the same loader"), (PLAIN, "of a plain session per expert's")):
        if other in rates:
            yield _tile(f"{rates[APPLIANCE.name] / rates[other]:.2f} &#215;", says)
    yield _tile(f"{ours['loads']:,}", f"loads, of which {ours['loads_floor']:,} cannot be spared")
    yield _tile(_seconds(ours["wait_p50_seconds"]), "median wait")


def _tile(value: str, says: str) -> str:
    return f'<div class="tile"><b>{value}</b>{escape(says)}</div>'


def _throughput(rows: Sequence[Mapping[str, Any]]) -> str:
    bound = _bound(rows)
    return _bars(rows, "images_per_second", lambda row: bound, lambda row: f"{row['images_per_second']:.1f} /s")


def _bound(rows: Sequence[Mapping[str, Any]]) -> float:
    return float(next(row["images_per_second"] for row in rows if row["policy"] == ALL))


def _by_budget(found: Mapping[str, Any]) -> str:
    points = found["by_budget"]
    if len({point["budget_share"] for point in points}) < 2:
        return ""
    return _section("Throughput and memory", _MEMORY, _curves(points, _bound(found["policies"])))


def _curves(points: Sequence[Mapping[str, Any]], bound: float) -> str:
    """Images per second over the share of the experts that memory holds, a line per policy."""
    across = _Scale(max(point["budget_share"] for point in points) * 100)
    top = max(bound, *(point["images_per_second"] for point in points))
    drawn = [
        f'<line class="mark" x1="{_LABELS}" x2="{_LABELS + _PLOT}" y1="{_rise(bound, top):.1f}" '
        f'y2="{_rise(bound, top):.1f}"/>',
        f'<text x="{_LABELS - 8}" y="{_rise(bound, top) + 4:.1f}" text-anchor="end">{bound:.1f} /s</text>',
    ]
    ends: list[tuple[float, float, str]] = []
    for policy in dict.fromkeys(point["policy"] for point in points):
        spots = [
            (across.at(p["budget_share"] * 100), _rise(p["images_per_second"], top), p["images_per_second"])
            for p in points
            if p["policy"] == policy
        ]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in spots)
        drawn.append(f'<path class="curve {_kind(policy)}" d="M{line}"/>')
        drawn += [
            f'<circle class="{_kind(policy)}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{rate:.1f} /s</title></circle>'
            for x, y, rate in spots
        ]
        ends.append((spots[-1][1], spots[-1][0], policy))
    below = 0.0
    for y, x, policy in sorted(ends):
        below = max(y + 4, below + _LINE)  # lines that end beside each other are named below each other
        drawn.append(f'<text x="{x + 8:.1f}" y="{below:.1f}">{escape(policy)}</text>')
    return _drawing(_CURVES, across, drawn, " %")


def _rise(value: float, top: float) -> float:
    return _CURVES - value / top * (_CURVES - 12)


def _loads(rows: Sequence[Mapping[str, Any]]) -> str:
    return _bars(rows, "loads", lambda row: row["loads_floor"], lambda row: f"{row['loads']:,}")


def _bars(
    rows: Sequence[Mapping[str, Any]],
    name: str,
    mark: Callable[[Mapping[str, Any]], float],
    value: Callable[[Mapping[str, Any]], str],
) -> str:
    scale = _Scale(max(max(row[name], mark(row)) for row in rows))
    drawn = []
    for number, row in enumerate(rows):
        top, end = number * _ROW, scale.at(row[name])
        drawn.append(_label(row["policy"], top))
        drawn.append(
            f'<rect class="{_kind(row["policy"])}" x="{_LABELS}" y="{top + 5}" width="{max(end - _LABELS, 1):.1f}" '
            f'height="{_ROW - 10}" rx="2"><title>{escape(row["policy"])}: {value(row)}</title></rect>'
        )
        at = scale.at(mark(row))
        drawn.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{top + 2}" y2="{top + _ROW - 2}"/>')
        drawn.append(f'<text x="{_WIDTH - 4}" y="{top + 17}" text-anchor="end">{value(row)}</text>')
    return _drawing(len(rows) * _ROW, scale, drawn)


def _waits(laps: Sequence[Lap]) -> str:
    scale = _Scale(max(lap.wait_seconds(_QUANTILES[-1]) for lap in laps))
    drawn = []
    for number, lap in enumerate(laps):
        top, kind = number * _ROW, _kind(lap.policy)
        low, lower, middle, upper, high = (scale.at(lap.wait_seconds(share)) for share in _QUANTILES)
        centre = top + _ROW / 2
        drawn.append(_label(lap.policy, top))
        drawn.append(f'<line class="{kind}" x1="{low:.1f}" x2="{high:.1f}" y1="{centre}" y2="{centre}"/>')
        drawn.append(
            f'<rect class="{kind}" x="{lower:.1f}" y="{top + 7}" width="{max(upper - lower, 1):.1f}" '
            f'height="{_ROW - 14}" rx="2"/>'
        )
        drawn.append(f'<line class="mark" x1="{middle:.1f}" x2="{middle:.1f}" y1="{top + 4}" y2="{top + _ROW - 4}"/>')
        shown = _seconds(lap.wait_seconds(0.5))
        drawn.append(f'<text x="{_WIDTH - 4}" y="{top + 17}" text-anchor="end">{shown}</text>')
    return _drawing(len(laps) * _ROW, scale, drawn, " s")


def _timelines(laps: Mapping[str, Lap], experts: int) -> Iterable[str]:
    shown = [laps[name] for name in (APPLIANCE.name, COSERVE.name, PLAIN) if name in laps] or list(laps.values())[:3]
    scale = _Scale(max(lap.seconds for lap in shown))
    height, ranks = 170, _ranks(experts)
    for lap in shown:
        first = [stay for stay in lap.stays if stay.began_seconds == 0]
        later = [stay for stay in lap.stays if stay.began_seconds > 0]
        thick = max(height / len(ranks) * 0.9, 0.6)
        drawn = [
            f'<path class="stays {_kind(lap.policy)} {name}" stroke-width="{thick:.2f}" '
            f'd="{_path(stays, scale, ranks, height)}"/>'
            for name, stays in (("first", first), ("later", later))
            if stays
        ]
        end = scale.at(lap.seconds)
        drawn.append(f'<line class="grid" x1="{end:.1f}" x2="{end:.1f}" y1="0" y2="{height}"/>')
        drawn.append(_label(lap.policy, height / 2 - 13))
        drawn.append(
            f'<text class="soft" x="{_WIDTH - 4}" y="{height / 2 + 4}" text-anchor="end">{lap.loads:,} loads</text>'
        )
        yield _drawing(height, scale, drawn, " s")


def _ranks(experts: int) -> dict[str, int]:
    names = [*(paper.classifier(rank) for rank in range(experts)), *paper.DETECTOR_BYTES]
    return {name: number for number, name in enumerate(names)}


def _path(stays: Sequence[Stay], scale: _Scale, ranks: Mapping[str, int], height: float) -> str:
    return "".join(
        f"M{scale.at(stay.began_seconds):.1f} {(ranks[stay.expert] + 0.5) * height / len(ranks):.1f}"
        f"H{max(scale.at(stay.ended_seconds), scale.at(stay.began_seconds) + 0.5):.1f}"
        for stay in stays
    )


class _Scale:
    """From nothing to the largest value, across the plot, with round ticks."""

    def __init__(self, largest: float) -> None:
        self._largest = max(largest, 1e-9)
        rough = self._largest / _TICKS
        unit = 10.0 ** floor(log10(rough))
        self.step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough)

    def at(self, value: float) -> float:
        return _LABELS + min(value / self._largest, 1.0) * _PLOT

    def ticks(self) -> list[float]:
        return [number * self.step for number in range(int(self._largest / self.step) + 1)]


def _label(policy: str, top: float) -> str:
    return f'<text x="{_LABELS - 8}" y="{top + 17}" text-anchor="end">{escape(policy)}</text>'


def _drawing(height: float, scale: _Scale, drawn: Iterable[str], unit: str = "") -> str:
    grid = [
        f'<line class="grid" x1="{scale.at(tick):.1f}" x2="{scale.at(tick):.1f}" y1="0" y2="{height}"/>'
        f'<text class="soft" x="{scale.at(tick):.1f}" y="{height + 16}" text-anchor="middle">{tick:g}{unit}</text>'
        for tick in scale.ticks()
    ]
    return f'<svg viewBox="0 0 {_WIDTH} {height + 24}" role="img">{"".join(grid)}{"".join(drawn)}</svg>'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("policy", "loader", "images/s", "of all in memory", "loads", "floor", "wait p50", "p99", "weights", "CPU")
    lines = [
        (
            row["policy"],
            row["loader"],
            f"{row['images_per_second']:.1f}",
            f"{row['fraction_of_all_resident']:.1%}",
            f"{row['loads']:,}",
            f"{row['loads_floor']:,}",
            _seconds(row["wait_p50_seconds"]),
            _seconds(row["wait_p99_seconds"]),
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"{row['cpu_seconds']:.1f} s",
        )
        for row in rows
    ]
    body = "".join(
        f'<tr class="{_kind(line[0])}">{"".join(f"<td>{escape(cell)}</td>" for cell in line)}</tr>' for line in lines
    )
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{body}</table>"


def _notes(found: Mapping[str, Any]) -> str:
    notes = [
        "One expert per architecture was compiled; the others are copies of it with segment files of their own, whose "
        "weights differ in the last bits. What they answer means nothing: the task says what goes on to a detector.",
        "Every policy began with as many experts in memory as its budget holds, the most probable first. Policies of "
        "CoServe's paper have a memory pool per executor, as published; ours has one for all.",
        "segments: our loader, direct reads past the page cache. plain: an InferenceSession per expert, the least "
        "recently used leave, the better of two thread settings; what a session takes was measured, its model files "
        "are in the page cache, which is to its favour.",
        *(f"{row['policy']}: {row['how']}." for row in found["policies"]),
    ]
    return f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"
