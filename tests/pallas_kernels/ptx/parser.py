"""PTX as LLVM and Mosaic GPU write it, as a list of instructions."""

import re
from typing import NamedTuple

SHARED = "__dynamic_shmem__0"
PATTERNS = {
    "label": re.compile(r"(\$\w+):"),
    "operand": re.compile(r"\{[^}]*\}|\[[^\]{]*(?:\{[^}]*\}\s*)?\]|[^,\s][^,]*"),
    "wait": re.compile(r"mbarrier\.try_wait\.parity\.shared\.b64 P1, (\[[^\]]*\]), ([%\w]+),"),
    "product": re.compile(
        r"(wgmma\.mma_async)\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16 (\{[^}]*\}), (\{[^}]*\}|%\w+), (%\w+), "
        r"p, 1, 1, ([01])(?:, ([01]))?;"
    ),
}


class Instruction(NamedTuple):
    """operands: names of registers, integers, or lists of these: vectors, addresses. predicate: a register and what it has to be."""

    name: str
    operands: list
    predicate: tuple[str, bool] | None = None
    line: str = ""


class Program(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]


def parse(text: str) -> Program:
    """The one kernel of a module."""
    lines = iter(re.sub(r"//.*", "", text[text.index(".entry") :]).splitlines())
    while next(lines) != "{":  # parameters
        pass
    instructions, labels = [], {}
    for line in map(str.strip, lines):
        if label := PATTERNS["label"].match(line):
            labels[label[1]] = len(instructions)
        elif line == "{":  # inline assembly on several lines: what waits for a barrier
            instructions.append(_wait(" ".join(iter(lambda: next(lines).strip(), "}"))))
        elif line.startswith("{"):
            instructions.append(_product(line))
        elif line and line[0] not in ".})":
            instructions.append(_plain(line.removesuffix(";")))
    return Program(instructions, labels)


def _wait(block):
    bar, parity = PATTERNS["wait"].search(block).groups()
    return Instruction("mbarrier.try_wait", [_operand(bar), _operand(parity)], line=block)


def _product(line):
    """operands: accumulators, the left operand (registers, or a descriptor), the right one, whether each is transposed."""
    name, *operands, first, second = PATTERNS["product"].search(line).groups()
    transposed = (None, int(first)) if second is None else (int(first), int(second))
    return Instruction(name, [*map(_operand, operands), *transposed], line=line)


def _plain(line):
    predicate = None
    if line[0] == "@":
        guard, line = line.split(maxsplit=1)
        predicate = guard.lstrip("@!"), guard[1] != "!"
    name, _, rest = line.partition(" ") if " " in line.split("\t")[0] else line.partition("\t")
    return Instruction(name.strip(), [_operand(x) for x in PATTERNS["operand"].findall(rest)], predicate, line)


def _operand(text):
    text = text.strip()
    if text[0] == "{":
        return [_operand(x) for x in text[1:-1].split(",")]
    if text[0] == "[":
        parts = re.findall(r"\{[^}]*\}|[^,\s{][^,]*", text[1:-1])
        return [_operand(x) for x in (parts[0].split("+") + parts[1:] if len(parts) == 1 else parts) if x.strip()]
    if re.fullmatch(r"-?\d+U?", text):
        return int(text.removesuffix("U"))
    if re.fullmatch(r"0[dfx][0-9a-fA-F]+", text):
        return int(text[2:], 16)
    return text
