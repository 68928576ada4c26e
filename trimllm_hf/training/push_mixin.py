"""A Trainer whose `push_to_hub`, and `save_model` with `push_to_hub=True`, publish with this package's `push_to_hub`."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..publish.hub import push_to_hub
from ..publish.remote import retried
from ..utils import as_list
from .trainer_hooks import finish_current_push

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.get_logger("transformers.trimllm_hf")


class PushMixin(_Base):
    """Replaces the final push; those at saves (`hub_strategy`) are the Trainer's own."""

    def trim_callback(self) -> Any:
        """The Trainer's TrimCallback."""
        raise NotImplementedError

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository, as the Trainer does, with retries if the Hub is busy."""
        if self.args.hub_token and self.args.hub_strategy != HubStrategy.END:
            logger.warning(
                "hub_token is part of the arguments, which the Trainer pickles and pushes at each save: whoever reads the "
                "repository can read it. Give it by hf auth login or HF_TOKEN, or set hub_strategy='end'."
            )
        retried(partial(super().init_hf_repo, *args, **kwargs), "Making the repository")

    def push_to_hub(  # type: ignore[override]  # the Trainer's promises a commit to every process, and gives it to one
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the model, write its card and publish both, checked, as one commit; see `trimllm_hf.push_to_hub`.

        A model that keeps all its layers is pushed in the Trainer's own way.

        Args:
            commit_message: As for the Trainer, like the rest.
            blocking: False returns a Future.
            token: By default `args.hub_token`.
            revision: By default `args.hub_revision`.
            private: By default `args.hub_private_repo`.
            **kwargs: For `create_model_card`.

        Raises:
            ValueError: If the folder or the token is not valid. The model is saved, and nothing was sent.
            PushError: If the Hub failed or refused. The model is saved and can be sent later with `trimllm push`.
        """
        layer_map = self.trim_callback().layer_map
        if layer_map is None or not layer_map.dropped_layers:
            given = {} if private is None else {"private": private}
            return super().push_to_hub(commit_message, blocking, token, revision, **given, **kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        private = self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = [*as_list(kwargs.pop("tags", None)), *as_list(getattr(self.model, "model_tags", None))]
        self.create_model_card(**kwargs, tags=list(dict.fromkeys(tags)) or None)
        finish_current_push(self)
        publish = partial(
            push_to_hub, str(self.args.output_dir), str(self.hub_model_id), private=private, token=token,
            revision=revision or self.args.hub_revision, commit_message=commit_message,
        )  # fmt: skip
        return publish() if blocking else HfApi().run_as_future(publish)
