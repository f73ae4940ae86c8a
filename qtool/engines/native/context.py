"""What every process of a job has: the float model to read from, and the format to write for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from qtool.checkpoint import formats
from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.formats import QuantizedFormat
from qtool.checkpoint.reader import Checkpoint
from qtool.engines.native import device
from qtool.engines.native.device import ELEMENTS, Room
from qtool.model.decoder import DecoderStream
from qtool.quant.group import Storage
from qtool.scheme import QuantizationArgs


@dataclass(frozen=True)
class Context:
    """What units work with.

    Attributes:
        model: the float model.
        format: of the output.
        cache: how keys and values are kept; None for floats.
        rows: how many elements of a weight are rounded at a time on a device.
    """

    model: DecoderStream
    format: QuantizedFormat
    cache: QuantizationArgs | None = None
    rows: Room = field(default_factory=lambda: Room(ELEMENTS, ELEMENTS, print))

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
        device_memory: bytes of the device that a process may take; None for whatever is there.
        elements: of a weight, to be rounded at a time on a device.
        cache: how keys and values are kept; None for floats.
    """

    path: str
    dtype: torch.dtype
    device: str
    trust_remote_code: bool
    format: str
    threads: int
    device_memory: int | None = None
    elements: int = ELEMENTS
    cache: QuantizationArgs | None = None

    def open(self, card: int | None = None) -> Context:
        """In a process that has nothing yet. Raises InputError when the checkpoint can't be opened any more.

        Args:
            card: the number of the device to compute on, of several.
        """
        torch.set_num_threads(self.threads)
        if card is not None:
            device.use(self.device, card)
        device.limit(self.device, self.device_memory)
        return self.of(Checkpoint.open(self.path))

    @property
    def decisive(self) -> dict[str, object]:
        """What decides about the bytes of the output."""
        cache = self.cache and asdict(self.cache)
        rest = {"dtype": str(self.dtype), "path": "", "device_memory": None, "elements": 0, "cache": cache}
        return vars(self) | rest

    def of(self, checkpoint: Checkpoint, tell: Callable[[str], None] = print) -> Context:
        """With a checkpoint that is open; `tell` hears when less goes to the device at a time than was planned.

        Everything reads the model through these weights, so what changes the whole model wraps them here.
        """
        model = DecoderStream(
            checkpoint,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            weights=FloatReader(checkpoint, self.device, as_float=True),
        )
        few = min(self.elements, 1 << 18)
        message = "the device's memory ran out: from here on {} million numbers of a weight are rounded at a time"
        room = Room(self.elements, few, lambda size: tell(message.format(round(size / 1e6, 1))))
        return Context(model, formats.get(self.format), self.cache, room)


def storage(output_format: QuantizedFormat, dtype: torch.dtype) -> Storage:
    """What a format keeps of a layer whose float tensors are `dtype`."""
    return Storage(
        dtype=dtype,
        weight_scale=lambda scale, scheme: output_format.storable_weight_scale(scale, scheme, dtype),
        input_scale=lambda scale: output_format.storable_scale(scale, dtype),
    )
