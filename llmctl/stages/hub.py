"""What `push` and `pull` share: names on the hub, and its refusals as errors with a hint. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from llmctl.errors import UserError

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def check_name(name: str) -> None:
    """Raise UserError for what cannot be the name of a repository with its owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{name}: not a name on the hub ({said})", "names look like `user/name`") from None
    if "/" not in name:
        raise UserError(f"{name}: does not say whose repository it is", f"name the account too: USER/{name}")


@contextlib.contextmanager
def hub_errors(name: str, *, writing: bool) -> Iterator[None]:
    """Turn the hub's refusals around a repository into a `UserError`.

    Args:
        writing: whether it is to be written, for the messages.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    unreachable = UserError(
        f"{name}: the hub cannot be reached ({constants.ENDPOINT})", "check the network, then run it again"
    )
    try:
        yield
    except UserError:
        raise
    except OfflineModeIsEnabled:
        raise UserError(f"{name}: HF_HUB_OFFLINE is set", "unset it to use the hub") from None
    except GatedRepoError:
        raise UserError(
            f"{name}: the hub gives it only to those who accepted its terms",
            "accept them on its page, then log in with `hf auth login`",
        ) from None
    except RepositoryNotFoundError as error:
        if writing and error.response is not None and error.response.status_code == 401:
            raise UserError(f"{name}: the hub does not accept the token", LOGIN) from None
        raise UserError(
            f"{name}: no such model on the hub", "check the spelling; a private model needs `hf auth login`"
        ) from None
    except HfHubHTTPError as error:
        raise _refusal(name, error, writing) from error
    except LocalEntryNotFoundError as error:
        raise unreachable from error
    except Exception as error:  # no network shows as one of many errors of many libraries
        if _is_network(error):
            raise unreachable from error
        raise


def _refusal(name: str, error: Exception, writing: bool) -> UserError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        return UserError(f"{name}: the hub does not accept the token", LOGIN)
    if status == 403:
        what = "write to" if writing else "read"
        return UserError(
            f"{name}: the token has no permission to {what} it",
            "take a token with that right (https://huggingface.co/settings/tokens), and a name of your own account",
        )
    if status == 409:
        return UserError(
            f"{name}: the repository exists on the hub",
            "choose another name, or add --update to put these files over those there",
        )
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"{name}: the hub refused ({said})", "run it again; https://status.huggingface.co tells of outages"
    )


def _is_network(error: BaseException) -> bool:
    """Whether an error, or one below it, is that of a connection: of sockets, httpx or requests."""
    seen: BaseException | None = error
    while seen is not None:
        names = {kind.__name__ for kind in type(seen).__mro__}
        if names & {
            "ConnectionError",
            "TransportError",
            "TimeoutException",
            "Timeout",
            "gaierror",
            "ConnectError",
        }:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
