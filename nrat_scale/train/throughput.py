"""How much of the device a step uses: floating-point operations a second, as a share of the card's bf16 peak."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nrat_scale.core.modes import attack_mode

# Dense bf16 peak of the tensor cores with float32 accumulation, in TFLOP/s, from NVIDIA's datasheets (H100, H200, A100, L40S,
# HGX B200) and the Ada whitepaper (RTX 4090); a name is matched as a part of what the driver reports, the first that fits.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.05,
    "RTX 4090": 165.2,
}


def peak_tflops(device_name: str) -> float | None:
    """The dense bf16 peak of a card, or None if it is not in `PEAK_TFLOPS`."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


@torch.no_grad()
def forward_flops(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of one forward pass of one image [H, W, C]; a multiply-add counts as two."""
    parameter = next(model.parameters())
    height, width, channels = image_shape
    x = torch.zeros(1, channels, height, width, device=parameter.device, dtype=parameter.dtype)
    with attack_mode(model, "eval"), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()
