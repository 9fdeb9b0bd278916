"""The arguments of every command. Texts with units stay texts here; :mod:`units` reads them and refuses in words."""

from __future__ import annotations

import argparse
from pathlib import Path

MOST_REALISATIONS = 2**53  # as in sweep, which would load scipy here
SEED = 7

_PATH_LOSS = "slope:4, ms:0@10m,4, stretched:0.9,0.5 or table:FILE; then ;h=10m ;min=1m ;rinf=40km (in quotes)"
_FADING = "rayleigh, rayleigh*lognormal:8dB, nakagami:4, pareto:1.5, logpareto:2, table:FILE and others"
_THRESHOLDS = "of SINR: --thresholds=-10:20:1dB, 0dB, or linear 0.5,1x; with = where it begins with a minus"
_DENSITIES = "base stations: 1e-1:1e6:29/km2 (logarithmic, 29 of them) or 0.5,2/km2; the unit is never left out"


def realisations(text: str) -> int:
    """A whole number, also as 1e6."""
    value = float(text)
    if not (1 <= value <= MOST_REALISATIONS and value == int(value)):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 2^53, got {text}")
    return int(value)


def standard_error(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 1, got {text}")
    return value


def activity(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2^63, got {text}")
    return value


def names(known: tuple[str, ...]):
    """The type of an argument that is some of the known names, with commas."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if not set(found) <= set(known) or len(set(found)) != len(found):
            raise argparse.ArgumentTypeError(f"must be some of {', '.join(known)}, got {text}")
        return found

    return parse


# ------------------------------------------------------------------------------------------------------------- groups


def _network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument("--path-loss", required=True, metavar="LAW", help=_PATH_LOSS)
    group.add_argument("--fading", default="rayleigh", metavar="LAW", help=_FADING)
    group.add_argument("--association", choices=("strongest", "nearest"), default="strongest", help="who serves")
    group.add_argument(
        "--noise", default="0", metavar="POWER", help="--noise=-92dBm (needs --transmit-power), -122dB or 6e-13x"
    )
    group.add_argument("--transmit-power", metavar="POWER", help="30dBm or 1W; what --noise in dBm is relative to")
    group.add_argument("--activity", type=activity, default=1.0, metavar="P", help="of cells that do not serve")


def _sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--seed", type=seed, default=SEED, metavar="N", help="runs that share it share realisations")
    _device(group)
    group.add_argument("--num-terms", type=int, metavar="N", help="method power: powers taken one by one")
    group.add_argument("--rate-nodes", type=int, metavar="N", help="method power: nodes of the rate; 0: none")
    group.add_argument("--num-points", type=int, metavar="N", help="geometry, conditional: stations taken one by one")
    group.add_argument("--residual", choices=("gauss", "mean", "none"), help="what stands for all others")


def _device(group: argparse._ActionsContainer) -> None:
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")


def _realisations(parser: argparse._ActionsContainer, default: int | None) -> None:
    words = "realisations, as 1e6" + ("; not given: what --target-se needs, or else 2^18" if default is None else "")
    parser.add_argument("--n", type=realisations, default=default, metavar="N", help=words)


def _densities(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--densities", required=True, metavar="D", help=_DENSITIES)


def _thresholds(parser: argparse._ActionsContainer, default: str) -> None:
    parser.add_argument("--thresholds", default=default, metavar="T", help=_THRESHOLDS)


def _outputs(parser: argparse.ArgumentParser, *, plot: str | None) -> None:
    if plot is not None:
        parser.add_argument("--plot", type=Path, metavar="FILE.png", help=plot)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it as JSON")


def _result_files(parser: argparse.ArgumentParser, plot: str) -> None:
    words = "may be repeated: .npz (everything, can be loaded), .csv (a row for each point) or .json"
    parser.add_argument("--out", type=Path, action="append", default=[], metavar="FILE", help=words)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help=plot)


# ------------------------------------------------------------------------------------------------------------ commands


def add_sweep(parser: argparse.ArgumentParser) -> None:
    _network(parser)
    what = parser.add_argument_group("sweep")
    _densities(what)
    _thresholds(what, "0dB")
    what.add_argument("--method", choices=("auto", "power", "geometry", "conditional", "exact"), default="auto")
    what.add_argument("--no-rate", action="store_true", help="coverage alone")
    _realisations(what, None)
    what.add_argument("--target-se", type=standard_error, metavar="E", help="go on until no coverage has a larger one")
    what.add_argument("--relative", action="store_true", help="the target error is relative to each coverage")
    what.add_argument("--most", type=realisations, metavar="N", help="where a target is given up; not given: 2^32")
    what.add_argument("--checkpoint", type=Path, metavar="FILE.npz", help="go on from it, and keep it as the run goes")
    _sampling(parser)
    _result_files(parser, "coverage, rate and both times density, over density")


def add_regime(parser: argparse.ArgumentParser) -> None:
    _network(parser)
    _outputs(parser, plot=None)


def add_exact(parser: argparse.ArgumentParser) -> None:
    _network(parser)
    what = parser.add_argument_group("question")
    _densities(what)
    _thresholds(what, "0dB")
    what.add_argument("--no-rate", action="store_true", help="coverage alone")
    _result_files(parser, "the same as a plot over density")


def add_ccdf(parser: argparse.ArgumentParser) -> None:
    _network(parser)
    what = parser.add_argument_group("question")
    _densities(what)
    _thresholds(what, "-20:40:1dB")
    what.add_argument("--method", choices=("auto", "power", "geometry", "conditional"), default="auto")
    what.add_argument("--meta", action="store_true", help="of a cell's coverage over geometries, at each threshold")
    _realisations(what, 2**20)
    _sampling(parser)
    _result_files(parser, "P(SINR > threshold) over threshold, a line for each density")


def add_optimum(parser: argparse.ArgumentParser) -> None:
    _network(parser)
    what = parser.add_argument_group("question")
    what.add_argument("--quantity", choices=("coverage", "coverage_density", "ase"), default="ase")
    what.add_argument("--threshold", metavar="T", help="of a coverage: 0dB or 1x")
    what.add_argument("--range", required=True, metavar="LOW,HIGH/km2", help="densities between which it is looked for")
    _realisations(what, 2**18)
    _sampling(parser)
    _outputs(parser, plot="the quantity over density, with its maximum")


def add_order(parser: argparse.ArgumentParser) -> None:
    words = "JSON: path_loss, fading, association, noise, activity in the words of the command line; or a sweep's JSON"
    parser.add_argument("a", type=Path, metavar="A.json", help=words)
    parser.add_argument("b", type=Path, metavar="B.json", help="the network it is compared with")
    what = parser.add_argument_group("question")
    _densities(what)
    _thresholds(what, "-10:20:5dB")
    what.add_argument("--method", choices=("auto", "power", "geometry"), default="auto")
    what.add_argument("--no-rate", action="store_true", help="coverage alone")
    _realisations(what, 2**20)
    _sampling(parser)
    _outputs(parser, plot="differences of coverage, with their 95 %% intervals")


def add_phase(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("diagram")
    what.add_argument("--near-exponents", default="0,0.5,1,1.5,2,2.5,3,4", metavar="B,...",
                      help="beta_0 of each column")  # fmt: skip
    what.add_argument("--tail-indices", default="0.5,0.75,1,1.25,1.5,2,3,inf", metavar="A,...",
                      help="alpha of each row: Pareto marks; inf: Rayleigh fading")  # fmt: skip
    what.add_argument("--far-exponent", type=float, default=4.0, metavar="B", help="beyond 10 m")
    what.add_argument("--quantity", choices=("coverage", "rate"), default="coverage", help="whose exponent is fitted")
    what.add_argument("--threshold", default="0dB", metavar="T", help="of the coverage")
    what.add_argument("--densities", default="1e8:1e10:9/km2", metavar="D",
                      help="slopes are fitted over their last two decades")  # fmt: skip
    _realisations(what, 2**17)
    _sampling(parser)
    _outputs(parser, plot="fitted slopes by colour and number, with the lines of theory")


FIGURES = tuple(f"F{number}" for number in range(1, 9))


def add_reproduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path("densification"), metavar="FOLDER",
                        help="of figures and of the runs they are drawn from, which are gone on from")  # fmt: skip
    parser.add_argument("--figures", type=names(FIGURES), default=",".join(FIGURES), metavar="F1,F2", help="which")
    parser.add_argument("--quick", action="store_true", help="with 2^14 instead of 2^20 realisations")
    parser.add_argument("--seed", type=seed, default=SEED, metavar="N")
    _device(parser)


def add_verify(parser: argparse.ArgumentParser) -> None:
    _realisations(parser, 1_000_000)
    parser.add_argument("--seed", type=seed, default=SEED, metavar="N", help="of all simulations")
    parser.add_argument("--only", metavar="WORD", help="the laws whose name has this word in it")
    _device(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")


def add_bench(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("question: P(SIR > threshold), strongest cell, one slope, Rayleigh, no noise")
    what.add_argument("--exponent", type=float, default=4.0, metavar="B", help="of the path loss, above 2")
    what.add_argument("--threshold", default="0dB", metavar="T", help="0dB or 1x")
    what.add_argument("--target-se", type=standard_error, default=1e-3, metavar="E", help="error to reach")
    what.add_argument(
        "--stations", type=float, default=256.0, metavar="N", help="in the window of the usual simulation"
    )
    what.add_argument("--seed", type=seed, default=SEED, metavar="N", help="of all random numbers")
    _device(what)
    _outputs(parser, plot="error against time, for several target errors")
