"""The decoder over ranks is the decoder: exactly in float64, and in real processes up to the rounding of its sums."""

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tokenweave_models.common.ranks import run_ranks
from tokenweave_models.tokenweave.demo_ranks import RankRun, layer_times
from tokenweave_models.tokenweave.model import MODES, ModelConfig, ReferenceNorms, random_decoder
from tokenweave_models.tokenweave.tensor_parallel import FusedReduction, SeparateReduction, shard

import tokenweave_ops

CONFIG = ModelConfig(hidden=96, intermediate=200, num_layers=3, num_heads=8, num_kv_heads=4)
DTYPES = ("bfloat16", "float16", "float32")
WORLD_SIZE = 2


def some_tokens(batch: int, seq: int) -> torch.Tensor:
    return torch.randint(256, (batch, seq), generator=torch.Generator().manual_seed(1))


class ThreadNorms(ReferenceNorms):
    """The sum over ranks that are threads of this process, in any dtype."""

    def __init__(self, rank: int, world_size: int, parts: dict, barrier: threading.Barrier):
        self.rank, self.world_size, self.parts, self.barrier = rank, world_size, parts, barrier

    def add(self, x, residual, weight, eps):
        self.parts[self.rank] = x
        self.barrier.wait()
        total = sum(self.parts[rank] for rank in range(self.world_size))
        self.barrier.wait()  # nobody replaces a part that another still reads
        return super().add(total, residual, weight, eps)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shares_add_up_to_the_decoder(world_size):
    model, tokens = random_decoder(CONFIG, seed=3).double(), some_tokens(2, 9)
    barrier, parts, logits = threading.Barrier(world_size, timeout=30), {}, {}

    def run(rank):
        norms = ThreadNorms(rank, world_size, parts, barrier)
        logits[rank] = shard(model, rank, world_size)(tokens, norms)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = model(tokens, MODES["reference"])
    for rank in range(world_size):
        torch.testing.assert_close(logits[rank], expected, rtol=1e-10, atol=1e-10)


def test_a_share_holds_its_part_and_no_more():
    model = random_decoder(CONFIG, seed=0)
    shares = [shard(model, rank, 4) for rank in range(4)]
    layers = [share.layers[1] for share in shares]
    whole = model.layers[1]
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        parts = [layer.get_submodule(name).weight for layer in layers]
        assert torch.equal(torch.cat(parts, dim=0), whole.get_submodule(name).weight)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        parts = [layer.get_submodule(name).weight for layer in layers]
        assert torch.equal(torch.cat(parts, dim=1), whole.get_submodule(name).weight)
    for parameter in layers[2].self_attn.parameters():
        assert parameter.is_contiguous() and not parameter.requires_grad
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4  # no share keeps the whole alive
    assert shares[2].lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


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
    one_process = model(tokens, MODES["fused"]).double()
    truth = model.double()(tokens, MODES["reference"])  # the rounded weights, exactly
    logits = {mode: torch.from_numpy(runs[0][dtype].logits[mode]).double() for mode in ("separate", "fused")}
    error = {mode: (values - truth).abs().max().item() for mode, values in logits.items()}
    one_process_error = (one_process - truth).abs().max().item()

    # A sublayer's output is rounded world_size + 1 times, each partial sum and their total, where one process rounds it
    # once; all else is rounded alike.
    ulp = torch.finfo(getattr(torch, dtype)).eps * truth.abs().max().item()
    for mode in error:
        assert error[mode] <= (WORLD_SIZE + 1) * one_process_error + 4 * ulp, mode
    assert error["fused"] <= 2 * error["separate"] + 4 * ulp
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
    for mode in ("separate", "fused"):
        first, *others = (torch.from_numpy(rank[dtype].logits[mode]) for rank in runs)
        assert all(torch.equal(first, other) for other in others)


def test_every_call_is_timed(ranks):
    _, runs = ranks
    for rank in runs:
        for mode in ("separate", "fused"):
            ((whole, calls),) = rank["float32"].pass_ms[mode]
            assert len(calls) == 2 * CONFIG.num_layers + 1
            assert 0 < sum(calls) < whole


def test_a_layer_counts_with_its_slowest_rank_and_a_call_with_its_shortest_time():
    first = RankRun({"fused": [(10.0, [1.0, 4.0]), (20.0, [1.0, 1.0]), (30.0, [9.0, 9.0])]}, {})
    second = RankRun({"fused": [(11.0, [2.0, 3.0]), (19.0, [1.0, 1.0]), (33.0, [9.0, 9.0])]}, {})
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

    for name in ("rms_norm", "add_rms_norm_", "allreduce_rmsnorm_"):
        spy(tokenweave_ops, name)
    spy(dist, "all_reduce")
    model, tokens = random_decoder(CONFIG, seed=0), some_tokens(2, 4)
    expected = model(tokens, MODES["fused"])
    sublayers = 2 * CONFIG.num_layers

    calls.clear()
    separate = SeparateReduction(group_of_one, tokens.numel(), CONFIG.hidden, torch.float32)
    torch.testing.assert_close(model(tokens, separate), expected)
    here = separate.buffer.data_ptr()
    assert calls[1:] == [("all_reduce", here), ("add_rms_norm_", here)] * sublayers

    calls.clear()
    with tokenweave_ops.Workspace(
        group_of_one, tokens.numel(), CONFIG.hidden, torch.float32, device="cpu"
    ) as workspace:
        torch.testing.assert_close(model(tokens, FusedReduction(workspace)), expected)
        assert calls[1:] == [("allreduce_rmsnorm_", workspace.empty(1).data_ptr())] * sublayers


@pytest.mark.parametrize(
    ("sizes", "world_size", "message"),
    [
        ({}, 3, "num_heads must be a multiple of world_size, got num_heads=8, world_size=3"),
        ({"num_kv_heads": 2}, 4, "num_kv_heads must be a multiple of world_size, got num_kv_heads=2, world_size=4"),
        ({"intermediate": 201}, 2, "intermediate must be a multiple of world_size, got intermediate=201, world_size=2"),
    ],
)
def test_a_world_size_that_does_not_divide_is_refused(sizes, world_size, message):
    config = ModelConfig(**({"hidden": 96, "intermediate": 200, "num_heads": 8, "num_kv_heads": 4} | sizes))
    with pytest.raises(ValueError, match=message):
        shard(random_decoder(config, seed=0), 0, world_size)
