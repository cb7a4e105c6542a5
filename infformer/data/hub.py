"""Datasets of the Hugging Face hub, or of a local folder laid out like one."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.cache.cache import Cache

from infformer.data.errors import DataError
from infformer.data.files import describe_content
from infformer.hub import WITHOUT_A_NETWORK, problem_with_the_hub


def load_split(repository: str, subset: str | None, split: str) -> Any:
    """One split of a dataset as a memory-mapped `datasets.Dataset`.

    The hub is asked first, briefly: the libraries below would try again for minutes. When it cannot be reached, what
    was downloaded before is used.

    Raises:
        DataError: no such subset or split; or the hub cannot be reached and nothing was downloaded before.
        HubError: no such dataset.
    """
    asked = f"data.repository={repository} data.subset={subset or 'null'}"
    check_repository(repository)
    folder = Path(os.path.expanduser(repository))
    if folder.is_dir():
        # The library takes no notice when a file of the folder changes, so each state of it has a cache of its own.
        own = Path(datasets.config.HF_DATASETS_CACHE, "local_folders", _state(folder))
        return _load(str(folder), subset, split, asked, cache_dir=str(own))
    problem = problem_with_the_hub("dataset", repository, "data.repository")
    if problem is None:
        return _load(repository, subset, split, asked)
    try:
        return _cached(repository, subset).as_dataset(split=split)
    except (ValueError, OSError) as error:
        raise DataError(
            f"{asked}: {problem}, and no earlier download of it is in {datasets.config.HF_DATASETS_CACHE} "
            f"({' '.join(str(error).split())}). To work without a network set data.repository= to a local folder laid "
            f"out like the dataset, {WITHOUT_A_NETWORK}"
        ) from error


def check_repository(repository: str) -> None:
    """Make sure that what can only be a local folder is one.

    Raises:
        DataError: it is not.
    """
    folder = Path(os.path.expanduser(repository))
    is_path = folder.is_absolute() or repository.startswith((".", "~")) or repository.count("/") > 1
    if is_path and not folder.is_dir():
        raise DataError(f"data.repository={repository}: there is no such folder (seen from {Path.cwd()}).")


def describe_split(repository: str, subset: str | None, split: str) -> str:
    """Names the content of a split: it changes with the revision on the hub, or with the files of a local folder.

    Raises:
        DataError: as `load_split`.
    """
    folder = Path(os.path.expanduser(repository))
    state = _state(folder) if folder.is_dir() else "hub"
    return f"{state} {load_split(repository, subset, split)._fingerprint}"


def _state(folder: Path) -> str:
    return hashlib.sha256(json.dumps(describe_content(folder)).encode()).hexdigest()[:16]


def _load(path: str, subset: str | None, split: str, asked: str, cache_dir: str | None = None) -> Any:
    try:
        return datasets.load_dataset(path, subset, split=split, cache_dir=cache_dir)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(f"{asked}, split {split}: {error}") from error


def _cached(repository: str, subset: str | None) -> Any:
    """The newest download of a dataset; opening it needs no network, not even to find out that there is none."""
    return Cache(
        dataset_name=repository.split("/")[-1], repo_id=repository, config_name=subset, version="auto", hash="auto"
    )
