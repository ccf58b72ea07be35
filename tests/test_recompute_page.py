"""The worked example of RECOMPUTE.md, run from top to bottom as it stands."""

import re
from pathlib import Path

import numpy as np

from varve.pipeline.datasets.synthetic import make_dataset

PAGE = Path(__file__).parents[1] / "docs" / "RECOMPUTE.md"


def test_the_worked_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / "demo" / "videos", clips_per_class=2, classes=("grow", "shrink"),
                 broken=False)  # fmt: skip
    text = PAGE.read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    assert names["gated"].changed == ["blocks.10.mlp"]
    report = names["report"]
    assert report.decoded == 0
    ran = {stage.split()[1] for stage in report.calls}
    assert ran == {"blocks.10.mlp", "blocks.11.attn", "blocks.11.mlp", "proj"}
    assert "0 files to decode" in capsys.readouterr().out
    assert np.isfinite(names["drift"])
    assert names["drift"] > 0
