"""Estimate the memory that a model needs, and choose micro-batches that fit.

Activations are counted, not guessed: the model runs once on torch's meta device, where tensors have shapes
but no data, and what autograd keeps for backward is added up. So changing a layer changes the estimate.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchtop.batches import micro_batch_shape
from benchtop.errors import SharedError, UserError
from benchtop.machine import Kernels, World

# copies of a chunk's logits alive at once: in float32; when compiled, logits and gradient in the run's dtype
LOSS_COPIES, COMPILED_LOSS_COPIES = 6, 2.1
BACKWARD = 1.3          # uncompiled, the backward pass takes this many times what is kept for it
# fraction of free memory to use; a GPU's blocks share reserved memory and need little more than is counted
MOST_OF_GPU, MOST_OF_CPU = 0.9, 0.8
LARGEST_CPU_MICRO_BATCH = 2**14     # tokens; more are not faster on a CPU


def largest_chunk(device: torch.device) -> int:
    """Most bytes that a chunk's logits may take as float32.

    On CUDA 1/32 of the GPU's memory, since few large products are faster, but at most 1 GiB: 4,096 rows of
    50,304 columns (twice as many rows are 1 % faster on an H200).
    """
    if device.type != "cuda":
        return 2**27 if device.type == "cpu" else 2**28
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(2**30, max(2**28, memory // 32))


def chunk_rows(x: Tensor, columns: int) -> int:
    """Rows of a chunk of x, a power of 2."""
    limit = largest_chunk(x.device) // (4 * columns)
    return 2 ** int(math.log2(max(1, min(limit, x.size(0)))))


PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}


class Watch(TorchDispatchMode):
    """Record inputs and outputs of matrix products, and which tensors are made from weights alone.

    Compiled code keeps the inputs and outputs of products for backward and recomputes what lies between: for
    GPT 21 model widths per token and layer, where uncompiled code keeps 28.
    """

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        self.weights = {id_of(weight): weight for weight in weights}
        self.touched: list[Tensor] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        read = [thing for thing in args if isinstance(thing, Tensor)]
        if read and isinstance(made, Tensor) and all(id_of(tensor) in self.weights for tensor in read):
            self.weights[id_of(made)] = made        # a copy in another dtype, of which there is one
        elif operation.overloadpacket in PRODUCTS:
            self.touched += [*read, made]
        return made


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def kept_mib(make_model: Callable[..., nn.Module], cfg, dtype: torch.dtype, kernels: Kernels,
             ) -> tuple[float, float]:
    """MiB kept for backward, from a pass on the meta device: (for each row of a micro-batch, once)."""
    with torch.device("meta"):
        model = make_model(cfg, 0, dtype)
        inputs = torch.zeros(1, cfg.seq_len, dtype=torch.int64)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), \
            Watch([*model.parameters(), *model.buffers()]) as watch:
        model.hidden(inputs)
    kept = {}
    for tensor in watch.touched if kernels.compiled else saved:
        # FlexAttention keeps no T x T weights
        of_attention = tensor.ndim > 2 and tensor.size(-1) == cfg.seq_len and tensor.size(-2) > cfg.head_dim
        if id_of(tensor) not in watch.weights and not (of_attention and kernels.flex is not None):
            kept[id_of(tensor)] = tensor.untyped_storage().nbytes()
    parameters = {id_of(parameter) for parameter in model.parameters()}
    copies = sum(weight.untyped_storage().nbytes() for key, weight in watch.weights.items()
                 if key not in parameters)
    return sum(kept.values()) / 2**20, copies / 2**20


def memory_estimate_mib(experiment, cfg, world: World, kernels: Kernels,
                        kept: tuple[float, float] | None = None) -> float:
    """MiB that a process needs, within 10 % if kernels are compiled and roughly if not: weights, gradients,
    optimizer state, what is kept for backward, a chunk of the loss, and on a CPU torch itself.

    kept  the result of kept_mib, if known; it does not depend on the micro-batch size
    """
    with torch.device("meta"):
        model = experiment.Model(cfg, 0, world.dtype)
    named, optimizer = dict(model.named_parameters()), experiment.Optimizer
    state = sum(p.numel() * len(optimizer.state_of(optimizer.group_of(name, p))) for name, p in named.items())
    states = 4 * (2 * sum(p.numel() for p in named.values()) + state / world.size)
    _, rows = micro_batch_shape(cfg, world.size)
    tokens, columns, bytes_each = rows * cfg.seq_len, cfg.padded_vocab_size, world.dtype.itemsize
    chunk = min(largest_chunk(world.device) // 4, tokens * columns)     # logits in a chunk
    head = model.head.numel() * (4 + bytes_each) + tokens * cfg.model_dim * bytes_each
    torch_itself = 550 * 2**20 if world.device.type == "cpu" else 0
    by_row, once = kept or kept_mib(experiment.Model, cfg, world.dtype, kernels)
    if kernels.compiled:
        loss, kept = COMPILED_LOSS_COPIES * bytes_each * chunk, once + rows * by_row
    else:
        loss, kept = LOSS_COPIES * 4 * chunk, BACKWARD * (once + rows * by_row)
    return (torch_itself + states + head + loss) / 2**20 + kept


def choose_micro_batch(experiment, cfg, world: World, kernels: Kernels, saved: dict | None = None):
    """The Config with micro-batches that seem to fit: a process's whole share of a step, or half, etc."""
    share = cfg.seq_len * math.ceil(cfg.rows_per_step / world.size)
    if cfg.micro_batch_tokens:
        return dataclasses.replace(cfg, micro_batch_tokens=min(cfg.micro_batch_tokens, share))
    if saved and saved["identity"]["processes"] == world.size:
        # as before the run was resumed: sums over other micro-batches would differ in the last bit
        return dataclasses.replace(cfg, micro_batch_tokens=saved["micro_batch_tokens"])
    if world.device.type == "cpu":
        share = min(share, max(cfg.seq_len, LARGEST_CPU_MICRO_BATCH))
    most = MOST_OF_CPU if world.device.type == "cpu" else MOST_OF_GPU
    cfg, limit = dataclasses.replace(cfg, micro_batch_tokens=share), most * world.free_memory_mib()
    kept = kept_mib(experiment.Model, cfg, world.dtype, kernels)
    while memory_estimate_mib(experiment, cfg, world, kernels, kept) > limit:
        if cfg.micro_batch_tokens <= cfg.seq_len:
            break
        cfg = with_half_micro_batch(cfg)
    return cfg


def with_half_micro_batch(cfg):
    rows = math.ceil(cfg.micro_batch_tokens / cfg.seq_len / 2)
    return dataclasses.replace(cfg, micro_batch_tokens=rows * cfg.seq_len)


def memory_advice(experiment, cfg, world: World, kernels: Kernels) -> str:
    """The three flags that save the most memory by the estimate, the most effective first."""
    smaller = {"seq_len": cfg.seq_len // 2, "model_dim": cfg.model_dim // 2,
               "num_layers": cfg.num_layers // 2, "value_embeddings": 0, "mlp_ratio": 2}
    needs = []
    for knob, value in smaller.items():
        if knob not in cfg.names() or getattr(cfg, knob) <= value:
            continue
        with contextlib.suppress(UserError):    # Config forbids this value
            changed = dataclasses.replace(cfg, **{knob: value, "micro_batch_tokens": 0})
            changed = dataclasses.replace(changed, micro_batch_tokens=changed.seq_len)
            needs.append((memory_estimate_mib(experiment, changed, world, kernels), f"--{knob} {value}"))
    return ", then ".join(f"{flag} (about {mib:,.0f} MiB)" for mib, flag in sorted(needs)[:3])


def fit_micro_batch(cfg, world: World, warm_up: Callable, clear: Callable, say: Callable, advice: Callable):
    """Warm up with the micro-batch of cfg, and halve it until it fits into memory on all processes.

    The tokens of a step stay the same, so only its speed changes.
    warm_up  tries a Config; clear frees what it allocated; advice returns flags that need less memory
    raises   SharedError with that advice if not even one row fits
    """
    while True:
        fits = True
        try:
            warm_up(cfg)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        if all(world.gather(fits)):
            return cfg
        clear()
        world.forget_kernels()
        world.empty_cache()
        smaller = with_half_micro_batch(cfg)
        if smaller == cfg:
            raise SharedError(f"not even one row of {cfg.seq_len} tokens fits into memory; use {advice()}")
        say(f"micro-batches of {cfg.micro_batch_tokens:,} tokens do not fit into memory; "
            f"trying {smaller.micro_batch_tokens:,}")
        cfg = smaller


def is_out_of_memory(error: BaseException) -> bool:
    """torch has an exception class for it on GPUs, but only messages on CPUs and for cuBLAS."""
    words = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return (isinstance(error, torch.OutOfMemoryError | MemoryError)
            or any(word in str(error) for word in words))
