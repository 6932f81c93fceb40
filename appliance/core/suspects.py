"""Pictures and experts that may have ended the process: who is suspect, who is given up, and what may be in work
beside what.

A crash names nobody: whoever was in hand may have done it. So each picture runs with nobody beside it until it has its
verdict, and each expert is loaded with nobody beside it until it has worked; a crash is then its own, and an innocent
picture is in hand at one crash, not at several. One picture at all crashes of an expert is to blame itself; where they
have none in common, the expert is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from appliance.core.types import Batch, Crash, Load, Refusal

POISON, CRASHES = "poison", "crashes"
ATTEMPTS = 3
"""So many crashes with a picture in hand make it poison: one in company, and two alone. As many with an expert at work
set that aside."""


def is_suspect(attempts: int) -> bool:
    """Whether a picture that was in hand at so many crashes has to run with nobody beside it."""
    return attempts > 0


def poisoned(attempts: int) -> Refusal | None:
    """Why a picture that was in hand at so many crashes is given up, None while it may be tried again."""
    if attempts < ATTEMPTS:
        return None
    return Refusal(POISON, f"the service ended {attempts} times while it had this picture in hand")


def running_order(suspected: Mapping[int, int], fresh: Iterable[int], alike: Callable[[int], object]) -> list[int]:
    """Who runs alone before all others, by arrival: `suspected` with their attempts, those at the fewest crashes first.

    Before one that would be poison at the next crash runs a witness, the first `fresh` one that is `alike`: where an
    expert ends the process, it says so, and the other is not given up for it.
    """
    by_attempts = sorted(suspected, key=lambda arrival: (suspected[arrival], arrival))
    wanted = {alike(arrival) for arrival in by_attempts if suspected[arrival] == ATTEMPTS - 1}
    witnesses = []
    for arrival in fresh:
        if alike(arrival) in wanted:
            wanted.remove(alike(arrival))
            witnesses.append(arrival)
    early = [arrival for arrival in by_attempts if suspected[arrival] < ATTEMPTS - 1]
    return [*early, *witnesses, *by_attempts[len(early) :]]


def blamed(crashes: Sequence[Crash]) -> Refusal | None:
    """Why an expert is set aside that was at work at these crashes, and did not work well between them; None while it
    may be tried again.

    At the last one it was alone, so that it was this expert or the picture; and no picture was there every time.
    """
    if len(crashes) < ATTEMPTS or not crashes[-1].alone:
        return None
    if frozenset.intersection(*(crash.pictures for crash in crashes)):
        return None
    doing = "ran it, with no picture the same each time," if crashes[-1].pictures else "loaded it"
    detail = f"the service ended {len(crashes)} times while it {doing} and it never worked in between"
    return Refusal(CRASHES, f"{detail}: repair its bundle, or send the command reinstate")


Work = Batch | Load
"""What can end the process while it is done."""


class Gate:
    """Lets batches and loads begin, in the order in which they are offered.

    A suspect's begins when nothing is in work, and nothing begins beside it. Others that come behind it wait until it
    has ended, and the next suspect until they have: so the line stands still for one suspect's work at a time.
    """

    def __init__(self) -> None:
        self._held: deque[tuple[Work, bool]] = deque()
        self._in_work: set[int | tuple[str, str]] = set()
        self._is_exclusive = False

    def offer(self, work: Work, *, suspect: bool) -> list[Work]:
        """What to begin now."""
        self._held.append((work, suspect))
        return self._let_through()

    def ended(self, which: int | tuple[str, str]) -> list[Work]:
        """The same, now that the batch of this number has ended or was dropped, or the load of this expert to this
        device."""
        self._in_work.discard(which)
        return self._let_through()

    def drop(self, which: int | tuple[str, str]) -> bool:
        """Whether it was held back, and now will never begin. Who came behind it may begin when that `ended`."""
        held = len(self._held)
        self._held = deque(one for one in self._held if _name(one[0]) != which)
        return len(self._held) < held

    def hurry(self, device: str, expert: str) -> bool:
        """Whether the load was held back: then it gives way to no other once it begins."""
        is_held = False
        for place, (work, suspect) in enumerate(self._held):
            if isinstance(work, Load) and _name(work) == (device, expert):
                self._held[place], is_held = (replace(work, ahead=False), suspect), True
        return is_held

    def _let_through(self) -> list[Work]:
        begun = []
        while self._held and self._may_begin(self._held[0][1]):
            work, self._is_exclusive = self._held.popleft()
            self._in_work.add(_name(work))
            begun.append(work)
        return begun

    def _may_begin(self, suspect: bool) -> bool:
        return not self._in_work or not (suspect or self._is_exclusive)


def _name(work: Work) -> int | tuple[str, str]:
    """By which it is known: a batch by its number, a load by its device and expert."""
    return work.id if isinstance(work, Batch) else (work.device, work.expert)
