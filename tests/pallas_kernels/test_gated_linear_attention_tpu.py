"""The TPU kernels of linear attention with decay, interpreted: against the reference in float64, and their contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_linear_attention import gated_linear_attention, tpu
from tests.helpers import tree_errors
from tests.pallas_kernels.test_gated_linear_attention import ROWS, Case, documents, errors, example, value_and_gradients


@pytest.mark.parametrize(
    "case",
    [
        Case(1, "head", HV=2),
        Case(70, "fixed", documents=True, HV=2),
        Case(300, "head", documents=True),  # three chunks
        pytest.param(Case(300, "head", "strong", B=1, HV=2), marks=pytest.mark.slow),
        Case(256, "head", "none", B=1, H=1, HV=2),
        Case(256, "fixed", "weak", B=1, H=1, HV=1, K=130, V=4),  # wider than a register
        Case(130, "head", B=1, H=3, HV=9),  # heads that no group of eight divides
        Case(1, "channel", B=1, HV=2),
        Case(300, "channel", documents=True, H=1, HV=2),  # grouped values
        pytest.param(Case(200, "channel", "strong", B=1, H=1, HV=1), marks=pytest.mark.slow),
        pytest.param(Case(256, "channel", "none", B=1, H=1, HV=2), marks=pytest.mark.slow),
        Case(130, "channel", "weak", B=1, H=1, HV=1, K=130, V=4),
    ],
    ids=str,
)
def test_matches_the_reference(case):
    segment_ids = documents(1, case)
    found = errors(example(1, case, segment_ids), segment_ids, "pallas", jnp.float32)
    # Sums of a hundred terms in another order than the reference's; none is amplified, for decays are at most 1.
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize(
    "axes, dtype, bound",
    [
        ("head", jnp.float32, 2e-6),
        ("channel", jnp.bfloat16, 6e-3),
        pytest.param("head", jnp.bfloat16, 6e-3, marks=pytest.mark.slow),
        pytest.param("channel", jnp.float32, 2e-6, marks=pytest.mark.slow),
    ],
)
def test_no_races_and_nothing_read_before_it_is_written(capsys, axes, dtype, bound):
    interpreter = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    case = Case(143, axes, H=1, HV=1)
    segment_ids = np.tile(ROWS, (1, 11))[2:4]  # padding left, right, between and inside
    with pltpu.force_tpu_interpret_mode(interpreter):
        found = errors(example(0, case, segment_ids), segment_ids, "pallas", dtype, state_dtype=jnp.float32)
    # bfloat16: operands of products are rounded to 2^-9 two or three times in a row.
    assert max(found.values()) < bound, found
    assert "RACE" not in capsys.readouterr().out.upper()


@pytest.mark.parametrize("axes", ["head", "channel"])
def test_two_parts_are_one_sequence(axes):
    case = Case(200, axes, B=1, H=1, HV=1)
    arguments = {name: jnp.asarray(x, jnp.float32) for name, x in example(3, case).items()}

    def part(tokens, state):
        own = {name: x[:, tokens] for name, x in arguments.items() if name != "initial_state"}
        return gated_linear_attention(**own, initial_state=state, implementation="pallas")

    o, final_state = part(slice(None), arguments["initial_state"])
    first, middle = part(slice(77), arguments["initial_state"])
    second, last = part(slice(77, None), middle)
    assert max(tree_errors((jnp.concatenate([first, second], axis=1), last), (o, final_state)).values()) < 1e-6


def test_checkpoint_and_vmap():
    arguments = {name: jnp.asarray(x, jnp.float32) for name, x in example(4, Case(130, "head", B=1, H=1, HV=1)).items()}
    expected = value_and_gradients(arguments, None, "pallas")

    def loss(arguments):
        o, state = gated_linear_attention(**arguments, implementation="pallas")
        return jnp.sum(o**2) + jnp.sum(state**2)

    plain = jax.jit(jax.grad(loss))(arguments)
    again = jax.jit(jax.grad(jax.checkpoint(loss)))(arguments)
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arguments))
    assert max(tree_errors(again, plain).values()) < 1e-6
    assert max(tree_errors(jax.tree.map(lambda x: x[0], mapped), plain).values()) < 1e-6
    assert expected["o"].shape == arguments["v"].shape


def test_what_the_kernel_does_not_take_is_refused_by_name_and_not_chosen():
    with jax.enable_x64(True):
        double = example(0, Case(5, "head"))
        with pytest.raises(ValueError, match="q has dtype float64, needs float32 or bfloat16 for implementation='pallas'"):
            gated_linear_attention(**double, implementation="pallas")
        assert gated_linear_attention(**double)[0].dtype == jnp.float64


@pytest.mark.parametrize("axes", ["head", "channel"])
def test_chosen_where_it_is_lowered_for_a_tpu(axes):
    arguments = {name: jnp.asarray(x, jnp.float32) for name, x in example(0, Case(140, axes, HV=2)).items()}
    program = jax.jit(lambda arguments: gated_linear_attention(**arguments))
    text = {platform: jax.export.export(program, platforms=[platform])(arguments).mlir_module() for platform in ("tpu", "cpu")}
    assert "tpu_custom_call" in text["tpu"] and "tpu_custom_call" not in text["cpu"]
    assert tpu.is_faster(*(arguments[name] for name in ("q", "k", "v", "log_decay")))
