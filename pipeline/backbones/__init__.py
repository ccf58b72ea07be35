"""Backbones: frozen networks as chains of named stages.

This file is the contract. A family of networks is a file of this folder, or a class of a user's own
with `@register("backbones", NAME)` in a file for `--plugin`. It has two functions:

    networks() -> Sequence[str]
        Names of the networks of the family ("ViT-B-16", "resnet18"). Cheap: it imports no library
        of networks.
    build(network: str, weights: str, precision: torch.dtype) -> Backbone
        The network with its weights, in eval mode, without gradients, as a chain. `weights` is a
        published tag, the path of a weight file or `random-SEED`; `make_network` reads the last
        two.

A family may have `EXAMPLE`, the name of a small network for the contract suite; by default it is
the first of `networks()`. With `SLOW = True` the suite counts as slow for it, since each clip takes
seconds; with `NEEDS`, the name of a library, it is skipped where that is not installed.

A chain starts from uint8 pictures [N, S, S, 3] RGB, which its first stage normalises; that of an
audio backbone starts from float32 samples [N, samples]. docs/ADDING_A_BACKBONE.md lists each step.
"""

import difflib
from dataclasses import replace

import torch

from varve.pipeline import registry
from varve.pipeline.backbones._graft import seal as seal
from varve.pipeline.backbones._graft import snapshot as snapshot
from varve.pipeline.backbones._names import origin as origin
from varve.pipeline.backbones._prompts import ClassPrompts as ClassPrompts
from varve.pipeline.backbones._prompts import TextTower as TextTower
from varve.pipeline.backbones._prompts import check_prompts as check_prompts
from varve.pipeline.backbones._prompts import class_features as class_features
from varve.pipeline.backbones._prompts import class_features_key as class_features_key
from varve.pipeline.backbones._reductions import Reduction as Reduction
from varve.pipeline.backbones._reductions import canonical_reduction as canonical_reduction
from varve.pipeline.backbones._reductions import expand as expand
from varve.pipeline.backbones._reductions import reduce as reduce
from varve.pipeline.backbones._reductions import reduction_identity as reduction_identity
from varve.pipeline.backbones._reductions import reduction_of as reduction_of
from varve.pipeline.backbones._reductions import reductions_of as reductions_of
from varve.pipeline.backbones._reductions import resume_refusal as resume_refusal
from varve.pipeline.backbones._stage import CLASSIFIER as CLASSIFIER
from varve.pipeline.backbones._stage import Backbone as Backbone
from varve.pipeline.backbones._stage import Stage as Stage
from varve.pipeline.backbones._suffix import Suffix as Suffix
from varve.pipeline.backbones._vit import Normalise as Normalise
from varve.pipeline.backbones._weights import make_network as make_network
from varve.pipeline.backbones._weights import parameter_digest as parameter_digest
from varve.pipeline.backbones._weights import tensors_of as tensors_of
from varve.pipeline.precision import precision_warning as precision_warning

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def load(name: str, precision: torch.dtype = torch.float32) -> Backbone:
    """Build the backbone that a NAME:TAG names.

    Args:
        name: `ViT-B-16:openai`, `resnet18:IMAGENET1K_V1`, `NAME:/path/file.safetensors`,
            `NAME:random-SEED`.
        precision: torch.float32, bfloat16 or float16.

    Raises:
        ValueError: No family knows the network, or the weights do not fit it.
        OSError: The weights cannot be had (no file, or no hub to ask).
    """
    network, _, weights = name.partition(":")
    families = {f: registry.variant("backbones", f) for f in registry.available("backbones")}
    known = {n: family for family, module in families.items() for n in module.networks()}
    if network not in known:
        near = difflib.get_close_matches(network, known, n=4)
        raise ValueError(
            f"no family knows the network {network!r}"
            + (f"; did you mean {' or '.join(near)}?" if near else ".")
            + f" Families are {', '.join(families)}; names are those of open_clip (ViT-B-16), "
            "torchvision (resnet18) and timm (vit_small_patch14_dinov2), or those of a file that "
            "--plugin loads"
        )
    if not weights:
        raise ValueError(
            f"backbone {name!r} names no weights; give {network}:TAG (a published tag), "
            f"{network}:/path/file.safetensors, or {network}:random-0 to try without"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"no precision {precision}; choose from float32, bfloat16, float16")
    family = known[network]
    built: Backbone = families[family].build(network, weights, precision)
    if not (source := registry.source_digest("backbones", family)):
        return built
    # A user's file has no versions: an edit of its text gives other keys.
    stages = (replace(s, options={**s.options, "source": source}) for s in built.stages)
    return replace(built, stages=tuple(stages))
