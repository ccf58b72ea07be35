"""Prompts: words of labels, sentences of templates, and features that are means of unit vectors."""

import pytest
import torch

from varve.pipeline import backbones
from varve.pipeline.backbones import _prompts, clip_vit
from varve.stores.digests import canonical

TWO = _prompts.TEMPLATES[:2]


class Codes:
    """A text tower whose features are written down beforehand."""

    def __init__(self, codes):
        self.codes = codes

    def encode(self, sentences):
        return torch.stack([self.codes[sentence] for sentence in sentences])

    def identity(self):
        return {"codes": len(self.codes)}


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("YoYo", "yo yo"),
        ("TVShow", "tv show"),
        ("brush_hair", "brush hair"),
        ("shoot_ball", "shoot ball"),
        ("abseiling", "abseiling"),
        ("air drumming", "air drumming"),
        ("Pushing [something] from left to right", "Pushing something from left to right"),
        ("Pretending to put [number of] [something]", "Pretending to put number of something"),
        ("adult+female+singing", "adult female singing"),
        ("C++", "c++"),
        ("1 + 1", "1 + 1"),
        ("HandstandPushups", "handstand pushups"),
        ("TV_news", "tv news"),
        ("passing_American_football_(not_in_game)", "passing american football (not in game)"),
        ("brush_hair slowly", "brush hair slowly"),
        ("walk \t fast", "walk fast"),
        ("Level3", "level 3"),
        ("Take12Jumps", "take 12 jumps"),
        ("3DPrinting", "3d printing"),
        ("17", "17"),
        ("[]", "[]"),
        ("Throwing {}", "Throwing {}"),
        (" A ", "a"),
        ("push-up", "push-up"),
        ("Ёлка_Зимой", "ёлка зимой"),
        ("___", "___"),
        ("", ""),
    ],
)
def test_labels_become_words(label, words):
    assert _prompts.words(label) == words


def test_braces_in_a_label_stay_data():
    sentences = _prompts.prompts(["{0} {x}", "a {} b"], ["do {}."])
    assert sentences == [["do {0} {x}."], ["do a {} b."]]


def test_templates_are_distinct_and_have_braces():
    assert len(set(_prompts.TEMPLATES)) == len(_prompts.TEMPLATES)
    (sentences,) = _prompts.prompts(["brush_hair"])
    assert all("brush hair" in sentence and "{}" not in sentence for sentence in sentences)


@pytest.mark.parametrize("templates", [[], ["a video"], ["a {}", "a video"]])
def test_templates_without_braces_are_refused(templates):
    with pytest.raises(ValueError, match=r"has {} where the label goes"):
        _prompts.prompts(["run"], templates)


def test_a_class_is_the_unit_mean_of_its_prompts():
    text = Codes({
        "a run": torch.tensor([1.0, 0.0]),
        "b run": torch.tensor([0.0, 1.0]),
        "a sit": torch.tensor([0.0, -1.0]),
        "b sit": torch.tensor([0.0, -1.0]),
    })  # fmt: skip
    features = _prompts.class_features(text, ["run", "sit"], ["a {}", "b {}"])
    torch.testing.assert_close(features, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))


LONG = "putting " + "one more of the small things " * 12


def test_labels_that_are_too_long_are_refused_by_name():
    text = backbones.load("ViT-S-32:random-0").text
    labels = ["brush_hair", f"{LONG} left", f"{LONG} right"]
    with pytest.raises(ValueError, match=r"of 2 of 3 classes .* 77 tokens .* left' \(8[0-9]\)"):
        _prompts.check_prompts(text, labels)
    with pytest.raises(ValueError, match=r"a prompt of 8[0-9] tokens"):
        _prompts.class_features(text, labels[1:], TWO)


def test_a_prompt_that_fits_to_the_last_token_is_read():
    text = backbones.load("ViT-S-32:random-0").text
    label = "run " * (text.max_tokens - len(text.tokens(["a "])[0]))
    assert _prompts.check_prompts(text, [label], ["a {}"]).shared == ()
    with pytest.raises(ValueError, match=r"\(78\)"):
        _prompts.check_prompts(text, [label + "run"], ["a {}"])


def test_labels_that_share_a_text_feature_are_found():
    text = backbones.load("ViT-S-32:random-0").text
    labels = ["brush_hair", "run", "BrushHair", "Running", "brush  hair"]
    checked = _prompts.check_prompts(text, labels)
    assert checked.shared == (("brush_hair", "BrushHair", "brush  hair"),)
    features = _prompts.class_features(text, labels, TWO)
    assert len(features.unique(dim=0)) == 3


def test_class_features_of_a_clip_network_are_unit_and_stand_alone(monkeypatch):
    monkeypatch.setattr(clip_vit, "PROMPTS_A_BATCH", 4)
    text = backbones.load("ViT-S-32:random-0").text
    features = _prompts.class_features(text, ["Archery", "brush_hair", "YoYo"], TWO)
    assert features.dtype == torch.float32
    assert features.shape == (3, 384)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert torch.equal(_prompts.class_features(text, ["brush_hair"], TWO), features[1:2])


def test_the_key_follows_templates_and_tower():
    text = Codes({})
    keys = [
        _prompts.class_features_key(text),
        _prompts.class_features_key(text, ["a {}"]),
        _prompts.class_features_key(Codes({"x": None})),
    ]
    assert len({canonical(key) for key in keys}) == len(keys)
