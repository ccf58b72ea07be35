"""Measure the time of decoders for the T frames of a clip, and count the wrong frames.

    python benchmarks/bench_decode.py [DIR ...] [--frames 8] [--limit 20] [--json]

Every decoder decodes the TSN centres of the frame count that it reports, at the video's size. A
frame is wrong if there is none, or if it differs on average by more than 2 grey levels from the
frame of the same index in ffmpeg's output (in a whole PyAV decode, if ffmpeg is not installed). A
time is the least of `--repeat` attempts in a child process, which is killed after its deadline. The
start of the process is not counted.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import TimeoutError as DeadlineError
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import pebble

from varve.pipeline.config import FrameSet
from varve.pipeline.decoders import _index, pyav
from varve.pipeline.decoders._stream import Converter, Undecodable, decode, open_video
from varve.pipeline.decoders.sampling import indices

SUFFIXES = {".mp4", ".avi", ".mkv", ".webm", ".mov", ".mpg", ".ts", ".flv"}
DEADLINE_SECONDS = 20.0
WRONG_LEVELS = 2.0

Frames = dict[int, np.ndarray]


def with_pyav(path: str, frames: int, index: _index.Index | None = None) -> Frames:
    """Decode as by default: a packet index, then only the groups of pictures that are needed."""
    index = index or _index.read(path)
    try:
        return _pictures(pyav, path, index, frames)
    except _index.Contradicted:
        return _pictures(pyav, path, _index.read(path, proof=False), frames)


def with_decord_where_safe(path: str, frames: int) -> Frames:
    """Decode as `--decoder decord` does: decord for files that the index proves safe, else PyAV."""
    from varve.pipeline.decoders import decord

    index = _index.read(path)
    if index.hazard:
        return with_pyav(path, frames, index)
    try:
        return _pictures(decord, path, index, frames)
    except _index.Contradicted:
        return with_pyav(path, frames)


def with_decord_alone(path: str, frames: int) -> Frames:
    """Decode with decord as most code calls it."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    video = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    wanted = _centres(len(video), frames)
    return dict(zip(wanted, video.get_batch(wanted).asnumpy(), strict=True))


def with_torchcodec_alone(path: str, frames: int) -> Frames:
    """Decode with torchcodec and its exact index, on the CPU."""
    from torchcodec.decoders import VideoDecoder

    video = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    wanted = _centres(len(video), frames)
    return dict(zip(wanted, video.get_frames_at(indices=wanted).data.numpy(), strict=True))


def with_whole_decode(path: str, frames: int) -> Frames:
    """Decode all frames with PyAV, from the first to the last."""
    container, stream = open_video(path)
    decoded = list(decode(stream, container.demux(stream)))
    converter = Converter()
    wanted = _centres(len(decoded), frames)
    return {number: np.asarray(converter.image(decoded[number])) for number in wanted}


DECODERS = {
    "pyav (auto)": (with_pyav, "av"),
    "decord where safe": (with_decord_where_safe, "decord"),
    "decord alone": (with_decord_alone, "decord"),
    "torchcodec alone": (with_torchcodec_alone, "torchcodec"),
    "pyav, whole decode": (with_whole_decode, "av"),
}


def attempt(name: str, path: str, frames: int) -> tuple[float, Frames]:
    """Decode once, in the child process; return seconds and frames."""
    start = time.perf_counter()
    decoded = DECODERS[name][0](path, frames)
    return time.perf_counter() - start, decoded


def reference(path: str) -> np.ndarray:
    """Return every frame of the video, uint8 [N, H, W, 3]."""
    index = _index.read(path, proof=False)
    images = [np.asarray(i) for _, i in pyav.pictures(path, index, list(range(index.num_frames)))]
    if shutil.which("ffmpeg") is None:
        return np.stack(images)
    command = ["ffmpeg", "-v", "error", "-threads", "1", "-i", path, "-map", "0:v:0", "-vsync",
               "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]  # fmt: skip
    raw = subprocess.run(command, capture_output=True, check=False).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, *images[0].shape)


def count_wrong(decoded: Frames, expected_NHWC: np.ndarray) -> int:
    """Return the number of frames that are not those of their index."""

    def wrong(number: int, frame: np.ndarray) -> bool:
        if number >= len(expected_NHWC) or frame.shape != expected_NHWC[number].shape:
            return True
        difference = np.abs(frame.astype(np.int16) - expected_NHWC[number])
        return bool(difference.mean() > WRONG_LEVELS)

    return sum(wrong(number, frame) for number, frame in decoded.items())


def measure(name: str, paths: list[Path], expected: dict[Path, np.ndarray], options) -> dict:
    """Measure one decoder on all videos."""
    seconds, wrong, requested, lost = [], 0, 0, []
    pool = pebble.ProcessPool(1, context=get_context("spawn"))
    pool.schedule(attempt, args=(name, str(paths[0]), options.frames)).exception()  # imports
    for path in paths:
        requested += len(set(_centres(len(expected[path]), options.frames)))
        best = None
        for _ in range(options.repeat):
            task = pool.schedule(
                attempt, args=(name, str(path), options.frames), timeout=DEADLINE_SECONDS
            )
            try:
                taken, decoded = task.result()
            except DeadlineError:
                lost.append(f"{path.name}: no answer within {DEADLINE_SECONDS:g} s")
                break
            except Exception as error:
                lost.append(f"{path.name}: {type(error).__name__}")
                break
            best = taken if best is None else min(best, taken)
        if best is None:
            wrong += len(set(_centres(len(expected[path]), options.frames)))
            continue
        seconds.append(best)
        wrong += count_wrong(decoded, expected[path])
    pool.stop()
    pool.join()
    return {
        "decoder": name,
        "ms_per_clip_mean": 1e3 * statistics.mean(seconds) if seconds else None,
        "ms_per_clip_median": 1e3 * statistics.median(seconds) if seconds else None,
        "frames_wrong": wrong,
        "frames_requested": requested,
        "clips_lost": lost,
    }


def gather(folders: list[Path], limit: int) -> dict[str, list[Path]]:
    """Return up to `limit` videos of each folder, evenly spaced in its listing."""
    gathered = {}
    for folder in folders:
        videos = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        chosen = [videos[i * len(videos) // limit] for i in range(limit)] if videos else []
        gathered[folder.name] = list(dict.fromkeys(chosen))
    return {name: videos for name, videos in gathered.items() if videos}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR")
    parser.add_argument("--frames", type=int, default=8, help="frames per clip")
    parser.add_argument("--limit", type=int, default=20, help="videos per folder")
    parser.add_argument("--repeat", type=int, default=3, help="attempts per video")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    options = parser.parse_args()
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    folders = options.folders or [shared / n for n in ("ucf101_few", "asl20", "asl24")]
    with tempfile.TemporaryDirectory() as scratch:
        if not options.folders and not any(folder.is_dir() for folder in folders):
            from varve.pipeline.datasets import synthetic

            synthetic.make_dataset(Path(scratch) / "generated", clips_per_class=2, broken=False)
            folders = [Path(scratch) / "generated"]
        report = {"machine": _machine(), "frames": options.frames, "folders": {}}
        for name, paths in gather(folders, options.limit).items():
            expected = {}
            for path in paths:
                try:
                    expected[path] = reference(str(path))
                except Undecodable as error:
                    print(f"left out {path}: {error.detail}", file=sys.stderr)
            installed = [n for n, (_, lib) in DECODERS.items() if importlib.util.find_spec(lib)]
            rows = [measure(n, list(expected), expected, options) for n in installed]
            report["folders"][name] = {"clips": len(expected), "decoders": rows}
            if not options.json:
                _print(name, len(expected), rows)
    if not report["folders"]:
        print("no video found; name a folder with videos", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if options.json else report["machine"])
    return 0


def _pictures(module, path: str, index: _index.Index, frames: int) -> Frames:
    wanted = sorted(set(_centres(index.num_frames, frames)))
    return {n: np.asarray(image) for n, image in module.pictures(path, index, wanted)}


def _centres(num_frames: int, frames: int) -> list[int]:
    return indices(FrameSet(frames=frames), np.arange(num_frames)).tolist()


def _print(name: str, clips: int, rows: list[dict]) -> None:
    print(f"\n{name}: {clips} clips")
    print(f"{'decoder':20s} {'ms/clip mean':>13s} {'median':>8s} {'frames wrong':>16s}  lost")
    for row in rows:
        mean, median = (row[f"ms_per_clip_{kind}"] for kind in ("mean", "median"))
        times = f"{mean:13.1f} {median:8.1f}" if mean is not None else f"{'-':>13s} {'-':>8s}"
        wrong = f"{row['frames_wrong']} of {row['frames_requested']}"
        print(f"{row['decoder']:20s} {times} {wrong:>16s}  {len(row['clips_lost'])}")
        for lost in row["clips_lost"]:
            print(f"    {lost}")


def _machine() -> dict:
    names = ("av", "decord", "torchcodec", "numpy", "pillow")
    tool = "not installed"
    if shutil.which("ffmpeg"):
        version_text = subprocess.run(
            ["ffmpeg", "-version"], capture_output=True, text=True, check=True
        )
        tool = version_text.stdout.split()[2]
    return {
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "ffmpeg (reference)": tool,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        **{name: version(name) for name in names if importlib.util.find_spec(
            {"pillow": "PIL"}.get(name, name))},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
