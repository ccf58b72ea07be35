"""Format data sets: the layouts there are, and what was recognised in a directory."""

import textwrap
from collections import Counter
from dataclasses import asdict
from typing import Any

from varve.pipeline.datasets.layouts import Layout, Listing
from varve.pipeline.units import printable

MOST_ROWS = 10
MOST_CLASSES = 30


def layout_facts(layouts: dict[str, Layout]) -> list[dict[str, str]]:
    """Return the layouts as JSON."""
    return [{"layout": n, "needs": k.needs, "tree": k.tree} for n, k in layouts.items()]


def layout_lines(layouts: dict[str, Layout]) -> str:
    """Return the layouts as text, each with what it needs and a picture of its tree."""
    parts = []
    for name, known in layouts.items():
        needs = f": {known.needs}" if known.needs else ""
        parts.append(f"{name}{needs}\n{textwrap.indent(known.tree, '    ')}".rstrip())
    return "\n\n".join(parts)


def listing_facts(listing: Listing) -> dict[str, Any]:
    """Return what was recognised as JSON: clips by split and class, lengths, and first rows."""
    counts = Counter((clip.split, clip.label) for clip in listing.clips)
    splits = list(dict.fromkeys(clip.split for clip in listing.clips))
    stretches = [
        clip.end_seconds - (clip.start_seconds or 0.0)
        for clip in listing.clips
        if clip.end_seconds is not None
    ]
    return {
        "layout": listing.layout,
        "root": str(listing.root),
        "dataset": listing.summary,
        "clips": len(listing.clips),
        "classes": list(listing.classes),
        "splits": {split: sum(n for (s, _), n in counts.items() if s == split) for split in splits},
        "clips_by_class": {
            label: {split: n for split in splits if (n := counts[split, label])}
            for label in listing.classes
        },
        # Of clips that a list gives as stretches; the length of files is known after a build.
        "stretches": len(stretches),
        "shortest_seconds": min(stretches, default=None),
        "longest_seconds": max(stretches, default=None),
        "left_out": dict(getattr(listing, "left_out", ())),
        "rows": [asdict(clip) for clip in listing.clips[:MOST_ROWS]],
    }


def listing_lines(listing: Listing) -> str:
    """Return what was recognised as text."""
    facts = listing_facts(listing)
    lines = [facts["dataset"], ""]
    names = {split: split or "no split" for split in facts["splits"]}
    shown = listing.classes[:MOST_CLASSES]
    width = max(map(len, [*map(printable, shown), "class", "all"]))
    lines.append(f"{'class':<{width}}  " + "  ".join(f"{name:>8}" for name in names.values()))
    for label in shown:
        counts = facts["clips_by_class"][label]
        numbers = "  ".join(f"{counts.get(s, 0):>{max(8, len(name))}}" for s, name in names.items())
        lines.append(f"{printable(label):<{width}}  {numbers}")
    if len(listing.classes) > len(shown):
        lines.append(f"and {len(listing.classes) - len(shown)} more classes")
    totals = "  ".join(f"{n:>{max(8, len(names[s]))}}" for s, n in facts["splits"].items())
    lines += [f"{'all':<{width}}  {totals}", ""]
    if facts["stretches"]:
        lines.append(
            f"{facts['stretches']} clips are stretches of {facts['shortest_seconds']:g} to "
            f"{facts['longest_seconds']:g} s"
        )
    if facts["left_out"]:
        lines.append("left out: " + ", ".join(f"{n} {k}" for k, n in facts["left_out"].items()))
    lines.append(f"first {len(facts['rows'])} of {facts['clips']} clips:")
    for clip in listing.clips[:MOST_ROWS]:
        times = (
            ""
            if clip.start_seconds is None and clip.end_seconds is None
            else (
                f"  {clip.start_seconds or 0:g} s to "
                + ("the end" if clip.end_seconds is None else f"{clip.end_seconds:g} s")
            )
        )
        cells = "  ".join(map(printable, filter(None, (clip.path, clip.label, clip.split))))
        lines.append(f"  {cells}{times}")
    lines.append("name a --backbone and a --store to plan a build")
    return "\n".join(lines)
