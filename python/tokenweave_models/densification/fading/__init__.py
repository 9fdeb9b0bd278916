"""Laws of the marks: fading, shadowing and antenna gain, as one positive factor of the received power per station."""

from tokenweave_models.densification.fading.base import Fading
from tokenweave_models.densification.fading.composite import Product, Suzuki
from tokenweave_models.densification.fading.heavy import LogPareto, Pareto
from tokenweave_models.densification.fading.light import (
    Gamma,
    LogNormal,
    Nakagami,
    NoFading,
    Rayleigh,
    Rice,
    Weibull,
)
from tokenweave_models.densification.fading.user import FadingFunction, FadingTable

__all__ = [
    "Fading",
    "FadingFunction",
    "FadingTable",
    "Gamma",
    "LogNormal",
    "LogPareto",
    "Nakagami",
    "NoFading",
    "Pareto",
    "Product",
    "Rayleigh",
    "Rice",
    "Suzuki",
    "Weibull",
]
