"""Pickles that contain data alone. Nothing in a pickle is run; whatever is no data is refused."""

import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

_DATA: dict[str, type] = {
    **{f"builtins.{kind.__name__}": kind for kind in (dict, list, tuple, set, frozenset)},
    **{f"builtins.{kind.__name__}": kind for kind in (str, int, float, bool)},
    **{f"collections.{kind.__name__}": kind for kind in (OrderedDict, defaultdict)},
}


class _NotData(pickle.UnpicklingError):
    """A pickle names a class or a function that is no data."""


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full not in _DATA:
            raise _NotData(full)
        return _DATA[full]


def read_pickle(path: Path) -> Any:
    """Read a pickle of containers, strings and numbers.

    Raises:
        ValueError: It names anything else, or is no pickle.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        try:
            return _DataUnpickler(file, encoding="utf-8").load()
        except _NotData as error:
            raise ValueError(
                f"{path} holds {error}, which is no list, dict, text or number, and is not run: "
                "save it as JSON"
            ) from None
        except OSError:
            raise
        except Exception as error:  # damaged pickles cause errors of all kinds
            raise ValueError(f"{path} is no pickle, or is damaged; save it as JSON") from error
