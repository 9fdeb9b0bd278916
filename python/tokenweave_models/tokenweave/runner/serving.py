"""Continuous batching: which tokens of which requests the next pass works on. Nothing here computes.

A request's tokens are its prompt and what was generated since. Each pass takes from every request that has begun the
tokens that are not cached yet: one, if it is generating, or a chunk of its prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Request:
    """What to continue, and how far it has come.

    Attributes:
        number: names the request; draws depend on it.
        prompt: its tokens, at least one.
        max_new_tokens: when to stop, at least 1.
        stop_tokens: tokens that end it earlier; the one that did is the last of ``generated``.
        slot: its place in the cache, None before it has begun and after it has ended.
        num_cached: how many of its tokens the cache holds.
    """

    number: int
    prompt: Sequence[int]
    max_new_tokens: int
    stop_tokens: Collection[int] = ()
    generated: list[int] = field(default_factory=list)
    slot: int | None = None
    num_cached: int = 0

    def __post_init__(self) -> None:
        if len(self.prompt) < 1:
            raise ValueError(f"Request {self.number}: prompt must have at least one token, got none")
        if self.max_new_tokens < 1:
            raise ValueError(f"Request {self.number}: max_new_tokens must be at least 1, got {self.max_new_tokens}")

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def is_finished(self) -> bool:
        return len(self.generated) >= self.max_new_tokens or (
            len(self.generated) > 0 and self.generated[-1] in self.stop_tokens
        )

    def tokens(self, begin: int, end: int) -> list[int]:
        """Those at positions begin to end."""
        split = len(self.prompt)
        return [*self.prompt[begin:end], *self.generated[max(0, begin - split) : max(0, end - split)]]


@dataclass(frozen=True)
class Chunk:
    """The tokens of one request that a pass works on: ``num_tokens`` from position ``begin`` on."""

    request: Request
    begin: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.begin + self.num_tokens

    @property
    def is_last_known(self) -> bool:
        """Whether the pass tells the request's next token."""
        return self.end == self.request.num_tokens


class Scheduler:
    """Requests in the order they came, over the slots of a cache and a budget of tokens per pass.

    Requests that generate come first, one token each; what is left of the budget goes to prompts, first come first
    served, the last of them cut to what is left. A waiting request begins as soon as a slot is free and the budget
    reaches it. Nobody starves: as the budget is at least the number of slots, a prompt that has begun advances in every
    pass, and what has begun ends.

    Args:
        num_slots: requests that may be under way at once.
        token_budget: tokens per pass, at least num_slots.
        max_len: tokens that a slot holds.
    """

    def __init__(self, num_slots: int, token_budget: int, max_len: int):
        if num_slots < 1:
            raise ValueError(f"Scheduler: num_slots must be at least 1, got {num_slots}")
        if token_budget < num_slots:
            raise ValueError(
                f"Scheduler: token_budget must be at least num_slots={num_slots}, so that all requests advance, got "
                f"{token_budget}"
            )
        self.token_budget, self.max_len = token_budget, max_len
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order they began, which is the order they came
        self._free_slots = list(range(num_slots))[::-1]

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, request: Request) -> None:
        # The last generated token is never cached.
        needed = len(request.prompt) + request.max_new_tokens - 1
        if needed > self.max_len:
            raise ValueError(
                f"Scheduler: a request must fit {self.max_len} tokens, got {len(request.prompt)} of prompt and "
                f"{request.max_new_tokens} new ones for request {request.number}"
            )
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """The next pass; empty if there is nothing to do. Its outcome is told by :meth:`advance`."""
        left = self.token_budget
        generating = [request for request in self.running if request.generated]
        chunks = [Chunk(request, request.num_cached, 1) for request in generating]
        left -= len(chunks)
        prefilling = deque(request for request in self.running if not request.generated)
        while left > 0:
            if prefilling:
                request = prefilling.popleft()
            elif self.waiting and self._free_slots:
                request = self.waiting.popleft()
                request.slot = self._free_slots.pop()
                self.running.append(request)
            else:
                break
            num_tokens = min(left, len(request.prompt) - request.num_cached)
            chunks.append(Chunk(request, request.num_cached, num_tokens))
            left -= num_tokens
        return chunks

    def advance(self, chunks: Sequence[Chunk], new_tokens: Sequence[int]) -> None:
        """The pass over ``chunks`` is done: new_tokens are those after the chunks that are ``is_last_known``, in order.
        Requests that are finished give their slots back."""
        going_on = [chunk.request for chunk in chunks if chunk.is_last_known]
        for chunk in chunks:
            chunk.request.num_cached = chunk.end
        for request, token in zip(going_on, new_tokens, strict=True):
            request.generated.append(token)
            if request.is_finished:
                self._free_slots.append(request.slot)
                request.slot = None
                self.running.remove(request)
