"""Coverage, rate and both times density over densities: sampled to a number of realisations or a target error."""

from __future__ import annotations

import argparse

from tokenweave_models.common.errors import UserError
from tokenweave_models.common.output import check_output
from tokenweave_models.densification import units
from tokenweave_models.densification.runner import options, plots
from tokenweave_models.densification.runner.reporting import (
    print_regime_words,
    print_result,
    print_slopes,
    shown_columns,
    title_of,
    written,
)
from tokenweave_models.densification.runner.sampling import save, sweep_with_bar
from tokenweave_models.densification.sweep import GIVE_UP

REALISATIONS = 2**18  # where neither a number nor an error is asked for


def check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.method == "exact":
        options.refuse_unused(arguments, "with --method exact", "n", "target_se", "checkpoint")
    if arguments.n is not None and arguments.target_se is not None:
        raise UserError("--n and --target-se exclude each other: one says how many, the other how well")
    if arguments.target_se is None:
        options.refuse_unused(arguments, "without --target-se", "relative", "most")
    if arguments.checkpoint is not None:
        if arguments.checkpoint.suffix != ".npz":
            raise UserError(f"--checkpoint must end in .npz, got {arguments.checkpoint}")
        if arguments.checkpoint.resolve() in [path.resolve() for path in arguments.out]:
            raise UserError(f"--checkpoint must be another file than --out, got {arguments.checkpoint} for both")
        check_output(arguments.checkpoint)
    options.check_results(arguments.out, arguments.plot)


def amount_of(arguments: argparse.Namespace, method: str) -> dict[str, int | float | None]:
    if method == "exact":
        return {}
    if arguments.target_se is None:
        return {"num_realisations": arguments.n or REALISATIONS}
    most = GIVE_UP if arguments.most is None else arguments.most
    return {"target_se": arguments.target_se, "relative_se": arguments.relative, "most_realisations": most}


def run(arguments: argparse.Namespace) -> None:
    check_arguments(arguments)
    network = options.network_of(arguments)
    densities = units.parse_densities(arguments.densities)
    thresholds_db = units.parse_thresholds(arguments.thresholds)
    rate = not arguments.no_rate
    options.check_rate(network, rate)
    method = options.method_of(network, arguments.method, rate)
    result = sweep_with_bar(
        "sampling" if method != "exact" else "integrating",
        network,
        densities,
        thresholds_db,
        method=method,
        rate=rate,
        settings=options.settings_of(arguments, method),
        seed=arguments.seed,
        device=options.device_of(arguments.device),
        checkpoint=arguments.checkpoint,
        **amount_of(arguments, method),
        **options.provenance_of(arguments),
    )
    count = result.provenance.get("num_realisations")
    how = f"method {method}" + (f", {count} realisations, seed {arguments.seed}" if count else "")
    print_result(f"{title_of(network)}, {how}", result)
    print_slopes(result.slopes(), result.thresholds_db[shown_columns(result.thresholds_db)])
    print_regime_words(result)
    save(result, arguments.out)
    if arguments.plot is not None:
        plots.draw_sweeps(arguments.plot, {"": result})
        written(arguments.plot)
