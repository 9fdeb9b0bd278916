"""One rank of the groups in test_processes.py and test_link.py: reads the name of a scenario and its arguments from
stdin, one JSON line each, runs it, and answers with a line. Started as a program, never forked."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist

import tokenweave_ops as ops
from tokenweave_ops import _shared_memory
from tokenweave_ops._emulated_link import EmulatedLink
from tokenweave_ops.reference import allreduce_rmsnorm as reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Rank:
    def __init__(self, rank: int, world_size: int, group):
        self.rank, self.world_size, self.group = rank, world_size, group
        self.workspace: ops.Workspace | None = None

    # ------------------------------------------------------------------------------------------------------ scenarios

    def open(self, max_tokens=64, hidden=512, dtype="bf16", device="cpu", link=None, **options):
        self.close()
        if isinstance(link, dict):
            link = EmulatedLink(**link)
        self.workspace = ops.Workspace(
            self.group, max_tokens, hidden, DTYPES[dtype], device=device, link=link, **options
        )
        return repr(self.workspace)

    def close(self):
        if self.workspace is not None:
            self.workspace.close()
        self.workspace = None

    def values(self, dtype: str, hidden: int, num_tokens: int):
        """Every form, against virtual ranks in this process: the same bits."""
        generator = torch.Generator().manual_seed(num_tokens)
        dtype = DTYPES[dtype]
        x = torch.randn(self.world_size, num_tokens, hidden, generator=generator).to(dtype)
        start = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
        weight = torch.randn(hidden, generator=generator).to(dtype)
        everyone = start.expand(self.world_size, -1, -1).clone()
        with ops.Workspace.virtual(self.world_size, max(1, num_tokens), hidden, dtype) as virtual:
            expected = ops.allreduce_rmsnorm(x, everyone, weight, virtual, weight_bias=1.0)
            sums = ops.allreduce(x, virtual)
            sharded = everyone.clone()
            ops.gather_residual_(everyone, virtual)
        place = self.workspace.empty(num_tokens, hidden, dtype)
        place.copy_(x[self.rank])
        residual = start.clone()
        ops.allreduce_rmsnorm_(place, residual, weight, self.workspace, weight_bias=1.0)
        assert torch.equal(place, expected[self.rank]) and torch.equal(residual, sharded[self.rank])
        rows = reference.owned_rows(num_tokens, self.world_size, self.rank)
        residual_2, replicated = start.clone(), start.clone()
        y = ops.allreduce_rmsnorm(x[self.rank], residual_2, weight, self.workspace, weight_bias=1.0)
        assert torch.equal(y, place) and torch.equal(residual_2[rows], residual[rows])
        ops.gather_residual_(residual_2, self.workspace)
        assert torch.equal(residual_2, everyone[0])
        y = ops.allreduce_rmsnorm(
            x[self.rank], replicated, weight, self.workspace, weight_bias=1.0, residual_mode="replicated"
        )
        assert torch.equal(y, place) and torch.equal(replicated, everyone[0])
        assert torch.equal(ops.allreduce(x[self.rank], self.workspace), sums[0])
        place.copy_(x[self.rank])
        ops.allreduce_(place, self.workspace)
        assert torch.equal(place, sums[0])

    def many_calls(self, calls: int):
        generator = torch.Generator().manual_seed(3)
        sizes = torch.randint(0, 24, (calls,), generator=generator).tolist()
        channels = torch.randint(0, 2, (calls,), generator=generator).tolist()
        for number, (num_tokens, channel) in enumerate(zip(sizes, channels, strict=True)):
            x = self.workspace.empty(num_tokens)
            x.fill_(float(number % 8))
            ops.allreduce_(x, self.workspace, channel=channel)
            assert (x == self.world_size * (number % 8)).all(), f"call {number}"

    def stragglers(self, calls: int):
        generator = torch.Generator().manual_seed(4)
        for number in range(calls):
            late = int(torch.randint(0, self.world_size, (), generator=generator))
            pause_s = float(torch.rand((), generator=generator)) * 0.03
            if late == self.rank:
                time.sleep(pause_s)  # long enough for the others to fall asleep, or not
            x = self.workspace.empty(8)
            x.fill_(float(number % 8))
            ops.allreduce_(x, self.workspace)
            assert (x == self.world_size * (number % 8)).all(), f"call {number}"

    def allreduce(
        self, num_tokens: int = 8, offset_bytes: int = 0, delay_s: float = 0.0, channel: int = 0, dtype: str = "bf16"
    ):
        """The first element of the result."""
        time.sleep(delay_s)
        x = self.workspace.empty(num_tokens, dtype=DTYPES[dtype], offset_bytes=offset_bytes)
        x.fill_(1.0)
        started = time.perf_counter()
        try:
            ops.allreduce_(x, self.workspace, channel=channel)
        except ops.CommunicationError as error:
            error.waited_s = time.perf_counter() - started
            error.nan_rows = x.isnan().all(1).sum().item()
            raise
        return x[0, 0].item()

    def bad_argument(self, kind: str = "x"):
        x, ws = self.workspace.empty(8), self.workspace
        residual, weight = torch.zeros(8, 512, dtype=torch.bfloat16), torch.ones(512, dtype=torch.bfloat16)
        {
            "x": lambda: ops.allreduce_(torch.ones(8, 512, dtype=torch.bfloat16), ws),
            "mode": lambda: ops.allreduce_rmsnorm_(x, residual, weight, ws, residual_mode="whole"),
            "grad": lambda: ops.allreduce_rmsnorm_(x, residual, weight.requires_grad_(), ws),
            "eps": lambda: ops.allreduce_rmsnorm_(x, residual, weight, ws, eps="small"),
            "meta": lambda: ops.allreduce_rmsnorm_(x, residual.to("meta"), weight, ws),
            "none": lambda: ops.allreduce_rmsnorm_(x, None, weight, ws),
            "memory": lambda: ops.allreduce(torch.empty(1, 1, 512, dtype=torch.bfloat16).expand(2**45, 8, 512), ws),
        }[kind]()

    def close_in_a_handler(self):
        """A signal handler that tidies up while an op waits."""
        signal.signal(signal.SIGTERM, lambda *_: self.workspace.close())
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        self.allreduce()

    def compiled(self):
        """An op in compiled code, where errors are RuntimeErrors."""
        function = torch.compile(lambda x: ops.allreduce(x, self.workspace), backend="eager", fullgraph=True)
        x = torch.ones(4, 512, dtype=torch.bfloat16)
        with torch.no_grad():
            return function(x)[0, 0].item()

    def open_with_a_peer_out_of_reach(self):
        """As with a driver that claims access to a peer: this rank's mapping of rank 0 is memory of its own."""
        real, made = _shared_memory.map_memory, []

        def map_memory(descriptor, num_bytes):
            made.append(real(descriptor, num_bytes))
            return made[-1].clone() if len(made) % 2 == 0 else made[-1]  # the own memory first, then rank 0's

        _shared_memory.map_memory = map_memory
        try:
            self.open()
        finally:
            _shared_memory.map_memory = real

    def held_memory_after_failures(self, max_tokens: int):
        for _ in range(3):
            with contextlib.suppress(ops.CommunicationError):
                self.open(max_tokens=max_tokens)
        self.workspace = None
        return self.memory()

    def gather(self):
        ops.gather_residual_(self.workspace.empty(8).clone(), self.workspace)

    def reset(self):
        self.workspace.reset()
        return self.workspace.generation

    def check(self):
        self.workspace.check()

    def nothing(self):
        pass

    def two_channels_at_once(self, calls: int):
        problems = []

        def run(channel):
            try:
                for number in range(calls):
                    x = self.workspace.empty(16, offset_bytes=channel * 16 * 1024)
                    x.fill_(float(number % 4 + channel))
                    ops.allreduce_(x, self.workspace, channel=channel)
                    assert (x == self.world_size * (number % 4 + channel)).all(), f"channel {channel}, call {number}"
            except BaseException as error:
                problems.append(repr(error))

        threads = [threading.Thread(target=run, args=(channel,)) for channel in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems, problems

    def close_while_waiting(self):
        """One thread waits for peers that do not come, another closes the workspace under it."""
        raised = []

        def wait():
            try:
                self.allreduce()
            except RuntimeError as error:
                raised.append(f"{type(error).__name__}: {error}")

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        started = time.perf_counter()
        self.workspace.close()
        thread.join()
        self.workspace = None
        assert time.perf_counter() - started < 5
        return raised

    def halves(self):
        """Two groups of two: ranks are those of the group, never the world's."""
        groups = [dist.new_group([first, first + 1]) for first in range(0, self.world_size, 2)]
        group = groups[self.rank // 2]
        with ops.Workspace(group, 8, 64, torch.float32, device="cpu") as workspace:
            x = workspace.empty(8)
            x.fill_(float(self.rank))
            ops.allreduce_(x, workspace)
            return x[0, 0].item(), workspace.rank

    def timed(self, num_tokens: int, op: str = "allreduce_"):
        """What one call took, and what the link promises for it."""
        x, link = self.workspace.empty(num_tokens), self.workspace.link
        expected_us = (link.gather_us if op == "gather_residual_" else link.occupied_us)(x.nbytes, self.world_size)
        dist.barrier()
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        getattr(ops, op)(x, self.workspace)
        return {
            "wall_s": time.perf_counter() - began_s,
            "cpu_s": time.process_time() - began_cpu_s,
            "link_s": expected_us * 1e-6,
        }

    def timed_on_two_channels(self, num_tokens: int):
        """Seconds until each of two calls, begun at the same time by two threads, was done."""
        dist.barrier()
        took_s = [0.0, 0.0]
        began_s = time.perf_counter()

        def run(channel):
            self.allreduce(num_tokens, offset_bytes=channel * num_tokens * 1024, channel=channel)
            took_s[channel] = time.perf_counter() - began_s

        threads = [threading.Thread(target=run, args=(channel,)) for channel in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(took_s)

    def counted_meanwhile(self, num_tokens: int):
        """How far this thread counts while another one is in a call."""
        count = 0
        thread = threading.Thread(target=self.allreduce, args=(num_tokens,))
        thread.start()
        while thread.is_alive():
            count += 1
        return count

    def threads_of_a_call(self, num_tokens: int, max_ctas: int):
        """How many threads a thread of this process starts by its calls."""
        torch.set_num_threads(3)
        x, more = self.workspace.empty(num_tokens), []
        residual, weight = torch.zeros_like(x), torch.ones(x.shape[1], dtype=x.dtype)

        def run():
            before = set(os.listdir("/proc/self/task"))
            for mode in ("sharded", "replicated"):
                ops.allreduce_rmsnorm_(x, residual, weight, self.workspace, residual_mode=mode, max_ctas=max_ctas)
            ops.gather_residual_(residual, self.workspace, max_ctas=max_ctas)
            more.extend(set(os.listdir("/proc/self/task")) - before)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        torch.set_num_threads(1)
        return len(more)

    def memory(self):
        """What this process holds of shared memory: file descriptors and mappings."""
        held = [
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")
        ]
        with open("/proc/self/maps") as maps:
            mapped = sum("memfd:tokenweave" in line for line in maps)
        return sum("memfd" in name or "pidfd" in name for name in held), mapped


def main() -> None:
    rank, world_size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size,
        timeout=datetime.timedelta(seconds=30),
    )  # fmt: skip
    process = Rank(rank, world_size, dist.group.WORLD)
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        scenario, arguments = json.loads(line)
        try:
            answer = {"result": getattr(process, scenario)(**arguments)}
        except BaseException as error:
            answer = {
                "error": type(error).__name__,
                "text": str(error),
                "waited_s": getattr(error, "waited_s", None),
                "nan_rows": getattr(error, "nan_rows", None),
                "traceback": traceback.format_exc(),
            }
        print(json.dumps(answer), flush=True)
    os._exit(0)  # without a word to peers that may be gone


if __name__ == "__main__":
    main()
