"""EDVR-M's feature extractor (Wang et al. 2019), with BasicSR's names: IconVSR's keyframes come from it.

Every frame's features are aligned to the middle frame's by deformable convolutions over a pyramid of three
levels (PCD), then weighed in time and space and fused (TSA).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.baselines.basicvsr import SLOPE, ResidualBlock
from eval.baselines.deform import DeformConv


def conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size, but for its stride."""
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)


def act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


def doubled(x: Tensor) -> Tensor:
    """Twice the size, bilinear."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class PCDAlign(nn.Module):
    """Pyramid, cascading and deformable alignment of one frame's features to the reference's."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        levels = ("l1", "l2", "l3")
        self.offset_conv1 = nn.ModuleDict({level: conv(2 * width, width) for level in levels})
        self.offset_conv2 = nn.ModuleDict(
            {level: conv(width if level == "l3" else 2 * width, width) for level in levels}
        )
        self.offset_conv3 = nn.ModuleDict({level: conv(width, width) for level in levels[:2]})
        self.dcn_pack = nn.ModuleDict({level: DeformConv(width, groups) for level in levels})
        self.feat_conv = nn.ModuleDict({level: conv(2 * width, width) for level in levels[:2]})
        self.cas_offset_conv1 = conv(2 * width, width)
        self.cas_offset_conv2 = conv(width, width)
        self.cas_dcnpack = DeformConv(width, groups)

    def forward(self, frame: list[Tensor], reference: list[Tensor]) -> Tensor:
        """Features of both at full, half and quarter size to the aligned ones at full size."""
        guide = features = None
        for level, x, ref in zip(("l3", "l2", "l1"), frame[::-1], reference[::-1], strict=True):
            own = act(self.offset_conv1[level](torch.cat([x, ref], 1)))
            if guide is None:
                guide = act(self.offset_conv2[level](own))
                features = act(self.dcn_pack[level](x, guide))
                continue
            # Offsets are in pixels: twice as far at twice the size.
            guide = act(self.offset_conv2[level](torch.cat([own, 2 * doubled(guide)], 1)))
            guide = act(self.offset_conv3[level](guide))
            both = torch.cat([self.dcn_pack[level](x, guide), doubled(features)], 1)
            features = self.feat_conv[level](both)
            if level == "l2":
                features = act(features)
        guide = act(self.cas_offset_conv1(torch.cat([features, reference[0]], 1)))
        return act(self.cas_dcnpack(features, act(self.cas_offset_conv2(guide))))


class TSAFusion(nn.Module):
    """Temporal and spatial attention: aligned features of all frames to one."""

    def __init__(self, width: int, frames: int):
        super().__init__()
        self.temporal_attn1 = conv(width, width)
        self.temporal_attn2 = conv(width, width)
        self.feat_fusion = conv(frames * width, width, 1)
        self.spatial_attn1 = conv(frames * width, width, 1)
        self.spatial_attn2 = conv(2 * width, width, 1)
        self.spatial_attn3 = conv(width, width)
        self.spatial_attn4 = conv(width, width, 1)
        self.spatial_attn5 = conv(width, width)
        self.spatial_attn_l1 = conv(width, width, 1)
        self.spatial_attn_l2 = conv(2 * width, width)
        self.spatial_attn_l3 = conv(width, width)
        self.spatial_attn_add1 = conv(width, width, 1)
        self.spatial_attn_add2 = conv(width, width, 1)

    def forward(self, aligned: Tensor) -> Tensor:
        """`B F C H W` to `B C H W`."""
        reference = self.temporal_attn1(aligned[:, aligned.shape[1] // 2])
        likeness = self.temporal_attn2(aligned.flatten(0, 1)).unflatten(0, aligned.shape[:2])
        share = (likeness * reference[:, None]).sum(2, keepdim=True).sigmoid()
        weighed = (aligned * share).flatten(1, 2)
        features = act(self.feat_fusion(weighed))

        half = act(self.spatial_attn2(_pooled(act(self.spatial_attn1(weighed)))))
        quarter = act(self.spatial_attn_l2(_pooled(act(self.spatial_attn_l1(half)))))
        quarter = act(self.spatial_attn_l3(quarter))
        half = act(self.spatial_attn3(half)) + doubled(quarter)
        attention = self.spatial_attn5(doubled(act(self.spatial_attn4(half))))
        added = self.spatial_attn_add2(act(self.spatial_attn_add1(attention)))
        return features * attention.sigmoid() * 2 + added


def _pooled(x: Tensor) -> Tensor:
    """Maximum beside mean of 3x3 places, at half the size."""
    return torch.cat([F.max_pool2d(x, 3, 2, padding=1), F.avg_pool2d(x, 3, 2, padding=1)], 1)


class EDVRFeatures(nn.Module):
    """Features of the middle one of `frames` neighbouring frames, at their own size."""

    def __init__(self, width: int, frames: int, blocks: int, groups: int):
        super().__init__()
        self.conv_first = conv(3, width)
        self.feature_extraction = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.conv_l2_1, self.conv_l2_2 = conv(width, width, stride=2), conv(width, width)
        self.conv_l3_1, self.conv_l3_2 = conv(width, width, stride=2), conv(width, width)
        self.pcd_align = PCDAlign(width, groups)
        self.fusion = TSAFusion(width, frames)

    def forward(self, frames: Tensor) -> Tensor:
        """`B F 3 H W` in [0, 1], H and W multiples of 4, to `B C H W`."""
        count = frames.shape[1]
        l1 = self.feature_extraction(act(self.conv_first(frames.flatten(0, 1))))
        l2 = act(self.conv_l2_2(act(self.conv_l2_1(l1))))
        l3 = act(self.conv_l3_2(act(self.conv_l3_1(l2))))
        levels = [x.unflatten(0, (-1, count)) for x in (l1, l2, l3)]
        reference = [x[:, count // 2] for x in levels]
        aligned = [self.pcd_align([x[:, i] for x in levels], reference) for i in range(count)]
        return self.fusion(torch.stack(aligned, 1))
