"""A wait for the device ends within its time limit, whatever the device does."""

import math

import pytest

from ddp_trainer.distributed.device_wait import wait_for


class DeviceEvent:
    """An event whose `query` returns True from call number `reached_at` (1-based) onward."""

    def __init__(self, reached_at: float) -> None:
        self.reached_at, self.queries, self.synchronized = reached_at, 0, False

    def query(self) -> bool:
        self.queries += 1
        return self.queries >= self.reached_at

    def synchronize(self) -> None:
        self.synchronized = True


def test_wait_with_a_limit_returns_when_the_event_is_reached() -> None:
    event = DeviceEvent(reached_at=3)
    wait_for(event, seconds=60)
    assert (event.queries, event.synchronized) == (3, False)


def test_wait_longer_than_the_limit_is_an_error() -> None:
    with pytest.raises(TimeoutError, match=r"within 0 s; another process may have died"):
        wait_for(DeviceEvent(reached_at=math.inf), seconds=0.01)


def test_wait_without_a_limit_uses_synchronize() -> None:
    event = DeviceEvent(reached_at=math.inf)
    wait_for(event)
    assert (event.queries, event.synchronized) == (0, True)
