"""The GPU's second lane: its order by fake streams on any machine, its results and its graph on a GPU."""

from contextlib import contextmanager

import pytest
import torch
from tokenweave_models.tokenweave.batch import Batch, KVCache
from tokenweave_models.tokenweave.capture import CapturedPass
from tokenweave_models.tokenweave.config import ModelConfig
from tokenweave_models.tokenweave.demo import why_not
from tokenweave_models.tokenweave.executor import Executor
from tokenweave_models.tokenweave.lanes import StreamLane
from tokenweave_models.tokenweave.model import random_decoder
from tokenweave_models.tokenweave.reduction import EagerAddition, FusedAddition
from tokenweave_models.tokenweave.schedule import steps_of

from tokenweave_ops import SplitPlan

SIZES = {"hidden": 64, "intermediate": 96, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
CONFIG = ModelConfig(**SIZES)
EXPERTS = ModelConfig(**SIZES, num_experts=4, experts_per_token=2)
PLAN = SplitPlan(24, "split", 10, 4, 2, 16, launch="graph", predicted_us={})


class FakeCuda:
    """Streams that only keep, for each, what has to be over before its next work: the clock of everything it saw."""

    def __init__(self, monkeypatch):
        fake = self

        class Stream:
            def __init__(self, device=None, priority=0):
                self.priority, self.seen = priority, set()

            def wait_event(self, event):
                self.seen |= event.seen

            def wait_stream(self, other):
                self.seen |= other.seen

        class Event:
            def record(self, stream):
                self.seen = set(stream.seen)

        @contextmanager
        def use(stream):
            before, fake.current = fake.current, stream
            yield
            fake.current = before

        self.compute = self.current = Stream()
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", use)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.current)

    def work(self, name) -> set:
        """Enqueues work on the current stream. What is over when it begins."""
        before = set(self.current.seen)
        self.current.seen.add(name)
        return before


def test_the_stream_lane_waits_for_its_caller_and_the_caller_for_tickets_only(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    lane = StreamLane("cuda:0")
    before = {}

    def reduce(name):
        assert cuda.current is not cuda.compute
        assert cuda.current.priority == -1
        before[name] = cuda.work(name)

    cuda.work("attention 0")
    first = lane.submit(lambda: reduce("reduce 0"))
    before["attention 1"] = cuda.work("attention 1")
    second = lane.submit(lambda: reduce("reduce 1"))
    assert cuda.current is cuda.compute
    lane.wait(first)
    before["mlp 0"] = cuda.work("mlp 0")
    lane.wait(second)
    before["mlp 1"] = cuda.work("mlp 1")
    assert before["reduce 0"] == {"attention 0"}
    assert before["attention 1"] == {"attention 0"}  # not the reduction: they overlap
    assert before["reduce 1"] == {"attention 0", "attention 1", "reduce 0"}
    assert "reduce 0" in before["mlp 0"] and "reduce 1" not in before["mlp 0"]
    assert "reduce 1" in before["mlp 1"]
    lane.submit(lambda: reduce("reduce 2"))
    assert "reduce 2" not in cuda.work("logits")
    lane.settle()
    assert "reduce 2" in cuda.work("next pass")


def test_a_split_pass_on_streams_orders_what_depends(monkeypatch):
    """The executor's own pass, its sublayers and reductions replaced by notes on the streams they run on."""
    cuda = FakeCuda(monkeypatch)
    lane = StreamLane("cuda:0")
    before = {}

    class Note(FusedAddition):
        def reduce(self, x, residual, weight, eps, *, channel, max_ctas, tag):
            before[len(before)] = (cuda.current, cuda.work(("reduce", channel, len(before))))
            super().reduce(x, residual, weight, eps, channel=channel, max_ctas=max_ctas, tag=tag)

    @contextmanager
    def observe(event, step):
        if event == "compute":
            before[len(before)] = (cuda.current, cuda.work((step.sublayer, step.half, len(before))))
        yield

    cache = KVCache(CONFIG, 2, 24, dtype=torch.float32)
    executor = Executor(random_decoder(CONFIG, seed=0), cache, Note(24, CONFIG.hidden, torch.float32), lane=lane)
    executor.forward(Batch.of(torch.arange(24), [15, 9], [15, 9], [0, 1]), PLAN, observe)
    streams = [stream for stream, _ in before.values()]
    num_steps = 2 * len(steps_of(CONFIG.num_layers))
    assert streams.count(cuda.compute) == len(streams) - num_steps == num_steps
    names = cuda.compute.seen
    assert len(names) == 2 * num_steps  # the caller's stream has joined everything
    for index, (_, seen) in before.items():
        (name,) = {name for name in names if name[2] == index}
        if name[0] != "reduce":
            # All earlier reductions of its own half, and not the latest of the other.
            earlier = {n for n in names if n[0] == "reduce" and n[2] < index}
            assert {n for n in earlier if n[1] == name[1]} <= seen
            others = [n for n in earlier if n[1] != name[1]]
            if others:
                assert max(others, key=lambda n: n[2]) not in seen


def test_a_capture_needs_a_gpu():
    with pytest.raises(ValueError, match="CapturedPass: batch must be on a GPU, got cpu"):
        CapturedPass(None, Batch.of(torch.arange(4), [4], [4], [0]))


@pytest.fixture
def cuda():
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if reason := why_not(device, torch.bfloat16):
        pytest.skip(reason)
    return device


@pytest.mark.parametrize("config", [CONFIG, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("plan", [None, PLAN], ids=["whole", "split"])
def test_a_replayed_graph_is_the_pass(cuda, config, plan):
    model = random_decoder(config, seed=0).bfloat16().to(cuda)
    tokens = torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(0)).to(cuda)

    def executor(model, reduction):
        dtype = model.norm.weight.dtype
        cache = KVCache(config, 2, 24, dtype=dtype, device=cuda)
        return Executor(model, cache, reduction(24, config.hidden, dtype, cuda), lane=StreamLane(cuda))

    def batch(row):
        return Batch.of(tokens[row], [15, 9], [15, 9], [0, 1])

    with torch.inference_mode():
        fused = executor(model, FusedAddition)
        expected = [fused.forward(batch(row), plan).clone() for row in range(3)]
        captured = CapturedPass(fused, batch(0), plan)
        for row in (1, 2, 0, 1):
            assert torch.equal(captured.replay(tokens[row]), expected[row])
        with pytest.raises(ValueError, match=r"tokens must be \[24\], got \[23\]"):
            captured.replay(tokens[0, :23])
        truth = executor(model.double(), EagerAddition).forward(batch(1)).double()
        error = (expected[1].double() - truth).abs().max().item()
        assert error < 0.1 * truth.abs().max().item()


def test_chunks_on_a_gpu(cuda):
    """A chunk that reads earlier keys takes attention's form without a mask: against the CPU's, with one."""
    model, tokens = random_decoder(CONFIG, seed=0), torch.arange(24)
    logits = {}
    with torch.inference_mode():
        for device in ("cpu", cuda):
            cache = KVCache(CONFIG, 1, 24, dtype=torch.float32, device=device)
            rows = EagerAddition(24, CONFIG.hidden, torch.float32, device)
            executor = Executor(model.to(device), cache, rows)
            executor.forward(Batch.of(tokens[:10].to(device), [10], [10], [0]))
            logits[str(device)] = executor.forward(Batch.of(tokens[10:].to(device), [14], [24], [0])).cpu()
    torch.testing.assert_close(logits["cuda"], logits["cpu"], rtol=1e-3, atol=1e-3)
