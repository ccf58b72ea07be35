"""Class prompts: labels to words, words to sentences, sentences to one text feature a class.

Shapes: C classes, R templates, D feature width.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from varve.pipeline.backbones import TextTower

# "{}" is where the words of the label go. Changing the list changes the features' key.
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
CODE = "prompts/1"
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def words(label: str) -> str:
    """The words of a label. One that has spaces is a phrase already, and stays as it is.

    >>> words("ApplyEyeMakeup"), words("brush_hair"), words("TVShow")
    ('apply eye makeup', 'brush hair', 'tv show')
    >>> words("Pushing [something] from left to right")
    'Pushing [something] from left to right'
    """
    if any(character.isspace() for character in label.strip()):
        return label.strip()
    parts = [part for part in _CAMEL.sub("_", label.strip()).split("_") if part]
    return " ".join(parts).lower() or label


def prompts(labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[list[str]]:
    """The sentences [C][R] of each label.

    Raises:
        ValueError: No template, or one without the place for the label.
    """
    odd = [template for template in templates if "{}" not in template]
    if odd or not templates:
        raise ValueError(f"a prompt template says where the label goes with {{}}; got {odd}")
    # Not str.format, to which other braces of a template would be instructions.
    return [[template.replace("{}", words(label)) for template in templates] for label in labels]


def class_features(
    text: TextTower, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """One unit vector a class: the mean of its prompts' unit features, made unit again.

    Returns:
        float32 [C, D]; row c is the class `labels[c]`, and does not depend on the others.
    """
    sentences = prompts(labels, templates)
    flat = [sentence for of_label in sentences for sentence in of_label]
    features_ND = text.encode(flat)
    features_CRD = features_ND.reshape(len(labels), len(templates), features_ND.shape[-1])
    return torch.nn.functional.normalize(features_CRD.mean(dim=1), dim=-1)


def identity(
    text: TextTower, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> dict[str, Any]:
    """Everything that decides `class_features`, as JSON."""
    return {
        "code": CODE,
        "prompts": prompts(labels, templates),
        "text": text.identity(),
    }
