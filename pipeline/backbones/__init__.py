"""Backbones: frozen networks as chains of named stages.

This file is the contract; every other module here is one family of networks, found by its file
name. A family module has two functions:

    recognises(network: str) -> bool
        Whether the name ("ViT-B-16", "resnet18") is one of its own. Cheap: no model is built.
    build(network: str, weights: str, precision: torch.dtype) -> Backbone
        The network with its weights, in eval mode, without gradients, as a chain.

Shapes: N frames, S = size in pixels, L tokens (class token first), C channels, H x W a grid.
A chain starts from uint8 pictures [N, S, S, 3] RGB; its first stage normalises them.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline._variants import available, variant
from pipeline.spec import Picture
from stores.identity import digest


@dataclass(frozen=True)
class Stage:
    """One named step of a chain: a module from one tensor to one tensor.

    Attributes:
        name: `stem`, `blocks.3.attn`, `layer2.1`, `proj`...
        module: Takes the previous stage's output. In eval mode, frozen, in the run's precision.
        code: What the module computes, by name and version; changed when the code's values change.
        options: JSON; whatever decides the output besides code and parameters (heads, eps,
            activation, mean and std...).
        form: Of the output: `tokens` [N, L, C] with `prefix` class tokens first, `map`
            [N, C, H, W], or `vector` [N, C].
        token_wise: Each output token depends on the input token in its place alone.
        prefix: Class (and register) tokens before the patch tokens; `tokens` only.
    """

    name: str
    module: nn.Module
    code: str
    options: Mapping[str, Any]
    form: str
    token_wise: bool = False
    prefix: int = 0


@dataclass(frozen=True)
class Backbone:
    """A chain of stages over pictures of one kind.

    Attributes:
        name: NAME:TAG as the store calls it ("ViT-B-16:openai"; a weight file by its stem).
        network: The bare network name.
        precision: Of parameters and activations.
        channels_last: Memory format that map-shaped activations run in.
        text: The text tower of a CLIP network, else None.
    """

    name: str
    network: str
    stages: tuple[Stage, ...]
    picture: Picture
    precision: torch.dtype
    channels_last: bool = False
    text: "TextTower | None" = None

    @property
    def stage_names(self) -> list[str]:
        return [stage.name for stage in self.stages]

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            ValueError: There is none; the message lists the stages.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"{self.name} has no stage {name!r}; it has {', '.join(self.stage_names)}")

    def keys(self, frames_key: str) -> dict[str, str]:
        """Fingerprint of every stage's output over the frames of `frames_key`.

        A chain: each key is made of the previous stage's, so a change in one stage renames it
        and all that follow, and none before it.
        """
        keys, key = {}, frames_key
        for stage in self.stages:
            key = digest({"input": key, **self.describe(stage)})
            keys[stage.name] = key
        return keys

    def describe(self, stage: Stage) -> dict[str, Any]:
        """Everything that decides the stage's output for a given input, as JSON."""
        return {
            "stage": stage.name,
            "code": stage.code,
            "options": dict(stage.options),
            "parameters": parameter_digest(stage.module),
            "precision": str(self.precision).removeprefix("torch."),
        }

    def run(self, x: Tensor, keep: Iterable[str], start: str | None = None) -> dict[str, Tensor]:
        """Run the chain as far as the last stage in `keep`.

        Args:
            x: uint8 pictures [N, S, S, 3], or the output of stage `start`.
            keep: Names of stages whose output is wanted.
            start: The stage after which to begin; None for the pictures.

        Returns:
            The outputs by stage name, in the run's precision. They share no memory with `x`.
        """
        wanted = set(keep)
        names = self.stage_names
        for name in wanted | ({start} if start else set()):
            self.stage(name)
        first = 0 if start is None else names.index(start) + 1
        early = [name for name in wanted if names.index(name) < first]
        if early:
            raise ValueError(f"{', '.join(early)} come before the start, {start}")
        outputs: dict[str, Tensor] = {}
        for stage in self.stages[first:]:
            if len(outputs) == len(wanted):
                break
            x = stage.module(x)
            if stage.name in wanted:
                outputs[stage.name] = x
        return outputs


@dataclass(frozen=True)
class TextTower:
    """Class prompts to features, for networks that have a text encoder.

    `encode(prompts)` gives float32 [len(prompts), D], L2-normalised; `identity` is JSON that
    decides its values (parameters, context length, tokenizer).
    """

    encode: Any
    identity: Mapping[str, Any]


def parameter_digest(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of parameters and buffers."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        total.update(flat.numpy())
    return total.hexdigest()


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
    families = {family: variant("pipeline.backbones", family) for family in
                available("pipeline.backbones")}
    for module in families.values():
        if module.recognises(network):
            if not weights:
                raise ValueError(
                    f"backbone {name!r} names no weights; give NAME:TAG (a published tag), "
                    f"NAME:/path/file.safetensors, or {network}:random-0 to try without"
                )
            built: Backbone = module.build(network, weights, precision)
            return built
    raise ValueError(
        f"no family knows the network {network!r}; tried {', '.join(families)}. Names are those of "
        "open_clip (ViT-B-16), torchvision (resnet18) and timm (vit_small_patch14_dinov2)"
    )
