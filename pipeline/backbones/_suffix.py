"""The end of a chain as a module to train on a cached feature."""

from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn

from varve.pipeline.backbones._reductions import canonical_reduction, expand, reduce, resume_refusal
from varve.pipeline.backbones._stage import Backbone


class Suffix(nn.Module):
    """The stages after a cached feature. It shares its modules with the backbone it comes from:
    moving or casting the suffix moves or casts them there too.

    `train()` puts trainable modules in training mode, and leaves frozen ones in eval mode: a frozen
    batch norm keeps its running statistics.

    Attributes:
        stages: The modules, in chain order.
        calls: Counter of the calls of each stage, where one is set.
    """

    calls: "Counter[str] | None" = None

    def __init__(self, backbone: Backbone, after: str, keep: Sequence[str] = ()) -> None:
        super().__init__()
        name, _, reduction = after.partition(":")
        first = backbone.stage(name)
        reduction = canonical_reduction(first, reduction)
        begin = backbone.stage_names.index(name)
        wanted = list(keep) or [backbone.stage_names[-1]]
        for output in wanted:
            last = backbone.stage_names.index(backbone.stage(output).name)
            if last <= begin:
                raise ValueError(
                    f"{output} comes no later than {after}, after which the suffix runs"
                )
            chain = backbone.stages[begin : last + 1]
            # Of tokens the suffix returns the part that it was given.
            part = "" if chain[-1].form != "tokens" else reduction
            reason = resume_refusal(reduction, chain, part)
            if reason:
                raise ValueError(f"a suffix after {after} cannot give {output}: {reason}")
        self._backbone = (backbone.without_text(),)  # in a tuple, so that torch does not see it
        self._first, self._reduction = first, reduction
        self._shape = backbone.feature_shape(first, reduction)
        self._wanted, self._alone = wanted, not keep
        following = backbone.stages[begin + 1 :]
        self._frames = next((stage.frames for stage in following if stage.frames), 0)
        end = max(backbone.stage_names.index(output) for output in wanted)
        self.stages = nn.ModuleList(stage.module for stage in following[: end - begin])

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Run the stages.

        Args:
            x: The feature, [N, ...] one row a frame or [B, T, ...] as a store returns it, in any
                float type. bfloat16 and float16 are cast to the backbone's precision.

        Returns:
            The last stage's output, or a dict of those in `keep`, with the same leading axes, or
            fewer time steps where a stage merges them. Of tokens, the part that was given, in its
            form: from a class token, class tokens.

        Raises:
            ValueError: The shape is not that of the feature.
        """
        shape = self._shape
        clips = x.ndim == len(shape) + 2
        frames = x.flatten(0, 1) if clips else x
        if tuple(frames.shape[1:]) != shape:
            raise ValueError(
                f"the suffix starts from {self._first.name}"
                f"{':' * bool(self._reduction)}{self._reduction}, [clips, T, "
                f"{', '.join(map(str, shape))}] or [N, {', '.join(map(str, shape))}], not from "
                f"{list(x.shape)}"
            )
        (backbone,) = self._backbone
        if clips and self._frames not in (0, x.shape[1]):
            raise ValueError(
                f"the suffix mixes the frames of clips of {self._frames} frames, and these have "
                f"{x.shape[1]}: {list(x.shape)}"
            )
        outputs = backbone.run(
            expand(frames, self._first, self._reduction), self._wanted, self._first.name, self.calls
        )
        for name, y in outputs.items():
            if backbone.stage(name).form == "tokens":
                outputs[name] = reduce(y, backbone.stage(name), self._reduction)
        if clips:
            outputs = {n: self._by_clip(y, n, *x.shape[:2]) for n, y in outputs.items()}
        return outputs[self._wanted[0]] if self._alone else outputs

    def _by_clip(self, y: Tensor, name: str, clips: int, steps: int) -> Tensor:
        """Return a stage's output [N, ...] as [B, T, ...], of clips of `steps` time steps."""
        (backbone,) = self._backbone
        frames = backbone.clip_frames
        before, after = (backbone.time_steps(s, frames) for s in (self._first.name, name))
        return y.reshape(clips, steps * after // before, *y.shape[1:])

    def train(self, mode: bool = True) -> "Suffix":
        """Put trainable modules in training mode; frozen ones stay in eval, inside grafts too."""
        self.training = mode
        for stage in self.stages:
            _train(stage, mode)
        return self


def _train(module: nn.Module, mode: bool) -> None:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        mode = False
    module.training = mode
    for child in module.children():
        _train(child, mode)
