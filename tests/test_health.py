"""Whether the service gets on, and whether memory is what it should be; values in, values out."""

from __future__ import annotations

import pytest

from appliance.core.drift import WINDOW_SECONDS, Balance
from appliance.core.memory import Ledger
from appliance.core.types import (
    Batch,
    CancelLoad,
    Device,
    Event,
    Finished,
    Footprint,
    HurryLoad,
    Load,
    Loaded,
    LoadFailed,
    Refusal,
    Run,
    RunFailed,
    Segment,
)
from appliance.engine.engine import Order
from appliance.health import (
    RESTING_BYTES,
    STUCK_LOAD_SECONDS,
    STUCK_SECONDS,
    Drift,
    Passing,
    Underway,
    process_balance,
    weights_balance,
)

BATCH = Batch(7, "cpu-0", "cpu", "e", ("r1", "r2"))
BIG = Footprint((Segment("s", 50_000_000),))
NOTHING = Passing(0, 0, 0, 0, 25_000_000)
LOAD = Load("cpu", "e", ())
AHEAD = Load("cpu", "e", (), ahead=True)
REFUSAL = Refusal("load", "no")


@pytest.mark.parametrize(
    ("orders", "seconds"),
    [
        ([Run(BATCH)], STUCK_SECONDS),
        ([LOAD], STUCK_LOAD_SECONDS),
        ([AHEAD], None),
        ([AHEAD, HurryLoad("cpu", "e")], STUCK_LOAD_SECONDS),
        ([AHEAD, CancelLoad("cpu", "e")], STUCK_LOAD_SECONDS),
    ],
)
def test_an_order_of_which_nothing_is_heard_is_stuck(orders: list[Order], seconds: float | None) -> None:
    underway = Underway()
    for order in orders:
        underway.begun(order, 100.0)
    assert underway.is_stuck(1e9) == (seconds is not None)
    if seconds is not None:
        assert not underway.is_stuck(100.0 + seconds - 1)
        assert underway.is_stuck(100.0 + seconds)


@pytest.mark.parametrize(
    ("order", "event"),
    [
        (Run(BATCH), Finished(BATCH, (), 0.1)),
        (Run(BATCH), RunFailed(BATCH, REFUSAL)),
        (LOAD, Loaded("cpu", "e")),
        (LOAD, LoadFailed("cpu", "e", REFUSAL)),
    ],
)
def test_what_has_ended_is_not_stuck(order: Order, event: Event) -> None:
    underway = Underway()
    underway.begun(order, 0.0)
    underway.ended(event)
    assert not underway.is_stuck(1e9)
    assert not underway.has_runs


def test_another_load_that_ends_hides_no_hung_one() -> None:
    underway = Underway()
    underway.begun(LOAD, 0.0)
    for now in range(1, 1000):
        underway.begun(Load("cpu", "other", ()), float(now))
        underway.ended(Loaded("cpu", "other"))
    assert underway.is_stuck(1000.0)


def test_a_leak_beyond_what_may_rest_is_seen_whatever_the_settings_would_allow() -> None:
    """Nothing waits and nothing runs: then no allowance for pictures hides it."""
    ledger = Ledger(Device("cpu", 10**9, 2, 10**8), {})
    start, leak = 60_000_000, 20_000_000

    def drift(measured: int) -> float:
        return process_balance(ledger, {}, NOTHING, at_start_bytes=start, kept_bytes=0, measured_bytes=measured).drift

    assert drift(start + RESTING_BYTES) == 0.0
    assert drift(start + RESTING_BYTES + leak) > 0.05


def test_pictures_that_wait_or_run_and_batches_may_be_there() -> None:
    segment = Segment("s", 1000)
    ledger = Ledger(Device("cpu", 10**9, 2, 10**8), {"e": Footprint((segment,), 0, 500, 50)})
    ledger.begin_load("e")
    ledger.finish_load("e")
    ledger.begin_run("e", 2, 4)
    balance = process_balance(
        ledger, {}, Passing(10, 20, 30, 2, 100), at_start_bytes=5000, kept_bytes=7, measured_bytes=0
    )
    assert balance.booked_bytes == 5000 + 1000
    assert balance.unbooked_bytes == 600 + 7 + (10 + 2 * 20 + 30 + 16 * 2 * 100) + RESTING_BYTES


def test_a_device_that_nobody_uses_does_not_drift_and_what_was_never_booked_does() -> None:
    ledger = Ledger(Device("cuda:0", 10**9, 2, 10**8), {})
    assert weights_balance(ledger, {}, 0).drift == 0.0
    assert weights_balance(ledger, {}, 1_000_000).drift > 0.05


def test_what_is_loading_may_be_there_or_not() -> None:
    ledger, footprints = Ledger(Device("cpu", 10**9, 2, 10**8), {"e": BIG}), {"e": BIG}
    ledger.begin_load("e")
    for mapped in (0, BIG.weights_bytes):
        assert weights_balance(ledger, footprints, mapped).drift == 0.0
        found = process_balance(
            ledger, footprints, NOTHING, at_start_bytes=10**6, kept_bytes=0, measured_bytes=10**6 + mapped
        )
        assert found.drift == 0.0
    ledger.finish_load("e")
    assert weights_balance(ledger, footprints, 0).drift < -0.9
    assert weights_balance(ledger, footprints, BIG.weights_bytes).drift == 0.0


def test_each_device_is_judged_apart_and_told_as_it_was_first_seen() -> None:
    drift, fine, leak = Drift(), Balance(1000, 0, 1000), Balance(1000, 0, 1100)
    for second in range(int(WINDOW_SECONDS) + 2):
        wrong = drift.look({"process": fine, "cuda:0": leak}, float(second))
    assert wrong == {"cuda:0": {"drift": 0.1, "booked_bytes": 1000, "unbooked_bytes": 0, "measured_bytes": 1100}}
    assert (drift.of("cuda:0"), drift.of("process"), drift.of("cuda:1")) == (0.1, 0.0, 0.0)
    assert drift.look({"cuda:0": fine}, WINDOW_SECONDS + 2) == {}
