"""A run without data: the real training loop on random tokens with the frequencies of text; writes nothing.

For benchmarks and comparisons; a model learns nothing about text from it.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import torch

from benchtop.batches import Batch, Rows
from benchtop.budget import Clock
from benchtop.evaluation import TokenLosses
from benchtop.run import Experiment, Run
from benchtop.steps import LossScale

MEAN_DOCUMENT = 700     # tokens


def zipf_tokens(count: int, vocab_size: int, eot_id: int, mean: int = MEAN_DOCUMENT, seed: int = 0,
                ) -> np.ndarray:
    """Documents of about `mean` tokens, each after eot_id; the frequency of the n-th token falls as 1 / n."""
    draw = np.random.default_rng(seed)
    # the logarithm of a token's frequency rank is uniform (Zipf's law)
    tokens = np.exp(draw.random(count) * np.log(vocab_size - 1)).astype(np.int64) - 1
    tokens[tokens == eot_id] = 0
    tokens[draw.random(count) < 1 / mean] = eot_id
    tokens[0] = eot_id
    return tokens.astype(np.uint32)


class SyntheticRun(Run):
    """The real run on synthetic batches; it never validates, saves or writes a log.

    `rows` collects its metrics. `after_step(run)` is called once a step is queued; the run ends when that
    call returns True or the budget is used up.
    """

    def __init__(self, experiment: Experiment, cfg, world, model, optimizer, compiled: bool,
                 after_step: Callable[["SyntheticRun"], bool] = lambda run: False, mean: int = MEAN_DOCUMENT):
        count = min(4_000_000, max(20 * cfg.seq_len, 8 * cfg.batch_tokens))
        rows = Rows([zipf_tokens(count, cfg.vocab_size, model.eot_id, mean)], cfg, model.eot_id)
        super().__init__(experiment, cfg, world, model, optimizer, SimpleNamespace(rows=rows),
                         TokenLosses(model, world, compiled), None, Clock(world),
                         LossScale(enabled=world.dtype == torch.float16))
        self.after_step, self.rows = after_step, []

    def batches(self) -> Iterator[Batch]:
        for batch in super().batches():
            yield batch
            if self.after_step(self):
                return

    @property
    def told_to_stop(self) -> int:
        return 0

    def validate_and_log(self) -> None:
        if self.logs:
            self.rows.append(dict(self.values))

    def save(self) -> None:
        pass
