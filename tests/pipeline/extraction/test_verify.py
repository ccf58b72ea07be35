"""Verification where a part of what a store was built with is missing."""

from varve import BuildSpec, Runtime, build, load_plugin
from varve.pipeline import registry
from varve.pipeline.extraction.verify import verify

RULE = """
from varve import register


@register("samplings", "edges")
def edges(times_N, frames):
    return [0, len(times_N) - 1][:frames]
"""


def test_frames_of_a_rule_that_is_not_loaded_are_a_finding_and_the_rest_is_verified(
    dataset, tmp_path, monkeypatch
):
    monkeypatch.setenv(registry.VARIABLE, "")
    monkeypatch.setattr(registry, "_LOADED", {})
    (tmp_path / "rule.py").write_text(RULE)
    videos, store = dataset(("grow", "shrink"), 3), tmp_path / "s.zarr"
    load_plugin(tmp_path / "rule.py")
    try:
        for sampling in ("tsn", "edges"):
            spec = BuildSpec("resnet18:random-0", "stem:pool", frames=2, sampling=sampling)
            build(videos, store, spec, runtime=Runtime(serial=True))
        both = verify(store, sample=2)
        assert (both.equal, both.findings) == (4, [])
    finally:
        registry.unregister("samplings", "edges")
    result = verify(store, sample=2)
    assert result.equal == 2
    (finding,) = result.findings
    assert finding.problem.startswith("cannot be computed again: no sampling 'edges'")
