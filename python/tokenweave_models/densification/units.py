"""What the command line's words mean: quantities with their units, path losses, fading. One grammar, stated here.

Numbers are decimal (``0.5``, ``1e-3``). Blanks are ignored. A unit follows its number, or the last of a list.

==============  =====================================================================================================
field           allowed form
==============  =====================================================================================================
densities       ``LOW:HIGH:COUNT/UNIT``, a logarithmic grid with both ends; or ``D1,D2,.../UNIT``. UNIT, never left out,
                is ``km2`` or ``m2``. ``1e-1:1e6:29/km2``, ``0.5,2/m2``
thresholds      in dB: ``LOW:HIGH:STEPdB``, both ends if STEP divides the range; or ``T1,T2,...dB``. Linear: the same
                list with ``x``: ``1x``, ``0.5,1,2x``. ``-10:20:1dB``, ``0dB``
length          ``10m``, ``40km``, ``0.1cm``
noise           ``0``; ``-92dBm``, against the transmit power; ``-122dB``, relative to the transmit power; a linear
                power relative to it, ``6e-13x``
power           ``30dBm`` or ``1W``, ``100mW``
path loss       ``slope:BETA``; ``ms:B0@R1,B1@R2,...,BK``, exponents and the breakpoint after each (lengths);
                ``stretched:A,B``, exp(A r^B) with r in metres; ``table:FILE``, lines ``distance_m loss_db``.
                Then, each at most once: ``;h=LENGTH`` (height), ``;min=LENGTH`` (shortest distance), ``;rinf=LENGTH``
                (radius of the disc). ``ms:0@10m,4;rinf=40km``
fading          factors joined by ``*``: ``none``, ``rayleigh``, ``gamma:K``, ``nakagami:M``, ``rice:KdB``,
                ``weibull:K``, ``lognormal:SdB``, ``suzuki:SdB``, ``pareto:ALPHA``, ``logpareto:G``, ``table:FILE``,
                lines ``mark P(above)``. ``rayleigh*lognormal:8dB``
==============  =====================================================================================================

Whatever else comes is refused with a :class:`UserError` that names the field, says what may stand there, and what came.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import reduce
from math import isfinite
from operator import mul
from pathlib import Path

import numpy as np

from tokenweave_models.common.errors import UserError
from tokenweave_models.densification.fading import (
    Fading,
    FadingTable,
    Gamma,
    LogNormal,
    LogPareto,
    Nakagami,
    NoFading,
    Pareto,
    Rayleigh,
    Rice,
    Suzuki,
    Weibull,
)
from tokenweave_models.densification.path_loss import MultiSlope, PathLoss, PathLossTable, StretchedExponential
from tokenweave_models.densification.samplers import MOST_DB

MOST_VALUES = 1024  # of densities, and of thresholds: what one call of a sampler takes
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_AREAS_PER_KM2 = {"km2": 1.0, "m2": 1e6}
_METRES = {"m": 1.0, "km": 1e3, "cm": 1e-2}
_WATTS = {"W": 1.0, "mW": 1e-3}

DENSITIES_FORM = "LOW:HIGH:COUNT/km2 or D1,D2,.../km2 (or /m2; the unit is never left out)"
THRESHOLDS_FORM = "LOW:HIGH:STEPdB or T1,T2,...dB, or linear T1,T2,...x"
LENGTH_FORM = "a length with its unit: 10m, 40km or 5cm"
NOISE_FORM = "0, -92dBm, -122dB (relative to the transmit power) or 6e-13x (linear, relative to it)"
POWER_FORM = "30dBm, 1W or 100mW"
PATH_LOSS_FORM = "slope:4, ms:0@10m,4, stretched:0.9,0.5 or table:FILE, then ;h=10m ;min=1m ;rinf=40km where wanted"
FADING_FORM = (
    "factors joined by *: none, rayleigh, gamma:K, nakagami:M, rice:6dB, weibull:K, lognormal:8dB, suzuki:8dB, "
    "pareto:ALPHA, logpareto:G, table:FILE"
)


def _refusal(field: str, form: str, text: str, why: str = "") -> UserError:
    return UserError(f"{field} must be {form}, got {text!r}{why and ': ' + why}")


def _number(field: str, form: str, text: str, word: str) -> float:
    if not re.fullmatch(_NUMBER, word) or not isfinite(float(word)):
        raise _refusal(field, form, text, f"{word!r} is not a finite number")
    return float(word)


def _compact(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _with_unit(field: str, form: str, text: str, units: dict[str, float]) -> float:
    match = re.fullmatch(rf"({_NUMBER})([A-Za-z]*)", _compact(text))
    if not match:
        raise _refusal(field, form, text)
    number, unit = match.groups()
    if unit not in units:
        raise _refusal(field, form, text, f"{unit!r} is not one of its units" if unit else "the unit is missing")
    return _number(field, form, text, number) * units[unit]


def parse_densities(text: str, field: str = "--densities") -> np.ndarray:
    """Densities per km^2, float64 ``[n]``, in the order given."""
    body, slash, unit = _compact(text).rpartition("/")
    if not slash:
        raise _refusal(field, DENSITIES_FORM, text, "the unit is missing")
    if unit not in _AREAS_PER_KM2:
        raise _refusal(field, DENSITIES_FORM, text, f"{unit!r} is not one of its units")
    if ":" in body:
        words = body.split(":")
        if len(words) != 3:
            raise _refusal(field, DENSITIES_FORM, text, "a grid is LOW:HIGH:COUNT")
        low, high = (_number(field, DENSITIES_FORM, text, word) for word in words[:2])
        if not re.fullmatch(r"\d+", words[2]) or not 2 <= int(words[2]) <= MOST_VALUES:
            raise _refusal(field, DENSITIES_FORM, text, f"COUNT is a whole number from 2 to {MOST_VALUES}")
        if not 0 < low < high:
            raise _refusal(field, DENSITIES_FORM, text, "a grid needs 0 < LOW < HIGH")
        values = np.geomspace(low, high, int(words[2]))
    else:
        values = np.array([_number(field, DENSITIES_FORM, text, word) for word in body.split(",")])
    if not (values > 0).all():
        raise _refusal(field, DENSITIES_FORM, text, "a density is positive")
    if len(values) > MOST_VALUES:
        raise _refusal(field, DENSITIES_FORM, text, f"there may be {MOST_VALUES} densities")
    return values * _AREAS_PER_KM2[unit]


def parse_thresholds(text: str, field: str = "--thresholds") -> np.ndarray:
    """SINR thresholds in dB, float64 ``[n]``, in the order given."""
    match = re.fullmatch(r"(.*?)(dB|x)", _compact(text))
    if not match:
        raise _refusal(field, THRESHOLDS_FORM, text, "the unit is missing")
    body, unit = match.groups()
    if re.search(r"[A-Za-z]", re.sub(_NUMBER, "", body)):
        raise _refusal(field, THRESHOLDS_FORM, text, "one unit, at the end, holds for all; dB and linear do not mix")
    if ":" in body:
        words = body.split(":")
        if len(words) != 3 or unit == "x":
            raise _refusal(field, THRESHOLDS_FORM, text, "a grid is LOW:HIGH:STEPdB")
        low, high, step = (_number(field, THRESHOLDS_FORM, text, word) for word in words)
        if not (low <= high and step > 0 and (high - low) / step < MOST_VALUES):
            raise _refusal(field, THRESHOLDS_FORM, text, f"LOW <= HIGH, STEP > 0 and at most {MOST_VALUES} of them")
        return _in_range(field, text, low + step * np.arange(int((high - low) / step + 1e-9) + 1))
    values = np.array([_number(field, THRESHOLDS_FORM, text, word) for word in body.split(",")])
    if len(values) > MOST_VALUES:
        raise _refusal(field, THRESHOLDS_FORM, text, f"there may be {MOST_VALUES} thresholds")
    if unit == "x":
        if not (values > 0).all():
            raise _refusal(field, THRESHOLDS_FORM, text, "a linear threshold is positive (0dB is 1x)")
        values = 10 * np.log10(values)
    return _in_range(field, text, values)


def _in_range(field: str, text: str, thresholds_db: np.ndarray) -> np.ndarray:
    if not (np.abs(thresholds_db) <= MOST_DB).all():
        raise _refusal(field, THRESHOLDS_FORM, text, f"thresholds are -{MOST_DB:g} to {MOST_DB:g} dB")
    return thresholds_db


def parse_length_m(text: str, field: str) -> float:
    """A length in metres, at least 0."""
    length = _with_unit(field, LENGTH_FORM, text, _METRES)
    if length < 0:
        raise _refusal(field, LENGTH_FORM, text, "a length is not negative")
    return length


def parse_power_dbm(text: str, field: str = "--transmit-power") -> float:
    """A power in dBm."""
    if _compact(text).endswith("dBm"):
        return _with_unit(field, POWER_FORM, text, {"dBm": 1.0})
    watts = _with_unit(field, POWER_FORM, text, _WATTS)
    if not watts > 0:
        raise _refusal(field, POWER_FORM, text, "a power is positive")
    return float(10 * np.log10(watts) + 30)


def _linear(field: str, text: str, db: float) -> float:
    if not -3000 <= db <= 3000:
        raise _refusal(field, NOISE_FORM, text, f"{db:g} dB is beyond what numbers hold, -3000 to 3000")
    return 10 ** (db / 10)


def parse_noise(text: str, transmit_power_dbm: float | None = None, field: str = "--noise") -> float:
    """Noise relative to the transmit power, linear. In dBm it needs the transmit power, which else has no use."""
    word = _compact(text)
    if re.fullmatch(rf"{_NUMBER}", word) and float(word) == 0:
        return 0.0
    if word.endswith("dBm"):
        if transmit_power_dbm is None:
            raise _refusal(field, NOISE_FORM, text, "in dBm it needs the transmit power")
        return _linear(field, text, _with_unit(field, NOISE_FORM, text, {"dBm": 1.0}) - transmit_power_dbm)
    if word.endswith("dB"):
        return _linear(field, text, _with_unit(field, NOISE_FORM, text, {"dB": 1.0}))
    noise = _with_unit(field, NOISE_FORM, text, {"x": 1.0})
    if noise < 0:
        raise _refusal(field, NOISE_FORM, text, "noise is not negative")
    return noise


# -------------------------------------------------------------------------------------------------- path loss, fading


def _built(field: str, text: str, build: Callable[[], object]):
    """What ``build`` makes; the law's own refusal, which names the argument and its range, becomes the user's."""
    try:
        return build()
    except ValueError as error:
        raise UserError(f"{field} {text!r}: {error}") from error


def _columns(field: str, text: str, path: str) -> np.ndarray:
    """float64 ``[lines, 2]`` of a text file; ``#`` begins a comment, a comma may stand between the columns."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field} {text!r}: cannot read the table: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].replace(",", " ").split()
        if not words:
            continue
        if len(words) != 2 or not all(re.fullmatch(_NUMBER, word) for word in words):
            raise UserError(f"{field} {text!r}: line {number} of the table must be two numbers, got {line.strip()!r}")
        rows.append([float(word) for word in words])
    if len(rows) < 2:
        raise UserError(f"{field} {text!r}: the table must have at least 2 lines, got {len(rows)}")
    return np.array(rows)


_GEOMETRY = {"h": "height_m", "min": "min_distance_m", "rinf": "r_inf_m"}


def parse_path_loss(text: str, field: str = "--path-loss") -> PathLoss:
    """The path loss that the words describe."""
    law, *options = text.strip().split(";")
    lengths = {}
    for option in options:
        name, equals, value = _compact(option).partition("=")
        if name not in _GEOMETRY or not equals:
            raise _refusal(field, PATH_LOSS_FORM, text, f"{option!r} is none of h=, min=, rinf=")
        if _GEOMETRY[name] in lengths:
            raise _refusal(field, PATH_LOSS_FORM, text, f"{name}= is given twice")
        lengths[_GEOMETRY[name]] = parse_length_m(value, f"{field}, {name}=")
    name, colon, rest = law.strip().partition(":")
    if not colon or not rest.strip():
        raise _refusal(field, PATH_LOSS_FORM, text)

    def numbers(words: Sequence[str]) -> list[float]:
        return [_number(field, PATH_LOSS_FORM, text, word) for word in words]

    words = _compact(rest).split(",")
    if name == "slope" and len(words) == 1:
        exponents = numbers(words)
        return _built(field, text, lambda: MultiSlope(exponents, **lengths))
    if name == "ms":
        pairs = [word.split("@") for word in words]
        if any(len(pair) != 2 for pair in pairs[:-1]) or len(pairs[-1]) != 1:
            raise _refusal(field, PATH_LOSS_FORM, text, "every exponent but the last has its breakpoint: B0@R1,...,BK")
        exponents = numbers([pair[0] for pair in pairs])
        breakpoints_m = [parse_length_m(pair[1], f"{field}, breakpoint") for pair in pairs[:-1]]
        return _built(field, text, lambda: MultiSlope(exponents, breakpoints_m, **lengths))
    if name == "stretched" and len(words) == 2:
        a, b = numbers(words)
        return _built(field, text, lambda: StretchedExponential(a, b, **lengths))
    if name == "table":
        columns = _columns(field, text, rest.strip())
        loss = 10 ** (columns[:, 1] / 10)
        return _built(field, text, lambda: PathLossTable(columns[:, 0], loss, **lengths, name=f"table:{rest.strip()}"))
    raise _refusal(field, PATH_LOSS_FORM, text)


_PLAIN: dict[str, Callable[[float], Fading]] = {
    "gamma": Gamma,
    "nakagami": Nakagami,
    "weibull": Weibull,
    "pareto": Pareto,
    "logpareto": LogPareto,
}
_IN_DB: dict[str, Callable[[float], Fading]] = {"rice": Rice, "lognormal": LogNormal, "suzuki": Suzuki}
_WITHOUT: dict[str, Callable[[], Fading]] = {"none": NoFading, "rayleigh": Rayleigh}


def parse_fading(text: str, field: str = "--fading") -> Fading:
    """The law of the marks that the words describe."""
    return reduce(mul, [_factor(field, text, word.strip()) for word in text.split("*")])


def _factor(field: str, text: str, word: str) -> Fading:
    name, colon, rest = word.partition(":")
    rest = rest.strip()
    if name in _WITHOUT and not colon:
        return _WITHOUT[name]()
    if name == "table" and rest:
        marks, survival = _columns(field, text, rest).T
        return _built(field, text, lambda: FadingTable(marks, survival, name=f"table:{rest}"))
    if name in _PLAIN and rest:
        if rest.endswith("dB"):
            raise _refusal(field, FADING_FORM, text, f"{name} takes a plain number, not dB")
        shape = _number(field, FADING_FORM, text, rest)
        return _built(field, text, lambda: _PLAIN[name](shape))
    if name in _IN_DB and rest:
        if not rest.endswith("dB"):
            raise _refusal(field, FADING_FORM, text, f"{name} takes dB: the unit is missing")
        decibels = _number(field, FADING_FORM, text, rest[:-2].strip())
        return _built(field, text, lambda: _IN_DB[name](decibels))
    raise _refusal(field, FADING_FORM, text, f"{word!r} is none of them")
