"""What `appliance bench task` found, as one page for a browser: plots drawn here, nothing fetched, light and dark.

Numbers are those of the medians; distributions and timelines are of one round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from appliance.core.policies import APPLIANCE, COSERVE
from appliance.lab import paper
from appliance.lab.contenders import ALL
from appliance.lab.laps import Lap, Stay
from appliance.lab.pages import (
    ROW,
    WIDTH,
    Bar,
    Curve,
    Marked,
    Scale,
    bars,
    curves,
    document,
    drawing,
    label,
    notes,
    seconds,
    section,
    table,
    tile,
)
from appliance.lab.plain import PLAIN

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def page(found: Mapping[str, Any], laps: Sequence[Lap]) -> str:
    """One file of HTML, which is also XML."""
    rows = found["policies"]
    by_policy = {lap.policy: lap for lap in laps}
    ordered = [by_policy[row["policy"]] for row in rows]
    experts, gap = f"{found['experts']} experts of {found['shape']}", f"{found['gap_seconds'] * 1e3:g} ms"
    budget = f"{found['budget_bytes'] / found['weights_bytes']:.0%}"
    content = f"""<h1>{escape(experts)}, served from {budget} of their memory</h1>
<p>{found["requests"]:,} pictures, one every {gap}; {found["checked_share"]:.0%} go on to one of two detectors;
{found["cores"]} cores, {escape(found["runtime"])}, disk {found["disk_bytes_per_second"] / 1e9:.2f} GB/s.
Every policy in turn, live: real sessions, real reads, the memory budget enforced.</p>
<div class="tiles">{"".join(_tiles(rows))}</div>
{section("Throughput", "Pictures answered per second; the line is a box that holds everything.", _throughput(rows))}
{_by_budget(found)}
{section("Loads", "Experts brought from the disk; the line is what no policy can do without.", _loads(rows))}
{section("Waiting", _WAITING, _waits(ordered))}
{section("Who is in memory", _RESIDENCY, "".join(_timelines(by_policy, found["experts"])))}
{section("Numbers", _rounds(found["pairs"]), _table(rows))}
{section("How it was measured", "", _notes(found))}"""
    return document(f"{experts} in {budget} of their memory", content)


_MEMORY = (
    "Pictures per second over the share of the experts that memory holds; the line is a box that holds everything."
)
_WAITING = "From a picture to its verdict: nine tenths of them, the middle half, and the median."
_RESIDENCY = (
    "Each line is an expert while it is in memory, the most asked at the top, the detectors at the bottom; "
    "pale are those that were there at the start. Time in seconds."
)


def _rounds(count: int) -> str:
    return "One round." if count == 1 else f"Medians of {count} rounds, every other one in reverse order."


def _kind(policy: str) -> str:
    return {APPLIANCE.name: "ours", PLAIN: "plain", ALL: "bound"}.get(policy, "other")


def _tiles(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    rates = {row["policy"]: row["images_per_second"] for row in rows}
    ours = next((row for row in rows if row["policy"] == APPLIANCE.name), None)
    if ours is None:
        return
    yield tile(f"{ours['fraction_of_all_resident']:.0%}", "of the throughput with everything in memory")
    for other, says in ((COSERVE.name, "of CoServe's, on the same loader"), (PLAIN, "of a plain session per expert's")):
        if other in rates:
            yield tile(f"{rates[APPLIANCE.name] / rates[other]:.2f} &#215;", says)
    yield tile(f"{ours['loads']:,}", f"loads, of which {ours['loads_floor']:,} cannot be spared")
    yield tile(seconds(ours["wait_p50_seconds"]), "median wait")


def _throughput(rows: Sequence[Mapping[str, Any]]) -> str:
    bound = _bound(rows)
    return _bars(rows, "images_per_second", lambda row: bound, lambda row: f"{row['images_per_second']:.1f} /s")


def _bound(rows: Sequence[Mapping[str, Any]]) -> float:
    return float(next(row["images_per_second"] for row in rows if row["policy"] == ALL))


def _by_budget(found: Mapping[str, Any]) -> str:
    points = found["by_budget"]
    if len({point["budget_share"] for point in points}) < 2:
        return ""
    return section("Throughput and memory", _MEMORY, _curves(points, _bound(found["policies"])))


def _curves(points: Sequence[Mapping[str, Any]], bound: float) -> str:
    """Images per second over the share of the experts that memory holds, a line per policy."""
    drawn = []
    for policy in dict.fromkeys(point["policy"] for point in points):
        spots = [(p["budget_share"] * 100, p["images_per_second"]) for p in points if p["policy"] == policy]
        drawn.append(Curve(policy, _kind(policy), spots, spots))
    return curves(drawn, " %", " /s", bound=Marked(bound, f"{bound:.1f} /s"))


def _loads(rows: Sequence[Mapping[str, Any]]) -> str:
    return _bars(rows, "loads", lambda row: row["loads_floor"], lambda row: f"{row['loads']:,}")


def _bars(
    rows: Sequence[Mapping[str, Any]],
    name: str,
    mark: Callable[[Mapping[str, Any]], float],
    value: Callable[[Mapping[str, Any]], str],
) -> str:
    return bars([Bar(row["policy"], _kind(row["policy"]), row[name], value(row), mark(row)) for row in rows])


def _waits(laps: Sequence[Lap]) -> str:
    scale = Scale(max(lap.wait_seconds(_QUANTILES[-1]) for lap in laps))
    drawn = []
    for number, lap in enumerate(laps):
        top, kind = number * ROW, _kind(lap.policy)
        low, lower, middle, upper, high = (scale.at(lap.wait_seconds(share)) for share in _QUANTILES)
        centre = top + ROW / 2
        drawn.append(label(lap.policy, top))
        drawn.append(f'<line class="{kind}" x1="{low:.1f}" x2="{high:.1f}" y1="{centre}" y2="{centre}"/>')
        drawn.append(
            f'<rect class="{kind}" x="{lower:.1f}" y="{top + 7}" width="{max(upper - lower, 1):.1f}" '
            f'height="{ROW - 14}" rx="2"/>'
        )
        drawn.append(f'<line class="mark" x1="{middle:.1f}" x2="{middle:.1f}" y1="{top + 4}" y2="{top + ROW - 4}"/>')
        shown = seconds(lap.wait_seconds(0.5))
        drawn.append(f'<text x="{WIDTH - 4}" y="{top + 17}" text-anchor="end">{shown}</text>')
    return drawing(len(laps) * ROW, scale, drawn, " s")


def _timelines(laps: Mapping[str, Lap], experts: int) -> Iterable[str]:
    shown = [laps[name] for name in (APPLIANCE.name, COSERVE.name, PLAIN) if name in laps] or list(laps.values())[:3]
    scale = Scale(max(lap.seconds for lap in shown))
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
        drawn.append(label(lap.policy, height / 2 - 13))
        drawn.append(
            f'<text class="soft" x="{WIDTH - 4}" y="{height / 2 + 4}" text-anchor="end">{lap.loads:,} loads</text>'
        )
        yield drawing(height, scale, drawn, " s")


def _ranks(experts: int) -> dict[str, int]:
    names = [*(paper.classifier(rank) for rank in range(experts)), *paper.DETECTOR_BYTES]
    return {name: number for number, name in enumerate(names)}


def _path(stays: Sequence[Stay], scale: Scale, ranks: Mapping[str, int], height: float) -> str:
    return "".join(
        f"M{scale.at(stay.began_seconds):.1f} {(ranks[stay.expert] + 0.5) * height / len(ranks):.1f}"
        f"H{max(scale.at(stay.ended_seconds), scale.at(stay.began_seconds) + 0.5):.1f}"
        for stay in stays
    )


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
            seconds(row["wait_p50_seconds"]),
            seconds(row["wait_p99_seconds"]),
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"{row['cpu_seconds']:.1f} s",
        )
        for row in rows
    ]
    return table(heads, ((_kind(line[0]), line) for line in lines))


def _notes(found: Mapping[str, Any]) -> str:
    said = [
        "One expert per architecture was compiled; the others are copies of it with segment files of their own, whose "
        "weights differ in the last bits. What they answer means nothing: the task says what goes on to a detector.",
        "Every policy began with as many experts in memory as its budget holds, the most probable first. Policies of "
        "CoServe's paper have a memory pool per executor, as published; ours has one for all.",
        "segments: our loader, direct reads past the page cache. plain: an InferenceSession per expert, the least "
        "recently used leave, the better of two thread settings; what a session takes was measured, its model files "
        "are in the page cache, which is to its favour.",
        *(f"{row['policy']}: {row['how']}." for row in found["policies"]),
    ]
    return notes(said)
