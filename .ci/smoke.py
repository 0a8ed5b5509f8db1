"""What an installed wheel has to do: hold its files, load its kernels, and give a loss and its gradient."""

import importlib.metadata
from pathlib import Path

import torch
import torch.nn.functional as F

import fastseg

files = {str(file) for file in importlib.metadata.files("fastseg-kernels") or ()}
for name in ("py.typed", "fusion/backend.py", "kernels/cross_entropy.py", "kernels/tuned/nvidia-h200.json"):
    assert f"fastseg/{name}" in files, f"{name} is missing"
strange = [
    name for name in files if not name.startswith(("fastseg/", "fastseg_kernels-", "fastseg_kernels.libs/", "../"))
]
assert not strange, strange

backend = fastseg.info()["cpu"]
assert backend == "C++ kernels", backend
logits = torch.randn(2, 21, 16, 16, requires_grad=True)
labels = torch.randint(21, (2, 64, 64))
loss = fastseg.UpsampleCrossEntropyLoss()(logits, labels)
plain = F.cross_entropy(F.interpolate(logits, size=(64, 64), mode="bilinear"), labels)
torch.testing.assert_close(loss, plain)
torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(plain, logits))
print(f"fastseg {fastseg.__version__} from {Path(fastseg.__file__).parent}: {backend}, one loss and its gradient")
