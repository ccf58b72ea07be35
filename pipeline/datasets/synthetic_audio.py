"""Audio of the synthetic dataset, made from a seed; see `varve.pipeline.datasets.synthetic`.

Classes that differ by their audio alone, over t from 0 to 1:

    sway, rising tone     a tone that rises by two octaves
    sway, falling tone    the same played backwards: another order, the same set of samples
    sway, beeps           a tone, on and off
    sway, hum             a tone and its harmonics, far below

All other clips have noise only, that of the clip's number. Loudness, pitch and noise depend on the
number and not on the class. Light to import (numpy).
"""

from collections.abc import Callable

import numpy as np

RATE = 16000


def _tone(hertz_N: np.ndarray) -> np.ndarray:
    return np.asarray(np.sin(2 * np.pi * np.cumsum(hertz_N) / RATE))


def _rising(t_N: np.ndarray, pitch: float) -> np.ndarray:
    return _tone(pitch * 4.0**t_N)


def _falling(t_N: np.ndarray, pitch: float) -> np.ndarray:
    return _rising(t_N, pitch)[::-1]


def _beeps(t_N: np.ndarray, pitch: float) -> np.ndarray:
    seconds_N = np.arange(len(t_N)) / RATE
    return _tone(np.full(len(t_N), 2 * pitch)) * (seconds_N % 0.2 < 0.1)


def _hum(t_N: np.ndarray, pitch: float) -> np.ndarray:
    low = np.full(len(t_N), pitch / 4)
    return np.asarray(sum(_tone(low * n) / n for n in (1, 2, 3)) / 2)


SIGNALS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "sway, rising tone": _rising,
    "sway, falling tone": _falling,
    "sway, beeps": _beeps,
    "sway, hum": _hum,
}


def waveform(label: str, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the audio of one clip of a class: float32 [N] in [-1, 1], mono at `RATE`."""
    t_N = np.linspace(0, 1, round(seconds * RATE))
    pitch, loudness = rng.uniform(300, 500), rng.uniform(0.3, 0.8)
    wave_N = 0.02 * rng.standard_normal(len(t_N))
    if label in SIGNALS:
        wave_N = wave_N + loudness * SIGNALS[label](t_N, pitch)
    clipped_N: np.ndarray = wave_N.clip(-1, 1).astype(np.float32)
    return clipped_N
