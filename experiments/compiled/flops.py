"""FLOPs of what an optimized HLO module executes on each device: of matrix products, of kernels what they say of themselves.

Splash Attention says nothing: its kernels are known by their names, and count for the blocks of scores that they compute.
"""

import math
import re

from experiments.compiled.hlo import Execution, Instruction, Module
from pallas_kernels.attention.tpu import block_length

_SHAPE = re.compile(r"\[([\d,]*)\]")
_KERNEL = re.compile(r'"flops":"(\d+)"')
_SPLASH = re.compile(r"splash_mha_(fwd|dq|dkv)")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_GROUPS = re.compile(r"(feature|batch)_group_count=(\d+)")


def flops(module: Module, window: int | None = None) -> int:
    """Of one execution of the module, the mean of its devices, conditionals by the branch that has least.

    window: of its attention, None where that sees all before a token.
    """

    def of(execution: Execution) -> int:
        parts = module.parts(execution.computation, execution.name)
        return execution.count * sum(_flops(module.computations[computation], instruction, window) for computation, instruction in parts)

    return sum(map(of, module.cheapest(of)))


def _flops(arrays: dict[str, Instruction], instruction: Instruction, window: int | None) -> int:
    if instruction.opcode == "custom-call":
        if match := _SPLASH.match(instruction.name):
            return _splash(match[1], instruction.type, [arrays[name].type for name in instruction.operands], window)
        match = _KERNEL.search(instruction.attributes)
        return int(match[1]) if match else 0
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    result = _shape(instruction.type)
    left, right = (_shape(arrays[name].type) for name in instruction.operands)
    if instruction.opcode == "dot":
        return 2 * math.prod(result) * math.prod(left[int(i)] for i in _CONTRACTED.search(instruction.attributes)[1].split(",") if i)
    return _convolution(instruction.attributes, result, left, right)


def splash_blocks(tokens: int, block: int, window: int | None = None) -> int:
    """Blocks of scores that Splash computes of a row: each, whole, that has a pair in reach."""
    reach = tokens if window is None else 1 + -(-(window - 1) // block)
    return sum(min(i + 1, reach) for i in range(tokens // block))


def _splash(kernel: str, result: str, operands: list[str], window: int | None) -> int:
    """Of one of its kernels: q [...,H,T,K], k, v are the first arrays of floats among its operands.

    Products a block, by the width they take: forward scores and output; for keys and values scores, dv, dp, dk, and dq in parts where
    one kernel is for all gradients; for queries scores, dp, dq.
    """
    q, k, v = [_shape(type) for type in operands if type.startswith(("f32", "bf16"))][:3]
    (*heads, queries, K), keys, V = q, k[-2], v[-1]
    has_dq = any(shape.count(",") == len(q) for shape in _SHAPE.findall(result))
    width = {"fwd": K + V, "dq": 2 * K + V, "dkv": (3 if has_dq else 2) * K + 2 * V}[kernel]
    # Of a row cut over devices, each computes half a stretch from the row's beginning and half of one from its end: its share.
    block = block_length(queries if queries == keys else queries // 2)
    scores = splash_blocks(keys, block, window) * block**2 * queries // keys
    return 2 * math.prod(heads) * scores * width


def _convolution(attributes: str, result: list[int], left: list[int], right: list[int]) -> int:
    """Of the products that count: a batched matmul is, on TPU, a convolution most of whose window lies on padding and gaps."""
    inputs, kernel, outputs = _LABELS.search(attributes).groups()
    window = dict(re.findall(r"(\w+)=([\w\-]+)", re.search(r"window=\{([^}]*)\}", attributes)[1])) if "window={" in attributes else {}
    pairs = 1
    for i in range(sum(label.isdecimal() for label in outputs)):
        pairs *= _valid(
            window,
            i,
            left[inputs.index(str(i))],
            right[kernel.index(str(i))],
            result[outputs.index(str(i))],
        )
    groups = {name: int(count) for name, count in _GROUPS.findall(attributes)}
    batch, features = result[outputs.index("b")], result[outputs.index("f")]
    return 2 * pairs * batch * features * right[kernel.index("i")] // groups.get("batch", 1)


def _valid(window: dict[str, str], i: int, size: int, kernel: int, positions: int) -> int:
    """Pairs of a position of the result and one of the window, in spatial dimension ``i``, that meet an element of the input."""

    def of(name: str, default: str) -> str:
        return window[name].split("x")[i] if name in window else default

    stride, apart, gaps = int(of("stride", "1")), int(of("rhs_dilate", "1")), int(of("lhs_dilate", "1"))
    before = int(of("pad", "0_0").split("_")[0])
    places = (at * stride - before + k * apart for at in range(positions) for k in range(kernel))
    return sum(place >= 0 and place % gaps == 0 and place // gaps < size for place in places)


def _shape(type: str) -> list[int]:
    return [int(n) for n in _SHAPE.search(type)[1].split(",") if n]
