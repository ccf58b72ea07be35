"""Class prompts: a label gives words, words give sentences, sentences give one text feature.

Shapes: C classes, R templates, D feature width.
"""

import re
from collections.abc import Sequence
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
CODE = "prompts/1"
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class TextTower(Protocol):
    """Encoder of class prompts, for networks that have one.

    Its parameters are float32 and are loaded on first use, so that a backbone that is built for
    pictures alone does not pay for it.
    """

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return float32 [len(prompts), D], L2-normalised, in the space of the last vector."""

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the features of given prompts, as JSON."""


def words(label: str) -> str:
    """Return the words of a label. A label with spaces is a phrase already, and is not changed.

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
    """Return the sentences [C][R] of each label.

    Raises:
        ValueError: There is no template, or one without {} for the label.
    """
    odd = [template for template in templates if "{}" not in template]
    if odd or not templates:
        raise ValueError(f"a prompt template has {{}} where the label goes; got {odd}")
    # Not str.format, which would read other braces of a template as instructions.
    return [[template.replace("{}", words(label)) for template in templates] for label in labels]


def class_features(
    text: TextTower, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """Return one unit vector a class: the normalised mean of its prompts' unit features.

    Prompt ensembling as in CLIP (Radford et al. 2021, section 3.1.4).

    Returns:
        float32 [C, D]; row c is the class `labels[c]`, and does not depend on the others.
    """
    sentences = prompts(labels, templates)
    flat = [sentence for of_label in sentences for sentence in of_label]
    features_ND = text.encode(flat)
    features_CRD = features_ND.reshape(len(labels), len(templates), features_ND.shape[-1])
    return torch.nn.functional.normalize(features_CRD.mean(dim=1), dim=-1)


def class_features_key(text: TextTower, templates: Sequence[str] = TEMPLATES) -> dict[str, Any]:
    """Return everything besides the labels that decides `class_features`, as JSON."""
    return {"code": CODE, "templates": list(templates), "text": text.identity()}
