"""What TokenWeave's authors measured on H100 DGX machines, bf16, batch of one prefill.

Numbers from the csv files and figures of https://github.com/microsoft/tokenweave at commit f483d1c (arXiv 2505.11329).
None of them was measured by this project.
"""

from tokenweave_ops import SplitOverride

TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)

# End to end, 8 GPUs (csv of figure 11a), milliseconds. "reference" is vLLM with the multimem all-reduce;
# "no_communication" is the same with the all-reduce deleted.
LATENCY_MS = {
    "llama-3.3-70b": {
        "reference": (53.7, 94.2, 179.5, 356.0, 744.1, 1640.0, 3918.0),
        "no_communication": (41.9, 74.9, 144.9, 289.5, 610.2, 1371.0, 3338.0),
        "weave": (46.2, 76.7, 142.2, 279.8, 585.3, 1326.0, 3282.0),
    },
    "qwen2.5-72b": {
        "reference": (54.3, 97.1, 183.3, 358.5, 754.6, 1656.0, 3978.0),
        "no_communication": (42.5, 77.8, 149.1, 292.6, 624.0, 1393.0, 3410.0),
        "weave": (47.6, 79.0, 146.7, 288.4, 607.9, 1369.0, 3220.0),
    },
    "mixtral-8x22b": {
        "reference": (42.9, 68.2, 121.4, 230.7, 471.0, 1024.0, 2383.0),
        "no_communication": (36.4, 57.1, 102.2, 195.6, 405.1, 891.0, 2110.0),
        "weave": (69.1, 69.9, 107.7, 199.4, 399.2, 875.0, 2104.0),
    },
}

# Reference over weave on 4 GPUs (csv of figure 11b).
SPEEDUP_4_GPUS = {
    "llama-3.3-70b": (1.13, 1.10, 1.13, 1.15, 1.14, 1.13, 1.11),
    "qwen2.5-72b": (1.12, 1.11, 1.10, 1.16, 1.14, 1.12, 1.06),
}


def _splits(*rows: tuple[int, int, int]) -> dict[int, SplitOverride]:
    return {
        num_tokens: SplitOverride(offset, attention_ctas, mlp_ctas)
        for num_tokens, (attention_ctas, mlp_ctas, offset) in zip(TOKENS, rows, strict=True)
    }


# The tuned prefill tables for 8 GPUs: attention CTAs, MLP CTAs, offset.
SPLITS = {
    "llama-3.3-70b": _splits((4, 2, 0), (4, 4, 0), (4, 4, 0), (8, 4, 256), (8, 8, 256), (8, 4, 0), (4, 4, 0)),
    "qwen2.5-72b": _splits((4, 8, 0), (4, 8, 0), (8, 8, 256), (8, 4, 0), (8, 4, 0), (8, 8, 0), (8, 8, 256)),
    "mixtral-8x22b": _splits((2, 4, 0), (8, 2, 0), (8, 2, 256), (8, 2, 256), (8, 2, 256), (8, 4, 128), (8, 4, 0)),
}
# Those for 4 GPUs are mostly 8 and 8 or 8 and 4 CTAs.
SPLITS_4_GPUS = _splits(*[(8, 8, 0)] * len(TOKENS))

# The fused kernel, 8 GPUs, hidden 8192, by tokens and CTAs (csv of figure 10), microseconds. It slows down beyond 32.
FUSED_US = {
    256: {2: 61.2, 4: 42.0, 8: 33.7, 16: 30.1, 32: 31.9},
    1024: {2: 207.8, 4: 128.0, 8: 86.6, 16: 75.4, 32: 78.7},
    4096: {2: 792.8, 4: 465.9, 8: 290.8, 16: 258.2, 32: 259.8},
    8192: {2: 1571.0, 4: 913.8, 8: 561.7, 16: 503.5, 32: 502.3},
    32768: {2: 6241.0, 4: 3558.0, 8: 2184.0, 16: 1972.0, 32: 1966.0},
}
# The same with its best number of CTAs (csv of figure 4), for other numbers of tokens.
FUSED_BEST_US = {64: 17.1, 128: 21.7, 512: 45.1, 2048: 137.1}
# RMSNorm with residual add over all rows, hidden 8192 (csv of figure 4).
NORM_US = {
    64: 8.4,
    128: 9.6,
    256: 11.9,
    512: 18.3,
    1024: 29.9,
    2048: 51.8,
    4096: 96.3,
    8192: 184.2,
    32768: 712.4,
}

# Gate-and-up GEMM, SiLU, down GEMM; hidden 8192, inner 3584 (figure 9): unsplit microseconds, and the time of two equal
# halves over it.
TWO_GEMMS_HIDDEN, TWO_GEMMS_INNER = 8192, 3584
TWO_GEMMS = {
    1024: (306.0, 1.044),
    1280: (372.0, 1.228),
    1536: (436.0, 1.116),
    1792: (495.0, 1.160),
    2048: (559.0, 1.084),
    2304: (622.0, 1.121),
    2560: (686.0, 1.083),
    2816: (750.0, 1.096),
    3072: (816.0, 1.067),
    3328: (877.0, 1.087),
    3584: (871.0, 1.138),
    3840: (960.0, 1.036),
}
