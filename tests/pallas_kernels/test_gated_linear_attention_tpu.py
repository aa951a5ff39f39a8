"""The TPU kernels of linear attention with decay, interpreted: against the reference in float64, and their contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_linear_attention import gated_linear_attention, tpu, tpu_decays, tpu_near
from tests.helpers import relative_error, tree_errors
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


def near_and_far(shape, least):
    """Log decays [1,497,HV,K], from ``least`` times the strongest one, and ids of documents, four chunks of 128 tokens: decays near to the
    middles of blocks, just too far in one channel, a document that starts, near again and padding at the end."""
    log_decay, segment_ids = np.zeros(shape) - 1.25 * np.linspace(least, 1, shape[-1]), np.ones(shape[:2], int)
    log_decay[:, 128:256, -1, -1] = -1.35  # 2^-62 in the 32 tokens between a middle and an end; the others' -1.25 makes 2^-58 at most
    segment_ids[:, 300:] = 2
    segment_ids[:, 480:] = 0
    return log_decay - 1e-3 * np.random.default_rng(0).random(shape), segment_ids


@pytest.mark.parametrize("detect_races", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_decays_near_and_far_in_one_call(capsys, detect_races):
    case = Case(497, "channel", B=1, H=1, HV=1, V=4)
    arguments = example(5, case)
    arguments["log_decay"], segment_ids = near_and_far(arguments["log_decay"].shape, 0)
    resets = np.where(np.arange(497)[:, None, None] == 300, tpu_decays.RESET, arguments["log_decay"][0])
    chunks = np.pad(resets.reshape(497, -1), [(0, 15), (0, 0)]).reshape(4, 128, -1)
    assert [bool(tpu_near.are_near(jnp.asarray(x, jnp.float32))) for x in chunks] == [True, False, False, True]
    interpreter = pltpu.InterpretParams(detect_races=detect_races, uninitialized_memory="nan", out_of_bounds_reads="raise")
    with pltpu.force_tpu_interpret_mode(interpreter):
        found = errors(arguments, segment_ids, "pallas", jnp.bfloat16, state_dtype=jnp.float32)
    assert max(found.values()) < 6e-3, found  # as above
    assert "RACE" not in capsys.readouterr().out.upper()


def test_pairs_of_near_decays():
    """Scores and gradients by decays to and from middles, in float32, against the definition in float64: exp of sums of up to 42."""
    rng, C, K = np.random.default_rng(6), 128, 16
    q, k, *d_scores = (rng.normal(size=(C, width)).astype(np.float32) for width in (K, K, C, C))
    log_decay = (-1.3 * rng.random(K) * rng.random((C, K))).astype(np.float32)
    (decays,) = tpu_near.near_decays(jnp.asarray(log_decay), tpu_decays.spans(jnp.float32)[4 * tpu_decays.PART :], 1)

    def returned(generator):
        while True:
            try:
                next(generator)
            except StopIteration as end:
                return end.value

    scores = returned(decays.scores([q, k], k, jnp.float32))
    gradients = returned(decays.gradients(d_scores, [q, k], k, jnp.float32))
    sums = np.cumsum(log_decay.astype(np.float64), axis=0)
    between = np.exp(np.where(np.tri(C, dtype=bool)[:, :, None], sums[:, None] - sums, -np.inf))
    expected = [np.einsum("ik,jk,ijk->ij", x, k, between) for x in (q, k)]
    d_rows = [np.einsum("ij,jk,ijk->ik", d, k, between) for d in d_scores]
    d_k = sum(np.einsum("ij,ik,ijk->jk", d, x, between) for d, x in zip(d_scores, (q, k), strict=True))
    at = (decays.since_start, np.exp(sums)), (decays.until_end, np.exp(sums[-1] - sums)), (decays.total, np.exp(sums[-1:]))
    pairs = *zip(scores, expected, strict=True), *zip(gradients.rows, d_rows, strict=True), (gradients.k, d_k), *at
    assert all(relative_error(found, exact) < 5e-6 for found, exact in pairs)
    assert all(relative_error(*x) < 1e-6 for x in ((gradients.met[0], q), (gradients.met_k, k)))


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
