"""Find a model: a folder, or a repository of the Hugging Face Hub.

The environment variables of the Hub client apply: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN,
HF_ENDPOINT.
"""

from __future__ import annotations

import errno
import glob
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vlmport.checkpoint.folders import check_adapter, check_checkpoint, files_of
from vlmport.errors import SourceError, did_you_mean
from vlmport.files.foreign import WEB_PAGE_HINT, is_web_page

__all__ = ["fetch_files", "find_folder", "locate", "locate_adapter"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
PATTERNS = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt", "README.md", "LICENSE*"]
SUBFOLDERS = ["*/*"]  # fnmatch's star crosses slashes: "onnx/…", "checkpoint-500/…"
TIMEOUT = 10.0  # seconds for the first response; the client itself has no limit


def locate(source: str | Path, revision: str | None = None, *, known: Iterable[str] = ()) -> Path:
    """Find the folder of a checkpoint: `source` itself, or the snapshot of a Hub id.

    Args:
        known: other names that the caller takes, for an error that suggests one.

    Raises SourceError if it can't be found or downloaded, and if it is not a checkpoint.
    """
    folder = find_folder(source, revision, known=known)
    try:
        check_checkpoint(folder)
    except OSError as cause:
        raise _unreadable(folder, cause) from cause
    return folder


def locate_adapter(source: str | Path, revision: str | None = None) -> Path:
    """Find the folder of a LoRA adapter, as `locate` finds that of a checkpoint.

    Raises SourceError also if it, or its repository, holds other weights, which would be ignored.
    """
    folder = find_folder(source, revision)
    try:
        names = files_of(folder)
        if not Path(source).expanduser().exists():
            names = sorted({*names, *_repository_files(str(source), revision)})
        check_adapter(folder, names)
    except OSError as cause:
        raise _unreadable(folder, cause) from cause
    return folder


def find_folder(
    source: str | Path, revision: str | None = None, *, known: Iterable[str] = ()
) -> Path:
    """Find a local folder, or the snapshot of a Hub id. Raises SourceError.

    Args:
        known: other names that the caller takes, for an error that suggests one.
    """
    text = str(source)
    try:
        path = Path(source).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as cause:  # a long name, an unknown user, a NUL
        reason = getattr(cause, "strerror", None) or cause
        raise SourceError(
            f"{text[:80]!r}: {reason}", hint="use a folder or a Hub id", code="source.not-found"
        ) from cause
    if is_folder and text:
        if revision is not None:
            hint = "leave out --revision; it chooses among the versions of a Hub repository"
            raise SourceError(
                f"{path}: a local folder has no revision {revision!r}",
                hint=hint,
                code="source.no-revision",
            )
        return path
    if exists and text:
        raise SourceError(
            f"{path}: a file, expected a folder",
            hint=f"use its folder: {path.parent}",
            code="source.not-a-folder",
        )
    if isinstance(source, str) and HUB_ID.fullmatch(source) and ".." not in source:
        return _fetch(source, revision)
    if isinstance(source, Path) or text.startswith((".", "~")) or len(path.parts) > 1:
        raise SourceError(
            f"{path}: no such folder{_near(path)}", hint="check the path", code="source.not-found"
        )
    names = tuple(known)
    what = f"neither {'a built-in name, ' if names else ''}a folder nor a Hub id"
    raise SourceError(
        f"{text!r}: {what}{did_you_mean(text, names) or _near(path)}",
        hint="`vlmport models` lists the built-in names; a Hub id has the form 'org/name'"
        if names
        else "use a folder, or a Hub id such as 'org/name'",
        code="source.not-found",
    )


def _unreadable(folder: Path, cause: OSError) -> SourceError:
    hint = "check the folder's permissions"
    return SourceError(
        f"{folder}: can't be read: {cause.strerror or cause}", hint=hint, code="source.unreadable"
    )


def _near(path: Path) -> str:
    """Suggest a folder with a similar name in the same place."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return f" ({path.parent} does not exist either)" if path.parent != path else ""
    return did_you_mean(path.name, names)


def fetch_files(repo: str, revision: str | None, names: Iterable[str]) -> Path:
    """Download the files with these exact paths; return the snapshot of the Hub repository.

    Raises SourceError as `find_folder` does.
    """
    return _fetch(repo, revision, [glob.escape(name) for name in names], [])


def _repository_files(repo: str, revision: str | None) -> list[str]:
    """List all files of a Hub repository; empty if the Hub can't be reached."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return []
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)
    except Exception:  # the snapshot is in the cache; newer files are unknown
        return []
    return [one.rfilename for one in info.siblings or ()]


def _fetch(
    repo: str,
    revision: str | None,
    patterns: Sequence[str] = PATTERNS,
    ignored: Sequence[str] = SUBFOLDERS,
) -> Path:
    """Return a repository's snapshot: the newest if the Hub responds, else the cached one."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    problem: Exception | None = None
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)
        except RevisionNotFoundError as error:
            raise _explain(error, repo, revision) from error
        except Exception as error:
            problem = error
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored),
                local_files_only=constants.HF_HUB_OFFLINE or problem is not None,
            )
        )
    except Exception as error:
        raise _explain(problem or error, repo, revision) from error


def _explain(error: Exception, repo: str, revision: str | None) -> SourceError:
    """Explain an exception of the Hub client in one line, with a hint."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    if problem := _disk_problem(error):
        return SourceError(
            f"{repo}: {problem}: {constants.HF_HUB_CACHE}",
            hint="free space there, or set HF_HUB_CACHE to a folder on another disk; run it again",
            code="hub.cache-unwritable",
        )
    if page := _no_hub(error):
        return SourceError(
            f"{repo}: {endpoint} answers with {page}",
            hint=f"{WEB_PAGE_HINT}; HF_ENDPOINT must be the address of a Hub",
            code="hub.web-page",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        hint = f"see the branches and tags at {endpoint}/{repo}"
        return SourceError(
            f"{repo}: no revision {revision!r}", hint=hint, code="source.no-revision"
        )
    if isinstance(error, errors.GatedRepoError):
        hint = f"accept its terms at {endpoint}/{repo}, then set HF_TOKEN or run `hf auth login`"
        return SourceError(f"{repo}: access is gated", hint=hint, code="hub.no-access")
    if isinstance(error, errors.RepositoryNotFoundError):
        near = _near(Path(repo)) if Path(repo).parent.is_dir() else ""
        hint = "check the spelling; if it is private, set HF_TOKEN or run `hf auth login`"
        what = f"no such folder{near}, and no such model at {endpoint}"
        return SourceError(f"{repo}: {what}", hint=hint, code="hub.not-found")
    if isinstance(error, errors.HFValidationError):
        hint = "give a folder, or a Hub id such as 'org/name'"
        return SourceError(
            f"{repo}: no such folder, and no Hub id: {_line(error)}",
            hint=hint,
            code="source.not-found",
        )
    if isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        at = f" at revision {revision!r}" if revision else ""
        return SourceError(
            f"{repo}: not completely in the Hub's cache{at}, and HF_HUB_OFFLINE is set",
            hint=f"unset HF_HUB_OFFLINE to fetch it; the cache is {constants.HF_HUB_CACHE}",
            code="hub.offline",
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error, repo, endpoint)
    if any("Timeout" in kind.__name__ for kind in type(error).__mro__):
        what = f"{endpoint} gives no answer"
    else:
        what = f"can't be fetched from {endpoint}: {_line(error)}"
    return SourceError(
        f"{repo}: {what}",
        hint="check the network (and HF_ENDPOINT, proxies) and run it again; downloads resume",
        code="hub.unreachable",
    )


def _explain_status(error: Exception, repo: str, endpoint: str) -> SourceError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status in (401, 403):
        return SourceError(
            f"{repo}: {endpoint} refuses access ({status})",
            hint="check that HF_TOKEN may read this repository; `hf auth login` creates a token",
            code="hub.no-access",
        )
    hint = "wait a moment and run it again; downloads resume"
    return SourceError(
        f"{repo}: {endpoint} answers with an error: {_line(error)}",
        hint=hint,
        code="hub.unreachable",
    )


def _line(error: Exception) -> str:
    """Return the type and the first line of an exception of another library."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _disk_problem(error: BaseException) -> str | None:
    """Describe the problem of the cache's disk, if it stopped the download."""
    for cause in _chain(error):
        code = getattr(cause, "errno", None)
        # hf_xet, the Rust downloader, raises a RuntimeError that only its text explains.
        if code == errno.ENOSPC or "No space left on device" in str(cause):
            return "the disk is full"
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            return "the cache can't be written"
    return None


def _no_hub(error: BaseException) -> str | None:
    """Name the kind of response, if something other than a Hub responded with status 200."""
    from huggingface_hub.errors import FileMetadataError

    for cause in _chain(error):
        if isinstance(cause, json.JSONDecodeError):
            return "a web page" if is_web_page(cause.doc[:1000].encode()) else "no JSON"
        if isinstance(cause, FileMetadataError):  # no ETag or no commit, which every Hub sends
            return "something other than a Hub's file, perhaps a web page"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
