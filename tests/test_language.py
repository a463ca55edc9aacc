"""examples/language_model.py: networks from the folders of others, generation, training of bytes, and the program."""

import json
import lzma
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

import public
import ssmkit
from example import EXAMPLES
from language import generation, training, vocabulary
from language.model import language_model, load_model, new_model, save_model
from sashimi.generation import Sampling, make_engine
from sashimi.problems import Problem
from ssmkit.convert import Architecture
from ssmkit.testing import assert_modes_agree, relative_error

import language_model as program  # isort: skip

RECORDED = json.loads(public.RECORDED.read_text())["models"]
GREEDY = Sampling(temperature=0.0)


def folder_of(path, name):
    """A folder as transformers writes it."""
    config, weights = public.MODELS[name], public.weights(public.MODELS[name])
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("folders")
    return {name: folder_of(path / str(i), name) for i, name in enumerate(public.MODELS)}


def written(engine, streams, length, sampling=GREEDY, **options):
    """All tokens of every stream."""
    parts = generation.generate(engine, streams, length, sampling, **options)
    return [torch.cat(row).tolist() for row in zip(*parts, strict=True)]


@pytest.fixture
def small():
    torch.manual_seed(0)
    return language_model(Architecture(ssmkit.Mamba2, {"d_model": 16, "d_state": 8, "headdim": 8}, 2, 40)).eval()


# --- the network and its folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [ssmkit.Mamba, ssmkit.Mamba2])
def test_the_network_keeps_the_contract(layer):
    options = {"d_model": 8, "d_state": 4, **({"headdim": 4} if layer is ssmkit.Mamba2 else {})}
    network = language_model(Architecture(layer, options, n_layers=2, vocab_size=30))
    assert_modes_agree(network.double())
    head, embedding = network["head"].module.weight, network["embedding"].module.weight
    assert head is embedding
    assert float(embedding.detach().std()) == pytest.approx(0.02, rel=0.2)
    untied = language_model(Architecture(layer, options, n_layers=2, vocab_size=30, tied=False))
    assert untied["head"].module.weight is not untied["embedding"].module.weight


def test_the_last_map_of_a_layer_starts_smaller_the_more_layers_there_are():
    deep, flat = (language_model(Architecture(ssmkit.Mamba, {"d_model": 16}, n, 30)) for n in (9, 1))
    first, second = (net["blocks"][0]["mixer"]["out_proj"].module.weight.detach().std() for net in (deep, flat))
    assert float(second / first) == pytest.approx(3, rel=0.2)


@pytest.mark.numerical
@pytest.mark.parametrize("name", public.MODELS)
@torch.no_grad()
def test_a_folder_of_transformers_is_the_loop_over_its_weights(folders, name):
    model, tokens = load_model(folders[name]), public.prompt(public.MODELS[name])
    expected = public.logits(public.weights(public.MODELS[name]), public.MODELS[name], tokens)
    assert relative_error(model.network(torch.tensor(tokens)), torch.from_numpy(expected)) < 1e-5
    assert not model.network.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.network.parameters())
    assert model.stop == [0]


@pytest.mark.numerical
@pytest.mark.parametrize("engine", ["program", "step"])
@pytest.mark.parametrize("name", public.MODELS)
def test_greedy_generation_is_that_of_transformers(folders, name, engine):
    """Token for token as recorded, and by the loop that reads the whole text anew for every token."""
    network, tokens = load_model(folders[name]).network, public.prompt(public.MODELS[name])
    made = written(make_engine(network, engine), generation.read_prompts(network, [tokens]), public.TOKENS)
    (greedy,), config = made, public.MODELS[name]
    said = public.logits(public.weights(config), config, tokens + greedy)[len(tokens) - 1 : -1]
    assert greedy == said.argmax(1).tolist()
    if "time_step_limit" not in config:  # which transformers does not keep from the second token on
        assert greedy == RECORDED[name]["greedy"]


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_greedy_generation_is_that_of_transformers_where_it_is_installed(folders, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = load_model(folders[name])
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for given, value in theirs.state_dict().items():
        assert torch.equal(value, public.weights(public.MODELS[name])[given])
    theirs.generation_config.eos_token_id = None
    streams = generation.read_prompts(model.network, [tokens := public.prompt(public.MODELS[name])])
    made = written(make_engine(model.network), streams, 200)
    assert made == [public.continued(theirs, tokens, 200)]


def same_weights(a, b):
    a, b = a.network.state_dict(), b.network.state_dict()
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", [name for name in public.MODELS if public.MODELS[name]["layer_norm_epsilon"] == 1e-5])
def test_folders_come_back_to_the_bit(folders, name, tmp_path):
    model = load_model(folders[name])
    save_model(model, tmp_path / "same")
    again = load_model(tmp_path / "same")
    assert same_weights(again, model)
    assert again.config == model.config
    with safe_open(tmp_path / "same" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert ("lm_head.weight" in file.keys()) != model.architecture.tied  # noqa: SIM118
    save_model(model, tmp_path / "other", "mamba-ssm")
    other = load_model(tmp_path / "other")
    assert other.library == "mamba-ssm"
    assert same_weights(other, model)
    assert other.stop == []
    weights = torch.load(tmp_path / "other" / "pytorch_model.bin")
    assert {"lm_head.weight", "backbone.embedding.weight"} <= set(weights)
    save_model(other, tmp_path / "back", "transformers")
    back = load_model(tmp_path / "back")
    assert same_weights(back, model)
    assert back.architecture == model.architecture
    assert back.config["eos_token_id"] is None


def test_weights_in_several_files_are_read(folders, tmp_path):
    model, weights = load_model(folders["mamba"]), public.weights(public.MODELS["mamba"])
    (tmp_path / "config.json").write_text((folders["mamba"] / "config.json").read_text())
    names = sorted(set(weights) - {"lm_head.weight"})
    index = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(index.values()):
        save_file({name: weights[name] for name in names if index[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert same_weights(load_model(tmp_path), model)


def test_weights_of_half_precision_are_computed_with_in_float32(folders, tmp_path):
    weights = {name: value.bfloat16() for name, value in public.weights(public.MODELS["mamba2"]).items()}
    (tmp_path / "config.json").write_text((folders["mamba2"] / "config.json").read_text())
    torch.save(weights, tmp_path / "pytorch_model.bin")
    network = load_model(tmp_path).network
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert network["head"].module.weight is network["embedding"].module.weight
    assert torch.equal(network["norm"].module.weight.bfloat16(), weights["backbone.norm_f.weight"])


def test_special_tokens(small):
    architecture = Architecture(ssmkit.Mamba, {"d_model": 8}, 1, 30)
    assert new_model(architecture).stop == []
    model = new_model(architecture)
    for value, expected in ((7, [7]), ([3, 4], [3, 4]), (None, []), (0, [0])):
        model.config["eos_token_id"] = value
        assert model.stop == expected


def edit(folder, source, name, change):
    """A copy of a folder with one file changed, or without it."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / name).unlink() if change is None else (folder / name).write_bytes(change((source / name).read_bytes()))
    return folder


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", None, "config.json does not exist; give the folder of a model"),
        ("config.json", lambda text: text[:9], "config.json cannot be read"),
        ("config.json", lambda text: b"[]", "config.json is not a configuration"),
        (
            "config.json",
            lambda text: text.replace(b'"mamba"', b'"llama"'),
            "cannot be converted .*unknown `model_type` 'llam",
        ),
        (
            "config.json",
            lambda text: text.replace(b'"num_hidden_layers": 3', b'"num_hidden_layers": 4'),
            "missing: backb",
        ),
        ("model.safetensors", None, "has no weights; it needs model.safetensors, model.safetensors.index.json or"),
        ("model.safetensors", lambda data: data[:100], "cannot be read as safetensors"),
    ],
)
def test_folders_that_cannot_be_read_are_refused(folders, tmp_path, name, change, message):
    with pytest.raises(Problem, match=message):
        load_model(edit(tmp_path / "x", folders["mamba"], name, change))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin"])
def test_damaged_weights_are_refused(folders, tmp_path, name):
    (tmp_path / "config.json").write_text((folders["mamba"] / "config.json").read_text())
    (tmp_path / name).write_text("{}")
    with pytest.raises(Problem, match=f"{name} cannot be read"):
        load_model(tmp_path)


def test_a_pickle_that_runs_code_is_refused_and_not_run(folders, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "config.json").write_text((folders["mamba"] / "config.json").read_text())
    torch.save({"backbone.embeddings.weight": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Problem, match=r"pytorch_model.bin cannot be read"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_network_that_the_other_library_has_not_is_refused(folders, tmp_path):
    model = load_model(folders["mamba, every option"])
    with pytest.raises(Problem, match="the model cannot be written for mamba-ssm .*`eps` must be 1e-05"):
        save_model(model, tmp_path / "x", "mamba-ssm")
    assert not (tmp_path / "x").exists()


# --- prompts and generation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.no_grad()
def test_prompts_are_the_same_in_chunks_of_any_size(folders, name, chunk):
    network, tokens = load_model(folders[name]).network, public.prompt(public.MODELS[name])
    streams = generation.read_prompts(network.double(), [tokens], chunk=chunk)
    assert relative_error(streams.logits[0], network(torch.tensor(tokens))[-1]) < 1e-12
    y, _ = network.step(torch.tensor([5]), streams.state)
    assert relative_error(y[0], network(torch.tensor([*tokens, 5]))[-1]) < 1e-10


def test_prompts_of_different_lengths_are_what_they_are_alone(small):
    prompts, engine = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]], make_engine(small)
    together = written(engine, generation.read_prompts(small, prompts, 2), 30)
    assert len(together) == 6
    for i, prompt in enumerate(prompts):
        alone = written(engine, generation.read_prompts(small, [prompt]), 30)
        assert together[2 * i : 2 * i + 2] == alone * 2


@pytest.mark.parametrize("engine", ["program", "step"])
def test_a_seed_decides_whatever_the_blocks(small, engine):
    engine, sampling = make_engine(small, engine), Sampling(1.0, top_k=20)

    def made(seed, **options):
        return written(engine, generation.read_prompts(small, [[1, 2]], 3, seed=seed), 40, sampling, **options)

    first = made(1)
    assert first == made(1) == made(1, block=7) == made(1, block=1)
    assert first != made(2)
    assert first[0] != first[1]
    assert all(len(row) == 40 for row in first)


@pytest.mark.numerical
def test_both_engines_draw_the_same(small):
    found = [
        written(make_engine(small, name), generation.read_prompts(small, [[1, 2]], 3), 60, Sampling(0.9, 10, 0.9))
        for name in ("program", "step")
    ]
    assert found[0] == found[1]


@torch.no_grad()
def test_drawn_tokens_have_the_probabilities_of_the_network(small):
    """Of the first token after a prompt, at a temperature and from the likeliest."""
    small["head"].module.weight.mul_(8)
    streams = generation.read_prompts(small, [[1, 2]], 20_000)
    p = F.softmax(streams.logits[0] / 0.7, -1)
    kept = p.argsort(descending=True)[:12]
    before = p[kept].cumsum(0) - p[kept]
    kept = kept[before < 0.8 * p[kept].sum()]
    assert 3 < len(kept) < 12
    made = written(make_engine(small, "step"), streams, 1, Sampling(0.7, top_k=12, top_p=0.8))
    counts = Counter(row[0] for row in made)
    assert set(counts) <= set(kept.tolist())
    for token in kept.tolist():
        expected = float(p[token] / p[kept].sum())
        assert counts[token] / 20_000 == pytest.approx(expected, abs=4 * math.sqrt(expected / 20_000))


@pytest.mark.parametrize("block", [1, 5, 64])
def test_stop_tokens_end_every_text_by_itself(small, block):
    engine, sampling = make_engine(small), Sampling(1.0)
    free = written(engine, generation.read_prompts(small, [[1], [2, 3]], 3), 60, sampling)
    stop = {free[0][20], free[1][3]}
    made = written(engine, generation.read_prompts(small, [[1], [2, 3]], 3), 60, sampling, stop=stop, block=block)
    lengths = set()
    for whole, cut in zip(free, made, strict=True):
        end = next((k for k, token in enumerate(whole) if token in stop), len(whole) - 1)
        assert cut == whole[: end + 1]
        lengths.add(len(cut))
    assert len(lengths) > 2


def test_generation_ends_when_all_have_stopped(small):
    class Counting:
        def __init__(self):
            self.engine, self.rows = make_engine(small), []

        def run(self, logits, state, uniform, sampling):
            self.rows.append(tuple(uniform.shape))
            return self.engine.run(logits, state, uniform, sampling)

    engine = Counting()
    streams = generation.read_prompts(small, [[1]], 4)
    made = written(engine, streams, 1000, Sampling(1.0), stop=set(range(10)), block=2)
    assert len(engine.rows) < 40
    assert [rows for rows, _ in engine.rows] == sorted((rows for rows, _ in engine.rows), reverse=True)
    assert engine.rows[-1][0] < 4
    assert all(row[-1] < 10 and min([10, *row[:-1]]) >= 10 for row in made)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "at least one token"), ([[40]], "has the tokens 0 to 39"), ([[3, -1]], "has the tokens 0 to 39")],
)
def test_bad_prompts_are_refused(small, prompts, message):
    with pytest.raises(Problem, match=message):
        generation.read_prompts(small, prompts)


# --- text -------------------------------------------------------------------------------------------------------------


def test_text_of_bytes_is_given_out_once_it_is_whole():
    words = vocabulary.Bytes()
    text = "aé€😀z"
    tokens = words.encode(text)
    assert words.decode(tokens) == text
    writer = vocabulary.Writer(words)
    parts = [writer.add([token]) for token in tokens]
    assert "".join(parts) == text
    assert [i for i, part in enumerate(parts) if part] == [0, 2, 5, 9, 10]
    writer = vocabulary.Writer(words)
    assert writer.add(words.encode("a€")[:-1]) == "a"
    assert writer.add([], last=True) == "\ufffd"
    writer = vocabulary.Writer(words)
    assert writer.add([255]) == ""
    assert writer.add(list(b"ab")) == "\ufffdab"
    assert writer.add([], last=True) == ""


def test_numbers_are_tokens_as_they_are():
    words = vocabulary.Numbers()
    assert words.encode(" 3 14\n15") == [3, 14, 15]
    assert words.decode([3, 14]) == "3 14 "
    with pytest.raises(Problem, match="with --numbers a prompt must be numbers separated by spaces, not '3 x'"):
        words.encode("3 x")


def test_the_vocabulary_of_a_model(tmp_path, monkeypatch):
    assert isinstance(vocabulary.vocabulary(tmp_path, 256), vocabulary.Bytes)
    assert isinstance(vocabulary.vocabulary(tmp_path, 256, numbers=True), vocabulary.Numbers)
    with pytest.raises(Problem, match="has no tokenizer.json; give --tokenizer FILE, or --numbers"):
        vocabulary.vocabulary(tmp_path, 300)
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for tokenizer in (None, tmp_path / "tokenizer.json"):
        with pytest.raises(Problem, match="pip install tokenizers; or give --numbers"):
            vocabulary.vocabulary(tmp_path, 256, tokenizer)


def test_tokenizer_files_are_read_where_their_package_is_installed(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "bc": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    words = vocabulary.vocabulary(tmp_path, 3)
    assert words.encode("a bc x") == [0, 1, 2]
    assert words.decode([1, 0]) == "bc a"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Problem, match="cannot be read as a tokenizer"):
        vocabulary.vocabulary(tmp_path, 3)


# --- training ---------------------------------------------------------------------------------------------------------

TINY = {"d_model": 16, "layers": 1, "d_state": 8, "headdim": 8, "batch": 4, "excerpt": 32, "lr": 0.02}


def test_text_is_split_by_file(tmp_path):
    (tmp_path / "sub").mkdir()
    for i in range(41):
        (tmp_path / ("sub" if i % 2 else ".") / f"{i:02}.txt").write_text(f"<{i}>")
    (tmp_path / "picture.png").write_bytes(b"x")
    text = training.read_text(tmp_path)
    assert text.files == 41
    training_part, held_out = (bytes(part.tolist()).decode() for part in (text.training, text.held_out))
    assert len(held_out.split("><")) == 2
    parts = [f"<{i}>" for i in range(41)]
    assert all((part in training_part) != (part in held_out) for part in parts)
    assert "x" not in training_part + held_out


def test_one_file_is_split_at_its_end(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(100)))
    text = training.read_text(tmp_path / "a.txt")
    assert (text.training.tolist(), text.held_out.tolist()) == (list(range(95)), list(range(95, 100)))


def test_the_standard_library_is_text():
    text = training.read_text(None)
    assert len(text.training) > 1_000_000
    assert b"import " in bytes(text.held_out.tolist())


def test_text_that_is_missing_is_refused(tmp_path):
    with pytest.raises(Problem, match="has 0 text files, and 20 are needed"):
        training.read_text(tmp_path)
    with pytest.raises(Problem, match="0 text files"):
        training.read_text(tmp_path / "none")


def test_excerpts_are_parts_of_the_text_that_depend_on_seed_and_step():
    text, settings = torch.arange(200, dtype=torch.uint8), training.Settings(excerpt=10, batch=500)
    first = training.excerpts(text, settings, 3)
    assert first.shape == (500, 11)
    assert torch.equal(first, first[:, :1] + torch.arange(11))
    assert (int(first.min()), int(first.max())) == (0, 199)
    assert torch.equal(first, training.excerpts(text, settings, 3))
    assert not torch.equal(first, training.excerpts(text, settings, 4))
    assert not torch.equal(first, training.excerpts(text, training.Settings(excerpt=10, batch=500, seed=1), 3))


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
def test_a_network_learns_a_text_and_writes_it(layer):
    text = torch.frombuffer(bytearray(b"so much depends upon " * 50), dtype=torch.uint8)
    settings = training.Settings(layer=layer, steps=80, **TINY)
    losses, networks = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = new_model(settings.architecture)
        training.train(model.network, text, settings, lambda step, bits: losses.append((step, bits)))
        networks.append(model)
    assert losses[:80] == losses[80:]
    assert same_weights(*networks)
    assert [step for step, _ in losses[:80]] == list(range(1, 81))
    assert losses[0][1] > 5
    assert losses[79][1] < 0.5
    network = networks[0].network
    assert not network.training
    streams = generation.read_prompts(network, [list(b"upon so mu")])
    (made,) = written(make_engine(network), streams, 40)
    assert bytes(made).decode() == "ch depends upon so much depends upon so "


def test_the_rate_rises_and_falls():
    settings = training.Settings(steps=100)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 5)
    assert rates[4] == rates[5] == 1
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 1e-3
    assert training.Settings(steps=1).rate(0) == 1


def test_the_rate_of_every_step_is_that_of_its_number(monkeypatch):
    """A step whose rate is zero changes nothing."""
    text, moved = torch.arange(100, dtype=torch.uint8), []
    settings = training.Settings(steps=6, **TINY)
    monkeypatch.setattr(training.Settings, "rate", lambda self, step: float(step in (0, 4)))
    network = new_model(settings.architecture).network
    before = network["norm"].module.weight.detach().clone()

    def report(step, bits):
        nonlocal before
        after = network["norm"].module.weight.detach().clone()
        moved.append(not torch.equal(before, after))
        before = after

    training.train(network, text, settings, report)
    assert moved == [True, False, False, False, True, False]


@torch.no_grad()
def test_bits_per_byte_are_the_cross_entropy_of_forward():
    torch.manual_seed(0)
    network = new_model(training.Settings(**TINY).architecture).network
    text = torch.randint(256, (50,), dtype=torch.uint8)
    said = network(text[None, :-1].long())
    expected = float(F.cross_entropy(said[0], text[1:].long())) / math.log(2)
    for chunk in (1, 13, 1000):
        assert training.bits_per_byte(network, text, chunk) == pytest.approx(expected, rel=1e-5)


def test_baselines_are_their_definitions():
    text = training.Text(
        torch.tensor([0, 1, 0, 1, 1], dtype=torch.uint8), torch.tensor([0, 1, 1], dtype=torch.uint8), 1
    )
    found = training.baselines(text, text.held_out)
    after_0, after_1 = (2 + 0.01) / (2 + 256 * 0.01), (1 + 0.01) / (2 + 256 * 0.01)
    assert found["bigram"] == pytest.approx(-(math.log2(after_0) + math.log2(after_1)) / 2)
    both, before = (
        len(lzma.compress(data, preset=6)) for data in (bytes([0, 1, 0, 1, 1, 0, 1, 1]), bytes([0, 1, 0, 1, 1]))
    )
    assert found["lzma"] == pytest.approx(8 * (both - before) / 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, not 0"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"excerpt": -1}, "--excerpt must be at least 1"),
        ({"headdim": 5}, "Mamba2: `headdim` must divide `expand \\* d_model`, got 5 and 256"),
        ({"layers": 0}, "`n_layers` must be at least 1"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(Problem, match=message):
        _ = training.Settings(**options).architecture


def test_a_training_that_cannot_go_on_is_refused():
    settings = training.Settings(steps=3, **{**TINY, "lr": 1e30})
    network = new_model(settings.architecture).network
    with pytest.raises(Problem, match="the loss of step [23] is not finite; give a smaller --lr"):
        training.train(network, torch.zeros(100, dtype=torch.uint8), settings)
    with pytest.raises(Problem, match="the text has 32 bytes, less than one excerpt"):
        training.train(network, torch.zeros(32, dtype=torch.uint8), settings)
    torch.manual_seed(0)
    one = new_model(settings.architecture).network
    training.train(one, torch.zeros(33, dtype=torch.uint8), training.Settings(steps=1, **TINY))


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with as many files as are needed."""
    path = tmp_path_factory.mktemp("texts")
    for i in range(20):
        (path / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    return path


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The program in this process: exit status, output, errors."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments):
        try:
            status = program.main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
        found = capsys.readouterr()
        return status, found.out, found.err

    return go


SMALL = "--d-model 16 --layers 1 --d-state 8 --headdim 8 --batch 2 --excerpt 64 --steps 4 --measure 500 --device cpu"
CPU = ["--device", "cpu"]


def test_train_and_generate_as_a_user_runs_them(texts, tmp_path):
    command = [sys.executable, str(EXAMPLES / "language_model.py")]
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 250}
    done = subprocess.run([*command, "train", *SMALL.split(), "--data", str(texts)], **options, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    names = [words[0] for words in lines if len(words) == 2]
    assert names[-3:] == ["bigram", "lzma", "network"]
    assert {path.name for path in (tmp_path / "runs/language").iterdir()} == {"config.json", "model.safetensors"}
    done = subprocess.run([*command, "generate", "--length", "5", *CPU], **options, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def ")
    assert "5 tokens in" in done.stderr


def test_all_in_small(call, texts, monkeypatch, tmp_path):
    """Without arguments, with settings that take seconds."""
    settings = training.Settings(**{**TINY, "steps": 2, "data": texts})
    train = program.Train
    monkeypatch.setattr(program, "Train", lambda: train(settings, measure=300, device="cpu"))
    status, out, _ = call()
    assert status == 0
    assert "def " in out.partition("runs/language")[2]
    assert load_model(tmp_path / "runs/language").architecture == settings.architecture


def test_generate_with_the_weights_of_others(call, folders):
    tokens = public.prompt(public.MODELS["mamba"])
    prompt = " ".join(map(str, tokens))
    arguments = [
        "generate",
        "--model",
        folders["mamba"],
        "--numbers",
        "--length",
        40,
        "--temperature",
        0,
        "--stop",
        *CPU,
    ]
    status, out, err = call(*arguments, "--prompt", prompt)
    greedy = RECORDED["mamba"]["greedy"]
    assert status == 0, err
    assert list(map(int, out.split())) == tokens + greedy
    drawn = [call(*arguments[:-5], "--seed", seed, *CPU, "--prompt", "3")[1] for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    (folders["mamba"].parent / "prompt.txt").write_text(prompt)
    assert call(*arguments, "--prompt-file", folders["mamba"].parent / "prompt.txt", "--chunk", 3)[1] == out
    # Several texts, each under its number; a stop token is not written.
    stop = greedy[5]
    status, out, err = call(*arguments[:-3], "--stop", stop, *CPU, "--prompt", prompt, "3 4", "--samples", 2)
    texts = [list(map(int, part.partition("\n")[2].split())) for part in out.split("---")[1:]]
    assert [part.partition("\n")[0].strip() for part in out.split("---")[1:]] == [f"{i} of 4" for i in (1, 2, 3, 4)]
    assert texts[0] == texts[1] == tokens + greedy[: greedy.index(stop)]
    assert texts[2] == texts[3]
    assert texts[2][:2] == [3, 4]
    written_tokens = sum(map(len, texts)) - 2 * len(tokens) - 2 * 2
    stopped = sum(len(text) < length for text, length in zip(texts, [90, 90, 42, 42], strict=True))
    assert f"{written_tokens + stopped} tokens in" in err


@pytest.mark.parametrize("samples", [1, 2])
def test_a_character_that_is_not_complete_is_written_at_the_end(call, samples, tmp_path, monkeypatch):
    """By a network that goes on with the two first bytes of a character of three."""
    architecture = training.Settings(**TINY).architecture
    save_model(new_model(architecture), tmp_path / "model")

    def drawn(*arguments, **options):
        yield [torch.tensor(list("a€".encode()[:-1]))] * samples

    monkeypatch.setattr(program, "generate", drawn)
    status, out, _ = call("generate", "--model", "model", "--samples", samples, "--prompt", "x", *CPU)
    assert status == 0
    assert out.count("xa\ufffd\n") == samples


def test_convert_writes_for_the_other_library(call, folders, tmp_path):
    (folders["mamba2"] / "tokenizer.json").write_text("words")
    status, out, err = call("convert", "--model", folders["mamba2"], "--out", "other", "--to", "mamba-ssm")
    assert status == 0, err
    assert out.strip() == "other, for mamba-ssm"
    assert (tmp_path / "other/tokenizer.json").read_text() == "words"
    assert same_weights(load_model(tmp_path / "other"), load_model(folders["mamba2"]))
    assert call("convert", "--model", "other", "--out", "other")[0] == 0
    (folders["mamba2"] / "tokenizer.json").unlink()


def test_ctrl_c_keeps_what_was_learned(call, texts, monkeypatch, tmp_path):
    def stopped(network, text, settings, report, device):
        report(1, 5.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "train", stopped)
    status, out, err = call("train", *SMALL.split(), "--data", texts, "--out", "stopped")
    assert status == 0, err
    assert "stopped; the model so far is written" in err
    assert "network" in out
    assert load_model(tmp_path / "stopped").architecture.n_layers == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "none"], "none/config.json does not exist"),
        (["generate", "--length", "0"], "--length must be at least 1, not 0"),
        (["generate", "--samples", "0"], "--samples must be at least 1"),
        (["generate", "--chunk", "0"], "--chunk must be at least 1"),
        (["generate", "--threads", "0"], "--threads must be at least 1"),
        (["generate", "--top-p", "2"], "--top-p must be above 0"),
        (["train", "--measure", "1"], "--measure must be at least 2"),
        (["train", "--data", "none"], "none has 0 text files"),
        (["convert", "--model", "none", "--out", "x"], "none/config.json does not exist"),
    ],
)
def test_what_a_user_can_put_right_is_said_in_one_sentence(call, arguments, message):
    status, _, err = call(*arguments)
    assert status == 1
    assert err.startswith("language_model: ")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_prompt_that_cannot_be_read_is_refused(call, folders):
    status, _, err = call("generate", "--model", folders["mamba"], "--numbers", "--prompt-file", "none", *CPU)
    assert status == 1
    assert "none cannot be read" in err
