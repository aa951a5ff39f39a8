"""Folders to workdirs and back, on folders made here: bit for bit, in every layout and dtype, old names, and refusals."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import hybrid_jax
import hybrid_jax.model
from hybrid_jax.config import GLA, Attention, CheckpointConfig, ConfigError, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from hybrid_jax.hf import convert, names, options, tensors
from hybrid_jax.sharding import make_mesh
from hybrid_jax.train.checkpoints import Checkpoints
from hybrid_jax.train.step import abstract_state
from hybrid_jax.train.workdir import claim, read_config
from tests.hybrid_jax import hf_folders
from tests.hybrid_jax.hf_folders import ATTN, BFLOAT16, fla_options, random_tensors


def read_back(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.numpy.load_file(file).items()}


def assert_same_bits(out, expected):
    assert out.keys() == expected.keys()
    for name, tensor in expected.items():
        assert out[name].dtype == tensor.dtype, name
        assert out[name].shape == tensor.shape and out[name].tobytes() == tensor.tobytes(), name


def there_and_back(tmp_path, **given):
    convert.from_hf(tmp_path / "theirs", tmp_path / "run")
    convert.to_hf(tmp_path / "run", tmp_path / "back", **given)
    return read_back(tmp_path / "back")


CASES = {
    "hgrn": ("hgrn", {}, np.float32, 1),
    "hgrn2 hybrid, bfloat16": ("hgrn2", {"attn": ATTN}, BFLOAT16, 1),
    "retnet hybrid, float16, sharded": ("retnet", {"attn": ATTN}, np.float16, 3),
    "gla hybrid, list form, sharded": ("gla", {"attn": [{"layers": [0], "num_heads": 2}, {"layers": [3], "num_heads": 2}]}, BFLOAT16, 2),
    "gla conv, not fused": ("gla", {"use_short_conv": True, "fuse_norm": False}, np.float32, 1),
    "delta_net tied": ("delta_net", {"tie_word_embeddings": True}, BFLOAT16, 1),
    "gated_deltanet hybrid": ("gated_deltanet", {"attn": ATTN}, np.float32, 2),
    "kda hybrid, bounded": ("kda", {"attn": ATTN, "lower_bound": -5.0, "safe_gate": True}, BFLOAT16, 2),
    "transformer": ("transformer", {"qkv_bias": True, "qk_norm": True}, np.float16, 1),
}


ALIKE = ("hgrn2 hybrid, bfloat16", "gla conv, not fused", "delta_net tied", "gated_deltanet hybrid")  # others have their layouts and dtypes


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow) if case in ALIKE else case for case in CASES])
def test_there_and_back_bit_for_bit(case, tmp_path):
    model_type, changes, dtype, shards = CASES[case]
    described = fla_options(model_type, **changes)
    given = random_tensors(described, dtype)
    hf_folders.write(tmp_path / "theirs", described, given, shards)
    assert_same_bits(there_and_back(tmp_path), given)
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written.pop("torch_dtype") == np.dtype(dtype).name
    assert written == described
    assert read_config(tmp_path / "run").model.dtype == ("bfloat16" if dtype is BFLOAT16 else "float32")


# fla's tensor of layer 0 -> where it lies in that layer, those that are not called the same there and here.
OF_LAYER = {
    "gla": {
        **{"mlp.gate_proj.weight": "mlp.gate_proj.kernel", "mlp.up_proj.weight": "mlp.up_proj.kernel"},
        **{"attn.gk_proj.0.weight": "mixer.decay_in.kernel", "attn.gk_proj.1.weight": "mixer.decay_out.kernel"},
        **{"attn.gk_proj.1.bias": "mixer.decay_out.bias", "attn.g_proj.weight": "mixer.g_proj.kernel"},
        **{"attn.g_norm_swish_gate.weight": "mixer.g_norm.scale", "attn.k_proj.weight": "mixer.k_proj.kernel"},
    },
    "kda": {
        **{"attn.f_proj.0.weight": "mixer.decay_in.kernel", "attn.f_proj.1.weight": "mixer.decay_out.kernel"},
        **{"attn.g_proj.0.weight": "mixer.gate_in.kernel", "attn.g_proj.1.weight": "mixer.gate_out.kernel"},
        **{"attn.g_proj.1.bias": "mixer.gate_out.bias", "attn.o_norm.weight": "mixer.o_norm.scale"},
        **{"attn.q_conv1d.weight": "mixer.q_conv.weight", "attn.A_log": "mixer.A_log", "attn.b_proj.weight": "mixer.b_proj.kernel"},
    },
    "hgrn": {
        "attn.i_proj.weight": "mixer.i_proj.kernel",
        "attn.f_proj.weight": "mixer.f_proj.kernel",
        "attn.g_norm.weight": "mixer.g_norm.scale",
    },
}


@pytest.mark.parametrize("model_type", OF_LAYER)
def test_tensors_of_one_shape_are_not_taken_for_one_another(model_type):
    """There and back they would come to the same; that a model computes what fla's does is shown by tests/parity."""
    described = options.modern(fla_options(model_type))
    slots = names.slots(options.model_config(described, "float32"), described)
    found = {name: ".".join(map(str, slots[f"model.layers.0.{name}"].path[4:])) for name in OF_LAYER[model_type]}
    assert found == OF_LAYER[model_type]


def test_each_tensor_goes_back_in_the_dtype_it_came_in_or_in_the_one_asked_for(tmp_path):
    described = fla_options("gated_deltanet")
    given = random_tensors(described, BFLOAT16)
    given |= {name: tensor.astype(np.float32) for name, tensor in given.items() if "A_log" in name}
    hf_folders.write(tmp_path / "theirs", described, given)
    assert_same_bits(there_and_back(tmp_path), given)
    convert.to_hf(tmp_path / "run", tmp_path / "wide", dtype="float32")
    assert_same_bits(read_back(tmp_path / "wide"), {name: tensor.astype(np.float32) for name, tensor in given.items()})


def test_values_that_do_not_fit_the_dtype_are_named(tmp_path):
    described = fla_options("hgrn")
    given = random_tensors(described)
    given["model.norm.weight"][0] = 1e6
    hf_folders.write(tmp_path / "theirs", described, given)
    with pytest.raises(ConfigError, match="model.norm.weight has values that are no float16: choose another --to_dtype"):
        there_and_back(tmp_path, dtype="float16")


@pytest.mark.parametrize("before", ["no folder", "what a killed conversion left"])
def test_a_conversion_that_fails_leaves_nothing_and_can_be_repeated(before, tmp_path, monkeypatch):
    described = fla_options("hgrn")
    given = random_tensors(described)
    given["model.norm.weight"][0] = 1e6
    assert list(given)[0] != "model.norm.weight"  # what fails is not the first tensor that is written
    hf_folders.write(tmp_path / "theirs", described, given)
    convert.from_hf(tmp_path / "theirs", tmp_path / "run")
    back = tmp_path / "back"
    if before != "no folder":
        back.mkdir()
    if before == "what a killed conversion left":
        (back / convert.PARTIAL).mkdir()
        (back / convert.PARTIAL / "tokenizer.model").write_bytes(b"half")
    others = {path.name for path in tmp_path.iterdir()} - {"back"}
    monkeypatch.setattr(tensors, "SHARD_BYTES", 20_000)
    with pytest.raises(ConfigError, match="model.norm.weight has values that are no float16"):
        convert.to_hf(tmp_path / "run", back, dtype="float16")
    assert back.exists() == (before != "no folder") and not list(back.glob("*"))
    assert {path.name for path in tmp_path.iterdir()} - {"back"} == others
    with monkeypatch.context() as patch:
        patch.setattr(convert, "_write_json", lambda *_: 1 / 0)  # the last file
        with pytest.raises(ZeroDivisionError):
            convert.to_hf(tmp_path / "run", back)
    assert back.exists() == (before != "no folder") and not list(back.glob("*"))
    convert.to_hf(tmp_path / "run", back)
    assert_same_bits(read_back(back), given)
    assert not (back / convert.PARTIAL).exists() and not (back / "tokenizer.model").exists()
    with pytest.raises(ConfigError, match="has files already: give an empty or a new folder"):
        convert.to_hf(tmp_path / "run", back)


def test_a_large_model_is_written_in_shards(tmp_path, monkeypatch):
    described = fla_options("gla")
    given = random_tensors(described)
    hf_folders.write(tmp_path / "theirs", described, given)
    monkeypatch.setattr(tensors, "SHARD_BYTES", 20_000)
    assert_same_bits(there_and_back(tmp_path), given)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in (tmp_path / "back").glob("model-*.safetensors")}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in given.values())
    assert len(set(index["weight_map"].values())) > 2
    shutil.rmtree(tmp_path / "run")
    convert.from_hf(tmp_path / "back", tmp_path / "run")


def test_the_loaded_model_is_the_converted_one(tmp_path):
    described = fla_options("gated_deltanet", attn=ATTN)
    folder = hf_folders.write(tmp_path / "theirs", described, random_tensors(described))
    tokens = np.arange(20)[None] % 61
    direct = hybrid_jax.load(folder)
    assert direct.config.layer_kinds == ("gated_delta_net", "attention") * 2
    convert.from_hf(folder, tmp_path / "run")
    np.testing.assert_array_equal(jax.jit(direct)(tokens), jax.jit(hybrid_jax.load(tmp_path / "run"))(tokens))


def test_what_came_in_float32_computes_in_bfloat16_where_asked_to(tmp_path):
    described = fla_options("gla", num_hidden_layers=1)
    folder = hf_folders.write(tmp_path / "theirs", described, random_tensors(described))
    convert.from_hf(folder, tmp_path / "run", "bfloat16")
    models = [
        hybrid_jax.load(*given)
        for given in ((folder,), (folder, None, "bfloat16"), (tmp_path / "run",), (tmp_path / "run", None, "float32"))
    ]
    assert [model.config.dtype for model in models] == ["float32", "bfloat16", "bfloat16", "float32"]
    assert {leaf.dtype for model in models for leaf in jax.tree.leaves(nnx.state(model))} == {np.dtype("float32")}
    with pytest.raises(ConfigError, match="dtype='bf16' must be 'bfloat16' or 'float32'"):
        hybrid_jax.load(folder, dtype="bf16")


def test_old_names(tmp_path):
    """The MLP's two halves in one, DeltaNet's norm, and the unused D and q_conv1d: the new names come back."""
    for model_type in ("delta_net", "gated_deltanet", "hgrn"):
        described = fla_options(model_type, use_short_conv=True)
        given = random_tensors(described)
        old = {name.replace("attn.o_norm", "attn.norm"): x for name, x in given.items()} if model_type == "delta_net" else dict(given)
        for layer in range(4):
            mlp = f"model.layers.{layer}.mlp"
            old[f"{mlp}.gate_proj.weight"] = np.concatenate([old[f"{mlp}.gate_proj.weight"], old.pop(f"{mlp}.up_proj.weight")])
            if model_type == "gated_deltanet":
                old[f"model.layers.{layer}.attn.D"] = np.zeros(2, np.float32)
            if model_type == "hgrn":
                old[f"model.layers.{layer}.attn.q_conv1d.weight"] = np.zeros((32, 1, 4), np.float32)
        hf_folders.write(tmp_path / model_type / "theirs", described, old)
        assert_same_bits(there_and_back(tmp_path / model_type), given)


def test_tensors_that_are_missing_too_many_or_misshapen_are_named(tmp_path):
    described = fla_options("gla")
    given = random_tensors(described)
    del given["model.layers.2.attn.gk_proj.1.bias"]
    given["model.layers.4.attn.q_proj.weight"] = np.zeros((16, 32), np.float32)
    given["lm_head.weight"] = np.zeros((60, 32), np.float32)
    folder = hf_folders.write(tmp_path / "theirs", described, given)
    with pytest.raises(ConfigError) as refused:
        convert.from_hf(folder, tmp_path / "run")
    for wrong in (
        "model.layers.2.attn.gk_proj.1.bias is missing",
        "model.layers.4.attn.q_proj.weight is not a tensor of this model",
        "lm_head.weight is [60, 32], not [61, 32]",
    ):
        assert wrong in str(refused.value)
    assert not (tmp_path / "run").exists()


def damage(folder, how):
    file = folder / "model-00002-of-00002.safetensors"
    match how:
        case "a shard is missing":
            file.unlink()
        case "a shard is cut short":
            file.write_bytes(file.read_bytes()[:-100])
        case "an index that leads out of the folder":
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
        case "an index that is none":
            (folder / "model.safetensors.index.json").write_text("[]")
        case "a pickle alone":
            for safe in folder.glob("model*"):
                safe.unlink()
            (folder / "pytorch_model.bin").write_bytes(b"\x80")
        case "integers":
            safetensors.numpy.save_file({"model.norm.weight": np.zeros(32, np.int8)}, file)
        case "no config":
            (folder / "config.json").unlink()
        case "a config that is not JSON":
            (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    "how, told",
    [
        ("a shard is missing", "has no model-00002-of-00002.safetensors"),
        ("a shard is cut short", "is not a whole safetensors file"),
        ("an index that leads out of the folder", "no file of this folder"),
        ("an index that is none", "is not an index of safetensors"),
        ("a pickle alone", "has no model.safetensors .not pytorch_model.bin, a pickle, which is never opened"),
        ("integers", "tensor model.norm.weight of .* is I8: only F32, BF16, F16 are supported"),
        ("no config", "holds no Hugging Face model: it has no config.json"),
        ("a config that is not JSON", "config.json is not JSON"),
    ],
)
def test_damaged_folders(how, told, tmp_path):
    described = fla_options("hgrn")
    folder = hf_folders.write(tmp_path / "theirs", described, random_tensors(described), shards=2)
    damage(folder, how)
    with pytest.raises(ConfigError, match=told):
        convert.from_hf(folder, tmp_path / "run")


def test_tokenizer_files_come_along(tmp_path):
    described = fla_options("hgrn")
    folder = hf_folders.write(tmp_path / "theirs", described, random_tensors(described))
    files = {"tokenizer.json": b"{}", "tokenizer.model": b"\x00pieces", "tokenizer_config.json": b'{"eos_token": "</s>"}'}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    there_and_back(tmp_path)
    for name, content in files.items():
        assert (tmp_path / "back" / name).read_bytes() == content


def test_a_run_of_our_own(tmp_path):
    """What fla's config.json says of it gives the same model, and the parameters are the same."""
    model = ModelConfig(
        mixer=GLA(heads=2), layers=3, width=32, mlp_width=48, vocabulary=300, ratio=3, attention=Attention(heads=2), dtype="float32"
    )
    claim(tmp_path / "run", RunConfig(model=model))
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save_params(jax.jit(lambda: hybrid_jax.model.initialize(model, jax.random.key(0)))())
    assert convert.to_hf(tmp_path / "run", tmp_path / "ours") == 0
    assert len({file.stat().st_mode for file in (tmp_path / "ours").iterdir()}) == 1  # whoever may read one may read all
    assert json.loads((tmp_path / "ours/config.json").read_text())["eos_token_id"] == 256
    tokens = np.arange(20)[None]
    np.testing.assert_array_equal(hybrid_jax.load(tmp_path / "ours")(tokens), hybrid_jax.load(tmp_path / "run")(tokens))
    with pytest.raises(ConfigError, match="has files already"):
        convert.to_hf(tmp_path / "run", tmp_path / "ours")


def test_a_schedule_free_run_is_averaged_parameter_by_parameter(tmp_path, monkeypatch):
    """What is written is what is loaded, and of its sequences no more than a parameter's own is ever read at once."""
    model = ModelConfig(mixer=GLA(heads=2), layers=2, width=32, mlp_width=48, vocabulary=300, dtype="float32")
    run = RunConfig(model=model, optimizer=OptimizerConfig(name="schedule_free"))
    claim(tmp_path / "run", run)
    state = abstract_state(run, make_mesh(MeshConfig(), jax.devices()[:1])).state
    draws = (np.random.default_rng(i).random(x.shape).astype(x.dtype) for i, x in enumerate(jax.tree.leaves(state)))
    state = jax.tree.map(lambda x: jax.device_put(next(draws), x.sharding), state)._replace(step=jax.numpy.int32(7))
    with Checkpoints(tmp_path / "run", CheckpointConfig()) as checkpoints:
        checkpoints.save(state)
    read, load = [], Checkpoints.load

    def counted(self, step, items):
        read.append(sum(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(items)))
        return load(self, step, items)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "load", counted)
        assert convert.to_hf(tmp_path / "run", tmp_path / "ours") == 7
    assert set(read) == {3}  # of its two sequences one parameter each, and their weight
    tokens = np.arange(20)[None]
    np.testing.assert_array_equal(hybrid_jax.load(tmp_path / "ours")(tokens), hybrid_jax.load(tmp_path / "run")(tokens))


def test_every_parameter_has_its_tensor():
    for model_type in hf_folders.FAMILIES:
        model = options.model_config(fla_options(model_type), "float32")
        found = names.slots(model, {})
        assert names.elements(found) == sum(leaf.size for leaf in jax.tree.leaves(hybrid_jax.model.abstract(model)[1]))
