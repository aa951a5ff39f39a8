"""What an optimized HLO module executes: each instruction, how often, and the bytes it moves to and from HBM.

XLA's own cost analysis counts the body of a loop once. Here it counts by the loop's trips: those that XLA says, and those of JAX's
loops over a fixed number of steps, which count from a constant up to one. Of a conditional one branch is run, and which one the data
say: the cheapest counts, so that what is counted is at most what is run.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_BODY = re.compile(r"body=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INDEX = re.compile(r"index=(\d+)")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# Instructions that name, regroup or wait for data and move none.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
FREE |= {"copy-done", "slice-done", "async-done", "all-gather-done", "all-reduce-done", "collective-permute-done"}
FREE |= {"fusion-done"}
FUSIONS = {"fusion", "fusion-start"}  # the second goes on beside what follows it, on a GPU
ALLOCATION = 'custom_call_target="AllocateBuffer"'
CONTROL = {"while", "conditional", "call", "async-start"}


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


@dataclass(frozen=True)
class Execution:
    """An instruction that is run ``count`` times and moves ``hbm_bytes`` each time; ``known`` unless a loop's trips are not."""

    name: str
    computation: str  # that it is in
    count: int
    hbm_bytes: int
    known: bool

    @property
    def total_bytes(self) -> int:
        """Of all times it is run."""
        return self.count * self.hbm_bytes


class Module:
    """``compiled.as_text()``, parsed as far as needed."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        current = None
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations[match[2]] = {}
                if match[1]:
                    self.entry = match[2]
            elif current is not None and (match := _INSTRUCTION.match(line)):
                current[match[2]] = _instruction(match[2], match[3], bool(match[1]))

    @cached_property
    def executions(self) -> list[Execution]:
        """:meth:`cheapest` in bytes to and from HBM."""
        return self.cheapest(lambda execution: execution.total_bytes)

    @property
    def hbm_bytes(self) -> int:
        """To and from HBM, of all that is executed."""
        return sum(execution.total_bytes for execution in self.executions)

    def cheapest(self, cost: Callable[[Execution], float]) -> list[Execution]:
        """Every instruction outside of fusions that does something, in no particular order; of a conditional those of its branch that
        costs least, the sum of ``cost`` over it.
        """
        return list(self._walk(self.entry, 1, True, cost))

    def parts(self, computation: str, name: str) -> Iterator[tuple[str, Instruction]]:
        """An instruction with its computation, and where it is a fusion all that it consists of, each with its own."""
        instruction = self.computations[computation][name]
        yield computation, instruction
        if instruction.opcode in FUSIONS:
            for called in _called(instruction):
                for inner in self.computations[called]:
                    yield from self.parts(called, inner)

    def _walk(self, computation, count, known, cost):
        for instruction in self.computations[computation].values():
            if instruction.opcode in CONTROL:
                times = self._trips(computation, instruction) if instruction.opcode == "while" else 1
                called = (list(self._walk(name, count * (times or 1), known and times is not None, cost)) for name in _called(instruction))
                if instruction.opcode == "conditional":
                    called = [min(called, key=lambda branch: sum(map(cost, branch)))]
                yield from itertools.chain.from_iterable(called)
            elif instruction.opcode not in FREE and ALLOCATION not in instruction.attributes:
                yield Execution(instruction.name, computation, count, self._bytes(computation, instruction), known)

    def _trips(self, computation, loop) -> int | None:
        """Trips of a while loop where XLA says them, or that counts from a constant up to another; None for any other."""
        if match := _TRIPS.search(loop.attributes):
            return int(match[1])
        condition = self.computations[_CONDITION.search(loop.attributes)[1]]
        test = _root(condition)
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, limit = (condition[name] for name in test.operands)
        if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
            return None
        at = int(_INDEX.search(counter.attributes)[1])
        arrays = self.computations[computation]
        carry = arrays[loop.operands[0]]
        start = _source(arrays, carry.operands[at] if carry.opcode == "tuple" else carry.name)
        step = self._step(_BODY.search(loop.attributes)[1], at)
        if start.opcode != "constant" or step is None:
            return None
        return -(-(int(limit.operands[0]) - int(start.operands[0])) // step)

    def _step(self, body, at) -> int | None:
        """By how much a trip raises the counter at place ``at`` of a loop's carry: 2 where XLA has unrolled the loop; None: not known."""
        arrays = self.computations[body]
        carry = _root(arrays)
        new = _source(arrays, carry.operands[at] if carry.opcode == "tuple" else carry.name)
        added = [_source(arrays, name) for name in new.operands] if new.opcode == "add" else []
        by = [int(each.operands[0]) for each in added if each.opcode == "constant"]
        return by[0] if by and any(each.opcode == "get-tuple-element" for each in added) else None

    def _bytes(self, computation, instruction) -> int:
        arrays = self.computations[computation]
        if instruction.opcode in FUSIONS:
            inside = _called(instruction)[0]
            read = sum(self._read(inside, i, arrays[name].type) for i, name in enumerate(instruction.operands))
            type = instruction.type if instruction.opcode == "fusion" else _root(self.computations[inside]).type
            return read + self._written(inside, type)
        if instruction.opcode in ("slice", "dynamic-slice"):
            return 2 * hbm_bytes(instruction.type)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * hbm_bytes(arrays[instruction.operands[1]].type)
        if instruction.opcode.endswith("-start") and instruction.opcode != "slice-start":  # its type: destination, source, context
            return hbm_bytes(instruction.type)
        if instruction.opcode == "slice-start":  # ((source), destination, context), the destination's size read of the source
            destination = _arrays(instruction.type)[1]
            return array_bytes(destination) + hbm_bytes(destination)
        operands = dict.fromkeys(instruction.operands)  # a kernel that takes an array twice, as blocks of two kinds, reads it once
        return hbm_bytes(instruction.type) + sum(hbm_bytes(arrays[name].type) for name in operands)

    def _read(self, computation, index, type) -> int:
        """Bytes a fusion reads of its operand ``index``: where all that it uses are slices of it, only those."""
        whole = hbm_bytes(type)
        arrays = self.computations[computation]
        names = [i.name for i in arrays.values() if i.opcode == "parameter" and i.operands == (str(index),)]
        names += [i.name for i in arrays.values() if i.opcode == "bitcast" and _source(arrays, i.name).name in names]
        read = 0
        for user in (i for i in arrays.values() if any(name in i.operands for name in names)):
            if user.opcode in ("dynamic-slice", "slice") and user.operands[0] in names:
                read += array_bytes(user.type)
            elif user.name in names:  # the same array under another name
                continue
            elif user.opcode == "fusion":
                inside = _called(user)[0]
                read += sum(self._read(inside, i, type) for i, name in enumerate(user.operands) if name in names)
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] in names):  # updated in place
                return whole
        return min(read, whole)

    def _written(self, computation, type) -> int:
        """Bytes a fusion writes: of an array updated in place, only the update."""
        arrays = self.computations[computation]
        root = _source(arrays, _root(arrays).name)
        if root.opcode == "dynamic-update-slice":
            return min(hbm_bytes(type), array_bytes(arrays[root.operands[1]].type))
        return hbm_bytes(type)


def array_bytes(type: str) -> int:
    """Bytes of an array or tuple type, such as ``(f32[8,128]{1,0:T(8,128)}, s32[])``."""
    return sum(_size(match) for match in _ARRAY.finditer(type))


def hbm_bytes(type: str) -> int:
    """The same, without arrays that XLA keeps in another memory space, such as VMEM: ``S(1)`` in their layout."""
    return sum(_size(match) for match in _ARRAY.finditer(type) if "S(" not in (match[3] or ""))


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(i for i in computation.values() if i.is_root)


def _source(arrays: dict[str, Instruction], name: str) -> Instruction:
    """What an instruction is a copy of."""
    while arrays[name].opcode in ("copy", "bitcast"):
        name = arrays[name].operands[0]
    return arrays[name]


def _arrays(type: str) -> list[str]:
    return [match[0] for match in _ARRAY.finditer(type)]


def _size(match) -> int:
    width = re.search(r"\d+", match[1])  # none: "token", which has no bytes
    bits = 8 if match[1] == "pred" else int(width[0]) if width else 0
    return math.prod(int(n) for n in match[2].split(",") if n) * bits // 8


def _called(instruction) -> list[str]:
    branches = _BRANCHES.search(instruction.attributes)
    return _NAME.findall(branches[1]) if branches else _CALLED.findall(instruction.attributes)


def _instruction(name, text, is_root) -> Instruction:
    type, rest = _split(text)
    opcode, rest = rest.split("(", 1)
    end = _closing(rest)
    inside = rest[:end]
    operands = (inside,) if opcode.strip() in ("parameter", "constant") else tuple(_NAME.findall(inside))
    return Instruction(name, opcode.strip(), type, operands, rest[end + 1 :], is_root)


def _split(text) -> tuple[str, str]:
    """A type and what follows it; the type of several results is in parentheses."""
    if text.startswith("("):
        end = _closing(text[1:]) + 2
        return text[:end], text[end:].lstrip()
    return tuple(text.split(" ", 1))


def _closing(text) -> int:
    """Where the parenthesis that is open before ``text`` is closed."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i
    raise ValueError(f"unbalanced parentheses: {text[:80]}")
