"""The tokenizers: by name, by size, and as files for `transformers`.

The tokenizer `sample`, a byte pair encoding of data/sample.txt, is learned here: it needs no
download.
"""

import contextlib
import functools
import hashlib
import heapq
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import tiktoken

from support.files import InputError, read_text, write_json, write_text
from support.sentences import END_OF_TEXT

SIZES = {"gpt2": 50257, "sample": 1001, "bytes": 256}  # tokens of each tokenizer
SAMPLE = Path(__file__).parent.parent / "data" / "sample.txt"
N_CHARACTERS = 58_000  # of the sample: no part of its validation or test split
# a word or a number with the space before it, other characters, white space; much like GPT-2's
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
SHA256 = "a65aba16a7c6dff304d676cc20b67df7659d88725d1dd8e0430792a345403afb"  # of these
# A vocabulary file has a character for every byte: single bytes, in GPT-2's order.
BYTES = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
VISIBLE = {ord(character) for character in BYTES[:188]}  # bytes that are their own characters
SPELLING = dict(zip(sorted(range(256), key=lambda byte: byte not in VISIBLE), BYTES))
BYTE_OF = {character: bytes([byte]) for byte, character in SPELLING.items()}
# a text to try a tokenizer on, as it reads it: é may be unknown, and spaces may become one
TRIAL = "The cat's tail  (at the café).\n\nNobody came, not 1 of 10."
READ = {TRIAL.replace("é", e).replace("  ", space) for e in ("é", "") for space in ("  ", " ")}

# --------------------------------------------------------------------------------------------------
# by name, and by size


def check_tokenizer(name):
    """Raises InputError for a name that `get_encoding` does not know."""
    kind, _, n = name.partition(":")
    small = kind == "gpt2" and n.isascii() and n.isdigit() and len(n) < 6 and 257 <= int(n) < 50257
    if name not in SIZES and not (small and int(n) not in SIZES.values()):
        raise InputError(
            "tokenizer must be gpt2, gpt2:N with N in 257 ... 50256 (except 1001), sample or "
            f"bytes, not {json.dumps(name)}"
        )


def vocabulary_size(name):
    """The number of tokens of a tokenizer, by its name."""
    return SIZES.get(name) or int(name.partition(":")[2])


def tokenizer_by_size(vocab_size):
    """The name of our tokenizer with so many tokens; None if there is none."""
    names = {size: name for name, size in SIZES.items()}
    name = names.get(vocab_size, f"gpt2:{vocab_size}")
    with contextlib.suppress(InputError):
        check_tokenizer(name)
        return name


def get_encoding(name):
    """A tokenizer as a tiktoken.Encoding.

    tiktoken downloads `gpt2` once. `gpt2:N` has the N - 1 tokens that GPT-2's byte pair encoding
    learned first, and <|endoftext|>. The others need no download: `sample` has 1,000 tokens learned
    from data/sample.txt, and <|endoftext|>; `bytes` has 256 tokens.
    Raises InputError for another name, or if the download fails.
    """
    check_tokenizer(name)
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding(name, pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens={})
    if name == "sample":
        pattern, first = PATTERN, sample_tokens()
    else:
        gpt2 = download_gpt2()
        if name == "gpt2":
            return gpt2
        ranks, n = gpt2._mergeable_ranks, vocabulary_size(name) - 1
        pattern, first = gpt2._pat_str, sorted(ranks, key=ranks.get)[:n]
    ranks = {token: rank for rank, token in enumerate(first)}
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def download_gpt2():
    """GPT-2's tokenizer, from the network or from tiktoken's cache. Raises InputError."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:  # requests' errors are OSErrors, a bad hash is a ValueError
        raise InputError(
            f"the gpt2 tokenizer could not be downloaded ({type(e).__name__}); check the network, "
            "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer sample or bytes"
        ) from None


def token_ids(encoding, text, name):
    """The tokens of a text, which may contain <|endoftext|>: (n,) uint16. name: of the text, for
    the message. Raises InputError if tiktoken cannot read it."""
    try:
        ids = encoding.encode_to_numpy(text, allowed_special="all")
    except UnicodeEncodeError:  # half of a pair of surrogates, which `encode` replaces
        ids = np.array(encoding.encode(text, allowed_special="all"))
    except ValueError:  # tiktoken's expression gives up
        raise InputError(
            f"{name}: tiktoken cannot split this text; it may contain a million white-space "
            "characters in a row"
        ) from None
    return ids.astype(np.uint16)


def token_bytes(encoding):
    """The bytes of every token id, a list: what a partitioner reads instead of ids."""
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]


# --------------------------------------------------------------------------------------------------
# learned from the sample


def learn(text, n):
    """The first n tokens of the byte pair encoding of a text (Sennrich et al., arXiv 1508.07909).

    Returns a list of bytes: the 256 single bytes, and then the most frequent pair of neighbors
    within a word, again and again. The text must contain enough pairs.
    """
    counts = Counter(re.findall(PATTERN, text))
    words = [[bytes([b]) for b in word.encode()] for word in counts]
    counts, pairs, places = list(counts.values()), Counter(), defaultdict(set)
    tokens, heap = [bytes([b]) for b in range(256)], []

    def add(i, sign):  # the pairs of word i
        for pair in zip(words[i], words[i][1:]):
            pairs[pair] += sign * counts[i]
            places[pair].add(i)
            changed.add(pair)

    changed = set()
    for i in range(len(words)):
        add(i, 1)
    while len(tokens) < n:
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
        changed.clear()
        frequency, best = heapq.heappop(heap)
        if pairs[best] == -frequency:  # it has not changed since it was pushed
            tokens.append(b"".join(best))
            for i in places.pop(best):
                add(i, -1)
                words[i] = merge(words[i], best)
                add(i, 1)
    return tokens


def merge(word, pair):
    """A word, a list of tokens, in which every occurrence of the pair has become one token."""
    new = []
    for token in word:
        if new and (new[-1], token) == pair:
            new[-1] += token
        else:
            new.append(token)
    return new


@functools.cache
def sample_tokens():
    """The 1,000 tokens that `learn` finds in the sample. Raises InputError if the sample changed:
    the tokens of every run that was trained with them would mean something else."""
    text = ""
    with contextlib.suppress(OSError, ValueError):
        text = read_text(SAMPLE)[:N_CHARACTERS]
    if hashlib.sha256(text.encode()).hexdigest() != SHA256:
        raise InputError(
            f"{SAMPLE} is missing or was changed, and the tokenizer 'sample' is learned from it; "
            "restore it (to use another text, copy it to another file), or use the tokenizer "
            "'bytes'"
        )
    return learn(text, 1000)


# --------------------------------------------------------------------------------------------------
# for transformers


def spell(encoding):
    """The tokens of a tokenizer in the order of their ids, as vocabulary files write them."""
    return ["".join(map(SPELLING.get, token)) for token in token_bytes(encoding)]


def write_tokenizer(encoding, n_positions, folder):
    """Write tokenizer.json and tokenizer_config.json, from which `transformers` makes a tokenizer
    with the same ids as a tiktoken.Encoding of `get_encoding`. Raises InputError.

    n_positions: of the model, the most tokens that it can read.
    """
    tokens, special = spell(encoding), [*encoding.special_tokens_set]
    ids = {token: i for i, token in enumerate(tokens)}
    # tiktoken merges any two neighbors that make a token, so all such pairs are listed, by the rank
    # of the token. Of the pairs that make the same token, only one ever occurs in a text.
    splits = ((t[:i], t[i:]) for t in tokens if t not in special for i in range(1, len(t)))
    merges = [[a, b] for a, b in splits if a in ids and b in ids]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    # ByteLevel spells a text like `spell`; with use_regex, it first splits it like GPT-2
    spelled = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [{**spelled, "use_regex": True}]
    if encoding.name == "sample":
        # \w has a few other members there, but none of them is in a token of several bytes
        split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
        steps = [{**split, "invert": False}, {**spelled, "use_regex": False}]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": ids[t], "content": t, **flags, "special": True} for t in special],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {**spelled, "use_regex": False},
        "model": {"type": "BPE", "vocab": ids, "merges": merges},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": n_positions}
    config |= dict.fromkeys(("bos_token", "eos_token"), special[0]) if special else {}
    # not token_type_ids, whose embeddings would be added to those of the tokens
    config |= {"model_input_names": ["input_ids", "attention_mask"]}
    config |= {"clean_up_tokenization_spaces": False}
    write_text(folder / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False) + "\n")
    write_json(folder / "tokenizer_config.json", config)


def read_vocabulary(tokenizer, size):
    """The bytes of the tokens of a tokenizer of `transformers`, for a model with `size` of them: a
    list of at least so many.

    They are known for byte-level BPE (GPT-2, Llama 3, Qwen) and for SentencePiece (Llama 2,
    Mistral, Gemma). Special tokens are not text, but <|endoftext|> ends a document, and so does the
    eos_token, unless the chat template uses it: then it ends a turn. Raises InputError for
    tokenizers of another kind.
    """
    if tokenizer.vocab_size > size:  # tokens that were added may have no embedding
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model only {size:,}; they do "
            "not belong together"
        )
    ids, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    special = {i for i in added if added[i].special} | set(tokenizer.all_special_ids)
    eos, template = tokenizer.eos_token, str(getattr(tokenizer, "chat_template", None))
    in_chats = eos is not None and ("eos_token" in template or eos in template)
    byte_level = "\u0120" in ids and "\u2581" not in ids  # how the two kinds write a space
    vocabulary = [b""] * max(size, 1 + max(ids.values()))
    for token, i in ids.items():
        if token == "<|endoftext|>" or token == eos and not in_chats:
            vocabulary[i] = END_OF_TEXT
        elif i in special:
            continue
        elif byte_level and i in added:  # these are spelled as they are
            vocabulary[i] = token.encode()
        elif byte_level:
            vocabulary[i] = b"".join(BYTE_OF.get(char, b"?") for char in token)
        elif i not in added and re.fullmatch("<0x[0-9A-F]{2}>", token):
            vocabulary[i] = bytes.fromhex(token[3:5])
        else:
            vocabulary[i] = token.replace("\u2581", " ").encode(errors="replace")
    text = b"".join(vocabulary[i] for i in tokenizer.encode(TRIAL, add_special_tokens=False))
    if text.decode(errors="replace").lstrip() not in READ:
        raise InputError(
            f"the tokens of this {type(tokenizer).__name__} are not pieces of a text; hub.localize "
            "needs byte-level BPE or SentencePiece"
        )
    return vocabulary
