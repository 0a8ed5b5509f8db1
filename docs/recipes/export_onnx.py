"""ONNX: a network of fastseg's layers runs where fastseg isn't installed."""

import onnxruntime
import torch

import fastseg

model = fastseg.models.FCN(num_classes=5).eval()
images = torch.rand(1, 3, 64, 64)
torch.onnx.export(model, (images,), "fcn.onnx", dynamo=True, verbose=False)  # PyTorch's own operators alone

session = onnxruntime.InferenceSession("fcn.onnx", providers=["CPUExecutionProvider"])
(logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
torch.testing.assert_close(torch.from_numpy(logits), model(images).detach(), rtol=1e-4, atol=1e-4)
