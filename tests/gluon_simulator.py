"""Gluon kernels on the CPU, without a GPU or a compiler: the same bodies, their partitions as threads that take turns.

Whose turn it is, and when a copy between memories is done, a seed decides (gluon_engine.py). A fault raises:

- nobody can go on (a release that is missing, a wrong phase): what each partition waits for, with its line;
- shared memory is read while a copy writes it, or written while a product or a copy that nobody has waited for reads it;
- a product or a copy reads what was stored without a fence, or a copy signals a barrier that was initialised without one;
- a result of a product is used before its wait; too many arrivals in a phase; a pointer leaves its tensor;
- at the end: arrivals, loads, stores or products that nobody waits for.

Shared memory begins as NaN, and a copy makes it NaN until it is done. Not modelled: layouts and bank conflicts, registers
(fastattn/devtools/sass.py looks at those), and programs that run at once: they run one after the other.
"""

import itertools
import math
import operator
import types

import torch
from gluon_engine import Engine, Fault, line
from gluon_values import Layout, Pointer, Tile, choose, load, mathematical, raw, reduction, store, where

__all__ = ["Fault", "simulate"]

BOX = 256  # elements of a side that one copy moves at most


class Descriptor:
    """A tensor as copies see it: boxes at coordinates, zeros outside, nothing stored there."""

    layout = property(lambda self: Layout())

    def __init__(self, descriptor):
        base = descriptor.base
        self.x = base.as_strided(tuple(descriptor.shape), tuple(descriptor.strides), base.storage_offset())
        self.dtype, self.block_shape = base.dtype, list(descriptor.block_shape)
        assert max(self.block_shape) <= BOX
        self.nbytes = math.prod(self.block_shape) * base.element_size()
        self.nbytes_per_cta, self.block_type = self.nbytes, self

    shape = property(lambda self: self.block_shape)

    def box(self, at):
        """(where in the tensor, where in the tile)"""
        ends = [(int(c), min(int(c) + b, n)) for c, b, n in zip(at, self.block_shape, self.x.shape, strict=True)]
        outer = tuple(slice(max(lo, 0), max(hi, max(lo, 0))) for lo, hi in ends)
        return outer, tuple(slice(s.start - lo, s.stop - lo) for s, (lo, _) in zip(outer, ends, strict=True))


class Shared:
    """A view of shared memory, and for every element who uses it: products and copies that read, copies that write, stores
    without a fence."""

    def __init__(self, machine, d, reading=None, writing=None, unfenced=None):
        self.machine, self.d = machine, d
        new = [torch.zeros(d.shape, dtype=torch.int16) if x is None else x for x in (reading, writing, unfenced)]
        self.reading, self.writing, self.unfenced = new

    part = False  # of another view
    dtype = property(lambda self: self.d.dtype)
    shape = property(lambda self: list(self.d.shape))
    type = property(lambda self: self)
    layout = property(lambda self: Layout())

    def view(self, function):
        return Shared(self.machine, *(function(x) for x in (self.d, self.reading, self.writing, self.unfenced)))

    def index(self, i):
        i = int(raw(i))
        if not 0 <= i < self.d.shape[0]:
            raise Fault(f"index {i} of {self.d.shape[0]} buffers at {line()}")
        return self.view(lambda x: x[i])

    def slice(self, start, length, dim=0):
        found = self.view(lambda x: x.narrow(dim, int(start), int(length)))
        found.part = True
        return found

    def permute(self, order):
        return self.view(lambda x: x.permute(*order))

    def reshape(self, shape):
        if self.part:
            raise Fault(f"Gluon does not reshape a slice, at {line()}")
        return self.view(lambda x: x.view(*map(int, shape)))

    def load(self, layout=None):
        return self.machine.get(self)

    def store(self, value):
        self.machine.put(self, value)

    def check(self, *, writes=False, fenced=False):
        if self.writing.any():
            raise Fault(f"shared memory is used while a copy writes it, at {line()}")
        if writes and self.reading.any():
            raise Fault(f"shared memory is written while it is read, at {line()}")
        if fenced and self.unfenced.any():
            raise Fault(f"shared memory was stored without a fence, at {line()}")


class Barrier:
    """An mbarrier: a phase ends with its last arrival and its last byte."""

    def __init__(self, name):
        self.name, self.count, self.loaded, self.seen, self.unfenced = name, None, 0, 0, torch.ones(1)

    def index(self, i):
        assert int(i) == 0
        return self

    def init(self, count):
        self.count = self.pending = int(count)
        self.bytes = self.ended = 0

    def update(self, arrivals=0, expected=0):
        if self.count is None:
            raise Fault(f"{self.name} is used before its init at {line()}")
        self.pending, self.bytes = self.pending - arrivals, self.bytes + expected
        if self.pending < 0:
            raise Fault(f"too many arrivals at {self.name} in one phase, at {line()}")
        if self.pending == 0 and self.bytes == 0:
            self.ended, self.pending = self.ended + 1, self.count
            return True
        return False

    def copied(self, n):
        if self.update(expected=-n):
            self.loaded = self.ended

    def passes(self, parity):
        """Whether the phase of that parity has ended; the one before the first counts as ended, with parity 1."""
        return self.ended % 2 != parity % 2


class Product:
    """A product in flight: it can be an accumulator, and nothing else, until it is waited for."""

    def __init__(self, a, b, acc):
        self.a, self.b, self.acc, self.value = a, b, acc, None

    type = property(lambda self: self)
    layout = property(lambda self: Layout())

    def run(self):
        """As late as it may be: when it is waited for."""
        total = self.a.d.float() @ self.b.d.float()
        if self.acc is not None:
            total = total + (self.acc.value if isinstance(self.acc, Product) else self.acc).d
        self.value = Tile(total)
        for x in (self.a, self.b):
            if isinstance(x, Shared):
                x.reading -= 1


# What kernels call


class Machine:
    """A program's shared memory, barriers and partitions, and every function that a kernel may call."""

    def __init__(self, grid, options):
        self.grid, self.options = grid, options
        self.bound = {}

    def run(self, function, args, program, seed):
        self.engine, self.program = Engine(seed), program
        self.barriers, self.named = [], {}
        self.engine.run(lambda: function(*args))
        self.check_end()

    def __getattr__(self, name):
        if hasattr(torch, name) and isinstance(getattr(torch, name), torch.dtype):
            return getattr(torch, name)
        if name.endswith("Layout"):
            return Layout
        raise NotImplementedError(f"the simulator has no {name}")

    # scalars and tiles
    constexpr, static_range = staticmethod(lambda x: x), range
    range = staticmethod(lambda *ends, **_: map(Tile, range(*map(operator.index, ends))))
    zeros = staticmethod(lambda shape, dtype, layout=None: Tile(torch.zeros(shape, dtype=dtype)))
    full = staticmethod(lambda shape, value, dtype, layout=None: Tile(torch.full(shape, raw(value), dtype=dtype)))
    arange = staticmethod(lambda a, b, layout=None: Tile(torch.arange(a, b, dtype=torch.int32)))
    maximum, minimum = staticmethod(choose(max, torch.maximum)), staticmethod(choose(min, torch.minimum))
    max, min, sum = staticmethod(reduction(torch.amax)), staticmethod(reduction(torch.amin)), staticmethod(reduction(torch.sum))
    exp2, log2 = staticmethod(mathematical(torch.exp2)), staticmethod(mathematical(torch.log2))
    abs, where = staticmethod(lambda x: Tile(abs(raw(x)))), staticmethod(where)
    fma = staticmethod(lambda a, b, c: a * b + c)
    cdiv = staticmethod(lambda a, b: (a + (b - 1)) // b if isinstance(a, Tile) else -(-a // raw(b)))
    expand_dims = staticmethod(lambda x, axis: Tile(x.d.unsqueeze(axis)))
    convert_layout = staticmethod(lambda x, layout, assert_trivial=False: x)
    to_tensor = staticmethod(lambda x: x if isinstance(x, Tile) else Tile(x))
    trans = staticmethod(lambda x: Tile(x.d.T))
    join = staticmethod(lambda a, b: Tile(torch.stack((a.d, b.d), -1)))
    split = staticmethod(lambda x: x.split())
    reshape = staticmethod(lambda x, *shape: x.reshape(*shape))
    load, store = staticmethod(load), staticmethod(store)
    assume = static_assert = device_assert = static_print = multiple_of = staticmethod(lambda *_, **__: None)
    thread_barrier = barrier = staticmethod(lambda *_, **__: None)

    def program_id(self, axis):
        return Tile(self.program[axis])

    def num_programs(self, axis):
        return Tile(self.grid[axis])

    def num_warps(self):
        return self.options.get("num_warps", 4)

    # shared memory and barriers
    def allocate_shared_memory(self, dtype, shape, layout=None, value=None):
        if dtype == torch.int64:
            ring = [Barrier(f"mbarrier {len(self.barriers) + i}") for i in range(math.prod(shape[:-1]))]
            self.barriers += ring
            return Ring(ring)
        made = Shared(self, torch.full([int(n) for n in shape], float("nan"), dtype=dtype))
        if value is not None:
            self.put(made, value)
        return made

    def allocate_mbarrier(self, batch=1):
        return self.allocate_shared_memory(torch.int64, [batch, 1])

    def init(self, bar, count):
        bar.init(count)
        self.engine.task.unfenced.append(bar)

    def invalidate(self, bar):
        bar.count = None

    def expect(self, bar, n, pred=True):
        if raw(pred):
            self.engine.pause()
            bar.update(arrivals=1, expected=int(raw(n)))

    def arrive(self, bar, count=1, pred=True):
        if raw(pred):
            self.engine.pause()
            bar.update(arrivals=int(count))

    def wait(self, bar, phase, pred=True, deps=()):
        if raw(pred):
            parity = int(raw(phase))
            self.engine.pause(lambda: bar.passes(parity), f"phase {parity % 2} of {bar.name}")
            bar.seen = max(bar.seen, bar.ended)

    def named_barrier(self, number, threads, waits):
        """bar.sync and bar.arrive with the threads of one warp group."""
        self.engine.pause()
        number, state = int(raw(number)), self.named.setdefault(int(raw(number)), [0, 0])  # threads that came, generation
        state[0] += 128
        if state[0] > int(threads):
            raise Fault(f"too many threads at named barrier {number} at {line()}")
        generation = state[1]
        if state[0] == int(threads):
            state[:] = 0, generation + 1
        elif waits:
            self.engine.pause(lambda: state[1] != generation, f"named barrier {number}")

    def named_barrier_wait(self, number, threads):
        self.named_barrier(number, threads, True)

    def named_barrier_arrive(self, number, threads):
        self.named_barrier(number, threads, False)

    @staticmethod
    def rounded(x, dtype):
        return Tile(x.d.to(dtype)), Tile(x.d.to(dtype).float())

    # copies
    def async_load(self, descriptor, coord, bar, to, pred=True):
        if not raw(pred):
            return
        self.engine.pause()
        to.check(writes=True)
        if bar.unfenced.any():
            raise Fault(f"{bar.name} was initialised without a fence, at {line()}")
        where, inside = descriptor.box(coord)
        data = torch.zeros(descriptor.block_shape, dtype=descriptor.dtype)
        data[inside] = descriptor.x[where]
        data = data.view(to.d.shape)
        to.writing += 1
        to.d.fill_(float("nan"))

        def arrived():
            to.d.copy_(data)
            to.writing -= 1
            bar.copied(descriptor.nbytes)

        self.engine.copy(arrived)

    def async_store(self, descriptor, coord, source, adds=False):
        self.engine.pause()
        source.check(fenced=True)
        where, inside = descriptor.box(coord)
        data = source.d.reshape(descriptor.block_shape)[inside].clone()  # nobody may change it until the store is waited for
        source.reading += 1
        self.engine.task.stores.append(source)
        self.engine.copy(lambda: descriptor.x[where].add_(data) if adds else descriptor.x[where].copy_(data))

    def async_atomic_add(self, descriptor, coord, source):
        self.async_store(descriptor, coord, source, True)

    # as other versions of Triton, and kernels/hopper/gluon.py, call them
    async_copy_global_to_shared, async_copy_shared_to_global, _reduce_add = async_load, async_store, async_atomic_add

    def store_wait(self, pendings, read_only=True):
        self.engine.pause()
        while len(self.engine.task.stores) > int(pendings):
            self.engine.task.stores.popleft().reading.sub_(1)

    def get(self, source):
        self.engine.pause()
        source.check()
        return Tile(source.d.clone())

    def put(self, to, value):
        self.engine.pause()
        to.check(writes=True)
        if to.d.shape != value.d.shape or to.dtype != value.dtype:
            raise Fault(f"{value.dtype} {value.shape} stored as {to.dtype} {to.shape} at {line()}")
        to.d.copy_(value.d)
        to.unfenced.fill_(1)
        self.engine.task.unfenced.append(to)

    def fence_async_shared(self, cluster=False):
        for x in self.engine.task.unfenced:
            x.unfenced.zero_()
        self.engine.task.unfenced.clear()

    # products
    def warpgroup_mma_init(self, value):
        return value

    def warpgroup_mma(self, a, b, acc, use_acc=True, precision=None, max_num_imprecise_acc=None, is_async=False):
        self.engine.pause()
        if isinstance(a, Product) or a.dtype != b.dtype or a.dtype.itemsize != 2 or not isinstance(b, Shared):
            raise Fault(f"operands of a product at {line()}")
        for x in (a, b):
            if isinstance(x, Shared):
                x.check(fenced=True)
                x.reading += 1
        one = Product(a, b, acc if raw(use_acc) else None)
        self.engine.task.products.append(one)
        return one if is_async else self.warpgroup_mma_wait(0, (one,))

    def warpgroup_mma_wait(self, num_outstanding=0, deps=()):
        self.engine.pause()
        mine = self.engine.task.products
        while len(mine) > num_outstanding:
            mine.popleft().run()
        if any(isinstance(x, Product) and x.value is None for x in deps):
            raise Fault(f"a product is used before its wait at {line()}")
        found = tuple(x.value if isinstance(x, Product) else x for x in deps)
        return found[0] if len(found) == 1 else found

    # partitions
    def warp_specialize(self, functions_and_args, worker_num_warps, worker_num_regs=None):
        assert len(functions_and_args) == len(worker_num_warps) + 1
        results = {}

        def body(i, function, args):
            return lambda: results.__setitem__(i, function(*args))

        made = [
            self.engine.spawn(f"partition {i} ({function.__name__})", body(i, function, args))
            for i, (function, args) in enumerate(functions_and_args)
        ]
        self.engine.pause(lambda: all(task.done for task in made), "its partitions")
        return results[0]

    def check_end(self):
        for number, (threads, _) in self.named.items():
            if threads:
                raise Fault(f"named barrier {number} ends with {threads} threads that wait for others")
        for bar in self.barriers:
            if bar.count is not None and (bar.pending != bar.count or bar.bytes):
                raise Fault(f"{bar.name} ends inside a phase")
            if bar.loaded > bar.seen:
                raise Fault(f"nobody waited for a load that {bar.name} counts")


class Ring:
    """Barriers side by side."""

    def __init__(self, bars):
        self.bars = bars

    def index(self, i):
        i = int(raw(i))
        if not 0 <= i < len(self.bars):
            raise Fault(f"index {i} of {len(self.bars)} barriers at {line()}")
        return self.bars[i]


# Binding


def bound(x, machine):
    """x as the simulated kernel sees it: functions over the machine's, modules of the language as the machine itself."""
    if isinstance(x, tuple):
        return tuple(bound(one, machine) for one in x)
    if isinstance(x, types.ModuleType):
        return machine
    if type(x).__name__ == "constexpr":
        return bound(x.value, machine)
    function = getattr(x, "fn", x)
    name = getattr(function, "__name__", "")
    if not isinstance(function, types.FunctionType):
        return getattr(machine, name) if isinstance(x, type) and name.endswith("Layout") else x
    where_from = function.__module__ or ""
    if (where_from.startswith("triton.") or where_from.endswith("hopper.gluon")) and hasattr(type(machine), name):
        return getattr(machine, name)
    if getattr(x, "__triton_builtin__", False):
        raise NotImplementedError(f"the simulator has no {name}")
    if function not in machine.bound:
        code, own = function.__code__, {"range": machine.range}
        machine.bound[function] = types.FunctionType(code, own, name, function.__defaults__)
        own.update((k, bound(v, machine)) for k, v in function.__globals__.items() if k in code.co_names)
    return machine.bound[function]


def argument(x, machine):
    """x as a kernel's argument: pointers, descriptors, scalars, and tuples of them."""
    if isinstance(x, tuple):
        return tuple(argument(one, machine) for one in x)
    if isinstance(x, torch.Tensor):
        return Pointer(x)
    if hasattr(x, "block_shape"):
        return Descriptor(x)
    return Tile(x) if isinstance(x, (bool, int, float)) else bound(x, machine)


def simulate(kernel, grid, *args, seed=0, **options):
    """Launch a kernel, its constants included in `args`; `options` like num_warps are those of the launch.

    Raises:
        Fault: see above.
    """
    grid = (*grid, 1, 1)[:3]
    machine = Machine(grid, options)
    function = bound(kernel, machine)
    args = [bound(x, machine) if p.is_constexpr else argument(x, machine) for p, x in zip(kernel.params, args, strict=True)]
    for program in itertools.product(*(range(n) for n in reversed(grid))):
        machine.run(function, args, program[::-1], f"{seed} {program}")
