"""The command line as its users run it: exit codes, what is printed, what is left on disk.

A process of its own takes seconds to start, so each kind of end (done, done with quarantined
clips, refused, a traceback, help) is seen from outside once, and otherwise within this process.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from varve.pipeline.config import BuildSpec
from varve.stores import FeatureStore

NETWORK = ["--backbone", "resnet18:random-0", "--keep", "layer1.0:pool", "--frames", "2"]
SPEC = BuildSpec(("resnet18:random-0",), ("layer1.0:pool",), frames=2)

pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")


def process(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "varve", *map(str, arguments)],
        capture_output=True, text=True, timeout=180, cwd=Path(__file__).parents[3],
    )  # fmt: skip


@pytest.fixture(scope="module")
def videos(dataset) -> Path:
    return dataset(("grow", "bob ↕"), 2, broken=True)


@pytest.fixture(scope="module")
def built(videos, built_once) -> Path:
    return built_once(videos, SPEC)


@pytest.fixture
def store(built, tmp_path) -> Path:
    shutil.copytree(built, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def test_plan_and_build_have_what_was_left_out_as_json(dataset, tmp_path, varve):
    root = tmp_path / "videos"
    shutil.copytree(dataset(("grow",), 1), root)
    (root / "notes.srt").write_text("1", "utf-8")
    (root / "@eaDir").mkdir()
    counts = {".srt": 1, "hidden or system entries": 1}
    options = [root, "--store", tmp_path / "s.zarr", *NETWORK, "--json"]
    before = dict(json.loads(varve("plan", *options, "--no-estimate").stdout)["left_out"])
    assert before.items() >= counts.items()
    assert json.loads(varve("build", *options).stdout)["left_out"] == before


def test_build_reports_what_it_did_and_exits_with_1_for_quarantined_clips(videos, tmp_path, varve):
    done = process("build", videos, "--store", tmp_path / "s.zarr", *NETWORK)
    assert done.returncode == 1
    assert "7 clips ready, 4 clips quarantined" in done.stdout
    assert "empty: the file has 0 bytes" in done.stdout
    assert "Dask dashboard: http" in done.stderr
    assert "decode: 10/10 clips" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    again = varve("build", videos, "--store", tmp_path / "s.zarr", *NETWORK, "--json")
    assert again.returncode == 1
    facts = json.loads(again.stdout)
    assert (facts["files_decoded"], facts["clips"]) == (0, {"ready": 7, "quarantined": 4})
    assert facts["seconds"]["all"] < 60


def test_plan_prints_its_columns_and_writes_nothing(videos, tmp_path, varve):
    done = varve("plan", videos, "--store", tmp_path / "s.zarr", *NETWORK)
    assert done.returncode == 0
    assert "10 missing (10 from the video)" in done.stdout or "11 missing" in done.stdout
    assert "time: about" in done.stdout
    assert not (tmp_path / "s.zarr").exists()


def test_info_and_failures_describe_the_store(built, varve):
    info = process("info", built)
    assert varve("info", built).stdout == info.stdout
    assert info.returncode == 0
    assert "11 clips (7 ready, 4 quarantined" in info.stdout
    assert "layer1.0:pool  (11, 2, 64) float16  7 valid" in info.stdout
    facts = json.loads(varve("info", built, "--json").stdout)
    assert facts["classes"] == ["bob ↕", "grow"]
    failures = varve("failures", built, "--json")
    assert failures.returncode == 1
    reasons = {row["reason"] for row in json.loads(failures.stdout)}
    assert reasons == {"empty", "not_video", "no_video_stream"}


def test_verify_finds_nothing_in_a_good_store(built, varve):
    done = varve("verify", built, "--sample", "7")
    assert done.returncode == 0, done.stdout
    assert "7 cells read" in done.stdout
    assert "7 cells computed again: 7 equal to the bit" in done.stdout


def test_verify_names_the_shard_and_the_clip_of_a_flipped_bit(store, varve):
    (feature,) = FeatureStore.open(store).features()
    row = int(feature.valid.nonzero()[0][2])
    shard = store / feature.shard_of(row)
    data = bytearray(shard.read_bytes())
    data[2 * (2 * 64 * 2 + 4) + 9] ^= 4  # the third chunk present
    shard.write_bytes(data)
    done = varve("verify", store)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("BAD")]
    assert feature.shard_of(row) in line
    assert FeatureStore.open(store).clips.at[row, "path"] in line


def test_verify_finds_values_that_their_video_does_not_give(store, varve):
    """A wrong value under a right checksum: only computing it again can tell."""
    import numpy as np

    from varve.stores.clips import row_keys
    from varve.stores.columns import Column, ColumnSpec

    opened = FeatureStore.open(store)
    (feature,) = opened.features()
    row = int(feature.valid.nonzero()[0][0])
    spec = ColumnSpec(
        feature.backbone, feature.name, feature.fingerprint, feature.shape[1:], "float16", {}
    )
    wrong = feature.bits(np.array([row])) * np.float16(1.5)
    keys = row_keys(opened.clips)[[row]]
    Column(store, spec).write_shard(0, np.array([row]), wrong, keys, len(opened.clips))
    done = varve("verify", store, "--sample", "7")
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("BAD")]
    assert "differs from the video's feature" in line
    assert opened.clips.at[row, "path"] in line


REFUSED = {
    "no backbone": (["build", "{videos}", "--store", "{tmp}/s"], "no backbone asked for"),
    "no folder": (["build", "/no/such", "--store", "{tmp}/s"], "no dataset at /no/such"),
    "no plan": (["plan", "/no/such", "--store", "{tmp}/s"], "no dataset at /no/such"),
    "no videos": (["build", "/no/such", "--store", "{tmp}/s", *NETWORK], "/no/such"),
    "no store": (["build", "{videos}", "--store", "{videos}", *NETWORK], "is no store"),
    "views": (["build", "{videos}", "--store", "{tmp}/s", *NETWORK, "--views", "2"], "--flip"),
    "dtype": (["build", "{videos}", "--store", "{tmp}/s", *NETWORK, "--dtype", "int8"], "bfloat16"),
    "decoder": (["build", "{videos}", "--store", "{tmp}/s", *NETWORK, "--decoder", "x"], "pyav"),
    "layout": (
        ["build", "{videos}", "--store", "{tmp}/s", *NETWORK, "--layout", "ucf101"], "ucf101"
    ),
    "option": (["build", "{videos}", "--frames", "eight"], "'--frames'"),
    "info": (["info", "{tmp}"], "is no store"),
    "verify": (["verify", "{tmp}/nothing"], "no such folder"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "outside"),
    [*((name, False) for name in REFUSED), ("no backbone", True), ("option", True)],
)
def test_a_wrong_request_is_a_sentence_and_exit_code_2(videos, tmp_path, varve, request_, outside):
    arguments, message = REFUSED[request_]
    filled = [a.format(videos=videos, tmp=tmp_path) for a in arguments]
    done = (process if outside else varve)(*filled)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s").exists()


def test_debug_shows_where_an_error_came_from(tmp_path):
    assert "Traceback" in process("info", tmp_path, "--debug").stderr


def test_every_command_has_help_with_an_example(varve):
    for command in ("build", "plan", "info", "failures", "verify", "diff", "gc", "demo", "run",
                    "ablate", "route"):  # fmt: skip
        done = varve(command, "--help")
        assert done.returncode == 0
        assert f"Example: varve {command}" in " ".join(done.stdout.split())
    assert process("gc", "--help").stdout == varve("gc", "--help").stdout


def test_an_interrupt_that_a_callback_swallows_is_reported_at_the_end(varve, monkeypatch):
    def swallowing(**_):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("varve.pipeline.cli.app.app", swallowing)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = varve("anything")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.returncode == 130
    assert "interrupted; what was finished is kept" in done.stderr
    monkeypatch.setattr("varve.pipeline.cli.app.app", lambda **_: 0)
    assert varve("anything").returncode == 0


@pytest.mark.parametrize(
    ("redirections", "arguments", "code"),
    [
        (">/dev/full", "info STORE --json", 2),
        (">&-", "info STORE", 0),
        ("2>&-", "info no-such-store", 2),
        ("2>/dev/full", "info no-such-store", 2),
        ("| true", "info STORE --json", 0),
    ],
)
def test_exit_codes_are_true_whatever_became_of_the_output(built, redirections, arguments, code):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = f"{sys.executable} -m varve {arguments.replace('STORE', str(built))} {redirections}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], env=environment,
                          capture_output=True, text=True, timeout=180,
                          cwd=Path(__file__).parents[3])  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if ">&-" in redirections:
        assert done.stdout == ""
