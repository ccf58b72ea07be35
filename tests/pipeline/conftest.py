"""Fixtures of tests of builds, and videos whose every frame shows its number.

Data sets, stores and networks are made once for many tests, which read them alone: whatever a test
changes it copies first.
"""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import av
import pytest

from varve.contracts.videos import FPS, encode, number_of, numbered


def cut_copy(source: Path, target: Path, start: int) -> Path:
    """Copy packets so that playing begins at frame `start`, in the midst of a group of pictures.

    What stands before it stays in the file, to be decoded and not shown: what `ffmpeg -ss` with
    `-c copy` leaves.
    """
    with (
        av.open(str(source)) as old,
        av.open(str(target), "w", options={"avoid_negative_ts": "disabled"}) as new,
    ):
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        shift = round(start / FPS / stream.time_base)
        for packet in old.demux(stream):
            if packet.size:
                packet.pts -= shift
                packet.dts -= shift
                packet.stream = copy
                new.mux(packet)
    return target


@dataclass(frozen=True)
class Video:
    """A file, and the number that each of its frames shows."""

    path: Path
    numbers: list[int]


X264 = {"g": "12", "bf": "2", "preset": "veryfast"}
OPEN = {"x264-params": "open-gop=1:keyint=12:bframes=2:b-adapt=0", "preset": "veryfast"}
UNEVEN = [n * 40 + 17 * (n % 3) + 300 * (n // 20) for n in range(60)]

MADE: dict[str, tuple[str, dict]] = {
    "h264.mp4": ("libx264", X264),
    "h264_open.mp4": ("libx264", OPEN),
    "h264_open.ts": ("libx264", OPEN),
    "h264.mkv": ("libx264", X264),
    "h264.avi": ("libx264", X264),
    "uneven.mp4": ("libx264", {"ticks": UNEVEN, **X264}),
    "uneven.mkv": ("libx264", {"ticks": UNEVEN, **X264}),
    "sound_first.mp4": ("libx264", {"sound_first": True, **X264}),
    "turned.mp4": ("libx264", {"rotation": 90, **X264}),
    "full_range.mp4": ("libx264", {"pix_fmt": "yuvj420p", **X264}),
    "ten_bit.mp4": ("libx264", {"pix_fmt": "yuv420p10le", **X264}),
    "interlaced.ts": ("libx264", {"flags": "+ildct+ilme", "x264-params": "tff=1", **X264}),
    "odd.mkv": ("libvpx-vp9", {"size": (161, 97), "g": "12", "deadline": "realtime"}),
    "single.mp4": ("libx264", {"frames": 1, **X264}),
    "mpeg4.avi": ("mpeg4", {"g": "12", "b": "2M"}),
    "mpeg4_b.avi": ("mpeg4", {"g": "12", "bf": "2", "b": "2M"}),
    "mpeg4_b.mp4": ("mpeg4", {"g": "12", "bf": "2", "b": "2M"}),
    "mpeg2.mpg": ("mpeg2video", {"g": "12", "bf": "2", "b": "2M"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:keyint=12", "preset": "ultrafast"}),
    "vp9.webm": ("libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "vp8.webm": ("libvpx", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "motion.avi": ("mjpeg", {"pix_fmt": "yuvj420p"}),
    "sorenson.flv": ("flv", {"g": "12", "b": "2M"}),
}


# Tests are no package, so what they share comes as fixtures.
@pytest.fixture(scope="session", name="number_of")
def number_of_fixture():
    return number_of


@pytest.fixture(scope="session", name="encode")
def encode_fixture():
    return encode


def film(path: Path, frames: int, fps: int | Fraction) -> Path:
    """Write a long film of small frames, which repeat after 256 of them."""
    pictures = [
        av.VideoFrame.from_ndarray(numbered(number), "rgb24").reformat(format="yuv420p")
        for number in range(min(frames, 256))
    ]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps, options={"g": "12"})
        stream.width, stream.height = pictures[0].width, pictures[0].height
        for number in range(frames):
            picture = pictures[number % 256]
            picture.pts, picture.time_base = number, 1 / Fraction(fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session", name="film")
def film_fixture():
    return film


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Iterator[Path]:
    """The plugin of docs/ADDING_A_BACKBONE.md, a tiny network, with pictures of 224 pixels."""
    from varve.pipeline import registry

    page = Path(__file__).parents[2] / "docs" / "ADDING_A_BACKBONE.md"
    family, *_ = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    plugin = tmp_path_factory.mktemp("tiny") / "tiny.py"
    plugin.write_text(family.replace("size=64, resize=72", "size=224, resize=224"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_LOADED", dict(registry._LOADED))
        patch.setenv(registry.VARIABLE, "")
        registry.load_plugin(str(plugin))
        yield plugin
        registry.unregister("backbones", "tiny")


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Video]:
    """One small file of every kind that hides its frames in another way."""
    folder = tmp_path_factory.mktemp("videos")
    by_name = {}
    for name, (codec, options) in MADE.items():
        path = encode(folder / name, codec, **options)
        by_name[name] = Video(path, list(range(options.get("frames", 60))))
    for name in ("h264.mp4", "h264_open.mp4", "mpeg4_b.mp4"):
        path = cut_copy(by_name[name].path, folder / f"cut_{name}", start=19)
        by_name[path.name] = Video(path, list(range(19, 60)))
    return by_name


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Iterator[Callable[..., Path]]:
    """`dataset(classes, clips_per_class, broken=False)`: a synthetic one, made once for all."""
    from varve.pipeline.datasets.synthetic import make_dataset

    states: dict[Path, dict[Path, tuple[int, int]]] = {}

    def state(root: Path) -> dict[Path, tuple[int, int]]:
        return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*.*")}

    @cache
    def make(classes: tuple[str, ...], clips_per_class: int, broken: bool = False) -> Path:
        root = tmp_path_factory.mktemp("videos") / "set"
        make_dataset(root, clips_per_class, broken=broken, classes=classes)
        states[root] = state(root)
        return root

    yield make
    for root, before in states.items():
        assert state(root) == before, "a test changed a data set that others read"


@pytest.fixture(scope="session")
def built_once(tmp_path_factory) -> Callable[..., Path]:
    """`built_once(videos, *specs)`: a store, by one build after the other in this process."""
    from varve import Runtime, build

    @cache
    def make(videos: Path, *specs) -> Path:
        store = tmp_path_factory.mktemp("stores") / "s.zarr"
        for spec in specs:
            build(videos, store, spec, runtime=Runtime(serial=True))
        return store

    return make


@pytest.fixture(scope="module")
def loaded_once() -> Iterator[None]:
    """Each network is made and digested once for the whole file, whose tests must leave it so."""
    import torch

    from varve.pipeline import backbones

    networks = {}

    def load(name: str, precision: torch.dtype = torch.float32, real=backbones.load):
        if (name, precision) not in networks:
            network = backbones.seal(real(name, precision))
            networks[name, precision] = (network, network.keys(""))
        return networks[name, precision][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "load", load)
        yield
    for network, keys in networks.values():
        stages = tuple(replace(stage, sealed=False) for stage in network.stages)
        assert replace(network, stages=stages).keys("") == keys, f"a test changed {network}"


@pytest.fixture(scope="module")
def children_kept() -> Iterator[None]:
    """Keep decoding children from build to build of this process, until the end of the file."""
    from varve.pipeline.extraction import extract

    pools = []

    class Kept(extract.DecodePool):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            pools.append(self)

        def close(self) -> None:
            """Stay open until the end of the module."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract, "DecodePool", cache(Kept))
        yield
        extract.close_pools()
    for pool in pools:
        super(Kept, pool).close()


@pytest.fixture(scope="module")
def resnet():
    from varve.pipeline import backbones

    return backbones.load("resnet18:random-0")


@pytest.fixture(scope="module")
def vit():
    from varve.pipeline import backbones

    return backbones.load("ViT-S-32:random-0")


@pytest.fixture
def varve(monkeypatch, capsys) -> Callable[..., SimpleNamespace]:
    """The command line within this process; says its exit code and what it printed."""
    from varve.pipeline import cli

    def run(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["varve", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=end.value.code, stdout=printed.out, stderr=printed.err)

    return run
