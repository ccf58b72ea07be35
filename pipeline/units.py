"""Format quantities for people: seconds and bytes."""


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
