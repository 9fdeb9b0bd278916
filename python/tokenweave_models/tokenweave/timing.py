"""The time of a forward pass, and what of it is spent on residual additions, norms, and sums over ranks before them."""

from torch import Tensor

from tokenweave_models.common.stopwatch import Stopwatch
from tokenweave_models.tokenweave.model import Decoder, Norms


class TimedNorms:
    """Passes calls on to another Norms and times them, except the projection."""

    def __init__(self, norms: Norms, stopwatch: Stopwatch):
        self.norms, self.stopwatch = norms, stopwatch
        self.project = norms.project

    def first(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        with self.stopwatch.measure():
            return self.norms.first(x, weight, eps)

    def add(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        with self.stopwatch.measure():
            return self.norms.add(x, residual, weight, eps)


def timed_pass(model: Decoder, tokens: Tensor, norms: Norms) -> tuple[float, list[float]]:
    """(milliseconds of the pass, milliseconds of each of its norms)"""
    whole, norms_only = Stopwatch(tokens.device), Stopwatch(tokens.device)
    with whole.measure():
        model(tokens, TimedNorms(norms, norms_only))
    return whole.total_ms(), norms_only.each_ms()
