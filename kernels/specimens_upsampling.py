"""Representative calls of the upsampling operators' launchers; see `fastseg.kernels.specimens`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from fastseg.kernels import (
    upsample_argmax,
    upsample_confusion_matrix,
    upsample_cross_entropy,
    upsample_mask_argmax,
    upsample_sigmoid_sums,
    upsample_threshold,
)
from fastseg.kernels.specimen import Call, Specimen, describe, fill, make_tensor
from fastseg.ops.losses.options import LossOptions
from fastseg.ops.upsample_cross_entropy import OVERLAP_SUMS
from fastseg.ops.upsample_sigmoid_sums import ALL_SUMS, CLASS_SUMS, SigmoidOptions
from fastseg.ops.upsampling import Upsampling, upsampling_between


@dataclasses.dataclass(frozen=True)
class _Upsampling:
    """Logits of a size and dtype, the output's height and width, and the arguments of the operators."""

    sizes: tuple[int, int, int, int]
    out: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = False
    mode: str = "bilinear"
    align_corners: bool = False
    target: torch.dtype = torch.int64
    weighted: bool = False
    label_smoothing: float = 0.0
    reduction: str = "mean"
    with_overlap: bool = False
    predicted: bool = False  # whether the predictions and the confusion matrix are specimens, too
    tuned: bool = False

    def specimens(self) -> Iterator[Specimen]:
        """Its loss, forward and backward, and its predictions, stored and counted."""
        name = describe(
            "x".join(map(str, self.sizes)), "to", "x".join(map(str, self.out)), self.dtype,
            self.channels_last and "channels_last", self.mode, self.align_corners and "align_corners", self.target,
            self.weighted and "weighted", self.label_smoothing and "smoothed", self.reduction,
            self.with_overlap and "overlap",
        )  # fmt: skip
        yield Specimen(f"upsample_cross_entropy {name} forward", self.forward, self.tuned)
        yield Specimen(f"upsample_cross_entropy {name} backward", self.backward, self.tuned)
        if not self.predicted:
            return
        yield Specimen(f"upsample_argmax {name} forward", self.argmax, self.tuned)
        yield Specimen(f"upsample_confusion_matrix {name} forward", self.confusion_matrix, self.tuned)
        yield Specimen(f"upsample_threshold {name} forward", self.threshold, self.tuned)
        yield Specimen(f"upsample_mask_argmax {name} forward", self.mask_argmax, self.tuned)

    @property
    def _upsampling(self) -> Upsampling:
        return upsampling_between(self.sizes[2:], self.out, self.mode, self.align_corners)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
        """Input, target, weight, and what forward fills: loss, statistics, total_weight and overlap."""
        input = make_tensor(self.sizes, self.dtype, device, self.channels_last)
        images, classes, _, _ = self.sizes
        target = torch.randint(classes, (images, *self.out), dtype=self.target, device=device)
        accumulation = torch.float64 if self.dtype == torch.float64 else torch.float32
        weight = torch.rand(classes, dtype=accumulation, device=device) if self.weighted else None
        statistics = torch.empty((2, images, *self.out), dtype=accumulation, device=device)
        total_weight = statistics.new_empty(())
        loss = torch.empty_like(statistics[0] if self.reduction == "none" else total_weight)
        overlap = statistics.new_empty((OVERLAP_SUMS * self.with_overlap, images, classes))
        return input, target, weight, [loss, statistics, total_weight, overlap]

    @property
    def _options(self) -> LossOptions:
        return LossOptions(-100, self.reduction, self.label_smoothing, self.mode, self.align_corners)

    def forward(self, device: torch.device) -> Call:
        """Prepares the loss."""
        input, target, weight, outputs = self.tensors(device)
        tensors = upsample_cross_entropy.ForwardTensors(input, target, weight, *outputs)

        def call() -> tuple[Tensor, ...]:
            upsample_cross_entropy.forward(tensors, self._options, self._upsampling)
            return tuple(outputs)

        return call

    def backward(self, device: torch.device) -> Call:
        """Prepares the loss' gradient, by running forward."""
        input, target, weight, outputs = self.tensors(device)
        upsample_cross_entropy.forward(
            upsample_cross_entropy.ForwardTensors(input, target, weight, *outputs), self._options, self._upsampling
        )
        loss, statistics, total_weight, overlap = outputs
        tensors = upsample_cross_entropy.BackwardTensors(
            torch.ones_like(loss), torch.ones_like(overlap), input, target, weight, statistics, total_weight,
            torch.empty_like(input),
        )  # fmt: skip

        def call() -> tuple[Tensor, ...]:
            upsample_cross_entropy.backward(tensors, self._options, self._upsampling)
            return (tensors.grad_input,)

        return call

    def argmax(self, device: torch.device) -> Call:
        """Prepares the prediction, with confidence where the loss would have overlap."""
        input = make_tensor(self.sizes, self.dtype, device, self.channels_last)
        labels = torch.empty((self.sizes[0], *self.out), dtype=self.target, device=device)
        confidence = input.new_empty((self.sizes[0] * self.with_overlap, *self.out))

        def call() -> tuple[Tensor, ...]:
            upsample_argmax.forward((input, labels, confidence), self._upsampling)
            return labels, confidence

        return call

    def confusion_matrix(self, device: torch.device) -> Call:
        """Prepares the confusion matrix; with an ignored label where there are class weights."""
        input, target, _, _ = self.tensors(device)
        counts = torch.zeros(self.sizes[1] ** 2 + 1, dtype=torch.int64, device=device)
        ignore_index = 255 if self.weighted else None

        def call() -> tuple[Tensor, ...]:
            upsample_confusion_matrix.forward((input, target, counts.zero_()), ignore_index, self._upsampling)
            return (counts,)

        return call

    def threshold(self, device: torch.device) -> Call:
        """Prepares the masks of all classes, with scores where the loss would have overlap."""
        input = make_tensor(self.sizes, self.dtype, device, self.channels_last)
        images, classes, _, _ = self.sizes
        masks = torch.empty((images, classes, *self.out), dtype=torch.uint8, device=device)
        scores = input.new_empty((images * self.with_overlap, classes))
        boxes = torch.empty((*scores.shape, 4), dtype=torch.int64, device=device)

        def call() -> tuple[Tensor, ...]:
            upsample_threshold.forward((input, masks, scores, boxes), 0.0, self._upsampling)
            return masks, scores, boxes

        return call

    def mask_argmax(self, device: torch.device) -> Call:
        """Prepares the classes of masks, of which there are as many; their matrix products in TF32 but for doubles."""
        input = make_tensor(self.sizes, self.dtype, device, self.channels_last)
        images, queries, _, _ = self.sizes
        accumulation = torch.float64 if self.dtype == torch.float64 else torch.float32
        probabilities = make_tensor((images, queries, queries), accumulation, device, False)
        labels = torch.empty((images, *self.out), dtype=self.target, device=device)

        def call() -> tuple[Tensor, ...]:
            takes_tf32 = self.dtype in (torch.bfloat16, torch.float16)
            upsample_mask_argmax.forward((input, probabilities, labels), takes_tf32, self._upsampling)
            return (labels,)

        return call


@dataclasses.dataclass(frozen=True)
class _SigmoidSums:
    """Logits of a size and dtype, the output's height and width, and the arguments of the sums."""

    sizes: tuple[int, int, int, int]
    out: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = False
    target: torch.dtype | None = torch.uint8  # of masks; None for labels
    gamma: float | None = None
    smaller: bool = False
    mode: str = "bilinear"
    align_corners: bool = False
    tuned: bool = False

    def specimens(self) -> Iterator[Specimen]:
        """Forward and backward."""
        name = describe(
            "x".join(map(str, self.sizes)), "to", "x".join(map(str, self.out)), self.dtype,
            self.channels_last and "channels_last", self.target or "labels", self.mode,
            self.align_corners and "align_corners", "" if self.gamma is None else f"gamma {self.gamma}",
            self.smaller and "smaller",
        )  # fmt: skip
        yield Specimen(f"upsample_sigmoid_sums {name} forward", self.forward, self.tuned)
        yield Specimen(f"upsample_sigmoid_sums {name} backward", self.backward, self.tuned)

    @property
    def _options(self) -> tuple[SigmoidOptions, Upsampling]:
        options = SigmoidOptions(255, self.gamma, None, self.smaller, self.mode, self.align_corners)
        return options, upsampling_between(self.sizes[2:], self.out, self.mode, self.align_corners)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Input, target and sums."""
        input, (images, classes, _, _) = make_tensor(self.sizes, self.dtype, device, self.channels_last), self.sizes
        if self.target is None:
            target = torch.randint(classes, (images, *self.out), device=device)
        else:
            target = torch.randint(2, (images, classes, *self.out), device=device).to(self.target)
        accumulation = torch.float64 if self.dtype == torch.float64 else torch.float32
        sums = CLASS_SUMS if self.gamma is None else ALL_SUMS
        return input, target, torch.empty((sums, images, classes), dtype=accumulation, device=device)

    def forward(self, device: torch.device) -> Call:
        """Prepares the sums."""
        tensors = self.tensors(device)

        def call() -> tuple[Tensor, ...]:
            upsample_sigmoid_sums.forward(tensors, *self._options)
            return (tensors[-1],)

        return call

    def backward(self, device: torch.device) -> Call:
        """Prepares their gradient."""
        input, target, sums = self.tensors(device)
        grads = fill(torch.empty_like(sums))
        tensors = grads, input, target, torch.empty_like(input)

        def call() -> tuple[Tensor, ...]:
            upsample_sigmoid_sums.backward(tensors, *self._options)
            return (tensors[-1],)

        return call


_ALL_ARGUMENTS = {"weighted": True, "label_smoothing": 0.1, "with_overlap": True}
_CASES = [
    # Each bucket's: what an interval holds, 4 x 4 pixels, 2 x 2, 2 x 1 or 1 x 1.
    _Upsampling((16, 150, 128, 128), (512, 512), predicted=True, tuned=True),
    _Upsampling((16, 19, 128, 256), (512, 1024), **_ALL_ARGUMENTS, tuned=True),
    _Upsampling((16, 19, 256, 256), (512, 512), predicted=True, tuned=True),
    _Upsampling((16, 19, 256, 256), (512, 512), **_ALL_ARGUMENTS),
    _Upsampling((4, 19, 256, 256), (512, 256), predicted=True),
    _Upsampling((4, 19, 256, 256), (512, 256), **_ALL_ARGUMENTS),
    _Upsampling((4, 21, 512, 512), (256, 256), predicted=True),
    _Upsampling((4, 21, 512, 512), (256, 256), **_ALL_ARGUMENTS),
    _Upsampling((2, 19, 128, 128), (512, 512), torch.float64, predicted=True),
    _Upsampling((2, 19, 128, 128), (512, 512), torch.float64, **_ALL_ARGUMENTS),
    _Upsampling((2, 19, 256, 256), (512, 512), torch.float64, **_ALL_ARGUMENTS, predicted=True),
    _Upsampling((2, 19, 256, 256), (512, 256), torch.float64, **_ALL_ARGUMENTS, predicted=True),
    _Upsampling((2, 19, 512, 512), (256, 256), torch.float64, **_ALL_ARGUMENTS, predicted=True),
    # What else changes the code: other dtypes, layouts, grids and arguments.
    _Upsampling(
        (8, 150, 128, 128), (512, 512), channels_last=True, target=torch.uint8, with_overlap=True, predicted=True
    ),
    _Upsampling((8, 150, 128, 128), (512, 512), torch.float32, weighted=True, reduction="none"),
    _Upsampling((8, 150, 128, 128), (512, 512), torch.float32, reduction="none", **_ALL_ARGUMENTS),
    _Upsampling(
        (8, 150, 128, 128), (512, 512), mode="nearest", target=torch.int32, label_smoothing=0.1, predicted=True
    ),
    _Upsampling((8, 19, 65, 129), (512, 1024), torch.float16, align_corners=True, label_smoothing=0.1, predicted=True),
    _Upsampling((8, 2, 256, 256), (512, 512), torch.float16, target=torch.int16, reduction="sum"),
    # Sizes: rows alone grow, intervals of many pixels, odd ratios, one logit, a small map, offsets past 2^31.
    _Upsampling((4, 19, 64, 512), (512, 512)),
    _Upsampling((4, 21, 16, 16), (512, 512)),
    _Upsampling((3, 21, 97, 129), (333, 501), torch.float32),
    _Upsampling((2, 5, 1, 1), (20, 20)),
    _Upsampling((1, 19, 4, 4), (16, 16)),
    _Upsampling((1, 150, 5000, 4000), (20000, 16000), **_ALL_ARGUMENTS, predicted=True),
]
_SIGMOIDS = [
    # Each bucket's, with the terms of all three kinds of losses, of masks and of labels.
    _SigmoidSums((16, 20, 128, 128), (512, 512), gamma=0.0, tuned=True),
    _SigmoidSums((16, 20, 128, 128), (512, 512), target=None, gamma=2.0),
    _SigmoidSums((16, 1, 256, 256), (512, 512)),
    _SigmoidSums((16, 1, 256, 256), (512, 512), torch.float32, target=torch.float32, smaller=True),
    _SigmoidSums((16, 20, 256, 256), (512, 512), target=torch.float32, gamma=2.0, align_corners=True),
    _SigmoidSums((4, 19, 256, 256), (512, 256), torch.float32, target=None, gamma=0.0),
    _SigmoidSums((4, 21, 512, 512), (512, 512), channels_last=True, target=torch.int64, gamma=2.0, mode="nearest"),
    _SigmoidSums((4, 21, 512, 512), (512, 512), target=None, gamma=2.0, mode="nearest"),
    *(
        _SigmoidSums((2, 19, *before), after, torch.float64, target=torch.float64, gamma=2.0)
        for before, after in (
            ((128, 128), (512, 512)), ((256, 256), (512, 512)), ((256, 256), (512, 256)), ((512, 512), (256, 256))
        )
    ),
]  # fmt: skip
UPSAMPLING = [specimen for case in [*_CASES, *_SIGMOIDS] for specimen in case.specimens()]
