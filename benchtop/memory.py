"""What fits into memory: an estimate from the model as it is, and micro-batches that fit.

Activations are counted, not guessed: the model runs once on torch's meta device, where tensors have shapes
and no content, and what autograd keeps for backward is added up. So a changed layer changes the estimate.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchtop import host
from benchtop.batches import micro_batch_shape
from benchtop.errors import SharedError, UserError
from benchtop.machine import World

LOSS_COPIES = 6         # of a chunk's logits, that are alive together
BACKWARD = 1.3          # times what is kept for backward is what backward takes, with its own tensors
LARGEST_CPU_MICRO_BATCH = 2**14     # tokens; more are not faster on a CPU


def largest_chunk(device: torch.device) -> int:
    """Bytes that a chunk's logits may take as float32. A GPU multiplies in few and large products, and a
    thirty-second of its memory is theirs, up to 4,096 rows of 50,304 columns: twice as many are 1 % faster."""
    if device.type != "cuda":
        return 2**27 if device.type == "cpu" else 2**28
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(2**30, max(2**28, memory // 32))


def chunk_rows(x: Tensor, columns: int) -> int:
    """Rows of a chunk of x, a power of 2."""
    limit = largest_chunk(x.device) // (4 * columns)
    return 2 ** int(math.log2(max(1, min(limit, x.size(0)))))


def activation_mib(make_model: Callable[..., nn.Module], cfg, dtype: torch.dtype, flex: bool) -> float:
    """What one row of a micro-batch keeps for backward, by a pass over the meta device.

    flex  leave out the T x T weights of attention, which FlexAttention does not keep
    """
    kept: dict[int, torch.UntypedStorage] = {}
    weights: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        # the copies of weights that products read, and the head's gradient, are there once, not for each row
        of_weights = tensor.ndim == 2 and tensor.numel() in weights and cfg.seq_len not in tensor.shape
        if not of_weights and not (flex and tensor.ndim == 4 and tensor.size(-1) == cfg.seq_len):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor
    with torch.device("meta"):
        model = make_model(cfg, 0, dtype)
        inputs = torch.zeros(1, cfg.seq_len, dtype=torch.int64)
    weights |= {parameter.numel() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(inputs, inputs)
    for weight in (*model.parameters(), *model.buffers()):
        kept.pop(weight.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values()) / 2**20


def memory_estimate_mib(experiment, cfg, world: World, flex: dict | None = None) -> float:
    """Roughly what a process needs: weights, gradients, optimizer state, activations and a chunk of the loss.

    Compiled needs less than estimated. On a CPU torch itself counts, too.
    """
    with torch.device("meta"):
        model = experiment.Model(cfg, 0, world.dtype)
    named, optimizer = dict(model.named_parameters()), experiment.Optimizer
    kept = sum(p.numel() * len(optimizer.state_of(optimizer.group_of(name, p))) for name, p in named.items())
    states = 4 * (2 * sum(p.numel() for p in named.values()) + kept / world.size)
    largest = max(p.numel() for p in named.values())
    _, rows = micro_batch_shape(cfg, world.size)
    chunk = min(largest_chunk(world.device), 4 * rows * cfg.seq_len * cfg.padded_vocab_size)
    loss = 8 * largest + LOSS_COPIES * chunk
    torch_itself = 450 * 2**20 if world.device.type == "cpu" else 0
    activations = rows * activation_mib(experiment.Model, cfg, world.dtype, flex is not None)
    return (torch_itself + states + loss) / 2**20 + BACKWARD * activations


def choose_micro_batch(experiment, cfg, world: World, flex: dict | None = None, saved: dict | None = None):
    """The Config with micro-batches that seem to fit: all a process has in a step, or half, and so on."""
    share = cfg.seq_len * math.ceil(cfg.rows_per_step / world.size)
    if cfg.micro_batch_tokens:
        return dataclasses.replace(cfg, micro_batch_tokens=min(cfg.micro_batch_tokens, share))
    if saved and saved["identity"]["processes"] == world.size:
        # sums over other micro-batches would differ in the last bit
        return dataclasses.replace(cfg, micro_batch_tokens=saved["micro_batch_tokens"])
    if world.device.type == "cpu":
        share = min(share, max(cfg.seq_len, LARGEST_CPU_MICRO_BATCH))
    cfg, limit = dataclasses.replace(cfg, micro_batch_tokens=share), 0.8 * free_memory_mib(world)
    while memory_estimate_mib(experiment, cfg, world, flex) > limit and cfg.micro_batch_tokens > cfg.seq_len:
        cfg = with_half_micro_batch(cfg)
    return cfg


def with_half_micro_batch(cfg):
    rows = math.ceil(cfg.micro_batch_tokens / cfg.seq_len / 2)
    return dataclasses.replace(cfg, micro_batch_tokens=rows * cfg.seq_len)


def memory_advice(experiment, cfg, world: World, flex: dict | None) -> str:
    """The three flags that would save most memory, by the estimate, the most effective first."""
    smaller = {"seq_len": cfg.seq_len // 2, "model_dim": cfg.model_dim // 2,
               "num_layers": cfg.num_layers // 2, "value_embeddings": 0, "mlp_ratio": 2}
    needs = []
    for knob, value in smaller.items():
        if knob not in cfg.names() or getattr(cfg, knob) <= value:
            continue
        with contextlib.suppress(UserError):    # a rule of Config forbids this one
            changed = dataclasses.replace(cfg, **{knob: value, "micro_batch_tokens": 0})
            changed = dataclasses.replace(changed, micro_batch_tokens=changed.seq_len)
            needs.append((memory_estimate_mib(experiment, changed, world, flex), f"--{knob} {value}"))
    return ", then ".join(f"{flag} (about {mib:,.0f} MiB)" for mib, flag in sorted(needs)[:3])


def fit_micro_batch(cfg, world: World, warm_up: Callable, clear: Callable, say: Callable, advice: Callable):
    """Warm up with the micro-batch of cfg, or half of it, and so on, until all processes have the memory.

    The tokens of a step stay the same, so nothing changes but its speed.
    warm_up  tries a Config; clear gives back what it took; advice says what would need less
    raises   SharedError with three flags that need less memory if one row is too much
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
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        smaller = with_half_micro_batch(cfg)
        if smaller == cfg:
            raise SharedError(f"not even one row of {cfg.seq_len} tokens fits into memory; use {advice()}")
        say(f"micro-batches of {cfg.micro_batch_tokens:,} tokens do not fit into memory; "
            f"trying {smaller.micro_batch_tokens:,}")
        cfg = smaller


def is_out_of_memory(error: BaseException) -> bool:
    """torch has a class for it on GPUs; for CPUs and for cuBLAS only words."""
    words = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return (isinstance(error, torch.OutOfMemoryError | MemoryError)
            or any(word in str(error) for word in words))


def free_memory_mib(world: World) -> float:
    """What a process may take: of its GPU, or its share of the machine's memory."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**20
    return host.free_memory_mib() / world.local_size
