"""Several views of a clip in training, and five crops in testing, from a real build."""

import numpy as np
import pytest
import torch

from varve import BuildSpec, run
from varve.heads.parts.clips import Clips, joined, part_of, sparse
from varve.pipeline.config import Picture
from varve.pipeline.experiments import run_spec
from varve.pipeline.experiments.run import RunState, scores_of
from varve.pipeline.progress import Progress
from varve.stores import FeatureStore, SpecMismatch

NAME = "resnet18:random-0"
QUICK = {"first_epochs": 3, "epochs": 3}


@pytest.fixture(scope="module")
def store(dataset, built_once) -> FeatureStore:
    spec = BuildSpec((NAME,), keep=("layer4.0", "pool"), frames=2, views=3, flip=True,
                     random_crop=True, five_crop=True)  # fmt: skip
    return FeatureStore.open(built_once(dataset(("grow", "shrink"), 3), spec))


def three_views(clips=40):
    """Clips whose feature has the numbers of the clip and of the view."""
    views = [{"x": torch.arange(clips)[:, None, None] + 1000.0 * view} for view in range(3)]
    return Clips(views[0], torch.arange(clips) % 2, torch.arange(clips), views[1:])


def drawn_views(clips, seed):
    values = torch.zeros(len(clips))
    for indices, batch in clips.batches(7, np.random.default_rng(seed)):
        values[indices] = batch["x"][:, 0, 0]
    assert torch.equal(values % 1000, torch.arange(len(clips)).float())
    return (values // 1000).long()


def test_every_epoch_draws_a_view_of_each_clip_by_its_generator():
    clips = three_views()
    first = drawn_views(clips, 0)
    assert set(first.tolist()) == {0, 1, 2}
    assert torch.equal(drawn_views(clips, 0), first)
    assert not torch.equal(drawn_views(clips, 1), first)
    plain = torch.cat([batch["x"] for _, batch in clips.batches(7)])[:, 0, 0]
    assert torch.equal(plain, torch.arange(40).float())


def test_clips_without_views_are_drawn_as_before():
    batches = three_views().each_view()[0].batches(7, np.random.default_rng(3))
    order = torch.cat([indices for indices, _ in batches])
    assert order.tolist() == np.random.default_rng(3).permutation(40).tolist()


def test_views_stay_with_their_clips_when_these_are_joined_divided_and_thinned():
    clips = three_views(10)
    both = joined(part_of(clips, torch.tensor([3, 1])), sparse(clips, 1))
    for number, view in enumerate(both.each_view()):
        expected = [3, 1, *range(10)]
        assert view.whole("x")[:, 0, 0].tolist() == [1000.0 * number + n for n in expected]


def test_a_view_has_the_features_of_the_plain_one():
    with pytest.raises(ValueError, match="a view has other features"):
        Clips({"x": torch.zeros(2, 1, 1)}, torch.zeros(2).long(), views=[{"y": torch.zeros(2, 1)}])


@pytest.mark.parametrize(
    ("head", "options"),
    [("lucir", {}), ("stpr", {"text": "codes", "layers": 1, "heads": 2, "ffn": 8}),
     ("hce", {"blocks": 1}), ("linear", {"blocks": 1}), ("icarl", {"whiten": "first",
      "predict": "classifier"})],
)  # fmt: skip
def test_training_reads_views_of_the_task_and_of_its_memory(store, tmp_path, head, options):
    options = {**QUICK, **options}
    plain = run(store, head, "1+1x1", options=options, out=tmp_path)
    varied = run(store, head, "1+1x1", options={**options, "views": 3}, out=tmp_path)
    assert plain.folder != varied.folder
    assert varied.cost["bytes_read"] > plain.cost["bytes_read"]
    again = run(store, head, "1+1x1", options={**options, "views": 3}, out=tmp_path / "again")
    states = [
        [file.read_bytes() for file in sorted((done.folder / "checkpoints").glob("*.safetensors"))]
        for done in (plain, varied, again)
    ]
    assert len(states[0]) == 2
    assert states[1] == states[2]
    assert states[1][-1] != states[0][-1]


def test_scores_of_five_crops_are_the_mean_over_them(store, tmp_path):
    done = run(store, "lucir", "1+1x1", options={**QUICK, "crops": 5}, out=tmp_path)
    plan = run_spec.prepare_run(store, "lucir", "1+1x1", options={**QUICK, "crops": 5})
    state = RunState(plan, done.folder, None, Progress())
    test = plan.division.test[0]
    clips = plan.test_clips(test)
    cells = [store.feature(NAME, "pool", view=view).read(test) for view in (0, -1, -2, -3, -4)]
    assert len({c.tobytes() for c in cells}) == 5
    each = [state.plan.head.scores({"vector": torch.from_numpy(c).float()}) for c in cells]
    mean = torch.stack(each).double().mean(dim=0).float()
    torch.testing.assert_close(scores_of(state.plan.head.scores, clips), mean)


def test_five_crops_train_nothing_again(store, tmp_path):
    plain = run(store, "lucir", "1+1x1", options=QUICK, out=tmp_path)
    crops = {**QUICK, "crops": 5}
    done = run(store, "lucir", "1+1x1", options=crops, out=tmp_path, states_from=plain.folder)
    assert done.folder != plain.folder
    for file in (plain.folder / "checkpoints").glob("*.safetensors"):
        assert (done.folder / "checkpoints" / file.name).read_bytes() == file.read_bytes()
    assert done.cost["seconds"] == plain.cost["seconds"]


def test_heads_that_train_nothing_read_no_views(store, tmp_path):
    with pytest.raises(ValueError, match="nearest_mean trains nothing"):
        run(store, "nearest_mean", "1+1x1", options={"views": 2}, out=tmp_path)


@pytest.mark.parametrize(
    ("options", "command"),
    [({"views": 2}, "--views 2 --flip --random-crop"), ({"crops": 5}, "--five-crop")],
)
def test_a_store_without_the_views_says_how_to_add_them(dataset, built_once, options, command):
    spec = BuildSpec((NAME,), keep="pool", frames=2)
    plain = FeatureStore.open(built_once(dataset(("grow", "shrink"), 3), spec))
    with pytest.raises(SpecMismatch, match=command):
        run_spec.prepare_run(plain, "lucir", "1+1x1", options=options)


@pytest.mark.parametrize("options", [{"views": 0}, {"crops": 3}])
def test_numbers_of_views_and_crops_are_checked(store, options):
    with pytest.raises(ValueError, match="views="):
        run_spec.prepare_run(store, "lucir", "1+1x1", options=options)


def test_a_network_that_sees_the_whole_frame_has_no_corners():
    spec = BuildSpec((NAME,), five_crop=True)
    assert [each.view for each in spec.frame_sets(Picture())] == [0, -1, -2, -3, -4]
    with pytest.raises(ValueError, match="five_crop"):
        spec.frame_sets(Picture(resize_mode="squash"))
