"""Digests of specifications: canonical JSON and its SHA-256. Equal values give equal bytes."""

import hashlib
import json
import math
from pathlib import PurePath
from typing import Any

WEIGHT_FILES = (".safetensors", ".pt", ".pth")


def canonical(value: Any) -> bytes:
    """Return a value as JSON with sorted keys and no spaces.

    Accepts the values that JSON represents exactly: dicts with string keys, lists, strings,
    booleans, None, integers and finite floats. A tuple is written as a list. An integral float is
    written as a float, so that 1 and 1.0 differ.

    Raises:
        TypeError: The value contains anything else (a numpy scalar, a set, a NaN); the message
            gives its path.

    >>> canonical({"b": (1, 2.5), "a": None})
    b'{"a":null,"b":[1,2.5]}'
    """
    _check(value, "$")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON, as 64 hexadecimal digits.

    >>> digest({"frames": 8})[:12]
    '98d992ecb8c9'
    """
    return hashlib.sha256(canonical(value)).hexdigest()


def store_name(name: str) -> str:
    """Return the name of the backbone NETWORK:WEIGHTS in a store.

    A weight file becomes its stem, and a folder that begins with "/", "." or "~" its own name. The
    repository of a hub (`hf-hub:owner/name`) stays whole.

    >>> store_name("resnet18:/data/resnet18-imagenet1k.safetensors"), store_name("ViT-B-16:openai")
    ('resnet18:resnet18-imagenet1k', 'ViT-B-16:openai')
    """
    network, _, weights = name.partition(":")
    if weights.lower().endswith(WEIGHT_FILES):
        weights = PurePath(weights).stem
    elif weights.startswith(("/", ".", "~")):
        weights = PurePath(weights).name
    return f"{network}:{weights}"


def _check(value: Any, path: str) -> None:
    if value is None or type(value) in (bool, int, str):
        return
    if type(value) is float:
        if math.isfinite(value):
            return
    elif type(value) is dict:
        for key, inner in value.items():
            if type(key) is not str:
                raise TypeError(f"{path}: the key {key!r} is no string")
            _check(inner, f"{path}.{key}")
        return
    elif type(value) in (list, tuple):
        for i, inner in enumerate(value):
            _check(inner, f"{path}[{i}]")
        return
    raise TypeError(f"{path}: {value!r} ({type(value).__name__}) has no exact JSON form")
