"""The synthetic data set: its construction leaves only motion to tell classes apart."""

import collections
import hashlib
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from varve.pipeline.datasets import synthetic
from varve.pipeline.datasets.corruptions import CORRUPTIONS
from varve.pipeline.datasets.synthetic import (
    AUDIO_CLASSES,
    CLASSES,
    REVERSED_PAIRS,
    broken_files,
    frames,
    make_dataset,
    write_video,
)
from varve.pipeline.datasets.synthetic_audio import RATE, waveform
from varve.pipeline.decoders import REASONS


def digests(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*.*"))
    }


def decode(path):
    with av.open(str(path), "r") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def facts(path):
    with av.open(str(path), "r") as container:
        stream = container.streams.video[0]
        return (
            stream.codec_context.name,
            stream.width,
            stream.height,
            stream.average_rate,
            sum(1 for _ in container.decode(stream)),
        )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("synthetic") / "set", clips_per_class=6)


@pytest.mark.parametrize(("a", "b"), REVERSED_PAIRS)
def test_a_twin_is_the_other_played_backwards_bit_for_bit(a, b):
    for seed in range(5):
        forward = frames(a, np.random.default_rng(seed))
        backward = frames(b, np.random.default_rng(seed))
        assert np.array_equal(forward[::-1], backward)
        assert not np.array_equal(forward, backward)


def test_all_classes_but_the_two_oscillations_have_a_twin():
    assert sorted([*sum(REVERSED_PAIRS, ()), "sway ↔", "bob ↕"]) == sorted(CLASSES)
    assert len(CLASSES) == 12


def test_a_clip_number_draws_the_same_from_the_generator_for_every_class():
    """The look is drawn before the class is used, so that nothing of it can depend on it."""
    shapes, next_draws = set(), set()
    for label in CLASSES:
        rng = np.random.default_rng(3)
        shapes.add(frames(label, rng).shape)
        next_draws.add(float(rng.random()))
    assert len(shapes) == 1
    assert len(next_draws) == 1


def test_files_of_one_number_differ_in_nothing_but_their_motion(dataset):
    seen = collections.defaultdict(set)
    for path in dataset.root.glob("*/*/clip_*"):
        seen[path.parent.parent.name, path.name].add(facts(path))
    assert len(seen) == 6
    assert all(len(kinds) == 1 for kinds in seen.values())
    counts = collections.Counter(path.parent.name for path in dataset.root.glob("*/*/clip_*"))
    assert counts == dict.fromkeys(CLASSES, 6)


def test_the_corners_of_the_first_frame_are_alike_in_all_classes():
    """The backdrop, where no motion reaches, is the same picture whatever the class."""
    corners = {frames(label, np.random.default_rng(1))[:, :6, :6].tobytes() for label in CLASSES}
    assert len(corners) == 1


def grey8(clip_NHWC):
    """Eight centre frames' central squares as 8 x 8 grey levels: [8, 64]."""
    count, height, width = clip_NHWC.shape[:3]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    pictures = []
    for i in range(8):
        frame = Image.fromarray(clip_NHWC[(2 * i + 1) * count // 16])
        square = frame.crop((left, top, left + side, top + side))
        grey = square.convert("L").resize((8, 8), Image.Resampling.BOX)
        pictures.append(np.asarray(grey, dtype=np.float64).ravel())
    return np.stack(pictures)


@pytest.fixture(scope="module")
def drawn():
    """[K, C, 8, 64] for 24 clip numbers of all classes; of twins the second is the first's frames
    from the last one on, as it was found to be above."""
    second = {b: a for a, b in REVERSED_PAIRS}

    def clips(k):
        class_frames = {name: frames(name, np.random.default_rng([9, k])) for name in CLASSES
                        if name not in second}  # fmt: skip
        return [
            grey8(class_frames[second[n]][::-1] if n in second else class_frames[n])
            for n in CLASSES
        ]

    return np.stack([np.stack(clips(k)) for k in range(24)])


def accuracy(feats_KCD, classes):
    """Accuracy of nearest means by cosine, of two thirds of the numbers, on the other third."""
    feats_KCD = feats_KCD[:, [CLASSES.index(name) for name in classes]]
    feats_KCD = feats_KCD / np.linalg.norm(feats_KCD, axis=-1, keepdims=True)
    held_out = np.arange(len(feats_KCD)) % 3 == 2
    means_CD = feats_KCD[~held_out].mean(axis=0)
    means_CD /= np.linalg.norm(means_CD, axis=-1, keepdims=True)
    guessed = (feats_KCD[held_out] @ means_CD.T).argmax(axis=-1)
    return (guessed == np.arange(len(classes))).mean()


def test_frames_in_order_distinguish_all_classes_and_their_mean_does_not(drawn):
    in_order, averaged = drawn.reshape(*drawn.shape[:2], -1), drawn.mean(axis=2)
    assert accuracy(in_order, CLASSES) > 0.9
    assert accuracy(averaged, CLASSES) < 0.6


@pytest.mark.parametrize(("a", "b"), REVERSED_PAIRS)
def test_order_distinguishes_twins_and_the_set_of_frames_is_at_chance(drawn, a, b):
    in_order, averaged = drawn.reshape(*drawn.shape[:2], -1), drawn.mean(axis=2)
    assert accuracy(in_order, (a, b)) > 0.9
    assert 0.2 < accuracy(averaged, (a, b)) < 0.8


def test_the_set_of_frames_distinguishes_the_oscillations(drawn):
    assert accuracy(drawn.mean(axis=2), ("sway ↔", "bob ↕")) > 0.8


def test_sizes_rates_lengths_and_codecs_vary(tmp_path):
    dataset = make_dataset(tmp_path / "set", clips_per_class=30, broken=False, classes=["grow"])
    seen = [facts(path) for path in (dataset.root).glob("*/*/*")]
    codecs, widths, heights, rates, counts = (set(column) for column in zip(*seen, strict=True))
    assert codecs == {"h264", "mpeg4"}
    assert min(widths | heights) >= 128
    assert max(widths | heights) <= 320
    assert any(side % 16 for side in widths)
    assert any(width < height for _, width, height, *_ in seen)
    assert any(width > height for _, width, height, *_ in seen)
    assert len(rates) >= 5
    assert len(counts) >= 15
    seconds = [count / rate for _, _, _, rate, count in seen]
    assert min(seconds) >= 0.9
    assert max(seconds) <= 3.1


def test_equal_seeds_give_equal_bytes_and_others_do_not(tmp_path, dataset):
    known, some = digests(dataset.root), CLASSES[::4]
    again = make_dataset(tmp_path / "again", 6, broken=False, classes=some)
    assert digests(again.root).items() <= known.items()
    other = make_dataset(tmp_path / "other", 2, seed=1, broken=False, classes=some)
    assert not set(digests(other.root).values()) & set(known.values())


def test_no_file_names_the_version_of_the_library_that_wrote_it(dataset):
    for path in dataset.root.glob("*/*/*"):
        written = path.read_bytes()
        assert b"Lavf" not in written
        assert b"Lavc" not in written


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_bytes_do_not_depend_on_previous_contents_of_memory(tmp_path, suffix):
    """With x264's mbtree on, these 166 x 228 frames gave 3 to 8 different files in 8 runs."""
    clip = frames("turn counter-clockwise", np.random.default_rng([0, 12]))
    assert clip.shape[2] % 16
    rng, written = np.random.default_rng(0), set()
    for _ in range(8):
        scraps = [rng.bytes(size) for size in rng.integers(1000, 300_000, size=20).tolist()]
        del scraps
        write_video(tmp_path / f"clip{suffix}", clip, Fraction(25))
        written.add((tmp_path / f"clip{suffix}").read_bytes())
    assert len(written) == 1


def test_a_clip_depends_on_nothing_but_seed_class_and_number(tmp_path, dataset):
    some = make_dataset(tmp_path / "set", clips_per_class=2, classes=["bob ↕", "grow"])
    whole = digests(dataset.root)
    clips = {name: value for name, value in digests(some.root).items() if "clip_" in name}
    assert len(clips) == some.clips == 4
    assert all(whole[name] == value for name, value in clips.items())


def test_all_whole_clips_have_distinct_bytes(dataset):
    clips = [value for name, value in digests(dataset.root).items() if "clip_" in name]
    assert len(set(clips)) == len(clips) == dataset.clips == 72


def test_a_file_shows_the_frames_it_was_encoded_from(tmp_path):
    clip = frames("turn clockwise", np.random.default_rng(0))
    for name in ("clip.mp4", "clip.avi"):
        write_video(tmp_path / name, clip, Fraction(25))
        decoded = np.stack(decode(tmp_path / name))
        assert decoded.shape == clip.shape
        # Codec and colour subsampling cost about 3 levels on average, another frame over 5.
        errors = np.abs(decoded.astype(int) - clip).mean(axis=(1, 2, 3))
        shifted = np.abs(np.roll(decoded, 3, axis=0).astype(int) - clip).mean(axis=(1, 2, 3))
        assert errors.max() < 5
        assert (errors < shifted).all()


def test_the_index_comes_first_where_requested(tmp_path):
    clip = frames("grow", np.random.default_rng(0))[:12]
    for index_first in (True, False):
        write_video(tmp_path / "clip.mp4", clip, Fraction(25), index_first=index_first)
        written = (tmp_path / "clip.mp4").read_bytes()
        assert (written.index(b"moov") < written.index(b"mdat")) is index_first


def test_keyframes_come_as_often_as_requested(tmp_path):
    clip = np.concatenate([frames("sway ↔", np.random.default_rng(0))] * 3)[:36]
    write_video(tmp_path / "clip.mp4", clip, Fraction(25), keyframe_every=8)
    with av.open(str(tmp_path / "clip.mp4"), "r") as container:
        keys = [i for i, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert max(np.diff([*keys, len(clip)])) <= 8


def test_a_data_set_without_broken_files_lists_none(tmp_path):
    dataset = make_dataset(tmp_path / "set", clips_per_class=1, broken=False)
    assert dataset.broken == ()
    assert broken_files(dataset.root) == []
    assert len(list(dataset.root.glob("*/*/*"))) == dataset.clips == len(CLASSES)


def test_broken_files_are_listed_with_their_reasons(dataset):
    listed = broken_files(dataset.root)
    assert tuple(listed) == dataset.broken
    assert {path.stem: reason for path, reason in listed} == {
        stem: corruption.reason for stem, corruption in CORRUPTIONS.items()
    }
    assert {reason for _, reason in listed} <= {*REASONS, ""}
    assert {path.parent.parent.name for path, _ in listed} == {"train", "test"}


def test_each_broken_file_is_broken_by_the_listed_reason(dataset):
    spoilt = {path.stem: path for path, _ in dataset.broken}

    assert spoilt["empty"].stat().st_size == 0
    for stem in ("text", "no index"):
        with pytest.raises(av.error.InvalidDataError):
            av.open(str(spoilt[stem]), "r")
    with av.open(str(spoilt["sound only"]), "r") as container:
        assert not container.streams.video
        assert sum(frame.samples for frame in container.decode(audio=0)) >= 16_000

    beside = [path for path in spoilt["duplicate"].parent.iterdir() if path.stem != "duplicate"]
    assert spoilt["duplicate"].read_bytes() in [path.read_bytes() for path in beside]


@pytest.mark.parametrize(
    ("stem", "share"), [("cut short", (0.4, 0.7)), ("garbage inside", (0.2, 0.7))]
)
def test_a_file_with_corrupt_data_still_promises_every_frame(dataset, stem, share):
    (path,) = (path for path, _ in dataset.broken if path.stem == stem)
    with av.open(str(path), "r") as container:
        stream = container.streams.video[0]
        times, refused = [], 0
        for packet in container.demux(stream):
            try:
                times += [frame.pts for frame in packet.decode()]
            except av.error.InvalidDataError:
                refused += 1
        promised = stream.frames
    original = path.with_name("clip_000.mp4")
    assert promised == facts(original)[-1]
    assert refused > 0
    assert share[0] < len(set(times)) / promised < share[1]


def test_spoiling_is_a_function_of_the_bytes(dataset):
    whole = (dataset.root / "train" / "grow" / "clip_000.mp4").read_bytes()
    spoilt = {stem: corruption.apply(whole) for stem, corruption in CORRUPTIONS.items()}
    assert spoilt == {stem: corruption.apply(whole) for stem, corruption in CORRUPTIONS.items()}
    assert len(set(spoilt.values())) == len(CORRUPTIONS)


def test_an_unknown_class_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"no class 'jump'; choose from move right"):
        frames("jump", np.random.default_rng(0))
    for classes in (["grow", "jump"], ["grow", "grow"], []):
        with pytest.raises(ValueError, match="must be distinct ones of"):
            make_dataset(tmp_path, classes=classes)
    with pytest.raises(ValueError, match="at least one clip"):
        make_dataset(tmp_path, clips_per_class=0)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_a_data_set_is_not_changed(dataset):
    before = digests(dataset.root)
    with pytest.raises(FileExistsError, match="remove it or write into another folder"):
        make_dataset(dataset.root, clips_per_class=1)
    assert digests(dataset.root) == before


def test_other_containers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"choose from \.mp4, \.avi"):
        write_video(tmp_path / "clip.webm", np.zeros((1, 128, 128, 3), np.uint8), Fraction(25))


def test_the_generator_is_light_to_import():
    module = "varve.pipeline.datasets.synthetic"
    code = f"import sys, {module}; print('torch' in sys.modules, 'dask' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert synthetic.__doc__


def test_classes_of_audio_have_equal_frames_to_the_bit_and_different_audio():
    looks = {label: frames(label, np.random.default_rng(3)) for label in ("sway ↔", *AUDIO_CLASSES)}
    assert all(np.array_equal(look, looks["sway ↔"]) for look in looks.values())
    sounds = {
        name: waveform(name, 2.0, np.random.default_rng(5)) for name in ("bob ↕", *AUDIO_CLASSES)
    }
    assert all(x.shape == (2 * RATE,) and np.abs(x).max() <= 1 for x in sounds.values())
    # What is drawn is the clip's and not the class's: without its tone, each is the same noise.
    assert np.array_equal(sounds["bob ↕"], waveform("move up", 2.0, np.random.default_rng(5)))
    quiet = sounds["bob ↕"]
    tones = {name: x - quiet for name, x in sounds.items()}
    np.testing.assert_allclose(
        tones["sway, rising tone"], tones["sway, falling tone"][::-1], atol=2e-6
    )
    assert all(np.abs(tones[name]).max() > 0.2 for name in AUDIO_CLASSES)


def test_a_data_set_with_sound_has_a_track_in_every_file(tmp_path):
    first, second = (
        make_dataset(tmp_path / name, 2, broken=False, classes=("grow", "sway, hum"), sound=True)
        for name in "ab"
    )
    assert first.clips == 4
    for path in sorted(first.root.glob("*/*/*.*")):
        with av.open(str(path)) as container:
            (track,) = container.streams.audio
            assert track.codec_context.sample_rate == RATE
        assert path.read_bytes() == (second.root / path.relative_to(first.root)).read_bytes()
    with pytest.raises(ValueError, match="sway, hum"):
        make_dataset(tmp_path / "c", 1, classes=("sway, hum",))
