"""The decoder over ranks is the decoder: exactly in float64, and in real processes up to the rounding of its sums."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tokenweave_models.common.ranks import run_ranks
from tokenweave_models.tokenweave.batch import Batch, KVCache
from tokenweave_models.tokenweave.config import ModelConfig
from tokenweave_models.tokenweave.demo_ranks import MODES, RankRun, layer_times
from tokenweave_models.tokenweave.executor import Executor
from tokenweave_models.tokenweave.lanes import SameLane
from tokenweave_models.tokenweave.model import Decoder, random_decoder
from tokenweave_models.tokenweave.passes import prefill_executor, prefill_logits
from tokenweave_models.tokenweave.reduction import EagerAddition, FusedAddition, FusedReduction, SeparateReduction
from tokenweave_models.tokenweave.tensor_parallel import parts_of, shard

import tokenweave_ops

CONFIG = ModelConfig(hidden=96, intermediate=200, num_layers=3, num_heads=8, num_kv_heads=4)
ODD_VOCABULARY = ModelConfig(
    vocab_size=257, hidden=96, intermediate=200, num_layers=2, num_heads=8, num_kv_heads=4, qkv_bias=True,
    num_experts=3, experts_per_token=2, tie_embeddings=True,
)  # fmt: skip
# Of 4 ranks the third has one row of the vocabulary and the last has none.
SMALL_VOCABULARY = replace(CONFIG, vocab_size=5, num_layers=1)
DTYPES = ("bfloat16", "float16", "float32")
WORLD_SIZE = 2


def some_tokens(batch: int, seq: int, vocab_size: int = 256) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, seq), generator=torch.Generator().manual_seed(1))


def one_process(model, tokens, reduction=EagerAddition):
    rows = reduction(tokens.numel(), model.config.hidden, model.norm.weight.dtype)
    return prefill_logits(prefill_executor(model, tokens, rows), tokens)


class ThreadReduction(EagerAddition):
    """The sum over ranks that are threads of this process, in any dtype."""

    def __init__(self, rank: int, world_size: int, parts: dict, barrier: threading.Barrier, *sizes):
        super().__init__(*sizes)
        self.rank, self.world_size, self.parts, self.barrier = rank, world_size, parts, barrier

    def reduce(self, x, residual, weight, eps, **options):
        self.parts[self.rank] = x.clone()
        self.barrier.wait()
        x.copy_(sum(self.parts[rank] for rank in range(self.world_size)))
        self.barrier.wait()  # nobody replaces a part that another still reads
        super().reduce(x, residual, weight, eps, **options)


class ThreadGroup:
    def __init__(self, rank: int, world_size: int):
        self.of_rank, self.world_size = rank, world_size

    def rank(self):
        return self.of_rank

    def size(self):
        return self.world_size


@pytest.mark.parametrize("config", [CONFIG, ODD_VOCABULARY, SMALL_VOCABULARY], ids=["dense", "experts", "few tokens"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shares_add_up_to_the_decoder(config, world_size, monkeypatch):
    model, tokens = random_decoder(config, seed=3).double(), some_tokens(2, 9, min(config.vocab_size, 256))
    barrier, parts, columns, logits = threading.Barrier(world_size, timeout=30), {}, {}, {}
    current = threading.local()

    def all_gather(gathered, own, group):
        columns[current.rank] = own.clone()
        barrier.wait()
        for rank, out in enumerate(gathered):
            out.copy_(columns[rank])
        barrier.wait()

    monkeypatch.setattr(dist, "all_gather", all_gather)

    def run(rank):
        current.rank = rank
        reduction = ThreadReduction(rank, world_size, parts, barrier, tokens.numel(), config.hidden, torch.float64)
        share = shard(model, rank, world_size)
        group = ThreadGroup(rank, world_size) if world_size > 1 else None
        logits[rank] = prefill_logits(prefill_executor(share, tokens, reduction, group=group), tokens)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = one_process(model, tokens)
    assert expected.shape == (2, 9, config.vocab_size)
    for rank in range(world_size):
        torch.testing.assert_close(logits[rank], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", [CONFIG, ODD_VOCABULARY], ids=["dense", "experts"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shares_hold_every_weight_once(config, world_size):
    """The parts of all ranks, put together by their published names, are the published tensors; and each parameter of
    a share is written by its parts everywhere and nowhere twice."""
    model = random_decoder(config, seed=0)
    whole = {
        part.source: part.destination(dict(model.named_parameters())[part.parameter]) for part in parts_of(config, 0, 1)
    }
    pieces: dict[str, list] = {}
    for rank in range(world_size):
        share = shard(model, rank, world_size)
        parameters = dict(share.named_parameters())
        written = {name: torch.zeros(parameter.shape, dtype=torch.int32) for name, parameter in parameters.items()}
        for part in parts_of(config, rank, world_size):
            pieces.setdefault(part.source, []).append((part, part.destination(parameters[part.parameter])))
            part.destination(written[part.parameter]).add_(1)
        assert all((count == 1).all() for count in written.values())
        for parameter in parameters.values():
            assert parameter.is_contiguous() and not parameter.requires_grad
            assert parameter.untyped_storage().nbytes() == parameter.numel() * 4  # no share keeps the whole alive
    assert pieces.keys() == whole.keys()
    for source, found in pieces.items():
        part = found[0][0]
        assert part.source_shape == tuple(whole[source].shape)
        is_whole = part.end - part.begin == part.source_shape[part.dim]
        tensors = [piece for _, piece in found]
        if is_whole:
            assert all(torch.equal(piece, whole[source]) for piece in tensors)
        else:
            assert torch.equal(torch.cat(tensors, dim=part.dim), whole[source])


def test_only_a_whole_decoder_is_divided():
    share = shard(random_decoder(CONFIG, seed=0), 0, 2)
    with pytest.raises(ValueError, match="shard: model must be whole, got a share of 2"):
        shard(share, 0, 2)


@pytest.fixture(scope="module")
def ranks():
    """Both modes in every dtype on real processes: by rank and dtype, what each rank saw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))  # spawned ranks take over sys.path
        import tp_work

        tokens = some_tokens(3, 11)  # an odd number of rows: ranks own different numbers of them
        return tokens, run_ranks(tp_work.all_dtypes, WORLD_SIZE, CONFIG, 5, tokens.numpy(), DTYPES, timeout_s=120)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_those_of_one_process(ranks, dtype):
    tokens, runs = ranks
    for rank in runs:
        assert isinstance(rank[dtype], RankRun), rank[dtype]
    model = random_decoder(CONFIG, seed=5).to(getattr(torch, dtype))
    rounded = one_process(model, tokens, FusedAddition).double()
    truth = one_process(model.double(), tokens)  # the rounded weights, exactly
    logits = {mode: torch.from_numpy(runs[0][dtype].logits[mode]).double() for mode in MODES}
    error = {mode: (values - truth).abs().max().item() for mode, values in logits.items()}
    one_process_error = (rounded - truth).abs().max().item()

    # A sublayer's output is rounded world_size + 1 times, each partial sum and their total, where one process rounds it
    # once; all else is rounded alike.
    ulp = torch.finfo(getattr(torch, dtype)).eps * truth.abs().max().item()
    for mode in error:
        assert error[mode] <= (WORLD_SIZE + 1) * one_process_error + 4 * ulp, mode
    for mode in ("fused", "fused_link", "weave_link"):
        assert error[mode] <= 2 * error["reference"] + 4 * ulp, mode
    assert torch.equal(logits["fused"], logits["fused_link"])  # a link takes time and changes nothing
    assert truth.std() > 0.1  # logits that say something

    # Where the best byte leads the second by more than all errors, nothing may change it.
    best, second = truth.topk(2, dim=-1).values.unbind(-1)
    clear = best - second > 2 * max(error.values())
    assert clear.sum() > clear.numel() // 4
    for values in logits.values():
        assert (values.argmax(-1) == truth.argmax(-1))[clear].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ranks_hold_the_same_bits(ranks, dtype):
    _, runs = ranks
    for mode in MODES:
        first, *others = (torch.from_numpy(rank[dtype].logits[mode]) for rank in runs)
        assert all(torch.equal(first, other) for other in others)


def test_every_call_is_timed(ranks):
    _, runs = ranks
    for rank in runs:
        for mode in MODES:
            ((whole, calls),) = rank["float32"].pass_ms[mode]
            halves = 2 if mode == "weave_link" else 1
            assert len(calls) == halves * (2 * CONFIG.num_layers + 1)
            assert 0 < sum(calls) < whole
        # The link is busy for at least as long as it says.
        assert sum(rank["float32"].pass_ms["fused_link"][0][1]) >= rank["float32"].link_ms > 0


def test_a_layer_counts_with_its_slowest_rank_and_a_call_with_its_shortest_time():
    first = RankRun({"fused": [(10.0, [1.0, 4.0]), (20.0, [1.0, 1.0]), (30.0, [9.0, 9.0])]}, {}, "", 0.0)
    second = RankRun({"fused": [(11.0, [2.0, 3.0]), (19.0, [1.0, 1.0]), (33.0, [9.0, 9.0])]}, {}, "", 0.0)
    config = ModelConfig(num_layers=2)
    assert layer_times([first, second], "fused", config) == (20.0 / 2, 4.0 / 2)


@pytest.fixture
def group_of_one(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_fused_is_one_op_on_the_workspace_and_separate_is_two(group_of_one, monkeypatch):
    calls = []

    def spy(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda x, *rest, **named: (calls.append((name, x.data_ptr())), real(x, *rest, **named))[1]
        )

    model, tokens = random_decoder(CONFIG, seed=0), some_tokens(2, 4)
    expected = one_process(model, tokens, FusedAddition)
    for name in ("add_rms_norm_", "allreduce_rmsnorm_"):
        spy(tokenweave_ops, name)
    spy(dist, "all_reduce")
    reductions = 2 * CONFIG.num_layers + 1

    separate = SeparateReduction(group_of_one, tokens.numel(), CONFIG.hidden, torch.float32, all_reduce=dist.all_reduce)
    torch.testing.assert_close(prefill_logits(prefill_executor(model, tokens, separate), tokens), expected)
    here = separate.rows(1).data_ptr()
    assert calls == [("all_reduce", here), ("add_rms_norm_", here)] * reductions

    calls.clear()
    with tokenweave_ops.Workspace(
        group_of_one, tokens.numel(), CONFIG.hidden, torch.float32, device="cpu"
    ) as workspace:
        executor = prefill_executor(model, tokens, FusedReduction(workspace))
        torch.testing.assert_close(prefill_logits(executor, tokens), expected)
        assert calls == [("allreduce_rmsnorm_", workspace.empty(1).data_ptr())] * reductions


def test_model_reduction_and_group_are_of_the_same_ranks(group_of_one):
    share, whole = shard(random_decoder(CONFIG, seed=0), 0, 2), random_decoder(CONFIG, seed=0)
    cache = KVCache(CONFIG, 1, 8, dtype=torch.float32)
    alone, two = FusedAddition(8, CONFIG.hidden, torch.float32), FusedAddition(8, CONFIG.hidden, torch.float32)
    two.world_size = 2
    for model, reduction, group in (
        (share, two, None),
        (share, two, group_of_one),
        (share, two, ThreadGroup(1, 2)),
        (share, alone, ThreadGroup(0, 2)),
        (whole, two, None),
        (whole, alone, ThreadGroup(0, 2)),
    ):
        with pytest.raises(ValueError, match="model, reduction and group must be of the same ranks, got model"):
            Executor(model, cache, reduction, group=group)
    Executor(share, cache, two, group=ThreadGroup(0, 2))
    with pytest.raises(ValueError, match="Executor: cache must hold at most the model's 4096 positions, got 4097"):
        Executor(whole, KVCache(CONFIG, 1, 4097, dtype=torch.float32), alone)
    uneven = random_decoder(replace(CONFIG, num_experts=2, experts_per_token=1, intermediate=50), seed=0)
    with pytest.raises(ValueError, match="rows of experts must be multiples of 16 bytes, got hidden=96 and .*=50 of 4"):
        Executor(uneven, cache, alone)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"Decoder: rank must be 0 to 1, got {rank}"):
            Decoder(CONFIG, rank, 2)


def test_a_split_needs_two_channels(group_of_one):
    model = random_decoder(CONFIG, seed=0)
    with tokenweave_ops.Workspace(
        group_of_one, 8, CONFIG.hidden, torch.float32, device="cpu", num_channels=1
    ) as workspace:
        executor = Executor(
            model, KVCache(CONFIG, 1, 8, dtype=torch.float32), FusedReduction(workspace), lane=SameLane()
        )
        plan = tokenweave_ops.SplitPlan(8, "split", 4, 1, 1, 1, launch="eager", predicted_us={})
        with pytest.raises(ValueError, match="a plan that splits needs a reduction with 2 channels, got 1"):
            executor.forward(Batch.of(torch.arange(8), [8], [8], [0]), plan)


@pytest.mark.parametrize(
    ("sizes", "world_size", "message"),
    [
        ({}, 3, "num_heads must be a multiple of world_size, got num_heads=8, world_size=3"),
        ({"num_kv_heads": 2}, 4, "num_kv_heads must be a multiple of world_size, got num_kv_heads=2, world_size=4"),
        ({}, 0, "world_size must be at least 1, got 0"),
        ({"intermediate": 201}, 2, "intermediate must be a multiple of world_size, got intermediate=201, world_size=2"),
    ],
)
def test_a_world_size_that_does_not_divide_is_refused(sizes, world_size, message):
    config = ModelConfig(**({"hidden": 96, "intermediate": 200, "num_heads": 8, "num_kv_heads": 4} | sizes))
    with pytest.raises(ValueError, match=message):
        shard(random_decoder(config, seed=0), 0, world_size)
