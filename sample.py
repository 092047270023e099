"""Write text with a run, at its own dial; the partitioner finds the blocks as the text grows.

    python sample.py runs/quickstart --prompt "Attention is"
    python sample.py runs/quickstart --prompt "Attention is" --prompt "The room" --samples 2
    python sample.py gpt2 --prompt "The mind is"           # weights that were never localised

Several texts are written side by side.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import argparse
import codecs
import math

import torch

from eval import load_model, turn
from locality import Partitioner
from prepare_data import get_encoding, prepared, read_meta, token_bytes
from support.files import InputError, run_script
from support.machine import pick_device


def main():
    parser = argparse.ArgumentParser(
        description="write text with a run, or with other weights",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("run", help="a run of train.py; or weights: gpt2, gpt2-medium … or a path (dial at 0)")
    add("--prompt", action="append", help="the text to go on from; a new line if not given")
    add("--samples", type=int, default=1, help="texts from each prompt")
    add("--tokens", type=int, default=200, help="how many to write")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    add("--top-k", type=int, default=0, help="choose among the k likeliest tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="among the fewest that are so likely together")
    add("--schedule", help="another schedule than the run's")
    add("--fidelity", type=float, help="another fidelity than the run's")
    add("--seed", type=int, default=1)
    add("--device", default="auto")
    args = parser.parse_args()
    prompts = [prompt for prompt in args.prompt or ["\n"] for _ in range(args.samples)]
    check_arguments(args, prompts)

    device = pick_device(args.device)
    model, config = load_model(args.run, device)
    turn(model, config, args.schedule, args.fidelity)
    encoding = get_encoding(config["tokenizer"])
    vocabulary, words = token_bytes(encoding), config.get("background")
    if "background" not in config and config["source"]:  # a run of an earlier version
        words = read_meta(prepared(config))["background"]
    how = vocabulary, config["partition"], config["max_lookback"], words
    partitioners = [Partitioner(*how) for _ in prompts]
    generator = torch.Generator(device).manual_seed(args.seed)
    choice = args.temperature, args.top_k, args.top_p, generator
    ids = [encoding.encode(prompt, allowed_special="all") for prompt in prompts]
    write(prompts, model.generate(ids, args.tokens, partitioners, *choice), vocabulary)


def check_arguments(args, prompts):
    """Raises InputError."""
    if not all(prompts):
        raise InputError("the prompt is empty; give at least one character")
    numbers = args.temperature, args.top_k, args.tokens, args.seed
    if not all(0 <= n for n in numbers) or args.temperature == math.inf or args.seed >= 2**63:
        raise InputError("--temperature, --top-k, --tokens and --seed are numbers of 0 or more")
    if args.samples < 1 or not 0 < args.top_p <= 1:
        raise InputError("--samples is at least 1, --top-p above 0 and at most 1")


def write(texts, generated, vocabulary):
    """Print some texts and what is written after them: the first as it grows, the others at the
    end. generated: yields a token for each of them."""
    texts = list(texts)
    # a character may come in several tokens
    utf8 = [codecs.getincrementaldecoder("utf-8")("replace") for _ in texts]
    print(texts[0], end="", flush=True)
    for tokens in generated:
        for i, token in enumerate(tokens):
            piece = utf8[i].decode(vocabulary[token])
            texts[i] += piece
            if i == 0:
                print(piece, end="", flush=True)
    ends = [decoder.decode(b"", final=True) for decoder in utf8]
    print(ends[0])
    for text, end in zip(texts[1:], ends[1:]):
        print(f"\n---\n{text}{end}")


if __name__ == "__main__":
    run_script(main)
