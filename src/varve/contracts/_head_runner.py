"""A small experiment runner for heads: moving blobs, a tiny network, and tasks in sequence.

Shapes: N clips, T frames, L tokens, D width.
"""

import copy
from collections import Counter

import numpy as np
import torch
from torch import nn

from varve.heads import (
    FineTunesBackbone,
    ReplaysExemplars,
    Task,
    UsesTeacher,
    build_head,
    options_of,
)
from varve.heads.parts.clips import Clips
from varve.pipeline.registry import variant

T, L, D = 4, 5, 16
BLOCKS = 3


class Attention(nn.Module):
    """Mixes the tokens of a frame, so that none can be computed alone."""

    token_wise = False

    def __init__(self, generator):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(D, D, generator=generator) / D**0.5)

    def forward(self, x):
        return x + 0.1 * torch.tanh(x.mean(dim=-2, keepdim=True) @ self.mix)


class Mlp(nn.Module):
    token_wise = True

    def __init__(self, generator):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D, generator=generator) / D**0.5)

    def forward(self, x):
        return x + 0.1 * torch.relu(x @ self.weight)


class Projection(nn.Module):
    def forward(self, x):
        return nn.functional.layer_norm(x[:, 0], (D,))


class TinyNetwork:
    """A `varve.heads.Network` of three blocks of two stages over tokens, and a last vector."""

    frames = T

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.modules = {}
        for i in range(BLOCKS):
            self.modules[f"blocks.{i}.attn"] = Attention(generator)
            self.modules[f"blocks.{i}.mlp"] = Mlp(generator)
        self.modules["vector"] = Projection()
        for module in self.modules.values():
            module.requires_grad_(False)
        self.stages = tuple(self.modules)

    def find(self, name):
        stage, colon, reduction = name.partition(":")
        if stage.startswith("blocks.-"):
            number, *step = stage.removeprefix("blocks.-").split(".")
            stage = f"blocks.{BLOCKS - int(number)}.{(step or ['mlp'])[0]}"
        assert stage in self.modules
        return stage + colon + reduction

    def shape(self, name):
        return (D,) if name == "vector" or name.endswith(":cls") else (L, D)

    def time_steps(self, name):
        return T

    def module(self, stage):
        return self.modules[self.find(stage)]

    def graft(self, name):
        graft = variant("grafts", name)
        return getattr(graft, "build", graft)

    def suffix(self, changes, after, keep=(), unfreeze=()):
        modules = dict(self.modules)
        for stage in map(self.find, unfreeze):
            modules[stage] = copy.deepcopy(self.modules[stage]).requires_grad_(True)
        for stage, change in changes.items():
            stage = self.find(stage)
            modules[stage] = change if isinstance(change, nn.Module) else change(modules[stage])
        first, _, reduction = self.find(after).partition(":")
        return Chain(self, modules, first, reduction, [self.find(stage) for stage in keep])

    def run(self, x_NLD, name):
        """Return a feature of frames, from the input of the first block."""
        stage, _, reduction = self.find(name).partition(":")
        with torch.no_grad():
            for name in self.stages[: self.stages.index(stage) + 1]:
                x_NLD = self.modules[name](x_NLD)
        return x_NLD[:, 0] if reduction == "cls" else x_NLD


class Chain(nn.Module):
    def __init__(self, network, modules, first, reduction, keep):
        super().__init__()
        names = network.stages[network.stages.index(first) + 1 :]
        self.names, self.reduction, self.keep = names, reduction, keep
        self.stages = nn.ModuleList(modules[name] for name in names)

    def forward(self, x):
        lead = x.shape[: 2 if x.ndim == (3 if self.reduction else 4) else 1]
        x = x.flatten(0, len(lead) - 1).float()
        x = x[:, None] if self.reduction else x
        kept = {}
        for name, stage in zip(self.names, self.stages, strict=True):
            x = stage(x)
            kept[name] = x.unflatten(0, lead)
        return {name: kept[name] for name in self.keep} if self.keep else kept[self.names[-1]]


class Counted:
    """Cells that count how often each of their clips was read."""

    def __init__(self, cells, rows, reads):
        self.cells, self.rows, self.reads = cells, rows, reads

    def __len__(self):
        return len(self.cells)

    def __getitem__(self, indices):
        self.reads.update(self.rows[indices].tolist())
        return self.cells[indices]


def epochs_of(build, count):
    """Return options that set the numbers of epochs of a head."""
    known, names = options_of(build), ("epochs", "first_epochs")
    return {name: count for name in names if name in known and known[name].default is not None}


class Runner:
    """Runs one head on tasks, as the experiment runner does.

    Attributes:
        reads: Number of reads of each row since the last `reads.clear()`.
        seen: Tokens and label of each row.
    """

    def __init__(self, build, **options):
        self.head = build_head(build, epochs_of(build, 25) | options)
        self.network = TinyNetwork()
        if isinstance(self.head, FineTunesBackbone):
            self.head.attach(self.network)
        self.number, self.next_row, self.reads = 0, 0, Counter()
        self.seen = {}

    def tokens(self, labels, clips=6, seed=0):
        """Return clips in random order, [N, T, L, D], and labels; each class has its motion."""
        rng = np.random.default_rng([seed, 1])
        cells, numbers = [], []
        for label in labels:
            ends = np.random.default_rng([label, 2]).normal(size=(2, 1, D))
            path = np.linspace(0, 1, T)[:, None, None]
            centre_TLD = (1 - path) * ends[0] + path * ends[1]
            cells.append(2 * centre_TLD + 0.3 * rng.normal(size=(clips, T, L, D)))
            numbers += [label] * clips
        order = rng.permutation(len(numbers))
        cells = torch.from_numpy(np.concatenate(cells)[order]).float()
        return cells, torch.tensor(numbers)[torch.from_numpy(order)]

    def batch(self, tokens):
        flat = tokens.flatten(0, 1)
        # The audio backbone gives another feature of the same clips.
        stages = {name: "blocks.-2:cls" if name == "sound" else name for name in self.head.reads}
        return {
            name: self.network.run(flat, stage).unflatten(0, tokens.shape[:2])
            for name, stage in stages.items()
        }

    def clips(self, tokens, labels, rows=None):
        if rows is None:
            rows = torch.arange(self.next_row, self.next_row + len(labels))
            self.next_row += len(labels)
        for row, cell, label in zip(rows.tolist(), tokens, labels.tolist(), strict=True):
            self.seen[row] = (cell, label)
        cells = self.batch(tokens) | self.teacher_features(tokens)
        features = {name: Counted(each, rows, self.reads) for name, each in cells.items()}
        return Clips(features, labels, rows)

    def teacher_features(self, tokens):
        """Return the teacher's outputs of clips, for heads that use them."""
        if not isinstance(self.head, UsesTeacher) or not self.head.classes:
            return {}
        with torch.no_grad():
            outputs = self.head.suffix(self.batch(tokens)[self.head.reads[0]])
        return {
            f"teacher {name}": outputs[self.network.find(name)] for name in self.head.teacher_stages
        }

    def text(self, classes):
        """Return a unit vector per class, near the mean frame of its clips."""
        means = [self.network.run(self.tokens([c], 8, 99)[0].flatten(0, 1), "vector").mean(0)
                 for c in classes]  # fmt: skip
        return nn.functional.normalize(torch.stack(means), dim=1)

    def task(self, labels, clips=6, seed=0):
        clips = self.clips(*self.tokens(labels, clips, seed))
        memory = None
        if isinstance(self.head, ReplaysExemplars) and len(self.head.exemplars):
            rows = self.head.exemplars
            cells, numbers = zip(*(self.seen[row] for row in rows.tolist()), strict=True)
            memory = self.clips(torch.stack(cells), torch.tensor(numbers), rows)
        return Task(clips, self.number, self.text(sorted(set(labels))), memory)

    def learn(self, labels, clips=6, seed=0):
        self.head.learn(self.task(labels, clips, seed))
        self.number += 1

    def scores(self, tokens):
        return self.head.scores(self.batch(tokens))

    def predicted(self, tokens):
        return torch.tensor(self.head.classes)[self.scores(tokens).argmax(dim=1)]


class TrainedRuns:
    """Runners of one head after some tasks. Each is trained once; a call returns a copy.

    Args:
        build: The head.
        options: Options of the head.
    """

    def __init__(self, build, options):
        self._build, self._options, self._runs = build, options, {}

    def __call__(self, *tasks):
        """Return a runner that has learned these tasks: labels, clips per class, and seed."""
        if tasks not in self._runs:
            run = self(*tasks[:-1]) if tasks else Runner(self._build, **self._options)
            if tasks:
                torch.manual_seed(0)
                np.random.seed(0)  # noqa: NPY002 - another state than a test has set
                labels, clips, seed = tasks[-1]
                run.learn(list(labels), clips, seed)
            self._runs[tasks] = run
        return copy.deepcopy(self._runs[tasks])
