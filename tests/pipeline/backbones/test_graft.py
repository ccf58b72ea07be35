"""Grafts in a chain: what fits, what keys follow, and the end of a chain as a module to train."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from varve.heads.grafts.adapter import Adapter
from varve.heads.grafts.temporal_shift import TemporalShift
from varve.pipeline import backbones

FRAMES_KEY = "0" * 64
VIT, RESNET = "ViT-S-32:random-0", "resnet18:random-0"


class Scaled(nn.Module):
    """Module as a user writes it in a notebook, without any declaration."""

    def __init__(self, inner, factor=1.0):
        super().__init__()
        self.inner = inner
        self.factor = factor
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.inner(x) * (self.factor * self.gain).to(x.dtype)


def adapted(backbone, *blocks, **options):
    width = backbone.shapes["stem"][-1]
    for i in blocks:
        name = f"blocks.{i}.mlp"
        backbone = backbone.graft(
            name, Adapter(backbone.stage(name).module, width=width, **options)
        )
    return backbone


def pictures(backbone, count=2, seed=0):
    size = backbone.picture.size
    numbers = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)
    return torch.from_numpy(numbers)


def changed_from(before, after):
    """Stages with other keys."""
    old, new = before.keys(FRAMES_KEY), after.keys(FRAMES_KEY)
    return [name for name in before.stage_names if old[name] != new[name]]


def test_a_graft_changes_the_keys_from_its_stage_on_and_not_the_first_backbone(vit):
    keys = vit.keys(FRAMES_KEY)
    new = adapted(vit, 9, 11)
    assert changed_from(vit, new) == vit.stage_names[vit.stage_names.index("blocks.9.mlp") :]
    assert new.changed == ["blocks.9.mlp", "blocks.11.mlp"]
    assert vit.keys(FRAMES_KEY) == keys
    assert vit.changed == []
    assert new.stage("blocks.10.mlp") is vit.stage("blocks.10.mlp")


def test_an_unknown_stage_is_refused_with_a_list_of_the_stages(vit):
    with pytest.raises(ValueError, match=r"no stage 'block.3'; it has stem, blocks.0.attn, .*proj"):
        vit.graft("block.3", nn.Identity())
    with pytest.raises(ValueError, match="no stage 'layer9'"):
        vit.unfreeze("layer9")
    with pytest.raises(ValueError, match="no stage 'layer9'"):
        vit.suffix("layer9")


class Narrow(nn.Module):
    def forward(self, x):
        return x[..., :-1]


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean(dim=1)


class Doubled(nn.Module):
    def forward(self, x):
        return x.double()


class Text(nn.Module):
    def forward(self, x):
        return "text"


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Narrow(),
            r"gives \[1, 50, 383\] where the stage gives \[1, 50, 384\], and blocks.10.attn",
        ),
        (Pooled(), r"gives \[1, 384\] for 1 frames; the stage gives tokens \[1, 50, 384\]"),
        (Doubled(), r"gives torch.float64; .* runs in torch.float32"),
        (Text(), r"gives str for 1 frames"),
        (nn.Linear(5, 5), r"does not take the stage's input, float32 \[1, 50, 384\]"),
    ],
)
def test_a_graft_that_does_not_fit_is_refused_before_anything_runs(vit, module, message):
    with pytest.raises(ValueError, match=message):
        vit.graft("blocks.9.mlp", module)


def test_what_is_no_module_is_refused(vit):
    with pytest.raises(TypeError, match="a graft is a torch module, not a function"):
        vit.graft("blocks.9.mlp", lambda x: x)


def test_the_last_stage_may_be_given_another_width(vit):
    new = vit.graft("proj", nn.Sequential(Pooled(), nn.Linear(384, 7)))
    assert new.shapes["proj"] == (7,)
    assert new.run(pictures(vit), ["proj"])["proj"].shape == (2, 7)
    assert vit.shapes["proj"] == (384,)


def test_every_way_of_changing_a_graft_changes_its_keys(vit):
    module = Scaled(vit.stage("blocks.11.mlp").module)
    new = vit.graft("blocks.11.mlp", module)
    seen = [new.keys(FRAMES_KEY)["proj"]]

    def look():
        seen.append(new.keys(FRAMES_KEY)["proj"])

    look()
    assert seen[0] == seen[1]
    module.factor = 2.0
    look()
    module.gain.data.mul_(1.5)  # past autograd's eyes
    look()
    with torch.no_grad():
        module.gain.add_(1)
    look()
    module.register_buffer("late", torch.zeros(1), persistent=False)
    look()
    module.late.add_(1)
    look()
    module.forward = lambda x: module.inner(x) + 1
    look()
    assert len(set(seen)) == len(seen) - 1


def test_training_a_frozen_stage_in_place_changes_its_keys():
    backbone = backbones.load(RESNET)
    before = backbone.keys(FRAMES_KEY)
    weight = backbone.stage("layer3.0").module.conv1.weight
    weight.requires_grad_(True)
    torch.optim.SGD([weight], lr=0.1).zero_grad()
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    weight.requires_grad_(False)
    after = backbone.keys(FRAMES_KEY)
    changed = [name for name in before if before[name] != after[name]]
    assert changed[0] == "layer3.0"
    with torch.no_grad():
        weight.mul_(0.5)
    assert backbone.keys(FRAMES_KEY)["layer3.0"] != after["layer3.0"]


def test_an_unfrozen_stage_keeps_its_key_until_it_is_trained(resnet):
    new = resnet.unfreeze("layer4.0", "layer4.1")
    assert changed_from(resnet, new) == []
    assert new.changed == []
    module = new.stage("layer4.1").module
    assert module.conv1.weight.requires_grad
    with torch.no_grad():
        module.conv1.weight.mul_(1.01)
    assert changed_from(resnet, new) == ["layer4.1", "pool", "fc"]
    assert new.changed == ["layer4.1"]
    assert not resnet.stage("layer4.1").module.conv1.weight.requires_grad


def test_a_graft_upon_a_graft_and_upon_an_unfrozen_stage(resnet):
    thawed = resnet.unfreeze("layer4.0")
    shifted = thawed.graft(
        "layer4.0", TemporalShift(thawed.stage("layer4.0").module, frames=2, fold=8)
    )
    again = shifted.graft("layer4.0", Scaled(shifted.stage("layer4.0").module))
    assert len({network.keys(FRAMES_KEY)["fc"] for network in (thawed, shifted, again)}) == 3
    assert again.changed == ["layer4.0"]


def test_a_snapshot_keeps_the_keys_and_later_training_does_not_change_it(vit):
    live = adapted(vit, 11)
    live.stage("blocks.11.mlp").module.train()
    taken = backbones.snapshot(live)
    before = taken.keys(FRAMES_KEY)
    assert before == live.keys(FRAMES_KEY)
    with torch.no_grad():
        live.stage("blocks.11.mlp").module.up.fill_(1)
    assert taken.keys(FRAMES_KEY) == before != live.keys(FRAMES_KEY)
    assert not taken.stage("blocks.11.mlp").module.training
    assert live.stage("blocks.11.mlp").module.training
    assert taken.stage("blocks.3.mlp").module is vit.stage("blocks.3.mlp").module
    assert taken.changed == ["blocks.11.mlp"]


@pytest.mark.parametrize("network", [VIT, RESNET])
def test_a_suffix_from_every_stage_gives_what_the_whole_chain_gives(network):
    backbone = backbones.load(network)
    x = pictures(backbone)
    with torch.inference_mode():
        outputs = backbone.run(x, backbone.stage_names)
    last = backbone.stage_names[-1]
    for name in backbone.stage_names[:-1]:
        suffix = backbone.suffix(name)
        output = suffix(outputs[name].clone())
        assert torch.equal(output, outputs[last]), name
        clips = suffix(outputs[name].clone()[None])
        assert torch.equal(clips, outputs[last][None]), name


def test_a_suffix_gives_the_requested_stages_by_name(resnet):
    suffix = resnet.suffix("layer3.1", keep=["layer4.0", "pool"])
    outputs = suffix(torch.rand(2, 3, *resnet.shapes["layer3.1"]))
    assert {n: tuple(y.shape) for n, y in outputs.items()} == {
        "layer4.0": (2, 3, 512, 7, 7),
        "pool": (2, 3, 512),
    }


def test_the_class_token_alone_feeds_what_follows_the_last_attention(vit):
    x = pictures(vit)
    with torch.inference_mode():
        outputs = vit.run(x, vit.stage_names)
    suffix = adapted(vit, 11).suffix("blocks.11.attn:cls")
    cls = outputs["blocks.11.attn"][:, 0].clone()
    torch.testing.assert_close(suffix(cls), outputs["proj"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(suffix(cls[None]), outputs["proj"][None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "after", "message"),
    [
        (VIT, "blocks.10.mlp:cls", "blocks.11.attn needs all that blocks.10.mlp gives"),
        (VIT, "blocks.11.attn:mean", "an aggregate, and has no inverse: keep blocks.11"),
        (VIT, "blocks.11.attn:map", "patch tokens alone, and proj is wanted whole"),
        (RESNET, "layer3.1:pool", "an aggregate, and has no inverse: keep layer3.1"),
        (RESNET, "layer3.1:cls", "the stage gives a map, whose reductions are"),
        (RESNET, "fc", "fc comes no later than fc"),
    ],
)
def test_a_reduction_that_cannot_feed_what_follows_is_refused(network, after, message):
    with pytest.raises(ValueError, match=message):
        backbones.load(network).suffix(after)


def test_a_part_of_the_tokens_is_refused_where_tokens_mix(vit):
    with pytest.raises(ValueError, match=r"tokens \[N, 50, 384\], not from float32 \[2, 1, 384\]; "
                                         "blocks.11.attn needs all of it"):  # fmt: skip
        vit.run(torch.zeros(2, 1, 384), ["proj"], start="blocks.10.mlp")
    with pytest.raises(ValueError, match=r"resumes from map \[N, 256, 14, 14\]"):
        backbones.load(RESNET).run(torch.zeros(2, 256), ["pool"], start="layer3.1")
    with pytest.raises(ValueError, match=r"the suffix starts from blocks.11.attn:cls, \[clips, T"):
        vit.suffix("blocks.11.attn:cls")(torch.zeros(2, 50, 384, 1))


def test_training_mode_reaches_what_trains_and_no_frozen_batch_norm(resnet):
    new = resnet.unfreeze("layer4.1")
    suffix = new.suffix("layer3.1").train()
    frozen, trained = new.stage("layer4.0").module, new.stage("layer4.1").module
    assert (frozen.bn1.training, trained.bn1.training) == (False, True)
    before = copy.deepcopy(frozen.bn1.running_mean)
    suffix(torch.rand(4, *resnet.shapes["layer3.1"]))
    assert torch.equal(frozen.bn1.running_mean, before)
    assert not suffix.eval().training
    assert not trained.bn1.training


def test_clips_of_another_number_of_frames_are_refused(resnet):
    shifted = resnet.graft(
        "layer4.0", TemporalShift(resnet.stage("layer4.0").module, frames=4, fold=8)
    )
    with pytest.raises(ValueError, match=r"layer4.0 mixes .* clips of 4 frames, and 6 frames"):
        shifted.run(torch.zeros(6, *resnet.shapes["layer3.1"]), ["pool"], start="layer3.1")


def test_the_suffix_trains_the_module_that_was_grafted(vit):
    new = adapted(vit, 11, seed=3)
    suffix = new.suffix("blocks.11.attn:cls")
    trained = [p for p in suffix.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * 384 * 64
    before = new.keys(FRAMES_KEY)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    suffix(torch.rand(2, 4, 384)).square().mean().backward()
    optimizer.step()
    after = new.keys(FRAMES_KEY)
    assert [n for n in before if before[n] != after[n]] == ["blocks.11.mlp", "proj"]


class LoRA(nn.Module):
    def __init__(self, base, alpha):
        super().__init__()
        self.base, self.alpha = base, alpha
        self.a = nn.Parameter(torch.full((2, base.in_features), 0.01))
        self.b = nn.Parameter(torch.full((base.out_features, 2), 0.01))

    def forward(self, x):
        return self.base(x) + self.alpha * (x @ self.a.T @ self.b.T)


def test_what_is_put_into_an_unfrozen_or_a_frozen_stage_is_part_of_the_key():
    def lora(backbone, alpha):
        module = backbone.stage("blocks.10.mlp").module
        module.mlp.c_fc = LoRA(module.mlp.c_fc, alpha)
        return backbone

    def graft(backbone):
        return backbone.graft("blocks.10.mlp", Scaled(backbone.stage("blocks.10.mlp").module))

    def activation(backbone, kind):
        backbone.stage("blocks.10.mlp").module.mlp.gelu = kind
        return backbone

    def keys(backbone):
        return backbone.keys(FRAMES_KEY)["proj"]

    def load():
        return backbones.load(VIT)

    plain = keys(load())
    all_keys = [
        plain,
        *(keys(lora(load().unfreeze("blocks.10.mlp"), alpha)) for alpha in (1.0, 4.0)),
        *(keys(graft(lora(load(), alpha))) for alpha in (1.0, 4.0)),
        keys(activation(load().unfreeze("blocks.10.mlp"), nn.ReLU())),
        keys(activation(load(), nn.Tanh())),
        keys(lora(load(), 1.0).unfreeze("blocks.10.mlp").unfreeze("blocks.10.mlp")),
    ]
    assert all_keys[1] == all_keys[-1]
    assert len(set(all_keys)) == len(all_keys) - 1
    assert keys(load().unfreeze("blocks.10.mlp").unfreeze("blocks.10.mlp")) == plain
    assert keys(copy.deepcopy(load())) == plain


@pytest.mark.parametrize("through", [lambda b: b, lambda b: b.unfreeze("blocks.10.mlp")])
def test_a_hook_on_a_stage_is_refused(through):
    backbone = backbones.load(VIT)
    backbone.stage("blocks.10.mlp").module.register_forward_hook(lambda m, i, o: o * 2)
    with pytest.raises(ValueError, match="forward hooks"):
        through(backbone).keys(FRAMES_KEY)


def test_a_write_past_autograd_changes_a_frozen_stages_key():
    backbone = backbones.load(RESNET)
    before = backbone.keys(FRAMES_KEY)
    backbone.stage("layer4.1").module.conv1.weight.data.mul_(1.1)
    after = backbone.keys(FRAMES_KEY)
    assert [n for n in before if before[n] != after[n]] == ["layer4.1", "pool", "fc"]
    backbone.stage("layer4.0").module.conv1.weight.detach().numpy()[:] *= 2
    assert backbone.keys(FRAMES_KEY)["layer4.0"] != after["layer4.0"]


def test_unfreezing_a_graft_keeps_its_key(vit):
    grafted = adapted(vit, 11)
    thawed = grafted.unfreeze("blocks.11.mlp")
    assert thawed.keys(FRAMES_KEY) == grafted.keys(FRAMES_KEY)
    assert all(p.requires_grad for p in thawed.stage("blocks.11.mlp").module.parameters())
    assert not any(p.requires_grad for p in vit.stage("blocks.11.mlp").module.parameters())


class InPlace(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        out = self.inner(x)
        x.zero_()
        return out


def test_a_graft_that_works_in_place_spoils_no_kept_output(vit):
    x = pictures(vit)
    spoiling = vit.graft("blocks.10.mlp", InPlace(vit.stage("blocks.10.mlp").module))
    with torch.inference_mode():
        expected = vit.run(x, ["blocks.10.attn", "proj"])
        outputs = spoiling.run(x, ["blocks.10.attn", "proj"])
    for name, output in expected.items():
        assert torch.equal(outputs[name], output), name


class Context(nn.Module):
    token_wise = True

    def __init__(self, inner, share):
        super().__init__()
        self.inner = inner
        self.share = nn.Parameter(torch.tensor(share))

    def forward(self, x):
        return self.inner(x) + self.share * x.mean(dim=1, keepdim=True)


def test_a_module_that_declares_token_wise_wrongly_is_refused(vit):
    inner = vit.stage("blocks.11.mlp").module
    with pytest.raises(ValueError, match="token_wise = True, but its output for the class token"):
        vit.graft("blocks.11.mlp", Context(inner, 0.5))
    late = vit.graft("blocks.11.mlp", Context(inner, 0.0))
    with torch.no_grad():
        late.stage("blocks.11.mlp").module.share.fill_(0.5)
    with pytest.raises(ValueError, match="has token_wise"):
        backbones.snapshot(late)


def test_a_wrapper_in_training_does_not_change_a_frozen_batch_norm(resnet):
    inner = resnet.stage("layer4.0").module
    before = {name: t.clone() for name, t in inner.state_dict().items()}
    new = resnet.graft("layer4.0", nn.Sequential(Scaled(inner), nn.Dropout(0.5)))
    suffix = new.suffix("layer3.1").train()
    dropout, scaled = new.stage("layer4.0").module[1], new.stage("layer4.0").module[0]
    assert (dropout.training, scaled.training, inner.bn1.training) == (True, True, False)
    suffix(torch.rand(4, *resnet.shapes["layer3.1"]))
    assert all(torch.equal(t, before[name]) for name, t in inner.state_dict().items())


def test_clips_of_another_length_than_that_of_a_temporal_graft_are_refused(resnet):
    inner = resnet.stage("layer4.0").module
    suffix = resnet.graft("layer4.0", TemporalShift(inner, frames=4)).suffix("layer3.1")
    with pytest.raises(ValueError, match="mixes the frames of clips of 4 frames, and these have 8"):
        suffix(torch.rand(1, 8, *resnet.shapes["layer3.1"]))
    assert suffix(torch.rand(2, 4, *resnet.shapes["layer3.1"])).shape == (2, 4, 1000)


def test_of_tokens_a_suffix_returns_the_part_that_it_received(vit):
    whole = vit.suffix("blocks.11.attn", keep=["blocks.11.mlp"])(torch.ones(2, 3, 50, 384))
    assert whole["blocks.11.mlp"].shape == (2, 3, 50, 384)
    token = vit.suffix("blocks.11.attn:cls", keep=["blocks.11.mlp", "proj"])(torch.ones(2, 3, 384))
    assert token["blocks.11.mlp"].shape == (2, 3, 384)
    patches = vit.suffix("blocks.11.attn:map", keep=["blocks.11.mlp"])(torch.ones(2, 3, 384, 7, 7))
    assert patches["blocks.11.mlp"].shape == (2, 3, 384, 7, 7)


class Noisy(nn.Module):
    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how
        if how == "a list":
            self.drops = [nn.Dropout(0.5)]
        elif how == "a stubborn dropout":
            self.drop = nn.Dropout(0.5)
            self.drop.train = lambda mode=True: self.drop

    def forward(self, x):
        y = self.inner(x)
        if self.how == "a draw":
            return y + torch.randn_like(y)
        return (self.drops[0] if self.how == "a list" else self.drop)(y)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a list", "drops of Noisy is a list of modules, which torch does not see"),
        ("a draw", "gives other numbers each time, in eval mode too"),
    ],
)
def test_a_graft_without_one_value_is_refused_and_draws_nothing_of_the_callers(vit, how, message):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=message):
        vit.graft("blocks.10.mlp", Noisy(vit.stage("blocks.10.mlp").module, how))
    assert torch.equal(torch.random.get_rng_state(), state)


class Remembering(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.ones(1))
        self._last = None

    def forward(self, x):
        self._last = self.inner(x) * self.gain
        return self._last


def test_a_graft_that_keeps_a_tensor_of_its_last_call_is_refused(vit):
    new = vit.graft("blocks.11.mlp", Remembering(vit.stage("blocks.11.mlp").module))
    new.suffix("blocks.11.attn")(torch.rand(1, 50, 384))
    with pytest.raises(ValueError, match=r"blocks.11.mlp: .*Keep it detached|cannot be copied"):
        backbones.snapshot(new)


def test_grafting_moves_no_statistics_of_the_module(resnet):
    norm = nn.BatchNorm2d(512)
    module = nn.Sequential(resnet.stage("layer4.0").module, norm).train()
    resnet.graft("layer4.0", module)
    assert norm.training
    assert int(norm.num_batches_tracked) == 0
