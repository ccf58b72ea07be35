"""Cost of a head: parameters and multiply-adds by module, and peak memory of the process.

`varve.pipeline.experiments.cost_table` makes tables of it.
"""

import contextlib
import ctypes
import resource
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from varve.heads import HasModules, Head
from varve.heads.parts.clips import Clips

NETWORK, BACKBONE, BLOCKS, CLASSIFIER = "network", "backbone", "blocks", "classifier"
COLUMNS = ["part", "parameters", "multiply_adds", "cached"]
MOST_CLIPS = 8


def multiply_adds(head: Head, clips: Clips) -> int:
    """Count the multiply-adds of a head's scores for one clip.

    Matrix products and convolutions count, one for each multiplication with its addition. Searches
    in an index (FAISS) and elementwise operations do not. The result is the mean over up to eight
    clips, since a head may route some of them to more experts than others.
    """
    indices = torch.arange(min(MOST_CLIPS, len(clips)))
    with FlopCounterMode(display=False) as counter:
        for index in indices:
            head.scores(clips[index[None]])
    return int(counter.get_total_flops()) // (2 * len(indices))


@contextlib.contextmanager
def memory_peak() -> Iterator[Callable[[], int]]:
    """Measure the largest memory while the block runs: give a function that returns bytes.

    On the CPU it is the resident memory of the process, on a GPU what torch allocated there. Where
    the kernel does not let the mark be reset, it is the largest since the process started.
    """
    with contextlib.suppress(OSError, AttributeError):
        # glibc keeps what earlier runs have freed, and it would count here.
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def peak() -> int:
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return int(torch.cuda.max_memory_allocated())
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    yield peak


def module_costs(head: Head, clips: Clips) -> list[dict[str, Any]]:
    """Count parameters and multiply-adds of a trained head's modules, without cached stages.

    Args:
        head: A head that has learned something.
        clips: Clips to score; multiply-adds are the mean over up to eight of them, since a head may
            route some to more experts than others.

    Returns:
        A dict of `COLUMNS` for each part, the network first. `parameters` counts each tensor once.
    """
    parts = named_modules(head)
    parameters = _parameters(parts)
    if not isinstance(head, HasModules):
        parameters[CLASSIFIER] = head.trainable
    indices = torch.arange(min(MOST_CLIPS, len(clips)))
    with counted(parts, CLASSIFIER) as flops:
        for index in indices:
            head.scores(clips[index[None]])
    names = [name for name in parameters if parameters[name] or flops[name]]
    names = [*(name for name in names if name != CLASSIFIER), CLASSIFIER]
    return [
        cost_row(name, parameters[name], flops[name] // (2 * len(indices)), False) for name in names
    ]


def named_modules(head: Head) -> list[tuple[str, nn.Module]]:
    """Return the modules of a head by part, those of its network stage by stage and by graft."""
    parts: list[tuple[str, nn.Module]] = []
    for name, module in modules_of(head):
        if name != NETWORK:
            parts.append((name, module))
            continue
        for stage in stages_of(module):
            grafts, inner = grafts_of(stage)
            trains = any(p.requires_grad for p in inner.parameters())
            parts += [(graft_name(graft), graft) for graft in reversed(grafts)]
            parts.append((BLOCKS if trains else BACKBONE, inner))
    order = (BACKBONE, BLOCKS)
    return sorted(parts, key=lambda part: order.index(part[0]) if part[0] in order else len(order))


@contextlib.contextmanager
def counted(parts: Sequence[tuple[str, nn.Module]], rest: str) -> Iterator[Counter[str]]:
    """Count the FLOPs (two a multiply-add) of modules by the names of their parts, and the rest.

    What a module of another part computes within a module is that part's alone.
    """
    flops: Counter[str] = Counter()
    running, before = [rest], 0
    with contextlib.ExitStack() as hooks, FlopCounterMode(display=False) as counter:

        def assign() -> None:
            nonlocal before
            total = int(counter.get_total_flops())
            flops[running[-1]] += total - before
            before = total

        def enter(name: str, *_: Any) -> None:
            assign()
            running.append(name)

        def leave(*_: Any) -> None:
            assign()
            running.pop()

        for name, module in parts:
            hooks.callback(module.register_forward_pre_hook(partial(enter, name)).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield flops
        assign()


def _parameters(parts: Sequence[tuple[str, nn.Module]]) -> Counter[str]:
    """Count the parameters of each part, each tensor once.

    A graft has those that neither the stage within it nor a classifier that it reads has.
    """
    grafts = {id(module) for _, module in parts if grafts_of(module)[0]}
    seen: set[int] = set()
    counts = Counter({name: 0 for name, _ in parts})
    for name, module in sorted(parts, key=lambda part: id(part[1]) in grafts):
        for parameter in module.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts[name] += parameter.numel()
    return counts


def stages_of(suffix: nn.Module) -> list[nn.Module]:
    """Return the modules of the stages of a suffix, with their grafts."""
    stages: Any = suffix.stages
    return list(stages)


def grafts_of(stage: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """Return the grafts of a stage, the outermost first, and the module that they stand around."""
    grafts = []
    while isinstance(inner := getattr(stage, "inner", None), nn.Module):
        grafts.append(stage)
        stage = inner
    return grafts, stage


def graft_name(graft: nn.Module) -> str:
    """Return the name that a graft's class declares as its code, such as hf_gate."""
    declared = vars(type(graft)).get("code", type(graft).__name__)
    return str(declared).partition("/")[0]


def modules_of(head: Head) -> list[tuple[str, nn.Module]]:
    """Return the modules that a head declares; see `varve.heads.HasModules`."""
    return list(head.modules()) if isinstance(head, HasModules) else []


def cost_row(part: str, parameters: int, multiply_adds: int, cached: bool) -> dict[str, Any]:
    """Return the row of a part in a cost table."""
    return dict(zip(COLUMNS, (part, parameters, multiply_adds, cached), strict=True))
