"""Which :class:`HardwareProfile` a rank plans with: the user's, or a built-in one for a device of its kind."""

from __future__ import annotations

import platform
import re
from dataclasses import fields, replace
from pathlib import Path

import torch

from tokenweave_models.common.errors import UserError
from tokenweave_ops import H100, EmulatedLink, HardwareProfile, cpu_profile

LINK_FIELDS = ("link_gb_s", "latency_us", "cta_gb_s", "stream_gb_s")

# One rank on one thread of a server processor. Orders of magnitude, for who has not calibrated.
CPU = cpu_profile("cpu", 1, gemm_tflops=0.1, memory_gb_s=10.0, link_gb_s=5.0, link_latency_us=50.0)


def device_name(device: torch.device) -> str:
    """What a profile is made for and checked against: a GPU as the driver spells it; a CPU's model, and this process's
    threads, since a rank has a share of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_model()}, {threads} thread{'s' * (threads > 1)}"


def cpu_model() -> str:
    """As the kernel spells it, with the model number, since virtual machines often hide the name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    name = re.search(r"^(?:model name|Hardware|CPU part)\s*:\s*(.+)$", text, re.MULTILINE)
    number = re.search(r"^model\s*:\s*(\d+)$", text, re.MULTILINE)
    return (name[1] if name else platform.machine()) + (f" (model {number[1]})" if number else "")


def built_in_profile(device: torch.device) -> HardwareProfile:
    """The nearest built-in profile, under the name of this device. What was not made for it is marked so."""
    base = H100 if device.type == "cuda" else CPU
    name = device_name(device)
    if name == base.device:
        return base
    if device.type == "cuda":
        num_sms, link = torch.cuda.get_device_properties(device).multi_processor_count, base.link
    else:
        num_sms = torch.get_num_threads()
        # Summing through shared memory takes a core; beside nothing else, all of them (max_ctas of the ops).
        link = replace(base.link, sms_per_cta=1, exposed_ctas=num_sms, exposed_ctas_large=num_sms)
    assumed = dict.fromkeys(sources_of(base), f"assumption: that of the built-in profile {base.name}")
    return replace(base, device=name, num_sms=num_sms, link=link, sources=assumed | {"num_sms": "measured"})


def sources_of(profile: HardwareProfile) -> dict[str, str]:
    """Where each number of a profile comes from; empty text where it does not say."""
    own = [item.name for item in fields(profile)]
    names = [name for name in own if name not in ("name", "device", "link", "split_step", "sources")]
    return {name: profile.sources.get(name, "") for name in (*names, *LINK_FIELDS)}


def load_profile(path: Path, device: torch.device) -> HardwareProfile:
    """The profile in a file, for this device. Raises UserError if it is none, or one of another device."""
    try:
        profile = HardwareProfile.load(path)
        profile.check_device(device_name(device))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    return profile


def profile_of(device: torch.device, path: Path | None, link: EmulatedLink | None = None) -> HardwareProfile:
    """What a rank on this device plans with: the profile at ``path``, or a built-in one; with the emulated link, if
    there is one, in place of its link."""
    profile = built_in_profile(device) if path is None else load_profile(path, device)
    if link is None:
        return profile
    sleeping = replace(profile.link, link_gb_s=link.gigabytes_per_s, latency_us=link.latency_us, sms_per_cta=0)
    sources = dict.fromkeys(LINK_FIELDS, f"assumption: {link}")
    return replace(profile, link=sleeping, sources=dict(profile.sources) | sources)
