"""After a crash: whoever was in hand runs alone, who ends the process again is given up, and the others go on."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.suspects import ATTEMPTS, CRASHES, Gate, Work, blamed, is_suspect, poisoned, running_order
from appliance.core.types import Batch, Crash, Load


def batch(number: int, *requests: str) -> Batch:
    return Batch(number, f"cpu-{number}", "cpu", "e0", requests)


@pytest.mark.parametrize(("attempts", "suspect", "poison"), [(0, False, False), (1, True, False), (2, True, False)])
def test_who_was_in_hand_at_a_crash_is_suspect(attempts: int, suspect: bool, poison: bool) -> None:
    assert (is_suspect(attempts), poisoned(attempts) is not None) == (suspect, poison)


def test_who_was_in_hand_at_three_crashes_is_poison() -> None:
    why = poisoned(3)
    assert why is not None
    assert (why.reason, why.detail) == ("poison", "the service ended 3 times while it had this picture in hand")


def test_who_was_at_the_fewest_crashes_runs_first_and_a_witness_before_who_has_one_try_left() -> None:
    kinds = {1: "a", 2: "a", 3: "b", 4: "a", 5: "b", 6: "b"}
    assert running_order({1: 1, 2: 2, 3: 3}, [4, 5, 6], kinds.__getitem__) == [1, 4, 2, 3]
    assert running_order({3: 2, 2: 2}, [4, 5, 6], kinds.__getitem__) == [4, 5, 2, 3]
    assert running_order({}, [4, 5, 6], kinds.__getitem__) == []


def crash(*pictures: int, alone: bool = True) -> Crash:
    return Crash(frozenset(pictures), alone)


@pytest.mark.parametrize(
    ("crashes", "says"),
    [
        ([], None),
        ([crash(1), crash(2)], None),
        ([crash(1), crash(1), crash(1)], None),
        ([crash(1, 2, alone=False), crash(1), crash(1)], None),
        ([crash(1), crash(2), crash(3, alone=False)], None),
        ([crash(1, 2, alone=False), crash(1), crash(2)], "while it ran it, with no picture the same each time,"),
        ([crash(1), crash(1), crash(1), crash(2)], "4 times while it ran it"),
        ([crash(alone=False), crash(), crash()], "while it loaded it"),
        ([crash(1), crash(1), crash()], "while it loaded it"),
    ],
)
def test_an_expert_is_blamed_when_no_picture_was_at_all_of_its_crashes(crashes: list[Crash], says: str | None) -> None:
    why = blamed(crashes)
    assert (why is not None) == (says is not None)
    if why is not None and says is not None:
        assert why.reason == CRASHES
        assert says in why.detail


def test_a_load_of_a_suspected_expert_has_nothing_beside_it() -> None:
    gate, load = Gate(), Load("cpu", "e0", ())
    gate.offer(batch(1), suspect=False)
    assert gate.offer(load, suspect=True) == []
    assert gate.offer(Load("cpu", "e1", ()), suspect=False) == []
    assert gate.ended(1) == [load]
    assert gate.ended(("cpu", "e0")) == [Load("cpu", "e1", ())]


def test_a_load_that_is_held_back_and_needed_now_gives_way_no_more_once_it_begins() -> None:
    gate, held = Gate(), Load("cpu", "e0", (), ahead=True)
    gate.offer(batch(1), suspect=False)
    gate.offer(held, suspect=True)
    assert not gate.hurry("cuda:0", "e0"), "that is another load"
    assert gate.hurry("cpu", "e0")
    assert gate.ended(1) == [Load("cpu", "e0", (), ahead=False)]
    assert not gate.hurry("cpu", "e0"), "it has begun: who loads it has to hear of it"
    assert gate.offer(batch(2), suspect=False) == [], "it is a suspect's as before"


def test_batches_without_suspects_pass_the_gate_at_once() -> None:
    gate = Gate()
    assert [gate.offer(batch(n), suspect=False) for n in range(3)] == [[batch(n)] for n in range(3)]


def test_a_suspect_runs_with_nobody_beside_it_and_keeps_nobody_for_longer() -> None:
    gate = Gate()
    gate.offer(batch(1), suspect=False)
    assert gate.offer(batch(2), suspect=True) == []
    assert gate.offer(batch(3), suspect=False) == []
    assert gate.offer(batch(4), suspect=False) == []
    assert gate.ended(1) == [batch(2)]
    assert gate.offer(batch(5), suspect=True) == []
    assert gate.ended(2) == [batch(3), batch(4)], "others go before the next suspect"
    assert gate.ended(4) == []
    assert gate.ended(3) == [batch(5)]


def test_a_batch_that_is_dropped_never_begins_and_keeps_nobody_waiting() -> None:
    gate = Gate()
    gate.offer(batch(1), suspect=False)
    gate.offer(batch(2), suspect=True)
    gate.offer(batch(3), suspect=False)
    assert not gate.drop(1), "it has begun, and has to be ended"
    assert gate.drop(2)
    assert not gate.drop(2)
    assert gate.ended(2) == [batch(3)], "beside the first, which still runs"
    assert gate.offer(batch(4), suspect=True) == []
    assert gate.drop(4)
    assert gate.ended(4) == []
    assert gate.ended(1) == gate.ended(3) == []
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
            assert gate.drop(drops)
            now = gate.ended(drops)
        else:
            ends = data.draw(st.sampled_from(running))
            running.remove(ends)
            now = gate.ended(ends)
        running += [work.id for work in now if isinstance(work, Batch)]
        begun += [work.id for work in now if isinstance(work, Batch)]
        assert running or len(begun) + len(dropped) == len(offers) - len(coming)
        assert len(running) == 1 or not any(offers[number] for number in running)
    assert begun == [number for number in range(len(offers)) if number not in dropped]


@dataclass
class Box:
    """A box that is started again whenever something ends it; what it remembers are attempts, crashes and verdicts.

    Poison ends it when it is decoded; `killers` end it when they run or, where that is true, when they are loaded.
    """

    pictures: Mapping[int, str]
    poison: frozenset[int]
    killers: Mapping[str, bool]
    workers: int
    most: int
    data: st.DataObject
    attempts: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    crashes: dict[str, list[Crash]] = field(default_factory=lambda: defaultdict(list))
    verdicts: dict[int, str] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)
    ends: int = 0

    def live(self) -> None:
        while in_work := self._life():
            self.ends += 1
            for work in in_work:
                pictures = frozenset(map(int, work.requests)) if isinstance(work, Batch) else frozenset[int]()
                for picture in pictures:
                    self.attempts[picture] += 1
                if isinstance(work, Load) or self._runs(work):
                    self.crashes[work.expert].append(Crash(pictures, alone=len(in_work) == 1))

    def _runs(self, batch: Batch) -> bool:
        """Or it is still decoded."""
        if self.poison & set(map(int, batch.requests)):
            return False
        return batch.expert in self.killers or self.data.draw(st.booleans())

    def _life(self) -> list[Work]:
        """Of one process: what was in work when it ended, nothing when all pictures have their verdict."""
        gate, coming, in_work, given_out = Gate(), deque(self._batches()), list[Work](), 0
        there, parked = set[str](), dict[str, list[Batch]]()
        while coming or in_work:
            if coming and given_out < self.workers:
                given_out += 1
                batch = coming.popleft()
                if batch.expert in there:
                    in_work += self._offer(gate, batch)
                else:
                    parked.setdefault(batch.expert, []).append(batch)
                    if len(parked[batch.expert]) == 1:
                        in_work += gate.offer(Load("cpu", batch.expert, ()), suspect=bool(self.crashes[batch.expert]))
            else:
                done = in_work.pop(self.data.draw(st.integers(0, len(in_work) - 1)))
                if isinstance(done, Batch):
                    given_out -= 1
                    self.verdicts |= dict.fromkeys(map(int, done.requests), "inspected")
                    self.crashes.pop(done.expert, None)
                    in_work += gate.ended(done.id)
                else:
                    there.add(done.expert)
                    self.crashes[done.expert] = [c for c in self.crashes[done.expert] if c.pictures]
                    in_work += gate.ended((done.device, done.expert))
                    for batch in parked.pop(done.expert):
                        in_work += self._offer(gate, batch)
            if any(self._is_deadly(work) for work in in_work):
                return in_work
        return []

    def _offer(self, gate: Gate, batch: Batch) -> list[Work]:
        return gate.offer(batch, suspect=any(int(name) in self.alone for name in batch.requests))

    def _is_deadly(self, work: Work) -> bool:
        if isinstance(work, Load):
            return self.killers.get(work.expert, False)
        return bool(self.poison & set(map(int, work.requests))) or not self.killers.get(work.expert, True)

    def _batches(self) -> Iterator[Batch]:
        """As the service feeds and the controller makes them: suspects first, each in a batch of its own."""
        open_ones = [picture for picture in self.pictures if picture not in self.verdicts]
        groups: dict[str, list[str]] = {}
        numbers = iter(range(1000))
        suspected = {picture: self.attempts[picture] for picture in open_ones if self.attempts[picture]}
        fresh = [picture for picture in open_ones if picture not in suspected]
        early = running_order(suspected, fresh, self.pictures.__getitem__)
        for picture in [*early, *(picture for picture in fresh if picture not in early)]:
            name = self.pictures[picture]
            if poisoned(self.attempts[picture]) is not None:
                self.verdicts[picture] = "poison"
            elif blamed(self.crashes[name]) is not None:
                self.verdicts[picture] = CRASHES
            elif picture in early:
                self.alone.add(picture)
                yield Batch(next(numbers), "cpu-0", "cpu", name, (str(picture),))
            else:
                group = groups.setdefault(name, [])
                group.append(str(picture))
                if len(group) == self.most:
                    yield Batch(next(numbers), "cpu-0", "cpu", name, tuple(groups.pop(name)))
        for name, group in groups.items():
            yield Batch(next(numbers), "cpu-0", "cpu", name, tuple(group))


@given(
    poison=st.sets(st.integers(0, 39), max_size=12),
    killers=st.dictionaries(st.sampled_from(["e0", "e1", "e2"]), st.booleans(), max_size=3),
    experts=st.lists(st.sampled_from(["e0", "e1", "e2", "e3"]), min_size=40, max_size=40),
    workers=st.integers(1, 4),
    most=st.integers(1, 8),
    data=st.data(),
)
def test_poison_alone_becomes_a_dead_letter_and_experts_that_crash_are_set_aside(
    poison: set[int], killers: dict[str, bool], experts: list[str], workers: int, most: int, data: st.DataObject
) -> None:
    """Also when many come at once. An expert that crashes takes one picture with it at most, the last of its kind."""
    pictures = dict(enumerate(experts))
    box = Box(pictures, frozenset(poison), killers, workers, most, data)
    box.live()
    assert len(box.verdicts) == 40
    taken_along = dict.fromkeys(killers, 0)
    for picture, verdict in box.verdicts.items():
        name = pictures[picture]
        if name not in killers:
            assert verdict == ("poison" if picture in poison else "inspected")
            assert picture in poison or box.attempts[picture] <= 1, "an innocent one is in hand once"
        elif picture not in poison:
            assert verdict in (CRASHES, "poison")
            taken_along[name] += verdict == "poison"
    assert all(count <= 1 for count in taken_along.values())
    for name, count in taken_along.items():
        others = {picture for picture in pictures if pictures[picture] == name} - poison
        assert not count or len(others) == 1 or {box.verdicts[picture] for picture in others} == {"poison", CRASHES}
    assert box.ends <= ATTEMPTS * len(poison) + 5 * len(killers)
