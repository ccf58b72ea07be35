"""Weight files on disk: what a file is, by its bytes, and its objects without running code.

A file of `torch.save` is read by torch's restricted unpickler. Besides tensors and containers it
may hold options (`argparse.Namespace`) and numpy's numbers, which contain no code.
"""

import argparse
import re
import threading
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

HEAD_BYTES = 512
MOST_NAMES = 4  # in a message
AGAIN = "download or copy it again"
PLAIN = (
    "save the weights alone, once, where it was made: torch.save(model.state_dict(), 'weights.pt')"
)
_READING = threading.Lock()  # torch's list of safe classes belongs to the whole process

# By first bytes: what a file is that contains no weights, and what to do.
_OTHER_FILES = (
    (
        b"version https://git-lfs",
        "a pointer of git-lfs and not the file itself; run `git lfs pull`",
    ),
    (b"\x1f\x8b", "compressed by gzip; unpack it"),
    (b"BZh", "compressed by bzip2; unpack it"),
    (b"\xfd7zXZ", "compressed by xz; unpack it"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it; convert it to safetensors"),
    (b"\x93NUMPY", "a numpy array; convert it to safetensors"),
)


def read_objects(file: Path) -> object:
    """Read the objects of a weight file, onto the CPU. No code in it is run.

    Raises:
        ValueError: It is no weight file, or contains more than data; the message says what it is.
    """
    with file.open("rb") as opened:
        head = opened.read(HEAD_BYTES)
    if other := _other_file(head):
        raise ValueError(f"{file} is {other}")
    if file.suffix.lower() == ".safetensors":
        return _read_safetensors(file, head)
    return _read_pickle(file, head)


def _other_file(head: bytes) -> str:
    """Return what a file without weights is, by its first bytes, and what to do; "" for others."""
    if not head:
        return f"empty (0 bytes); {AGAIN}"
    if _is_safetensors(head):
        return ""
    if known := next((text for first, text in _OTHER_FILES if head.startswith(first)), ""):
        return known
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return f"a web page and not the file itself; {AGAIN}, after a login where one is needed"
    if len(head) > 8 and all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return f"text and not weights, and begins {_shown(head)!r}; {AGAIN}"
    return ""


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{"  # after the length of the header


def _shown(head: bytes) -> str:
    return head[:40].decode("utf-8", "replace").strip()


def _read_safetensors(file: Path, head: bytes) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        if head.startswith((b"PK", b"\x80")) and not _is_safetensors(head):
            raise ValueError(f"{file} is a file of torch.save; name it .pt") from error
        raise ValueError(
            f"{file} cannot be read as safetensors, or is cut off ({error}); {AGAIN}"
        ) from error


def _read_pickle(file: Path, head: bytes) -> object:
    if _is_safetensors(head):
        raise ValueError(f"{file} is a file of safetensors; name it .safetensors")
    if head.startswith(b"PK"):
        _check_archive(file)
    try:
        with _READING, safe_globals(_DATA), warnings.catch_warnings(action="ignore"):
            state: object = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files cause errors that nobody foresaw
        # Torch's own messages are of many lines, and advise to run the code in the file.
        raise ValueError(f"{file} {_refusal(file, head, error)}") from error
    return state


def _check_archive(file: Path) -> None:
    """Refuse archives other than those of `torch.save`."""
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is cut off: the index at its end is missing; {AGAIN}")
    with zipfile.ZipFile(file) as archive:
        names = {Path(entry).name for entry in archive.namelist()}
    if "constants.pkl" in names:
        raise ValueError(
            f"{file} is a TorchScript archive: a program beside its weights, which is not "
            "run. Save the weights alone, once: "
            "torch.save(torch.jit.load(PATH, 'cpu').state_dict(), 'weights.pt')"
        )
    if "data.pkl" not in names:
        raise ValueError(f"{file} is a zip archive without weights of torch.save; unpack it")


def _refusal(file: Path, head: bytes, error: Exception) -> str:
    """Return what a file is that torch refuses to read, and what to do."""
    classes = _classes(file, error)
    if any(re.match(r"torch\.nn\.modules\.", name) for name in classes):
        own_classes = [name for name in classes if not name.startswith("torch.")] or classes
        return f"is a whole pickled network ({_some(own_classes)}): code, which is not run; {PLAIN}"
    if classes:
        return (
            f"holds Python objects beside its tensors ({_some(classes)}), which could run code; "
            f"{PLAIN}"
        )
    if "EOF" in str(error) or head.startswith(b"PK"):
        return f"is cut off or damaged; {AGAIN}"
    return f"is no file of torch.save, or is damaged; {AGAIN}, or {PLAIN}"


def _classes(file: Path, error: Exception) -> list[str]:
    """Return the names of the classes and functions in a file that are no data."""
    try:
        with _READING, safe_globals(_DATA):
            return sorted(set(get_unsafe_globals_in_checkpoint(file)))
    except Exception:  # a file of the form before torch 1.6, or a damaged one
        return re.findall(r"GLOBAL ([\w.]+)", str(error))


def _some(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _data() -> list[Any]:
    """Return the classes and functions that a file may name: they contain data alone."""
    scalar = np.float64(0).__reduce__()[0]
    numbers = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}
    return [
        *(argparse.Namespace, np.dtype, *numbers),
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    ]


_DATA = _data()
