"""`tokenweave densification sweep|regime|exact|ccdf|optimum|order|phase|reproduce|verify|bench`."""

from __future__ import annotations

import argparse
from importlib import import_module

from tokenweave_models.common.errors import UserError
from tokenweave_models.densification.runner import arguments as known

COMMANDS = {
    "sweep": (known.add_sweep, "coverage, rate and spectral efficiency over density, with error bars"),
    "regime": (known.add_regime, "what a dense network of these laws does, and which moments that rests on"),
    "exact": (known.add_exact, "coverage and rate by formulas, and their asymptotes"),
    "ccdf": (known.add_ccdf, "the distribution of the SINR at some densities, beside its limit"),
    "optimum": (known.add_optimum, "the density at which coverage or spectral efficiency is highest"),
    "order": (known.add_order, "which of two networks is better, realisation by realisation"),
    "phase": (known.add_phase, "fitted exponents over near-field exponent and tail index: the phase diagram"),
    "reproduce": (known.add_reproduce, "figures F1 to F8"),
    "verify": (known.add_verify, "every exact law against simulation, as z-scores"),
    "bench": (known.add_bench, "time to an equal error, against the usual ways to simulate"),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says defaults that are values, and not that a switch is off or a number not given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing else super()._get_help_string(action)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="densification_command", required=True, metavar="command")
    for name, (add, text) in COMMANDS.items():
        add(commands.add_parser(name, help=text, formatter_class=HelpFormatter))


def run(arguments: argparse.Namespace) -> None:
    # Imported when needed: scipy is slow to load, and the other commands of tokenweave do without it.
    try:
        command = import_module(f"tokenweave_models.densification.runner.{arguments.densification_command}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "tokenweave_models":
            raise
        raise UserError(f"{error.name} is not installed; run: pip install 'tokenweave-ops[models]'") from error
    command.run(arguments)
