"""Format quantities and names for people: seconds, bytes, file names."""

import unicodedata


def clock(seconds: float) -> str:
    """Return seconds as text.

    >>> clock(42.4), clock(75), clock(7322)
    ('42 s', '1 min 15 s', '2 h 02 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(num_bytes: float) -> str:
    """Return bytes as text, in powers of ten.

    >>> size(999), size(2_420_736), size(23e9)
    ('999 B', '2.42 MB', '23 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def printable(text: str, keep: str = "") -> str:
    r"""Return text in which characters that steer a terminal, or begin a line, are escaped.

    Those are the control characters, marks that turn the direction of writing, separators of lines,
    and halves of characters, which no terminal can print.

    Args:
        text: A file name, or a message that has some in it.
        keep: Characters to leave as they are, such as a newline.

    >>> printable("a\nb\x1b[2J \u202ec\ufeff")
    'a\\nb\\x1b[2J \\u202ec\\ufeff'
    """
    return "".join(
        c if c in keep or unicodedata.category(c) not in _ESCAPED else ascii(c)[1:-1] for c in text
    )


_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")
