"""Compiles the attention of train_gpt.py for make-believe GPUs, and prints what its kernels take.

    python tests/make_believe_attention.py H100=64,128 4090=128

One line of JSON per card and width of a head: what each kernel takes of registers and bytes of stack for a
thread, and bytes of shared memory for a block. What does not fit into registers spills to the stack, which
lies in the card's memory. test_gpu_code.py judges the figures.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import make_believe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    make_believe.plug_in()

import torch
import triton
from torch._subclasses import FakeTensorMode

import train_gpt
from benchtop.machine import World, choose_kernels

ROW = 1024


def kernels_of(width: int) -> dict:
    """What the kernels of attention take, in rows of documents, forward and backward."""
    cfg = train_gpt.Config(seq_len=ROW, num_layers=1, num_heads=2, model_dim=2 * width, vocab_size=512)
    world = World(cfg)
    with FakeTensorMode(), torch.autograd.set_multithreading_enabled(False):
        kernels = choose_kernels(cfg, world)
    if kernels.flex is None:
        return {"attention": kernels.attention}
    with torch.device("meta"):
        model = train_gpt.GPT(cfg, 0, world.dtype, kernels.flex)
    make_believe.KERNELS.clear()
    with FakeTensorMode(), torch.autograd.set_multithreading_enabled(False):
        context, = model.contexts(torch.zeros(4, ROW, dtype=torch.int64, device="cuda"))
        # queries and keys are made anew by the rotation; values are a part of what one product makes
        q, k = (torch.zeros(4, ROW, 2, width, dtype=world.dtype, device="cuda", requires_grad=True)
                for _ in range(2))
        values = torch.zeros(4, ROW, 6, width, dtype=world.dtype, device="cuda", requires_grad=True)
        attend = torch.compile(lambda q, k, v, context: context.attend(q, k, v, 15 / width), dynamic=False)
        attend(q, k, values[:, :, 4:], context).sum().backward()
    templates = {name: made for name, made in make_believe.KERNELS.items() if name.startswith("triton_tem")}
    return {"attention": kernels.attention, "options": kernels.flex,
            "kernels": {name: [takes(kernel) for kernel in made] for name, made in templates.items()}}


def takes(kernel) -> dict[str, int]:
    """REG, STACK and LOCAL, which NVIDIA's tool reads from the machine code of a kernel, and SHARED."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return found | {"SHARED": kernel.metadata.shared}


if __name__ == "__main__":
    make_believe.become(make_believe.CARDS["H100"])
    for card, widths in (argument.split("=") for argument in sys.argv[1:]):
        child = os.fork()       # torch asks a card for its properties once; imports take seconds
        if not child:
            make_believe.see(make_believe.CARDS[card])
            for width in widths.split(","):
                torch._dynamo.reset()
                began = time.process_time()
                found = kernels_of(int(width))
                print(json.dumps({"card": card, "width": int(width), **found,
                                  "seconds": round(time.process_time() - began, 1)}), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{card}: the process ended with {status}")
