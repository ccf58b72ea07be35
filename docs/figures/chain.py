"""Draw the chain of cached layers as SVG: `python docs/figures/chain.py > docs/figures/chain.svg`.

Columns up to a changed layer stay valid. `update` computes those after it from the last valid one.
"""

BOX, GAP, HEIGHT, LEFT = 104, 22, 40, 16
VALID, COMPUTED, FROZEN, CHANGED = "#d3e8d3", "#f6d9c4", "#e8ebf0", "#f2a65a"
STAGES = ("video", "frames", "stem", "layer1", "layer2", "layer3", "layer4", "pool")
CACHED = {"layer2": VALID, "layer3": VALID, "layer4": COMPUTED, "pool": COMPUTED}
CHANGED_STAGE = "layer4"


def box(x: float, y: float, text: str, fill: str) -> str:
    """Return a labelled box as SVG."""
    return (
        f'<rect x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="6" fill="{fill}" '
        f'stroke="#444"/><text x="{x + BOX / 2}" y="{y + 25}" text-anchor="middle">{text}</text>'
    )


def arrow(x: float, y: float, to_x: float, to_y: float, style: str = "") -> str:
    """Return an arrow as SVG."""
    return (
        f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="#444" stroke-width="1.5" '
        f'marker-end="url(#head)" {style}/>'
    )


def label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    """Return a small line of text as SVG."""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="12" fill="#444">{text}</text>'


def main() -> None:
    """Print the drawing."""
    left = {stage: LEFT + i * (BOX + GAP) for i, stage in enumerate(STAGES)}
    width, network, store = LEFT * 2 + len(STAGES) * (BOX + GAP) - GAP, 42, 142
    middle = {stage: x + BOX / 2 for stage, x in left.items()}
    parts = [
        label(LEFT, 24, "decoded once, run once:", "start"),
        label(LEFT, store + 25, "feature store (Zarr), a column per kept layer", "start"),
    ]
    for stage, following in zip(STAGES, (*STAGES[1:], None), strict=True):
        fill = CHANGED if stage == CHANGED_STAGE else FROZEN
        parts.append(box(left[stage], network, stage, fill))
        if following:
            parts.append(arrow(left[stage] + BOX, network + 20, left[following] - 2, network + 20))
        if stage in CACHED:
            state = "valid" if CACHED[stage] == VALID else "computed"
            parts.append(box(left[stage], store, state, CACHED[stage]))
            parts.append(arrow(middle[stage], network + HEIGHT, middle[stage], store - 2))
    parts.append(label(middle[CHANGED_STAGE], 24, "changed by a method"))
    start, end, bottom, below = (
        middle["layer3"],
        middle["pool"],
        store + HEIGHT,
        store + HEIGHT + 28,
    )
    parts.append(
        f'<path d="M {start} {bottom} V {below} H {end} V {bottom + 4}" fill="none" '
        'stroke="#b4551d" stroke-width="2" stroke-dasharray="6 4" marker-end="url(#head)"/>'
    )
    text = "update: reads the cached layer3 and runs only layer4 and pool"
    parts.append(label(width - LEFT, below + 18, text, "end"))
    print(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {below + 30}" '
        'font-family="sans-serif" font-size="15">'
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#444"/></marker></defs>'
        f'<rect width="100%" height="100%" fill="white"/>\n{chr(10).join(parts)}\n</svg>'
    )


if __name__ == "__main__":
    main()
