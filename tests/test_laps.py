"""What a lap knows of what ran beside what."""

from __future__ import annotations

from appliance.core.types import Batch, Finished, Load, Loaded, LoadFailed, Refusal, Run, RunFailed
from appliance.lab.laps import Ran, Work

WHY = Refusal("gone", "it went")


def batch(number: int, device: str = "cpu", pictures: int = 1) -> Batch:
    return Batch(number, f"{device}-{number}", device, "e", tuple(f"r{n}" for n in range(pictures)))


def ended(which: Batch, seconds: float = 1.0) -> Finished:
    return Finished(which, ((),) * len(which.requests), seconds)


def test_what_was_at_work_when_a_batch_began_is_beside_it_whatever_ends_meanwhile() -> None:
    work, (one, two, three, four) = Work(), (batch(1), batch(2), batch(3, "cuda:0", 4), batch(4))
    for begun in (Run(one), Load("cpu", "x", ()), Run(two), Load("cuda:0", "y", ()), Run(three)):
        work.begins(begun)
    for over in (ended(one, 0.1), Loaded("cpu", "x"), RunFailed(two, WHY), LoadFailed("cuda:0", "y", WHY)):
        work.ends(over)
    work.begins(Run(four))
    for last in (ended(three, 0.3), ended(four, 0.4)):
        work.ends(last)
    assert work.ran == [
        Ran(one, {"cpu": 1}, {}, 0.1),
        Ran(three, {"cpu": 2, "cuda:0": 1}, {"cpu": 1, "cuda:0": 1}, 0.3),
        Ran(four, {"cpu": 1, "cuda:0": 1}, {"cpu": 0, "cuda:0": 0}, 0.4),
    ], "who failed says nothing"


def test_what_passes_between_two_batches_counts_by_the_pictures_of_the_first() -> None:
    work = Work()
    work.goes_on(ended(batch(1, pictures=3)), 0.002)
    assert work.handovers == [(3, 0.002)]
