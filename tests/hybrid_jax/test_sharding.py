"""The mesh and its table, and training on eight virtual devices to the losses of one."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hybrid_jax import config, sharding
from hybrid_jax.model import abstract
from tests.hybrid_jax.sharded_training import MESHES

MIXERS = {
    "hgrn": {},
    "hgrn2": {"expand_ratio": 8},
    "retnet": {"heads": 4},
    "gla": {"heads": 4},
    "delta_net": {"heads": 4},
    "gated_delta_net": {"heads": 4, "head_width": 8},
    "kda": {"heads": 4, "head_width": 8},
}


SHORT = [("gla", ["fsdp 2, seq 2, tensor 2"])]
FULL = [(name, list(MESHES)) for name in MIXERS]


@pytest.mark.parametrize("name, meshes", [*SHORT, *(pytest.param(*case, marks=pytest.mark.slow) for case in FULL)])
def test_a_mesh_changes_no_loss(name, meshes):
    mixer = {"name": name} | MIXERS[name]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # with the eight devices that tests have
    command = [sys.executable, "-m", "tests.hybrid_jax.sharded_training", json.dumps(mixer), *meshes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout.splitlines()[-1])
    one = losses.pop("one")
    assert list(losses) == meshes
    assert one[0] != one[-1]
    for mesh, found in losses.items():
        # sums over devices are taken in another order: float32 rounding, grown through three steps of Adam
        np.testing.assert_allclose(found, one, rtol=2e-5, err_msg=mesh)


def abstract_mesh(**sizes):
    return jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in sharding.AXES), sharding.AXES)


def leaves(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_each_parameter_lies_as_its_axes_say():
    params = abstract(config.ModelConfig(mixer=config.KDA(), ratio=6, layers=12))[1]
    found = {name: s.spec for name, s in leaves(sharding.param_shardings(abstract_mesh(fsdp=2, tensor=2), params)).items()}
    expected = {
        "embedding.table": P("tensor", "fsdp"),
        "output.kernel": P("fsdp", "tensor"),
        "stages.0.runs.0.mixer.q_proj.kernel": P(None, None, "fsdp", "tensor"),
        "stages.0.runs.0.mixer.o_proj.kernel": P(None, None, "tensor", "fsdp"),
        "stages.0.runs.0.mixer.q_conv.weight": P(None, None, "tensor", None),
        "stages.0.runs.0.mixer.A_log": P(None, None, "tensor"),
        "stages.0.runs.0.mixer.dt_bias": P(None, None, "tensor"),
        "stages.0.runs.0.mixer.decay_in.kernel": P(None, None, "fsdp", None),
        "stages.0.runs.0.mixer.decay_out.kernel": P(None, None, None, "tensor"),
        "stages.0.runs.0.mixer.gate_out.bias": P(None, None, "tensor"),
        "stages.0.runs.1.mlp.down_proj.kernel": P(None, None, "tensor", "fsdp"),
        "norm.scale": P(None),
    }
    for name, spec in expected.items():
        assert found[next(key for key in found if key.startswith(name))] == spec


def test_a_size_that_does_not_divide_is_named():
    params = abstract(config.ModelConfig(vocabulary=257))[1]
    says = "mesh tensor=2 does not divide the 'vocabulary' axis of size 257 of parameter embedding.table"
    with pytest.raises(config.ConfigError, match=says):
        sharding.param_shardings(abstract_mesh(tensor=2), params)


def test_mesh_uses_every_device():
    assert sharding.make_mesh(config.MeshConfig(), jax.devices()[:1]).shape == {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1}
    with pytest.raises(config.ConfigError, match="does not fit 1 device; the sizes must multiply to 1"):
        sharding.make_mesh(config.MeshConfig(tensor=4), jax.devices()[:1])
    with pytest.raises(config.ConfigError, match="data 1 x fsdp 1 x seq 1 x tensor 1 does not fit 2 devices"):
        sharding.make_mesh(config.MeshConfig(fsdp=1), jax.devices()[:1] * 2)


class Device:
    """Of a TPU that is not there: its place in a slice of 2 x 2 chips, and its slice."""

    platform, device_kind, core_on_chip = "tpu", "TPU of tests", 0

    def __init__(self, number, slices):
        self.id, self.process_index, self.coords = number, number // 4, (number % 2, number // 2 % 2, 0)
        if slices > 1:
            self.slice_index = number // 4


@pytest.mark.parametrize("slices, sizes", [(1, {}), (2, {"data": 2}), (2, {"data": 4, "tensor": 2}), (4, {"data": 4, "seq": 2})])
def test_slices_are_the_outer_part_of_the_data_axis(slices, sizes):
    devices = [Device(number, slices) for number in range(4 * slices)]
    mesh = sharding.make_mesh(config.MeshConfig(**sizes | {"fsdp": -1}), devices[::-1])
    assert {axis: mesh.shape[axis] for axis in sizes} == sizes and mesh.size == 4 * slices
    assert {device.id for device in mesh.devices.flat} == set(range(4 * slices))
    per_slice = np.reshape([device.id // 4 for device in mesh.devices.flat], (slices, -1))
    np.testing.assert_array_equal(per_slice, np.repeat(np.arange(slices)[:, None], 4, 1))


def test_slices_that_are_no_part_of_the_data_axis_are_refused():
    with pytest.raises(config.ConfigError, match="mesh.data=1 cannot be dealt to 2 slices; give --config.mesh.data=2"):
        sharding.make_mesh(config.MeshConfig(), [Device(number, 2) for number in range(8)])


def test_constraint_without_a_mesh_is_nothing():
    x = jax.numpy.ones((2, 3))
    assert sharding.constrain(x, "batch", "time") is x
