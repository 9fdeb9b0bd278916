"""What the collectives promise besides their values: determinism, splits, failures that end, pads at rest, the plan."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import re
import threading

import pytest
import torch

from tokenweave_ops import CommunicationError, CommunicationTimeout, RankDisagreement, Workspace, testing
from tokenweave_ops.reference import allreduce_rmsnorm as reference
from tokenweave_ops.testing_ranks import LocalRanks

family = testing.family("allreduce_rmsnorm")
BF16 = torch.bfloat16


def inputs(device, world_size, num_tokens, hidden, dtype=BF16):
    """Small integers: their sums are exact in any order, so the bits must be equal with every transport."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((world_size, num_tokens, hidden), (num_tokens, hidden), (hidden,))
    x, residual, weight = (torch.randint(-8, 9, shape, generator=generator).to(dtype).to(device) for shape in shapes)
    return x, residual.expand(world_size, -1, -1).clone(), weight


# ---------------------------------------------------------------------------------------------------------- ownership


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 16])
def test_owned_rows_partition_the_tokens(host, world_size):
    for num_tokens in (0, 1, 7, world_size - 1, world_size, 1000, 2**31 + 5, 2**40 + 3):
        ranges = [host.owned_rows(num_tokens, world_size, rank) for rank in range(world_size)]
        assert ranges[0][0] == 0 and ranges[-1][1] == num_tokens
        assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
        sizes = [end - begin for begin, end in ranges]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
        for rank, (begin, end) in enumerate(ranges):
            rows = reference.owned_rows(num_tokens, world_size, rank)
            assert (rows.start, rows.stop) == (begin, end)


def test_launch_plan(host):
    """A pure function: no GPU is asked, so all ranks launch the same grid. Every pack has a thread."""
    for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for hidden in (8, 264, 2880, 4096, 5120, 6144, 7168, 8192, 16384):
            for num_tokens in (0, 1, 7, 1000, 2**31 + 1):
                for world_size, max_ctas in ((1, 1), (2, 16), (8, 4), (16, 128)):
                    plan = host.plan_allreduce(num_tokens, hidden, dtype, world_size, max_ctas)
                    packs = hidden * size // 16
                    assert plan.block_x % 32 == 0 and 32 <= plan.block_x <= 512
                    assert (plan.block_x - 32) * plan.packs_per_thread < packs <= plan.block_x * plan.packs_per_thread
                    assert plan.packs_per_thread * plan.rows_in_flight == 8
                    assert 1 <= plan.grid <= max_ctas and plan.grid <= max(1, -(-num_tokens // world_size))
    assert host.plan_allreduce(4096, 8192, "bf16", 8, 16).rows_in_flight == 4


# ------------------------------------------------------------------------------------------------------- determinism


def test_bits_do_not_depend_on_the_number_of_blocks(ranks):
    x, residual, weight = inputs(ranks.device, 3, 13, 264)
    results = []
    with ranks.workspaces(3, 13, 264, BF16) as group:
        for max_ctas in (1, 2, 4, 8, 16, 32):
            h = residual.clone()
            results.append((group.allreduce_rmsnorm_(x, h, weight, max_ctas=max_ctas), h))
        assert group.pads_are_zero()
    for y, h in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(h, results[0][1])


def test_bits_do_not_depend_on_the_other_rows(ranks):
    """A split in two halves, as token weaving does it, on different channels and offsets."""
    x, residual, weight = inputs(ranks.device, 2, 12, 64)
    with ranks.workspaces(2, 24, 64, BF16) as group:
        h = residual.clone()
        whole = group.allreduce_rmsnorm_(x, h, weight)
        for begin, end, channel in ((0, 5, 0), (5, 12, 1)):
            part = residual[:, begin:end].clone()
            y = group.allreduce_rmsnorm_(
                x[:, begin:end], part, weight, channel=channel, offset_bytes=12 * 128 + begin * 128
            )
            assert torch.equal(y, whole[:, begin:end])


def test_strided_and_misaligned_inputs(ranks):
    """The functional form takes x from anywhere; the residual may be a slice of wider rows."""
    x, residual, weight = inputs(ranks.device, 2, 6, 64)
    wide = torch.full((2, 6, 96), 3.0, dtype=BF16, device=ranks.device)
    wide[:, :, 32:] = residual
    odd = torch.zeros(2, 6, 65, dtype=BF16, device=ranks.device)
    odd[:, :, 1:] = x
    with ranks.workspaces(2, 6, 64, BF16) as group:
        expected_h = residual.clone()
        expected = group.allreduce_rmsnorm(x, expected_h, weight)
        got = group.allreduce_rmsnorm(odd[:, :, 1:], wide[:, :, 32:], weight)
    assert torch.equal(got, expected) and torch.equal(wide[:, :, 32:], expected_h)
    assert (wide[:, :, :32] == 3).all() and torch.equal(odd[:, :, 1:], x)


def test_many_calls_of_mixed_sizes(ranks):
    """Slots are reset by whoever reads them: any sequence of grids and channels works, and the pads end up zero."""
    generator = torch.Generator().manual_seed(1)
    calls = 60 if ranks.is_emulated else 300
    with ranks.workspaces(3, 40, 64, BF16) as group:
        for number in range(calls):
            num_tokens, channel, max_ctas = (int(torch.randint(0, n, (), generator=generator)) for n in (40, 2, 20))
            x = torch.full((3, num_tokens, 64), float(number % 8), dtype=BF16, device=ranks.device)
            y = group.allreduce_(x, channel=channel, max_ctas=max_ctas + 1)
            assert (y == 3.0 * (number % 8)).all()
        assert group.pads_are_zero()


# ---------------------------------------------------------------------------------------------- the emulated protocol


@pytest.mark.parametrize("transport", ["peer", "multimem"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_thousand_schedules(simt, transport, world_size):
    """Random schedules, late stores, stale loads, starved ranks: never a wrong bit, never a hang, pads at rest."""
    num_tokens, hidden, seeds = 5, 24, 1000
    generator = torch.Generator().manual_seed(1)
    # Small integers: sums are exact in any order.
    x = torch.randint(-8, 9, (world_size, num_tokens, hidden), generator=generator).to(BF16)
    start = torch.randint(-8, 9, (num_tokens, hidden), generator=generator).to(BF16)
    weight = torch.ones(hidden, dtype=BF16)
    h = (x.float().sum(0) + start.float()).to(BF16)
    emulator = testing.host().simt
    expected = None
    with (
        simt.use(family),
        LocalRanks(world_size, num_tokens, hidden, transport=transport) as group,
    ):
        placed = [workspace.empty(num_tokens) for workspace in group.workspaces]
        for seed in range(seeds):
            emulator.set_options(seed=seed)
            residuals = [start.clone() for _ in range(world_size)]
            for part, values in zip(placed, x, strict=True):
                part.copy_(values)

            def call(rank, workspace, residuals=residuals):
                family.allreduce_rmsnorm_(placed[rank], residuals[rank], weight, workspace, max_ctas=2)
                # A second launch right behind: the slots of the first must not be in its way.
                family.gather_residual_(residuals[rank], workspace, max_ctas=1)

            group.run(call)
            for rank, workspace in enumerate(group.workspaces):
                workspace.check()
                expected = placed[0].clone() if expected is None else expected
                assert torch.equal(placed[rank], expected), f"seed {seed}: rank {rank} holds other bits"
                assert torch.equal(residuals[rank], h), f"seed {seed}: the residual of rank {rank} is wrong"
        assert not any(pad.any().item() for pad in group.workspaces[0]._pads.tensors)
    emulator.set_options()
    assert emulator.counters()["held_stores"] > 0


# ---------------------------------------------------------------------------------------------- failures of launches


@pytest.fixture(params=["simt", "cuda"])
def group(request):
    """Three ranks with a launch each, whose deadline is soon."""
    backend = request.getfixturevalue(request.param)
    with backend.use(family), LocalRanks(3, 8, 64, device=request.param, timeout_s=0.05) as local:
        yield local


@pytest.fixture
def emulated_group(simt):
    with simt.use(family), LocalRanks(3, 8, 64, timeout_s=0.5) as local:
        yield local


def placed_ones(group, num_tokens=8):
    parts = [workspace.empty(num_tokens) for workspace in group.workspaces]
    for part in parts:
        part.fill_(1.0)
    return parts


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_rank_is_named_and_its_rows_are_nan(group, missing):
    x = placed_ones(group)
    group.run(lambda rank, w: family.allreduce_(x[rank], w, max_ctas=2), ranks=[r for r in range(3) if r != missing])
    for rank in range(3):
        if rank == missing:
            continue
        with pytest.raises(CommunicationTimeout, match=rf"rank {missing}\b.*\(allreduce, entry, block \d, channel 0\)"):
            group.workspaces[rank].check()
        with pytest.raises(CommunicationTimeout, match="since that call the workspace does not work, reset\\(\\)"):
            family.allreduce_(x[rank], group.workspaces[rank])
        assert x[rank].isnan().all(), "unfinished rows must not look like a result"
    assert (x[missing] == 1).all()


def test_a_rank_that_leaves_after_the_entry_is_named_at_the_exit(group):
    """Rank 2's launch works through the entry only: here its words are put by hand."""
    x = placed_ones(group)
    workspaces = group.workspaces
    # What rank 2 would have said at the entry is what the others say: they leave it in its pad.
    group.run(lambda rank, w: family.allreduce_(x[rank], w, max_ctas=1), ranks=[0, 1])
    words = workspaces[0]._pads.tensors[2].view(torch.int64)[64:66].clone()
    assert words[0] == words[1] != 0
    group.reset()
    x = placed_ones(group)
    for rank in (0, 1):
        workspaces[rank]._pads.tensors[rank].view(torch.int64)[64 + 2] = words[0]
    group.run(lambda rank, w: family.allreduce_(x[rank], w, max_ctas=1), ranks=[0, 1])
    for rank in (0, 1):
        with pytest.raises(CommunicationTimeout, match=r"rank 2\b.*\(allreduce, exit, block 0, channel 0\)"):
            workspaces[rank].check()
        assert x[rank].isnan().all()


def test_a_reset_makes_the_group_work_again(group):
    x = placed_ones(group)
    group.run(lambda rank, w: family.allreduce_(x[rank], w), ranks=[0, 1])
    group.reset()
    x = placed_ones(group)
    group.run(lambda rank, w: family.allreduce_(x[rank], w))
    for rank, workspace in enumerate(group.workspaces):
        workspace.check()
        assert (x[rank] == 3).all() and workspace.generation == 2


@pytest.mark.parametrize(
    ("different", "message"),
    [
        (
            "tokens",
            "rank . came with another op, num_tokens, hidden, dtype, eps, weight_bias, max_ctas or tag than rank .",
        ),
        ("max_ctas", "rank . came with another op, num_tokens"),
        ("op", "rank . came with another op, num_tokens"),
        ("offset", "rank . has its tensor at byte (128|0) of the workspace, rank . at byte (0|128)"),
    ],
)
def test_ranks_that_disagree(group, different, message):
    x = placed_ones(group, 6)
    odd = group.workspaces[1]
    changed = {
        "tokens": lambda: family.allreduce_(x[1][:5], odd),
        "max_ctas": lambda: family.allreduce_(x[1], odd, max_ctas=1),
        "op": lambda: family.gather_residual_(x[1], odd),
        "offset": lambda: family.allreduce_(odd.empty(6, offset_bytes=128), odd),
    }[different]
    group.run(lambda rank, w: changed() if rank == 1 else family.allreduce_(x[rank], w))
    raised = []
    for workspace in group.workspaces:
        with pytest.raises(RankDisagreement) as error:
            workspace.check()
        raised.append(str(error.value))
    assert any(re.search(message, text) for text in raised), raised


def test_ranks_with_other_tags(group):
    x = placed_ones(group, 6)
    residual, weight = torch.zeros_like(x[0]), torch.ones_like(x[0][0])
    residuals = [residual.clone() for _ in group.workspaces]

    def call(tags):
        def one(rank, workspace):
            family.allreduce_rmsnorm_(x[rank], residuals[rank], weight, workspace, tag=tags[rank])

        group.run(one)

    call([-(2**63), -(2**63), -(2**63), -(2**63)])
    for workspace in group.workspaces:
        workspace.check()
    call([7, 7 + 2**40, 7, 7])  # they differ in a high bit
    raised = []
    for workspace in group.workspaces:
        with pytest.raises(RankDisagreement) as error:
            workspace.check()
        raised.append(str(error.value))
    assert any("max_ctas or tag than" in text for text in raised), raised


def test_a_refused_call_ends_the_others(group):
    x = placed_ones(group)

    def call(rank, workspace):
        if rank == 2:
            with pytest.raises(RuntimeError, match="x must lie in the workspace's buffer"):
                family.allreduce_(torch.ones(8, 64, dtype=BF16, device=workspace.device), workspace)
        else:
            family.allreduce_(x[rank], workspace)

    group.run(call)
    for workspace in group.workspaces[:2]:
        with pytest.raises(RankDisagreement, match="rank 2 refused its call because of a bad argument"):
            workspace.check()


def test_a_launch_that_finds_itself_aborted(ranks):
    """Some rank has given up before: nobody waits for the deadline, and no row looks like a result."""
    if ranks.kind == "cpu":
        pytest.skip("virtual ranks on a CPU wait for nobody")
    x, residual, weight = inputs(ranks.device, 3, 8, 64)
    with ranks.workspaces(3, 8, 64, BF16, timeout_s=5) as group:
        # As rank 1 would write it after waiting in vain for rank 2.
        word = -(1 << 63) | 1 << 32 | 1 << 16 | 2
        for pad in group.all[0]._pads.tensors:
            pad.view(torch.int64)[0] = word
        placed = group.inside(x)
        with pytest.raises(CommunicationTimeout, match="rank 1 gave up waiting for rank 2; rank . stopped waiting"):
            group._run(lambda w, a, r: family.allreduce_rmsnorm_(a, r, weight, w, max_ctas=2), placed, residual)
        for part in placed:
            assert part.isnan().any(), "a failed call must not leave something that looks like its result"
        with pytest.raises(CommunicationTimeout, match=r"reset\(\)"):
            group.allreduce_(x)


def test_two_calls_at_once_on_one_channel(emulated_group):
    """Rank 0's launch twice, side by side as on two streams, while its peers are late."""
    x = placed_ones(emulated_group)
    workspace = emulated_group.workspaces[0]
    emulator = testing.host().simt
    emulator.begin_group()
    for stream in (0, 7):
        emulator.set_rank(stream)
        family.allreduce_(x[0], workspace, max_ctas=1)
    emulator.run_group()
    with pytest.raises(CommunicationError, match="another call was running on this channel of rank 0"):
        workspace.check()


def test_different_channels_do_not_meet(emulated_group):
    """Two calls at once on two channels, as on two streams of each rank."""
    group = emulated_group
    parts = [(w.empty(4), w.empty(4, offset_bytes=4 * 128)) for w in group.workspaces]
    for first, second in parts:
        first.fill_(1.0)
        second.fill_(2.0)
    emulator = testing.host().simt
    for seed in range(50):
        emulator.set_options(seed=seed)
        emulator.begin_group()
        for rank, workspace in enumerate(group.workspaces):
            for channel in (0, 1):
                emulator.set_rank(2 * rank + channel)  # a stream each
                parts[rank][channel].fill_(1.0 + channel)
                family.allreduce_(parts[rank][channel], workspace, channel=channel, max_ctas=2)
        emulator.run_group()
        for rank, workspace in enumerate(group.workspaces):
            workspace.check()
            assert (parts[rank][0] == 3).all() and (parts[rank][1] == 6).all()
    emulator.set_options()


# ----------------------------------------------------------------------------------------------------- the workspace


def test_the_workspace_says_what_it_is():
    with Workspace.virtual(2, 100, 64, BF16) as workspace:
        text = repr(workspace)
        assert "virtual ranks of 2 on cpu, transport peer" in text and "deadline 60 s" in text
        assert workspace.empty(100).shape == (2, 100, 64) and workspace.empty(3, 8, torch.float32).shape == (2, 3, 8)
        first, second = Workspace.virtual(1, 1, 8), Workspace.virtual(1, 1, 8)
        assert len({workspace.id, first.id, second.id}) == 3


def test_views_outlive_the_workspace():
    workspace = Workspace.virtual(2, 4, 64, BF16)
    x = workspace.empty(4)
    workspace.close()
    workspace.close()
    x.fill_(1.0)
    assert (x == 1).all()
    with pytest.raises(CommunicationError, match="is closed"):
        workspace.empty(4)


def test_timeout_from_the_environment(monkeypatch):
    monkeypatch.setenv("TOKENWEAVE_TIMEOUT_S", "2.5")
    monkeypatch.setenv("TOKENWEAVE_TIMEOUT_SCALE", "4")
    assert Workspace.virtual(1, 1, 8).timeout_s == 10.0
    monkeypatch.setenv("TOKENWEAVE_TIMEOUT_SCALE", "-1")
    with pytest.raises(
        ValueError, match=r"timeout_s must be 0.001 to 1e\+06, got 2.5 times TOKENWEAVE_TIMEOUT_SCALE=-1"
    ):
        Workspace.virtual(1, 1, 8)
    monkeypatch.setenv("TOKENWEAVE_TIMEOUT_S", "soon")
    with pytest.raises(ValueError, match="TOKENWEAVE_TIMEOUT_S must be a number, got 'soon'"):
        Workspace.virtual(1, 1, 8)


def test_the_default_device_is_not_asked():
    with torch.device("meta"), Workspace.virtual(2, 4, 64, BF16, device="cpu") as workspace:
        assert workspace.empty(4).device.type == "cpu"
        workspace.check()


def test_a_workspace_is_not_copied():
    with Workspace.virtual(2, 4, 64, BF16) as workspace:
        for copier in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                copier(workspace)
        family.allreduce_(workspace.empty(4), workspace)


def test_checking_while_another_thread_closes():
    """check() sees an open workspace or a closed one, never memory that is gone."""
    for _ in range(300):
        workspace = Workspace.virtual(2, 4, 64, BF16)
        thread = threading.Thread(target=workspace.close)
        thread.start()
        with pytest.raises(RuntimeError, match="which is closed"):
            check_forever(workspace)
        thread.join()


def check_forever(workspace):
    while True:
        workspace.check()


def test_the_weight_may_lie_in_the_buffer():
    """Between the ranks' rows, where it is nobody's x."""
    with Workspace.virtual(2, 16, 64, torch.float32) as workspace:
        x, weight = workspace.empty(4), workspace.empty(1, offset_bytes=8 * 256)[0, 0]
        x.fill_(1.0)
        weight.fill_(2.0)
        residual = torch.zeros(2, 4, 64)
        family.allreduce_rmsnorm_(x, residual, weight, workspace, eps=0.0)
        assert (x == 2).all()


def test_the_watcher_reports_once(group):
    reported, done = [], threading.Event()

    def on_error(error):
        reported.append(error)
        done.set()

    x = placed_ones(group)
    group.workspaces[0].watch(on_error, interval_s=0.005)
    with pytest.raises(ValueError, match="a watcher is already running"):
        group.workspaces[0].watch(on_error)
    group.run(lambda rank, w: family.allreduce_(x[rank], w), ranks=[0, 1])
    assert done.wait(5) and isinstance(reported[0], CommunicationTimeout)
    group.workspaces[0]._watcher.join(5)
    assert len(reported) == 1 and not group.workspaces[0]._watcher.is_alive()


def test_a_forked_child_is_refused():
    """Its parent's memory is shared with it, its parent's place in the group is not."""
    with Workspace.virtual(2, 4, 64, BF16) as workspace:
        x = workspace.empty(4)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                family.allreduce_(x, workspace)
                os.write(write, b"no error")
            except BaseException as error:
                os.write(write, str(error).encode()[:400])
            finally:
                os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            assert "a forked child has to make its own" in pipe.read()


def test_written_tensors_get_a_new_version(backend):
    """So that autograd notices if it had saved one of them."""
    x, residual, weight = inputs(backend.device, 2, 4, 64)
    device = "simt" if backend.name == "simt" else backend.device
    with backend.use(family), Workspace.virtual(2, 4, 64, BF16, device=device) as workspace:
        placed = workspace.empty(4)
        for call, written in (
            (lambda: family.allreduce_rmsnorm_(placed, residual, weight, workspace), (placed, residual)),
            (lambda: family.allreduce_rmsnorm(x, residual, weight, workspace), (residual,)),
            (lambda: family.allreduce_(placed, workspace), (placed,)),
            (lambda: family.gather_residual_(residual, workspace), (residual,)),
        ):
            versions = [tensor._version for tensor in written]
            call()
            assert all(tensor._version > before for tensor, before in zip(written, versions, strict=True))


# --------------------------------------------------------------------------------------------------------- only a GPU


def test_side_stream_and_graph_replay(cuda):
    x, residual, weight = inputs("cuda", 4, 32, 4096)
    with Workspace.virtual(4, 32, 4096, BF16, device="cuda") as workspace:
        placed, h = workspace.empty(32), residual.clone()
        placed.copy_(x)
        family.allreduce_rmsnorm_(placed, h, weight, workspace, max_ctas=4)
        expected = placed.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        static_h = residual.clone()
        with torch.cuda.stream(stream):
            placed.copy_(x)
            family.allreduce_rmsnorm_(placed, static_h, weight, workspace, max_ctas=4)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(placed, expected) and torch.equal(static_h, h)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            placed.copy_(x)
            static_h.copy_(residual)
            family.allreduce_rmsnorm_(placed, static_h, weight, workspace, max_ctas=4)
        for _ in range(20):
            placed.fill_(float("nan"))
            graph.replay()
        torch.cuda.synchronize()
        workspace.check()
        assert torch.equal(placed, expected) and torch.equal(static_h, h)
        assert not any(pad.any().item() for pad in workspace._pads.tensors)
