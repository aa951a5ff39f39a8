"""FLOPs read from an optimized module: of products, of kernels that say theirs, and of Splash Attention, which does not."""

import contextlib
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import process_mask

from experiments import cli
from experiments.compiled import hlo, tpu_topology
from experiments.compiled.flops import flops, splash_blocks
from experiments.compiled.process import Process
from hybrid_jax.sharding import make_mesh
from hybrid_jax.train.feed import batch_shapes
from hybrid_jax.train.step import compile_step, make_program
from pallas_kernels.attention import attention
from pallas_kernels.attention.tpu import _stretch_kernel, block_length


@pytest.mark.parametrize(
    "line, expected",
    [
        ("dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 6 * 4 * 5),
        ("convolution(%a, %b), dim_labels=bf_io->bf", 2 * 6 * 4 * 5),
        ('custom-call(%a, %b), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"77"}}', 77),
        ("add(%a, %b)", 0),
    ],
)
def test_flops_of_a_line(line, expected):
    text = "ENTRY %main (a: f32[6,5], b: f32[5,4]) -> f32[6,4] {\n  %a = f32[6,5]{1,0} parameter(0)\n  %b = f32[5,4]{1,0} parameter(1)\n"
    assert flops(hlo.Module(f"{text}  ROOT %c = f32[6,4]{{1,0}} {line}\n}}\n")) == expected


def test_a_batched_product_that_is_a_convolution_counts_what_it_multiplies():
    """TPUs write [3,6,5] x [3,5,4] as a convolution over the batch, of whose window all but the diagonal meets gaps."""
    window = "window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf"
    text = f"""ENTRY %main (a: f32[3,6,5], b: f32[3,5,4]) -> f32[3,6,4] {{
  %a = f32[3,6,5]{{2,1,0}} parameter(0)
  %b = f32[3,5,4]{{2,1,0}} parameter(1)
  ROOT %c = f32[3,6,4]{{2,1,0}} convolution(%a, %b), {window}
}}
"""
    assert flops(hlo.Module(text)) == 2 * 3 * 6 * 4 * 5


def test_flops_in_loops_are_those_of_all_trips():
    def run(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    compiled = jax.jit(run).lower(jnp.ones((6, 5)), jnp.ones((7, 5, 5))).compile()
    assert flops(hlo.Module(compiled.as_text())) == 7 * 2 * 6 * 5 * 5


def kernels(B, H, HK, queries, keys, K, V, fused=True):
    """The text of a module with Splash Attention's forward and backward kernels, as libtpu writes it."""
    arrays = {"q": (B, H, queries, K), "k": (B, HK, keys, K), "v": (B, HK, keys, V), "do": (B, H, queries, V)}
    types = {name: f"bf16[{','.join(map(str, shape))}]{{3,2,1,0}}" for name, shape in arrays.items()}
    types |= {"table": "s8[1,4,4]{2,1,0}", "ids": f"s32[{B},8,{keys}]{{2,1,0}}"}
    in_parts = f"bf16[{B},4,{H},{queries},{K}]{{4,3,2,1,0:T(8,128)(2,1)}}, "
    called = {
        "fwd_segmented_residuals": (f"(f32[{B},128,{V}]{{2,1,0}}, {types['do']})", "%table, %q, %k, %v, %ids"),
        "dkv_segmented_no_residuals": (f"({in_parts if fused else ''}{types['k']}, {types['v']})", "%table, %q, %k, %v, %ids, %do"),
        "dq_segmented_no_residuals": (f"({types['q']})", "%table, %q, %k, %v, %ids, %do"),
    }
    lines = [f"  %{name} = {type} parameter({i})" for i, (name, type) in enumerate(types.items())]
    for name, (result, operands) in called.items():
        if "dq_" not in name or not fused:
            lines.append(f'  %splash_mha_{name}.7 = {result} custom-call({operands}), custom_call_target="tpu_custom_call"')
    return "\n".join(["ENTRY %main () -> () {", *lines, "}\n"])


def counted(*shape, window=None, **keywords):
    return flops(hlo.Module(kernels(*shape, **keywords)), window)


def test_what_each_kernel_of_splash_multiplies():
    ones = (1, 1, 1, 128, 128)
    assert counted(*ones, 1, 0) == 2 * 128**2 * (1 + 3) and counted(*ones, 0, 1) == 2 * 128**2 * (1 + 2)
    assert counted(*ones, 1, 0, fused=False) == 2 * 128**2 * (1 + 2 + 2) and counted(*ones, 0, 1, fused=False) == 2 * 128**2 * (1 + 2 + 1)
    assert counted(3, 4, 2, 4096, 4096, 64, 64) == 12 * 10 * 1024**2 * 2 * 64 * 7  # 10 of 16 blocks
    assert counted(1, 1, 1, 4096, 4096, 64, 64, window=1025) == 7 * 1024**2 * 2 * 64 * 7
    assert counted(1, 1, 1, 2048, 8192, 64, 64) == 9 * 1024**2 * 2 * 64 * 7  # a quarter of 36


@pytest.mark.parametrize("H, HK, K, V", [(4, 4, 32, 32), (4, 2, 64, 32)])
def test_splash_counts_what_xla_counts_of_the_same_attention(H, HK, K, V):
    """On the CPU, at a block that is one of both: exactly its products, and XLA's own count, which has exponentials and sums too.

    Forward and backward are two programs, so that XLA does not take the scores of one for the other.
    """
    q, k, v, do = (jax.ShapeDtypeStruct((2, 128, *heads), jnp.float32) for heads in ((H, K), (HK, K), (HK, V), (H, V)))
    forward = jax.jit(functools.partial(jax.vjp, functools.partial(attention, implementation="xla")))
    _, gradients = jax.eval_shape(forward, q, k, v)
    backward = jax.jit(lambda gradients, do: gradients(do))
    compiled = [forward.lower(q, k, v).compile(), backward.lower(gradients, do).compile()]
    own = counted(2, H, HK, 128, 128, K, V)
    assert sum(flops(hlo.Module(each.as_text())) for each in compiled) == own
    assert own < sum(each.cost_analysis()["flops"] for each in compiled) < 1.1 * own


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 6000), window=st.one_of(st.none(), st.integers(1, 7000)))
def test_blocks_are_those_of_splash_itself(tokens, window):
    block = block_length(tokens)
    T = -(-tokens // block) * block
    mask = splash.CausalMask((T, T)) if window is None else splash.LocalMask((T, T), (window - 1, 0), offset=0)
    tables, _ = process_mask(splash.MultiHeadMask([mask]), (block, block))
    assert splash_blocks(T, block, window) == np.count_nonzero(tables.block_mask)


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_stretches_dealt_from_both_ends(devices):
    """The blocks in the tables that each device's kernel goes by: the same number on all, and what is counted."""
    length, heads = 1024, 1
    for at in range(devices):
        places = jnp.array([at, 2 * devices - 1 - at])
        kernel = _stretch_kernel(heads, length, 2 * devices * length, None, places, interpret=True)
        computed = np.count_nonzero(kernel.fwd_mask_info.block_mask)
        assert computed == np.count_nonzero(kernel.dkv_mask_info.block_mask) == 2 * devices + 1
    assert counted(1, 1, 1, 2 * length, 2 * devices * length, 64, 64, fused=2 * devices <= 8) == (2 * devices + 1) * 1024**2 * 2 * 64 * 7


def step_flops(config, devices):
    mesh = make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh):
        compiled, _ = compile_step(make_program(config, mesh), batch_shapes(config, mesh))
    return flops(hlo.Module(compiled.as_text()), config.model.full_attention.window)


def step_on_tpu(config):
    return {"flops": step_flops(config, tpu_topology.devices("v5e:1x1"))}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install -e '.[tpu]'")
@pytest.mark.slow
def test_a_step_with_splash_has_the_flops_of_one_with_xla():
    """Of a whole training step, compiled for a TPU and for this CPU; a window of one block, for the blocks of the two forms differ."""
    overrides = ("--config.data.window=128", "--config.model.layers=2", "--config.model.remat=none", "--config.mesh.fsdp=1")
    config = cli.load_run(["--config=configs/transformer.py:tiny", *overrides], "").config
    with contextlib.closing(Process(tpu_topology.COMPILER, tpu_topology.environment("v5e:1x1"))) as compiler:
        assert compiler.call(step_on_tpu, config)["flops"] == step_flops(config, jax.devices("cpu")[:1])
