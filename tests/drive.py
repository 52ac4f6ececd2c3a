"""Run a Benchtop's train_gpt.py after some lines of Python have tampered with it or its bench.

    python drive.py LAB 'benchtop.run.remove_checkpoints = lambda *_, **__: None' --num_steps=4
"""

import sys

lab, lines, *flags = sys.argv[1:]
sys.path.insert(0, lab)

import benchtop.run  # noqa: E402, F401  (the lab's own)
import train_gpt  # noqa: E402

exec(lines)
sys.argv = ["train_gpt.py", *flags]
train_gpt.main()
