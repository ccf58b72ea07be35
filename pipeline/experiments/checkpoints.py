"""Checkpoints: the state of a head after each task, from which a killed run resumes.

`checkpoints/task-03.safetensors` holds the tensors that task 3 changed. `task-03.json`, written
last, names the file of every tensor of the state, and has the records of the run so far. So an
expert that no longer changes is written once, however many tasks follow, and a checkpoint is either
complete or absent.
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


def write(run: Path, task: int, state: Mapping[str, Tensor], records: Mapping[str, Any]) -> None:
    """Write the state after a task, and the records that a resumed run needs, as JSON."""
    earlier = _last(run)[1]["tensors"] if task else {}
    name = f"task-{task:02}.safetensors"
    changed, index = {}, {}
    for key, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        bits = hashlib.blake2b(plain.view(-1).view(torch.uint8).numpy(), digest_size=16).hexdigest()
        written = earlier.get(key)
        if written and written[1] == bits and written[2] == list(plain.shape):
            index[key] = written
        else:
            changed[key], index[key] = plain, [name, bits, list(plain.shape)]
    folder = run / FOLDER
    atomic.write(run, folder / name, save(changed))
    text = json.dumps({"task": task, "tensors": index, **records}, indent=1)
    atomic.write(run, folder / f"task-{task:02}.json", text.encode())


def read(run: Path, task: int = -1) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint.

    Args:
        run: The run folder.
        task: Number of the task; -1 for the last complete one.

    Returns:
        The task, the state after it, and the records; task -1 where there is no such checkpoint.

    Raises:
        ValueError: A file is missing or damaged.
    """
    task, content = _last(run, f"{task:02}" if task >= 0 else "*")
    files: dict[str, dict[str, Tensor]] = {}
    state = {}
    try:
        for key, (name, _, _) in content.get("tensors", {}).items():
            if name not in files:
                files[name] = load((run / FOLDER / name).read_bytes())
            state[key] = files[name][key]
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{run / FOLDER} is damaged ({error}): remove {run} and run it again"
        ) from error
    return task, state, content


def complete(run: Path, tasks: int) -> bool:
    """Return whether there is a checkpoint for each of so many tasks."""
    return all((run / FOLDER / f"task-{task:02}.json").exists() for task in range(tasks))


def remove(run: Path) -> None:
    """Remove the checkpoints of a finished run."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def _last(run: Path, pattern: str = "*") -> tuple[int, dict[str, Any]]:
    files = sorted(
        (run / FOLDER).glob(f"task-{pattern}.json"), key=lambda file: int(file.stem[len("task-") :])
    )
    if not files:
        return -1, {}
    try:
        content = json.loads(files[-1].read_bytes())
        return int(content["task"]), content
    except (ValueError, KeyError) as error:
        raise ValueError(f"{files[-1]} is damaged ({error}): remove it") from error
