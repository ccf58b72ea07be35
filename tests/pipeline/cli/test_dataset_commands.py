"""Commands that describe data sets, and names that would steer a terminal."""

import json

import pandas as pd
import pytest

from varve.pipeline.cli.format_store import failure_lines
from varve.pipeline.registry import available


@pytest.fixture
def listed(tmp_path):
    rows = ["a.mp4,walk,train,1,2.5", "a.mp4,run,train,3,9", "b.mp4,walk,test,,", "c.mp4,,test,,"]
    text = "path,label,split,start,end\n" + "\n".join(rows) + "\n"
    (tmp_path / "clips.csv").write_text(text, "utf-8")
    return tmp_path


def test_datasets_lists_every_layout_with_its_tree(varve):
    text = varve("datasets").stdout
    facts = {entry["layout"]: entry for entry in json.loads(varve("datasets", "--json").stdout)}
    assert list(facts) == available("layouts")
    for name, entry in facts.items():
        assert entry["needs"]
        assert "ROOT/" in entry["tree"]
        assert f"{name}: {entry['needs']}" in text
        assert all(f"    {line}".rstrip() in text for line in entry["tree"].split("\n"))


def test_a_plan_without_a_backbone_describes_the_data_set(listed, varve):
    text = varve("plan", listed).stdout
    lines = [line.split() for line in text.split("\n")]
    assert ["class", "train", "test"] in lines
    assert ["walk", "1", "1"] in lines
    assert ["all", "2", "1"] in lines
    assert "without a label, left out: 1" in text
    assert "2 clips are stretches of 1.5 to 6 s" in text
    assert "a.mp4  run  train  3 s to 9 s" in text
    facts = json.loads(varve("plan", listed, "--json").stdout)
    assert facts["clips_by_class"] == {"run": {"train": 1}, "walk": {"train": 1, "test": 1}}
    assert (facts["shortest_seconds"], facts["longest_seconds"]) == (1.5, 6.0)
    assert [row["path"] for row in facts["rows"]] == ["a.mp4", "a.mp4", "b.mp4"]
    assert sorted(path.name for path in listed.iterdir()) == ["clips.csv"]


def test_names_that_steer_a_terminal_are_printed_escaped(tmp_path, varve):
    clip = {"path": "a\n\x1b[2Jb.mp4", "reason": "missing", "detail": "not\nthere \x07"}
    assert failure_lines(pd.DataFrame([clip])) == (
        "  row 0  a\\n\\x1b[2Jb.mp4  missing: not; there \\x07"
    )
    (tmp_path / "x\n\x1b[31m").mkdir()
    (tmp_path / "x\n\x1b[31m" / "v\x9b.mp4").write_bytes(b"")
    text = varve("plan", tmp_path).stdout
    assert "\x1b" not in text
    assert "x\\n\\x1b[31m/v\\x9b.mp4" in text
