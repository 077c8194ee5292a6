"""Networks whose BatchNorm layers can, or must not, be folded into convolutions."""

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


class Chain(nn.Module):
    """Convolutions directly followed by BatchNorm: with bias, strided, in groups, and BatchNorm without affine."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.SiLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1, padding_mode="circular", groups=2),
            nn.BatchNorm2d(8, affine=False, eps=1e-3),
            nn.SiLU(),
            nn.Conv2d(8, 8, 1, bias=False),
            nn.BatchNorm2d(8, affine=False),
            nn.Flatten(),
        )
        self.fc = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


class Unfoldable(nn.Module):
    """One case, chosen by name, in which `bn` must not be folded into `conv`."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        if case == "other layers":
            self.conv, self.bn = nn.ConvTranspose2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        elif case == "other class":
            self.bn = Shifted(3)
        elif case == "parametrised convolution":
            parametrizations.weight_norm(self.conv)
        elif case == "parametrised norm":
            parametrize.register_parametrization(self.bn, "weight", nn.Softplus())
        elif case == "untracked":
            self.bn = nn.BatchNorm2d(3, track_running_stats=False)
        self.more = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        # `case` is a constant for torch.fx, the sum of an image is not.
        if self.case == "untraceable" and x.sum() < 0:
            return self.fc(x.flatten(1))
        if self.case == "order":
            out = self.conv(self.bn(x))
        elif self.case == "activation between":
            out = self.bn(nn.functional.silu(self.conv(x)))
        elif self.case == "convolution twice":
            out = self.bn(self.conv(nn.functional.silu(self.conv(x))))
        elif self.case == "norm twice":
            out = self.bn(nn.functional.silu(self.bn(self.conv(x))))
        elif self.case == "result used elsewhere":
            out = self.conv(x)
            out = self.bn(out) + 0.5 * out
        elif self.case == "result used by two norms":
            out = self.conv(x)
            out = self.bn(out) * self.more(out)
        else:
            out = self.bn(self.conv(x))
        return self.fc(out.flatten(1))


class Shifted(nn.BatchNorm2d):
    """More than BatchNorm, as timm's BatchNormAct2d is."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.silu(super().forward(input))


class Aliased(nn.Module):
    """Convolution and BatchNorm have two names each, or another operation reads the convolution's weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        if not tied:
            self.body = nn.Sequential(self.conv, self.bn, nn.ReLU())
        self.tied, self.fc = tied, nn.Linear(3 * 64 if tied else 4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        if not self.tied:
            return self.fc(self.body(x).flatten(1))
        hidden = self.bn(self.conv(x)).relu()
        return self.fc(nn.functional.conv_transpose2d(hidden, self.conv.weight).flatten(1))
