"""
Generate text with a run, at its own dial; the partitioner finds the blocks as the text grows.

    python sample.py runs/quickstart --prompt "Attention is"
    python sample.py runs/quickstart --prompt "Attention is" --prompt "The room" --samples 2    # four texts, side by side
"""

import argparse
import codecs
import math
import sys

import torch

from eval import load_run, pick_device, prepared
from locality import InputError, Partitioner, schedule
from prepare_data import get_encoding, read_meta, token_bytes


def main():
    parser = argparse.ArgumentParser(description="generate text with a run",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", help="a run folder of train.py")
    parser.add_argument("--prompt", action="append", help="the text to go on from (default: a new line); may be repeated")
    parser.add_argument("--samples", type=int, default=1, help="texts from each prompt")
    parser.add_argument("--tokens", type=int, default=200, help="how many to generate")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k likeliest tokens; 0: among all")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among the fewest likeliest tokens that have this "
                        "probability together")
    parser.add_argument("--schedule", help="another schedule than the run's")
    parser.add_argument("--fidelity", type=float, help="another fidelity than the run's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    prompts = [prompt for prompt in args.prompt or ["\n"] for _ in range(args.samples)]
    if not all(prompts):
        raise InputError("the prompt is empty; give at least one character")
    if not 0 <= args.temperature < math.inf or args.top_k < 0 or args.tokens < 0 or not 0 <= args.seed < 2 ** 63:
        raise InputError("--temperature, --top-k, --tokens and --seed are numbers of 0 or more")
    if args.samples < 1 or not 0 < args.top_p <= 1:
        raise InputError("--samples is at least 1, --top-p above 0 and at most 1")

    device = pick_device(args.device)
    model, config = load_run(args.run, device)
    if args.schedule or args.fidelity is not None:
        fidelity = config["fidelity"] if args.fidelity is None else args.fidelity
        model.set_locality(schedule(args.schedule or config["schedule"], model.config.n_layer, fidelity))
    encoding = get_encoding(config["tokenizer"])
    vocabulary = token_bytes(encoding)
    if "background" not in config:    # a run of an earlier version
        config["background"] = read_meta(prepared(config))["background"]
    partitioners = [Partitioner(vocabulary, config["partition"], config["max_lookback"], config["background"])
                    for _ in prompts]
    generator = torch.Generator(device).manual_seed(args.seed)

    sys.stdout.reconfigure(errors="replace")
    # the first text is shown as it grows, the others when all are done; a character may come in several tokens
    utf8 = [codecs.getincrementaldecoder("utf-8")("replace") for _ in prompts]
    print(prompts[0], end="", flush=True)
    for tokens in model.generate([encoding.encode_ordinary(prompt) for prompt in prompts], args.tokens, partitioners,
                                 args.temperature, args.top_k, args.top_p, generator):
        for i, token in enumerate(tokens):
            text = utf8[i].decode(vocabulary[token])
            prompts[i] += text
            if i == 0:
                print(text, end="", flush=True)
    ends = [decoder.decode(b"", final=True) for decoder in utf8]
    print(ends[0])
    for prompt, end in zip(prompts[1:], ends[1:]):
        print(f"\n---\n{prompt}{end}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
