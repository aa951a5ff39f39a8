"""What the host does before a Mosaic GPU kernel runs: its function in LLVM's dialect, from the log of passes, executed symbolically.

The kernel's arguments are arrays in global memory; array k lies at ``address(k)``. The function writes descriptors of copies (TMA) and
passes them by value, beside pointers.
"""

import re
from typing import NamedTuple

AFTER = "IR Dump Before GpuLaunchLoweringPass"  # in the log; of the kernel, only the launch is left
DESCRIPTOR_BYTES = 128


def address(k: int) -> int:
    """Of an array in global memory: none is as large as the distance between two."""
    return (k + 1) << 36


class Descriptor(NamedTuple):
    """Of copies of boxes: shape, strides and box of an array in elements, the swizzle in shared memory in bytes (16: none)."""

    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


class Launch(NamedTuple):
    """grid: CTAs in x, y and z. parameters: each an address, or the descriptors that it holds, by their offset."""

    grid: tuple[int, int, int]
    warpgroups: int
    parameters: list[int | dict[int, Descriptor]]


def read(log: str) -> Launch:
    """The launch that a log of passes ends in."""
    host = Host()
    text = log[log.rindex(AFTER) :]
    for line in text[text.index("_mosaic_gpu(") :].splitlines():
        found = host.execute(line.split(" loc(")[0].strip())
        if found is not None:
            return found
    raise AssertionError("no launch in the log")


class Host:
    """values: of names, an integer or (name of an allocation, offset in bytes). stored: of such places."""

    def __init__(self):
        self.values, self.stored, self.descriptors = {}, {}, {}

    def execute(self, line: str) -> Launch | None:
        """One line; the launch, where it is that."""
        if "gpu.launch_func" in line:
            return self.launch(line)
        if line.startswith("call @mosaic_gpu_init_tma_desc"):
            self.describe(re.findall(r"%\w+", line))
        elif store := re.match(r"llvm\.store (%\w+), (%\w+)", line):
            self.stored[self.place(store[2])] = self.values[store[1]]
        elif assignment := re.match(r"(%\w+) = ([\w.]+)(.*)", line):
            self.values[assignment[1]] = self.value(assignment[1], assignment[2], assignment[3])
        return None

    def place(self, name):
        value = self.values.get(name, (name, 0))  # the function's own arguments: pointers
        return value if isinstance(value, tuple) else ("memory", value)

    def value(self, name, operation, rest):
        operands = re.findall(r"%\w+", rest)
        match operation:
            case "llvm.mlir.constant":
                return int(re.match(r"\((-?\w+)", rest)[1].replace("true", "1").replace("false", "0"))
            case "llvm.alloca":
                return name, 0
            case "llvm.getelementptr":
                return self.element(operands[0], rest)
            case "llvm.load":
                source, offset = self.place(operands[0])
                if source in self.values:  # what this function has allocated: the descriptors, as they are passed
                    return {at: d for (of, at), d in self.descriptors.items() if of == source}
                return address(offset // 8)
            case "llvm.insertvalue":  # into what describes an array: its address alone is of use
                position = rest[rest.index("[") + 1 : rest.index("]")]
                return self.values[operands[0]] if position == "1" else self.values.get(operands[1])
            case _:  # views and casts
                return self.values.get(operands[0]) if operands else None

    def element(self, base, rest):
        place, offset = self.place(base)
        size = {"i8": 1}.get(rest.rsplit(", ", 1)[1], 8)
        if place == "memory":
            size = {"bf16": 2, "f32": 4, "i32": 4, "i8": 1}[rest.rsplit(", ", 1)[1]]
        index = re.search(r"\[(%?\w+)\]", rest)[1]
        offset += size * (self.values[index] if index[0] == "%" else int(index))
        return offset if place == "memory" else (place, offset)

    def describe(self, names):
        target, base, _, rank, shape, strides, swizzle, box = names
        rank = self.values[rank]

        def numbers(name):
            place, offset = self.place(name)
            return tuple(self.stored[place, offset + 8 * i] for i in range(rank))

        base, swizzle = self.values[base], self.values[swizzle]
        self.descriptors[self.place(target)] = Descriptor(base, numbers(shape), numbers(strides), numbers(box), swizzle)

    def launch(self, line):
        blocks, threads, parameters = (re.search(rf"{word}\s*\(([^)]*)\)", line)[1] for word in ("blocks in", "threads in", "args"))
        of = [[self.values[name] for name in re.findall(r"%\w+", part)] for part in (blocks, threads, parameters)]
        return Launch(tuple(of[0]), of[1][0] * of[1][1] * of[1][2] // 128, of[2])
