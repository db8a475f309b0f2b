"""Encoded keys and values of an index in memory: codes as they are stored, decoded where they are attended."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rabatch.index.compiled import read_only
from rabatch.index.token_codes import TokenCodes
from rabatch.storage.codecs import BITS, GROUP, STEPS, Coded


class Affine(NamedTuple):
    """What makes numbers of `y`: `center + scale * y`, each [n_kv, head_dim], float32."""

    scale: Tensor
    center: Tensor


@dataclass(frozen=True, eq=False)
class CodedRows:
    """Keys or values of the rows of an index: int8, or values in groups of 32 channels.

    Keys in groups are not held like this: who scores one key would need the steps of its 32, channel by channel.

    Attributes:
        codec: As in `rabatch.storage.codecs`.
        codes: [n_kv, n_rows, width]: int8, or uint8 of groups.
        affine: On the device, as `codes`.
        first_row: The row of the layer that is row 0 here.
    """

    codec: str
    codes: Tensor
    affine: Affine
    first_row: int

    @classmethod
    def of(cls, coded: Coded, first_row: int, device: str | torch.device) -> CodedRows:
        """From what is stored; on the CPU codes share its memory."""
        assert coded.codec == "int8" or coded.of == "value"
        codes = torch.from_numpy(coded.codes)
        affine = Affine(*(torch.from_numpy(a.copy()).to(device) for a in (coded.scale, coded.center)))
        codes = codes.view(torch.int8) if coded.codec == "int8" else codes
        return cls(coded.codec, codes.to(device), affine, first_row)

    @property
    def shape(self) -> tuple[int, int, int]:
        """n_kv, n_rows, head_dim."""
        return self.codes.shape[0], self.codes.shape[1], self.affine.scale.shape[1]

    @cached_property
    def kernel(self) -> NDArray[np.int8] | TokenCodes:
        """As kernels read `y`, on the CPU."""
        codes = read_only(self.codes.numpy())
        return codes if self.codec == "int8" else TokenCodes(codes, self.shape[2], BITS[self.codec])

    def on_cpu(self) -> CodedRows:
        """With its codes in the machine's memory."""
        return self if self.codes.device.type == "cpu" else dataclasses.replace(self, codes=self.codes.cpu())

    def numbers(self, head: int, rows: Tensor | slice) -> Tensor:
        """Rows of a head, [..., head_dim], float32, in torch: what kernels are compared with.

        Args:
            rows: int64, of the layer, any shape; or a slice of the rows here.
        """
        codes = self.codes[head, rows] if isinstance(rows, slice) else self.codes[head][rows - self.first_row]
        y = codes.float() if self.codec == "int8" else _grouped(codes, self.shape[2], BITS[self.codec])
        return y * self.affine.scale[head] + self.affine.center[head]

    def decoded(self) -> Tensor:
        """All rows, [n_kv, n_rows, head_dim], float32."""
        return torch.stack([self.numbers(head, slice(None)) for head in range(self.shape[0])])


def _grouped(codes: Tensor, dim: int, bits: int) -> Tensor:
    """`y` of values in groups, [..., width] -> [..., dim]."""
    width, groups, top = -(-dim * bits // 8), -(-dim // GROUP), 2**bits - 1
    planes = [(codes[..., :width] >> shift) & top for shift in range(0, 8, bits)]
    plain = torch.cat(planes, dim=-1)[..., :dim].float()
    steps = torch.from_numpy(STEPS).to(codes.device)[codes[..., width : width + groups].long()]
    halves = codes[..., width + groups :]
    zero = torch.stack([halves & 15, halves >> 4], dim=-1).flatten(-2)[..., :groups].float()
    channels = torch.arange(dim, device=codes.device) // GROUP
    return steps[..., channels] * (plain - zero[..., channels] * (top / 15))
