"""What test_sweep.py runs on spawned ranks. A module of its own, since ranks import it by name."""

from tokenweave_models.densification.fading import Rayleigh
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.path_loss import MultiSlope
from tokenweave_models.densification.sweep import sweep

BATCH = 16384
ARRAYS = ("coverage", "coverage_se", "rate_nats", "rate_se", "truncation_bias_bound", "histogram")


def small_sweep(**options):
    network = Network(MultiSlope([1.5, 4], [10.0]), Rayleigh(), noise=1e-8)
    return sweep(network, [100.0, 1e4], [-5.0, 0.0, 5.0], **{"num_realisations": 5 * BATCH + 100, "seed": 3} | options)


def bits_of(result):
    """All that must not differ between two runs of the same realisations."""
    arrays = {name: getattr(result, name).tobytes() for name in ARRAYS}
    return arrays | {"groups": result.groups.sums.tobytes(), "sizes": result.groups.sizes.tolist()}


def bits_of_rank(group, report, checkpoint):
    return bits_of(small_sweep(group=group, checkpoint=checkpoint, progress=lambda progress: report(group.rank())))
