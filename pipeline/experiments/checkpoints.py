"""Checkpoints: a head's state after each task, so that a killed run goes on from the last one.

`checkpoints/task-03.safetensors` holds the tensors that task 3 changed; `task-03.json`, written
last, says for every tensor of the state which file has it, and what the run knew then. So old
experts are written once, however many tasks follow, and a checkpoint is whole or not there.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from varve.stores import atomic

FOLDER = "checkpoints"


def write(run: Path, task: int, state: Mapping[str, Tensor], known: Mapping[str, Any]) -> None:
    """Keep the state after a task, and what else a resumed run needs to know, as JSON."""
    before = _last(run)[1]["tensors"] if task else {}
    name = f"task-{task:02}.safetensors"
    tensors, places = {}, {}
    for key, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        bits = hashlib.blake2b(plain.view(-1).view(torch.uint8).numpy(), digest_size=16).hexdigest()
        held = before.get(key)
        if held and held[1] == bits and held[2] == list(plain.shape):
            places[key] = held
        else:
            tensors[key], places[key] = plain, [name, bits, list(plain.shape)]
    folder = run / FOLDER
    atomic.write(run, folder / name, save(tensors))
    text = json.dumps({"task": task, "tensors": places, **known}, indent=1)
    atomic.write(run, folder / f"task-{task:02}.json", text.encode())


def read(run: Path, task: int = -1) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """A task, the state after it, and what the run knew; task -1 where there is none.

    Args:
        task: Which; -1 for the last whole one.

    Raises:
        ValueError: A file is missing or damaged.
    """
    task, known = _last(run, f"{task:02}" if task >= 0 else "*")
    held: dict[str, dict[str, Tensor]] = {}
    state = {}
    try:
        for key, (name, _, _) in known.get("tensors", {}).items():
            if name not in held:
                held[name] = load((run / FOLDER / name).read_bytes())
            state[key] = held[name][key]
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{run / FOLDER} is damaged ({error}): remove {run} and run it again"
        ) from error
    return task, state, known


def whole(run: Path, tasks: int) -> bool:
    """Whether there is one for each of so many tasks."""
    return all((run / FOLDER / f"task-{task:02}.json").exists() for task in range(tasks))


def remove(run: Path) -> None:
    """Of a run that has ended."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def _last(run: Path, which: str = "*") -> tuple[int, dict[str, Any]]:
    files = sorted(
        (run / FOLDER).glob(f"task-{which}.json"), key=lambda file: int(file.stem[len("task-") :])
    )
    if not files:
        return -1, {}
    try:
        known = json.loads(files[-1].read_bytes())
        return int(known["task"]), known
    except (ValueError, KeyError) as error:
        raise ValueError(f"{files[-1]} is damaged ({error}): remove it") from error
