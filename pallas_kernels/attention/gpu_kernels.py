"""The bodies of attention's Mosaic GPU kernels, for Hopper: the output, the gradient of q, and those of k and v.

A program has a tile of TILE tokens of one head at a time, half of it for each of two compute warpgroups, and goes through blocks of the
tokens of the other side, which a third warpgroup loads ahead of them, those of the program's next tile behind those of this one:

    of_queries    a tile of queries, blocks of keys     m, l, acc as in FlashAttention
    d_queries     a tile of queries, blocks of keys     dq_i = scale * sum_j ds_ij k_j
    d_keys        a tile of keys, blocks of queries     dv_j = sum_i p_ij do_i    dk_j = scale * sum_i ds_ij q_i

with p_ij = exp(scale q_i . k_j - logsumexp_i) and ds_ij = p_ij (do_i . v_j - mean_i). Exponentials are powers of two, and so are the
logsumexps between the kernels. A query i attends to the key j where 0 <= key_j - first_i < count_i (:mod:`.reach`). Of a tile's blocks
(:mod:`.gpu_schedule`, ``items``) those come first in which some of its tokens do not attend, or are not attended to, by some of the
others, and then, without a look at who attends to whom, those in which all do.
"""

import math
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.gpu_schedule import TILE, Item
from pallas_kernels.attention.reference import MASKED

WARPGROUPS = 2  # that compute
ROWS = TILE // WARPGROUPS  # of the tile, a warpgroup: what one wgmma has
STAGES = 2  # blocks in shared memory at a time
LOG2E = math.log2(math.e)
# Of 64K registers, what two computing warpgroups and one that loads may take.
COMPUTE_REGISTERS, LOAD_REGISTERS = 232, 40
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def tokens(count: int, width: int, stages: int) -> plgpu.SMEM:
    """Scratch for ``stages`` times [count,width] of bfloat16, as wgmma wants its operands."""
    return plgpu.SMEM((stages, count, width), jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def numbers(count: int, dtype, stages: int) -> plgpu.SMEM:
    return plgpu.SMEM((stages, count), dtype)


def of_queries(plan, q, k, v, first, count, key, items, output, logsumexp, own, made, streamed, barriers):
    """own: q, first, count; made: output, logsumexp; streamed: k, v, key."""
    scale = plan.scale * LOG2E

    def load_own(item, wg, slots, loaded):
        rows = _rows(item, wg)
        _copy((q.at[item.b, rows, item.h], first.at[item.b, rows], count.at[item.b, rows]), slots, loaded)

    def compute(item, wg, slots, each_block):
        q_smem, first_smem, count_smem = slots
        o_smem, lse_smem = (ref.at[wg] for ref in made)
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
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
        o_smem[...] = (acc * _across(1 / total, acc)).astype(o_smem.dtype)
        lse_smem[...] = jnp.where(nothing, 0.0, m * scale + jnp.log2(total))
        plgpu.commit_smem()
        rows = _rows(item, wg)
        plgpu.copy_smem_to_gmem(o_smem, output.at[item.b, rows, item.h])
        plgpu.copy_smem_to_gmem(lse_smem, logsumexp.at[item.b, item.h, rows])

    _go_through(plan, items, own, load_own, partial(_load_keys, plan, (k, v, key), streamed), compute, barriers)


def d_queries(plan, q, k, v, d_output, first, count, key, items, logsumexp, mean, dq, own, streamed, barriers):
    """own: q, d_output, first, count, logsumexp, mean; streamed: k, v, key."""

    def load_own(item, wg, slots, loaded):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of what was made in their place
        _copy(_of_queries((q, d_output, first, count, logsumexp, mean), item, _rows(item, wg)), slots, loaded)

    def compute(item, wg, slots, each_block):
        q_smem, do_smem, *numbers_smem = slots
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
        plgpu.copy_smem_to_gmem(q_smem, dq.at[item.b, _rows(item, wg), item.h])

    _go_through(plan, items, own, load_own, partial(_load_keys, plan, (k, v, key), streamed), compute, barriers)


def d_keys(plan, q, k, v, d_output, first, count, key, items, logsumexp, mean, dk, dv, own, streamed, barriers):
    """own: k, v, key; streamed: q, d_output, first, count, logsumexp, mean. For one head of queries."""

    def load_own(item, wg, slots, loaded):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of what was made in their place
        rows, head = _rows(item, wg), _shared_head(plan, item)
        _copy((k.at[item.b, rows, head], v.at[item.b, rows, head], key.at[item.b, rows]), slots, loaded)

    def load(item, step, slot, loaded):
        at = pl.ds(item.visits.block(step) * plan.block, plan.block)
        _copy(_of_queries((q, d_output, first, count, logsumexp, mean), item, at), (ref.at[slot] for ref in streamed), loaded)

    def compute(item, wg, slots, each_block):
        k_smem, v_smem, key_smem = slots
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
        rows = _rows(item, wg)
        plgpu.copy_smem_to_gmem(k_smem, dk.at[item.b, rows, item.h])
        plgpu.copy_smem_to_gmem(v_smem, dv.at[item.b, rows, item.h])

    _go_through(plan, items, own, load_own, load, compute, barriers)


def _rows(item, wg):
    return pl.ds(item.tile * TILE + wg * ROWS, ROWS)


def _shared_head(plan, item):
    """Of keys and values."""
    return lax.div(item.h, jnp.int32(plan.group))


def _go_through(plan, items, own, load_own: Callable, load: Callable, compute: Callable, barriers) -> None:
    """A program: ``compute(item, wg, slots, each_block)`` of all its items on the computing warpgroups, for which the last one does
    ``load(item, step, slot, loaded)`` ahead of them, all items' blocks in a row.

    items: :func:`.gpu_schedule.dealt`; own: a tile's scratch, of which a warpgroup has one or two, in turn, and fills them by
    ``load_own(item, wg, slots, loaded)``, with two of them an item ahead. each_block(body, carry): carry = body(slot, carry, whole) for
    each step. barriers: of blocks loaded, of blocks read, of tiles loaded.
    """
    wg, item_at = lax.axis_index("wg"), partial(Item.read, items, lax.axis_index("program"))  # four items are a line of the cache
    behind = item_at(items.shape[1] - 1)

    @pl.when(wg < WARPGROUPS)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        _compute_items(wg, behind.tile, item_at, own, load_own, compute, barriers)

    @pl.when(wg == WARPGROUPS)
    def _():
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
        _load_items(behind, item_at, load, barriers)


def _compute_items(wg, count, item_at, own, load_own, compute, barriers):
    loaded, consumed, own_loaded = barriers
    turns = own[0].shape[0] // WARPGROUPS

    def load(n):
        at = wg * turns + lax.rem(n, jnp.int32(turns))
        load_own(item_at(n), wg, [ref.at[at] for ref in own], own_loaded.at[at])

    if turns > 1:
        pl.when(count > 0)(lambda: load(jnp.int32(0)))

    @pl.loop(0, count)
    def _(n):
        if turns == 1:
            load(n)
        else:
            pl.when(n + 1 < count)(lambda: load(n + 1))
        item, at = item_at(n), wg * turns + lax.rem(n, jnp.int32(turns))
        plgpu.barrier_wait(own_loaded.at[at])

        def each_block(body, *accumulators, carry=None):
            def step(i, carry, whole):
                slot = lax.rem(item.before + i, jnp.int32(STAGES))
                plgpu.barrier_wait(loaded.at[slot])
                carry = body(*accumulators, slot, whole) if carry is None else body(slot, carry, whole)
                plgpu.commit_smem()  # what was read here comes before what TMA, another proxy, writes there next
                plgpu.barrier_arrive(consumed.at[slot])
                return carry

            carry = lax.fori_loop(0, item.visits.checked, partial(step, whole=False), carry)
            return lax.fori_loop(item.visits.checked, item.visits.steps, partial(step, whole=True), carry)

        compute(item, wg, [ref.at[at] for ref in own], each_block)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _load_items(behind, item_at, load, barriers):
    loaded, consumed, _ = barriers

    def until_read(at):
        slot = lax.rem(at, jnp.int32(STAGES))
        pl.when(at >= STAGES)(lambda: plgpu.barrier_wait(consumed.at[slot]))
        return slot

    @pl.loop(0, behind.tile)
    def _(n):
        item = item_at(n)

        @pl.loop(0, item.visits.steps)
        def _(i):
            slot = until_read(item.before + i)
            load(item, i, slot, loaded.at[slot])

    for i in range(STAGES):
        until_read(behind.before + i)


def _load_keys(plan, arrays, streamed, item, step, slot, loaded):
    """The ``step``-th block of keys of an item: of k and v [B,T,HK,...] and key [B,T]."""
    (k, v, key), b, head = arrays, item.b, _shared_head(plan, item)
    at = pl.ds(item.visits.block(step) * plan.block, plan.block)
    _copy((k.at[b, at, head], v.at[b, at, head], key.at[b, at]), (ref.at[slot] for ref in streamed), loaded)


def _of_queries(arrays, item, rows):
    """What the gradients ask of queries: of q and d_output [B,T,H,...], first and count [B,T], logsumexp and mean [B,H,T]."""
    (q, d_output, first, count, logsumexp, mean), b, h = arrays, item.b, item.h
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
