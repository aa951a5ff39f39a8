"""FLOPs of what an optimized HLO module executes on each device: of matrix products, and of kernels what they say of themselves."""

import math
import re

from experiments.benchmarks.hlo import Instruction, Module

_SHAPE = re.compile(r"\[([\d,]*)\]")
_KERNEL = re.compile(r'"flops":"(\d+)"')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_GROUPS = re.compile(r"(feature|batch)_group_count=(\d+)")


def flops(module: Module) -> int:
    """Of one execution of the module."""
    return sum(
        execution.count * _flops(module, computation, instruction)
        for execution in module.executions
        for computation, instruction in module.parts(execution.computation, execution.name)
    )


def _flops(module: Module, computation: str, instruction: Instruction) -> int:
    if instruction.opcode == "custom-call":
        match = _KERNEL.search(instruction.attributes)
        return int(match[1]) if match else 0
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    result = _shape(instruction.type)
    left, right = (_shape(module.computations[computation][name].type) for name in instruction.operands)
    if instruction.opcode == "dot":
        return 2 * math.prod(result) * math.prod(left[int(i)] for i in _CONTRACTED.search(instruction.attributes)[1].split(",") if i)
    return _convolution(instruction.attributes, result, left, right)


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
