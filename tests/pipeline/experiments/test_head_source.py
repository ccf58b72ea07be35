"""A user's head: the identity of its runs, the copy in a run folder, and what is refused."""

import json
import sys

import pytest
import torch

from varve import ablate, run
from varve.pipeline.experiments import checkpoints, head_source, routing, run_spec, sweep
from varve.pipeline.experiments.head_source import code_digest, find_head
from varve.pipeline.experiments.run_folder import Run
from varve.pipeline.experiments.sweep_spec import Sweep

SCENARIO = "2+2x2"
# Deeper ones are written with what stands beside them.
MINE = """
from varve.heads.linear import Linear
from varve.heads.parts.training import OptimConfig

class Mine(Linear):
    def __init__(self, lr: float = 0.05, epochs: int = 2, seed: int = 0) -> None:
        super().__init__(optim=OptimConfig(lr=lr, epochs=epochs, first_epochs=None), seed=seed)

build = Mine
"""


@pytest.fixture
def head_file(tmp_path):
    file = tmp_path / "methods" / "mine.py"
    file.parent.mkdir()
    file.write_text(MINE)
    return file


def states(folder):
    return [f.read_bytes() for f in sorted((folder / "checkpoints").glob("*.safetensors"))]


def test_a_file_is_a_head_and_is_called_by_its_stem(vector_store, head_file, tmp_path):
    done = run(vector_store, str(head_file), SCENARIO, out=tmp_path / "runs", options={"lr": 0.1})
    assert done.folder.name.startswith(f"mine-{SCENARIO}-1000-")
    assert done.spec["head"] == "mine"
    assert done.spec["options"] == {"lr": 0.1, "epochs": 2, "seed": 1000, "whiten": "",
                                    "views": 1, "crops": 1}  # fmt: skip
    assert str(head_file) not in (done.folder / "spec.json").read_text()
    plain = run(vector_store, "linear", SCENARIO, out=tmp_path / "runs",
                options={"lr": 0.1, "epochs": 2, "first_epochs": 2})  # fmt: skip
    assert states(plain.folder) == states(done.folder)


def test_a_moved_file_finds_its_run_and_an_edited_one_is_another(
    vector_store, head_file, tmp_path, monkeypatch
):
    done = run(vector_store, head_file, SCENARIO, out=tmp_path)
    moved = head_file.rename(tmp_path / "mine.py")
    with monkeypatch.context() as patch:
        patch.setattr("varve.pipeline.experiments.run.RunState", None)
        assert run(vector_store, moved, SCENARIO, out=tmp_path).folder == done.folder
        monkeypatch.chdir(tmp_path)
        assert run(vector_store, "mine.py", SCENARIO, out=tmp_path).folder == done.folder
    # Within one second and of one length: what Python keeps of compiled files would not see it.
    moved.write_text(MINE.replace("lr=lr", "lr=.9"))
    edited = run(vector_store, moved, SCENARIO, out=tmp_path)
    assert edited.folder != done.folder
    assert edited.spec["options"] == done.spec["options"]
    assert states(edited.folder) != states(done.folder)
    moved.write_text(MINE)
    assert run(vector_store, moved, SCENARIO, out=tmp_path).folder == done.folder


def test_modules_beside_it_are_read_with_it(vector_store, head_file, tmp_path):
    head_file.write_text("import rate\nfrom base import Base\n" + MINE.replace("(Linear)", "(Base)")
                         .replace("0.05", "rate.RATE"))  # fmt: skip
    (head_file.parent / "base.py").write_text(
        "from varve.heads.linear import Linear as Base\nimport rate\n"
    )
    (head_file.parent / "other.py").write_text("")
    for rate in (0.05, 0.06):  # one is not left over from the other
        (head_file.parent / "rate.py").write_text(f"RATE = {rate}")
        assert set(find_head(head_file).files) == {"mine.py", "base.py", "rate.py"}
        assert run_spec.option_defaults(find_head(head_file).build)["lr"] == rate
    first = code_digest(find_head(head_file))
    (head_file.parent / "rate.py").write_text("RATE = 0.05")
    assert code_digest(find_head(head_file)) != first
    done = run(vector_store, head_file, SCENARIO, out=tmp_path / "runs")
    (head_file.parent / "other.py").write_text("x = 1")
    assert run(vector_store, head_file, SCENARIO, out=tmp_path / "runs").folder == done.folder
    assert {f.name for f in (done.folder / "head_source").iterdir()} == {
        "mine.py",
        "base.py",
        "rate.py",
    }
    assert not {"rate", "base", "mine"} & set(sys.modules)


def test_a_head_that_it_imports_is_part_of_its_code(head_file, tmp_path, monkeypatch):
    for folder in ("parts", "grafts"):
        (tmp_path / "heads" / folder).mkdir(parents=True)
    for name in ("__init__", "_whitening", "linear", "lwf"):
        (tmp_path / "heads" / f"{name}.py").write_text("")
    monkeypatch.setattr(head_source, "HEADS", tmp_path / "heads")
    before = code_digest(find_head(head_file))
    (tmp_path / "heads" / "lwf.py").write_text("edited = 1")
    assert code_digest(find_head(head_file)) == before
    (tmp_path / "heads" / "linear.py").write_text("from varve.heads import lwf")
    after = code_digest(find_head(head_file))
    assert after != before
    (tmp_path / "heads" / "lwf.py").write_text("edited = 2")
    assert code_digest(find_head(head_file)) != after


def test_a_run_folder_is_restored_without_the_file(vector_store, head_file, tmp_path):
    done = run(vector_store, head_file, SCENARIO, out=tmp_path / "runs")
    head_file.write_text("raise RuntimeError")
    head, _ = routing.restored(Run.read(done.folder), vector_store)
    assert type(head).__name__ == "Mine"
    assert head.classes == list(head.state_dict()["classes"])
    head_file.unlink()
    done.folder.rename(tmp_path / "moved")
    again, _ = routing.restored(Run.read(tmp_path / "moved"), vector_store)
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in head.state_dict().items())
    copy = tmp_path / "moved" / "head_source" / "mine.py"
    copy.write_text(MINE.replace("0.05", "0.06"))
    with pytest.raises(ValueError, match="is not what the run was started with"):
        routing.restored(Run.read(tmp_path / "moved"), vector_store)
    copy.unlink()
    with pytest.raises(ValueError, match=r"mine\.py is gone"):
        routing.restored(Run.read(tmp_path / "moved"), vector_store)


def test_a_file_put_beside_a_run_of_heads_is_not_run(vector_store, tmp_path):
    done = run(vector_store, "nearest_mean", SCENARIO, out=tmp_path)
    (done.folder / "head_source").mkdir()
    (done.folder / "head_source" / "nearest_mean.py").write_text("raise RuntimeError")
    head, _ = routing.restored(done, vector_store)
    assert type(head).__module__ == "varve.heads.closed_form.nearest_mean"


def test_what_is_imported_for_types_alone_is_not_looked_at(head_file):
    head_file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from varve import pipeline\n"
        + MINE
    )
    assert find_head(head_file).build


def test_a_head_named_by_an_attribute_counts_too(head_file, tmp_path, monkeypatch):
    head_file.write_text(
        "import varve.heads.linear\nMine = varve.heads.linear.Linear\nbuild = Mine\n"
    )
    assert {file.stem for file in head_source.imported_heads(find_head(head_file))} == {"linear"}
    head_file.write_text(
        "from varve import heads\nimport varve.heads.parts.fine_tuned_head\n"
        "build = lambda: heads.lwf.LwF\n"
    )
    assert {file.stem for file in head_source.imported_heads(find_head(head_file))} == {"lwf"}


def test_a_killed_run_resumes_with_the_code_that_it_started_with(
    vector_store, head_file, tmp_path, monkeypatch
):
    whole = run(vector_store, head_file, SCENARIO, out=tmp_path / "whole", threads=1)

    class Stop(BaseException):
        pass

    def stopping(run, task, *rest, write=checkpoints.write):
        write(run, task, *rest)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", stopping)
        with pytest.raises(Stop):
            run(vector_store, head_file, SCENARIO, out=tmp_path / "parts", threads=1)
    (begun,) = (tmp_path / "parts").iterdir()
    head_file.write_text(MINE.replace("lr=lr", "lr=9 * lr"))
    edited = run(vector_store, head_file, SCENARIO, out=tmp_path / "parts", threads=1)
    assert edited.folder != begun
    assert not (begun / "metrics.json").exists()
    kept = begun / "head_source" / "mine.py"
    ended = run(vector_store, kept, SCENARIO, out=tmp_path / "parts")
    assert ended.folder == begun
    assert states(ended.folder) == states(whole.folder)
    assert states(edited.folder) != states(whole.folder)


def test_processes_train_with_the_text_that_was_read(
    vector_store, head_file, tmp_path, monkeypatch, client
):
    """A grid over its own options; the file is gone before the first of them begins."""
    monkeypatch.chdir(head_file.parent)
    (head_file.parent / "rate.py").write_text("RATE = 0.05")
    head_file.write_text("from rate import RATE\n" + MINE.replace("0.05", "RATE"))

    def removing(*rest, execute=sweep.execute):
        for file in head_file.parent.iterdir():
            file.unlink()
        return execute(*rest)

    monkeypatch.setattr(sweep, "execute", removing)
    table = ablate(vector_store, ["nearest_mean", "mine.py"], SCENARIO, {"mine.lr": [0.1, 0.2]}, 1,
                   options={"mine": {"epochs": 1}}, out=tmp_path / "runs",
                   client=client)  # fmt: skip
    assert table.attrs["errors"] == [], table.attrs
    assert table["head"].tolist() == ["nearest_mean", "mine", "mine"]
    assert set(table["option.lr"].dropna()) == {0.1, 0.2}


def test_a_sweep_finds_files_from_where_it_lies(head_file, tmp_path):
    file = head_file.parent / "s.toml"
    file.write_text('heads = ["linear", "mine.py"]\nscenario = "demo"\nseeds = [1]\n'
                    '[grid]\n"mine.lr" = [0.1]\n[options.mine]\nepochs = 3\n')  # fmt: skip
    assert Sweep.read(file).runs() == [
        ("linear", 1, {}, {}), ("mine", 1, {"epochs": 3, "lr": 0.1}, {})
    ]  # fmt: skip


def test_two_files_of_one_name_are_refused(vector_store, head_file, tmp_path):
    (tmp_path / "mine.py").write_text(MINE + "\n")
    with pytest.raises(ValueError, match=r"methods/mine\.py.*by its name alone, so rename one"):
        ablate(vector_store, [head_file, tmp_path / "mine.py"], SCENARIO, out=tmp_path / "runs")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("stpr.py", MINE, r"stpr\.py has the name of heads/stpr\.py.*rename the file"),
        ("mine.py", "x = (", r"mine\.py is no Python: '\(' was never closed.*line 1"),
        ("mine.py", "x = 1\n1 / 0", r"mine\.py raises ZeroDivisionError .*: division.* \(line 2"),
        ("mine.py", "raise SystemExit(3)", r"mine\.py raises SystemExit"),
        ("mine.py", "import nosuch", r"raises ModuleNotFoundError .*'nosuch' \(line 1"),
        ("mine.py", "from . import x", r"raises ImportError .*relative import"),
        (
            "mine.py",
            "from varve import pipeline",
            r"mine\.py imports varve\.pipeline: a head sees only tensors",
        ),
        ("mine.py", "class A: ...\nbuild = 3", r"has no `build`.* classes are A: end it with"),
        ("mine.py", "", r"has no `build` to be called; its classes are none"),
        ("mine.py", "def build(lr): ...", r"option lr of its build has no default: give it"),
        ("mine.py", "def build(to=print): ...", r"option to of its build has <built-in"),
        ("mine.py", "def build(): return 3", r"its build gives 'int' without classes, reads"),
    ],
)
def test_a_file_that_is_no_head_is_refused_before_anything_is_written(
    vector_store, tmp_path, name, text, message
):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        run(vector_store, tmp_path / name, SCENARIO, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_missing_file_is_named(vector_store, tmp_path, varve):
    with pytest.raises(FileNotFoundError, match=r"no such file: mine\.py \(looked for in /"):
        run(vector_store, "mine.py", SCENARIO, out=tmp_path)
    with pytest.raises(ValueError, match=r"no 'mine' in heads/; found .* by the path of its file"):
        run(vector_store, "mine", SCENARIO, out=tmp_path)


def test_the_command_takes_a_file(vector_store, head_file, tmp_path, varve):
    output = varve("run", vector_store.path, "--head", head_file, "--scenario", SCENARIO, "--out",
                   tmp_path / "runs", "--set", "lr=0.1", "--json")  # fmt: skip
    assert output.returncode == 0, output.stderr
    assert json.loads(output.stdout)["spec"]["head"] == "mine"
    output = varve("run", vector_store.path, "--head", "gone.py", "--scenario", SCENARIO)
    assert output.returncode == 2
    assert "no such file: gone.py" in output.stderr
