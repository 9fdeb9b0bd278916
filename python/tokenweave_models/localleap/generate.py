"""Text by a masked diffusion language model: behind prompts (``generate``), or where a text has masks (``infill``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenweave_models.localleap.config import ModelConfig
from tokenweave_models.localleap.decoding import BlockDecoder, Commit, Rules, Selector, Statistics, padded_length
from tokenweave_models.localleap.model import DiffusionModel
from tokenweave_models.localleap.passes import CACHES
from tokenweave_ops import DecodeRequests, decode_step_

MAX_BLOCK_LENGTH = 1024  # of decode_step_
TOO_LONG = "generate: a prompt with its new tokens must have at most {} positions, got {}"

Tokens = Sequence[int] | Tensor
PerSequence = float | int | Sequence[float] | Sequence[int] | None
OnCommit = Callable[[list[Commit]], None]


@dataclass(frozen=True)
class Generation:
    """What came out, in the order of the call.

    Attributes:
        tokens: of each sequence, int64 on the CPU: of ``generate`` the new ones, of ``infill`` the whole text.
        statistics: of each sequence.
        steps: of the batch: decode_step_ calls, which the sequences shared.
        model_s, selector_s: time of all passes of the model and of all decode_step_ calls.
    """

    tokens: list[Tensor]
    statistics: list[Statistics]
    steps: int
    model_s: float
    selector_s: float


def generate(
    model: DiffusionModel,
    prompts: Sequence[Tokens],
    *,
    policy: str | Sequence[str] = "local_leap",
    threshold: PerSequence = None,
    relaxed_threshold: PerSequence = None,
    radius: PerSequence = None,
    temperature: PerSequence = None,
    seed: PerSequence = None,
    cache: str = "none",
    gen_length: int = 128,
    block_length: int = 32,
    steps: int | None = None,
    forbidden_ids: Sequence[int] = (),
    deferred_ids: Sequence[int] = (),
    vocab_limit: int | None = None,
    early_stop: bool = False,
    exact: bool = False,
    cuda_graph: bool = False,
    on_commit: OnCommit | None = None,
    selector: Selector = decode_step_,
) -> Generation:
    """gen_length tokens behind each prompt, block by block from the left, by LocalLeap's outer loop (algorithm 1 of
    arXiv 2510.07081, which is that of LLaDA) with any of the selection policies.

    Sequences of any length share a batch: they are padded on the left, each goes on to its next block when it is ready,
    and leaves when it is done. A sequence decodes the same alone and in any batch, up to the rounding of the model's
    matrix products, whose order of summation may depend on how many rows they have.

    Args:
        prompts: token ids, without masks. They may be empty.
        policy: one for all, or one for each prompt; see ``tokenweave_ops.POLICIES``.
        threshold, relaxed_threshold, radius, temperature, seed: of the policy (``tokenweave_ops.DecodeRequests``), a
            number or one for each prompt. None: as published; temperature and seed 0.
        cache: "none": every pass computes all positions. "prefix", "dual": see ``passes``; faster and not the same.
        gen_length: a multiple of block_length.
        block_length: up to 1024.
        steps: over how many steps topk (and klass, where nothing is stable) spreads a block. None: block_length.
        forbidden_ids, deferred_ids: up to 16 each: never chosen; ranked last. The mask is never chosen.
        vocab_limit: ids from here on are padding of the vocabulary. None: none are.
        early_stop: end a sequence behind the first block that has the model's eos_id; what is left is filled with it.
        exact: decide in float64 where fp32 is too close to a threshold to call.
        cuda_graph: replay the passes over blocks as a CUDA graph. Needs a GPU and the dual cache.
        on_commit: called after each step with what it committed, in the order of sequences and positions.
        selector: called as ``tokenweave_ops.decode_step_`` is, instead of it.

    Raises:
        ValueError: an argument makes no sense, or does not fit the model.
        RuntimeError: numbers of a policy make no sense (decode_step_ says which).
    """
    texts, blocks = plan_generate(model.config, prompts, gen_length, block_length)
    found = _decode(
        model, texts, blocks, block_length,
        policy=policy, threshold=threshold, relaxed_threshold=relaxed_threshold, radius=radius,
        temperature=temperature, seed=seed, cache=cache, steps=steps, forbidden_ids=forbidden_ids,
        deferred_ids=deferred_ids, vocab_limit=vocab_limit, stop_id=model.config.eos_id if early_stop else None,
        exact=exact, cuda_graph=cuda_graph, on_commit=on_commit, selector=selector,
    )  # fmt: skip
    return replace(found, tokens=[tokens[-gen_length:] for tokens in found.tokens])


def infill(
    model: DiffusionModel,
    texts: Sequence[Tokens],
    *,
    policy: str | Sequence[str] = "local_leap",
    threshold: PerSequence = None,
    relaxed_threshold: PerSequence = None,
    radius: PerSequence = None,
    temperature: PerSequence = None,
    seed: PerSequence = None,
    cache: str = "none",
    block_length: int = 32,
    steps: int | None = None,
    forbidden_ids: Sequence[int] = (),
    deferred_ids: Sequence[int] = (),
    vocab_limit: int | None = None,
    exact: bool = False,
    cuda_graph: bool = False,
    on_commit: OnCommit | None = None,
    selector: Selector = decode_step_,
) -> Generation:
    """The texts with tokens in place of their masks (the model's mask_id).

    A text is cut into blocks from its first token on; the last block, if it is cut short, reaches back instead. Blocks
    without masks cost nothing. The arguments are those of :func:`generate`.
    """
    found, blocks = plan_infill(model.config, texts, block_length)
    return _decode(
        model, found, blocks, block_length,
        policy=policy, threshold=threshold, relaxed_threshold=relaxed_threshold, radius=radius,
        temperature=temperature, seed=seed, cache=cache, steps=steps, forbidden_ids=forbidden_ids,
        deferred_ids=deferred_ids, vocab_limit=vocab_limit, stop_id=None,
        exact=exact, cuda_graph=cuda_graph, on_commit=on_commit, selector=selector,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- plans


def plan_generate(
    config: ModelConfig, prompts: Sequence[Tokens], gen_length: int, block_length: int
) -> tuple[list[Tensor], list[Sequence[int]]]:
    """The texts with masks behind the prompts, and the first positions of the blocks of each.

    Raises:
        ValueError: as :func:`generate`, as far as the weights need not be there.
    """
    _check_block_length(block_length)
    if gen_length < 1 or gen_length % block_length:
        raise ValueError(f"generate: gen_length must be a multiple of block_length={block_length}, got {gen_length}")
    texts = [_text_of(config, prompt, f"prompt {number}") for number, prompt in enumerate(prompts)]
    for number, text in enumerate(texts):
        if (text == config.mask_id).any():
            raise ValueError(
                f"generate: prompt {number} must not have the mask's id {config.mask_id}; infill() decodes masks"
            )
    longest = max(map(len, texts), default=0) + gen_length
    if longest > config.max_positions:  # before so many masks are made
        raise ValueError(TOO_LONG.format(config.max_positions, longest))
    blocks = [range(len(text), len(text) + gen_length, block_length) for text in texts]
    masks = torch.full((gen_length,), config.mask_id)
    texts = [torch.cat((text, masks)) for text in texts]
    _check_length(config, texts, blocks)
    return texts, blocks


def plan_infill(
    config: ModelConfig, texts: Sequence[Tokens], block_length: int
) -> tuple[list[Tensor], list[Sequence[int]]]:
    """The texts, and the first positions of those of their blocks that have masks.

    Raises:
        ValueError: as :func:`infill`, as far as the weights need not be there.
    """
    _check_block_length(block_length)
    found = [_text_of(config, text, f"text {number}") for number, text in enumerate(texts)]
    blocks: list[Sequence[int]] = []
    for text in found:
        with_masks = ((text == config.mask_id).nonzero().flatten() // block_length).unique().tolist()
        blocks.append([min(index * block_length, len(text) - block_length) for index in with_masks])
    _check_length(config, found, blocks)
    return found, blocks


def _check_block_length(block_length: int) -> None:
    if not 1 <= block_length <= MAX_BLOCK_LENGTH:
        raise ValueError(f"generate: block_length must be 1 to {MAX_BLOCK_LENGTH}, got {block_length}")


def _text_of(config: ModelConfig, tokens: Tokens, name: str) -> Tensor:
    text = torch.as_tensor(tokens).cpu()
    if text.ndim != 1 or (len(text) and text.dtype not in (torch.int64, torch.int32)):
        raise ValueError(f"generate: {name} must be token ids, [num_tokens] int64, got {list(text.shape)} {text.dtype}")
    if len(text) and not 0 <= text.min() <= text.max() < config.vocab_size:
        raise ValueError(
            f"generate: {name} must have tokens 0 to {config.vocab_size - 1}, got {text.min()} to {text.max()}"
        )
    return text.to(torch.int64)


def _check_length(config: ModelConfig, texts: list[Tensor], blocks: list[Sequence[int]]) -> None:
    length = padded_length(texts, blocks, config.shifted)
    if length > config.max_positions:
        raise ValueError(TOO_LONG.format(config.max_positions, length))


def _decode(
    model: DiffusionModel, texts: list[Tensor], blocks: list[Sequence[int]], block_length: int, *,
    cache: str, steps: int | None, forbidden_ids: Sequence[int], deferred_ids: Sequence[int], vocab_limit: int | None,
    stop_id: int | None, exact: bool, cuda_graph: bool, on_commit: OnCommit | None, selector: Selector, **numbers,
) -> Generation:  # fmt: skip
    device = model.embed_tokens.weight.device
    if cache not in CACHES:
        raise ValueError(f"generate: cache must be one of {', '.join(CACHES)}, got {cache!r}")
    if cuda_graph and (device.type != "cuda" or cache != "dual"):
        raise ValueError(
            f"generate: cuda_graph must be False unless on a GPU with cache 'dual', got {device}, {cache!r}"
        )
    if steps is not None and steps < 1:
        raise ValueError(f"generate: steps must be at least 1, got {steps}")
    steps = block_length if steps is None else steps
    given = {name: value for name, value in numbers.items() if value is not None}
    requests = DecodeRequests.make(len(texts), block_length, **given, steps=steps, device=device)

    def ids(listed: Sequence[int]) -> Tensor | None:
        return torch.tensor(list(listed), dtype=torch.int64, device=device) if len(listed) else None

    rules = Rules(
        cache=cache, steps=steps, forbidden=ids(forbidden_ids), deferred=ids(deferred_ids), vocab_limit=vocab_limit,
        stop_id=stop_id, exact=exact, cuda_graph=cuda_graph,
    )  # fmt: skip
    decoder = BlockDecoder(model, texts, blocks, requests, rules, selector)
    for commits in decoder:
        if on_commit is not None:
            on_commit(commits)
    model_s, selector_s = decoder.total_seconds()
    return Generation(decoder.results, decoder.statistics(), decoder.num_steps, model_s, selector_s)
