#!/usr/bin/env python3
"""The result file of bench/split_tax.py: its schema, its tables and verdicts, its picture.

python bench/split_report.py FILE.json              the tables again
python bench/split_report.py FILE.json -o out.png   and the picture
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import environment  # noqa: E402
from bench.harness import ENV_FIELDS  # noqa: E402
from bench.terminal import Terminal  # noqa: E402

SCHEMA = "tokenweave split tax"
VERSION = 1
WITHIN_PCT = 1.0  # of the best split: what the planner's split is asked to be
COSTLY = 1.03  # equal halves that cost more than this are asked to be beaten

# TokenWeave's figure of the split cost, hidden 8192, intermediate 3584 per rank: 8 H100, not measured here.
# num_tokens -> (unsplit us, equal halves, best offset of 0 to 256 in steps of 64), the last two over unsplit.
PUBLISHED = {
    1024: (306, 1.044, 1.044), 1280: (372, 1.228, 1.078), 1536: (436, 1.116, 1.061), 1792: (495, 1.160, 1.096),
    2048: (559, 1.084, 1.084), 2304: (622, 1.121, 1.088), 2560: (686, 1.083, 1.079), 2816: (750, 1.096, 1.072),
    3072: (816, 1.067, 1.062), 3328: (877, 1.087, 1.039), 3584: (871, 1.138, 1.118), 3840: (960, 1.036, 1.036),
}  # fmt: skip

# --- verdicts ---------------------------------------------------------------------------------------------------------


def is_within(row: dict) -> bool | None:
    """Whether the planner's split is within 1 % of the best of all splits; None where nothing was measured."""
    return None if row["planned_over_best"] is None else row["planned_over_best"] <= 1 + WITHIN_PCT / 100


def against_equal(row: dict) -> str | None:
    """Where equal halves cost more than 3 %: `below` or `not below` them is the planner's split; or `equal is best`,
    where no split is below them. None where they cost less, or nothing was measured."""
    equal = row["ratios"].get(str(row["equal"]))
    if equal is None or equal <= COSTLY or row["planned"] is None:
        return None
    if row["ratios"][str(row["planned"])] < equal:
        return "below"
    return "equal is best" if row["best"] == row["equal"] else "not below"


def verdicts(rows: list[dict]) -> list[str]:
    """What the rows say of the planner, as sentences; nothing about rows that state no speed."""
    lines = []
    within = [
        (row["num_tokens"], row["planned_over_best"], is_within(row)) for row in rows if is_within(row) is not None
    ]
    if within:
        good, (tokens, worst, _) = sum(fits for *_, fits in within), max(within, key=lambda entry: entry[1])
        lines.append(
            f"Planner within {WITHIN_PCT:g} % of the best split at {good} of {len(within)} sizes; farthest at {tokens} "
            f"tokens, {100 * (worst - 1):+.1f} %."
        )
    costly = [(row["num_tokens"], against_equal(row)) for row in rows if against_equal(row)]
    if costly:
        line = f"Equal halves cost more than 3 % at {len(costly)} sizes; the planner is below them at "
        line += f"{sum(state == 'below' for _, state in costly)}."
        for state, text in (
            ("equal is best", "no split is below them"),
            ("not below", "the planner is not, others are"),
        ):
            if sizes := ", ".join(str(tokens) for tokens, found in costly if found == state):
                line += f" At {sizes} tokens {text}."
        lines.append(line)
    noise = [row["mirror_noise"] for row in rows if row["mirror_noise"] is not None]
    if noise:
        lines.append(
            f"Splits S and T - S, the same GEMMs in the other order, differ by {100 * max(noise):.1f} % in the median "
            "at the noisiest size: smaller differences say nothing. The best split is the luckiest of many, which "
            "counts against the planner."
        )
    return lines


# --- tables -----------------------------------------------------------------------------------------------------------

TAX_HEADINGS = [
    "T", "us", "p20 - p80", "equal", "planner S", "planner", "best S", "best", "of best", "offsets", "paper equal",
    "paper best",
]  # fmt: skip
BESIDE_HEADINGS = [
    "gemm", "T", "cache", "us alone", "CTAs", "blocks", "times", "SMs taken", "GB/s", "GB/s alone", "hidden"
]  # fmt: skip


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def has_published_sizes(doc: dict) -> bool:
    return (doc["sizes"]["hidden"], doc["sizes"]["intermediate"]) == (8192, 3584)


def best_offset_ratio(row: dict) -> float | None:
    """The best of the published offsets, as measured here."""
    return min((row["ratios"][str(split)] for split in row["published"]), default=None) if row["ratios"] else None


def tax_cells(row: dict, published: bool) -> list[str]:
    if not row["ok"]:
        return [str(row["num_tokens"]), "wrong", *["-"] * (len(TAX_HEADINGS) - 2)]
    ratios = row["ratios"]
    _, equal, offsets = PUBLISHED.get(row["num_tokens"], (None, None, None)) if published else (None, None, None)
    return [
        str(row["num_tokens"]), f"{row['us']:.1f}", f"{row['us_p20']:.1f} - {row['us_p80']:.1f}",
        _ratio(ratios[str(row["equal"])]), str(row["planned"] or "-"), _ratio(ratios.get(str(row["planned"]))),
        str(row["best"] or "-"), _ratio(ratios.get(str(row["best"]))),
        "-" if row["planned_over_best"] is None else f"{100 * (row['planned_over_best'] - 1):+.1f} %",
        _ratio(best_offset_ratio(row)), _ratio(equal), _ratio(offsets),
    ]  # fmt: skip


def beside_cells(row: dict, doc: dict) -> list[list[str]]:
    start = [row["gemm"], str(row["num_tokens"]), row["cache"]]
    if not row["ok"]:
        return [[*start, "wrong", *["-"] * (len(BESIDE_HEADINGS) - 4)]]
    num_sms, world_size = doc["env"].get("sms"), doc["collective"]["world_size"]
    alone = {entry["max_ctas"]: entry["gb_per_s"] for entry in doc["collective"]["alone"]}
    lines = []
    for entry in row["beside"]:
        blocks = world_size * entry["max_ctas"]
        lines.append([
            *start, f"{row['us']:.1f}", str(entry["max_ctas"]), str(blocks) if num_sms else "-", _ratio(entry["ratio"]),
            _ratio(num_sms / (num_sms - blocks)) if num_sms and num_sms > blocks else "-",
            "-" if entry["gb_per_s"] is None else f"{entry['gb_per_s']:.1f}", f"{alone[entry['max_ctas']]:.1f}",
            "-" if entry["hidden"] is None else f"{100 * entry['hidden']:.0f} %",
        ])  # fmt: skip
    return lines


def remarks(doc: dict) -> list[str]:
    env, sizes = doc["env"], doc["sizes"]
    commit, where = environment.commit_label(env), environment.device_label(env)
    lines = [
        f"{where}; torch {env['torch']}; {env['date'][:10]}; commit {commit}. Planned with {doc['profile']}.",
        f"Split tax: one rank's MLP, hidden {sizes['hidden']}, intermediate {sizes['intermediate']}, {sizes['dtype']}. "
        "Columns from `equal` on are medians of times over unsplit of the same round; `of best` is the planner's split "
        "over the best one. `best` is searched over the multiples of 64 with at least 37 % of the tokens in either "
        "half; `offsets` is the best of the published offsets, as measured here, some of which lie outside that range. "
        "SiLU and product are two torch kernels in every contestant.",
    ]
    if has_published_sizes(doc):
        lines.append(
            "`paper`: published by TokenWeave's authors, another machine (8 H100): equal halves, and the best of the "
            "offsets."
        )
    if hot := [str(row["num_tokens"]) for row in doc["tax"] if row["cache"] == "hot"]:
        lines.append(f"Weights and inputs stayed in a cache between calls at {', '.join(hot)} tokens.")
    lines += verdicts(doc["tax"])
    if doc["beside"]:
        collective = doc["collective"]
        lines.append(
            f"Beside a collective: allreduce_rmsnorm_ on {collective['num_tokens']}x{collective['hidden']}, "
            f"{collective['world_size']} virtual ranks, {collective['sets']} sets in turn; `CTAs` is max_ctas per "
            "rank, `blocks` all that are resident, `times` the GEMM's time over its time alone, `SMs taken` what that "
            "would be if each block took a multiprocessor and nothing else, GB/s the collective's."
        )
        lines.append(doc["note"])
    for entry in (doc["collective"] or {"alone": []})["alone"]:
        if not entry["ok"]:
            lines.append(f"The collective with max_ctas={entry['max_ctas']} is wrong: nothing was timed beside it.")
    lines += [f"{name} was skipped: {why}" for name, why in doc["skipped"].items()]
    if (env.get("other_load") or 0) > 0.1:
        lines.append(f"Not a quiet machine: other processes used {100 * env['other_load']:.0f} % of its cores.")
    flags: dict[str, list[str]] = {}
    for row in [*doc["tax"], *doc["beside"]]:
        for flag in row["flags"]:
            flags.setdefault(flag, []).append(" ".join([row.get("gemm", "split tax"), str(row["num_tokens"])]))
    return lines + [f"{flag}: {', '.join(rows)}." for flag, rows in flags.items()]


def print_tables(doc: dict, terminal: Terminal) -> None:
    if doc["tax"]:
        lines = [tax_cells(row, has_published_sizes(doc)) for row in doc["tax"]]
        terminal.table(
            f"split tax on {doc['env']['device']}", TAX_HEADINGS, lines, [not row["ok"] for row in doc["tax"]]
        )
    if doc["beside"]:
        lines = [(line, not row["ok"]) for row in doc["beside"] for line in beside_cells(row, doc)]
        title = f"GEMMs beside a collective on {doc['env']['device']}"
        terminal.table(title, BESIDE_HEADINGS, [line for line, _ in lines], [bad for _, bad in lines])
    for line in remarks(doc):
        terminal.print(line)


# --- the schema -------------------------------------------------------------------------------------------------------

_NUMBER, _MAYBE, _LIST = (int, float), (int, float, type(None)), (list,)
_DOC_FIELDS = {"schema", "version", "env", "profile", "sizes", "tax", "collective", "beside", "skipped", "note"}
_TIMES = {"us": _MAYBE, "us_p20": _MAYBE, "us_p80": _MAYBE, "max_err": _MAYBE}
TAX_FIELDS = _TIMES | {
    "num_tokens": (int,), "ok": (bool,), "cache": (str,), "wrong": _LIST, "equal": (int,), "planned": (int, type(None)),
    "searched": _LIST, "published": _LIST, "predicted_ratio": _MAYBE, "ratios": (dict,), "best": (int, type(None)),
    "planned_over_best": _MAYBE, "mirror_noise": _MAYBE, "rounds": (int,), "flags": _LIST,
}  # fmt: skip
BESIDE_FIELDS = _TIMES | {
    "gemm": (str,), "num_tokens": (int,), "features": (int,), "inner": (int,), "ok": (bool,), "cache": (str,),
    "beside": _LIST, "flags": _LIST,
}  # fmt: skip
ENTRY_FIELDS = {"max_ctas": (int,), "ratio": _NUMBER, "gb_per_s": _MAYBE, "hidden": _MAYBE}
ALONE_FIELDS = {"max_ctas": (int,), "ok": (bool,), "max_err": _MAYBE, "us": _MAYBE, "gb_per_s": _MAYBE}


def _require(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise ValueError(f"{where}: {what}")


def _check_fields(value: object, fields: dict[str, tuple], where: str) -> None:
    _require(isinstance(value, dict), where, f"is {value!r}, expected an object")
    _require(set(value) == set(fields), where, f"fields differ: {sorted(set(value) ^ set(fields))}")
    for name, types in fields.items():
        found = value[name]
        fits = isinstance(found, types) and (bool in types or not isinstance(found, bool))
        _require(fits, f"{where}.{name}", f"is {found!r}, expected {' or '.join(t.__name__ for t in types)}")
        _require(not isinstance(found, float) or math.isfinite(found), f"{where}.{name}", f"is {found}")


def _check_times(row: dict, where: str) -> None:
    times = (row["us_p20"], row["us"], row["us_p80"])
    if row["ok"]:
        _require(None not in times and 0 < times[0] <= times[1] <= times[2], where, f"bad times {times}")
        _require(row["max_err"] is not None, where, "a correct row states its error")
    else:
        _require(times == (None, None, None), where, "the result is wrong, yet it states a time")
    _require(row["cache"] in ("cold", "hot"), f"{where}.cache", f"is {row['cache']!r}, expected cold or hot")


def validate(doc: dict) -> None:
    """Raises ValueError with a sentence that says where the document departs from the schema."""
    head = (doc.get("schema"), doc.get("version")) if isinstance(doc, dict) else None
    _require(head == (SCHEMA, VERSION), "document", f"must be {SCHEMA!r} version {VERSION}, got {head}")
    _require(set(doc) == _DOC_FIELDS, "document", f"fields differ: {sorted(set(doc) ^ _DOC_FIELDS)}")
    missing = [name for name in ENV_FIELDS if name not in doc["env"]]
    _require(not missing, "env", f"missing {', '.join(missing)}")
    _require(doc["env"]["device"] == "cpu" or "gpu" in doc["env"], "env", "a cuda result must name its gpu")
    for index, row in enumerate(doc["tax"]):
        where = f"tax[{index}]"
        _check_fields(row, TAX_FIELDS, where)
        _check_times(row, where)
        needed = [row["equal"], *row["searched"], *row["published"], *([row["planned"]] if row["planned"] else [])]
        wanted = {str(split) for split in needed} if row["ok"] else set()
        _require(
            set(row["ratios"]) == wanted, f"{where}.ratios", f"splits differ: {sorted(set(row['ratios']) ^ wanted)}"
        )
        good = all(isinstance(ratio, _NUMBER) and 0 < ratio < math.inf for ratio in row["ratios"].values())
        _require(good, f"{where}.ratios", f"must be positive numbers, got {row['ratios']}")
        _require(
            row["best"] is None or row["best"] in row["searched"], f"{where}.best", f"is {row['best']}, not searched"
        )
    for index, row in enumerate(doc["beside"]):
        where = f"beside[{index}]"
        _check_fields(row, BESIDE_FIELDS, where)
        _check_times(row, where)
        _require(row["ok"] or not row["beside"], where, "the result is wrong, yet it states a slowdown")
        for entry in row["beside"]:
            _check_fields(entry, ENTRY_FIELDS, f"{where}.beside")
    _require(not doc["beside"] or doc["collective"] is not None, "document", "beside needs the collective it is beside")
    for entry in (doc["collective"] or {"alone": []})["alone"]:
        _check_fields(entry, ALONE_FIELDS, "collective.alone")


def load(path: Path) -> dict:
    doc = json.loads(path.read_text())
    validate(doc)
    return doc


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(doc: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from bench.plot import COLOURS, GRID, INK

    tax = [row for row in doc["tax"] if row["ok"]]
    gemms = [row for row in doc["beside"] if row["ok"] and row["beside"]]
    if not tax and not gemms:
        raise SystemExit("split_report.py: the file holds no correct row")
    style = {
        "axes.edgecolor": "#999999", "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.labelcolor": INK,
    }  # fmt: skip
    with plt.rc_context(style):
        panels = [panel for panel in (tax and _draw_tax, gemms and _draw_beside) if panel]
        figure, axes = plt.subplots(
            1, len(panels), figsize=(7.5 * len(panels), 5.6), squeeze=False, layout="constrained"
        )
        for panel, place in zip(panels, axes[0], strict=True):
            panel(place, doc, tax if panel is _draw_tax else gemms, COLOURS)
        figure.suptitle(f"Token splitting on {environment.device_label(doc['env'])}", fontweight="bold", color=INK)
        figure.supxlabel(
            f"{doc['env']['date'][:10]}, commit {environment.commit_label(doc['env'])}, torch {doc['env']['torch']}. "
            "Medians of interleaved rounds.", fontsize=9, color="#666666",
        )  # fmt: skip
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _draw_tax(axes, doc: dict, rows: list[dict], colours: list[str]) -> None:
    tokens = [row["num_tokens"] for row in rows]
    lines = {
        "equal halves": [row["ratios"][str(row["equal"])] for row in rows],
        "planner": [row["ratios"].get(str(row["planned"]), math.nan) for row in rows],
        "best of all splits": [row["ratios"].get(str(row["best"]), math.nan) for row in rows],
    }
    for colour, marker, (name, values) in zip(colours[1:], "sD^", lines.items(), strict=False):
        axes.plot(tokens, values, marker=marker, color=colour, label=name, linewidth=2)
    if has_published_sizes(doc) and (shown := [t for t in tokens if t in PUBLISHED]):
        for column, dash, name in ((1, ":", "equal halves"), (2, "--", "best offset")):
            values = [PUBLISHED[t][column] for t in shown]
            axes.plot(shown, values, dash, color="#999999", label=f"{name}, published, other machine")
    axes.axhline(1, color="#333333", linewidth=1.3)
    axes.set_xlabel("tokens")
    axes.set_ylabel("time of two halves / unsplit")
    axes.set_title("What splitting costs two GEMMs", loc="left", fontweight="bold")
    axes.legend(fontsize=9, frameon=False)


def _draw_beside(axes, doc: dict, rows: list[dict], colours: list[str]) -> None:
    names = list(dict.fromkeys(row["gemm"] for row in rows))
    tokens = list(dict.fromkeys(row["num_tokens"] for row in rows))
    for row in rows:
        ctas, ratios = zip(*((entry["max_ctas"], entry["ratio"]) for entry in row["beside"]), strict=True)
        axes.plot(
            ctas, ratios, marker="osD^v"[tokens.index(row["num_tokens"]) % 5], linewidth=2,
            color=colours[names.index(row["gemm"]) % len(colours)], label=f"{row['gemm']}, {row['num_tokens']} tokens",
        )  # fmt: skip
    axes.axhline(1, color="#333333", linewidth=1.3)
    axes.set_xscale("log", base=2)
    every = sorted({entry["max_ctas"] for row in rows for entry in row["beside"]})
    axes.set_xticks(every, [str(n) for n in every])
    axes.set_xlabel(f"CTAs per rank ({doc['collective']['world_size']} virtual ranks)")
    axes.set_ylabel("time of the GEMM / alone")
    axes.set_title("A GEMM beside a collective", loc="left", fontweight="bold")
    axes.legend(fontsize=9, frameon=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="draw a picture too")
    options = parser.parse_args()
    doc = load(options.file)
    print_tables(doc, Terminal())
    if options.output:
        draw(doc, options.output)
        print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
