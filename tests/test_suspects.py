"""After a crash: whoever was in hand runs alone, who ends the process again is given up, and the others go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.suspects import ATTEMPTS, Gate, is_suspect, poisoned
from appliance.core.types import Batch


def batch(number: int, *requests: str) -> Batch:
    return Batch(number, f"cpu-{number}", "cpu", "e0", requests)


@pytest.mark.parametrize(("attempts", "suspect", "poison"), [(0, False, False), (1, True, False), (2, True, False)])
def test_who_was_in_hand_at_a_crash_is_suspect(attempts: int, suspect: bool, poison: bool) -> None:
    assert (is_suspect(attempts), poisoned(attempts) is not None) == (suspect, poison)


def test_who_was_in_hand_at_three_crashes_is_poison() -> None:
    why = poisoned(3)
    assert why is not None
    assert (why.reason, why.detail) == ("poison", "the service ended 3 times while it had this picture in hand")


def test_batches_without_suspects_pass_the_gate_at_once() -> None:
    gate = Gate()
    assert [gate.offer(batch(n), suspect=False) for n in range(3)] == [[batch(n)] for n in range(3)]


def test_a_suspect_runs_with_nobody_beside_it_and_keeps_nobody_for_longer() -> None:
    gate = Gate()
    gate.offer(batch(1), suspect=False)
    assert gate.offer(batch(2), suspect=True) == []
    assert gate.offer(batch(3), suspect=False) == []
    assert gate.offer(batch(4), suspect=False) == []
    assert gate.ended(batch(1)) == [batch(2)]
    assert gate.offer(batch(5), suspect=True) == []
    assert gate.ended(batch(2)) == [batch(3), batch(4)], "others go before the next suspect"
    assert gate.ended(batch(4)) == []
    assert gate.ended(batch(3)) == [batch(5)]


def test_a_batch_that_is_dropped_never_begins_and_keeps_nobody_waiting() -> None:
    gate = Gate()
    gate.offer(batch(1), suspect=False)
    gate.offer(batch(2), suspect=True)
    gate.offer(batch(3), suspect=False)
    assert not gate.drop(batch(1)), "it has begun, and has to be ended"
    assert gate.drop(batch(2))
    assert not gate.drop(batch(2))
    assert gate.ended(batch(2)) == [batch(3)], "beside the first, which still runs"
    assert gate.offer(batch(4), suspect=True) == []
    assert gate.drop(batch(4))
    assert gate.ended(batch(4)) == []
    assert gate.ended(batch(1)) == gate.ended(batch(3)) == []
    assert gate.offer(batch(5), suspect=True) == [batch(5)]


@given(offers=st.lists(st.booleans(), max_size=30), data=st.data())
def test_whatever_comes_suspects_run_alone_all_begin_in_order_and_the_line_never_stands_still(
    offers: list[bool], data: st.DataObject
) -> None:
    gate, running, begun, dropped = Gate(), list[int](), list[int](), set[int]()
    coming = deque(enumerate(offers))
    while coming or running:
        if coming and (not running or data.draw(st.booleans())):
            number, suspect = coming.popleft()
            now = gate.offer(batch(number), suspect=suspect)
        elif data.draw(st.booleans()) and (held := set(range(len(offers) - len(coming))) - {*begun, *dropped}):
            drops = data.draw(st.sampled_from(sorted(held)))
            dropped.add(drops)
            assert gate.drop(batch(drops))
            now = gate.ended(batch(drops))
        else:
            ends = data.draw(st.sampled_from(running))
            running.remove(ends)
            now = gate.ended(batch(ends))
        running += [b.id for b in now]
        begun += [b.id for b in now]
        assert running or len(begun) + len(dropped) == len(offers) - len(coming)
        assert len(running) == 1 or not any(offers[number] for number in running)
    assert begun == [number for number in range(len(offers)) if number not in dropped]


@dataclass
class Box:
    """A box that is started again whenever a picture ends it; what it remembers are attempts and verdicts."""

    poison: frozenset[str]
    workers: int
    most: int
    choose: Callable[[int], int]
    attempts: dict[str, int]
    verdicts: dict[str, str] = field(default_factory=dict)
    crashes: int = 0

    def live(self) -> None:
        while in_hand := self._life():
            self.crashes += 1
            for picture in in_hand:
                self.attempts[picture] += 1

    def _life(self) -> list[str]:
        """Of one process: who was in hand when it ended, nobody when all have their verdict."""
        gate, waiting, running, given_out = Gate(), deque(self._batches()), list[Batch](), 0
        while waiting or running:
            if waiting and given_out < self.workers:
                next_one = waiting.popleft()
                is_alone = any(is_suspect(self.attempts[picture]) for picture in next_one.requests)
                running += gate.offer(next_one, suspect=is_alone)
                given_out += 1
            else:
                done = running.pop(self.choose(len(running)))
                self.verdicts |= dict.fromkeys(done.requests, "inspected")
                running += gate.ended(done)
                given_out -= 1
            in_hand = [picture for one in running for picture in one.requests]
            if self.poison.intersection(in_hand):
                return in_hand
        return []

    def _batches(self) -> Iterator[Batch]:
        """As the controller makes them: a suspect in one of its own."""
        number, group = 0, list[str]()
        for picture in [name for name in self.attempts if name not in self.verdicts]:
            if poisoned(self.attempts[picture]) is not None:
                self.verdicts[picture] = "poison"
            elif is_suspect(self.attempts[picture]):
                yield batch(number := number + 1, picture)
            else:
                group.append(picture)
            if len(group) == self.most:
                yield batch(number := number + 1, *group)
                group = []
        if group:
            yield batch(number := number + 1, *group)


@given(
    poison=st.sets(st.integers(0, 39), max_size=12), workers=st.integers(1, 4), most=st.integers(1, 8), data=st.data()
)
def test_poison_alone_becomes_a_dead_letter_within_three_crashes_each(
    poison: set[int], workers: int, most: int, data: st.DataObject
) -> None:
    """Also when many come at once: an innocent picture is in hand at one crash, and never at a second."""
    names = frozenset(f"p{number}" for number in poison)
    box = Box(
        names,
        workers,
        most,
        lambda running: data.draw(st.integers(0, running - 1)),
        dict.fromkeys((f"p{number}" for number in range(40)), 0),
    )
    box.live()
    assert {name for name, verdict in box.verdicts.items() if verdict == "poison"} == names
    assert len(box.verdicts) == 40
    assert all(attempts <= 1 for name, attempts in box.attempts.items() if name not in names)
    assert box.crashes <= ATTEMPTS * len(names)
