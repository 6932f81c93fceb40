"""What a demo came to: all that was said about each of its pictures, what that is worth, and which promises broke.

Values in, values out: brokers, clocks and terminals are elsewhere.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from appliance import samples
from appliance.catalog import Catalog
from appliance.core.types import Outcome
from appliance.lab.boards import Part
from appliance.lab.telling import quantile

_ANSWERS = {outcome.value for outcome in Outcome if outcome.is_answer}
NOISE_BYTES = 4_000_000
"""What the promise of docs/architecture.md leaves for noise beside `anonymous_promise_bytes`."""


@dataclass(slots=True)
class Score:
    """The pictures by request id, and every message about them. What was not asked here is not kept.

    One thread asks, one hears; what is read meanwhile is copied first.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    verdicts: dict[str, Counter[bytes]] = field(default_factory=dict)
    errors: set[str] = field(default_factory=set)

    def ask(self, request_id: str, part: Part) -> None:
        """Before the picture is sent."""
        self.parts[request_id] = part

    def hear(self, payload: bytes) -> None:
        """A message on a result or error topic. A body with an outcome is a verdict, any other is a refusal."""
        try:
            body = json.loads(payload)
            name = str(body["request_id"])
        except (ValueError, TypeError, KeyError):  # published by hand, and not by a box
            return
        if name not in self.parts:
            return
        if "outcome" in body:
            self.verdicts.setdefault(name, Counter())[payload] += 1
        else:
            self.errors.add(name)

    @property
    def answered(self) -> int:
        return len(self.verdicts.keys() | self.errors)

    @property
    def refused(self) -> int:
        """Pictures answered on the error topic only."""
        return len(self.errors - self.verdicts.keys())

    @property
    def different(self) -> int:
        """Pictures with two verdicts that are not the same bytes."""
        return sum(len(bodies) > 1 for bodies in tuple(self.verdicts.values()))

    @property
    def repeated(self) -> int:
        """Verdicts that came again as the same bytes: at-least-once delivery allows it."""
        return sum(bodies.total() - len(bodies) for bodies in tuple(self.verdicts.values()))

    def judged(self) -> Iterator[tuple[Part, Mapping[str, Any]]]:
        """Each picture that has a verdict, with the first one."""
        for name, bodies in tuple(self.verdicts.items()):
            yield self.parts[name], json.loads(next(iter(bodies)))


def closing(
    catalog: Catalog, score: Score, stats: Mapping[str, Any], resident_max: int, waits: Sequence[float], seconds: float
) -> dict[str, Any]:
    """The demo's closing numbers. `stats` are the box's last, `waits` the seconds that each answer took."""
    judged = list(score.judged())
    count = samples.count(samples.Judged(part.truth, body["outcome"] == "fail") for part, body in judged)
    answers = sum(body["outcome"] in _ANSWERS for _, body in judged)
    return {
        "pictures": len(score.parts),
        "verdicts": len(judged),
        "different_verdicts": score.different,
        "repeated_verdicts": score.repeated,
        "refused": score.refused,
        "outcomes": dict(Counter(str(body["outcome"]) for _, body in judged)),
        "defective": count.defective,
        "missed_defects": count.missed,
        "recall": round(count.recall, 4),
        "sound": count.sound,
        "false_alarms": count.false_alarms,
        "false_alarm_rate": round(count.false_alarm_rate, 4),
        "localisation_f": round(_localised(catalog, judged).f, 4),
        "images_per_second": round(answers / seconds, 1) if seconds else 0.0,
        "wait_p50_seconds": round(quantile(waits, 0.5), 4) if waits else None,
        "experts": len(catalog.bundles),
        "experts_used": len({part.component for part in score.parts.values()}),
        "experts_resident_max": resident_max,
        "boards": stats.get("boards", {}).get("verdicts", {}),
        "loads": stats.get("loads"),
        "evictions": stats.get("evictions"),
        "budget_bytes": stats.get("weights_budget_bytes"),
        "peak_weights_bytes": stats.get("weights_peak_bytes"),
        "anonymous_at_start_bytes": stats.get("anonymous_at_start_bytes"),
        "anonymous_peak_bytes": stats.get("anonymous_peak_bytes"),
        "anonymous_promise_bytes": stats.get("anonymous_promise_bytes"),
    }


def compared(found: Mapping[str, Any], replayed: Mapping[str, Any]) -> dict[str, Any]:
    """The closing numbers beside what the simulator made of the same run's journal."""
    live = (found["loads"], found["evictions"])
    return {
        **found,
        "simulated_loads": replayed["loads"],
        "simulated_evictions": replayed["evictions"],
        "simulation_agrees": (replayed["loads"], replayed["evictions"]) == live,
    }


def broken_promises(found: Mapping[str, Any]) -> list[str]:
    """Which of the demo's promises the closing numbers break, in words; empty when it went as it should."""
    unanswered = found["pictures"] - found["verdicts"] - found["refused"]
    weights, budget = found["peak_weights_bytes"], found["budget_bytes"]
    anonymous, promise = found["anonymous_peak_bytes"], found["anonymous_promise_bytes"]
    promises = {
        "no picture was published": found["pictures"] > 0,
        f"{unanswered} pictures got no verdict": unanswered == 0,
        f"{found['refused']} pictures were refused": found["refused"] == 0,
        f"{found['different_verdicts']} pictures got different verdicts": found["different_verdicts"] == 0,
        "the simulator replays other loads and evictions": found["simulation_agrees"],
        "the box told no memory numbers": None not in (weights, budget, anonymous, promise),
        f"weights took {weights} bytes of {budget}": (weights or 0) <= (budget or 0),
        f"the process took {anonymous} bytes, promised {promise}": (anonymous or 0) <= (promise or 0) + NOISE_BYTES,
    }
    return [words for words, is_kept in promises.items() if not is_kept]


def _localised(catalog: Catalog, judged: Sequence[tuple[Part, Mapping[str, Any]]]) -> samples.Localisation:
    """Findings with a box against the labelled boxes, board by board, as far as its pictures have verdicts."""
    boards: dict[tuple[str, str, str], list[tuple[Part, Mapping[str, Any]]]] = {}
    for part, body in judged:
        boards.setdefault((part.line, part.board, part.product), []).append((part, body))
    results = []
    for (_, _, product), members in boards.items():
        if all(part.truth == samples.SOUND for part, _ in members):
            defects: Sequence[samples.Defect] = ()
        else:
            defects = samples.read_defects(catalog.products[product].folder / "sample.txt")
        cells = [samples.centre_cell(part.rect) for part, _ in members]
        seen = [d for d in defects if any(samples.contains(cell, d.centre) for cell in cells)]
        results.append(samples.localise(seen, [found for part, body in members for found in _found(part, body)]))
    return samples.total(results)


def _found(part: Part, body: Mapping[str, Any]) -> Iterator[samples.Found]:
    x, y, *_ = part.rect
    for finding in body.get("findings", ()):
        if finding["box"] is not None:
            x1, y1, x2, y2 = finding["box"]
            yield samples.Found((x + x1, y + y1, x + x2, y + y2), finding["label"], finding["score"])
