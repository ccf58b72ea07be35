"""Video transformers of the library transformers: weights, and steps on the tokens of clips.

A tubelet of some frames and a square of pixels is a token. The tokens of a clip are those of its U
time steps, each a square grid. Between stages each time step is a row, so that a stage is kept, or
averaged, for each time step; attention sees all tokens of the clip.

Shapes: B clips, T frames, U time steps, N = B * U rows, P patches of a time step, C channels.
"""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from varve.pipeline.backbones import _vit, _weights
from varve.pipeline.backbones._stage import CLASSIFIER, Stage
from varve.pipeline.backbones.video._over_time import compute

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHTS, CONFIG = ("model.safetensors", "pytorch_model.bin"), "config.json"
NEEDS = "transformers"
_MAKING = threading.Lock()


def library() -> ModuleType:
    """Import the library.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "VideoMAE and V-JEPA 2 need the library transformers: "
            "pip install 'varve[transformers]'",
            name=NEEDS,
        ) from error
    module: ModuleType = transformers
    return module


def construct(
    make: Callable[[], nn.Module], weights: str, state: Mapping[str, Tensor] | None, name: str
) -> Any:
    """Make a network of the library and give it its parameters; see `_weights.construct`.

    The library adds a method to torch's class of modules when it first makes a network. It is
    removed: the keys of modules must not depend on what was loaded before.
    """

    def make_alone() -> nn.Module:
        with _MAKING:
            before = {*vars(nn.Module)}
            try:
                return make()
            finally:
                for added in {*vars(nn.Module)} - before:
                    delattr(nn.Module, added)

    return _weights.construct(make_alone, weights, state, name)


def published(network: str, weights: str) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """Return the parameters that WEIGHTS names, and the configuration beside them.

    Args:
        network: Name of the network, for messages.
        weights: `random-SEED`; a weight file; a folder with `model.safetensors`; or `OWNER/NAME`, a
            repository of the Hugging Face hub. A `config.json` beside the parameters is read.

    Returns:
        The parameters, None for `random-SEED`; and the configuration, {} where there is no file.

    Raises:
        ValueError: It is none of these, or a file that cannot be read.
        OSError: There is no such file, or no hub to ask.
    """
    if _weights.seed_of(weights) is not None:
        return None, {}
    folder = Path(weights).expanduser()
    if weights.lower().endswith((".safetensors", ".pt", ".pth")):
        file = folder
    elif folder.is_dir() and "/" in weights:
        file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder)
        if file == folder:
            raise FileNotFoundError(f"{folder} has no {' or '.join(WEIGHTS)}")
    elif weights.count("/") == 1 and not weights.startswith((".", "/", "~")):
        name = f"{network}:{weights}"
        file = _weights.hub_file(weights, WEIGHTS, name)
        _weights.hub_file(weights, (CONFIG,), name)
    else:
        raise _weights.no_tag(network, weights, ("OWNER/NAME of a repository of the hub",))
    config = file.parent / CONFIG
    if not config.is_file():
        return _weights.read(file), {}
    try:
        content = json.loads(config.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is not JSON: {error}") from error
    return _weights.read(file), dict(content)


def merged(
    network: str, options: Mapping[str, Any], config: Mapping[str, Any], left_out: str = ""
) -> dict[str, Any]:
    """Return the options of a network, with those of a configuration beside its parameters.

    Args:
        network: Name of the network, for messages.
        options: Options of the network.
        config: Content of `config.json`, of which options of these names are taken.
        left_out: An option that the network's name decides.

    Raises:
        ValueError: The configuration is of a network of another width or depth.
    """
    for name in ("hidden_size", "num_hidden_layers"):
        if name in config and config[name] != options[name]:
            raise ValueError(
                f"{network} has {name}={options[name]}, and {CONFIG} beside the weights has "
                f"{config[name]}: name the network that it is of"
            )
    return {k: config.get(k, v) if k != left_out else v for k, v in options.items()}


def without_others(
    state: Mapping[str, Tensor], prefix: str, others: tuple[str, ...]
) -> dict[str, Tensor]:
    """Return parameters without a prefix, and without the named parts of other networks."""
    names = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return {k: x for k, x in names.items() if k.partition(".")[0] not in others}


def fused(query: nn.Linear, key: nn.Linear, value: nn.Linear) -> nn.Linear:
    """Return one linear layer that gives queries, keys and values, side by side."""
    parts = (query, key, value)
    weights = [part.weight.detach() for part in parts]
    width, biased = query.in_features, any(part.bias is not None for part in parts)
    layer = nn.Linear(width, 3 * width, biased, device="meta")
    layer.weight = nn.Parameter(torch.cat(weights))
    if biased:
        zeros = query.weight.detach().new_zeros(query.out_features)
        biases = [zeros if p.bias is None else p.bias.detach() for p in parts]
        layer.bias = nn.Parameter(torch.cat(biases))
    return layer


class Stem(nn.Module):
    """Compute tokens [B * U, P, C] of pictures [B * T, S, S, 3].

    Args:
        normalise: Scales the pictures.
        tubelets: Convolution of clips [B, 3, T, S, S] whose kernel is its stride.
        positions_UPC: Position embedding; None where positions enter the attention.
        frames: T.
    """

    mixes_time = True
    positions: Tensor | None

    def __init__(
        self,
        normalise: _vit.Normalise,
        tubelets: nn.Module,
        positions_UPC: Tensor | None,
        frames: int,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.tubelets = tubelets
        self.register_buffer("positions", positions_UPC)
        self.frames = frames

    def forward(self, x_NSS3: Tensor) -> Tensor:
        x_N3SS = self.normalise(x_NSS3)
        x_BT3SS = x_N3SS.view(len(x_N3SS) // self.frames, self.frames, *x_N3SS.shape[1:])
        map_BCUHW = compute(self.tubelets, x_BT3SS.transpose(1, 2).contiguous())
        x_BUPC = map_BCUHW.flatten(3).permute(0, 2, 3, 1).contiguous()
        if self.positions is not None:
            x_BUPC = x_BUPC + self.positions
        return x_BUPC.flatten(0, 1)


class OverClips(nn.Module):
    """Run a module of the tokens of clips, [B, U * P, C], on time steps [B * U, P, C].

    Args:
        inner: Module that keeps the shape.
        frames: U.
    """

    mixes_time = True

    def __init__(self, inner: nn.Module, frames: int) -> None:
        super().__init__()
        self.inner = inner
        self.frames = frames

    def forward(self, x_NPC: Tensor) -> Tensor:
        N, P, C = x_NPC.shape
        x_BLC = x_NPC.reshape(N // self.frames, self.frames * P, C)
        out: Tensor = self.inner(x_BLC)
        return out.reshape(N, P, C)


class Mlp(_vit.MlpStep):
    """Compute x + mlp(norm(x)) of each token alone, in a network that mixes time steps."""

    mixes_time = True


class Pool(nn.Module):
    """Average the tokens of a clip: [B * U, P, C] to [B, C], then normalise.

    Args:
        norm: Norm of the mean.
        frames: U.
    """

    mixes_time = True

    def __init__(self, norm: nn.Module, frames: int) -> None:
        super().__init__()
        self.norm = norm
        self.frames = frames

    def forward(self, x_NPC: Tensor) -> Tensor:
        N, P, C = x_NPC.shape
        mean_BC = x_NPC.reshape(N // self.frames, self.frames * P, C).mean(dim=1)
        out: Tensor = self.norm(mean_BC)
        return out


def chain_of(
    stem: Stem,
    blocks: list[tuple[nn.Module, Mlp]],
    steps: int,
    attention: tuple[str, Mapping[str, Any]],
    ends: Mapping[str, nn.Module | None],
) -> tuple[Stage, ...]:
    """Return a transformer as a chain: `stem, blocks.i.attn, blocks.i.mlp, norm, pool, fc`.

    Args:
        stem: Makes the tokens.
        blocks: Attention [B, L, C] and MLP of each block.
        steps: U.
        attention: Code of the attention, and its options besides those of its norm.
        ends: Modules by name: `norm` of all tokens, `pool_norm` of their mean, and `fc`, the
            classifier; None for those that the weights lack.
    """
    tubelets = stem.tubelets
    options: dict[str, Any] = {**stem.normalise.options(), "frames": stem.frames}
    options |= {"kernel": list(getattr(tubelets, "kernel_size", ()))}
    chain = [Stage("stem", stem, "tubelet_stem/1", options, "tokens", frames=stem.frames)]
    code, more = attention
    for i, (attend, mlp) in enumerate(blocks):
        options = {"frames": steps, **more, **_vit.norm_options(attend.get_submodule("norm"))}
        over = OverClips(attend, steps)
        chain.append(Stage(f"blocks.{i}.attn", over, code, options, "tokens", frames=steps))
        options = {"activation": "GELU", **_vit.norm_options(mlp.norm)}
        chain.append(Stage(f"blocks.{i}.mlp", mlp, "tubelet_mlp/1", options, "tokens", True))
    if (norm := ends["norm"]) is not None:
        options = _vit.norm_options(norm)
        chain.append(Stage("norm", norm, "vit_norm/1", options, "tokens", True))
    pool_norm = ends["pool_norm"] or nn.Identity()
    options = {"frames": steps, **_vit.norm_options(pool_norm)}
    pool = Pool(pool_norm, steps)
    chain.append(Stage("pool", pool, "tubelet_pool/1", options, "vector", frames=steps))
    if (classifier := ends["fc"]) is not None:
        chain.append(Stage(CLASSIFIER, classifier, "tubelet_fc/1", {}, "vector"))
    for stage in chain:
        stage.module.eval().requires_grad_(False)
    return tuple(chain)


def gelu_mlp(first: nn.Module, last: nn.Module, activation: str) -> nn.Module:
    """Return two linear layers with a GELU between them.

    Raises:
        ValueError: The activation is another.
    """
    if activation != "gelu":
        raise ValueError(f"an activation {activation!r}: only 'gelu' is known here")
    return nn.Sequential(first, nn.GELU(), last)
