"""The bodies of attention's Mosaic GPU kernels, for Hopper: the output, the gradient of q, and those of k and v.

A program has a tile of TILE tokens of one head, half of it for each of two compute warpgroups, and goes through blocks of the tokens
of the other side, which a third warpgroup loads ahead of them:

    of_queries    a tile of queries, blocks of keys     m, l, acc as in FlashAttention
    d_queries     a tile of queries, blocks of keys     dq_i = scale * sum_j ds_ij k_j
    d_keys        a tile of keys, blocks of queries     dv_j = sum_i p_ij do_i    dk_j = scale * sum_i ds_ij q_i

with p_ij = exp(scale q_i . k_j - logsumexp_i) and ds_ij = p_ij (do_i . v_j - mean_i). Exponentials are powers of two, and so are the
logsumexps between the kernels. A query i attends to the key j where 0 <= key_j - first_i < count_i (:mod:`.reach`). A tile goes through the
blocks that ``visits`` [B,tiles,4] has of it (:class:`Visits`): first those in which some of its tokens do not attend, or are not attended
to, by some of the others, and then, without a look at who attends to whom, those in which all do.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.reference import MASKED

WARPGROUPS = 2  # that compute
ROWS = 64  # of the tile, a warpgroup: what one wgmma has
TILE = WARPGROUPS * ROWS
STAGES = 2  # blocks in shared memory at a time
LOG2E = math.log2(math.e)
# Of 64K registers, what two computing warpgroups and one that loads may take.
COMPUTE_REGISTERS, LOAD_REGISTERS = 232, 40


class Visits(NamedTuple):
    """Blocks from ``begin`` to before ``end``, of those from ``whole`` to before ``whole_end`` all pairs of tokens; [...] int32 each."""

    begin: jax.Array
    whole: jax.Array
    whole_end: jax.Array
    end: jax.Array

    @classmethod
    def of_tile(cls, ref, b, tile) -> "Visits":
        return cls(*(ref[b, tile, i] for i in range(4)))

    @property
    def checked(self):
        """How many come first, not whole."""
        return self.whole - self.begin + self.end - self.whole_end

    @property
    def steps(self):
        return self.end - self.begin

    def block(self, step):
        """The ``step``-th block gone through."""
        before = self.whole - self.begin
        checked = self.begin + step + jnp.where(step < before, 0, self.whole_end - self.whole)
        return jnp.where(step < self.checked, checked, self.whole + step - self.checked)


ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def tokens(count: int, width: int, stages: int) -> plgpu.SMEM:
    """Scratch for ``stages`` times [count,width] of bfloat16, as wgmma wants its operands."""
    return plgpu.SMEM((stages, count, width), jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def numbers(count: int, dtype, stages: int) -> plgpu.SMEM:
    return plgpu.SMEM((stages, count), dtype)


def of_queries(plan, q, k, v, first, count, key, visits, output, logsumexp, own, streamed, barriers):
    """own: q, first, count, output, logsumexp; streamed: k, v, key."""
    b, tile, h, kv_head = _program(plan, heavy_last=True)
    visits = Visits.of_tile(visits, b, tile)
    load = partial(_load_keys, plan, (k, v, key), streamed, b, kv_head, visits)
    scale = plan.scale * LOG2E

    def compute(wg, each_block):
        rows = pl.ds(tile * TILE + wg * ROWS, ROWS)
        q_smem, first_smem, count_smem, o_smem, lse_smem = (ref.at[wg] for ref in own)
        _copy((q.at[b, rows, h], first.at[b, rows], count.at[b, rows]), (q_smem, first_smem, count_smem), barriers[2].at[wg])
        plgpu.barrier_wait(barriers[2].at[wg])
        first_of, count_of = _row(first_smem), _row(count_smem)

        def block(slot, carry, whole):
            m, total, acc = carry
            k_smem, v_smem, key_smem = (ref.at[slot] for ref in streamed)
            scores = _product(q_smem, k_smem.T)
            if not whole:
                attends = _attends(_across(first_of, scores), _across(count_of, scores), _along(_column(key_smem), scores))
                scores = jnp.where(attends, scores, MASKED)
            m_next = jnp.maximum(m, scores.max(axis=1))  # of scores without their scale, which with a difference is one instruction
            # While nothing is attended to, less than nothing is subtracted, so that what is masked weighs nothing.
            weights = jnp.exp2(scores * scale - _across(jnp.maximum(m_next, MASKED / 2) * scale, scores))
            decay = jnp.exp2((m - m_next) * scale)
            total = decay * total + weights.sum(axis=1)
            acc = _across(decay, acc) * acc + _product(weights.astype(jnp.bfloat16), v_smem)
            return m_next, total, acc

        start = _full((ROWS,), MASKED, ROW), _full((ROWS,), 0, ROW), _full((ROWS, plan.values), 0, plgpu.Layout.WGMMA)
        m, total, acc = each_block(block, carry=start)
        nothing = total == 0  # what padding attends to
        total = jnp.where(nothing, 1.0, total)
        o_smem[...] = (acc * _across(1 / total, acc)).astype(o_smem.dtype)
        lse_smem[...] = jnp.where(nothing, 0.0, m * scale + jnp.log2(total))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_smem, output.at[b, rows, h])
        plgpu.copy_smem_to_gmem(lse_smem, logsumexp.at[b, h, rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    _stream(visits, load, compute, barriers)


def d_queries(plan, q, k, v, d_output, first, count, key, visits, logsumexp, mean, dq, own, streamed, barriers):
    """own: q, d_output, first, count, logsumexp, mean; streamed: k, v, key."""
    b, tile, h, kv_head = _program(plan, heavy_last=True)
    visits = Visits.of_tile(visits, b, tile)
    load = partial(_load_keys, plan, (k, v, key), streamed, b, kv_head, visits)

    def compute(wg, each_block):
        rows = pl.ds(tile * TILE + wg * ROWS, ROWS)
        q_smem, do_smem, *numbers_smem = (ref.at[wg] for ref in own)
        sources = _of_queries((q, d_output, first, count, logsumexp, mean), b, rows, h)
        _copy(sources, (q_smem, do_smem, *numbers_smem), barriers[2].at[wg])
        plgpu.barrier_wait(barriers[2].at[wg])
        first_of, count_of, lse, delta = (_row(ref) for ref in numbers_smem)

        def block(acc, slot, whole):
            k_smem, v_smem, key_smem = (ref.at[slot] for ref in streamed)
            scores = _product(q_smem, k_smem.T)
            weights = jnp.exp2(scores * (plan.scale * LOG2E) - _across(lse, scores))
            if not whole:
                attends = _attends(_across(first_of, scores), _across(count_of, scores), _along(_column(key_smem), scores))
                weights = jnp.where(attends, weights, 0)
            d_weights = _product(do_smem, v_smem.T)
            d_scores = weights * (d_weights - _across(delta, scores))
            plgpu.wgmma(acc, d_scores.astype(jnp.bfloat16), k_smem)
            plgpu.wgmma_wait(0)

        (acc,) = _accumulated([plan.keys], partial(each_block, block))
        q_smem[...] = (acc * plan.scale).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, dq.at[b, rows, h])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    _stream(visits, load, compute, barriers)


def d_keys(plan, q, k, v, d_output, first, count, key, visits, logsumexp, mean, dk, dv, own, streamed, barriers):
    """own: k, v, key; streamed: q, d_output, first, count, logsumexp, mean. For one head of queries."""
    b, tile, h, kv_head = _program(plan, heavy_last=False)
    visits = Visits.of_tile(visits, b, tile)

    def load(step, slot, loaded):
        at = pl.ds(visits.block(step) * plan.block, plan.block)
        _copy(_of_queries((q, d_output, first, count, logsumexp, mean), b, at, h), (ref.at[slot] for ref in streamed), loaded)

    def compute(wg, each_block):
        rows = pl.ds(tile * TILE + wg * ROWS, ROWS)
        k_smem, v_smem, key_smem = (ref.at[wg] for ref in own)
        _copy((k.at[b, rows, kv_head], v.at[b, rows, kv_head], key.at[b, rows]), (k_smem, v_smem, key_smem), barriers[2].at[wg])
        plgpu.barrier_wait(barriers[2].at[wg])
        keys = _row(key_smem)

        def block(acc_k, acc_v, slot, whole):
            q_smem, do_smem, first_smem, count_smem, lse_smem, mean_smem = (ref.at[slot] for ref in streamed)
            scores = _product(k_smem, q_smem.T)
            weights = jnp.exp2(scores * (plan.scale * LOG2E) - _along(_column(lse_smem), scores))
            if not whole:
                first_of, count_of = (_along(_column(ref), scores) for ref in (first_smem, count_smem))
                weights = jnp.where(_attends(first_of, count_of, _across(keys, scores)), weights, 0)
            plgpu.wgmma(acc_v, weights.astype(jnp.bfloat16), do_smem)
            d_weights = _product(v_smem, do_smem.T)
            d_scores = weights * (d_weights - _along(_column(mean_smem), scores))
            plgpu.wgmma(acc_k, d_scores.astype(jnp.bfloat16), q_smem)
            plgpu.wgmma_wait(0)

        acc_k, acc_v = _accumulated([plan.keys, plan.values], partial(each_block, block))
        k_smem[...], v_smem[...] = (acc_k * plan.scale).astype(k_smem.dtype), acc_v.astype(v_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_smem, dk.at[b, rows, h])
        plgpu.copy_smem_to_gmem(v_smem, dv.at[b, rows, h])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    _stream(visits, load, compute, barriers)


def _program(plan, heavy_last: bool):
    """(b, tile, h, the head of keys and values) of this program: tiles with the most blocks begin first."""
    tile, h = lax.axis_index("tile"), lax.axis_index("head")
    return lax.axis_index("batch"), plan.tiles - 1 - tile if heavy_last else tile, h, lax.div(h, jnp.int32(plan.group))


def _stream(visits: Visits, load: Callable, compute: Callable, barriers) -> None:
    """Run ``compute(wg, each_block)`` on the computing warpgroups, for which the last one does ``load(step, slot, loaded)`` ahead of them.

    each_block(body, carry): carry = body(slot, carry, whole) for each step. barriers: of slots loaded, of slots read, of the tile.
    """
    loaded, consumed, _ = barriers
    wg = lax.axis_index("wg")

    @pl.when(wg < WARPGROUPS)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

        def each_block(body, *accumulators, carry=None):
            def step(i, carry, whole):
                slot = lax.rem(i, jnp.int32(STAGES))
                plgpu.barrier_wait(loaded.at[slot])
                carry = body(*accumulators, slot, whole) if carry is None else body(slot, carry, whole)
                plgpu.commit_smem()  # what was read here comes before what TMA, another proxy, writes there next
                plgpu.barrier_arrive(consumed.at[slot])
                return carry

            carry = lax.fori_loop(0, visits.checked, partial(step, whole=False), carry)
            return lax.fori_loop(visits.checked, visits.steps, partial(step, whole=True), carry)

        compute(wg, each_block)

    @pl.when(wg == WARPGROUPS)
    def _():
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")

        @pl.loop(0, visits.steps + STAGES)
        def _(i):
            slot = lax.rem(i, jnp.int32(STAGES))

            @pl.when(i >= STAGES)
            def _():
                plgpu.barrier_wait(consumed.at[slot])

            @pl.when(i < visits.steps)
            def _():
                load(i, slot, loaded.at[slot])


def _load_keys(plan, arrays, streamed, b, head, visits, step, slot, loaded):
    """The ``step``-th block of keys of ``visits``: of k and v [B,T,HK,...] and key [B,T]."""
    k, v, key = arrays
    at = pl.ds(visits.block(step) * plan.block, plan.block)
    _copy((k.at[b, at, head], v.at[b, at, head], key.at[b, at]), (ref.at[slot] for ref in streamed), loaded)


def _of_queries(arrays, b, rows, h):
    """What the gradients ask of queries: of q and d_output [B,T,H,...], first and count [B,T], logsumexp and mean [B,H,T]."""
    q, d_output, first, count, logsumexp, mean = arrays
    return q.at[b, rows, h], d_output.at[b, rows, h], first.at[b, rows], count.at[b, rows], logsumexp.at[b, h, rows], mean.at[b, h, rows]


def _copy(sources, targets, arrived):
    for source, target in zip(sources, targets, strict=True):
        plgpu.copy_gmem_to_smem(source, target, arrived)


def _attends(first, count, key):
    """Of pairs of tokens; one comparison, without a sign, in which all before the first are far behind the last."""
    return (key - first).astype(jnp.uint32) < count.astype(jnp.uint32)


def _product(a, b):
    """a [64,K] @ b [K,N]; b, and a or not, references to shared memory."""

    def run(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, b.shape[1]), jnp.float32))


def _accumulated(widths, run):
    """What ``run`` adds to accumulators [64,width]."""

    def scoped(*accs):
        run(*accs)
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(scoped, *(plgpu.ACC((ROWS, width), jnp.float32) for width in widths))


def _full(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _row(ref):
    return plgpu.layout_cast(ref[...], ROW)


def _column(ref):
    return plgpu.layout_cast(ref[...], COLUMN)


def _across(row, like):
    return lax.broadcast_in_dim(row, like.shape, [0])


def _along(column, like):
    return lax.broadcast_in_dim(column, like.shape, [1])
