"""Checkpoints from the Hugging Face hub: a pinned revision into the local cache, resumed where a download broke off.

Only the files that diffusers reads are fetched, not the single-file copies beside them. Knows nothing of what the
files hold; every failure that a user can mend is one sentence with the link.
"""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import DryRunFileInfo, constants
from huggingface_hub.errors import (
    DryRunError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from tqdm import tqdm

from engine.catalog import ModelSpec
from engine.errors import LoadError

TOKENS = "https://huggingface.co/settings/tokens"
DESCRIPTIONS = ["model_index.json", "*/config.json", "*/scheduler_config.json", "README.md"]
"""Files that tell what a checkpoint is."""
INSTEAD = "use --weights DIR with a copy of it, or --random-weights to measure without"


def cached(spec: ModelSpec, patterns: list[str]) -> Path | None:
    """The folder of the model's revision in the local cache, None if it is not there; asks nobody."""
    try:
        folder = huggingface_hub.snapshot_download(
            spec.source, revision=spec.revision, allow_patterns=patterns, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    return Path(folder)


def has_token() -> bool:
    """Whether HF_TOKEN is set or the machine is logged in to the hub."""
    return huggingface_hub.get_token() is not None


def download(spec: ModelSpec, patterns: list[str], told: Callable[[int, int], None]) -> Path:
    """Fetch what is missing of the model's revision.

    Args:
        patterns: globs of the wanted files.
        told: called with bytes done and bytes in all; what it raises ends the download, which a later call resumes.

    Returns:
        The folder of the revision.

    Raises:
        LoadError: no access, no connection or no room on the disk, in one sentence.
    """
    fetch = partial(huggingface_hub.snapshot_download, spec.source, revision=spec.revision, allow_patterns=patterns)
    try:
        missing = _missing_bytes(fetch)
        _require_disk(spec, missing)
        return Path(fetch(tqdm_class=_bar(lambda done: told(done, missing))))
    except GatedRepoError as error:
        raise LoadError(_no_access(spec)) from error
    except HfHubHTTPError as error:
        raise LoadError(_refused(spec, error)) from error
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise LoadError(unreachable(spec)) from error
    except (OSError, RuntimeError) as error:  # the hub's transfer library wraps the system's error in a RuntimeError
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise LoadError(
                f"The disk filled up while {spec.name} was downloaded to {constants.HF_HUB_CACHE}: make room and "
                "retry, what is there already is kept."
            ) from error
        raise


def quantized(repository: str, revision: str | None, offline: bool) -> tuple[Path, str]:
    """A repository's quantized denoiser with what describes it, fetched if need be, and the commit that it is from. Of
    a whole pipeline it is the denoiser's folder alone, of any other repository all JSON files and weights.

    Args:
        revision: a branch, tag or commit; None for the main branch.

    Raises:
        LoadError: it cannot be had, in one sentence.
    """
    folder, commit = _fetched(repository, revision, offline, [*DESCRIPTIONS, "config.json", "*.index.json"])
    part = "transformer/" if (folder / "transformer" / "config.json").is_file() else ""
    folder, _ = _fetched(repository, commit, offline, [f"{part}*.json", f"{part}*.safetensors", "twinframe.json"])
    if not any((folder / part).glob("*.safetensors")):
        raise LoadError(f"{repository} has no weights in safetensors files here: give a folder that has them.")
    return folder, commit


def described(repository: str, revision: str | None, offline: bool) -> tuple[Path, str]:
    """What a repository's JSON files and card say, without weights, fetched if need be; and the commit it is from.

    Args:
        revision: a branch, tag or commit; None for the main branch.

    Raises:
        LoadError: they cannot be had, in one sentence.
    """
    return _fetched(repository, revision, offline, DESCRIPTIONS)


def _fetched(repository: str, revision: str | None, offline: bool, patterns: list[str]) -> tuple[Path, str]:
    local = offline or constants.HF_HUB_OFFLINE
    page = f"https://huggingface.co/{repository}"
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=patterns, local_files_only=local
            )
        )
    except GatedRepoError as error:
        steps = f"accept its licence at {page}, make an access token at {TOKENS} and set HF_TOKEN to it"
        raise LoadError(f"{repository} is gated: {steps}.") from error
    except HfHubHTTPError as error:
        raise LoadError(
            f"The hub gives no access to {page} ({error.response.status_code}): check the name, or give a folder."
        ) from error
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        what = (
            "is not on this machine and nothing may be fetched offline" if local else "cannot be fetched from the hub"
        )
        raise LoadError(f"{repository} {what}: give a folder with a checkpoint, or check the connection.") from error
    return folder, folder.name


def weight_bytes(repository: str, revision: str) -> dict[str, int]:
    """Bytes of a repository's safetensors files by the folder they are in; nothing where the hub cannot be asked."""
    try:
        files = huggingface_hub.HfApi().model_info(repository, revision=revision, files_metadata=True).siblings or []
    except (HTTPError, HfHubHTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError):
        return {}
    found: dict[str, int] = {}
    for file in files:
        part, _, name = file.rfilename.rpartition("/")
        if name.endswith(".safetensors"):
            found[part] = found.get(part, 0) + (file.size or 0)
    return found


def lora(
    repository: str, revision: str | None, name: str | None, usual: tuple[str, ...], offline: bool
) -> tuple[Path, str, str]:
    """A LoRA's file, fetched if need be, the commit that it is from, and its name in the repository.

    Args:
        revision: a branch, tag or commit; None for the main branch.
        name: of the file in the repository; None for one of the `usual` names, or the only safetensors file.

    Raises:
        LoadError: it cannot be had, or there are several, in one sentence.
    """
    local = offline or constants.HF_HUB_OFFLINE
    try:
        if name is None:
            names = _lora_names(repository, revision, local)
            chosen = [one for one in names if one in usual] or names
            if len(chosen) != 1:
                found = f"holds several, {', '.join(chosen[:3])}" if chosen else "holds no safetensors file"
                raise LoadError(
                    f"The repository {repository} {found}: name one as --lora {repository}/FILE.safetensors."
                )
            name = chosen[0]
        file = Path(huggingface_hub.hf_hub_download(repository, name, revision=revision, local_files_only=local))
    except GatedRepoError as error:
        raise LoadError(
            f"The LoRA {repository} is gated: accept its licence at https://huggingface.co/{repository}, make an "
            f"access token at {TOKENS} and set HF_TOKEN to it."
        ) from error
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise LoadError(_no_lora(repository, local)) from error
        raise LoadError(f"The repository {repository} has no file {name}: look at its page for the LoRA's.") from error
    except HfHubHTTPError as error:
        raise LoadError(
            f"The hub gives no access to {repository} ({error.response.status_code}): give a LoRA's file, or a "
            "repository as owner/name."
        ) from error
    except (HTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise LoadError(_no_lora(repository, local)) from error
    commit = file.parts[file.parts.index("snapshots") + 1] if "snapshots" in file.parts else revision or "main"
    return file, commit, name


def _lora_names(repository: str, revision: str | None, local: bool) -> list[str]:
    if local:
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True))
        return sorted(str(file.relative_to(folder)) for file in folder.rglob("*.safetensors"))
    files = huggingface_hub.list_repo_files(repository, revision=revision)
    return sorted(file for file in files if file.endswith(".safetensors"))


def _no_lora(repository: str, local: bool) -> str:
    if local:
        return f"There is no LoRA {repository} on this machine, and nothing may be fetched offline: give its file."
    return f"The hub cannot be reached for the LoRA {repository}: check the connection, or give its file."


def _missing_bytes(fetch: Callable[..., Any]) -> int:
    try:
        files: list[DryRunFileInfo] = fetch(dry_run=True, tqdm_class=_bar(None))
    except DryRunError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None  # why the hub could not be asked
    return sum(file.file_size or 0 for file in files if file.will_download)


def no_copy(spec: ModelSpec) -> str:
    """What to say when nothing may be fetched and the model is not here."""
    return f"{spec.name} is not on this machine and nothing may be fetched offline: leave out --offline, or {INSTEAD}."


def unreachable(spec: ModelSpec) -> str:
    """The sentence for a hub that does not answer."""
    return f"The hub cannot be reached for {spec.name} ({spec.url}): check the connection, {INSTEAD}."


def gated(spec: ModelSpec) -> str:
    """The sentence for a model whose licence has to be accepted first."""
    steps = f"accept its licence at {spec.url}, make an access token at {TOKENS} and set HF_TOKEN to it"
    return f"{spec.name} is gated: {steps}."


def _no_access(spec: ModelSpec) -> str:
    if not has_token():
        return gated(spec)
    return f"The account of this HF_TOKEN has no access to {spec.name}: accept its licence at {spec.url} and retry."


def _refused(spec: ModelSpec, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401 and has_token():
        return f"The hub does not know this HF_TOKEN: make a new one at {TOKENS} and retry."
    if status in (401, 403, 404):
        return f"The hub gives no access to {spec.url} at revision {spec.revision}: check HF_TOKEN, or {INSTEAD}."
    return f"The hub answered with error {status} for {spec.name}: retry later, or {INSTEAD}."


def _require_disk(spec: ModelSpec, needed: int) -> None:
    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise LoadError(
            f"{spec.name} needs {needed / 1e9:.1f} GB more in {constants.HF_HUB_CACHE}, where {free / 1e9:.1f} GB are "
            "free: make room, or set HF_HOME to a larger disk."
        )


def _bar(told: Callable[[int], None] | None) -> type[tqdm]:
    """A progress bar class for `snapshot_download` that draws nothing and tells bytes done.

    The library opens one bar for files and two for bytes, received and written ("reconstructed"); the last counts
    what an earlier download left as well.
    """
    lock = threading.Lock()

    class Bar(tqdm):
        def __init__(self, *args: object, **kwargs: object):
            self._counts = "reconstruct" in str(kwargs.get("desc", "")).lower()
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                if told is not None and self._counts:
                    told(int(self.n))

    return Bar
