"""A sweep shared by several processes or GPUs, each with its own range of realisations: the bits are those of one.

    python examples/densification_on_ranks.py                            # starts two processes itself
    torchrun --nproc-per-node=8 examples/densification_on_ranks.py       # on GPUs if there is one for each rank

Every rank samples its own range of realisations; the float64 sums of whole batches and the 64-bit histograms are
gathered and added in the order of their numbers. So a run may be cut among ranks in any way, and a checkpoint that 8
GPUs have left may be gone on from by one.
"""

import os
import sys

import torch
import torch.distributed as dist
from tokenweave_models.densification.fading import LogNormal, Rayleigh
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.path_loss import MultiSlope
from tokenweave_models.densification.sweep import sweep

DENSITIES, THRESHOLDS_DB = [1.0, 1e2, 1e4, 1e6], [-5.0, 0.0, 5.0]
NETWORK = Network(MultiSlope([1.5, 4.0], [10.0]), Rayleigh() * LogNormal(8.0))
REALISATIONS = 1 << 20


def main() -> None:
    local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= local_world
    device = f"cuda:{local_rank}" if on_gpus else "cpu"
    if on_gpus:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    group = dist.group.WORLD

    options = {"num_realisations": REALISATIONS, "device": device}
    shared = sweep(NETWORK, DENSITIES, THRESHOLDS_DB, group=group, **options)
    is_equal = True
    if group.rank() == 0:
        print(f"{REALISATIONS} realisations of {NETWORK.path_loss.describe()}, {NETWORK.fading.describe()}")
        print(f"on {group.size()} ranks, {device.split(':')[0]}; P(SINR > T), its standard error in brackets")
        print("  per km2 " + "".join(f"{f'T = {threshold:g} dB':>20}" for threshold in THRESHOLDS_DB))
        for density, coverage, error in zip(DENSITIES, shared.coverage, shared.coverage_se, strict=True):
            cells = (f"{value:.5f} ({se:.5f})" for value, se in zip(coverage, error, strict=True))
            print(f"{density:>9g} " + "".join(f"{cell:>20}" for cell in cells))
        alone = sweep(NETWORK, DENSITIES, THRESHOLDS_DB, **options)
        is_equal = (alone.coverage == shared.coverage).all() and (alone.rate_nats == shared.rate_nats).all()
        print("one process alone: " + ("the same bits" if is_equal else "OTHER BITS"))
    dist.destroy_process_group()
    if not is_equal:
        sys.exit("the sweep depends on how many ranks shared it")


if __name__ == "__main__":
    if "RANK" not in os.environ:  # not under torchrun yet
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])
    main()
