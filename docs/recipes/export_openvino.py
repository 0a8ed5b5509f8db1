"""OpenVINO: an exported program whose operators are PyTorch's own."""

import openvino
import torch

import fastseg

model = fastseg.models.FCN(num_classes=5).eval()
images = torch.rand(1, 3, 64, 64)
program = torch.export.export(model, (images,)).run_decompositions(fastseg.decompositions())
precision = {"INFERENCE_PRECISION_HINT": "f32"}  # by default OpenVINO takes bfloat16 where the CPU has it
compiled = openvino.Core().compile_model(openvino.convert_model(program), "CPU", precision)

logits = torch.from_numpy(compiled(images.numpy())[0])
torch.testing.assert_close(logits, model(images).detach(), rtol=1e-4, atol=1e-4)
