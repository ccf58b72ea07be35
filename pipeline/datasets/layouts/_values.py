"""Values that a layout returns: the clips of a dataset."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ListedClip:
    """One clip as the dataset lists it.

    Attributes:
        path: Path of a video file or a folder of frames, relative to the root of the listing, with
            forward slashes.
        label: Name of the class, with whatever characters.
        split: Name of the part of the dataset ("train", "test"...); "" for none.
        start_seconds: Start of the clip on the clock of its file, whose earliest stream, video or
            audio, starts at 0; None for the start of the file.
        end_seconds: End of the clip in its file; None for the end of the file.
    """

    path: str
    label: str
    split: str = ""
    start_seconds: float | None = None
    end_seconds: float | None = None


@dataclass(frozen=True)
class Listing:
    """All clips of a dataset, in a stable order.

    Attributes:
        clips: The clips.
        classes: The labels in the dataset's own order (a class index file, else sorted). Class
            orders of published scenarios are permutations of it.
        layout: Name of the layout.
        summary: What was read and what was left out, for a person.
        root: Directory that paths are relative to: the dataset's, or that of a list file.
        left_out: Number of files that are no clip, by kind (videos, pictures, an extension), the
            most frequent first. `read` counts them; a layout adds kinds of its own. Empty for a
            list that is named itself: it chooses the files.
    """

    clips: tuple[ListedClip, ...]
    classes: tuple[str, ...]
    layout: str
    summary: str
    root: Path
    left_out: tuple[tuple[str, int], ...] = ()
