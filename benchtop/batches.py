"""Batches: the tokens of each training step, a pure function of (manifest, seed, step).

Knows tokens and a Config's seq_len, max_doc_len, batch_tokens, micro_batch_tokens, seed; no model, no device.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchtop.errors import UserError


class Rows:
    """The rows of all epochs: which tokens are trained on together, and when.

    A document longer than a row or than max_doc_len is cut into parts; each part but the first gets an extra
    <|endoftext|> in front, so every row starts like a document and the mask keeps parts apart.
    A row is one part of full length, or several short parts in an order set by the seed; what does not fit
    at the end of the row is dropped, so an epoch has each token at most once. Rows are reshuffled for each
    epoch. The constructor plans all rows from the document lengths; any step is then a lookup.

    seq_len  inputs in a row (T); a row has T + 1 tokens, the last of which is only a target
    """

    def __init__(self, shards: list[np.ndarray], cfg, eot_id: int):
        self.shards, self.eot_id, self.seed = shards, eot_id, cfg.seed
        self.length = cfg.seq_len + 1
        self.bases = np.cumsum([0] + [len(shard) for shard in shards])
        self._cut_documents(min(cfg.max_doc_len, self.length))
        self._pack_rows()
        self._orders: dict[int, np.ndarray] = {}
        if not self.num_rows:
            raise UserError(f"the training data have {self.bases[-1]:,} tokens, too few for one row of "
                            f"--seq_len {cfg.seq_len}; lower --seq_len or add text")

    def _cut_documents(self, longest: int) -> None:
        """Fill, for each part, `starts` (its first token), `sizes` (its length with the leading
        <|endoftext|>), `continues` (whether that one is extra) and `ends` (whether it ends its document)."""
        starts, lengths = [], []
        for base, shard in zip(self.bases, self.shards, strict=False):
            begins = np.flatnonzero(shard == self.eot_id)
            starts.append(begins + base)
            lengths.append(np.diff(begins, append=len(shard)))
        start, length = np.concatenate(starts), np.concatenate(lengths)
        if not len(start):
            raise UserError(f"the training data have no <|endoftext|> (token {self.eot_id}), with which each "
                            "document begins; they were made with another tokenizer")
        # the first part holds `longest` tokens, each later one an extra <|endoftext|> and longest - 1 tokens
        parts = 1 + np.maximum(0, -(-(length - longest) // (longest - 1)))
        document = np.repeat(np.arange(len(start)), parts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
        offset = np.where(number == 0, 0, longest + (number - 1) * (longest - 1))
        self.starts = start[document] + offset
        self.continues = number > 0
        self.sizes = np.minimum(longest, length[document] - offset + self.continues)
        self.ends = number == parts[document] - 1

    def _pack_rows(self) -> None:
        """Fill `order` (parts, row by row), `first` and `last`: row i is order[first[i]:last[i]]."""
        rng = np.random.default_rng([self.seed, 0])
        whole = np.flatnonzero(self.sizes == self.length)
        short = rng.permutation(np.flatnonzero(self.sizes < self.length))
        reach = np.concatenate([[0], np.cumsum(self.sizes[short])])
        # after[i]: the part at which the next row begins if a row begins at part i
        after = np.searchsorted(reach, reach[:-1] + self.length, side="left").tolist()
        first, place = [], 0
        while place < len(short) and after[place] <= len(short):
            first.append(place)
            place = after[place]
        first = np.array(first, dtype=np.int64)
        last = np.array([after[place] for place in first], dtype=np.int64)
        self.order = np.concatenate([whole, short])
        self.first = np.concatenate([np.arange(len(whole)), first + len(whole)])
        self.last = np.concatenate([np.arange(len(whole)) + 1, last + len(whole)])
        self.num_rows = len(self.first)
        # tokens of the data in an epoch, without the extra <|endoftext|> of parts
        own = np.concatenate([[0], np.cumsum(self.continues[self.order])])
        self.num_tokens = self.num_rows * self.length - int((own[self.last] - own[self.first]).sum())
        # inside a row, the last token of a part that does not end its document has no true next token
        cut = np.concatenate([[0], np.cumsum(~self.ends[self.order])])
        self.num_targets = self.length - 1 - (cut[self.last - 1] - cut[self.first])

    def numbers(self, step: int, rows_per_step: int) -> np.ndarray:
        """(rows_per_step) row numbers of a step; steps count from 0."""
        position = np.arange(step * rows_per_step, (step + 1) * rows_per_step)
        epochs, places = np.divmod(position, self.num_rows)
        return np.array([self._order_of(epoch)[place]
                         for epoch, place in zip(epochs.tolist(), places, strict=True)])

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self.seed, 1, epoch]).permutation(self.num_rows)
        return self._orders[epoch]

    def targets_in_step(self, step: int, rows_per_step: int) -> int:
        """Number of targets in a step: all positions except those whose true next token is not in the row."""
        return int(self.num_targets[self.numbers(step, rows_per_step)].sum())

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a row, (T) int64 each; a target of -1 is ignored."""
        tokens = np.empty(self.length, dtype=np.int64)
        ignored = []
        filled = 0
        for part in self.order[self.first[number]:self.last[number]]:
            if self.continues[part]:
                tokens[filled] = self.eot_id
                filled += 1
            size = min(int(self.sizes[part]) - bool(self.continues[part]), self.length - filled)
            shard = int(np.searchsorted(self.bases, self.starts[part], side="right")) - 1
            start = int(self.starts[part] - self.bases[shard])
            tokens[filled:filled + size] = self.shards[shard][start:start + size]
            filled += size
            if not self.ends[part] and filled < self.length:
                ignored.append(filled - 1)
        inputs, targets = tokens[:-1], tokens[1:].copy()
        targets[ignored] = -1
        return inputs, targets

    def micro_batches(self, step: int, cfg, rank: int = 0, world_size: int = 1,
                      ) -> Iterator[tuple[Tensor, Tensor]]:
        """One process's micro-batches of a step: (B, T) int64 inputs and targets, with the same B for all.

        Rows are dealt to the ranks in turn. If they do not divide evenly, rows without targets are added.
        """
        mine = list(self.numbers(step, cfg.rows_per_step)[rank::world_size])
        count, rows = micro_batch_shape(cfg, world_size)
        mine += [-1] * (count * rows - len(mine))
        for start in range(0, len(mine), rows):
            batch = [self.row(number) if number >= 0 else self._empty_row()
                     for number in mine[start:start + rows]]
            inputs, targets = zip(*batch, strict=True)
            yield torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))

    def _empty_row(self) -> tuple[np.ndarray, np.ndarray]:
        return np.full(self.length - 1, self.eot_id), np.full(self.length - 1, -1)


def micro_batch_shape(cfg, world_size: int) -> tuple[int, int]:
    """(micro-batches per step, rows in each), the same for every process."""
    rows = math.ceil(cfg.rows_per_step / world_size)
    count = math.ceil(rows / (cfg.micro_batch_tokens // cfg.seq_len or rows))
    return count, math.ceil(rows / count)


@dataclass(frozen=True)
class Batch:
    """One process's share of a step.

    num_targets    targets in the step, over all processes
    micro_batches  pairs of inputs and targets, (B, T) each
    """
    num_targets: int
    micro_batches: list[tuple[Tensor, Tensor]]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """A Batch with `change` applied to every tensor, such as a copy to a device."""
        pairs = [(change(inputs), change(targets)) for inputs, targets in self.micro_batches]
        return Batch(self.num_targets, pairs)


def batch_of(rows: Rows, cfg, step: int, rank: int = 0, world_size: int = 1) -> Batch:
    return Batch(rows.targets_in_step(step, cfg.rows_per_step),
                 list(rows.micro_batches(step, cfg, rank, world_size)))
