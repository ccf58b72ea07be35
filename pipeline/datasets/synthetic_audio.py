"""Sounds of the small labelled data set, made from a seed; see `varve.pipeline.datasets.synthetic`.

What is heard in a clip whose class is told by its sound alone, over t from 0 to 1:

    sway, rising tone     a tone that goes up by two octaves    in order, not as a set of moments,
    sway, falling tone    the same played backwards             one or the other
    sway, beeps           a tone, on and off
    sway, hum             a tone and its harmonics, far below

In all other clips there is noise, that of the clip's number. Loudness, pitch and noise depend on
the number and not on the class.

Light to import (numpy).
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


SOUNDS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "sway, rising tone": _rising,
    "sway, falling tone": _falling,
    "sway, beeps": _beeps,
    "sway, hum": _hum,
}


def sound(label: str, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Draw what is heard in one clip of a class: float32 [N] in [-1, 1], mono at `RATE`."""
    t_N = np.linspace(0, 1, round(seconds * RATE))
    pitch, loudness = rng.uniform(300, 500), rng.uniform(0.3, 0.8)
    noise_N = 0.02 * rng.standard_normal(len(t_N))
    if label in SOUNDS:
        noise_N = noise_N + loudness * SOUNDS[label](t_N, pitch)
    heard_N: np.ndarray = noise_N.clip(-1, 1).astype(np.float32)
    return heard_N
