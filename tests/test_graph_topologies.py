"""One small net for every way in which dimensions hang together: what is found, and that shrinking is exact."""

from __future__ import annotations

import pytest
import torch
from exactness import check_exact
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import sharpen

SEQUENCE = {"x": torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
IMAGE = {"x": torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}


class Net(nn.Module):
    """A net of named layers; subclasses say how they are wired."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class Chain(Net):
    def __init__(self) -> None:
        super().__init__(a=nn.Linear(12, 20), b=nn.Linear(20, 14), c=nn.Linear(14, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(F.gelu(self.a(x)))))


class Residual(Net):
    def __init__(self) -> None:
        super().__init__(
            stem=nn.Conv2d(3, 16, 3), a=nn.Conv2d(16, 10, 1), b=nn.Conv2d(10, 16, 1), head=nn.Linear(16, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.b(F.relu(self.a(x)))).mean((2, 3)))


class PaddedShortcut(Net):
    def __init__(self) -> None:
        super().__init__(a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(8, 14, 3, padding=1), head=nn.Linear(14, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head((F.pad(x, (0, 0, 0, 0, 2, 4)) + self.b(F.relu(x))).mean((2, 3)))


class Concat(Net):
    def __init__(self) -> None:
        super().__init__(
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(3, 6, 3, padding=1),
            n=nn.BatchNorm2d(14),
            c=nn.Conv2d(14, 10, 1),
            head=nn.Linear(24, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        both = F.relu(self.n(torch.cat([self.a(x), self.b(x)], 1)))
        return self.head(torch.cat([both, self.c(both)], 1).mean((2, 3)))


class MisalignedConcat(Net):
    def __init__(self) -> None:
        super().__init__(
            a=nn.Linear(12, 8), b=nn.Linear(12, 10), c=nn.Linear(12, 6), d=nn.Linear(12, 12), head=nn.Linear(18, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.cat([self.a(x), self.b(x)], -1), torch.cat([self.c(x), self.d(x)], -1)
        return self.head(torch.tanh(left + right))


class Split(Net):
    def __init__(self) -> None:
        super().__init__(a=nn.Linear(12, 20), b=nn.Linear(8, 6), head=nn.Linear(18, 4))
        self.left, self.right = 8, 12

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).split([self.left, self.right], -1)
        return self.head(torch.cat([self.b(F.relu(left)), right], -1))


class Grouped(Net):
    def __init__(self) -> None:
        super().__init__(
            a=nn.Conv2d(3, 12, 1),
            g=nn.Conv2d(12, 24, 3, padding=1, groups=4),
            b=nn.Conv2d(24, 8, 1),
            head=nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.relu(self.g(F.relu(self.a(x))))).mean((2, 3)))


class Depthwise(Net):
    def __init__(self) -> None:
        super().__init__(
            a=nn.Conv2d(3, 12, 1),
            d=nn.Conv2d(12, 12, 3, padding=1, groups=12),
            n=nn.BatchNorm2d(12),
            b=nn.Conv2d(12, 8, 1),
            head=nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.relu6(self.n(self.d(F.relu6(self.a(x)))))).mean((2, 3)))


class Flatten(Net):
    def __init__(self) -> None:
        super().__init__(a=nn.Conv2d(3, 10, 3, stride=3), head=nn.Linear(90, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.a(x)).flatten(1))


class SharedWeights(Net):
    def __init__(self) -> None:
        super().__init__(a=nn.Linear(12, 12), b=nn.Linear(12, 12), head=nn.Linear(12, 4))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class TwoOutputs(Net):
    def __init__(self) -> None:
        super().__init__(a=nn.Linear(12, 20), b=nn.Linear(20, 5), c=nn.Linear(20, 16), d=nn.Linear(16, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.gelu(self.a(x))
        return {"logits": self.b(x), "boxes": self.d(F.gelu(self.c(x)))}


class GatedFFN(Net):
    def __init__(self) -> None:
        super().__init__(up=nn.Linear(12, 40), down=nn.Linear(20, 12), head=nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.head(x + self.down(F.silu(gate) * value))


class GroupedQueryAttention(Net):
    def __init__(self) -> None:
        super().__init__(
            q=nn.Linear(12, 48), k=nn.Linear(12, 24), v=nn.Linear(12, 24), o=nn.Linear(48, 12), head=nn.Linear(12, 4)
        )
        self.width, self.repeats, self.scale = 8, 2, 8**-0.5

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (each(x).view(batch, length, -1, self.width).transpose(1, 2) for each in (self.q, self.k, self.v))
        k, v = (each.repeat_interleave(self.repeats, 1) for each in (k, v))
        return self.head(
            x + self.o(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))
        )


class FusedAttention(Net):
    def __init__(self) -> None:
        super().__init__(qkv=nn.Linear(12, 96), o=nn.Linear(32, 12), head=nn.Linear(12, 4))
        self.heads, self.width = 4, 8

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * 0.35).softmax(-1)
        return self.head(x + self.o((weights @ v).transpose(1, 2).reshape(batch, length, -1)))


class MultiheadAttention(Net):
    def __init__(self) -> None:
        super().__init__(
            a=nn.Linear(12, 16), attention=nn.MultiheadAttention(16, 4, batch_first=True), head=nn.Linear(16, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class GroupNorm(Net):
    def __init__(self) -> None:
        super().__init__(a=nn.Conv2d(3, 20, 1), n=nn.GroupNorm(5, 20), b=nn.Conv2d(20, 8, 1), head=nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.silu(self.n(self.a(x)))).mean((2, 3)))


class TransposedConv(Net):
    def __init__(self) -> None:
        super().__init__(
            a=nn.Conv2d(3, 12, 3),
            up=nn.ConvTranspose2d(12, 8, 2, stride=2),
            s=nn.ConvTranspose2d(8, 8, 2, groups=4),
            b=nn.Conv2d(8, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.s(F.relu(self.up(F.relu(self.a(x)))))))


class PixelShuffle(Net):
    def __init__(self) -> None:
        super().__init__(a=nn.Conv2d(3, 24, 3), b=nn.Conv2d(6, 10, 1), c=nn.Conv2d(40, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.pixel_shuffle(self.a(x), 2)))
        return self.c(F.pixel_unshuffle(x, 2))


class ChannelShuffle(Net):
    def __init__(self) -> None:
        super().__init__(a=nn.Conv2d(3, 12, 1), g=nn.Conv2d(12, 12, 1, groups=3), b=nn.Conv2d(12, 4, 1))
        self.groups = 3

    def forward(self, x: Tensor) -> Tensor:
        x = self.g(self.a(x))
        batch, channels, height, width = x.shape
        x = x.view(batch, self.groups, channels // self.groups, height, width).transpose(1, 2)
        return self.b(F.relu(x.reshape(batch, channels, height, width)))


class Rotary(Net):
    """Halves of the width turn together; the angles are a buffer of half the width."""

    def __init__(self) -> None:
        super().__init__(q=nn.Linear(12, 32), k=nn.Linear(12, 32), v=nn.Linear(12, 32), o=nn.Linear(32, 4))
        self.width = 8
        self.register_buffer("frequency", torch.rand(4, dtype=torch.float64))

    def turn(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * self.frequency
        angle = torch.cat([angle, angle], -1)
        half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
        return x * angle.cos() + half * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (each(x).view(batch, length, -1, self.width).transpose(1, 2) for each in (self.q, self.k, self.v))
        weights = (self.turn(q) @ self.turn(k).transpose(-1, -2)).mul(0.35).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(batch, length, -1))


class SqueezeExcite(Net):
    def __init__(self) -> None:
        super().__init__(a=nn.Conv2d(3, 16, 1), down=nn.Conv2d(16, 6, 1), up=nn.Conv2d(6, 16, 1), b=nn.Conv2d(16, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.b(x * self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid())


SIZES = {
    Chain: {"a": 20, "b": 14},
    Residual: {"stream": 16, "a": 10},
    PaddedShortcut: {"stream": 8},
    Concat: {"a": 8, "b": 6, "c": 10},
    MisalignedConcat: {"stream": 6, "stream#2": 2, "stream#3": 10},
    Split: {"a": 8, "a#2": 12, "b": 6},
    Grouped: {"a.channels": 4, "a.channels#2": 3, "g.channels": 6, "b": 8},
    Depthwise: {"a": 12, "b": 8},
    Flatten: {"a": 10},
    SharedWeights: {},
    TwoOutputs: {"a": 20, "c": 16},
    GatedFFN: {"up": 20},
    GroupedQueryAttention: {"heads": 3, "q.heads": 2, "head_width": 8},
    FusedAttention: {"qkv.heads": 4, "qkv.head_width": 8},
    MultiheadAttention: {"heads": 4, "head_width": 4, "attention.out_proj": 16},
    GroupNorm: {"a.channels": 5, "a.channels#2": 4, "b": 8},
    TransposedConv: {"a": 12, "up.channels": 4, "up.channels#2": 2, "s": 2},
    PixelShuffle: {"a.channels": 6, "b": 10},
    ChannelShuffle: {"a.channels": 3, "a.channels#2": 4, "g.channels": 4},
    Rotary: {"heads": 4, "head_width": 4},
    SqueezeExcite: {"a": 16, "down": 6},
}
"""Net -> the groups that it has."""


@pytest.mark.parametrize("kind", SIZES, ids=lambda kind: kind.__name__)
def test_topology(kind: type[Net]) -> None:
    torch.manual_seed(0)
    model = kind().double().eval()
    sharpen(model, factor=2.0)
    inputs = IMAGE if any(isinstance(layer, nn.Conv2d) for layer in model.children()) else SEQUENCE
    graph = check_exact(model, inputs)
    assert {name: group.size for name, group in graph.groups.items()} == SIZES[kind]
