"""The TPU kernels of the gated delta rule, interpreted: against the reference in float64, and its contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_delta_rule import gated_delta_rule, tpu, tpu_inverse
from tests.helpers import relative_error, tree_errors
from tests.pallas_kernels.test_gated_delta_rule import ROWS, Case, documents_of, evaluate, example
from tests.pallas_kernels.test_gated_linear_attention_tpu import near_and_far


def errors(case, segment_ids, dtype=np.float32, seed=1, **replaced):
    """Of outputs and all gradients against the reference in float64, on values rounded to ``dtype``."""
    arguments = example(seed, case, segment_ids) | replaced
    for name in "qkv":
        arguments[name] = np.asarray(jnp.asarray(arguments[name], dtype), np.float64)
    expected = evaluate(case, arguments, segment_ids, "reference", np.float64)
    found = evaluate(case, arguments, segment_ids, "pallas", dtype)
    if segment_ids is not None:
        padding = np.asarray(segment_ids) == 0
        assert all(not np.any(x[padding]) for x in found.values() if x.shape[:2] == padding.shape)
    return tree_errors(found, expected)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, "fixed", H=1, HV=2),
        Case(256, "fixed", "weak", B=1, H=1, HV=1, K=130, V=4),  # wider than a register
        Case(30, "head", B=1, H=3, HV=9, documents=True),  # heads that no group of eight divides
        pytest.param(Case(1, "channel", B=1, H=1, HV=1), marks=pytest.mark.slow),
        pytest.param(Case(256, "channel", "weak", B=1, H=1, HV=1, K=130, V=4), marks=pytest.mark.slow),
        pytest.param(Case(150, "channel", B=1, H=1, HV=1, keys="long"), marks=pytest.mark.slow),
        pytest.param(Case(30, "channel", B=1, H=3, HV=9, documents=True), marks=pytest.mark.slow),
    ],
    ids=lambda case: "-".join(str(x) for x in case),
)
def test_matches_the_reference(case):
    found = errors(case, documents_of(case))
    # A hundred roundings. beta is up to 2, so that (I + A)^-1 shrinks none of them.
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize("decays", ["mixed", "strong", *(pytest.param(name, marks=pytest.mark.slow) for name in ("weak", "zero"))])
@pytest.mark.parametrize("axes", ["head", "channel"])
def test_any_decay_and_documents_anywhere(axes, decays):
    case = Case(300, axes, decays, documents=True, H=1, HV=2)  # three chunks
    for seed in range(3):
        found = errors(case, documents_of(case, seed), seed=seed)
        assert max(found.values()) < 2e-6, (seed, found)


@pytest.mark.parametrize("keys, bound", [("unit", 2e-6), ("long", 2e-6), ("same", 5e-6)])
def test_no_decay(keys, bound):
    """One key over and over with beta up to 2 is the worst that can happen to the inverse: no entry of A is small, and roundings add up."""
    case = Case(150, "none", documents=True, H=1, HV=2, keys=keys)
    for ids in (documents_of(case), jnp.ones((case.B, case.T), int)):
        found = errors(case, ids)
        assert max(found.values()) < bound, found


@pytest.mark.parametrize("keys", ["random", "close", "same"])
def test_the_inverse(keys):
    """In float32 to its rounding; for bfloat16 operands of 16 bits leave the blocks far better than their rounding to bfloat16, 1e-3."""
    rng = np.random.default_rng(0)
    k = rng.normal(size=(128, 64)) + {"random": 0, "close": 3, "same": 0}[keys] * rng.normal(size=64)
    k = np.broadcast_to(k[0], k.shape) if keys == "same" else k
    k = k / np.linalg.norm(k, axis=1, keepdims=True)
    pairs = ((k @ k.T) * rng.uniform(0, 2, 128)).astype(np.float32)
    expected = np.linalg.inv(np.eye(128) + np.tril(pairs, -1).astype(np.float64))
    blocks = np.concatenate([expected[:64, :64], expected[64:, 64:]], axis=1)
    for dtype, bound in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-4)):
        (found,) = jax.jit(lambda pairs, dtype=dtype: tpu_inverse.inverses([pairs], dtype))(pairs)
        assert relative_error(found, blocks) < bound, (keys, dtype)
        (found,) = tpu_inverse.whole([found], [jnp.asarray(pairs[64:, :64])])
        assert relative_error(found, expected) < bound, (keys, dtype)


@pytest.mark.parametrize(
    "axes, dtype, bound",
    [
        ("head", jnp.bfloat16, 8e-3),
        pytest.param("head", np.float32, 2e-6, marks=pytest.mark.slow),
        ("channel", jnp.bfloat16, 8e-3),
        pytest.param("channel", np.float32, 2e-6, marks=pytest.mark.slow),
    ],
)
def test_no_races_and_nothing_read_before_it_is_written(capsys, axes, dtype, bound):
    interpreter = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    case = Case(143, axes, B=2, H=1, HV=2 if axes == "head" else 1)
    segment_ids = np.tile(ROWS, (1, 11))[2:4]  # padding left, right, between and inside
    with pltpu.force_tpu_interpret_mode(interpreter):
        found = errors(case, segment_ids, dtype)
    # bfloat16: operands of products are rounded to 2^-9 three or four times in a row.
    assert max(found.values()) < bound, found
    assert "RACE" not in capsys.readouterr().out.upper()


@pytest.mark.slow
def test_decays_near_and_far_in_one_call(capsys):
    case = Case(497, "channel", B=1, H=1, HV=1, V=4)
    log_decay, segment_ids = near_and_far((1, 497, 1, case.K), 0.75)  # roundings add up where nothing is forgotten
    interpreter = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    with pltpu.force_tpu_interpret_mode(interpreter):
        found = errors(case, segment_ids, jnp.bfloat16, log_decay=log_decay)
    assert max(found.values()) < 8e-3, found  # as above
    assert "RACE" not in capsys.readouterr().out.upper()


def test_two_parts_are_one_sequence():
    arguments = {name: jnp.asarray(x, jnp.float32) for name, x in example(3, Case(200, "head", H=1, HV=1)).items()}
    run = jax.jit(lambda arguments: gated_delta_rule(**arguments, implementation="pallas"))

    def part(tokens, state):
        return run({name: x[:, tokens] for name, x in arguments.items()} | {"initial_state": state})

    output, final_state = part(slice(None), arguments["initial_state"])
    first, middle = part(slice(100), arguments["initial_state"])
    second, last = part(slice(100, None), middle)
    assert max(tree_errors((jnp.concatenate([first, second], axis=1), last), (output, final_state)).values()) < 1e-6


def test_checkpoint_and_vmap():
    arguments = {name: jnp.asarray(x, jnp.float32) for name, x in example(4, Case(130, "head", B=1, H=1, HV=1)).items()}

    def loss(arguments):
        output, state = gated_delta_rule(**arguments, implementation="pallas")
        return jnp.sum(output**2) + jnp.sum(state**2)

    plain = jax.jit(jax.grad(loss))(arguments)
    again = jax.jit(jax.grad(jax.checkpoint(loss)))(arguments)
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arguments))
    assert max(tree_errors(again, plain).values()) < 1e-6
    assert max(tree_errors(jax.tree.map(lambda x: x[0], mapped), plain).values()) < 1e-6


def test_what_the_kernel_does_not_take_is_refused_by_name_and_not_chosen():
    with jax.enable_x64(True):
        double = example(0, Case(5, "none"))
        with pytest.raises(ValueError, match="q has dtype float64, needs float32 or bfloat16 for implementation='pallas'"):
            gated_delta_rule(**double, implementation="pallas")
        assert gated_delta_rule(**double)[0].dtype == jnp.float64


@pytest.mark.parametrize("axes", ["none", "head", "channel"])
def test_chosen_where_it_is_lowered_for_a_tpu(axes):
    arguments = {name: jnp.asarray(x, jnp.float32) for name, x in example(0, Case(140, axes, H=1, HV=1)).items()}
    program = jax.jit(lambda arguments: gated_delta_rule(**arguments))
    text = {platform: jax.export.export(program, platforms=[platform])(arguments).mlir_module() for platform in ("tpu", "cpu")}
    assert "tpu_custom_call" in text["tpu"] and "tpu_custom_call" not in text["cpu"]
    assert tpu.is_faster(*(arguments.get(name) for name in ("q", "k", "v", "beta", "log_decay")))
