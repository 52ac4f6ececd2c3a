"""How fast a saved model writes, with what it keeps of its text and without.

    python benchmarks/decode.py experiments/RUN                    a run that was trained with --save_model

Both write the same tokens, the likeliest ones: once reading only the newest token, once all of the text anew
for each token.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from documents import Parser, command, positive
from train_gpt import GPT, World, generate, load_trained, parse_config


@torch.no_grad()
def plain(model: GPT, prompt: torch.Tensor, count: int) -> list[int]:
    text = prompt
    for _ in range(count):
        text = torch.cat([text, model.head_logits(model.hidden(text)[:, -1:]).argmax(-1)], dim=1)
    return text[0, prompt.size(1):].tolist()


@command
def main() -> None:
    parser = Parser("Tokens per second of a saved model, cached and plain.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run that was trained with --save_model")
    parser.add_argument("--tokens", type=positive, default=512, help="to write")
    args = parser.parse_args()
    cfg = parse_config(["--sample", str(args.run)])
    world = World(cfg)
    model, tokenizer = load_trained(args.run, cfg, world)
    model.eval()
    model.head.data[tokenizer.eot_token] = 0        # so that no text ends early
    prompt = torch.tensor([[tokenizer.eot_token]], device=world.device)
    seconds, texts = {}, {}

    def cached(count: int) -> list[int]:
        return generate(model, prompt, replace(cfg, temperature=0, sample_tokens=count))[0]
    for name, write in (("cached", cached), ("plain", lambda count: plain(model, prompt, count))):
        write(8)
        world.synchronize()
        begun = time.perf_counter()
        texts[name] = write(args.tokens)
        world.synchronize()
        seconds[name] = time.perf_counter() - begun
        print(f"{name:<8}{args.tokens / seconds[name]:10,.1f} tokens/s", flush=True)
    same = sum(a == b for a, b in zip(texts["cached"], texts["plain"], strict=True))
    print(f"cached is {seconds['plain'] / seconds['cached']:.1f} times as fast; {same} of {args.tokens} "
          "tokens are the same")


if __name__ == "__main__":
    main()
