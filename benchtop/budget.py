"""The budget of a run: how much of it is used, by steps or by the clock, and when to validate.

Only training counts: the clock stops while a run compiles, validates or writes.
"""

import time

from benchtop.machine import World

VALIDATIONS = 10        # per run, if --val_every is 0
MOST_EPOCHS = 4         # more passes over the same text teach little (arXiv:2305.16264)


class Clock:
    """Seconds of training; the clock stops while a run compiles, validates or writes.

    start() and stop() wait for the GPU; in between, steps queue up.
    """

    def __init__(self, world: World):
        self.world, self.stopped_at, self.begun = world, 0.0, None

    @property
    def seconds(self) -> float:
        return self.stopped_at + (time.perf_counter() - self.begun if self.begun is not None else 0.0)

    def share(self, cfg) -> float:
        """Share of --train_minutes that is used; 0 without --train_minutes."""
        return self.seconds / (60 * cfg.train_minutes) if cfg.train_minutes else 0.0

    def start(self) -> None:
        self.world.synchronize()
        self.begun = time.perf_counter()

    def stop(self) -> None:
        self.world.synchronize()
        self.stopped_at, self.begun = self.seconds, None


def budget_used(cfg, step: int, clock_share: float) -> float:
    """Share of the budget that is used, 0 to 1: that of the steps or that of the minutes, if larger.

    clock_share  used share of the minutes, the same on all processes
    """
    return min(1.0, max(step / cfg.num_steps if cfg.num_steps else 0.0, clock_share))


def validates(cfg, step: int, progress: float, before: float) -> bool:
    """Whether to validate after a step that took the used share of the budget from `before` to `progress`."""
    if progress >= 1 or cfg.val_every:
        return progress >= 1 or is_multiple(step, cfg.val_every)
    return int(VALIDATIONS * progress) > int(VALIDATIONS * before)


def is_multiple(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; False if `every` is 0."""
    return every > 0 and step % every == 0
