"""Weights come and go whole, or not at all."""

import collections
import hashlib
import importlib
import io
import json
import warnings
from dataclasses import asdict

import pytest
import torch

import eval
from model import GPT, GPTConfig
from support import tokenizers, weights
from support.files import InputError
from support.tokenizers import check_tokenizer, get_encoding, spell, vocabulary_size

SHAPE = {"vocab_size": 101, "block_size": 64, "n_layer": 3, "n_head": 4, "n_embd": 48}


def published(folder, **shape):
    """The path of a small random GPT-2, written in the old format, like the published ones."""
    torch.manual_seed(0)
    GPT(GPTConfig(**{**SHAPE, **shape})).save_pretrained(folder)
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    del state["lm_head.weight"]
    state = {name.removeprefix("transformer."): v for name, v in state.items()}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def changed(path, **tensors):
    """Save the weights again with other tensors; None removes one."""
    state = {**torch.load(path, weights_only=True), **tensors}
    torch.save({name: v for name, v in state.items() if v is not None}, path)


BIAS, POSITIONS = "h.1.mlp.c_fc.bias", "wpe.weight"
DAMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "not a readable"),
    "a web page": (lambda path: path.write_bytes(b"<html>not found</html>"), "refused"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable"),
    "a tensor less": (lambda path: changed(path, **{BIAS: None}), f"{BIAS} is missing"),
    "a shape": (lambda path: changed(path, **{BIAS: torch.zeros(7)}), r"shape \(7,\), expected"),
    "not finite": (lambda path: changed(path, **{BIAS: torch.zeros(192) / 0}), "finite numbers"),
    "integers": (lambda path: changed(path, **{BIAS: torch.ones(192).int()}), "finite numbers"),
    "no matrix": (lambda path: changed(path, **{POSITIONS: torch.zeros(9)}), "no GPT-2"),
    "no positions": (lambda path: changed(path, **{POSITIONS: torch.zeros(0, 48)}), "no GPT-2"),
    "untied": (lambda path: changed(path, **{"lm_head.weight": torch.ones(101, 48)}), "lm_head"),
    "a list": (lambda path: torch.save([torch.zeros(3)], path), "not the weights"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_weights_file_is_refused_by_name(tmp_path, name):
    damage, message = DAMAGES[name]
    damage(published(tmp_path))
    with pytest.raises(InputError, match=f"pytorch_model.bin: .*{message}"):
        GPT.from_pretrained(tmp_path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 9\n"
ONE, ROWS = torch.zeros(1), torch.zeros(9, 8)
with warnings.catch_warnings(action="ignore"):  # nested tensors are a prototype
    NESTED = torch.nested.nested_tensor([ONE, ONE])
MANY_LAYERS = {"wte.weight": ROWS, "wpe.weight": ROWS, "ln_f.weight": ONE, "ln_f.bias": ONE}
MANY_LAYERS |= {f"h.{i}.x": ONE for i in range(40000)}
HOSTILE = {
    "expanded": ({"wte.weight": ONE.expand(2**40, 2**10)}, "claim 4,503,599,627,370,496 bytes"),
    "many layers": (MANY_LAYERS, "h.0.ln_1.weight is missing"),
    "no layers": ({"wte.weight": ROWS, "wpe.weight": ROWS}, "missing"),
    "many values": ({"a": [[[0] * 2**10] * 2**10] * 2**10}, "more than 4,194,304 values"),
    "meta": ({"a": torch.zeros(9, device="meta")}, "not plain numbers"),
    "sparse": ({"a": torch.ones(9).to_sparse()}, "not plain numbers"),
    "nested": ({"a": NESTED}, "not plain numbers"),
    "complex": ({"a": ONE.to(torch.complex64)}, "not plain numbers"),
    "float8": ({"a": ONE.to(torch.float8_e4m3fn)}, "not plain numbers"),
    "a set": ({"a": {1}}, "which does not belong"),
    "a key": ({"a": {(1, 2): 3}}, "which does not belong"),
    "a long integer": ({"a": 2**65}, "which does not belong"),
}


class Odd:
    """Unpickled as an OrderedDict whose method `values` is a class: it returns nothing."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        state = {"values": collections.OrderedDict}
        return collections.OrderedDict, (), state, None, iter(self.content.items())


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_a_file_is_hidden_from_the_check(tmp_path, name):
    content, message = HOSTILE[name]
    for wrapped in (Odd(content), {"model": Odd(content)}):
        torch.save(wrapped, tmp_path / "pytorch_model.bin")
        with pytest.raises(InputError, match=f"^[^\n]*pytorch_model.bin.*{message}"):
            GPT.from_pretrained(tmp_path)
    torch.save({"a": ["x" * 10**6] * 100}, tmp_path / "pytorch_model.bin")  # stored once
    with pytest.raises(InputError, match="claim 100,000,000 bytes"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_ends_quickly_and_in_one_line(tmp_path, name):
    content, message = HOSTILE[name]
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=f"^[^\n]*pytorch_model.bin.*{message}"):
        GPT.from_pretrained(tmp_path)


def nested(depth):
    """A file in torch's old format with a list in a list in a list ..."""
    file = io.BytesIO()
    torch.save({"a": 7}, file, _use_new_zipfile_serialization=False)
    content, seven = file.getvalue(), b"K\x07s"
    assert content.count(seven) == 1
    return content.replace(seven, b"]" * depth + b"a" * (depth - 1) + b"s")


def test_nesting_is_limited(tmp_path):
    for depth, cyclic in ((900, False), (10**5, False), (0, True)):
        if cyclic:
            value = []
            value.append(value)
            torch.save({"a": value}, tmp_path / "w.bin")
        else:
            (tmp_path / "w.bin").write_bytes(nested(depth))
        with pytest.raises(InputError, match="w.bin contains values nested"):
            weights.load(tmp_path / "w.bin")
    (tmp_path / "w.bin").write_bytes(nested(9))
    assert str(weights.load(tmp_path / "w.bin")["a"]) == "[[[[[[[[[]]]]]]]]]"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_safetensors_pass_the_same_check(tmp_path, dtype):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"a": ONE.to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not plain numbers"):
        GPT.from_pretrained(tmp_path)


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = published(tmp_path)
    for other, reason in ((tmp_path, "not a regular file"), (tmp_path / "no", "No such file")):
        with pytest.raises(InputError, match=f"cannot be read .{reason}"):
            weights.load(other)
    for error in (MemoryError(), torch.OutOfMemoryError(), RuntimeError("can't allocate memory")):
        monkeypatch.setattr(
            torch, "load", lambda *_, error=error, **__: (_ for _ in ()).throw(error)
        )
        with pytest.raises(type(error)) as raised:
            weights.load(path)
        assert raised.value is error


def test_a_git_lfs_pointer_is_named(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text(POINTER.format("0" * 64))
        with pytest.raises(InputError, match=f"{name}: a git-lfs pointer.*git lfs pull"):
            weights.load(tmp_path / name)


def parameters(path, **settings):
    return GPT.from_pretrained(path, **settings).state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.transformer.", "model."])
def test_what_programs_wrap_around_the_tensors_is_removed(tmp_path, wrapper, prefix):
    path = published(tmp_path)
    expected = parameters(path)
    state = {prefix + name: v for name, v in torch.load(path, weights_only=True).items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    assert equal(parameters(path), expected)
    name = next(iter(state))
    state["module.module." + name] = state[name] + 1  # the same name twice
    torch.save(state, path)
    with pytest.raises(InputError, match="contradictory"):
        GPT.from_pretrained(path)


def test_models_of_nanogpt_are_named(tmp_path):
    path = published(tmp_path)
    state, ours = torch.load(path, weights_only=True), GPT(GPTConfig(**SHAPE)).state_dict()
    del ours["ln_f.bias"]
    for content in ({"model": state, "model_args": {}, "iter_num": 3}, ours, {"model": ours}):
        torch.save(content, path)
        with pytest.raises(InputError, match="nanoGPT.*stored transposed"):
            GPT.from_pretrained(path)


def test_the_output_head_may_be_the_only_name_of_the_embedding(tmp_path):
    path = published(tmp_path)
    expected, wte = parameters(path), torch.load(path, weights_only=True)["wte.weight"]
    changed(path, **{"wte.weight": None, "lm_head.weight": wte})
    assert equal(parameters(path), expected)
    changed(path, **{"wte.weight": wte.double()})
    with pytest.raises(InputError, match="lm_head.weight differs"):
        GPT.from_pretrained(path)


# ---- which file


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_shards_are_merged(tmp_path, kind):
    path = published(tmp_path)
    expected, state = parameters(path), torch.load(path, weights_only=True)
    path.unlink()
    if kind == "bin":
        save, index = torch.save, tmp_path / "pytorch_model.bin.index.json"
    else:
        save = pytest.importorskip("safetensors.torch").save_file
        index = tmp_path / "model.safetensors.index.json"
    files = {name: f"m-{number % 2}.{kind}" for number, name in enumerate(state)}
    for file in set(files.values()):
        part = {name: v.clone() for name, v in state.items() if files[name] == file}
        save(part, tmp_path / file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert weights.find(tmp_path) == index and equal(parameters(tmp_path), expected)
    save({"other": ONE}, tmp_path / f"m-0.{kind}")
    with pytest.raises(InputError, match=f"m-0.{kind}: tensor '.*' is missing"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / f"m-1.{kind}").unlink()
    with pytest.raises(InputError, match=f"m-1.{kind} cannot be read .No such file"):
        GPT.from_pretrained(tmp_path)


INDEXES = [*("../x.bin", "/tmp/x.bin", "a/b.bin", "..", "", "x.bin\n", "c\\x.bin"), 3, None]
INDEXES += ["pytorch_model.bin.index.json"]


@pytest.mark.parametrize("file", INDEXES)
def test_an_index_names_only_files_beside_it(tmp_path, file):
    index = tmp_path / "pytorch_model.bin.index.json"
    for content in ({"weight_map": {"wte.weight": file}}, {"weight_map": file}, {}):
        index.write_text(json.dumps(content))
        with pytest.raises(InputError, match="^[^\n]*index.json (names|is not an index)[^\n]*$"):
            weights.load(index)


def test_a_local_folder_comes_before_a_published_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "download_gpt2", lambda name: f"downloaded {name}")
    assert weights.find("gpt2") == "downloaded gpt2"
    assert str(weights.find(published(tmp_path / "gpt2"))) == str(weights.find("gpt2").absolute())


FOLDERS = [
    (["adapter_config.json", "adapter_model.safetensors"], "an adapter .adapter_config.json"),
    (["checkpoint-500/", "checkpoint-1000/", "trainer_state.json"], "newest.*/checkpoint-1000$"),
    (["config.json", "tf_model.h5"], "format of tf_model.h5"),
    (["flax_model.msgpack"], "format of flax_model.msgpack"),
    (["model.ckpt.data-00000-of-00001", "model.ckpt.index"], "format of model.ckpt.index"),
    (["gpt2.Q4.gguf"], "format of gpt2.Q4.gguf"),
    (["model.onnx"], "format of model.onnx"),
    (["notes.txt"], "no best.pt, model.safetensors or pytorch_model.bin"),
]


@pytest.mark.parametrize("names, message", FOLDERS)
def test_a_folder_without_weights_is_described(tmp_path, names, message):
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    with pytest.raises(InputError, match=message):
        weights.find(tmp_path)


@pytest.mark.parametrize("installed", [True, False])
def test_if_both_formats_are_there_a_message_says_which_is_used(
    tmp_path, monkeypatch, capsys, installed
):
    for name in (*weights.SAFETENSORS, *weights.TORCH):
        (tmp_path / name).touch()
    find_spec = lambda name: object() if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    names = ["model.safetensors", "pytorch_model.bin"]
    used, ignored = names if installed else names[::-1]
    assert weights.find(tmp_path).name == used
    assert capsys.readouterr().err.startswith(f"{tmp_path}: using {used}, not {ignored}")
    (tmp_path / ignored).unlink()
    (tmp_path / f"{ignored}.index.json").unlink()
    assert weights.find(tmp_path).name == used and not capsys.readouterr().err


# ---- what is beside the weights


OTHERS = {"activation_function": "relu", "layer_norm_epsilon": 1e-6, "n_inner": 100, "n_head": 5}
OTHERS |= {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}


OTHERS |= {"n_layer": 4}
HEADS = [("n_head", value) for value in (None, "4", 4.0, True, 0, -4, 10**30)]


@pytest.mark.parametrize("key, value", [*OTHERS.items(), *HEADS])
def test_another_model_than_gpt2_is_refused(tmp_path, key, value):
    path = published(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError, match=f"(config.json|model.bin).*{key}"):
        GPT.from_pretrained(path)


CHANGES = [("vocab_size", 2**62), ("vocab_size", 30), ("vocab_size", 0), ("block_size", 65)]
CHANGES += [("n_layer", torch.zeros(2)), ("n_head", 5), ("max_lookback", [1]), ("depth", 1)]
CHANGES += [(name, None) for name in SHAPE]  # keys that are missing


@pytest.mark.parametrize("key, value", CHANGES)
def test_a_model_config_that_does_not_match_its_weights_is_refused(tmp_path, key, value):
    model = GPT(GPTConfig(**SHAPE))
    config = {**asdict(model.config), key: value}
    if value is None:
        del config[key]
    torch.save({"model": model.state_dict(), "model_config": config}, tmp_path / "best.pt")
    with pytest.raises(InputError, match="best.pt"):
        GPT.from_pretrained(tmp_path)


def test_a_model_may_use_fewer_positions_but_not_more(tmp_path):
    path = published(tmp_path)
    whole, short = GPT.from_pretrained(path), GPT.from_pretrained(path, 16)
    assert short.config.block_size == 16 and whole.config.block_size == 64
    assert torch.equal(short.wpe.weight, whole.wpe.weight[:16])
    assert whole.wte.weight.shape == (128, 48) and not whole.wte.weight[101:].any()
    with pytest.raises(InputError, match=r"bin has 64 positions; lower block_size \(65\)"):
        GPT.from_pretrained(path, 65)


CONFIGS = [b'{"n_head": 1e999}', b"[" * 10**5, b'{"a": "\xff"}', b"[1]", b"4", b"{}", b"", b"{"]


@pytest.mark.parametrize("content", [*CONFIGS, None], ids=lambda content: str(content)[:20])
def test_a_config_json_that_is_none_is_named(tmp_path, content):
    path, config = published(tmp_path), tmp_path / "config.json"
    config.unlink()
    config.mkdir() if content is None else config.write_bytes(content)
    with pytest.raises(InputError, match="^[^\n]*config.json[^\n]*$"):
        GPT.from_pretrained(path)


@pytest.fixture
def vocabularies(gpt2_tokenizer):
    """{name of a file: its content, GPT-2's}; in tests, a part of a merge may be of any length."""
    tokens = spell(gpt2_tokenizer)
    merges = [f"{token[0]} {token[1:]}" for token in tokens[256:-1]]
    ids = {token: i for i, token in enumerate([*tokens, "<pad>"])}
    tokenizer = {"model": {"type": "BPE", "vocab": ids, "merges": merges}}
    return {
        "vocab.json": json.dumps(ids, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer.json": json.dumps(tokenizer),
    }


WIDE = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8}
SHALLOW = {**WIDE, "block_size": 32}


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
@pytest.mark.parametrize("rows", [50257, 50258, 50304])
def test_beside_gpt2s_vocabulary_further_rows_are_not_used(
    tmp_path, capsys, vocabularies, name, rows
):
    published(tmp_path, vocab_size=rows, **WIDE)
    (tmp_path / name).write_text(vocabularies[name], encoding="utf-8")
    model, config, _ = eval.load(tmp_path)
    assert model.config.vocab_size == 50257 and config["tokenizer"] == "gpt2"
    wte = weights.load(tmp_path / "pytorch_model.bin")["wte.weight"]
    assert torch.equal(model.wte.weight[:50257], wte[:50257])
    assert not model.wte.weight[50257:].any()
    message = f"has {rows:,} tokens; using the 50,257 of GPT-2\n"
    assert capsys.readouterr().err.endswith(message if rows > 50257 else "")


ANOTHER = {
    "vocab.json": lambda text: text.replace('"the"', '"teh"'),
    "merges.txt": lambda text: text.replace("\nt he\n", "\nt eh\n"),
    "tokenizer.json": lambda text: text.replace('"BPE"', '"Unigram"'),
    "vocab.txt": lambda text: "[PAD]\n[UNK]\n",
    "spiece.model": lambda text: "\0",
}
ODD = ['{"a": [1]}', '{"model": 3}', "[1]", "", "{", '{"model": {"vocab": {"a": {}}}}']


@pytest.mark.parametrize("name", ANOTHER)
def test_another_vocabulary_of_the_same_size_is_refused(tmp_path, vocabularies, name):
    published(tmp_path, vocab_size=50257, **WIDE)
    (tmp_path / "tokenizer.json").unlink()
    text = vocabularies.get(name, "")
    for content in (ANOTHER[name](text), *ODD):
        assert content != text or not text
        (tmp_path / name).write_text(content, encoding="utf-8")
        for load in (eval.load, GPT.from_pretrained):
            with pytest.raises(InputError, match=f"^[^\n]*{name} [^\n]*$"):
                load(tmp_path)


def test_weights_without_a_vocabulary_are_read_only_if_their_tokenizer_is_known(
    tmp_path, vocabularies
):
    published(tmp_path, vocab_size=300, **WIDE)
    assert eval.load(tmp_path)[1]["tokenizer"] == "gpt2:300"  # an export
    (tmp_path / "tokenizer.json").unlink()
    assert eval.load(tmp_path)[1]["tokenizer"] == "gpt2:300"
    config = json.loads((tmp_path / "config.json").read_text())
    for other in ({"tokenizer": "gpt2:299"}, {"tokenizer": "a"}, {"tokenizer": None}, {}, None, 3):
        (tmp_path / "config.json").write_text(json.dumps({**config, "localist": other}))
        with pytest.raises(InputError, match="300 tokens and no vocabulary beside it"):
            eval.load(tmp_path)
        assert GPT.from_pretrained(tmp_path).config.vocab_size == 300
    (tmp_path / "vocab.json").write_text(vocabularies["vocab.json"], encoding="utf-8")
    with pytest.raises(InputError, match="300 tokens, but the vocabulary beside it 50,257"):
        eval.load(tmp_path)


@pytest.mark.parametrize("name", ["sample", "bytes", "gpt2:257"])
def test_an_export_is_read_with_the_tokenizer_of_the_run(tmp_path, gpt2_tokenizer, name):
    published(tmp_path, vocab_size=vocabulary_size(name), **WIDE)
    assert eval.load(tmp_path)[1]["tokenizer"] == name
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    path.write_text(json.dumps(tokenizer))
    for load in (eval.load, GPT.from_pretrained):
        with pytest.raises(InputError, match=f"json is not the vocabulary of .*{name};"):
            load(tmp_path)
    n = vocabulary_size("sample")  # one size, one tokenizer
    with pytest.raises(InputError, match=f"except {n}"):
        check_tokenizer(f"gpt2:{n}")


# ---- the export


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin.index.json", "tf_model.h5", "vocab.json", "best.pt"],
)
def test_an_export_replaces_only_an_export(tmp_path, name):
    model = GPT(GPTConfig(**SHAPE))
    model.save_pretrained(tmp_path)
    (tmp_path / ".DS_Store").touch()
    with torch.no_grad():
        model.ln_f.bias.add_(1)
    model.save_pretrained(tmp_path)
    assert torch.equal(parameters(tmp_path)["ln_f.bias"], model.ln_f.bias)
    (tmp_path / name).write_text("{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=f"not of an earlier export .{name}.*empty folder"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_export_does_not_replace_the_weights_of_others(tmp_path):
    published(tmp_path)
    (tmp_path / "config.json").write_text('{"n_head": 4}')
    with pytest.raises(InputError, match="config.json.*empty folder"):
        GPT(GPTConfig(**SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="pytorch_model.bin"):
        GPT(GPTConfig(**SHAPE)).save_pretrained(tmp_path / "pytorch_model.bin")


def files_in(folder):
    return {path.name for path in folder.iterdir()}


def test_an_export_leaves_nothing_of_an_earlier_one(tmp_path, file_size):
    model = GPT(GPTConfig(256, **WIDE))
    model.partition, model.background = "semantic", {"total": 9, "words": [1, 7], "counts": [4, 5]}
    model.save_pretrained(tmp_path)
    names = {"config.json", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json"}
    assert files_in(tmp_path) == {*names, "background.json"}
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert json.loads(before["background.json"]) == model.background
    file_size(20000)
    with pytest.raises(InputError, match="could not be written"):
        GPT(GPTConfig(101, **{**WIDE, "n_embd": 64})).save_pretrained(tmp_path)
    file_size(None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    GPT(GPTConfig(1001, **WIDE)).save_pretrained(tmp_path)
    assert files_in(tmp_path) == names and eval.load(tmp_path)[1]["tokenizer"] == "sample"
    GPT(GPTConfig(101, **WIDE)).save_pretrained(tmp_path)
    assert files_in(tmp_path) == {"config.json", "pytorch_model.bin"}


def test_an_export_keeps_the_dial(tmp_path):
    model = GPT(GPTConfig(256, **WIDE, max_lookback=7, anchor=True))
    blocks = {"partition": None, "max_lookback": 7, "anchor": True}
    for x in (0, 0.25, 1):
        model.set_locality([x])
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["locality"] == [x]
        assert config["localist"] == {"tokenizer": "bytes", **blocks, "floor": x}
        assert GPT.from_pretrained(tmp_path).locality == [0]


@pytest.mark.parametrize("size", [101, 50257])
def test_transformers_finds_no_tokenizer_in_an_export_without_one(
    tmp_path, monkeypatch, capsys, size
):
    transformers = pytest.importorskip("transformers")

    def unreachable(name):
        raise ConnectionError

    monkeypatch.setattr(tokenizers.tiktoken, "get_encoding", unreachable)
    GPT(GPTConfig(size, **WIDE)).save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config.vocab_size == size
    with pytest.raises((ValueError, AttributeError)):  # rather than one that has no tokens
        transformers.AutoTokenizer.from_pretrained(tmp_path)
    error = capsys.readouterr().err
    assert ("no tokenizer until you export again: the gpt2" in error) == (size == 50257)
    assert error.count("\n") == (size == 50257)


@pytest.mark.parametrize("name", ["gpt2", "gpt2:300", "sample", "bytes"])
def test_transformers_reads_a_text_with_an_export_and_its_tokenizer(tmp_path, request, name):
    transformers = pytest.importorskip("transformers")
    if name.startswith("gpt2"):
        request.getfixturevalue("gpt2_tokenizer")
    model = GPT(GPTConfig(vocabulary_size(name), **SHALLOW)).eval()
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(theirs) is transformers.GPT2LMHeadModel
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    ids = torch.tensor([get_encoding(name).encode("It's a text.")])
    with torch.no_grad():
        logits = theirs(**tokenizer("It's a text.", return_tensors="pt")).logits
        expected = model(ids)[0]
        assert torch.allclose(logits, expected, atol=1e-5)
    # a token more, in a row more
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    theirs.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    again, config, _ = eval.load(tmp_path / "theirs")
    assert torch.equal(again(ids)[0], expected) and config["tokenizer"] == name


def test_the_export_says_what_the_model_is(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = GPTConfig(**SHAPE, dropout=0.25, max_lookback=8)
    GPT(config).save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path, dropout=0.25, max_lookback=8).config == config
    theirs = transformers.GPT2Config.from_pretrained(tmp_path)
    assert theirs.attn_pdrop == theirs.embd_pdrop == theirs.resid_pdrop == 0.25
    assert SHAPE.items() <= {**theirs.to_dict(), "block_size": theirs.n_positions}.items()


def test_what_is_missing_is_named(tmp_path):
    for name in ("gpt3", tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError):
            weights.find(name)
    path = published(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="config.json.*heads"):  # 48 wide: how many heads?
        GPT.from_pretrained(path)


@pytest.fixture
def hub(tmp_path, monkeypatch, serve):
    """A mirror that serves a small GPT-2 as gpt2 and gpt2-medium: ({path: content}, the folder that
    it was published in). Tests may change the dict."""
    content = published(tmp_path / "published", n_layer=1, n_embd=768, n_head=12).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = POINTER.format(sha256)
    path = "/openai-community/{}/{}/main/pytorch_model.bin"
    base, files = serve({path.format(name, "resolve"): content for name in ("gpt2", "gpt2-medium")})
    files[path.format("gpt2-medium", "raw")] = pointer.encode()
    monkeypatch.setenv("HF_ENDPOINT", base)
    monkeypatch.setattr(weights, "CACHE", tmp_path / "cache")
    sizes = {"gpt2": (len(content), sha256), "gpt2-medium": (len(content), None)}
    monkeypatch.setattr(weights, "PRETRAINED", sizes)
    return files, tmp_path / "published"


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium"])
def test_downloads_once_and_equals_what_was_published(hub, name):
    files, folder = hub
    model = GPT.from_pretrained(name)
    files.clear()  # the second time it comes from the cache
    again, expected = GPT.from_pretrained(name).state_dict(), GPT.from_pretrained(folder)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value) and torch.equal(again[key], value)


BROKEN = [
    (lambda content: content[:-100], "bytes"),  # another length
    (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "sha256"),  # another content
    (lambda content: (content[:1000], len(content)), "broke off"),  # the connection breaks
    (lambda content: None, "404.*local folder"),
]


@pytest.mark.parametrize("change, message", BROKEN)
def test_a_download_that_is_not_whole_is_named_and_not_kept(hub, change, message, tmp_path):
    files, _ = hub
    path = "/openai-community/gpt2/resolve/main/pytorch_model.bin"
    files[path] = change(files[path])
    with pytest.raises(InputError, match=message):
        weights.download_gpt2("gpt2")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
