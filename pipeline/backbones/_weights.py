"""Parameters of a network: from a weight file, a seed, or a published tag.

A file or a tag ends in `fill`, which accepts a state of exactly the network's own names and shapes;
a seed ends in a seeded construction. Nothing here falls back on another source.
"""

import difflib
import hashlib
import logging
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from varve.pipeline.backbones._weight_files import read_objects
from varve.stores.digests import WEIGHT_FILES

CONNECT_SECONDS = 5.0
# Entries of a training checkpoint that contain the network, the first choice first.
WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "network", "net"),
    *("model_ema", "state_dict_ema", "ema", "teacher", "student"),
)
# Names of the attribute in which other code keeps a network.
PREFIXES = (
    *("module", "_orig_mod", "model", "backbone", "encoder", "encoder_q", "net"),
    *("teacher", "student"),
)
_LOG = logging.getLogger(__name__)
_NOTED: set[str] = set()


def is_file(weights: str) -> bool:
    """Return whether the weights of a NAME:WEIGHTS name a file.

    Raises:
        ValueError: They are a path to a kind of file that is not read.
    """
    if weights.lower().endswith(WEIGHT_FILES):
        return True
    if "/" in weights or "\\" in weights:
        raise ValueError(f"weights {weights!r}: a weight file ends in {', '.join(WEIGHT_FILES)}")
    return False


def seed_of(weights: str) -> int | None:
    """Return the seed of `random-SEED`, or None for other weights.

    >>> seed_of("random-7"), seed_of("openai")
    (7, None)

    Raises:
        ValueError: Random weights without a plain decimal seed.
    """
    if not weights.startswith("random") or is_file(weights):
        return None
    match = re.fullmatch(r"random-(0|[1-9][0-9]{0,17})", weights)
    if match is None:
        raise ValueError(f"weights {weights!r}: random ones name their seed, as in random-0")
    return int(match[1])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generator inside the block, and restore the caller's generators after it.

    The generator is that of the whole process: one thread is in the block at a time, and others
    must not draw from it meanwhile.
    """
    with _SEEDING, torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that one reseeds the generators of every GPU as well.
        torch.default_generator.manual_seed(seed)
        yield


_SEEDING = threading.RLock()


def make_network(make: Callable[[], nn.Module], network: str, weights: str) -> nn.Module:
    """Make a network with seeded parameters (`random-SEED`) or with those of a weight file.

    Args:
        make: Function that constructs the network; it draws parameters from torch's generator.
        network: Name of the network, for messages.
        weights: `random-SEED`, or the path of a file.

    Raises:
        ValueError: The weights are a tag, or do not fit the network.
        FileNotFoundError: There is no such file.
    """
    state = None
    if seed_of(weights) is None:
        if not is_file(weights):
            raise no_tag(network, weights, ())
        state = read(weights)
    return construct(make, weights, state, f"{network}:{weights}")


def construct(
    make: Callable[[], nn.Module], weights: str, state: Mapping[str, Tensor] | None, name: str
) -> nn.Module:
    """Make a network and give it its parameters.

    Args:
        make: Function that constructs the network; it draws parameters from torch's generator.
        weights: The requested weights; with `random-SEED` the drawn parameters stay.
        state: All other weights, under the network's own names.
        name: NETWORK:WEIGHTS, for messages.

    Raises:
        ValueError: The state does not fit the network.
    """
    seed = seed_of(weights)
    if seed is not None:
        with seeded(seed):
            return make()
    # No parameter is drawn only to be replaced: for a ViT-L the drawing alone takes seconds.
    with torch.device("meta"):
        module = make()
    fill(module, state or {}, name)
    return module


def fill(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Replace the module's parameters and buffers by copies of `state`.

    Raises:
        ValueError: A name is missing or unexpected, a shape or kind of number differs, or a value
            is infinite or not a number.
    """
    expected = module.state_dict()
    if (own_prefix := _prefix(expected)) and not any(key.startswith(own_prefix) for key in state):
        state = {own_prefix + key: tensor for key, tensor in state.items()}
    check(expected, state, name)
    check_finite(state, {key for key, _ in module.named_parameters()}, name)
    # A file's tensors begin wherever its header ends, and the last bits of a matrix product can
    # depend on the alignment of its operands; torch aligns what it allocates to 64 bytes.
    aligned = {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}
    module.load_state_dict(aligned, strict=False, assign=True)


def check(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str) -> None:
    """Compare names, shapes and kinds of number, apart from batch norm's count of batches.

    Raises:
        ValueError: They differ; the message shows the first few of each difference.
    """
    counted = [key for key in expected if not key.endswith("num_batches_tracked")]
    absent = [key for key in counted if key not in state]
    unexpected = [key for key in state if key not in expected]
    differing = [
        f"{key} ({_kind(state[key])}, not {_kind(expected[key])})"
        for key in expected
        if key in state and _kind(state[key]) != _kind(expected[key])
    ]
    problems = {"missing": absent, "unexpected": unexpected, "of another shape": differing}
    differences = [f"{what}: {_first(keys)}" for what, keys in problems.items() if keys]
    if differences:
        raise ValueError(
            f"the weights do not fit {name}; {'; '.join(differences)}. "
            + (
                _part_that_fits(counted, state)
                or "Check that the file was made for this very network"
            )
        )


def _part_that_fits(expected: Iterable[str], state: Mapping[str, Tensor]) -> str:
    """Return a sentence about names that would fit without their first part; "" for none."""
    wanted = set(expected)
    for prefix in dict.fromkeys(key.partition(".")[0] + "." for key in state):
        if wanted and all(prefix + key in state for key in wanted):
            return f"The names that begin with {prefix!r} fit: save these alone, without it"
    return ""


def check_finite(state: Mapping[str, Tensor], parameters: Collection[str], name: str) -> None:
    """Refuse infinite values and not-a-number, but for the -inf of a mask, which is no parameter.

    Raises:
        ValueError: There are such values; the message counts them for each tensor.
    """
    counts = {}
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        bad = ~tensor.isfinite()
        if key not in parameters:
            bad &= tensor != -torch.inf
        if count := int(bad.sum()):
            counts[key] = f"{key} ({count} of {tensor.numel()})"
    if counts:
        raise ValueError(
            f"the weights of {name} have values that are infinite or not a number: "
            f"{_first([*counts.values()])}. The training that saved them had diverged, or the file "
            "is damaged; take an earlier checkpoint, or copy the file again"
        )


def read(path: str | Path) -> dict[str, Tensor]:
    """Read a weight file, out of the usual wrappers, onto the CPU. No code in it is run.

    A prefix that all names share and that other code adds ("module.", "backbone.") is removed, with
    a note in the log.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read as names and tensors alone.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no weight file {file}; give NETWORK:PATH with a path that exists")
    state = _unwrapped(read_objects(file), file)
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{file} holds a {type(state).__name__}, not names and tensors")
    odd = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"{file} holds entries that are no tensors: {_first(odd)}")
    if prefix := _prefix(state):
        _note(f"{file}: all names begin with {prefix!r}, which is left out")
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _unwrapped(state: object, file: Path) -> object:
    """Return the network's entry of a training checkpoint; other objects are returned unchanged."""
    while isinstance(state, dict):
        networks = [key for key in WRAPPERS if isinstance(state.get(key), dict)]
        if not networks:
            break
        if len(networks) > 1:
            others = ", ".join(map(repr, networks[1:]))
            _note(f"{file}: {networks[0]!r} is read; it holds {others} too, to be saved alone")
        state = state[networks[0]]
    return state


def _prefix(names: Iterable[str]) -> str:
    """Return the beginning that wrappers have added to all of some names.

    >>> _prefix(["module.model.conv.weight", "module.model.fc.bias"]), _prefix(["fc.bias"])
    ('module.model.', '')
    """
    rests, prefix = [str(name) for name in names], ""
    while rests:
        first, dot, _ = rests[0].partition(".")
        if first not in PREFIXES or not all(rest.startswith(first + ".") for rest in rests):
            break
        prefix += first + dot
        rests = [rest.removeprefix(first + dot) for rest in rests]
    return prefix


def _note(text: str) -> None:
    """Log a sentence about a file, once in a process."""
    if text not in _NOTED:
        _NOTED.add(text)
        _LOG.warning(text)


def hub_file(repo: str, names: Iterable[str], name: str) -> Path:
    """Return a file of a Hugging Face repository: from the local cache, else downloaded into it.

    Args:
        repo: `owner/name`.
        names: File names to try, the best first.
        name: NETWORK:TAG, for messages.

    Raises:
        OSError: The hub cannot be reached, or none of the files is there.
    """
    import huggingface_hub

    candidates = list(names)
    for file in candidates:
        cached = huggingface_hub.try_to_load_from_cache(repo, file)
        if isinstance(cached, str):
            return Path(cached)
    for file in candidates:
        _reach(huggingface_hub.hf_hub_url(repo, file), name)
        try:
            return Path(huggingface_hub.hf_hub_download(repo, file))
        except huggingface_hub.errors.LocalEntryNotFoundError as error:
            raise _not_fetched(name, error) from error
        except huggingface_hub.errors.EntryNotFoundError:
            continue
        except Exception as error:  # the client's own classes differ from release to release
            raise _not_fetched(name, error) from error
    raise OSError(f"{name}: {repo} holds none of {', '.join(candidates)}")


def url_state(url: str, name: str) -> dict[str, Tensor]:
    """Return the weight file at `url`, by way of torch.hub's cache and its check of the hash.

    Raises:
        OSError: The server cannot be reached, or the answer is not the file.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / url.rsplit("/", 1)[-1]
    if not file.is_file():
        _reach(url, name)
        folder.mkdir(parents=True, exist_ok=True)
        digits = re.search(r"-([0-9a-f]{8,})\.", file.name)
        try:
            torch.hub.download_url_to_file(
                url, str(file), hash_prefix=digits[1] if digits else None, progress=False
            )
        except (OSError, RuntimeError) as error:
            raise _not_fetched(name, error) from error
    return read(file)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, also those that a state dict leaves out."""
    parameters: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers(remove_duplicate=False))


def parameter_digest(module: nn.Module) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of parameters and buffers."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors_of(module).items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        total.update(flat.numpy())
    return total.hexdigest()


def no_tag(network: str, weights: str, tags: Iterable[str]) -> ValueError:
    """Return the error for weights that are no tag of the network."""
    known = list(tags)
    near = difflib.get_close_matches(weights, known, n=3)
    return ValueError(
        f"{network} has no weights {weights!r}"
        + (f"; did you mean {' or '.join(near)}?" if near else ".")
        + f" Published tags: {', '.join(known) or 'none'}. Or give a file, "
        f"{network}:/path/file.safetensors"
    )


def _reach(url: str, name: str) -> None:
    """Raise within seconds if no server answers: the clients themselves try for minutes."""
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "varve"})
    try:
        urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()  # an answer of any kind; the client handles it
    except OSError as error:
        raise _not_fetched(name, error) from error


def _not_fetched(name: str, error: Exception) -> OSError:
    network = name.partition(":")[0]
    return OSError(
        f"{name}: the published weights could not be fetched ({error}). Connect and try again, "
        f"or pass a weight file, {network}:/path/file.safetensors; {network}:random-0 is a seeded "
        "random network to try things with"
    )


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else ' integer'}"


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
