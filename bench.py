"""Times, side by side and with their log.

    python bench.py --only data [--source FILE] [--tokenizer gpt2|bytes] [--json FILE]

data: tokens a second of encoding (tiktoken) and of partitioning (semantic blocks), at 1, 4 and 16 times the text. Time should grow
with the text, memory should not, and partitioning should take no more than three times as long as encoding.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np

from locality import InputError, background, partition
from prepare_data import get_encoding, token_bytes


def peak_memory():
    """The most memory this process and its children have held, MB; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024


def bench_data(args):
    """Encoding against partitioning; one row for each size of the text."""
    try:
        text = Path(args.source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read {args.source} as UTF-8 text: {e}") from e
    if len(text) < 1000:
        raise InputError(f"{args.source} is too short to time: {len(text)} characters")
    encoding = get_encoding(args.tokenizer)
    vocabulary = token_bytes(encoding)

    rows = []
    print(f"{'text':>6s} {'MB':>7s} {'tokens':>11s} {'encode s':>9s} {'M tok/s':>8s} {'partition s':>12s} {'M tok/s':>8s} {'ratio':>6s} {'peak MB':>8s}")
    for times in (1, 4, 16):
        start = time.perf_counter()
        parts = [encoding.encode_to_numpy(text, allowed_special="all") for _ in range(times)]
        tokens = np.concatenate([p.astype(np.uint16) for p in parts])
        del parts
        encode = time.perf_counter() - start
        known = background(tokens[: len(tokens) // times], vocabulary)
        start = time.perf_counter()
        partition(tokens, vocabulary, "semantic", args.max_lookback, known)
        split = time.perf_counter() - start
        mb = times * len(text.encode()) / 1e6
        row = {"times": times, "mb": mb, "tokens": len(tokens), "encode_s": encode, "partition_s": split, "peak_mb": peak_memory()}
        rows.append(row)
        print(
            f"{times:5d}x {mb:7.1f} {len(tokens):11,d} {encode:9.2f} {len(tokens) / encode / 1e6:8.2f} {split:12.2f} "
            f"{len(tokens) / split / 1e6:8.2f} {split / encode:6.2f} {row['peak_mb'] or 0:8d}"
        )
    return rows


SECTIONS = {"data": bench_data}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, help="one section; default: all")
    parser.add_argument("--source", default="data/sample.txt", metavar="FILE")
    parser.add_argument("--tokenizer", choices=["gpt2", "bytes"], default="gpt2")
    parser.add_argument("--max-lookback", type=int, default=256)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    log = {"machine": platform.platform(), "processors": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__}
    print(", ".join(f"{k} {v}" for k, v in log.items()))
    for name in [args.only] if args.only else SECTIONS:
        print(f"\n{name}")
        log[name] = SECTIONS[name](args)
    if args.json:
        Path(args.json).write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        print(f"bench.py: {e}", file=sys.stderr)
        sys.exit(2)
