"""Run a Benchtop's train_gpt.py after some lines of Python have tampered with it.

    python drive.py LAB 'train_gpt.look = None' --num_steps=4
"""

import sys

lab, lines, *flags = sys.argv[1:]
sys.path.insert(0, lab)

import train_gpt  # noqa: E402  (the lab's own)

exec(lines)
sys.argv = ["train_gpt.py", *flags]
train_gpt.main()
