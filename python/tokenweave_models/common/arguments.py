"""Types of command line arguments."""

import argparse

MOST = 2**31 - 1  # of a number of things: beyond it, arithmetic on sizes would have to fear 64 bits


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    if value > MOST:
        raise argparse.ArgumentTypeError(f"must be at most {MOST}, got {value}")
    return value
