"""Download checkpoints from the hub, measure downloads, and explain what the hub refuses."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from extract.errors import BackboneError

CONFIGURATION = ("config.json", "preprocessor_config.json")
_FILES = (*CONFIGURATION, "*.safetensors", "*.safetensors.index.json")
"""Files of a model that are downloaded."""


def no_checkpoint(name: str) -> BackboneError:
    """Make the error for a name that leads nowhere."""
    return BackboneError(
        f"no checkpoint at {name}: BACKBONE is vitl16, vit7b16, demo, a directory with config.json, or a hub id"
    )


def download(hub_id: str, files: Sequence[str] = _FILES) -> Path:
    """Download those `files` of a model that are not here yet; return their directory.

    Raises:
        BackboneError: the model is gated, private, missing or out of reach.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(hub_id):
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))


def measure_download(hub_id: str) -> int:
    """Return the bytes that `download` would fetch; fetch nothing.

    Raises:
        BackboneError: as `download`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    with _hub_errors(hub_id):
        try:
            files = snapshot_download(hub_id, allow_patterns=list(_FILES), dry_run=True)
        except DryRunError:  # the hub is out of reach: `download` then finds all files here, or raises the reason
            download(hub_id)
            return 0
        return sum(file.file_size or 0 for file in files if file.will_download)


@contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    """Turn an error of a request to the hub into one line."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except BackboneError:
        raise
    except GatedRepoError as error:
        token = "the token in HF_TOKEN has no access" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
        raise BackboneError(
            f"{hub_id} is gated and {token}: accept its licence at https://huggingface.co/{hub_id}, "
            "then set HF_TOKEN to a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise BackboneError(
            f"no model {hub_id} on the hub, or it is private: check BACKBONE, and set HF_TOKEN for a private model"
        ) from error
    except HFValidationError as error:
        raise no_checkpoint(hub_id) from error
    # A connection that breaks during a download raises an exception of the HTTP library inside the hub client.
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            raise BackboneError(
                f"the hub does not accept the token in HF_TOKEN for {hub_id}: set HF_TOKEN to a valid one, or unset it"
            ) from error
        raise BackboneError(
            f"cannot download {hub_id} ({type(error).__name__}): check the network, or download it elsewhere "
            "and set BACKBONE to the directory"
        ) from error
