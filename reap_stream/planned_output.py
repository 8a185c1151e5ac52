"""What a job that runs the model will write, decided and checked before a weight is read."""

from __future__ import annotations

from dataclasses import replace

from reap_stream.checkpoint.shard_uses import ShardOrder
from reap_stream.download import check_download
from reap_stream.errors import UsageError
from reap_stream.model.opened import OpenedModel
from reap_stream.mtp_choice import MtpChoice
from reap_stream.pruning import Variant, check_config, plan_variants, read_targets, recoded
from reap_stream.settings import OutputSettings
from reap_stream.shard_order import shard_order


class PlannedOutput:
    """The checkpoints of a job, once `plan` was called.

    Args:
        settings: as asked for.
        propagate: whose activations later layers see.

    Attributes:
        settings: as asked for; then, with what happens to next-token-prediction layers.
        variants: a checkpoint for each target.
        order: when the pass reads the source's shards.
    """

    variants: list[Variant]
    order: ShardOrder

    def __init__(self, settings: OutputSettings, propagate: str) -> None:
        self.settings = settings
        self._propagate = propagate

    def plan(self, model: OpenedModel, mtp: MtpChoice) -> OpenedModel:
        """Lays out what is written.

        Args:
            model: the source.
            mtp: what happens to its next-token-prediction layers.

        Returns:
            The source with recipes for weights that are written in another format.

        Raises:
            NoRoomError: the disk holds less than the source's shards and the output need.
            UsageError: targets that cannot be, or not together.
            UnsupportedError: a weight or an entry of config.json that cannot be written so.
        """
        self.settings = replace(self.settings, mtp=mtp.kind)
        model = recoded(model, self.settings, mtp.kind)
        self.variants = plan_variants(model, read_targets(model, self.settings), self.settings)
        if self._propagate == "pruned" and len(self.variants) > 1:
            message = (
                "--propagate pruned runs later layers on pruned ones, so each target needs a pass "
                "of its own: give one target at a time"
            )
            raise UsageError(message)
        check_config(model, self.variants, self.settings.mtp)
        self.order = shard_order(model, mtp.head, writes=True, mtp=mtp.kind)
        # A job that goes on has taken its room.
        plans = () if self.settings.resume else tuple(variant.plan for variant in self.variants)
        check_download(model, self.order, self.settings.output, plans)
        return model
