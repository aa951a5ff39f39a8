"""A CTA that runs the PTX of a kernel: warpgroups in lockstep, each for a while at random, copies in flight meanwhile.

Not known: lanes of a warpgroup that part at a branch, clusters. Not seen: a sum that is read before its products were waited for, and
CTAs that race in global memory.
"""

from collections import Counter
from functools import cache

import numpy as np

from tests.pallas_kernels.ptx import arithmetic
from tests.pallas_kernels.ptx.arithmetic import FIRST, LANE, THREADS, TYPES, UNSIGNED, WARP, halves, joined
from tests.pallas_kernels.ptx.copies import Barrier, Copies, Stores
from tests.pallas_kernels.ptx.launch import Launch
from tests.pallas_kernels.ptx.memory import BARRIERS, START, Agents, Clocks, Memory, warps_of
from tests.pallas_kernels.ptx.parser import SHARED, Program
from tests.pallas_kernels.ptx.products import Products

BY_VALUE = 1 << 60  # addresses of parameters that are descriptors
STEPS = 50, 4000  # instructions of a warpgroup before it is another's turn
HANDLERS = {}


def run(program: Program, launch: Launch, arrays, random) -> Counter:
    """All CTAs one after the other; what was found wrong. arrays: (bytes, bytes of an element) of each, written in place."""
    faults = Counter()
    width, height, depth = launch.grid
    with np.errstate(all="ignore"):
        for n in range(width * height * depth):
            place = n % width, n // width % height, n // width // height
            Cta(program, launch, place, arrays, random, faults).run()
    return faults


class Cta:
    def __init__(self, program, launch, place, arrays, random, faults):
        self.program, self.launch, self.place, self.random, self.faults = program, launch, place, random, faults
        self.agents = Agents(launch.warpgroups)
        self.clocks = Clocks(self.agents)
        self.memory = Memory(self.agents, self.clocks, faults)
        self.copies = Copies(self.memory, arrays, random)
        self.barriers, self.meetings = {}, {}
        self.warpgroups = [Warpgroup(self, i) for i in range(launch.warpgroups)]

    def run(self):
        """Until all have returned. AssertionError where none can go on."""
        while running := [w for w in self.warpgroups if not w.done]:
            moved = [running[k].run(self.random.integers(*STEPS)) for k in self.random.permutation(len(running))]
            if self.copies.on_their_way and (not any(moved) or self.random.random() < 0.5):
                self.copies.arrive()
            elif not any(moved):
                raise AssertionError(f"all wait: {[w.instruction.line for w in running]}")
        if self.copies.on_their_way:
            self.faults["an exit before loads have arrived"] += 1


class Meeting:
    """A barrier of whole warpgroups."""

    def __init__(self):
        self.arrived, self.passed = set(), set()


class Warpgroup:
    def __init__(self, cta: Cta, number: int):
        self.cta, self.number, self.next, self.done = cta, number, 0, False
        self.lane_warps = warps_of(number)
        self.warps = np.unique(self.lane_warps)
        self.products = Products(self.warps, cta.memory)
        self.stores = {int(warp): Stores(int(warp), cta.copies) for warp in self.warps}
        self.registers = {f"%ctaid.{axis}": np.full(THREADS, at, np.uint32) for axis, at in zip("xyz", cta.place, strict=True)}
        self.registers["%tid.x"] = (LANE + THREADS * number).astype(np.uint32)
        self.registers[SHARED] = np.full(THREADS, START, np.uint64)

    @property
    def instruction(self):
        return self.cta.program.instructions[self.next]

    def run(self, steps: int) -> bool:
        """So many instructions, or until one has to wait, or the last; whether there were any."""
        for step in range(steps):
            if self.done or not self.step():
                return step > 0
        return True

    def step(self) -> bool:
        instruction = self.instruction
        lanes = LANE
        if instruction.predicate is not None:
            register, wanted = instruction.predicate
            lanes = np.flatnonzero(self.registers[register] == wanted)
        before = self.next
        self.next += 1
        if lanes.size and _handler(instruction.name)(self, instruction, lanes) is False:
            self.next = before
            return False
        return True

    def value(self, operand, dtype) -> np.ndarray:
        if isinstance(operand, int):
            unsigned = UNSIGNED[dtype.itemsize]
            return np.array(operand != 0 if dtype.kind == "b" else operand & (256**dtype.itemsize - 1), unsigned).view(dtype)[()]
        if "_param_" in operand:
            return np.full(THREADS, BY_VALUE + (int(operand.rsplit("_", 1)[1]) << 40), np.uint64)
        return self.registers[operand].view(dtype)

    def put(self, name, value):
        value = np.broadcast_to(value, THREADS)
        self.registers[name] = value.view(UNSIGNED[value.itemsize])

    def address(self, operand) -> np.ndarray:
        base, *offset = operand
        width = TYPES["u32"] if isinstance(base, str) and base.startswith("%r") and base[2] != "d" else TYPES["u64"]
        return np.broadcast_to(self.value(base, width), THREADS).astype(np.int64) + (offset[0] if offset else 0)

    def one(self, operand, lanes, dtype="u32") -> int:
        """A value that these lanes agree on."""
        values = np.unique(np.broadcast_to(self.value(operand, TYPES[dtype]), THREADS)[lanes])
        assert values.size == 1, f"lanes differ: {self.instruction.line}"
        return int(values[0])

    def barrier(self, operand, lanes) -> Barrier:
        (at,) = np.unique(self.address(operand)[lanes])
        return self.cta.barriers[int(at)]

    def descriptor(self, operand, lane):
        """(the descriptor, its coordinates)."""
        base, coordinates = operand
        at = int(self.registers[base][lane]) - BY_VALUE
        return self.cta.launch.parameters[at >> 40][at % 2**40], [self.one(c, [lane], "s32") for c in coordinates]


@cache
def _handler(name):
    found = max((prefix for prefix in HANDLERS if name.startswith(prefix)), key=len, default=None)
    if arithmetic.operation(name) is not None:
        return _calculate
    assert found, f"PTX that is not known: {name}"
    return HANDLERS[found]


def handles(*prefixes):
    def register(function):
        HANDLERS.update(dict.fromkeys(prefixes, function))
        return function

    return register


def _calculate(self, instruction, lanes):
    assert lanes.size == THREADS, instruction.line
    function, types = arithmetic.operation(instruction.name)
    target, *operands = instruction.operands
    values = [self.value(x, types[min(i, len(types) - 1)]) for i, x in enumerate(operands)]
    self.put(target, function(*values))


@handles("bra")
def _branch(self, instruction, lanes):
    assert lanes.size == THREADS, f"lanes part: {instruction.line}"
    self.next = self.cta.program.labels[instruction.operands[0]]


@handles("ret")
def _return(self, instruction, lanes):
    self.done = True
    for stores in self.stores.values():
        stores.exit()


@handles("prefetch", "setmaxnreg", "fence.mbarrier_init", "wgmma.fence")
def _nothing(self, instruction, lanes):
    pass


@handles("mov")
def _move(self, instruction, lanes):
    target, source = instruction.operands
    if isinstance(target, list):
        whole = self.registers[source]
        for name, half in zip(target, halves(whole), strict=True):
            self.put(name, half)
    elif isinstance(source, list):
        kind = TYPES[instruction.name.removeprefix("mov.")]
        low, high = (np.broadcast_to(self.value(x, UNSIGNED[kind.itemsize // 2]), THREADS) for x in source)
        self.put(target, joined(low, high, kind.type))
    else:
        self.put(target, self.value(source, TYPES[instruction.name.removeprefix("mov.")]))


@handles("cvta")
def _same(self, instruction, lanes):
    target, source = instruction.operands
    self.put(target, self.value(source, TYPES["u64"]))


@handles("ld.param")
def _parameter(self, instruction, lanes):
    target, ((name,)) = instruction.operands[0], instruction.operands[1]
    self.put(target, np.uint64(self.cta.launch.parameters[int(name.rsplit("_", 1)[1])]))


@handles("elect")
def _elect(self, instruction, lanes):
    self.put(instruction.operands[0].split("|")[1], LANE % WARP == 0)


@handles("ld", "st")
def _transfer(self, instruction, lanes):
    """Between registers and shared or global memory."""
    is_load = instruction.name.startswith("ld")
    registers, at = instruction.operands if is_load else instruction.operands[::-1]
    registers = registers if isinstance(registers, list) else [registers]
    kind = UNSIGNED[TYPES[instruction.name.rsplit(".", 1)[1]].itemsize]
    at = self.address(at)[:, None] + kind.itemsize * np.arange(len(registers))
    if at[0, 0] < 1 << 36:
        (self.cta.memory.load if is_load else self.cta.memory.store)(self.lane_warps[lanes], at[lanes], instruction.line)
        memory = self.cta.memory.bytes
    else:
        memory, _, start = self.cta.copies.array(int(at[lanes[0], 0]))
        at = start + at - at[lanes[0], 0]
    memory = memory.view(kind)
    if is_load:
        loaded = np.zeros(at.shape, kind)
        loaded[lanes] = memory[at[lanes] // kind.itemsize]
        for k, name in enumerate(registers):
            self.put(name, loaded[:, k].copy())
    else:
        values = np.stack([np.broadcast_to(self.value(x, kind), THREADS) for x in registers], axis=1)
        memory[at[lanes] // kind.itemsize] = values[lanes]


@handles("ldmatrix.sync.aligned.m8n8.x", "stmatrix.sync.aligned.m8n8.x")
def _matrices(self, instruction, lanes):
    """Of 8 rows of 16 bytes, whose addresses 8 lanes have; each lane has a word of each."""
    assert "trans" not in instruction.name, instruction.line
    is_load = instruction.name.startswith("ld")
    registers, at = instruction.operands if is_load else instruction.operands[::-1]
    rows = self.address(at)
    at = np.stack([rows[FIRST + 8 * j + LANE % WARP // 4] + 4 * (LANE % 4) for j in range(len(registers))], axis=1)
    (self.cta.memory.load if is_load else self.cta.memory.store)(self.lane_warps, at, instruction.line)
    memory = self.cta.memory.bytes.view(np.uint32)
    if is_load:
        for k, name in enumerate(registers):
            self.put(name, memory[at[:, k] // 4])
    else:
        memory[at // 4] = np.stack([self.registers[x] for x in registers], axis=1)


@handles("bar.sync")
def _meet(self, instruction, lanes):
    number, threads = (*instruction.operands, THREADS * self.cta.launch.warpgroups)[:2]
    number, clocks = self.one(number, lanes), self.cta.clocks
    meeting = self.cta.meetings.setdefault(number, Meeting())
    if self.number in meeting.passed:
        meeting.passed.remove(self.number)
        return True
    meeting.arrived.add(self.number)
    if THREADS * len(meeting.arrived) < self.one(threads, lanes):
        return False
    warps = np.concatenate([self.cta.warpgroups[i].warps for i in meeting.arrived])
    clocks.learn(warps, clocks.told(warps))
    meeting.passed, meeting.arrived = meeting.arrived - {self.number}, set()
    return True


@handles("mbarrier.init")
def _create(self, instruction, lanes):
    at, count = instruction.operands
    number = len(self.cta.barriers)
    assert number < BARRIERS, "more barriers than are known"
    self.cta.barriers[int(self.address(at)[lanes[0]])] = Barrier(number, self.one(count, lanes), self.cta.agents.all)


@handles("mbarrier.arrive")
def _arrive(self, instruction, lanes):
    _, at, number = instruction.operands
    of_bytes = np.broadcast_to(self.value(number, TYPES["u32"]), THREADS)[lanes].sum() if "expect_tx" in instruction.name else 0
    told = self.cta.clocks.told(np.unique(self.lane_warps[lanes]))
    self.barrier(at, lanes).change(lanes.size, int(of_bytes), told)


@handles("mbarrier.try_wait")
def _wait(self, instruction, lanes):
    at, parity = instruction.operands
    barrier = self.barrier(at, lanes)
    if barrier.phases % 2 == self.one(parity, lanes):
        return False
    self.cta.clocks.learn(self.warps, barrier.known)
    self.cta.clocks.completed(self.warps, self.cta.agents.loads(barrier.number), barrier.phases)
    return True


@handles("fence.proxy.async")
def _fence(self, instruction, lanes):
    self.cta.clocks.fence(self.warps)


@handles("wgmma.mma_async")
def _multiply(self, instruction, lanes):
    accumulators, left, right, *transposed = instruction.operands
    sums = np.stack([self.registers[x].view(np.float32) for x in accumulators], axis=1)
    left = [self.registers[x] for x in left] if isinstance(left, list) else self.one(left, lanes, "u64")
    sums = self.products.multiply(sums, left, self.one(right, lanes, "u64"), transposed, instruction.line[-60:])
    for k, name in enumerate(accumulators):
        self.put(name, sums[:, k].copy())


@handles("wgmma.commit_group")
def _commit_products(self, instruction, lanes):
    self.products.commit()


@handles("wgmma.wait_group")
def _wait_for_products(self, instruction, lanes):
    self.products.wait(instruction.operands[0])


@handles("cp.async.bulk.tensor")
def _copy_box(self, instruction, lanes):
    (lane,) = lanes
    warp = int(self.lane_warps[lane])
    if instruction.name.endswith("bulk_group"):
        box, at = instruction.operands
        self.stores[warp].box(*self.descriptor(box, lane), int(self.address(at)[lane]), instruction.line)
    else:
        at, box, barrier = instruction.operands
        at, barrier = int(self.address(at)[lane]), self.barrier(barrier, lanes)
        self.cta.copies.load(warp, *self.descriptor(box, lane), at, barrier, instruction.line)


@handles("cp.async.bulk.global")
def _copy_bytes(self, instruction, lanes):
    (lane,) = lanes
    to, of, size = instruction.operands
    stores = self.stores[int(self.lane_warps[lane])]
    stores.bytes(int(self.address(to)[lane]), int(self.address(of)[lane]), self.one(size, lanes), instruction.line)


@handles("cp.async.bulk.commit_group")
def _commit_stores(self, instruction, lanes):
    for warp in np.unique(self.lane_warps[lanes]):
        self.stores[int(warp)].commit()


@handles("cp.async.bulk.wait_group")
def _wait_for_stores(self, instruction, lanes):
    for warp in np.unique(self.lane_warps[lanes]):
        self.stores[int(warp)].wait(instruction.operands[0], instruction.name.endswith("read"))
