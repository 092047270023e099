"""The dial on models of `transformers` is the dial of model.py, whatever they are and read."""

import copy
import importlib
import json
import runpy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from conftest import ROOT
from eval import load
from locality import SCHEDULES, count_background, partition_text, schedule
from model import GPT, GPTConfig, attention_weights, in_block
from prepare_data import TextConfig, prepare
from support.files import InputError
from support.sentences import END_OF_TEXT
from support.tokenizers import get_encoding, read_vocabulary, token_bytes

tf = pytest.importorskip("transformers")
tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()
tokenizers = pytest.importorskip("tokenizers")

import hub  # noqa: E402

TEXT = (ROOT / "data" / "sample.txt").read_text(encoding="utf-8")
SIZE = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 48}
SIZE |= {"vocab_size": 400, "intermediate_size": 64, "initializer_range": 0.3}
SIZE |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 12}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "GPT2": ({k: v for k, v in SIZE.items() if k != "intermediate_size"}, "LMHeadModel", {}),
    "Llama": (GROUPED, "ForCausalLM", {}),
    "Qwen3": (GROUPED, "ForCausalLM", {}),
    "Mistral": (GROUPED, "ForCausalLM", {"sliding_window": 24}),
    "Gemma3": (
        GROUPED,
        "ForCausalLM",
        {"sliding_window": 24, "layer_types": WINDOWS, "tie_word_embeddings": False},
    ),
}
DIAL = [0.25, 0.7, 1.0]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def close(actual, expected, tolerance=1e-5):
    """Whether two tensors are equal up to rounding, compared with the largest number."""
    return torch.allclose(actual, expected, 0, tolerance * float(expected.abs().max()))


def make(name, **options):
    """A random model of an architecture, with large weights, so that its attention is sharp."""
    torch.manual_seed(0)
    size, head, own = MODELS[name]
    config = getattr(tf, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    model = getattr(tf, name + head)(config(**size, **own, **options))
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it, learned from the sample."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=byte_level.alphabet(), special_tokens=["<|endoftext|>"]
    )
    bpe.train_from_iterator([TEXT], trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


@pytest.fixture(scope="session")
def ids(tokenizer):
    """Tokens of the sample, (1, 200), some of which begin new blocks and documents."""
    text = TEXT[:300] + "<|endoftext|>" + TEXT[3000:3600]
    return torch.tensor([tokenizer.encode(text)[:200]])


@pytest.fixture(params=MODELS)
def model(request):
    return make(request.param)


def lookback_of(ids, tokenizer, partition, *rules):
    """What prepare_data.py would find, (1, n) int64."""
    vocabulary = read_vocabulary(tokenizer, 400)
    back = partition_text(ids[0].numpy(), vocabulary, partition, *rules)
    return torch.from_numpy(back.astype(np.int64))[None]


# ---- the attention


@pytest.mark.parametrize("partition", ["window:16", "semantic", "block:20"])
@pytest.mark.parametrize("anchor", [False, True])
def test_an_export_through_the_hub_equals_model_py_at_every_dial(tmp_path, partition, anchor):
    torch.manual_seed(0)
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 32, "max_lookback": 24, "anchor": anchor}
    ours = GPT(GPTConfig(1001, 128, **shape)).eval()
    for p in ours.h.parameters():
        p.add_(0.2 * torch.randn_like(p))
    ours.save_pretrained(tmp_path)
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    encoding = get_encoding("sample")
    ids = torch.tensor([encoding.encode(TEXT[1000:])[:128], encoding.encode(TEXT[9000:])[:128]])
    rows = [partition_text(row.numpy(), token_bytes(encoding), partition, 24) for row in ids]
    lookback = torch.from_numpy(np.stack(rows).astype(np.int64))
    rules = {"partition": partition, "max_lookback": 24, "anchor": anchor}
    seen = []
    for name in SCHEDULES:
        for floor in (0.3, 1.0):
            ours.set_locality(schedule(name, 4, floor))
            hub.localize(theirs, tokenizer, name, floor, **rules)
            expected, actual = ours(ids, lookback)[0], theirs(ids).logits
            assert close(actual, expected)
            assert not any(close(actual, other, 1e-4) for other in seen)
            seen += [actual] if name != "distributed" else []


def test_at_0_a_model_is_its_untouched_self(model, tokenizer, ids):
    untouched = copy.deepcopy(model)
    hub.localize(model, tokenizer, "distributed", partition="window:4")
    padding = {"attention_mask": torch.ones_like(ids)}
    padding["attention_mask"][0, -9:] = 0
    for options in ({}, padding, {"labels": ids}):
        expected, actual = untouched(ids, **options), model(ids, **options)
        x, y = (out.logits[:, :-9] for out in (expected, actual))
        assert close(y, x, 1e-6)
    assert actual.loss == pytest.approx(expected.loss.item(), rel=1e-6)
    model.set_locality(DIAL)
    assert not torch.allclose(model(ids).logits, expected.logits, atol=0.1)


def test_the_floor_holds_in_every_layer_and_head_whatever_the_weights(model, tokenizer, ids):
    hub.localize(model, tokenizer, partition="window:5")
    near = in_block(torch.full_like(ids, 4).minimum(torch.arange(200)))[:, None]  # (1, 1, T, T)
    for dial in ([0.3, 0.6, 0.9], [1.0, 0.1, 0.5]):
        for p in model.parameters():
            p.copy_(3 * torch.randn_like(p))
        model.set_locality(dial)
        for a, least in zip(model(ids, output_attentions=True).attentions, dial):
            fidelity = (a * near).sum(-1)  # (1, H, T)
            assert fidelity.min() >= least - 1e-5
            assert torch.allclose(a.sum(-1), torch.ones(()))
        assert not (a.triu(1)).any()


def test_a_layer_with_a_window_keeps_it(tokenizer, ids):
    """The window of 24 tokens limits both halves; the block of 50 limits one."""
    for name, windowed in (("Mistral", [0, 1, 2]), ("Gemma3", [0, 2])):
        model = hub.localize(make(name), tokenizer, partition="block:50")
        model.set_locality(DIAL)
        outside = torch.ones(200, 200).tril(-24).bool()
        for layer, a in enumerate(model(ids, output_attentions=True).attentions):
            assert bool(a[..., outside].any()) == (layer not in windowed)
            block = torch.arange(200)[:, None] % 50 >= torch.arange(200)[:, None] - torch.arange(
                200
            )
            assert ((a * block).sum(-1) >= DIAL[layer] - 1e-5).all()


def test_the_weights_are_those_of_the_definition_and_change_no_output(tokenizer, ids):
    model = hub.localize(make("GPT2"), tokenizer, partition="window:5")
    model.set_locality(DIAL)
    layer, inputs = model.transformer.h[1], []
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    out = model(ids, output_attentions=True)
    assert torch.allclose(out.logits, model(ids).logits, atol=1e-3)
    q, k, _ = layer.attn.c_attn(layer.ln_1(inputs[0])).split(48, 2)
    q, k = (x.unflatten(2, (4, 12)).transpose(1, 2) for x in (q, k))
    block = in_block(torch.full_like(ids, 4).minimum(torch.arange(200)))[:, None]
    assert torch.allclose(out.attentions[1], attention_weights(q, k, block, 0.7), atol=1e-5)


@torch.enable_grad()
def test_gradients_flow_with_checkpoints_and_without(model, tokenizer, ids):
    hub.localize(model, tokenizer, floor=0.5, partition="window:8").train()
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    whole, checkpointed = (torch.cat([g.flatten() for g in x]) for x in gradients)
    assert close(checkpointed, whole) and whole.abs().max() > 0


# ---- generation


def grow(model, ids, n=14, **options):
    mask = torch.ones_like(ids) if "attention_mask" not in options else None
    options = {"attention_mask": mask, "do_sample": False, **options}
    return model.generate(ids, max_new_tokens=n, min_new_tokens=n, **options)[:, ids.size(1) :]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"num_beams": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 32},
    ],
    ids=str,
)
def test_generates_the_same_with_a_cache_and_without(model, tokenizer, ids, options):
    hub.localize(model, tokenizer, partition="semantic:closed", max_lookback=40)
    model.set_locality(DIAL)
    torch.manual_seed(1)
    cached = grow(model, ids[:, :90], **options)
    without = {k: v for k, v in options.items() if k in ("do_sample", "num_beams")}
    torch.manual_seed(1)
    assert torch.equal(cached, grow(model, ids[:, :90], use_cache=False, **without))
    model.set_locality([0, 0, 0])
    torch.manual_seed(1)
    assert not torch.equal(cached, grow(model, ids[:, :90], **options))  # the dial matters


def test_texts_of_a_batch_do_not_depend_on_padding(model, tokenizer, ids):
    """Left padding, as in `generate`, and right padding, as in training."""
    hub.localize(model, tokenizer, partition="semantic:closed", max_lookback=40)
    model.set_locality(DIAL)
    short, pad = ids[:, 60:150], torch.zeros(1, 60, dtype=torch.int64)
    rest = torch.zeros(1, 60, dtype=torch.int64), torch.ones_like(short)
    left = torch.cat((ids[:, :150], torch.cat((pad, short), 1)))
    left_mask = torch.cat((torch.ones(1, 150), torch.cat(rest, 1))).long()
    for options in ({"num_beams": 2}, {"cache_implementation": "static"}):
        both = grow(model, left, attention_mask=left_mask, **options)
        assert torch.equal(both[:1], grow(model, ids[:, :150], **options))
        assert torch.equal(both[1:], grow(model, short, **options))
    right, right_mask = torch.cat((short, pad), 1), torch.cat(rest[::-1], 1)
    batch, mask = torch.cat((ids[:, :150], right)), torch.cat((torch.ones(1, 150), right_mask))
    logits = model(batch, attention_mask=mask.long()).logits
    assert close(logits[:1], model(ids[:, :150]).logits)
    assert close(logits[1:, :90], model(short).logits)


def test_packed_texts_are_as_if_each_were_read_by_itself(model, tokenizer, ids):
    hub.localize(model, tokenizer, partition="block:32", max_lookback=40, anchor=True)
    model.set_locality(DIAL)
    texts = ids[:, :70], ids[:, 70:80], ids[:, 80:]
    position = torch.cat([torch.arange(text.size(1)) for text in texts])[None]
    packed = model(ids, position_ids=position, use_cache=False).logits
    alone = torch.cat([model(text).logits for text in texts], 1)
    assert close(packed, alone)


def test_the_model_inside_finds_its_blocks_too(model, tokenizer, ids):
    """Programs that wrap a model call its forward, or the model without its output head."""
    hub.localize(model, tokenizer, partition="window:8")
    logits = model(ids).logits
    assert torch.equal(model.forward(ids).logits, logits)
    assert close(model.lm_head(model.base_model(ids).last_hidden_state), logits)


def test_a_model_that_reads_images_too_is_its_untouched_self_at_0(tokenizer, ids):
    """The tokens of an image see each other, also later ones: these are in their blocks."""
    text = {**GROUPED, "layer_types": WINDOWS, "sliding_window": 24}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    special = {"image_token_index": 399, "boi_token_index": 398, "eoi_token_index": 397}
    config = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4, **special}
    torch.manual_seed(0)
    model = tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(**config)).eval()
    ids = ids[:, :60].clone()
    ids[ids > 396] = 5
    ids[0, 20:26] = torch.tensor([398, 399, 399, 399, 399, 397])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28)}
    inputs["token_type_ids"] = (ids == 399).long()
    untouched = model(**inputs).logits
    hub.localize(model, tokenizer, "distributed", partition="window:4")
    assert close(model(**inputs).logits, untouched, 1e-5)
    model.set_locality([0.5, 0.5, 0.9])
    assert not close(model(**inputs).logits, untouched, 1e-3)
    for a in model(**inputs, output_attentions=True).attentions:
        assert (a[0, :, 21:25, 21:25].sum(-1) > 0).all()


def test_a_part_that_the_model_itself_does_not_call_does_no_harm(tokenizer, ids):
    """The output head of OPT calls the decoder of its model, but not the model."""
    size = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 48, "ffn_dim": 64}
    model = tf.OPTForCausalLM(tf.OPTConfig(vocab_size=400, word_embed_proj_dim=48, **size)).eval()
    hub.localize(model, tokenizer, partition="window:8")
    assert torch.equal(model.forward(ids).logits, model(ids).logits)


def test_a_cache_can_be_used_by_hand(model, tokenizer, ids):
    """Piece by piece, its rows moved, its end cut off: always as if the whole had been read."""
    hub.localize(model, tokenizer, partition="semantic:closed", max_lookback=40)
    model.set_locality(DIAL)
    batch = torch.cat((ids[:, :100], ids[:, 100:]))
    expected = model(batch, use_cache=False).logits
    out = model(batch[:, :60], use_cache=True)
    cache = out.past_key_values
    shallow = copy.copy(cache)
    shallow.layers = copy.deepcopy(cache.layers)
    shallow.reorder_cache(beam_idx=torch.tensor([1, 0]))
    out = model(batch[[1, 0], 60:80], past_key_values=shallow)
    assert close(out.logits, expected[[1, 0], 60:80])
    forked = copy.deepcopy(cache)
    for i in range(60, 100, 20):
        out = model(batch[:, i : i + 20], past_key_values=cache)
        assert close(out.logits, expected[:, i : i + 20])
    forked.reorder_cache(torch.tensor([1, 0]))
    out = model(batch[[1, 0], 60:80], past_key_values=forked)
    assert close(out.logits, expected[[1, 0], 60:80])
    forked.batch_select_indices(torch.tensor([1]))
    forked.batch_repeat_interleave(2)
    out = model(batch[:1, 80:].repeat(2, 1), past_key_values=forked)
    assert close(out.logits, expected[:1, 80:].repeat(2, 1, 1))
    if not any(forked.is_sliding):
        forked.crop(-20)
        out = model(batch[:1, 80:90].repeat(2, 1), past_key_values=forked)
        assert close(out.logits, expected[:1, 80:90].repeat(2, 1, 1))


def test_rows_are_moved_once_even_if_the_file_is_loaded_again():
    importlib.reload(hub)
    cache = tf.DynamicCache()
    cache.texts = torch.arange(3)
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    assert cache.texts.tolist() == [1, 2, 0]


def test_calls_from_several_threads_do_not_mix(tokenizer, ids):
    model = hub.localize(make("Llama"), tokenizer, partition="semantic:closed", max_lookback=40)
    model.set_locality(DIAL)

    def read(text, wait=lambda: None):
        with torch.no_grad():
            cache = model(text[:, :60], use_cache=True).past_key_values
            wait()
            return model(text[:, 60:100], past_key_values=cache).logits

    texts, barrier = (ids[:, :100], ids[:, 100:]), threading.Barrier(2, timeout=30)
    hook = model.model.register_forward_pre_hook(lambda *_: print(barrier.wait()))
    with ThreadPoolExecutor(2) as pool:
        actual = list(pool.map(partial(read, wait=barrier.wait), texts))
    hook.remove()
    assert all(map(torch.equal, actual, map(read, texts)))


def test_a_compiled_model_follows_the_dial(tokenizer, ids):
    model = hub.localize(make("Qwen3"), tokenizer, partition="window:8")
    compiled = torch.compile(model, backend="eager")
    for dial in (DIAL, [0.0, 0.0, 0.5]):
        model.set_locality(dial)
        assert close(compiled(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_in_the_untouched_model(tokenizer, ids, dtype):
    errors = []
    for localized in (False, True):
        model = make("Llama")
        if localized:
            hub.localize(model, tokenizer, partition="window:8")
        expected = model(ids).logits
        errors.append((model.to(dtype)(ids).logits - expected).std())
    assert errors[1] < 1.5 * errors[0]


def test_what_a_call_lacks_is_said(tokenizer, ids):
    model = make("Llama")
    cache = model(ids[:, :9], use_cache=True).past_key_values
    hub.localize(model, tokenizer)
    with pytest.raises(InputError, match="tokens that the localized model has not read"):
        model(ids[:, 9:12], past_key_values=cache)
    with pytest.raises(InputError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 48))
    for mask in (torch.zeros(1, 1, 9, 9), torch.ones(1, 8), {"full_attention": None}):
        with pytest.raises(InputError, match=r"mask must have the shape \(1, 9\)"):
            model(ids[:, :9], attention_mask=mask)
    for dial in ([1, 1], [0, 0, 2], [0, 0, float("nan")], 0.5, "quintic", [None] * 3):
        with pytest.raises(InputError, match="set_locality takes 3 numbers"):
            model.set_locality(dial)


# ---- the blocks of any tokenizer


def test_blocks_are_those_that_prepare_data_would_find(model, tokenizer, ids):
    vocabulary = read_vocabulary(tokenizer, 400)
    background = count_background(ids[0].numpy(), vocabulary)
    for partition in ("semantic", "semantic:closed", "sentence", "document", "aligned:20"):
        for known in (None, background):
            hub.localize(model, tokenizer, partition=partition, background=known)
            lookback = model.localist.read(input_ids=ids).lookback
            assert torch.equal(lookback, lookback_of(ids, tokenizer, partition, 512, known))
    assert len(lookback.unique()) > 20


def test_the_vocabulary_of_gpt2_is_the_one_that_prepare_data_reads(gpt2_tokenizer, tmp_path):
    GPT(GPTConfig(50257, 8, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path)
    theirs = tf.AutoTokenizer.from_pretrained(tmp_path)
    assert read_vocabulary(theirs, 50257) == token_bytes(gpt2_tokenizer)
    added = copy.deepcopy(theirs)
    added.add_tokens(["<think>"])
    added.add_special_tokens({"pad_token": "<pad>"})
    assert read_vocabulary(added, 50300)[50257:] == [b"<think>", *[b""] * 42]


def word_level(n):
    """A tokenizer of n tokens that do not matter."""
    words = tokenizers.models.WordLevel({f"word{i}": i for i in range(n)}, "word0")
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))


def sentencepiece_like(**options):
    """A fast tokenizer like those of Llama 2 and Gemma: ▁ for a space, <0x0A> for a byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzTINCB'.,()10", "th", "▁th", "▁the", "he"]
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("h", "e")]
    bpe = tokenizers.models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>"
    )
    bpe = tokenizers.Tokenizer(bpe)
    normalizers = tokenizers.normalizers
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe, **special, **options)


ODD_TEXT = "The café's 猫 🙂\n\nNobody, not 1\tof 10."


def read_text(tokenizer, text):
    vocabulary = read_vocabulary(tokenizer, 1000)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return b"".join(vocabulary[i] for i in ids)


def test_the_tokens_of_sentencepiece_are_read_as_text():
    tokenizer = sentencepiece_like()
    assert read_text(tokenizer, ODD_TEXT) == b" " + ODD_TEXT.encode()
    assert read_text(tokenizer, "the end</s>") == b" the end" + END_OF_TEXT
    spaces = [tf.AddedToken("▁▁", normalized=False), tf.AddedToken("▁▁▁▁", normalized=False)]
    tokenizer.add_tokens(spaces)  # as Gemma has runs of spaces
    text = "I sat.  The cat    ran."
    tokens = [tokenizer.convert_tokens_to_ids(piece) for piece in ("▁the", "▁▁", "the", "▁▁▁▁")]
    vocabulary = read_vocabulary(tokenizer, 1000)
    assert b"".join(vocabulary[i] for i in tokens if i) == b" the      "
    assert read_text(tokenizer, text).decode().split() == text.split()


def test_a_slow_sentencepiece_tokenizer_is_read_as_text(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spiece"), vocab_size=600,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    slow = tf.GPTSw3Tokenizer(str(tmp_path / "spiece.model"))
    assert not slow.is_fast
    assert read_text(slow, ODD_TEXT).lstrip() == ODD_TEXT.encode()


def test_the_end_of_a_turn_is_no_end_of_a_document(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.add_special_tokens({"eos_token": "<|im_end|>"})
    assert read_text(chat, "one<|im_end|> two") == b"one" + END_OF_TEXT + b" two"
    chat.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    assert read_text(chat, "one<|im_end|> two") == b"one two"
    assert read_text(chat, "one<|endoftext|> two") == b"one" + END_OF_TEXT + b" two"


def test_tokens_that_are_not_pieces_of_the_text_are_refused(tmp_path, ids):
    words = {word: i for i, word in enumerate(["[UNK]", "the", "cat", "##s"])}
    word_piece = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    word_piece = tf.PreTrainedTokenizerFast(tokenizer_object=word_piece, unk_token="[UNK]")
    model = make("GPT2")
    before = model(ids).logits
    for tokenizer in (word_piece, tf.ByT5Tokenizer()):
        with pytest.raises(InputError, match="not pieces of a text"):
            hub.localize(model, tokenizer)
    assert model.config._attn_implementation == "sdpa" and torch.equal(model(ids).logits, before)


# ---- models that cannot be localized

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48, "vocab_size": 400}
OTHERS = {
    "every token": lambda: tf.LlamaForSequenceClassification(make("Llama").config),
    "see later ones": lambda: tf.BertForMaskedLM(tf.BertConfig(**LAYERS)),
    "not a decoder": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=400, d_model=48, num_layers=2, num_heads=4, d_kv=12, d_ff=64)
    ),
    "not num_hidden_layers": lambda: tf.BartForCausalLM(
        tf.BartConfig(
            vocab_size=400,
            d_model=48,
            **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
            **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
            encoder_layers=4,
            decoder_layers=2,
        )
    ),
    "cannot replace": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=400, hidden_size=48, n_layer=2, n_head=4)
    ),
    "interact outside attention": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=400, hidden_size=48, num_hidden_layers=2)
    ),
    "parts that": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**LAYERS, head_dim=12, num_key_value_heads=2, num_local_experts=4)
    ),
    "soft-capped": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**LAYERS, head_dim=12, num_key_value_heads=2, intermediate_size=64)
    ),
}


@pytest.mark.parametrize("reason", OTHERS)
def test_a_model_that_cannot_be_localized_is_refused_and_stays_as_it_was(reason, tokenizer, ids):
    torch.manual_seed(0)
    model = OTHERS[reason]().eval()
    call = {"input_ids": ids[:, :20]}
    call |= {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    before, config = model(**call).logits, model.config.to_dict()
    with pytest.raises(InputError, match=f"{type(model).__name__}.*{reason}"):
        hub.localize(model, tokenizer)
    assert torch.equal(model(**call).logits, before) and model.config.to_dict() == config
    assert not hasattr(model, "localist")


def test_other_attention_functions_and_bad_rules_are_refused(tokenizer):
    model = make("Llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="'flash_attention_2' cannot be localized.*'sdpa'"):
        hub.localize(model, tokenizer)
    with pytest.raises(InputError, match="is not a decoder"):
        hub.localize(torch.nn.Linear(2, 2), tokenizer)
    for wrong in (None, "gpt2", tokenizer.backend_tokenizer):
        with pytest.raises(InputError, match="is not a tokenizer"):
            hub.localize(make("Llama"), wrong)
    with pytest.raises(InputError, match="401 tokens, the model only 400"):
        hub.localize(make("Llama"), word_level(401))
    for rules in (
        {"background": {"total": 1}},
        {"schedule": "cubik"},
        {"floor": 0},
        {"partition": "windows"},
        {"partition": "window:600"},
        {"max_lookback": 0},
    ):
        with pytest.raises(InputError):
            hub.localize(make("Llama"), tokenizer, **rules)


# ---- to disk and back


@pytest.mark.parametrize("tokenizer", ["bytes", "sample"])
def test_a_run_is_the_same_model_through_the_hub(train, tmp_path, tokenizer):
    """With its dial, and with the blocks that its prepared data has."""
    with torch.enable_grad():
        folder = train(f"hub-{tokenizer}", floor=0.9, tokenizer=tokenizer)
    ours, config, trained_on = load(folder)
    ours.save_pretrained(tmp_path)
    theirs = hub.load(tmp_path)
    assert theirs.config.locality == ours.locality == [0.0, 0.9]
    prepared = prepare(TextConfig.of(config), trained_on)
    values = (torch.from_numpy(x[:192].astype(np.int64))[None] for x in prepared.split("val"))
    tokens, lookback = values
    assert prepared.meta["background"] == theirs.localist.background
    assert torch.equal(theirs.localist.read(input_ids=tokens).lookback, lookback)
    assert close(theirs(tokens).logits, ours(tokens, lookback)[0])


def test_a_saved_model_has_its_dial_and_is_otherwise_what_it_was(model, tokenizer, ids, tmp_path):
    before = model(ids).logits
    vocabulary = read_vocabulary(tokenizer, 400)
    background = count_background(ids[0].numpy(), vocabulary)
    rules = {"partition": "semantic:closed", "max_lookback": 40, "anchor": True}
    hub.localize(model, tokenizer, **rules, background=background)
    model.set_locality(DIAL)
    expected = model(ids).logits
    model.save_pretrained(save_directory=tmp_path)
    again = hub.load(tmp_path)
    assert torch.equal(again(ids).logits, expected)
    config = again.config.get_text_config()
    assert config.localist == {**rules, "floor": 1.0} and config.locality == DIAL
    assert again.localist.background == background
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is type(model) and torch.equal(plain(ids).logits, before)
    assert tf.AutoTokenizer.from_pretrained(tmp_path).encode(TEXT) == tokenizer.encode(TEXT)
    hub.localize(again, tokenizer, partition="window:4").save_pretrained(tmp_path)
    assert hub.load(tmp_path).localist.background is None


def test_a_copy_has_a_dial_of_its_own(tokenizer, ids):
    model = hub.localize(make("Qwen3"), tokenizer, partition="window:4")
    expected, other = model(ids).logits, copy.deepcopy(model)
    other.set_locality([0, 0, 0])
    assert not torch.allclose(other(ids).logits, expected, atol=0.1)
    assert torch.equal(model(ids).logits, expected)


def test_a_dial_that_was_switched_off_is_missed(tokenizer, ids):
    model = hub.localize(make("Llama"), tokenizer, partition="window:4")
    expected = model(ids).logits
    model.set_attn_implementation("sdpa")
    with pytest.raises(InputError, match="replaced after hub.localize; call it again"):
        model(ids)
    hub.localize(model, tokenizer, partition="window:4")
    assert torch.equal(model(ids).logits, expected)


def test_a_second_call_that_fails_leaves_the_first(tokenizer, ids):
    model = hub.localize(make("Llama"), tokenizer, "localist", partition="window:4")
    expected, weight = model(ids).logits, model.lm_head.weight.clone()
    model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        hub.localize(model, tokenizer, partition="window:9")
    model.lm_head.weight.copy_(weight)
    assert torch.equal(model(ids).logits, expected)
    assert model.config.localist["partition"] == "window:4"


def test_the_whole_of_a_folder_is_of_one_place(tokenizer, tmp_path):
    hub.localize(make("Llama"), tokenizer, "linear").save_pretrained(tmp_path / "a" / "b")
    assert hub.load(tmp_path / "a", subfolder="b").config.locality == [0.0, 0.5, 1.0]


def test_a_second_call_replaces_the_first(tokenizer, ids, monkeypatch):
    model = hub.localize(make("Llama"), tokenizer, "linear", partition="window:4")
    hub.localize(model, tokenizer, "localist", 0.5, partition="block:9")
    once = hub.localize(make("Llama"), tokenizer, "localist", 0.5, partition="block:9")
    assert torch.equal(model(ids).logits, once(ids).logits)
    monkeypatch.setattr(tf.LlamaPreTrainedModel, "_supports_sdpa", False)  # as in older models
    model = make("Llama", attn_implementation="eager")
    for partition in ("window:4", "block:9"):
        hub.localize(model, tokenizer, partition=partition)
    assert model.config.localist["partition"] == "block:9"


def test_a_folder_without_a_whole_model_is_refused(tokenizer, tmp_path):
    base = tf.LlamaModel(make("Llama").config)
    hub.localize(base, tokenizer).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="no output head"):
        hub.load(tmp_path / "base")
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="run has no config.json; if it is a run"):
        hub.load(tmp_path / "run")
    for name in (tmp_path / "nowhere", "nowhere/at-all"):
        with pytest.raises(InputError, match="^[^\n]*cannot be loaded: [^\n]+$"):
            hub.load(name)


@pytest.mark.parametrize(
    "change",
    [
        {"localist": None},
        {"localist": 3},
        {"localist": {"partition": 3}},
        {"locality": [1]},
        {"locality": None},
    ],
)
def test_a_folder_without_a_dial_is_refused(tokenizer, tmp_path, change):
    hub.localize(make("Llama"), tokenizer).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError):
        hub.load(tmp_path)


def test_the_examples_of_the_documents_work(tokenizer, tmp_path, monkeypatch):
    tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED)).save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    monkeypatch.chdir(tmp_path)
    for name in ("README.md", "docs/HUB.md"):
        text = (ROOT / name).read_text(encoding="utf-8").split("\nimport hub\n")[1]
        example = text.partition("```")[0].replace("Qwen/Qwen3-0.6B", "qwen")
        (tmp_path / "example.py").write_text(f"import hub\n{example}", encoding="utf-8")
        scope = runpy.run_path("example.py", {"text": TEXT[:500]})
        assert scope["model"].config.locality == [0.0] * 3
    assert hub.load("localized").config.locality == schedule("quintic", 3)
