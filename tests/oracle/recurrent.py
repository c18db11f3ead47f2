"""BasicVSR and IconVSR: pixels fetched one corner at a time, resizing as matrices, passes as recursions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


# ---- places between pixels --------------------------------------------------------------------------------


def fetch(x: Tensor, row: Tensor, column: Tensor, outside: str) -> Tensor:
    """`x` (B C H W) at real positions (B h w): four neighbours weighed by how near they are. `outside`:
    "zeros" (each neighbour beyond the edge counts as zero) or "border" (positions are first moved inside)."""
    batch, channels, height, width = x.shape
    if outside == "border":
        row, column = row.clamp(0, height - 1), column.clamp(0, width - 1)
    top, left = row.floor(), column.floor()
    total = torch.zeros(batch, channels, *row.shape[1:], dtype=x.dtype)
    for down in (0, 1):
        for right in (0, 1):
            r, c = top + down, left + right
            share = (1 - (row - r).abs()) * (1 - (column - c).abs())
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            at = r.clamp(0, height - 1).long() * width + c.clamp(0, width - 1).long()
            index = at.flatten(1)[:, None].expand(-1, channels, -1)
            values = x.flatten(2).gather(2, index).unflatten(2, row.shape[1:])
            total = total + values * (share * inside)[:, None]
    return total


def warped(x: Tensor, flow: Tensor, outside: str = "zeros") -> Tensor:
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=x.dtype) for n in x.shape[-2:]), indexing="ij")
    return fetch(x, rows + flow[:, 1], columns + flow[:, 0], outside)


def axis(source: int, target: int, corners: bool, dtype: torch.dtype) -> Tensor:
    """The matrix (target, source) of linear interpolation; `corners`: end pixels meet end pixels."""
    i = torch.arange(target, dtype=torch.float64)
    if corners:
        at = i * ((source - 1) / (target - 1)) if target > 1 else i * 0
    else:
        at = ((i + 0.5) * source / target - 0.5).clamp(0, source - 1)
    near = 1 - (at[:, None] - torch.arange(source, dtype=torch.float64)).abs()
    return near.clamp(min=0).to(dtype)


def resized(x: Tensor, height: int, width: int, corners: bool = False) -> Tensor:
    down = axis(x.shape[-2], height, corners, x.dtype)
    right = axis(x.shape[-1], width, corners, x.dtype)
    return down @ x @ right.T


def larger(x: Tensor, times: int) -> Tensor:
    return resized(x, times * x.shape[-2], times * x.shape[-1])


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.1 * x)


class Network:
    """What both networks share. `w`: weights by BasicSR's names."""

    def __init__(self, weights: Weights):
        self.w = weights

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w[f"{name}.bias"], stride, padding=weight.shape[-1] // 2)

    def blocks(self, name: str, x: Tensor) -> Tensor:
        i = 0
        while f"{name}.{i}.conv1.weight" in self.w:
            x = x + self.conv(f"{name}.{i}.conv2", self.conv(f"{name}.{i}.conv1", x).clamp(min=0))
            i += 1
        return x

    def trunk(self, name: str, x: Tensor) -> Tensor:
        return self.blocks(f"{name}.main.2", leaky(self.conv(f"{name}.main.0", x)))

    # -- flow

    def flow(self, reference: Tensor, other: Tensor) -> Tensor:
        height, width = reference.shape[-2:]
        tall, wide = (height + 31) // 32 * 32, (width + 31) // 32 * 32
        pair = [
            (resized(x, tall, wide) - self.w["spynet.mean"]) / self.w["spynet.std"]
            for x in (reference, other)
        ]
        flow = resized(self.level(5, *pair), height, width)
        return torch.stack((flow[:, 0] * width / wide, flow[:, 1] * height / tall), 1)

    def level(self, i: int, reference: Tensor, other: Tensor) -> Tensor:
        """The flow of a level, from that of the next coarser one, of pictures of half the size."""
        height, width = reference.shape[-2:]
        if i == 0:
            flow = torch.zeros_like(reference[:, :2])
        else:
            coarse = self.level(i - 1, halved(reference), halved(other))
            flow = 2 * resized(coarse, height, width, corners=True)
        x = torch.cat((reference, warped(other, flow, "border"), flow), 1)
        for layer in range(5):
            x = self.conv(f"spynet.basic_module.{i}.basic_module.{2 * layer}", x)
            x = x.clamp(min=0) if layer < 4 else x
        return flow + x

    def hidden_from(self, hidden: Tensor, frame: Tensor, neighbour: Tensor) -> Tensor:
        return warped(hidden, self.flow(frame, neighbour))

    # -- frames

    def picture(self, features: Tensor, frame: Tensor) -> Tensor:
        for name in ("upconv1", "upconv2"):
            y = self.conv(name, features)
            batch, channels, height, width = y.shape
            y = y.reshape(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
            features = leaky(y.reshape(batch, channels // 4, 2 * height, 2 * width))
        return self.conv("conv_last", leaky(self.conv("conv_hr", features))) + larger(frame, 4)

    def start(self, frame: Tensor) -> Tensor:
        width = self.w["conv_hr.weight"].new_zeros(self.w["upconv1.weight"].shape[1])
        return width[None, :, None, None].expand(frame.shape[0], -1, *frame.shape[-2:])


def halved(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def basicvsr(weights: Weights, frames: Tensor) -> Tensor:
    net, count = Network(weights), frames.shape[1]
    x = [frames[:, i] for i in range(count)]
    backward, forward = {}, {}
    for order, name, hidden in (
        (range(count - 1, -1, -1), "backward_trunk", backward),
        (range(count), "forward_trunk", forward),
    ):
        before = None
        for i in order:
            past = net.start(x[i]) if before is None else net.hidden_from(hidden[before], x[i], x[before])
            hidden[i] = net.trunk(name, torch.cat((x[i], past), 1))
            before = i
    both = [leaky(net.conv("fusion", torch.cat((backward[i], forward[i]), 1))) for i in range(count)]
    return torch.stack([net.picture(both[i], x[i]) for i in range(count)], 1)


def iconvsr(weights: Weights, frames: Tensor, stride: int = 5) -> Tensor:
    net, count = Network(weights), frames.shape[1]
    height, width = frames.shape[-2:]
    rows = [*range(height), *range(height - 2, -1, -1)][: (height + 3) // 4 * 4]
    columns = [*range(width), *range(width - 2, -1, -1)][: (width + 3) // 4 * 4]
    x = [frames[:, i][:, :, rows][..., columns] for i in range(count)]
    reach = weights["edvr.fusion.feat_fusion.weight"].shape[1] // len(weights["edvr.conv_first.bias"]) // 2
    front = [x[i] for i in range(2 * reach, reach, -1)]
    back = [x[-i] for i in range(reach + 2, 2 * reach + 2)]
    longer = [*front, *x, *back]
    key = {
        i: edvr(net, longer[i : i + 2 * reach + 1]) for i in range(count) if i % stride == 0 or i == count - 1
    }
    backward: dict[int, Tensor] = {}
    for i in range(count - 1, -1, -1):
        past = net.hidden_from(backward[i + 1], x[i], x[i + 1]) if i + 1 in backward else net.start(x[i])
        if i in key:
            past = net.conv("backward_fusion", torch.cat((past, key[i]), 1))
        backward[i] = net.trunk("backward_trunk", torch.cat((x[i], past), 1))
    out, hidden = [], None
    for i in range(count):
        past = net.start(x[i]) if hidden is None else net.hidden_from(hidden, x[i], x[i - 1])
        if i in key:
            past = net.conv("forward_fusion", torch.cat((past, key[i]), 1))
        hidden = net.trunk("forward_trunk", torch.cat((x[i], backward[i], past), 1))
        out.append(net.picture(hidden, x[i])[..., : 4 * height, : 4 * width])
    return torch.stack(out, 1)


# ---- EDVR -------------------------------------------------------------------------------------------------


def deformed(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Every kernel tap of every channel group fetched where its offset says."""
    groups, (height, width) = mask.shape[1] // 9, x.shape[-2:]
    each = x.shape[1] // groups
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=x.dtype), torch.arange(width, dtype=x.dtype), indexing="ij"
    )
    out = bias[None, :, None, None].expand(x.shape[0], -1, height, width)
    for g in range(groups):
        channels = slice(g * each, (g + 1) * each)
        for tap in range(9):
            row = rows + tap // 3 - 1 + offset[:, 18 * g + 2 * tap]
            column = columns + tap % 3 - 1 + offset[:, 18 * g + 2 * tap + 1]
            seen = fetch(x[:, channels], row, column, "zeros") * mask[:, 9 * g + tap, None]
            out = out + torch.einsum("oc,bchw->bohw", weight[:, channels, tap // 3, tap % 3], seen)
    return out


def deform_layer(net: Network, name: str, x: Tensor, guide: Tensor) -> Tensor:
    y = net.conv(f"{name}.conv_offset", guide)
    taps = y.shape[1] // 3
    mask = 1 / (1 + torch.exp(-y[:, 2 * taps :]))
    return deformed(x, y[:, : 2 * taps], mask, net.w[f"{name}.weight"], net.w[f"{name}.bias"])


def edvr(net: Network, frames: list[Tensor]) -> Tensor:
    levels = []
    for frame in frames:
        one = net.blocks("edvr.feature_extraction", leaky(net.conv("edvr.conv_first", frame)))
        two = leaky(net.conv("edvr.conv_l2_2", leaky(net.conv("edvr.conv_l2_1", one, 2))))
        three = leaky(net.conv("edvr.conv_l3_2", leaky(net.conv("edvr.conv_l3_1", two, 2))))
        levels.append((one, two, three))
    reference = levels[len(frames) // 2]
    return attention(net, [align(net, own, reference) for own in levels], len(frames) // 2)


def align(net: Network, own: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> Tensor:
    at = "edvr.pcd_align"
    guide3 = leaky(net.conv(f"{at}.offset_conv1.l3", torch.cat((own[2], reference[2]), 1)))
    guide3 = leaky(net.conv(f"{at}.offset_conv2.l3", guide3))
    three = leaky(deform_layer(net, f"{at}.dcn_pack.l3", own[2], guide3))

    guide2 = leaky(net.conv(f"{at}.offset_conv1.l2", torch.cat((own[1], reference[1]), 1)))
    guide2 = leaky(net.conv(f"{at}.offset_conv2.l2", torch.cat((guide2, larger(guide3, 2) * 2), 1)))
    guide2 = leaky(net.conv(f"{at}.offset_conv3.l2", guide2))
    two = deform_layer(net, f"{at}.dcn_pack.l2", own[1], guide2)
    two = leaky(net.conv(f"{at}.feat_conv.l2", torch.cat((two, larger(three, 2)), 1)))

    guide1 = leaky(net.conv(f"{at}.offset_conv1.l1", torch.cat((own[0], reference[0]), 1)))
    guide1 = leaky(net.conv(f"{at}.offset_conv2.l1", torch.cat((guide1, larger(guide2, 2) * 2), 1)))
    guide1 = leaky(net.conv(f"{at}.offset_conv3.l1", guide1))
    one = deform_layer(net, f"{at}.dcn_pack.l1", own[0], guide1)
    one = net.conv(f"{at}.feat_conv.l1", torch.cat((one, larger(two, 2)), 1))

    guide = leaky(net.conv(f"{at}.cas_offset_conv1", torch.cat((one, reference[0]), 1)))
    return leaky(
        deform_layer(net, f"{at}.cas_dcnpack", one, leaky(net.conv(f"{at}.cas_offset_conv2", guide)))
    )


def attention(net: Network, aligned: list[Tensor], middle: int) -> Tensor:
    at = "edvr.fusion"
    reference = net.conv(f"{at}.temporal_attn1", aligned[middle])
    weighed = []
    for features in aligned:
        likeness = (net.conv(f"{at}.temporal_attn2", features) * reference).sum(1, keepdim=True)
        weighed.append(features / (1 + torch.exp(-likeness)))
    joined = torch.cat(weighed, 1)
    fused = leaky(net.conv(f"{at}.feat_fusion", joined))

    y = leaky(net.conv(f"{at}.spatial_attn2", pooled(leaky(net.conv(f"{at}.spatial_attn1", joined)))))
    low = leaky(net.conv(f"{at}.spatial_attn_l2", pooled(leaky(net.conv(f"{at}.spatial_attn_l1", y)))))
    low = leaky(net.conv(f"{at}.spatial_attn_l3", low))
    y = leaky(net.conv(f"{at}.spatial_attn3", y)) + larger(low, 2)
    y = net.conv(f"{at}.spatial_attn5", larger(leaky(net.conv(f"{at}.spatial_attn4", y)), 2))
    added = net.conv(f"{at}.spatial_attn_add2", leaky(net.conv(f"{at}.spatial_attn_add1", y)))
    return 2 * fused / (1 + torch.exp(-y)) + added


def pooled(x: Tensor) -> Tensor:
    """Every second place's 3x3 neighbourhood: its maximum, then its sum over nine (zeros outside)."""
    lowest = F.pad(x, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 2).unfold(3, 3, 2)
    zeros = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2)
    return torch.cat((lowest.amax((-1, -2)), zeros.sum((-1, -2)) / 9), 1)
