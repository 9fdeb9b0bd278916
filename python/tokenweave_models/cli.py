"""The `tokenweave` command."""

import argparse
import sys
from collections.abc import Sequence

from tokenweave_models.common.errors import UserError
from tokenweave_models.densification.runner import main as densification
from tokenweave_models.localleap.runner import main as localleap
from tokenweave_models.tokenweave import demo
from tokenweave_models.tokenweave.calibration import calibrate
from tokenweave_models.tokenweave.simulator import simulate


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tokenweave", description="Handwritten Hopper kernels and their models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    info_parser = commands.add_parser("info", help="what was built, for what, and what is visible now")
    info_parser.add_argument("--json", action="store_true", help="print it as JSON")
    programs = {
        "demo": (demo, "a small decoder on real text, eager against fused and woven, then the bench"),
        "simulate": (simulate, "replay TokenWeave's schedule for a model on GPUs that need not be here"),
        "localleap": (localleap, "decode masked diffusion language models: generate, bench, demo"),
        "densification": (densification, "SINR, coverage and rate in Poisson fields, from sparse to ultra-dense"),
        "calibrate": (calibrate, "measure this device for the planner of token splits"),
    }
    for name, (program, words) in programs.items():
        program.add_arguments(commands.add_parser(name, help=words))
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        from tokenweave_ops import info

        return info.main(["--json"] if arguments.json else [])
    try:
        programs[arguments.command][0].run(arguments)
    except UserError as error:
        print(f"tokenweave: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tokenweave: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
