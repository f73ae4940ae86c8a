"""What every process of a job has: the float model to read from, and the format to write for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtool.checkpoint import formats
from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.formats import QuantizedFormat
from qtool.checkpoint.reader import Checkpoint
from qtool.model.decoder import DecoderStream
from qtool.quant.group import Storage


@dataclass(frozen=True)
class Context:
    """What units work with.

    Attributes:
        model: the float model.
        format: of the output.
    """

    model: DecoderStream
    format: QuantizedFormat

    def storage(self, weight: str) -> Storage:
        """What the output keeps of the numbers of this weight's layer."""
        return storage(self.format, self.model.weights.dtype(weight))


@dataclass(frozen=True)
class Setup:
    """How a process comes to its context; it is alike in all processes of a job.

    Attributes:
        path: the checkpoint's folder.
        dtype: compute type.
        device: where to compute.
        trust_remote_code: allow the checkpoint's own modelling code.
        format: name of the output's format.
        threads: how many to compute with; results depend on it in the last bits.
    """

    path: str
    dtype: torch.dtype
    device: str
    trust_remote_code: bool
    format: str
    threads: int

    def open(self) -> Context:
        """In a process that has nothing yet. Raises InputError when the checkpoint can't be opened any more."""
        torch.set_num_threads(self.threads)
        return self.of(Checkpoint.open(self.path))

    def of(self, checkpoint: Checkpoint) -> Context:
        """With a checkpoint that is open.

        Everything reads the model through these weights, so what changes the whole model wraps them here.
        """
        model = DecoderStream(
            checkpoint,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            weights=FloatReader(checkpoint, self.device, as_float=True),
        )
        return Context(model, formats.get(self.format))


def storage(output_format: QuantizedFormat, dtype: torch.dtype) -> Storage:
    """What a format keeps of a layer whose float tensors are `dtype`."""
    return Storage(
        dtype=dtype,
        weight_scale=lambda scale, scheme: output_format.storable_weight_scale(scale, scheme, dtype),
        input_scale=lambda scale: output_format.storable_scale(scale, dtype),
    )
