"""Collectives read from an optimized module: which there are, how much each sends, which axes of the mesh it crosses, how long it takes."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments.compiled import hlo
from experiments.compiled.collectives import Collective, collectives, groups, sent, total
from hybrid_jax.chips import CHIPS
from launch import accelerators
from launch.chips import LINKS, Place, network, network_seconds
from launch.topologies import CARDS
from pallas_kernels.platforms import GENERATIONS

SHAPE = {"data": 2, "fsdp": 2, "seq": 1, "tensor": 2}


@pytest.mark.parametrize(
    "attributes, expected",
    [
        ("replica_groups={{0,1},{2,3}}, use_global_device_ids=true", [(0, 1), (2, 3)]),
        ("channel_id=1, replica_groups={}, to_apply=%add", [(0, 1, 2, 3)]),
        ("replica_groups=[2,2]<=[4], dimensions={0}", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [(0, 2), (1, 3)]),
        ("replica_groups=[1,4]<=[2,2]T(1,0)", [(0, 2, 1, 3)]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2] {'axis_2'}, use_global_device_ids=true", [(0, 1), (2, 3)]),
        ("replica_groups=mesh[a=2,b=2] {a}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh[a=4] {a:(1)2}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh[a=4] {a:(2)2}", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh[a=2,b=2], device_ids=(3,1,2,0) {b}", [(3, 1), (2, 0)]),
        ("source_target_pairs={{0,1},{1,0}}, channel_id=2", [(0, 1), (1, 0)]),
    ],
)
def test_groups(attributes, expected):
    assert groups(attributes, 4) == expected


def test_groups_that_cannot_be_read_are_told():
    with pytest.raises(ValueError, match="cannot be read: replica_groups=V9"):
        groups("replica_groups=V9", 4)


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_groups_by_axes_are_those_of_numpy(sizes, data):
    chosen = data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1))
    order = sorted(chosen) + sorted(set(range(len(sizes))) - chosen)
    members = np.prod([sizes[i] for i in chosen])
    expected = np.arange(np.prod(sizes)).reshape(sizes).transpose(order).reshape(members, -1).T
    mesh = ",".join(f"'axis_{i}'={size}" for i, size in enumerate(sizes))
    found = groups(f"replica_groups=mesh[{mesh}] {{{','.join(f'axis_{i}' for i in sorted(chosen))}}}", expected.size)
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected.tolist()))


LINES = """\
HloModule jit_f

%all-reduce-scatter.1 (input: f32[8,16]) -> f32[2,16] {
  %input = f32[8,16]{1,0} parameter(0)
  %all-reduce.1 = f32[8,16]{1,0} all-reduce(%input), channel_id=1, replica_groups=[2,4]<=[2,4], use_global_device_ids=true, to_apply=%add
  ROOT %slice = f32[2,16]{1,0} dynamic-slice(%all-reduce.1, %zero), dynamic_slice_sizes={2,16}
}

%body (b: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %b = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%b), index=1
  %scattered = f32[2,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %start = (f32[2,16]{1,0}, f32[8,16]{1,0}) all-gather-start(%scattered), channel_id=2, replica_groups=[2,4]<=[2,4], dimensions={0}
  %done = f32[8,16]{1,0} all-gather-done(%start)
  %one = s32[] constant(1)
  %i.2 = s32[] add(%i, %one)
  ROOT %next = (s32[], f32[8,16]{1,0}) tuple(%i.2, %done)
}

%condition (c: (s32[], f32[8,16])) -> pred[] {
  %c = (s32[], f32[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(5)
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

%wrapped (w: bf16[8]) -> bf16[8] {
  %w = bf16[8]{0} parameter(0)
  ROOT %inner = bf16[8]{0} all-to-all(%w), channel_id=3, replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}
}

ENTRY %main (x.0: f32[8,16], y: bf16[8]) -> f32[8,16] {
  %x.0 = f32[8,16]{1,0} parameter(0)
  %y = bf16[8]{0} parameter(1)
  %zero.1 = s32[] constant(0)
  %carry = (s32[], f32[8,16]{1,0}) tuple(%zero.1, %x.0)
  %loop = (s32[], f32[8,16]{1,0}) while(%carry), condition=%condition, body=%body
  %begun = ((bf16[8]{0}), bf16[8]{0}, u32[]) async-start(%y), calls=%wrapped
  %ended = bf16[8]{0} async-done(%begun)
  %alone = bf16[8]{0} all-reduce(%ended), channel_id=4, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %sent = (bf16[8]{0}, bf16[8]{0}, u32[]) collective-permute-start(%alone), channel_id=5, source_target_pairs={{0,1},{1,0},{2,2}}
  %received = bf16[8]{0} collective-permute-done(%sent)
  %token = token[] after-all()
  %told = (bf16[8]{0}, u32[], token[]) send(%y, %token), channel_id=6, is_host_transfer=true, TO_THE_OTHER_SLICE
  ROOT %out = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
""".replace(
    "TO_THE_OTHER_SLICE",
    'frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.222_0",_xla_megascale_reduce_operation="SUM",'
    '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}',
)


def test_loops_asynchronous_forms_fusions_and_slices():
    found = total(collectives(hlo.Module(LINES), 8), SHAPE)
    in_loop = ("fsdp", "tensor")  # groups of four neighbours
    array = 8 * 16 * 4
    assert {(row["kind"], row["axes"]): (row["count"], row["bytes"]) for row in found} == {
        ("reduce-scatter", in_loop): (5, 5 * array * 3 / 4),
        ("all-gather", in_loop): (5, 5 * array * 3 / 4),
        ("all-to-all", ("data",)): (1, 16 / 2),
        ("all-reduce", ("data",)): (1, 2 * 16 / 2),
        ("collective-permute", ("tensor",)): (1, 16),
    }


def test_a_compiled_program_says_what_was_asked_for():
    """One collective of each kind, along a known axis each, on eight devices in an order of our own."""
    order = np.random.default_rng(0).permutation(8)
    devices = np.array(jax.devices("cpu"))[order].reshape(*SHAPE.values())
    mesh = jax.sharding.Mesh(devices, tuple(SHAPE), axis_types=(AxisType.Auto,) * 4)

    def each(x, y):  # x [8,8] is [4,8] on a device of fsdp, y [8,8] is [4,4]
        def step(total, _):
            return jax.lax.psum(jnp.sin(total), "tensor"), None

        looped, _ = jax.lax.scan(step, y, None, length=3)
        gathered = jax.lax.all_gather(y, ("data", "fsdp"), tiled=True)  # [16,4]
        scattered = jax.lax.psum_scatter(gathered * gathered, "data", tiled=True)  # [8,4]
        exchanged = jax.lax.all_to_all(scattered, "fsdp", 0, 0, tiled=True)
        turned = jax.lax.ppermute(exchanged, "data", [(0, 1), (1, 0)])
        return x, looped, turned

    specs = (P("fsdp"), P(("data", "fsdp"), "tensor"))
    run = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=(*specs, P(("data", "fsdp"), "tensor")), check_vma=False))
    arrays = jax.ShapeDtypeStruct((8, 8), jnp.float32), jax.ShapeDtypeStruct((16, 8), jnp.float32)
    found = total(collectives(hlo.Module(run.lower(*arrays).compile().as_text()), 8), SHAPE)
    assert {(row["kind"], row["axes"]): (row["count"], row["bytes"]) for row in found} == {
        ("all-reduce", ("tensor",)): (3, 3 * 2 * 4 * 4 * 4 / 2),
        ("all-gather", ("data", "fsdp")): (1, 16 * 4 * 4 * 3 / 4),
        ("reduce-scatter", ("data",)): (1, 16 * 4 * 4 / 2),
        ("all-to-all", ("fsdp",)): (1, 8 * 4 * 4 / 2),
        ("collective-permute", ("data",)): (1, 8 * 4 * 4),
    }


def test_of_every_chip_that_can_be_named_all_is_known():
    generations = {generation.spoken for generation in accelerators.GENERATIONS}
    assert generations == set(GENERATIONS.values())
    assert set(LINKS) == generations | set(CARDS)
    assert all(None not in CHIPS[kind] for kind in LINKS)


def place(*devices):
    """Of (slice, x, y, z) each."""
    return Place.of(SimpleNamespace(platform="tpu", slice_index=s, coords=c) for s, *c in devices)


def test_the_least_time_of_collectives():
    links = LINKS["v5e"]._replace(link_rate=1.0, dcn_rate=0.5)
    gather = Collective("all-gather", 2, 80, ((0, 1, 2, 3),))
    line = place(*((0, x, 0, 0) for x in range(4)))
    assert network_seconds(links, (4, 4), line, gather) == (2 * 60 / 1, 0)  # the ends of a line have one link
    assert network_seconds(links, (16, 4), line, gather) == (2 * 60 / 2, 0)  # a ring
    assert network_seconds(links, (2, 2), place((0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 1, 0)), gather) == (2 * 60 / 2, 0)
    assert network_seconds(links, (4, 4), place(*((s, x, 0, 0) for s in (0, 1) for x in (0, 1))), gather) == (
        2 * 40 / 1,  # between the two chips of a slice
        2 * (40 / 2) / 0.5,  # half of the array comes from the other slice, through two chips
    )
    two_cores = links._replace(devices=2)
    cores = place((0, 0, 0, 0), (0, 0, 0, 0), (0, 1, 0, 0), (0, 1, 0, 0))
    assert network_seconds(two_cores, (4, 4), cores, gather) == (2 * 40 / 1, 0)  # what one core has the other one has
    assert network_seconds(two_cores, (4, 4), cores, Collective("all-gather", 1, 80, ((0, 2), (1, 3)))) == (2 * 40 / 1, 0)
    assert network_seconds(two_cores, (4, 4), cores, Collective("all-reduce", 1, 80, ((0, 1), (2, 3)))) == (0, 0)


def test_the_least_time_between_gpus():
    links = LINKS["h100"]._replace(link_rate=10.0, dcn_rate=0.5)
    hosts = Place.of(SimpleNamespace(platform="gpu", process_index=i // 4, id=i) for i in range(8))
    assert network_seconds(links, (4,), hosts, Collective("all-gather", 1, 80, ((0, 1, 2, 3), (4, 5, 6, 7)))) == (60 / 10, 0)
    across = Collective("all-reduce", 1, 80, tuple((i, i + 4) for i in range(4)))
    assert network_seconds(links, (4,), hosts, across) == (0, 2 * 40 / 0.5)
    both = Collective("all-gather", 1, 80, (tuple(range(8)),))
    assert network_seconds(links, (4,), hosts, both) == (60 / 10, (40 / 4) / 0.5)  # half comes from the other host, by four cards
    shape = {"data": 2, "fsdp": 4}
    found = network(links, (4,), hosts, [across, both], shape)
    assert found == {"data, between hosts": 160, "data+fsdp": 6, "data+fsdp, between hosts": 20}


@pytest.mark.parametrize("kind, expected", [("all-gather", 75), ("reduce-scatter", 75), ("all-reduce", 150), ("all-to-all", 75)])
def test_what_each_sends(kind, expected):
    assert sent(kind, 4, 100) == expected and sent(kind, 1, 100) == 0
