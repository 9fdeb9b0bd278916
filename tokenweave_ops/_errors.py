"""The errors of calls that the ranks of a workspace could not finish."""

from __future__ import annotations

import re


class CommunicationError(RuntimeError):
    """The ranks of a workspace could not finish a call. The message names op, stage, rank, peer, block and channel."""


class CommunicationTimeout(CommunicationError):
    """A rank did not come within the deadline."""


class RankDisagreement(CommunicationError):
    """Ranks came with different arguments, or one refused its own."""


class PeerLost(CommunicationError):
    """The process of a rank has ended, or it has closed its workspace."""


_ERRORS = {error.__name__: error for error in (CommunicationError, CommunicationTimeout, RankDisagreement, PeerLost)}
_NAMED = re.compile(rf"\w+: ({'|'.join(_ERRORS)}): ")


def named_error(error: RuntimeError) -> RuntimeError:
    """The error an op raised, as the class that its text names: torch knows RuntimeError only."""
    found = _NAMED.match(str(error))
    return _ERRORS[found[1]](str(error)) if found else error
