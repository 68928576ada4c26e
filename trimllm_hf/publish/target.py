"""Where a push goes: a branch of a repository or a pull request against it, and one commit made there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from transformers.utils import logging

from .contents import Contents
from .remote import WAITS, brief, difference, files_at, head_of, retried, transient

logger = logging.get_logger("transformers.trimllm_hf")

Operation = CommitOperationAdd | CommitOperationDelete


class PushError(RuntimeError):
    """A push that did not complete.

    Attributes:
        landed: True: the commit is on the Hub, and a later step failed. False: the repository is as it was. None: unknown,
            since the Hub did not answer; pushing again finds out, and makes no second commit.
    """

    def __init__(self, message: str, landed: bool | None) -> None:
        super().__init__(message)
        self.landed = landed


@dataclass(frozen=True)
class Target:
    """A branch of a repository, or (with an author) a pull request against it.

    Attributes:
        own: Whether the repository may be created.
        made: What `open` has created, for error messages: "the repository", or a branch.
    """

    api: HfApi
    repo_id: str
    branch: str
    author: str | None
    own: bool
    made: list[str] = field(default_factory=list)

    def open(self, private: bool | None) -> str:
        """Create the repository and the branch if they do not exist; returns the commit at the head of the branch."""
        what = f"Opening {self.repo_id}"
        try:
            info = retried(lambda: self.api.repo_info(self.repo_id), what)
        except RepositoryNotFoundError:
            if not self.own:
                raise ValueError(
                    f"Expected a repository to open a pull request in, got {self.repo_id}, which this token does not see."
                ) from None
            retried(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True), f"Making {self.repo_id}")
            self.made.append("the repository")
            info = retried(lambda: self.api.repo_info(self.repo_id), what)
        if private and not info.private:
            raise ValueError(
                f"Expected {self.repo_id} to be private, got one that exists and is public. Make it private in its settings "
                "first, or push to another name."
            )
        try:
            return head_of(self.api, self.repo_id, self.branch)
        except RevisionNotFoundError:
            if self.author is not None or self.branch.startswith("refs/"):
                raise ValueError(
                    f"Expected a branch of {self.repo_id}, got {self.branch!r}, which does not exist."
                ) from None
            branch = self.branch
            retried(lambda: self.api.create_branch(self.repo_id, branch=branch, exist_ok=True), f"Making {branch}")
            self.made.append(f"the branch {branch}")
            return head_of(self.api, self.repo_id, branch)

    def holding(self, contents: Contents) -> CommitInfo | None:
        """The commit that holds exactly this folder: the head of the branch or, for a pull request, of an open one."""
        places = [(self.branch, None), *(self._pull_requests() if self.author is not None else ())]
        for revision, url in places:
            oid = head_of(self.api, self.repo_id, revision)
            if not difference(contents.folder, contents.sizes, files_at(self.api, self.repo_id, oid)):
                return CommitInfo(
                    commit_url=f"{self.api.endpoint}/{self.repo_id}/commit/{oid}", commit_message="",
                    commit_description="", oid=oid, pr_url=url,
                )  # fmt: skip
        return None

    def _pull_requests(self) -> list[tuple[str, str | None]]:
        """The author's open pull requests, newest first: their references and addresses."""

        def listed() -> list[tuple[str, str | None]]:
            found = self.api.get_repo_discussions(self.repo_id, author=self.author, discussion_type="pull_request")
            return [(f"refs/pr/{pull.num}", pull.url) for pull in found if pull.status in ("open", "draft")]

        return retried(listed, f"Listing the pull requests of {self.repo_id}")

    def operations(self, contents: Contents, parent: str) -> list[Operation]:
        """The operations after which the repository holds the folder: files to add to `parent`, old weights to delete."""
        apart = difference(contents.folder, contents.sizes, files_at(self.api, self.repo_id, parent))
        return [
            *(CommitOperationDelete(name, is_folder=False) for name in apart.stale),
            *(CommitOperationAdd(name, contents.folder / name) for name in apart.changed),
        ]

    def commit(self, contents: Contents, operations: list[Operation], parent: str, message: str) -> CommitInfo:
        """Upload, then make one commit. After an error, look first whether the repository has it.

        Raises:
            PushError: If the commit is not there, or the Hub does not answer.
        """
        pull = self.author is not None
        additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
        try:  # the client retries uploads itself
            self.api.preupload_lfs_files(
                self.repo_id, additions, revision=self.branch, create_pr=pull, free_memory=False
            )  # fmt: skip
        except Exception as error:
            raise self._as_it_was(parent, error) from error
        for wait in (*WAITS, None):
            try:
                made = self.api.create_commit(
                    self.repo_id, operations, commit_message=message, revision=self.branch, create_pr=pull,
                    parent_commit=parent,
                )  # fmt: skip
            except Exception as error:
                if (landed := self._landed_after(error, contents, parent)) is not None:
                    return landed
                if wait is None or not transient(error):
                    raise self._as_it_was(parent, error) from error
                logger.warning(f"There is no commit yet: {brief(error)} Retrying in {wait:g} s.")
                time.sleep(wait)
            else:
                self._look_at(contents, made)
                return made
        raise AssertionError  # the last wait is None

    def _landed_after(self, error: Exception, contents: Contents, parent: str) -> CommitInfo | None:
        """The commit if it was made despite the error; None if the repository is as it was."""
        try:
            found = self.holding(contents)
            head = head_of(self.api, self.repo_id, self.branch)
        except Exception as second:
            raise PushError(
                f"Pushing to {self.repo_id} failed, and the Hub cannot be asked whether the commit landed. {brief(error)} "
                f"Then: {brief(second)} Push again: if it landed, no second commit is made.",
                landed=None,
            ) from error
        if found is not None:
            logger.warning(f"The commit landed, as {found.oid}, although the response was lost: {brief(error)}")
        elif head != parent and self.author is None:
            raise PushError(
                f"Nothing was committed to {self.repo_id}: someone else committed {head} meanwhile, which is not this "
                f"folder. Look at it, then push again. {brief(error)}",
                landed=False,
            ) from error
        return found

    def _as_it_was(self, parent: str, error: Exception) -> PushError:
        return PushError(
            f"Nothing was committed to {self.repo_id}, which stands {self._as_found()}, at {parent}. {brief(error)} "
            "Push again when that is fixed; what was uploaded is not sent again.",
            landed=False,
        )

    def _as_found(self) -> str:
        return f"as it was but for {' and '.join(self.made)}, created by this push" if self.made else "as it was"

    def _look_at(self, contents: Contents, made: CommitInfo) -> None:
        """A .gitignore in the repository lets the client leave files out without an error."""
        with landed(self.repo_id, made.oid):
            held = files_at(self.api, self.repo_id, made.oid)
        absent = [name for name, size in contents.sizes.items() if name not in held or held[name].size != size]
        if absent:
            raise PushError(
                f"The commit {made.oid} of {self.repo_id} lacks {', '.join(absent[:3])}. Mend the repository's "
                ".gitignore and push again.",
                landed=True,
            )


@contextmanager
def landed(repo_id: str, oid: str, but: str = "but the repository could not be looked at afterwards") -> Iterator[None]:
    """Make errors after the commit say that it was made."""
    try:
        yield
    except Exception as error:
        raise PushError(f"The commit {oid} landed in {repo_id}, {but}. {brief(error)}", landed=True) from error
