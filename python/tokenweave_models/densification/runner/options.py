"""From arguments to networks, samplers' settings and devices; and errors as sentences."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tokenweave_models.common.errors import UserError
from tokenweave_models.common.output import check_output
from tokenweave_models.densification import units
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.samplers import Settings, choose_method

POSITIONAL = ("a", "b")  # arguments without a name of their own
SETTINGS = {  # and the methods that look at them
    "num_terms": ("power",),
    "rate_nodes": ("power",),
    "num_points": ("geometry", "conditional"),
    "residual": ("power", "geometry"),
}
RESULT_SUFFIXES = (".npz", ".csv", ".json")
OWN_ERRORS = ("sweep:", "sample_power_domain:", "sample_geometry:", "rayleigh_conditional:", "compare:", "optimum:")


def network_of(arguments: argparse.Namespace) -> Network:
    return make_network(
        path_loss=arguments.path_loss,
        fading=arguments.fading,
        association=arguments.association,
        noise=arguments.noise,
        transmit_power=arguments.transmit_power,
        activity=arguments.activity,
    )


def make_network(
    path_loss: str,
    fading: str = "rayleigh",
    association: str = "strongest",
    noise: str = "0",
    transmit_power: str | None = None,
    activity: float = 1.0,
) -> Network:
    """From the words of the command line. Raises UserError."""
    if transmit_power is not None and not noise.strip().endswith("dBm"):
        raise UserError(f"--transmit-power has no use without a noise in dBm, got --noise {noise}")
    power_dbm = None if transmit_power is None else units.parse_power_dbm(transmit_power)
    with refused_in_words():
        return Network(
            path_loss=units.parse_path_loss(path_loss),
            fading=units.parse_fading(fading),
            association=association,
            noise=units.parse_noise(noise, power_dbm),
            activity=activity,
        )


def method_of(network: Network, method: str, rate: bool) -> str:
    """The method, or the one that "auto" stands for. Raises UserError: it cannot answer."""
    with refused_in_words():
        return choose_method(network, method, rate)


def settings_of(arguments: argparse.Namespace, method: str, **defaults: Any) -> Settings:
    """Of the method's sampler; what was not given is as in :class:`Settings`, or as in defaults. Raises UserError: one
    of another method's was given."""
    refuse_unused(arguments, f"with method {method}", *(name for name in SETTINGS if method not in SETTINGS[name]))
    given = {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}
    with refused_in_words():
        return Settings(**defaults | given)


def check_rate(network: Network, is_wanted: bool, cure: str = "--no-rate asks for coverage alone") -> None:
    if is_wanted and not network.rate_exists:
        raise UserError(
            f"--fading {network.fading.describe()}: E ln(1 + mark) is infinite, and so is the mean rate at every "
            f"density; {cure}"
        )


def refuse_unused(arguments: argparse.Namespace, why: str, *names: str) -> None:
    """Arguments that would be ignored: what the user meant by them would not happen."""
    for name in names:
        if (value := getattr(arguments, name)) is not None and value is not False:  # 0 is a value
            raise UserError(f"--{name.replace('_', '-')} has no use {why}")


def device_of(name: str) -> str:
    """The device asked for, never another in its place."""
    is_there = torch.cuda.is_available()
    if name == "cuda" and not is_there:
        raise UserError("--device cuda: torch sees no GPU; `tokenweave info` says more")
    if name == "auto":
        return "cuda" if is_there else "cpu"
    return name


def check_results(paths: list[Path], plot: Path | None) -> None:
    """Before a long run: that its files can be written, and are of a kind that is known."""
    for path in paths:
        if path.suffix not in RESULT_SUFFIXES:
            raise UserError(f"--out must end in {', '.join(RESULT_SUFFIXES)}, got {path}")
        check_output(path)
    check_plot(plot)


def check_plot(path: Path | None) -> None:
    if path is not None and path.suffix != ".png":
        raise UserError(f"--plot must end in .png, got {path}")
    check_output(path)


def provenance_of(arguments: argparse.Namespace) -> dict[str, str]:
    """What a result's provenance says of the run: the command with all its values, and when."""
    words = ["tokenweave", "densification", arguments.densification_command]
    hidden = ("command", "densification_command")
    for name, value in vars(arguments).items():
        if name in hidden or value is None or value is False or value == []:
            continue
        option = "" if name in POSITIONAL else f"--{name.replace('_', '-')}="
        for one in value if isinstance(value, list) else [value]:
            text = ",".join(one) if isinstance(one, tuple) else str(one)
            words.append(option[:-1] if one is True else option + text)
    return {"command": shlex.join(words), "date": now()}


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@contextmanager
def refused_in_words() -> Iterator[None]:
    """What refuses an argument says why; that is all the user has to see."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device's memory is too small for this: {error}") from error
    except ImportError as error:  # the compiled library is missing
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if not str(error).startswith(OWN_ERRORS):
            raise
        raise UserError(str(error)) from error
