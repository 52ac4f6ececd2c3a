"""Time the batched HellaSwag scorer against scoring one candidate at a time, in turns, with one model.

    python benchmarks/hellaswag.py --rows FILE.jsonl [--score experiments/RUN]

Without --score, the model is the demo's with random weights; its speed is the same.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchtop.command_line import command, positive
from benchtop.evaluation import TokenLosses
from benchtop.folder import load_script
from benchtop.machine import World
from benchtop.saved import load_trained, saved_config, score
from benchtop.scoring import METRICS
from benchtop.tasks import read_questions
from benchtop.tokenizer import load_tokenizer, only_tokenizer
from train_gpt import GPT, PRESETS, Config


def one_by_one(model: GPT, tokenizer, questions: list, device: torch.device) -> list[np.ndarray]:
    """Summed log-probability of each ending, by the plain loop: one forward pass per ending."""
    sums = []
    for question in questions:
        row = []
        for ending in question.endings:
            tokens = tokenizer.encode_ordinary(f" {ending}")
            context = tokenizer.encode_ordinary(question.ctx)
            context = context[max(0, len(context) + len(tokens) - model.cfg.seq_len):]
            ids = torch.tensor([[tokenizer.eot_token, *context, *tokens]], device=device)   # (1, T)
            logits = model.logits(model.hidden(ids[:, :-1])[0, -len(tokens):])              # (N, V)
            log_probabilities = torch.log_softmax(logits, dim=-1)                           # (N, V)
            row.append(log_probabilities.gather(1, ids[0, -len(tokens):, None]).sum().item())
        sums.append(np.array(row))
    return sums


@command
@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="a .jsonl file in HellaSwag's format")
    parser.add_argument("--score", type=Path, help="a run trained with --save_model")
    parser.add_argument("--tokenizer", default="", help="of the model without --score"
                        " (default: the only one)")
    parser.add_argument("--dtype", default="auto", help="of the matrix products")
    parser.add_argument("--rounds", type=positive, default=3)
    args = parser.parse_args()
    questions = read_questions(args.rows)
    if args.score:
        experiment = load_script(args.score).EXPERIMENT
        cfg = saved_config(experiment, args.score, dtype=args.dtype)
        world = World(cfg)
        model, tokenizer = load_trained(experiment, args.score, cfg, world)
    else:
        tokenizer = load_tokenizer(args.tokenizer or only_tokenizer())
        cfg = Config(**PRESETS["demo"] | {"vocab_size": tokenizer.n_vocab, "dtype": args.dtype})
        world = World(cfg)
        torch.manual_seed(0)
        model = GPT(cfg, tokenizer.eot_token, world.dtype).to(world.device)
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    begun = time.perf_counter()
    model.compile_parts()
    losses_of = TokenLosses(model, world, compiled=True)
    rows_at_once = max(1, 2**14 // cfg.seq_len)
    score(losses_of, tokenizer, questions[:8], rows_at_once, world)
    print(f"compiled in {time.perf_counter() - begun:.1f} s; after training, this is already done")
    times: dict[str, list[float]] = {"one by one": [], "batched": []}
    for _ in range(args.rounds):
        begun = time.perf_counter()
        scores = score(losses_of, tokenizer, questions, rows_at_once, world)
        times["batched"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        with torch.compiler.set_stance("force_eager"):      # or each length would be compiled
            alone = one_by_one(model.eval(), tokenizer, questions, world.device)
        times["one by one"].append(time.perf_counter() - begun)
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        print(f"{name:<12}{middle[name]:7.2f} s   ({' '.join(f'{second:.2f}' for second in seconds)})")
    print(f"batched is {middle['one by one'] / middle['batched']:.1f} times as fast on "
          f"{world.device_name()}, {torch.get_num_threads()} threads, "
          f"{str(world.dtype).removeprefix('torch.')}")
    differences = [np.abs(sums - item["log_probabilities"]).max()
                   for sums, item in zip(alone, scores.items, strict=True)]
    print(f"largest difference in a score: {max(differences):.2g} nats")
    for metric in METRICS:
        lengths = metric.removeprefix("acc_norm_").replace("acc", "nothing")
        same = sum(int((sums / np.maximum(item.get(lengths, [1] * len(sums)), 1)).argmax())
                   == item[metric]["choice"] for sums, item in zip(alone, scores.items, strict=True))
        print(f"{metric}: the same choice in {same:,} of {len(questions):,} rows")
    print("\n".join(scores.lines()))


if __name__ == "__main__":
    main()
