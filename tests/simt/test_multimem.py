"""Multicast addresses: sums over ranks in any order, stores to all of them, and what may not touch them."""

import contextlib
import ctypes
import itertools
import mmap
from enum import IntEnum

import numpy as np
import pytest
import torch

# In the order of tests/simt/kernels/multimem.cuh.
Reach = IntEnum("Reach", "store add", start=0)
Break = IntEnum(
    "Break",
    "nothing fence_and_relaxed_signals entry_release entry_acquire exit_release exit_acquire exit_barrier",
    start=0,
)
Misuse = IntEnum(
    "Misuse",
    "none load_streaming store_streaming load_relaxed load_acquire store_relaxed store_release cas add "
    "multimem_load multimem_store multimem_add",
    start=0,
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANGE_BYTES = 65536


@pytest.fixture(scope="module")
def reserved():
    """Two ranges of addresses without access: a twin that read or wrote one would end the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, 2 * RANGE_BYTES, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert address != ctypes.c_void_p(-1).value
    yield address, address + RANGE_BYTES
    libc.munmap(address, 2 * RANGE_BYTES)


@pytest.fixture
def multicast(simt, reserved):
    """``with multicast(buffers, ...) as (address, ...)``: an address for each list of one array per rank."""

    @contextlib.contextmanager
    def register(*lists_of_buffers):
        with contextlib.ExitStack() as stack:
            for address, buffers in zip(reserved, lists_of_buffers, strict=False):
                addresses = [buffer.ctypes.data for buffer in buffers]
                simt.register_multicast(address, buffers[0].nbytes, addresses)
                stack.callback(simt.unregister_multicast, address)
            yield reserved[: len(lists_of_buffers)]

    return register


def case_name(value):
    return value.name if isinstance(value, IntEnum) else None


# ---------------------------------------------------------------------------------------------------------------- sums


@pytest.fixture
def load_add(kernels, multicast, peer_memory):
    """The emulated sum of a (ranks, n) tensor over its ranks."""

    def run(values, peer=False):
        dtype = next(name for name, dtype in DTYPES.items() if dtype == values.dtype)
        words = [rank.contiguous().view(torch.int32).numpy() for rank in values]
        out = torch.full_like(values[0], -7.0)
        with peer_memory(*(words if peer else [])), multicast(words) as (address,):
            kernels.multimem.load_add(dtype, address, out.data_ptr(), words[0].nbytes // 16)
        return out

    return run


def same_bits(actual, expected):
    """Equal bit for bit, but for the payload of a NaN, which the formats' conversions do not keep."""
    integer = torch.int16 if actual.dtype.itemsize == 2 else torch.int32
    nan = expected.isnan()
    return torch.equal(actual.isnan(), nan) and torch.equal(actual.view(integer)[~nan], expected.view(integer)[~nan])


@pytest.mark.parametrize("peer", [False, True], ids=["plain_memory", "peer_memory"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_is_exact_and_rounded_once(load_add, simt, dtype, ranks, peer):
    """Values whose fp32 sums are exact in any order, but too wide for a 16-bit format: float64 says what one rounding
    gives."""
    generator = torch.Generator().manual_seed(ranks)
    values = torch.randint(-255, 256, (ranks, 512), generator=generator).double()
    values *= 2.0 ** torch.randint(-4, 6, (ranks, 512), generator=generator)
    values = values.to(DTYPES[dtype])
    expected = values.double().sum(0).to(DTYPES[dtype])
    if dtype == "bf16" and ranks > 2:
        step_by_step = values[0]
        for rank in values[1:]:
            step_by_step = step_by_step + rank
        assert not torch.equal(step_by_step, expected), "these values would not show a rounding after each rank"
    for seed in range(5):
        simt.set_options(seed=seed)
        assert same_bits(load_add(values, peer), expected)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "dtype, values, expected",
    [
        ("fp16", (65504, 65504, -65504, 0), 65504),  # past the format's range on the way only
        ("fp16", (65504, 65504, 0, 0), INF),
        ("fp16", (6e-8, 6e-8, -1.2e-7, 6e-8), 6e-8),  # subnormals
        ("bf16", (3e38, 3e38, 0, 0), INF),
        ("bf16", (256, 1, 0, 0), 256),  # a tie goes to the even neighbour
        ("bf16", (256, 3, 0, 0), 260),
        *[(dtype, (-0.0, -0.0, -0.0, -0.0), -0.0) for dtype in DTYPES],
        *[(dtype, (-0.0, 0.0, -0.0, -0.0), 0.0) for dtype in DTYPES],
        *[(dtype, (INF, 1, 2, 3), INF) for dtype in DTYPES],
        *[(dtype, (INF, -INF, 2, 3), NAN) for dtype in DTYPES],
        *[(dtype, (NAN, 1, 2, 3), NAN) for dtype in DTYPES],
    ],
)
def test_sum_at_the_edges_of_the_formats(load_add, dtype, values, expected):
    column = torch.tensor(values, dtype=torch.float64).to(DTYPES[dtype])
    out = load_add(column[:, None].expand(4, 16).contiguous())
    assert same_bits(out, torch.full((16,), expected, dtype=torch.float64).to(DTYPES[dtype]))


def test_fp32_sum_is_a_sum_in_some_order_and_every_order_comes(load_add, simt):
    values = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    sums = np.stack([values[a] + values[b] + values[c] for a, b, c in itertools.permutations(range(3))])
    came = np.zeros(sums.shape, bool)
    for seed in range(20):
        simt.set_options(seed=seed)
        out = load_add(torch.from_numpy(values)).numpy()
        matches = sums == out
        assert matches.any(0).all()
        came |= matches
    assert came.all(), "some order of the ranks never came"


@pytest.mark.parametrize("dtype, big, small", [("fp32", 2.0**24, 1), ("bf16", 2.0**24, 1), ("fp16", 2.0**15, 2.0**-10)])
def test_order_of_the_ranks_varies_with_the_seed(load_add, simt, dtype, big, small):
    """big + small is lost in fp32: what is left depends on who is added last. The same seed gives the same order."""
    values = torch.tensor([[big], [small], [-big]]).expand(3, 16).to(DTYPES[dtype]).contiguous()

    def sums(seed):
        simt.set_options(seed=seed)
        return load_add(values)[0].item()

    answers = [sums(seed) for seed in range(20)]
    assert set(answers) == {0.0, float(small)}
    assert answers == [sums(seed) for seed in range(20)]


# -------------------------------------------------------------------------------------------------------------- stores


@pytest.mark.parametrize("percent", [None, 0, 75, 100], ids=lambda percent: f"hold_back_{percent}")
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_store_reaches_every_rank(kernels, simt, multicast, peer_memory, ranks, percent):
    source = np.random.default_rng(0).integers(0, 2**32, (70, 4), dtype=np.uint32)
    for seed in range(5):
        buffers = [np.full((72, 4), 7, np.uint32) for _ in range(ranks)]
        simt.set_options(seed=seed, hold_back_percent=percent or 0)
        held = simt.counters()["held_stores"]
        with peer_memory(*(buffers if percent is not None else [])), multicast(buffers) as (address,):
            kernels.multimem.broadcast(source, address + 16, 70)
        held = (simt.counters()["held_stores"] - held) / (70 * ranks)
        assert abs(held - (percent or 0) / 100) < 0.2, "each rank's copy is held back or not by its own chance"
        for buffer in buffers:
            assert np.array_equal(buffer[1:-1], source)
            assert (buffer[[0, -1]] == 7).all(), "wrote beside its 16 bytes"


@pytest.mark.parametrize("peer", [False, True], ids=["plain_memory", "peer_memory"])
def test_no_increment_is_lost(kernels, seeds, multicast, peer_memory, peer):
    def check():
        pads = [np.array([rank, 77], np.uint64) for rank in range(3)]
        with peer_memory(*(pads if peer else [])), multicast(pads) as (address,):
            kernels.multimem.count(address, 3, 64, 4)
        total = 3 * 64 * 4
        return all(pad.tolist() == [rank + total + (total << 32), 77] for rank, pad in enumerate(pads))

    seeds.never(check, 20)


@pytest.mark.parametrize("percent", [0, 75, 100])
def test_thread_reads_its_own_stores(kernels, seeds, multicast, peer_memory, percent):
    def check():
        buffers, errors = [np.zeros((64, 4), np.float32) for _ in range(2)], np.zeros(1, np.uint32)
        with peer_memory(*buffers), multicast(buffers) as (address,):
            kernels.multimem.read_own_stores(*buffers, address, errors, 64)
        return errors[0] == 0 and all((buffer == 2).all() for buffer in buffers)

    seeds.never(check, 20, hold_back_percent=percent)


@pytest.mark.parametrize("reach", Reach, ids=case_name)
@pytest.mark.parametrize("peer", [False, True], ids=["plain_memory", "peer_memory"])
def test_ranks_are_reached_one_after_the_other_in_any_order(kernels, simt, multicast, peer_memory, reach, peer):
    ahead = np.zeros(20, np.uint32)
    for seed in range(len(ahead)):
        simt.set_options(seed=seed)
        pads = [np.zeros(2, np.uint64) for _ in range(2)]
        with peer_memory(*(pads if peer else [])), multicast(pads) as (address,):
            kernels.multimem.watch(*pads, address, ahead[seed : seed + 1], reach)
        assert [pad[0] for pad in pads] == [400, 400]
    assert np.bitwise_or.reduce(ahead) == 3, f"one rank was always reached first: {ahead}"


# ---------------------------------------------------------------------------------------------------------- all-reduce


@pytest.fixture
def all_reduce(kernels, simt, multicast, peer_memory, group):
    def run(ranks, what, block=64):
        data = np.random.default_rng(ranks).integers(-1000, 1000, (ranks, block, 4)).astype(np.float32)
        buffers = [np.zeros((block, 4), np.float32) for _ in range(ranks)]
        pads = [np.zeros(2, np.uint64) for _ in range(ranks)]
        outs, ok = np.zeros_like(data), np.ones(1, np.uint32)
        with peer_memory(*buffers, *pads), multicast(buffers, pads) as addresses, group():
            for rank in range(ranks):
                simt.set_rank(rank)
                kernels.multimem.all_reduce(buffers, pads, *addresses, rank, data[rank], outs[rank], ok, block, what)
        return ok[0] == 1 and (outs == data.sum(0)).all()

    return run


@pytest.mark.parametrize("what", [Break.nothing, Break.fence_and_relaxed_signals], ids=case_name)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ordered_all_reduce_is_always_right(all_reduce, seeds, ranks, what):
    seeds.never(lambda: all_reduce(ranks, what), 200 if ranks < 8 else 40)
    seeds.never(lambda: all_reduce(ranks, what), 20, hold_back_percent=100)


@pytest.mark.parametrize("what", list(Break)[2:], ids=case_name)
@pytest.mark.parametrize("ranks", [2, 4])
def test_unordered_all_reduce_is_found(all_reduce, seeds, ranks, what):
    seeds.found(lambda: all_reduce(ranks, what))


def test_without_held_stores_and_stale_loads_a_missing_order_is_not_found(all_reduce, seeds):
    seeds.never(lambda: all_reduce(4, Break.exit_release), 20, hold_back_percent=0)


# -------------------------------------------------------------------------------------------------------------- faults

ORDINARY = [what for what in Misuse if what != Misuse.none and not what.name.startswith("multimem")]
MULTIMEM = [what for what in Misuse if what.name.startswith("multimem")]
ORDINARY_FAULT = (
    r"^kernel 'misuse', block 0, thread 3: only multimem instructions may touch a multicast address \(0x[0-9a-f]+\) "
    r"\[simt/kernels/multimem\.cuh:\d+\]$"
)
MULTIMEM_FAULT = (
    r"^kernel 'misuse', block 0, thread 3: a multimem instruction needs a multicast address: 0x[0-9a-f]+ is in no "
    r"registered range \[simt/kernels/multimem\.cuh:\d+\]$"
)


@pytest.mark.parametrize("peer", [False, True], ids=["plain_memory", "peer_memory"])
@pytest.mark.parametrize("what", ORDINARY, ids=case_name)
def test_ordinary_access_to_a_multicast_address(kernels, simt, multicast, peer_memory, what, peer):
    buffers = [np.zeros((4, 4), np.uint32) for _ in range(2)]
    with peer_memory(*(buffers if peer else [])), multicast(buffers) as (address,):
        for piece in (0, 3):
            with pytest.raises(simt.Fault, match=ORDINARY_FAULT):
                kernels.multimem.misuse(address + 16 * piece, what)
        for buffer in buffers:
            kernels.multimem.misuse(buffer.ctypes.data, what)
    assert not np.any(buffers)


@pytest.mark.parametrize("what", MULTIMEM, ids=case_name)
def test_multimem_instruction_outside_every_range(kernels, simt, multicast, what):
    buffers = [np.zeros((4, 4), np.uint32) for _ in range(2)]
    with multicast(buffers) as (address,):
        for wrong in (buffers[0].ctypes.data, address - 16, address + buffers[0].nbytes):
            with pytest.raises(simt.Fault, match=MULTIMEM_FAULT):
                kernels.multimem.misuse(wrong, what)
        for piece in (0, 3):
            kernels.multimem.misuse(address + 16 * piece, what)
        with pytest.raises(simt.Fault, match="access is not aligned"):
            kernels.multimem.misuse(address + 4, what)
    with pytest.raises(simt.Fault, match=MULTIMEM_FAULT):
        kernels.multimem.misuse(address, what)


def test_ranges_that_cannot_be_registered(kernels, simt, reserved):
    kernels.multimem.misuse(0, Misuse.none)
    buffer = np.zeros((4, 4), np.uint32)
    for address, size, addresses in [
        (reserved[0], buffer.nbytes, []),
        (reserved[0], buffer.nbytes, [buffer.ctypes.data] * 65),
        (reserved[0], 0, [buffer.ctypes.data]),
        (reserved[0] + 8, buffer.nbytes, [buffer.ctypes.data]),
        (reserved[0], 24, [buffer.ctypes.data]),
        (reserved[0], buffer.nbytes, [buffer.ctypes.data, buffer.ctypes.data + 4]),
    ]:
        with pytest.raises(ValueError, match="rank_addresses must name 1 to 64 ranks|must be multiples of 16"):
            simt.register_multicast(address, size, addresses)
