"""Run folders: the files of a run, and reading a finished one.

spec.json            what decides the numbers (`varve.pipeline.experiments.run_spec`)
head_source/         a user's head: its code (`varve.pipeline.experiments.head_source`)
matrix.json          accuracy after each task on the test clips of each task, CNN and NME
metrics.json         written last: a folder that has it is finished
cost.json            see `Run.cost`
predictions.parquet  stage (the last task learned), row, label, classifier, top1 to top5
checkpoints/         see `varve.pipeline.experiments.checkpoints`
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from varve.pipeline.experiments.metrics import CLASSIFIERS, Matrix
from varve.stores import atomic

# Raised where the meaning of a file changes, so that none is misread.
FORMAT = 2
CNN, NME = CLASSIFIERS


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: The run folder.
        spec: What decided its numbers.
        matrix: Accuracy of the head's own classifier.
        nme: Accuracy of the nearest mean of exemplars; None for heads without exemplars.
        metrics: "cnn" and "nme", the figures of `Matrix.figures`; "left_out", number of clips of
            the store used neither for training nor for testing, by reason; "diagnostics", for each
            task what the head reports of its training (`varve.heads.ReportsDiagnostics`).
        cost: "trainable" parameters; "multiply_adds" of the head for a clip, with its network
            where it runs; "seconds" of training and "score_seconds" by task; "peak_memory_bytes"
            of the process; "bytes_read" from the store; "state_bytes" of the head; "exemplars" and
            "exemplar_bytes"; "stages_recomputed", calls of each stage by task.
    """

    folder: Path
    spec: Mapping[str, Any]
    matrix: Matrix
    nme: Matrix | None
    metrics: Mapping[str, Any]
    cost: Mapping[str, Any]

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """Predictions of the test clips after each task, the five likeliest classes of each."""
        return pd.read_parquet(self.folder / "predictions.parquet")

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """Read the folder of a finished run.

        Raises:
            ValueError: It is no run folder, of another format, or not finished.
        """
        folder = Path(folder)
        if not (folder / "metrics.json").exists():
            raise ValueError(f"{folder} is no finished run: it has no metrics.json")
        spec, matrices, metrics, cost = (
            json.loads((folder / f"{name}.json").read_bytes())
            for name in ("spec", "matrix", "metrics", "cost")
        )
        check_format(folder, spec)
        nme = Matrix.from_json(matrices, NME) if matrices[NME] else None
        return cls(folder, spec, Matrix.from_json(matrices), nme, metrics, cost)


def check_format(folder: Path, spec: Mapping[str, Any]) -> None:
    """Check that a run folder is of the format of this version.

    Raises:
        ValueError: Another version has written it.
    """
    if spec.get("format") != FORMAT:
        raise ValueError(
            f"{folder} is a run folder of format {spec.get('format', 1)}, and this version reads "
            f"format {FORMAT}: run it again, or read it with the version that wrote it"
        )


def write_json(folder: Path, name: str, content: Any) -> None:
    """Write a file of a run folder atomically."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    atomic.write(folder, folder / f"{name}.json", text.encode())
