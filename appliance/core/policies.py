"""The policies by name: how tasks are assigned and arranged, whether an executor waits for its loads, who is evicted.

A policy is a value; one controller obeys them all. `coserve` is CoServe as published (ASPLOS 2025, §4.2 to §4.4), the
others of the paper are its baselines (§5.1) and the steps of its ablation (§5.4). `appliance` is ours: what a queued
request needs stays, what is resident goes first, and loads go on beside runs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from appliance.core.costs import Cost

PATIENCE_SECONDS = 20.0
"""From then on a task without a deadline is overdue: for it, who is needed by later ones alone may leave. It bounds
starvation; shorter means more switches."""
ROOM_PATIENCE_SECONDS = 2.0
"""A batch that has waited so long for room for its activations is passed by nobody."""
HEAD_START_SECONDS = 2.0
"""A task counts as having come so much earlier for each step of its line's priority. Nine steps stay below patience: a
task that has just come is not overdue, or a busy line of the highest priority would have an expert leave for each."""
SLACK_SHARE = 4.0
"""A task is overdue so many times its load and run before its deadline: others may be in the way."""
PLENTY_LOADS = 8.0
"""Executors with work for so many times the seconds of a load lose nothing when it waits."""
PLENTY_RUNS = 2.0
"""How many times the seconds of all waiting loads the backlog of runs must be: more loads will come."""
SECOND_COPY = 64.0
"""How many times its cost a load has to be worth that brings to one device what another one holds or loads: memory
that others need goes to it too."""


class Offer(NamedTuple):
    """What a task would add to one executor: `total_seconds` is its backlog before, `extra_seconds` the addition.

    `answer_seconds` is when the task itself would be answered, where loads go on beside runs. One is made for each
    executor and task, and a tuple is made sooner than a frozen dataclass.
    """

    executor: str
    total_seconds: float
    extra_seconds: float
    answer_seconds: float = 0.0


class Resident(NamedTuple):
    """What is known of an expert that may leave. Times are monotonic seconds; never used counts as used when loaded.

    `probability` of use, as declared; where the policy learns, in proportion to what it is by now. One is made whenever
    what an expert is worth may have changed.
    """

    expert: str
    bytes: int
    load_seconds: float
    probability: float
    loaded_seconds: float
    used_seconds: float


@dataclass(frozen=True, slots=True)
class Policy:
    """How one policy differs from another.

    `assign(offers, turn)`: who gets the `turn`-th task. `groups`: a task goes directly behind the last one for the same
    expert on its executor, else to the tail (CoServe §4.3); without, always to the tail. `in_order`: an executor works
    its queue off in order, and a load occupies it; without, what is resident goes first and loads go on beside. With
    both, whoever stands behind waits as long as more tasks come for the expert in front than run: nothing bounds it.
    `place`: who is resident where at the start.
    `worth(resident, now)`: the least worth leaves first, with `orphans_first` after the subsequent experts none of
    whose preliminary experts is resident, largest first (CoServe §4.4). `spares_queued`: what a queued task needs
    leaves only for one that is overdue by its deadline or by `patience_seconds`, and that came before it. A load for
    which somebody has to leave is held for `hold_share` of its seconds: others may ask for the same, or a rarer one.
    `learns`: probabilities are what the lines ask, not what is declared for good.
    """

    name: str
    assign: Callable[[Sequence[Offer], int], Offer]
    worth: Callable[[Resident, float], float]
    place: Callable[[Sequence[tuple[str, int]], Mapping[str, int]], list[tuple[str, str]]]
    groups: bool = False
    in_order: bool = True
    orphans_first: bool = False
    spares_queued: bool = False
    patience_seconds: float = PATIENCE_SECONDS
    hold_share: float = 0.0
    learns: bool = False

    def due_seconds(self, since_seconds: float, deadline_seconds: float | None, cost: Cost) -> float:
        """From when a task is overdue that has to be loaded and run at this cost."""
        if deadline_seconds is None:
            return since_seconds + self.patience_seconds
        return deadline_seconds - SLACK_SHARE * (cost.load_seconds + cost.run_seconds(1))

    def turn_seconds(self, since_seconds: float, due_seconds: float) -> float:
        """When it is the turn of a task among others: by patience, or sooner when it is due sooner. As they came where
        queues are worked off in order."""
        return since_seconds if self.in_order else min(due_seconds, since_seconds + self.patience_seconds)

    def head_start_seconds(self, priority: int) -> float:
        """How much earlier a task of a line of this priority, 0 to 9, counts as having come: who comes later than
        that has no advantage over a task of another line. Where queues are worked off in order, all are equal."""
        return 0.0 if self.in_order else priority * HEAD_START_SECONDS


def first(offers: Sequence[Offer], turn: int) -> Offer:
    """Everything to one executor."""
    return offers[0]


def in_turn(offers: Sequence[Offer], turn: int) -> Offer:
    """Evenly, whatever is asked."""
    return offers[turn % len(offers)]


def soonest(offers: Sequence[Offer], turn: int) -> Offer:
    """The offer that finishes the whole backlog soonest; among equals the one that adds least (CoServe §4.3).

    Where the backlog ends with loads, runs end sooner whoever gets them: then whoever answers soonest.
    """
    busiest = next_busiest = 0.0
    for offer in offers:
        total = offer.total_seconds
        if total > busiest:
            busiest, next_busiest = total, busiest
        elif total > next_busiest:
            next_busiest = total
    best, least = offers[0], (inf, inf, inf)
    for offer in offers:
        _, total, extra, answer = offer
        others = next_busiest if total == busiest else busiest
        end = total + extra
        adds = (end if end > others else others, answer, extra)
        if adds < least:
            best, least = offer, adds
    return best


def least_recently_used(resident: Resident, now: float) -> float:
    return resident.used_seconds


def first_in(resident: Resident, now: float) -> float:
    return resident.loaded_seconds


def least_probable(resident: Resident, now: float) -> float:
    return resident.probability


def least_loss(resident: Resident, now: float) -> float:
    """Seconds of loading that its leaving is expected to cost, per byte that it frees."""
    return resident.probability * resident.load_seconds / max(resident.bytes, 1)


def dealt(sizes: Sequence[tuple[str, int]], rooms: Mapping[str, int]) -> list[tuple[str, str]]:
    """Who is resident where at the start: round-robin over the pools until memory is full (CoServe §4.1).

    `sizes` are (expert, bytes), the most probable first, `rooms` the bytes of each pool; gives (pool, expert).
    """
    left, turn, placed = dict(rooms), deque(rooms), list[tuple[str, str]]()
    for expert, size in sizes:
        pool = next((pool for pool in turn if left[pool] >= size), None)
        if pool is None:
            break
        turn.remove(pool)
        turn.append(pool)
        left[pool] -= size
        placed.append((pool, expert))
    return placed


def filled(sizes: Sequence[tuple[str, int]], rooms: Mapping[str, int]) -> list[tuple[str, str]]:
    """The same, but the first pool is filled before the next is begun."""
    left, placed = dict(rooms), list[tuple[str, str]]()
    for expert, size in sizes:
        pool = next((pool for pool in left if left[pool] >= size), None)
        if pool is None:
            break
        left[pool] -= size
        placed.append((pool, expert))
    return placed


SAMBA = Policy("samba", first, least_recently_used, dealt)
SAMBA_FIFO = replace(SAMBA, name="samba-fifo", worth=first_in)
SAMBA_PARALLEL = replace(SAMBA, name="samba-parallel", assign=in_turn)
NONE = replace(SAMBA_PARALLEL, name="none", worth=first_in)
EM = replace(NONE, name="em", worth=least_probable, orphans_first=True)
EM_RA = replace(EM, name="em+ra", groups=True)
COSERVE = replace(EM_RA, name="coserve", assign=soonest)
APPLIANCE = Policy(
    "appliance",
    soonest,
    least_loss,
    filled,
    groups=True,
    in_order=False,
    spares_queued=True,
    hold_share=0.25,
    learns=True,
)
ALL_RESIDENT = replace(APPLIANCE, name="all-resident")
"""The bound: ours, on a box whose memory holds everything. Whoever makes the box sees to that."""

PAPER = (SAMBA, SAMBA_FIFO, SAMBA_PARALLEL, NONE, EM, EM_RA, COSERVE)
POLICIES = {policy.name: policy for policy in (*PAPER, APPLIANCE)}


def tuned(policy: Policy, hold_share: float | None) -> Policy:
    """The policy as a box is set; None leaves it as it is. Where a load occupies its executor, none is held."""
    return policy if hold_share is None or policy.in_order else replace(policy, hold_share=hold_share)


def oracle(uses: Mapping[str, Sequence[float]]) -> Policy:
    """Ours, but who is needed again last leaves first (Belady's MIN), as told by each expert's uses, in seconds."""

    def worth(resident: Resident, now: float) -> float:
        times = uses.get(resident.expert, ())
        following = bisect_right(times, now)
        return -times[following] if following < len(times) else -inf

    return replace(APPLIANCE, name="oracle", worth=worth)
