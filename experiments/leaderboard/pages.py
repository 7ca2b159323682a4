"""The table and the picture of the leaderboard's results, and their summary in the project's README.

python experiments/leaderboard/pages.py     # from results.json, without measuring anything
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TABLE, PICTURE, README = HERE / "README.md", HERE / "front.svg", HERE.parents[1] / "README.md"
KINDS = {"weights": "up and gate, weights alone", "calibrated": "all three families, calibrated"}
STYLES = {
    "GloBE, one square atom, coded": ("navy", "o"),
    "GloBE, one square atom": ("tab:blue", "o"),
    "GloBE, equal bytes for all banks": ("deepskyblue", "o"),
    "GloBE, tanh, bfloat16": ("teal", "o"),
    "RTN": ("darkgray", "s"),
    "GPTQ": ("tab:orange", "s"),
    "GPTQ, rotated": ("tab:red", "s"),
    "GPTQ, bits by row": ("gold", "D"),
    "GPTQ, rotated, bits by row": ("tab:brown", "D"),
    "shared basis, rounded": ("tab:green", "^"),
    "SVD, rounded": ("tab:olive", "^"),
    "MoBE form, rounded": ("tab:purple", "^"),
    "SLBF form, rounded": ("tab:pink", "^"),
    "shared basis, bfloat16": ("yellowgreen", "v"),
    "pruned by REAP": ("black", "x"),
}
"""Colour and mark of each method, the same in all panels, in the order of the legend."""
SUMMARY = {
    "GloBE, one square atom": ("GloBE, one square atom",),
    "the same, coded": ("GloBE, one square atom, coded",),
    "GPTQ, the best form of four": tuple(name for name in STYLES if name.startswith("GPTQ")),
    "rounded factors, the best of four": tuple(name for name in STYLES if name.endswith("rounded")),
}
"""Methods of one row of the summary in the project's own README."""
SHARES = (0.125, 0.145, 0.182, 0.21, 0.27)
MARKS = ("<!-- leaderboard, written by experiments/leaderboard/pages.py -->\n", "<!-- end -->\n")
TICKS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 12)


def front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that no other one beats in both bytes and divergence, from the smallest."""
    best: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda one: (one["bytes"], one["kl"])):
        if not best or point["kl"] < best[-1]["kl"]:
            best.append(point)
    return best


def boards(results: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Return the rows of every model and kind by bytes."""
    places = dict.fromkeys((one["model"], one["kind"]) for one in results)
    return [
        (
            model,
            kind,
            sorted((one for one in results if (one["model"], one["kind"]) == (model, kind)), key=_bytes),
        )
        for model, kind in sorted(places, key=lambda place: place[1])
    ]


def _bytes(one: dict[str, Any]) -> float:
    return one["bytes"]


def table(results: list[dict[str, Any]]) -> str:
    """Return the rows of every model by bytes; bold are those on the front."""
    text = (HERE / "intro.md").read_text()
    for model, kind, points in boards(results):
        best = front(points)
        text += f"\n## {model}, {KINDS[kind]}\n\n{points[0]['tokens']:,} tokens; the original has a perplexity of "
        text += f"{points[0]['perplexity_original']:.2f}.\n\n"
        text += "| bits | of bf16 | method | size | KL (95 %) | perplexity | top-1 | RelFrob | s | MiB |\n"
        text += "|---" * 10 + "|\n"
        for one in points:
            mark = "**" if one in best else ""
            run = one["relfrob"] is not None
            text += (
                f"| {one['bits']:.2f} | {one['share']:.3f} | {mark}{one['method']}{mark} | {one['size']} | "
                f"{mark}{one['kl']:.5f}{mark} ({one['kl_low']:.5f} to {one['kl_high']:.5f}) | "
                f"{one['perplexity']:.2f} | {one['top1']:.2%} | "
            )
            text += (
                f"{one['relfrob']:.4f} | {one['seconds']:.0f} | {one['memory_mib']:.0f} |\n"
                if run
                else "- | - | - |\n"
            )
    return text


def summary(results: list[dict[str, Any]]) -> str:
    """Return the least divergence of each method within shares of the bytes, of all calibrated models."""
    text = (
        "| KL within a share of the bfloat16 bytes | " + " | ".join(f"{share:g}" for share in SHARES) + " |\n"
    )
    text += "|---" * (len(SHARES) + 1) + "|\n"
    for model, kind, points in boards(results):
        if kind != "calibrated":
            continue
        best = {
            (title, share): min(
                (one["kl"] for one in points if one["method"] in methods and one["share"] <= share),
                default=None,
            )
            for title, methods in SUMMARY.items()
            for share in SHARES
        }
        for title in SUMMARY:
            cells = []
            for share in SHARES:
                kl = best[title, share]
                found = [one for other in SUMMARY if (one := best[other, share]) is not None]
                least = min(found, default=None)
                cells.append("-" if kl is None else f"**{kl:.5f}**" if kl == least else f"{kl:.5f}")
            text += f"| `{model}`: {title} | " + " | ".join(cells) + " |\n"
    return text


def with_summary(page: str, results: list[dict[str, Any]]) -> str:
    """Return a page with the summary between its marks; one without them stays as it is."""
    before, begin, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    return before + begin + summary(results) + end + after if end else page


def write_pages(results: list[dict[str, Any]]) -> None:
    """Write table, picture and the summary in the project's README."""
    TABLE.write_text(table(results))
    draw(results, PICTURE)
    README.write_text(with_summary(README.read_text(), results))


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw divergence over bytes, both logarithmic: a row of panels for each model, a column for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "globe"
    found = {(model, kind): points for model, kind, points in boards(results)}
    models = list(dict.fromkeys(one["model"] for one in results))
    kinds = [kind for kind in KINDS if any(kind == own for _, own in found)]
    height = 4.2 * len(models) + 1.2
    figure, axes = plt.subplots(len(models), len(kinds), figsize=(6.6 * len(kinds), height), squeeze=False)
    lines: dict[str, Any] = {}
    for panels, model in zip(axes, models, strict=True):
        for axis, kind in zip(panels, kinds, strict=True):
            if (model, kind) not in found:
                axis.remove()
                continue
            lines |= _panel(axis, found[model, kind])
            axis.set_title(f"{model}, {KINDS[kind]}", fontsize=11)
    order = sorted(lines, key=lambda name: list(STYLES).index(name) if name in STYLES else len(STYLES))
    figure.tight_layout(rect=(0, 1.2 / height, 1, 1))
    figure.legend(
        [lines[name] for name in order], order, loc="lower center", ncols=2 * len(kinds), fontsize=9
    )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _panel(axis: Any, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Draw one model and kind, and return its lines by what they are called."""
    lines = {}
    for method in dict.fromkeys(one["method"] for one in points):
        own = [one for one in points if one["method"] == method]
        size, kl = ([one[name] for one in own] for name in ("bits", "kl"))
        colour, mark = STYLES.get(method, (None, "."))
        (lines[method],) = axis.plot(size, kl, f"{mark}-", ms=5, lw=1.2, color=colour)
    best = front(points)
    steps = ([one["bits"] for one in best], [one["kl"] for one in best])
    (lines["front"],) = axis.step(*steps, "k:", where="post")
    axis.set(xscale="log", yscale="log", xlabel="bits a weight", ylabel="KL (nats)")
    low, high = points[0]["bits"] / 1.05, points[-1]["bits"] * 1.05
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xlim(low, high)
    shares = axis.secondary_xaxis("top", functions=(lambda bits: bits / 16, lambda share: 16 * share))
    shares.set_xticks(
        [tick / 16 for tick in ticks], [f"{tick / 16:.3g}" for tick in ticks], fontsize=8, color="gray"
    )
    low, high = axis.get_ylim()
    ticks = [n * 10.0**power for power in range(-6, 2) for n in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    for one in (axis, shares):
        one.minorticks_off()
    axis.grid(alpha=0.3)
    return lines


if __name__ == "__main__":
    write_pages(json.loads(TABLE.with_name("results.json").read_text()))
