"""Initial weights: every parameter is drawn by its own generator, seeded with (seed, parameter name).

A changed layer therefore leaves all other initial weights of that seed as they were, and two runs with the
same seed are a pair:

    self.up = uniform(hidden, width, std=0.02)      # instead of nn.Parameter(torch.empty(...).uniform_(...))
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Draw = Callable[[Tensor, torch.Generator | None], object]


def drawn(parameter: nn.Parameter, draw: Draw) -> nn.Parameter:
    """Fill the parameter by `draw`; draw_weights() repeats that with a generator of the parameter's own."""
    parameter.draw = draw
    draw(parameter.detach(), None)
    return parameter


def normal(*shape: int, std: float = 1.0) -> nn.Parameter:
    return drawn(nn.Parameter(torch.empty(shape)), normal_law(std))


def uniform(*shape: int, std: float) -> nn.Parameter:
    most = math.sqrt(3) * std
    return drawn(nn.Parameter(torch.empty(shape)),
                 lambda weight, generator: weight.uniform_(-most, most, generator=generator))


def normal_law(std: float) -> Draw:
    """For parameters of torch's own modules: drawn(linear.weight, normal_law(0.02))"""
    return lambda weight, generator: weight.normal_(0, std, generator=generator)


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def draw_weights(model: nn.Module, seed: int) -> None:
    """Redraw every parameter that has a `draw`, seeded with (seed, its name), on the parameter's device."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "draw"):
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7], "big"))
            parameter.draw(parameter.detach(), generator)


def drawn_in_one_stream(model: nn.Module) -> list[str]:
    """A line for the log if random parameters have no `draw`: any change in the model may change them."""
    # vectors that a script makes are constants, such as (1, 0); biases of torch's modules are random
    biases = {id(module.bias) for module in model.modules() if hasattr(module, "bias")}
    others = {name: weight.detach() for name, weight in model.named_parameters()
              if not hasattr(weight, "draw") and (weight.ndim > 1 or id(weight) in biases)}
    names = [name for name, weight in others.items() if weight.min() != weight.max()]
    if not names:
        return []
    listed = ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
    return [f"weights     drawn from one shared random stream, not seeded by (seed, name): {listed}; "
            "make them with normal() or uniform(), so that runs with equal seeds are pairs"]
