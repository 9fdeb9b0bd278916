"""`tokenweave localleap generate|bench|demo`."""

from __future__ import annotations

import argparse

from tokenweave_models.localleap.demo import demo
from tokenweave_models.localleap.runner import bench, generate

COMMANDS = {
    "generate": (generate, "text behind prompts, or in place of masks, by a LLaDA or Dream model"),
    "bench": (bench, "time of a decoding step, model and selector apart, by policy and cache"),
    "demo": (demo, "train a tiny model and compare the policies on it"),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says defaults that are values, and not that a switch is off or a number not given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing else super()._get_help_string(action)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="localleap_command", required=True, metavar="command")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, formatter_class=HelpFormatter)
        module.add_arguments(command)


def run(arguments: argparse.Namespace) -> None:
    COMMANDS[arguments.localleap_command][0].run(arguments)
