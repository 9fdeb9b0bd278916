"""Benchmarks of family anchor_decoding: decode_step_ with LocalLeap, a sequence for every 32 rows, and its first half,
confidence_scan.

A step that has committed leaves less to do for the next one, so the tokens are masked again before every call: on a CPU
outside the timed part; on a GPU, where one graph holds many calls, inside it and for every contestant alike. What that
copy costs there is measured beside them, as `reset`.
"""

from __future__ import annotations

from functools import partial

import torch

import tokenweave_ops
from bench import selector_formulations as formulations
from bench.harness import RETURNED, Case, Contestant
from bench.machines import Buffer, Limit
from bench.norm_formulations import compiled_afresh
from bench.selector_formulations import BLOCK_LENGTH, FAMILY, MASK_ID
from tokenweave_ops import DecodeRequests

ROWS = (1, 32, 128, 256, 1024, 2048)
CPU_MOST_ROWS = 256
VOCABULARIES = (126464, 152064)  # LLaDA, Dream
BF16 = torch.bfloat16
CONFIDENCE_ERROR = 1e-3  # torch in fp32 is off by up to 1.2e-4 here, a bf16 softmax by 4e-3
EAGER_SCAN = "logits.float().softmax(-1).max(-1)"
COMPILED_SCAN = "torch.compile(max-autotune) of 1 / (logits.float() - max).exp().sum(-1) beside logits.max(-1)"
SELECTION = "windows by max_pool1d, torch.where, all rows read"


def cases(device: str, quick: bool) -> list[Case]:
    rows = [r for r in ROWS if device == "cuda" or r <= CPU_MOST_ROWS]
    shapes = [(r, vocab, BF16) for vocab in VOCABULARIES for r in rows]
    first = (32, VOCABULARIES[0], BF16)
    shapes.remove(first)
    shapes = [first, *shapes, *((32, VOCABULARIES[0], dtype) for dtype in (torch.float16, torch.float32))]
    if quick:
        shapes = [first] if device == "cpu" else [first, (1024, VOCABULARIES[0], BF16)]
    steps = [_step_case(*shape, device) for shape in shapes]
    return [
        steps[0],
        _step_case(*first, device, half_masked=True),
        *steps[1:],
        *(_scan_case(*s, device) for s in shapes),
    ]


def _block(rows: int) -> tuple[int, int]:
    """batch, block_length"""
    return (rows // BLOCK_LENGTH, BLOCK_LENGTH) if rows >= BLOCK_LENGTH else (1, rows)


def _requests(batch: int, block_length: int, device: str) -> DecodeRequests:
    return DecodeRequests.make(
        batch, block_length, policy="local_leap", threshold=formulations.THRESHOLD,
        relaxed_threshold=formulations.RELAXED_THRESHOLD, radius=formulations.RADIUS, device=device,
    )  # fmt: skip


# --- the whole step ---------------------------------------------------------------------------------------------------


def _step_case(rows: int, vocab: int, dtype: torch.dtype, device: str, half_masked: bool = False) -> Case:
    batch, block_length = _block(rows)
    fill_tokens = formulations.fill_half_masked if half_masked else formulations.fill_masked
    masked_rows = rows // 2 if half_masked else rows
    steps = {
        "tokenweave": (
            "tokenweave_ops.decode_step_(logits, tokens, requests), policy local_leap; reads masked rows only",
            partial(_our_step, _requests(batch, block_length, device)), False,
        ),
        "reference": (
            "the published selector: per sequence argmax, softmax in float64, gather, then a Python loop with .item()",
            formulations.published_step, False,
        ),
        "eager": (f"{EAGER_SCAN}; {SELECTION}", formulations.eager_step, False),
        "compile": (f"{COMPILED_SCAN}; {SELECTION}; one graph", formulations.compiled_step, True),
    }  # fmt: skip
    contestants = [_step_contestant(name, *step, device) for name, step in steps.items()]
    if device == "cuda":
        contestants.append(Contestant("reset", "tokens.copy_(masked tokens) alone", _reset, yardstick=True))
    tokens = Buffer((batch, block_length), torch.int64, fill_tokens)
    return Case(
        family=FAMILY, op="decode_step_", case=f"{rows}x{vocab}" + " half masked" * half_masked, dtype=dtype,
        buffers={
            "logits": Buffer((batch, block_length, vocab), dtype, formulations.fill_logits),
            "tokens": tokens, "start": tokens,
        },
        contestants=contestants,
        reference=formulations.exact_step,
        tolerance=1e-6,  # below 1 / vocab: every token must be the same
        bytes=masked_rows * vocab * dtype.itemsize,
        flops=4 * masked_rows * vocab,  # compare, multiply-add and add; an exp2 is not counted
        limit=Limit("read", ("logits",)), independent_rows=False,
    )  # fmt: skip


def _our_step(requests, logits, tokens):
    tokenweave_ops.decode_step_(logits, tokens, requests, mask_id=MASK_ID)


def _reset(buffers):
    return partial(buffers["tokens"].copy_, buffers["start"])


def _step_contestant(name: str, formulation: str, step, compiled: bool, device: str) -> Contestant:
    ready = None

    def bind(buffers):
        nonlocal ready
        ready = ready or (compiled_afresh(step) if compiled else step)
        call = partial(ready, buffers["logits"], buffers["tokens"])
        if device == "cpu":
            return call
        reset = _reset(buffers)

        def reset_and_call():
            reset()
            call()

        return reset_and_call

    if device == "cpu":
        return Contestant(name, formulation, bind, {"tokens": "tokens"}, undo=_reset)
    return Contestant(name, f"tokens.copy_(masked tokens), then {formulation}", bind, {"tokens": "tokens"})


# --- the scan alone ---------------------------------------------------------------------------------------------------


def _scan_case(rows: int, vocab: int, dtype: torch.dtype, device: str) -> Case:
    batch, block_length = _block(rows)
    requests = _requests(batch, block_length, device)

    def ours(buffers):
        scan = partial(
            tokenweave_ops.confidence_scan, buffers["logits"], buffers["tokens"], requests, mask_id=MASK_ID
        )  # fmt: skip
        return lambda: scan().statistics[..., 0]

    def theirs(scan, compiled):
        ready = None

        def bind(buffers):
            nonlocal ready
            ready = ready or (compiled_afresh(scan) if compiled else scan)
            call = partial(ready, buffers["logits"])
            return lambda: call()[0]

        return bind

    outputs = {"confidence": RETURNED}
    return Case(
        family=FAMILY, op="confidence_scan", case=f"{rows}x{vocab}", dtype=dtype,
        buffers={
            "logits": Buffer((batch, block_length, vocab), dtype, formulations.fill_logits),
            "tokens": Buffer((batch, block_length), torch.int64, formulations.fill_masked),
        },
        contestants=[
            Contestant("tokenweave", "tokenweave_ops.confidence_scan(logits, tokens, requests)", ours, outputs),
            Contestant("eager", EAGER_SCAN, theirs(formulations.eager_scan, False), outputs),
            Contestant("compile", COMPILED_SCAN, theirs(formulations.compiled_scan, True), outputs),
        ],
        reference=formulations.exact_scan,
        tolerance=CONFIDENCE_ERROR,
        bytes=rows * vocab * dtype.itemsize,
        flops=4 * rows * vocab,
        limit=Limit("read", ("logits",)), independent_rows=False,
    )  # fmt: skip
