"""The part of a pass that lies behind the decoder: next-token-prediction (MTP) layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reap_stream.calibration.batches import Batch
from reap_stream.model.calls import LayerCall
from reap_stream.model.experts import BatchTokens
from reap_stream.model.layer import StreamedModel
from reap_stream.model.mtp_inputs import MtpInputs


@dataclass(frozen=True, slots=True)
class MtpPass:
    """Prediction layers on the calibration rows.

    Attributes:
        first: number of the first of them.
        streamed: gives one of them at a time.
        inputs: makes what they are run on.
    """

    first: int
    streamed: StreamedModel
    inputs: MtpInputs

    def call(
        self,
        index: int,
        batch: Batch,
        ids: np.ndarray[Any, Any],
        info: BatchTokens,
        hidden_states: torch.Tensor,
    ) -> tuple[torch.Tensor, LayerCall, BatchTokens]:
        """What one layer is run on for one batch; see `StreamedLayer.run`.

        Args:
            index: number of the layer, as the decoder's are counted on.
            batch: the batch.
            ids: int64 [rows, width], its tokens.
            info: which of its tokens are real.
            hidden_states: [rows, width, hidden], what the layer before gave.
        """
        own = index - self.first
        embeddings, call = self.inputs.call(own, ids, hidden_states)
        # The tokens that the last positions of a row would need are not in the row.
        ends = torch.tensor(batch.lengths) - (own + 1)
        reached = (torch.arange(batch.width) < ends[:, None]).reshape(-1)
        return embeddings, call, BatchTokens(reached.to(info.valid.device), info.sources)
