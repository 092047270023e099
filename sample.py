"""Generate text with a run, at its dial. The partitioner finds the blocks as the text grows.

    python sample.py runs/quickstart --prompt "Attention is"
    python sample.py runs/quickstart --prompt "Attention is" --prompt "The room" --samples 2
    python sample.py runs/quickstart --stop "<|endoftext|>"  # a text ends where the next one begins
    python sample.py gpt2 --prompt "The mind is"           # weights that were never localized

Several texts are generated side by side. `prefill` reads the prompts and fills a key-value cache;
`decode` then reads one token per text and step. With `plain`, there is no cache: every context is
read again for every token.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import argparse
import codecs
import math
import sys

import torch
from torch.nn.utils.rnn import pad_sequence

from eval import add_model_arguments, load, turn
from fast.attention import BlockMask
from locality import Partitioner
from model import clamp_lookback
from support.files import InputError, run_script
from support.machine import pick_device
from support.tokenizers import get_encoding, token_bytes, token_ids

# --------------------------------------------------------------------------------------------------
# generation


@torch.no_grad()
def generate(
    model, prompts, n, partitioners=None, temperature=1.0, top_k=0, top_p=1.0, generator=None
):
    """Yield n times a list with the next token id of each text.

    model: a GPT in eval mode. prompts: lists of ids, none of them empty, of any lengths.
    partitioners: a fresh Partitioner per prompt, which finds the blocks as the text grows; needed
    unless every lambda is 0. For the other arguments see `sample_token`.
    At most the last block_size tokens of a prompt are read. When a context has block_size tokens,
    its last half becomes the new context, as if the text began there. Positions count from the
    start of the context, so moving on by a single token would change every key and value.
    """
    size, device = model.config.block_size, model.wte.weight.device
    texts, caches = [list(prompt) for prompt in prompts], None
    starts = [max(len(text) - size, 0) for text in texts]
    lookbacks = partitioners and [p.push(t).tolist() for p, t in zip(partitioners, texts)]
    longest = min(size, max(map(len, texts)) + n)
    for _ in range(n):
        full = [len(text) - start > size for text, start in zip(texts, starts)]
        for i, text in enumerate(texts):
            starts[i] = len(text) - (size + 1) // 2 if full[i] else starts[i]
        at = [len(text) - start - 1 for text, start in zip(texts, starts)]
        at = torch.tensor(at, device=device)  # (B,), the position of each newest token
        if caches is None or any(full):
            if not model.config.plain:
                caches = [KVCache(model.config, x, longest, at) for x in model.locality]
            batch = (rows and cut(rows, starts, device) for rows in (texts, lookbacks))
            x = prefill(model, *batch, at, caches)  # (B, C)
        else:
            newest = (
                rows and torch.tensor([row[-1] for row in rows], device=device)
                for rows in (texts, lookbacks)
            )
            x = decode(model, *newest, at, caches)  # (B, C)
        logits = model.head(x).float()  # (B, V)
        tokens = sample_token(logits, temperature, top_k, top_p, generator).tolist()
        yield tokens
        for i, token in enumerate(tokens):
            texts[i].append(token)
            if partitioners:
                lookbacks[i].extend(partitioners[i].push([token]).tolist())


def cut(rows, starts, device):
    """The rows from their starts on, (B, T), padded at the end: causality hides the padding."""
    rows = [torch.tensor(row[start:]) for row, start in zip(rows, starts)]
    return pad_sequence(rows, True).to(device)


def prefill(model, idx, lookback, at, caches=None):
    """Read contexts, (B, T), that end at positions `at`, (B,), and fill the caches, one per layer.

    Returns the input of the output head at these positions, (B, C).
    """
    watch = caches and (lambda layer, q, k, v: caches[layer].fill(k, v))
    x = model.hidden(idx, lookback, watch)  # (B, T, C)
    return x[torch.arange(len(at), device=at.device), at]


def decode(model, token, lookback, at, caches):
    """Read one more token per text: its id, its lookback and its position, (B,) each.

    Returns the input of the output head, (B, C).
    """
    masks = {}  # layers whose caches have the same size share a mask
    if lookback is not None:
        lookback = clamp_lookback(lookback[:, None], model.config.max_lookback, at[:, None])

    def watch(layer, q, k, v):
        cache = caches[layer]
        if cache.size not in masks:
            masks[cache.size] = cache.mask(at, lookback, k.dtype)
        S = masks[cache.size].visible.size(-1)
        return *cache.update(k, v, at, S), masks[cache.size]

    return model.hidden(token[:, None], watch=watch, position=at[:, None])[:, 0]


class KVCache:
    """The keys and values of one layer while text is generated.

    If the layer's locality is 1, it holds only the last max_lookback + 1 tokens, plus token 0 if
    that is an anchor: no block reaches further back, so the cache does not grow. Position p is in
    slot p % size; the newest token overwrites the oldest.
    """

    def __init__(self, config, locality, longest, at):
        """longest: tokens of any context to come; at: (B,), where the contexts end now."""
        self.size = min(config.max_lookback + 1, longest) if locality == 1 else longest
        self.anchor = config.anchor
        self.sink = config.anchor and self.size < longest  # a last slot, for token 0
        self.at, self.rows = at, torch.arange(len(at), device=at.device)

    def positions(self, at):
        """The position in each slot when the newest is `at`, (B,) int64: (B, S). A negative one
        means that the slot is empty."""
        slots = torch.arange(self.size, device=at.device)
        p = at[:, None] - (at[:, None] - slots) % self.size
        return torch.cat((p, -(at[:, None] < self.size).long()), 1) if self.sink else p

    def fill(self, k, v):
        """Take what is needed of the keys and values of whole contexts, (B, H, T, D)."""
        p = self.positions(self.at).clamp(min=0)[:, None, :, None]
        self.k, self.v = k.take_along_dim(p, 2), v.take_along_dim(p, 2)  # (B, H, S, D)

    def mask(self, at, lookback, dtype):
        """What tokens at positions `at`, (B,), see in the slots: a BlockMask of floats to add to
        the scores, (B, 1, 1, S). lookback: (B, 1), or None if no layer needs it."""
        p = self.positions(at)  # (B, S)
        newest = int(at.max())
        p = p[:, : newest + 1] if newest < self.size else p  # later slots are still empty
        start = at[:, None] if lookback is None else at[:, None] - lookback  # (B, 1)
        block = p >= start
        block = block | (p == 0) if self.anchor else block
        masks = (
            torch.zeros_like(m, dtype=dtype).masked_fill(~m, -math.inf) for m in (block, p >= 0)
        )
        block, visible = (m[:, None, None] for m in masks)
        return BlockMask(dense=block, visible=visible)

    def update(self, k, v, at, S):
        """Add a token per text, k and v: (B, H, 1, D). Returns the first S slots, (B, H, S, D)."""
        slot = at % self.size
        self.k[self.rows, :, slot] = k[:, :, 0]
        self.v[self.rows, :, slot] = v[:, :, 0]
        return self.k[:, :, :S], self.v[:, :, :S]


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw a token from each row of logits, (B, V) float32 -> (B,) int64.

    It is drawn from softmax(logits / temperature); temperature 0 takes the most likely token.
    top_k: draw only from the k most likely tokens; 0: from all. top_p: draw only from the smallest
    set of most likely tokens whose total probability is at least top_p. Raises InputError for
    logits that are not finite.
    """
    # below 1e-6 the most likely token is certain by far; lower still, float32 would divide by 0
    largest = logits.amax(-1, keepdim=True)
    if not largest.isfinite().all():
        raise InputError("the predictions of this model are not finite numbers")
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = (logits - largest) / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        likeliest, token = p.sort(descending=True)
        # drop a token, but not the first, if those before it have the probability p already
        before = likeliest.cumsum(-1)[:, :-1]
        likeliest[:, 1:][before >= top_p] = 0
        p = torch.zeros_like(p).scatter(1, token, likeliest)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# --------------------------------------------------------------------------------------------------
# the command line


def main():
    parser = argparse.ArgumentParser(
        description="generate text with a run, or with published weights",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_model_arguments(parser)
    add("--prompt", action="append", help="the text to continue; a newline if not given")
    add("--samples", type=int, default=1, help="texts per prompt")
    add("--tokens", type=int, default=200, help="tokens to generate per text")
    add("--stop", help="end a text just before this would first appear")
    add("--temperature", type=float, default=0.8, help="0: always the most likely token")
    add("--top-k", type=int, default=0, help="draw from the k most likely tokens; 0: from all")
    add("--top-p", type=float, default=1.0, help="draw from the top tokens whose p sums to this")
    add("--seed", type=int, default=1)
    args = parser.parse_args()
    check_arguments(args)
    prompts = [prompt for prompt in args.prompt or ["\n"] for _ in range(args.samples)]

    device = pick_device(args.device)
    model, config, trained_on = load(args.run, device, plain=args.plain)
    turn(model, config, args.schedule, args.floor)
    encoding = get_encoding(config["tokenizer"])
    vocabulary, background = token_bytes(encoding), trained_on.get("background")
    rules = config["partition"], config["max_lookback"], background, config["plain"]
    partitioners = [Partitioner(vocabulary, *rules) for _ in prompts]
    generator = torch.Generator(device).manual_seed(args.seed)
    choice = args.temperature, args.top_k, args.top_p, generator
    ids = [token_ids(encoding, prompt, "the prompt").tolist() for prompt in prompts]
    if max(map(len, ids)) > model.config.block_size:
        print(
            f"only the last {model.config.block_size} tokens of a prompt are read", file=sys.stderr
        )
    generated = generate(model, ids, args.tokens, partitioners, *choice)
    write(prompts, generated, vocabulary, args.stop)


def check_arguments(args):
    """Raises InputError."""
    if "" in (args.prompt or ()) or args.stop == "":
        raise InputError("--prompt and --stop must have at least one character")
    numbers = args.temperature, args.top_k, args.tokens, args.seed
    if not all(0 <= n for n in numbers) or args.temperature == math.inf or args.seed >= 2**63:
        raise InputError("--temperature, --top-k, --tokens and --seed take numbers of 0 or more")
    if not 1 <= args.samples <= 1000 or not 0 < args.top_p <= 1:
        raise InputError("--samples must be in 1 ... 1000, and --top-p above 0 and at most 1")


def write(texts, generated, vocabulary, stop=None):
    """Print the texts and what is generated after them: the first as it grows, the others at the
    end. generated: yields a token id per text. A text ends where `stop` would be written; the rest
    of what is generated after it is dropped."""
    # a character may take several tokens
    utf8 = [codecs.getincrementaldecoder("utf-8")("replace") for _ in texts]
    written, ended, printed = [""] * len(texts), [False] * len(texts), 0
    print(texts[0], end="", flush=True)
    for tokens in generated:
        for i, token in enumerate(tokens):
            if not ended[i]:
                written[i] += utf8[i].decode(vocabulary[token])
                if stop and stop in written[i]:
                    written[i], ended[i] = written[i].partition(stop)[0], True
        end = len(written[0]) - (0 if ended[0] else held_back(written[0], stop))
        print(written[0][printed:end], end="", flush=True)
        printed = end
        if all(ended):
            break
    for i, decoder in enumerate(utf8):
        written[i] += "" if ended[i] else decoder.decode(b"", final=True)
    print(written[0][printed:])
    for text, more in zip(texts[1:], written[1:]):
        print(f"\n---\n{text}{more}")


def held_back(text, stop):
    """How many characters at the end of a text may be the beginning of `stop`: not yet printed."""
    return max((n for n in range(1, len(stop or "")) if text.endswith(stop[:n])), default=0)


if __name__ == "__main__":
    run_script(main)
