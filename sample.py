"""
Generate text with a run, at its own dial; the partitioner finds the blocks as the text grows.

    python sample.py runs/quickstart --prompt "Attention is"
"""

import argparse
import codecs
import math
import sys

import torch

from eval import load_run, pick_device
from locality import InputError, Partitioner, schedule
from prepare_data import get_encoding, token_bytes


def main():
    parser = argparse.ArgumentParser(description="generate text with a run",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", help="a run folder of train.py")
    parser.add_argument("--prompt", default="\n", help="the text to go on from")
    parser.add_argument("--tokens", type=int, default=200, help="how many to generate")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k likeliest tokens; 0: among all")
    parser.add_argument("--schedule", help="another schedule than the run's")
    parser.add_argument("--fidelity", type=float, help="another fidelity than the run's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if not args.prompt:
        raise InputError("the prompt is empty; give at least one character")
    if not 0 <= args.temperature < math.inf or args.top_k < 0 or args.tokens < 0 or not 0 <= args.seed < 2 ** 63:
        raise InputError("--temperature, --top-k, --tokens and --seed are numbers of 0 or more")

    device = pick_device(args.device)
    model, config = load_run(args.run, device)
    if args.schedule or args.fidelity is not None:
        fidelity = config["fidelity"] if args.fidelity is None else args.fidelity
        model.set_locality(schedule(args.schedule or config["schedule"], model.config.n_layer, fidelity))
    encoding = get_encoding(config["tokenizer"])
    vocabulary = token_bytes(encoding)
    partitioner = Partitioner(vocabulary, config["partition"], config["max_lookback"], config["background"])
    generator = torch.Generator(device).manual_seed(args.seed)

    utf8 = codecs.getincrementaldecoder("utf-8")("replace")    # a character may come in several tokens
    print(args.prompt, end="", flush=True)
    for token in model.generate(encoding.encode_ordinary(args.prompt), args.tokens, partitioner, args.temperature,
                                args.top_k, generator):
        print(utf8.decode(vocabulary[token]), end="", flush=True)
    print(utf8.decode(b"", final=True))


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
