"""Audio: the samples around each frame, and audio backbones in a store."""

import shutil
import subprocess
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from varve.pipeline import backbones
from varve.pipeline.config import BuildSpec, FrameSet, Runtime, Sound
from varve.pipeline.datasets.synthetic import make_dataset, write_video
from varve.pipeline.decoders import Request, Stretch, _audio, _child, _index, decode
from varve.pipeline.experiments import head_inputs
from varve.pipeline.extraction.build import build
from varve.pipeline.extraction.verify import verify
from varve.stores import FeatureStore, SpecMismatch

pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")
RATE, FPS, FRAMES = 16000, 25, 60
AUDIO = FrameSet(frames=4, picture=Sound())
SEEN = FrameSet(frames=4)
SPEC = BuildSpec(("mel_resnet18:random-0", "resnet18:random-0"), ("mel", "pool"), frames=1)


def decode_audio(path, *stretches, frame_set=AUDIO):
    return decode(Request(str(path), stretches or (Stretch(),), (frame_set,)))


def mux(path, codec, samples_CN, rate, late_seconds=0.0, gap=None, late_frames=0, **options):
    """A video of 60 frames with a track that begins late, or leaves out [a, b) seconds.

    The frames begin `late_frames` frames after the file.
    """
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        layout = "mono" if len(samples_CN) == 1 else "stereo"
        track = container.add_stream(codec, rate=rate, layout=layout)
        for number in range(FRAMES):
            picture = np.full((48, 64, 3), 4 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = number + late_frames, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        step = rate // 50
        for first in range(0, samples_CN.shape[1], step):
            if gap and gap[0] <= first / rate < gap[1]:
                continue
            part = np.ascontiguousarray(samples_CN[:, first : first + step], np.float32)
            frame = av.AudioFrame.from_ndarray(part, "fltp", layout)
            frame.sample_rate = rate
            frame.time_base = Fraction(1, rate)
            frame.pts = first + round(late_seconds * rate)
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return path


def steps(seconds=2.4):
    """Samples of which each is known by its value, to a 16-bit step."""
    return (np.arange(round(seconds * RATE)) % 20000 / 32768).astype(np.float32)


def around(track_N, frame, frames=FRAMES, low=0, high=np.inf):
    """Cut by hand one second with the middle of the frame's time in its middle."""
    middle = round((frame + 0.5) / FPS * RATE)
    out = np.zeros(RATE, np.float32)
    for i, sample in enumerate(range(middle - RATE // 2, middle + RATE // 2)):
        if max(0, low) <= sample < min(len(track_N), high):
            out[i] = track_N[sample]
    return out


def test_each_frame_has_the_second_around_it_to_the_sample(tmp_path):
    path, track_N = tmp_path / "a.avi", steps()
    shown = np.zeros((FRAMES, 48, 64, 3), np.uint8)
    write_video(path, shown, Fraction(FPS), audio_N=track_N)
    (answer,) = decode_audio(path)
    assert (answer.facts.warning, answer.facts.sound) == ("", "")
    assert answer.frames[0].dtype == np.float32
    for row, frame in enumerate((7, 22, 37, 52)):
        np.testing.assert_array_equal(answer.frames[0][row], around(track_N, frame))


def test_pictures_and_sounds_of_a_file_come_together_and_alone_alike(tmp_path):
    path = tmp_path / "a.avi"
    shown = np.random.default_rng(0).integers(0, 256, (FRAMES, 48, 64, 3), np.uint8)
    write_video(path, shown, Fraction(FPS), audio_N=steps())
    (both,) = decode(Request(str(path), (Stretch(),), (SEEN, AUDIO)))
    (seen,), (audio,) = decode_audio(path, frame_set=SEEN), decode_audio(path)
    np.testing.assert_array_equal(both.frames[0], seen.frames[0])
    np.testing.assert_array_equal(both.frames[1], audio.frames[0])
    # Two rates: the track is decoded for each.
    slow = replace(AUDIO, picture=Sound(rate=8000))
    (rates,) = decode(Request(str(path), (Stretch(),), (AUDIO, slow)))
    np.testing.assert_array_equal(rates.frames[0], audio.frames[0])
    np.testing.assert_array_equal(rates.frames[1], decode_audio(path, frame_set=slow)[0].frames[0])


def test_a_clip_has_no_audio_of_its_neighbours(tmp_path):
    path, track_N = tmp_path / "a.avi", steps()
    write_video(path, np.zeros((FRAMES, 48, 64, 3), np.uint8), Fraction(FPS), audio_N=track_N)
    parts = (Stretch(0.0, 1.2), Stretch(1.2, 2.4), Stretch())
    first, second, whole = decode_audio(path, *parts)
    for answer, start, (low, high) in (
        (first, 0, (0, 19200)), (second, 30, (19200, 38400)), (whole, 0, (0, 38400))
    ):  # fmt: skip
        count = 60 if answer is whole else 30
        for row in range(4):
            frame = start + (2 * row + 1) * count // 8
            expected = around(track_N, frame, low=low, high=high)
            np.testing.assert_array_equal(answer.frames[0][row], expected)


def test_missing_audio_is_silent_and_reported(tmp_path, encode):
    silent = encode(tmp_path / "none.mp4", "libx264")
    (answer,) = decode_audio(silent)
    assert not answer.frames[0].any()
    assert answer.facts.sound == "no track, replaced by silence"
    short = mux(tmp_path / "short.mkv", "pcm_s16le", steps(0.6)[None], RATE)
    start, end = decode_audio(short, Stretch(0.0, 1.2), Stretch(1.2, 2.4))
    assert start.facts.sound == ""
    assert start.frames[0][0].any()
    assert end.facts.sound == "none at 4 of 4 moments"
    (whole,) = decode_audio(short)
    assert whole.facts.sound == "none at 2 of 4 moments"
    mute = mux(tmp_path / "mute.mkv", "pcm_s16le", 0 * steps()[None], RATE)
    assert decode_audio(mute)[0].facts.sound == "nothing but silence"
    assert not end.frames[0].any()


def test_samples_of_a_track_have_the_times_of_the_file(tmp_path):
    track_N = steps()
    late = mux(tmp_path / "late.mkv", "pcm_s16le", track_N[None], RATE, late_seconds=0.5)
    shifted_N = np.concatenate([np.zeros(RATE // 2, np.float32), track_N])
    (answer,) = decode_audio(late)
    for row, frame in enumerate((7, 22, 37, 52)):
        expected = around(shifted_N, frame, high=FRAMES * RATE // FPS)
        np.testing.assert_array_equal(answer.frames[0][row], expected)
    holed_N = track_N.copy()
    holed_N[RATE : RATE * 3 // 2] = 0
    holed = mux(tmp_path / "holed.mkv", "pcm_s16le", track_N[None], RATE, gap=(1.0, 1.5))
    (answer,) = decode_audio(holed)
    for row, frame in enumerate((7, 22, 37, 52)):
        cut, expected = answer.frames[0][row], around(holed_N, frame)
        assert (cut == expected).mean() > 0.999  # libswresample fades in at the gap's end


def samples_of(path):
    window = _audio.Window(0, 2 * RATE, 0, np.inf)
    index = _index.read(str(path), audio=True)
    return index.source.read_audio(RATE, index.start_seconds, [window]).samples[window]


def pulse(rate):
    """A short rising tone in the middle of two seconds, on both channels."""
    t_N = np.arange(2 * rate) / rate
    tone_N = np.sin(2 * np.pi * (300 * t_N + 400 * t_N**2)) * np.exp(-(((t_N - 1) / 0.05) ** 2))
    return np.stack([0.5 * tone_N, 0.5 * tone_N])


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("a.mp4", "aac", 44100), ("a.mkv", "libmp3lame", 48000), ("a.mp4", "libmp3lame", 48000),
     ("b.mkv", "libopus", 48000), ("a.avi", "pcm_s16le", 22050)],
)  # fmt: skip
def test_what_a_codec_puts_before_a_track_delays_nothing(tmp_path, name, codec, rate):
    decoded, original = samples_of(mux(tmp_path / name, codec, pulse(rate), rate)), pulse(RATE)[0]
    spectra = [np.fft.rfft(x, 4 * RATE) for x in (decoded, original)]
    together = np.fft.irfft(spectra[0] * spectra[1].conj())
    assert int(together.argmax()) == 0
    assert np.abs(decoded - original).max() < 0.05


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_the_clock_of_the_frames_is_that_of_the_sound(tmp_path, rate):
    """Recordings begin at some time of day, here at 5 seconds."""
    path = mux(tmp_path / "a.mkv", "pcm_s16le", pulse(rate), rate, output_ts_offset="5")
    index = _index.read(str(path), audio=True)
    assert index.start_seconds > 4.9
    decoded = samples_of(path)
    assert np.abs(decoded - pulse(RATE)[0]).max() < 0.02


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_a_track_that_starts_before_the_frames_is_heard_at_the_times_of_the_file(tmp_path, name):
    """The sound is a pulse at 1 s, where the first frame is shown."""
    path = mux(tmp_path / name, "mp2", pulse(RATE), RATE, late_frames=FPS)
    first, second, whole = decode_audio(path, Stretch(0.9, 1.4), Stretch(1.4, 1.9), Stretch())
    for answer, frames in ((first, [1, 3, 6, 8]), (whole, [7, 22, 37, 52])):
        for row, frame in enumerate(frames):
            expected = around(np.pad(pulse(RATE)[0], (0, RATE)), frame + FPS)
            if answer is first:
                middle = round((1 + (frame + 0.5) / FPS) * RATE)
                cut = np.arange(middle - RATE // 2, middle + RATE // 2)
                expected[(cut < 0.9 * RATE) | (cut >= 1.4 * RATE)] = 0
            assert np.abs(answer.frames[0][row] - expected).max() < 0.06
    assert np.abs(second.frames[0]).max() < 0.06


def test_a_track_that_changes_its_format_is_read_to_its_end(tmp_path):
    parts = [mux(tmp_path / f"{rate}.ts", "mp2", pulse(rate), rate, output_ts_offset=str(late))
             for rate, late in ((44100, 0), (48000, 3))]  # fmt: skip
    both = tmp_path / "both.ts"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    window = _audio.Window(0, 6 * RATE, 0, np.inf)
    index = _index.read(str(both), audio=True)
    samples = index.source.read_audio(RATE, index.start_seconds, [window]).samples[window]
    loud = np.flatnonzero(np.abs(samples) > 0.3) / RATE
    assert loud.min() == pytest.approx(1, abs=0.15)
    assert loud.max() == pytest.approx(4, abs=0.15)


def test_frames_far_apart_are_each_shown_for_their_time(tmp_path, encode):
    ticks = [40 * n + 3000 * (n >= 5) for n in range(10)]
    path = encode(tmp_path / "a.mkv", "libx264", frames=10, ticks=ticks)
    answer = _child._FileReader(Request(str(path), (Stretch(),), (AUDIO,)), _index.read(str(path)))
    windows = [answer.window(Sound(), Stretch(), number) for number in range(10)]
    middles = [(window.begin + RATE // 2) / RATE for window in windows]
    expected = [0.02, 0.06, 0.1, 0.14, 1.68, 3.22, 3.26, 3.3, 3.34, 3.38]
    np.testing.assert_allclose(middles, expected, atol=2e-3)
    assert {window.high for window in windows} == {round(3.4 * RATE)}


def damaged(path, codec, rate):
    """A file whose packets of sound are noise from the twentieth on."""
    whole = mux(path.with_name(f"whole_{path.name}"), codec, pulse(rate), rate)
    rng = np.random.default_rng(0)
    with av.open(str(whole)) as old, av.open(str(path), "w") as new:
        copies = {s.index: new.add_stream_from_template(s) for s in old.streams}
        count = 0
        for packet in old.demux():
            if not packet.size:
                continue
            written = packet
            if packet.stream.type == "audio":
                count += 1
                if count > 20:
                    written = av.Packet(rng.integers(0, 256, packet.size, np.uint8).tobytes())
                    written.pts, written.dts, written.time_base = (
                        packet.pts,
                        packet.dts,
                        packet.time_base,
                    )
            written.stream = copies[packet.stream_index]
            new.mux(written)
    return path


@pytest.mark.parametrize("codec", ["aac", "libmp3lame", "alac"])
def test_a_damaged_track_loses_no_picture_and_is_reported(tmp_path, codec):
    path = damaged(tmp_path / "a.mkv", codec, 44100)
    (seen,) = decode(Request(str(path), (Stretch(),), (SEEN,)))
    (both,) = decode(Request(str(path), (Stretch(),), (SEEN, AUDIO)))
    np.testing.assert_array_equal(both.frames[0], seen.frames[0])
    assert "could not be decoded" in both.facts.sound or "none at" in both.facts.sound
    assert np.isfinite(both.frames[1]).all()


def test_numbers_that_are_not_finite_are_silent_and_reported(tmp_path):
    samples = steps()[None].copy()
    samples[:, RATE:] = np.nan
    (answer,) = decode_audio(mux(tmp_path / "a.mkv", "pcm_f32le", samples, RATE))
    assert np.isfinite(answer.frames[0]).all()
    assert "could not be decoded" in answer.facts.sound


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize(("codec", "rate"), [("pcm_s16le", 22050), ("libmp3lame", 44100)])
def test_samples_are_those_of_ffmpeg(tmp_path, codec, rate):
    path = mux(tmp_path / "a.avi", codec, pulse(rate), rate)
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-vn", "-af",
               f"aresample={RATE}:async=1:first_pts=0:ochl=mono:osf=flt:rematrix_maxval=1",
               "-f", "f32le", "-"]  # fmt: skip
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    expected = np.frombuffer(raw, np.float32)[: 2 * RATE]
    # To a bit of 16 where the codec's arithmetic is another release's.
    np.testing.assert_allclose(samples_of(path)[: len(expected)], expected, atol=2**-16)


@pytest.fixture(scope="module")
def sounding(tmp_path_factory):
    """Videos with sound, and one without; a store of what two networks make of them."""
    folder = tmp_path_factory.mktemp("sounding")
    classes = ("sway ↔", "sway, hum")
    make_dataset(folder / "set", 1, broken=False, classes=classes, sound=True)
    mute = folder / "set" / "train" / "sway ↔" / "mute.avi"
    write_video(mute, np.zeros((12, 64, 64, 3), np.uint8), Fraction(10))
    report = build(folder / "set", folder / "s.zarr", SPEC, runtime=Runtime(serial=True))
    return folder, report


def test_an_audio_backbone_is_a_column_like_any_other(sounding):
    folder, report = sounding
    assert (report.decoded, report.clips) == (3, {"ready": 3})
    store = FeatureStore.open(folder / "s.zarr")
    mel = store.feature("mel_resnet18:random-0", "mel")
    pool = store.feature("mel_resnet18:random-0", "pool")
    assert mel.shape == (3, 1, 1, 64, 98)
    assert pool.spec["pixels"] == "mono float32, libswresample, 3"
    network = backbones.load("mel_resnet18:random-0")
    for row, clip in store.clips.iterrows():
        (answer,) = decode_audio(folder / "set" / clip["path"], frame_set=replace(AUDIO, frames=1))
        with torch.inference_mode():
            expected = network.run(torch.from_numpy(answer.frames[0]), ["pool"])["pool"]
        np.testing.assert_allclose(pool.read([row])[0], expected, atol=2e-3, rtol=2e-3)
        silent = clip["path"].endswith("mute.avi")
        problem = "no track, replaced by silence"
        assert clip["audio"] == (problem if silent else "")
        assert clip["detail"] == (f"audio: {problem}" if silent else "")
        assert (np.ptp(mel.read([row])) == 0) == silent
    again = build(folder / "set", folder / "s.zarr", SPEC, runtime=Runtime(serial=True))
    assert (again.decoded, again.computed) == (0, 0)


def test_facts_of_a_track_outlive_a_build_without_audio(sounding, tmp_path):
    folder, _ = sounding
    shutil.copytree(folder, tmp_path / "copy")
    more = BuildSpec(("resnet18:random-0",), ("layer1.0:pool",), frames=2)
    build(tmp_path / "copy/set", tmp_path / "copy/s.zarr", more, runtime=Runtime(serial=True))
    table = FeatureStore.open(tmp_path / "copy/s.zarr").clips
    table = table.set_index("path")
    mute, rest = table.loc["train/sway ↔/mute.avi"], table.drop("train/sway ↔/mute.avi")
    assert mute["detail"] == "audio: no track, replaced by silence"
    assert set(rest["detail"]) == {""}


def test_stored_sounds_are_verified_as_pictures_are(sounding):
    folder, _ = sounding
    report = verify(folder / "s.zarr", sample=2)
    assert not report.findings
    assert report.equal == 6


def test_audio_features_of_a_head_are_chosen_by_name(sounding):
    store = FeatureStore.open(sounding[0] / "s.zarr")
    name = head_inputs.choose_backbone(store, "")
    assert name == "resnet18:random-0"
    features = head_inputs.find_features(
        store, name, ["vector", "sound", "mel_resnet18:random-0/mel"]
    )
    backbones_and_names = [(feature.backbone, feature.name) for feature in features.values()]
    mel = "mel_resnet18:random-0"
    assert backbones_and_names == [("resnet18:random-0", "pool"), (mel, "pool"), (mel, "mel")]
    with pytest.raises(ValueError, match="0 of those of"):
        head_inputs.find_features(store, name, ["resnet34/pool"])


def test_for_a_store_without_audio_the_command_is_named(dataset, built_once):
    spec = BuildSpec(("resnet18:random-0",), ("layer1.0:pool",), frames=2)
    store = FeatureStore.open(built_once(dataset(("grow",), 1), spec))
    with pytest.raises(SpecMismatch, match="no audio backbone"):
        head_inputs.find_features(store, "resnet18:random-0", ["sound"])
