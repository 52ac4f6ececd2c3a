"""Muon, Adam and the schedule. Run: ./run.sh test tests/test_optimizer.py"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from tiny_runs import EAGER
from torch import nn

import train_gpt
import train_llama3
import train_nanogpt
from benchtop.errors import UserError
from benchtop.evaluation import TokenLosses
from benchtop.machine import World
from benchtop.steps import LossScale, NonFinite
from benchtop.warm_up import ready
from train_gpt import EXPERIMENT, GPT, Config, Optimizer, adam_update, group_of, lr_scale, newton_schulz


def small_config(**knobs) -> Config:
    return Config(**{"vocab_size": 101, "num_layers": 4, "num_heads": 2, "model_dim": 16, "seq_len": 32,
                     "batch_tokens": 64, "value_embeddings": 1, **knobs})


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (3, 2, 6, 4)])
def test_newton_schulz_keeps_singular_vectors_and_brings_values_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * 37
    result = newton_schulz(matrix)
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    rotated = U.mT @ result @ Vh.mT         # diagonal, when the singular vectors are the same
    diagonal = rotated.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(rotated, torch.diag_embed(diagonal), atol=1e-3, rtol=0)
    assert diagonal.min() > 0.65 and diagonal.max() < 1.25


def test_newton_schulz_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match="matrices"):
        newton_schulz(torch.randn(5))


def test_newton_schulz_of_nothing_is_nothing():
    assert torch.equal(newton_schulz(torch.zeros(4, 6)), torch.zeros(4, 6))


def optimizer_of(script, world: World | None = None, **knobs):
    """A model of a script with its optimizer."""
    experiment = script.EXPERIMENT
    sizes = dict(vocab_size=101, num_layers=4, num_heads=2, model_dim=16, seq_len=32, batch_tokens=64,
                 num_steps=3, device="cpu")
    cfg = experiment.Config(**{**sizes, **knobs})
    model = experiment.Model(cfg, 100)
    return model, experiment.Optimizer(model, cfg, world or World(cfg))


SCRIPTS = pytest.mark.parametrize("script", [train_gpt, train_nanogpt, train_llama3],
                                  ids=lambda script: script.__name__)


@SCRIPTS
def test_every_parameter_is_in_exactly_one_group(script):
    model, optimizer = optimizer_of(script)
    groups = {group: {piece.name for piece in pieces} for group, pieces in optimizer.groups.items()}
    assert sorted(itertools.chain(*groups.values())) == sorted(name for name, _ in model.named_parameters())
    assert all(groups.values())
    if script is train_gpt:
        assert all(piece.parameter.ndim >= 2 for piece in optimizer.groups["matrices"])


class OneOf(World):
    """One of several processes that say nothing to each other."""

    def __init__(self, cfg, rank: int, size: int):
        super().__init__(cfg)
        self.rank, self.size = rank, size


@SCRIPTS
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_weight_has_one_owner_who_alone_keeps_its_state(script, processes):
    """For any number of processes each row of a parameter is in one piece, and one process has its state."""
    owners: dict[str, torch.Tensor] = {}
    for rank in range(processes):
        cfg = script.EXPERIMENT.Config(device="cpu")
        model, optimizer = optimizer_of(script, OneOf(cfg, rank, processes))
        pieces = optimizer.pieces
        assert [piece.owner == rank for piece in pieces] == [bool(piece.state) for piece in pieces]
        for name, parameter in model.named_parameters():
            counts = torch.zeros(parameter.shape, dtype=torch.int32)
            for piece in pieces:
                if piece.name == name:
                    assert piece.parameter is parameter
                    counts[piece.rows] += 1
                    if piece.owner == rank:
                        owners.setdefault(name, torch.zeros(parameter.shape, dtype=torch.int32))
                        owners[name][piece.rows] += 1
            assert (counts == 1).all(), name
    assert set(owners) == {name for name, _ in model.named_parameters()}
    assert all((count == 1).all() for count in owners.values())


@SCRIPTS
def test_a_parameter_without_a_gradient_is_named(script):
    model, optimizer = optimizer_of(script)
    for name, parameter in model.named_parameters():
        parameter.grad = None if name in ("layers.2.out", "layers.2.out.weight") else parameter.detach()
    with pytest.raises(UserError, match=r"parameter layers\.2\.out(\.weight)? has no gradient"):
        optimizer.sum_gradients()


@pytest.mark.parametrize(("name", "shape", "group"), [
    ("layers.0.gate", (3,), "scalars"), ("layers.0.gate", (3, 4), "matrices"),
    ("bigram_embeds", (9, 4), "embeddings"), ("value_embeds.1", (9, 4), "embeddings"),
    ("mixer", (9, 4), "matrices"),
    ("temperature", (), "scalars"), ("head", (9, 4), "head")])
def test_a_new_parameter_finds_its_group(name, shape, group):
    assert group_of(name, torch.zeros(shape)) == group


def test_adam_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = torch.randn(50), nn.Parameter(torch.randn(50))
    theirs.data.copy_(ours)
    reference = torch.optim.Adam([theirs], lr=0.03, betas=(0.8, 0.95), eps=1e-10)
    mean, square = torch.zeros(50), torch.zeros(50)
    for step in range(1, 8):
        grad = torch.randn(50)
        theirs.grad = grad.clone()
        reference.step()
        adam_update([ours], [grad], [mean], [square], 0.03, 0.8, 0.95, step, 1e-10)
        torch.testing.assert_close(ours, theirs.data)


def test_muon_is_that_of_torch():
    """torch.optim.Muon without weight decay, for one square matrix; it averages gradients as ours does."""
    torch.manual_seed(0)
    cfg = small_config(num_layers=1, value_embeddings=0, muon_lr=0.04, batch_tokens=524288, num_steps=1)
    model = GPT(cfg, 100)
    optimizer = Optimizer(model, cfg, World(cfg))
    theirs = nn.Parameter(model.layers[0].out.detach().clone())
    reference = torch.optim.Muon([theirs], lr=0.04, weight_decay=0, momentum=0.85, nesterov=True,
                                 ns_coefficients=(3.4445, -4.7750, 2.0315), eps=1e-7)
    for _ in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        theirs.grad = model.layers[0].out.grad.clone()
        reference.step()
        optimizer.step(1.0)
        reference.param_groups[0]["momentum"] += 0.1 / 300
        # theirs multiplies in bfloat16
        torch.testing.assert_close(model.layers[0].out.detach(), theirs.detach(), atol=4e-3, rtol=0)


def test_matrices_of_one_shape_are_updated_each_by_itself():
    """The batched update of many matrices is the update of each alone."""
    torch.manual_seed(0)
    cfg = small_config(num_layers=3)
    model = GPT(cfg, 100)
    optimizer = Optimizer(model, cfg, World(cfg))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.step(0.5)
    lr = 0.5 * cfg.muon_lr * (cfg.batch_tokens / 524288) ** (1 / 12)
    for name in {piece.name for piece in optimizer.groups["matrices"]}:
        grad, weight = grads[name], before[name]
        for index in range(grad.numel() // (grad.size(-2) * grad.size(-1))):
            matrix = grad.view(-1, *grad.shape[-2:])[index]
            shape_factor = math.sqrt(max(1, matrix.size(0) / matrix.size(1)))
            wanted = weight.view(-1, *grad.shape[-2:])[index] - lr * shape_factor * newton_schulz(matrix)
            got = dict(model.named_parameters())[name].detach().view(-1, *grad.shape[-2:])[index]
            torch.testing.assert_close(got, wanted)


def test_learning_rates_follow_batch_and_width_as_stated():
    def lrs(**knobs) -> dict[str, float]:
        cfg = small_config(**knobs)
        return Optimizer(GPT(cfg, 100), cfg, World(cfg)).lrs
    base, batch, width = lrs(), lrs(batch_tokens=1024), lrs(model_dim=64)
    for group in base:
        assert batch[group] == pytest.approx(2 ** (1 / 3) * base[group])
        assert width[group] == pytest.approx(base[group] * (1 if group in ("matrices", "scalars") else 0.5))
    reference = lrs(batch_tokens=524288, model_dim=768, num_layers=1, value_embeddings=0)
    cfg = Config()
    assert reference == pytest.approx({"matrices": cfg.muon_lr, "embeddings": cfg.embed_lr,
                                       "head": cfg.head_lr, "scalars": cfg.scalar_lr})


def test_the_rules_fill_in_what_is_left_open_and_nothing_else():
    for tokens, batch in ((10_000, 512), (10**6, 8192), (98_304_000, 2**17), (986_316_800, 2**19)):
        cfg = Config(train_tokens=tokens).with_budget(10**9)
        assert cfg.batch_tokens == batch and (cfg.num_steps - 1) * batch < tokens <= cfg.num_steps * batch
        assert cfg.train_tokens == cfg.num_steps * batch
    assert [Config(model_dim=dim).num_heads for dim in (64, 256, 384, 768, 1000, 2048)] == [1, 2, 3, 6, 5, 16]
    assert [Config(seq_len=length).short_window for length in (256, 1024, 4096)] == [256, 512, 2048]
    assert Config(seq_len=1000, train_tokens=10**6).with_budget(10**9).batch_tokens == 8000
    given = dict(num_steps=7, batch_tokens=1024, num_heads=4, short_window=100)
    cfg = Config(**given).with_budget(10**9)
    assert {knob: getattr(cfg, knob) for knob in given} == given and cfg.train_tokens == 7 * 1024


@pytest.mark.parametrize(("epoch", "most"), [(10**9, 4_000_000), (10**6, 4_000_000), (50_000, 200_000)])
def test_without_a_budget_it_is_four_million_tokens_or_four_epochs_if_less(epoch, most):
    cfg = Config().with_budget(epoch)
    assert most - cfg.batch_tokens < cfg.train_tokens == cfg.num_steps * cfg.batch_tokens <= most
    assert Config(train_tokens=most).with_budget(epoch).batch_tokens == cfg.batch_tokens
    clock = Config(train_minutes=3).with_budget(epoch)
    assert clock.num_steps == clock.train_tokens == 0 and clock.batch_tokens == cfg.batch_tokens


def test_the_schedule_warms_up_stays_and_cools_down():
    cfg = small_config(warmup_steps=4, cooldown_frac=0.5, final_lr_frac=0.1)
    assert [lr_scale(cfg, step, 0) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert lr_scale(cfg, 10, 0.5) == 1
    assert lr_scale(cfg, 10, 0.75) == pytest.approx(0.55)
    assert lr_scale(cfg, 10, 1) == pytest.approx(0.1)
    assert lr_scale(small_config(cooldown_frac=0), 10, 0.99) == 1


def test_warming_up_changes_nothing():
    torch.manual_seed(0)
    model = GPT(small_config(), 100)
    optimizer = Optimizer(model, model.cfg, World(model.cfg))
    before = [value.clone() for value in model.state_dict().values()]
    cfg = replace(model.cfg, micro_batch_tokens=64)
    ready(EXPERIMENT, cfg, World(cfg), EAGER, TokenLosses(model, World(cfg)), optimizer, print)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(not tensor.any() for piece in optimizer.pieces for tensor in piece.state.values())
    assert optimizer.steps_done == 0


def test_a_loss_scale_leaves_out_steps_that_overflow():
    model = GPT(small_config(), 100)
    optimizer = Optimizer(model, model.cfg, World(model.cfg))
    scale = LossScale(enabled=True)

    def gradients(value: float) -> torch.Tensor:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        return optimizer.sum_gradients()
    norms = gradients(scale.value)
    assert scale.unscale(optimizer, norms)
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    wanted = torch.tensor([math.sqrt(parameter.numel()) for parameter in model.parameters()])
    torch.testing.assert_close(norms, wanted)
    assert not scale.unscale(optimizer, gradients(math.inf))
    assert scale.value == 2**15 and model.head.grad is None
    scale.value = 1.0
    with pytest.raises(NonFinite):
        scale.unscale(optimizer, gradients(math.nan))
