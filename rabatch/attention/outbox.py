"""Results on their way from a card to the host, copied while the card computes on."""

from __future__ import annotations

import torch
from torch import Tensor


class Outbox:
    """Copies tensors into pinned host memory on a CUDA stream of its own; on the CPU there is nothing to copy."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def copies(self) -> bool:
        """Whether results change memory, that is, whether the device is not the host."""
        return self._stream is not None

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory on the host that `send` can fill without waiting."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.copies)

    def send(self, tensor: Tensor, to: Tensor | None = None) -> Tensor:
        """A tensor on the host with these contents, once `wait` has returned. On the CPU: the tensor itself.

        Args:
            to: On a card, host memory of this shape to fill, or None for new memory. Copies are asynchronous where
                `to` is contiguous.
        """
        if self._stream is None:
            return tensor
        target = self.room(tuple(tensor.shape), tensor.dtype) if to is None else to
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            target.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is not given to others before the copy is done
        return target

    def wait(self) -> None:
        """Return when everything sent is there."""
        if self._stream is not None:
            self._stream.synchronize()
