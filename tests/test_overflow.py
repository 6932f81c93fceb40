"""More pictures than may wait: who is turned away."""

from __future__ import annotations

from appliance.core.types import (
    QUEUE_FULL,
    Arrived,
    Finished,
    Loaded,
    Outcome,
    Overflow,
    Publish,
)
from tests.kit import DOUBTFUL, box, inspection_graph, request
from tests.kit_controller import (
    only_run,
    plain_experts,
)


def test_where_more_pictures_wait_outside_nobody_is_turned_away() -> None:
    controller, _ = box(plain_experts("a"), inspection_graph(["a"]), 100, most_waiting=2)
    assert controller.room(1000) == 2
    controller.handle(Arrived(request("0", "c-a")), 0.0)
    assert (controller.room(1000), controller.room(1)) == (1, 1)
    controller.handle(Arrived(request("1", "c-a")), 0.0)
    assert controller.room(1000) == 0


def test_where_the_new_picture_is_turned_away_it_hears_so_at_once_and_only_it() -> None:
    controller, _ = box(plain_experts("a"), inspection_graph(["a"]), 100, 1, most_waiting=2, overflow=Overflow.REJECT)
    for name in ("0", "1"):
        assert not [a for a in controller.handle(Arrived(request(name, "c-a")), 0.0) if isinstance(a, Publish)]
    assert controller.room(1000) == 1000, "all come here, to be turned away"
    (publish,) = controller.handle(Arrived(request("2", "c-a", at=0.5)), 0.75)
    assert isinstance(publish, Publish)
    assert (publish.verdict.request, publish.verdict.outcome) == ("2", Outcome.REJECTED)
    assert publish.verdict.waited_seconds == 0.25
    assert publish.verdict.refusal is not None
    assert publish.verdict.refusal.reason == QUEUE_FULL
    assert "request-id" in publish.verdict.refusal.detail
    assert controller.handle(Arrived(request("1", "c-a")), 0.8) == [], "one that is open is no new one"
    assert only_run(controller.handle(Loaded("cpu", "a"), 1.0)).batch.requests == ("0", "1")


def test_where_the_oldest_is_turned_away_those_that_were_begun_stay() -> None:
    limits = {"most_waiting": 2, "overflow": Overflow.OLDEST}
    controller, _ = box(plain_experts("a"), inspection_graph(["a"]), 100, executors=1, **limits)  # type: ignore[arg-type]
    controller.handle(Arrived(request("0", "c-a")), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.1))
    for number in (1, 2, 3):
        moves = controller.handle(Arrived(request(f"{number}", "c-a")), 0.2)
        assert [m.verdict.request for m in moves if isinstance(m, Publish)] == ([f"{number - 1}"] if number > 1 else [])
    moves = controller.handle(Finished(run.batch, ((DOUBTFUL,),), 0.1), 0.3)
    assert only_run(moves).batch.requests == ("3",)
    (publish,) = controller.handle(Arrived(request("4", "c-a")), 0.4)
    assert isinstance(publish, Publish)
    assert publish.verdict.request == "4", "both others were looked at: nobody else is left to turn away"
