"""What the planner knows about a device (:class:`HardwareProfile`) and the link between ranks (:class:`LinkModel`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

FORMAT = "tokenweave hardware profile"
FORMAT_VERSION = 1


def _check_numbers(
    owner: object, what: str, at_least_zero: tuple[str, ...] = (), maybe_infinite: tuple[str, ...] = ()
) -> None:
    for item in fields(owner):
        value = getattr(owner, item.name)
        if item.type not in ("int", "float"):
            continue
        if isinstance(value, bool) or not isinstance(value, int if item.type == "int" else (int, float)):
            raise ValueError(f"{what}: {item.name} must be {item.type}, got {value!r}")
        if item.type == "float":
            object.__setattr__(owner, item.name, float(value))
        low_enough = value >= 0 if item.name in at_least_zero else value > 0
        if math.isnan(value) or not low_enough or (math.isinf(value) and item.name not in maybe_infinite):
            bound = "at least 0" if item.name in at_least_zero else "positive"
            finite = "" if item.name in maybe_infinite else " and finite"
            raise ValueError(f"{what}: {item.name} must be {bound}{finite}, got {value!r}")


def _check_keys(data: object, owner: type, what: str) -> dict:
    if not isinstance(data, dict):
        raise ValueError(f"{what}: must be an object, got {type(data).__name__}")
    known = {item.name for item in fields(owner)}
    if data.keys() != known:
        missing, unknown = sorted(known - data.keys()), sorted(data.keys() - known)
        raise ValueError(f"{what}: missing keys {missing}, unknown keys {unknown}")
    return data


@dataclass(frozen=True)
class LinkModel:
    """Time of an all-reduce between the ranks, as a function of bytes and of the CTAs that drive it.

    A reduce-scatter followed by an all-gather sends and receives B = N * (1 + 1/W) bytes per rank and direction, where
    N is the size of the whole tensor and W the number of ranks. With C CTAs::

        us = latency_us + B * max(1 / (C * cta_gb_s) + 1 / stream_gb_s, 1 / link_gb_s) / 1e3

    Each CTA waits for its own rows (``cta_gb_s``), somewhat longer the more CTAs share the fabric (``stream_gb_s``),
    until the link itself is full (``link_gb_s``). A link that needs no CTAs, such as a transport that sleeps, has
    infinite ``cta_gb_s`` and ``stream_gb_s``.
    """

    link_gb_s: float  # per rank and direction, both directions busy
    latency_us: float  # of one collective of no bytes: barriers and launch
    cta_gb_s: float = math.inf  # that one CTA moves alone
    stream_gb_s: float = math.inf  # of what CTAs lose to each other below the link's limit
    sms_per_cta: int = 1  # multiprocessors (cores) that a CTA takes from the compute lane; 0: none
    cta_choices: tuple[int, ...] = (2, 4, 8)  # CTAs of a collective that hides behind compute
    exposed_ctas: int = 16  # CTAs of a collective that nothing hides, below exposed_large_tokens
    exposed_ctas_large: int = 32
    exposed_large_tokens: int = 8192

    def __post_init__(self):
        rates = ("link_gb_s", "cta_gb_s", "stream_gb_s")
        _check_numbers(self, "LinkModel", at_least_zero=("latency_us", "sms_per_cta"), maybe_infinite=rates)
        choices = tuple(self.cta_choices)
        object.__setattr__(self, "cta_choices", choices)
        if not choices or any(not isinstance(c, int) or isinstance(c, bool) or c < 1 for c in choices):
            raise ValueError(f"LinkModel: cta_choices must be positive integers, got {choices}")

    def collective_us(self, num_bytes, world_size: int, ctas):
        """Time of an all-reduce of ``num_bytes`` (of the whole tensor) by ``ctas`` CTAs per rank; numbers or arrays."""
        us_per_byte = np.maximum(1 / (ctas * self.cta_gb_s) + 1 / self.stream_gb_s, 1 / self.link_gb_s) / 1e3
        return self.latency_us + num_bytes * (1 + 1 / world_size) * us_per_byte

    def exposed(self, num_tokens: int) -> int:
        """CTAs of a collective over ``num_tokens`` rows that nothing hides."""
        return self.exposed_ctas_large if num_tokens >= self.exposed_large_tokens else self.exposed_ctas


@dataclass(frozen=True)
class HardwareProfile:
    """Rates and overheads of one kind of device, and of the link between the ranks.

    GB/s are 1e9 bytes a second, TFLOPS 1e12 operations a second, both of the whole device. A CPU is described in the
    same words: ``num_sms`` is its cores, ``gemm_tiles`` one small tile. ``sources`` says, for every number, where it
    comes from: ``"measured"``, or ``"datasheet: ..."``, ``"fit: ..."``, ``"public: ..."``, ``"assumption: ..."``.
    """

    name: str
    device: str  # as the driver spells it; a profile is refused on a device of another name
    num_sms: int
    gemm_tflops: float  # inside a full wave of the largest tiles
    gemm_operand_rows: float  # small tiles are slower: time per output element grows as 1 + this * (1/m + 1/n)
    gemm_wave_us: float  # prologue and epilogue of a wave
    gemm_tiles: tuple[tuple[int, int], ...]  # rows of tokens, columns of output features
    moe_gemm_efficiency: float  # rate of the experts' grouped GEMMs over that of one GEMM
    attention_tflops: float  # 4 head_dim operations per (query, key) pair and head
    attention_extra_keys: float  # diagonal tiles and start-up, as keys per query
    attention_tile_rows: int  # queries of one head that one multiprocessor works on
    hbm_gb_s: float  # weights, keys and values, activations
    norm_gb_s: float  # residual add and norm: 4 passes over [num_tokens, hidden]
    kernel_us: float  # the shortest kernel, with the gap before it
    # Power of phases that no GEMM or attention runs in, over that of those it does; 1: the clock does not depend on it
    low_power_share: float
    eager_launch_us: float  # host time of one operation of a layer in eager mode
    moe_launch_us: float  # host time of one routed-experts block in eager mode
    graph_launch_us: float  # host time of one operation of a replayed CUDA graph
    pass_us: float  # of one forward pass, outside the layers: scheduling, sampling, embedding
    link: LinkModel
    split_step: int = 64  # a split is a multiple of this many rows
    # Measured GEMMs: (features, inner, rows, microseconds). Libraries do not always take the best tile; where there are
    # samples, the wave model only says what changes with fewer multiprocessors.
    gemm_samples: tuple[tuple[int, int, int, float], ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        free = (
            "gemm_operand_rows",
            "gemm_wave_us",
            "attention_extra_keys",
            "kernel_us",
            "eager_launch_us",
            "moe_launch_us",
            "graph_launch_us",
            "pass_us",
        )
        _check_numbers(self, "HardwareProfile", at_least_zero=free)
        for name in ("name", "device"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"HardwareProfile: {name} must be a name, got {getattr(self, name)!r}")
        tiles = tuple(tuple(tile) for tile in self.gemm_tiles)
        object.__setattr__(self, "gemm_tiles", tiles)
        if not tiles or any(len(tile) != 2 or min(tile) < 1 for tile in tiles):
            raise ValueError(f"HardwareProfile: gemm_tiles must be pairs of positive sizes, got {tiles}")
        samples = tuple(tuple(sample) for sample in self.gemm_samples)
        object.__setattr__(self, "gemm_samples", samples)
        for sample in samples:
            if len(sample) != 4 or not all(isinstance(x, (int, float)) and 0 < x < math.inf for x in sample):
                raise ValueError(
                    f"HardwareProfile: gemm_samples must be (features, inner, rows, microseconds), got {sample}"
                )
        if not isinstance(self.link, LinkModel):
            raise ValueError(f"HardwareProfile: link must be a LinkModel, got {type(self.link).__name__}")
        unknown = sorted(self.sources.keys() - set(MEASURABLE))
        if unknown:
            raise ValueError(f"HardwareProfile: sources names unknown fields {unknown}; known: {sorted(MEASURABLE)}")

    @cached_property
    def tile_terms(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every GEMM tile: rows, features, and how much slower it computes than the largest one."""
        tile_rows, tile_features = np.array(self.gemm_tiles, dtype=np.float64).T
        operands = 1 + self.gemm_operand_rows * (1 / tile_rows + 1 / tile_features)
        return tile_rows, tile_features, operands / operands.min()

    @cached_property
    def gemm_curves(self) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
        """``gemm_samples`` by (features, inner): rows in ascending order, and their microseconds."""
        shapes: dict[tuple[int, int], dict[int, float]] = {}
        for features, inner, rows, us in self.gemm_samples:
            shapes.setdefault((features, inner), {})[rows] = us
        return {
            shape: (np.array(sorted(curve), dtype=np.float64), np.array([curve[rows] for rows in sorted(curve)]))
            for shape, curve in shapes.items()
        }

    def check_device(self, device: str) -> None:
        """Raises ValueError if this profile was made on another device than the one named."""
        if device != self.device:
            raise ValueError(
                f"HardwareProfile: profile {self.name!r} was made on {self.device!r}, this device is {device!r}; "
                "run `tokenweave calibrate` here"
            )

    def with_measured(self, **values: float | int | tuple) -> HardwareProfile:
        """A copy with these fields (``link_gb_s`` and its like for those of the link) replaced and marked measured."""
        unknown = sorted(values.keys() - set(MEASURABLE))
        if unknown:
            raise ValueError(f"HardwareProfile: cannot measure {unknown}; known: {sorted(MEASURABLE)}")
        link_names = {item.name for item in fields(LinkModel)}
        link = replace(self.link, **{name: value for name, value in values.items() if name in link_names})
        own = {name: value for name, value in values.items() if name not in link_names}
        return replace(self, link=link, sources=dict(self.sources) | dict.fromkeys(values, "measured"), **own)

    # ------------------------------------------------------------------------------------------------------------ files

    def to_json(self) -> str:
        data = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        # JSON has no infinity: a rate without a limit is null.
        data["link"] = {name: None if value == math.inf else value for name, value in data["link"].items()}
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "profile") -> HardwareProfile:
        """The profile that :meth:`to_json` wrote. Raises ValueError, which begins with ``name``, for anything else."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: is not JSON: {error}") from None
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"{name}: is not a {FORMAT}")
        if (version := data.pop("version", None)) != FORMAT_VERSION:
            raise ValueError(f"{name}: version must be {FORMAT_VERSION}, got {version}")
        data = dict(_check_keys(data, cls, name))
        link = _check_keys(data.pop("link"), LinkModel, f"{name}: link")
        link = {key: math.inf if value is None else value for key, value in link.items()}
        if not isinstance(data["sources"], dict):
            raise ValueError(f"{name}: sources must be an object, got {type(data['sources']).__name__}")
        try:
            return cls(link=LinkModel(**link), **data)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from None

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> HardwareProfile:
        return cls.from_json(Path(path).read_text(encoding="utf-8"), str(path))


# Every number of a profile. The policy of the link (which CTA counts to try) is no measurement.
_POLICY = {"name", "device", "link", "sources", "split_step", "sms_per_cta"}
_POLICY |= {"cta_choices", "exposed_ctas", "exposed_ctas_large", "exposed_large_tokens"}
MEASURABLE = tuple(
    item.name for owner in (HardwareProfile, LinkModel) for item in fields(owner) if item.name not in _POLICY
)


# --------------------------------------------------------------------------------------------------- built-in profiles

_LLAMA = "fit: published Llama-3.3-70B latencies without communication, 8 GPUs, 1K to 8K tokens"
_KERNEL = "fit: published times of the fused kernel over tokens and CTAs, 8 GPUs, hidden 8192"
_NORM = "fit: published times of add and RMSNorm over tokens, hidden 8192"
_TILES = "assumption: what GEMM libraries offer for Hopper"
_FLASH = "public: FlashAttention-3 paper, forward, causal, head_dim 128, 512 to 16K tokens"

H100 = HardwareProfile(
    name="h100",
    device="NVIDIA H100 80GB HBM3",
    num_sms=132,
    gemm_tflops=627.6,
    gemm_operand_rows=16.0,
    gemm_wave_us=2.0,
    gemm_tiles=((128, 256), (256, 128), (128, 192), (192, 128), (128, 128)),
    moe_gemm_efficiency=0.816,
    attention_tflops=632.0,
    attention_extra_keys=235.0,
    attention_tile_rows=128,
    hbm_gb_s=3007.0,
    norm_gb_s=3007.0,
    kernel_us=3.0,
    low_power_share=0.5,
    eager_launch_us=10.0,
    moe_launch_us=507.0,
    graph_launch_us=1.0,
    pass_us=791.0,
    link=LinkModel(link_gb_s=306.7, latency_us=14.41, cta_gb_s=57.03, stream_gb_s=660.0),
    sources={
        "num_sms": "datasheet: NVIDIA H100 SXM5",
        "gemm_tflops": _LLAMA,
        "pass_us": _LLAMA,
        "gemm_operand_rows": _TILES,
        "gemm_wave_us": _TILES,
        "gemm_tiles": _TILES,
        "moe_gemm_efficiency": "fit: published Mixtral-8x22B latency without communication, 8K tokens",
        "moe_launch_us": "fit: published Mixtral-8x22B latency of weave, 1K tokens, which is the host's",
        "attention_tflops": _FLASH,
        "attention_extra_keys": _FLASH,
        "attention_tile_rows": _FLASH,
        "hbm_gb_s": _NORM,
        "norm_gb_s": _NORM,
        "kernel_us": "assumption: start and drain of a kernel, and the gap before it",
        "low_power_share": "assumption: phases of memory and link traffic draw half of the power limit",
        "eager_launch_us": "assumption: an eager framework's cost of one operation",
        "graph_launch_us": "assumption: a node of a replayed graph",
        "link_gb_s": _KERNEL,
        "latency_us": _KERNEL,
        "cta_gb_s": _KERNEL,
        "stream_gb_s": _KERNEL,
    },
)


def cpu_profile(
    device: str,
    num_cores: int,
    *,
    gemm_tflops: float,
    memory_gb_s: float,
    link_gb_s: float,
    link_latency_us: float,
) -> HardwareProfile:
    """The ranks' share of a CPU, and a link between them that takes no core: a transport that sleeps.

    device: as the operating system spells it. num_cores: of one rank. gemm_tflops, memory_gb_s: of these cores. The
    rest are assumptions, which :meth:`HardwareProfile.with_measured` replaces.
    """
    given = "assumption: given by the caller"
    rough = "assumption: the order of magnitude of a CPU"
    sources = dict.fromkeys(MEASURABLE, rough)
    sources |= dict.fromkeys(("num_sms", "gemm_tflops", "hbm_gb_s", "norm_gb_s", "link_gb_s", "latency_us"), given)
    return HardwareProfile(
        name="cpu",
        device=device,
        num_sms=num_cores,
        gemm_tflops=gemm_tflops,
        gemm_operand_rows=0.0,
        gemm_wave_us=0.0,
        gemm_tiles=((16, 64),),
        moe_gemm_efficiency=1.0,
        attention_tflops=gemm_tflops / 2,
        attention_extra_keys=0.0,
        attention_tile_rows=16,
        hbm_gb_s=memory_gb_s,
        norm_gb_s=memory_gb_s,
        kernel_us=5.0,
        low_power_share=1.0,
        eager_launch_us=0.0,  # on a CPU the host is the device: kernel_us has it
        moe_launch_us=0.0,
        graph_launch_us=0.0,
        pass_us=100.0,
        link=LinkModel(
            link_gb_s=link_gb_s,
            latency_us=link_latency_us,
            sms_per_cta=0,
            cta_choices=(1,),
            exposed_ctas=1,
            exposed_ctas_large=1,
        ),
        split_step=16,
        sources=sources,
    )
