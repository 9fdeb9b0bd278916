"""What the compiler says of a kernel: the reports of ptxas, sm_90 code, theoretical occupancy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPORT = re.compile(
    r"Compiling entry function '(?P<entry>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)", re.M)


@dataclass(frozen=True)
class Usage:
    """Of one kernel, for one target."""

    entry: str  # mangled
    target: str
    registers: int
    static_shared_bytes: int
    local_bytes: int  # stack frame and spills


def parse_report(text: str) -> list[Usage]:
    """Of a log of ptxas -v."""
    usages = []
    for m in REPORT.finditer(text):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        local = int(m["frame"]) + int(m["stores"]) + int(m["loads"])
        shared_bytes = int(shared[1]) if shared else 0
        usages.append(Usage(m["entry"], m["target"], int(m["registers"]), shared_bytes, local))
    return usages


def usages(cmake_directory: Path) -> list[Usage]:
    """Of the sm_90 kernels that were built there."""
    logs = sorted((cmake_directory / "ptxas").rglob("*.log"))
    return [u for log in logs for u in parse_report(log.read_text()) if u.target in ("sm_90", "sm_90a")]


# ----------------------------------------------------------------------------------------------------------- the code


def find_tool(name: str) -> str | None:
    """From the toolkit, or from the package of that name on PyPI (requirements/dev.txt)."""
    for site in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        for path in sorted(Path(site).glob(f"nvidia/*/bin/{name}")):
            return str(path)
    return shutil.which(name)


@cache
def disassemble(file: Path) -> str:
    """sm_90 code as text, one instruction a line."""
    tools = find_tool("cuobjdump"), find_tool("nvdisasm")
    if None in tools:
        raise FileNotFoundError("cuobjdump and nvdisasm are needed: pip install -r requirements/dev.txt")
    path = os.pathsep.join([*(str(Path(tool).parent) for tool in tools), os.environ.get("PATH", "")])
    command = [tools[0], "-sass", "-arch", "sm_90", str(file)]
    return subprocess.run(command, env=os.environ | {"PATH": path}, check=True, capture_output=True, text=True).stdout


def functions(sass: str) -> dict[str, list[str]]:
    """The instructions of each kernel, without operands and what fills its end, by mangled name."""
    found = {}
    for part in re.split(r"^\s*Function : ", sass, flags=re.M)[1:]:
        name, body = part.split("\n", 1)
        found[name.strip()] = [one for one in INSTRUCTION.findall(body) if one != "NOP"]
    return found


# ----------------------------------------------------------------------------------------------------------- occupancy


@dataclass(frozen=True)
class Occupancy:
    blocks: int  # on a multiprocessor
    warps: int
    limit: str  # what allows no more

    @property
    def percent(self) -> float:
        return 100 * self.warps / 64


def occupancy(threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """Of blocks of so many threads on a multiprocessor of compute capability 9.0: 64 warps, 32 blocks, 228 KiB of
    shared memory of which each block loses one, and four quarters of 16,384 registers, which warps take by 256.

    Source: CUDA C++ Programming Guide, "Compute Capabilities"; CUDA Occupancy Calculator."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    per_block = -(-(shared_bytes + 1024) // 128) * 128
    most = {
        "warps": 64 // warps,
        "blocks": 32,
        "registers": 4 * (16384 // per_warp) // warps if registers else 64,
        "shared memory": 228 * 1024 // per_block,
    }
    limit = min(most, key=most.__getitem__)
    return Occupancy(most[limit], most[limit] * warps, limit)
