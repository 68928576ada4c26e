"""`push_to_hub`: checks a folder and publishes it as one commit; on an error it says what the repository holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id  # type: ignore[attr-defined]
from transformers.utils import logging

from ..layer_map import LayerMap
from ..utils import json_at
from .card_check import check_card
from .card_data import tag_name
from .contents import Contents, contents_of
from .credentials import secrets_of_environment
from .folder import hide_local_base
from .model_check import check_model
from .remote import brief, retried
from .target import PushError, Target, landed
from .widths import widths_of

logger = logging.get_logger("transformers.trimllm_hf")

MAIN = "main"


@dataclass(frozen=True)
class Push:
    """The result of a push.

    Attributes:
        repo_id: The repository, with its namespace.
        commit: The commit that holds the folder.
        new: Whether this push made it; False if the repository already held the folder.
        tag: The tag that points to it, if any.
        contents: The files.
        layer_map: The model's map.
    """

    repo_id: str
    commit: CommitInfo
    new: bool
    tag: str | None
    contents: Contents
    layer_map: LayerMap


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    tag: bool | str = True,
) -> CommitInfo:
    """Publish a trimmed model's folder as one commit, after checking it.

    Nothing is sent until these checks pass: config, weights and map describe the same model; no file is incomplete or
    contains a credential; there is a card whose metadata the Hub accepts; the token has write access. Pickles, optimizer
    states and other files that are not part of a model are not uploaded, and are listed in the log. Old weights in the
    repository are deleted in the same commit. If the repository already holds the folder, no commit is made.

    Calls that fail temporarily are retried for half a minute. After any error the repository is compared with the folder
    before the push is reported as failed.

    Args:
        folder: What `save_pretrained` or the Trainer wrote, with its README.md.
        repo_id: "user/model", or "model" under the token's own name. Created if it does not exist.
        private: Create a new repository as private. With True, an existing public repository is refused.
        revision: Branch to commit to, created from main if it does not exist; with `create_pr`, the branch to open the pull
            request against. By default main. refs/pr/N adds to a pull request.
        create_pr: Open a pull request instead, also in a repository of someone else.
        token: By default that of `hf auth login` or HF_TOKEN.
        commit_message: By default the number of layers.
        tag: Set the tag trim-16of32 (16 of 32 layers kept) on the commit, as the last step; an existing tag of that name is
            moved. A string names another tag, False sets none. Pull requests are not tagged, nor are models that keep all
            their layers.

    Returns:
        The commit, with `oid`, `commit_url` and, for a pull request, `pr_url`.

    Raises:
        ValueError: If the folder, the card, the name or the token is invalid. Nothing was sent.
        PushError: If the Hub failed or refused; its message and `landed` say what the repository holds now.
    """
    return push(
        folder, repo_id, private=private, revision=revision, create_pr=create_pr, token=token,
        commit_message=commit_message, tag=tag,
    ).commit  # fmt: skip


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    tag: bool | str = True,
) -> Push:
    """As `push_to_hub`, but returns more than the commit."""
    validate_repo_id(repo_id)  # raises a ValueError
    if is_offline_mode():
        raise ValueError("Expected a network for a push, got offline mode. Unset HF_HUB_OFFLINE.")
    to_pull = (revision or MAIN).startswith("refs/pr/")
    if create_pr and to_pull:
        raise ValueError(
            f"Expected a branch to open a pull request against, got {revision}. Omit create_pr to add commits to it."
        )
    token = token or get_token()
    if not token:
        raise ValueError("Expected a token with write access, got none. Run hf auth login, or set HF_TOKEN.")
    hide_local_base(Path(folder))
    contents = contents_of(folder, {**secrets_of_environment(), "the token": token})
    layer_map = check_model(contents)
    card = check_card(contents, layer_map)
    api = HfApi(token=token)
    made: list[str] = []
    with _nothing_sent(repo_id, made):
        user, repo_id, own = _may_write(api, repo_id, create_pr or to_pull)
        _validate(api, card)
        target = Target(api, repo_id, revision or MAIN, user if create_pr else None, own, made)
        parent = target.open(private)
        found = target.holding(contents)
        operations = [] if found else target.operations(contents, parent)
    new = found is None
    if found is None:
        logger.warning(f"Pushing {contents.folder} to {repo_id}: {contents}.")
        message = commit_message or _title(layer_map, json_at(contents.folder / "config.json", "slicing"))
        found = target.commit(contents, operations, parent, message)
    else:
        logger.warning(f"{repo_id} already holds this folder, at {found.oid}: no commit was made.")
    name = None if create_pr or to_pull or not tag else tag if isinstance(tag, str) else tag_name(layer_map)
    if name is not None:
        _set_tag(api, repo_id, name, found.oid)
    return Push(repo_id, found, new, name, contents, layer_map)


def _title(layer_map: LayerMap, slicing: dict[str, Any] | None) -> str:
    """The depth, and the widths of a sliced model, for the title of a commit."""
    depth = f"{layer_map.num_layers} of {layer_map.base_num_layers} layers"
    if not layer_map.has_all_sublayers:
        depth = f"{layer_map.num_units('sublayer')} of {2 * layer_map.base_num_layers} attentions and MLPs"
    widths = widths_of(slicing)
    return depth if widths is None else f"{depth}, {widths.cut:.0%} of the {widths.of} cut"


def _may_write(api: HfApi, repo_id: str, by_pull: bool) -> tuple[str, str, bool]:
    """The token's user, the repository's whole name, and whether it is in a namespace of the user's own.

    Raises:
        ValueError: If the token is not valid or may not write there.
    """
    try:
        me = retried(api.whoami, "Asking whose token it is")
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ValueError(f"Expected a valid token, got one that the Hub refuses. {brief(error)}") from None
        raise
    role = me.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError(
            f"Expected a token with write access, got a read-only one of {me['name']}. Make one that may write at "
            f"{api.endpoint}/settings/tokens."
        )
    user: str = me["name"]
    if "/" not in repo_id:
        repo_id = f"{user}/{repo_id}"
    owner = repo_id.split("/")[0]
    own = [user, *(org["name"] for org in me.get("orgs", []) if org.get("roleInOrg") != "read")]
    if owner not in own and not by_pull:
        raise ValueError(
            f"Expected a name under {' or '.join(own)}, got {repo_id}, which is {owner}'s. Push to "
            f"{user}/{repo_id.split('/')[1]}, or open a pull request there with create_pr."
        )
    return user, repo_id, owner in own


def _validate(api: HfApi, card: ModelCard) -> None:
    """Have the Hub validate the card's metadata, which it would otherwise do only after the upload.

    Like `card.validate`, which in huggingface_hub 1.33 asks huggingface.co whatever the endpoint is.
    """

    def ask() -> None:
        body = {"repoType": "model", "content": str(card)}
        response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=body, headers={"Accept": "text/plain"})
        if response.status_code == 400:
            raise ValueError(f"Expected a card that the Hub accepts, got: {response.text}. Fix README.md. Nothing was sent.")
        hf_raise_for_status(response)

    retried(ask, "Validating the card")


def _set_tag(api: HfApi, repo_id: str, name: str, oid: str) -> None:
    with landed(repo_id, oid, f"but its tag {name} is not set; push again to set it"):
        refs = retried(lambda: api.list_repo_refs(repo_id), f"Listing the tags of {repo_id}")
        at = {tag.name: tag.target_commit for tag in refs.tags}.get(name)
        if at == oid:
            return
        if at is not None:
            logger.warning(f"The tag {name} of {repo_id} moves from {at} to {oid}.")
            _ignoring_absence(lambda: retried(lambda: api.delete_tag(repo_id, tag=name), f"Moving {name}"))
        retried(lambda: api.create_tag(repo_id, tag=name, revision=oid, exist_ok=True), f"Setting {name}")


def _ignoring_absence(call: Callable[[], None]) -> None:
    try:
        call()
    except RevisionNotFoundError:  # deleted by an earlier attempt whose response was lost
        pass


@contextmanager
def _nothing_sent(repo_id: str, made: list[str]) -> Iterator[None]:
    """Make errors before the commit say that nothing was sent, and what this push has created."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError | json.JSONDecodeError):
            raise
        now = f"in which this push has created {' and '.join(made)}" if made else "which is as it was"
        raise PushError(f"Nothing was sent to {repo_id}, {now}. {brief(error)}", landed=False) from error
