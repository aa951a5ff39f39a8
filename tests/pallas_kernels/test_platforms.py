"""Where kernels run: decided by the platform and the mesh that a program is lowered for, not by the machine it is lowered on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import checks, platforms


def double(x):
    def body(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    return platforms.pallas_call(body, name="double", out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype),))(x)[0]


def choose(name=None):
    return checks.choose("double", {"pallas": double, "xla": lambda x: x + x}, name, default="xla", kernel="pallas")


def lowered(function, platform, *arguments):
    return jax.export.export(jax.jit(function), platforms=[platform])(*arguments).mlir_module()


def mesh_of(kind, size=1):
    platform = {"TPU": "tpu", "cpu": "cpu"}.get(kind[:3], "gpu")
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return jax.sharding.AbstractMesh((size,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)


X = np.arange(16.0, dtype=np.float32).reshape(2, 2, 4)


def test_a_kernel_is_interpreted_on_cpu_and_compiled_for_tpu():
    for run in (double, jax.jit(double), jax.vmap(double), jax.jit(jax.vmap(double)), jax.checkpoint(double)):
        assert np.array_equal(run(X), 2 * X)
    assert "tpu_custom_call" in lowered(double, "tpu", X)
    assert "tpu_custom_call" not in lowered(double, "cpu", X)
    with pytest.raises(NotImplementedError, match=r"double: a Pallas kernel for TPU \(interpreted on CPU\), lowered for cuda"):
        lowered(double, "cuda", X)


def test_none_is_the_kernel_on_tpu_only():
    assert np.array_equal(choose()(X), 2 * X)
    assert "tpu_custom_call" in lowered(choose(), "tpu", X)
    for platform in ("cpu", "cuda"):
        assert "tpu_custom_call" not in lowered(choose(), platform, X)
    assert "tpu_custom_call" not in lowered(choose("xla"), "tpu", X)


def test_a_mesh_in_force_says_what_none_is_and_nothing_else_is_traced():
    def traced(name):
        return lambda x: found.append(name) or x

    for kind, name in (
        ("NVIDIA H200", "kernel"),
        ("NVIDIA A100-SXM4-80GB", "elsewhere"),
        ("AMD Instinct MI300X", "elsewhere"),
        ("TPU v5 lite", "kernel"),
        ("cpu", "elsewhere"),
    ):
        found = []
        with jax.sharding.use_abstract_mesh(mesh_of(kind)):
            jax.make_jaxpr(platforms.on_accelerator(traced("kernel"), elsewhere=traced("elsewhere")))(X)
        assert found == [name], kind
    for kind, platform, says in (("TPU v5 lite", "tpu", "tpu_custom_call"), ("cpu", "cpu", "while"), ("NVIDIA H200", "cuda", None)):
        with jax.sharding.use_abstract_mesh(mesh_of(kind)):
            if says:
                assert says in lowered(double, platform, X)
            else:
                with pytest.raises(NotImplementedError, match="double: a Pallas kernel for TPU"):
                    lowered(double, platform, X)


def test_arguments_that_are_not_arrays_reach_both():
    def scaled(x, scale, extra):
        assert isinstance(scale, float) and extra is None
        return scale * x

    assert np.array_equal(platforms.on_accelerator(scaled, elsewhere=scaled)(jnp.asarray(X), 3.0, None), 3 * X)


def test_where_xla_partitions_the_program_it_has_no_kernel():
    spec = PartitionSpec("data")
    with jax.sharding.use_abstract_mesh(mesh_of("TPU v5 lite", 2)):
        assert platforms.is_partitioned()
        assert "tpu_custom_call" not in lowered(choose(), "tpu", X)
        by_hand = jax.shard_map(lambda x: choose()(x), in_specs=spec, out_specs=spec)
        assert "tpu_custom_call" in lowered(by_hand, "tpu", X)
    assert not platforms.is_partitioned()


def test_a_compiled_program_says_which_implementations_it_runs():
    def scoped(x):
        with jax.named_scope("outer"):
            x = jnp.sin(choose()(x))
        with jax.named_scope("other"):
            return jax.lax.scan(lambda x, _: (choose("pallas")(x), None), x, length=2)[0]

    text = jax.jit(scoped).lower(X).compile().as_text()
    assert checks.implementations_in("outer", text) == {"double": ["xla"]}
    assert checks.implementations_in("other", text) == {"double": ["pallas"]}
    assert checks.implementations_in("out", text) == {}


def test_results_vary_over_the_mesh_as_operands_do():
    def add(x, y):
        def body(x_ref, y_ref, out_ref):
            out_ref[...] = x_ref[...] + y_ref[...]

        return platforms.pallas_call(body, name="add", out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype),))(x, y)[0]

    spec = PartitionSpec("data")
    sharded = jax.shard_map(lambda x: add(x, jnp.ones_like(X[:1])), mesh=mesh_of("TPU v5 lite", 2), in_specs=spec, out_specs=spec)
    assert "tpu_custom_call" in lowered(sharded, "tpu", X)


def test_the_generation_is_that_of_the_mesh_in_force():
    assert platforms.generation() is None
    nvidia = (("NVIDIA H200", "hopper"), ("NVIDIA GH200 480GB", "hopper"), ("NVIDIA H100 80GB HBM3", "hopper"), ("NVIDIA B200", None))
    for kind, name in (("TPU v5 lite", "v5e"), ("TPU7x", "tpu7x"), ("TPU v99", None), *nvidia):
        with jax.sharding.use_abstract_mesh(mesh_of(kind)):
            assert platforms.generation() == name
            assert platforms.kernels(tpu=checks, gpu=platforms) is (platforms if name == "hopper" else checks)


def test_interpreted_kernels_can_be_differentiated_inside_a_rule():
    @jax.custom_vjp
    def f(x):
        return double(x)

    f.defvjp(lambda x: (double(x), None), lambda _, d: (double(d),))
    assert np.array_equal(jax.jit(jax.grad(lambda x: jnp.sum(jax.checkpoint(f)(x))))(X), np.full_like(X, 2))
    assert lowered(jax.grad(lambda x: jnp.sum(jax.vmap(f)(x))), "tpu", X).count("tpu_custom_call") == 1
