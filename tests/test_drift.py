"""The alarm for memory that nobody booked, or that is booked and not there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.drift import TOLERANCE, WINDOW_SECONDS, Balance, DriftAlarm
from appliance.drivers.devices import anonymous_bytes
from tests.kit_process import alone

FINE, LEAK, LACK = Balance(800, 200, 1000), Balance(800, 200, 1060), Balance(800, 200, 700)


@pytest.mark.parametrize(
    ("measured", "drift"), [(800, 0.0), (900, 0.0), (1000, 0.0), (1100, 0.1), (700, -0.1), (0, -0.8)]
)
def test_drift_is_what_lies_outside_what_is_booked(measured: int, drift: float) -> None:
    assert Balance(800, 200, measured).drift == pytest.approx(drift)


@pytest.mark.parametrize("wrong", [LEAK, LACK])
def test_what_is_wrong_for_a_whole_window_raises_the_alarm_and_one_look_that_is_not_lowers_it(wrong: Balance) -> None:
    alarm = DriftAlarm()
    raised = [alarm.look(wrong, float(second)) for second in range(int(WINDOW_SECONDS) + 10)]
    assert raised == [second >= WINDOW_SECONDS for second in range(int(WINDOW_SECONDS) + 10)]
    assert alarm.drift == pytest.approx(wrong.drift)
    assert not alarm.look(FINE, WINDOW_SECONDS + 10)
    assert alarm.drift == 0.0


def test_a_peak_of_a_few_seconds_raises_nothing() -> None:
    alarm = DriftAlarm()
    assert not any(alarm.look(LEAK if second % 10 else FINE, float(second)) for second in range(300))


def test_too_much_after_too_little_begins_a_new_window() -> None:
    alarm = DriftAlarm()
    looks = [LEAK] * 50 + [LACK] * 50
    assert not any(alarm.look(balance, float(second)) for second, balance in enumerate(looks))


def test_the_drift_told_is_the_least_of_the_window() -> None:
    alarm = DriftAlarm()
    for second in range(200):
        alarm.look(Balance(800, 200, 1100 + second % 30), float(second))
    assert alarm.drift == pytest.approx(0.1)


def test_a_real_leak_is_seen_by_who_measures_and_nothing_else_is() -> None:
    alone(leak, 0, False)
    alone(leak, 64 << 20, True)


def leak(size: int, raises: bool) -> None:
    start = anonymous_bytes()
    held = np.ones(size, np.uint8)
    balance = Balance(start, 16 << 20, anonymous_bytes())
    alarm = DriftAlarm()
    assert any(alarm.look(balance, float(second)) for second in range(61)) == raises
    assert held.nbytes == size


@given(st.lists(st.integers(0, 2000), max_size=200))
def test_no_alarm_while_any_look_of_the_window_was_fine(measured: list[int]) -> None:
    alarm = DriftAlarm()
    for second, value in enumerate(measured):
        raised = alarm.look(Balance(800, 200, value), float(second))
        recent = measured[max(0, second - int(WINDOW_SECONDS)) : second + 1]
        sides = {abs(d) > TOLERANCE and (d > 0) for d in (Balance(800, 200, m).drift for m in recent)}
        enough = second >= WINDOW_SECONDS
        all_out = all(abs(Balance(800, 200, m).drift) > TOLERANCE for m in recent)
        assert raised == (enough and all_out and len(sides) == 1)
