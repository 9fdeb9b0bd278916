"""A run of one sampler: batches in order, cut into calls, shared among ranks, kept in a file that it can go on from.

None of these three changes a bit of what comes out: the sampler's sums of a batch depend on its number only, and
:class:`Accumulator` adds them up along a tree over these numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import nan
from pathlib import Path
from time import perf_counter
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed as dist

from tokenweave_models.densification.accumulate import Accumulator
from tokenweave_models.densification.samplers import Sampler, check_bias, check_residual_share
from tokenweave_ops.sinr_field import BATCH, MAX_REALISATIONS

FIRST_ROUND = 2 * BATCH  # realisations before errors are looked at for the first time; then twice as many, and so on
CALL_S = 0.5  # about how long a call of a sampler may take, so that progress is seen and Ctrl-C heard
CALL_BYTES = 1 << 28  # of sums that a call may return
SAVE_EVERY_S = 60.0


class Progress(NamedTuple):
    """After a call: realisations done, how many are planned so far, and the largest standard error of a coverage when
    last looked at (nan before)."""

    num_realisations: int
    planned: int
    largest_se: float


class Run:
    """Of a sampler over its densities.

    Args:
        sampler: what is run.
        densities_per_km2: for messages.
        progress: called after every call of the sampler.
        checkpoint: a .npz file; what is there is gone on from, and it is kept up to date. None keeps nothing.
        identity: JSON of what makes two runs the same; a checkpoint of another one is refused.
        group: ranks that share the work. All of them must make the same calls.

    Raises:
        ValueError: the checkpoint is broken or of another run.
    """

    def __init__(
        self,
        sampler: Sampler,
        densities_per_km2: np.ndarray,
        progress: Callable[[Progress], None],
        checkpoint: str | Path | None,
        identity: str,
        group: dist.ProcessGroup | None,
    ):
        self.sampler, self.densities = sampler, densities_per_km2
        self._progress, self._group, self._identity = progress, group, identity
        self._rank, self._world = (group.rank(), group.size()) if group is not None else (0, 1)
        self._checkpoint = Path(checkpoint) if checkpoint else None
        self.accumulator = Accumulator((len(densities_per_km2), sampler.items), sampler.histogram_shape)
        self._largest_se = nan
        self._saved_s = perf_counter()
        bytes_per_batch = len(densities_per_km2) * max(sampler.items, 1) * 16
        self._most_at_once = max(1, min(MAX_REALISATIONS // BATCH, CALL_BYTES // bytes_per_batch))
        self._at_once = 1  # batches in the next call of each rank
        self._resume()
        self._whole = self.accumulator.state_dict()  # of the last moment when all was whole: what an interrupt leaves

    def extend_to(self, num_realisations: int) -> None:
        """Until there are so many.

        Raises:
            ValueError: there are more already, or what was found says that the method cannot answer.
        """
        if num_realisations < self.accumulator.num_batches * BATCH:
            raise ValueError(
                f"sweep: num_realisations must be at least the {self.accumulator.num_batches * BATCH} that the "
                f"checkpoint holds, got {num_realisations}"
            )
        whole, rest = divmod(num_realisations, BATCH)
        try:
            while self.accumulator.num_batches < whole:
                self._step(whole, num_realisations)
            if rest:  # every rank on its own: shorter than asking for it
                last = self._call(whole, 1, rest)
                self.accumulator.add_last(*last, rest)
                self._report(num_realisations)
        except KeyboardInterrupt:
            self._save()
            raise
        self._save()
        self._check_shares()

    def extend_until(self, target_se: float, relative: bool, most_realisations: int) -> bool:
        """Until no coverage (no rate, where there are no coverages) has a larger error; whether that was reached.

        The run is looked at after fixed numbers of realisations, each twice the one before, so that one that was
        interrupted ends where it would have.
        """
        judged = slice(self.sampler.num_moments, None) if self.sampler.items > self.sampler.num_moments else slice(0, 1)
        goal = FIRST_ROUND
        while True:
            if goal >= self.accumulator.num_realisations:
                self.extend_to(min(goal, most_realisations))
                mean, error = (values[:, judged] for values in self.estimate())
                self._largest_se = float(np.nanmax(error, initial=0.0))
                if not (error > target_se * (mean if relative else 1.0)).any():
                    return True
                if goal >= most_realisations:
                    return False
            goal *= 2

    def estimate(self) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard errors, ``[densities, items]``. A count of none or all among n is uncertain by 1 / n."""
        mean, error = self.accumulator.estimate()
        if self.sampler.counts:
            coverage = mean[:, self.sampler.num_moments :]
            sure = (coverage == 0) | (coverage == 1)
            error[:, self.sampler.num_moments :][sure] = 1 / self.accumulator.num_realisations
        return mean, error

    def _step(self, whole: int, planned: int) -> None:
        begin_s = perf_counter()
        first = self.accumulator.num_batches
        count = min(self._at_once * self._world, whole - first)
        share = -(-count // self._world)  # of each rank; the last ones may have less, or nothing
        own = max(0, min(share, count - self._rank * share))
        sums, histogram = self._call(first + self._rank * share, own, own * BATCH)
        if self._group is not None:
            sums, histogram = self._gather(sums, histogram, share)
        self.accumulator.add(sums[:count], histogram)
        self._whole = self.accumulator.state_dict()
        self._adapt(perf_counter() - begin_s)
        self._check_shares()
        self._report(planned)
        if perf_counter() - self._saved_s > SAVE_EVERY_S:
            self._save()

    def _call(self, first_batch: int, batches: int, num_realisations: int) -> tuple[np.ndarray, np.ndarray]:
        if num_realisations == 0:
            shape = (0, len(self.densities), self.sampler.items, 2)
            return np.zeros(shape), np.zeros(self.sampler.histogram_shape, dtype=np.int64)
        found = self.sampler.run(first_realisation=first_batch * BATCH, num_realisations=num_realisations)
        return found.sums.cpu().numpy(), found.histogram.cpu().numpy()

    def _gather(self, sums: np.ndarray, histogram: np.ndarray, share: int) -> tuple[np.ndarray, np.ndarray]:
        device = "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"
        own = torch.zeros((share, *sums.shape[1:]), dtype=torch.float64)
        own[: len(sums)] = torch.from_numpy(sums)
        everyone = [torch.empty_like(own, device=device) for _ in range(self._world)]
        dist.all_gather(everyone, own.to(device), group=self._group)
        total = torch.from_numpy(histogram).to(device)
        dist.all_reduce(total, group=self._group)
        return torch.cat(everyone).cpu().numpy(), total.cpu().numpy()

    def _adapt(self, elapsed_s: float) -> None:
        """The next call's size. How a run is cut does not show in it, but ranks must cut it alike."""
        if self._group is not None:
            slowest = torch.tensor(elapsed_s)
            slowest = slowest.cuda() if dist.get_backend(self._group) == "nccl" else slowest
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=self._group)
            elapsed_s = float(slowest)
        if elapsed_s < CALL_S / 2:
            self._at_once = min(2 * self._at_once, self._most_at_once)
        elif elapsed_s > 2 * CALL_S:
            self._at_once = max(1, self._at_once // 2)

    def _check_shares(self) -> None:
        if self.sampler.num_moments:
            check_residual_share(self.sampler, self.accumulator.estimate()[0][:, 2], self.densities)
            check_bias(self.sampler, self.accumulator.mean_square()[:, 2], self.densities)

    def _report(self, planned: int) -> None:
        self._progress(Progress(self.accumulator.num_realisations, planned, self._largest_se))

    # ------------------------------------------------------------------------------------------------- the checkpoint

    def _save(self) -> None:
        self._saved_s = perf_counter()
        if self._checkpoint is None or self._rank != 0:
            return
        unfinished = self._checkpoint.with_suffix(".part")
        with unfinished.open("wb") as file:
            np.savez(file, identity=np.array(self._identity), **self._whole)
        unfinished.replace(self._checkpoint)  # the old one stays until the new one is whole

    def _resume(self) -> None:
        state = self._read() if self._rank == 0 else None
        if self._group is not None:
            box = [state]
            dist.broadcast_object_list(box, group=self._group, group_src=0)
            state = box[0]
        if isinstance(state, str):
            raise ValueError(state)
        if state is not None:
            self.accumulator.load_state_dict(state)

    def _read(self) -> dict[str, np.ndarray] | str | None:
        """The state, or what is wrong with it (a sentence that all ranks can raise), or None if there is none."""
        path = self._checkpoint
        if path is None or not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                state = dict(file)
                identity = str(state.pop("identity"))
        except (OSError, KeyError, ValueError, EOFError, TypeError, BadZipFile) as error:
            return f"sweep: checkpoint {path.name} cannot be read: {error}"
        if identity != self._identity:
            ours, theirs = json.loads(self._identity), json.loads(identity)
            names = ", ".join(name for name in ours if ours[name] != theirs.get(name))
            return f"sweep: checkpoint must be of the same sweep, got {path.name} of another {names}"
        return state
