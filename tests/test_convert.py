"""Weights of transformers and mamba-ssm: held against loops over their public names, and mapped back to the bit."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import public
from family import COMPOSED
from ssmkit import S4D, Mamba, Mamba2, Residual, Sequential
from ssmkit.convert import (
    Architecture,
    from_mamba_ssm,
    from_mixer,
    from_transformers,
    to_mamba_ssm,
    to_mixer,
    to_transformers,
)
from ssmkit.testing import relative_error
from test_layers import with_numbers_of_its_own

BLOCKS = {name: make for name, make in COMPOSED.items() if isinstance(make(), (Mamba, Mamba2))}
BLOCKS["Mamba2, D of features"] = lambda: Mamba2(4, 3, headdim=2, D_has_hdim=True)

# In the form of published ones: of mamba-130m-hf, and of Codestral.
MAMBA_130M = json.loads("""{
  "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536, "d_model": 768,
  "eos_token_id": 0, "expand": 2, "fused_add_norm": true, "hidden_act": "silu", "hidden_size": 768,
  "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
  "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0, "pad_vocab_size_multiple": 8, "residual_in_fp32": true,
  "rms_norm": true, "ssm_cfg": {}, "state_size": 16, "time_step_floor": 0.0001, "time_step_max": 0.1,
  "time_step_min": 0.001, "time_step_rank": 48, "torch_dtype": "float32", "use_bias": false, "use_cache": true,
  "use_conv_bias": true, "vocab_size": 50280
}""")
CODESTRAL = json.loads("""{
  "architectures": ["Mamba2ForCausalLM"], "chunk_size": 256, "conv_kernel": 4, "expand": 2, "head_dim": 64,
  "hidden_act": "silu", "hidden_size": 4096, "layer_norm_epsilon": 1e-05, "model_type": "mamba2", "n_groups": 8,
  "norm_before_gate": true, "num_heads": 128, "num_hidden_layers": 64, "rms_norm": true, "state_size": 128,
  "tie_word_embeddings": false, "time_step_limit": [0.0, Infinity], "time_step_rank": 256, "use_bias": false,
  "use_conv_bias": true, "vocab_size": 32768
}""")
MAMBA2_130M = json.loads("""{
  "d_model": 768, "d_intermediate": 0, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"},
  "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": true, "residual_in_fp32": true, "fused_add_norm": true,
  "pad_vocab_size_multiple": 16, "tie_embeddings": true
}""")


def network(architecture):
    """The network in the docstring of the module."""
    d, vocab_size, eps = architecture.options["d_model"], architecture.vocab_size, architecture.eps

    def block():
        return Residual({"norm": nn.RMSNorm(d, eps), "mixer": architecture.layer(**architecture.options)})

    return Sequential(
        {
            "embedding": nn.Embedding(vocab_size, d),
            "blocks": Sequential(*(block() for _ in range(architecture.n_layers))),
            "norm": nn.RMSNorm(d, eps),
            "head": nn.Linear(d, vocab_size, bias=False),
        }
    )


def same(a, b):
    return set(a) == set(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# --- one block --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_a_block_with_the_weights_of_a_mixer_is_the_loop_over_their_names(name):
    layer = with_numbers_of_its_own(BLOCKS[name]()).double()
    weights = to_mixer(layer.state_dict(), layer)
    arrays = {key: value.numpy() for key, value in weights.items()}
    u = torch.randn(20, layer.d_input, dtype=torch.float64)
    if isinstance(layer, Mamba):
        expected = public.mamba_mixer(arrays, u.numpy())
    else:
        core, before = layer["mixer"]["ssm"]["ssd"], "norm" in layer["mixer"]["ssm"].layers._modules
        expected = public.mamba2_mixer(arrays, u.numpy(), core.ngroups, core.dt_limit, before)
    assert relative_error(layer(u), torch.from_numpy(expected)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_mixer_comes_back_to_the_bit(name, dtype):
    layer, other = with_numbers_of_its_own(BLOCKS[name]()).to(dtype), BLOCKS[name]().to(dtype)
    weights = to_mixer(layer.state_dict(), layer)
    other.load_state_dict(from_mixer(weights, other))
    assert same(other.state_dict(), layer.state_dict())
    assert same(to_mixer(other.state_dict(), other), weights)


def test_names_of_a_mixer():
    """As transformers and mamba-ssm have them."""
    given = {"in_proj.bias", "out_proj.bias", "conv1d.bias"}
    common = {"in_proj.weight", "out_proj.weight", "conv1d.weight", "A_log", "D"}
    first, second = Mamba(4, bias=True), Mamba2(4, headdim=4, bias=True)
    assert set(to_mixer(first.state_dict(), first)) == common | given | {
        "x_proj.weight",
        "dt_proj.weight",
        "dt_proj.bias",
    }
    assert set(to_mixer(second.state_dict(), second)) == common | given | {"dt_bias", "norm.weight"}
    plain = Mamba2(4, headdim=4, conv_bias=False, rmsnorm=False)
    assert set(to_mixer(plain.state_dict(), plain)) == common | {"dt_bias"}


def test_what_is_not_joined_is_not_copied():
    layer = Mamba2(4, headdim=4)
    mine = layer.state_dict()
    weights = to_mixer(mine, layer)
    shared = {value.data_ptr() for value in mine.values()}
    assert {name for name, value in weights.items() if value.data_ptr() not in shared} == {"in_proj.weight"}


def test_reading_a_mixer_copies_nothing():
    layer = Mamba2(4, headdim=4)
    weights = to_mixer(layer.state_dict(), layer)
    spaces = {value.untyped_storage().data_ptr() for value in weights.values()}
    assert {value.untyped_storage().data_ptr() for value in from_mixer(weights, layer).values()} <= spaces


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.numerical
@pytest.mark.parametrize("name", public.MODELS)
@torch.no_grad()
def test_a_model_with_weights_of_transformers_is_the_loop_over_their_names(name):
    config = public.MODELS[name]
    architecture = Architecture.from_transformers(config)
    model, weights, tokens = network(architecture), public.weights(config), public.prompt(config)
    model.load_state_dict(from_transformers(weights, config))
    expected = torch.from_numpy(public.logits(weights, config, tokens))
    assert relative_error(model(torch.tensor(tokens)), expected) < 1e-5
    assert relative_error(model.double()(torch.tensor(tokens)), expected) < 1e-12


@pytest.mark.parametrize("name", public.MODELS)
def test_the_loop_is_what_transformers_computes(name):
    """Recorded from transformers, which computes in float32."""
    config = public.MODELS[name]
    recorded = json.loads(public.RECORDED.read_text())["models"][name]
    found = public.logits(public.weights(config), config, public.prompt(config))
    at = torch.from_numpy(found[[0, 1, 20, -1], :6])
    assert relative_error(at, torch.tensor(recorded["logits"], dtype=torch.float64)) < 2e-5


@pytest.mark.parametrize("name", public.MODELS)
@torch.no_grad()
def test_a_model_is_that_of_transformers_where_it_is_installed(name):
    pytest.importorskip("transformers")
    config, tokens = public.MODELS[name], public.prompt(public.MODELS[name])
    model = public.theirs(config)
    ours = network(Architecture.from_transformers(model.config.to_dict()))
    ours.load_state_dict(from_transformers(model.state_dict(), config))
    given = torch.tensor([tokens])
    assert relative_error(ours(given), model(given).logits) < 1e-5
    assert same(to_transformers(ours.state_dict(), config), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", public.MODELS)
def test_weights_come_back_to_the_bit(name, dtype):
    config = public.MODELS[name]
    weights = {key: value.to(dtype) for key, value in public.weights(config).items()}
    ours = from_transformers(weights, config)
    assert set(ours) == set(network(Architecture.from_transformers(config)).state_dict())
    assert same(to_transformers(ours, config), weights)
    architecture = replace(Architecture.from_transformers(config), eps=1e-5)
    theirs = to_mamba_ssm(ours, architecture)
    renamed = {name.replace("backbone.embeddings.", "backbone.embedding."): value for name, value in weights.items()}
    assert same(theirs, renamed)
    assert same(from_mamba_ssm(theirs, architecture.to_mamba_ssm()), ours)


def test_both_names_of_the_embedding_are_read():
    config = public.MODELS["mamba"]
    weights = public.weights(config)
    renamed = {name.replace("embeddings", "embedding"): value for name, value in weights.items()}
    assert same(from_transformers(renamed, config), from_transformers(weights, config))
    architecture = Architecture.from_transformers(config)
    assert same(from_mamba_ssm(weights, architecture), from_mamba_ssm(renamed, architecture))


@pytest.mark.parametrize("left_out", ["lm_head.weight", "backbone.embeddings.weight"])
def test_of_a_tied_head_and_its_embedding_one_is_enough(left_out):
    config = public.MODELS["mamba2"]
    weights = public.weights(config)
    rest = {name: value for name, value in weights.items() if name != left_out}
    ours = from_transformers(rest, config)
    assert same(ours, from_transformers(weights, config))
    assert ours["layers.head.module.weight"].data_ptr() == ours["layers.embedding.module.weight"].data_ptr()
    ours.pop("layers.head.module.weight")
    assert same(to_transformers(ours, config), weights)
    untied = {**config, "tie_word_embeddings": False}
    with pytest.raises(ValueError, match=f"missing: {left_out}"):
        from_transformers(rest, untied)


def test_a_tied_head_that_differs_is_refused():
    config = public.MODELS["mamba"]
    weights = public.weights(config)
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    message = (
        "from_transformers: lm_head.weight and backbone.embeddings.weight must be equal, as the configuration ties"
    )
    with pytest.raises(ValueError, match=message):
        from_transformers(weights, config)
    untied = {**config, "tie_word_embeddings": False}
    assert same(to_transformers(from_transformers(weights, untied), untied), weights)
    ours = from_transformers(weights, untied)
    with pytest.raises(
        ValueError, match="to_transformers: layers.head.module.weight and layers.embedding.module.weight must be equal"
    ):
        to_transformers(ours, config)


# --- what does not fit ------------------------------------------------------------------------------------------------


def faulty(weights):
    """Weights with every kind of fault, and what is said of them."""
    found = {name: value for name, value in weights.items() if not name.endswith(("1.mixer.D", "2.norm.weight"))}
    name = "backbone.layers.0.mixer.A_log"
    found[name] = found[name][1:]
    found["backbone.layers.0.mixer.extra"] = torch.zeros(1)
    shapes = f"{tuple(found[name].shape)}, expected {tuple(weights[name].shape)}"
    return found, f"; unknown: backbone.layers.0.mixer.extra; wrong shape: {name} {shapes})."


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_keys_and_shapes_that_do_not_fit_are_named(name):
    config = public.MODELS[name]
    weights, said = faulty(public.weights(config))
    for function, named in ((from_transformers, config), (from_mamba_ssm, Architecture.from_transformers(config))):
        given = weights
        if function is from_mamba_ssm:
            given = {key.replace("embeddings", "embedding"): value for key, value in weights.items()}
        with pytest.raises(ValueError, match=f"^{function.__name__}: `state_dict` must match the conf") as caught:
            function(given, named)
        first = str(caught.value).removesuffix(said).partition("(missing: ")[2].split(", ")
        assert sorted(first) == ["backbone.layers.1.mixer.D", "backbone.layers.2.norm.weight"]


@pytest.mark.parametrize(("count", "end"), [(8, r"x7\)"), (9, r"x7 and 1 more\)"), (20, r"x7 and 12 more\)")])
def test_eight_keys_are_named(count, end):
    layer = Mamba(4)
    weights = to_mixer(layer.state_dict(), layer)
    with pytest.raises(ValueError, match=rf"unknown: (x\d, ){{7}}{end}\.$"):
        from_mixer({**weights, **{f"x{i}": torch.zeros(1) for i in range(count)}}, layer)


def test_long_lists_of_keys_are_cut():
    config = public.MODELS["mamba"]
    count = len(public.weights(config))
    with pytest.raises(ValueError, match=rf"missing: (backbone\.\S+, ){{7}}backbone\.\S+ and {count - 8} more\)\.$"):
        from_transformers({}, {**config, "tie_word_embeddings": False})


@pytest.mark.parametrize("function", [from_mixer, to_mixer])
def test_a_mixer_that_does_not_fit_is_refused(function):
    layer = Mamba(4)
    weights = layer.state_dict() if function is to_mixer else to_mixer(layer.state_dict(), layer)
    name = next(name for name in weights if name.endswith("A_log"))
    rest = {key: value for key, value in weights.items() if key != name}
    where = rf"{function.__name__}: `state_dict` must match the configuration or layer, got keys that do not \("
    with pytest.raises(ValueError, match=rf"^{where}missing: {name}\)\.$"):
        function(rest, layer)
    with pytest.raises(ValueError, match=rf"^{where}unknown: foreign\)\.$"):
        function({**weights, "foreign": torch.zeros(1)}, layer)
    with pytest.raises(ValueError, match=rf"^{where}wrong shape: {name} \(8, 15\), expected \(8, 16\)\)\.$"):
        function({**weights, name: weights[name][:, 1:]}, layer)
    with pytest.raises(
        TypeError, match=f"{function.__name__}: `state_dict` must hold tensors, got a ndarray as {name}."
    ):
        function({**weights, name: weights[name].numpy()}, layer)
    with pytest.raises(TypeError, match=f"{function.__name__}: `layer` must be .*, got a S4D."):
        function(weights, S4D(4))
    message = (
        f"{function.__name__}: `state_dict` must be a dictionary of tensors, got a Mamba; a module has `state_dict"
    )
    with pytest.raises(TypeError, match=message):
        function(layer, layer)


@pytest.mark.parametrize("function", [from_transformers, to_transformers, from_mamba_ssm, to_mamba_ssm])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_no_dictionary_of_tensors_is_refused(function, tied):
    architecture = Architecture(Mamba, {"d_model": 4}, n_layers=1, vocab_size=7, tied=tied)
    model = network(architecture)
    with pytest.raises(
        TypeError, match=f"{function.__name__}: `state_dict` must be a dictionary of tensors, got a Seq"
    ):
        function(model, architecture)
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    with pytest.raises(
        TypeError, match=f"{function.__name__}: `state_dict` must hold tensors, got a ndarray as layers"
    ):
        function(arrays, architecture)


# --- configurations ---------------------------------------------------------------------------------------------------


def test_configurations_in_the_form_of_published_ones():
    first = Architecture.from_transformers(MAMBA_130M)
    assert (first.layer, first.n_layers, first.vocab_size, first.eps, first.tied) == (Mamba, 24, 50280, 1e-5, True)
    assert first.options == {**Architecture(Mamba, {"d_model": 768}, 1, 1).options, "dt_rank": 48}
    second = Architecture.from_transformers(CODESTRAL)
    assert (second.layer, second.n_layers, second.vocab_size, second.tied) == (Mamba2, 64, 32768, False)
    assert second.options == {**Architecture(Mamba2, {"d_model": 4096}, 1, 1).options, "ngroups": 8}
    third = Architecture.from_mamba_ssm(MAMBA2_130M)
    assert third == Architecture(Mamba2, {"d_model": 768}, n_layers=24, vocab_size=50288)


@pytest.mark.parametrize("name", public.MODELS)
def test_configurations_come_back(name):
    config = public.MODELS[name]
    architecture = Architecture.from_transformers(config)
    written = architecture.to_transformers()
    assert {key: written[key] for key in config if key != "chunk_size"} == {
        key: value for key, value in config.items() if key != "chunk_size"
    }
    assert written["architectures"] == ["MambaForCausalLM" if "2" not in name else "Mamba2ForCausalLM"]
    assert Architecture.from_transformers(json.loads(json.dumps(written))) == architecture
    architecture = replace(architecture, eps=1e-5)
    assert Architecture.from_mamba_ssm(json.loads(json.dumps(architecture.to_mamba_ssm()))) == architecture


def test_every_option_of_a_layer_comes_back():
    """Of mamba-ssm: it has all of them."""
    options = {"d_state": 5, "d_conv": 3, "expand": 3, "conv_bias": False, "bias": True}
    options |= {"dt_min": 0.01, "dt_max": 0.2, "dt_init_floor": 1e-3}
    own = {
        Mamba: {"d_model": 4, "dt_rank": 3},
        Mamba2: {
            "d_model": 4,
            "headdim": 3,
            "ngroups": 2,
            "rmsnorm": False,
            "norm_before_gate": True,
            "A_init_range": (2.0, 3.0),
            "dt_limit": (0.1, 0.5),
            "D_has_hdim": True,
        },
    }
    for layer, more in own.items():
        architecture = Architecture(layer, {**options, **more}, n_layers=2, vocab_size=7, tied=False)
        assert len(architecture.options) == len(options) + len(more)
        assert Architecture.from_mamba_ssm(json.loads(json.dumps(architecture.to_mamba_ssm()))) == architecture


def test_a_configuration_for_mamba_ssm_has_all_its_fields():
    written = Architecture.from_mamba_ssm(MAMBA2_130M).to_mamba_ssm()
    options = {**Architecture(Mamba2, {"d_model": 768}, 1, 1).options, "A_init_range": [1.0, 16.0]}
    options = {name: value for name, value in options.items() if name not in ("d_model", "dt_limit")}
    assert written.pop("ssm_cfg") == {"layer": "Mamba2", **options}
    changed = {"vocab_size": 50288, "pad_vocab_size_multiple": 1}
    assert written == {name: value for name, value in {**MAMBA2_130M, **changed}.items() if name != "ssm_cfg"}


def test_json_has_no_infinity():
    for architecture in (Architecture(Mamba, {"d_model": 4}, 1, 7), Architecture(Mamba2, {"d_model": 64}, 1, 7)):
        for written in (architecture.to_transformers(), architecture.to_mamba_ssm()):
            json.dumps(written, allow_nan=False)
    limited = {**public.MODELS["mamba2"], "time_step_limit": [0.1, {"__float__": "Infinity"}]}
    assert Architecture.from_transformers(limited).options["dt_limit"] == (0.1, math.inf)


def test_what_is_left_out_has_the_defaults_of_the_library():
    small = {"hidden_size": 64, "num_hidden_layers": 1}
    first = Architecture.from_transformers({"model_type": "mamba", **small})
    assert first == Architecture(Mamba, {"d_model": 64}, n_layers=1, vocab_size=50280)
    second = Architecture.from_transformers({"model_type": "mamba2", **small, "num_heads": 2, "n_groups": 1})
    assert second == Architecture(Mamba2, {"d_model": 64}, n_layers=1, vocab_size=32768, tied=False)
    whole = [Architecture.from_transformers({"model_type": kind}) for kind in ("mamba", "mamba2")]
    assert [(a.options["d_model"], a.n_layers) for a in whole] == [(768, 32), (4096, 64)]
    assert whole[1].options["ngroups"] == 8
    third = Architecture.from_mamba_ssm({"d_model": 64, "n_layer": 2})
    assert third == Architecture(Mamba, {"d_model": 64}, n_layers=2, vocab_size=50280)
    assert Architecture.from_mamba_ssm({}) == Architecture(Mamba, {"d_model": 2560}, n_layers=64, vocab_size=50280)


def test_the_defaults_are_those_of_transformers_where_it_is_installed():
    transformers = pytest.importorskip("transformers")
    for kind in ("Mamba", "Mamba2"):
        config = getattr(transformers, f"{kind}Config")().to_dict()
        found = Architecture.from_transformers({"model_type": kind.lower(), "time_step_rank": 48})
        assert found == Architecture.from_transformers(config)


def test_options_without_effect_are_passed_over():
    ssm_cfg = {"layer": "Mamba2", "chunk_size": 64, "use_mem_eff_path": False, "conv_init": 0.1, "d_ssm": 128}
    found = Architecture.from_mamba_ssm({"d_model": 64, "ssm_cfg": {**ssm_cfg, "process_group": None}})
    assert found.options == Architecture(Mamba2, {"d_model": 64}, 1, 1).options
    found = Architecture.from_mamba_ssm({"d_model": 64, "ssm_cfg": {"dt_rank": "auto", "dt_scale": 2.0}})
    assert found.options == Architecture(Mamba, {"d_model": 64}, 1, 1).options
    assert Architecture.from_mamba_ssm({"d_model": 64, "ssm_cfg": None, "attn_layer_idx": None}).layer is Mamba


FIRST, SECOND = public.MODELS["mamba"], public.MODELS["mamba2"]
SMALL = {"d_model": 64, "n_layer": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "unknown `model_type` None; the known ones are mamba, mamba2."),
        ({**FIRST, "model_type": "falcon_mamba"}, "unknown `model_type` 'falcon_mamba'; the known ones are"),
        ({**FIRST, "hidden_act": "gelu"}, "`hidden_act` must be 'silu' or 'swish' (the activation of the layers)"),
        ({**FIRST, "intermediate_size": 50}, "`intermediate_size` must be 48 (expand * hidden_size), got 50."),
        ({**FIRST, "layer_norm_epsilon": 0}, "`eps` must be a positive number, got 0."),
        ({**SECOND, "num_heads": 5}, "`num_heads * head_dim` must be 48 (expand * hidden_size), got 40."),
        (
            {**SECOND, "layer_norm_epsilon": 1e-6},
            "`layer_norm_epsilon` must be 1e-05 (the one of the norm inside of Mamba2",
        ),
        ({**SECOND, "n_groups": 4}, "Mamba2: `ngroups` must divide the number of heads, got 4 and 6."),
        ({**SECOND, "num_hidden_layers": 0}, "Architecture: `n_layers` must be at least 1, got 0."),
    ],
)
def test_configurations_of_transformers_that_cannot_be_represented_are_refused(config, message):
    for call in (Architecture.from_transformers, lambda given: from_transformers({}, given)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {**SMALL, "d_intermediate": 128},
            "`d_intermediate` must be 0 (feed-forward parts are not supported), got 128.",
        ),
        ({**SMALL, "attn_layer_idx": [3]}, "`attn_layer_idx` must be [] (attention is not supported), got [3]."),
        ({**SMALL, "rms_norm": False}, "`rms_norm` must be True (LayerNorm is not supported), got False."),
        ({**SMALL, "ssm_cfg": {"layer": "Mamba3"}}, "unknown `layer` 'Mamba3'; the known ones are Mamba1, Mamba2."),
        ({**SMALL, "ssm_cfg": {"layer": "Mamba2", "d_ssm": 64}}, "`d_ssm` must be None or 128 (expand * d_model)"),
        (
            {**SMALL, "ssm_cfg": {"process_group": 2}},
            "`process_group` must be None (several processes are not supported), got 2.",
        ),
        ({**SMALL, "layers": 3}, "unknown `field` 'layers'; the known ones are attn_cfg, attn_layer_idx, d_inter"),
        ({**SMALL, "pad_vocab_size_multiple": 0}, "`pad_vocab_size_multiple` must be at least 1, got 0."),
        ({**SMALL, "vocab_size": 0}, "Architecture: `vocab_size` must be at least 1, got 0."),
    ],
)
def test_configurations_of_mamba_ssm_that_cannot_be_represented_are_refused(config, message):
    for call in (Architecture.from_mamba_ssm, lambda given: from_mamba_ssm({}, given)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Architecture.from_transformers({**FIRST, "expand": 1.5}),
            "Mamba: `expand` must be an integer, got 1.5",
        ),
        (lambda: Architecture.from_transformers(None), "must be a dictionary as in `config.json`, got a NoneType"),
        (lambda: Architecture.from_mamba_ssm([]), "must be a dictionary as in `config.json`, got a list"),
        (
            lambda: Architecture.from_mamba_ssm({**SMALL, "ssm_cfg": {"width": 2}}),
            "unexpected keyword argument 'width'",
        ),
        (lambda: Architecture.from_mamba_ssm({**SMALL, "vocab_size": 9.0}), "`vocab_size` must be an integer, got 9.0"),
        (lambda: Architecture(Mamba, {}, 1, 1), "missing 1 required positional argument: 'd_model'"),
        (lambda: Architecture(Mamba, {"d_model": 4}, True, 1), "`n_layers` must be an integer, got True"),
    ],
)
def test_wrong_types_are_refused(make, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


def test_an_architecture_is_of_mamba_layers():
    with pytest.raises(ValueError, match="Architecture: `layer` must be .*Mamba.* or .*Mamba2.*, got .*S4D"):
        Architecture(S4D, {"d_model": 4}, 1, 1)


@pytest.mark.parametrize(
    ("options", "eps", "message"),
    [
        ({"rmsnorm": False}, 1e-5, r"`rmsnorm` must be True \(the only one in transformers\), got False"),
        ({"norm_before_gate": True}, 1e-5, "`norm_before_gate` must be False"),
        ({"D_has_hdim": True}, 1e-5, "`D_has_hdim` must be False"),
        ({}, 1e-6, "`eps` must be 1e-05"),
    ],
)
def test_networks_that_transformers_has_not_are_refused(options, eps, message):
    architecture = Architecture(Mamba2, {"d_model": 4, "headdim": 4, **options}, n_layers=1, vocab_size=7, eps=eps)
    with pytest.raises(ValueError, match=message):
        architecture.to_transformers()
    with pytest.raises(ValueError, match=message):
        to_transformers(network(architecture).state_dict(), architecture)


def test_mamba_ssm_has_one_epsilon():
    architecture = Architecture(Mamba, {"d_model": 4}, n_layers=1, vocab_size=7, eps=1e-6, tied=False)
    for call in (architecture.to_mamba_ssm, lambda: to_mamba_ssm(network(architecture).state_dict(), architecture)):
        with pytest.raises(
            ValueError, match=r"Architecture: `eps` must be 1e-05 \(the only one in mamba-ssm\), got 1e-06"
        ):
            call()
    assert architecture.to_transformers()["layer_norm_epsilon"] == 1e-6


def test_an_architecture_takes_no_random_numbers_and_keeps_what_it_was_given():
    before, options = torch.get_rng_state(), {"d_model": 4}
    Architecture(Mamba2, {**options, "headdim": 4}, n_layers=1, vocab_size=7)
    assert torch.equal(before, torch.get_rng_state())
    assert options == {"d_model": 4}
    made = Architecture(Mamba, options, 1, 7)
    options["d_model"] = 8
    assert made.options["d_model"] == 4


def test_nothing_given_is_changed():
    config = public.MODELS["mamba2"]
    weights, text = public.weights(config), json.dumps(config)
    kept = {name: value.clone() for name, value in weights.items() if name != "lm_head.weight"}
    given = dict(kept)
    ours = from_transformers(given, config)
    assert list(given) == list(kept)
    assert same(given, kept)
    assert json.dumps(config) == text
    names = list(ours)
    to_transformers(ours, config)
    assert list(ours) == names
    mamba_ssm = json.loads(json.dumps(MAMBA2_130M))
    Architecture.from_mamba_ssm(mamba_ssm)
    assert mamba_ssm == MAMBA2_130M
