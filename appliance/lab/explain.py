"""What `appliance explain` tells of a journal: one request's way, the slowest requests, or what happened meanwhile.

All times are seconds since the journal began.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from appliance.core.explain import Arrival, Chronicle, Course, Departure, Journey, Question, Standing, chronicle
from appliance.core.types import Arrived
from appliance.drivers import journal
from appliance.errors import RecordsError
from appliance.lab.simulate import controller_of, policy_of

SLOWEST = 10


def explained(
    path: Path, request: str | None = None, *, since: float | None = None, until: float | None = None
) -> dict[str, Any]:
    """Of a request (or the only one whose name begins so), else of a span of seconds, else the slowest.

    Raises RecordsError when the journal cannot be read, has no such request, or is shorter.
    """
    opening, recorded = journal.read(path)
    events = list(recorded)
    if not events:
        raise RecordsError(f"{path} has no events", "stop the service first: it writes its journal as it goes")
    names = dict.fromkeys(event.request.id for _, event, _ in events if isinstance(event, Arrived))
    name = None if request is None else _named(path, request, names)
    in_order = policy_of(opening.policy).in_order
    told = chronicle(controller_of(opening), events, in_order=in_order, focus=name)
    seconds = told.ended_seconds - told.began_seconds
    about = {"journal": str(path), "policy": opening.policy, "seconds": seconds}
    if name is not None:
        return {**about, "request": _journey(told, told.journeys[name])}
    if since is not None and until is not None:
        if since > seconds:
            raise RecordsError(f"{path} ends after {seconds:.3f} s", "ask for an earlier moment")
        return {**about, "span": _span(told, since, until)}
    return {**about, **_slowest(told)}


def _named(path: Path, request: str, names: Iterable[str]) -> str:
    found = [name for name in names if name == request] or [name for name in names if name.startswith(request)]
    if not found:
        raise RecordsError(f"{path} has no request {request}", "without one, `appliance explain` lists the slowest")
    if len(found) > 1:
        raise RecordsError(f"{len(found)} requests of {path} begin with {request}", "give more of its name")
    return found[0]


def _slowest(told: Chronicle) -> dict[str, Any]:
    slowest = sorted(told.journeys.values(), key=lambda journey: (-_waited(told, journey), journey.request.id))
    return {
        "requests": len(slowest),
        "causes": dict(Counter(journey.cause.value for journey in slowest).most_common()),
        "evictions_by_rule": dict(Counter(departure.rule.value for departure in told.departures).most_common()),
        "slowest": [_brief(told, journey) for journey in slowest[:SLOWEST]],
    }


def _waited(told: Chronicle, journey: Journey) -> float:
    """Until its verdict, or until the journal ends."""
    if journey.verdict is not None:
        return journey.verdict.waited_seconds
    return told.ended_seconds - journey.request.arrived_seconds


def _brief(told: Chronicle, journey: Journey) -> dict[str, Any]:
    verdict = journey.verdict
    return {
        "request": journey.request.id,
        "component": journey.request.component,
        "arrived_seconds": journey.request.arrived_seconds - told.began_seconds,
        "outcome": verdict.outcome.value if verdict is not None else None,
        "reason": verdict.refusal.reason if verdict is not None and verdict.refusal is not None else None,
        "waited_seconds": _waited(told, journey),
        "cause": journey.cause.value,
        "cause_seconds": journey.waits[journey.cause],
        "waits": {wait.value: seconds for wait, seconds in journey.waits.items() if seconds},
    }


def _journey(told: Chronicle, journey: Journey) -> dict[str, Any]:
    deadline = journey.request.deadline_seconds
    return {
        **_brief(told, journey),
        "deadline_seconds": None if deadline is None else deadline - told.began_seconds,
        "scheduled_seconds": journey.taken_seconds - told.began_seconds,
        "answered_seconds": None if journey.ended_seconds is None else journey.ended_seconds - told.began_seconds,
        "questions": [_question(told, question) for question in journey.questions],
    }


def _question(told: Chronicle, question: Question) -> dict[str, Any]:
    start = told.began_seconds
    return {
        "expert": question.expert,
        "asked_seconds": question.asked_seconds - start,
        "device": question.device,
        "executor": question.executor,
        "found": question.found.value,
        "left_before": None if question.departure is None else _departure(question.departure, start),
        **_standing(question.standing),
        "waits": {wait.value: seconds for wait, seconds in question.waits.items() if seconds},
        "loads": [_load(load, start) for load in question.loads],
        "runs": [_run(run, start) for run in question.runs],
    }


def _standing(standing: Standing | None) -> dict[str, Any]:
    if standing is None:
        return {}
    batch = standing.running
    return {
        "running": None if batch is None else {"expert": batch.expert, "pictures": len(batch.requests)},
        "behind": [{"expert": expert, "pictures": count} for expert, count in standing.ahead],
        "resident": {device: list(there) for device, there in standing.resident.items()},
    }


def _departure(departure: Departure, start: float) -> dict[str, Any]:
    return {
        "at_seconds": departure.at_seconds - start,
        "device": departure.device,
        "expert": departure.expert,
        "rule": departure.rule.value,
        "for": departure.coming,
    }


def _load(load: Arrival, start: float) -> dict[str, Any]:
    return {
        "began_seconds": load.began_seconds - start,
        "ended_seconds": None if load.ended_seconds is None else load.ended_seconds - start,
        "device": load.device,
        "expert": load.expert,
        "ahead": load.ahead,
        "waiting": load.waiting,
        "failed": load.reason,
        "evicted": [_departure(departure, start) for departure in load.left],
    }


def _run(run: Course, start: float) -> dict[str, Any]:
    return {
        "began_seconds": run.began_seconds - start,
        "ended_seconds": None if run.ended_seconds is None else run.ended_seconds - start,
        "executor": run.batch.executor,
        "pictures": len(run.batch.requests),
        "failed": run.reason,
    }


def _span(told: Chronicle, since: float, until: float) -> dict[str, Any]:
    start = told.began_seconds
    first, last = start + since, start + until
    loads = [load for load in told.loads if first <= load.began_seconds < last]
    left = [departure for departure in told.departures if first <= departure.at_seconds < last]
    before = [count for at, count in told.queued if at <= first]
    within = [count for at, count in told.queued if first < at < last]
    ends = [journey.ended_seconds for journey in told.journeys.values() if journey.ended_seconds is not None]
    resident, loading = _residents(told, first)
    return {
        "since_seconds": since,
        "until_seconds": until,
        "verdicts": sum(first <= end < last for end in ends),
        "queued_at_start": before[-1] if before else 0,
        "queued_at_most": max([*before[-1:], *within], default=0),
        "queued_at_end": [*before, *within][-1] if before or within else 0,
        "resident": resident,
        "loading": loading,
        "loads": [_load(load, start) for load in loads],
        "evictions": [_departure(departure, start) for departure in left],
        "evictions_by_rule": dict(Counter(departure.rule.value for departure in left).most_common()),
    }


def _residents(told: Chronicle, at: float) -> tuple[Mapping[str, list[str]], Mapping[str, list[str]]]:
    """Who was ready and who was on its way at that second, by device."""
    left = [(departure.at_seconds, False, departure.device, departure.expert) for departure in told.departures]
    came = [(load.ended_seconds, True, load.device, load.expert) for load in told.loads if load.reason is None]
    moves = sorted((when, comes, device, expert) for when, comes, device, expert in [*left, *came] if when is not None)
    there = {device: dict.fromkeys(experts) for device, experts in told.residents_at_start.items()}
    for when, comes, device, expert in moves:
        if when > at:
            break
        if comes:
            there[device][expert] = None
        else:
            there[device].pop(expert, None)
    loading = {
        device: [load.expert for load in told.loads if load.device == device and _is_under_way(load, at)]
        for device in there
    }
    return {device: list(experts) for device, experts in there.items()}, loading


def _is_under_way(load: Arrival, at: float) -> bool:
    return load.began_seconds <= at and (load.ended_seconds is None or load.ended_seconds > at)
