"""When a process that keeps ending is started again."""

from proxy.child import BackOff

FIRST_S, LONGEST_S = 0.1, 10.0


def test_pauses_double_up_to_the_longest() -> None:
    back_off = BackOff(FIRST_S, LONGEST_S, settled_s=60.0)
    back_off.started()
    assert [back_off.failed() for _ in range(4)] == [0.1, 0.2, 0.4, 0.8]
    assert back_off.failures == 4
    assert not back_off.is_over


def test_process_that_has_failed_for_a_day_is_still_started_again() -> None:
    """2.0**1024 is an OverflowError: after three hours at ten seconds each nobody would start the worker any more."""
    back_off = BackOff(FIRST_S, LONGEST_S, settled_s=60.0)
    back_off.started()
    assert {back_off.failed() for _ in range(8640)} >= {LONGEST_S}
    assert back_off.failed() == LONGEST_S
