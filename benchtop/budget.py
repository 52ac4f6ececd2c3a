"""The budget of a run: how much of it is used, by steps or by the clock, and when to validate.

Time is the training's own: it stands while a run compiles, validates or writes.
"""

import time

from benchtop.machine import World

VALIDATIONS = 10        # over a run, where --val_every is 0
MOST_EPOCHS = 4         # beyond which repeated text teaches little (arXiv:2305.16264)


class Clock:
    """Seconds of training; it stands while a run compiles, validates or writes.

    A GPU is waited for when the clock starts and stops; in between, steps queue up.
    """

    def __init__(self, world: World):
        self.world, self.stopped_at, self.begun = world, 0.0, None

    @property
    def seconds(self) -> float:
        return self.stopped_at + (time.perf_counter() - self.begun if self.begun else 0.0)

    def share(self, cfg) -> float:
        """Of the minutes that --train_minutes gives; 0 without."""
        return self.seconds / (60 * cfg.train_minutes) if cfg.train_minutes else 0.0

    def start(self) -> None:
        self.world.synchronize()
        self.begun = time.perf_counter()

    def stop(self) -> None:
        self.world.synchronize()
        self.stopped_at, self.begun = self.seconds, None


def budget_used(cfg, step: int, clock_share: float) -> float:
    """Share of the budget that is used, 0 to 1: of the steps, or of the minutes if that is more.

    clock_share  of the minutes, as all processes know it
    """
    return min(1.0, max(step / cfg.num_steps if cfg.num_steps else 0.0, clock_share))


def validates(cfg, step: int, progress: float, before: float) -> bool:
    """Whether to validate after a step that brought the share of the budget from `before` to `progress`."""
    if progress >= 1 or cfg.val_every:
        return progress >= 1 or is_multiple(step, cfg.val_every)
    return int(VALIDATIONS * progress) > int(VALIDATIONS * before)


def is_multiple(step: int, every: int) -> bool:
    """Whether `step` is one of every so many; never where that is 0."""
    return every > 0 and step % every == 0
