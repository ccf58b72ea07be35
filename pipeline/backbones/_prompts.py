"""Class prompts: a label gives words, words give sentences, sentences give one text feature.

A prompt is never cut to the length of a text tower: labels whose prompts are too long are refused.
Labels with the same tokens in every prompt have one text feature; `check_prompts` finds them.

Shapes: C classes, R templates, D feature width.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# "{}" stands for the words of the label. Changing the list changes the features' key.
TEMPLATES = (
    "a video of {}.",
    "a video of a person doing {}.",
    "a person is doing {}.",
    "a short clip showing {}.",
    "a photo of someone during {}.",
    "a frame from a video about {}.",
    "an example of the action {}.",
    "human action: {}.",
)
CODE = "prompts/2"
# Between a word and the next capital, after an acronym, and between a word and its number.
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z0-9])(?=[A-Z][a-z])")
# An underscore, and a plus between two words; a bracket around a placeholder.
_JOINTS = re.compile(r"_|(?<=[^\W_])\+(?=[^\W_])")
_BRACKETS = re.compile(r"\[([^][]*)\]")
MOST_LABELS = 4  # in a message


class TextTower(Protocol):
    """Encoder of class prompts, for networks that have one.

    Its parameters are float32 and are loaded on first use, so that a backbone that is built for
    pictures alone does not pay for it.
    """

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return float32 [len(prompts), D], L2-normalised, in the space of the last vector."""

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the features of given prompts, as JSON."""

    def tokens(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return all tokens of each prompt, also where they are too many to be encoded."""

    @property
    def max_tokens(self) -> int:
        """The largest number of tokens that a prompt may have."""


@dataclass(frozen=True)
class ClassPrompts:
    """Words that stand for the classes in their prompts.

    Attributes:
        words: Words of each label.
        shared: Groups of labels that have the same prompts, and so one text feature.
    """

    words: Mapping[str, str]
    shared: tuple[tuple[str, ...], ...] = ()


def words(label: str) -> str:
    """Return the words of a label, one blank apart.

    Underscores, and pluses between words, become blanks, and square brackets go. A label without
    blanks is also cut at its capitals and numbers, and has no capitals then.

    >>> words("ApplyEyeMakeup"), words("brush_hair"), words("TV_news"), words("Level3")
    ('apply eye makeup', 'brush hair', 'tv news', 'level 3')
    >>> words("adult+female+singing"), words("Pushing [something] from left to right")
    ('adult female singing', 'Pushing something from left to right')
    """
    is_phrase = any(character.isspace() for character in label.strip())
    plain = _JOINTS.sub(" ", _BRACKETS.sub(r"\1", label))
    if not is_phrase:
        plain = _CAMEL.sub(" ", plain).lower()
    return " ".join(plain.split()) or label


def prompts(labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[list[str]]:
    """Return the sentences [C][R] of each label.

    Raises:
        ValueError: There is no template, or one without {} for the label.
    """
    odd = [template for template in templates if "{}" not in template]
    if odd or not templates:
        raise ValueError(f"a prompt template has {{}} where the label goes; got {odd}")
    # Not str.format, which would read other braces of a template as instructions.
    return [[template.replace("{}", words(label)) for template in templates] for label in labels]


def check_prompts(
    text: TextTower, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> ClassPrompts:
    """Return the words of labels, and which labels have the same prompts. Encodes nothing.

    Raises:
        ValueError: A prompt is longer than the text tower can read; the message has the labels.
    """
    same: dict[tuple[tuple[int, ...], ...], list[str]] = defaultdict(list)
    too_long: dict[str, int] = {}
    for label, sentences in zip(labels, prompts(labels, templates), strict=True):
        tokens = text.tokens(sentences)
        same[tuple(tokens)].append(label)
        if (longest := max(map(len, tokens))) > text.max_tokens:
            too_long[label] = longest
    if too_long:
        some = [f"{label!r} ({count})" for label, count in [*too_long.items()][:MOST_LABELS]]
        more = len(too_long) - len(some)
        raise ValueError(
            f"the prompts of {len(too_long)} of {len(labels)} classes have more than the "
            f"{text.max_tokens} tokens that the text tower reads: {', '.join(some)}"
            + (f" and {more} more" if more else "")
            + ". Give these classes shorter labels, or leave the text features out (--no-text)"
        )
    shared = tuple(tuple(group) for group in same.values() if len(group) > 1)
    return ClassPrompts({label: words(label) for label in labels}, shared)


def class_features(
    text: TextTower, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """Return one unit vector a class: the normalised mean of its prompts' unit features.

    Prompt ensembling as in CLIP (Radford et al. 2021, section 3.1.4).

    Returns:
        float32 [C, D]; row c is the class `labels[c]`, and does not depend on the others.

    Raises:
        ValueError: A prompt is longer than the text tower can read.
    """
    sentences = prompts(labels, templates)
    flat = [sentence for of_label in sentences for sentence in of_label]
    features_ND = text.encode(flat)
    features_CRD = features_ND.reshape(len(labels), len(templates), features_ND.shape[-1])
    return torch.nn.functional.normalize(features_CRD.mean(dim=1), dim=-1)


def class_features_key(text: TextTower, templates: Sequence[str] = TEMPLATES) -> dict[str, Any]:
    """Return everything besides the labels that decides `class_features`, as JSON."""
    return {"code": CODE, "templates": list(templates), "text": text.identity()}
