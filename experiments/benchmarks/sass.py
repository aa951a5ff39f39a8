"""A Mosaic GPU kernel as it was assembled, read from what jaxlib's CUDA plugin writes down with ``MOSAIC_GPU_DUMP_TO``.

ptxas says registers and spills. The disassembly, with the control bits of each instruction, gives the instructions that a warp
issues and the cycles that the compiler has it stall for between them: less than what it takes, for waits for memory and for other
warps are not among them. Loops are found by their backward branches, their trips from the constants of the counter that ends them.
Where warpgroups take different ways through a kernel, what all of them issue is counted.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_PTXAS = {
    "registers": re.compile(r"Used (\d+) registers"),
    "stack_bytes": re.compile(r"(\d+) bytes stack"),
    "spill_bytes": re.compile(r"(\d+) bytes spill"),
}
_INSTRUCTION = re.compile(r"\s*(?:[\d&\-]+:){3}[Y\-]:(\d\d)\s+/\*[0-9a-f]+\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*$")
_LABEL = re.compile(r"\s*\.(L_\w+):")
_TARGET = re.compile(r"`\(\.(L_\w+)\)")
_LAUNCH = re.compile(
    r"gpu\.launch .*? blocks\([^)]*\) in \(([^)]*)\) threads\([^)]*\) in \(([^)]*)\)(?: dynamic_shared_memory_size (%[\w#]+))?"
)
_CONSTANT = re.compile(r"(%[\w#]+) = arith\.constant (\d+) : (?:index|i32|i64)")


@dataclass(frozen=True)
class Kernel:
    """instructions: that a warp issues; cycles: that it stalls for in between; None without a disassembler. A CTA is a block of threads.

    unknown_loops: those whose trips are not constants, counted once. mix: the opcodes most often issued. ctas: None where not written down.
    """

    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    smem_bytes: int
    threads: int | None
    ctas: int | None
    instructions: int | None = None
    cycles: int | None = None
    unknown_loops: int = 0
    mix: dict[str, int] | None = None


@dataclass(frozen=True)
class Instruction:
    stall: int
    predicate: str | None
    opcode: str  # with what is after its dots
    operands: tuple[str, ...]
    target: int | None = None  # of a branch

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


def kernels(folder: Path) -> list[Kernel]:
    """The kernels written down in a folder, in the order they were compiled in."""
    paths = sorted(folder.glob("*.ptxas"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
    return [_kernel(path) for path in paths]


def _kernel(path: Path) -> Kernel:
    module, assembled = path.with_suffix(".before_layout_inference.txt"), path.with_suffix(".sass_ctrl")
    if not module.exists():  # only kernels whose layouts are inferred have it; the log begins with the same, and is many times as long
        module = path.with_suffix(".mlir-passes.log")
    facts = resources(path.read_text()) | launch(module.read_text())
    facts |= issued(assembled.read_text()) if assembled.exists() else {}
    return Kernel(path.stem.rsplit("_", 1)[0], **facts)


def resources(text: str) -> dict[str, int]:
    """Of ptxas's report: registers of a thread, bytes of its stack and those spilled there and read back."""
    report = "".join(line for line in text.splitlines(keepends=True) if "warning" not in line)  # which says the same of spills again
    return {name: sum(map(int, pattern.findall(report))) for name, pattern in _PTXAS.items()}


def launch(text: str) -> dict[str, int | None]:
    """Of a kernel's MLIR module: the blocks of its grid, threads of a block and their shared memory; None for what is no constant."""
    found = _LAUNCH.search(text)
    constants = {name: int(value) for name, value in _CONSTANT.findall(text[: found.start()])}
    blocks, threads, smem = found.groups()

    def size(axes):
        sizes = [constants.get(axis.split("=")[1].strip()) for axis in axes.split(",")]
        return None if None in sizes else math.prod(sizes)

    return {"ctas": size(blocks), "threads": size(threads), "smem_bytes": constants.get(smem, 0)}


def issued(text: str) -> dict:
    """Of a disassembly with control bits: instructions, cycles, unknown_loops and mix, as :class:`Kernel` has them."""
    program = instructions(text)
    weights, unknown = trips(program)
    mix = Counter()
    for instruction, weight in zip(program, weights, strict=True):
        mix[instruction.name] += weight
    return {
        "instructions": sum(weights),
        "cycles": sum(i.stall * weight for i, weight in zip(program, weights, strict=True)),
        "unknown_loops": unknown,
        "mix": dict(mix.most_common(12)),
    }


def instructions(text: str) -> list[Instruction]:
    """The program, without the padding after its end."""
    labels, found = {}, []
    for line in text.splitlines():
        if match := _LABEL.match(line):
            labels[match[1]] = len(found)
        elif (match := _INSTRUCTION.match(line)) and match[3] != "NOP":
            found.append(match.groups())
    program = []
    for stall, predicate, opcode, rest in found:
        target = _TARGET.search(rest)
        operands = tuple(operand.strip().removesuffix(".reuse") for operand in rest.split(","))
        program.append(Instruction(int(stall), predicate, opcode, operands, labels.get(target[1]) if target else None))
    while program and program[-1].target == len(program) - 1:  # a branch to itself, never reached
        program.pop()
    return program


def trips(program: list[Instruction]) -> tuple[list[int], int]:
    """How often each instruction is issued, and the number of loops whose trips are unknown."""
    weights, unknown = [1] * len(program), 0
    for end, branch in enumerate(program):
        start = branch.target
        if branch.name != "BRA" or start is None or start > end:
            continue
        body = program[start : end + 1]
        if any(i.name == "EXIT" and not i.predicate for i in body):  # back from code that is kept out of the way
            continue
        test = _definition(body, branch.predicate)
        if test is not None and "PHASECHK" in test.opcode:  # a wait for a barrier in shared memory
            continue
        count = _count(program, start, end)
        unknown += count is None
        for at in range(start, end + 1):
            weights[at] *= count or 1
    return weights, unknown


def _count(program, start, end) -> int | None:
    """Trips of the loop, whose counter goes from a constant to a constant in constant steps; None for any other."""
    body = program[start : end + 1]
    leaves = [i for i in body if i.name == "BRA" and i.predicate and i.target is not None and not start <= i.target <= end]
    predicate = body[-1].predicate or (leaves[0].predicate if leaves else None)
    test = _definition(body, predicate)
    while test is not None and test.name in ("PLOP3", "UPLOP3"):
        sources = [o.lstrip("!") for o in test.operands[2:] if re.fullmatch(r"!?U?P\d+", o)]
        test = _definition(body, sources[0]) if len(sources) == 1 else None
    if test is None or test.name not in ("ISETP", "UISETP"):
        return None
    counter, limit = test.operands[2], _constant(test.operands[3])
    step = _definition(body, counter)
    first = _definition(program[:start], counter)
    if step is None or step.name not in ("IADD3", "UIADD3", "VIADD") or first is None:
        return None
    source, addend = [o for o in step.operands[1:] if not re.fullmatch(r"U?P\w", o)][:2]  # but for predicates, which are carries
    if source != counter:
        return None
    begin = _constant(first.operands[-1]) if first.name in ("MOV", "UMOV", "IMAD", "CS2R") else None
    if first.name == "HFMA2" and first.operands[1:] == ("-RZ", "RZ", "0", "0"):  # nothing, made by another unit
        begin = 0
    by = _constant(addend)
    if None in (begin, by, limit) or not by:
        return None
    count = math.ceil((limit - begin) / by) + (".GT" in test.opcode or ".LE" in test.opcode)
    return count if count > 0 else None


def _definition(body, register) -> Instruction | None:
    """The last instruction that writes a register or predicate."""

    def written(i):
        if i.name == "CS2R" and ".32" not in i.opcode:  # with the register after it
            return i.operands[0], f"R{int(i.operands[0][1:]) + 1}"
        return i.operands[: 2 if "SETP" in i.name else 1]

    return next((i for i in reversed(body) if register in written(i)), None)


def _constant(operand: str) -> int | None:
    if operand in ("RZ", "URZ", "SRZ"):
        return 0
    return int(operand, 16) if re.fullmatch(r"-?0x[0-9a-f]+", operand) else None
