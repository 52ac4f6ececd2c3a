"""Evaluation: the loss of a model on held-out text, in nats per token and bits per byte.

An experiment supplies a model, never a loss: the cross-entropy of model.logits(model.hidden) is computed
here, on the same tokens in the same windows for any number of processes and any batch size.
"""

import math
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from tiktoken import Encoding
from torch import Tensor, nn

from benchtop.errors import UserError
from benchtop.machine import World
from benchtop.memory import chunk_rows
from benchtop.tokenizer import token_bytes


@dataclass(frozen=True)
class Validation:
    """The loss on held-out tokens: nats per token, and bits per byte of text without special tokens.

    nats  (2, documents) float64: the nats of each document's special tokens, then of its text
    """
    val_loss: float
    val_bpb: float
    nats: Tensor | None = field(default=None, compare=False, repr=False)


def chunk_losses(model: nn.Module, x: Tensor, targets: Tensor, likeliest: bool = False) -> Tensor:
    """(1, N) float32 losses of hidden states x (N, D); call it under no_grad.

    likeliest  return (2, N): the losses, then 1 where the target's logit is largest (first of ties), else 0
    """
    z = model.logits(x)                                                                     # (N, V)
    losses = F.cross_entropy(z, targets, ignore_index=-1, reduction="none")                 # (N)
    return torch.stack([losses, (z.argmax(-1) == targets).float()]) if likeliest else losses[None]


class TokenLosses:
    """The loss of each target under a model.

    compiled  whether to compile what follows the hidden states
    """

    def __init__(self, model: nn.Module, world: World, compiled: bool = False):
        self.model, self.world, self.compiled = model, world, compiled
        self.kernel = torch.compile(chunk_losses, dynamic=False) if compiled else chunk_losses

    def __call__(self, inputs: Tensor, targets: Tensor, likeliest: bool = False) -> Tensor:
        """Loss of each target in nats, 0 where there is no target: (B, T) float32, without a graph.

        targets    (B, T) on the CPU, so that a GPU need not be waited for; inputs (B, T) are on the device
        likeliest  return (2, B, T): the losses, then 1 where the target is the likeliest token, else 0
        """
        wanted, columns = targets.flatten(), self.model.cfg.padded_vocab_size               # (BT)
        places = (wanted >= 0).nonzero()[:, 0]      # the head computes only these
        wanted, places = self.world.sent(wanted), self.world.sent(places)
        # not under no_grad: with gradients on, the layers compiled for training serve for validation, too
        x = self.model.hidden(inputs).detach().flatten(0, 1)                                # (BT, D)
        found = torch.zeros(1 + likeliest, len(wanted), device=x.device)
        with torch.no_grad():
            for some in places.split(chunk_rows(x, columns)):
                # padded to the full chunk size, so that one compiled kernel serves all chunks
                filled = F.pad(some, (0, chunk_rows(x, columns) - len(some)))
                found[:, some] = self.kernel(self.model, x[filled], wanted[filled], likeliest)[:, :len(some)]
        found = found.view(1 + likeliest, *targets.shape)
        return found if likeliest else found[0]


class HeldOut:
    """The held-out tokens in consecutive windows of seq_len; each token is predicted once.

    A window predicts its seq_len tokens after an initial <|endoftext|>, as rows do in training.
    raises  UserError if the tokens contain no text
    """

    def __init__(self, shards: list[np.ndarray], cfg, tokenizer: Encoding):
        stream = np.concatenate(shards)
        self.tokens = stream[:cfg.val_tokens or len(stream)].astype(np.int64)
        self.is_whole = len(self.tokens) == len(stream)
        self.seq_len, self.eot_id = cfg.seq_len, tokenizer.eot_token
        self.token_bytes = token_bytes(tokenizer)
        self.num_bytes = torch.tensor([len(token) for token in self.token_bytes])           # (V)
        self.num_windows = math.ceil(len(self.tokens) / self.seq_len)
        if not self.num_bytes[self.tokens].any():
            raise UserError(f"the {len(stream):,} tokens of the val shards have no text to validate on; make "
                            "the data again" if self.is_whole else
                            f"--val_tokens {len(self.tokens)} leaves no text to validate on; use more, or 0 "
                            "for all")
        # (N) each token's document number; tokens before the first <|endoftext|> are a document, too
        self.document_of = np.cumsum(self.tokens == self.eot_id) - (self.tokens[0] == self.eot_id)

    def text(self) -> bytes:
        """The bytes of the tokens in the windows, without special tokens."""
        return b"".join(self.token_bytes[token] for token in self.tokens.tolist())

    def windows(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """(B, T) inputs and targets of these windows; targets are -1 after the end and in missing windows."""
        targets = np.full((len(numbers), self.seq_len), -1)
        for place, number in enumerate(numbers):
            window = self.tokens[number * self.seq_len:(number + 1) * self.seq_len]
            targets[place, :len(window)] = window
        inputs = np.roll(targets, 1, axis=1)
        inputs[:, 0] = self.eot_id
        return torch.from_numpy(np.where(inputs < 0, self.eot_id, inputs)), torch.from_numpy(targets)

    def places(self, numbers: list[int], of_text: Tensor) -> Tensor:
        """(B, T) index into the flattened Validation.nats to which each loss of these windows is added.

        of_text  (B, T) whether a target has bytes
        """
        documents = np.zeros(of_text.shape, np.int64)   # without a target, the loss of 0 may go anywhere
        for place, number in enumerate(numbers):
            window = self.document_of[number * self.seq_len:(number + 1) * self.seq_len]
            documents[place, :len(window)] = window
        return torch.from_numpy(documents) + (self.document_of[-1].item() + 1) * of_text

    @property
    def num_documents(self) -> int:
        return int(self.document_of[-1]) + 1

    def table(self, nats: Tensor) -> list[tuple[int, int, int, float, float]]:
        """(number, tokens, bytes, nats, nats of the text alone) of each document in Validation.nats.

        val_loss is all nats / all tokens; val_bpb is all nats of the text / (ln 2 * all bytes).
        """
        tokens = np.bincount(self.document_of).tolist()
        num_bytes = np.bincount(self.document_of, self.num_bytes[self.tokens]).astype(int).tolist()
        return list(zip(range(len(tokens)), tokens, num_bytes, nats.sum(0).tolist(), nats[1].tolist(),
                        strict=True))

    def evaluate(self, losses_of: TokenLosses, rows: int, world: World) -> Validation:
        """Validate on `rows` windows at a time; sums are float64."""
        nats = torch.zeros(2, dtype=torch.float64, device=world.float64_device)     # of all tokens, of text
        by_document = nats.new_zeros(2 * (self.document_of[-1].item() + 1))
        counts, model = torch.zeros(2, dtype=torch.float64), losses_of.model        # tokens, bytes of text
        model.eval()
        rounds = math.ceil(self.num_windows / (rows * world.size))
        for start in range(world.rank * rows, rounds * rows * world.size, rows * world.size):
            numbers = list(range(start, start + rows))
            inputs, targets = self.windows(numbers)
            byte_count = self.num_bytes[targets.clamp(min=0)] * (targets >= 0)              # (B, T)
            counts += torch.stack([(targets >= 0).sum(), byte_count.sum()])
            of_text = byte_count > 0                                                            # (B, T)
            places = world.sent(self.places(numbers, of_text))                                  # (B, T)
            of_text = world.sent(of_text)
            losses = losses_of(world.sent(inputs), targets)                                     # (B, T)
            # in two steps, since a device without float64 cannot convert before the copy
            losses = torch.stack([losses, losses * of_text]).to(nats.device).to(nats.dtype)     # (2, B, T)
            nats += losses.sum((1, 2))
            by_document.index_add_(0, places.flatten().to(nats.device), losses[0].flatten())
        model.train()
        nats, text_nats, tokens, text_bytes = world.sum(torch.cat([nats, counts.to(nats.device)])).tolist()
        return Validation(nats / tokens, text_nats / math.log(2) / text_bytes,
                          world.sum(by_document).view(2, -1).cpu())


def bpb_by_source(table: list[tuple], documents: dict[str, int]) -> dict[str, float]:
    """Bits per byte of each source of a mixture; --val_tokens may leave no text of some sources.

    table      rows of HeldOut.table
    documents  number of held-out documents of each source, in the order of the table
    """
    rows, found = iter(table), {}
    for name, count in documents.items():
        sizes = [(num_bytes, text_nats) for *_, num_bytes, _, text_nats in islice(rows, count)]
        if num_bytes := sum(size for size, _ in sizes):
            found[name] = sum(nats for _, nats in sizes) / math.log(2) / num_bytes
    return found
