"""A checkout of nanochat or nanoGPT on the loop and the data of train_gpt.py, for benchmarks/race.py.

    cp benchmarks/peer.py idea_peer.py && python idea_peer.py --checkout peers/nanochat --preset demo

Model, optimizer, compilation and schedule are the checkout's own. Batches, clock, validation and run folder
are the bench's, as for every other script, so runs can be compared. What differs from the peer's own program:
one process, no evaluation of its own; the schedules follow the share of the budget that is used, since a
clock may end the run; nanoGPT computes in bfloat16 on a CPU that multiplies it natively, where its own
train.py would stay in float32. Nothing of a peer is in this repository.
"""

import importlib
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import train_gpt
from benchtop import places
from benchtop.errors import UserError
from benchtop.run import Experiment
from train_gpt import CommonConfig


@dataclass(frozen=True)
class Config(CommonConfig):
    model_name: str = "peer"          # last part of the run folder's name
    checkout: str = ""                # folder with a clone of nanochat or nanoGPT
    rates: float = 1.0                # what all learning rates of the peer are multiplied by
    warmup_frac: float = 0.02         # first fraction of training, in which the learning rate climbs from 0
    grad_clip: float = 0.0            # clip the norm of all gradients to this; 0: as the peer does

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "rates", "grad_clip")
        self.require("warmup_frac", 0 <= self.warmup_frac < 1, "0 or more, and less than 1")
        if self.checkout and not self.grad_clip and (self.folder / "model.py").is_file():
            self.fill(grad_clip=1.0)    # as nanoGPT's train.py

    @property
    def folder(self) -> Path:
        return places.ROOT / self.checkout


def module_of(cfg: Config, name: str) -> ModuleType:
    """A module of the checkout.

    raises  UserError if it cannot be imported
    """
    if str(cfg.folder) not in sys.path:
        sys.path.insert(0, str(cfg.folder))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--checkout {cfg.checkout} cannot be used: {error}") from error


class Peer(train_gpt.Model):
    """What the bench asks of a model; `hidden` gives the peer's own logits, and `logits` hands them on."""

    def __init__(self, cfg: Config, eot_id: int, dtype: torch.dtype = torch.float32,
                 flex: dict | None = None):
        super().__init__(cfg, eot_id, dtype, flex)
        self.peer = self.make(cfg)
        self.call = self.peer

    def make(self, cfg: Config) -> nn.Module:
        raise NotImplementedError

    @property
    def layers(self) -> nn.ModuleList:
        return self.peer.transformer["h"]

    @property
    def head(self) -> nn.Parameter:
        return self.peer.lm_head.weight

    def logits(self, x: Tensor) -> Tensor:
        return x[:, :self.cfg.vocab_size]                                                   # (N, V)

    def compile_parts(self) -> None:
        self.call = torch.compile(self.peer, dynamic=False)

    def remarks(self) -> list[str]:
        return [f"peer        {type(self).__name__}, rates times {self.cfg.rates:g}, warm-up "
                f"{self.cfg.warmup_frac:g}"]


class Nanochat(Peer):
    """With the learning rates, schedules and weight decay of its scripts/base_train.py."""

    momentum_steps = 400

    def make(self, cfg: Config) -> nn.Module:
        os.environ["NANOCHAT_DTYPE"] = str(self.dtype).removeprefix("torch.")
        gpt = module_of(cfg, "nanochat.gpt")
        peer = gpt.GPT(gpt.GPTConfig(sequence_len=cfg.seq_len, vocab_size=cfg.vocab_size,
                                     n_layer=cfg.num_layers, n_head=cfg.num_heads, n_kv_head=cfg.num_heads,
                                     n_embd=cfg.model_dim))
        peer.init_weights()
        return peer

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.call(inputs, targets, loss_reduction="sum")                             # ()

    def hidden(self, inputs: Tensor) -> Tensor:
        return self.peer(inputs)                                                            # (B, T, V)

    def flops_per_token(self) -> float:
        return self.peer.estimate_flops()

    def make_optimizer(self, cfg: Config) -> torch.optim.Optimizer:
        scale = (cfg.batch_tokens / 2**19) ** 0.5
        # its rule for weight decay, by parameters at 12 tokens each, against a reference of 12 layers
        with torch.device("meta"):
            gpt = module_of(cfg, "nanochat.gpt")
            reference = gpt.GPT(gpt.GPTConfig(vocab_size=cfg.vocab_size))
        sizes = [sum(peer.num_scaling_params()[part] for part in ("transformer_matrices", "lm_head"))
                 for peer in (reference, self.peer)]
        self.decay = 0.28 * scale * sizes[0] / sizes[1]
        return self.peer.setup_optimizer(unembedding_lr=0.008 * scale, embedding_lr=0.3 * scale,
                                         scalar_lr=0.5 * scale, matrix_lr=0.02 * scale,
                                         weight_decay=self.decay)

    def schedule(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Momentum and weight decay of Muon."""
        momentum = 0.85 + 0.12 * min(1, step / self.momentum_steps)
        if step >= self.momentum_steps and self.progress > 0.35:
            momentum = 0.97 - 0.07 * (self.progress - 0.35) / 0.65
        for group in optimizer.param_groups:
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = self.decay * 0.5 * (1 + math.cos(math.pi * self.progress))

    @staticmethod
    def lr_scale(cfg: Config, progress: float) -> float:
        return min(1.0, 0.05 + 0.95 * (1 - progress) / 0.65)


class NanoGPT(Peer):
    """With AdamW and the cosine of its train.py; the rate of 124M parameters, for others by sqrt(width)."""

    def make(self, cfg: Config) -> nn.Module:
        model = module_of(cfg, "model")
        return model.GPT(model.GPTConfig(block_size=cfg.seq_len, vocab_size=cfg.padded_vocab_size,
                                         n_layer=cfg.num_layers, n_head=cfg.num_heads, n_embd=cfg.model_dim,
                                         dropout=0.0, bias=False))

    def both(self, call, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        device, low = inputs.device.type, self.dtype != torch.float32
        with torch.autocast("cpu" if device == "meta" else device, self.dtype if low else None, low):
            return call(inputs, targets)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        _, mean = self.both(self.call, inputs, targets)
        return mean.nan_to_num() * (targets >= 0).sum()                                     # ()

    def hidden(self, inputs: Tensor) -> Tensor:
        z, _ = self.both(self.peer, inputs, inputs)
        return z.float()                                                                    # (B, T, V)

    def flops_per_token(self) -> float:
        cfg = self.cfg
        return (6 * self.peer.get_num_params() + 12 * cfg.num_layers * cfg.model_dim * cfg.seq_len)

    def make_optimizer(self, cfg: Config) -> torch.optim.Optimizer:
        rate = 6e-4 * math.sqrt(768 / cfg.model_dim)
        optimizer = self.peer.configure_optimizers(0.1, rate, (0.9, 0.95), self.head.device.type)
        for group in optimizer.param_groups:
            group["initial_lr"] = rate
        return optimizer

    def schedule(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        pass

    @staticmethod
    def lr_scale(cfg: Config, progress: float) -> float:
        share = max(0.0, progress - cfg.warmup_frac) / (1 - cfg.warmup_frac)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share))


def make_model(cfg: Config, *rest, **more) -> Peer:
    kinds = {"nanochat/gpt.py": Nanochat, "model.py": NanoGPT}
    kind = next((kind for file, kind in kinds.items() if (cfg.folder / file).is_file()), None)
    if not (cfg.checkout and kind):
        raise UserError(f"--checkout must be a clone of nanochat or nanoGPT; it is {cfg.checkout!r}")
    return kind(cfg, *rest, **more)


class PeerOptimizer(train_gpt.Optimizer):
    """The peer's optimizer, in one process, behind what the loop asks of one."""

    rules, state_names = {"theirs": "theirs"}, {"theirs": ()}

    def __init__(self, model: Peer, cfg: Config, *rest):
        super().__init__(model, cfg, *rest)
        if self.world.size > 1:
            raise UserError("a peer trains in one process here; start it without torchrun")
        self.model, self.theirs = model, model.make_optimizer(cfg)
        self.compile()

    def compile(self) -> None:
        """One step of nothing, before the clock starts, in which its kernels are compiled."""
        rates = [(group["lr"], group["weight_decay"]) for group in self.theirs.param_groups]
        for group in self.theirs.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        with torch.enable_grad():
            self.theirs.step()
        self.theirs.state.clear()
        self.clear_gradients()
        for group, (rate, decay) in zip(self.theirs.param_groups, rates, strict=True):
            group["lr"], group["weight_decay"] = rate, decay

    @staticmethod
    def group_of(name: str, parameter: Tensor) -> str:
        return "theirs"

    @staticmethod
    def learning_rates(cfg: Config) -> dict[str, float]:
        return {"theirs": cfg.rates}

    def lr_scale(self, cfg: Config, step: int, progress: float) -> float:
        # a step of its own is little beside the warm-up, which begins above 0
        warm = min(1.0, (progress + 1e-3) / cfg.warmup_frac) if cfg.warmup_frac else 1.0
        return warm * self.model.lr_scale(cfg, progress)

    def theirs_step(self, pieces: list[train_gpt.Piece], lr: float) -> None:
        self.model.schedule(self.theirs, self.steps_done - 1)
        for group in self.theirs.param_groups:
            group["lr"] = group["initial_lr"] * lr
        with torch.enable_grad():
            self.theirs.step()

    def state(self) -> dict:
        return super().state() | {"theirs": self.theirs.state_dict()}

    def load(self, state: dict | None) -> None:
        super().load(state)
        self.theirs.load_state_dict(state["theirs"])


EXPERIMENT = Experiment(Config, make_model, PeerOptimizer, train_gpt.train)
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
