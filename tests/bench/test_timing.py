"""Times of a device that is simulated, so that they are known exactly."""

import pytest

from jax_w4moe import timing

DISPATCH_S = 1e-4  # of a program, by the host
SLOW_DISPATCH_S = 1e-2  # of the first few
START_S = 7e-4  # from dispatch to start on an idle device
NOTICE_S = 5e-5  # from an end until the host goes on
PROGRAM_S = 3e-3  # on the device


class Device:
    """One program at a time, in order; the clock is the host's."""

    def __init__(self) -> None:
        self.now = self.free = 0.0
        self.slow = 0  # of the next dispatches

    def dispatch(self) -> float:
        self.now += SLOW_DISPATCH_S if self.slow > 0 else DISPATCH_S
        self.slow -= 1
        self.free = max(self.free, self.now + START_S) + PROGRAM_S
        return self.free

    def block(self, end: float) -> None:
        self.now = max(self.now, end + NOTICE_S)

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("pause_s", "slow"), [(0.0, 0), (0.0, 10), (0.2, 0)])
def test_only_the_devices_time_counts(
    pause_s: float, slow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = timing.Program(lambda x: x + 1, [1.0, 2.0], calls=4)
    device = Device()
    device.slow = slow
    monkeypatch.setattr(timing, "time", device)
    monkeypatch.setattr(timing.jax, "block_until_ready", device.block)
    monkeypatch.setattr(program, "_dispatch", device.dispatch)
    monkeypatch.setattr(program, "_once", PROGRAM_S)
    times = program.times_us(repeats=5, pause_s=pause_s)
    assert times == pytest.approx([PROGRAM_S / 4 * 1e6] * 5)
