"""Evaluation: the loss of a model on held-out text, in nats per token and bits per byte.

An experiment hands over a model, never a number: what is computed here is the cross-entropy of model.logits
over model.hidden, for the same tokens in the same windows for any number of processes and rows at a time.
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
    """What the model makes of held-out tokens: nats per token, and bits per byte of text without specials.

    nats  (2, documents) float64 of each document, of its special tokens and of its text
    """
    val_loss: float
    val_bpb: float
    nats: Tensor | None = field(default=None, compare=False, repr=False)


def chunk_losses(model: nn.Module, x: Tensor, targets: Tensor, likeliest: bool = False) -> Tensor:
    """(1, N) float32 losses of hidden states x (N, D), without their gradient.

    likeliest  (2, N): the losses, then 1 where the target's logit is the largest (the first such), else 0
    """
    z = model.logits(x)                                                                     # (N, V)
    losses = F.cross_entropy(z, targets, ignore_index=-1, reduction="none")                 # (N)
    return torch.stack([losses, (z.argmax(-1) == targets).float()]) if likeliest else losses[None]


class TokenLosses:
    """The loss of each target under a model.

    compiled  whether to compile what is behind the hidden states
    """

    def __init__(self, model: nn.Module, world: World, compiled: bool = False):
        self.model, self.world, self.compiled = model, world, compiled
        self.kernel = torch.compile(chunk_losses, dynamic=False) if compiled else chunk_losses

    def __call__(self, inputs: Tensor, targets: Tensor, likeliest: bool = False) -> Tensor:
        """Loss of each target in nats, 0 where there is none; all (B, T), the result float32, no graph.

        targets    (B, T) on the CPU, which saves a GPU from being waited for; inputs are on the device
        likeliest  the result is (2, B, T): the losses, then 1 where the target is the likeliest token, else 0
        """
        wanted, columns = targets.flatten(), self.model.cfg.padded_vocab_size               # (BT)
        places = (wanted >= 0).nonzero()[:, 0]      # the head is spared the others
        wanted, places = self.world.sent(wanted), self.world.sent(places)
        # detached only here: with gradients on, the layers compiled for training serve for validation too
        x = self.model.hidden(inputs).detach().flatten(0, 1)                                # (BT, D)
        found = torch.zeros(1 + likeliest, len(wanted), device=x.device)
        with torch.no_grad():
            for some in places.split(chunk_rows(x, columns)):
                # filled up to the size of all chunks, so that one kernel serves them
                filled = F.pad(some, (0, chunk_rows(x, columns) - len(some)))
                found[:, some] = self.kernel(self.model, x[filled], wanted[filled], likeliest)[:, :len(some)]
        found = found.view(1 + likeliest, *targets.shape)
        return found if likeliest else found[0]


class HeldOut:
    """The held-out tokens in fixed windows of seq_len, one after the other; each token is predicted once.

    A window begins with an <|endoftext|>, as rows do in training, and predicts its seq_len tokens.
    raises  UserError if there is no text in them
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
        # (N) number of the document that each token is of; what precedes the first <|endoftext|> is one, too
        self.document_of = np.cumsum(self.tokens == self.eot_id) - (self.tokens[0] == self.eot_id)

    def text(self) -> bytes:
        """The bytes that the windows hold, special tokens left out."""
        return b"".join(self.token_bytes[token] for token in self.tokens.tolist())

    def windows(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """(B, T) inputs and targets of these windows; -1 in targets behind the end and where no window is."""
        targets = np.full((len(numbers), self.seq_len), -1)
        for place, number in enumerate(numbers):
            window = self.tokens[number * self.seq_len:(number + 1) * self.seq_len]
            targets[place, :len(window)] = window
        inputs = np.roll(targets, 1, axis=1)
        inputs[:, 0] = self.eot_id
        return torch.from_numpy(np.where(inputs < 0, self.eot_id, inputs)), torch.from_numpy(targets)

    def places(self, numbers: list[int], of_text: Tensor) -> Tensor:
        """(B, T) where in Validation.nats the losses of these windows are added up.

        of_text  (B, T) whether a target has bytes
        """
        documents = np.zeros(of_text.shape, np.int64)   # where no target is, its loss of 0 may go anywhere
        for place, number in enumerate(numbers):
            window = self.document_of[number * self.seq_len:(number + 1) * self.seq_len]
            documents[place, :len(window)] = window
        return torch.from_numpy(documents) + (self.document_of[-1].item() + 1) * of_text

    @property
    def num_documents(self) -> int:
        return int((self.tokens == self.eot_id).sum())

    def table(self, nats: Tensor) -> list[tuple[int, int, int, float, float]]:
        """Number, tokens, bytes, nats, and nats of the text alone, of each document of Validation.nats.

        All nats over all tokens are val_loss; those of the text, over ln 2 and all bytes, val_bpb.
        """
        tokens = np.bincount(self.document_of).tolist()
        num_bytes = np.bincount(self.document_of, self.num_bytes[self.tokens]).astype(int).tolist()
        return list(zip(range(len(tokens)), tokens, num_bytes, nats.sum(0).tolist(), nats[1].tolist(),
                        strict=True))

    def evaluate(self, losses_of: TokenLosses, rows: int, world: World) -> Validation:
        """Validate with `rows` rows at a time; sums in float64."""
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
            # in two steps, since a device without float64 cannot convert on the way
            losses = torch.stack([losses, losses * of_text]).to(nats.device).to(nats.dtype)     # (2, B, T)
            nats += losses.sum((1, 2))
            by_document.index_add_(0, places.flatten().to(nats.device), losses[0].flatten())
        model.train()
        nats, text_nats, tokens, text_bytes = world.sum(torch.cat([nats, counts.to(nats.device)])).tolist()
        return Validation(nats / tokens, text_nats / math.log(2) / text_bytes,
                          world.sum(by_document).view(2, -1).cpu())


def bpb_by_source(table: list[tuple], documents: dict[str, int]) -> dict[str, float]:
    """Bits per byte of each source of a mixture; of those that are validated on, with fewer tokens not all.

    table      as HeldOut.table has it
    documents  how many are of each source, one source behind the other
    """
    rows, found = iter(table), {}
    for name, count in documents.items():
        sizes = [(num_bytes, text_nats) for *_, num_bytes, _, text_nats in islice(rows, count)]
        if num_bytes := sum(size for size, _ in sizes):
            found[name] = sum(nats for _, nats in sizes) / math.log(2) / num_bytes
    return found
